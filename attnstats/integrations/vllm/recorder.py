"""The statistics of every request of an engine, added up step by step in its worker.

A step attends for many requests at once. Which rows are whose is read from the worker's batch; each captured layer is
computed for all of them in one packed call, from their queries and the keys in the paged cache, and sums are placed by
the tokens' positions in their requests. What goes wrong here costs requests their statistics, never an answer.
"""

from __future__ import annotations

import itertools
import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnstats import functional
from attnstats.core.options import Options
from attnstats.integrations.vllm import records
from attnstats.integrations.vllm.configuration import KEY, RequestSettings
from attnstats.statistics import Statistic
from attnstats.transformers.live import PlacedRecording
from attnstats.transformers.recording import Recording
from attnstats.transformers.selection import ChosenHeads

log = logging.getLogger(__name__)

BYPASSED = (
    "the attention of captured layers {missing} was not seen in a step: CUDA graphs or torch.compile went past it; set "
    "enforce_eager=True, or a cudagraph_mode that leaves attention out, such as PIECEWISE"
)


class KeyCache(NamedTuple):
    """A layer's paged cache.

    Attributes:
        block_size: in tokens.
        read: the keys (blocks, block size, key heads, D) of some blocks, by their numbers.
    """

    block_size: int
    read: Callable[[Tensor], Tensor]


Watch = Callable[[Tensor, KeyCache, Any], None]  # gets a layer's queries, its cache and the step's metadata


class RequestRecording(PlacedRecording):
    """One request.

    Attributes:
        fault: why there is nothing to read; None: there is.
        tokens: those of a finished request.
        fetched: its results were returned.
    """

    def __init__(self, reduce: tuple[str, ...], adder: Recording, first: int):
        super().__init__(reduce, torch.device("cpu"), first)
        self._head_counts = adder._head_counts  # the same for all requests
        self.fault: str | None = None
        self.tokens: list[int] = []
        self.fetched = False

    def is_new(self, begin: int, end: int) -> Tensor:
        """(1, end - begin) bool: the query is not recorded yet. A request that was preempted repeats some."""
        new = torch.ones(1, end - begin, dtype=torch.bool, device="cpu")
        if self._query_mask is not None and begin < self.length:
            old = self._query_mask.values[:, begin:end]
            new[:, : old.shape[1]] = ~old
        return new

    @property
    def bytes(self) -> int:
        """The memory of its numbers."""
        return sum(x.values.nbytes for by_layer in self._sums.values() for x in by_layer.values())


class WatchedLayer(NamedTuple):
    """A captured layer.

    Attributes:
        number: in the model.
        options: of its calls, with the sums of its statistics, its heads, scale, softcap, window and sinks.
        statistics: those of the settings that the options' sums belong to.
        left: how far behind itself a query sees; None: all the way.
    """

    number: int
    options: Options
    statistics: tuple[Statistic, ...]
    left: int | None


@dataclass(frozen=True)
class RequestRows:
    """The rows of one request in a step: queries begin .. end - 1 of its tokens."""

    recording: RequestRecording
    place: int  # in the batch
    begin: int
    end: int
    new: Tensor  # (1, end - begin) bool


