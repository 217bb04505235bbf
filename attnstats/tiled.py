"""Attention and its statistics in plain PyTorch at O(T) memory, on any device: the default without a GPU.

Attention itself is torch's flash kernel for the CPU, which returns the lse; elsewhere, and for what that kernel
can't do, a sweep over blocks of query rows. Statistics then follow from (query, key, lse) in two ways:

- `_band`: those whose weight is constant beyond a distance, from the keys near the diagonal alone, O(T) time;
- `_sweep`: all others, from every visible pair once, a block of rows at a time.

`gradients` is the backward pass of any forward that kept an lse; the Triton path uses it too.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from attnstats.geometry import Evaluation, Geometry
from attnstats.statistics import (
    LSE,
    ColumnStatistic,
    DistanceWeighted,
    Entropy,
    MaxLogit,
    PooledMap,
    RowStatistic,
    SinkMass,
    Statistic,
)

# Elements of one block of scores: 1 MiB of float32 stays in a core's L2 between the matmul and the reductions.
BLOCK_ELEMENTS = 2**18
BAND_LIMIT = 1024  # wider bands are swept: the buffer of a band grows with the square of its width
LOG_ZERO = -1e4  # exp of it is exactly 0, and 0 * LOG_ZERO is not NaN as 0 * -inf is
BAND_ROWS = 64  # rows of a band block; a block computes BAND_ROWS + reach keys per row to use reach + 1 of them


def attend(
    query: Tensor, key: Tensor, value: Tensor, geometry: Geometry, statistics: tuple[Statistic, ...]
) -> Evaluation:
    """Output, lse and statistics. The output is differentiable."""
    if _flash_takes(geometry):
        output, lse = _flash(query, key, value, geometry)
    else:
        output, lse = Recomputed.apply(query, key, value, geometry, _rowwise_attention)[:2]
    with torch.no_grad():
        return Evaluation(output, lse, from_lse(query, key, lse, geometry, statistics))


def from_lse(
    query: Tensor, key: Tensor, lse: Tensor, geometry: Geometry, statistics: tuple[Statistic, ...]
) -> dict[Statistic, Tensor]:
    """The statistics of `A = exp(scores - lse)`; lse (B, Hq, Tq), -inf for rows that see no key.

    MaxLogit is not a function of the lse: it costs the scores once more here.
    """
    banded = tuple(s for s in statistics if isinstance(s, DistanceWeighted) and is_narrow(s))
    swept = tuple(s for s in statistics if s not in banded and not isinstance(s, (LSE, SinkMass)))
    tensors = _band(query, key, lse, geometry, banded) if banded else {}
    if swept:
        tensors |= _sweep(query, key, lse, geometry, swept)
    for statistic in statistics:
        if isinstance(statistic, SinkMass):
            tensors[statistic] = sink_mass(query, key, lse, geometry, statistic)
        elif isinstance(statistic, LSE):
            tensors[statistic] = lse
    return {s: finish(s, tensors[s], geometry) for s in statistics}


def finish(statistic: Statistic, tensor: Tensor, geometry: Geometry) -> Tensor:
    """From sums to what is returned: means over counted queries, zeros where there is nothing but padding."""
    if isinstance(statistic, (LSE, PooledMap)):
        return tensor
    if isinstance(statistic, ColumnStatistic):
        if geometry.key_mask is not None:
            tensor = tensor.masked_fill(~geometry.key_mask[:, None], 0.0)
        if statistic.horizon is None:
            return tensor
        return tensor / geometry.queries_at_distance(*statistic.horizon).clamp(min=1)[:, None]
    if geometry.key_mask is None and geometry.query_real is None:
        return tensor
    rows = geometry.live() if geometry.query_real is None else geometry.live() & geometry.query_real
    return tensor.masked_fill(~rows[:, None], 0.0)


# Attention


def _flash_takes(geometry: Geometry) -> bool:
    return (
        geometry.device.type == "cpu"
        and hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu")
        and geometry.head_dim == geometry.value_dim
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
    output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, causal, attn_mask=bias, scale=geometry.scale
    )
    if geometry.key_mask is not None:  # the kernel gives 0 for rows that see nothing
        lse = lse.masked_fill(~geometry.live()[:, None], -torch.inf)
    return output, lse


def _rowwise_attention(query: Tensor, key: Tensor, value: Tensor, geometry: Geometry) -> Evaluation:
    output = query.new_empty(*query.shape[:3], geometry.value_dim)
    lse = query.new_empty(query.shape[:3], dtype=geometry.accumulator)
    for block in _blocks(geometry):
        for batch, heads, key_head in _heads(geometry):
            scores = _scores(query, key, geometry, block, batch, heads, key_head)
            row_lse = scores.logsumexp(-1)
            weights = _log_weights_(scores, row_lse).exp_()
            seen = value[batch, key_head, : block.keys].to(weights.dtype)
            output[batch, heads, block.rows] = (weights @ seen).to(output.dtype)
            lse[batch, heads, block.rows] = row_lse
    return Evaluation(output, lse, {})


class Recomputed(torch.autograd.Function):
    """Any forward pass that returns an lse, with the gradients of attention recomputed from it."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, geometry: Geometry, forward: Any) -> Any:
        output, lse, tensors = forward(query, key, value, geometry)
        ctx.save_for_backward(query, key, value, output, lse)
        ctx.geometry = geometry
        ctx.mark_non_differentiable(lse, *tensors.values())
        return output, lse, *tensors.values()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, *_: Any) -> Any:
        return *gradients(*ctx.saved_tensors, grad_output, ctx.geometry), None, None


