"""Forward passes of a model, reported to an observer as they begin and end.

Nested modules may each be called first: a head that calls the decoder past the model's body, users who call the body
without its head. `ForwardPasses` reports the pass of whichever is outermost.
"""

from __future__ import annotations

import inspect
import threading
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from attnstats.errors import InputError
from attnstats.transformers.calls import AttentionCall
from attnstats.transformers.sites import AttentionKind
from attnstats.wrappers import refuse_replica

NO_MAPS = (
    "model: output_attentions=True asks for the maps that attnstats is there to avoid; ask attnstats.capture for "
    "statistics of them (PooledMap is a picture of the map), or detach the model and use attn_implementation='eager'"
)


_IN_GRAPH = 0  # stands for the thread where a graph is traced


class Observer(Protocol):
    """Sees every forward pass of an attached model, and every attention call of one kind.

    Attributes:
        real_queries: (B, Tq) bool, in a pass the tokens of a decoder that are not padding, as its self-attention's mask
            has them; the mask of its cross-attention, which is of that kind, does not say.
    """

    kind: AttentionKind
    real_queries: Tensor | None

    def begin(self, ids: Tensor | None, cache: Any, positions: Any) -> None:
        """A forward pass starts, with these input_ids, cache and position_ids, where it has them."""

    def attend(self, layer: int, call: AttentionCall) -> Tensor:
        """The output of a call of its kind."""

    def pass_by(self) -> None:
        """A module of its kind is called whose attention isn't replaced; not in a graph."""

    def end(self, cache: Any) -> None:
        """The forward pass came to its end; not called after an exception."""

    def leave(self) -> None:
        """The forward pass is over, also after an exception."""


class OutsideGraphs:
    """An observer that compiled models call outside of their graphs."""

    def __init__(self, observer: Observer):
        def attend(layer: int, call: AttentionCall) -> Tensor:
            return observer.attend(layer, replace(call, mask=call.mask.placed()))

        # Here and not above the methods: it imports torch's compiler, and with it Triton.
        outside = torch.compiler.disable(
            reason="attnstats.capture(live=True) grows with every step, which no graph can: compile with "
            "fullgraph=False, or capture without live=True"
        )
        self.kind = observer.kind
        self.real_queries: Tensor | None = None  # of cross-attention, which is never live
        self.begin, self.attend = outside(observer.begin), outside(attend)
        self.pass_by = observer.pass_by
        self.end, self.leave = outside(observer.end), outside(observer.leave)


class ForwardPasses:
    """Hooks on nested modules that tell the observer of each forward pass once.

    Attributes:
        stacks: the outer before the inner.
        parameters: of each, the names of the arguments that its forward takes.
        layer_counts: of each, the layers that its config names.
        outermost: by thread, the stack whose forward pass is running.
    """

    def __init__(self, stacks: list[nn.Module], observer: Observer | None):
        self.stacks = stacks
        self.observer = observer
        self.parameters = [tuple(inspect.signature(stack.forward).parameters) for stack in stacks]
        self.layer_counts = [_layer_count(stack) for stack in stacks]
        self.outermost: dict[int, nn.Module | None] = {_IN_GRAPH: None}  # a key that comes later would compile anew

    def hook(self) -> list[Any]:
        """Register the hooks; returns their handles."""
        handles = []
        for stack in self.stacks:
            handles += [
                stack.register_forward_pre_hook(self._begin, with_kwargs=True),
                stack.register_forward_hook(self._end),
                stack.register_forward_hook(self._leave, always_call=True),
            ]
        return handles

    def __deepcopy__(self, _: Any) -> ForwardPasses:
        """A copy of the model has copies of these hooks, without an observer."""
        return ForwardPasses([], None)

    def __reduce__(self) -> Any:
        return ForwardPasses, ([], None)

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.observer is None:
            return
        refuse_replica(module)
        thread = _thread()
        if self._is_inner(module, self.outermost.get(thread)):
            return
        self._refuse_early_exit()
        self.outermost[thread] = module
        if args:
            for stack, names in zip(self.stacks, self.parameters, strict=True):
                if stack is module:
                    kwargs = dict(zip(names, args, strict=False)) | kwargs
        output_attentions = kwargs.get("output_attentions")
        if output_attentions is None:
            output_attentions = getattr(module.config, "output_attentions", False)
        if output_attentions:
            raise InputError(NO_MAPS)
        ids = kwargs.get("input_ids", args[0] if args else None)
        if getattr(module.config, "is_encoder_decoder", False):
            ids = kwargs.get("decoder_input_ids")
        ids = ids if isinstance(ids, Tensor) and ids.dim() == 2 else None
        positions = kwargs.get("decoder_position_ids", kwargs.get("position_ids"))
        self.observer.begin(ids, _cache(kwargs), positions)

    def _refuse_early_exit(self) -> None:
        """Raise InputError before a draft of the first layers, and undo the change of the config that asked for it."""
        if torch.compiler.is_compiling():  # it would compare numbers that may be symbols there
            return
        early = [
            (stack, count)
            for stack, count in zip(self.stacks, self.layer_counts, strict=True)
            if _layer_count(stack) != count
        ]
        if not early:
            return
        exit_layer = _layer_count(early[0][0])
        for stack, count in early:  # generate does not, after an exception
            config: Any = stack.config
            config.num_hidden_layers = count
        raise InputError(
            f"model: it is to run {exit_layer} of its {early[0][1]} layers, as generate(assistant_early_exit="
            f"{exit_layer}) drafts tokens, which cannot be captured; generate without it, or give an assistant_model"
        )

    def _end(self, module: nn.Module, _: Any, output: Any) -> None:
        if self.observer is not None and self.outermost.get(_thread()) is module:
            self.observer.end(_cache(output))

    def _leave(self, module: nn.Module, *_: Any) -> None:
        thread = _thread()
        if self.observer is not None and self.outermost.get(thread) is module:
            self.outermost[thread] = None
            self.observer.leave()

    def _is_inner(self, module: nn.Module, running: nn.Module | None) -> bool:
        """True if a stack around this one is running.

        A pass that ended with a KeyboardInterrupt never reported its end. So a module that seems to be running already,
        or that holds the one that does, starts a new pass.
        """
        for stack in self.stacks:
            if stack is module:
                return False
            if stack is running:
                return True
        return True


def _layer_count(stack: nn.Module) -> Any:
    return getattr(getattr(stack, "config", None), "num_hidden_layers", None)


def _thread() -> int:
    return _IN_GRAPH if torch.compiler.is_compiling() else threading.get_ident()


def _cache(fields: Any) -> Any:
    """The cache among a forward pass's arguments or in its output; transformers has renamed it.

    An output warns whoever asks for the old name, so its fields are looked up as in any dict.
    """
    for name in ("cache", "past_key_values"):
        cache = dict.get(fields, name) if isinstance(fields, dict) else getattr(fields, name, None)
        if cache is not None:
            return cache
    return None
