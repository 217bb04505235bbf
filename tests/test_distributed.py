"""Ranks together equal one process: two processes are started once and check everything."""

from itertools import pairwise

import pytest
import torch
import torch.distributed as dist

import attnstats
from attnstats import FAI, WAAD, Entropy, PooledMap, Received, distributed, reference
from attnstats.core.merging import merge_columns
from tests.cases import Case, allowed
from tests.process import two_ranks

ASKED = (FAI(3, 20), FAI(0, None), Received(), WAAD(10), Entropy())
CHECKS = {
    "contiguous, uneven": (Case(), "contiguous", True),
    "padding and a query mask": (Case(padding="left", counted="some"), "contiguous", True),
    "all columns everywhere": (Case(padding="holes", counted="some"), "contiguous", False),
    "zigzag": (Case(query_length=40, key_length=40, counted="some"), "zigzag", True),
    "not causal": (Case(is_causal=False, padding="right", query_length=40, key_length=40), "zigzag", False),
    "two tokens, one of them a rank's": (Case(query_length=2, key_length=2), "contiguous", True),
}


def context_parallel(case: Case, layout, scatter, from_lse):
    query, key, value = case.tensors()
    arguments = case.arguments()
    wide = [x.double() for x in (query, key, value)]
    _, truth = reference.attention(*wide, statistics=ASKED, **arguments)
    _, eager = reference.attention(query, key, value, statistics=ASKED, **arguments)
    query_mask = arguments.pop("query_mask")
    parts = []
    pieces = distributed.shard(case.query_length, layout=layout)
    for piece in pieces:
        given = arguments | {"query_offset": piece.start}
        if query_mask is not None:
            given["query_mask"] = query_mask[:, piece]
        if from_lse:
            lse = truth.lse[:, :, piece].float()
            parts.append(attnstats.statistics_from_lse(query[:, :, piece], key, lse, statistics=ASKED, **given))
        else:
            parts.append(attnstats.attention(query[:, :, piece], key, value, statistics=ASKED, **given).statistics)
    stats = distributed.reduce_columns(parts if len(parts) > 1 else parts[0], layout=layout, scatter=scatter)
    own = torch.cat([torch.arange(case.query_length)[piece] for piece in pieces])
    every = torch.arange(case.key_length)
    for s in ASKED:
        index = every if not scatter and s in ASKED[:3] else own
        limit = allowed(s, case, "tiled", truth[s], eager[s], truth.lse)
        torch.testing.assert_close(stats[s].double(), truth[s][..., index], atol=limit, rtol=0.0, msg=str(s))
        assert torch.equal(stats.valid[s], truth.valid[s][..., index]), s
    for s in (ASKED[0], ASKED[1]):
        assert torch.equal(stats.counts[s], truth.counts[s][..., own if scatter else every]), s
    assert set(stats.counts) == set(truth.counts)
    torch.testing.assert_close(stats.lse.double(), truth.lse[..., own], atol=1e-5, rtol=1e-5)


def layouts():
    for length in (1, 2, 7, 40):
        chunks = torch.arange(length).chunk(2)
        for rank in range(2):
            (piece,) = distributed.shard(length, rank=rank)
            expected = chunks[rank] if rank < len(chunks) else torch.arange(0)
            assert torch.equal(torch.arange(length)[piece], expected)
    assert distributed.shard(40, layout="zigzag", rank=0) == [slice(0, 10), slice(30, 40)]
    assert distributed.shard(40, layout="zigzag", rank=1) == [slice(10, 20), slice(20, 30)]


def tensor_parallel(rank):
    """Six heads, three a rank; of the chosen ones rank 0 has two, then one and none."""
    values = torch.randn(2, 6, 9, generator=torch.Generator().manual_seed(0))
    own = values[:, 3 * rank : 3 * rank + 3]
    for chosen in ([0, 2, 5], [4, 1], [5]):
        local = distributed.local_heads(chosen, 3)
        found = distributed.mean_over_heads(own[:, local])
        torch.testing.assert_close(found, values[:, chosen].mean(1))
    total, count = own.sum(1), 3 - rank
    torch.testing.assert_close(distributed.mean_over_ranks(total, count), values.sum(1) / 5)
    torch.testing.assert_close(total, own.sum(1))  # not changed in place


def bad_input():
    query = torch.zeros(1, 1, 4, 16)
    _, stats = attnstats.attention(query, query, query, statistics=[Received(last=2)])
    with pytest.raises(ValueError, match=r"Received\(last=2\) counted the last queries of every part.*query_mask"):
        distributed.reduce_columns(stats)
    _, stats = attnstats.attention(query, query, query, statistics=[PooledMap(2, 2), FAI(0, 3)])
    with pytest.raises(ValueError, match=r"PooledMap.*of several pieces"):
        distributed.reduce_columns([stats, stats])
    with pytest.raises(ValueError, match="parts is empty"):
        distributed.reduce_columns([])
    with pytest.raises(ValueError, match="layout must be 'contiguous' or 'zigzag', got 'ring'"):
        distributed.reduce_columns(stats, layout="ring")
    with pytest.raises(ValueError, match=r"zigzag.* multiple of 4, got 6; pad it"):
        distributed.shard(6, layout="zigzag")
    _, rows = attnstats.attention(query, query, query, statistics=["waad"])
    assert torch.equal(distributed.reduce_columns(rows)["waad"], rows["waad"])


def on_rank(rank: int) -> None:
    dist.init_process_group("gloo")
    for name, (case, layout, scatter) in CHECKS.items():
        for from_lse in (True, False):
            try:
                context_parallel(case, layout, scatter, from_lse)
            except AssertionError as error:
                raise AssertionError(f"rank {rank}, {name}, from_lse={from_lse}: {error}") from error
    layouts()
    tensor_parallel(rank)
    bad_input()


def test_two_ranks_equal_one_process():
    two_ranks(on_rank)


@pytest.mark.parametrize("cuts", [(0, 20, 37), (0, 1, 2, 30, 37)])
def test_parts_of_the_queries_merge(cuts):
    """Without a process group; every part sees the keys up to its last query, as while decoding."""
    case = Case(counted="some")
    query, key, value = (x.double() for x in case.tensors())
    mask = case.arguments()["query_mask"]
    asked = [FAI(3, 20), FAI(0, None), Received()]
    _, whole = reference.attention(query, key, value, statistics=asked, enable_gqa=True, query_mask=mask)
    parts = []
    for start, stop in pairwise(cuts):
        piece = slice(start, stop)
        own = {"enable_gqa": True, "query_mask": mask[:, piece], "backend": "tiled"}
        parts.append(
            attnstats.attention(query[:, :, piece], key[:, :, :stop], value[:, :, :stop], statistics=asked, **own)[1]
        )
    for s in asked:
        value, count = merge_columns([(part[s], part.counts.get(s)) for part in parts])
        torch.testing.assert_close(value, whole[s], atol=1e-12, rtol=0.0)
        assert count is None if s == Received() else torch.equal(count, whole.counts[s])
