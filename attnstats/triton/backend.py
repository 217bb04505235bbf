"""The backend "triton": which kernel computes what, in which order. launch.py starts them.

The forward kernel gives output, lse, the rows of its loop and, as its epilogue, the band; `column` takes what
an open horizon needs in a second pass. A few queries before many keys are cut into splits of keys, and then the band
has a pass of its own, as it has without a value, when statistics start from an lse. Runs on CUDA and ROCm, and on the
CPU in Triton's interpreter. Called from attention.py alone.
"""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor

from attnstats.core.geometry import Evaluation, Geometry, Step, divisor_of
from attnstats.statistics import LSE, Entropy, RowStatistic, Statistic
from attnstats.tiled.backend import sink_mass
from attnstats.tiled.sweep import Gradients, OfStatistics, Recomputed
from attnstats.triton import launch
from attnstats.triton.configs import Config, Kernel, candidates, interpreted
from attnstats.triton.plan import GradientPlan, Heads, Plan

MAX_HEAD_DIM = 256


def unavailable(geometry: Geometry) -> str | None:
    """Why this backend can't take a call, or None."""
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
    return None


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    geometry: Geometry,
    statistics: tuple[Statistic, ...],
    differentiable: bool = False,
) -> Evaluation:
    """Output, lse and statistics. Gradients go through the output and, if differentiable, through the statistics."""
    evaluate = functools.partial(_attend, statistics=statistics)
    inputs = (query, key, value, geometry.sinks)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        output, lse, *tensors = Recomputed.apply(*inputs, geometry, evaluate, gradients, differentiable)
        return Evaluation(output, lse, dict(zip(statistics, tensors, strict=True)))
    return evaluate(query, key, value, geometry)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, geometry: Geometry, statistics: tuple[Statistic, ...]
) -> Evaluation:
    plan = Plan.of(statistics, geometry.is_causal)
    in_pass = plan.without_bands() if plan.bands and launch.splits(geometry) else plan
    output, lse, results = launch.forward(query, key, value, geometry, in_pass)
    if geometry.heads:
        results = _of_heads(results, geometry)
    if in_pass is not plan:
        results |= _bands(query, key, lse, geometry, plan)
    if plan.has_passes_beside:
        results |= _beside(query, key, lse, geometry, plan)
    return Evaluation(output, lse, {s: geometry.finish(s, results[s]) for s in statistics})


def gradients(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    grad_output: Tensor,
    geometry: Geometry,
    of_statistics: OfStatistics,
) -> Gradients:
    """Gradients for query, key, value and sinks, from what `attend` returned and the gradients for it.

    `of_statistics` has the value of each statistic that carries a gradient, and that gradient.
    """
    asked, excess = _asked(lse, geometry, of_statistics)
    inputs = (query, key, value, output, lse, grad_output)
    *grads, delta = launch.backward(*inputs, geometry, asked)
    if geometry.sinks is None:
        return grads[0], grads[1], grads[2], None
    if excess is not None:
        delta = delta - excess
    share = (geometry.sinks.float()[:, None] - divisor_of(lse)).exp()
    return grads[0], grads[1], grads[2], -(share * delta).sum((0, 2)).to(geometry.sinks.dtype)


