"""How a transformers model is made to attend through attnstats: one attention and one mask function.

`attached` puts both in place under the name "attnstats" for as long as its `with` lasts. The mask function
answers with a small `MaskDescription` where others build a (B, 1, Tq, Tk) tensor, and raises where the
pattern isn't one it knows. What happens to an attention call is up to the `Observer`; capture.py has it.
transformers is imported on first use. Nothing here knows what a statistic is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from attnstats.attention import attention
from attnstats.errors import InputError

# transformers blocks names that contain sdpa, flash, flex or eager for models that lack the matching flag.
NAME = "attnstats"

# What a model hands its attention function and plain causal or full attention can't honour.
REFUSED = ("softcap", "s_aux", "sliding_window", "position_bias", "cu_seq_lens_q", "cu_seq_lens_k", "cache")


class Observer(Protocol):
    """Sees every forward pass of an attached model, and every attention call of modules with a `layer_idx`."""

    def begin(self) -> None:
        """A forward pass starts."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, **geometry: Any) -> Tensor:
        """The output of `attnstats.attention` for one call; `geometry` are its keyword arguments."""

    def end(self) -> None:
        """The forward pass came to its end; not called after an exception."""


_OBSERVERS: WeakKeyDictionary[nn.Module, Observer] = WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class MaskDescription:
    """Who sees whom in one forward pass, without the mask.

    Attributes:
        causal: query t sees keys s <= t; else all keys.
        query_offset: position of the first query, the first key being at 0.
        query_length, key_length: what the model announced, to be compared with what arrives.
        seen: the keys from here on are behind the last query's horizon (the unused slots of a static cache).
        key_padding_mask: (B, seen) bool, True for real tokens; None: all are.
    """

    # `generate` makes the masks of static caches in advance, calls `.contiguous()` on them, and the model then
    # tells a finished mask from a (B, T) one by its rank.
    ndim: ClassVar[int] = 4

    causal: bool
    query_offset: int
    query_length: int
    key_length: int
    seen: int
    key_padding_mask: Tensor | None

    def contiguous(self) -> MaskDescription:
        return self


