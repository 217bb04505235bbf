"""Attention with the statistics of its pass, and decoding, where the keys are cut into splits that are combined."""

from __future__ import annotations

import torch
from torch import Tensor

from attnstats.core.geometry import Evaluation, Geometry, divisor_of
from attnstats.kernels.arguments import Strides
from attnstats.statistics import Statistic
from attnstats.triton.configs import (
    INTERPRETED_SPLIT_KEYS,
    MAX_DECODED,
    MAX_PACKED_HEADS,
    SPLIT_KEYS,
    Config,
    Kernel,
    chunk,
    interpreted,
)
from attnstats.triton.launch import arguments
from attnstats.triton.launch.band_pass import band_reach, column_slots, slot_count
from attnstats.triton.launch.start import Launch, Prepared, fitting, prepare, remembered, start, start_prepared
from attnstats.triton.plan import Plan

COMBINE = Config(16, 0, 4, 2)


def splits(geometry: Geometry) -> int:
    """The number of parts that the keys are cut into when a few queries meet many of them, 0: they are not."""
    split = _split_keys()
    queries, keys = arguments.longest(geometry)
    return -(-geometry.key_length // split) if queries <= MAX_DECODED and keys >= 2 * split else 0


def _split_keys() -> int:
    return INTERPRETED_SPLIT_KEYS if interpreted() else SPLIT_KEYS


def forward(
    query: Tensor, key: Tensor, value: Tensor | None, geometry: Geometry, plan: Plan, lse: Tensor | None = None
) -> Evaluation:
    """Attention (with a value), or the rows of its loop from an lse."""
    parts = splits(geometry)
    kernel: Kernel = "decode" if parts else "forward_loop" if plan.in_loop else "forward"
    dim = max(geometry.head_dim, geometry.value_dim)
    return fitting(
        kernel, geometry, dim, lambda config: _forward(query, key, value, geometry, plan, lse, parts, config)
    )


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    geometry: Geometry,
    plan: Plan,
    lse: Tensor | None,
    parts: int,
    config: Config,
) -> Evaluation:
    prepared = remembered(geometry, _prepare_forward, plan, config, value is None, parts, chunk(geometry.device))
    dtype = query.dtype
    query, key = arguments.as_input(query), arguments.as_input(key)
    shape: tuple[int, ...] = (geometry.batch, geometry.query_heads, geometry.query_length)
    if parts:
        shape = (parts, *shape)
    output: Tensor | None = None
    if value is None:
        assert lse is not None
        lse = divisor_of(lse) * arguments.LOG2E
    else:
        value = arguments.as_input(value)
        output = _output(geometry, shape, query.dtype)
        lse = arguments.empty(geometry, shape, fill=-torch.inf)
    rows = arguments.empty(geometry, (len(plan.in_rows), *shape))
    columns = column_slots(geometry, plan, prepared.slots, geometry.query_heads)
    sinks2 = arguments.sinks2(geometry)
    strides = Strides(query.stride(), key.stride())
    if value is not None and output is not None:
        strides = Strides(*strides[:2], value.stride(), (output[0] if parts else output).stride())
    start_prepared(
        prepared,
        geometry,
        query=query,
        key=key,
        value=value,
        output=output,
        lse=lse,
        rows=rows,
        columns=columns,
        query_mask=arguments.flags(geometry.query_mask),
        sinks=None if parts else sinks2,
        reach=arguments.on_device(plan.reach_of_heads(geometry), geometry.device),
        dropout=arguments.dropout(geometry),
        strides=strides,
    )
    if parts and output is not None:
        output, lse, rows = _combine(output, lse, rows, sinks2, plan, geometry, query.dtype)
    elif parts:
        rows = rows.sum(1)
    results: dict[Statistic, Tensor] = dict(zip(plan.in_rows, rows, strict=True))
    if plan.band_columns:
        results |= dict(zip(plan.band_columns, columns.sum(1), strict=True))
    return Evaluation(query if output is None else output.to(dtype), lse, results)


def _output(geometry: Geometry, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """[*shape, value_dim]: float32 for splits; else in BTHD memory order, which models continue with."""
    if len(shape) == 4:
        return arguments.empty(geometry, (*shape, geometry.value_dim))
    size = (*shape, geometry.value_dim)
    output = torch.empty_permuted(size, (0, 2, 1, 3), dtype=dtype, device=geometry.device)
    return output if geometry.packing is None else output.zero_()


def forward_tile(geometry: Geometry, config: Config) -> tuple[int, Config]:
    """Heads packed into a tile of the forward kernel, and the tile's positions and keys."""
    if splits(geometry):
        heads = min(MAX_PACKED_HEADS, arguments.power_of_two(geometry.group))
        rows = arguments.power_of_two(arguments.longest(geometry)[0])
        return heads, config._replace(BM=max(config.BM // heads, rows))
    # No row of a tile is empty: a power of two that divides the group. Heads in one tile share the band's keys.
    heads = min(config.BM // 16, MAX_PACKED_HEADS, geometry.group & -geometry.group)
    return heads, config._replace(BM=config.BM // heads)


def _prepare_forward(
    geometry: Geometry, plan: Plan, config: Config, from_lse: bool, parts: int, chunk: int
) -> Prepared:
    from attnstats.kernels.forward import forward as kernel

    sizes = arguments.sizes(geometry)._replace(n_sequences=arguments.sequence_count(geometry))
    heads, config = forward_tile(geometry, config)
    constants = {
        "MOMENT": len(plan.moment),
        "LOOP_ROWS": arguments.weights(plan.loop_rows),
        **plan.whole_row_constants,
        "BAND_ROWS": arguments.weights(plan.band_rows, geometry.tail_of),
        "BAND_COLUMNS": arguments.weights(plan.band_columns),
        "BAND_BOUND": plan.bound(geometry),
        "FROM_LSE": from_lse,
        "SPLIT_KEYS": _split_keys() if parts else 0,
        "CHUNK": chunk,
        "HEADS": heads,
        "BM": config.BM,
        "BN": config.BN,
        "BAND_BN": min(64, config.BN),
        **band_reach(geometry, plan),
        **arguments.dims(geometry),
    }
    blocks = -(-sizes.longest // config.BM) * -(-geometry.group // heads) * geometry.key_heads
    programs = blocks * arguments.sequence_count(geometry) * max(parts, 1)
    slots = slot_count(*plan.reach(geometry), config.BM)
    return prepare(geometry, kernel, programs, constants, config, sizes, slots)


def _combine(
    output_parts: Tensor,
    lse_parts: Tensor,
    row_parts: Tensor,
    sinks2: Tensor | None,
    plan: Plan,
    geometry: Geometry,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, lse and rows of [splits, ...] parts."""
    output = output_parts.new_empty(output_parts.shape[1:], dtype=dtype)
    lse = lse_parts.new_empty(lse_parts.shape[1:])
    rows = row_parts.new_empty(len(row_parts), *lse.shape)
    launch = remembered(geometry, _prepare_combine, plan)
    start(
        launch,
        output_parts=output_parts,
        lse_parts=lse_parts,
        row_parts=row_parts,
        output=output,
        lse=lse,
        rows=rows,
        sinks=sinks2,
        n_rows=lse.numel(),
        n_splits=len(lse_parts),
        n_query_heads=geometry.query_heads,
        n_queries=geometry.query_length,
    )
    return output, lse, rows


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
