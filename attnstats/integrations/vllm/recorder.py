"""The statistics of every request of an engine, added up step by step in its worker.

A step attends for many requests at once. Which rows are whose is read from the worker's batch; each captured layer is
computed for all of them in one packed call, from their queries and the keys in the paged cache, and sums are placed by
the tokens' positions in their requests. Of requests with drafts (speculative decoding) the queries are kept until the
step's tokens are sampled, which says how many drafts were accepted; only then are they computed, without the rejected
ones. What goes wrong here costs requests their statistics, never an answer.
"""

from __future__ import annotations

import functools
import itertools
import logging
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from attnstats.core.options import Options
from attnstats.integrations.vllm import records
from attnstats.integrations.vllm.configuration import KEY, RequestSettings, bytes_per_token, described_memory
from attnstats.integrations.vllm.store import RequestWriter
from attnstats.integrations.vllm.sums import (
    CompiledSums,
    GatheredSums,
    KeyCache,
    LayerCall,
    PagedSums,
    RequestRows,
    StepBatch,
    WatchedLayer,
)
from attnstats.statistics import Statistic
from attnstats.tiled import steps
from attnstats.transformers.live import GrowingTensor, PlacedRecording
from attnstats.transformers.selection import ChosenHeads

log = logging.getLogger(__name__)

BYPASSED = (
    "the attention of captured layers {missing} was not seen in a step: CUDA graphs or torch.compile went past it; set "
    "enforce_eager=True, or a cudagraph_mode that leaves attention out, such as PIECEWISE"
)
HIDDEN = "the model's last hidden states were not seen in a step, which token entropies need; set token_entropy=False"

# Gets a layer's queries, what looks at its cache, and the step's metadata.
Watch = Callable[[Tensor, Callable[[], KeyCache], Any], None]


class Watched:
    """A part of the attention of one layer, before vLLM's own: with a `watch` it shows its inputs after each step."""

    watch: Watch | None = None

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        parent: Any = super()
        output = parent.forward(layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs)
        if self.watch is not None and attn_metadata is not None:
            self.watch(query, lambda: self.key_cache(layer, query, kv_cache, attn_metadata), attn_metadata)
        return output

    @abstractmethod
    def key_cache(self, layer: Any, query: Tensor, kv_cache: Tensor, metadata: Any) -> KeyCache:
        """A view of the layer's paged cache."""


Sums = CompiledSums | GatheredSums | PagedSums
State = Literal["finished", "running", "absent"]  # of a request

NO_TOKEN = "no token of it went through the model"
LOGIT_ROWS = 64  # of token entropies, made at a time: 64 rows of a vocabulary of 150k in float32 are 38 MB
ENTRY = 400  # bytes, about, of the id and the objects that hold a record


class RequestRecording(PlacedRecording):
    """One request.

    Attributes:
        temperature: of its sampling, 1 where it is greedy.
        adapter: the name of its LoRA adapter, "" without one.
        fault: why there is nothing to read; None: there is.
        fetched: its results were returned.
    """

    def __init__(
        self,
        reduce: tuple[str, ...],
        head_counts: dict[Statistic, dict[int, int]],
        first: int,
        temperature: float = 1.0,
    ):
        super().__init__(reduce, torch.device("cpu"), first)
        self._head_counts = head_counts  # the same for all requests
        self._entropy: GrowingTensor | None = None
        self.temperature = temperature
        self.adapter = ""
        self.fault: str | None = None
        self.fetched = False

    def add_entropy(self, begin: int, entropy: Tensor) -> None:
        """Add those of the distributions behind some tokens, 0 for tokens that were recorded before."""
        if self._entropy is None:
            self._entropy = GrowingTensor(entropy)
        self._entropy.add(begin, entropy)

    def drawn_entropy(self) -> Tensor | None:
        """(T,) in nats, of the distribution that each token was drawn from; NaN for the first, and behind cached ones.

        None: entropies are not recorded.
        """
        if self._entropy is None or self._query_mask is None:
            return None
        behind = self._entropy.values.masked_fill(~self._query_mask.values[0], torch.nan)
        return torch.cat([behind.new_full((1,), torch.nan), behind[:-1]])

    def new_queries(self, begin: int, end: int) -> Tensor | None:
        """(end - begin,) bool: the query is not recorded yet. After a preemption some are; None: none is."""
        if self._query_mask is None or begin >= self.length:
            return None
        old = self._query_mask.values[0, begin:end]
        return torch.cat([~old, old.new_ones(end - begin - len(old))])


