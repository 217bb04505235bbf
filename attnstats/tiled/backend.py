"""The backend "tiled": attention and its statistics in PyTorch at O(T) memory, the default without a GPU.

Attention is torch's flash kernel for the CPU, which also returns the lse; on other devices, and for what that
kernel can't do, a sweep over blocks of rows. The statistics follow from (query, key, lse): those whose weight is
constant beyond a distance from the keys near the diagonal (`diagonal`, O(T) time), all others from every visible
pair once (`sweep`). On a CPU `native` does both at once where it was compiled. Torch's kernel also gives the gradients
of its own output; all others, and those of statistics, come from a sweep.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnstats.core.geometry import Evaluation, Geometry, Step, divisor_of
from attnstats.statistics import LSE, ColumnStatistic, DistanceWeighted, SinkMass, Statistic
from attnstats.tiled import band as diagonal
from attnstats.tiled import native, sweep


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    geometry: Geometry,
    statistics: tuple[Statistic, ...],
    differentiable: bool = False,
) -> Evaluation:
    """Output, lse and statistics. Gradients go through the output and, if differentiable, through the statistics."""

    def evaluate(query: Tensor, key: Tensor, value: Tensor, geometry: Geometry) -> Evaluation:
        output, lse = _attend(query, key, value, geometry)
        return Evaluation(output, lse, from_lse(query, key, lse, geometry, statistics))

    inputs = (query, key, value, geometry.sinks)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        output, lse, *tensors = sweep.Recomputed.apply(*inputs, geometry, evaluate, gradients, differentiable)
        return Evaluation(output, lse, dict(zip(statistics, tensors, strict=True)))
    return evaluate(query, key, value, geometry)


def gradients(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    grad_output: Tensor,
    geometry: Geometry,
    of_statistics: sweep.OfStatistics,
) -> sweep.Gradients:
    """Gradients for query, key, value and sinks, from what `attend` returned and the gradients for it.

    `of_statistics` has the value of each statistic that carries a gradient, and that gradient.
    """
    inputs = (query, key, value, output, lse, grad_output)
    if geometry.packing is not None or of_statistics or geometry.sinks is not None or not _flash_takes(geometry):
        return sweep.gradients(*inputs, geometry, of_statistics)
    return *_flash_gradients(*inputs, geometry), None


def _attend(query: Tensor, key: Tensor, value: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
    if geometry.packing is not None:
        return _attend_by_sequence(query, key, value, geometry)
    if not _flash_takes(geometry):
        output, lse, _ = sweep.attention(query, key, value, geometry)
        return output, lse
    output, lse = _flash(query, key, value, geometry)
    if geometry.sinks is None:
        return output, lse
    counted = sweep.with_sinks(lse, geometry.sinks)  # a sink only scales a row
    share = (lse - divisor_of(counted)).exp()[..., None]
    return (output * share).to(output.dtype), counted


def from_lse(
    query: Tensor, key: Tensor, lse: Tensor, geometry: Geometry, statistics: tuple[Statistic, ...]
) -> dict[Statistic, Tensor]:
    """The statistics of `A = exp(scores - lse)`; lse (B, Hq, Tq), -inf for rows that see no key.

    MaxLogit is not a function of the lse: it costs the scores once more here.
    """
    tensors: dict[Statistic, Tensor] = {}
    for heads in dict.fromkeys(geometry.heads.get(s) for s in statistics):
        together = tuple(s for s in statistics if geometry.heads.get(s) == heads)
        if heads is None:
            tensors |= _evaluate(query, key, lse, geometry, together)
        else:
            of_query, of_key = list(heads), [head // geometry.group for head in heads]
            subset = geometry.subset(heads)
            tensors |= _evaluate(query[:, of_query], key[:, of_key], lse[:, of_query], subset, together)
    return {s: tensors[s] for s in statistics}


def _evaluate(
    query: Tensor, key: Tensor, lse: Tensor, geometry: Geometry, statistics: tuple[Statistic, ...]
) -> dict[Statistic, Tensor]:
    """`from_lse` for all heads."""
    if geometry.packing is not None:
        return _evaluate_by_sequence(query, key, lse, geometry, statistics)
    compiled, banded, swept = _split(geometry, statistics)
    tensors: dict[Statistic, Tensor] = {}
    if compiled:
        tensors = native.evaluate(query, key, lse, geometry, compiled)
    if banded:
        tensors |= diagonal.evaluate(query, key, lse, geometry, banded)
    if swept:
        tensors |= sweep.evaluate(query, key, lse, geometry, swept)
    for statistic in statistics:
        if isinstance(statistic, SinkMass):
            tensors[statistic] = sink_mass(query, key, lse, geometry, statistic)
        elif isinstance(statistic, LSE):
            tensors[statistic] = lse
    return {s: geometry.finish(s, tensors[s]) for s in statistics}


def _attend_by_sequence(query: Tensor, key: Tensor, value: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
    lse = query.new_full(query.shape[:3], -torch.inf, dtype=geometry.accumulator)
    parts, done = [], 0
    for queries, keys, alone in geometry.sequences():
        part, lse[:, :, queries] = _attend(query[:, :, queries], key[:, :, keys], value[:, :, keys], alone)
        parts += [_nothing(query, geometry, queries.start - done), part]
        done = queries.stop
    parts.append(_nothing(query, geometry, geometry.query_length - done))
    return torch.cat(parts, dim=2), lse


def _nothing(query: Tensor, geometry: Geometry, rows: int) -> Tensor:
    """The output of rows that belong to no sequence, or to one without keys."""
    return query.new_zeros(geometry.batch, geometry.query_heads, rows, geometry.value_dim)


def _evaluate_by_sequence(
    query: Tensor, key: Tensor, lse: Tensor, geometry: Geometry, statistics: tuple[Statistic, ...]
) -> dict[Statistic, Tensor]:
    tensors = {s: lse.new_full(geometry.shape_of(s), -torch.inf if isinstance(s, LSE) else 0) for s in statistics}
    for queries, keys, alone in geometry.sequences():
        found = _evaluate(query[:, :, queries], key[:, :, keys], lse[:, :, queries], alone, statistics)
        for s in statistics:
            tensors[s][:, :, keys if isinstance(s, ColumnStatistic) else queries] = found[s]
    return tensors


def plan(geometry: Geometry, statistics: tuple[Statistic, ...], attends: bool) -> list[Step]:
    """What `attend` (or `from_lse`) runs."""
    heads = geometry.batch * geometry.query_heads
    pairs = geometry.visible_pairs() * geometry.query_heads
    compiled, banded, swept = _split(geometry, statistics)
    steps = []
    if attends:
        runs = "torch's flash attention for CPU" if _flash_takes(geometry) else "attention, blocks of rows"
        steps.append(Step(runs, "output, lse", 2 * pairs * (geometry.head_dim + geometry.value_dim), 0))
    if compiled:
        steps.append(native.plan(geometry, compiled))
    if banded:
        steps.append(diagonal.plan(geometry, banded))
    if swept:
        steps.append(Step("sweep, blocks of rows", _names(swept), 2 * pairs * geometry.head_dim, sweep.scratch_bytes()))
    for s in statistics:
        if isinstance(s, SinkMass):
            flops = 2 * heads * geometry.query_length * s.count * geometry.head_dim
            steps.append(Step("first keys, gathered", s.name, flops, 4 * heads * geometry.query_length * s.count))
    return steps


def _split(
    geometry: Geometry, statistics: tuple[Statistic, ...]
) -> tuple[tuple[Statistic, ...], tuple[DistanceWeighted, ...], tuple[Statistic, ...]]:
    """Those that `native`, `diagonal` and `sweep` evaluate."""
    compiled = tuple(s for s in statistics if native.takes(geometry, s))
    rest = tuple(s for s in statistics if s not in compiled and not isinstance(s, (LSE, SinkMass)))
    banded = tuple(s for s in rest if isinstance(s, DistanceWeighted) and diagonal.is_narrow(s))
    return compiled, banded, tuple(s for s in rest if s not in banded)


def _names(statistics: tuple[Statistic, ...]) -> str:
    return ", ".join(s.name for s in statistics)


def _flash_takes(geometry: Geometry) -> bool:
    return (
        geometry.device.type == "cpu"
        and hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu")
        and geometry.head_dim == geometry.value_dim
        and geometry.scale > 0  # the kernel's running maximum is of unscaled scores
        and geometry.softcap is None
        and geometry.left is None
        and geometry.dropout_p == 0
        and (geometry.right is None or (geometry.is_causal and (geometry.offset == 0 or geometry.query_length == 1)))
    )


def _flash(query: Tensor, key: Tensor, value: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """Torch's CPU kernel behind SDPA, which also returns the lse; its causal mask is aligned top left."""
    seen, causal, bias = _flash_mask(geometry)
    key, value = key[:, :, :seen], value[:, :, :seen]
    # It reads the last dimension as contiguous without a look at its stride.
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, causal, attn_mask=bias, scale=geometry.scale
    )
    if geometry.key_mask is not None:  # the kernel gives 0 for rows that see nothing
        lse = lse.masked_fill(~geometry.live()[:, None], -torch.inf)
    return output, lse


