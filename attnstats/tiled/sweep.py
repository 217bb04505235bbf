"""Every visible pair once, a block of query rows at a time, in plain PyTorch and O(T) memory.

Three passes share the loop: attention where torch has no kernel that returns its lse, the statistics that need
more than the band, and the gradients of both for a forward pass that kept an lse.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnstats.core.autograd import Gradients, GradientsByStatistic, Residuals
from attnstats.core.geometry import Geometry, divisor_of, rows_before
from attnstats.core.scores import sink_gradient, softcap_, subtract_lse_, with_sinks
from attnstats.core.visibility import within
from attnstats.statistics import Entropy, PooledMap, Statistic, TopKeys

BLOCK_ELEMENTS = 2**18  # scores of a block: 1 MiB of float32 stays in a core's L2 from the matmul to the sums
SCRATCH_BYTES = 3 * 4 * BLOCK_ELEMENTS  # scores, their exponential and a weighted copy
LARGE = 16.0  # an lse below is rounded by at most 4 units of float32's epsilon, about what the sum of a row loses
LOG_ZERO = -1e4  # exp of it is exactly 0, and 0 * LOG_ZERO is not NaN as 0 * -inf is


def attention(query: Tensor, key: Tensor, value: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """Output and lse. A block holds whole rows, so no online softmax is needed."""
    output = query.new_zeros(*query.shape[:3], geometry.value_dim)
    lse = query.new_full(query.shape[:3], -torch.inf, dtype=geometry.accumulator)
    generator = _generator(geometry)
    live = geometry.live()
    for block in _blocks(geometry):
        for batch, heads, key_head in heads_of(geometry):
            scores = _scores(query, key, geometry, block, batch, heads, key_head)
            row_lse = scores.logsumexp(-1)
            if geometry.sinks is not None:
                row_lse = with_sinks(row_lse, geometry.sinks[heads])
            # Of scores that are all -inf there is no softmax; a row that sees no key has the lse -inf, sink or not.
            row_lse = row_lse.masked_fill(row_lse == -torch.inf, torch.nan)
            row_lse.masked_fill_(~live[batch, block.rows], -torch.inf)
            weights = subtract_lse_(scores, row_lse).exp_()
            if generator is not None:
                weights *= _kept(weights, generator, geometry)
            seen = value[batch, key_head, block.keys].to(weights.dtype)
            output[batch, heads, block.rows] = (weights @ seen).to(output.dtype)
            lse[batch, heads, block.rows] = row_lse
    return output, lse


def gradients(
    residuals: Residuals, grad_output: Tensor, geometry: Geometry, of_statistics: GradientsByStatistic
) -> Gradients:
    """Gradients of attention and of statistics, a block of rows at a time.

    With `A = exp(scores - lse)` and dA = dO V^T + the gradients that statistics add: dV = A^T dO, dQ = dS K and
    dK = dS^T Q, where dS = A * (dA - rowsum(A dA)). For attention that row sum is rowsum(dO * O). A softcap c passes
    `1 - (score / c)^2` of dS on; a sink gets `-sum_t exp(sink - lse) rowsum`. The lse's own gradient is one more A, so
    it lessens the row sum.
    """
    if geometry.packing is not None:
        return _gradients_by_sequence(residuals, grad_output, geometry, of_statistics)
    query, key, value, output, lse, *_ = residuals
    grad_query, grad_key, grad_value = (torch.zeros_like(x, dtype=geometry.accumulator) for x in (query, key, value))
    delta = (grad_output.to(geometry.accumulator) * output).sum(-1)
    statistic_grads = {s: geometry.gradient_of_sums(s, grad) for s, (_, grad) in of_statistics.items()}
    for of_lse in [s for s in statistic_grads if s.method == "lse"]:
        delta -= statistic_grads.pop(of_lse)
    counts = {s: _counts(s, geometry)[:, None] for s in statistic_grads if s.axis == "column"}
    members = _memberships(statistic_grads, geometry)
    generator = _generator(geometry)
    sinks = geometry.sinks
    has_nan = bool(lse.isnan().any())
    exact_lse = lse if sinks is None else lse.to(torch.float64, copy=True)
    for block in _blocks(geometry):
        by_distance = _by_distance(statistic_grads, geometry, block)
        for batch, heads, key_head in heads_of(geometry):
            of_rows, of_keys = (batch, heads, block.rows), (batch, key_head, block.keys)
            scores = _scores(query, key, geometry, block, batch, heads, key_head)
            softcap_slope = None
            if geometry.softcap is not None:
                softcap_slope = 1 - (scores.clamp(min=-geometry.softcap) / geometry.softcap) ** 2
            log_weights = subtract_lse_(scores, lse[of_rows])
            weights = log_weights.exp()
            if (lse[of_rows].abs() > LARGE).any():
                log_mass = _normalise_(weights, log_weights, lse[of_rows], None if sinks is None else sinks[heads])
                if sinks is not None:
                    exact_lse[of_rows] += log_mass
            if has_nan:  # -inf less an lse of NaN is NaN
                _hide_(weights, 0.0, geometry, block, batch)
            grad_rows = grad_output[of_rows].to(weights.dtype)
            grad_scores = grad_rows @ value[of_keys].to(weights.dtype).T
            dropped = weights
            if generator is not None:
                kept = _kept(weights, generator, geometry)
                grad_scores.mul_(kept)
                dropped = weights * kept
            if statistic_grads:
                grad_weights = torch.zeros_like(weights)
                for s, grad in statistic_grads.items():
                    if s.method == "segments":
                        grad_weights += grad[of_rows] @ _of(members[s], batch, block).T
                        continue
                    if s.axis == "column":
                        of_pairs = counts[s][batch, :, block.rows, None] * grad[batch, heads, None, block.keys]
                    else:
                        of_pairs = grad[of_rows][..., None]
                    if s.method == "row":  # the entropy's
                        grad_weights -= of_pairs * (log_weights.clamp(min=LOG_ZERO) + 1)
                    else:
                        grad_weights += of_pairs * by_distance.get(s, 1.0)
                grad_scores += grad_weights
                delta[of_rows] += (weights * grad_weights).sum(-1)
            grad_scores.sub_(delta[of_rows][..., None]).mul_(weights).mul_(geometry.scale)
            if has_nan:
                _hide_(grad_scores, 0.0, geometry, block, batch)
            if softcap_slope is not None:
                grad_scores.mul_(softcap_slope)
            grad_query[of_rows] = grad_scores @ key[of_keys].to(weights.dtype)
            grad_key[of_keys] += (grad_scores.mT @ query[of_rows].to(weights.dtype)).sum(0)
            grad_value[of_keys] += (dropped.mT @ grad_rows).sum(0)
    grad_sinks = None
    if sinks is not None:
        grad_sinks = sink_gradient((sinks.double()[:, None] - divisor_of(exact_lse)).exp(), delta, geometry)
    return Gradients(grad_query.to(query.dtype), grad_key.to(key.dtype), grad_value.to(value.dtype), grad_sinks)


def _normalise_(weights: Tensor, log_weights: Tensor, lse: Tensor, sinks: Tensor | None) -> Tensor:
    """Divide A [G, rows, keys] of whole rows by its sum, the sink's share included, and its log alike.

    Returns the log of the sums, which is what the lse lacks.
    """
    mass = weights.sum(-1)
    if sinks is not None:
        mass += (sinks[:, None] - lse).exp()
    mass.masked_fill_(lse == -torch.inf, 1.0)
    log_mass = mass.log()
    log_weights.sub_(log_mass[..., None])
    weights.div_(mass[..., None])
    return log_mass


def _gradients_by_sequence(
    residuals: Residuals, grad_output: Tensor, geometry: Geometry, of_statistics: GradientsByStatistic
) -> Gradients:
    query, key, value, output, lse, *_ = residuals
    grads = [torch.zeros_like(x) for x in (query, key, value)]
    grad_sinks = None if geometry.sinks is None else torch.zeros_like(geometry.sinks)
    for queries, keys, alone in geometry.sequences():
        of_rows = (slice(None), slice(None), queries)
        of_keys = (slice(None), slice(None), keys)
        own = {
            s: tuple(x[of_keys if s.axis == "column" else of_rows] for x in value_and_grad)
            for s, value_and_grad in of_statistics.items()
        }
        inputs = Residuals(query[of_rows], key[of_keys], value[of_keys], output[of_rows], lse[of_rows])
        *parts, sinks_part = gradients(inputs, grad_output[of_rows], alone, own)  # type: ignore[arg-type]
        for grad, where, part in zip(grads, (of_rows, of_keys, of_keys), parts, strict=True):
            grad[where] = part
        if grad_sinks is not None and sinks_part is not None:
            grad_sinks += sinks_part
    return Gradients(grads[0], grads[1], grads[2], grad_sinks)


def evaluate(
    query: Tensor, key: Tensor, lse: Tensor, geometry: Geometry, statistics: tuple[Statistic, ...]
) -> dict[Statistic, Tensor]:
    """Statistics with a weight, of whole rows, of segments and the largest, as sums (`Geometry.finish` divides)."""
    tensors = geometry.zeros(statistics)
    counts = {s: _counts(s, geometry) for s in statistics if s.axis != "row"}
    before = {s: rows_before(count != 0).tolist() for s, count in counts.items()}
    maps: list[Any] = [s for s in statistics if s.method == "pooled"]
    segments = {s: _segments(s, geometry) for s in maps}
    members = _memberships(statistics, geometry)
    has_nan = bool(lse.isnan().any())

    def needed_in(rows: slice) -> list[list[Statistic]]:
        """Of each batch row, the statistics that one of these rows counts for."""
        return [
            [s for s in statistics if s not in counts or before[s][batch][rows.start] < before[s][batch][rows.stop]]
            for batch in range(geometry.batch)
        ]

    for block in _blocks(geometry, lambda rows: any(needed_in(rows))):
        needed = needed_in(block.rows)
        by_distance = _by_distance({s for of_batch in needed for s in of_batch}, geometry, block)
        for batch, heads, key_head in heads_of(geometry):
            if not needed[batch]:
                continue
            scores = _scores(query, key, geometry, block, batch, heads, key_head)
            of_rows = (batch, heads, block.rows)
            own_rows = [s for s in needed[batch] if s.method == "row" and not isinstance(s, Entropy)]
            tops = [s for s in needed[batch] if isinstance(s, TopKeys)]
            of_scores = scores.clone() if own_rows or tops else scores
            log_weights = subtract_lse_(scores, lse[of_rows]).clamp_(min=LOG_ZERO)
            weights = log_weights.exp()
            if has_nan:  # -inf less an lse of NaN is NaN
                _hide_(weights, 0.0, geometry, block, batch)
            for s in own_rows:
                tensors[s][of_rows] = s.row(weights, of_scores)
            if tops:
                order = of_scores.sort(dim=-1, descending=True, stable=True).indices
                for s in tops:
                    first = order[..., : s.k]
                    seen = of_scores.gather(-1, first) > -torch.inf
                    own = tensors[s][of_rows][..., : first.shape[-1]]
                    own[..., 0, :] = weights.gather(-1, first) * seen
                    own[..., 1, :] = torch.where(seen, first + block.keys.start, -1)
            for s in needed[batch]:
                weighted = weights * by_distance[s] if s in by_distance else weights
                if isinstance(s, Entropy):
                    tensors[s][of_rows] = -(weights * log_weights).sum(-1)
                elif s.method == "weight" and s.axis == "row":
                    tensors[s][of_rows] = weighted.sum(-1)
                elif s.method == "segments":
                    tensors[s][of_rows] = weights @ _of(members[s], batch, block)
                elif s.axis != "row":
                    count = counts[s][batch, block.rows]
                    if has_nan:  # 0 * NaN is NaN: what doesn't count may not enter a sum
                        weighted = weighted.masked_fill(count[:, None] == 0, 0.0)
                        if s in by_distance:
                            weighted.masked_fill_(by_distance[s] == 0, 0.0)
                    if s.axis == "column":
                        tensors[s][batch, heads, block.keys] += count @ weighted
                    else:  # added up, not multiplied with a matrix of memberships: that would be Tk x J
                        of_query, of_key = segments[s]
                        pooled = weighted.new_zeros(tensors[s].shape[-1], *weighted.shape[:2])
                        pooled.index_add_(0, of_key[block.keys], (weighted * count[:, None]).permute(2, 0, 1))
                        tensors[s][batch, heads].index_add_(1, of_query[block.rows], pooled.permute(1, 2, 0))
    return tensors


def _by_distance(statistics: Iterable[Statistic], geometry: Geometry, block: _Block) -> dict[Statistic, Tensor]:
    """[rows, keys] the weight of each statistic whose weight varies."""
    varying = [s for s in statistics if s.uses_distance]
    if not varying:
        return {}
    distance = _distance(geometry, block)
    return {s: s.weight_as(distance, geometry.accumulator) for s in varying}


def _memberships(statistics: Iterable[Statistic], geometry: Geometry) -> dict[Statistic, Tensor]:
    """[B | 1, Tk, S] 1 where a key lies in a segment."""
    return {s: geometry.memberships(s).to(geometry.accumulator) for s in statistics if s.method == "segments"}


def _of(members: Tensor, batch: int, block: _Block) -> Tensor:
    """[keys, S] those of a block."""
    return members[batch if len(members) > 1 else 0, block.keys]


def _generator(geometry: Geometry) -> torch.Generator | None:
    """The generator of a pass's dropout; passes over the same blocks in the same order draw the same."""
    if geometry.dropout_seed is None:
        return None
    return torch.Generator(geometry.device).manual_seed(int(geometry.dropout_seed))


