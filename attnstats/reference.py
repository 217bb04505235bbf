"""The definitions in code: eager attention that holds the whole map A and computes every statistic from it.

This is the oracle of every other path. It works in the dtype of its inputs, as eager attention does, so
float64 inputs give the truth and bfloat16 inputs give the error that plain PyTorch makes in bfloat16. It
shares no arithmetic with the other backends: masks are dense, counts are sums over them. Memory is O(Tq * Tk).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnstats.core import arguments
from attnstats.core.geometry import Evaluation, Geometry, as_result, without_rows
from attnstats.core.options import Options, check_names
from attnstats.core.passes import Pass
from attnstats.results import AttentionResult
from attnstats.statistics import PooledMap, SinkMass, Statistic, TopKeys

NAME = "reference"
COMPUTES = frozenset({"weight", "row", "first_keys", "segments", "top", "pooled", "lse"})
READS_PAGES: frozenset[str] = frozenset()


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    statistics: Iterable[Statistic | str] = (),
    dropout_p: float = 0.0,
    differentiable: bool = False,
    **keywords: Any,
) -> AttentionResult:
    """`attnstats.attention` by definition, holding the Tq x Tk map. Arguments, results and errors are the same.

    Unlike the other backends it takes an `attn_mask` that depends on the query: bool (True: may be seen) or
    additive, broadcastable to (B, Hq, Tq, Tk).
    """
    check_names("reference.attention", False, keywords)
    options = Options(statistics=statistics, dropout_p=dropout_p, differentiable=differentiable, **keywords)
    options = arguments.plain(query, key, value, options)
    return _attention(query, key, value, options)


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    cu_seqlens_q: Tensor,
    statistics: Iterable[Statistic | str] = (),
    dropout_p: float = 0.0,
    differentiable: bool = False,
    **keywords: Any,
) -> AttentionResult:
    """`attnstats.varlen_attention` by definition, holding the map of all tokens with all."""
    check_names("reference.varlen_attention", True, keywords)
    options = Options(
        statistics=statistics,
        cu_seqlens_q=cu_seqlens_q,
        dropout_p=dropout_p,
        differentiable=differentiable,
        **keywords,
    )
    options = arguments.plain(query, key, value, options)
    query, key, value = arguments.batch_of_one(query=query, key=key, value=value)
    return _attention(query, key, value, options)


def _attention(query: Tensor, key: Tensor, value: Tensor, options: Options) -> AttentionResult:
    geometry = arguments.with_dropout_seed(arguments.resolve(query, key, value, options))
    evaluation = attend(query, key, value, geometry)
    kept = geometry
    if geometry.dense_mask is not None:  # read later, when the caller may have written into it
        kept = dataclasses.replace(geometry, dense_mask=_shows(geometry.dense_mask).clone(), memo={})
    return as_result(evaluation, geometry, lambda s: validity(s, kept), lambda s: counts(s, kept))


def attend(query: Tensor, key: Tensor, value: Tensor, geometry: Geometry) -> Evaluation:
    """Output, lse and statistics. Autograd goes through the output and, if differentiable, through the statistics."""
    scores = _scores(query, key, geometry)
    visible = _visible(geometry)
    live = visible.any(-1, keepdim=True)
    # Zeros in a row that sees no key, also where an additive mask hides them all, keep softmax and its gradient finite;
    # the row's weights are then set to 0.
    hidden = scores.masked_fill(~visible, -torch.inf).masked_fill(~live, 0.0)
    if geometry.sinks is not None:  # one more column, which belongs to no key
        sink = geometry.sinks.to(hidden.dtype)[:, None, None].expand(*hidden.shape[:3], 1)
        weights = torch.cat([hidden, sink], -1).softmax(-1, dtype=geometry.accumulator)[..., :-1]
    else:
        weights = hidden.softmax(-1, dtype=geometry.accumulator)
    weights = weights.to(query.dtype).masked_fill(~(visible & live), 0.0)
    output = _dropped(weights, geometry) @ value.repeat_interleave(geometry.group, dim=1)
    with torch.set_grad_enabled(geometry.differentiable and torch.is_grad_enabled()):
        masked = scores.to(geometry.accumulator).masked_fill(~visible, -torch.inf)
        lse = hidden.to(geometry.accumulator).logsumexp(-1)
        if geometry.sinks is not None:
            lse = torch.logaddexp(lse, geometry.sinks.to(geometry.accumulator)[:, None])
        lse = torch.where(live.squeeze(-1), lse, -torch.inf)
        weights = weights.to(geometry.accumulator)
        tensors = {s: _evaluate(s, weights, masked, lse, geometry) for s in geometry.statistics}
    return Evaluation(output, lse.detach(), tensors)


def _dropped(weights: Tensor, geometry: Geometry) -> Tensor:
    """The weights after dropout: some are 0, the rest are divided by 1 - dropout_p."""
    if geometry.dropout_seed is None:
        return weights
    generator = torch.Generator(geometry.device).manual_seed(int(geometry.dropout_seed))
    drawn = torch.rand(weights.shape, generator=generator, device=geometry.device, dtype=torch.float32)
    return weights.masked_fill(drawn < geometry.dropout_p, 0.0) / (1 - geometry.dropout_p)


def from_lse(query: Tensor, key: Tensor, lse: Tensor, geometry: Geometry) -> dict[Statistic, Tensor]:
    """The statistics of `A = exp(scores - lse)` for an lse from elsewhere, (B, Hq, Tq)."""
    masked = _scores(query, key, geometry).to(geometry.accumulator).masked_fill(~_visible(geometry), -torch.inf)
    weights = (masked - lse[..., None]).exp().masked_fill(~_visible(geometry), 0.0)
    return {s: _evaluate(s, weights, masked, lse, geometry) for s in geometry.statistics}


def passes(geometry: Geometry, attends: bool) -> list[Pass]:
    """One pass, which computes everything."""
    return [Pass("map", geometry.statistics, attends=attends)]


def cost(each: Pass, geometry: Geometry) -> tuple[str, int, int]:
    """The description of the pass, its floating-point operations and its scratch memory in bytes."""
    pairs = geometry.batch * geometry.query_heads * geometry.query_length * geometry.key_length
    flops = 2 * pairs * (geometry.head_dim + (geometry.value_dim if each.attends else 0))
    return "eager attention, Tq x Tk", flops, 3 * pairs * geometry.accumulator.itemsize


def _scores(query: Tensor, key: Tensor, geometry: Geometry) -> Tensor:
    """[B, Hq, Tq, Tk] scaled and capped scores with an additive mask, nothing hidden yet."""
    scores = query @ key.repeat_interleave(geometry.group, dim=1).transpose(-1, -2) * geometry.scale
    if geometry.softcap is not None:
        scores = geometry.softcap * torch.tanh(scores / geometry.softcap)
    bias = geometry.dense_mask
    return scores if bias is None or bias.dtype == torch.bool else scores + bias


class _Places(NamedTuple):
    """The position [T] of every query and key, and the index [T] of its sequence; -1 and -2: of none."""

    query: Tensor
    key: Tensor
    query_sequence: Tensor
    key_sequence: Tensor


def _places(geometry: Geometry) -> _Places:
    query = torch.arange(geometry.query_length, device=geometry.device, dtype=torch.int64)
    key = torch.arange(geometry.key_length, device=geometry.device, dtype=torch.int64)
    if geometry.packing is None:
        return _Places(query + geometry.offset, key, torch.zeros_like(query), torch.zeros_like(key))
    places = _Places(query, key, torch.full_like(query, -1), torch.full_like(key, -2))
    for i, (queries, keys) in enumerate(geometry.packing.slices()):
        length, key_length = queries.stop - queries.start, keys.stop - keys.start
        places.query[queries] = torch.arange(length, device=geometry.device, dtype=torch.int64) + key_length - length
        places.key[keys] = torch.arange(key_length, device=geometry.device, dtype=torch.int64)
        places.query_sequence[queries] = i
        places.key_sequence[keys] = i
    return places


def _distance(geometry: Geometry) -> Tensor:
    """[Tq, Tk] signed distance t - s."""
    places = _places(geometry)
    return places.query[:, None] - places.key


def _together(geometry: Geometry) -> Tensor:
    """[Tq, Tk] bool: query t and key s are of the same sequence."""
    places = _places(geometry)
    return places.query_sequence[:, None] == places.key_sequence


def _visible(geometry: Geometry) -> Tensor:
    """[B, 1 | Hq, Tq, Tk] bool: query t may see key s."""
    distance, visible = _distance(geometry), _together(geometry)
    if geometry.left is not None:
        visible = visible & (distance <= geometry.left)
    if geometry.right is not None:
        visible = visible & (distance >= -geometry.right)
    visible = visible.expand(geometry.batch, 1, -1, -1)
    if geometry.key_mask is not None:
        visible = visible & geometry.key_mask[:, None, None, :]
    if geometry.dense_mask is not None:
        visible = visible & _shows(geometry.dense_mask)
    return visible


def _shows(dense_mask: Tensor) -> Tensor:
    """True where a mask, bool or additive, hides nothing."""
    return dense_mask if dense_mask.dtype == torch.bool else dense_mask > -torch.inf


def _counts(geometry: Geometry, last: int | None = None) -> Tensor:
    """[B, Tq] float: c[t]."""
    counts = torch.ones(geometry.batch, geometry.query_length, dtype=torch.bool, device=geometry.device)
    for mask in (geometry.real_queries, geometry.query_mask):
        counts = counts if mask is None else counts & mask
    if last is not None:
        kept = torch.zeros_like(counts)
        sequence = _places(geometry).query_sequence
        for row, row_counts in zip(kept, counts, strict=True):
            for i in sequence.unique():
                row[(row_counts & (sequence == i)).nonzero()[-last:]] = True
        counts = kept
    return counts.to(geometry.accumulator) * (1 if geometry.query_weight is None else geometry.query_weight)


def _weights(statistic: Statistic, geometry: Geometry) -> Tensor:
    """[Tq, Tk] the statistic's weight, 0 across sequences."""
    return statistic.weight_as(_distance(geometry), geometry.accumulator) * _together(geometry)