def _flash_gradients(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    grad_output: Tensor,
    geometry: Geometry,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients that torch's CPU kernel has for its own output."""
    seen, causal, bias = _flash_mask(geometry)
    inputs = (grad_output, query, key[:, :, :seen], value[:, :, :seen], output)
    grad_query, grad_key, grad_value = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *(x if x.stride(-1) == 1 else x.contiguous() for x in inputs),
        lse.masked_fill(lse == -torch.inf, 0.0),  # as the kernel gave it
        0.0,
        causal,
        attn_mask=bias,
        scale=geometry.scale,
    )
    beyond = (0, 0, 0, geometry.key_length - seen)
    return grad_query, torch.nn.functional.pad(grad_key, beyond), torch.nn.functional.pad(grad_value, beyond)


def _flash_mask(geometry: Geometry) -> tuple[int, bool, Tensor | None]:
    """How many keys the kernel is given, whether it masks them causally, and its bias."""
    seen, causal = geometry.key_length, geometry.is_causal
    if causal and geometry.query_length == 1:  # the one query sees the keys up to its own position
        seen, causal = min(geometry.offset + 1, geometry.key_length), False
    if geometry.key_mask is None:
        return seen, causal, None
    bias = torch.zeros(geometry.batch, 1, 1, seen, dtype=geometry.dtype)
    return seen, causal, bias.masked_fill(~geometry.key_mask[:, None, None, :seen], -torch.inf)


