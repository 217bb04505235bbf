"""NaN and inf in query or key: one rule on every path.

A row with NaN or +inf among its scores has no softmax: its statistics are NaN. So is a row whose scores are all -inf;
beside a sink that has one, with all the mass in the sink. A column is NaN where a row without a softmax counts for it:
the row sees the key, counts, and has a weight other than 0. Everything else stays as it was.
"""

import functools

import pytest
import torch
from torch import Tensor

import attnstats
from attnstats import FAI, LSE, WAAD, Entropy, LocalMass, MaxLogit, MeanDistance, PooledMap, Received, SinkMass
from attnstats import reference as reference_module
from attnstats.tiled import native

LENGTH = 60
STATISTICS = (
    WAAD(10),
    LocalMass(4),
    MeanDistance(),
    Entropy(),
    MaxLogit(),
    LSE(),
    SinkMass(3),
    FAI(10, 100),
    FAI(3, 20),
    FAI(0, None),
    FAI(5, None),
    Received(),
    Received(last=4),
    PooledMap(3, 4),
)
COUNTED = torch.arange(LENGTH)[None] % 2 == 0  # query 40 counts, 41 doesn't
SETTINGS = {
    "plain": {},
    "counted": {"query_mask": COUNTED},
    "not counted": {"query_mask": ~COUNTED},
    "window": {"window_size": (8, 0)},
    "softcap": {"softcap": 5.0},
}


def spoiled(where: str, number: float, queries: int = LENGTH) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 2, LENGTH, 16, generator=generator)
    key, value = (torch.randn(1, 1, LENGTH, 16, generator=generator) for _ in range(2))
    if where == "query":
        query[0, 1, 40, 3] = number
    elif where == "key":
        key[0, 0, 25, 3] = number
    return query[:, :, LENGTH - queries :], key, value


def nan_of(statistic, query, key, query_mask=None, window_size=None, softcap=None) -> Tensor:
    """Where the rule says NaN."""
    group, rows = query.shape[1] // key.shape[1], query.shape[2]
    scores = query.double() @ key.repeat_interleave(group, 1).double().mT
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    distance = (torch.arange(rows) + key.shape[2] - rows)[:, None] - torch.arange(key.shape[2])
    visible = distance >= 0
    if window_size is not None:
        visible &= distance <= window_size[0]
    no_softmax = ((scores.isnan() | (scores == torch.inf)) & visible).any(-1)  # (B, Hq, Tq)
    counts = torch.ones(1, rows, dtype=torch.bool) if query_mask is None else query_mask
    if statistic.axis == "row":
        return no_softmax
    if statistic.method == "pooled":
        reached = (no_softmax & counts[:, None])[..., None] & visible
        bounds = statistic.boundaries(rows, key.shape[2])
        sizes = [(torch.tensor(b[1:]) - torch.tensor(b[:-1])).tolist() for b in bounds]
        parts = [row.split(sizes[1], -1) for row in reached.split(sizes[0], -2)]
        return torch.stack([torch.stack([p.any(-1).any(-1) for p in row], -1) for row in parts], -2)
    if statistic.last_queries is not None:
        counts = counts & (counts.flip(-1).cumsum(-1).flip(-1) <= statistic.last_queries)
    return ((no_softmax & counts[:, None])[..., None] & visible & (statistic.weight(distance) != 0)).any(-2)


def check(stats, statistics, query, key, clean=None, **setting) -> None:
    for s in statistics:
        expected = nan_of(s, query, key, **setting)
        value = stats[s]
        # The largest score and the lse of a row may be inf.
        seen = ~value.isfinite() if s in (MaxLogit(), LSE()) else value.isnan()
        assert torch.equal(seen, expected), f"{s}: {int(seen.sum())} NaN, {int(expected.sum())} by the rule"
        if clean is not None:
            torch.testing.assert_close(value[~expected], clean[s][~expected], rtol=1e-4, atol=1e-5)


@pytest.fixture(params=["reference", "tiled", "plain", "triton"])
def attention(request, monkeypatch):
    if request.param == "reference":
        return reference_module.attention
    monkeypatch.setattr(native, "enabled", request.param != "plain")
    return functools.partial(attnstats.attention, backend="triton" if request.param == "triton" else "tiled")


def varlen(attention):
    """The same for packed sequences."""
    if attention is reference_module.attention:
        return reference_module.varlen_attention
    return functools.partial(attnstats.varlen_attention, **attention.keywords)


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS.keys())
@pytest.mark.parametrize("number", [torch.nan, torch.inf], ids=["nan", "inf"])
@pytest.mark.parametrize("where", ["query", "key"])
def test_one_rule(attention, where, number, setting):
    if "softcap" in setting and number == torch.inf:
        number = torch.nan  # a capped inf is finite
    query, key, value = spoiled(where, number)
    stats = attention(query, key, value, statistics=STATISTICS, enable_gqa=True, **setting)[1]
    clean = None
    if where == "query":  # other rows are those of a call without it
        clean = attention(*spoiled("", 0.0), statistics=STATISTICS, enable_gqa=True, **setting)[1]
    check(stats, STATISTICS, query, key, clean, **setting)