def _evaluate(statistic: Statistic, weights: Tensor, scores: Tensor, lse: Tensor, geometry: Geometry) -> Tensor:
    """One statistic of the map `weights` [B, Hq, Tq, Tk] and the masked scores."""
    if statistic in geometry.heads:
        heads = list(geometry.heads[statistic])
        weights, scores, lse = weights[:, heads], scores[:, heads], lse[:, heads]
    if statistic.method == "lse":
        return lse
    if statistic.axis == "column":
        counts = _counts(geometry, statistic.last_queries)
        weight = _weights(statistic, geometry)
        weights = weights.masked_fill(counts[:, None, :, None] == 0, 0.0)  # NaN in what doesn't count doesn't count
        weighted = torch.where(weight == 0, 0.0, weights * weight)  # nor NaN where the weight is 0
        total = torch.einsum("bhts,bt->bhs", weighted, counts)
        if geometry.key_mask is not None:
            total = total * geometry.key_mask[:, None]
        if statistic.horizon is None:
            return total
        count = (counts @ weight)[:, None]
        return torch.where(count > 0, total / torch.where(count > 0, count, 1.0), 0.0)
    if isinstance(statistic, PooledMap):
        query_bounds, key_bounds = statistic.boundaries(geometry.query_length, geometry.key_length)
        counts = _counts(geometry)[:, None, :, None]
        counted = weights.masked_fill(counts == 0, 0.0) * counts
        rows = [part.sum(2) for part in counted.split(_lengths(query_bounds), dim=2)]
        return torch.stack(
            [torch.stack([p.sum(-1) for p in row.split(_lengths(key_bounds), -1)], -1) for row in rows], 2
        )
    row = _evaluate_row(statistic, weights, scores, geometry)
    if statistic.from_lse:  # else a function of the scores alone
        row = without_rows(statistic, row, weights.isnan().any(-1), torch.nan)
    live = _visible(geometry).any(-1)
    if statistic in geometry.heads and live.shape[1] > 1:
        live = live[:, list(geometry.heads[statistic])]
    if geometry.real_queries is not None:
        live = live & geometry.real_queries[:, None]
    return without_rows(statistic, row, ~live)