SINK_KEYS = 64  # first keys that are looked at together


def sink_mass(query: Tensor, key: Tensor, lse: Tensor, geometry: Geometry, statistic: SinkMass) -> Tensor:
    """The mass on the first keys: gather them, at most `count` a sequence, and look at nothing else."""
    if geometry.packing is not None:
        mass = torch.zeros_like(lse)
        for queries, keys, alone in geometry.sequences():
            mass[:, :, queries] = sink_mass(query[:, :, queries], key[:, :, keys], lse[:, :, queries], alone, statistic)
        return mass
    count = min(statistic.count, geometry.key_length)
    if geometry.key_mask is None:
        first = torch.arange(count, device=geometry.device).expand(geometry.batch, count)
        real = torch.ones_like(first, dtype=torch.bool)
    else:
        first = geometry.key_mask.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[:, :count]
        real = geometry.key_mask.gather(1, first)
    position = torch.arange(geometry.query_length, device=geometry.device)[:, None] + geometry.offset
    divisor = divisor_of(lse)[..., None]
    scaled = query.to(geometry.accumulator) * geometry.scale
    mass = torch.zeros_like(lse)
    for some, some_real in zip(first.split(SINK_KEYS, 1), real.split(SINK_KEYS, 1), strict=True):
        visible = some_real[:, None]
        distance = position - some[:, None]
        if geometry.left is not None:
            visible = visible & (distance <= geometry.left)
        if geometry.right is not None:
            visible = visible & (distance >= -geometry.right)
        index = some[:, None, :, None].expand(-1, geometry.key_heads, -1, geometry.head_dim)
        gathered = key.gather(2, index).to(geometry.accumulator).repeat_interleave(geometry.group, dim=1)
        scores = scaled @ gathered.mT
        if geometry.softcap is not None:
            scores.div_(geometry.softcap).tanh_().mul_(geometry.softcap)
        mass += scores.masked_fill_(~visible[:, None], -torch.inf).sub_(divisor).exp_().sum(-1)
    return mass