@dataclass
class Step:
    """What runs between two calls of the scheduler.

    Attributes:
        spans: by request, the positions of its queries.
        drafts: how many of the last of these are of drafts, of requests that have some.
        rows: of the recorded requests; None: no layer has been seen.
        starts: boundaries of the queries of all requests, in their order.
        sums: by the layers' metadata, by their window where that matters, and apart for requests with drafts.
        kept: the captured layers that attended, with the queries of requests with drafts.
        entropy: of the recorded requests, by their rows; None: not recorded.
        seen: the captured layers that attended.
        fault: why the step can't be recorded; None: it can.
    """

    spans: dict[Any, tuple[int, int]]
    drafts: dict[Any, int] = field(default_factory=dict)
    rows: list[RequestRows] | None = None
    starts: list[int] = field(default_factory=list)
    sums: dict[Any, Sums] = field(default_factory=dict)
    kept: list[LayerCall] = field(default_factory=list)
    entropy: list[Tensor] | None = None
    seen: set[int] = field(default_factory=set)
    fault: str | None = None


class StepRecorder:
    """The running requests of an engine, to which the sums of its steps are added.

    Attributes:
        model: what its records say of the model.
        layers, heads: those that are recorded.
    """

    bypassed = BYPASSED

    def __init__(self, settings: RequestSettings, layers: Iterable[int], heads: ChosenHeads, model: records.Model):
        self.model = model
        self.settings = settings
        self.layers = tuple(layers)
        self.heads = heads
        self._running: MutableMapping[Any, RequestRecording] = {}
        self._store = None if settings.folder is None else RequestWriter(Path(settings.folder), settings.quota_mb)
        self._step: Step | None = None
        self._warned = False
        self._is_compiled = steps.computes(settings.statistics)
        self._head_counts: dict[Statistic, dict[int, int]] = {}

    @abstractmethod
    def _begin(self, scheduled: Any) -> None:
        """Set the step, and the recordings of requests that are new."""

    @abstractmethod
    def _order(self, step: Step) -> Sequence[Any]:
        """The requests of a step in the order of its rows."""

    @abstractmethod
    def _tokens(self, request: Any) -> tuple[list[int], list[int]]:
        """Those of the prompt and of the output."""

    def _accepted(self, rows: RequestRows) -> RequestRows:
        """The rows of a request with drafts, without those of rejected ones; of an engine that has drafts."""
        raise NotImplementedError

    def memory(self, tokens: int, requests: int) -> str:
        """What requests that run at the same time hold at most."""
        per_token = bytes_per_token(self.settings, self._head_counts)
        return described_memory(self.settings, per_token, tokens, requests)

    # One step

    def begin(self, scheduled: Any) -> None:
        """Before the model runs, with what the scheduler sent."""
        self.end()  # of a step whose tokens were not sampled
        try:
            self._begin(scheduled)
        except Exception as error:
            self._fail(self._running.values(), f"before a step: {type(error).__name__}: {error}")

    def end(self) -> None:
        """After the model ran, or failed; where it may have drafts, after the step's tokens were sampled."""
        step, self._step = self._step, None
        if step is None or not any(id_ in self._running for id_ in step.spans):
            return
        missing = [layer for layer in self.layers if layer not in step.seen]
        if missing and step.fault is None:
            step.fault = self.bypassed.format(missing=", ".join(map(str, missing)))
        if self.settings.token_entropy and step.entropy is None and step.fault is None:
            step.fault = HIDDEN
        if step.fault is None:
            try:
                self._place(step)
            except Exception as error:
                step.fault = f"after a step: {type(error).__name__}: {error}"
        if step.fault is not None:
            self._fail([self._running[id_] for id_ in step.spans if id_ in self._running], step.fault)

    def _fail(self, requests: Iterable[RequestRecording], fault: str) -> None:
        for each in requests:
            each.fault = each.fault or fault
        if not self._warned:
            self._warned = True
            log.error("attnstats: requests have no statistics, because %s (said once)", fault)

    def _observe(
        self,
        layer: WatchedLayer,
        masks: dict[Statistic, Tensor],
        query: Tensor,
        look: Callable[[], KeyCache],
        metadata: Any,
    ) -> None:
        """A captured layer attended."""
        step = self._step
        if step is None or step.fault is not None:
            return
        step.seen.add(layer.number)
        try:
            rows = self._rows_of(step)
            if not rows:
                return
            call = LayerCall(layer, masks, query, look(), metadata)
            without, drafted = ([each for each in rows if bool(each.drafts) is has] for has in (False, True))
            if without:
                self._sums_of(step, without, call, step.starts[-1]).add(call)
            if drafted:
                step.kept.append(call.copied(drafted))
        except Exception as error:
            step.fault = f"layer {layer.number}: {type(error).__name__}: {error}"

    def _observe_hidden(self, model: Any, args: Any, output: Any) -> None:
        """The model ran; `output` has the last hidden states of all tokens, or that and others."""
        step = self._step
        if step is None or step.fault is not None:
            return
        try:
            rows, hidden = self._rows_of(step), output if isinstance(output, Tensor) else output[0]
            step.entropy = []
            for each in rows:
                own = hidden[each.queries]
                temperature = each.recording.temperature
                logits = (model.compute_logits(part).float() / temperature for part in own.split(LOGIT_ROWS))
                parts = [torch.distributions.Categorical(logits=x, validate_args=False).entropy() for x in logits]
                step.entropy.append(torch.cat(parts).cpu())
        except Exception as error:
            step.fault = f"token entropies: {type(error).__name__}: {error}"

    def _sums_of(self, step: Step, rows: list[RequestRows], call: LayerCall, count: int | None) -> Sums:
        """Where a step adds up a layer, made for the first of its kind. count: as for `StepBatch.of`."""
        layer, cache, metadata = call.layer, call.cache, call.metadata
        is_compiled = (
            self._is_compiled and cache.lse is None and cache.pages is not None and steps.takes(call.query, cache.pages)
        )
        key = id(metadata), None if is_compiled else layer.left, count is None
        if key not in step.sums:
            batch, settings = StepBatch.of(rows, count, metadata), self.settings
            if cache.lse is not None:
                step.sums[key] = PagedSums(batch, metadata, settings.reduce)
            elif is_compiled:
                step.sums[key] = CompiledSums(batch, settings.statistics, settings.reduce, layer.query_heads)
            else:
                step.sums[key] = GatheredSums(batch, settings.reduce, layer.left, cache.block_size)
        return step.sums[key]

    def _place(self, step: Step) -> None:
        """Add the sums of a step to its requests."""
        before, kept, row = self._rows_of(step), [], 0
        every = [self._accepted(each) if each.drafts else each for each in before]
        for old, rows in zip(before, every, strict=True):
            if rows.drafts:
                kept.append(rows._replace(row=row))  # as `LayerCall.copied` has their queries
                row += old.end - old.begin
        for call in step.kept:
            self._sums_of(step, kept, call, None).add(call)
        for sums in step.sums.values():
            for addend in sums.addends():
                s = addend.statistic
                for rows, start, part in zip(sums.batch.rows, addend.starts, addend.parts, strict=True):
                    if rows.new is not None and s.axis != "column":
                        part = part * rows.new.view(-1, *[1] * s.per_query)
                    rows.recording.add(s, addend.layer, start, part)
        for rows in every:
            real = torch.ones(1, rows.end - rows.begin, dtype=torch.bool, device="cpu")
            rows.recording.add_tokens_seen(rows.begin, real, real if rows.new is None else rows.new[None], None)
        for rows, entropy in zip(every, step.entropy or (), strict=False):
            own = entropy[: rows.end - rows.begin]
            rows.recording.add_entropy(rows.begin, own if rows.new is None else own * rows.new)

    def _rows_of(self, step: Step) -> list[RequestRows]:
        """The rows of the recorded requests of a step, in their order."""
        if step.rows is None:
            order = self._order(step)
            spans = [step.spans[request] for request in order]
            step.starts = [0, *itertools.accumulate(end - begin for begin, end in spans)]
            step.rows = []
            for place, request in enumerate(order):
                recording = self._running.get(request)
                if recording is not None and recording.fault is None:
                    begin, end = spans[place]
                    new, drafts = recording.new_queries(begin, end), step.drafts.get(request, 0)
                    step.rows.append(
                        RequestRows(request, recording, place, step.starts[place], begin, end, new, drafts)
                    )
        return step.rows

    def _record(self, request: Any, recording: RequestRecording) -> bytes:
        tokens: list[int] = []
        try:
            prompt, output = self._tokens(request)
            tokens = prompt + output
            if fault := recording.fault or (recording.length == recording.first and NO_TOKEN):
                return records.failure(fault, tokens)
            return records.encode(
                self.settings,
                self.layers,
                self.heads,
                recording,
                tokens,
                prompt=len(prompt),
                token_entropy=recording.drawn_entropy(),
                model=self.model.with_adapter(recording.adapter),
            )
        except Exception as error:
            return records.failure(f"{type(error).__name__}: {error}", tokens)

    def _write(self, store: RequestWriter, request_id: str, record: bytes) -> None:
        if fault := records.fault_of(record):
            store.lose(fault)
            return
        try:
            store.write(request_id, record)
        except Exception as error:
            store.lose(f"{type(error).__name__}: {error}")

    def _watched(
        self, number: int, query_heads: int, options: Options, left: int | None
    ) -> tuple[WatchedLayer, dict[Statistic, Tensor]]:
        """A captured layer, and the masks of the heads that statistics are of, for `_observe`."""
        chosen = {s: self.heads[s][number] for s in self.settings.statistics if number in self.heads[s]}
        for s in chosen:
            if left is not None and s.method in ("first_keys", "segments", "top"):
                raise ValueError(
                    f"{KEY}: layer {number} has a sliding window, which hides the first keys, and {s} numbers keys "
                    "from there on; leave it out, or choose other layers"
                )
        heads = {s: of_layer for s, of_layer in chosen.items() if of_layer is not None}
        for s in chosen:
            self._head_counts.setdefault(s, {})[number] = len(heads.get(s, range(query_heads)))
        every = torch.arange(query_heads, dtype=torch.int64, device="cpu")
        masks = {
            s: torch.isin(every, torch.tensor(of_layer, dtype=torch.int64, device="cpu"))
            for s, of_layer in heads.items()
        }
        return WatchedLayer(number, tuple(chosen), heads, query_heads, options, left), masks