def _kept(weights: Tensor, generator: torch.Generator, geometry: Geometry) -> Tensor:
    """0 where a weight is dropped, else 1 / (1 - dropout_p)."""
    drawn = torch.rand(weights.shape, generator=generator, device=weights.device, dtype=torch.float32)
    return (drawn >= geometry.dropout_p).to(weights.dtype).div_(1 - geometry.dropout_p)


def _segments(statistic: PooledMap, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """[Tq] and [Tk] int64: the segment of each query and of each key."""
    both = []
    for bounds in statistic.boundaries(geometry.query_length, geometry.key_length):
        ends = torch.tensor(bounds[1:], device=geometry.device, dtype=torch.int64)
        both.append(
            torch.searchsorted(ends, torch.arange(bounds[-1], device=geometry.device, dtype=torch.int64), right=True)
        )
    return both[0], both[1]


def _counts(statistic: Statistic, geometry: Geometry) -> Tensor:
    """[B, Tq] float, c[t] of Eq. 10."""
    counts = geometry.query_counts(statistic.last_queries)
    if counts is None:
        counts = torch.ones(geometry.batch, geometry.query_length, dtype=torch.bool, device=geometry.device)
    return counts.to(geometry.accumulator)


class _Block(NamedTuple):
    rows: slice
    keys: slice  # the only ones that the rows see
    hidden: Tensor | None  # [rows, keys] bool: outside the causal mask or the window; None: no key is


def _blocks(geometry: Geometry, needs: Callable[[slice], bool] = lambda rows: True) -> Iterator[_Block]:
    """The blocks of rows that see a key, less those that `needs` is False for."""
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
        if begin < stop and needs(slice(start, end)):
            block = _Block(slice(start, end), slice(begin, stop), None)
            ahead = geometry.right is not None and first + geometry.right < stop - 1
            behind = geometry.left is not None and last - geometry.left > begin
            if ahead or behind:
                visible = within(_distance(geometry, block), geometry.left, geometry.right)
                block = block._replace(hidden=None if visible is None else ~visible)
            yield block


def heads_of(geometry: Geometry) -> Iterator[tuple[int, slice, int]]:
    """Yield (batch row, query heads of one group, their key head)."""
    for batch in range(geometry.batch):
        for key_head in range(geometry.key_heads):
            yield batch, slice(key_head * geometry.group, (key_head + 1) * geometry.group), key_head


def _distance(geometry: Geometry, block: _Block) -> Tensor:
    """[rows, keys] signed distance t - s."""
    rows = torch.arange(block.rows.start, block.rows.stop, device=geometry.device, dtype=torch.int64) + geometry.offset
    return rows[:, None] - torch.arange(block.keys.start, block.keys.stop, device=geometry.device, dtype=torch.int64)


def _scores(
    query: Tensor, key: Tensor, geometry: Geometry, block: _Block, batch: int, heads: slice, key_head: int
) -> Tensor:
    """[G, rows, keys] scores of one group, -inf where a key can't be seen."""
    rows, keys = query[batch, heads, block.rows], key[batch, key_head, block.keys]
    products = rows.to(geometry.accumulator) @ keys.to(geometry.accumulator).T
    scores = softcap_(products.mul_(geometry.scale), geometry.softcap)  # scaled last, as in eager attention
    return _hide_(scores, -torch.inf, geometry, block, batch)


def _hide_(x: Tensor, number: float, geometry: Geometry, block: _Block, batch: int) -> Tensor:
    """`number` in x [.., rows, keys] in place where a key can't be seen."""
    if block.hidden is not None:
        x.masked_fill_(block.hidden, number)
    if geometry.key_mask is not None:
        x.masked_fill_(~geometry.key_mask[batch, block.keys], number)
    return x
