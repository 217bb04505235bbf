"""How a transformers model is made to attend through attnstats: `attach`, `detach`, and who watches it.

One attention function and one mask function (masks.py) are registered with transformers under the name "attnstats";
no model class is touched. While a model is attached each of its attention modules carries a `Site`, by which the
attention function knows where it was called from. What happens to a call beyond attending is up to the `Observer`;
capture.py has it. transformers is imported on first use. Nothing here knows what a statistic is.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol
from weakref import WeakSet

import torch
from torch import Tensor, nn

from attnstats.core.geometry import as_autocast
from attnstats.errors import InputError
from attnstats.functional import Backend
from attnstats.transformers.calls import Call
from attnstats.transformers.masks import MaskDescription, describe_mask, recognise, unannounced

# transformers blocks names that contain sdpa, flash, flex or eager for models that lack the matching flag.
NAME = "attnstats"
SITE = "_attnstats_site"  # the attribute of an attention module that holds its Site

Kind = Literal["self", "cross", "encoder"]

ATTENTION = re.compile(r"attention|attn", re.IGNORECASE)
CROSS = re.compile(r"cross|encoder_attn|encdecattention|encoder_attention", re.IGNORECASE)
BLOCK = re.compile(r"(Layer|Block)$")
# Of the types in a config's layer_types: attention with a softmax.
SOFTMAX_LAYER = re.compile(r"^(?!.*(linear|lightning)).*attention", re.IGNORECASE)

# What models and users hand through to an attention function and that says nothing, or what the mask says too.
HARMLESS = frozenset({
    "attention_mask", "cache_position", "cu_seq_lens_k", "cu_seq_lens_q", "labels", "max_length_k", "max_length_q",
    "num_items_in_batch", "position_ids", "token_type_ids",
})  # fmt: skip

NO_MAPS = (
    "model: output_attentions=True asks for the maps that attnstats is there to avoid; ask attnstats.capture for "
    "statistics of them (PooledMap is a picture of the map), or detach the model and use attn_implementation='eager'"
)
HOW_TO = (
    "its eager attention with output_attentions=True still gives its maps, and attnstats.statistics_from_lse takes the "
    "query, key and lse of any attention of your own"
)


class Observer(Protocol):
    """Sees every forward pass of an attached model, and every attention call within."""

    kind: Kind  # which of the model's attention it looks at

    def begin(self, ids: Tensor | None, cache: Any) -> None:
        """A forward pass starts, with these input_ids and this cache, where it has them."""

    def attend(self, layer: int, call: Call) -> Tensor:
        """The output of a call of its kind."""

    def end(self, cache: Any) -> None:
        """The forward pass came to its end; not called after an exception."""

    def leave(self) -> None:
        """The forward pass is over, also after an exception."""


@dataclass(eq=False)
class Attachment:
    """One model that attends through attnstats.

    Attributes:
        sites: by kind and layer, the modules that may attend there.
        implementations: what each config said before.
        target: (B, Tq) bool, which tokens of a decoder are real: its cross-attention isn't told.
    """

    backend: Backend
    allow_dense: bool
    sites: dict[Kind, dict[int, list[nn.Module]]] = field(default_factory=dict)
    implementations: list[tuple[Any, str]] = field(default_factory=list)
    observer: Observer | None = None
    target: Tensor | None = None


_ATTACHMENTS: WeakSet[Attachment] = WeakSet()


@dataclass(eq=False)
class Site:
    """Where an attention module stands in its model."""

    attachment: Attachment
    kind: Kind
    layer: int

    def __deepcopy__(self, _: Any) -> None:
        """A copy of the model attends like its original, and nobody watches it."""

    def __reduce__(self) -> Any:
        return type(None), ()


def attach(model: Any, *, backend: Backend = "auto", allow_dense: bool = False) -> Any:
    """Let a transformers model attend through attnstats, until `detach`. A second time changes the two settings.

    Logits and gradients are those of the model's SDPA or eager path. `attnstats.capture` attaches for its duration by
    itself; this is for models that are trained, compiled or served so for longer.

    Args:
        model: a loaded model (`PreTrainedModel`).
        backend: as for `attnstats.attention`.
        allow_dense: compute masks and position biases that have no description in O(T) memory on the whole map,
            eagerly and with a warning; without it they are an error.

    Returns:
        The model.

    Raises:
        TypeError: model isn't a transformers model.
        ValueError: its attention can't be replaced; the message says why.
    """
    attachment = attachment_of(model)
    if attachment is None:
        _attach(model, backend, allow_dense)
    else:
        attachment.backend, attachment.allow_dense = backend, allow_dense
    return model


def detach(model: Any) -> Any:
    """Undo `attach`; a model that isn't attached is left as it is. Returns the model."""
    attachment = attachment_of(model)
    if attachment is not None:
        if attachment.observer is not None:
            raise InputError("model: it is being captured; leave the `with attnstats.capture(...)` before detaching")
        _release(attachment)
    elif any(config._attn_implementation == NAME for config in _configs(model)):  # a copy of an attached model
        try:
            model.set_attn_implementation("sdpa")
        except ValueError:
            model.set_attn_implementation("eager")
    return model


