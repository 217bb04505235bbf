"""`attach` and `detach`: a transformers model attends through attnstats.

One attention function and one mask function (masks.py) are registered with transformers under the name "attnstats";
no model class is touched. `attach` puts that name into the model's config, a capture into what captured modules see of
it (uncaptured.py). Meanwhile each attention module carries a `Site`, by which the attention function knows its layer,
and an `Observer` may see every call. Nothing here depends on statistics. transformers is imported on first use.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from attnstats.core.geometry import as_autocast
from attnstats.core.options import Options
from attnstats.distributed import sequence_parallelism
from attnstats.errors import InputError
from attnstats.functional import Backend
from attnstats.tensors import check_plain
from attnstats.transformers.calls import AttentionCall
from attnstats.transformers.exchange import current_exchange
from attnstats.transformers.masks import (
    MaskDescription,
    describe_mask,
    describe_no_mask,
    describe_tensor,
    is_recorded_as_torch,
)
from attnstats.transformers.passes import NO_MAPS, ForwardPasses, Observer
from attnstats.transformers.sites import AttentionKind, attention_modules, configs, stacks, transformers_model
from attnstats.transformers.uncaptured import keep_others, own_masks

# transformers blocks names that contain sdpa, flash, flex or eager for models that lack the matching flag.
NAME = "attnstats"
SITE = "_attnstats_site"  # the attribute of an attention module that holds its Site

# Keyword arguments of an attention function that do not change attention, or only repeat what the mask says.
HARMLESS = frozenset({
    "attention_mask", "cache_position", "cu_seq_lens_k", "cu_seq_lens_q", "labels", "max_length_k", "max_length_q",
    "num_items_in_batch", "position_ids", "token_type_ids",
})  # fmt: skip

# A model's own attention by transformers' name, and the provider of the backend "flash" that is the same kernel.
KERNELS = {f"flash_attention_{n}": f"FlashAttention {n}" for n in (2, 3, 4)}

HOW_TO = (
    "its eager attention with output_attentions=True still gives its maps, and attnstats.statistics_from_lse takes the "
    "query, key and lse of any attention of your own"
)


@dataclass(eq=False)
class Attachment:
    """One model that attends through attnstats.

    Attributes:
        modules: by kind and layer, the modules that may attend there.
        implementations: each config with the attention implementation that it named before.
        prefers: the provider of the backend "flash" that is the model's own kernel; "": none is.
        undo: undoes what was changed so that some layers alone attend through attnstats.
    """

    backend: Backend
    allow_dense: bool
    modules: dict[AttentionKind, dict[int, list[nn.Module]]] = field(default_factory=dict)
    implementations: list[tuple[Any, str]] = field(default_factory=list)
    prefers: str = ""
    undo: ExitStack = field(default_factory=ExitStack)
    observer: Observer | None = None


_ATTACHMENTS: WeakSet[Attachment] = WeakSet()
_LOCK = threading.RLock()  # held while models are attached or detached; the garbage collector may end a capture then


class AttachedName(str):
    """NAME in the config of an attached model; a copied or pickled config has the implementation from before."""

    __slots__ = ("before",)
    before: str | None

    def __new__(cls, before: str | None) -> AttachedName:
        name = super().__new__(cls, NAME)
        name.before = before
        return name

    def __reduce__(self) -> Any:
        return copy.copy, (self.before,)  # a function that every process has

    def __deepcopy__(self, memo: Any) -> str | None:  # dynamo, in whose graph bart copies its config, calls this alone
        return self.before


@dataclass(eq=False)
class Site:
    """The place of an attention module in its model. A copied or pickled model has none: it isn't attached."""

    attachment: Attachment
    kind: AttentionKind
    layer: int

    def __reduce__(self) -> Any:
        return type(None), ()


def attach(model: Any, *, backend: Backend = "auto", allow_dense: bool = False) -> Any:
    """Let every layer of a transformers model attend through attnstats, until `detach`.

    A second time changes the two settings. Logits and gradients are those of the model's SDPA or eager path.
    `attnstats.capture` attaches the captured layers for its duration by itself; this is for models that are trained,
    compiled or served so for longer.

    Args:
        model: a loaded model (`PreTrainedModel`), wrapped or not, as for `attnstats.capture`.
        backend: as for `attnstats.attention`.
        allow_dense: as for `attnstats.capture`.

    A copy of the model, and what is loaded from a pickle of it, is not attached and has its own attention.

    Returns:
        The model, as it was passed.

    Raises:
        TypeError: model isn't a transformers model.
        ValueError: its attention can't be replaced; the message says why.
    """
    with _LOCK:
        attachment = attachment_of(model)
        if attachment is None:
            _attach(transformers_model(model), backend, allow_dense)
        else:
            attachment.backend, attachment.allow_dense = backend, allow_dense
    return model


def detach(model: Any) -> Any:
    """Undo `attach`; a model that isn't attached is left as it is. Returns the model."""
    with _LOCK:
        attachment = attachment_of(model)
        if attachment is not None:
            if attachment.observer is not None:
                raise InputError(
                    "model: it is being captured; leave the `with attnstats.capture(...)` before detaching"
                )
            _release(attachment)
    return model


