"""Launches kernels/: which kernel computes what, with which grid, tiles and scratch. The backend "triton".

The forward kernel gives output, lse, the rows of its loop and, as its epilogue, the band; `column` takes what
an open horizon needs in a second pass. Without a value, `band`, `forward` (rows only) and `column` start from an
lse. Runs on CUDA and ROCm, and on the CPU in Triton's interpreter. Called from attention.py alone.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnstats.diagonal import is_narrow
from attnstats.geometry import Evaluation, Geometry, Step, divisor_of
from attnstats.statistics import (
    CATALOGUE,
    LSE,
    ColumnStatistic,
    DistanceWeighted,
    Entropy,
    MaxLogit,
    PooledMap,
    Received,
    RowStatistic,
    SinkMass,
    Statistic,
)
from attnstats.sweep import Recomputed, membership
from attnstats.tiled import sink_mass

LOG2E = 1.4426950408889634
MAX_HEAD_DIM = 256


class Config(NamedTuple):
    """Tile sizes (BM queries, BN keys) and launch options of one kernel."""

    BM: int
    BN: int
    num_warps: int = 4
    num_stages: int = 2


# By the widest head size (next power of two) each entry is for; float32 tiles are twice as large and their matmul
# runs without tensor cores. The interpreter gets small tiles, so that short sequences span several.
FORWARD = {64: Config(128, 64, 8, 3), 128: Config(128, 64, 8, 3), 256: Config(64, 32, 8, 2)}
FORWARD_LOOP = {128: Config(64, 64, 8, 3), 256: Config(64, 32, 8, 2)}  # with statistics in the main loop
FORWARD_FP32 = {128: Config(32, 32, 8, 2), 256: Config(32, 16, 8, 2)}
COLUMN = {128: Config(128, 64, 8, 3), 256: Config(64, 64, 8, 2)}
COLUMN_FP32 = {256: Config(32, 32, 8, 2)}
INTERPRETED = Config(32, 16)
BAND = Config(128, 32, 8)  # BM counts the packed rows of one group's heads, which share a key tile
BAND_FP32 = Config(32, 16, 8)
MAX_PACKED_HEADS = 8  # more heads would leave too few positions per tile, and a slot for each


def interpreted() -> bool:
    """Whether kernels are run by Triton's interpreter. Triton reads the variable when it is first imported."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def unavailable(geometry: Geometry) -> str | None:
    """Why this backend can't take a call, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if geometry.device.type == "cpu" and not interpreted():
        return "CPU tensors need Triton's interpreter: set TRITON_INTERPRET=1 before Python starts"
    if geometry.device.type not in ("cpu", "cuda"):
        return f"no kernels for device {geometry.device.type!r}"
    if geometry.dtype == torch.float64:
        return "the kernels take float16, bfloat16 and float32, not float64"
    if max(geometry.head_dim, geometry.value_dim) > MAX_HEAD_DIM:
        return f"head_dim {max(geometry.head_dim, geometry.value_dim)} is over {MAX_HEAD_DIM}"
    if geometry.scale <= 0:
        return f"the online softmax needs scale > 0, got {geometry.scale}"
    return None


def attend(
    query: Tensor, key: Tensor, value: Tensor, geometry: Geometry, statistics: tuple[Statistic, ...]
) -> Evaluation:
    """Output, lse and statistics. The output is differentiable."""
    plan = Plan.of(statistics)
    forward = functools.partial(_attend, plan=plan)
    output, lse, *tensors = Recomputed.apply(query, key, value, geometry, forward)
    results = dict(zip(plan.in_forward, tensors, strict=True))
    with torch.no_grad():
        results |= _beside(query, key, lse, geometry, plan)
        return Evaluation(output, lse, {s: geometry.finish(s, results[s]) for s in statistics})


def from_lse(
    query: Tensor, key: Tensor, lse: Tensor, geometry: Geometry, statistics: tuple[Statistic, ...]
) -> dict[Statistic, Tensor]:
    """The statistics of `A = exp(scores - lse)`; lse (B, Hq, Tq), -inf for rows that see no key."""
    plan = Plan.of(statistics)
    results: dict[Statistic, Tensor] = {}
    if plan.band_rows or plan.band_columns:
        results |= _launch_band(query, key, lse, geometry, plan)
    if plan.loop_rows or plan.entropy:
        rows = plan._replace(band_rows=(), band_columns=())
        results |= _launch_forward(query, key, None, lse, geometry, rows).tensors
    results |= _beside(query, key, lse, geometry, plan)
    return {s: geometry.finish(s, results[s]) for s in statistics}


def plan(geometry: Geometry, statistics: tuple[Statistic, ...], attends: bool) -> list[Step]:
    """What `attend` (or `from_lse`) launches."""
    work = Plan.of(statistics)
    heads = geometry.batch * geometry.query_heads
    pairs = geometry.visible_pairs() * heads
    rows = heads * geometry.query_length
    behind, ahead = work.reach(geometry.is_causal)
    has_band = bool(work.band_rows or work.band_columns)
    steps = []
    config = _forward_config(geometry, work)
    band_config = config if attends else _band_config(geometry)[1]
    scratch = 4 * _slot_count(behind, ahead, band_config.BM) * len(work.band_columns) * heads * geometry.key_length
    band_flops = 2 * rows * (behind + ahead + band_config.BM) * geometry.head_dim if has_band else 0
    tiles = "queries x {0.BM}, keys x {0.BN}, {0.num_warps} warps, {0.num_stages} stages"
    if attends:
        flops = 2 * pairs * (geometry.head_dim + geometry.value_dim) + band_flops
        computes = ", ".join(("output", "lse", *(s.name for s in work.in_forward)))
        epilogue = f", band of {behind + ahead} keys as epilogue" if has_band else ""
        steps.append(Step(f"kernel forward: {tiles.format(config)}{epilogue}", computes, flops, scratch))
    else:
        if has_band:
            names = ", ".join(s.name for s in (*work.band_rows, *work.band_columns))
            steps.append(Step(f"kernel band: {tiles.format(band_config)}", names, band_flops, scratch))
        if work.loop_rows or work.entropy:
            names = ", ".join(s.name for s in (*work.loop_rows, *work.entropy))
            steps.append(
                Step(f"kernel forward, rows only: {tiles.format(config)}", names, 2 * pairs * geometry.head_dim, 0)
            )
    config = _config(COLUMN, COLUMN_FP32, geometry.dtype, _block_dim(geometry.head_dim))
    for together in (*work.column_passes().values(), *((s,) for s in work.maps)):
        segments = [
            s.boundaries(geometry.query_length, geometry.key_length)[0] for s in together if isinstance(s, PooledMap)
        ]
        scratch = 4 * heads * geometry.key_length * sum(len(bounds) - 1 for bounds in segments)
        names = ", ".join(s.name for s in together)
        steps.append(Step(f"kernel column: {tiles.format(config)}", names, 2 * pairs * geometry.head_dim, scratch))
    for sink in work.sinks:
        flops = 2 * rows * sink.count * geometry.head_dim
        steps.append(Step("first keys, gathered, plain PyTorch", sink.name, flops, 4 * rows * sink.count))
    return steps


class Plan(NamedTuple):
    """Which kernel, or which loop of it, computes each statistic."""

    loop_rows: tuple[DistanceWeighted, ...]  # forward's main loop
    entropy: tuple[Statistic, ...]
    max_logit: tuple[Statistic, ...]
    band_rows: tuple[DistanceWeighted, ...]  # forward's epilogue, or the band kernel
    band_columns: tuple[DistanceWeighted, ...]
    columns: tuple[ColumnStatistic, ...]  # the column kernel
    maps: tuple[PooledMap, ...]  # the column kernel, once per map
    sinks: tuple[SinkMass, ...]  # plain PyTorch on a few keys
    lse: tuple[Statistic, ...]

    @staticmethod
    def of(statistics: tuple[Statistic, ...]) -> Plan:
        rows = [s for s in statistics if isinstance(s, RowStatistic)]
        columns = [s for s in statistics if isinstance(s, ColumnStatistic)]
        return Plan(
            loop_rows=tuple(s for s in rows if not is_narrow(s)),
            entropy=tuple(s for s in statistics if isinstance(s, Entropy)),
            max_logit=tuple(s for s in statistics if isinstance(s, MaxLogit)),
            band_rows=tuple(s for s in rows if is_narrow(s)),
            band_columns=tuple(s for s in columns if is_narrow(s)),
            columns=tuple(s for s in columns if not is_narrow(s)),
            maps=tuple(s for s in statistics if isinstance(s, PooledMap)),
            sinks=tuple(s for s in statistics if isinstance(s, SinkMass)),
            lse=tuple(s for s in statistics if isinstance(s, LSE)),
        )

    @property
    def in_rows(self) -> tuple[Statistic, ...]:
        """What the forward kernel stores per query, in its order."""
        return (*self.loop_rows, *self.band_rows, *self.entropy, *self.max_logit)

    @property
    def in_forward(self) -> tuple[Statistic, ...]:
        return (*self.in_rows, *self.band_columns)

    def column_passes(self) -> dict[int | None, tuple[ColumnStatistic, ...]]:
        """The column kernel's passes: statistics that count the same queries go together."""
        counting = dict.fromkeys(s.last_queries for s in self.columns)
        return {last: tuple(s for s in self.columns if s.last_queries == last) for last in counting}

    def reach(self, causal: bool) -> tuple[int, int]:
        """How far the band goes behind and ahead of a query."""
        bands = [s.band for s in (*self.band_rows, *self.band_columns) if s.band]
        behind = max((hi for _, hi in bands), default=0)
        return max(0, behind), 0 if causal else max(0, max((-lo for lo, _ in bands), default=0))


