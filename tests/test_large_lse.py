"""Scores with a large common part, as key biases make them: Qwen2.5's give an lse of 1,100.

The softmax doesn't change when all scores of a row do, and eager attention, which divides by its own sum, hardly
notices. So the statistics may err twice as much as eager and no more, however large the lse.
"""

import dataclasses

import pytest
import torch

import attnstats
from attnstats import FAI, WAAD, Entropy, LocalMass, MeanDistance, Received, SinkMass, reference
from attnstats.tiled import native
from tests.cases import Case, check

LARGE = Case(query_length=97, key_length=97, head_dim=24, value_dim=24, bias=330, scale=0.11)
CASES = {
    "1,200": LARGE,
    "3,000": dataclasses.replace(LARGE, bias=520),
    "keys alone": dataclasses.replace(LARGE, bias=-520),
    "padded": dataclasses.replace(LARGE, padding="left", counted="some"),
    "window and sinks": dataclasses.replace(LARGE, window_size=(20, 0), sinks=True),
    "not causal": dataclasses.replace(LARGE, is_causal=False),
    "heads": dataclasses.replace(LARGE, heads="split"),
    "packed": dataclasses.replace(LARGE, packed=((30, 30), (5, 17), (40, 40))),
    "one query": dataclasses.replace(LARGE, query_length=1),
    "few queries": dataclasses.replace(LARGE, query_length=3, key_length=400),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("path", ["tiled", "plain", "triton"])
def test_errs_at_most_twice_as_much_as_eager(case, path, device, monkeypatch):
    monkeypatch.setattr(native, "enabled", path != "plain")
    backend = "triton" if path == "triton" else "tiled"
    check(case, backend, device if backend == "triton" else "cpu")


@pytest.mark.parametrize("backend", ["tiled", "triton"])
def test_a_foreign_lse_has_the_error_of_its_rounding(backend, device):
    check(LARGE, backend, device if backend == "triton" else "cpu", from_lse=True)


@pytest.mark.parametrize("compiled", [True, False])
def test_products_that_are_not_exact(compiled, monkeypatch):
    """The bias in the last dimension, where every order of summation adds it last."""
    monkeypatch.setattr(native, "enabled", compiled)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, 97, 64, generator=generator) for _ in range(3))
    query[..., -1] += 30
    key[..., -1] += 300
    statistics = (WAAD(10), LocalMass(4), FAI(3, 20), MeanDistance(), Entropy(), Received(), SinkMass(3))
    _, truth = reference.attention(query.double(), key.double(), value.double(), statistics=statistics)
    _, eager = reference.attention(query, key, value, statistics=statistics)
    _, stats = attnstats.attention(query, key, value, statistics=statistics, backend="tiled")
    for s in statistics:
        error, by_eager = ((x[s].double() - truth[s]).abs().max() for x in (stats, eager))
        assert error <= 2 * by_eager, s
