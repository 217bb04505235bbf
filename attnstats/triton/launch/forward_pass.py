"""Attention with the statistics of its pass, and decoding, where the keys are cut into splits that are combined."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from attnstats.core.geometry import Geometry
from attnstats.kernels.arguments import Strides
from attnstats.statistics import Statistic
from attnstats.triton.configs import (
    INTERPRETED_SPLIT_KEYS,
    MAX_DECODED,
    MAX_PACKED_HEADS,
    SPLIT_KEYS,
    Config,
    Kernel,
    band_width,
    chunk,
    interpreted,
)
from attnstats.triton.launch import arguments
from attnstats.triton.launch.arguments import RowLse
from attnstats.triton.launch.band_pass import add_slots, band_reach, column_slots, slot_count
from attnstats.triton.launch.start import Launch, Prepared, fitting, prepare, remembered, start, start_prepared
from attnstats.triton.plan import Plan

COMBINE = Config(16, 0, 4, 2)
MAX_MARKS = 64  # segments of a pass; more would take too many registers

T = TypeVar("T")


def splits(geometry: Geometry) -> int:
    """The number of parts that the keys are cut into when a few queries meet many of them, 0: they are not."""
    split = _split_keys()
    queries, keys = arguments.longest(geometry)
    return -(-geometry.key_length // split) if queries <= MAX_DECODED and keys >= 2 * split else 0


def _split_keys() -> int:
    return INTERPRETED_SPLIT_KEYS if interpreted() else SPLIT_KEYS


class Attended(NamedTuple):
    """The results of an attention pass."""

    output: Tensor
    row_lse: RowLse
    tensors: dict[Statistic, Tensor]


def forward(query: Tensor, key: Tensor, value: Tensor, geometry: Geometry, plan: Plan, with_pivot: bool) -> Attended:
    """Attention with the statistics of its pass. with_pivot: `row_lse` has a pivot and a factor, for a later pass."""
    return _fitting(geometry, plan, lambda config: _attend(query, key, value, geometry, plan, with_pivot, config))


def rows(query: Tensor, key: Tensor, row_lse: RowLse, geometry: Geometry, plan: Plan) -> dict[Statistic, Tensor]:
    """The row statistics of the plan from an lse that came with the call."""
    return _fitting(geometry, plan, lambda config: _rows(query, key, row_lse, geometry, plan, config))


def _fitting(geometry: Geometry, plan: Plan, run: Callable[[Config], T]) -> T:
    kernel: Kernel = "decode" if splits(geometry) else "forward_loop" if plan.in_loop else "forward"
    return fitting(kernel, geometry, max(geometry.head_dim, geometry.value_dim), run)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, geometry: Geometry, plan: Plan, with_pivot: bool, config: Config
) -> Attended:
    parts, dtype = splits(geometry), query.dtype
    query, key, value = arguments.as_input(query), arguments.as_input(key), arguments.as_input(value)
    shape: tuple[int, ...] = (geometry.batch, geometry.query_heads, geometry.query_length)
    if parts:
        shape = (parts, *shape)
    output = _output(geometry, shape, query.dtype)
    lse = None if parts else arguments.buffer(geometry, shape, fill=-torch.inf)
    pivot = factor = None
    if parts or with_pivot:
        pivot, factor = (arguments.buffer(geometry, shape, fill) for fill in (torch.inf, 1.0))
    sinks = arguments.sinks(geometry)
    in_rows, columns, marked = _start(
        geometry,
        plan,
        config,
        parts,
        marks_of(geometry, plan.segments),
        query=query,
        key=key,
        value=value,
        output=output,
        lse=lse,
        pivot=pivot,
        factor=factor,
        sinks=None if parts else sinks,
        strides=Strides(query.stride(), key.stride(), value.stride(), (output[0] if parts else output).stride()),
    )
    if lse is None:
        assert pivot is not None
        assert factor is not None
        output, row_lse, in_rows = _combine(output, pivot, factor, in_rows, sinks, plan, geometry, query.dtype)
    else:
        row_lse = RowLse(lse, pivot, factor)
    return Attended(output.to(dtype), row_lse, _results(plan, in_rows, columns, marked, geometry))


def _rows(
    query: Tensor, key: Tensor, row_lse: RowLse, geometry: Geometry, plan: Plan, config: Config
) -> dict[Statistic, Tensor]:
    marks = marks_of(geometry, plan.segments)
    in_rows, columns, marked = _start_rows(query, key, row_lse, geometry, plan, config, marks)
    return _results(plan, in_rows, columns, marked, geometry)


def segments(query: Tensor, key: Tensor, row_lse: RowLse, geometry: Geometry, statistic: Statistic) -> Tensor:
    """[B, Hq, Tq, S] in passes of their own, MAX_MARKS segments in each."""
    marks, nothing = marks_of(geometry, (statistic,)), Plan.of((), geometry.is_causal)
    assert marks is not None

    def run(config: Config, marks: Tensor) -> Tensor:
        _, _, marked = _start_rows(query, key, row_lse, geometry, nothing, config, marks)
        assert marked is not None
        return marked if row_lse.factor is None else marked * row_lse.factor[..., None]

    dim = max(geometry.head_dim, geometry.value_dim)
    kernel: Kernel = "decode" if splits(geometry) else "forward_loop"
    parts = [
        fitting(kernel, geometry, dim, lambda config, part=part: run(config, part))  # type: ignore[misc]
        for part in marks.split(MAX_MARKS, -1)
    ]
    return torch.cat(parts, -1)[..., : geometry.shape_of(statistic)[-1]]


def marks_of(geometry: Geometry, statistics: tuple[Statistic, ...]) -> Tensor | None:
    """[B | 1, Tk, n] in the dtype of the inputs: 1 where a key lies in a segment, side by side for all statistics, and
    zeros, so that n is what matmuls and the kernels' tiles take. None: there are no segments."""
    if not statistics:
        return None
    key = "marks", statistics
    marks: Tensor | None = geometry.memo.get(key)
    if marks is None:
        dtype = torch.float32 if interpreted() else geometry.dtype
        members = [geometry.memberships(s) for s in statistics]
        rows = max(map(len, members))
        marks = torch.cat([x.expand(rows, -1, -1) for x in members], -1).to(dtype)
        count = marks.shape[-1]
        padded = arguments.block_dim(count) if count <= MAX_MARKS else -(-count // MAX_MARKS) * MAX_MARKS
        marks = torch.nn.functional.pad(marks, (0, padded - count))
        if geometry.device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
            geometry.memo[key] = marks
    return marks


def _start_rows(
    query: Tensor,
    key: Tensor,
    row_lse: RowLse,
    geometry: Geometry,
    plan: Plan,
    config: Config,
    marks: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`_start` from an lse, the splits added up."""
    parts = splits(geometry)
    query, key = arguments.as_input(query), arguments.as_input(key)
    in_rows, columns, marked = _start(
        geometry,
        plan,
        config,
        parts,
        marks,
        query=query,
        key=key,
        value=None,
        output=None,
        lse=None,
        pivot=row_lse.pivots(geometry),
        factor=None,
        sinks=None,
        strides=Strides(query.stride(), key.stride()),
    )
    if parts:
        in_rows, marked = in_rows.sum(1), None if marked is None else marked.sum(0)
    return in_rows, columns, marked


def _start(
    geometry: Geometry, plan: Plan, config: Config, parts: int, marks: Tensor | None, **tensors: Any
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Start the kernel with these tensors; return its rows [rows, (splits), B, Hq, Tq], its columns, and what marks
    [B | 1, Tk, MARKS] give, [(splits), B, Hq, Tq, MARKS]."""
    from_lse = tensors["value"] is None
    streams = (tensors["key"],) if from_lse else (tensors["key"], tensors["value"])
    described = not parts and arguments.described(geometry, *streams)  # a split is soon over
    width = 0 if marks is None else marks.shape[-1]
    prepared = remembered(geometry, _prepare_forward, plan, config, from_lse, parts, described, width)
    shape = (*((parts,) if parts else ()), geometry.batch, geometry.query_heads, geometry.query_length)
    in_rows = arguments.buffer(geometry, (len(plan.in_rows) + 2 * len(plan.top), *shape))
    marked = None
    if marks is not None:
        marks = marks.contiguous()[:, None]  # one head
        tensors["strides"] = tensors["strides"]._replace(
            marks=(marks.stride(0) * (len(marks) > 1), *marks.stride()[1:])
        )
        marked = torch.empty((*shape, width), dtype=torch.float32, device=geometry.device)
        marked = arguments.filled(marked, geometry, -2)
    columns = column_slots(geometry, plan, prepared.slots, geometry.query_heads)
    start_prepared(
        prepared,
        geometry,
        rows=in_rows,
        columns=columns,
        marks=marks,
        marked=marked,
        query_counts=arguments.counts(geometry),
        reach=arguments.on_device(prepared.reach, geometry.device),  # type: ignore[arg-type]
        dropout=arguments.dropout(geometry),
        **tensors,
    )
    return in_rows, add_slots(columns, geometry), marked


def _results(
    plan: Plan, in_rows: Tensor, columns: Tensor, marked: Tensor | None, geometry: Geometry
) -> dict[Statistic, Tensor]:
    in_rows, top = in_rows[: len(plan.in_rows)], in_rows[len(plan.in_rows) :]
    results = dict(zip((*plan.in_rows, *plan.band_columns), (*in_rows.unbind(), *columns.unbind()), strict=True))
    if marked is not None:
        widths = [geometry.shape_of(s)[-1] for s in plan.segments]
        parts = marked[..., : sum(widths)].split(widths, -1)
        results |= zip(plan.segments, parts, strict=True)
    return results | dict.fromkeys(plan.top, top.movedim(0, -1)[..., None])


def _output(geometry: Geometry, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """[*shape, value_dim]: float32 for splits; else in BTHD memory order, which models continue with."""
    size = (*shape, geometry.value_dim)
    if len(shape) == 4:
        output = torch.empty(size, dtype=torch.float32, device=geometry.device)
    else:
        output = torch.empty_permuted(size, (0, 2, 1, 3), dtype=dtype, device=geometry.device)
    return arguments.filled(output, geometry, -2)


def forward_tile(geometry: Geometry, config: Config) -> tuple[int, Config]:
    """Heads packed into a tile of the forward kernel, and the tile's positions and keys."""
    if geometry.dropout_p > 0:  # random numbers take the registers of half a tile
        config = config._replace(BN=max(16, config.BN // 2))
    if splits(geometry):
        heads = min(MAX_PACKED_HEADS, arguments.power_of_two(geometry.group))
        rows = arguments.power_of_two(arguments.longest(geometry)[0])
        return heads, config._replace(BM=max(config.BM // heads, rows))
    # No row of a tile is empty: a power of two that divides the group. Heads in one tile share the band's keys.
    heads = min(config.BM // 16, MAX_PACKED_HEADS, geometry.group & -geometry.group)
    return heads, config._replace(BM=config.BM // heads)


def _prepare_forward(
    geometry: Geometry, plan: Plan, config: Config, from_lse: bool, parts: int, described: bool, marks: int
) -> Prepared:
    from attnstats.kernels.forward import forward as kernel

    heads, config = forward_tile(geometry, config)
    sizes = arguments.sizes(geometry, config.BM)
    band_keys = band_width(config, geometry.dtype)
    constants = {
        "MOMENT": len(plan.moment),
        "LOOP_ROWS": arguments.weights(plan.loop_rows),
        **plan.whole_row_constants,
        "MARKS": marks,
        "TOP": len(plan.top),
        "BAND_ROWS": arguments.weights(plan.band_rows, geometry.tail_of),
        "BAND_COLUMNS": arguments.weights(plan.band_columns),
        "BAND_BOUND": plan.bound(geometry, config.BM + band_keys),
        "FROM_LSE": from_lse,
        "SPLIT_KEYS": _split_keys() if parts else 0,
        "CHUNK": chunk(geometry.device),
        "HEADS": heads,
        "BM": config.BM,
        "BN": config.BN,
        "BAND_BN": band_keys,
        **band_reach(geometry, plan),
        **arguments.dims(geometry),
        "DESCRIBED": described,
    }
    programs = sizes.n_blocks * -(-geometry.group // heads) * geometry.key_heads * geometry.batch * max(parts, 1)
    slots, reach = slot_count(*plan.reach(geometry), config.BM), plan.reach_of_heads(geometry)
    return prepare(geometry, kernel, programs, constants, config, sizes, arguments.score(geometry), slots, reach)


def _combine(
    output_parts: Tensor,
    pivots: Tensor,
    factors: Tensor,
    row_parts: Tensor,
    sinks: Tensor | None,
    plan: Plan,
    geometry: Geometry,
    dtype: torch.dtype,
) -> tuple[Tensor, RowLse, Tensor]:
    """Output, lse and rows of [splits, ...] parts."""
    output = output_parts.new_empty(output_parts.shape[1:], dtype=dtype)
    row_lse = RowLse(*(torch.empty_like(pivots[0]) for _ in range(3)))
    rows = row_parts.new_empty(len(row_parts), *row_lse.lse.shape)
    launch = remembered(geometry, _prepare_combine, plan)
    parts = dict(
        output_parts=output_parts,
        pivots=pivots,
        factors=factors,
        row_parts=row_parts,
        output=output,
        rows=rows,
        sinks=sinks,
        n_rows=row_lse.lse.numel(),
        n_splits=len(pivots),
        n_query_heads=geometry.query_heads,
        n_queries=geometry.query_length,
        **row_lse._asdict(),
    )
    start(launch, parts)
    return output, row_lse, rows


def _prepare_combine(geometry: Geometry, plan: Plan) -> Launch:
    from attnstats.kernels.combine import combine as kernel

    constants = {
        "LOOP_ROWS": len(plan.moment) + len(plan.loop_rows),
        **plan.whole_row_constants,
        "BM": COMBINE.BM,
        "VALUE_DIM": geometry.value_dim,
        "BLOCK_VALUE_DIM": arguments.block_dim(geometry.value_dim),
    }
    rows = geometry.batch * geometry.query_heads * geometry.query_length
    return Launch(kernel, -(-rows // COMBINE.BM), geometry.device, constants, COMBINE)
