"""Band statistics from an lse, and what the forward pass needs for its own band."""

from __future__ import annotations

import torch
from torch import Tensor

from attnstats.core.geometry import Geometry
from attnstats.kernels.arguments import Strides
from attnstats.statistics import Statistic
from attnstats.triton.configs import MAX_PACKED_HEADS, Config, interpreted
from attnstats.triton.launch import arguments
from attnstats.triton.launch.arguments import RowLse
from attnstats.triton.launch.start import Prepared, fitting, prepare, remembered, start_prepared
from attnstats.triton.plan import Heads, Plan


def slot_count(behind: int, ahead: int, block_rows: int) -> int:
    """The number of query blocks that a key's band column may come from."""
    return 1 + -(-behind // block_rows) + -(-ahead // block_rows)


def column_slots(geometry: Geometry, plan: Plan, slots: int, heads: int) -> Tensor:
    """[columns, slots, B, heads, Tk] zeros: where each query block leaves its part of a key's band columns."""
    shape = (len(plan.band_columns), slots, geometry.batch, heads, geometry.key_length)
    return torch.zeros(shape, dtype=torch.float32, device=geometry.device)


def add_slots(columns: Tensor, geometry: Geometry) -> Tensor:
    """[columns, B, heads, Tk] the sums over slots; NaN in sequences that are longer than the call said."""
    if not columns.shape[0]:
        return columns
    sums = columns.sum(1)
    packing = geometry.packing
    if packing is None or not packing.believed:
        return sums
    return sums.masked_fill_(packing.within_longer(packing.keys, geometry.key_length), torch.nan)


def band_reach(geometry: Geometry, plan: Plan) -> dict[str, int]:
    """The constants of how far a band goes."""
    behind, ahead = plan.reach(geometry)
    return {"BEHIND": behind, "ROWS_BEHIND": plan.rows_behind(geometry), "AHEAD": ahead}


def band_tile(geometry: Geometry, heads: Heads, config: Config) -> tuple[int, Config]:
    """Heads packed into a tile of the band kernel, and the tile's positions and keys."""
    packed = 1 if heads is not None else min(MAX_PACKED_HEADS, arguments.power_of_two(geometry.group))
    if geometry.dtype == torch.float32 and not interpreted():
        packed = min(packed, max(1, config.BM // 16))  # more rows than the table says would spill
    alone = geometry.query_weight is None and geometry.paged is None
    rows = config.BM if alone else config.BM // 2  # weights and the places of pages take registers, too
    positions = max(16, rows // packed)
    return packed, config._replace(BM=positions)


def band(
    query: Tensor, key: Tensor, row_lse: RowLse, geometry: Geometry, plan: Plan, heads: Heads
) -> dict[Statistic, Tensor]:
    """The plan's band statistics, of these heads, from the lse of all heads."""
    dim = geometry.head_dim
    return fitting("band", geometry, dim, lambda config: _band(query, key, row_lse, geometry, plan, heads, config))


def _band(
    query: Tensor, key: Tensor, row_lse: RowLse, geometry: Geometry, plan: Plan, heads: Heads, config: Config
) -> dict[Statistic, Tensor]:
    prepared = remembered(geometry, _prepare_band, plan, config, heads)
    query, key = arguments.as_input(query), arguments.as_input(key)
    count = arguments.head_count(geometry, heads)
    rows = arguments.buffer(geometry, (len(plan.band_rows), geometry.batch, count, geometry.query_length))
    columns = column_slots(geometry, plan, prepared.slots, count)
    start_prepared(
        prepared,
        geometry,
        query=query,
        key=key,
        pivot=row_lse.pivot_or_lse,
        factor=row_lse.factor,
        rows=rows,
        columns=columns,
        query_counts=arguments.counts(geometry),
        sinks=arguments.sinks(geometry),
        pages=arguments.pages(geometry),
        heads=arguments.on_device(heads, geometry.device),
        strides=Strides(query.stride(), key.stride()),
    )
    return dict(zip(plan.bands, (*rows.unbind(), *add_slots(columns, geometry).unbind()), strict=True))


def _prepare_band(geometry: Geometry, plan: Plan, config: Config, heads: Heads) -> Prepared:
    from attnstats.kernels.band import band as kernel

    packed, config = band_tile(geometry, heads, config)
    constants = {
        "ROWS": arguments.weights(plan.band_rows, geometry.tail_of),
        "COLUMNS": arguments.weights(plan.band_columns),
        "HEADS": packed,
        "BM": config.BM,
        "BN": config.BN,
        **band_reach(geometry, plan),
        **arguments.dims(geometry, with_value=False),
        "PAGE": 0 if geometry.paged is None else geometry.paged.page_size,
    }
    count = arguments.head_count(geometry, heads)
    sizes = arguments.sizes(geometry, config.BM)._replace(n_heads=count)
    of_row = -(-geometry.group // packed) * geometry.key_heads if heads is None else count
    programs = sizes.n_blocks * of_row * geometry.batch
    slots = slot_count(*plan.reach(geometry), config.BM)
    prepared = prepare(geometry, kernel, programs, constants, config, sizes, arguments.score(geometry), slots)
    if plan.bound(geometry, config.BM + config.BN):
        return prepared
    return prepared._replace(visible=prepared.visible._replace(left=None))
