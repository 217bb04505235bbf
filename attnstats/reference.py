"""The definitions made executable: eager attention that holds the whole map A and reads every statistic off it.

This is the oracle of every other path. It works in the dtype of its inputs, as eager attention does, so
float64 inputs give the truth and bfloat16 inputs give the error that plain PyTorch makes in bfloat16. It
shares no arithmetic with the other backends: masks are dense, counts are sums over them. Memory is O(Tq * Tk).
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import torch
from torch import Tensor

from attnstats.geometry import AttentionResult, Evaluation, Geometry, Step
from attnstats.statistics import (
    LSE,
    ColumnStatistic,
    Entropy,
    MaxLogit,
    PooledMap,
    RowStatistic,
    SinkMass,
    Statistic,
    Statistics,
    resolve,
)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    statistics: Iterable[Statistic | str] = (),
    attn_mask: Tensor | None = None,
    is_causal: bool = True,
    scale: float | None = None,
    enable_gqa: bool = False,
    query_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    query_offset: int | None = None,
) -> AttentionResult:
    """`attnstats.attention` by definition, holding the Tq x Tk map. Arguments, results and errors are the same.

    Unlike the other backends it takes an `attn_mask` that depends on the query: bool (True: may be seen) or
    additive, broadcastable to (B, Hq, Tq, Tk).
    """
    wanted = resolve(statistics)
    geometry = Geometry.resolve(
        query,
        key,
        value,
        wanted,
        attn_mask=attn_mask,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=enable_gqa,
        query_mask=query_mask,
        key_padding_mask=key_padding_mask,
        query_offset=query_offset,
    )
    output, lse, tensors = attend(query, key, value, geometry, wanted)
    return AttentionResult(output, Statistics(tensors, _validity(geometry, wanted), lse))


def attend(
    query: Tensor, key: Tensor, value: Tensor, geometry: Geometry, statistics: tuple[Statistic, ...]
) -> Evaluation:
    """Output, lse and statistics. Differentiable by autograd through the output."""
    scores = _scores(query, key, geometry)
    visible = _visible(geometry)
    live = visible.any(-1, keepdim=True)
    # Zeros under a dead row keep softmax and its gradient finite; its weights are then set to 0.
    weights = scores.masked_fill(~visible & live, -torch.inf).softmax(-1, dtype=geometry.accumulator)
    weights = weights.to(query.dtype).masked_fill(~(visible & live), 0.0)
    output = weights @ value.repeat_interleave(geometry.group, dim=1)
    with torch.no_grad():
        masked = scores.to(geometry.accumulator).masked_fill(~visible, -torch.inf)
        lse = masked.logsumexp(-1)
        tensors = {s: _evaluate(s, weights.to(geometry.accumulator), masked, lse, geometry) for s in statistics}
    return Evaluation(output, lse, tensors)


def from_lse(
    query: Tensor, key: Tensor, lse: Tensor, geometry: Geometry, statistics: tuple[Statistic, ...]
) -> dict[Statistic, Tensor]:
    """The statistics of `A = exp(scores - lse)` for an lse from elsewhere, (B, Hq, Tq)."""
    masked = _scores(query, key, geometry).to(geometry.accumulator).masked_fill(~_visible(geometry), -torch.inf)
    weights = (masked - lse[..., None]).exp().masked_fill(~_visible(geometry), 0.0)
    return {s: _evaluate(s, weights, masked, lse, geometry) for s in statistics}


def plan(geometry: Geometry, statistics: tuple[Statistic, ...], attends: bool) -> list[Step]:
    """What `attend` (or `from_lse`) does: everything, on the map."""
    pairs = geometry.batch * geometry.query_heads * geometry.query_length * geometry.key_length
    flops = 2 * pairs * (geometry.head_dim + (geometry.value_dim if attends else 0))
    names = ", ".join((("output", "lse") if attends else ()) + tuple(s.name for s in statistics))
    return [Step("eager attention, Tq x Tk", names, flops, 3 * pairs * geometry.accumulator.itemsize)]


def _scores(query: Tensor, key: Tensor, geometry: Geometry) -> Tensor:
    """[B, Hq, Tq, Tk] scaled scores with an additive mask, nothing hidden yet."""
    scores = query @ key.repeat_interleave(geometry.group, dim=1).transpose(-1, -2) * geometry.scale
    bias = geometry.dense_mask
    return scores if bias is None or bias.dtype == torch.bool else scores + bias


def _distance(geometry: Geometry) -> Tensor:
    """[Tq, Tk] signed distance t - s."""
    query_position = torch.arange(geometry.query_length, device=geometry.device) + geometry.offset
    return query_position[:, None] - torch.arange(geometry.key_length, device=geometry.device)[None, :]


def _visible(geometry: Geometry) -> Tensor:
    """[B, 1 | Hq, Tq, Tk] bool: query t may see key s."""
    visible = torch.ones(
        geometry.batch, 1, geometry.query_length, geometry.key_length, dtype=torch.bool, device=geometry.device
    )
    if geometry.is_causal:
        visible = visible & (_distance(geometry) >= 0)
    if geometry.key_mask is not None:
        visible = visible & geometry.key_mask[:, None, None, :]
    if geometry.dense_mask is not None:
        dense = geometry.dense_mask
        visible = visible & (dense if dense.dtype == torch.bool else dense > -torch.inf)
    return visible


def _counts(geometry: Geometry, last: int | None = None) -> Tensor:
    """[B, Tq] float: c[t]."""
    counts = torch.ones(geometry.batch, geometry.query_length, dtype=torch.bool, device=geometry.device)
    for mask in (geometry.query_real, geometry.query_mask):
        counts = counts if mask is None else counts & mask
    if last is not None:
        kept = torch.zeros_like(counts)
        for row, row_counts in zip(kept, counts, strict=True):
            row[row_counts.nonzero()[-last:]] = True
        counts = kept
    return counts.to(geometry.accumulator)


def _evaluate(statistic: Statistic, weights: Tensor, scores: Tensor, lse: Tensor, geometry: Geometry) -> Tensor:
    """One statistic off the map `weights` [B, Hq, Tq, Tk] and the masked scores."""
    if isinstance(statistic, LSE):
        return lse
    if isinstance(statistic, ColumnStatistic):
        counts = _counts(geometry, statistic.last_queries)
        weight = statistic.weight(_distance(geometry)).to(weights.dtype)
        total = torch.einsum("bhts,bt,ts->bhs", weights, counts, weight)
        if geometry.key_mask is not None:
            total = total * geometry.key_mask[:, None]
        if statistic.horizon is None:
            return total
        count = (counts @ weight)[:, None]
        return torch.where(count > 0, total / count.clamp(min=1), 0.0)
    if isinstance(statistic, PooledMap):
        query_bounds, key_bounds = statistic.boundaries(geometry.query_length, geometry.key_length)
        counted = weights * _counts(geometry)[:, None, :, None]
        rows = [part.sum(2) for part in counted.split(_lengths(query_bounds), dim=2)]
        return torch.stack(
            [torch.stack([p.sum(-1) for p in row.split(_lengths(key_bounds), -1)], -1) for row in rows], 2
        )
    row = _evaluate_row(statistic, weights, scores, geometry)
    live = (scores > -torch.inf).any(-1)
    if geometry.query_real is not None:
        live = live & geometry.query_real[:, None]
    return row.masked_fill(~live, 0.0)


def _evaluate_row(statistic: Statistic, weights: Tensor, scores: Tensor, geometry: Geometry) -> Tensor:
    if isinstance(statistic, RowStatistic):
        return (weights * statistic.weight(_distance(geometry))).sum(-1)
    if isinstance(statistic, Entropy):
        return torch.special.entr(weights).sum(-1)
    if isinstance(statistic, MaxLogit):
        return scores.amax(-1)
    if isinstance(statistic, SinkMass):
        if geometry.key_mask is None:
            return weights[..., : statistic.count].sum(-1)
        first = geometry.key_mask & (geometry.key_mask.cumsum(-1) <= statistic.count)
        return (weights * first[:, None, None, :]).sum(-1)
    raise TypeError(f"no definition for {statistic}")


def _lengths(bounds: tuple[int, ...]) -> list[int]:
    return [b - a for a, b in pairwise(bounds)]


def _validity(geometry: Geometry, statistics: tuple[Statistic, ...]) -> dict[Statistic, Tensor]:
    """Validity masks from dense masks: (B, Tq), (B, Tk) or (B, I, J) bool."""
    visible = _visible(geometry).any(1)  # [B, Tq, Tk]
    counted = _counts(geometry) > 0
    key_real = visible.new_ones(geometry.batch, geometry.key_length) if geometry.key_mask is None else geometry.key_mask
    valid: dict[Statistic, Tensor] = {}
    for statistic in statistics:
        rows = visible.any(-1) & counted
        if isinstance(statistic, ColumnStatistic):
            valid[statistic] = key_real
            if statistic.horizon is not None:
                weight = statistic.weight(_distance(geometry)).to(geometry.accumulator)
                valid[statistic] = key_real & (counted.to(weight.dtype) @ weight > 0)
        elif isinstance(statistic, PooledMap):
            query_bounds, key_bounds = statistic.boundaries(geometry.query_length, geometry.key_length)
            pairs = rows[:, :, None] & key_real[:, None, :]
            valid[statistic] = torch.stack(
                [
                    torch.stack([p.flatten(1).any(-1) for p in part.split(_lengths(key_bounds), 2)], -1)
                    for part in pairs.split(_lengths(query_bounds), 1)
                ],
                1,
            )
        else:
            valid[statistic] = rows
    return valid
