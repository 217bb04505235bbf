"""What a layer that isn't captured keeps: its model's attention function, and the masks that transformers makes for it.

The model's config stays as it is, so whatever transformers decides by its attention implementation is decided as
before. Only captured modules see another name in it (`CapturedConfig`). A mask that is made by such a config is a
MaskDescription that carries the model's own mask besides. It goes through the model as one, and is replaced by the own
mask where a module without captured modules is called.
"""

from __future__ import annotations

import copy
import inspect
import operator
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, NamedTuple

from torch import nn

from attnstats.transformers.masks import MaskDescription, describe_mask
from attnstats.transformers.sites import is_called_attention


class CapturedConfig:
    """A config as captured modules see it, with the name of another attention implementation.

    A copy of it, and what is loaded from a pickle of it, is the config itself.
    """

    def __init__(self, config: Any, implementation: str):
        self.__dict__.update(_config=config, _attn_implementation=implementation)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._config, name, value)

    def __deepcopy__(self, memo: Any) -> Any:
        return copy.deepcopy(self._config, memo)

    def __reduce__(self) -> Any:
        return operator.getitem, ([self._config], 0)  # a function that every process has


class _Pairing(NamedTuple):
    """A config by which masks are made for captured layers and, where own, for others as well."""

    config: Any
    own: bool


class _MaskFunctions(NamedTuple):
    """The mask function registered for an implementation, and the one that takes its place."""

    own: Callable[..., Any] | None
    paired: Callable[..., Any]


_PAIRINGS: list[_Pairing] = []
_FUNCTIONS: dict[str, _MaskFunctions] = {}


def keep_others(
    undo: ExitStack, model: Any, modules: list[nn.Module], implementation: str, hook: Callable[..., Any]
) -> None:
    """Let these attention modules alone attend by that implementation; `undo` undoes it.

    Args:
        hook: a pre-hook of modules without captured ones, that gives them `own_masks`.
    """
    captured = [module for module in modules if _config(module) is not None]  # without one nothing is looked up
    configs = {id(x): x for x in (model.config, model.config.get_text_config(), *map(_config, captured))}
    others = _others(model, captured)
    own = any(id(_config(other)) in configs and is_called_attention(name, other) for name, other in others.items())
    views = {key: CapturedConfig(config, implementation) for key, config in configs.items()}
    for module in captured:
        config = _config(module)
        undo.callback(module.__dict__.__setitem__, "config", config)
        module.__dict__["config"] = views[id(config)]
    for other in others.values():
        undo.callback(other.register_forward_pre_hook(hook, with_kwargs=True).remove)
    for config in configs.values():
        pairing = _Pairing(config, own)
        undo.callback(_unpair, pairing)
        _pair(pairing)


def _config(module: nn.Module) -> Any:
    return module.__dict__.get("config")


def own_masks(argument: Any) -> Any:
    """The argument of a module with the model's own masks in place of descriptions that carry them."""
    if isinstance(argument, MaskDescription):
        return argument.own[0] if argument.own else argument
    if type(argument) in (tuple, list):
        return type(argument)(own_masks(x) for x in argument)
    if type(argument) is dict:
        return {name: own_masks(x) for name, x in argument.items()}
    return argument


def _others(model: nn.Module, captured: list[nn.Module]) -> dict[str, nn.Module]:
    """By name the modules whose forward takes a mask, and that hold no captured module and are none."""
    inside = {id(module) for module in captured}
    others = {}
    for name, module in model.named_modules():
        try:
            parameters = inspect.signature(module.forward).parameters
        except ValueError:  # a module of TorchScript, which knows tensors alone
            continue
        if any("mask" in p for p in parameters) and not any(id(part) in inside for part in module.modules()):
            others[name] = module
    return others


def _registered() -> dict[str, Any]:
    from transformers import AttentionMaskInterface

    functions: dict[str, Any] = AttentionMaskInterface._global_mapping
    return functions


def _pair(pairing: _Pairing) -> None:
    functions, name = _registered(), pairing.config._attn_implementation
    current = functions.get(name)
    if name not in _FUNCTIONS or current is not _FUNCTIONS[name].paired:
        _FUNCTIONS[name] = _MaskFunctions(current, _for_both(current))
        functions[name] = _FUNCTIONS[name].paired
    _PAIRINGS.append(pairing)


def _unpair(pairing: _Pairing) -> None:
    _PAIRINGS[:] = [other for other in _PAIRINGS if other is not pairing]
    if _PAIRINGS:
        return
    registered = _registered()
    for name, functions in _FUNCTIONS.items():
        if registered.get(name) is not functions.paired:  # somebody registered another one meanwhile
            continue
        if functions.own is None:
            del registered[name]
        else:
            registered[name] = functions.own
    _FUNCTIONS.clear()


def _for_both(own: Callable[..., Any] | None) -> Callable[..., Any]:
    """A mask function that makes a description beside the mask of `own`, of configs that are paired."""

    def make(*args: Any, **settings: Any) -> Any:
        if isinstance(settings.get("attention_mask"), MaskDescription):
            return settings["attention_mask"]
        config = settings.get("config")
        for pairing in _PAIRINGS:
            if pairing.config is config:
                description = describe_mask(*args, **settings)
                if not pairing.own or not isinstance(description, MaskDescription):
                    return description
                return replace(description, own=(None if own is None else own(*args, **settings),))
        return None if own is None else own(*args, **settings)

    return make
