"""Column statistics over all queries, and pooled maps, from an lse."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from attnstats.core.geometry import Geometry
from attnstats.kernels.arguments import Segments, Strides
from attnstats.statistics import PooledMap, Received, Statistic
from attnstats.triton.configs import Config
from attnstats.triton.launch import arguments
from attnstats.triton.launch.arguments import RowLse
from attnstats.triton.launch.start import Prepared, fitting, prepare, remembered, start_prepared
from attnstats.triton.plan import Heads


def columns(
    query: Tensor,
    key: Tensor,
    row_lse: RowLse,
    geometry: Geometry,
    statistics: Sequence[Statistic],
    query_mask: Tensor | None,
    heads: Heads,
) -> Tensor:
    """[statistics, B, heads, Tk] column sums over the queries that count."""
    shape = (len(statistics), geometry.batch, arguments.head_count(geometry, heads), geometry.key_length)

    def run(config: Config) -> Tensor:
        if (queries := arguments.longest(geometry)[0]) < config.BM:
            config = config._replace(BM=max(16, arguments.power_of_two(queries)))
        sums = arguments.buffer(geometry, shape, of_keys=True)
        _column(query, key, row_lse, geometry, tuple(statistics), query_mask, heads, sums, None, config)
        return sums

    return fitting("column", geometry, geometry.head_dim, run)


def pooled(
    query: Tensor, key: Tensor, row_lse: RowLse, geometry: Geometry, statistic: PooledMap, heads: Heads
) -> Tensor:
    """[B, heads, I, J] sums over segments of queries and of keys."""
    query_bounds, key_bounds = statistic.boundaries(geometry.query_length, geometry.key_length)
    segments = len(query_bounds) - 1

    def run(config: Config) -> Tensor:
        # A segment fills whole tiles of queries: short ones get short tiles.
        rows = max(16, arguments.power_of_two(geometry.query_length // segments))
        config = config._replace(BM=min(config.BM, rows))
        pieces = _pieces(key_bounds, config.BN, geometry.device)
        count = arguments.head_count(geometry, heads)
        sums = torch.empty((pieces.total, geometry.batch, count, segments), dtype=torch.float32, device=geometry.device)
        cuts = Segments(arguments.on_device(query_bounds, geometry.device), pieces.first, pieces.bounds)
        _column(query, key, row_lse, geometry, (Received(),), geometry.query_mask, heads, sums, cuts, config)
        return torch.segment_reduce(sums, "sum", lengths=pieces.of_segments, unsafe=True).permute(1, 2, 3, 0)

    return fitting("pooled", geometry, geometry.head_dim, run)


def _column(
    query: Tensor,
    key: Tensor,
    row_lse: RowLse,
    geometry: Geometry,
    statistics: tuple[Statistic, ...],
    query_mask: Tensor | None,
    heads: Heads,
    sums: Tensor,
    segments: Segments | None,
    config: Config,
) -> None:
    """Fill `sums`."""
    query, key = arguments.as_input(query), arguments.as_input(key)
    pivot, factor, counted = row_lse.pivots(geometry), row_lse.factor, None
    if query_mask is not None:
        counted = geometry.counted_rows(query_mask).int()
        pivot = pivot.masked_fill(~query_mask[:, None], torch.inf)
    if geometry.query_weight is not None:
        weight = geometry.query_weight.float()[:, None]
        factor = weight.expand(pivot.shape).contiguous() if factor is None else factor * weight
    described = arguments.described(geometry, query)
    masked = query_mask is not None
    prepared = remembered(geometry, _prepare_column, config, statistics, heads, masked, described)
    start_prepared(
        prepared,
        geometry,
        query=query,
        key=key,
        pivot=pivot,
        factor=factor,
        columns=sums,
        counted=counted,
        heads=arguments.on_device(heads, geometry.device),
        n_segments=None if segments is None else sums.shape[-1],
        segments=segments,
        reach=prepared.reach,
        strides=Strides(query.stride(), key.stride()),
    )


def _prepare_column(
    geometry: Geometry,
    config: Config,
    statistics: tuple[Statistic, ...],
    heads: Heads,
    has_query_mask: bool,
    described: bool,
) -> Prepared:
    from attnstats.kernels.column import column as kernel

    far = [s.far for s in statistics]
    constants = {
        "COLUMNS": arguments.weights(statistics),
        "FAR": arguments.bounded(max(distance for distance, _ in filter(None, far))) if all(far) else None,
        "FAR_WEIGHTS": tuple(weight for _, weight in filter(None, far)),
        "COUNTED": has_query_mask,
        "BM": config.BM,
        "BN": config.BN,
        **arguments.dims(geometry, with_value=False),
        "DESCRIBED": described,
    }
    count = arguments.head_count(geometry, heads)
    sizes = arguments.sizes(geometry, config.BN, by_keys=True)._replace(n_heads=count)
    programs = sizes.n_blocks * count * geometry.batch
    score, reach = arguments.score(geometry), _farthest(statistics)
    return prepare(geometry, kernel, programs, constants, config, sizes, score, reach=reach)


def _farthest(statistics: Sequence[Statistic]) -> int | None:
    """The farthest distance at which a weight is not 0; None: there is none."""
    ends = [None if s.band is None else s.band[1] for s in statistics]
    return None if None in ends else arguments.bounded(max((end for end in ends if end is not None), default=0))


class _Pieces(NamedTuple):
    """Blocks of keys cut at the boundaries of segments."""

    total: int
    bounds: Tensor  # [total + 1] where each piece begins
    first: Tensor  # [blocks + 1] the first piece of each block
    of_segments: Tensor  # [J] how many pieces each segment has


@functools.lru_cache(maxsize=16)
def _pieces(key_bounds: tuple[int, ...], block: int, device: torch.device) -> _Pieces:
    length = key_bounds[-1]
    starts = sorted({*range(0, length, block), *key_bounds[:-1]})
    index = {start: i for i, start in enumerate(starts)} | {length: len(starts)}
    first = [index[key] for key in key_bounds]
    return _Pieces(
        len(starts),
        torch.tensor([*starts, length], dtype=torch.int32, device=device),
        torch.tensor(
            [*(index[start] for start in range(0, length, block)), len(starts)], dtype=torch.int32, device="cpu"
        ).to(device),
        torch.tensor([b - a for a, b in pairwise(first)], device=device, dtype=torch.int64),
    )
