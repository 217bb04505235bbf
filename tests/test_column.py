"""kernels/column.py: full-horizon columns over blocks, segments and query masks."""

import pytest
import torch

import attnstats
from attnstats import FAI, PooledMap, Received, reference
from tests.cases import Case


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize(("queries", "keys"), [(70, 70), (5, 70), (33, 64)])
def test_columns_over_blocks(is_causal, queries, keys, device):
    case = Case(
        batch=1, group=3, query_length=queries, key_length=keys, is_causal=is_causal, query_offset=keys - queries
    )
    query, key, value = case.tensors(device)
    bounds = (0, 1, queries // 2 + 1, queries)
    asked = [
        Received(),
        Received(2),
        FAI(0, None),
        FAI(40, None),
        PooledMap(bounds, (0, 31, 33, keys)),
        PooledMap(1, 1),
    ]
    wide = [x.double() for x in (query, key, value)]
    _, expected = reference.attention(*wide, statistics=asked, **case.arguments(device))
    found = attnstats.statistics_from_lse(
        query, key, expected.lse.float(), statistics=asked, backend="triton", **case.arguments(device)
    )
    for s in asked:
        torch.testing.assert_close(found[s].double(), expected[s], rtol=1e-5, atol=2e-5)


def received(spoiled, device):
    """Received attention with a query that doesn't count, as it was drawn and overwritten."""
    query, key, _ = Case(batch=1, group=1).tensors(device)
    counted = torch.ones(1, 37, dtype=torch.bool, device=device)
    counted[:, 5] = False
    overwritten = query.clone()
    overwritten[:, :, 5] = spoiled
    arguments = {"statistics": ["received"], "query_mask": counted, "backend": "triton"}
    return [attnstats.attention(x, key, key, **arguments).statistics["received"] for x in (query, overwritten)]


def test_rows_of_large_scores_that_do_not_count_leave_no_trace(device):
    expected, found = received(1e4, device)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("spoiled", [torch.nan, torch.inf])
def test_rows_of_nan_that_do_not_count_leave_no_trace(spoiled, device):
    expected, found = received(spoiled, device)
    assert torch.equal(found, expected)
