"""The parts of a transformers model: which modules attend, in which layer, and which are called for a forward pass.

Read off names, configs and classes; nothing is changed here. transformers is imported on first use.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any, Literal

from torch import nn

from attnstats.wrappers import unwrap

AttentionKind = Literal["self", "cross", "encoder"]

ATTENTION_NAME = re.compile(r"attention|attn", re.IGNORECASE)
CROSS_NAME = re.compile(r"cross|encoder_attn|encdecattention|encoder_attention", re.IGNORECASE)
BLOCK_CLASS = re.compile(r"(Layer|Block)$")
# Of the types in a config's layer_types: attention with a softmax.
SOFTMAX_LAYER = re.compile(r"^(?!.*(linear|lightning)).*(attention|sparse)", re.IGNORECASE)


def transformers_model(model: Any) -> Any:
    """The transformers model inside its wrappers, if it has any. Raises TypeError for anything else."""
    try:
        from transformers import PreTrainedModel
    except ImportError as error:
        raise ImportError("attnstats.capture needs transformers: pip install 'attnstats[transformers]'") from error
    model = unwrap(model)
    if not isinstance(model, PreTrainedModel):
        inside = "; pass the model that it wraps" if isinstance(model, nn.Module) else ""
        raise TypeError(
            f"model must be a loaded transformers model (PreTrainedModel), got {type(model).__name__}{inside}"
        )
    return model


def attention_modules(model: Any) -> dict[AttentionKind, dict[int, list[nn.Module]]]:
    """The modules that may attend, by kind and layer. Of a multimodal model those of its text model."""
    config = model.config
    text = config.get_text_config()
    inside_encoder: set[int] = set()
    if getattr(config, "is_encoder_decoder", False):
        inside_encoder = {id(module) for module in _encoder(model).modules()}
    softmax = _softmax_layers(text)
    candidates: list[tuple[AttentionKind, int, bool, str, nn.Module]] = []
    for name, module, owner in _with_owners(model):
        layer, knows_layer = getattr(module, "layer_idx", None), True
        if not is_called_attention(name if isinstance(layer, int) else "", module):
            continue
        if text is not config and owner.config is not text:
            continue
        if not isinstance(layer, int) or layer < 0:
            layer, knows_layer = next((int(part) for part in name.split(".") if part.isdigit()), -1), False
        kind: AttentionKind = "self"
        if id(module) in inside_encoder:
            kind = "encoder"
        elif CROSS_NAME.search(name.rpartition(".layers.")[2]) or getattr(module, "is_cross_attention", False):
            kind = "cross"
        if layer >= 0 and (kind != "self" or softmax is None or layer in softmax):
            candidates.append((kind, layer, knows_layer, name, module))
    numbered = {kind for kind, _, knows_layer, *_ in candidates if knows_layer}
    # Where some modules know their layer, those that don't are no attention, and neither is a decoder layer that holds
    # one. Of nested modules otherwise, either may be the one that attends.
    candidates = [candidate for candidate in candidates if candidate[2] or candidate[0] not in numbered]
    names = [name for *_, name, _ in candidates]
    modules: dict[AttentionKind, dict[int, list[nn.Module]]] = {}
    for kind, layer, knows_layer, name, module in candidates:
        holds_another = any(other.startswith(f"{name}.") for other in names)
        if not holds_another or (knows_layer and not BLOCK_CLASS.search(type(module).__name__)):
            modules.setdefault(kind, {}).setdefault(layer, []).append(module)
    return {kind: dict(sorted(layers.items())) for kind, layers in modules.items()}


def is_called_attention(name: str, module: nn.Module) -> bool:
    """True if the last parts of its name in the model, or the name of its class, say attention."""
    return bool(ATTENTION_NAME.search(".".join(name.split(".")[-2:])) or ATTENTION_NAME.search(type(module).__name__))


def stacks(model: Any, kind: AttentionKind) -> list[nn.Module]:
    """The modules whose forward pass is one pass of this kind of attention, the outer before the inner."""
    if kind == "encoder":
        return [_encoder(model)]
    nested = [model, model.base_model]
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    if isinstance(decoder, nn.Module):
        nested.append(decoder)
    return [module for i, module in enumerate(nested) if not any(module is outer for outer in nested[:i])]


def configs(model: Any) -> list[Any]:
    """Every config object whose attention implementation `set_attn_implementation` may change, each once."""
    by_id: dict[int, Any] = {}
    pending = [module.config for module in model.modules() if hasattr(module, "set_attn_implementation")]
    while pending:
        config = pending.pop()
        if id(config) not in by_id:
            by_id[id(config)] = config
            pending += [c for key in config.sub_configs if (c := getattr(config, key, None)) is not None]
    return list(by_id.values())


def head_count(model: Any, kind: AttentionKind) -> int | None:
    """Query heads of a layer; None: unknown, or not the same in every layer."""
    config = model.config.get_text_config()
    try:
        count = getattr(config, "num_attention_heads", None)
        if getattr(config, "is_encoder_decoder", False):
            count = getattr(config, f"{'encoder' if kind == 'encoder' else 'decoder'}_attention_heads", count)
    except Exception:  # configs that differ by layer raise an error of their own
        return None
    return count if isinstance(count, int) else None


def _with_owners(model: nn.Module) -> Iterator[tuple[str, nn.Module, Any]]:
    """Every module once, with its name and the PreTrainedModel that it is part of."""
    pending: list[tuple[str, nn.Module, Any]] = [("", model, model)]
    seen = set()
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
    """The layers that have softmax attention; None: all."""
    types = getattr(config, "layer_types", None)
    if not types:
        return None
    return {layer for layer, name in enumerate(types) if SOFTMAX_LAYER.search(name) or "hybrid" in name}


def _encoder(model: Any) -> nn.Module:
    encoder: Callable[[], nn.Module] = model.get_encoder
    return encoder()