@contextmanager
def observed(
    model: Any, observer: Observer, layers: tuple[int, ...], backend: Backend, allow_dense: bool
) -> Iterator[None]:
    """Let `observer` see the model's calls; if it isn't attached, these layers are for the duration.

    Raises:
        TypeError, ValueError: as `attach`; the model is observed already.
    """
    with _LOCK:
        attachment = attachment_of(model)
        if attachment is not None and attachment.observer is not None:
            raise InputError(
                f"model: this {type(model).__name__}, or one that it is part of, is being captured already; one at a "
                "time"
            )
        attached_here = attachment is None
        if attachment is None:
            attachment = _attach(model, backend, allow_dense, (observer.kind, layers))
        before = attachment.backend, attachment.allow_dense
        attachment.backend, attachment.allow_dense = backend, allow_dense or attachment.allow_dense
        attachment.observer = observer
    handles: list[Any] = []
    try:
        handles += ForwardPasses(stacks(model, observer.kind), observer).hook()
        yield
    finally:
        with _LOCK:
            attachment.observer = None
            attachment.backend, attachment.allow_dense = before
            for handle in handles:
                handle.remove()
            if attached_here:
                _release(attachment)


def attachment_of(model: Any) -> Attachment | None:
    """The attachment of the model, or of one that it is part of. Raises TypeError for what is no model."""
    for module in transformers_model(model).modules():
        site = module.__dict__.get(SITE)
        if site is not None:
            return site.attachment
    return None


def _attach(
    model: Any, backend: Backend, allow_dense: bool, some: tuple[AttentionKind, tuple[int, ...]] | None = None
) -> Attachment:
    """Attach the model; `some`: layers of one kind alone, and the others keep their attention."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, describe_mask)
    attachment = Attachment(backend, allow_dense)
    attachment.implementations = [(config, config._attn_implementation) for config in configs(model)]
    attachment.prefers = KERNELS.get(str(model.config.get_text_config()._attn_implementation), "")
    name = type(model).__name__
    shared = [config for other in _ATTACHMENTS for config, _ in other.implementations]
    if any(config is other for config, _ in attachment.implementations for other in shared):
        raise InputError(f"model: this {name} shares its config with a model that is attached already; one at a time")
    try:
        try:
            model.set_attn_implementation(NAME)
        except ValueError as error:
            raise InputError(f"model: the attention of {name} cannot be replaced: {error}; {HOW_TO}") from error
        attachment.modules = attention_modules(model)
        if model.config.get_text_config()._attn_implementation != NAME or not attachment.modules:
            raise InputError(
                f"model: {name} does not call its attention through transformers' AttentionInterface, so its place "
                f"cannot be taken; {HOW_TO}"
            )
        for kind, layers in attachment.modules.items():
            for layer, modules in layers.items():
                for module in modules:
                    if not hasattr(module.__dict__.get("config", model.config), "_attn_implementation"):
                        raise InputError(
                            f"model: {type(module).__name__} of another library took the place of an attention of "
                            f"{name}; load the model anew, or give query and key off its hooks to attnstats.attention"
                        )
                    module.__dict__[SITE] = Site(attachment, kind, layer)
        if some is None:
            for config, before in attachment.implementations:
                if config._attn_implementation == NAME:
                    config._attn_implementation_internal = AttachedName(before)
        else:
            _restore_implementations(attachment)
            of_kind = attachment.modules[some[0]]
            captured = [module for layer in some[1] for module in of_kind[layer]]
            keep_others(attachment.undo, model, captured, NAME, _before_uncaptured)
    except BaseException:
        _release(attachment)
        raise
    _ATTACHMENTS.add(attachment)
    return attachment


def _release(attachment: Attachment) -> None:
    _ATTACHMENTS.discard(attachment)
    for layers in attachment.modules.values():
        for modules in layers.values():
            for module in modules:
                module.__dict__.pop(SITE, None)
    attachment.undo.close()
    _restore_implementations(attachment)


def _restore_implementations(attachment: Attachment) -> None:
    for config, implementation in attachment.implementations:
        # The public property would set the sub-configs as well, whose implementations may differ.
        config._attn_implementation_internal = implementation


def _before_uncaptured(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """A pre-hook: the module gets the masks that its own attention function takes, and the observer hears of it."""
    site: Site | None = module.__dict__.get(SITE)
    if site is not None and site.attachment.observer is not None:
        observer = site.attachment.observer
        _check_whole_sequences(_where(module, site))
        if site.kind == observer.kind and not torch.compiler.is_compiling():
            observer.pass_by()
        if site.kind == "self" and observer.kind == "cross":
            observer.real_queries = _real_queries(args, kwargs)
    return own_masks(args), own_masks(kwargs)


def _real_queries(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The tokens of a decoder that aren't padding, as the mask of its self-attention has them."""
    for name, mask in [*enumerate(args), *kwargs.items()]:
        if isinstance(mask, MaskDescription):
            return mask.placed().real_queries
        if isinstance(mask, Tensor) and mask.dim() == 4 and "mask" in str(name):  # one that the user made
            return describe_tensor(mask, mask.shape[2], mask.shape[3], is_causal=True).real_queries
    return None


