"""Token credit against its token-by-token definition, on 10,000 random cases, and the cases that have a name."""

import random
from typing import Any, NamedTuple

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from attnstats import credit
from tests import plain_credit as plain

CASES = 10_000
BATCH = 250
WIDTH = 24


# Which of the drawn settings each credit has.
SETTINGS = {
    "local_chunk": ("q", "amp", "bottom"),
    "global_anchor": ("q", "amp", "bottom"),
    "coupled_rhythm": ("q", "amp", "alpha", "k", "tau_waad", "tau_delta"),
    "high_entropy": ("q", "amp", "bottom"),
    "high_entropy_selection": ("q",),
}


class Batch(NamedTuple):
    """The rows and settings of one call. Signals are NaN or infinite where they must not matter."""

    waad: torch.Tensor
    fai: torch.Tensor
    entropy: torch.Tensor
    mask: torch.Tensor
    valid: torch.Tensor
    settings: dict
    keep_mean: bool


def random_mask(draw: random.Random) -> list[bool]:
    """Left, right or no padding, a response of 0 to WIDTH tokens, holes in every third."""
    length = draw.choice([0, 1, 2, 3, draw.randint(4, WIDTH), WIDTH])
    left = draw.choice([0, WIDTH - length, draw.randint(0, WIDTH - length)])
    holes = draw.choice([0.0, 0.0, 0.4])
    return [left <= t < left + length and draw.random() >= holes for t in range(WIDTH)]


def random_signal(draw: random.Random) -> list[float]:
    """Few values with many ties, one value, or values of which no two are equal; exact in float32."""
    kind = draw.choice(["ties", "ties", "constant", "distinct"])
    if kind == "constant":
        return [draw.choice([0.0, 2.5])] * WIDTH
    step, largest = (4, 12) if kind == "ties" else (2**16, 2**22)
    return [draw.randint(0, largest) / step for _ in range(WIDTH)]


def random_batch(seed: int) -> Batch:
    draw = random.Random(seed)
    mask = torch.tensor([random_mask(draw) for _ in range(BATCH)])
    chances = torch.tensor([draw.choice([0.0, 0.0, 0.3, 1.0]) for _ in range(BATCH)])
    invalid = torch.tensor([[draw.random() for _ in range(WIDTH)] for _ in range(BATCH)]) < chances[:, None]
    waad, fai, entropy = (torch.tensor([random_signal(draw) for _ in range(BATCH)]) for _ in range(3))
    settings = {
        "q": draw.choice([0.0, 0.1, 0.2, 0.28, 0.4, 0.4, 0.4, 0.55, 0.7, 1.0]),
        "amp": draw.choice([1.0, 1.5, 3.0]),
        "alpha": draw.choice([0.0, 0.25, 0.5, 1.0]),
        "k": draw.choice([1, 2, 3, 40]),
        "tau_waad": draw.choice([None, None, 1.25]),
        "tau_delta": draw.choice([None, None, 0.75]),
        "bottom": draw.random() < 0.3,
    }
    return Batch(
        waad.masked_fill(~mask, torch.nan),
        fai.masked_fill(~mask | invalid, torch.nan),
        entropy.masked_fill(~mask, torch.inf),
        mask,
        ~invalid,
        settings,
        draw.random() < 0.3,
    )


def vectorised(name: str, batch: Batch) -> torch.Tensor:
    signals = {signal: getattr(batch, signal) for signal in plain.SIGNALS[name]}
    settings = {setting: batch.settings[setting] for setting in SETTINGS[name]}
    if name != "high_entropy_selection":
        settings["keep_mean"] = batch.keep_mean
    return getattr(credit, name)(**signals, **settings, mask=batch.mask)


