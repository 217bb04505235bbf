"""The backend "tiled": attention and its statistics in plain PyTorch at O(T) memory, the default without a GPU.

Attention is torch's flash kernel for the CPU, which also returns the lse; on other devices, and for what that
kernel can't do, a sweep over blocks of rows. The statistics follow from (query, key, lse): those whose weight is
constant beyond a distance from the keys near the diagonal (`diagonal`, O(T) time), all others from every visible
pair once (`sweep`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnstats import diagonal, sweep
from attnstats.geometry import Evaluation, Geometry, Step, divisor_of
from attnstats.statistics import LSE, DistanceWeighted, SinkMass, Statistic


def attend(
    query: Tensor, key: Tensor, value: Tensor, geometry: Geometry, statistics: tuple[Statistic, ...]
) -> Evaluation:
    """Output, lse and statistics. The output is differentiable."""
    if _flash_takes(geometry):
        output, lse = _flash(query, key, value, geometry)
    else:
        output, lse = sweep.Recomputed.apply(query, key, value, geometry, sweep.attention)
    with torch.no_grad():
        return Evaluation(output, lse, from_lse(query, key, lse, geometry, statistics))


def from_lse(
    query: Tensor, key: Tensor, lse: Tensor, geometry: Geometry, statistics: tuple[Statistic, ...]
) -> dict[Statistic, Tensor]:
    """The statistics of `A = exp(scores - lse)`; lse (B, Hq, Tq), -inf for rows that see no key.

    MaxLogit is not a function of the lse: it costs the scores once more here.
    """
    banded, swept = _split(statistics)
    tensors: dict[Statistic, Tensor] = {}
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


def plan(geometry: Geometry, statistics: tuple[Statistic, ...], attends: bool) -> list[Step]:
    """What `attend` (or `from_lse`) runs."""
    heads = geometry.batch * geometry.query_heads
    pairs = geometry.visible_pairs() * heads
    banded, swept = _split(statistics)
    steps = []
    if attends:
        runs = "torch's flash attention for CPU" if _flash_takes(geometry) else "attention, blocks of rows"
        steps.append(Step(runs, "output, lse", 2 * pairs * (geometry.head_dim + geometry.value_dim), 0))
    if banded:
        steps.append(diagonal.plan(geometry, banded))
    if swept:
        steps.append(Step("sweep, blocks of rows", _names(swept), 2 * pairs * geometry.head_dim, sweep.scratch_bytes()))
    for s in statistics:
        if isinstance(s, SinkMass):
            flops = 2 * heads * geometry.query_length * s.count * geometry.head_dim
            steps.append(Step("first keys, gathered", s.name, flops, 4 * heads * geometry.query_length * s.count))
    return steps


def _split(statistics: tuple[Statistic, ...]) -> tuple[tuple[DistanceWeighted, ...], tuple[Statistic, ...]]:
    banded = tuple(s for s in statistics if isinstance(s, DistanceWeighted) and diagonal.is_narrow(s))
    return banded, tuple(s for s in statistics if s not in banded and not isinstance(s, (LSE, SinkMass)))


def _names(statistics: tuple[Statistic, ...]) -> str:
    return ", ".join(s.name for s in statistics)


def _flash_takes(geometry: Geometry) -> bool:
    return (
        geometry.device.type == "cpu"
        and hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu")
        and geometry.head_dim == geometry.value_dim
        and geometry.scale > 0  # the kernel's running maximum is of unscaled scores
        and (not geometry.is_causal or geometry.offset == 0 or geometry.query_length == 1)
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


def sink_mass(query: Tensor, key: Tensor, lse: Tensor, geometry: Geometry, statistic: SinkMass) -> Tensor:
    """The mass on the first keys: gather them, at most `count` a batch row, and look at nothing else."""
    count = min(statistic.count, geometry.key_length)
    if geometry.key_mask is None:
        first = torch.arange(count, device=geometry.device).expand(geometry.batch, count)
        seen = torch.ones_like(first, dtype=torch.bool)
    else:
        first = geometry.key_mask.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[:, :count]
        seen = geometry.key_mask.gather(1, first)
    visible = seen[:, None]
    if geometry.is_causal:
        position = torch.arange(geometry.query_length, device=geometry.device) + geometry.offset
        visible = visible & (first[:, None] <= position[:, None])
    index = first[:, None, :, None].expand(-1, geometry.key_heads, -1, geometry.head_dim)
    keys = key.gather(2, index).to(geometry.accumulator).repeat_interleave(geometry.group, dim=1)
    scores = (query.to(geometry.accumulator) * geometry.scale) @ keys.mT
    return scores.masked_fill_(~visible[:, None], -torch.inf).sub_(divisor_of(lse)[..., None]).exp_().sum(-1)
