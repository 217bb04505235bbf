"""Captured statistics added up over the steps of a generation.

Rows and columns are placed by absolute position, so that a prompt in chunks, single tokens, reordered beams and
rejected tokens all give the results of one teacher-forced pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnstats.core.merging import divisors
from attnstats.errors import InputError
from attnstats.statistics import Statistic
from attnstats.transformers.calls import AttentionCall, Request
from attnstats.transformers.recording import Recording, Sums

UNDOABLE_ROWS = 64  # how many of the last tokens can be taken back
SMALLEST = 256  # tokens that a growing tensor has room for at least


def most_tokens(length: int) -> int:
    """For how many tokens a growing tensor has room at most, once it has `length` of them."""
    return max(SMALLEST, 2 * length)


class GrowingTensor:
    """A tensor (..., T) that grows along its last dimension by doubling."""

    def __init__(self, like: Tensor):
        self._buffer = _zeros(like, most_tokens(like.shape[-1]))
        self.length = 0

    @property
    def values(self) -> Tensor:
        return self._buffer[..., : self.length]

    def add(self, start: int, x: Tensor) -> None:
        """Add x from index `start` on. All elements start at 0 (False)."""
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
        """Select or repeat batch rows, the first dimension, by `change`."""
        self._buffer = change(self._buffer)


def _zeros(like: Tensor, length: int) -> Tensor:
    shape = (*like.shape[:-1], length)
    if not torch.is_inference_mode_enabled():
        return torch.zeros(shape, dtype=like.dtype, device=like.device)
    with torch.inference_mode(False):  # the next step may be outside of it, and adds in place
        return torch.zeros(shape, dtype=like.dtype, device=like.device)


class LastStep(NamedTuple):
    """The last queries of a layer's most recent call, from which the column sums of rejected tokens are recomputed."""

    call: AttentionCall
    request: Request  # for column statistics


class PlacedRecording(Recording):
    """Sums that are placed by position, of one sequence per batch row, in whatever parts its queries come.

    Attributes:
        first: position of the first token that went through the model, which is the number of keys cached before it.
        length: one past the last token that went through the model.
    """

    def __init__(self, reduce: tuple[str, ...], device: torch.device | None, first: int = 0):
        super().__init__(reduce, device)
        self.first = self.length = first
        self._sums: dict[Statistic, dict[int | None, GrowingTensor]] = {}
        self._query_mask: GrowingTensor | None = None  # (B, T) bool
        self._query_weight: GrowingTensor | None = None  # (B, T)
        self._key_mask: GrowingTensor | None = None

    def add(self, statistic: Statistic, layer: int, start: int, x: Tensor) -> None:
        """Add a part of a layer's sums, as `addends` gives them, whose first query or key is at `start`."""
        key = None if self.over_layers else layer
        of_layers = self._sums.setdefault(statistic, {})
        x = x.movedim(-1 - statistic.per_query, -1)  # tokens last, along which it grows
        if key not in of_layers:
            of_layers[key] = GrowingTensor(x)
        elif of_layers[key].values.shape[:-1] != x.shape[:-1]:
            raise InputError(
                f"{statistic} had {tuple(of_layers[key].values.shape[:-1])} numbers per token in the steps before, and "
                f"has {tuple(x.shape[:-1])} now; run.segment_boundaries keeps its number of segments while a model "
                "generates"
            )
        of_layers[key].add(start, x)

    def add_tokens_seen(
        self, begin: int, real: Tensor, counted: Tensor, weight: Tensor | None, earlier_keys: Tensor | None = None
    ) -> None:
        """Record, once per step, which of its queries count and which of its tokens are real.

        Args:
            begin: position of the first query.
            real, counted: (B, Tq) bool.
            weight: (B, Tq) how much each query counts; None: 1.
            earlier_keys: (B, first) bool, the real ones among the keys that were cached before; None: all.
        """
        batch, device = len(real), real.device
        if self._query_mask is None or self._key_mask is None:
            self._query_mask, self._key_mask = GrowingTensor(real), GrowingTensor(real)
            if self.first:
                self._key_mask.add(0, real.new_ones(batch, self.first) if earlier_keys is None else earlier_keys)
        self._query_mask.add(begin, counted)
        if self._query_weight is None and weight is not None:
            self._query_weight = GrowingTensor(weight)
            self._query_weight.add(0, weight.new_ones(batch, begin))
        if self._query_weight is not None:
            ones = torch.ones(real.shape, dtype=self._query_weight.values.dtype, device=device)
            self._query_weight.add(begin, ones if weight is None else weight)
        self._key_mask.add(begin, real)
        self.first = min(self.first, begin)  # of what was cached before, some may be computed after all
        self.length = max(self.length, begin + real.shape[1])

    def read(self, statistic: Statistic) -> Tensor:
        first = 0 if statistic.axis == "column" else self.first
        sums: Sums = {
            layer: x.values[..., first : self.length].movedim(-1, -1 - statistic.per_query)
            for layer, x in self._sums[statistic].items()
        }
        mean = self.mean(statistic, self.over_ranks(statistic, sums))
        if statistic.is_mean:
            count = divisors(self._counts(statistic)).to(mean.dtype)
            mean = mean / (count if self.over_heads else count[:, None])
        return mean if self.device is None else mean.to(self.device)

    def valid(self, statistic: Statistic) -> Tensor:
        assert self._query_mask is not None
        assert self._key_mask is not None
        if statistic.axis != "column":
            return self._query_mask.values[:, self.first :].clone()
        key_mask = self._key_mask.values
        return key_mask & (self._counts(statistic) > 0) if statistic.is_mean else key_mask.clone()

    def _counts(self, statistic: Statistic) -> Tensor:
        """(B, T), the number of counted queries at a key's horizon, |T(s)| of Eq. 10, or the sum of their weights."""
        assert self._query_mask is not None
        assert statistic.horizon is not None
        lo, hi = statistic.horizon
        counted = self._query_mask.values
        if self._query_weight is not None:
            counted = self._query_weight.values.double() * counted
        before = torch.nn.functional.pad(counted.cumsum(-1), (1, 0))
        position = torch.arange(self.length, device=counted.device, dtype=torch.int64)
        first = (position + lo).clamp(max=self.length)
        end = torch.full_like(first, self.length) if hi is None else (position + hi + 1).clamp(max=self.length)
        return before[:, torch.maximum(first, end)] - before[:, first]


