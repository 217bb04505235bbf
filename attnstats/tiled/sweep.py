"""Every visible pair once, a block of query rows at a time, in plain PyTorch and O(T) memory.

Three passes share the loop: attention where torch has no kernel that returns its lse, the statistics that need
more than the band, and the gradients of both for a forward pass that kept an lse. `Recomputed` is what ties a forward
pass of any backend to its gradients.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attnstats.core.geometry import Evaluation, Geometry, divisor_of, full_precision
from attnstats.statistics import (
    LSE,
    ColumnStatistic,
    DistanceWeighted,
    Entropy,
    MaxLogit,
    PooledMap,
    RowStatistic,
    Statistic,
)

BLOCK_ELEMENTS = 2**18  # scores of a block: 1 MiB of float32 stays in a core's L2 from the matmul to the sums
LOG_ZERO = -1e4  # exp of it is exactly 0, and 0 * LOG_ZERO is not NaN as 0 * -inf is


def attention(query: Tensor, key: Tensor, value: Tensor, geometry: Geometry) -> Evaluation:
    """Output and lse; whole rows at a time, so no online softmax is needed."""
    output = query.new_zeros(*query.shape[:3], geometry.value_dim)
    lse = query.new_full(query.shape[:3], -torch.inf, dtype=geometry.accumulator)
    generator = _generator(geometry)
    for block in _blocks(geometry):
        for batch, heads, key_head in heads_of(geometry):
            scores = _scores(query, key, geometry, block, batch, heads, key_head)
            row_lse = scores.logsumexp(-1)
            if geometry.sinks is not None:
                row_lse = with_sinks(row_lse, geometry.sinks[heads])
            weights = _log_weights_(scores, row_lse).exp_()
            if generator is not None:
                weights *= _kept(weights, generator, geometry)
            seen = value[batch, key_head, block.keys].to(weights.dtype)
            output[batch, heads, block.rows] = (weights @ seen).to(output.dtype)
            lse[batch, heads, block.rows] = row_lse
    return Evaluation(output, lse, {})


def with_sinks(lse: Tensor, sinks: Tensor) -> Tensor:
    """The lse [.., H, T] of the keys with the sinks [H] counted; a row that sees no key keeps -inf."""
    counted = torch.logaddexp(lse, sinks.to(lse.dtype)[:, None])
    return torch.where(lse == -torch.inf, lse, counted)


class Recomputed(torch.autograd.Function):
    """A forward pass that returns an lse, with gradients recomputed from it.

    `attend(query, key, value, geometry)` gives an Evaluation, whose statistics carry gradients if `differentiable`;
    `gradients` is a backend's function of that name. Gives output, lse and statistics in one tuple.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None,
        geometry: Geometry,
        attend: Any,
        gradients: Any,
        differentiable: bool,
    ) -> Any:
        output, lse, tensors = attend(query, key, value, geometry)
        tensors = {s: x.clone() if x is lse else x for s, x in tensors.items()}
        kept = tuple(tensors.values()) if differentiable else ()
        ctx.save_for_backward(query, key, value, output, lse, *kept)
        ctx.geometry, ctx.gradients = geometry, gradients
        ctx.statistics = tuple(tensors) if differentiable else ()
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(lse, *(() if differentiable else tensors.values()))
        return output, lse, *tensors.values()

    @staticmethod
    @once_differentiable  # the lse is a constant here, so second derivatives would be wrong
    def backward(ctx: Any, grad_output: Tensor | None, _: None, *grads: Tensor | None) -> Any:
        query, key, value, output, lse, *values = ctx.saved_tensors
        grads = grads[: len(values)]
        of_statistics = {
            s: (x, grad) for s, x, grad in zip(ctx.statistics, values, grads, strict=True) if grad is not None
        }
        if grad_output is None:
            grad_output = torch.zeros_like(output)
        with full_precision(query.device):
            found = ctx.gradients(query, key, value, output, lse, grad_output, ctx.geometry, of_statistics)
        return *found, *(None,) * 4


