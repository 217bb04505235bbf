"""Recording the attention statistics of a running transformers model: chosen layers and heads, pass by pass or live.

`capture` is for users and for `attnstats analyze`. How the model is made to call us is in hooks.py, what one call
computes in calls.py, which layers and heads are meant in selection.py, where results are kept in recording.py. Which
heads are local or global is for the caller to say.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from attnstats.distributed import local_heads, tensor_parallel_group
from attnstats.errors import InputError
from attnstats.functional import Backend
from attnstats.results import ByStatistic
from attnstats.statistics import LSE, MaxLogit, PooledMap, Statistic, resolve
from attnstats.transformers import caches
from attnstats.transformers.calls import Call
from attnstats.transformers.hooks import Kind, attachment_of, base_model, observed, sites
from attnstats.transformers.recording import Generation, Pass, Ranks, grows
from attnstats.transformers.selection import Choice, Heads, Layers, check_heads, resolve_heads, resolve_layers

Reduce = Literal["heads", "layers"]


class StopForward(RuntimeError):
    """The model was stopped after the last captured layer, as `stop_after_last_layer=True` asked."""


class Kept(NamedTuple):
    """What a capture keeps, in bytes, by statistic."""

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
    after the `with`. Reading it before a forward pass, or after one that raised, is a RuntimeError.

    Attributes:
        statistics: those recorded.
        layers: numbers of the captured layers, ascending.
        heads: per statistic and layer the heads chosen, None for all.
        stopped: whether `on_token` asked to stop.
    """

    def __init__(
        self,
        model: Any,
        kind: Kind,
        statistics: tuple[Statistic, ...],
        layers: tuple[int, ...],
        heads: Choice,
        reduce: tuple[Reduce, ...],
        live: bool,
        on_token: Callable[[Capture], bool | None] | None,
        device: torch.device | None,
        stop: bool,
    ):
        self.kind = kind
        self.statistics = statistics
        self.layers = layers
        self.heads = heads
        self.stopped = False
        self._model = model
        self._head_count = _head_count(model, kind)
        self._reduce = reduce
        self._live = live
        self._on_token = on_token
        self._device = device
        self._stop = stop
        self._last_layer = max(layer for chosen in heads.values() for layer in chosen)
        self._query_mask: Tensor | None = None
        self._store: Pass | Generation = self._fresh()
        self._complete = False
        self._running = False
        self._thread = 0
        self._seen: tuple[int, Tensor] | None = None  # the last recorded call's layer and query
        self._calls: set[int] = set()
        self._ids: Tensor | None = None
        self._stopping = False  # until generate has asked should_stop
        self._cache: weakref.ref[Any] | None = None  # of the sequence that a live run follows
        self._resumed: bool | None = None

    # Reading

    def __getitem__(self, key: Statistic | str) -> Tensor:
        return self._finite(self._statistic(key))

    def __contains__(self, key: object) -> bool:
        return key in self.statistics or any(statistic.name == key for statistic in self.statistics)

    @property
    def valid(self) -> ByStatistic:
        """Per statistic a bool tensor, (B, Tq), (B, Tk) or (B, I, J): False where a value is a placeholder."""
        self._require_complete()
        return ByStatistic({s: self._store.valid(s) for s in self.statistics})

    @property
    def query_mask(self) -> Tensor | None:
        """(B, Tq) bool, which queries of the coming forward passes count in column statistics; None: all."""
        return self._query_mask

    @query_mask.setter
    def query_mask(self, mask: Tensor | None) -> None:
        if mask is not None and (not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.dim() != 2):
            got = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"query_mask must be a bool tensor (B, T) in the shape of input_ids, or None; got {got}")
        self._query_mask = mask

    @property
    def length(self) -> int:
        """Of a live capture: how many tokens went through the model."""
        return self._store.length if isinstance(self._store, Generation) else 0

    @property
    def tokens(self) -> Tensor:
        """Of a live capture: (B, length) the ids of these tokens, in the order of the results' batch rows."""
        tokens = self._store.tokens if isinstance(self._store, Generation) else None
        if tokens is None:
            raise RuntimeError(
                "tokens: nothing was generated with live=True, or the model was called without input_ids"
            )
        return tokens.values

    def kept(self, batch: int = 1, length: int = 1024) -> Kept:
        """What results of a batch of so many rows and tokens take, before anything runs.

        Example: see `attnstats.capture`.
        """
        of_model = self._head_count
        sizes = {}
        for s in self.statistics:
            counts = [of_model or 1 if heads is None else len(heads) for heads in self.heads[s].values()]
            per_layer = 1 if "heads" in self._reduce else max(counts)
            slices = per_layer * (1 if "layers" in self._reduce else len(counts))
            values = length
            if isinstance(s, PooledMap):
                query_bounds, key_bounds = s.boundaries(length, length)
                values = (len(query_bounds) - 1) * (len(key_bounds) - 1)
            sizes[s] = 4 * batch * slices * values * (2 if self._live else 1)
        return Kept(sizes)

    # Running

    def forward(self, **inputs: Any) -> Any:
        """Run the model; with `stop_after_last_layer` no further than the last captured layer, and return None."""
        if not self._stop:
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

    # What the model calls

    def begin(self, ids: Tensor | None, cache: Any) -> None:
        """A forward pass starts: what the last one left is dropped, unless it is added to."""
        if self._running and self._thread != threading.get_ident():
            raise RuntimeError("attnstats.capture: two threads run the captured model at once; one after the other")
        self._ids = ids if self._live else None
        if not self._live:
            self._store = self._fresh()
        else:
            # Whether this pass goes on with the cache of the last one; None: there are none to compare.
            self._resumed = None if cache is None or self._cache is None else self._is_current(cache)
            self._follow(cache)
        self._complete = False
        self._calls, self._seen = set(), None
        self._running = True
        if not torch.compiler.is_compiling():
            self._thread = threading.get_ident()

    def attend(self, layer: int, call: Call) -> Tensor:
        """The model calls this for every layer, captured or not."""
        wanted = tuple(s for s in self.statistics if layer in self.heads[s])
        # Gradient checkpointing repeats layers in the backward pass, when another pass may be the most recent.
        if not wanted or not self._running:
            return call.attend().output
        if layer in self._calls:
            if self._seen is not None and self._seen[0] == layer and self._seen[1] is call.query:
                return call.attend().output  # the same map once more, with the other half of the values
            raise InputError(
                f"model: layer {layer} attends twice in one forward pass, to different things, so that it has no one "
                "map; capture other layers"
            )
        if isinstance(self._store, Generation):
            self._place(self._store, call)
        self._store.ranks = self._ranks(call)
        self._calls.add(layer)
        self._seen = layer, call.query
        heads = {s: chosen for s in wanted if (chosen := self._local(s, layer, call)) is not None}
        output = self._store.attend(layer, call, wanted, self._counting(call), heads).output
        if self._stop and layer == self._last_layer:
            raise StopForward(
                "stop_after_last_layer=True: the model has no output; call run.forward(**inputs), not model(**inputs)"
            )
        return output

    def end(self, cache: Any) -> None:
        """The model calls this when a forward pass is complete: results become readable."""
        expected = {layer for chosen in self.heads.values() for layer in chosen}
        if missing := sorted(expected - self._calls):
            raise RuntimeError(
                f"attnstats.capture: layers {missing} did not call attnstats in this forward pass; the model skipped "
                "them, has no attention there, or their attention was replaced inside the `with`"
            )
        self._store.finish()
        self._complete = True
        if self._live:
            self._follow(cache)
            if self._stopping:
                raise RuntimeError(
                    "on_token returned True, but the generation goes on; pass it stopping_criteria=[run.should_stop]"
                )
            if self._on_token is not None and self._on_token(self):
                self.stopped = self._stopping = True

    def leave(self) -> None:
        """The model calls this when a forward pass is over, also after an exception."""
        if torch.compiler.is_compiling() or self._thread == threading.get_ident():
            self._running, self._seen = False, None

    def select(self, cache: Any, change: Callable[[Tensor], Tensor]) -> None:
        """A cache tells that its batch rows were chosen anew."""
        if isinstance(self._store, Generation) and self._is_current(cache):
            self._store.select(change)

    def cut(self, cache: Any, length: int) -> None:
        """A cache tells that it dropped its last tokens."""
        if isinstance(self._store, Generation) and self._is_current(cache):
            if length == 0:
                self._store = self._fresh()
            else:
                self._store.cut(length)

    def let_go(self) -> None:
        """The `with` is over."""
        caches.release(self)
        if isinstance(self._store, Generation):
            self._store.forget()

    def _follow(self, cache: Any) -> None:
        if cache is not None:
            caches.follow(cache, self)
            self._cache = weakref.ref(cache)

    def _is_current(self, cache: Any) -> bool:
        return self._cache is not None and self._cache() is cache

    def _fresh(self) -> Pass | Generation:
        return (Generation if self._live else Pass)(self._reduce, self._device)

    def _place(self, store: Generation, call: Call) -> None:
        """Before the first layer of a step: where does it go on?"""
        if self._calls:
            return
        if call.begin == 0:
            self._store = self._fresh()
            self.stopped = self._stopping = False
        elif store.length and self._resumed is False:
            raise InputError(
                f"attnstats.capture(live=True): the model goes on at position {call.begin} with another cache than the "
                "one that was followed; a live capture is of one sequence at a time"
            )
        elif call.begin > store.length:
            raise InputError(
                f"attnstats.capture(live=True): the model goes on at position {call.begin}, but only the first "
                f"{store.length} tokens were seen; let the whole sequence run inside the `with`"
            )
        elif call.begin < store.length:
            store.cut(call.begin)
        if isinstance(self._store, Generation):
            self._store.note(call.begin, self._ids)

    def _counting(self, call: Call) -> Tensor | None:
        """(B, Tq) bool: which of the call's queries count, as the user said; None: all."""
        mask = self._query_mask
        if call.target is not None:
            mask = call.target if mask is None else mask.to(call.target.device) & call.target
        if mask is None:
            return None
        batch, length = call.query.shape[0], call.end - call.begin
        if not self._live and tuple(mask.shape) != (batch, length):
            raise InputError(
                f"query_mask must have shape {(batch, length)}, that of this pass's input_ids, got {tuple(mask.shape)}"
                "; while a model generates, live=True takes the prompt's"
            )
        if self._live:  # the mask is that of the prompt, and what comes after counts
            mask = torch.nn.functional.pad(mask, (0, max(0, call.end - mask.shape[1])), value=True)
            mask = mask[:, call.begin : call.end]
            if batch != len(mask) and batch % len(mask) == 0:
                mask = mask.repeat_interleave(batch // len(mask), dim=0)  # beams
        return mask.to(call.query.device)

    def _ranks(self, call: Call) -> Ranks | None:
        """Who has the other heads, where fewer arrive than the model has."""
        total, here = self._head_count, call.query.shape[1]
        if total is None or here == total or not torch.distributed.is_initialized():
            return None
        group = tensor_parallel_group(self._model)
        if group is None or torch.distributed.get_world_size(group) * here != total:
            return None
        return Ranks(group, here, self.heads)

    def _local(self, statistic: Statistic, layer: int, call: Call) -> tuple[int, ...] | None:
        """The chosen heads as they are numbered here; None: all that are here."""
        heads, count, ranks = self.heads[statistic][layer], call.query.shape[1], self._store.ranks
        if heads is not None and ranks is not None:  # of a rank that has none of them one is computed, and left out
            heads = tuple(local_heads(heads, count, group=ranks.group)) or (0,)
        if heads is None or heads == tuple(range(count)):
            return None
        if max(heads) >= count:
            raise InputError(f"heads: layer {layer} has query heads 0..{count - 1}, got {heads}")
        return heads

    def _statistic(self, key: Statistic | str) -> Statistic:
        self._require_complete()
        matches = [s for s in self.statistics if key in (s, s.name)]
        if len(matches) != 1:
            found = "ambiguous" if matches else "not among the statistics recorded"
            raise KeyError(f"{key!r} is {found}: {', '.join(map(str, matches or self.statistics))}")
        return matches[0]

    def _finite(self, statistic: Statistic) -> Tensor:
        """The result; NaN of a head is named and never averaged with other heads."""
        result = self._store.read(statistic)
        if not isinstance(statistic, (LSE, MaxLogit)) and not torch.compiler.is_compiling() and result.isnan().any():
            broken = self._store.broken(statistic, self.heads[statistic])
            named = ", ".join(f"layer {layer} heads {heads}" for layer, heads in broken.items())
            where = named or "heads of another rank"
            message = f"{statistic} is NaN in {where}: query or key hold NaN or infinities there"
            if self._reduce:
                raise ValueError(f"{message}; leave them out with `heads`, or capture without `reduce`")
            warnings.warn(message, RuntimeWarning, stacklevel=3)
        return result

    def _require_complete(self) -> None:
        if not self._complete:
            if self._calls or self._running:
                done = [layer for layer in self.layers if layer in self._calls]
                raise RuntimeError(
                    f"the last forward pass is incomplete, it recorded layers {done} of {list(self.layers)}: "
                    "it raised, or it is still running; run the model again inside the `with`"
                )
            raise RuntimeError("nothing was recorded: call model(**inputs) inside `with attnstats.capture(model, ...)`")


class Capturing(AbstractContextManager["Capture"]):
    """What `capture` returns: enter it once."""

    def __init__(self, opened: AbstractContextManager[Capture]):
        self._opened: AbstractContextManager[Capture] | None = opened
        self._inside: AbstractContextManager[Capture] | None = None

    def __enter__(self) -> Capture:
        if self._opened is None:
            raise RuntimeError("this capture was used already; call attnstats.capture(...) again for another `with`")
        self._inside, self._opened = self._opened, None
        return self._inside.__enter__()

    def __exit__(self, *error: Any) -> bool | None:
        assert self._inside is not None
        return self._inside.__exit__(*error)


def capture(
    model: Any,
    *,
    statistics: Iterable[Statistic | str],
    layers: Layers = "middle-third",
    heads: Heads | Mapping[Any, Heads] | None = None,
    reduce: Reduce | Iterable[Reduce] | None = None,
    query_mask: Tensor | None = None,
    attention: Kind = "self",
    live: bool = False,
    on_token: Callable[[Capture], bool | None] | None = None,
    device: torch.device | str | None = None,
    stop_after_last_layer: bool = False,
    allow_dense: bool = False,
    backend: Backend = "auto",
) -> Capturing:
    """Record statistics of a transformers model while it runs, without changing what it computes.

    Inside the `with` the model attends through `attnstats.attention`: its logits are those of its eager path, and
    `model.generate` works. The run holds the most recent forward pass; with `live=True` it holds all tokens since the
    sequence began, as one teacher-forced pass over them would. Afterwards, also after an exception, the model's own
    attention is back; with gradient checkpointing `backward` belongs inside the `with`.

    Causal, full, sliding-window and chunked attention, softcaps, sinks, left and right padding, packed rows, dynamic,
    static and sliding caches are covered. What is not is an error that names it, never a wrong result.

    Args:
        model: a loaded transformers model (`PreTrainedModel`).
        statistics: as for `attnstats.attention`.
        layers: "middle-third" (five evenly spaced, as in the paper), "all", a slice or layer numbers; negative ones
            count from the end. Layers without softmax attention (Mamba, linear attention) are left out.
        heads: which query heads: None, all; a list, these in every captured layer; `{layer: list}`, these in each
            captured layer; a bool tensor (captured layers, heads), such as the classes of `attnstats.heads`. Per
            statistic: `{"waad": <one of those>, "fai": <one of those>}`, where a statistic that isn't named has all.
            Without `reduce` every layer must choose equally many.
        reduce: "heads": a mean over the chosen heads of each layer; "layers": over layers, head by head; both,
            `("layers", "heads")`: one mean over all chosen (layer, head). Summed while the model runs.
        query_mask: (B, Tq) bool in the shape of the forward's input_ids: which queries count in column statistics (the
            response). Can be changed between forward passes: `run.query_mask = mask`. With `live` it is that of the
            prompt, and every later token counts.
        attention: "self", of the decoder or the only stack; "encoder" and "cross", of an encoder-decoder model.
            Cross-attention has no distances, so only statistics without them; the decoder's padding counts nowhere.
        live: keep statistics up to date while the model generates token by token, or in chunks.
        on_token: called with the run after every forward pass of a live capture. If it returns True the generation
            stops, given `model.generate(..., stopping_criteria=[run.should_stop])`.
        device: where results are kept, "cpu" say; default: where they are made.
        stop_after_last_layer: nothing after the last captured layer's attention is computed. The pass is run with
            `run.forward(**inputs)` and has no output.
        allow_dense: compute masks and position biases that have no description in O(T) memory on the whole map,
            eagerly and with a warning; without it they are an error.
        backend: as for `attnstats.attention`.

    Returns:
        What goes into a `with`, once, and gives a `Capture` there: `run["waad"]` (L, B, H, Tq), or (B, Tq) with both
        reduced; `run.valid["waad"]` (B, Tq). Column statistics have Tk for Tq: keys of the cache included, its unused
        slots not.

    Raises:
        TypeError, ValueError: naming the argument, what came and what would work; from the forward pass for what
            shows only there.

    Example:
        >>> import attnstats, torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(hidden_size=32, intermediate_size=32, num_attention_heads=4, num_hidden_layers=6)
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes)).eval()
        >>> with attnstats.capture(model, statistics=["waad", "fai"]) as run:
        ...     logits = model(torch.arange(12)[None]).logits
        >>> run.layers, run["waad"].shape
        ((2, 3, 4), torch.Size([3, 1, 4, 12]))
        >>> print(run.kept(batch=1, length=1000))
        WAAD(window=10): 0.05 MB
        FAI(lo=10, hi=100): 0.05 MB
        kept in all: 0.10 MB

    Source: Li et al., arXiv 2510.13554v2, Sec. 4.1: heads by class, means over them (Eq. 8).
    """
    base_model(model)
    wanted = resolve(statistics)
    reduced = _reduce(reduce)
    _check_settings(wanted, attention, live, on_token, stop_after_last_layer)
    attachment = attachment_of(model)
    found = (sites(model) if attachment is None else attachment.sites).get(attention, {})
    if not found:
        raise InputError(f"attention={attention!r}: {type(model).__name__} has no such attention that can be replaced")
    chosen_layers = resolve_layers(layers, tuple(found))
    chosen_heads = resolve_heads(heads, wanted, chosen_layers, _head_count(model, attention))
    check_heads(chosen_heads, chosen_layers, reduced)
    on = None if device is None else torch.device(device)
    run = Capture(
        model, attention, wanted, chosen_layers, chosen_heads, reduced, live, on_token, on, stop_after_last_layer
    )
    run.query_mask = query_mask
    return Capturing(_observing(model, run, backend, allow_dense))


@contextmanager
def _observing(model: Any, run: Capture, backend: Backend, allow_dense: bool) -> Iterator[Capture]:
    with observed(model, run, backend, allow_dense):
        try:
            yield run
        finally:
            run.let_go()


def _reduce(reduce: Reduce | Iterable[Reduce] | None) -> tuple[Reduce, ...]:
    chosen: Any = (reduce,) if isinstance(reduce, str) else () if reduce is None else reduce
    if not isinstance(chosen, Iterable) or not set(chosen := tuple(chosen)) <= {"heads", "layers"}:
        raise ValueError(f"reduce must be None, 'heads', 'layers' or both, ('layers', 'heads'); got {reduce!r}")
    return tuple(name for name in ("layers", "heads") if name in chosen)


def _check_settings(
    statistics: tuple[Statistic, ...], attention: str, live: bool, on_token: Any, stop_after_last_layer: bool
) -> None:
    if not statistics:
        raise ValueError("statistics is empty; name what to record, such as ['waad', 'fai']")
    if attention not in ("self", "encoder", "cross"):
        raise ValueError(f"attention must be 'self', 'encoder' or 'cross', got {attention!r}")
    if attention == "cross":
        for s in (s for s in statistics if s.uses_distance):
            raise ValueError(f"statistics: {s} needs distances, and cross-attention has none")
    if on_token is not None and not live:
        raise ValueError("on_token needs live=True")
    if live:
        if attention != "self" or stop_after_last_layer:
            raise ValueError("live=True needs attention='self' and stop_after_last_layer=False")
        for s in statistics:
            if not grows(s):
                raise ValueError(f"statistics: {s} depends on where the sequence ends, so it cannot be kept live")


def _head_count(model: Any, kind: Kind) -> int | None:
    """Query heads of a layer; None: unknown, or not the same in every layer."""
    config = model.config.get_text_config()
    try:
        count = getattr(config, "num_attention_heads", None)
        if getattr(config, "is_encoder_decoder", False):
            count = getattr(config, f"{'encoder' if kind == 'encoder' else 'decoder'}_attention_heads", count)
    except Exception:  # configs that differ by layer raise an error of their own
        return None
    return count if isinstance(count, int) else None
