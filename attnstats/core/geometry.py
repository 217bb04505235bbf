"""One attention call without its numbers: lengths, positions, windows, padding, packed sequences, counted queries.

`arguments.resolve` makes a `Geometry` and validates; everything behind it trusts a Geometry, and what it derives costs
O(T). `reference` takes only its plain facts and derives the rest from dense masks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnstats.core.merging import divisors
from attnstats.core.packing import Line, Packing
from attnstats.core.paging import PagedKeys
from attnstats.core.visibility import seen_keys
from attnstats.results import AttentionResult, Statistics
from attnstats.statistics import PooledMap, SegmentMass, Statistic

LOG2E = 1.4426950408889634


@dataclass(frozen=True, eq=False, kw_only=True)
class Geometry:
    """One attention call without its numbers.

    Query t may see key s where `-right <= t - s <= left`, in absolute positions, unless a mask hides it.

    Attributes:
        statistics: those to compute.
        query_offset: position of the first query; the keys stand at 0 .. key_length - 1. None where queries and
            keys share no positions (cross-attention), so that no distance is defined. Negative only for a packed
            sequence with more queries than keys, whose first queries see nothing.
        left, right: how far behind and ahead of itself a query sees; None: all the way. Causal is right = 0.
        softcap: scores become `softcap * tanh(score / softcap)`; None: they stay.
        sinks: (Hq,) float, one more logit per head in every row's softmax that belongs to no key; None: none.
        key_mask: (B, Tk) bool, True where a key may be seen; None: all.
        real_queries: (B, Tq) bool, True where a query isn't padding; None: all.
        query_mask: (B, Tq) bool, True where a query counts in columns (the paper's response R); padding does not.
            None: all.
        query_weight: (B, Tq) how much each query counts in columns; query_mask is False where it is 0. None: 1.
        segment_ends: (sequences, S + 1) int64, the call's boundaries of key segments, OPEN_HORIZON for an open end.
        dense_mask: the caller's attn_mask where it depends on the query, (B|1, Hq|1, Tq|1, Tk), bool (True: may
            be seen) or additive. Only `reference` takes it.
        packing: sequences laid end to end in a batch of one, each with positions of its own, queries last; None:
            every batch row is one sequence.
        paged: the packed keys lie in pages, and the key of the call is the cache (blocks, Hkv, block_size, D); None:
            they don't.
        heads: the query heads of each statistic that is computed for some heads only.
        dropout_p: the share of A that is dropped before it meets the values; statistics are of the whole A.
        dropout_seed: (1,) int64 on the device, from which each pass derives the same mask; None: nothing is dropped.
        differentiable: statistics carry gradients.
        prefers: the attention kernel of the backend "flash" that comes first, by name; "": the fastest.
        memo: values that backends derive from this geometry and read again in the next call like it.
    """

    statistics: tuple[Statistic, ...]
    batch: int
    query_heads: int
    key_heads: int
    query_length: int
    key_length: int
    head_dim: int
    value_dim: int
    dtype: torch.dtype
    device: torch.device
    scale: float
    query_offset: int | None
    left: int | None
    right: int | None
    softcap: float | None
    sinks: Tensor | None
    key_mask: Tensor | None = None
    real_queries: Tensor | None = None
    query_mask: Tensor | None
    query_weight: Tensor | None = None
    segment_ends: Tensor | None = None
    dense_mask: Tensor | None = None
    packing: Packing | None = None
    paged: PagedKeys | None = None
    heads: Mapping[Statistic, tuple[int, ...]]
    dropout_p: float
    dropout_seed: Tensor | None = None
    differentiable: bool
    prefers: str
    memo: dict[Any, Any] = field(default_factory=dict, repr=False)

    @functools.cached_property
    def group(self) -> int:
        """Query heads per key head."""
        return self.query_heads // self.key_heads

    @functools.cached_property
    def accumulator(self) -> torch.dtype:
        """The dtype of lse and of the statistics."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @functools.cached_property
    def offset(self) -> int:
        """`query_offset`, and 0 where positions have no meaning and only have to be consistent."""
        return self.query_offset or 0

    @functools.cached_property
    def is_causal(self) -> bool:
        return self.right == 0

    @functools.cached_property
    def all_live(self) -> bool:
        """True if every query is certain to see a key, without a look at a mask."""
        no_mask = self.key_mask is None and self.packing is None and self.dense_mask is None
        return no_mask and self.left is None and self.offset >= 0

    def live(self) -> Tensor:
        """(B, Tq) bool: the query sees at least one key, in any head. From the masks, never from an lse."""
        if self.all_live:
            return torch.ones(self.batch, self.query_length, dtype=torch.bool, device=self.device)
        first, end = self.seen()
        if self.dense_mask is not None:
            return self._dense_live
        if self.key_mask is None:
            return (end > first).expand(self.batch, -1)
        before = rows_before(self.key_mask)
        return before[:, end] > before[:, first]

    @functools.cached_property
    def _dense_live(self) -> Tensor:
        """`live` under a mask that depends on the query: made once, when the call is, as the mask is the caller's."""
        assert self.dense_mask is not None
        visible = self.dense_mask if self.dense_mask.dtype == torch.bool else self.dense_mask > -torch.inf
        first, end = (x.expand(self.query_length)[:, None] for x in self.seen())
        index = torch.arange(self.key_length, dtype=torch.int64, device=self.device)
        visible = visible & (index >= first) & (index < end)
        if self.key_mask is not None:
            visible = visible & self.key_mask[:, None, None]
        return visible.any(1).any(-1).expand(self.batch, -1)

    def query_mask_of(self, last_queries: int | None) -> Tensor | None:
        """`query_mask`, of each sequence only so many of the last queries that count; None: no limit."""
        query_mask = self.query_mask
        if last_queries is None:
            return query_mask
        if query_mask is None:
            query_mask = torch.ones(self.batch, self.query_length, dtype=torch.bool, device=self.device)
        before = rows_before(query_mask)
        own_end = self._along_queries().own_end.expand(self.query_length)
        return query_mask & (before[:, own_end] - before[:, :-1] <= last_queries)

    def query_counts(self, last_queries: int | None = None) -> Tensor | None:
        """(B, Tq) how much each query counts in columns, bool or float, as `query_mask_of`; None: 1 each."""
        query_mask = self.query_mask_of(last_queries)
        if self.query_weight is None:
            return query_mask
        assert query_mask is not None
        return self.query_weight.masked_fill(~query_mask, 0.0)

    def boundaries_of(self, statistic: Statistic) -> Tensor:
        """(sequences | 1, S + 1) int64, the boundaries of a SegmentMass."""
        assert isinstance(statistic, SegmentMass)
        if statistic.boundaries is None:
            assert self.segment_ends is not None
            return self.segment_ends
        bounds = self.memo.get(("segments", statistic))
        if bounds is None:
            bounds = torch.tensor([statistic.ends], dtype=torch.int64, device="cpu").to(self.device)
            self.memo["segments", statistic] = bounds
        return bounds

    def memberships(self, statistic: Statistic) -> Tensor:
        """(B | 1, Tk, S) bool: the key lies in the segment."""
        bounds = self.boundaries_of(statistic)
        index = torch.arange(self.key_length, device=self.device, dtype=torch.int64)
        position = index[None]
        if self.packing is not None:
            keys = self.packing.keys.long()
            sequence = torch.searchsorted(keys[1:], index, right=True).clamp(max=self.packing.count - 1)
            position = (index - keys[sequence])[None]
            bounds = bounds.expand(self.packing.count, -1)[sequence][None]
        else:
            bounds = bounds[:, None]
        position = position[..., None]
        return (position >= bounds[..., :-1]) & (position < bounds[..., 1:])

    def queries_at_distance(self, lo: int, hi: int | None) -> Tensor:
        """(B, Tk) int64, |T(s)|: counted queries t with `lo <= t - s <= hi` (the denominator of Eq. 10)."""
        return self._over_horizon(lo, hi, self.query_mask)

    def weight_at_distance(self, lo: int, hi: int | None) -> Tensor:
        """(B, Tk) what means are divided by: `queries_at_distance`, or the sum of their weights, exactly 0 where none
        counts."""
        counts = self.queries_at_distance(lo, hi)
        if self.query_weight is None:
            return counts
        weights = self.query_counts()
        assert weights is not None
        return self._over_horizon(lo, hi, weights.double()).masked_fill(counts == 0, 0.0).to(self.accumulator)

    def _over_horizon(self, lo: int, hi: int | None, of_queries: Tensor | None) -> Tensor:
        """(B, Tk) the sum of (B, Tq) numbers over the queries t of each key with `lo <= t - s <= hi`; None: 1 each."""
        position, _, begin, length = self._along_keys()
        first = torch.minimum((position + lo).clamp(min=0), length)
        end = length
        if hi is not None:
            hi = min(hi, abs(self.offset) + self.query_length + self.key_length)  # int64 holds position + hi
            end = torch.minimum((position + hi + 1).clamp(min=0), length)
        end = torch.maximum(first, end)
        if of_queries is None:
            return (end - first).expand(self.batch, -1)
        before = rows_before(of_queries)
        return (before[:, begin + end] - before[:, begin + first]).expand(self.batch, -1)

    def validity(self, statistic: Statistic) -> Tensor:
        """False for placeholders: (B, Tq) bool for rows, (B, Tk) for columns, (B, I, J) for a map."""
        real_keys = self._real_keys()
        if statistic.axis == "column":
            if statistic.horizon is None:
                return real_keys
            return (self.queries_at_distance(*statistic.horizon) > 0) & real_keys
        rows = self.live() if self.query_mask is None else self.live() & self.query_mask
        if not isinstance(statistic, PooledMap):
            return rows
        query_bounds, key_bounds = statistic.boundaries(self.query_length, self.key_length)
        return _any_per_segment(rows, query_bounds)[:, :, None] & _any_per_segment(real_keys, key_bounds)[:, None, :]

    def counts(self, statistic: Statistic) -> Tensor:
        """(B, Tk) the counted queries behind each mean of a statistic with a horizon, 0 for padding: int64, or with a
        query_weight the sum of these in the statistics' dtype."""
        assert statistic.horizon is not None
        return self.weight_at_distance(*statistic.horizon) * self._real_keys()

    def shape_of(self, statistic: Statistic) -> tuple[int, ...]:
        """The shape of a statistic's tensor."""
        heads = len(self.heads.get(statistic, range(self.query_heads)))
        segments = None if self.segment_ends is None else self.segment_ends.shape[1] - 1
        return self.batch, heads, *statistic.shape(self.query_length, self.key_length, segments)

    def zeros(self, statistics: Iterable[Statistic]) -> dict[Statistic, Tensor]:
        """A tensor for each statistic's sums, or largest keys, of rows that see no key."""
        tensors = {s: torch.zeros(self.shape_of(s), dtype=self.accumulator, device=self.device) for s in statistics}
        for s, x in tensors.items():
            if s.method == "top":
                x[..., 1, :] = -1.0
        return tensors

    def finish(self, statistic: Statistic, tensor: Tensor) -> Tensor:
        """The returned value of a backend's sums: means over counted queries, zeros for padding."""
        if statistic.method in ("lse", "pooled"):
            return tensor
        if statistic.axis == "column":
            if self.key_mask is not None:
                tensor = tensor.masked_fill(~self.key_mask[:, None], 0.0)
            horizon = statistic.horizon
            if horizon is None:
                return tensor
            counts = self.memo.get(horizon)
            if counts is None:
                counts = divisors(self.weight_at_distance(*horizon))[:, None].to(self.accumulator)
                # A tensor made while a CUDA graph is captured is only there when the graph runs.
                if self.device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
                    self.memo[horizon] = counts
            return tensor / counts
        if self.all_live and self.real_queries is None:
            return tensor
        rows = self.live() if self.real_queries is None else self.live() & self.real_queries
        return without_rows(statistic, tensor, ~rows)

    def gradient_of_sums(self, statistic: Statistic, grad: Tensor) -> Tensor:
        """The gradient of a backend's sums, in all heads, from that of the value that `finish` returned."""
        grad = grad.to(self.accumulator)
        if statistic.axis == "column":
            if self.key_mask is not None:
                grad = grad.masked_fill(~self.key_mask[:, None], 0.0)
            if statistic.horizon is not None:
                grad = grad / divisors(self.weight_at_distance(*statistic.horizon))[:, None].to(self.accumulator)
        elif not self.all_live or self.real_queries is not None:
            rows = self.live()
            if self.real_queries is not None and statistic.method != "lse":  # padding has an lse
                rows = rows & self.real_queries
            grad = without_rows(statistic, grad, ~rows)
        return self.in_all_heads(statistic, grad)

    def in_all_heads(self, statistic: Statistic, x: Tensor) -> Tensor:
        """(B, Hq, T, ..): x in the statistic's heads, 0 in the others."""
        if statistic not in self.heads:
            return x
        in_all = x.new_zeros(x.shape[0], self.query_heads, *x.shape[2:])
        for i, head in enumerate(self.heads[statistic]):  # not in_all[:, heads], which copies a list to the device
            in_all[:, head] = x[:, i]
        return in_all

    def row_mass(self, lse: Tensor) -> Tensor:
        """(B, 1 | Hq, Tq): the sums of the rows of A: 1 less the sink's share, 0 for rows that see no key."""
        live = self.live()[:, None].to(self.accumulator)
        if self.sinks is None:
            return live
        return -torch.expm1(self.sinks.to(lse.dtype)[:, None] - divisor_of(lse)).to(self.accumulator) * live

    def counted_rows(self, query_mask: Tensor) -> Tensor:
        """[batch rows or packed sequences, 2] int64: those of its queries that count are all among first .. end - 1."""
        begin = torch.zeros(1, dtype=torch.int64, device=self.device)
        stop = begin + self.query_length
        if self.packing is not None:
            begin, stop = self.packing.queries[:-1].long(), self.packing.queries[1:].long()
        before = rows_before(query_mask)
        first = torch.searchsorted(before, before[:, begin], right=True) - 1
        end = torch.searchsorted(before, before[:, stop])
        return torch.stack([first - begin, end - begin], dim=-1).flatten(0, 1)

    def tail_of(self, statistic: Statistic) -> float:
        """The weight of a statistic with a band outside of it; 0 where no query sees a key outside.

        Sums of the weights less their tail, to which the tail is added, lose digits of a tail that no pair has.
        """
        assert statistic.band is not None
        if self.packing is None:
            nearest, farthest = self.offset - self.key_length + 1, self.offset + self.query_length - 1
        else:
            farthest = self.packing.max_keys - 1
            nearest = 1 - max(self.packing.max_queries, self.packing.max_keys)
        nearest = nearest if self.right is None else max(nearest, -self.right)
        farthest = farthest if self.left is None else min(farthest, self.left)
        lo, hi = statistic.band
        return 0.0 if lo <= nearest and farthest <= hi else statistic.tail

    def nan_without_softmax(self, lse: Tensor) -> Tensor:
        """The lse (B, Hq, Tq), NaN where a row sees a key and it isn't finite: a score was NaN or inf, or all -inf."""
        if self.all_live:
            return torch.add(lse, lse, alpha=0)  # 0 times what isn't finite is NaN
        without = lse.isnan() | (lse == torch.inf) | ((lse == -torch.inf) & self.live()[:, None])
        return lse.masked_fill(without, torch.nan)

    def visible_pairs(self, last_queries: int | None = None) -> int:
        """Pairs (t, s) inside the causal mask, windows and sequences, of a head of a batch row, padding included.

        last_queries: of each sequence only so many of the last queries; None: all.
        """
        here = self
        if self.packing is None:  # counted without the device
            here = dataclasses.replace(self, device=torch.device("cpu"), memo={})
        first, end = here.seen()
        pairs = (end - first).expand(self.query_length)
        if last_queries is not None:
            index = torch.arange(self.query_length, device=here.device, dtype=torch.int64)
            pairs = pairs[here._along_queries().own_end - index <= last_queries]
        return int(pairs.sum())

    def subset(self, heads: tuple[int, ...]) -> Geometry:
        """The same call for some of its query heads, each with a key head of its own."""
        subset = self.memo.get(("subset", heads))
        if subset is None:
            sinks = None if self.sinks is None else self.sinks[list(heads)]
            subset = self.memo["subset", heads] = dataclasses.replace(
                self, query_heads=len(heads), key_heads=len(heads), sinks=sinks, heads={}, memo={}
            )
        return subset

    def sequences(self) -> Iterator[tuple[slice, slice, Geometry]]:
        """Yield the slices of queries and of keys of each packed sequence that has both, and its geometry alone."""
        assert self.packing is not None
        for i, (queries, keys) in enumerate(self.packing.slices()):
            if queries.start < queries.stop and keys.start < keys.stop:
                yield queries, keys, self._batch_of(i, 1, queries, keys)

    def batches(self) -> Iterator[tuple[slice, slice, Geometry]]:
        """`sequences`, those of the same lengths that follow each other as one batch."""
        assert self.packing is not None
        slices = enumerate(self.packing.slices())
        for (of_queries, of_keys), alike in groupby(slices, lambda each: [x.stop - x.start for x in each[1]]):
            (first, (queries, keys)), *others = alike
            if of_queries and of_keys:
                count = 1 + len(others)
                queries = slice(queries.start, queries.start + count * of_queries)
                keys = slice(keys.start, keys.start + count * of_keys)
                yield queries, keys, self._batch_of(first, count, queries, keys)

    def _batch_of(self, first: int, count: int, queries: slice, keys: slice) -> Geometry:
        """Packed sequences of the same lengths, `count` from the first on, as a batch."""
        query_length, key_length = ((x.stop - x.start) // count for x in (queries, keys))

        def by_row(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[0, queries].unflatten(0, (count, query_length))

        return dataclasses.replace(
            self,
            batch=count,
            query_length=query_length,
            key_length=key_length,
            query_offset=key_length - query_length,
            query_mask=by_row(self.query_mask),
            query_weight=by_row(self.query_weight),
            segment_ends=None if self.segment_ends is None else self.segment_ends[first : first + count],
            dropout_seed=None if self.dropout_seed is None else self.dropout_seed + queries.start,
            packing=None,
            memo={},
        )

    def _real_keys(self) -> Tensor:
        """(B, Tk) bool: not padding, and of a sequence."""
        real = self.key_mask
        if real is None:
            real = torch.ones(self.batch, self.key_length, dtype=torch.bool, device=self.device)
        if self.packing is None:
            return real
        return real & (torch.arange(self.key_length, device=self.device, dtype=torch.int64) < self.packing.keys[-1])

    def _along_queries(self) -> Line:
        if self.packing is not None:
            return self.packing.along_queries(self.query_length)
        position = torch.arange(self.query_length, device=self.device, dtype=torch.int64) + self.offset
        return Line(position, *(position.new_full((), n) for n in (self.query_length, 0, self.key_length)))

    def _along_keys(self) -> Line:
        """Here positions count from the first query of the sequence: query i stands at i."""
        if self.packing is not None:
            return self.packing.along_keys(self.key_length)
        position = torch.arange(self.key_length, device=self.device, dtype=torch.int64) - self.offset
        return Line(position, *(position.new_full((), n) for n in (self.key_length, 0, self.query_length)))

    def seen(self) -> tuple[Tensor, Tensor]:
        """[Tq] int64 `first` and `end`: a query sees the keys first .. end - 1 of its batch row that no mask hides."""
        position, _, begin, length = self._along_queries()
        first, end = seen_keys(position, length, self.left, self.right)
        return begin + first, begin + end


def without_rows(statistic: Statistic, tensor: Tensor, rows: Tensor, value: float = 0.0) -> Tensor:
    """A row statistic's tensor (B, heads, Tq, ..) with the value in the rows, (B, Tq) bool or (B, Hq, Tq); of the keys
    that a `TopKeys` names there is none then."""
    rows = rows[:, None] if rows.dim() == 2 else rows
    index: Any = (..., *[None] * statistic.per_query)
    tensor = tensor.masked_fill(rows[index], value)
    if statistic.method == "top":
        tensor[..., 1, :].masked_fill_(rows[..., None], -1.0)
    return tensor


class Evaluation(NamedTuple):
    """The results of a backend: output (B, Hq, Tq, Dv), lse (B, Hq, Tq), and a tensor per statistic.

    pivot, factor: (B, Hq, Tq) float32, the lse without its rounding, for the backward pass: A = exp2(score * log2(e) -
    pivot) * factor. The pivot is +inf for rows that see no key. None: the lse is enough, or all that the backend has.
    """

    output: Tensor
    lse: Tensor
    tensors: dict[Statistic, Tensor]
    pivot: Tensor | None = None
    factor: Tensor | None = None


Validity = Callable[[Statistic], Tensor]
_NOTHING = contextlib.nullcontext()


def as_result(
    evaluation: Evaluation, geometry: Geometry, validity: Validity | None = None, counts: Validity | None = None
) -> AttentionResult:
    """The public result of an evaluation; a packed call loses its batch dimension of one."""
    output = evaluation.output
    statistics = as_statistics(evaluation.tensors, evaluation.lse, geometry, validity, counts)
    return AttentionResult(output if geometry.packing is None else output[0].transpose(0, 1), statistics)


def as_statistics(
    tensors: dict[Statistic, Tensor],
    lse: Tensor,
    geometry: Geometry,
    validity: Validity | None = None,
    counts: Validity | None = None,
) -> Statistics:
    """The public container of the tensors; a packed call loses its batch dimension of one."""
    validity, counts = validity or geometry.validity, counts or geometry.counts
    if geometry.packing is None:
        return Statistics(tensors, validity, counts, lse)
    unbatched = {s: x[0] for s, x in tensors.items()}
    return Statistics(unbatched, lambda s: validity(s)[0], lambda s: counts(s)[0], lse[0])


def full_precision(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """A context with autocast off, which would round the scores of float32 inputs away from their lse."""
    if not _is_autocast(device.type):
        return _NOTHING
    return torch.autocast(device.type, enabled=False)


def _is_autocast(device_type: str) -> bool:
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def as_autocast(*tensors: Tensor | None) -> tuple[Any, ...]:
    """Query, key, value and an additive mask in autocast's dtype, as SDPA casts them; unchanged without autocast."""
    device = (tensors[0] if tensors[0] is not None else next(x for x in tensors if x is not None)).device.type
    if not _is_autocast(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    not_cast = (torch.float64, torch.bool)
    return tuple(x if x is None or x.dtype in not_cast else x.to(dtype) for x in tensors)


def divisor_of(lse: Tensor) -> Tensor:
    """The lse with +inf for rows that see no key, so that exp(score - lse) is exactly 0 there, not NaN."""
    return lse.masked_fill(lse == -torch.inf, torch.inf)


def needs_pivot(dtype: torch.dtype) -> bool:
    """True if gradients of these inputs show the rounding of an lse in float32. Inputs in 16 bits round their scores
    more, and no kernel takes float64."""
    return dtype == torch.float32


def pivot_of(lse: Tensor, all_live: bool = False) -> Tensor:
    """The pivot of rows whose factor is 1: their lse in the exp2 domain, float32, +inf for rows that see no key."""
    return ((lse if all_live else divisor_of(lse)) * LOG2E).float()


def rows_before(flags: Tensor) -> Tensor:
    """(B, T + 1) the number of True among the first i of (B, T) flags."""
    return torch.nn.functional.pad(flags.cumsum(-1), (1, 0))


def _any_per_segment(flags: Tensor, bounds: tuple[int, ...]) -> Tensor:
    """(B, n) bool: any True in [bounds[i], bounds[i + 1]) of (B, T) bool."""
    return rows_before(flags)[:, list(bounds)].diff(dim=-1) > 0
