"""kernels/column.py: full-horizon columns over blocks, segments and query masks."""

import pytest
import torch

import attnstats
from attnstats import FAI, PooledMap, Received, reference
from attnstats.tiled import native
from tests.cases import Case, check
from tests.process import python


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
    statistics = [Received(), FAI(0, None), FAI(3, 9), PooledMap(1, 37)]

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


@pytest.mark.parametrize(
    "case",
    [
        Case(counted="some", padding="left"),
        Case(counted="none"),
        Case(packed=((9, 9), (0, 4), (40, 40), (3, 30)), counted="some"),
        Case(query_length=33, key_length=90, counted="some", window_size=(20, 3), is_causal=False, query_offset=30),
    ],
    ids=str,
)
def test_columns_of_some_queries(case, device):
    statistics = [Received(2), Received(), FAI(5, None)]
    check(case, "triton", device, from_lse=True, statistics=statistics)


# Counts the matmuls of the column kernel, each of which is one tile: a block of keys by BM queries.
TILES = """
import sys, torch, attnstats
from attnstats import Received
from attnstats.triton.configs import candidates
from attnstats.triton.launch import block_dim
from triton.runtime import interpreter

tiles, dot = [], interpreter.InterpreterBuilder.create_dot
def count(self, *operands):
    tiles.append(1)
    return dot(self, *operands)
interpreter.InterpreterBuilder.create_dot = count
query = torch.randn(2, 1, 512, 16)
mask = torch.zeros(2, 512, dtype=torch.bool)
mask[0, [5, 300, 400]] = True
config = next(candidates("column", query.device, query.dtype, block_dim(16)))
blocks = 512 // config.BN
cu_seqlens = torch.tensor([0, 330, 512], dtype=torch.int32)
packed, packed_lse = query[0].transpose(0, 1), torch.zeros(1, 512)

def run(statistic, **arguments):
    tiles.clear()
    attnstats.statistics_from_lse(query, query, torch.zeros(2, 1, 512), statistics=[statistic], backend="triton",
                                  check=False, **arguments)
    return len(tiles)

assert run(Received()) > 2 * 2 * blocks
# Two tiles per block of keys and batch row at most: one whole, one of the rest.
assert 0 < run(Received(16)) <= 2 * 2 * blocks
assert 0 < run(Received(2), query_mask=mask) <= -(-101 // config.BM) * blocks + blocks
assert run(Received(), query_mask=torch.zeros_like(mask)) == 0
tiles.clear()
attnstats.statistics_from_lse(packed, packed, packed_lse, statistics=[Received(16)], backend="triton",
                              cu_seqlens_q=cu_seqlens, check=False)
assert 0 < len(tiles) <= 2 * (blocks + 2)
"""


def test_only_tiles_of_rows_that_count_are_visited():
    python("-c", TILES, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