def _asked(lse: Tensor, geometry: Geometry, of_statistics: OfStatistics) -> tuple[launch.Asked, Tensor | None]:
    """What statistics ask of A, and what the shift of delta has besides row sums of A times that.

    With r = rowsum(A dA), dS = A (dA - r). What dA has in common along a row is taken off r instead: the tail of a
    weight, and the entropy's -g. The row sum itself is g S, S being the statistic; the entropy's g (H - mass).
    """
    plan = GradientPlan.of(tuple(of_statistics))
    if not of_statistics:
        return launch.Asked(plan, None, None, None), None
    shift, excess = torch.zeros_like(lse), torch.zeros_like(lse)
    grads = {s: geometry.gradient_of_sums(s, grad) for s, (_, grad) in of_statistics.items()}
    rows, columns = [grads[s] for s in plan.rows], [grads[s] for s in plan.columns]
    for s, (value, _) in of_statistics.items():
        if isinstance(s, LSE):  # its dS is g A
            shift -= grads[s]
        elif isinstance(s, RowStatistic):
            shift += grads[s] * geometry.in_all_heads(s, value)
            if s.band is not None:
                excess -= s.tail * grads[s]
        elif isinstance(s, Entropy):
            rows.append(grads[s])
            shift += grads[s] * (geometry.in_all_heads(s, value) - geometry.row_mass(lse))
            excess += grads[s]
    shift += excess
    return launch.Asked(plan, _stacked(rows), _stacked(columns), shift), excess


def _stacked(tensors: list[Tensor]) -> Tensor | None:
    return torch.stack(tensors).float() if tensors else None


def from_lse(
    query: Tensor, key: Tensor, lse: Tensor, geometry: Geometry, statistics: tuple[Statistic, ...]
) -> dict[Statistic, Tensor]:
    """The statistics of `A = exp(scores - lse)`; lse (B, Hq, Tq), -inf for rows that see no key."""
    plan = Plan.of(statistics, geometry.is_causal)
    results = _bands(query, key, lse, geometry, plan)
    if plan.in_loop:
        rows = launch.forward(query, key, None, geometry, plan.without_bands(), lse).tensors
        results |= _of_heads(rows, geometry)
    results |= _beside(query, key, lse, geometry, plan)
    return {s: geometry.finish(s, results[s]) for s in statistics}


def _of_heads(results: dict[Statistic, Tensor], geometry: Geometry) -> dict[Statistic, Tensor]:
    """From results of all heads those that were asked for."""
    return {s: _chosen(x, geometry.heads[s]) if s in geometry.heads else x for s, x in results.items()}


def _chosen(x: Tensor, heads: tuple[int, ...]) -> Tensor:
    # Not x[:, heads]: that would copy the list to the device in every call.
    index = launch.on_device(heads, x.device)
    return x if index is None else x.index_select(1, index)


def _bands(query: Tensor, key: Tensor, lse: Tensor, geometry: Geometry, plan: Plan) -> dict[Statistic, Tensor]:
    results: dict[Statistic, Tensor] = {}
    for heads, together in plan.band_passes(geometry).items():
        results |= launch.band(query, key, lse, geometry, together, heads)
    return results


def _beside(query: Tensor, key: Tensor, lse: Tensor, geometry: Geometry, plan: Plan) -> dict[Statistic, Tensor]:
    """What takes a pass of its own after the lse is known."""
    results = _of_heads(dict.fromkeys(plan.lse, lse), geometry)
    for (last, heads), together in plan.column_passes(geometry).items():
        sums = launch.columns(query, key, lse, geometry, together, geometry.counted(last), heads)
        results |= dict(zip(together, sums, strict=True))
    for pooled in plan.maps:
        results[pooled] = launch.pooled(query, key, lse, geometry, pooled, geometry.heads.get(pooled))
    for sink in plan.sinks:
        results[sink] = sink_mass(*_subset(query, key, lse, geometry, geometry.heads.get(sink)), sink)
    return results


