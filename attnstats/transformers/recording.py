"""Captured statistics of one forward pass, or added up over the steps of a generation.

Both recordings keep sums, by layer or over layers, per head or over heads, and `read` turns them into means.
`PassRecording` takes what an attention call returns; `GenerationRecording` places rows and columns by absolute
position, so that a prompt in chunks, single tokens, reordered beams and rejected tokens all give the results of one
teacher-forced pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnstats.distributed import gather_heads, local_heads
from attnstats.errors import InputError
from attnstats.statistics import ColumnStatistic, DistanceWeighted, PooledMap, Statistic, is_mean, summed
from attnstats.transformers.calls import AttentionCall, reach_of
from attnstats.transformers.selection import ChosenHeads

UNDOABLE_ROWS = 64  # how many of the last tokens can be taken back

Sums = dict[int | None, Tensor]  # by layer; None: layers are added up


@dataclass(frozen=True)
class Ranks:
    """Tensor parallel: each rank of the group has `count` query heads of a layer, `chosen` are those of the model."""

    group: Any
    count: int
    chosen: ChosenHeads


class Recording:
    """Sums of statistics by layer, or one over layers, and what turns them into means.

    Attributes:
        ranks: the tensor-parallel group that has the other heads; None: all heads are here.
    """

    def __init__(self, reduce: tuple[str, ...], device: torch.device | None):
        self.over_layers = "layers" in reduce
        self.over_heads = "heads" in reduce
        self.device = device
        self.ranks: Ranks | None = None
        self._head_counts: dict[Statistic, dict[int, int]] = {}
        self._has_nan: dict[Statistic, dict[int, Tensor]] = {}  # bool per chosen head
        self._copies: list[Any] = []

    def addends(self, layer: int, results: Mapping[Statistic, Tensor]) -> dict[Statistic, Tensor]:
        """What each result (B, heads, ...) of a layer adds to the sums; counts its heads and notes NaN."""
        addends = {}
        for statistic, x in results.items():
            count = x.shape[1]
            if self.ranks is not None:
                chosen = self.ranks.chosen[statistic][layer]
                x = x if _has_some(chosen, self.ranks) else x[:, :0]
                size = torch.distributed.get_world_size(self.ranks.group)
                count = size * self.ranks.count if chosen is None else len(chosen)
            self._head_counts.setdefault(statistic, {})[layer] = count
            nan = x.sum((0, *range(2, x.dim()))).isnan()
            of_layers = self._has_nan.setdefault(statistic, {})
            of_layers[layer] = of_layers[layer] | nan if layer in of_layers else nan
            addends[statistic] = x.sum(1) if self.over_heads else x
        return addends

    def mean(self, statistic: Statistic, sums: Sums) -> Tensor:
        """(L, B, heads, ...), without L where layers are reduced and without heads where they are."""
        counts = self._head_counts[statistic]
        if self.over_layers:
            (total,) = sums.values()
            return total / (sum(counts.values()) if self.over_heads else len(counts))
        _check_shapes(statistic, sums.values())
        if self.over_heads:
            sums = {layer: x / counts[layer] for layer, x in sums.items() if layer is not None}
        first = next(iter(sums.values()))
        return torch.stack([x.to(first.device) for _, x in sorted(sums.items(), key=lambda item: item[0] or 0)])

    def over_ranks(self, statistic: Statistic, sums: Sums) -> Sums:
        """Sums over the heads of all ranks, or the heads of all ranks; every rank takes part."""
        if self.ranks is None:
            return sums
        group, count, chosen = self.ranks.group, self.ranks.count, self.ranks.chosen
        whole: Sums = {}
        for layer, x in sums.items():
            if self.over_heads:
                whole[layer] = x.contiguous().clone()
                torch.distributed.all_reduce(whole[layer], group=group)
            else:
                heads = next(iter(chosen[statistic].values())) if layer is None else chosen[statistic][layer]
                whole[layer] = gather_heads(x, heads, count, group=group)
        return whole

    def heads_with_nan(self, statistic: Statistic, chosen: dict[int, tuple[int, ...] | None]) -> dict[int, list[int]]:
        """The heads of each layer, by their number in the model, that gave a NaN on this rank."""
        by_layer: dict[int, list[int]] = {}
        for layer, flags in self._has_nan[statistic].items():
            heads = chosen[layer]
            if self.ranks is not None:
                first = torch.distributed.get_rank(self.ranks.group) * self.ranks.count
                here = range(first, first + self.ranks.count)
                heads = tuple(head for head in (here if heads is None else heads) if head in here)
            places = flags.nonzero().flatten().tolist()
            if places:
                by_layer[layer] = places if heads is None else [heads[place] for place in places]
        return by_layer

    def to_device(self, x: Tensor) -> Tensor:
        """x on the device of the results; a copy off a GPU runs in the background, and `wait` waits for it."""
        if self.device is None or x.device == self.device:
            return x
        if self.device.type != "cpu" or x.device.type != "cuda":
            return x.to(self.device)
        copied = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        copied.copy_(x, non_blocking=True)
        self._copies.append(torch.cuda.current_stream(x.device).record_event())
        return copied

    def wait(self) -> None:
        """Wait until every copy has arrived."""
        for event in self._copies:
            event.synchronize()
        self._copies.clear()


class PassRecording(Recording):
    """One forward pass."""

    def __init__(self, reduce: tuple[str, ...], device: torch.device | None):
        super().__init__(reduce, device)
        self._sums: dict[Statistic, Sums] = {}
        self._valid: dict[Statistic, Tensor] = {}  # layers have the same padding

    def attend(
        self,
        layer: int,
        call: AttentionCall,
        statistics: tuple[Statistic, ...],
        query_mask: Tensor | None,
        heads: Mapping[Statistic, tuple[int, ...]],
    ) -> Tensor:
        """The output of the call, whose statistics are recorded."""
        output, results = call.attend(statistics, query_mask, heads)
        for s, x in self.addends(layer, results).items():
            sums = self._sums.setdefault(s, {})
            if not self.over_layers:
                sums[layer] = x if self.device is None else self.to_device(x)
            elif None in sums:
                _check_shapes(s, (sums[None], x))
                sums[None] = sums[None] + x.to(sums[None].device)
            else:
                sums[None] = x
            if s not in self._valid:
                self._valid[s] = results.valid[s]
        return output

    def finish(self) -> None:
        """The forward pass came to its end: results of all ranks and layers are there."""
        if self.ranks is not None:
            self._sums = {s: self.over_ranks(s, sums) for s, sums in self._sums.items()}
        if self.over_layers and self.device is not None:
            self._sums = {s: {key: self.to_device(x) for key, x in sums.items()} for s, sums in self._sums.items()}

    def read(self, statistic: Statistic) -> Tensor:
        self.wait()
        return self.mean(statistic, self._sums[statistic])

    def valid(self, statistic: Statistic) -> Tensor:
        return self._valid[statistic]


class GrowingTensor:
    """A tensor (..., T) that grows along its last dimension by doubling."""

    def __init__(self, like: Tensor):
        self._buffer = _zeros(like, max(256, 2 * like.shape[-1]))
        self.length = 0

    @property
    def values(self) -> Tensor:
        return self._buffer[..., : self.length]

    def add(self, start: int, x: Tensor) -> None:
        """Add x from `start` on; elements that nothing was added to are 0 (False)."""
        end = start + x.shape[-1]
        if end > self._buffer.shape[-1]:
            larger = _zeros(self._buffer, max(end, 2 * self._buffer.shape[-1]))
            larger[..., : self.length] = self.values
            self._buffer = larger
        target = self._buffer[..., start:end]
        x = x.to(target.device)
        if x.dtype == torch.bool:
            target |= x
        else:
            target += x
        self.length = max(self.length, end)

    def truncate(self, length: int) -> None:
        self._buffer[..., length : self.length] = 0
        self.length = min(self.length, length)

    def select_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Let `change` choose or repeat batch rows, the first dimension."""
        self._buffer = change(self._buffer)


