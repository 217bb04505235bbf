"""The border: every bad argument gets one error that names it; and the O(T) facts against dense counts."""

import pytest
import torch

import attnstats
from attnstats import FAI, WAAD
from attnstats.core.arguments import resolve
from attnstats.core.geometry import Geometry
from attnstats.core.options import Options
from tests.cases import Case

Q, K, V = Case(batch=2, key_heads=2, group=2).tensors()  # (2, 4, 37, 16), (2, 2, 37, 16) twice


@pytest.mark.parametrize(
    ("changed", "error", "match"),
    [
        ({"query": Q[0]}, ValueError, r"query must have 4 dimensions.*\(4, 37, 16\)"),
        ({"key": [1, 2]}, TypeError, "key must be a tensor, got list"),
        ({"value": V[:, :, :0]}, ValueError, "value is empty"),
        ({"query": Q.int()}, TypeError, "query must be float16"),
        ({"key": K.half()}, TypeError, r"key must have query's dtype torch.float32, got torch.float16"),
        ({"key": K.to("meta")}, ValueError, "key must be on query's device cpu, got meta"),
        ({"key": K[:1]}, ValueError, "key must have query's batch size 2, got 1"),
        ({"key": K[..., :8]}, ValueError, "key must have query's head_dim 16, got 8"),
        ({"value": V[:, :, :5]}, ValueError, "value must have key's heads and length"),
        ({"query": Q[:, :3]}, ValueError, "key: the 3 query heads must be a multiple of its heads, got 2"),
        ({"enable_gqa": False}, ValueError, "enable_gqa=False.*pass True"),
        ({"key": K[:, :, :5], "value": V[:, :, :5]}, ValueError, "is_causal.*Tq=37, Tk=5.*query_offset"),
        ({"query_offset": -1}, ValueError, "query_offset must be an integer >= 0, got -1"),
        ({"query_offset": 1.5}, ValueError, "query_offset"),
        ({"query_offset": True}, ValueError, "query_offset must be an integer >= 0, got True"),
        ({"scale": True}, ValueError, "scale must be a finite number .*got True"),
        ({"scale": float("nan")}, ValueError, "scale must be a finite number"),
        ({"query_mask": torch.ones(2, 37)}, TypeError, r"query_mask must be a bool tensor, got torch.float32.*\.bool"),
        ({"query_mask": torch.ones(2, 36).bool()}, ValueError, r"query_mask must have shape \(2, 37\), got \(2, 36\)"),
        ({"key_padding_mask": [True]}, TypeError, "key_padding_mask must be a bool tensor, got list"),
        ({"key_padding_mask": torch.ones(2, 37).bool().to("meta")}, ValueError, "key_padding_mask must be on query's"),
        ({"attn_mask": torch.ones(3, 1, 1, 37).bool()}, ValueError, r"attn_mask must broadcast to \(2, 4, 37, 37\)"),
        ({"attn_mask": torch.ones(1, 1, 1, 37).int()}, TypeError, "attn_mask must be bool or query's dtype"),
        ({"attn_mask": 3}, TypeError, "attn_mask must be a tensor"),
        ({"statistics": [WAAD(), "wad"]}, ValueError, "statistics: unknown name 'wad'; the catalogue has waad"),
        (
            {"statistics": [attnstats.PooledMap(38, 2)]},
            ValueError,
            "query_segments=38 bins are more than the length 37",
        ),
        (
            {"is_causal": False, "query": Q[:, :, :5], "statistics": [WAAD()]},
            ValueError,
            "cross-attention.*query_offset",
        ),
    ],
)
def test_bad_arguments_are_named(changed, error, match):
    arguments = {"query": Q, "key": K, "value": V, "enable_gqa": True} | changed
    with pytest.raises(error, match=match):
        attnstats.attention(**arguments)
    with pytest.raises(error, match=match):
        attnstats.reference.attention(**arguments)


def geometry(case: Case) -> Geometry:
    return resolve(*case.tensors(), Options(**case.arguments()))


@pytest.mark.parametrize("padding", ["none", "left", "holes"])
@pytest.mark.parametrize("counted", ["all", "some"])
@pytest.mark.parametrize(("queries", "keys", "offset"), [(20, 20, None), (7, 20, None), (20, 12, 5)])
def test_counts_equal_dense_counts(padding, counted, queries, keys, offset):
    case = Case(query_length=queries, key_length=keys, query_offset=offset, padding=padding, counted=counted)
    facts = geometry(case)
    counts = facts.query_mask
    counts = torch.ones(case.batch, queries, dtype=torch.bool) if counts is None else counts
    distance = (torch.arange(queries) + facts.offset)[:, None] - torch.arange(keys)
    for statistic in (FAI(0, 0), FAI(2, 9), FAI(3, None), FAI(50, 60)):
        dense = (counts[:, :, None] & statistic.weight(distance)).sum(1)
        assert torch.equal(facts.queries_at_distance(*statistic.horizon), dense), statistic
    seen = (distance >= 0).expand(case.batch, -1, -1)
    if facts.key_mask is not None:
        seen = seen & facts.key_mask[:, None]
    assert torch.equal(facts.live(), seen.any(-1))
    assert facts.visible_pairs() == int((distance >= 0).sum())


def test_the_last_counted_queries():
    mask = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 1, 0, 0]], dtype=torch.bool)
    facts = resolve(Q[:, :, :5], K, V, Options(enable_gqa=True, query_mask=mask))
    expected = torch.tensor([[0, 0, 1, 1, 0], [0, 0, 1, 0, 0]], dtype=torch.bool)
    assert torch.equal(facts.query_mask_of(2), expected)


@pytest.mark.parametrize(
    ("queries", "keys", "options", "tail"),
    [
        (10, 10, {"is_causal": False}, 0.0),
        (10, 11, {"is_causal": False, "query_offset": 0}, 10.0),
        (11, 10, {"is_causal": False, "query_offset": 0}, 10.0),
        (10, 40, {"query_offset": 0}, 0.0),
        (40, 40, {"window_size": (9, 0)}, 0.0),
        (40, 40, {"window_size": (10, 0)}, 10.0),
    ],
)
def test_a_tail_that_some_pair_has(queries, keys, options, tail):
    x = torch.zeros(1, 1, 40, 4)
    facts = resolve(x[:, :, :queries], x[:, :, :keys], x[:, :, :keys], Options(statistics=[WAAD(10)], **options))
    assert facts.tail_of(WAAD(10)) == tail


def test_an_lse_that_is_not_finite_is_nan_where_every_row_sees_a_key():
    geometry = resolve(Q, K, V, Options(enable_gqa=True))
    lse = torch.tensor([1.5, -0.0, torch.inf, -torch.inf, torch.nan, 3e38]).repeat(2, 4, 7)[..., :37]
    expected = lse.masked_fill(~lse.isfinite(), torch.nan)
    found = geometry.nan_without_softmax(lse)
    assert torch.equal(found.view(torch.int32)[~found.isnan()], expected.view(torch.int32)[~expected.isnan()])
    assert torch.equal(found.isnan(), expected.isnan())
