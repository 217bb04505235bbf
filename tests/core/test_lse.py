"""The check of another kernel's lse: every mistake is named, no honest rounding is, and it is made where it is due."""

import dataclasses
import math

import pytest
import torch

import attnstats
from attnstats import WAAD, Received, reference
from attnstats.core import arguments
from attnstats.core.lse import _exact as lse_of_rows
from attnstats.core.lse import _largest_rounding, _Rows
from attnstats.core.options import Options
from tests.cases import Case

LN2 = math.log(2.0)
CASES = {
    "plain": Case(),
    "padding": Case(padding="left"),
    "holes, some counted": Case(padding="holes", counted="some"),
    "window, sinks, softcap": Case(window_size=(5, 0), sinks=True, softcap=2.0),
    "not causal, window to both sides": Case(window_size=(4, 2), is_causal=False),
    "cross": Case(is_causal=False, query_length=5, key_length=60),
    "offset": Case(query_length=7, key_length=60, query_offset=11),
    "rows past the last key's window": Case(query_length=30, query_offset=30, window_size=(5, 0)),
    "a batch row without keys": Case(padding="all"),
    "decode": Case(query_length=1, key_length=60, group=3),
    "packed": Case(packed=((9, 9), (0, 4), (4, 0), (21, 30)), sinks=True, counted="some"),
    "packed, window, not causal": Case(packed=((9, 9), (31, 31)), is_causal=False, window_size=(3, 3)),
    "bfloat16, bthd": Case(dtype="bfloat16", layout="bthd"),
    "float16, padding": Case(dtype="float16", padding="right"),
    "float64": Case(dtype="float64"),
}


def exact(case, **changed):
    """The lse of a case, some of its arguments changed, in float32."""
    wide = [x.double() for x in case.tensors()]
    return case.call(reference, wide, **changed).statistics.lse.float()


def from_lse(case, lse, **changed):
    query, key, _ = case.views(case.tensors())
    given = case.arguments() | {"statistics": [WAAD(4), Received()]} | changed
    if given["is_causal"] is False and case.query_length != case.key_length and case.query_offset is None:
        given["statistics"] = [Received()]
    return attnstats.statistics_from_lse(query, key, lse, **given)


@pytest.mark.parametrize("name", CASES)
def test_an_lse_of_these_arguments_passes(name):
    case = CASES[name]
    lse = exact(case)
    from_lse(case, lse)
    from_lse(case, lse / LN2, lse_base="2")
    found = case.call(attnstats, case.tensors(), **case.arguments()).statistics.lse
    from_lse(case, found)  # of torch's kernel and of ours, in half precision too
    from_lse(case, lse.masked_fill(lse == -torch.inf, 0.0))  # rows that see nothing


@pytest.mark.parametrize("name", CASES)
def test_a_wrong_base_and_zeros_are_named_in_every_call(name):
    case = CASES[name]
    lse = exact(case)
    for wrong, base, looks in (
        (lse / LN2, "e", "a log to base 2: pass lse_base='2'"),
        (lse, "2", "a natural log: pass lse_base='e'"),
        (torch.zeros_like(lse), "e", "zero everywhere"),
    ):
        with pytest.raises(ValueError, match=f"^lse: not the natural log.*{looks}.*check=False"):
            from_lse(case, wrong, lse_base=base)
        from_lse(case, wrong, lse_base=base, check=False)


LARGE = Case(query_length=64, key_length=64)