def gradients(
    query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor, grad_output: Tensor, geometry: Geometry
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of attention for query, key and value, a block of rows at a time.

    With `A = exp(scores - lse)`: dV = A^T dO, dS = A * (dO V^T - rowsum(dO * O)), dQ = dS K, dK = dS^T Q.
    """
    grads = [torch.zeros_like(x, dtype=geometry.accumulator) for x in (query, key, value)]
    grad_query, grad_key, grad_value = grads
    delta = (grad_output.to(geometry.accumulator) * output).sum(-1)
    for block in _blocks(geometry):
        for batch, heads, key_head in _heads(geometry):
            of_rows, of_keys = (batch, heads, block.rows), (batch, key_head, slice(block.keys))
            scores = _scores(query, key, geometry, block, batch, heads, key_head)
            weights = _log_weights_(scores, lse[of_rows]).exp_()
            grad_rows = grad_output[of_rows].to(weights.dtype)
            grad_scores = grad_rows @ value[of_keys].to(weights.dtype).T
            grad_scores.sub_(delta[of_rows][..., None]).mul_(weights).mul_(geometry.scale)
            grad_query[of_rows] = grad_scores @ key[of_keys].to(weights.dtype)
            grad_key[of_keys] += (grad_scores.mT @ query[of_rows].to(weights.dtype)).sum(0)
            grad_value[of_keys] += (weights.mT @ grad_rows).sum(0)
    return tuple(g.to(x.dtype) for g, x in zip(grads, (query, key, value), strict=True))  # type: ignore[return-value]


# Every visible pair once, a block of rows at a time


class _Block(NamedTuple):
    rows: slice
    keys: int  # the rows see no key at or past this one
    position: int  # of the first row


def _blocks(geometry: Geometry) -> Iterator[_Block]:
    step = max(16, min(512, BLOCK_ELEMENTS // (geometry.key_length * geometry.group)))
    for start in range(0, geometry.query_length, step):
        end = min(start + step, geometry.query_length)
        keys = min(geometry.offset + end, geometry.key_length) if geometry.is_causal else geometry.key_length
        yield _Block(slice(start, end), keys, geometry.offset + start)


def _heads(geometry: Geometry) -> Iterator[tuple[int, slice, int]]:
    """(batch row, query heads of one group, their key head)."""
    for batch in range(geometry.batch):
        for key_head in range(geometry.key_heads):
            yield batch, slice(key_head * geometry.group, (key_head + 1) * geometry.group), key_head


def _distance(geometry: Geometry, block: _Block) -> Tensor:
    """[rows, keys] signed distance t - s."""
    rows = torch.arange(block.rows.stop - block.rows.start, device=geometry.device) + block.position
    return rows[:, None] - torch.arange(block.keys, device=geometry.device)


def _scores(
    query: Tensor, key: Tensor, geometry: Geometry, block: _Block, batch: int, heads: slice, key_head: int
) -> Tensor:
    """[G, rows, keys] scores of one group, -inf where a key can't be seen."""
    rows = query[batch, heads, block.rows].to(geometry.accumulator) * geometry.scale
    scores = rows @ key[batch, key_head, : block.keys].to(geometry.accumulator).T
    if geometry.is_causal and block.position + 1 < block.keys:
        future = _distance(geometry, block)[:, block.position + 1 :] < 0
        scores[..., block.position + 1 :].masked_fill_(future, -torch.inf)
    if geometry.key_mask is not None:
        scores.masked_fill_(~geometry.key_mask[batch, : block.keys], -torch.inf)
    return scores


def _log_weights_(scores: Tensor, lse: Tensor) -> Tensor:
    """ln A = scores - lse in place; under a row that sees nothing (lse -inf) it is -inf, not NaN."""
    return scores.sub_(divisor_of(lse)[..., None])


def divisor_of(lse: Tensor) -> Tensor:
    """The lse with +inf for rows that see nothing, so that exp(score - lse) is exactly 0 there."""
    return lse.masked_fill(lse == -torch.inf, torch.inf)


def _sweep(
    query: Tensor, key: Tensor, lse: Tensor, geometry: Geometry, statistics: tuple[Statistic, ...]
) -> dict[Statistic, Tensor]:
    tensors = {s: lse.new_zeros(_shape(s, geometry)) for s in statistics}
    counts = {s: _counts(s, geometry) for s in statistics}
    pools = {s: membership(s, geometry) for s in statistics if isinstance(s, PooledMap)}
    for block in _blocks(geometry):
        distance = _distance(geometry, block)
        by_distance = {
            s: s.weight(distance).to(lse.dtype) for s in statistics if isinstance(s, DistanceWeighted) and s.uses_distance
        }
        for batch, heads, key_head in _heads(geometry):
            scores = _scores(query, key, geometry, block, batch, heads, key_head)
            of_rows = (batch, heads, block.rows)
            for s in statistics:
                if isinstance(s, MaxLogit):
                    tensors[s][of_rows] = scores.amax(-1)
            log_weights = _log_weights_(scores, lse[of_rows]).clamp_(min=LOG_ZERO)
            weights = log_weights.exp()
            for s in statistics:
                weighted = weights * by_distance[s] if s in by_distance else weights
                if isinstance(s, RowStatistic):
                    tensors[s][of_rows] = weighted.sum(-1)
                elif isinstance(s, Entropy):
                    tensors[s][of_rows] = -(weights * log_weights).sum(-1)
                elif isinstance(s, ColumnStatistic):
                    tensors[s][batch, heads, : block.keys] += counts[s][batch, block.rows] @ weighted
                elif isinstance(s, PooledMap):
                    of_query, of_key = pools[s]
                    counted = of_query[block.rows].T * counts[s][batch, block.rows]
                    tensors[s][batch, heads] += counted @ weights @ of_key[: block.keys]
    return tensors


def _shape(statistic: Statistic, geometry: Geometry) -> tuple[int, ...]:
    if isinstance(statistic, ColumnStatistic):
        return geometry.batch, geometry.query_heads, geometry.key_length
    if isinstance(statistic, PooledMap):
        query_bounds, key_bounds = statistic.boundaries(geometry.query_length, geometry.key_length)
        return geometry.batch, geometry.query_heads, len(query_bounds) - 1, len(key_bounds) - 1
    return geometry.batch, geometry.query_heads, geometry.query_length


def _counts(statistic: Statistic, geometry: Geometry) -> Tensor:
    """[B, Tq] float, c[t] of Eq. 10."""
    counted = geometry.counted(statistic.last_queries if isinstance(statistic, ColumnStatistic) else None)
    if counted is None:
        counted = torch.ones(geometry.batch, geometry.query_length, dtype=torch.bool, device=geometry.device)
    return counted.to(geometry.accumulator)


def membership(statistic: PooledMap, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """[Tq, I] and [Tk, J] float, 1 where a position lies in a segment."""
    both = []
    for bounds in statistic.boundaries(geometry.query_length, geometry.key_length):
        edges = torch.tensor(bounds, device=geometry.device)
        position = torch.arange(bounds[-1], device=geometry.device)[:, None]
        both.append(((edges[:-1] <= position) & (position < edges[1:])).to(geometry.accumulator))
    return both[0], both[1]


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
    return _log_weights_(scores.masked_fill_(~visible[:, None], -torch.inf), lse).exp_().sum(-1)


# The band beside the diagonal


class _Band(NamedTuple):
    """Distances `-ahead .. behind`, laid out as [rows, distance] with column j at distance `behind - j`."""

    behind: int
    ahead: int

    @property
    def width(self) -> int:
        return self.behind + self.ahead + 1

    def clip(self, statistic: DistanceWeighted) -> tuple[int, int]:
        """The statistic's own band within this one; empty where the second is less than the first."""
        lo, hi = statistic.band or (0, -1)
        return max(lo, -self.ahead), min(hi, self.behind)

    def weight(self, statistic: DistanceWeighted, like: Tensor) -> Tensor:
        """[hi - lo + 1] the statistic's weight less its tail, from distance lo upwards."""
        lo, hi = self.clip(statistic)
        return statistic.weight(torch.arange(lo, hi + 1, device=like.device)).to(like.dtype) - statistic.tail


def is_narrow(statistic: DistanceWeighted) -> bool:
    return statistic.band is not None and statistic.band[1] - statistic.band[0] < BAND_LIMIT


def _band(
    query: Tensor, key: Tensor, lse: Tensor, geometry: Geometry, statistics: tuple[DistanceWeighted, ...]
) -> dict[Statistic, Tensor]:
    """Statistics of the keys near the diagonal, rows and columns from the same scores.

    Blocks of rows meet overlapping windows of keys in one batched matmul. Read along its diagonals the product
    is the band itself, so that no causal mask is needed and nothing outside the band is exponentiated.
    """
    behind = max(0, min(max(s.band[1] for s in statistics if s.band), geometry.offset + geometry.query_length - 1))
    ahead = 0 if geometry.is_causal else max(-s.band[0] for s in statistics if s.band)
    band = _Band(behind, max(0, min(ahead, geometry.key_length - 1 - geometry.offset)))
    divisor = divisor_of(lse)
    tensors = {s: lse.new_zeros(_shape(s, geometry)) for s in statistics}
    met = [s for s in statistics if band.clip(s)[0] <= band.clip(s)[1]]
    by_distance = {s: band.weight(s, lse) for s in met}
    counted = geometry.counted()
    for batch, heads, key_head in _heads(geometry):
        keys, hidden = _padded_keys(key[batch, key_head], band, geometry, batch)
        for head in range(heads.start, heads.stop):
            blocks = _band_blocks(query[batch, head], keys, hidden, divisor[batch, head], band, geometry)
            for start, weights, padded in blocks:
                rows = slice(start, start + len(weights))
                for s in met:
                    if isinstance(s, RowStatistic):
                        lo, hi = band.clip(s)
                        near = weights[:, band.behind - hi : band.behind - lo + 1]
                        tensors[s][batch, head, rows] = near @ by_distance[s].flip(0)
                if counted is not None:
                    weights.mul_(counted[batch, rows, None])
                for s in met:
                    if isinstance(s, ColumnStatistic):
                        first, lo = geometry.offset + start, band.clip(s)[0]
                        _add_columns_(tensors[s][batch, head], padded, first, len(weights), band, lo, by_distance[s])
    live = geometry.live()[:, None].to(lse.dtype)
    return {s: tensors[s] + s.tail * live if s.tail else tensors[s] for s in statistics}


def _padded_keys(key: Tensor, band: _Band, geometry: Geometry, batch: int) -> tuple[Tensor, Tensor]:
    """The keys from `behind` before the first query on, zeros where there are none, and which of them are hidden."""
    blocks = -(-geometry.query_length // BAND_ROWS)
    length = blocks * BAND_ROWS + band.width - 1
    first = geometry.offset - band.behind  # the position at index 0
    inside = slice(max(0, -first), min(length, geometry.key_length - first))
    positions = slice(inside.start + first, inside.stop + first)
    keys = key.new_zeros(length, geometry.head_dim, dtype=geometry.accumulator)
    keys[inside] = key[positions]
    hidden = torch.ones(length, dtype=torch.bool, device=key.device)
    hidden[inside] = False if geometry.key_mask is None else ~geometry.key_mask[batch, positions]
    return keys, hidden


def _band_blocks(
    query: Tensor, keys: Tensor, hidden: Tensor, divisor: Tensor, band: _Band, geometry: Geometry
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """For one head, yield (first row, A as [rows, width], the buffer that holds it between rows of zeros)."""
    length, dim = query.shape
    window = BAND_ROWS + band.width - 1
    step = max(1, BLOCK_ELEMENTS // (BAND_ROWS * window)) * BAND_ROWS
    step = min(step, -(-length // BAND_ROWS) * BAND_ROWS)
    scaled = keys.new_zeros(step, dim)
    padded = keys.new_zeros(band.width + step + band.width, band.width)
    for start in range(0, length, step):
        rows = min(step, length - start)
        blocks = -(-rows // BAND_ROWS)
        torch.mul(query[start : start + rows], geometry.scale, out=scaled[:rows])
        windows = keys[start:].as_strided((blocks, window, dim), (BAND_ROWS * dim, dim, 1))
        scores = torch.bmm(scaled.view(-1, BAND_ROWS, dim)[:blocks], windows.mT)
        diagonals = scores.as_strided((blocks, BAND_ROWS, band.width), (BAND_ROWS * window, window + 1, 1))
        padded[band.width :].view(-1)[: diagonals.numel()].view_as(diagonals).copy_(diagonals)
        weights = padded[band.width : band.width + rows]
        weights.sub_(divisor[start : start + rows, None]).exp_()
        first = geometry.offset + start
        inside = first >= band.behind and first + rows + band.ahead <= geometry.key_length
        if geometry.key_mask is not None or not inside:
            weights.masked_fill_(hidden[start:].as_strided((rows, band.width), (1, 1)), 0.0)
        padded[band.width + rows :].zero_()
        yield start, weights, padded


def _add_columns_(column: Tensor, padded: Tensor, first: int, rows: int, band: _Band, lo: int, by_distance: Tensor) -> None:
    """Add to `column` [Tk] what it receives from a block of rows, the first of them at position `first`.

    A key's weights stand on an antidiagonal of the band: one row further down, one column further left.
    """
    hi = lo + len(by_distance) - 1
    start = (band.width - hi + lo) * band.width + band.behind - lo
    antidiagonals = padded.as_strided((rows + hi - lo, hi - lo + 1), (band.width, band.width - 1), start)
    received = (antidiagonals * by_distance).sum(1)
    skip = max(0, hi - first)
    keys = slice(first - hi + skip, min(first - lo + rows, len(column)))
    if keys.start < keys.stop:
        column[keys] += received[skip : skip + keys.stop - keys.start]
