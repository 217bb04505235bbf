"""The plain PyTorch path: memory, and the ways it splits the work."""

from dataclasses import dataclass

import pytest
import torch

import attnstats
from attnstats import FAI, WAAD, ColumnStatistic, Received, reference
from attnstats.tiled import backend, native, sweep
from attnstats.tiled import band as diagonal
from tests.cases import Case, check
from tests.process import python


@pytest.fixture(params=["compiled", "plain"])
def sums(request, monkeypatch):
    """The compiled sums where they were built, and without them."""
    monkeypatch.setattr(native, "enabled", request.param == "compiled")


# 256 MiB is one T x T map of float32 at T = 8192, 64 MiB one of bool.
MEMORY = """
import resource, sys, torch, attnstats
from attnstats import *
torch.set_num_threads(2)
length = 8192
query, key, value = (torch.randn(1, 1, length, 64, requires_grad=True) for _ in range(3))
asked = [WAAD(), LocalMass(), MeanDistance(), Entropy(), MaxLogit(), SinkMass(), FAI(), FAI(0, None), Received(),
         Received(64), PooledMap(64, 64)]
attnstats.attention(*(x[:, :, :256] for x in (query, key, value)), statistics=asked)[0].sum().backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
output, stats = attnstats.attention(query, key, value, statistics=asked, CHANGED)
if BACKWARD: output.sum().backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize("changed", ["is_causal=True", "is_causal=False", "query_offset=1"])
def test_no_map_at_8192(changed):
    script = MEMORY.replace("CHANGED", changed).replace("BACKWARD", str(changed == "query_offset=1"))
    assert int(python("-c", script)) < 48  # MiB


@pytest.mark.usefixtures("sums")
@pytest.mark.parametrize(
    "case", [Case(), Case(is_causal=False), Case(query_length=9, key_length=37, padding="left")], ids=str
)
def test_small_blocks(case, monkeypatch):
    """Blocks of few rows, so that short sequences span many."""
    monkeypatch.setattr(sweep, "BLOCK_ELEMENTS", 64)
    monkeypatch.setattr(diagonal, "BLOCK_ELEMENTS", 64)
    monkeypatch.setattr(diagonal, "BAND_ROWS", 4)
    check(case, "tiled")
    check(case, "tiled", from_lse=True)


@pytest.mark.usefixtures("sums")
@pytest.mark.parametrize(
    "changed", [{}, {"weighted": True, "heads": "some"}, {"counted": "some", "sinks": True}], ids=str
)
def test_sequences_of_the_same_lengths_are_one_batch(changed, monkeypatch):
    case = Case(packed=((1, 30),) * 3 + ((0, 4),) * 2 + ((5, 9),) * 2 + ((1, 30),), **changed)
    check(case, "tiled", from_lse=True)
    batches, evaluate = [], backend._evaluate

    def counted(query, key, lse, geometry, passes):
        batches.append((geometry.batch, geometry.query_length, geometry.key_length))
        return evaluate(query, key, lse, geometry, passes)

    monkeypatch.setattr(backend, "_evaluate", counted)
    check(case, "tiled", from_lse=True, statistics=[WAAD(10), FAI(0, 5)])
    assert batches[1:] == [(3, 1, 30), (2, 5, 9), (1, 1, 30)]


@pytest.mark.usefixtures("sums")
def test_a_wide_band_is_swept():
    asked = [WAAD(2000), FAI(0, 1500), FAI(3, 20)]
    query, key, value = Case(batch=1, key_heads=1, group=1).tensors()
    found = attnstats.attention(query, key, value, statistics=asked, backend="tiled").statistics
    expected = reference.attention(query, key, value, statistics=asked).statistics
    for s in asked:
        torch.testing.assert_close(found[s], expected[s], rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("sums")
def test_without_torchs_private_kernel(monkeypatch):
    monkeypatch.setattr("attnstats.tiled.cpu_flash.takes", lambda geometry: False)
    for case in (Case(), Case(is_causal=False, padding="left"), Case(dtype="bfloat16", padding="all")):
        check(case, "tiled")


@pytest.mark.parametrize(
    ("statistics", "counted", "blocks"),
    [
        ([Received(3)], range(160), {9}),
        ([Received(17)], range(160), {8, 9}),
        ([Received(2)], [3, 40, 77], {2, 4}),
        ([Received()], [3, 40, 77], {0, 2, 4}),
        ([Received(), Received(1)], [], set()),
        ([FAI(5, None), Received(1)], range(160), set(range(10))),
    ],
    ids=str,
)
def test_only_blocks_of_rows_that_count_are_visited(statistics, counted, blocks, monkeypatch):
    monkeypatch.setattr(native, "enabled", False)
    monkeypatch.setattr(sweep, "BLOCK_ELEMENTS", 64)  # blocks of 16 rows
    visited, scores = set(), sweep._scores

    def visit(query, key, geometry, block, *rest):
        visited.add(block.rows.start // 16)
        return scores(query, key, geometry, block, *rest)

    query, key, value = Case(1, 1, 1, 160, 160).tensors()
    arguments = {"statistics": statistics, "query_mask": torch.zeros(1, 160, dtype=torch.bool)}
    arguments["query_mask"][:, list(counted)] = True
    _, expected = reference.attention(query, key, value, **arguments)
    monkeypatch.setattr(sweep, "_scores", visit)
    found = attnstats.statistics_from_lse(query, key, expected.lse, backend="tiled", **arguments)
    assert visited == blocks
    for s in statistics:
        torch.testing.assert_close(found[s], expected[s], rtol=1e-5, atol=1e-5)


@dataclass(frozen=True)
class _NearOfTheLast(ColumnStatistic):
    """Mass from the last 3 queries at distances up to 5: a band, of some queries only."""

    band = (0, 5)
    last_queries = 3

    def weight(self, distance):
        return (distance >= 0) & (distance <= 5)


@pytest.mark.usefixtures("sums")
def test_a_band_of_the_last_queries():
    check(Case(), "tiled", statistics=[_NearOfTheLast()])
    check(Case(counted="some"), "tiled", from_lse=True, statistics=[_NearOfTheLast(), FAI(3, 20)])


@pytest.mark.usefixtures("sums")
@pytest.mark.parametrize("offset", [0, 5, 36])
def test_one_query_before_the_last_key(offset):
    check(Case(query_length=1, query_offset=offset), "tiled")
