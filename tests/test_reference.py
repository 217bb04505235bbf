"""The oracle against Python loops that follow the formulas word by word."""

import math

import pytest
import torch

import attnstats
from attnstats import (
    FAI,
    LSE,
    WAAD,
    Entropy,
    LocalMass,
    MaxLogit,
    MeanDistance,
    PooledMap,
    Received,
    SinkMass,
    reference,
)
from tests.cases import Case


def visible(case, padding, b, t, s):
    seen = padding is None or bool(padding[b, s])
    return seen and (not case.is_causal or s <= t)


def by_loops(case: Case):
    """Row, column and map statistics of every head as nested lists, from the definitions in PAPER terms."""
    query, key, _ = (x.double() for x in case.tensors())
    arguments = case.arguments()
    padding, response = arguments["key_padding_mask"], arguments["query_mask"]
    offset = case.query_offset if case.query_offset is not None else case.key_length - case.query_length
    results = {}
    for b in range(case.batch):
        for h in range(case.key_heads * case.group):
            a, scores = {}, {}
            for i in range(case.query_length):
                t = i + offset
                keys = [s for s in range(case.key_length) if visible(case, padding, b, t, s)]
                for s in keys:
                    scores[i, s] = float(query[b, h, i] @ key[b, h // case.group, s]) / math.sqrt(case.head_dim)
                total = sum(math.exp(scores[i, s]) for s in keys)
                for s in keys:
                    a[i, s] = math.exp(scores[i, s]) / total
            results[b, h] = (a, scores, offset, padding, response)
    return results


def counts(case, b, i, offset, padding, response):
    if response is not None and not response[b, i]:
        return False
    return padding is None or i + offset >= case.key_length or bool(padding[b, i + offset])


@pytest.mark.parametrize(
    "case",
    [
        Case(query_length=9, key_length=9, head_dim=4, value_dim=4),
        Case(query_length=5, key_length=9, head_dim=4, value_dim=3, counted="some"),
        Case(query_length=8, key_length=8, head_dim=4, value_dim=4, is_causal=False, padding="right"),
        Case(query_length=8, key_length=8, head_dim=4, value_dim=4, padding="left", counted="some"),
        Case(query_length=6, key_length=7, head_dim=4, value_dim=4, query_offset=3, padding="holes"),
    ],
    ids=str,
)
def test_every_statistic_by_loops(case):
    asked = [
        WAAD(4), LocalMass(3), MeanDistance(), Entropy(), MaxLogit(), LSE(), SinkMass(2),
        FAI(1, 4), FAI(2, None), Received(), Received(3), PooledMap(2, (0, 1, case.key_length)),
    ]  # fmt: skip
    query, key, value = (x.double() for x in case.tensors())
    output, stats = reference.attention(query, key, value, statistics=asked, **case.arguments())
    for (b, h), (a, scores, offset, padding, response) in by_loops(case).items():
        counted = [i for i in range(case.query_length) if counts(case, b, i, offset, padding, response)]
        for i in range(case.query_length):
            row = {s: w for (j, s), w in a.items() if j == i}
            real = padding is None or i + offset >= case.key_length or bool(padding[b, i + offset])
            expected = {
                WAAD(4): sum(w * min(abs(i + offset - s), 4) for s, w in row.items()),
                LocalMass(3): sum(w for s, w in row.items() if abs(i + offset - s) < 3),
                MeanDistance(): sum(w * abs(i + offset - s) for s, w in row.items()),
                Entropy(): -sum(w * math.log(w) for w in row.values()),
                MaxLogit(): max((scores[i, s] for s in row), default=0.0),
            }
            first = [s for s in range(case.key_length) if padding is None or padding[b, s]][:2]
            expected[SinkMass(2)] = sum(w for s, w in row.items() if s in first)
            for statistic, number in expected.items():
                assert math.isclose(float(stats[statistic][b, h, i]), number if real else 0.0, abs_tol=1e-12), statistic
            lse = math.log(sum(math.exp(scores[i, s]) for s in row)) if row else -math.inf
            assert float(stats.lse[b, h, i]) == lse or math.isclose(float(stats.lse[b, h, i]), lse, abs_tol=1e-12)
            mixed = sum((w * value[b, h // case.group, s] for s, w in row.items()), torch.zeros(case.value_dim))
            torch.testing.assert_close(output[b, h, i], mixed.double(), rtol=0, atol=1e-12)
        for s in range(case.key_length):
            for lo, hi in ((1, 4), (2, None)):
                after = [i for i in counted if lo <= i + offset - s <= (math.inf if hi is None else hi)]
                number = sum(a.get((i, s), 0.0) for i in after) / len(after) if after else 0.0
                assert math.isclose(float(stats[FAI(lo, hi)][b, h, s]), number, abs_tol=1e-12)
                real = padding is None or bool(padding[b, s])
                assert bool(stats.valid[FAI(lo, hi)][b, s]) == (bool(after) and real)
            for last, these in ((None, counted), (3, counted[-3:])):
                number = sum(a.get((i, s), 0.0) for i in these)
                assert math.isclose(float(stats[Received(last)][b, h, s]), number, abs_tol=1e-12)
        half = case.query_length // 2
        for i, rows in enumerate((range(half), range(half, case.query_length))):
            for j, keys in enumerate((range(1), range(1, case.key_length))):
                number = sum(a.get((t, s), 0.0) for t in rows if t in counted for s in keys)
                assert math.isclose(float(stats["pooled_map"][b, h, i, j]), number, abs_tol=1e-12)


@pytest.mark.filterwarnings("ignore:attn_mask of shape")
@pytest.mark.parametrize("kind", ["additive", "bool"])
@pytest.mark.parametrize("through", ["attention", "reference", "patched"])
def test_a_row_that_a_dense_mask_hides_whole(through, kind):
    """Its output and gradients are 0 and it is not valid; a softmax over -inf alone has NaN gradients."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (x.requires_grad_() for x in torch.randn(3, 1, 2, 6, 4, generator=generator))
    seen = torch.rand(6, 6, generator=generator) > 0.3
    seen[2], seen[:, 0], seen[2, 0] = False, True, False
    mask = seen if kind == "bool" else torch.randn(6, 6, generator=generator).masked_fill(~seen, -torch.inf)
    given = {"attn_mask": mask, "is_causal": False, "statistics": ["waad", "received"]}
    if through == "patched":
        with attnstats.patch_sdpa(statistics=["waad", "received"], allow_dense=True) as calls:
            output = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        stats = calls[0]
    elif through == "attention":
        output, stats = attnstats.attention(query, key, value, backend="reference", **given)
    else:
        output, stats = reference.attention(query, key, value, **given)
    found = torch.autograd.grad(output.square().sum(), (query, key, value))
    by_torch = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    expected = torch.autograd.grad(by_torch.square().sum(), (query, key, value))
    torch.testing.assert_close(output, by_torch.nan_to_num())
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y)
    mask.fill_(True if kind == "bool" else 0.0)  # results don't read the caller's mask
    live = [True, True, False, True, True, True]
    assert stats.valid["waad"].tolist() == [live]
    assert stats.lse.isfinite()[0, 0].tolist() == live
    assert stats["waad"][..., 2].eq(0).all()


def test_counts_of_a_mean():
    """The queries within each key's horizon."""
    query = torch.zeros(1, 1, 6, 4)
    statistics = reference.attention(query, query, query, statistics=[FAI(1, 3)], is_causal=True).statistics
    assert statistics.counts[FAI(1, 3)].tolist() == [[3, 3, 3, 2, 1, 0]]
