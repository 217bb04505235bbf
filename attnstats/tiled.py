"""The backend "tiled": attention and its statistics in PyTorch at O(T) memory, the default without a GPU.

Attention is torch's flash kernel for the CPU, which also returns the lse; on other devices, and for what that
kernel can't do, a sweep over blocks of rows. The statistics follow from (query, key, lse): those whose weight is
constant beyond a distance from the keys near the diagonal (`diagonal`, O(T) time), all others from every visible
pair once (`sweep`). On a CPU `native` does both at once where it was compiled.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnstats import diagonal, native, sweep
from attnstats.geometry import Evaluation, Geometry, Step, divisor_of
from attnstats.statistics import LSE, ColumnStatistic, DistanceWeighted, SinkMass, Statistic


def attend(
    query: Tensor, key: Tensor, value: Tensor, geometry: Geometry, statistics: tuple[Statistic, ...]
) -> Evaluation:
    """Output, lse and statistics. The output is differentiable."""
    if geometry.packing is not None:
        output, lse = _attend_by_sequence(query, key, value, geometry)
    elif _flash_takes(geometry) and geometry.sinks is None:
        output, lse = _flash(query, key, value, geometry)
    else:
        forward = _flash_with_sinks if _flash_takes(geometry) else sweep.attention
        output, lse = sweep.Recomputed.apply(query, key, value, geometry.sinks, geometry, forward)
    with torch.no_grad():
        return Evaluation(output, lse, from_lse(query, key, lse, geometry, statistics))


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
    return tensors


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
        part, lse[:, :, queries], _ = attend(query[:, :, queries], key[:, :, keys], value[:, :, keys], alone, ())
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
        and (geometry.right is None or (geometry.is_causal and (geometry.offset == 0 or geometry.query_length == 1)))
    )


def _flash(query: Tensor, key: Tensor, value: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """Torch's CPU kernel behind SDPA, which also returns the lse; its causal mask is aligned top left."""
    bias = None
    if geometry.key_mask is not None:
        bias = torch.zeros(geometry.batch, 1, 1, geometry.key_length, dtype=query.dtype)
        bias = bias.masked_fill(~geometry.key_mask[:, None, None], -torch.inf)
    causal = geometry.is_causal
    if causal and geometry.query_length == 1:  # the one query sees the keys up to its own position
        seen = min(geometry.offset + 1, geometry.key_length)
        key, value, causal = key[:, :, :seen], value[:, :, :seen], False
        bias = bias if bias is None else bias[..., :seen]
    # It reads the last dimension as contiguous without a look at its stride.
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, causal, attn_mask=bias, scale=geometry.scale
    )
    if geometry.key_mask is not None:  # the kernel gives 0 for rows that see nothing
        lse = lse.masked_fill(~geometry.live()[:, None], -torch.inf)
    return output, lse


def _flash_with_sinks(query: Tensor, key: Tensor, value: Tensor, geometry: Geometry) -> Evaluation:
    """A sink only scales a row: by exp(lse without it - lse with it)."""
    output, lse = _flash(query, key, value, geometry)
    assert geometry.sinks is not None
    counted = sweep.with_sinks(lse, geometry.sinks)
    share = (lse - divisor_of(counted)).exp()[..., None]
    return Evaluation((output * share).to(output.dtype), counted, {})


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