def _zeros(like: Tensor, length: int) -> Tensor:
    shape = (*like.shape[:-1], length)
    if not torch.is_inference_mode_enabled():
        return torch.zeros(shape, dtype=like.dtype, device=like.device)
    with torch.inference_mode(False):  # the next step may be outside of it, and adds in place
        return torch.zeros(shape, dtype=like.dtype, device=like.device)


class LastStep(NamedTuple):
    """The last queries of a layer's most recent call, to subtract what rejected tokens gave to the keys before them."""

    call: AttentionCall
    statistics: tuple[Statistic, ...]
    query_mask: Tensor | None
    heads: dict[Statistic, tuple[int, ...]]


class GenerationRecording(Recording):
    """All steps since the sequence began at position 0.

    Attributes:
        length: tokens that went through the model.
        tokens: (B, length) their ids, where the model was called with ids.
    """

    def __init__(self, reduce: tuple[str, ...], device: torch.device | None):
        super().__init__(reduce, device)
        self.length = 0
        self.tokens: GrowingTensor | None = None
        self._sums: dict[Statistic, dict[int | None, GrowingTensor]] = {}
        self._query_mask: GrowingTensor | None = None  # (B, T) bool
        self._key_mask: GrowingTensor | None = None
        self._last_steps: dict[int, LastStep] = {}  # by layer
        self._begin = 0

    def attend(
        self,
        layer: int,
        call: AttentionCall,
        statistics: tuple[Statistic, ...],
        query_mask: Tensor | None,
        heads: Mapping[Statistic, tuple[int, ...]],
    ) -> Tensor:
        """The output of the call, whose statistics are recorded."""
        sum_of = {s: summed(s) for s in statistics}
        heads_of_sums = {sum_of[s]: chosen for s, chosen in heads.items()}
        narrow = tuple(sum_of[s] for s in statistics if isinstance(s, DistanceWeighted) and s.band is not None)
        reach = reach_of(narrow)
        if not call.can_skip_keys(reach):
            narrow = ()
        full = tuple(s for s in sum_of.values() if s not in narrow)
        output, in_full = call.attend(full, query_mask, {s: h for s, h in heads_of_sums.items() if s in full})
        results, starts = dict(in_full), dict.fromkeys(full, call.first_key)
        if narrow:
            heads_of_narrow = {s: h for s, h in heads_of_sums.items() if s in narrow}
            with torch.no_grad():
                start, near = call.near(in_full.lse.detach(), narrow, reach, query_mask, heads_of_narrow)
            results |= dict(near)
            starts |= dict.fromkeys(narrow, start)
        key = None if self.over_layers else layer
        for s, x in self.addends(layer, {s: results[sum_of[s]] for s in statistics}).items():
            sums = self._sums.setdefault(s, {})
            if key not in sums:
                sums[key] = GrowingTensor(x)
            sums[key].add(starts[sum_of[s]] if isinstance(s, ColumnStatistic) else call.begin, x)
        self._begin = call.begin
        if self.length < call.end:
            self._add_masks(call, query_mask)
        self._remember(layer, call, statistics, query_mask, heads)
        return output

    def add_tokens(self, start: int, ids: Tensor | None) -> None:
        """Record the ids that go through the model now; None: it was given embeddings."""
        if ids is None or (self.tokens is None and start > 0):
            self.tokens = None
            return
        if self.tokens is None:
            self.tokens = GrowingTensor(ids)
        self.tokens.add(start, ids)

    def release(self) -> None:
        """Let go of the last step's tensors, among them the cache: nothing will be taken back any more."""
        self._last_steps.clear()

    def finish(self) -> None:
        """The forward pass came to its end."""

    def read(self, statistic: Statistic) -> Tensor:
        sums: Sums = {layer: x.values[..., : self.length] for layer, x in self._sums[statistic].items()}
        mean = self.mean(statistic, self.over_ranks(statistic, sums))
        if is_mean(statistic):
            count = self._counts(statistic).clamp(min=1)
            mean = mean / (count if self.over_heads else count[:, None])
        return mean if self.device is None else mean.to(self.device)

    def valid(self, statistic: Statistic) -> Tensor:
        assert self._query_mask is not None
        assert self._key_mask is not None
        if not isinstance(statistic, ColumnStatistic):
            return self._query_mask.values.clone()
        key_mask = self._key_mask.values
        return key_mask & (self._counts(statistic) > 0) if is_mean(statistic) else key_mask.clone()

    def _counts(self, statistic: ColumnStatistic) -> Tensor:
        """(B, T), the number of counted queries at a key's horizon, |T(s)| of Eq. 10."""
        assert self._query_mask is not None
        assert statistic.horizon is not None
        lo, hi = statistic.horizon
        counted = self._query_mask.values
        before = torch.nn.functional.pad(counted.cumsum(-1), (1, 0))
        position = torch.arange(self.length, device=counted.device)
        first = (position + lo).clamp(max=self.length)
        end = torch.full_like(first, self.length) if hi is None else (position + hi + 1).clamp(max=self.length)
        return before[:, torch.maximum(first, end)] - before[:, first]

    def _add_masks(self, call: AttentionCall, query_mask: Tensor | None) -> None:
        """Record, once per step, which of its queries count and which of its tokens are real."""
        batch = call.query.shape[0]
        ones = torch.ones(batch, call.end - call.begin, dtype=torch.bool, device=call.query.device)
        real = ones if call.mask.real_queries is None else call.mask.real_queries.to(ones.device)
        if self._query_mask is None or self._key_mask is None:
            self._query_mask, self._key_mask = GrowingTensor(ones), GrowingTensor(ones)
        self._query_mask.add(call.begin, real if query_mask is None else real & query_mask.to(real.device))
        self._key_mask.add(call.begin, real)
        self.length = call.end

    # Rows that move, tokens that are taken back

    def select_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """The cache's batch rows were chosen anew: `change` does the same to a tensor with the batch in front."""
        for tensor in self._tensors():
            tensor.select_rows(change)
        self._last_steps.clear()

    def truncate(self, length: int) -> None:
        """The tokens from position `length` on were rejected."""
        if length >= self.length:
            return
        columns = any(isinstance(s, ColumnStatistic) for s in self._sums)
        if columns and (length < max(self._begin, self.length - UNDOABLE_ROWS) or not self._last_steps):
            raise RuntimeError(
                f"attnstats.capture(live=True): the cache was cut from {self.length} to {length} tokens; only "
                f"tokens of the last step, {UNDOABLE_ROWS} at most and once, can be taken back. Start a new generation"
            )
        for layer, step in self._last_steps.items():
            self._subtract(layer, step, length)
        for tensor in self._tensors():
            tensor.truncate(length)
        self.length = length
        self._last_steps.clear()

    def _tensors(self) -> list[GrowingTensor]:
        sums = [x for by_layer in self._sums.values() for x in by_layer.values()]
        return sums + [x for x in (self._query_mask, self._key_mask, self.tokens) if x is not None]

    def _remember(
        self,
        layer: int,
        call: AttentionCall,
        statistics: tuple[Statistic, ...],
        query_mask: Tensor | None,
        heads: Mapping[Statistic, tuple[int, ...]],
    ) -> None:
        """Keep the last queries for `truncate`, where columns depend on them."""
        columns: tuple[Statistic, ...] = tuple(s for s in statistics if isinstance(s, ColumnStatistic))
        if columns:
            rows = min(UNDOABLE_ROWS, call.query.shape[2])
            mask = None if query_mask is None else query_mask[:, -rows:]
            of_columns = {s: chosen for s, chosen in heads.items() if s in columns}
            self._last_steps[layer] = LastStep(call.last(rows), columns, mask, of_columns)

    def _subtract(self, layer: int, step: LastStep, length: int) -> None:
        """Take off the sums what the tokens from `length` on gave to keys."""
        call = step.call
        rejected = torch.arange(call.begin, call.end, device=call.query.device) >= length
        rejected = rejected.expand(call.query.shape[0], -1)
        if step.query_mask is not None:
            rejected = rejected & step.query_mask.to(rejected.device)
        sum_of = {s: summed(s) for s in step.statistics}
        heads = {sum_of[s]: chosen for s, chosen in step.heads.items()}
        with torch.no_grad():
            results = call.attend(tuple(sum_of.values()), rejected, heads).statistics
        key = None if self.over_layers else layer
        for s, x in self.addends(layer, {s: results[sum_of[s]] for s in step.statistics}).items():
            self._sums[s][key].add(call.first_key, -x)


def _has_some(heads: tuple[int, ...] | None, ranks: Ranks) -> bool:
    return heads is None or bool(local_heads(heads, ranks.count, group=ranks.group))


def _check_shapes(statistic: Statistic, tensors: Any) -> None:
    shapes = {tuple(x.shape[1:]) for x in tensors}
    if len(shapes) > 1:
        raise InputError(
            f"{statistic}: layers had different numbers of keys or heads in this step, {sorted(shapes)}, because some "
            "keep only a window of the keys; capture with live=True, or layers of one kind"
        )


def can_be_live(statistic: Statistic) -> bool:
    """True if a statistic can be kept up to date token by token."""
    if isinstance(statistic, ColumnStatistic):
        return statistic.last_queries is None
    return not isinstance(statistic, PooledMap)