def describe_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int | Tensor = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | MaskDescription | None = None,
    **_: Any,
) -> MaskDescription:
    """The mask function registered with transformers, which calls it once per forward pass and kind of layer."""
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

    if isinstance(attention_mask, MaskDescription):
        return attention_mask
    if mask_function is None:
        mask_function = causal_mask_function
    if mask_function not in (causal_mask_function, bidirectional_mask_function):
        parts = " with ".join(_parts(mask_function))
        raise InputError(
            f"attnstats.capture: the model asks for the attention mask {parts}; only plain causal and full attention "
            "with padding can be captured so far. Take a model without sliding-window or chunked layers; give packed "
            "sequences one row each, with a (B, T) attention_mask"
        )
    causal = mask_function is causal_mask_function
    offset = int(q_offset) - int(kv_offset)
    seen = min(kv_length, offset + q_length) if causal else kv_length
    padding = attention_mask
    if padding is not None:
        padding = padding[:, int(kv_offset) :][:, :seen].bool()
        padding = nn.functional.pad(padding, (0, seen - padding.shape[1]), value=False)
        if bool(padding.all()):
            padding = None
    return MaskDescription(causal, offset, q_length, kv_length, seen, padding)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: MaskDescription | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function registered with transformers: (B, H, T, D) in, (B, Tq, Hq, Dv) out."""
    layer = getattr(module, "layer_idx", None)
    where = f"attnstats.capture: {type(module).__name__} of layer {layer}"
    for name in REFUSED:
        if kwargs.get(name) is not None:
            raise InputError(f"{where} passes {name}, which cannot be captured yet; take a model or inputs without it")
    if dropout > 0:
        raise InputError(f"{where} has dropout {dropout:g}; call model.eval(), or set its attention_dropout to 0")
    if isinstance(attention_mask, Tensor):
        raise InputError(
            f"{where} received the attention_mask {tuple(attention_mask.shape)}; "
            "a mask of your own cannot be captured yet, pass a (B, T) padding mask"
        )
    asked = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if attention_mask is None:
        # The model makes no mask: SDPA's convention is causal, aligned top left, except for a single query.
        causal = bool(asked) and query.shape[2] > 1
        seen = min(query.shape[2], key.shape[2]) if causal else key.shape[2]
        attention_mask = MaskDescription(causal, 0, query.shape[2], key.shape[2], seen, None)
    announced, arrived = (attention_mask.query_length, attention_mask.key_length), (query.shape[2], key.shape[2])
    if announced != arrived:
        raise InputError(
            f"{where} has {arrived[0]} queries and {arrived[1]} keys, but its mask was made for {announced[0]} "
            f"and {announced[1]}; attention_mask must be (B, T) with T the cached and new tokens together"
        )
    if query.shape[2] > 1 and bool(asked) != attention_mask.causal:
        # SDPA follows the flag without padding and the mask with it: there is no one right answer.
        made = "causal" if attention_mask.causal else "full"
        raise InputError(f"{where} has is_causal={asked}, but its mask is {made}; set is_causal in the model's config")
    padding = attention_mask.key_padding_mask
    geometry: dict[str, Any] = {
        "is_causal": attention_mask.causal,
        # Full attention can be across two sequences, where distances mean nothing.
        "query_offset": attention_mask.query_offset if attention_mask.causal else None,
        "key_padding_mask": None if padding is None else padding.to(key.device),
        "scale": scaling,
        "enable_gqa": True,
    }
    seen_keys, seen_values = key[:, :, : attention_mask.seen], value[:, :, : attention_mask.seen]
    observer = _OBSERVERS.get(module)
    if observer is None or not isinstance(layer, int):
        output = attention(query, seen_keys, seen_values, **geometry).output
    else:
        output = observer.attend(layer, query, seen_keys, seen_values, **geometry)
    return output.transpose(1, 2).contiguous(), None


@contextmanager
def attached(model: Any, observer: Observer) -> Iterator[None]:
    """Let `model` attend through attnstats and `observer` see it. The old implementation is back afterwards.

    Raises:
        TypeError: model isn't a transformers model.
        InputError: model is attached already, or its attention can't be replaced.
    """
    body = base_model(model)
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, describe_mask)
    implementations = [(config, config._attn_implementation) for config in _configs(model)]
    kind = type(model).__name__
    if any(implementation == NAME for _, implementation in implementations):
        raise InputError(f"model: this {kind}, or one that shares its config, is being captured already; one at a time")
    modules = [module for module in model.modules() if isinstance(getattr(module, "layer_idx", None), int)]
    handles = []
    try:
        try:
            model.set_attn_implementation(NAME)
        except ValueError as error:
            raise InputError(f"model: the attention of {kind} cannot be replaced: {error}") from error
        if model.config.get_text_config()._attn_implementation != NAME or not modules:
            raise InputError(
                f"model: {kind} does not call its attention through transformers' AttentionInterface, so it cannot be "
                "captured; families that do: Llama, Qwen, Mistral, SmolLM and most others"
            )
        _OBSERVERS.update(dict.fromkeys(modules, observer))
        handles.append(body.register_forward_pre_hook(lambda *_: observer.begin()))
        handles.append(body.register_forward_hook(lambda *_: observer.end()))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in modules:
            _OBSERVERS.pop(module, None)
        for config, implementation in implementations:
            # The public property would set the sub-configs as well, whose implementations may differ.
            config._attn_implementation_internal = implementation


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


def _parts(mask_function: Callable[..., Any]) -> list[str]:
    """The names of the functions that a composed mask is made of."""
    cells = [cell.cell_contents for cell in getattr(mask_function, "__closure__", None) or ()]
    parts = [part for cell in cells for part in (cell if isinstance(cell, tuple) else (cell,)) if callable(part)]
    if not parts:
        return [getattr(mask_function, "__qualname__", repr(mask_function)).removesuffix(".<locals>.inner_mask")]
    return [name for part in parts for name in _parts(part)]
