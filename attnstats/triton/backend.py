"""The backend "triton": runs the passes that plan.py makes; launch/ starts the kernels.

The forward kernel gives output, lse, the rows of its loop and, as its epilogue, the band; `column` takes open horizons
in a second pass. For a few queries the keys are cut into splits (decode, split-KV); then the band has a pass of its
own, as it has when statistics start from an lse. Runs on CUDA and ROCm, and on the CPU in Triton's interpreter.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

from attnstats.core.autograd import Gradients, GradientsByStatistic, Residuals, differentiable_pass
from attnstats.core.geometry import Evaluation, Geometry, needs_pivot
from attnstats.core.passes import Pass
from attnstats.core.scores import sink_gradient, sink_mass
from attnstats.statistics import PooledMap, Statistic, TopKeys
from attnstats.triton import launch, plan
from attnstats.triton.configs import Config, Kernel, candidates, interpreted
from attnstats.triton.plan import GradientPlan, Heads, Plan

NAME = "triton"
COMPUTES = frozenset({"weight", "row", "first_keys", "segments", "top", "pooled", "lse"})
READS_PAGES = frozenset({"band"})
MAX_HEAD_DIM = 256

RunPass = Callable[[Tensor, Tensor, launch.RowLse, Geometry, Pass, Plan], dict[Statistic, Tensor]]


def unavailable(geometry: Geometry) -> str | None:
    """The reason why this backend can't take a call, or None."""
    if not _has_triton():
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
    for s in geometry.statistics:
        kind = type(s).__name__
        if s.method == "row" and type(s) not in plan.WHOLE_ROWS:
            names = " and ".join(each.__name__ for each in plan.WHOLE_ROWS)
            return f"the kernels compute {names} of whole rows, not {kind}"
        if s.method == "weight" and launch.kernel_weight(s) is None:
            return (
                f"{kind} has no device weight; set its kernel_weight to a @triton.jit function "
                "(distance, a, b) -> float32"
            )
    return None


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def attend(query: Tensor, key: Tensor, value: Tensor, geometry: Geometry) -> Evaluation:
    """Output, lse and statistics. Gradients go through the output and, if differentiable, through the statistics."""
    return differentiable_pass(query, key, value, geometry, _attend, gradients)


def _attend(query: Tensor, key: Tensor, value: Tensor, geometry: Geometry) -> Evaluation:
    (_, lists), *later = _planned(geometry, attends=True)
    exact = needs_pivot(geometry.dtype)
    with_pivot = exact or any(each.run != "lse" for each, _ in later)
    output, row_lse, results = launch.forward(query, key, value, geometry, lists, with_pivot)
    results = _of_heads(results, geometry)
    for each, of_each in later:
        results |= _RUN[each.run](query, key, row_lse, geometry, each, of_each)
    tensors = {s: geometry.finish(s, results[s]) for s in geometry.statistics}
    return Evaluation(output, row_lse.lse, tensors, *(row_lse[1:] if exact else ()))


def from_lse(query: Tensor, key: Tensor, lse: Tensor, geometry: Geometry) -> dict[Statistic, Tensor]:
    """The statistics of `A = exp(scores - lse)`; lse (B, Hq, Tq), -inf for rows that see no key."""
    results: dict[Statistic, Tensor] = {}
    row_lse = launch.RowLse(lse)
    for each, lists in _planned(geometry, attends=False):
        results |= _RUN[each.run](query, key, row_lse, geometry, each, lists)
    return {s: geometry.finish(s, results[s]) for s in geometry.statistics}


def _planned(geometry: Geometry, attends: bool) -> tuple[tuple[Pass, Plan], ...]:
    """The passes in order, each with its lists."""
    key = "passes", attends
    planned: tuple[tuple[Pass, Plan], ...] | None = geometry.memo.get(key)
    if planned is None:
        passes = plan.passes(geometry, attends, launch.splits(geometry))
        planned = geometry.memo[key] = tuple((each, Plan.of(each.statistics, geometry.is_causal)) for each in passes)
    return planned