@dataclass(frozen=True)
class PackedRows:
    """The rows of a step's requests, packed for layers that have the same window and cache.

    Attributes:
        rows: with the position of the first key that is read for each.
        index: of their queries in the batch; None: all of them, in order.
        blocks: of the cache, of all requests in order.
        slots: of the keys among those blocks' tokens.
        query_mask: of the queries that are new; None: all are.
    """

    rows: list[tuple[RequestRows, int]]
    index: Tensor | None
    blocks: Tensor
    slots: Tensor
    query_mask: Tensor | None
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor

    @classmethod
    def of(cls, rows: list[RequestRows], left: int | None, size: int, metadata: Any) -> PackedRows:
        starts = metadata.query_start_loc.tolist()
        index, blocks, slots, first_keys = [], [], [], []
        used = 0
        for each in rows:
            first = 0 if left is None else max(0, each.begin - left)
            own = metadata.block_table[each.place, first // size : -(-each.end // size)]
            offset = used * size + first % size
            slots.append(torch.arange(offset, offset + each.end - first, dtype=torch.int64, device=own.device))
            blocks.append(own)
            index.append(torch.arange(starts[each.place], starts[each.place + 1], dtype=torch.int64, device=own.device))
            first_keys.append(first)
            used += len(own)
        new = torch.cat([each.new[0] for each in rows])
        return cls(
            list(zip(rows, first_keys, strict=True)),
            None if len(rows) == len(starts) - 1 else torch.cat(index),
            torch.cat(blocks).long(),
            torch.cat(slots),
            None if new.all() else new,
            _boundaries([each.end - each.begin for each in rows]),
            _boundaries([len(each) for each in slots]),
        )


@dataclass
class Step:
    """What runs between two calls of the scheduler.

    Attributes:
        spans: by request, the positions of its queries.
        rows: of the recorded requests; None: no layer has been seen.
        sums: by statistic, layer and window, of all their packed rows.
        seen: the captured layers that attended.
        fault: why the step can't be recorded; None: it can.
    """

    spans: dict[str, tuple[int, int]]
    rows: list[RequestRows] | None = None
    packed: dict[Any, PackedRows] = field(default_factory=dict)
    sums: dict[tuple[Statistic, int, int | None], Tensor] = field(default_factory=dict)
    seen: set[int] = field(default_factory=set)
    fault: str | None = None


class Recorder:
    """The requests of one worker.

    Attributes:
        layers, heads: those that are recorded.
        dropped: how many finished requests went before anybody fetched them.
    """

    def __init__(self, settings: RequestSettings, layers: dict[int, Any], heads: ChosenHeads, runner: Any):
        self.settings = settings
        self.layers = tuple(layers)
        self.heads = heads
        self.dropped = 0
        self._runner = runner
        self._running: dict[str, RequestRecording] = {}
        self._finished: OrderedDict[str, RequestRecording] = OrderedDict()
        self._adder = Recording(settings.reduce, torch.device("cpu"))
        self._step: Step | None = None
        self._warned = False
        for number, layer in layers.items():
            watched = self._watched(number, layer)
            layer.impl.watch = lambda *inputs, watched=watched: self._observe(watched, *inputs)

    # One step of the worker

    def begin(self, scheduled: Any) -> None:
        """Before the model runs, with what the scheduler sent."""
        for request_id in scheduled.finished_req_ids:
            self._finish(request_id)
        for new in scheduled.scheduled_new_reqs:
            if new.req_id in self._running:
                self._running[new.req_id].fault = "its prompt was continued by streaming, which is not recorded"
            elif _is_wanted(new.sampling_params):
                first = new.num_computed_tokens
                self._running[new.req_id] = RequestRecording(self.settings.reduce, self._adder, first)
        cached = scheduled.scheduled_cached_reqs
        begins = {new.req_id: new.num_computed_tokens for new in scheduled.scheduled_new_reqs}
        begins |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        spans = {id_: (begins[id_], begins[id_] + count) for id_, count in scheduled.num_scheduled_tokens.items()}
        self._step = Step(spans) if spans else None

    def end(self) -> None:
        """After the model ran, or failed."""
        step, self._step = self._step, None
        if step is None or not any(id_ in self._running for id_ in step.spans):
            return
        rows = self._rows_of(step)
        missing = [layer for layer in self.layers if layer not in step.seen]
        if missing:
            step.fault = BYPASSED.format(missing=", ".join(map(str, missing)))
        if step.fault is None:
            try:
                self._place(step)
            except Exception as error:
                step.fault = f"{type(error).__name__}: {error}"
        if step.fault is not None:
            for each in rows:
                each.recording.fault = step.fault
            if rows and not self._warned:
                self._warned = True
                log.error("attnstats: requests have no statistics, because %s (said once)", step.fault)

    def _observe(self, layer: WatchedLayer, query: Tensor, cache: KeyCache, metadata: Any) -> None:
        """A captured layer attended."""
        step = self._step
        if step is None or step.fault is not None:
            return
        step.seen.add(layer.number)
        rows = self._rows_of(step)
        if not rows:
            return
        try:
            self._add(step, rows, layer, query, cache, metadata)
        except Exception as error:
            step.fault = f"layer {layer.number}: {type(error).__name__}: {error}"

    def _add(
        self, step: Step, rows: list[RequestRows], layer: WatchedLayer, query: Tensor, cache: KeyCache, metadata: Any
    ) -> None:
        key = id(metadata), layer.left
        packed = step.packed.get(key)
        if packed is None:
            packed = step.packed[key] = PackedRows.of(rows, layer.left, cache.block_size, metadata)
        query = query[: int(metadata.query_start_loc[-1])] if packed.index is None else query[packed.index]
        results = packed_statistics(query, cache, packed, layer.options)
        of_layer = {s: results[s.summed][None] for s in layer.statistics}
        for s, x in self._adder.addends(layer.number, of_layer).items():
            place = s, -1 if self._adder.over_layers else layer.number, layer.left
            step.sums[place] = step.sums[place] + x if place in step.sums else x

    def _place(self, step: Step) -> None:
        """Add the sums of a step to its requests."""
        by_window = {left: packed for (_, left), packed in step.packed.items()}
        for (statistic, layer, left), x in step.sums.items():
            packed, is_column = by_window[left], statistic.axis == "column"
            bounds = packed.cu_seqlens_k if is_column else packed.cu_seqlens_q
            parts = x.split(bounds.diff().tolist(), -1 - statistic.per_query)
            for (rows, first_key), part in zip(packed.rows, parts, strict=True):
                if not is_column and packed.query_mask is not None:
                    part = part * rows.new[0].view(-1, *[1] * statistic.per_query)
                rows.recording.add(statistic, layer, first_key if is_column else rows.begin, part)
        for rows in self._rows_of(step):
            rows.recording.add_tokens_seen(rows.begin, torch.ones_like(rows.new), rows.new, None)

    def _rows_of(self, step: Step) -> list[RequestRows]:
        """The rows of the recorded requests of a step, in the order of the worker's batch."""
        if step.rows is None:
            step.rows = []
            for place, request_id in enumerate(self._runner.input_batch.req_ids):
                recording = self._running.get(request_id)
                if recording is not None and recording.fault is None and request_id in step.spans:
                    begin, end = step.spans[request_id]
                    step.rows.append(RequestRows(recording, place, begin, end, recording.is_new(begin, end)))
        return step.rows

    # Requests

    def _finish(self, request_id: str) -> None:
        recording = self._running.pop(request_id, None)
        if recording is None or recording.fetched:
            return
        recording.tokens = self._tokens(request_id)
        self._finished[request_id] = recording
        held = sum(each.bytes for each in self._finished.values())
        while self._finished and held > self.settings.keep_mb * 1e6:
            _, oldest = self._finished.popitem(last=False)
            held -= oldest.bytes
            self.dropped += 1

    def _tokens(self, request_id: str) -> list[int]:
        state = self._runner.requests[request_id]
        return [*(state.prompt_token_ids or ()), *state.output_token_ids]

    def fetch(self, external_id: str, index: int, count: int) -> bytes:
        """The record of a request, which is forgotten.

        Args:
            external_id: as the user knows it. vLLM puts eight letters behind it, and the completion's number before.
            index: the number of the completion, of `count`.
        """
        prefix = f"{index}_{external_id}" if count > 1 else external_id
        of_request = [
            id_
            for id_ in itertools.chain(self._finished, self._running)
            if id_ == prefix or (id_.startswith(f"{prefix}-") and len(id_) == len(prefix) + 9)
        ]
        if not of_request:
            return records.failure(
                f"request {external_id!r}: nothing is kept of it. It was fetched before, was sent with "
                f'extra_args={{"{KEY}": False}}, or had to go: {self.dropped} results were dropped, raise keep_mb'
            )
        request_id = of_request[-1]
        if request_id in self._finished:
            recording = self._finished.pop(request_id)
        else:  # the worker hears that a request is finished with the next step
            recording = self._running[request_id]
            recording.tokens, recording.fetched = self._tokens(request_id), True
        if recording.fault is not None:
            return records.failure(f"request {external_id!r} has no statistics: {recording.fault}")
        return records.encode(self.settings, self.layers, self.heads, recording, recording.tokens)

    def _watched(self, number: int, layer: Any) -> WatchedLayer:
        impl = layer.impl
        statistics = tuple(s for s in self.settings.statistics if number in self.heads[s])
        heads = {s.summed: chosen for s in statistics if (chosen := self.heads[s][number]) is not None}
        options = Options(
            statistics=tuple(s.summed for s in statistics),
            heads=heads or None,
            scale=impl.scale,
            softcap=impl.logits_soft_cap or None,
            window_size=None if impl.left is None else (impl.left, 0),
            sinks=impl.sinks,
            enable_gqa=True,
        )
        return WatchedLayer(number, options, statistics, impl.left)


def packed_statistics(
    query: Tensor, cache: KeyCache, packed: PackedRows, options: Options
) -> Mapping[Statistic, Tensor]:
    """The statistics (H, tokens) of packed rows, from their queries (tokens, H, D) and the keys in the paged cache."""
    key = cache.read(packed.blocks).flatten(0, 1)[packed.slots]
    options = options._replace(
        query_mask=packed.query_mask, cu_seqlens_q=packed.cu_seqlens_q, cu_seqlens_k=packed.cu_seqlens_k
    )
    return functional.attend(query, key, key, options).statistics.tensors


def _boundaries(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device="cpu")


def _is_wanted(sampling: Any) -> bool:
    """True unless a request's extra_args say {"attnstats": False}."""
    return sampling is not None and (sampling.extra_args or {}).get(KEY, True) is not False