def _subset(
    query: Tensor, key: Tensor, lse: Tensor, geometry: Geometry, heads: Heads
) -> tuple[Tensor, Tensor, Tensor, Geometry]:
    if heads is None:
        return query, key, lse, geometry
    of_key = tuple(head // geometry.group for head in heads)
    return _chosen(query, heads), _chosen(key, of_key), _chosen(lse, heads), geometry.subset(heads)


def plan(geometry: Geometry, statistics: tuple[Statistic, ...], attends: bool) -> list[Step]:
    """What `attend` (or `from_lse`) launches."""
    work = Plan.of(statistics, geometry.is_causal)
    pairs = geometry.visible_pairs() * geometry.batch
    every = geometry.query_heads
    splits = launch.splits(geometry)
    steps = []
    in_forward = work.without_bands() if splits or not attends else work
    if attends or work.in_loop:
        config = _config(geometry, "decode" if splits else "forward_loop" if work.in_loop else "forward")
        runs = f"kernel forward: {_tiles(config)}"
        flops, scratch = 2 * pairs * every * geometry.head_dim, 0
        computes = ", ".join(s.name for s in work.in_loop)
        if attends:
            flops += 2 * pairs * every * geometry.value_dim
            computes = ", ".join(("output", "lse", *(s.name for s in in_forward.in_forward)))
        else:
            runs = runs.replace("forward:", "forward, rows only:")
        if splits:
            runs += f", {splits} splits of the keys"
            scratch = 4 * splits * geometry.batch * every * geometry.query_length * (geometry.value_dim + 1)
        if in_forward.bands:
            runs += f", band of {sum(work.reach(geometry))} keys as epilogue"
            epilogue = _band_cost(geometry, work, config.BM, None)
            flops, scratch = flops + epilogue[0], scratch + epilogue[1]
        steps.append(Step(runs, computes, flops, scratch))
    if not in_forward.bands:
        for heads, together in work.band_passes(geometry).items():
            config = launch.band_tile(geometry, heads, _config(geometry, "band"))[1]
            names = ", ".join(s.name for s in together.bands)
            steps.append(
                Step(f"kernel band: {_tiles(config)}", names, *_band_cost(geometry, together, config.BM, heads))
            )
    column = f"kernel column: {_tiles(_config(geometry, 'column'))}"
    for (_, heads), columns in work.column_passes(geometry).items():
        count = every if heads is None else len(heads)
        names = ", ".join(s.name for s in columns)
        scratch = 4 * geometry.batch * every * geometry.query_length
        steps.append(Step(column, names, 2 * pairs * count * geometry.head_dim, scratch))
    for pooled in work.maps:
        count = len(geometry.heads.get(pooled, range(every)))
        segments = len(pooled.boundaries(geometry.query_length, geometry.key_length)[0]) - 1
        config = _config(geometry, "pooled")
        scratch = 4 * geometry.batch * count * segments * -(-geometry.key_length // config.BN)
        steps.append(
            Step(f"kernel column: {_tiles(config)}", pooled.name, 2 * pairs * count * geometry.head_dim, scratch)
        )
    for sink in work.sinks:
        rows = geometry.batch * len(geometry.heads.get(sink, range(every))) * geometry.query_length
        count = min(sink.count, geometry.key_length)
        steps.append(
            Step("first keys, gathered, plain PyTorch", sink.name, 2 * rows * count * geometry.head_dim, 4 * rows * 64)
        )
    return steps


def _config(geometry: Geometry, kernel: Kernel) -> Config:
    dim = geometry.head_dim if kernel in ("band", "column", "pooled") else max(geometry.head_dim, geometry.value_dim)
    return next(candidates(kernel, geometry.device, geometry.dtype, launch.block_dim(dim)))


def _tiles(config: Config) -> str:
    return f"queries x {config.BM}, keys x {config.BN}, {config.num_warps} warps, {config.num_stages} stages"


def _band_cost(geometry: Geometry, plan: Plan, block_rows: int, heads: Heads) -> tuple[int, int]:
    """Floating-point operations, and bytes of slots."""
    behind, ahead = plan.reach(geometry)
    count = geometry.batch * (geometry.query_heads if heads is None else len(heads))
    flops = 2 * count * geometry.query_length * (behind + ahead + block_rows) * geometry.head_dim
    slots = launch.slot_count(behind, ahead, block_rows) * len(plan.band_columns)
    return flops, 4 * slots * count * geometry.key_length