def gradients(
    residuals: Residuals, grad_output: Tensor, geometry: Geometry, of_statistics: GradientsByStatistic
) -> Gradients:
    """Gradients of what `attend` returned; `of_statistics` has each statistic that carries one, with its value."""
    row_lse = launch.RowLse(residuals.lse)
    if needs_pivot(geometry.dtype):
        assert residuals.pivot is not None
        row_lse = launch.RowLse(residuals.lse, residuals.pivot, residuals.factor)
    of_segments = {s: x for s, x in of_statistics.items() if s.method == "segments"}
    others = {s: x for s, x in of_statistics.items() if s not in of_segments}
    of_map, excess = _map_gradients(row_lse, geometry, others)
    grad_query, grad_key, grad_value, delta = launch.backward(residuals, row_lse, grad_output, geometry, of_map)
    if excess is not None:
        delta = delta - excess
    if of_segments:
        of_query, of_key, of_delta = _segment_gradients(residuals, row_lse, geometry, of_segments)
        grad_query, grad_key = (grad_query + of_query).to(grad_query.dtype), (grad_key + of_key).to(grad_key.dtype)
        delta = delta + of_delta
    of_sinks = None if geometry.sinks is None else sink_gradient(row_lse.sink_share(geometry), delta, geometry)
    return Gradients(grad_query, grad_key, grad_value, of_sinks)


def _segment_gradients(
    residuals: Residuals, row_lse: launch.RowLse, geometry: Geometry, of_segments: GradientsByStatistic
) -> tuple[Tensor, Tensor, Tensor]:
    """dQ, dK and delta of masses on segments, which are the output for values of 1 where a key lies in the segment."""
    marks = launch.marks_of(geometry, tuple(of_segments))
    assert marks is not None
    outputs = [geometry.in_all_heads(s, x) for s, (x, _) in of_segments.items()]
    grads = [geometry.gradient_of_sums(s, grad) for s, (_, grad) in of_segments.items()]
    padding = 0, marks.shape[-1] - sum(x.shape[-1] for x in outputs)
    output, grad = (torch.nn.functional.pad(torch.cat(x, -1), padding) for x in (outputs, grads))
    parts = []
    for start in range(0, marks.shape[-1], launch.MAX_MARKS):
        part = slice(start, start + launch.MAX_MARKS)
        value = marks[..., part][:, None].expand(geometry.batch, geometry.key_heads, -1, -1)
        own = residuals._replace(value=value, output=output[..., part])
        alone = dataclasses.replace(
            geometry, value_dim=value.shape[-1], dropout_p=0.0, dropout_seed=None, sinks=None, memo={}
        )
        nothing = launch.MapGradients(GradientPlan.of(()), None, None, None)
        # Half precision ends at 65504: the gradient is passed with its largest number as 1.
        size = grad[..., part].abs().amax().clamp(min=torch.finfo(torch.float32).tiny)
        d_output = (grad[..., part] / size).to(value.dtype)
        of_query, of_key, _, delta = launch.backward(own, row_lse, d_output, alone, nothing, of_values=False)
        parts.append((of_query * size, of_key * size, delta * size))
    of_query, of_key, delta = (sum(x) for x in zip(*parts, strict=True))
    return of_query, of_key, delta


def _map_gradients(
    row_lse: launch.RowLse, geometry: Geometry, of_statistics: GradientsByStatistic
) -> tuple[launch.MapGradients, Tensor | None]:
    """The statistics' gradients for A, and the part of delta's shift that is not a row sum of A times these.

    With r = rowsum(A dA), dS = A (dA - r). Row-constant terms of dA are folded into r: the tail of a weight, and the
    entropy's -g (1 + ln factor). The row sum itself is g S, S being the statistic; the entropy's is g (H - mass).
    """
    lists = GradientPlan.of(tuple(of_statistics))
    if not of_statistics:
        return launch.MapGradients(lists, None, None, None), None
    shift, excess = torch.zeros_like(row_lse.lse), torch.zeros_like(row_lse.lse)
    grads = {s: geometry.gradient_of_sums(s, grad) for s, (_, grad) in of_statistics.items()}
    rows, columns = [grads[s] for s in lists.rows], [grads[s] for s in lists.columns]
    for s, (value, _) in of_statistics.items():
        if s.method == "lse":  # its dS is g A
            shift -= grads[s]
        elif s.method == "weight" and s.axis == "row":
            shift += grads[s] * geometry.in_all_heads(s, value)
            if s in lists.near_rows:
                excess -= geometry.tail_of(s) * grads[s]
        elif s.method == "row":  # the entropy, the only one that carries gradients
            rows.append(grads[s])
            mass = geometry.live()[:, None].to(shift.dtype)
            if geometry.sinks is not None:
                mass = (mass - row_lse.sink_share(geometry)).to(shift.dtype)
            shift += grads[s] * (geometry.in_all_heads(s, value) - mass)
            excess += grads[s] * (1.0 + row_lse.log_factor())
    shift += excess
    return launch.MapGradients(lists, _stacked(rows), _stacked(columns), shift), excess


