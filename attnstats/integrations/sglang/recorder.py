"""The statistics of every request of an SGLang scheduler, added up step by step.

A forward hook on each captured layer has its queries. Keys are read from SGLang's pool, in which `req_to_token` says
where each token of a request lies: pages of one token. The scheduler's batch says which rows are whose.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from attnstats.core.options import Options
from attnstats.integrations.sglang import responses
from attnstats.integrations.vllm.configuration import KEY, RequestSettings
from attnstats.integrations.vllm.recorder import RequestRecording, Step, StepRecorder
from attnstats.integrations.vllm.records import Model
from attnstats.integrations.vllm.sums import KeyCache, WatchedLayer
from attnstats.statistics import Statistic
from attnstats.transformers.selection import ChosenHeads

ARGUMENTS = ("q", "k", "v", "forward_batch", "save_kv_cache")  # of RadixAttention.forward, in order
READ = (*ARGUMENTS, "key_value_num_tokens", "sinks")
# What a step may have that makes its attention another than causal attention, in its batch and its backend's metadata.
MASKS = ("custom_mask", "image_token_ranges", "cross_attention_custom_mask", "multi_item_delimiter_indices")
HEALTH_CHECK = "HEALTH_CHECK"  # ids of requests by which SGLang looks whether it answers begin so


class StepMetadata(NamedTuple):
    """Where the keys of a step's requests lie, as `attnstats.paged_statistics` takes it."""

    block_table: Tensor
    seq_lens: Tensor
    query_start_loc: Tensor


class SchedulerRecorder(StepRecorder):
    """The requests of one scheduler."""

    bypassed = (
        "the attention of captured layers {missing} was not seen in a step: CUDA graphs, torch.compile or a fused "
        "layer went past it; set disable_cuda_graph=True, or choose other layers"
    )

    def __init__(
        self,
        settings: RequestSettings,
        layers: Mapping[int, Any],
        heads: ChosenHeads,
        runner: Any,
        model: Model = Model(),  # noqa: B008 frozen
    ):
        super().__init__(settings, layers, heads, model)
        # By SGLang's own objects: one that is dropped without an end, as where it is aborted, takes its sums along.
        self._running = WeakKeyDictionary()
        self._runner = runner
        self._batch: tuple[Any, StepMetadata] | None = None
        for number, layer in layers.items():
            self._watch(number, layer)

    def _watch(self, number: int, layer: Any) -> None:
        left = layer.sliding_window_size if layer.sliding_window_size >= 0 else None
        options = Options(
            scale=layer.scaling,
            softcap=layer.logit_cap or None,
            window_size=None if left is None else (left, 0),
            enable_gqa=True,
        )
        watched = self._watched(number, layer.tp_q_head_num, options, left)
        layer.register_forward_hook(functools.partial(self._attended, *watched), with_kwargs=True)

    def _attended(
        self,
        watched: WatchedLayer,
        masks: dict[Statistic, Tensor],
        layer: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
    ) -> None:
        """A captured layer attended, and its keys are in the pool."""
        step = self._step
        if step is None or step.fault is not None:
            return
        step.seen.add(watched.number)
        try:
            if not self._rows_of(step):
                return
            call = dict(zip(ARGUMENTS, args, strict=False)) | kwargs
            if others := [name for name, x in call.items() if name not in READ and x is not None]:
                raise ValueError(f"its attention has {', '.join(others)}, which are not recorded")
            query = call["q"].reshape(len(call["q"]), layer.tp_q_head_num, layer.qk_head_dim)
            sinks = call.get("sinks")
            watched = watched._replace(options=watched.options._replace(sinks=sinks))
            metadata = self._metadata_of(step, call["forward_batch"])
        except Exception as error:
            step.fault = f"layer {watched.number}: {type(error).__name__}: {error}"
            return
        self._observe(watched, masks, query, lambda: self._key_cache(layer.layer_id, query), metadata)

    def _metadata_of(self, step: Step, batch: Any) -> StepMetadata:
        if self._batch is not None:
            if self._batch[0] is not batch:
                raise ValueError("the step ran in parts, which are not recorded")
            return self._batch[1]
        backend = self._runner.attn_backend
        mode = "decode_backend" if batch.forward_mode.is_decode() else "prefill_backend"
        state = getattr(getattr(backend, mode, backend), "forward_metadata", None)
        for name in MASKS:
            if getattr(batch, name, None) is not None or getattr(state, name, None) is not None:
                raise ValueError(f"the step has {name}, and only causal attention is recorded")
        count, longest = len(step.spans), max(end for _, end in step.spans.values())
        table = self._runner.req_to_token_pool.req_to_token[batch.req_pool_indices[:count], :longest]
        starts = torch.tensor(step.starts, dtype=torch.int32, device="cpu").to(table.device, non_blocking=True)
        metadata = StepMetadata(table, batch.seq_lens[:count], starts)
        self._batch = batch, metadata
        return metadata

    def _key_cache(self, layer: int, query: Tensor) -> KeyCache:
        pages = self._runner.token_to_kv_pool.get_key_buffer(layer)[:, None]  # (slots, 1, key heads, D)
        # SGLang's backends keep their log-sum-exps to themselves: on a GPU a pass over copied keys gives them.
        return KeyCache(1, pages.__getitem__, pages, (lambda: None) if query.is_cuda else None)

    # What the scheduler says

    def end(self) -> None:
        super().end()
        self._batch = None

    def _begin(self, scheduled: Any) -> None:
        if scheduled.forward_mode.is_decode():
            spans = [(end - 1, end) for end in scheduled.seq_lens_cpu.tolist()]
        elif scheduled.forward_mode.is_extend():
            lengths = zip(scheduled.prefix_lens, scheduled.extend_lens, strict=True)
            spans = [(begin, begin + length) for begin, length in lengths]
        else:
            return
        has_beams = any(request.beam_group is not None for request in scheduled.reqs)  # which have rows of their own
        by_request = dict(zip(scheduled.reqs, spans, strict=not has_beams))
        for request, (begin, _) in by_request.items():
            if request not in self._running and _is_wanted(request):
                recording = RequestRecording(self.settings.reduce, self._head_counts, begin)
                if request.input_embeds is not None:
                    recording.fault = "its prompt has embeddings, which are no tokens"
                self._running[request] = recording
        self._step = Step(by_request, fault="beam search is not recorded" if has_beams else None)

    def _order(self, step: Step) -> Sequence[Any]:
        return list(step.spans)

    def _tokens(self, request: Any) -> tuple[list[int], list[int]]:
        return list(request.origin_input_ids), list(request.output_ids)

    def send(self, requests: Sequence[Any], skipped: Any = None) -> None:
        """Before the scheduler sends what requests have so far: those that are finished get their record.

        Args:
            skipped: one of them, of which nothing is sent.
        """
        for request in requests:
            recording = self._running.get(request)
            if recording is None or request is skipped:
                continue
            try:
                self._send(request, recording)
            except Exception as error:
                self._fail([recording], f"before its response: {type(error).__name__}: {error}")

    def _send(self, request: Any, recording: RequestRecording) -> None:
        record = None
        if request.finished():
            del self._running[request]
            record = self._record(request, recording)
        if self._store is None:
            responses.attach(request, record)
        elif record is not None:
            self._write(self._store, request.rid, record)


def _is_wanted(request: Any) -> bool:
    """True unless a request's custom_params say {"attnstats": False}, or it is SGLang's own."""
    wanted = (request.sampling_params.custom_params or {}).get(KEY, True) is not False
    return wanted and not request.rid.startswith(HEALTH_CHECK)