@contextmanager
def observed(model: Any, observer: Observer, backend: Backend, allow_dense: bool) -> Iterator[None]:
    """Let `observer` see the attached model's calls, attaching it for the duration if it isn't.

    Raises:
        TypeError, ValueError: as `attach`; the model is observed already.
    """
    attachment = attachment_of(model)
    if attachment is not None and attachment.observer is not None:
        raise InputError(
            f"model: this {type(model).__name__}, or one that it is part of, is being captured already; one at a time"
        )
    ours = attachment is None
    if attachment is None:
        attachment = _attach(model, backend, allow_dense)
    before = attachment.backend, attachment.allow_dense
    attachment.backend, attachment.allow_dense = backend, allow_dense or attachment.allow_dense
    handles: list[Any] = []
    try:
        handles += _Passes(_stacks(model, observer.kind), observer).hook()
        attachment.observer = observer
        yield
    finally:
        attachment.observer = None
        attachment.backend, attachment.allow_dense = before
        for handle in handles:
            handle.remove()
        if ours:
            _release(attachment)


class _Passes:
    """Tells the observer of forward passes: of whichever of some nested modules is called first.

    Models whose head calls the decoder past their own body, users who call the body without its head.

    Attributes:
        stacks: the outer before the inner.
        outermost: of each thread, the one whose forward pass is running.
    """

    def __init__(self, stacks: list[nn.Module], observer: Observer | None):
        self.stacks = stacks
        self.observer = observer
        self.outermost: dict[int, nn.Module | None] = {}

    def hook(self) -> list[Any]:
        handles = []
        for stack in self.stacks:
            handles += [
                stack.register_forward_pre_hook(self._begin, with_kwargs=True),
                stack.register_forward_hook(self._end),
                stack.register_forward_hook(self._leave, always_call=True),
            ]
        return handles

    def __deepcopy__(self, _: Any) -> _Passes:
        """A copy of the model has copies of these hooks, and nobody watches it."""
        return _Passes([], None)

    def __reduce__(self) -> Any:
        return _Passes, ([], None)

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.observer is None or not self._is_outer(module):
            return
        self.outermost[_thread()] = module
        asked = kwargs.get("output_attentions")
        if asked or (asked is None and getattr(module.config, "output_attentions", False)):
            raise InputError(NO_MAPS)
        ids = kwargs.get("input_ids", args[0] if args else None)
        if getattr(module.config, "is_encoder_decoder", False):
            ids = kwargs.get("decoder_input_ids")
        self.observer.begin(ids if isinstance(ids, Tensor) and ids.dim() == 2 else None, _cache(kwargs))

    def _end(self, module: nn.Module, _: Any, output: Any) -> None:
        if self.observer is not None and self.outermost.get(_thread()) is module:
            self.observer.end(_cache(output))

    def _leave(self, module: nn.Module, *_: Any) -> None:
        if self.observer is not None and self.outermost.get(_thread()) is module:
            self.outermost[_thread()] = None
            self.observer.leave()

    def _is_outer(self, module: nn.Module) -> bool:
        """Whether no stack around this one is running. One that left with a KeyboardInterrupt is not told of, so a
        module that begins while it is said to be running, or outside of what is, begins anew."""
        running = self.outermost.get(_thread())
        for stack in self.stacks:
            if stack is module:
                return True
            if stack is running:
                return False
        return False


def _thread() -> int:
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


def attachment_of(model: Any) -> Attachment | None:
    """The attachment that the model, or one that it is part of, has. Raises TypeError for what is no model."""
    base_model(model)
    for module in model.modules():
        site = module.__dict__.get(SITE)
        if site is not None:
            return site.attachment
    return None