def _stacked(tensors: list[Tensor]) -> Tensor | None:
    return torch.stack(tensors).float() if tensors else None


def _of_heads(results: dict[Statistic, Tensor], geometry: Geometry) -> dict[Statistic, Tensor]:
    """The requested heads of results that have all heads."""
    if not geometry.heads:
        return results
    return {s: _select(x, geometry.heads.get(s)) for s, x in results.items()}


def _select(x: Tensor, heads: Heads) -> Tensor:
    # Not x[:, heads]: that would copy the list to the device in every call.
    index = launch.on_device(heads, x.device)
    return x if index is None else x.index_select(1, index)


def _subset(
    query: Tensor, key: Tensor, row_lse: launch.RowLse, geometry: Geometry, heads: Heads
) -> tuple[Tensor, Tensor, launch.RowLse, Geometry]:
    """A call of these heads alone, copied: a key head for each."""
    if heads is None:
        return query, key, row_lse, geometry
    of_key = tuple(head // geometry.group for head in heads)
    chosen = launch.on_device(heads, query.device)
    return _select(query, heads), _select(key, of_key), row_lse.of_heads(chosen), geometry.subset(heads)


def _rows(
    query: Tensor, key: Tensor, row_lse: launch.RowLse, geometry: Geometry, each: Pass, lists: Plan
) -> dict[Statistic, Tensor]:
    return launch.rows(*_subset(query, key, row_lse, geometry, each.heads), lists)


def _band(
    query: Tensor, key: Tensor, row_lse: launch.RowLse, geometry: Geometry, each: Pass, lists: Plan
) -> dict[Statistic, Tensor]:
    return launch.band(query, key, row_lse, geometry, lists, each.heads)


def _columns(
    query: Tensor, key: Tensor, row_lse: launch.RowLse, geometry: Geometry, each: Pass, _: Plan
) -> dict[Statistic, Tensor]:
    query_mask = geometry.query_mask_of(each.last_queries)
    sums = launch.columns(query, key, row_lse, geometry, each.statistics, query_mask, each.heads)
    return dict(zip(each.statistics, sums, strict=True))


def _pooled(
    query: Tensor, key: Tensor, row_lse: launch.RowLse, geometry: Geometry, each: Pass, _: Plan
) -> dict[Statistic, Tensor]:
    (statistic,) = each.statistics
    assert isinstance(statistic, PooledMap)
    return {statistic: launch.pooled(query, key, row_lse, geometry, statistic, each.heads)}


def _segments(
    query: Tensor, key: Tensor, row_lse: launch.RowLse, geometry: Geometry, each: Pass, _: Plan
) -> dict[Statistic, Tensor]:
    (statistic,) = each.statistics
    return {statistic: launch.segments(*_subset(query, key, row_lse, geometry, each.heads), statistic)}


def _top(
    query: Tensor, key: Tensor, row_lse: launch.RowLse, geometry: Geometry, each: Pass, _: Plan
) -> dict[Statistic, Tensor]:
    (statistic,) = each.statistics
    assert isinstance(statistic, TopKeys)
    return {statistic: launch.top(query, key, row_lse, geometry, statistic, each.heads)}


def _first_keys(
    query: Tensor, key: Tensor, row_lse: launch.RowLse, geometry: Geometry, each: Pass, _: Plan
) -> dict[Statistic, Tensor]:
    query, key, row_lse, geometry = _subset(query, key, row_lse, geometry, each.heads)
    (statistic,) = each.statistics

    def weights(products: Tensor, rows: slice) -> Tensor:
        return row_lse.weights(products, rows, geometry)

    mass = sink_mass(query, key, geometry, statistic, weights)  # type: ignore[arg-type]
    return {statistic: mass.masked_fill(row_lse.pivot_or_lse.isnan(), torch.nan)}


def _lse(
    query: Tensor, key: Tensor, row_lse: launch.RowLse, geometry: Geometry, each: Pass, _: Plan
) -> dict[Statistic, Tensor]:
    return _of_heads(dict.fromkeys(each.statistics, row_lse.lse), geometry)


_RUN: dict[str, RunPass] = {
    "rows": _rows,
    "decode": _rows,
    "band": _band,
    "column": _columns,
    "pooled": _pooled,
    "segments": _segments,
    "top": _top,
    "first_keys": _first_keys,
    "lse": _lse,
}


def passes(geometry: Geometry, attends: bool) -> list[Pass]:
    """The launches of `attend`, or of `from_lse`."""
    return [each for each, _ in _planned(geometry, attends) if each.run != "lse"]


def cost(each: Pass, geometry: Geometry) -> tuple[str, int, int]:
    """The description of a pass with its tiles, its floating-point operations and its scratch memory in bytes."""
    heads = geometry.batch * (geometry.query_heads if each.heads is None else len(each.heads))
    matmul = 2 * geometry.visible_pairs(each.last_queries) * heads * geometry.head_dim
    rows = heads * geometry.query_length
    if each.run in ("forward", "decode", "rows"):
        return _forward_cost(each, geometry, matmul)
    if each.run == "band":
        packed, config = launch.band_tile(geometry, each.heads, _config(geometry, "band"))
        lists = Plan.of(each.statistics, geometry.is_causal)
        return f"kernel band: {_tiles(config, packed)}", *_band_cost(geometry, lists, config.BM, each.heads)
    if each.run == "column":
        lse_copy = 4 * geometry.batch * geometry.query_heads * geometry.query_length
        return f"kernel column: {_tiles(_config(geometry, 'column'))}", matmul, lse_copy
    (statistic,) = each.statistics
    if isinstance(statistic, TopKeys):
        return f"kernel top: {_tiles(_config(geometry, 'top'))}", matmul, 0
    if statistic.method == "segments":
        segments = geometry.shape_of(statistic)[-1]
        passes = -(-segments // launch.MAX_MARKS)
        flops = passes * matmul + matmul // geometry.head_dim * segments
        description = f"kernel forward, rows only: {_tiles(_config(geometry, 'forward_loop'))}"
        return description, flops, 2 * geometry.key_length * segments
    if isinstance(statistic, PooledMap):
        config = _config(geometry, "pooled")
        segments = statistic.shape(geometry.query_length, geometry.key_length)[0]
        scratch = 4 * heads * segments * -(-geometry.key_length // config.BN)
        return f"kernel column: {_tiles(config)}", matmul, scratch
    count = min(statistic.count, geometry.key_length)  # type: ignore[attr-defined]
    return "first keys, gathered, plain PyTorch", 2 * rows * count * geometry.head_dim, 4 * rows * 64


def _forward_cost(each: Pass, geometry: Geometry, matmul: int) -> tuple[str, int, int]:
    lists = Plan.of(each.statistics, geometry.is_causal)
    splits = launch.splits(geometry)
    kernel: Kernel = "decode" if splits else "forward_loop" if lists.in_loop else "forward"
    packed, config = launch.forward_tile(geometry, _config(geometry, kernel))
    flops, scratch = matmul if each.attends or lists.in_loop else 0, 0
    if each.attends:
        flops += matmul // geometry.head_dim * geometry.value_dim
    flops += matmul // geometry.head_dim * sum(geometry.shape_of(s)[-1] for s in lists.segments)
    description = f"kernel forward{'' if each.attends else ', rows only'}: {_tiles(config, packed)}"
    if splits:
        description += f", {splits} splits of the keys" + (", kernel combine" if each.attends else "")
        rows = geometry.batch * geometry.query_heads * geometry.query_length
        scratch = 4 * splits * rows * (geometry.value_dim + 1)
    if lists.bands:
        description += f", band of {sum(lists.reach(geometry))} keys as epilogue"
        band_flops, band_scratch = _band_cost(geometry, lists, config.BM, None)
        flops, scratch = flops + band_flops, scratch + band_scratch
    return description, flops, scratch


def _config(geometry: Geometry, kernel: Kernel) -> Config:
    dim = (
        geometry.head_dim
        if kernel in ("band", "column", "pooled", "top")
        else max(geometry.head_dim, geometry.value_dim)
    )
    return next(candidates(kernel, geometry.device, geometry.dtype, launch.block_dim(dim)))


def _tiles(config: Config, heads: int = 1) -> str:
    packed = f" x {heads} heads" if heads > 1 else ""
    return f"queries x {config.BM}{packed}, keys x {config.BN}, {config.num_warps} warps, {config.num_stages} stages"


def _band_cost(geometry: Geometry, lists: Plan, block_rows: int, heads: Heads) -> tuple[int, int]:
    """Floating-point operations, and bytes of slots."""
    behind, ahead = lists.reach(geometry)
    count = geometry.batch * (geometry.query_heads if heads is None else len(heads))
    flops = 2 * count * geometry.query_length * (behind + ahead + block_rows) * geometry.head_dim
    slots = launch.slot_count(behind, ahead, block_rows) * len(lists.band_columns)
    return flops, 4 * slots * count * geometry.key_length