def _where(module: nn.Module, site: Site) -> str:
    return f"attnstats: {type(module).__name__} of layer {site.layer}"


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
    site = module.__dict__.get(SITE)
    if site is None:  # a model that was made of the config of an attached one
        site = Site(Attachment("auto", allow_dense=False), "self", getattr(module, "layer_idx", -1))
    attachment, observer, cross = site.attachment, site.attachment.observer, site.kind == "cross"
    if is_recorded_as_torch():
        settings = {"is_causal": is_causal, "softcap": softcap, "s_aux": s_aux, "position_bias": position_bias}
        return _as_sdpa(module, query, key, value, attention_mask, dropout, scaling, observer, **settings, **kwargs)
    where = _where(module, site)
    _check_whole_sequences(where)
    exchange = current_exchange()
    if exchange is not None:
        if s_aux is not None or position_bias is not None or not isinstance(attention_mask, MaskDescription):
            raise InputError(
                f"{where} has sinks, a position bias or a mask of its own, which Ulysses sequence parallelism does not "
                "exchange; run it with a sequence-parallel size of 1"
            )
        query, key, value = map(exchange.to_heads, (query, key, value))
    if isinstance(attention_mask, MaskDescription):
        mask = attention_mask.placed()
    else:
        check_plain(attention_mask=attention_mask)
        if attention_mask is not None and attention_mask.dim() == 4 and len(attention_mask) == 1:
            attention_mask = attention_mask.expand(len(query), -1, -1, -1)  # of every batch row
        causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal) and not cross
        lengths = query.shape[2], key.shape[2]
        mask = (
            describe_no_mask(*lengths, causal)
            if attention_mask is None
            else describe_tensor(attention_mask, *lengths, causal)
        )
    _check_arguments(where, mask, kwargs)
    query, key, value = as_autocast(query, key, value)
    if site.kind == "self" and observer is not None and observer.kind == "cross":
        observer.real_queries = mask.real_queries
    options = Options(
        scale=scaling,
        softcap=softcap,
        sinks=s_aux,
        dropout_p=dropout,
        backend=attachment.backend,
        prefers=attachment.prefers,
    )
    call = AttentionCall(
        where,
        query,
        key,
        value,
        mask,
        options,
        cross,
        position_bias,
        attachment.allow_dense,
        observer.real_queries if observer is not None and cross else None,
    )
    if observer is not None and observer.kind == site.kind:
        output = observer.attend(site.layer, call)
    else:
        output = call.attend().output
    output = output.transpose(1, 2).contiguous()
    return output if exchange is None else exchange.to_rows(output), None


def _as_sdpa(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float,
    scaling: float | None,
    observer: Observer | None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """The call as transformers' SDPA makes it. Raises RuntimeError for what is captured, or no SDPA knows."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    before = getattr(getattr(module.config, "_attn_implementation", None), "before", "sdpa")
    if observer is not None or before != "sdpa":
        reason = "while it is captured" if observer is not None else f"whose own attention is {before!r}"
        raise RuntimeError(
            f"attnstats: an attached {type(module).__name__} {reason} cannot be recorded by torch.jit.trace or "
            "torch.onnx.export, which know torch's operators alone; detach the model, or use torch.export"
        )
    output: tuple[Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **settings
    )
    return output


def _check_whole_sequences(where: str) -> None:
    if torch.compiler.is_compiling() or current_exchange() is not None:
        return
    parallelism = sequence_parallelism()
    if parallelism is not None:
        raise InputError(
            f"{where} gets a part of each sequence, by {parallelism}, whose exchange between ranks attnstats would "
            "take the place of; run this pass with whole sequences on each rank (a sequence-parallel size of 1)"
        )


def _check_arguments(where: str, mask: MaskDescription, kwargs: dict[str, Any]) -> None:
    """Raise InputError for what a model passes to its attention function and would silently be ignored."""
    if kwargs.get("output_attentions"):
        raise InputError(NO_MAPS)
    if type(kwargs.get("cache")).__name__ == "PagedAttentionCache":
        raise InputError(f"{where} attends to a paged cache (continuous batching), which cannot be read; use generate")
    for name, argument in kwargs.items():
        if isinstance(argument, (Tensor, float)) and name not in HARMLESS:
            raise InputError(
                f"{where} passes {name}, which changes its attention in a way that attnstats does not know; detach the "
                "model and use attn_implementation='eager'"
            )
    packed = kwargs.get("cu_seq_lens_q")
    if packed is not None and mask.segments is None and len(packed) > 2:
        raise InputError(
            f"{where} got cu_seq_lens_q of packed sequences, but a mask that lets them see each other: pass their "
            "position_ids, no attention_mask and use_cache=False"
        )