@pytest.mark.parametrize(
    ("case", "kernel", "looks"),
    [
        (LARGE, {"is_causal": False}, "without the causal mask"),
        (Case(is_causal=False), {"is_causal": True}, "with a causal mask, for is_causal=False"),
        (Case(window_size=(5, 0)), {"window_size": None}, "without window_size"),
        (Case(window_size=(5, 2), is_causal=False), {"window_size": None}, "without window_size"),
        (Case(padding="left"), {"key_padding_mask": None}, "without the mask of padding"),
        (Case(sinks=True), {"sinks": None}, "without sinks"),
        (Case(softcap=0.5), {"softcap": None}, "without softcap"),
        (LARGE, {"scale": 1.0}, r"without scale=0\.25"),
        (Case(query_length=9, key_length=60), {"query_offset": 0}, "whose first query is at 0, not at 51"),
        (
            Case(query_length=9, key_length=60, query_offset=7),
            {"query_offset": 51},
            "whose first query is at Tk - Tq, not at 7",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_a_kernel_did_otherwise_is_named(case, kernel, looks):
    with pytest.raises(ValueError, match=rf"kernel {looks}"):
        from_lse(case, exact(case, **kernel))


def test_the_default_scale_instead_of_the_given_one_is_named():
    with pytest.raises(ValueError, match=r"with scale 1 / sqrt\(head_dim\), not 0\.7"):
        from_lse(LARGE, exact(LARGE), scale=0.7)


def test_a_dense_mask_of_the_reference():
    case = Case(is_causal=False, group=1)
    bias = torch.randn(37, 37)
    lse = exact(case, attn_mask=bias.double())
    from_lse(case, lse, attn_mask=bias, backend="reference")
    with pytest.raises(ValueError, match="kernel without attn_mask"):
        from_lse(case, exact(case), attn_mask=bias, backend="reference")


@pytest.mark.parametrize(
    ("change", "looks"),
    [
        (lambda lse: lse.bfloat16().float(), r"rounded to torch\.bfloat16"),
        (lambda lse: lse.half().float(), r"rounded to torch\.float16"),
        (lambda lse: lse[:, [2, 0, 3, 1]], "Its heads look out of order"),
        (lambda lse: lse.flip(0), "Its batch rows look out of order"),
        (lambda lse: lse.flip(-1), "Its rows look out of order: in reverse"),
        (lambda lse: lse.transpose(1, 2).reshape(lse.shape), "Its rows look out of order: .*reshaped"),
        (lambda lse: lse + 0.5, "counted keys that aren't passed"),
        (lambda lse: lse - 0.5, "left out keys that are passed"),
        (lambda lse: lse.exp(), "sums of exp"),
        (lambda lse: lse + torch.tensor([0.5, -0.5])[:, None, None], "must be those that the kernel used"),
        (lambda lse: torch.full_like(lse, -torch.inf), "left out keys"),
        (lambda lse: torch.full_like(lse, torch.inf), "counted keys"),
    ],
)
def test_what_the_numbers_tell(change, looks):
    with pytest.raises(ValueError, match=looks):
        from_lse(LARGE, change(exact(LARGE)))


def test_packed_sequences_taken_for_one_are_named():
    case = Case(packed=((20, 20), (31, 31)))
    one = Case(batch=1, query_length=51, key_length=51)
    query, key, value = case.tensors()
    lse = attnstats.attention(query, key, value, enable_gqa=True).statistics.lse[0]
    assert one.query_length == case.query_length
    with pytest.raises(ValueError, match=r"in head \d, token \d+ .*the packed sequences for one"):
        from_lse(case, lse)


@pytest.mark.parametrize("size", [10.0, 300.0, 3000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_rounding_of_large_scores_is_no_mistake(size, dtype):
    """Key biases of real models: |lse| of 3,000."""
    query, key = torch.randn(2, 1, 2, 200, 64, dtype=torch.float64).to(dtype)
    query[..., -1], key[..., -1] = math.sqrt(8 * size), math.sqrt(8 * size)
    lse = attnstats.attention(query, key, key).statistics.lse
    assert size / 2 < float(lse.max()) < 2 * size
    attnstats.statistics_from_lse(query, key, lse, statistics=["waad"])
    scores = (query.float() @ key.float().mT).mul_(0.125)
    hidden = torch.ones(200, 200, dtype=torch.bool).triu(1)
    by_eager = scores.masked_fill(hidden, -torch.inf).logsumexp(-1)
    attnstats.statistics_from_lse(query, key, by_eager, statistics=["waad"])
    with pytest.raises(ValueError, match="lse_base='2'"):
        attnstats.statistics_from_lse(query, key, by_eager / LN2, statistics=["waad"])
    with pytest.raises(ValueError, match="rounded to"):
        attnstats.statistics_from_lse(query, key, by_eager.bfloat16().float(), statistics=["waad"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("length", [1, 37, 300])
def test_eager_attention_in_half_precision_passes(dtype, length):
    """Its scores are rounded to the dtype, and its lse is not."""
    case = Case(query_length=length, key_length=length, dtype=dtype, head_dim=24, spread=3.0)
    lse = case.call(reference, case.tensors(), enable_gqa=True).statistics.lse
    from_lse(case, lse)
    if length > 1:
        assert float((lse - exact(case)).abs().max()) > 2**-10
        with pytest.raises(ValueError, match="rounded to"):
            from_lse(case, lse.to(getattr(torch, dtype)).float())
        with pytest.raises(ValueError, match="lse_base='2'"):
            from_lse(case, lse / LN2)


def test_an_exponential_good_to_2_to_minus_14_passes():
    lse = exact(LARGE)
    from_lse(LARGE, lse + 2**-12)
    from_lse(LARGE, lse - 2**-12)
    with pytest.raises(ValueError, match="counted keys"):
        from_lse(LARGE, lse + 2**-10)


def test_rows_with_nan_show_it_and_are_no_mistake():
    query, key, _ = Case(batch=1, group=1).tensors()
    query[0, 0, 0] = torch.nan
    lse = reference.attention(query, key, key).statistics.lse
    assert lse.isnan().any()
    stats = attnstats.statistics_from_lse(query, key, lse, statistics=["waad"])
    assert stats["waad"][0, 0, 0].isnan()
    with pytest.raises(ValueError, match="lse_base='2'"):
        attnstats.statistics_from_lse(query, key, lse / LN2, statistics=["waad"])


def test_parts_that_were_merged_need_no_check():
    """An lse of all keys beside some of them: refused, and with check=False the shares of A of these keys."""
    case = Case(is_causal=False, group=1)
    query, key, _ = case.tensors()
    whole = attnstats.attention(query, key, key, statistics=["received"], is_causal=False).statistics
    part = {"statistics": ["received"], "is_causal": False}
    with pytest.raises(ValueError, match="counted keys that aren't passed"):
        attnstats.statistics_from_lse(query, key[:, :, :20], whole.lse, **part)
    found = attnstats.statistics_from_lse(query, key[:, :, :20], whole.lse, check=False, **part)
    torch.testing.assert_close(found["received"], whole["received"][:, :, :20])


def test_it_costs_a_few_rows(monkeypatch):
    """No row of the map but five of each head, in blocks of keys that stay small."""
    from attnstats.core import lse as module

    case = Case(batch=1, key_heads=3, group=2, query_length=400, key_length=400)
    lse = exact(case)
    of_one = from_lse(case, lse)["waad"]
    sizes, softcap = [], module.softcap_

    def spy(scores, cap):
        sizes.append(scores.numel())
        return softcap(scores, cap)

    monkeypatch.setattr(module, "softcap_", spy)
    from_lse(case, lse)
    assert sizes == [6 * 5 * 400]
    monkeypatch.setattr(module, "CHUNK", 400 * 16)
    assert torch.equal(from_lse(case, lse)["waad"], of_one)
    assert sizes[1:] == [2 * 5 * 400] * 3


def test_in_a_graph_only_when_asked():
    query, key, _ = LARGE.tensors()
    wrong = exact(LARGE) / LN2

    def call(query, key, lse, check):
        stats = attnstats.statistics_from_lse(query, key, lse, statistics=["waad"], enable_gqa=True, check=check)
        return stats["waad"] + 1

    compiled = torch.compile(call, backend="eager", fullgraph=True)
    compiled(query, key, wrong, None)
    compiled(query, key, wrong, False)
    compiled(query, key, exact(LARGE), True)
    with pytest.raises(ValueError, match="lse_base='2'"):
        compiled(query, key, wrong, True)


def test_on_another_device_only_when_asked():
    from attnstats import functional

    on_gpu = type("Fake", (), {"device": torch.device("cuda")})
    assert not functional._checks(None, on_gpu())
    assert functional._checks(True, on_gpu())
    assert functional._checks(None, torch.zeros(1))


def test_check_is_true_false_or_none():
    with pytest.raises(TypeError, match=r"check must be True, False or None.*got 'yes'"):
        from_lse(LARGE, exact(LARGE), check="yes")


def test_tf32_products_pass_on_a_gpu_alone():
    query, key, _ = (20 * x for x in Case(1, 1, 1, 64, 64).tensors())
    rows = torch.arange(64)[None]
    cut = [(x.view(torch.int32) & ~0x1FFF).view(torch.float32).double() for x in (query, key)]
    here = arguments.resolve(query, key, None, Options(enable_gqa=True))
    on_gpu = dataclasses.replace(here, device=torch.device("cuda"))
    exact, by_tf32 = (
        lse_of_rows(*x, here, _Rows(rows, torch.ones(1, 1, 1).bool()), torch.float64) for x in ((query, key), cut)
    )
    error = (by_tf32.lse - exact.lse).abs()
    assert not (error <= _largest_rounding(exact, here, True)).all()
    assert (error <= _largest_rounding(exact, on_gpu, True)).all()
    halves = dataclasses.replace(on_gpu, dtype=torch.bfloat16)  # whose products are exact
    assert torch.equal(_largest_rounding(exact, halves, False), _largest_rounding(exact, here, True))


def test_an_approximate_tanh_passes():
    query, key, _ = (20 * x for x in Case(1, 1, 1, 64, 64).tensors())
    capped = (query.double() @ key.double().mT).mul_(0.25 / 50).tanh_().mul_(50)
    hidden = torch.ones(64, 64, dtype=torch.bool).triu(1)
    lse = (capped * (1 + 2**-11)).masked_fill(hidden, -torch.inf).logsumexp(-1).float()
    attnstats.statistics_from_lse(query, key, lse, statistics=["waad"], softcap=50.0)
    assert float((lse.double() - capped.masked_fill(hidden, -torch.inf).logsumexp(-1)).abs().max()) > 0.02
