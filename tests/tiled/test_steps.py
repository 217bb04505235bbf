"""Statistics of a step out of pages, against the reference on each request alone."""

import itertools

import pytest
import torch

import attnstats
from attnstats import FAI, WAAD, Entropy, LocalMass, MaxLogit, MeanDistance, Received, SegmentMass
from attnstats.tiled import steps

KINDS = (WAAD(3), LocalMass(4), MeanDistance(), Entropy(), MaxLogit(), FAI(2, 9), FAI(5, None), Received())
pytestmark = pytest.mark.skipif(not steps.computes(KINDS), reason="the library was not compiled")

REQUESTS = ((1, 1), (1, 70), (5, 5), (3, 40), (40, 97), (1, 130))  # new tokens, keys


def pages(size, heads, dim, dtype, packed, seed=0):
    """Queries, a cache with the keys of `REQUESTS` in shuffled pages of NaN, its block table, and the keys."""
    generator = torch.Generator("cpu").manual_seed(seed)
    counts = [-(-keys // size) for _, keys in REQUESTS]
    order = (torch.randperm(sum(counts), generator=generator) + 1).tolist()
    cache = torch.full((sum(counts) + 1, size, heads, dim), torch.nan, dtype=dtype)
    if packed:  # as vLLM's for CPUs: a head's part of a block is [dim][size]
        cache = torch.full((sum(counts) + 1, heads, dim, size), torch.nan, dtype=dtype).permute(0, 3, 1, 2)
    table = torch.zeros(len(REQUESTS), max(counts), dtype=torch.int32)
    query, keys = [], []
    for i, (new, length) in enumerate(REQUESTS):
        own = [order.pop() for _ in range(counts[i])]
        table[i, : len(own)] = torch.tensor(own)
        key = torch.randn(length, heads, dim, generator=generator).to(dtype)
        for s in range(length):
            cache[own[s // size], s % size] = key[s]
        keys.append(key)
        query.append(torch.randn(new, 3 * heads, dim, generator=generator).to(dtype))
    return torch.cat(query), cache, table, keys


@pytest.mark.parametrize("settings", [{}, {"left": 20}, {"softcap": 2.0}, {"sinks": True}, {"counted": True}])
@pytest.mark.parametrize(("size", "packed"), [(16, False), (32, True), (64, True), (5, False)])
def test_every_request_is_as_alone(settings, size, packed):
    compare(torch.float32, settings, size, packed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    compare(dtype, {}, 32, True)
    compare(dtype, {}, 16, False)


@pytest.mark.parametrize("lanes", [4, 8, 16])
def test_every_set_of_instructions(lanes, monkeypatch):
    monkeypatch.setattr(steps, "lanes", lanes)
    compare(torch.float32, {"left": 33}, 32, True)


BOUNDS = [0, *itertools.accumulate(new for new, _ in REQUESTS)]
LENGTHS = [keys for _, keys in REQUESTS]


def sums_of(query, cache, table, counted=None, times=1, **settings):
    plan = steps.StepPlan(KINDS, query.shape[1], table, BOUNDS, LENGTHS, counted)
    results = {s: plan.zeros(s) for s in KINDS}
    for _ in range(times):
        plan.add(results, query, cache, scale=0.3, **settings)
    return plan, results


def compare(dtype, settings, size, packed):
    query, cache, table, keys = pages(size, 2, 24, dtype, packed)
    settings = dict(settings)
    sinks = torch.linspace(-1, 2, 6) if settings.pop("sinks", False) else None
    counted = torch.arange(len(query)) % 3 != 1 if settings.pop("counted", False) else None
    plan, results = sums_of(query, cache, table, counted, sinks=sinks, **settings)
    for i, key in enumerate(keys):
        rows = slice(BOUNDS[i], BOUNDS[i + 1])
        expected = attnstats.attention(
            query[rows].transpose(0, 1)[None].double(),
            *[key.transpose(0, 1)[None].double()] * 2,
            statistics=[s.summed for s in KINDS],
            enable_gqa=True,
            scale=0.3,
            softcap=settings.get("softcap"),
            sinks=None if sinks is None else sinks.double(),
            window_size=(settings["left"], 0) if "left" in settings else None,
            query_mask=None if counted is None else counted[None, rows],
            backend="reference",
        ).statistics.tensors
        for s in KINDS:
            part, whole = results[s].split(plan.widths[s], 1)[i].double(), expected[s.summed][0]
            first = plan.first_key[s][i] if s.axis == "column" else 0
            torch.testing.assert_close(part, whole[:, first:], atol=3e-5, rtol=3e-5)
            assert not whole[:, :first].any()


def test_layers_are_added_in_the_heads_that_each_has():
    query, cache, table, _ = pages(16, 2, 24, torch.float32, False)
    _, once = sums_of(query, cache, table)
    chosen = torch.tensor([True, False, False, True, True, False])
    _, some = sums_of(query, cache, table, heads={WAAD(3): chosen, FAI(2, 9): chosen}, times=2)
    for s in (WAAD(3), FAI(2, 9)):
        torch.testing.assert_close(some[s], 2 * once[s] * chosen[:, None])
    torch.testing.assert_close(some[Entropy()], 2 * once[Entropy()])


def test_nan_in_a_query_stays_in_its_rows_and_request():
    query, cache, table, _ = pages(16, 2, 24, torch.float32, False)
    query[1, 0, 0] = torch.nan  # the token of the second request, first head
    plan, results = sums_of(query, cache, table)
    for s in (WAAD(3), Entropy(), MaxLogit()):
        assert results[s].isnan().nonzero().tolist() == [[0, 1]]
    received = results[Received()]
    assert received[0, 1:71].isnan().all()
    assert received.isnan().sum() == 70
    of_horizon, keys = results[FAI(2, 9)], plan.first_key[FAI(2, 9)][1] + torch.arange(plan.widths[FAI(2, 9)][1])
    start = plan.widths[FAI(2, 9)][0]
    near = of_horizon[0, start : start + len(keys)].isnan()
    assert torch.equal(near, (keys >= 69 - 9) & (keys <= 69 - 2))  # the token is at 69


def test_what_it_has_no_code_for_is_said():
    assert not steps.computes([SegmentMass((0, 4, None))])
    assert not steps.computes([Received(last=4)])