def written_out(name: str, batch: Batch) -> torch.Tensor:
    settings = {setting: batch.settings[setting] for setting in SETTINGS[name]}

    def of_one(*signals):
        gamma = getattr(plain, name)(*signals, **settings)
        return plain.mean_kept(gamma) if batch.keep_mean and name != "high_entropy_selection" else gamma

    columns = [getattr(batch, signal).tolist() for signal in ("mask", *plain.SIGNALS[name])]
    return torch.tensor([plain.respond(mask, of_one, *row) for mask, *row in zip(*columns, strict=True)])


@pytest.mark.parametrize("name", plain.SIGNALS)
def test_as_written_out(name):
    for seed in range(CASES // BATCH):
        batch = random_batch(seed)
        actual, expected = vectorised(name, batch), written_out(name, batch)
        wrong = (~torch.isclose(actual, expected.to(actual.dtype), rtol=1e-6, atol=0)).nonzero().tolist()
        assert not wrong, f"random_batch({seed}) with {batch.settings} differs at (row, token) {wrong[:5]}"


def whole(*values: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A row of nothing but response, and its mask."""
    row = torch.tensor([values], dtype=torch.float64)
    return row, torch.ones_like(row, dtype=torch.bool)


def every_credit(waad, fai, mask, valid=None, **settings) -> dict[str, torch.Tensor]:
    return {
        "local_chunk": credit.local_chunk(waad, mask, **settings),
        "global_anchor": credit.global_anchor(fai, mask, valid=valid, **settings),
        "coupled_rhythm": credit.coupled_rhythm(waad, fai, mask, valid=valid, **settings),
        "random_tokens": credit.random_tokens(mask, **settings),
        "high_entropy": credit.high_entropy(fai, mask, **settings),
    }


@pytest.mark.parametrize(
    ("q", "length", "count"),
    [
        (0.4, 5, 2),
        (0.28, 25, 7),  # 7.000000000000001
        (0.07, 100, 7),  # 7.000000000000001
        (0.55, 100, 55),  # 55.00000000000001
        (0.4, 1, 1),
        (0.41, 5, 3),
        (0.0, 5, 0),
        (1.0, 5, 5),
        (1 / 3, 3, 1),
        (2 / 3, 3, 2),
    ],
)
def test_share_is_rounded_up_once(q, length, count):
    values, mask = whole(*range(length + 10))
    mask[:, length:] = False
    assert credit.top_share(values, mask, q).sum() == count


def test_every_share_of_every_length():
    mask = torch.ones(150, 150, dtype=torch.bool).tril()
    for percent in range(101):
        counts = credit.top_share(torch.rand(150, 150), mask, percent / 100).sum(1).tolist()
        assert counts == [-(-percent * length // 100) for length in range(1, 151)]


@pytest.mark.parametrize(
    ("waad", "expected"),
    [
        ([3.0], [1.5]),  # one token of one
        ([3.0, 5.0], [1.5, 1.0]),
        ([3.0, 4.0, 9.0], [1.5, 1.5, 1.0]),
        ([2.0, 2.0, 2.0, 2.0, 2.0], [1.5, 1.5, 1.0, 1.0, 1.0]),  # ties: the lower index
        ([5.0, 2.0, 2.0, 8.0, 8.0, 1.0], [1.5, 1.0, 1.5, 1.0, 1.5, 1.0]),
    ],
)
def test_local_chunk(waad, expected):
    assert credit.local_chunk(*whole(*waad))[0].tolist() == expected


# WAAD, FAI, settings and the weights: anchors are the q share by FAI, alpha is 1/2 and amp 3, so that an anchor has 3,
# a dominated one 2 and an intro token 2, and what is both adds up.
RHYTHMS = {
    "an anchor and its intro token": ([8, 3, 2, 2, 9], [0, 0, 9, 0, 0], {"q": 0.2}, [2, 1, 2, 1, 1]),
    "not dominated where WAAD is high": ([8, 3, 4, 2, 2], [0, 0, 9, 0, 0], {"q": 0.2}, [1, 1, 3, 1, 1]),
    "not dominated where delta is low": ([2, 2, 2, 9, 0], [0, 0, 9, 0, 0], {"q": 0.2, "tau_delta": 1}, [1, 1, 3, 1, 1]),
    "nothing before the first token": ([0, 8, 0, 8, 0], [9, 0, 0, 0, 0], {"q": 0.2}, [3, 1, 1, 1, 1]),
    "a window clipped to the response": ([9, 0, 5, 5, 5], [0, 9, 0, 0, 0], {"q": 0.2}, [2, 2, 1, 1, 1]),
    "k tokens are looked at and no more": (
        [9, 0, 1, 2, 1],
        [0, 0, 0, 0, 9],
        {"q": 0.2, "tau_delta": 5},
        [1, 1, 1, 1, 3],
    ),
    "one more is": ([9, 0, 1, 2, 1], [0, 0, 0, 0, 9], {"q": 0.2, "k": 4, "tau_delta": 5}, [2, 1, 1, 1, 2]),
    "the nearest of equals": ([4, 2, 4, 2, 0], [0, 0, 0, 0, 9], {"q": 0.2}, [1, 1, 1, 2, 2]),
    "two anchors with one intro token": ([9, 1, 1, 1, 9], [0, 8, 9, 0, 0], {"q": 0.4}, [2, 2, 2, 1, 1]),
    "an anchor that leads to an anchor": ([9, 1, 1, 9, 9], [9, 8, 0, 0, 0], {"q": 0.4}, [4, 2, 1, 1, 1]),
    "a dominated intro token": ([9, 5, 0, 9, 9], [0, 8, 9, 0, 0], {"q": 0.4, "k": 1, "tau_delta": 3}, [2, 3, 2, 1, 1]),
    "thresholds are reached, not passed": (
        [3, 1, 1, 9, 9],
        [0, 9, 0, 0, 0],
        {"q": 0.2, "tau_delta": 2},
        [2, 2, 1, 1, 1],
    ),
    "WAAD's threshold is too": ([3, 1, 0, 9, 9], [0, 9, 0, 0, 0], {"q": 0.2, "tau_waad": 1}, [2, 2, 1, 1, 1]),
    "the median is the lower one": ([9, 4, 1, 8], [0, 9, 0, 0], {"q": 0.25, "tau_delta": 0}, [2, 2, 1, 1]),
    "above the lower median": ([9, 4, 1, 3], [0, 9, 0, 0], {"q": 0.25, "tau_delta": 0}, [1, 3, 1, 1]),
    "delta's median leaves the last token out": ([5, 4, 4, 2, 9], [0, 9, 0, 0, 0], {"q": 0.2}, [2, 2, 1, 1, 1]),
}


@pytest.mark.parametrize("name", RHYTHMS)
def test_coupled_rhythm(name):
    waad, fai, settings, expected = RHYTHMS[name]
    signal, mask = whole(*waad)
    assert credit.coupled_rhythm(signal, whole(*fai)[0], mask, amp=3.0, **settings)[0].tolist() == expected


def test_coupled_sets_say_where_from():
    waad, mask = whole(9, 1, 1, 0, 9)
    sets = credit.coupled_sets(waad, whole(0, 8, 0, 9, 0)[0], mask)
    assert sets.anchor[0].tolist() == [False, True, False, True, False]
    assert sets.dominated[0].tolist() == [False, True, False, True, False]
    assert sets.intro[0].tolist() == [True, False, False, False, False]
    assert sets.lead[0].tolist() == [0, 1, 0, 3, 0]


def test_padding_and_holes_change_nothing():
    torch.manual_seed(0)
    waad, fai, valid = torch.rand(9), torch.rand(9), torch.rand(9) < 0.8
    places = [range(9), range(3, 12), range(11, 20), [0, 1, 2, 7, 8, 9, 10, 18, 19], range(0, 18, 2)]
    mask = torch.zeros(len(places), 20, dtype=torch.bool)
    signals = torch.full((3, len(places), 20), torch.nan)
    for row, tokens in enumerate(places):
        mask[row, list(tokens)] = True
        signals[:, row, list(tokens)] = torch.stack([waad, fai, valid.float()])
    found = every_credit(signals[0], signals[1], mask, None, keep_mean=True)
    found["coupled_rhythm"] = credit.coupled_rhythm(signals[0], signals[1], mask, valid=signals[2] == 1)
    del found["random_tokens"]
    for name, gamma in found.items():
        assert (gamma[~mask] == 1).all(), name
        weights = [row[counted] for row, counted in zip(gamma, mask, strict=True)]
        assert all(torch.equal(row, weights[0]) for row in weights), name


@pytest.mark.parametrize("keep_mean", [False, True])
def test_empty_masks(keep_mean):
    signal = torch.full((2, 6), torch.nan)
    mask = torch.zeros(2, 6, dtype=torch.bool)
    for name, gamma in every_credit(signal, signal, mask, keep_mean=keep_mean).items():
        assert (gamma == 1).all(), name
    assert (credit.high_entropy_selection(signal, mask) == 1).all()
    assert (credit.delta(signal, mask) == 0).all()


def test_empty_batches():
    signal, mask = torch.empty(0, 5), torch.empty(0, 5, dtype=torch.bool)
    assert all(gamma.shape == (0, 5) for gamma in every_credit(signal, signal, mask).values())


def test_without_valid_fai_nothing_is_amplified():
    waad, mask = torch.rand(2, 8), torch.ones(2, 8, dtype=torch.bool)
    nowhere = torch.full_like(waad, torch.nan)
    assert (credit.global_anchor(nowhere, mask, valid=~mask) == 1).all()
    assert (credit.coupled_rhythm(waad, nowhere, mask, valid=~mask) == 1).all()


def test_invalid_tokens_count_in_the_share_and_are_not_taken():
    fai, mask = whole(9, 8, 7, 6, 5, 4, 3, 2, 1, 0)
    valid = torch.tensor([[False] * 7 + [True] * 3])
    assert indices(credit.top_share(fai, mask, 0.4, valid)) == [7, 8, 9]
    assert indices(credit.top_share(fai, mask, 0.2, valid)) == [7, 8]
    assert indices(credit.top_share(fai, mask, 0.2, valid, bottom=True)) == [8, 9]


def indices(chosen: torch.Tensor) -> list[int]:
    return chosen[0].nonzero().flatten().tolist()


def test_mean_is_kept():
    torch.manual_seed(0)
    waad, fai, mask = torch.rand(20, 30), torch.rand(20, 30), torch.rand(20, 30) < 0.7
    for name, gamma in every_credit(waad, fai, mask, keep_mean=True).items():
        mean = gamma.masked_fill(~mask, 0).sum(1) / mask.sum(1)
        torch.testing.assert_close(mean, torch.ones(20), msg=name)
        assert (gamma > 1).any(), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype):
    torch.manual_seed(0)
    waad, fai = torch.randint(0, 40, (2, 5, 30)) / 4  # exact in all of them
    mask = torch.rand(5, 30) < 0.8
    expected = every_credit(waad.double(), fai.double(), mask)
    for name, gamma in every_credit(waad.to(dtype), fai.to(dtype), mask).items():
        if name != "random_tokens":
            assert gamma.dtype == dtype
            assert torch.equal(gamma.double(), expected[name]), name
    assert credit.delta(waad.to(dtype), mask).dtype == dtype


def test_weights_carry_no_gradient_and_inputs_stay():
    waad, fai = torch.rand(2, 2, 9, requires_grad=True)
    mask = torch.tensor([[True] * 9, [False] * 3 + [True] * 6])
    before = [x.detach().clone() for x in (waad, fai, mask)]
    gammas = every_credit(waad, fai, mask, mask)
    assert not any(gamma.requires_grad for gamma in gammas.values())
    assert all(torch.equal(x, old) for x, old in zip((waad, fai, mask), before, strict=True))
    advantages = torch.ones(2, requires_grad=True)
    assert credit.shape_advantages(advantages, gammas["local_chunk"]).requires_grad


def test_strides_don_t_matter():
    torch.manual_seed(0)
    waad, fai, mask = torch.rand(30, 7).t(), torch.rand(7, 60)[:, ::2], (torch.rand(30, 7) < 0.8).t()
    strided = credit.coupled_rhythm(waad, fai, mask)
    assert torch.equal(strided, credit.coupled_rhythm(waad.contiguous(), fai.contiguous(), mask.contiguous()))


def test_random_tokens():
    mask = torch.ones(4000, 10, dtype=torch.bool)
    mask[:, 7:] = False
    gamma = credit.random_tokens(mask, q=0.4, generator=torch.Generator().manual_seed(1))
    assert (gamma == 1.5).sum(1).eq(3).all()
    frequency = (gamma == 1.5).double().mean(0)
    assert (frequency[7:] == 0).all()
    assert (frequency[:7] - 3 / 7).abs().max() < 5 * (3 / 7 * 4 / 7 / 4000) ** 0.5
    assert torch.equal(gamma, credit.random_tokens(mask, q=0.4, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize(
    ("sign", "expected"),
    [
        ("both", [[1.0, 2.0], [-1.0, -2.0], [0.0, 0.0]]),
        ("positive", [[1.0, 2.0], [-1.0, -1.0], [0.0, 0.0]]),
        ("negative", [[1.0, 1.0], [-1.0, -2.0], [0.0, 0.0]]),
    ],
)
@pytest.mark.parametrize("shape", [(3,), (3, 1), (3, 2)])
def test_advantages(sign, expected, shape):
    advantages = torch.tensor([1.0, -1.0, 0.0])
    advantages = advantages if shape == (3,) else advantages[:, None].expand(shape)
    gamma = torch.tensor([[1.0, 2.0]] * 3)
    assert credit.shape_advantages(advantages, gamma, sign).tolist() == expected


def test_advantages_of_as_many_rows_as_tokens_are_of_rows():
    assert credit.shape_advantages(torch.tensor([1.0, 2.0]), torch.ones(2, 2)).tolist() == [[1.0, 1.0], [2.0, 2.0]]


SIGNAL, MASK = torch.rand(2, 5), torch.ones(2, 5, dtype=torch.bool)
WRONG: Any = 2.0


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: credit.local_chunk(SIGNAL, MASK.int()), TypeError, r"mask must be a bool tensor, got torch.int32"),
        (lambda: credit.local_chunk(SIGNAL.int(), MASK), TypeError, "waad must be a floating tensor"),
        (lambda: credit.local_chunk(SIGNAL[0], MASK[0]), ValueError, r"mask must be \(B, T\), got \(5,\)"),
        (lambda: credit.local_chunk(SIGNAL[:, :0], MASK[:, :0]), ValueError, "T of at least 1"),
        (lambda: credit.global_anchor(SIGNAL[:, :4], MASK), ValueError, r"fai must have the shape of mask \(2, 5\)"),
        (lambda: credit.global_anchor(SIGNAL, MASK, valid=MASK[:1]), ValueError, "valid must have the shape"),
        (lambda: credit.global_anchor(SIGNAL, MASK, valid=SIGNAL), TypeError, "valid must be a bool tensor"),
        (lambda: credit.local_chunk(SIGNAL, MASK, q=40), ValueError, r"q must be a share in \[0, 1\], got 40"),
        (lambda: credit.local_chunk(SIGNAL, MASK, q=1.01), ValueError, "q must be a share"),
        (lambda: credit.local_chunk(SIGNAL, MASK, q=float("nan")), ValueError, "q must be a share"),
        (lambda: credit.local_chunk(SIGNAL, MASK, amp=0.5), ValueError, "amp must be at least 1"),
        (lambda: credit.random_tokens(MASK, amp=float("inf")), ValueError, "amp must be at least 1 and finite"),
        (lambda: credit.coupled_rhythm(SIGNAL, SIGNAL, MASK, alpha=1.5), ValueError, r"alpha must be in \[0, 1\]"),
        (lambda: credit.coupled_rhythm(SIGNAL, SIGNAL, MASK, k=0), ValueError, "k must be an integer >= 1, got 0"),
        (lambda: credit.coupled_rhythm(SIGNAL, SIGNAL, MASK, k=WRONG), ValueError, "k must be an integer"),
        (lambda: credit.shape_advantages(SIGNAL[0], SIGNAL), ValueError, r"advantages must be \(B,\)"),
        (lambda: credit.shape_advantages(SIGNAL[:1], SIGNAL), ValueError, r"advantages must be \(B,\)"),
        (lambda: credit.shape_advantages(SIGNAL, SIGNAL, WRONG), ValueError, 'sign must be "both"'),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", SETTINGS)
def test_what_is_not_finite_is_named(name, value):
    batch = random_batch(3)
    signal = plain.SIGNALS[name][-2 if "valid" in plain.SIGNALS[name] else -1]
    row, token = (batch.mask & batch.valid).nonzero()[-1].tolist()
    getattr(batch, signal)[row, token] = value
    with pytest.raises(ValueError, match=f"{signal}: row {row} is {value} at token {token}"):
        vectorised(name, batch)


class Counter(TorchDispatchMode):
    """The number of operations that ran."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_no_loop_over_rows_or_tokens():
    counts = set()
    for rows, tokens in ((1, 10), (7, 10), (7, 300)):
        signal, mask = torch.rand(rows, tokens), torch.ones(rows, tokens, dtype=torch.bool)
        with Counter() as counter:
            every_credit(signal, signal, mask, mask, keep_mean=True)
        counts.add(counter.count)
    assert len(counts) == 1


def test_one_graph_for_every_length():
    torch.manual_seed(0)
    torch._dynamo.reset()
    compiled = CompileCounterWithBackend("eager")

    def shaped(waad, fai, mask, valid, advantages):
        gamma = credit.coupled_rhythm(waad, fai, mask, valid=valid, keep_mean=True)
        return credit.shape_advantages(advantages, gamma) * credit.local_chunk(waad, mask)

    graph = torch.compile(shaped, fullgraph=True, backend=compiled)
    for length in (40, 33, 21, 7):
        waad, fai = torch.rand(2, 3, length)
        mask = torch.rand(3, length) < 0.8
        arguments = waad, fai, mask, torch.rand(3, length) < 0.8, torch.rand(3)
        torch.testing.assert_close(graph(*arguments), shaped(*arguments))
    assert compiled.frame_count <= 2


def test_sixteen_bits_are_compared_in_float32():
    waad = torch.tensor([[8.0, 0.30078125, 0.0]], dtype=torch.bfloat16)
    fai, mask = torch.tensor([[0.0, 1.0, 0.0]], dtype=torch.bfloat16), torch.ones(1, 3, dtype=torch.bool)
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        sets = credit.coupled_sets(waad.to(dtype), fai.to(dtype), mask, q=0.3, tau_waad=0.3, tau_delta=1.0)
        assert not sets.dominated.any(), dtype  # in bfloat16 the threshold would be 0.30078125


@pytest.mark.parametrize("name", ["tau_waad", "tau_delta"])
def test_a_threshold_is_a_number(name):
    curve, mask = torch.rand(1, 4), torch.ones(1, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match=f"{name} must be a number, or None"):
        credit.coupled_rhythm(curve, curve, mask, **{name: float("nan")})
