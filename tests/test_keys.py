"""SegmentMass, TopKeys and query_weight: identities, ties, edges and errors. tests/test_features.py compares them with
the reference in every layout, tests/test_differentiable.py their gradients."""

import re

import pytest
import torch

import attnstats
from attnstats import FAI, WAAD, Entropy, PooledMap, Received, SegmentMass, SinkMass, TopKeys, reference
from attnstats.core.merging import merge_columns
from attnstats.tiled import native
from tests.cases import Case, check

BACKENDS = ("reference", "tiled", "plain", "triton")


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    """ "plain" is tiled without the compiled sums."""
    if request.param == "plain":
        monkeypatch.setattr(native, "enabled", False)
        return "tiled"
    return request.param


def run(case, statistics, backend, where, **changed):
    arguments = {"statistics": statistics, "backend": backend} | changed
    return case.call(attnstats, case.tensors(where), **arguments).statistics


CASES = {
    "causal": Case(),
    "full, padded": Case(is_causal=False, padding="left"),
    "window": Case(window_size=(9, 0)),
    "queries last": Case(query_length=11, key_length=40),
    "sinks": Case(sinks=True),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_segments_add_up(case, backend, where):
    """Those of all keys to the row's mass, finer ones to coarser ones, and the first to SinkMass."""
    n = case.key_length
    fine, coarse = SegmentMass((0, 4, 5, 5, 20, n)), SegmentMass((0, 5, None))
    stats = run(case, [fine, coarse, SegmentMass((0, n)), SegmentMass((4, 4)), SinkMass(4), Entropy()], backend, where)
    whole = stats[SegmentMass((0, n))][..., 0]
    torch.testing.assert_close(stats[coarse].sum(-1), whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(stats[fine][..., :2].sum(-1), stats[coarse][..., 0], rtol=1e-5, atol=1e-6)
    assert not stats[fine][..., 2].any()  # an empty one
    assert not stats[SegmentMass((4, 4))].any()
    if case.padding == "none":
        torch.testing.assert_close(stats[fine][..., 0], stats[SinkMass(4)], rtol=1e-5, atol=1e-6)
    if not case.sinks:
        assert torch.allclose(whole[stats.valid[coarse][:, None].expand_as(whole)], whole.new_tensor(1.0), atol=1e-5)


def test_segments_by_row_are_those_of_each_row(backend, where):
    case = Case()
    boundaries = torch.tensor([[0, 3, 30], [5, 5, -1]], device=where)
    found = run(case, [SegmentMass()], backend, where, segment_boundaries=boundaries)["segment_mass"]
    for row, bounds in enumerate(((0, 3, 30), (5, 5, None))):
        torch.testing.assert_close(found[row], run(case, [SegmentMass(bounds)], backend, where)["segment_mass"][row])


@pytest.mark.parametrize("count", [16, 17, 40, 130])
def test_any_number_of_segments(count, where, backend):
    """More than one narrow matmul of the kernels takes."""
    case = Case(batch=1, key_length=300, query_length=20, heads="some")
    bounds = tuple(range(0, 2 * count + 1, 2))
    check(case, backend, where, statistics=[SegmentMass(bounds), SegmentMass((0, 7, None))])
    check(case, backend, where, from_lse=True, statistics=[SegmentMass(bounds), Entropy()])


@pytest.mark.parametrize("k", [1, 2, 5, 16])
def test_of_equal_scores_the_first_keys(k, backend, where):
    query = torch.zeros(1, 2, 40, 16, device=where)
    values, indices = attnstats.attention(query, query, query, statistics=[TopKeys(k)], backend=backend).statistics[
        "top_keys"
    ]
    for t in range(40):
        count = min(k, t + 1)
        expected = [*range(count), *[-1] * (k - count)]
        assert indices[0, 1, t].tolist() == expected
        torch.testing.assert_close(values[0, 0, t, :count], values.new_full((count,), 1 / (t + 1)))
        assert not values[0, 0, t, count:].any()


def test_a_longer_list_begins_with_a_shorter_one(backend, where):
    stats = run(Case(key_length=90, query_length=90), [TopKeys(), TopKeys(4), TopKeys(16)], backend, where)
    for k in (1, 4):
        torch.testing.assert_close(stats[TopKeys(k)].values, stats[TopKeys(16)].values[..., :k], rtol=1e-6, atol=1e-7)
        assert torch.equal(stats[TopKeys(k)].indices, stats[TopKeys(16)].indices[..., :k])
    values = stats[TopKeys(16)].values
    assert (values.diff(dim=-1) <= 0).all()


def test_keys_whose_share_underflows_are_ranked_by_score(backend, where):
    """A of all but the first is 0 in float32."""
    key = torch.tensor([0.0, -900.0, -300.0, -600.0], device=where)[None, None, :, None].expand(1, 1, 4, 16)
    query = torch.full((1, 1, 4, 16), 1 / 4, device=where)
    top = attnstats.attention(query, key, key, statistics=[TopKeys(4)], is_causal=False, scale=1.0, backend=backend)
    values, indices = top.statistics["top_keys"]
    assert indices[0, 0, 0].tolist() == [0, 2, 3, 1]
    assert values[0, 0, 0].tolist() == [1, 0, 0, 0]


def test_rows_of_nan_have_no_keys(backend, where):
    query = torch.randn(1, 1, 40, 16, device=where)
    query[0, 0, 7, 3] = torch.nan
    asked = [TopKeys(), TopKeys(3), SegmentMass((0, 5, None))]
    stats = attnstats.attention(query, query.nan_to_num(), query, statistics=asked, backend=backend).statistics
    for s in asked[:2]:
        assert stats[s].values[0, 0, 7].isnan().all()
        assert (stats[s].indices[0, 0, 7] == -1).all()
        assert stats[s].values[0, 0, 8].isfinite().all()
    assert stats[asked[2]][0, 0, 7].isnan().all()
    assert stats[asked[2]][0, 0, 8].isfinite().all()


COLUMNS = (FAI(2, 9), FAI(0, None), Received(), Received(last=4), PooledMap(3, 4))


@pytest.mark.parametrize("case", [Case(), Case(padding="left"), Case(is_causal=False, group=1)], ids=str)
def test_a_weight_of_one_or_zero_is_a_mask(case, backend, where):
    mask = torch.rand(case.batch, case.query_length, generator=torch.Generator().manual_seed(1)).to(where) > 0.4
    by_mask = run(case, COLUMNS, backend, where, query_mask=mask)
    by_weight = run(case, COLUMNS, backend, where, query_weight=mask.float())
    for s in COLUMNS:
        torch.testing.assert_close(by_weight[s], by_mask[s], rtol=1e-6, atol=1e-7)
        assert torch.equal(by_weight.valid[s], by_mask.valid[s])
    torch.testing.assert_close(by_weight.counts[FAI(2, 9)], by_mask.counts[FAI(2, 9)].float())


def test_sums_are_linear_in_the_weight_and_means_free_of_its_size(backend, where):
    case, generator = Case(), torch.Generator().manual_seed(2)
    first, second = torch.rand(2, case.batch, case.query_length, generator=generator).to(where)
    sums = [Received(), PooledMap(3, 4)]
    one, other, both = (
        run(case, [*sums, FAI(2, 9)], backend, where, query_weight=u) for u in (first, second, 2 * first + second)
    )
    for s in sums:
        torch.testing.assert_close(both[s], 2 * one[s] + other[s], rtol=1e-5, atol=1e-5)
    scaled = run(case, [FAI(2, 9)], backend, where, query_weight=1000 * first)
    torch.testing.assert_close(scaled["fai"], one["fai"], rtol=1e-5, atol=1e-7)
    negative = run(case, sums, backend, where, query_weight=-first)
    torch.testing.assert_close(negative["received"], -one["received"], rtol=1e-6, atol=1e-6)


def test_a_mean_of_no_weight_is_not_valid(backend, where):
    case = Case()
    stats = run(case, [FAI(2, 9)], backend, where, query_weight=torch.zeros(2, case.query_length, device=where))
    assert not stats["fai"].any()
    assert not stats.valid["fai"].any()


def test_rows_that_do_not_count_spoil_no_weighted_column(backend, where):
    query = torch.randn(1, 1, 40, 16, device=where)
    key = query.clone()
    query[0, 0, 7] = torch.nan
    weight = torch.rand(1, 40, device=where) + 0.1
    weight[0, 7] = 0.0
    stats = attnstats.attention(
        query, key, key, statistics=COLUMNS[:3], query_weight=weight, backend=backend
    ).statistics
    assert all(stats[s].isfinite().all() for s in COLUMNS[:3])


def test_what_is_passed_is_read_at_the_call():
    """A later write into weights and boundaries changes neither results nor gradients."""
    query = torch.randn(1, 2, 20, 8, requires_grad=True)
    weight, boundaries = torch.rand(1, 20), torch.tensor([[0, 3, -1]])

    def call():
        return attnstats.attention(
            query, query, query, statistics=[FAI(1, 4), SegmentMass()], query_weight=weight,
            segment_boundaries=boundaries, differentiable=True,
        ).statistics  # fmt: skip

    def read(stats):
        loss = stats["fai"].square().sum() + stats["segment_mass"].square().sum()
        return stats.valid["fai"], stats.counts["fai"], *torch.autograd.grad(loss, query)

    expected = read(call())
    stats = call()
    weight.zero_()
    boundaries.zero_()
    assert all(map(torch.equal, read(stats), expected))


def test_in_a_graph():
    query, weight = torch.randn(2, 2, 24, 8), torch.rand(2, 24)
    boundaries = torch.tensor([[0, 2, 9], [1, 5, -1]])
    asked = [TopKeys(3), SegmentMass(), SegmentMass((0, 5, None)), FAI(1, 4)]

    def call(query):
        stats = attnstats.attention(
            query, query, query, statistics=asked, query_weight=weight, segment_boundaries=boundaries
        ).statistics
        return *stats["top_keys"], stats[asked[1]], stats[asked[2]], stats.valid[asked[1]], stats.counts["fai"]

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    for found, expected in zip(compiled(query), call(query), strict=True):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)


def test_from_sdpa_and_the_module():
    query = torch.randn(2, 4, 9, 8)
    asked = [TopKeys(2), SegmentMass((0, 3, None))]
    truth = reference.attention(query, query, query, statistics=asked).statistics
    with attnstats.patch_sdpa(statistics=asked) as calls:
        torch.nn.functional.scaled_dot_product_attention(query, query, query, is_causal=True)
        torch.nn.functional.scaled_dot_product_attention(query[:, :, :0], query, query)
    assert torch.equal(calls[0]["top_keys"].indices, truth["top_keys"].indices)
    torch.testing.assert_close(calls[0]["segment_mass"], truth["segment_mass"])
    assert calls[1]["top_keys"].indices.shape == (2, 4, 0, 2)
    assert calls[1]["segment_mass"].shape == (2, 4, 0, 2)
    assert calls[1].valid["segment_mass"].shape == (2, 0)
    with attnstats.patch_sdpa(statistics=asked[1:], reduce="heads") as calls:
        torch.nn.functional.scaled_dot_product_attention(query, query, query, is_causal=True)
    torch.testing.assert_close(calls[0]["segment_mass"], truth["segment_mass"].mean(1))
    module = attnstats.nn.MultiheadAttention(8, 2, batch_first=True, statistics=asked)
    module(query[:, 0], query[:, 0], query[:, 0], need_weights=False)
    assert module.statistics["top_keys"].values.shape == (2, 2, 9, 2)
    assert module.statistics["segment_mass"].shape == (2, 2, 9, 2)
    for make in (
        lambda: attnstats.patch_sdpa(statistics=[SegmentMass()]).__enter__(),
        lambda: attnstats.nn.MultiheadAttention(8, 2, statistics=[SegmentMass()]),
    ):
        with pytest.raises(ValueError, match="has no segment_boundaries"):
            make()
    with pytest.raises(ValueError, match=r"reduce='heads': TopKeys\(k=2\) names keys"):
        attnstats.patch_sdpa(statistics=asked, reduce="heads").__enter__()


def test_shards_of_the_queries_add_up_with_weights():
    query = torch.randn(1, 2, 20, 8)
    weight = torch.rand(1, 20)
    whole = attnstats.attention(query, query, query, statistics=[FAI(1, 4)], query_weight=weight).statistics
    sums, counts = 0, 0
    for part in halves(query, weight, [FAI(1, 4)]):
        sums = sums + part["fai"] * part.counts["fai"][:, None]
        counts = counts + part.counts["fai"]
    torch.testing.assert_close(counts, whole.counts["fai"])
    torch.testing.assert_close(sums / counts.clamp(min=1e-30)[:, None], whole["fai"])


def halves(query, weight, asked):
    """The statistics of the first ten and of the last ten queries."""
    return [
        attnstats.attention(
            query[:, :, start : start + 10], query, query, statistics=asked,
            query_weight=weight[:, start : start + 10], query_offset=start,
        ).statistics
        for start in (0, 10)
    ]  # fmt: skip


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_parts_of_the_queries_are_merged_with_their_weights(scale):
    """Sums of weights below 1 divide, too."""
    query, weight = torch.randn(1, 2, 20, 8), scale * torch.rand(1, 20)
    asked = [FAI(1, 4), SegmentMass((0, 5, None)), TopKeys(2)]
    whole = attnstats.attention(query, query, query, statistics=asked, query_weight=weight).statistics
    parts = halves(query, weight, asked)
    value, count = merge_columns([(part["fai"], part.counts["fai"]) for part in parts])
    torch.testing.assert_close(value, whole["fai"])
    torch.testing.assert_close(count, whole.counts["fai"])


def test_shards_on_one_rank_are_joined_along_the_queries(one_rank):
    query, weight = torch.randn(1, 2, 20, 8), 0.01 * torch.rand(1, 20)
    asked = [FAI(1, 4), SegmentMass((0, 5, None)), TopKeys(2)]
    whole = attnstats.attention(query, query, query, statistics=asked, query_weight=weight).statistics
    parts = halves(query, weight, asked)
    found = attnstats.distributed.reduce_columns(parts)
    for s in asked:
        torch.testing.assert_close(found[s], whole[s])
        assert torch.equal(found.valid[s], whole.valid[s])


def test_a_mean_does_not_depend_on_weights_far_away():
    query, weight = torch.randn(1, 1, 12, 8), torch.ones(1, 12)
    plain = attnstats.attention(query, query, query, statistics=[FAI(1, 4)]).statistics
    weight[0, 0] = 1e6
    found = attnstats.attention(query, query, query, statistics=[FAI(1, 4)], query_weight=weight).statistics
    torch.testing.assert_close(found["fai"], plain["fai"])
    assert torch.equal(found.valid["fai"], plain.valid["fai"])


def test_heads_of_a_mask_per_head():
    query, mask = torch.randn(1, 3, 8, 8), torch.rand(1, 3, 8, 8) > 0.3
    asked = [SegmentMass((0, 3)), TopKeys(2), WAAD(3)]
    arguments = {"statistics": asked, "is_causal": False, "attn_mask": mask, "backend": "reference"}
    every = attnstats.attention(query, query, query, **arguments).statistics
    for heads in ([0, 2], [1]):
        some = attnstats.attention(query, query, query, heads=heads, **arguments).statistics
        for s in asked:
            assert torch.equal(some.tensors[s], every.tensors[s][:, heads])


QUERY = torch.zeros(2, 1, 9, 8)
ROWS = torch.tensor([[0, 3, 9], [0, 3, 9]])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SegmentMass((3, 1)), "boundaries must not decrease and begin at 0 or later, got (3, 1)"),
        (lambda: SegmentMass((-1, 1)), "boundaries must not decrease and begin at 0"),
        (lambda: SegmentMass((0,)), "a tuple of two positions or more, got (0,)"),
        (lambda: SegmentMass(4), "a tuple of two positions or more, got 4"),  # type: ignore[arg-type]
        (lambda: SegmentMass((0, None, 4)), "must hold integers, and the last may be None"),
        (lambda: SegmentMass((0, 2.5)), "must hold integers"),  # type: ignore[arg-type]
        (lambda: TopKeys(17), "TopKeys: k must be at most 16, got 17"),
        (lambda: TopKeys(0), "TopKeys: k must be an integer >= 1"),
    ],
)
def test_statistics_that_cannot_be(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


def test_boundaries_may_be_a_list():
    assert SegmentMass([0, 3, None]) == SegmentMass((0, 3, None))


@pytest.mark.parametrize(
    ("statistics", "arguments", "kind", "message"),
    [
        ([SegmentMass((0, 10))], {}, ValueError, "has a boundary past the end, 10 of 9 keys"),
        ([SegmentMass()], {}, ValueError, "takes them from the call"),
        ([SegmentMass((0, 3))], {"segment_boundaries": ROWS}, ValueError, "no statistic takes them"),
        ([SegmentMass()], {"segment_boundaries": ROWS.float()}, TypeError, "must be an int32 or int64 tensor"),
        ([SegmentMass()], {"segment_boundaries": [0, 3]}, TypeError, "segment_boundaries"),
        ([SegmentMass()], {"segment_boundaries": ROWS[:1]}, ValueError, "must have shape (2, S + 1)"),
        ([SegmentMass()], {"segment_boundaries": ROWS.flip(1)}, ValueError, "must not decrease"),
        ([SegmentMass()], {"segment_boundaries": ROWS + 1}, ValueError, "past its end of 9 keys"),
        ([SegmentMass()], {"segment_boundaries": ROWS - 1}, ValueError, "must not decrease and begin at 0"),
        (["fai"], {"query_weight": torch.ones(2, 8)}, ValueError, "query_weight must have shape (2, 9)"),
        (["fai"], {"query_weight": torch.ones(2, 9, dtype=torch.bool)}, TypeError, "a bool one is a query_mask"),
        (["fai"], {"query_weight": -torch.ones(2, 9)}, ValueError, "must be >= 0 where a mean divides by its sum"),
        (
            ["received"],
            {"query_weight": torch.full((2, 9), torch.nan)},
            ValueError,
            "must be finite, and so must its sum",
        ),
        (
            ["fai"],
            {"query_weight": torch.full((2, 9), 1e39, dtype=torch.float64)},
            ValueError,
            "in torch.float32; got inf",
        ),
        (["fai"], {"query_weight": torch.full((2, 9), 2e38)}, ValueError, "its sum in torch.float32; got 2e+38"),
        (
            ["received"],
            {"query_weight": torch.ones(2, 9, requires_grad=True)},
            ValueError,
            "pass query_weight.detach()",
        ),
    ],
)
def test_bad_input(statistics, arguments, kind, message):
    with pytest.raises(kind, match=re.escape(message)):
        attnstats.attention(QUERY, QUERY, QUERY, statistics=statistics, **arguments)


def test_boundaries_of_a_sequence_that_grows_may_lie_ahead():
    stats = attnstats.attention(
        QUERY, QUERY, QUERY, statistics=[SegmentMass((0, 4, 99, None))], query_offset=0
    ).statistics
    assert stats["segment_mass"][..., 0].sum() > 0
    assert not stats["segment_mass"][..., 2].any()


def test_rows_need_no_weight():
    """They are as they were, and valid where the query counts."""
    weight = torch.ones(2, 9)
    weight[0, 4] = 0.0
    weighted = attnstats.attention(QUERY, QUERY, QUERY, statistics=[WAAD(4)], query_weight=weight).statistics
    plain = attnstats.attention(QUERY, QUERY, QUERY, statistics=[WAAD(4)]).statistics
    assert torch.equal(weighted["waad"], plain["waad"])
    assert torch.equal(weighted.valid["waad"], weight != 0)
