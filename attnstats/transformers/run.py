"""`Capture`, the object that `with attnstats.capture(...) as run` gives: it observes a model and holds the results."""

from __future__ import annotations

import math
import threading
import warnings
import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from attnstats import cells
from attnstats.distributed import local_heads, tensor_parallel_group
from attnstats.errors import InputError
from attnstats.results import ByStatistic, find
from attnstats.statistics import LSE, MaxLogit, SegmentMass, Statistic
from attnstats.tensors import check_plain
from attnstats.transformers import caches, frames
from attnstats.transformers.calls import AttentionCall, Request
from attnstats.transformers.exchange import current_exchange
from attnstats.transformers.live import GenerationRecording
from attnstats.transformers.positions import CachedPositions
from attnstats.transformers.recording import PassRecording, Ranks
from attnstats.transformers.selection import ChosenHeads, Reduce
from attnstats.transformers.sites import AttentionKind, head_count
from attnstats.wrappers import is_sharded, unwrap

if TYPE_CHECKING:
    from pandas import DataFrame


def _in_backward() -> bool:
    """True while autograd runs backward, and in a graph, which cannot tell."""
    return torch.compiler.is_compiling() or bool(torch._C._current_graph_task_id() != -1)


class StopForward(RuntimeError):
    """Raised after the last captured layer to stop the model, where stop_after_last_layer=True."""


def _check_boundaries(statistics: tuple[Statistic, ...], bounds: Tensor | None, call: AttentionCall) -> None:
    """Raise InputError for segments of keys that a single pass, which grows no more, doesn't have."""
    for s in statistics:
        if not isinstance(s, SegmentMass):
            continue
        given = s.boundaries
        if given is None:
            if bounds is None or bounds.device.type != "cpu" or torch.compiler.is_compiling():
                continue
            given = tuple(bounds.flatten().tolist())
        last, keys = max((bound for bound in given if bound is not None), default=0), call.key.shape[2]
        if last > keys:
            raise InputError(
                f"{s}: a boundary is past the end, {last} of {keys} keys; the last may be open, None, in a tensor -1"
            )


class MemoryUse(NamedTuple):
    """The bytes that results take, by statistic."""

    bytes: dict[Statistic, int]

    @property
    def total(self) -> int:
        return sum(self.bytes.values())

    def __str__(self) -> str:
        lines = [f"{statistic}: {size / 1e6:.2f} MB" for statistic, size in self.bytes.items()]
        return "\n".join([*lines, f"kept in all: {self.total / 1e6:.2f} MB"])