def _evaluate_row(statistic: Statistic, weights: Tensor, scores: Tensor, geometry: Geometry) -> Tensor:
    if not weights.numel():  # no rows, and perhaps no keys to take a maximum over
        return weights.new_zeros(geometry.batch, weights.shape[1], *geometry.shape_of(statistic)[2:])
    if statistic.method == "weight":
        return (weights * _weights(statistic, geometry)).sum(-1)
    if statistic.method == "row":
        return statistic.row(weights, scores)
    if statistic.method == "segments":
        return torch.einsum("bhts,bns->bhtn", weights, _segments(statistic, geometry))
    if isinstance(statistic, TopKeys):
        return _top(statistic, weights, scores, geometry)
    assert isinstance(statistic, SinkMass)
    if geometry.key_mask is None:
        return weights[..., _places(geometry).key < statistic.count].sum(-1)
    first = geometry.key_mask.cumsum(-1) <= statistic.count  # and padding, which has no weight
    return (weights * first[:, None, None, :]).sum(-1)


def _segments(statistic: Statistic, geometry: Geometry) -> Tensor:
    """[B, S, Tk] float: 1 where a key lies in a segment."""
    places, bounds = _places(geometry), geometry.boundaries_of(statistic).tolist()
    packing = geometry.packing
    within = []
    for i in range(geometry.batch if packing is None else packing.count):
        inside = [(places.key >= a) & (places.key < b) for a, b in pairwise(bounds[i % len(bounds)])]
        own = True if packing is None else places.key_sequence == i
        within.append(torch.stack(inside) & own)
    rows = torch.stack(within)
    return (rows if packing is None else rows.any(0)[None]).to(geometry.accumulator)