Gradients = tuple[Tensor, Tensor, Tensor, Tensor | None]  # for query, key, value and sinks
OfStatistics = Mapping[Statistic, tuple[Tensor, Tensor]]  # value and gradient of each that has one


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
    """Gradients of attention and of statistics, a block of rows at a time.

    With `A = exp(scores - lse)`, dA = dO V^T + what statistics ask of A: dV = A^T dO, dS = A * (dA - rowsum(A dA)),
    dQ = dS K, dK = dS^T Q. For attention that row sum is rowsum(dO * O). A softcap c passes `1 - (score / c)^2` of dS
    on; a sink gets `-sum_t exp(sink - lse) rowsum`. The lse's own gradient is one more A, so it lessens the row sum.
    """
    if geometry.packing is not None:
        return _gradients_by_sequence(query, key, value, output, lse, grad_output, geometry, of_statistics)
    grads = [torch.zeros_like(x, dtype=geometry.accumulator) for x in (query, key, value)]
    grad_query, grad_key, grad_value = grads
    delta = (grad_output.to(geometry.accumulator) * output).sum(-1)
    wanted = {s: geometry.gradient_of_sums(s, grad) for s, (_, grad) in of_statistics.items()}
    for of_lse in [s for s in wanted if isinstance(s, LSE)]:
        delta -= wanted.pop(of_lse)
    counts = {s: _counts(s, geometry)[:, None] for s in wanted if isinstance(s, ColumnStatistic)}
    generator = _generator(geometry)
    for block in _blocks(geometry):
        by_distance = _by_distance(wanted, geometry, block)
        for batch, heads, key_head in heads_of(geometry):
            of_rows, of_keys = (batch, heads, block.rows), (batch, key_head, block.keys)
            scores = _scores(query, key, geometry, block, batch, heads, key_head)
            passed = None
            if geometry.softcap is not None:
                passed = 1 - (scores.clamp(min=-geometry.softcap) / geometry.softcap) ** 2
            log_weights = _log_weights_(scores, lse[of_rows])
            weights = log_weights.exp()
            grad_rows = grad_output[of_rows].to(weights.dtype)
            grad_scores = grad_rows @ value[of_keys].to(weights.dtype).T
            seen = weights
            if generator is not None:
                kept = _kept(weights, generator, geometry)
                grad_scores.mul_(kept)
                seen = weights * kept
            if wanted:
                asked = torch.zeros_like(weights)
                for s, grad in wanted.items():
                    if isinstance(s, ColumnStatistic):
                        of_pairs = counts[s][batch, :, block.rows, None] * grad[batch, heads, None, block.keys]
                    else:
                        of_pairs = grad[of_rows][..., None]
                    if isinstance(s, Entropy):
                        asked -= of_pairs * (log_weights.clamp(min=LOG_ZERO) + 1)
                    else:
                        asked += of_pairs * by_distance.get(s, 1.0)
                grad_scores += asked
                delta[of_rows] += (weights * asked).sum(-1)
            grad_scores.sub_(delta[of_rows][..., None]).mul_(weights).mul_(geometry.scale)
            if passed is not None:
                grad_scores.mul_(passed)
            grad_query[of_rows] = grad_scores @ key[of_keys].to(weights.dtype)
            grad_key[of_keys] += (grad_scores.mT @ query[of_rows].to(weights.dtype)).sum(0)
            grad_value[of_keys] += (seen.mT @ grad_rows).sum(0)
    grad_sinks = None
    if geometry.sinks is not None:
        share = (geometry.sinks.to(lse.dtype)[:, None] - divisor_of(lse)).exp()
        grad_sinks = -(share * delta).sum((0, 2)).to(geometry.sinks.dtype)
    cast = [g.to(x.dtype) for g, x in zip(grads, (query, key, value), strict=True)]
    return cast[0], cast[1], cast[2], grad_sinks


