"""`capture`: recording the attention statistics of a running transformers model.

The settings are checked here, before anything runs. The run itself is in run.py, layers and heads are chosen in
selection.py, the model is attached in attach.py. Which heads are local or global is for the caller to say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from attnstats.errors import InputError
from attnstats.functional import Backend
from attnstats.statistics import Statistic, resolve
from attnstats.transformers.attach import attachment_of, observed
from attnstats.transformers.passes import OutsideGraphs
from attnstats.transformers.run import Capture
from attnstats.transformers.selection import (
    HeadSelection,
    Layers,
    Reduce,
    check_heads,
    resolve_heads,
    resolve_layers,
    resolve_reduce,
)
from attnstats.transformers.sites import AttentionKind, attention_modules, head_count, transformers_model
from attnstats.wrappers import refuse_replicas


class Capturing(AbstractContextManager["Capture"]):
    """The context manager that `capture` returns; it can be entered once."""

    def __init__(self, context: AbstractContextManager[Capture]):
        self._unused: AbstractContextManager[Capture] | None = context
        self._entered: AbstractContextManager[Capture] | None = None

    def __enter__(self) -> Capture:
        if self._unused is None:
            raise RuntimeError("this capture was used already; call attnstats.capture(...) again for another `with`")
        self._entered, self._unused = self._unused, None
        return self._entered.__enter__()

    def __exit__(self, *error: Any) -> bool | None:
        assert self._entered is not None
        return self._entered.__exit__(*error)


def capture(
    model: Any,
    *,
    statistics: Iterable[Statistic | str],
    layers: Layers = "middle-third",
    heads: HeadSelection | Mapping[Any, HeadSelection] | None = None,
    reduce: Reduce | Iterable[Reduce] | None = None,
    query_mask: Tensor | None = None,
    query_weight: Tensor | None = None,
    segment_boundaries: Tensor | None = None,
    attention: AttentionKind = "self",
    live: bool = False,
    on_token: Callable[[Capture], bool | None] | None = None,
    device: torch.device | str | None = None,
    stop_after_last_layer: bool = False,
    allow_dense: bool = False,
    backend: Backend = "auto",
) -> Capturing:
    """Record statistics of a transformers model while it runs, without changing what it computes.

    Inside the `with` captured layers attend through `attnstats.attention`, and all others as before: logits are those
    of the model's eager path, and `model.generate` works. The run holds the most recent forward pass; with `live=True`
    it holds all tokens since the sequence began, as one teacher-forced pass over them would; keys that were cached
    before have columns alone. Afterwards, also after an exception, the model's own attention is back; with gradient
    checkpointing `backward` belongs inside the `with`.

    Causal, full, sliding-window and chunked attention, softcaps, sinks, left and right padding, packed rows, dynamic,
    static, sliding, hybrid, offloaded and quantized caches are covered. Distances are those of the position_ids that
    the model is given. A cache that disagrees with them has lost keys: which ones it holds is for the caller to say, by
    `run.key_positions`. Anything else is an error that names it, never a wrong result.

    Args:
        model: a loaded transformers model (`PreTrainedModel`), or what wraps one: torch.compile, DDP, FSDP,
            DataParallel of one device, a PeftModel whose adapter changes weights only. Inside the `with` call either.
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
        query_weight: (B, Tq) float, how much each query counts there, as for `attnstats.attention`; can be changed
            between forward passes, too. With `live` it is that of the prompt, and every later token has 1.
        segment_boundaries: (B, S + 1) int, those of `SegmentMass()` for each batch row; can be changed, too.
        attention: "self", of the decoder or the only stack; "encoder" and "cross", of an encoder-decoder model.
            Cross-attention has no distances, so it takes only statistics without them; padding of the decoder never
            counts.
        live: keep statistics up to date while the model generates token by token, or in chunks.
        on_token: called with the run after every forward pass of a live capture. If it returns True the generation
            stops, given `model.generate(..., stopping_criteria=[run.should_stop])`.
        device: where results are kept, such as "cpu"; default: where they are computed.
        stop_after_last_layer: nothing after the last captured layer's attention is computed. The pass is run with
            `run.forward(**inputs)` and has no output. A model whose parameters are sharded (FSDP) runs to its end.
        allow_dense: compute masks and position biases of captured layers that have no description in O(T) memory on the
            whole map, eagerly and with a warning; without it they are an error.
        backend: as for `attnstats.attention`, of captured layers. The others call the model's own attention.

    Returns:
        A context manager, to be entered once, that gives a `Capture`: `run["waad"]` (L, B, H, Tq), or (B, Tq) with both
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
    refuse_replicas(model)
    wrapped, model = model, transformers_model(model)
    statistics = resolve(statistics)
    over = resolve_reduce(reduce)
    _check_settings(statistics, attention, live, on_token, stop_after_last_layer)
    for s in (s for s in statistics if over and not s.averages):
        raise ValueError(f"reduce={reduce!r}: {s} names keys, of which there is no mean; capture it without reduce")
    attachment = attachment_of(model)
    modules = (attention_modules(model) if attachment is None else attachment.modules).get(attention, {})
    if not modules:
        raise InputError(f"attention={attention!r}: {type(model).__name__} has no such attention that can be replaced")
    chosen_layers = resolve_layers(layers, tuple(modules))
    chosen_heads = resolve_heads(heads, statistics, chosen_layers, head_count(model, attention))
    check_heads(chosen_heads, chosen_layers, over)
    on = None if device is None else torch.device(device)
    run = Capture(
        wrapped, attention, statistics, chosen_layers, chosen_heads, over, live, on_token, on, stop_after_last_layer
    )
    run.query_mask = query_mask
    run.query_weight = query_weight
    run.segment_boundaries = segment_boundaries
    return Capturing(_observing(model, run, live, backend, allow_dense))


@contextmanager
def _observing(model: Any, run: Capture, live: bool, backend: Backend, allow_dense: bool) -> Iterator[Capture]:
    with observed(model, OutsideGraphs(run) if live else run, run.layers, backend, allow_dense):
        try:
            yield run
        finally:
            run.release()


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
            if not s.grows:
                raise ValueError(f"statistics: {s} depends on where the sequence ends, so it cannot be kept live")