class Recorder(StepRecorder):
    """The requests of one worker of vLLM.

    Attributes:
        dropped: how many finished requests went before anybody fetched them.
    """

    def __init__(
        self,
        settings: RequestSettings,
        layers: dict[int, Any],
        heads: ChosenHeads,
        runner: Any,
        model: records.Model = records.Model(),  # noqa: B008 frozen
    ):
        super().__init__(settings, layers, heads, model)
        self.dropped = 0
        self._runner = runner
        self._finished: dict[str, bytes] = {}  # records, the oldest first
        self._held = 0  # bytes of them
        for number, layer in layers.items():
            self._watch(number, layer.impl)
        if settings.token_entropy:
            runner.get_model().register_forward_hook(self._observe_hidden)

    def _watch(self, number: int, impl: Any) -> None:
        """Have a captured layer call `_observe`."""
        options = Options(
            scale=impl.scale,
            softcap=impl.logits_soft_cap or None,
            window_size=None if impl.left is None else (impl.left, 0),
            sinks=impl.sinks,
            enable_gqa=True,
        )
        impl.watch = functools.partial(self._observe, *self._watched(number, impl.num_heads, options, impl.left))

    def _begin(self, scheduled: Any) -> None:
        for request_id in scheduled.finished_req_ids:
            self._finish(request_id)
        for new in scheduled.scheduled_new_reqs:
            if new.req_id in self._running:
                self._running[new.req_id].fault = "its prompt was continued by streaming, which is not recorded"
            elif _is_wanted(new.sampling_params):
                first = new.num_computed_tokens
                temperature = new.sampling_params.temperature or 1.0
                recording = RequestRecording(self.settings.reduce, self._head_counts, first, temperature)
                if new.lora_request is not None:
                    recording.adapter = new.lora_request.lora_name
                if new.prompt_embeds is not None:
                    recording.fault = "its prompt has embeddings, which are no tokens"
                self._running[new.req_id] = recording
        cached = scheduled.scheduled_cached_reqs
        begins = {new.req_id: new.num_computed_tokens for new in scheduled.scheduled_new_reqs}
        begins |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        spans = {id_: (begins[id_], begins[id_] + count) for id_, count in scheduled.num_scheduled_tokens.items()}
        drafts = {id_: len(tokens) for id_, tokens in scheduled.scheduled_spec_decode_tokens.items()}
        self._step = Step(spans, drafts) if spans else None

    def _order(self, step: Step) -> Sequence[str]:
        return self._runner.input_batch.req_ids

    def _tokens(self, request: str) -> tuple[list[int], list[int]]:
        state = self._runner.requests[request]
        return list(state.prompt_token_ids or ()), list(state.output_token_ids)

    def _accepted(self, rows: RequestRows) -> RequestRows:
        # The last token that was sampled has no query yet.
        end = self._length(rows.request, rows.begin + 1) - 1
        end = min(max(end, rows.end - rows.drafts), rows.end)
        return rows._replace(end=end, new=rows.recording.new_queries(rows.begin, end))

    def _length(self, request: str, begin: int) -> int:
        """The tokens of a request, of which those from position `begin` on are new.

        The scheduler drops those behind one that ends the request.
        """
        state = self._runner.requests[request]
        sampling, prompt = state.sampling_params, state.num_tokens - len(state.output_token_ids)
        ends = {sampling.eos_token_id, *(sampling.stop_token_ids or ())}
        for i in range(max(begin, prompt), state.num_tokens):
            if state.output_token_ids[i - prompt] in ends:
                return i + 1
        return min(state.num_tokens, prompt + sampling.max_tokens, self._runner.max_model_len)

    def close(self) -> None:
        """The engine ends: what it has told no longer is finished, too, and what is running stays as far as it came."""
        self._step = None
        for request_id in list(self._running):
            self._finish(request_id)
        if self._store is not None:
            self._store.close()

    def _finish(self, request_id: str) -> None:
        recording = self._running.pop(request_id, None)
        if recording is None or (recording.fetched and self._store is None):
            return
        record = self._record(request_id, recording)
        if self._store is not None:
            self._write(self._store, request_id, record)
        if recording.fetched:
            return
        self._forget(request_id)  # an id may come again where vLLM is told to put nothing behind it
        self._finished[request_id] = record
        self._held += len(record) + ENTRY
        while self._held > self.settings.keep_mb * 1e6:
            self._forget(next(iter(self._finished)))
            self.dropped += 1

    def _forget(self, request_id: str) -> None:
        record = self._finished.pop(request_id, None)
        if record is not None:
            self._held -= len(record) + ENTRY

    def fetch(self, external_id: str, index: int, prompt: list[int], output: list[int]) -> bytes:
        """The record of a request, which is forgotten if the tokens are those of the request.

        Args:
            external_id: as the user knows it. vLLM puts eight letters behind it, and of several completions the number
                before it.
            index: the number of the completion.
            prompt, output: tokens, as for `records.is_of`.
        """
        found = self._named(external_id, index)
        for request_id, held in found:
            record = held if isinstance(held, bytes) else self._record(request_id, held)
            if not records.is_of(record, prompt, output):
                continue
            if isinstance(held, bytes):
                self._forget(request_id)
            else:
                held.fetched = True
            fault = records.fault_of(record)
            return records.failure(f"request {external_id!r} has no statistics: {fault}") if fault else record
        if found:
            return records.failure(
                f"request {external_id!r}: the statistics are of other tokens; is llm the engine of this output?"
            )
        return self._absent(external_id)

    def look_up(self, external_id: str, index: int) -> tuple[State, bytes]:
        """The record of a request, the newest with this id; it is kept. Arguments as for `fetch`."""
        found = self._named(external_id, index)
        if not found:
            return "absent", self._absent(external_id)
        request_id, held = found[0]
        return ("finished", held) if isinstance(held, bytes) else ("running", self._record(request_id, held))

    def kept(self) -> tuple[list[str], list[str]]:
        """The ids of the requests that `look_up` finds, finished and running, the oldest first."""
        return list(self._finished), [id_ for id_, recording in self._running.items() if not recording.fetched]

    def _named(self, external_id: str, index: int) -> list[tuple[str, bytes | RequestRecording]]:
        """What is kept of the requests with this id, the newest first."""
        names = {f"{index}_{external_id}"} | ({external_id} if index == 0 else set())
        # The worker hears that a request is finished with the next step.
        holders: tuple[Mapping[str, bytes | RequestRecording], ...] = (self._running, self._finished)
        found = [(id_, holder[id_]) for holder in holders for id_ in reversed(list(holder)) if _has_name(id_, names)]
        return [(id_, held) for id_, held in found if isinstance(held, bytes) or not held.fetched]

    def _absent(self, external_id: str) -> bytes:
        return records.failure(
            f"request {external_id!r}: nothing is kept of it. It was fetched before, was sent with "
            f'extra_args={{"{KEY}": False}}, is not of this engine, or had to go: {self.dropped} results were dropped, '
            "raise keep_mb"
        )


def _is_wanted(sampling: Any) -> bool:
    """True unless a request's extra_args say {"attnstats": False}, or over HTTP 0, as vLLM takes no booleans there."""
    return sampling is not None and (sampling.extra_args or {}).get(KEY, True) not in (False, "0", "false", "False")


def _has_name(request_id: str, names: set[str]) -> bool:
    """True if it is one of the names, with or without the letters that vLLM puts behind it."""
    return request_id in names or (request_id[-9:-8] == "-" and request_id[:-9] in names)