def _gradients_by_sequence(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    grad_output: Tensor,
    geometry: Geometry,
    of_statistics: OfStatistics,
) -> Gradients:
    grads = [torch.zeros_like(x) for x in (query, key, value)]
    grad_sinks = None if geometry.sinks is None else torch.zeros_like(geometry.sinks)
    for queries, keys, alone in geometry.sequences():
        of_rows = (slice(None), slice(None), queries)
        of_keys = (slice(None), slice(None), keys)
        of_its_own = {}
        for s, (value_of_all, grad_of_all) in of_statistics.items():
            own = of_keys if isinstance(s, ColumnStatistic) else of_rows
            of_its_own[s] = (value_of_all[own], grad_of_all[own])
        inputs = (query[of_rows], key[of_keys], value[of_keys], output[of_rows], lse[of_rows], grad_output[of_rows])
        *parts, sinks_part = gradients(*inputs, alone, of_its_own)
        for grad, where, part in zip(grads, (of_rows, of_keys, of_keys), parts, strict=True):
            grad[where] = part
        if grad_sinks is not None and sinks_part is not None:
            grad_sinks += sinks_part
    return grads[0], grads[1], grads[2], grad_sinks


def evaluate(
    query: Tensor, key: Tensor, lse: Tensor, geometry: Geometry, statistics: tuple[Statistic, ...]
) -> dict[Statistic, Tensor]:
    """Any statistic but LSE and SinkMass, as sums (`Geometry.finish` divides)."""
    tensors = {s: lse.new_zeros(geometry.shape_of(s)) for s in statistics}
    counts = {s: _counts(s, geometry) for s in statistics}
    segments = {s: _segments(s, geometry) for s in statistics if isinstance(s, PooledMap)}
    spoiled = bool(lse.isnan().any())  # rows of NaN
    for block in _blocks(geometry):
        by_distance = _by_distance(statistics, geometry, block)
        for batch, heads, key_head in heads_of(geometry):
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
                elif isinstance(s, (ColumnStatistic, PooledMap)):
                    count = counts[s][batch, block.rows]
                    if spoiled:  # 0 times NaN is NaN: neither what doesn't count nor what isn't seen may enter a sum
                        weighted = weighted.masked_fill(count[:, None] == 0, 0.0)
                        if block.hidden is not None:
                            weighted.masked_fill_(block.hidden, 0.0)
                    if isinstance(s, ColumnStatistic):
                        tensors[s][batch, heads, block.keys] += count @ weighted
                    else:  # added up, not multiplied with a matrix of memberships: that would be Tk x J
                        of_query, of_key = segments[s]
                        pooled = weighted.new_zeros(tensors[s].shape[-1], *weighted.shape[:2])
                        pooled.index_add_(0, of_key[block.keys], (weighted * count[:, None]).permute(2, 0, 1))
                        tensors[s][batch, heads].index_add_(1, of_query[block.rows], pooled.permute(1, 2, 0))
    return tensors


def _by_distance(statistics: Iterable[Statistic], geometry: Geometry, block: _Block) -> dict[Statistic, Tensor]:
    """[rows, keys] the weight of each statistic that has one which varies."""
    varying = [s for s in statistics if isinstance(s, DistanceWeighted) and s.uses_distance]
    if not varying:
        return {}
    distance = _distance(geometry, block)
    return {s: s.weight(distance).to(geometry.accumulator) for s in varying}


def _generator(geometry: Geometry) -> torch.Generator | None:
    """Where a pass draws its dropout from; passes over the same blocks in the same order draw the same."""
    if geometry.dropout_seed is None:
        return None
    return torch.Generator(geometry.device).manual_seed(int(geometry.dropout_seed))


def _kept(weights: Tensor, generator: torch.Generator, geometry: Geometry) -> Tensor:
    """0 where a weight is dropped, else what the others are scaled by."""
    drawn = torch.rand(weights.shape, generator=generator, device=weights.device)
    return (drawn >= geometry.dropout_p).to(weights.dtype).div_(1 - geometry.dropout_p)


def scratch_bytes() -> int:
    """Memory of the loop: scores, their exponential and a weighted copy."""
    return 3 * 4 * BLOCK_ELEMENTS