class Capture:
    """The statistics of the model's most recent forward pass, or of a whole generation; `capture` makes it.

    `run["waad"]` or `run[WAAD(10)]` is (L, B, H, ...), one slice per captured layer and chosen head, in the order of
    `run.layers` and of `run.heads`; without L where layers are reduced, without H where heads are. It stays readable
    after the `with`, when it holds no model any more, and so do its copies and pickles. Reading it before a forward
    pass, or after one that raised, is a RuntimeError.

    Attributes:
        statistics: those recorded.
        layers: numbers of the captured layers, ascending.
        heads: per statistic and layer the heads chosen, None for all.
        stopped: True once `on_token` asked to stop.
    """

    def __init__(
        self,
        model: Any,
        kind: AttentionKind,
        statistics: tuple[Statistic, ...],
        layers: tuple[int, ...],
        heads: ChosenHeads,
        reduce: tuple[Reduce, ...],
        live: bool,
        on_token: Callable[[Capture], bool | None] | None,
        device: torch.device | None,
        stop_after_last_layer: bool,
    ):
        self.kind = kind
        self.real_queries: Tensor | None = None
        self.statistics = statistics
        self.layers = layers
        self.heads = heads
        self.stopped = False
        self._model = model
        self._head_count = head_count(unwrap(model), kind)
        self._reduce = reduce
        self._live = live
        self._on_token = on_token
        self._device = device
        of_layers = {layer: tuple(s for s in statistics if layer in heads[s]) for layer in layers}
        self._statistics_of = {layer: of_layer for layer, of_layer in of_layers.items() if of_layer}
        self._has_output = not stop_after_last_layer
        # A pass that gathers parameters has to come to its end to let go of them.
        stops = stop_after_last_layer and not is_sharded(model)
        self._stop_after = max(self._statistics_of) if stops else None
        self._query_mask: Tensor | None = None
        self._query_weight: Tensor | None = None
        self._segment_boundaries: Tensor | None = None
        self._recording: PassRecording | GenerationRecording = self._new_recording()
        self._complete = False
        self._was_read = False  # what is recorded, in part or whole
        # Whisper's generate cuts long audio into segments, and may decode one more than once.
        self._in_segments = hasattr(unwrap(model), "generate_with_fallback")
        self._running = False
        self._unseen_pass = False  # True if a later pass was not announced by `begin`
        self._thread = 0
        self._last_call: tuple[int, Tensor] | None = None  # layer and query of the last one recorded
        self._recorded: set[int] = set()  # layers of this forward pass
        self._ids: Tensor | None = None
        self._stopping = False  # True until generate has asked should_stop
        self._cache: weakref.ref[Any] | None = None  # of the most recent pass
        self._resumed = False  # True if this pass goes on with that cache, or has none to compare
        self._seen: int | None = None  # of a live run the position of this pass's first token
        self._positions = CachedPositions()

    # Reading

    def __getitem__(self, key: Statistic | str) -> Any:
        self._require_complete()
        self._was_read = True
        statistic = find(key, self.statistics, "recorded")
        result = self._recording.read(statistic)
        self._check_finite(statistic, result)
        return statistic.returned(result)

    def __contains__(self, key: object) -> bool:
        return key in self.statistics or any(statistic.name == key for statistic in self.statistics)

    @property
    def valid(self) -> ByStatistic:
        """Per statistic a bool tensor, (B, Tq), (B, Tk) or (B, I, J): False where a value is a placeholder."""
        self._require_complete()
        return ByStatistic({s: self._recording.valid(s) for s in self.statistics})

    def to_frame(self) -> DataFrame:
        """One row per layer, batch row, head and position, a column per number, NaN where it is not valid.

        Levels that are reduced are left out, and so are maps. Of segments there is a column each, segment_mass_0 and so
        on, of largest keys two, top_keys_value_0 and top_keys_index_0. `position` counts the tokens in the cache, too,
        where a column statistic has them.
        """
        results = {s: frames.Recorded(self[s], self.valid[s], self.heads[s]) for s in self.statistics}
        return frames.to_frame(results, self._reduce, self.kind == "cross")

    def __repr__(self) -> str:
        over = f", means over {' and '.join(self._reduce)}" if self._reduce else ""
        lines = [f"Capture of layers {', '.join(map(str, self.layers))}{over}"]
        for s in self.statistics:
            values = s.returned(self._recording.read(s)) if self._is_readable else None
            lines.append(f"  {frames.described(s, values, self.heads[s], self._reduce)}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        results = {s: self._recording.read(s) for s in self.statistics if self._is_readable}
        return cells.text(repr(self)) + cells.curves(frames.curves(results, self._reduce))

    @property
    def _is_readable(self) -> bool:
        """True if results can be read without an error and without the other ranks."""
        return self._complete and not self._unseen_pass and self._recording.ranks is None

    @property
    def query_mask(self) -> Tensor | None:
        """(B, Tq) bool, which queries of the coming forward passes count in column statistics; None: all."""
        return self._query_mask

    @query_mask.setter
    def query_mask(self, mask: Tensor | None) -> None:
        check_plain(query_mask=mask)
        if mask is not None and (not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.dim() != 2):
            got = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"query_mask must be a bool tensor (B, T) in the shape of input_ids, or None; got {got}")
        self._query_mask = mask

    @property
    def query_weight(self) -> Tensor | None:
        """(B, Tq) float, how much each query of the coming forward passes counts in column statistics; None: 1."""
        return self._query_weight

    @query_weight.setter
    def query_weight(self, weight: Tensor | None) -> None:
        check_plain(query_weight=weight)
        if weight is not None and not (isinstance(weight, Tensor) and weight.is_floating_point() and weight.dim() == 2):
            got = f"{weight.dtype} {tuple(weight.shape)}" if isinstance(weight, Tensor) else type(weight).__name__
            raise TypeError(f"query_weight must be a float tensor (B, T) in the shape of input_ids, or None; got {got}")
        self._query_weight = weight

    @property
    def segment_boundaries(self) -> Tensor | None:
        """(B, S + 1) int64, those of `SegmentMass()` in the coming forward passes."""
        return self._segment_boundaries

    @segment_boundaries.setter
    def segment_boundaries(self, boundaries: Tensor | None) -> None:
        check_plain(segment_boundaries=boundaries)
        if boundaries is not None:
            if not isinstance(boundaries, Tensor) or boundaries.is_floating_point() or boundaries.dim() != 2:
                got = f"{boundaries.dtype} {tuple(boundaries.shape)}" if isinstance(boundaries, Tensor) else boundaries
                raise TypeError(f"segment_boundaries must be an int64 tensor (B, S + 1), or None; got {got}")
            if SegmentMass() not in self.statistics:
                raise ValueError("segment_boundaries: no statistic takes them; record SegmentMass() without boundaries")
        self._segment_boundaries = boundaries

    @property
    def key_positions(self) -> Tensor | dict[int, Tensor] | None:
        """The positions of the keys that are cached before the next pass: integers (B, Tk) or (B, key heads, Tk).

        To be set, as a tensor or a dict of tensors by layer, where keys were removed from the cache, or where it was
        filled with keys that the model's position_ids don't count. Tokens that go through the model afterwards are
        added. None, as at first: the cache holds all keys.
        """
        passed: Tensor | dict[int, Tensor] | None = self._positions.passed
        return passed

    @key_positions.setter
    def key_positions(self, keys: Tensor | Mapping[int, Tensor] | None) -> None:
        self._positions.set_keys(keys)

    @property
    def length(self) -> int:
        """Of a live capture: how many tokens went through the model."""
        recording = self._recording
        return recording.length - recording.first if isinstance(recording, GenerationRecording) else 0

    @property
    def tokens(self) -> Tensor:
        """Of a live capture: (B, length) the ids of these tokens, in the order of the results' batch rows."""
        tokens = self._recording.tokens if isinstance(self._recording, GenerationRecording) else None
        if tokens is None:
            raise RuntimeError(
                "tokens: nothing was generated with live=True, or the model was called without input_ids"
            )
        return tokens.values

    def kept(self, batch: int = 1, length: int = 1024) -> MemoryUse:
        """The memory that the results of a batch of that many rows and tokens will take.

        Example: see `attnstats.capture`.
        """
        sizes = {}
        for s in self.statistics:
            counts = [self._head_count or 1 if heads is None else len(heads) for heads in self.heads[s].values()]
            per_layer = 1 if "heads" in self._reduce else max(counts)
            slices = per_layer * (1 if "layers" in self._reduce else len(counts))
            bounds = self._segment_boundaries
            values = math.prod(s.shape(length, length, None if bounds is None else bounds.shape[-1] - 1))
            sizes[s] = 4 * batch * slices * values * (2 if self._live else 1)
        return MemoryUse(sizes)

    # Running

    def forward(self, **inputs: Any) -> Any:
        """Run the model; with `stop_after_last_layer` no further than the last captured layer, and return None."""
        if self._model is None:
            raise RuntimeError("the `with` of this capture is over; call attnstats.capture(...) again for another pass")
        if self._has_output:
            return self._model(**inputs)
        with torch.no_grad():
            try:
                self._model(**inputs)
            except StopForward:
                self.end(None)
        return None

    def should_stop(self, input_ids: Tensor, scores: Any = None, **_: Any) -> Tensor:
        """Goes into `generate(..., stopping_criteria=[run.should_stop])`: stops once `on_token` returned True."""
        stop, self._stopping = self._stopping, False
        return torch.full((len(input_ids),), stop, dtype=torch.bool, device=input_ids.device)

    # As an observer of the model (passes.py) and of its cache (caches.py)

    def begin(self, ids: Tensor | None, cache: Any, position_ids: Any) -> None:
        """A forward pass starts: the results of the last one are dropped, unless this one adds to them."""
        if self._running and self._thread != threading.get_ident():
            raise RuntimeError("attnstats.capture: two threads run the captured model at once; one after the other")
        if not isinstance(self._recording, GenerationRecording):
            if self.kind == "encoder" and self._complete:
                self._drop_segment()
            self._recording = self._new_recording()
        else:
            self._seen = self._recording.length
        self._ids = ids
        self._resumed = cache is None or self._is_current(cache)
        exchange = current_exchange()
        self._positions.begin(position_ids if exchange is None else exchange.position_ids, self._resumed)
        self._remember(cache)
        self._complete = False
        self._recorded, self._last_call = set(), None
        self._running, self._unseen_pass = True, False
        if not torch.compiler.is_compiling():
            self._thread = threading.get_ident()

    def attend(self, layer: int, call: AttentionCall) -> Tensor:
        """The output of a layer's attention call, which is recorded if the layer is captured."""
        statistics = self._statistics_of.get(layer)
        self.pass_by()
        if not self._running or statistics is None:
            return call.attend().output
        if layer in self._recorded:
            if self._last_call is not None and self._last_call[0] == layer and self._last_call[1] is call.query:
                return call.attend().output  # the same map again, for the other half of the values
            raise InputError(
                f"model: layer {layer} attends twice in one forward pass, with different queries, so that it has no "
                "single map; capture other layers"
            )
        if self.kind == "self" and (self._live or self._positions.keys or any(s.needs_positions for s in statistics)):
            call = self._positions.place(layer, call, self._seen)
        if self._live and not self._recorded:
            self._start_or_go_on(call)
        count = call.query.shape[1]
        self._recording.ranks = None if self._head_count in (None, count) else self._ranks(count)
        self._recorded.add(layer)
        self._last_call = layer, call.query
        heads = None
        for s in statistics:
            if self.heads[s][layer] is not None:
                heads = self._local_heads(statistics, layer, count)
                break
        query_mask = None
        if self._query_mask is not None or call.real_queries is not None:
            query_mask = self._query_mask_of(call)
        weight, bounds = self._query_weight, self._segment_boundaries
        if weight is not None:
            weight = self._along_queries("query_weight", weight, call, 1.0)
        if not self._live:
            _check_boundaries(statistics, bounds, call)
        if bounds is not None:
            bounds = bounds.to(call.query.device)
            if self._live and len(bounds) < len(call.query) and len(call.query) % len(bounds) == 0:  # beams
                bounds = bounds.repeat_interleave(len(call.query) // len(bounds), dim=0)
        request = Request(statistics, query_mask, weight, bounds, heads)
        output = self._recording.attend(layer, call, request.only(statistics) if bounds is not None else request)
        if layer == self._stop_after:
            self._positions.end()
            raise StopForward(
                "stop_after_last_layer=True: the model has no output; call run.forward(**inputs), not model(**inputs)"
            )
        return output

    def pass_by(self) -> None:
        """A layer is called, captured or not."""
        if not self._running:
            # Gradient checkpointing repeats layers in the backward pass, when another pass may be the most recent.
            self._unseen_pass = self._unseen_pass or not _in_backward()

    def end(self, cache: Any) -> None:
        """The forward pass is complete: results become readable."""
        if len(self._recorded) < len(self._statistics_of):
            missing = sorted(self._statistics_of.keys() - self._recorded)
            raise RuntimeError(
                f"attnstats.capture: layers {missing} did not call attnstats in this forward pass; the model skipped "
                "them, has no attention there, or their attention was replaced inside the `with`"
            )
        self._recording.finish()
        self._positions.end()
        self._remember(cache)
        self._complete = True
        if self._live:
            if self._stopping:
                raise RuntimeError(
                    "on_token returned True, but the generation goes on; pass it stopping_criteria=[run.should_stop]"
                )
            if self._on_token is not None and self._on_token(self):
                self.stopped = self._stopping = True

    def leave(self) -> None:
        """The forward pass is over, also after an exception: nothing that was read in it is kept."""
        if torch.compiler.is_compiling() or self._thread == threading.get_ident():
            self._running, self._last_call = False, None
            self._ids = self.real_queries = None
            self._positions.leave()

    def rows_selected(self, cache: Any, change: Callable[[Tensor], Tensor]) -> None:
        """The batch rows of a cache were selected or repeated by `change`."""
        if self._is_current(cache):
            self._positions.select_rows(change)
            if isinstance(self._recording, GenerationRecording):
                self._recording.select_rows(change)

    def truncated(self, cache: Any, removed: int) -> None:
        """A cache dropped its last `removed` tokens."""
        if removed == 0 or not self._is_current(cache):
            return
        self._positions.truncate(removed)
        recording = self._recording
        if isinstance(recording, GenerationRecording):
            if recording.length - removed <= recording.first:
                self._recording = self._new_recording()
            else:
                recording.truncate(recording.length - removed)

    def release(self) -> None:
        """The `with` is over: drop all but the results."""
        caches.unfollow(self)
        if isinstance(self._recording, GenerationRecording):
            self._recording.release()
        self.__dict__.update(self._without_model())

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy or a pickle: the results."""
        return self.__dict__ | self._without_model()

    def _without_model(self) -> dict[str, Any]:
        """The attributes that refer to the model, its cache or the user's functions, emptied."""
        positions = CachedPositions()
        positions.keys = dict(self._positions.keys)
        emptied = dict.fromkeys(("_model", "_cache", "_on_token", "_ids", "_last_call"))
        return {**emptied, "_positions": positions, "_running": False}

    def _remember(self, cache: Any) -> None:
        """This is the cache of the most recent pass."""
        if cache is None or torch.compiler.is_compiling():
            return
        if self._live or self._positions.keys:
            caches.follow(cache, self)
        self._cache = weakref.ref(cache)

    def _is_current(self, cache: Any) -> bool:
        return self._cache is not None and self._cache() is cache

    def _new_recording(self) -> PassRecording | GenerationRecording:
        return (GenerationRecording if self._live else PassRecording)(self._reduce, self._device)

    def _start_or_go_on(self, call: AttentionCall) -> None:
        """Before the first layer of a live step: it goes on where the last one ended, or starts a sequence."""
        recording = self._recording
        assert isinstance(recording, GenerationRecording)
        if call.mask.query_offset == 0 or recording.length == 0:
            if recording.length:
                self._drop_segment()
            recording = self._recording = GenerationRecording(self._reduce, self._device, first=call.begin)
            self.stopped = self._stopping = False
        elif not self._resumed:
            raise InputError(
                f"attnstats.capture(live=True): the model goes on at position {call.begin} with another cache than the "
                "one that was followed; a live capture is of one sequence at a time"
            )
        elif call.begin != recording.length:
            raise InputError(
                f"attnstats.capture(live=True): the cache holds {call.begin} tokens where {recording.length} were seen;"
                " take tokens back with cache.crop, or if keys were removed set run.key_positions and pass position_ids"
            )
        recording.add_tokens(call.begin, self._ids)

    def _drop_segment(self) -> None:
        """A sequence is replaced by another: warn if that happens between two calls of the user's."""
        if self._in_segments and not self._was_read:
            warnings.warn(
                "attnstats.capture: this model's generate decodes long audio segment by segment, and the run holds the "
                "last one alone; pass one segment at a time",
                RuntimeWarning,
                stacklevel=2,
            )
        self._was_read = False

    def _query_mask_of(self, call: AttentionCall) -> Tensor:
        """(B, Tq) bool: the call's queries that count, by the user's mask and without padding."""
        mask = self._query_mask
        if call.real_queries is not None:
            mask = call.real_queries if mask is None else mask.to(call.real_queries.device) & call.real_queries
        assert mask is not None
        return self._along_queries("query_mask", mask, call, True)

    def _along_queries(self, name: str, given: Tensor, call: AttentionCall, later: float | bool) -> Tensor:
        """(B, Tq) of the call's queries what the user gave for the pass, or live for the prompt; then `later`."""
        batch, _, length, _ = call.query.shape
        if not self._live and tuple(given.shape) != (batch, length):
            raise InputError(
                f"{name} must have shape {(batch, length)}, that of this pass's input_ids, got {tuple(given.shape)}"
                "; while a model generates, live=True takes the prompt's"
            )
        if self._live:
            assert isinstance(self._recording, GenerationRecording)
            begin, end = call.begin - self._recording.first, call.end - self._recording.first
            given = torch.nn.functional.pad(given, (0, max(0, end - given.shape[1])), value=later)[:, begin:end]
            if batch != len(given) and batch % len(given) == 0:
                given = given.repeat_interleave(batch // len(given), dim=0)  # beams
        return given.to(call.query.device)

    def _ranks(self, count: int) -> Ranks | None:
        """The ranks that have the other heads, where fewer arrive than the model has."""
        if not torch.distributed.is_initialized():
            return None
        exchange = current_exchange()
        group = tensor_parallel_group(unwrap(self._model)) if exchange is None else exchange.group
        if group is None or torch.distributed.get_world_size(group) * count != self._head_count:
            return None
        return Ranks(group, count, self.heads)

    def _local_heads(
        self, statistics: tuple[Statistic, ...], layer: int, count: int
    ) -> dict[Statistic, tuple[int, ...]] | None:
        """The chosen heads as they are numbered on this rank, of statistics that are not of all its heads."""
        local: dict[Statistic, tuple[int, ...]] = {}
        ranks = self._recording.ranks
        for s in statistics:
            heads = self.heads[s][layer]
            if heads is not None and ranks is not None:  # a rank without any computes one, which is then dropped
                heads = tuple(local_heads(heads, count, group=ranks.group)) or (0,)
            if heads is None or heads == tuple(range(count)):
                continue
            if max(heads) >= count:
                raise InputError(f"heads: layer {layer} has query heads 0..{count - 1}, got {heads}")
            local[s] = heads
        return local or None

    def _check_finite(self, statistic: Statistic, result: Tensor) -> None:
        """Warn of heads that have NaN, by name; raise ValueError where they were averaged with others."""
        if isinstance(statistic, (LSE, MaxLogit)) or torch.compiler.is_compiling() or not result.isnan().any():
            return
        by_layer = self._recording.heads_with_nan(statistic, self.heads[statistic])
        named = ", ".join(f"layer {layer} heads {heads}" for layer, heads in by_layer.items())
        where = named or "heads of another rank"
        message = f"{statistic} is NaN in {where}: query or key hold NaN or infinities there"
        if self._reduce:
            raise ValueError(f"{message}; leave them out with `heads`, or capture without `reduce`")
        warnings.warn(message, RuntimeWarning, stacklevel=3)

    def _require_complete(self) -> None:
        if self._unseen_pass:
            raise RuntimeError(
                "the last forward pass was not recorded: it went past the model's hooks, as model.forward(...) and "
                "calls of single layers do; call model(...) inside the `with`"
            )
        if self._complete:
            return
        if self._recorded or self._running:
            done = [layer for layer in self.layers if layer in self._recorded]
            raise RuntimeError(
                f"the last forward pass is incomplete, it recorded layers {done} of {list(self.layers)}: "
                "it raised, or it is still running; run the model again inside the `with`"
            )
        raise RuntimeError("nothing was recorded: call model(**inputs) inside `with attnstats.capture(model, ...)`")