def test_few_queries_and_many_keys(attention):
    query, key, value = spoiled("key", torch.nan, queries=2)
    key, value = (torch.cat([x, torch.randn(1, 1, 200, 16)], 2) for x in (key, value))
    statistics = STATISTICS[:-1]
    stats = attention(query, key, value, statistics=statistics, enable_gqa=True)[1]
    check(stats, statistics, query, key)


def test_queries_beyond_the_last_reach_no_key(attention):
    """A tile's rows without a query are 8 to 11 positions behind this key."""
    query, key, value = spoiled("", 0.0)
    key[0, 0, 52, 3] = torch.nan
    statistics = (FAI(8, 100), FAI(8, 20))
    check(attention(query, key, value, statistics=statistics, enable_gqa=True)[1], statistics, query, key)


def test_a_row_of_nan_reaches_no_hidden_key(attention):
    query, key, value = spoiled("query", torch.nan)
    value.requires_grad_()
    padding = (torch.arange(LENGTH)[None] >= 3) & (torch.arange(LENGTH)[None] // 10 != 2)
    arguments = {"key_padding_mask": padding, "window_size": (18, 0), "enable_gqa": True}
    output, stats = attention(query, key, value, statistics=[PooledMap(3, 6)], **arguments)
    nan = stats["pooled_map"].isnan()
    assert nan[0, 1, 2].tolist() == [False, False, False, True, True, False]  # query 40 sees the keys 30 to 40
    assert int(nan.sum()) == 2
    (grad,) = torch.autograd.grad(output.sum(), value)
    assert torch.equal(grad.isnan().any(-1)[0, 0].nonzero()[:, 0], torch.arange(30, 41))


BOUNDS = torch.tensor([0, 20], dtype=torch.int32)
MINUS_INFINITY = {  # queries, keys, how many of the first keys have the score -inf, other arguments
    "one": (1, 1, 1, {}),
    "rows": (20, 20, 6, {}),
    "some see none": (20, 20, 6, {"key_padding_mask": torch.arange(20)[None] >= 3}),
    "packed": (20, 20, 6, {"cu_seqlens_q": BOUNDS, "cu_seqlens_k": BOUNDS}),
    "decode": (2, 300, 300, {}),
    "decode, one split": (2, 300, 200, {}),
}


@pytest.mark.parametrize("sinks", [None, (0.3, 2e38), (-400.0, -torch.inf)])
@pytest.mark.parametrize("name", MINUS_INFINITY)
def test_scores_of_minus_infinity(attention, name, sinks):
    queries, keys, hidden, arguments = MINUS_INFINITY[name]
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 2, queries, 16, generator=generator)
    key, value = (torch.randn(1, 1, keys, 16, generator=generator) for _ in range(2))
    query[..., 0] = query[..., 0].abs() + 0.1
    key[:, :, :hidden, 0] = -torch.inf
    tensors, function, truth = [query, key, value], attention, reference_module.attention
    if name == "packed":
        tensors = [x[0].transpose(0, 1) for x in tensors]
        function, truth = varlen(attention), reference_module.varlen_attention
    statistics = STATISTICS[:-1]
    given = {"statistics": statistics, "enable_gqa": True, "sinks": None if sinks is None else torch.tensor(sinks)}
    output, stats = function(*tensors, **arguments, **given)
    true_output, true = truth(*(x.double() for x in tensors), **arguments, **given)
    of_torch = isinstance(attention, functools.partial) and attention.keywords["backend"] == "tiled"
    if of_torch:  # torch's kernel for the CPU gives 0
        output = output.masked_fill(true_output.isnan(), torch.nan)
    torch.testing.assert_close(output.double(), true_output, rtol=1e-4, atol=1e-5, equal_nan=True)
    for s in statistics:
        found, expected = stats[s].double(), true[s]
        if s in (MaxLogit(), LSE()):  # NaN is as good as -inf
            found, expected = (x.masked_fill(~x.isfinite(), torch.nan) for x in (found, expected))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, equal_nan=True, msg=lambda m: f"{s}: {m}")  # noqa: B023


@pytest.mark.parametrize("backend", ["reference", "tiled", "triton"])
@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
def test_in_an_lse(backend, number):
    query, key, value = spoiled("", 0.0)
    lse = attnstats.attention(query, key, value, enable_gqa=True)[1].lse.clone()
    lse[0, 1, 40] = number
    statistics = [s for s in STATISTICS if s.from_lse]
    query[0, 1, 40, 3] = torch.nan  # what a kernel gives such an lse for
    arguments = {"statistics": statistics, "enable_gqa": True, "backend": backend}
    check(attnstats.statistics_from_lse(query, key, lse, **arguments), statistics, query, key)


def test_packed(attention):
    """A NaN in one sequence leaves the others."""
    query, key, value = spoiled("query", torch.nan)
    packed = [x[0].transpose(0, 1) for x in (query, key, value)]
    bounds = torch.tensor([0, 30, 45, LENGTH], dtype=torch.int32)
    statistics = STATISTICS[:-1]
    stats = varlen(attention)(*packed, cu_seqlens_q=bounds, statistics=statistics, enable_gqa=True)[1]
    part = slice(30, 45)
    for s in statistics:
        nan = ~stats[s].isfinite() if s in (MaxLogit(), LSE()) else stats[s].isnan()
        assert torch.equal(nan[None, :, part], nan_of(s, query[:, :, part], key[:, :, part])), s
        assert int(nan.sum()) == int(nan[:, part].sum()), s