def _segments(statistic: PooledMap, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """[Tq] and [Tk] int64: the segment of each query and of each key."""
    both = []
    for bounds in statistic.boundaries(geometry.query_length, geometry.key_length):
        ends = torch.tensor(bounds[1:], device=geometry.device)
        both.append(torch.searchsorted(ends, torch.arange(bounds[-1], device=geometry.device), right=True))
    return both[0], both[1]


def _counts(statistic: Statistic, geometry: Geometry) -> Tensor:
    """[B, Tq] float, c[t] of Eq. 10."""
    counted = geometry.counted(statistic.last_queries if isinstance(statistic, ColumnStatistic) else None)
    if counted is None:
        counted = torch.ones(geometry.batch, geometry.query_length, dtype=torch.bool, device=geometry.device)
    return counted.to(geometry.accumulator)


class _Block(NamedTuple):
    rows: slice
    keys: slice  # the rows see no other
    hidden: Tensor | None  # [rows, keys] bool: outside the causal mask or the window; None: none is


def _blocks(geometry: Geometry) -> Iterator[_Block]:
    seen = geometry.key_length
    if geometry.left is not None and geometry.right is not None:
        seen = min(seen, geometry.left + geometry.right + 1)
    step = max(16, min(512, BLOCK_ELEMENTS // (seen * geometry.group)))
    for start in range(0, geometry.query_length, step):
        end = min(start + step, geometry.query_length)
        first, last = geometry.offset + start, geometry.offset + end - 1  # positions
        begin, stop = 0, geometry.key_length
        if geometry.left is not None:
            begin = max(0, first - geometry.left)
        if geometry.right is not None:
            stop = min(stop, last + geometry.right + 1)
        if begin < stop:
            block = _Block(slice(start, end), slice(begin, stop), None)
            ahead = geometry.right is not None and first + geometry.right < stop - 1
            behind = geometry.left is not None and last - geometry.left > begin
            if ahead or behind:
                distance = _distance(geometry, block)
                hidden = torch.zeros_like(distance, dtype=torch.bool)
                if geometry.right is not None:
                    hidden |= distance < -geometry.right
                if geometry.left is not None:
                    hidden |= distance > geometry.left
                block = block._replace(hidden=hidden)
            yield block


def heads_of(geometry: Geometry) -> Iterator[tuple[int, slice, int]]:
    """(batch row, query heads of one group, their key head)."""
    for batch in range(geometry.batch):
        for key_head in range(geometry.key_heads):
            yield batch, slice(key_head * geometry.group, (key_head + 1) * geometry.group), key_head


def _distance(geometry: Geometry, block: _Block) -> Tensor:
    """[rows, keys] signed distance t - s."""
    rows = torch.arange(block.rows.start, block.rows.stop, device=geometry.device) + geometry.offset
    return rows[:, None] - torch.arange(block.keys.start, block.keys.stop, device=geometry.device)


def _scores(
    query: Tensor, key: Tensor, geometry: Geometry, block: _Block, batch: int, heads: slice, key_head: int
) -> Tensor:
    """[G, rows, keys] scores of one group, -inf where a key can't be seen."""
    rows = query[batch, heads, block.rows].to(geometry.accumulator) * geometry.scale
    scores = rows @ key[batch, key_head, block.keys].to(geometry.accumulator).T
    if geometry.softcap is not None:
        scores.div_(geometry.softcap).tanh_().mul_(geometry.softcap)
    if block.hidden is not None:
        scores.masked_fill_(block.hidden, -torch.inf)
    if geometry.key_mask is not None:
        scores.masked_fill_(~geometry.key_mask[batch, block.keys], -torch.inf)
    return scores


def _log_weights_(scores: Tensor, lse: Tensor) -> Tensor:
    """ln A = scores - lse in place; under a row that sees nothing (lse -inf) it is -inf, not NaN."""
    return scores.sub_(divisor_of(lse)[..., None])