def _attend(query: Tensor, key: Tensor, value: Tensor, geometry: Geometry, plan: Plan) -> Evaluation:
    return _launch_forward(query, key, value, None, geometry, plan)


def _beside(query: Tensor, key: Tensor, lse: Tensor, geometry: Geometry, plan: Plan) -> dict[Statistic, Tensor]:
    """What takes a pass of its own after the lse is known."""
    results: dict[Statistic, Tensor] = dict.fromkeys(plan.lse, lse)
    for last, together in plan.column_passes().items():
        whole = (0, geometry.query_length)
        sums = _launch_column(query, key, lse, geometry, together, geometry.counted(last), whole)
        results |= dict(zip(together, sums[:, 0], strict=True))
    for pooled in plan.maps:
        query_bounds, _ = pooled.boundaries(geometry.query_length, geometry.key_length)
        sums = _launch_column(query, key, lse, geometry, (Received(),), geometry.counted(), query_bounds)[0]
        results[pooled] = (sums @ membership(pooled, geometry)[1]).permute(1, 2, 0, 3)  # [I, B, Hq, J] to [B, Hq, I, J]
    for sink in plan.sinks:
        results[sink] = sink_mass(query, key, lse, geometry, sink)
    return results


def _launch_forward(
    query: Tensor, key: Tensor, value: Tensor | None, lse: Tensor | None, geometry: Geometry, plan: Plan
) -> Evaluation:
    """Attention (value given) or its loop rows from an lse (lse given)."""
    from attnstats.kernels.forward import forward

    dtype = query.dtype
    query, key = _kernel_input(query), _kernel_input(key)
    shape = (geometry.batch, geometry.query_heads, geometry.query_length)
    output = query.new_empty(0)
    if value is None:
        lse2 = divisor_of(lse) * LOG2E  # type: ignore[arg-type]
    else:
        value = _kernel_input(value)
        output = query.new_empty(*shape, geometry.value_dim)
        lse2 = query.new_empty(shape, dtype=torch.float32)  # natural here: the kernel writes what is returned
    block_dim, block_value_dim = _block_dim(geometry.head_dim), _block_dim(geometry.value_dim)
    config = _forward_config(geometry, plan)
    behind, ahead = plan.reach(geometry.is_causal)
    rows = query.new_empty(len(plan.in_rows), *shape, dtype=torch.float32)
    columns = _slots(plan, geometry, behind, ahead, config.BM)
    _launch(
        forward,
        (-(-geometry.query_length // config.BM) * geometry.query_heads * geometry.batch,),
        (query, key, value, output, lse2, _flags(geometry.counted()), _flags(geometry.key_mask), rows, columns),
        _sizes(geometry),
        tuple(_strides(x) for x in (query, key, value, output)),
        {
            "LOOP_ROWS": _flat(plan.loop_rows, tails=False),
            "ENTROPY": len(plan.entropy),
            "MAX_LOGIT": len(plan.max_logit),
            "BAND_ROWS": _flat(plan.band_rows),
            "BAND_COLUMNS": _flat(plan.band_columns),
            "BEHIND": behind,
            "AHEAD": ahead,
            "CAUSAL": geometry.is_causal,
            "MASKED_KEYS": geometry.key_mask is not None,
            "MASKED_QUERIES": geometry.counted() is not None,
            "FROM_LSE": value is None,
            "BM": config.BM,
            "BN": config.BN,
            "BAND_BN": min(BAND.BN, config.BN),
            "DIM": geometry.head_dim,
            "BLOCK_DIM": block_dim,
            "VALUE_DIM": geometry.value_dim,
            "BLOCK_VALUE_DIM": block_value_dim,
        },
        config,
    )
    tensors: dict[Statistic, Tensor] = dict(zip(plan.in_rows, rows, strict=True))
    tensors |= dict(zip(plan.band_columns, columns.sum(1), strict=True))
    return Evaluation(output.to(dtype), lse2, tensors)


def _launch_band(query: Tensor, key: Tensor, lse: Tensor, geometry: Geometry, plan: Plan) -> dict[Statistic, Tensor]:
    from attnstats.kernels.band import band

    query, key = _kernel_input(query), _kernel_input(key)
    heads, config = _band_config(geometry)
    behind, ahead = plan.reach(geometry.is_causal)
    shape = (geometry.batch, geometry.query_heads, geometry.query_length)
    rows = query.new_empty(len(plan.band_rows), *shape, dtype=torch.float32)
    columns = _slots(plan, geometry, behind, ahead, config.BM)
    programs = (
        -(-geometry.query_length // config.BM) * -(-geometry.group // heads) * geometry.key_heads * geometry.batch
    )
    _launch(
        band,
        (programs,),
        (query, key, divisor_of(lse) * LOG2E, _flags(geometry.counted()), _flags(geometry.key_mask), rows, columns),
        _sizes(geometry),
        (_strides(query), _strides(key)),
        {
            "ROWS": _flat(plan.band_rows),
            "COLUMNS": _flat(plan.band_columns),
            "BEHIND": behind,
            "AHEAD": ahead,
            "CAUSAL": geometry.is_causal,
            "MASKED_KEYS": geometry.key_mask is not None,
            "MASKED_QUERIES": geometry.counted() is not None,
            "HEADS": heads,
            "BM": config.BM,
            "BN": config.BN,
            "DIM": geometry.head_dim,
            "BLOCK_DIM": _block_dim(geometry.head_dim),
        },
        config,
    )
    results: dict[Statistic, Tensor] = dict(zip(plan.band_rows, rows, strict=True))
    return results | dict(zip(plan.band_columns, columns.sum(1), strict=True))


def _launch_column(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    geometry: Geometry,
    statistics: Sequence[DistanceWeighted],
    counted: Tensor | None,
    query_bounds: tuple[int, ...],
) -> Tensor:
    """[statistics, segments, B, Hq, Tk] column sums over the counted queries of each segment."""
    from attnstats.kernels.column import column

    query, key = _kernel_input(query), _kernel_input(key)
    lse2 = divisor_of(lse) * LOG2E
    if counted is not None:
        lse2 = lse2.masked_fill(~counted[:, None], torch.inf)
    block_dim = _block_dim(geometry.head_dim)
    config = _config(COLUMN, COLUMN_FP32, geometry.dtype, block_dim)
    segments = len(query_bounds) - 1
    shape = (len(statistics), segments, geometry.batch, geometry.query_heads, geometry.key_length)
    sums = query.new_empty(shape, dtype=torch.float32)
    bounds = torch.tensor(query_bounds, dtype=torch.int32, device=query.device)
    *sizes, query_offset, queries, keys, scale2 = _sizes(geometry)
    _launch(
        column,
        (-(-geometry.key_length // config.BN) * geometry.key_heads * geometry.batch,),
        (query, key, lse2, _flags(geometry.key_mask), bounds, sums),
        (*sizes, segments, query_offset, queries, keys, scale2),
        (_strides(query), _strides(key)),
        {
            "COLUMNS": _flat(statistics),
            "CAUSAL": geometry.is_causal,
            "MASKED_KEYS": geometry.key_mask is not None,
            "BM": config.BM,
            "BN": config.BN,
            "DIM": geometry.head_dim,
            "BLOCK_DIM": block_dim,
        },
        config,
    )
    return sums


def _launch(
    kernel: Any,
    grid: tuple[int],
    tensors: tuple[Tensor | None, ...],
    sizes: tuple[float, ...],
    strides: tuple[tuple[int, ...], ...],
    constants: dict[str, Any],
    config: Config,
) -> None:
    """The one place where a kernel starts: on the device of its tensors, which may not be the current one."""
    device = tensors[0].device  # type: ignore[union-attr]
    # Pinned: without fusion score * scale - lse is rounded twice, and Triton's default is about to change.
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True}
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[grid](*tensors, *sizes, *strides, **constants, **options)


def _sizes(geometry: Geometry) -> tuple[Any, ...]:
    return (
        geometry.batch,
        geometry.query_heads,
        geometry.group,
        geometry.offset,
        geometry.query_length,
        geometry.key_length,
        geometry.scale * LOG2E,
    )


def _strides(x: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0, 0) if x is None or x.dim() != 4 else x.stride()


def _flags(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.to(torch.uint8, memory_format=torch.contiguous_format)


def _slot_count(behind: int, ahead: int, block_rows: int) -> int:
    return 1 + -(-behind // block_rows) + -(-ahead // block_rows)


def _slots(plan: Plan, geometry: Geometry, behind: int, ahead: int, block_rows: int) -> Tensor:
    """[columns, slots, B, Hq, Tk] zeros: where each query block leaves its part of a key's band columns."""
    slots = _slot_count(behind, ahead, block_rows)
    shape = (len(plan.band_columns), slots, geometry.batch, geometry.query_heads, geometry.key_length)
    return torch.zeros(shape, dtype=torch.float32, device=geometry.device)


def _kernel_input(x: Tensor) -> Tensor:
    """The interpreter's arithmetic on bfloat16 is wrong (it works on bit patterns): it gets float32."""
    return x.detach().float() if interpreted() and x.dtype == torch.bfloat16 else x.detach()


def _flat(statistics: Iterable[DistanceWeighted], tails: bool = True) -> tuple[Any, ...]:
    """The statistics' weights as the flat constexpr tuple of kernels/tiles.py."""
    flat: list[Any] = []
    for s in statistics:
        weight = _kernel_weight(s)
        # Triton's cache key of a tuple names the functions in it but not their source: the digest does.
        digest = getattr(weight, "cache_key", "")
        flat += [weight, *(*s.parameters, 0, 0)[:2], s.tail if tails else 0.0, digest]
    return tuple(flat)


def _kernel_weight(statistic: DistanceWeighted) -> Any:
    from attnstats.kernels import weights

    weight = statistic.kernel_weight
    if weight is None and CATALOGUE.get(statistic.name) is type(statistic):
        weight = getattr(weights, statistic.name, None)
    if weight is None:
        raise ValueError(
            f"statistics: {type(statistic).__name__} has no device weight: set kernel_weight to a @triton.jit "
            "function (distance, a, b), or use backend='tiled'"
        )
    return weight


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _block_dim(dim: int) -> int:
    return max(16, _power_of_two(dim))


def _config(table: dict[int, Config], table_fp32: dict[int, Config], dtype: torch.dtype, block_dim: int) -> Config:
    if interpreted():
        return INTERPRETED
    chosen = table_fp32 if dtype == torch.float32 else table
    return next(config for widest, config in chosen.items() if block_dim <= widest)


def _forward_config(geometry: Geometry, plan: Plan) -> Config:
    table = FORWARD_LOOP if plan.loop_rows or plan.entropy else FORWARD
    return _config(table, FORWARD_FP32, geometry.dtype, _block_dim(max(geometry.head_dim, geometry.value_dim)))


def _band_config(geometry: Geometry) -> tuple[int, Config]:
    """Heads packed into a tile of the band kernel, and its tiles."""
    heads = min(MAX_PACKED_HEADS, _power_of_two(geometry.group))
    packed = INTERPRETED if interpreted() else BAND_FP32 if geometry.dtype == torch.float32 else BAND
    rows = max(16, packed.BM // heads)
    return heads, packed._replace(BM=rows, BN=min(packed.BN, rows))