def _attach(model: Any, backend: Backend, allow_dense: bool) -> Attachment:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, describe_mask)
    attachment = Attachment(backend, allow_dense)
    attachment.implementations = [(config, config._attn_implementation) for config in _configs(model)]
    kind = type(model).__name__
    shared = [config for other in _ATTACHMENTS for config, _ in other.implementations]
    if any(config is other for config, _ in attachment.implementations for other in shared):
        raise InputError(f"model: this {kind} shares its config with a model that is attached already; one at a time")
    try:
        try:
            model.set_attn_implementation(NAME)
        except ValueError as error:
            raise InputError(f"model: the attention of {kind} cannot be replaced: {error}; {HOW_TO}") from error
        attachment.sites = sites(model)
        if model.config.get_text_config()._attn_implementation != NAME or not attachment.sites:
            raise InputError(
                f"model: {kind} does not call its attention through transformers' AttentionInterface, so its place "
                f"cannot be taken; {HOW_TO}"
            )
        for of_kind, layers in attachment.sites.items():
            for layer, modules in layers.items():
                for module in modules:
                    module.__dict__[SITE] = Site(attachment, of_kind, layer)
    except BaseException:
        _release(attachment)
        raise
    _ATTACHMENTS.add(attachment)
    return attachment


def _release(attachment: Attachment) -> None:
    _ATTACHMENTS.discard(attachment)
    for layers in attachment.sites.values():
        for modules in layers.values():
            for module in modules:
                module.__dict__.pop(SITE, None)
    for config, implementation in attachment.implementations:
        # The public property would set the sub-configs as well, whose implementations may differ.
        config._attn_implementation_internal = implementation


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: MaskDescription | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function registered with transformers: (B, H, T, D) in, (B, Tq, Hq, Dv) out.

    Of the other keyword arguments sliding_window is ignored: some models pass another one than their mask has, and the
    mask is what their eager attention follows.
    """
    site: Site | None = module.__dict__.get(SITE)
    layer = getattr(module, "layer_idx", None) if site is None else site.layer
    where = f"attnstats: {type(module).__name__} of layer {layer}"
    across = site is not None and site.kind == "cross"
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    if attention_mask is None:
        mask = unannounced(query.shape[2], key.shape[2], causal, across)
    elif isinstance(attention_mask, MaskDescription):
        mask = attention_mask
    else:
        announced = f"{tuple(attention_mask.shape)} that was passed as a tensor"
        mask = recognise(attention_mask, query.shape[2], key.shape[2], announced, causal and not across)
    _refuse(where, mask, kwargs)
    query, key, value = as_autocast(query, key, value)
    observer = None if site is None else site.attachment.observer
    if site is not None and observer is not None and observer.kind == "cross" and site.kind == "self":
        site.attachment.target = mask.real_queries
    call = Call(
        where,
        query,
        key,
        value,
        mask,
        across,
        {"scale": scaling, "softcap": softcap, "sinks": s_aux},
        position_bias,
        "auto" if site is None else site.attachment.backend,
        site is not None and site.attachment.allow_dense,
        site.attachment.target if site is not None and across else None,
        dropout,
    )
    if site is not None and observer is not None and observer.kind == site.kind:
        output = observer.attend(site.layer, call)
    else:
        output = call.attend().output
    return output.transpose(1, 2).contiguous(), None


def _refuse(where: str, mask: MaskDescription, kwargs: dict[str, Any]) -> None:
    """Raise InputError for what a model hands to its attention function and would be answered wrongly."""
    if kwargs.get("output_attentions"):
        raise InputError(NO_MAPS)
    for name, given in kwargs.items():
        if isinstance(given, (Tensor, float)) and name not in HARMLESS:
            raise InputError(
                f"{where} passes {name}, which changes its attention in a way that attnstats does not know; detach the "
                "model and use attn_implementation='eager'"
            )
    if type(kwargs.get("cache")).__name__ == "PagedAttentionCache":
        raise InputError(f"{where} attends to a paged cache (continuous batching), which cannot be read; use generate")
    packed = kwargs.get("cu_seq_lens_q")
    if packed is not None and mask.segments is None and len(packed) > 2:
        raise InputError(
            f"{where} got cu_seq_lens_q of packed sequences, but a mask that lets them see each other: pass their "
            "position_ids, no attention_mask and use_cache=False"
        )


# What a model is made of


def base_model(model: Any) -> nn.Module:
    """The body of a transformers model, without its head. Raises TypeError for anything else."""
    try:
        from transformers import PreTrainedModel
    except ImportError as error:
        raise ImportError("attnstats.capture needs transformers: pip install 'attnstats[transformers]'") from error
    if not isinstance(model, PreTrainedModel):
        inside = "; pass the model that it wraps" if isinstance(model, nn.Module) else ""
        raise TypeError(
            f"model must be a loaded transformers model (PreTrainedModel), got {type(model).__name__}{inside}"
        )
    return model.base_model


def sites(model: Any) -> dict[Kind, dict[int, list[nn.Module]]]:
    """The modules that may attend, by kind and layer: of the text model alone, where there are others."""
    config = model.config
    text = config.get_text_config()
    inside_encoder: set[int] = set()
    if getattr(config, "is_encoder_decoder", False):
        inside_encoder = {id(module) for module in _encoder(model).modules()}
    softmax = _softmax_layers(text)
    found: dict[Kind, dict[int, list[nn.Module]]] = {}
    candidates: list[tuple[Kind, int, bool, str, nn.Module]] = []
    for name, module, owner in _with_owners(model, "", model):
        layer, own = getattr(module, "layer_idx", None), True
        named = ATTENTION.search(".".join(name.split(".")[-2:])) and isinstance(layer, int)
        if not (named or ATTENTION.search(type(module).__name__)) or (text is not config and owner.config is not text):
            continue
        if not isinstance(layer, int) or layer < 0:
            layer, own = next((int(part) for part in name.split(".") if part.isdigit()), -1), False
        kind: Kind = "self"
        if id(module) in inside_encoder:
            kind = "encoder"
        elif CROSS.search(name.rpartition(".layers.")[2]) or getattr(module, "is_cross_attention", False):
            kind = "cross"
        if layer >= 0 and (kind != "self" or softmax is None or layer in softmax):
            candidates.append((kind, layer, own, name, module))
    numbered = {kind for kind, _, own, *_ in candidates if own}
    # Where modules know their layer, those that don't are something else; and a decoder layer is not its attention. Of
    # others, one within the other, either may be the one that attends.
    candidates = [candidate for candidate in candidates if candidate[2] or candidate[0] not in numbered]
    names = [name for *_, name, _ in candidates]
    for kind, layer, own, name, module in candidates:
        holds_another = any(other.startswith(f"{name}.") for other in names)
        if not holds_another or (own and not BLOCK.search(type(module).__name__)):
            found.setdefault(kind, {}).setdefault(layer, []).append(module)
    return {kind: dict(sorted(layers.items())) for kind, layers in found.items()}


def _with_owners(module: nn.Module, name: str, owner: Any) -> Iterator[tuple[str, nn.Module, Any]]:
    """Every module once, with its name and the PreTrainedModel that it is part of."""
    pending, seen = [(name, module, owner)], set()
    while pending:
        name, module, owner = pending.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        if hasattr(module, "set_attn_implementation"):
            owner = module
        yield name, module, owner
        pending += [(f"{name}.{part}" if name else part, child, owner) for part, child in module.named_children()]


def _softmax_layers(config: Any) -> set[int] | None:
    """The layers that have softmax attention, of a model that has others; None: all."""
    types = getattr(config, "layer_types", None)
    if not types:
        return None
    return {layer for layer, kind in enumerate(types) if SOFTMAX_LAYER.search(kind) or "hybrid" in kind}


def _stacks(model: Any, kind: Kind) -> list[nn.Module]:
    """The modules whose forward pass is one pass of this kind of attention, whichever is called."""
    if kind == "encoder":
        return [_encoder(model)]
    found = [model, model.base_model]
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    if isinstance(decoder, nn.Module):
        found.append(decoder)
    return [module for i, module in enumerate(found) if not any(module is other for other in found[:i])]


def _encoder(model: Any) -> nn.Module:
    encoder: Callable[[], nn.Module] = model.get_encoder
    return encoder()


def _configs(model: Any) -> list[Any]:
    """Every config object whose attention implementation `set_attn_implementation` may change, each once."""
    found: dict[int, Any] = {}
    pending = [module.config for module in model.modules() if hasattr(module, "set_attn_implementation")]
    while pending:
        config = pending.pop()
        if id(config) not in found:
            found[id(config)] = config
            pending += [c for key in config.sub_configs if (c := getattr(config, key, None)) is not None]
    return list(found.values())


def _cache(fields: Any) -> Any:
    """The cache among a forward pass's arguments or in its output; transformers has renamed it.

    An output warns whoever asks for the old name, so what it has is looked up as in any dict.
    """
    for name in ("cache", "past_key_values"):
        cache = dict.get(fields, name) if isinstance(fields, dict) else getattr(fields, name, None)
        if cache is not None:
            return cache
    return None
