"""Starts the kernels: a function for each, which makes its buffers, picks its tiles and passes its arguments.

Called from ops.py alone, with what a `Plan` says. Nothing here waits for the device, and no size depends on data,
so a call can be captured into a CUDA graph.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from attnstats.core.geometry import Evaluation, Geometry, divisor_of
from attnstats.statistics import CATALOGUE, ColumnStatistic, DistanceWeighted, PooledMap, Received, Statistic, Summed
from attnstats.triton.configs import (
    INTERPRETED_SPLIT_KEYS,
    MAX_DECODED,
    MAX_PACKED_HEADS,
    SPLIT_KEYS,
    Config,
    Kernel,
    candidates,
    chunk,
    interpreted,
    table_version,
)
from attnstats.triton.plan import GradientPlan, Heads, Plan

LOG2E = 1.4426950408889634

T = TypeVar("T")


def splits(geometry: Geometry) -> int:
    """Into how many parts the keys are cut when a few queries meet many of them, 0: they are not."""
    split = INTERPRETED_SPLIT_KEYS if interpreted() else SPLIT_KEYS
    queries, keys = _longest(geometry)
    return -(-geometry.key_length // split) if queries <= MAX_DECODED and keys >= 2 * split else 0


def forward(
    query: Tensor, key: Tensor, value: Tensor | None, geometry: Geometry, plan: Plan, lse: Tensor | None = None
) -> Evaluation:
    """Attention (value given) or the rows of its loop from an lse (lse given)."""
    kernel: Kernel = "forward_loop" if plan.in_loop else "forward"
    if splits(geometry):
        kernel = "decode"
    dim = max(geometry.head_dim, geometry.value_dim)
    return _fitting(kernel, geometry, dim, lambda config: _forward(query, key, value, geometry, plan, lse, config))


class _Prepared(NamedTuple):
    """What calls of one geometry share."""

    programs: int
    sizes: tuple[float | None, ...]
    constants: dict[str, Any]
    config: Config  # its BM counts positions
    parts: int = 0  # splits of the keys
    slots: int = 0


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    geometry: Geometry,
    plan: Plan,
    lse: Tensor | None,
    config: Config,
) -> Evaluation:
    from attnstats.kernels.forward import forward as kernel

    known = ("forward", plan, config, value is None, chunk(geometry.device))
    if known not in geometry.memo:
        geometry.memo[known] = _prepared_forward(geometry, plan, config, value is None)
    programs, sizes, constants, config, parts, slots = geometry.memo[known]
    dtype = query.dtype
    query, key = _input(query), _input(key)
    shape = (geometry.batch, geometry.query_heads, geometry.query_length)
    partial = (parts,) if parts else ()
    output: Tensor | None = None
    written: Tensor | None = None
    if value is None:
        assert lse is not None
        natural = divisor_of(lse) * LOG2E
    else:
        value = _input(value)
        if parts:
            output = _empty(geometry, (parts, *shape, geometry.value_dim))
            written = output[0]
        else:  # heads innermost but one, as models want it
            batch, heads, length = shape
            size = (batch, heads, length, geometry.value_dim)
            output = torch.empty_permuted(size, (0, 2, 1, 3), dtype=query.dtype, device=query.device)
            if geometry.packing is not None:
                output.zero_()
            written = output
        natural = _empty(geometry, (*partial, *shape), fill=-torch.inf)  # written by the kernel, not in exp2's domain
    rows = _empty(geometry, (len(plan.in_rows), *partial, *shape))
    columns = _slots(plan, geometry, slots, geometry.query_heads)
    sinks2 = _sinks2(geometry)
    counted, present = _flags(geometry.counted()), _flags(geometry.key_mask)
    reach = on_device(plan.reach_of_heads(geometry), geometry.device)
    in_pass = (None if parts else sinks2, *_boundaries(geometry), reach, geometry.dropout_seed)
    tensors = (query, key, value, output, natural, rows, columns, counted, present, *in_pass)
    strides = tuple(_strides(x) for x in (query, key, value, written))
    _launch(kernel, programs, tensors, (*sizes, _dropout(geometry)), strides, constants, config)
    lse2 = natural
    if parts and value is None:
        rows = rows.sum(1)
    elif parts:
        assert output is not None
        output, lse2, rows = _combine(output, natural, rows, sinks2, plan, geometry, query.dtype)
    results: dict[Statistic, Tensor] = dict(zip(plan.in_rows, rows, strict=True))
    if plan.band_columns:
        results |= dict(zip(plan.band_columns, columns.sum(1), strict=True))
    return Evaluation(query if output is None else output.to(dtype), lse2, results)


def _prepared_forward(geometry: Geometry, plan: Plan, config: Config, from_lse: bool) -> _Prepared:
    longest = _longest(geometry)[0]
    parts = splits(geometry)
    if parts:
        heads = min(MAX_PACKED_HEADS, _power_of_two(geometry.group))
        config = config._replace(BM=max(config.BM // heads, _power_of_two(longest)))
    else:
        # Heads of a group share a tile's keys either way. In one tile they also share the band's keys and weights.
        heads = min(config.BM // 16, MAX_PACKED_HEADS, geometry.group & -geometry.group)
        config = config._replace(BM=config.BM // heads)
    behind, ahead = plan.reach(geometry)
    blocks = -(-longest // config.BM) * -(-geometry.group // heads) * geometry.key_heads
    constants = {
        "MOMENT": len(plan.moment),
        "LOOP_ROWS": _flat(plan.loop_rows, tails=False),
        "ENTROPY": len(plan.entropy),
        "MAX_LOGIT": len(plan.max_logit),
        "BAND_ROWS": _flat(plan.band_rows),
        "BAND_COLUMNS": _flat(plan.band_columns),
        "BEHIND": behind,
        "ROWS_BEHIND": plan.rows_behind(geometry),
        "AHEAD": ahead,
        "BAND_BOUND": plan.bound(geometry),
        "FROM_LSE": from_lse,
        "SPLIT_KEYS": (INTERPRETED_SPLIT_KEYS if interpreted() else SPLIT_KEYS) if parts else 0,
        "CHUNK": chunk(geometry.device),
        "HEADS": heads,
        "BM": config.BM,
        "BN": config.BN,
        "BAND_BN": min(64, config.BN),
        "DIM": geometry.head_dim,
        "BLOCK_DIM": block_dim(geometry.head_dim),
        "VALUE_DIM": geometry.value_dim,
        "BLOCK_VALUE_DIM": block_dim(geometry.value_dim),
    }
    sizes = (geometry.batch, _sequences(geometry), geometry.query_heads, *_sizes(geometry), longest)
    programs = blocks * _sequences(geometry) * max(parts, 1)
    slots = slot_count(behind, ahead, config.BM)
    return _Prepared(programs, (*sizes, *_window(geometry), *_score(geometry)), constants, config, parts, slots)


def _combine(
    parts: Tensor,
    lse_parts: Tensor,
    row_parts: Tensor,
    sinks2: Tensor | None,
    plan: Plan,
    geometry: Geometry,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, lse and rows of [splits, ...] parts."""
    from attnstats.kernels.combine import combine as kernel

    output = parts.new_empty(parts.shape[1:], dtype=dtype)
    lse = lse_parts.new_empty(lse_parts.shape[1:])
    rows = row_parts.new_empty(len(row_parts), *lse.shape)
    config = Config(16, 0, 4, 2)
    _launch(
        kernel,
        -(-lse.numel() // config.BM),
        (parts, lse_parts, row_parts, output, lse, rows, sinks2),
        (lse.numel(), len(parts), geometry.query_heads, geometry.query_length),
        (),
        {
            "LOOP_ROWS": len(plan.moment) + len(plan.loop_rows),
            "ENTROPY": len(plan.entropy),
            "MAX_LOGIT": len(plan.max_logit),
            "BM": config.BM,
            "VALUE_DIM": geometry.value_dim,
            "BLOCK_VALUE_DIM": block_dim(geometry.value_dim),
        },
        config,
    )
    return output, lse, rows


def band(
    query: Tensor, key: Tensor, lse: Tensor, geometry: Geometry, plan: Plan, heads: Heads
) -> dict[Statistic, Tensor]:
    """The plan's band statistics, of these heads, from an lse of all heads."""
    return _fitting(
        "band", geometry, geometry.head_dim, lambda config: _band(query, key, lse, geometry, plan, heads, config)
    )


def band_tile(geometry: Geometry, heads: Heads, config: Config) -> tuple[int, Config]:
    """Heads packed into a tile of the band kernel, and the tile's positions and keys."""
    packed = 1 if heads is not None else min(MAX_PACKED_HEADS, _power_of_two(geometry.group))
    if geometry.dtype == torch.float32 and not interpreted():
        packed = min(packed, max(1, config.BM // 16))  # more rows than the table says would spill
    positions = max(16, config.BM // packed)
    return packed, config._replace(BM=positions)


def _band(
    query: Tensor, key: Tensor, lse: Tensor, geometry: Geometry, plan: Plan, heads: Heads, config: Config
) -> dict[Statistic, Tensor]:
    from attnstats.kernels.band import band as kernel

    known = ("band", plan, config, heads)
    if known not in geometry.memo:
        geometry.memo[known] = _prepared_band(geometry, plan, config, heads)
    programs, sizes, constants, config, _, slots = geometry.memo[known]
    query, key = _input(query), _input(key)
    count = geometry.query_heads if heads is None else len(heads)
    rows = _empty(geometry, (len(plan.band_rows), geometry.batch, count, geometry.query_length))
    columns = _slots(plan, geometry, slots, count)
    counted, present = _flags(geometry.counted()), _flags(geometry.key_mask)
    which = (_sinks2(geometry), *_boundaries(geometry), on_device(heads, geometry.device))
    tensors = (query, key, divisor_of(lse) * LOG2E, rows, columns, counted, present, *which)
    _launch(kernel, programs, tensors, sizes, (_strides(query), _strides(key)), constants, config)
    results: dict[Statistic, Tensor] = dict(zip(plan.band_rows, rows, strict=True))
    if plan.band_columns:
        results |= dict(zip(plan.band_columns, columns.sum(1), strict=True))
    return results


def _prepared_band(geometry: Geometry, plan: Plan, config: Config, heads: Heads) -> _Prepared:
    packed, config = band_tile(geometry, heads, config)
    behind, ahead = plan.reach(geometry)
    longest = _longest(geometry)[0]
    count = geometry.query_heads if heads is None else len(heads)
    of_sequence = -(-geometry.group // packed) * geometry.key_heads if heads is None else count
    left, right = _window(geometry)
    constants = {
        "ROWS": _flat(plan.band_rows),
        "COLUMNS": _flat(plan.band_columns),
        "BEHIND": behind,
        "ROWS_BEHIND": plan.rows_behind(geometry),
        "AHEAD": ahead,
        "HEADS": packed,
        "BM": config.BM,
        "BN": config.BN,
        "DIM": geometry.head_dim,
        "BLOCK_DIM": block_dim(geometry.head_dim),
    }
    sizes = (geometry.batch, geometry.query_heads, count, *_sizes(geometry), longest)
    window = (left if plan.bound(geometry) else None, right)
    programs = -(-longest // config.BM) * of_sequence * _sequences(geometry)
    slots = slot_count(behind, ahead, config.BM)
    return _Prepared(programs, (*sizes, *window, *_score(geometry)), constants, config, slots=slots)


def columns(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    geometry: Geometry,
    statistics: Sequence[ColumnStatistic],
    counted: Tensor | None,
    heads: Heads,
) -> Tensor:
    """[statistics, B, heads, Tk] column sums over the counted queries."""
    count = geometry.query_heads if heads is None else len(heads)
    shape = (len(statistics), geometry.batch, count, geometry.key_length)

    def run(config: Config) -> Tensor:
        if (longest := _longest(geometry)[0]) < config.BM:
            config = config._replace(BM=max(16, _power_of_two(longest)))
        sums = _empty(geometry, shape)
        _column(query, key, lse, geometry, statistics, counted, heads, sums, None, config)
        return sums

    return _fitting("column", geometry, geometry.head_dim, run)


def pooled(query: Tensor, key: Tensor, lse: Tensor, geometry: Geometry, statistic: PooledMap, heads: Heads) -> Tensor:
    """[B, heads, I, J] sums over segments of queries and of keys."""
    query_bounds, key_bounds = statistic.boundaries(geometry.query_length, geometry.key_length)
    segments = len(query_bounds) - 1
    count = geometry.query_heads if heads is None else len(heads)

    def run(config: Config) -> Tensor:
        # A segment fills whole tiles of queries: short ones get short tiles.
        rows = max(16, _power_of_two(geometry.query_length // segments))
        config = config._replace(BM=min(config.BM, rows))
        pieces = _pieces(key_bounds, config.BN, geometry.device)
        sums = _empty(geometry, (pieces.total, geometry.batch, count, segments))
        cut = (on_device(query_bounds, geometry.device), pieces.blocks, pieces.bounds)
        _column(query, key, lse, geometry, (Received(),), geometry.counted(), heads, sums, cut, config)
        return torch.segment_reduce(sums, "sum", lengths=pieces.of_segments, unsafe=True).permute(1, 2, 3, 0)

    return _fitting("pooled", geometry, geometry.head_dim, run)


def _column(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    geometry: Geometry,
    statistics: Sequence[ColumnStatistic],
    counted: Tensor | None,
    heads: Heads,
    sums: Tensor,
    cut: tuple[Tensor | None, ...] | None,
    config: Config,
) -> None:
    from attnstats.kernels.column import column as kernel

    query, key = _input(query), _input(key)
    lse2 = divisor_of(lse) * LOG2E
    if counted is not None:
        lse2 = lse2.masked_fill(~counted[:, None], torch.inf)
    what = (tuple(statistics), sums.shape[2], sums.shape[3] if cut else 1, counted is not None)
    known = ("column", config, *what)
    if known not in geometry.memo:
        geometry.memo[known] = _prepared_column(geometry, config, *what)
    programs, sizes, constants, *_ = geometry.memo[known]
    which = (*_boundaries(geometry), on_device(heads, geometry.device), *(cut or (None, None, None)))
    tensors = (query, key, lse2, sums, _flags(geometry.key_mask), *which)
    _launch(kernel, programs, tensors, sizes, (_strides(query), _strides(key)), constants, config)


def _prepared_column(
    geometry: Geometry,
    config: Config,
    statistics: tuple[ColumnStatistic, ...],
    count: int,
    segments: int,
    counted: bool,
) -> _Prepared:
    longest = _longest(geometry)[1]
    constant = [s.far for s in statistics]
    constants = {
        "COLUMNS": _flat(statistics),
        "FAR": _bounded(max(far[0] for far in constant if far)) if all(constant) else None,
        "FAR_WEIGHTS": tuple(far[1] for far in constant if far),
        "COUNTED": counted,
        "BM": config.BM,
        "BN": config.BN,
        "DIM": geometry.head_dim,
        "BLOCK_DIM": block_dim(geometry.head_dim),
    }
    sizes = (geometry.batch, geometry.query_heads, count, *_sizes(geometry), longest, segments)
    programs = -(-longest // config.BN) * count * _sequences(geometry)
    reach = _farthest(statistics)
    return _Prepared(programs, (*sizes, *_window(geometry), reach, *_score(geometry)), constants, config)


class Asked(NamedTuple):
    """What statistics ask of A in the backward pass, on top of what the output does."""

    plan: GradientPlan
    rows: Tensor | None  # [plan.rows and entropy, B, Hq, Tq] gradients
    columns: Tensor | None  # [plan.columns, B, Hq, Tk] gradients of sums
    shift: Tensor | None  # [B, Hq, Tq] what is the same in all of a row: added to delta


def backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    grad_output: Tensor,
    geometry: Geometry,
    asked: Asked,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients for query, key and value, and delta [B, Hq, Tq]: row sums of A times its own, and the shift."""
    dim = max(geometry.head_dim, geometry.value_dim)
    inputs = (query, key, value, output, lse, grad_output)
    by_queries, by_keys = backward_kernels(geometry, asked.plan)
    grad_query, delta = _fitting(
        by_queries, geometry, dim, lambda config: _backward_queries(inputs, geometry, asked, config)
    )
    grad_key, grad_value = _fitting(
        by_keys, geometry, dim, lambda config: _backward_keys(inputs, delta, geometry, asked, config)
    )
    return grad_query, grad_key, grad_value, delta


def backward_kernels(geometry: Geometry, plan: GradientPlan) -> tuple[Kernel, Kernel]:
    """The entries of the table for dQ and for dK and dV."""
    if plan.weighs or geometry.softcap is not None or geometry.dropout_p > 0:
        return "weighted_queries", "weighted_keys"
    return "backward_queries", "backward_keys"


def _backward_queries(
    inputs: tuple[Tensor, ...], geometry: Geometry, asked: Asked, config: Config
) -> tuple[Tensor, Tensor]:
    from attnstats.kernels.backward import backward_queries as kernel

    dtype = inputs[0].dtype
    query, key, value, output, lse, grad_output = (_input(x) for x in inputs)
    made = _like(query, geometry)
    delta = _empty(geometry, lse.shape)
    tensors = (query, key, value, output, grad_output, made, lse.contiguous(), delta, asked.shift)
    strides = tuple(_strides(x) for x in (query, key, value, output, grad_output, made))
    _launch_backward(kernel, False, geometry, asked, tensors, strides, config)
    return made.to(dtype), delta


def _backward_keys(
    inputs: tuple[Tensor, ...], delta: Tensor, geometry: Geometry, asked: Asked, config: Config
) -> tuple[Tensor, Tensor]:
    from attnstats.kernels.backward import backward_keys as kernel

    dtype = inputs[0].dtype
    query, key, value, _, lse, grad_output = (_input(x) for x in inputs)
    made = _like(key, geometry), _like(value, geometry)
    tensors = (query, key, value, grad_output, *made, lse.contiguous(), delta)
    strides = tuple(_strides(x) for x in (query, key, value, grad_output, *made))
    _launch_backward(kernel, True, geometry, asked, tensors, strides, config)
    return made[0].to(dtype), made[1].to(dtype)


def _launch_backward(
    kernel: Any,
    by_keys: bool,
    geometry: Geometry,
    asked: Asked,
    tensors: tuple[Tensor | None, ...],
    strides: tuple[tuple[int, ...], ...],
    config: Config,
) -> None:
    known = ("backward", by_keys, asked.plan, config)
    if known not in geometry.memo:
        geometry.memo[known] = _prepared_backward(geometry, asked.plan, config, by_keys)
    programs, sizes, constants, *_ = geometry.memo[known]
    counted = _flags(geometry.counted()) if asked.plan.columns else None
    which = (asked.rows, asked.columns, counted, _flags(geometry.key_mask), *_boundaries(geometry))
    tensors = (*tensors, *which, geometry.dropout_seed)
    _launch(kernel, programs, tensors, (*sizes, _dropout(geometry)), strides, constants, config)


def _prepared_backward(geometry: Geometry, plan: GradientPlan, config: Config, by_keys: bool) -> _Prepared:
    longest = _longest(geometry)[by_keys]
    blocks = -(-longest // (config.BN if by_keys else config.BM))
    heads = geometry.key_heads if by_keys else geometry.query_heads
    constants = {
        "ROWS": _flat(plan.far_rows, tails=False),
        "NEAR_ROWS": _flat(plan.near_rows),
        "ENTROPY": int(plan.entropy),
        "COLUMNS": _flat(plan.far_columns),
        "NEAR_COLUMNS": _flat(plan.near_columns),
        "BM": config.BM,
        "BN": config.BN,
        "DIM": geometry.head_dim,
        "BLOCK_DIM": block_dim(geometry.head_dim),
        "VALUE_DIM": geometry.value_dim,
        "BLOCK_VALUE_DIM": block_dim(geometry.value_dim),
    }
    behind, ahead = plan.reach(geometry)
    reach = (_bounded(behind), _bounded(ahead)) if plan.near_rows or plan.near_columns else (None, None)
    sizes = (geometry.batch, geometry.query_heads, *_sizes(geometry), longest, *_window(geometry))
    if not by_keys:
        sizes = (*sizes, *reach)
    programs = blocks * heads * _sequences(geometry)
    return _Prepared(programs, (*sizes, geometry.scale, *_score(geometry)), constants, config)


def _like(x: Tensor, geometry: Geometry) -> Tensor:
    """A buffer of x's shape and, where they are sane, strides; zeros where no program may come by."""
    return torch.empty_like(x) if geometry.packing is None else torch.zeros_like(x)


class _Pieces(NamedTuple):
    """Blocks of keys cut at the boundaries of segments."""

    total: int
    bounds: Tensor  # [total + 1] where each piece begins
    blocks: Tensor  # [blocks + 1] the first piece of each block
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
        torch.tensor([*(index[start] for start in range(0, length, block)), len(starts)], dtype=torch.int32).to(device),
        torch.tensor([b - a for a, b in pairwise(first)], device=device),
    )


# (kernel, device, dtype, head size) to the configurations that did not fit.
_TOO_LARGE: dict[tuple[Any, ...], set[Config]] = {}


@functools.cache
def _out_of_resources() -> type[Exception]:
    from triton.runtime.errors import OutOfResources

    return OutOfResources


def _fitting(kernel: Kernel, geometry: Geometry, dim: int, run: Callable[[Config], T]) -> T:
    """Run with the table's configuration or, where the device lacks the shared memory, with a smaller one."""
    asked = ("tiles", kernel, table_version())
    if asked not in geometry.memo:
        where = (kernel, geometry.device, geometry.dtype, block_dim(dim))
        configs = tuple(candidates(kernel, geometry.device, geometry.dtype, block_dim(dim)))
        geometry.memo[asked] = configs, _TOO_LARGE.setdefault(where, set())
    configs, known = geometry.memo[asked]
    for config in configs:
        if config not in known:
            try:
                return run(config)
            except _out_of_resources():
                known.add(config)
    raise ValueError(
        f"query: head_dim {dim} in {geometry.dtype} needs more shared memory than {geometry.device} has, in every "
        f"configuration of the {kernel} kernel; backend='tiled' would work"
    )


def _launch(
    kernel: Any,
    programs: int,
    tensors: tuple[Tensor | None, ...],
    sizes: tuple[float | None, ...],
    strides: tuple[tuple[int, ...], ...],
    constants: dict[str, Any],
    config: Config,
) -> None:
    """The one place where a kernel starts: on the device of its tensors, which may not be the current one."""
    if programs == 0:  # packed sequences without a token
        return
    device = tensors[0].device  # type: ignore[union-attr]
    # Pinned: without fusion score * scale - lse is rounded twice, and Triton's default is about to change.
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True}
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[(programs,)](*tensors, *sizes, *strides, **constants, **options)


def _farthest(statistics: Sequence[DistanceWeighted]) -> int | None:
    """The farthest distance at which a weight is not 0; None: there is none."""
    ends = [None if s.band is None else s.band[1] for s in statistics]
    return None if None in ends else _bounded(max((end for end in ends if end is not None), default=0))


def _bounded(distance: int) -> int:
    """What a 32-bit position can be added to; no sequence is as long."""
    return max(-(2**30), min(distance, 2**30))


def _window(geometry: Geometry) -> tuple[int | None, int | None]:
    left, right = geometry.left, geometry.right
    return None if left is None else _bounded(left), None if right is None else _bounded(right)


def _sequences(geometry: Geometry) -> int:
    return geometry.batch if geometry.packing is None else geometry.packing.count


def _longest(geometry: Geometry) -> tuple[int, int]:
    """Queries and keys of the longest sequence."""
    if geometry.packing is None:
        return geometry.query_length, geometry.key_length
    return geometry.packing.max_queries, geometry.packing.max_keys


def _boundaries(geometry: Geometry) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if geometry.packing is None else (geometry.packing.queries, geometry.packing.keys)


def _sizes(geometry: Geometry) -> tuple[int, ...]:
    return geometry.group, geometry.offset, geometry.query_length, geometry.key_length


def _score(geometry: Geometry) -> tuple[float, float | None]:
    """scale2 and cap2 of tiles.scores."""
    return geometry.scale * LOG2E, None if geometry.softcap is None else geometry.softcap * LOG2E


def _dropout(geometry: Geometry) -> float | None:
    return None if geometry.dropout_seed is None else geometry.dropout_p


def _sinks2(geometry: Geometry) -> Tensor | None:
    return None if geometry.sinks is None else geometry.sinks.detach().float() * LOG2E


def _empty(geometry: Geometry, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, fill: float = 0.0) -> Tensor:
    """A buffer that a kernel fills. Tokens outside all packed sequences are nobody's: there it starts with `fill`."""
    if geometry.packing is None:
        return torch.empty(shape, dtype=dtype, device=geometry.device)
    return torch.full(shape, fill, dtype=dtype, device=geometry.device)


def _slots(plan: Plan, geometry: Geometry, slots: int, heads: int) -> Tensor:
    """[columns, slots, B, heads, Tk] zeros: where each query block leaves its part of a key's band columns."""
    shape = (len(plan.band_columns), slots, geometry.batch, heads, geometry.key_length)
    return torch.zeros(shape, dtype=torch.float32, device=geometry.device)


def slot_count(behind: int, ahead: int, block_rows: int) -> int:
    return 1 + -(-behind // block_rows) + -(-ahead // block_rows)


def _strides(x: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0, 0) if x is None else x.stride()


def _flags(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.to(torch.uint8, memory_format=torch.contiguous_format)


def _input(x: Tensor) -> Tensor:
    """As the kernels can take it: no bfloat16 in the interpreter, whose arithmetic on it is wrong (it works on bit
    patterns), and no rows so far apart that an offset within a tile passes 32 bits."""
    if x.requires_grad:
        x = x.detach()
    if max(x.stride()[2:]) > 2**22:
        x = x.contiguous()
    return x.float() if interpreted() and x.dtype == torch.bfloat16 else x


def on_device(numbers: tuple[int, ...] | None, device: torch.device) -> Tensor | None:
    return None if numbers is None else _constant(numbers, device)


@functools.lru_cache(maxsize=256)
def _constant(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """Made once: a copy from the host can't be captured into a CUDA graph."""
    return torch.tensor(numbers, dtype=torch.int32, device=device)


def _flat(statistics: Iterable[Any], tails: bool = True) -> tuple[Any, ...]:
    """The statistics' weights as the flat constexpr tuple of kernels/tiles.py."""
    flat: list[Any] = []
    for s in statistics:
        weight = kernel_weight(s)
        # Triton's cache key of a tuple names the functions in it but not their source: the digest does.
        digest = getattr(weight, "cache_key", "")
        flat += [weight, *(*s.parameters, 0, 0)[:2], s.tail if tails else 0.0, digest]
    return tuple(flat)


def kernel_weight(statistic: Any) -> Any:
    """The device function of a statistic's weight: its own, or for a statistic of the catalogue that of its name."""
    from attnstats.kernels import weights

    if isinstance(statistic, Summed):
        return kernel_weight(statistic.of)
    if statistic.kernel_weight is None and CATALOGUE.get(statistic.name) is type(statistic):
        return getattr(weights, statistic.name, None)
    return statistic.kernel_weight


def _power_of_two(number: int) -> int:
    return 1 << (max(number, 1) - 1).bit_length()


def block_dim(dim: int) -> int:
    return max(16, _power_of_two(dim))