class GenerationRecording(PlacedRecording):
    """All steps since the sequence began, at position 0 or behind a prefix that was cached before.

    Attributes:
        tokens: (B, length - first) their ids; None: the model was called without ids.
    """

    def __init__(self, reduce: tuple[str, ...], device: torch.device | None, first: int = 0):
        super().__init__(reduce, device, first)
        self.tokens: GrowingTensor | None = None
        self._last_steps: dict[int, LastStep] = {}  # by layer
        self._begin = 0

    def attend(self, layer: int, call: AttentionCall, request: Request) -> Tensor:
        """The output of the call, whose statistics are recorded."""
        output, results = call.attend(request.summed())
        for s, x in self.addends(layer, {s: results.tensors[s.summed] for s in request.statistics}).items():
            self.add(s, layer, call.first_key if s.axis == "column" else call.begin, x)
        self._begin = call.begin
        if self.length < call.end:
            self._add_masks(call, request)
        self._remember(layer, call, request)
        return output

    def _add_masks(self, call: AttentionCall, request: Request) -> None:
        ones = torch.ones(call.query.shape[0], call.query.shape[2], dtype=torch.bool, device=call.query.device)
        real = ones if call.mask.real_queries is None else call.mask.real_queries.to(ones.device)
        query_mask = request.query_mask
        counted = real if query_mask is None else real & query_mask.to(real.device)
        self.add_tokens_seen(call.begin, real, counted, request.query_weight, call.earlier_keys)

    def add_tokens(self, start: int, ids: Tensor | None) -> None:
        """Record the ids of this step's tokens; None: the model was called with embeddings."""
        if ids is None or (self.tokens is None and start > self.first):
            self.tokens = None
            return
        if self.tokens is None:
            self.tokens = GrowingTensor(ids)
        self.tokens.add(start - self.first, ids)

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy or a pickle: no token can be taken back."""
        return super().__getstate__() | {"_last_steps": {}}

    def release(self) -> None:
        """Drop the last step's tensors, among them the cache: no token can be taken back any more."""
        self._last_steps.clear()

    def finish(self) -> None:
        """The forward pass came to its end."""

    # Batch rows that are reordered, tokens that are taken back

    def select_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """The cache's batch rows were selected or repeated by `change`, which does it to a tensor's first dimension."""
        for tensor in self._tensors():
            tensor.select_rows(change)
        self._last_steps.clear()

    def truncate(self, length: int) -> None:
        """The tokens from position `length` on were rejected."""
        if length >= self.length:
            return
        columns = any(s.axis == "column" for s in self._sums)
        if columns and (length < max(self._begin, self.length - UNDOABLE_ROWS) or not self._last_steps):
            raise RuntimeError(
                f"attnstats.capture(live=True): the cache was cut from {self.length} to {length} tokens; only "
                f"tokens of the last step, {UNDOABLE_ROWS} at most and once, can be taken back. Start a new generation"
            )
        for layer, step in self._last_steps.items():
            self._subtract(layer, step, length)
        for tensor in self._tensors():
            tensor.truncate(length - self.first if tensor is self.tokens else length)
        self.length = length
        self._last_steps.clear()

    def _tensors(self) -> list[GrowingTensor]:
        sums = [x for by_layer in self._sums.values() for x in by_layer.values()]
        of_tokens = (self._query_mask, self._query_weight, self._key_mask, self.tokens)
        return sums + [x for x in of_tokens if x is not None]

    def _remember(self, layer: int, call: AttentionCall, request: Request) -> None:
        """Keep the last queries for `truncate`, where columns depend on them."""
        columns = tuple(s for s in request.statistics if s.axis == "column")
        if columns:
            rows = min(UNDOABLE_ROWS, call.query.shape[2])
            mask, weight = (None if x is None else x[:, -rows:] for x in (request.query_mask, request.query_weight))
            of_last = request.only(columns)._replace(query_mask=mask, query_weight=weight)
            self._last_steps[layer] = LastStep(call.last(rows), of_last)

    def _subtract(self, layer: int, step: LastStep, length: int) -> None:
        """Subtract from the column sums the attention of the tokens from position `length` on."""
        call, request = step
        rejected = torch.arange(call.begin, call.end, device=call.query.device, dtype=torch.int64) >= length
        rejected = rejected.expand(call.query.shape[0], -1)
        if request.query_mask is not None:
            rejected = rejected & request.query_mask.to(rejected.device)
        with torch.no_grad():
            results = call.attend(request.summed()._replace(query_mask=rejected)).statistics
        for s, x in self.addends(layer, {s: results.tensors[s.summed] for s in request.statistics}).items():
            self.add(s, layer, call.first_key, -x)