def _top(statistic: TopKeys, weights: Tensor, scores: Tensor, geometry: Geometry) -> Tensor:
    """[B, H, Tq, 2, k]: by score, which tells apart what is equal as A, and of equal scores the first position."""
    order = scores.sort(dim=-1, descending=True, stable=True).indices[..., : statistic.k]
    position = _places(geometry).key[order].to(weights.dtype)
    seen = scores.gather(-1, order) > -torch.inf
    top = torch.stack([weights.gather(-1, order) * seen, torch.where(seen, position, -1.0)], -2)
    missing = top.new_tensor([0.0, -1.0])[:, None].expand(*top.shape[:-1], statistic.k - order.shape[-1])
    return torch.cat([top, missing], -1)


def _real_keys(geometry: Geometry) -> Tensor:
    """[B, Tk] bool: not padding, and of a sequence."""
    real = (_places(geometry).key_sequence >= 0).expand(geometry.batch, -1)
    return real if geometry.key_mask is None else real & geometry.key_mask


def _lengths(bounds: tuple[int, ...]) -> list[int]:
    return [b - a for a, b in pairwise(bounds)]


def counts(statistic: Statistic, geometry: Geometry) -> Tensor:
    """(B, Tk) the counted queries behind each mean, int64, or the sum of their weights, from dense masks."""
    counted = _counts(geometry, statistic.last_queries) @ _weights(statistic, geometry)
    return (counted.long() if geometry.query_weight is None else counted) * _real_keys(geometry)


def validity(statistic: Statistic, geometry: Geometry) -> Tensor:
    """False for placeholders, from dense masks: (B, Tq), (B, Tk) or (B, I, J) bool."""
    visible = _visible(geometry).any(1)  # [B, Tq, Tk]
    counted = _counts(geometry) != 0
    real_keys = _real_keys(geometry)
    rows = visible.any(-1) & counted
    if statistic.axis == "column":
        return real_keys if statistic.horizon is None else counts(statistic, geometry) > 0
    if isinstance(statistic, PooledMap):
        query_bounds, key_bounds = statistic.boundaries(geometry.query_length, geometry.key_length)
        pairs = rows[:, :, None] & real_keys[:, None, :]
        return torch.stack(
            [
                torch.stack([p.flatten(1).any(-1) for p in part.split(_lengths(key_bounds), 2)], -1)
                for part in pairs.split(_lengths(query_bounds), 1)
            ],
            1,
        )
    return rows
