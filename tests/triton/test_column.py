"""kernels/column.py: full-horizon columns over blocks, segments and query masks."""

import pytest
import torch

import attnstats
from attnstats import FAI, PooledMap, Received, reference
from attnstats.tiled import native
from tests.cases import Case


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize(("queries", "keys"), [(70, 70), (5, 70), (33, 64)])
def test_columns_over_blocks(is_causal, queries, keys, device):
    case = Case(
        batch=1, group=3, query_length=queries, key_length=keys, is_causal=is_causal, query_offset=keys - queries
    )
    query, key, value = case.tensors(device)
    bounds = (0, 1, queries // 2 + 1, queries)
    statistics = [
        Received(),
        Received(2),
        FAI(0, None),
        FAI(40, None),
        PooledMap(bounds, (0, 31, 33, keys)),
        PooledMap(1, 1),
    ]
    wide = [x.double() for x in (query, key, value)]
    _, expected = reference.attention(*wide, statistics=statistics, **case.arguments(device))
    results = attnstats.statistics_from_lse(
        query, key, expected.lse.float(), statistics=statistics, backend="triton", **case.arguments(device)
    )
    for s in statistics:
        torch.testing.assert_close(results[s].double(), expected[s], rtol=1e-5, atol=2e-5)


@pytest.fixture(params=["reference", "tiled", "tiled plain", "triton"])
def backend(request, monkeypatch):
    name, _, plain = request.param.partition(" ")
    if plain:
        monkeypatch.setattr(native, "enabled", False)
    return name


@pytest.mark.parametrize("number", [1e4, torch.nan, torch.inf])
def test_a_bad_query_reaches_only_keys_that_it_sees_and_counts_for(number, backend, where):
    query, key, _ = Case(batch=1, group=1).tensors(where)
    query_mask = torch.ones(1, 37, dtype=torch.bool, device=where)
    overwritten = query.clone()
    overwritten[:, :, 20] = number
    statistics = [Received(), FAI(0, None), FAI(3, 9), PooledMap(37, 37)]

    def compute(query):
        arguments = {"statistics": statistics, "query_mask": query_mask, "backend": backend}
        return attnstats.attention(query, key, key, **arguments).statistics

    before, after = compute(query), compute(overwritten)
    for s in statistics:
        assert torch.equal(before[s][..., 21:], after[s][..., 21:]), s  # keys in its future
    query_mask[:, 20] = False
    before, after = compute(query), compute(overwritten)
    for s in statistics:
        assert torch.equal(before[s], after[s]), s
