"""Gradients of a forward pass that returns an lse: its backward pass recomputes the map from it.

`differentiable_pass` ties a backend's forward pass to its `gradients` for autograd; backends differ only in these.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad

from attnstats.core.geometry import Evaluation, Geometry, full_precision
from attnstats.statistics import Statistic


class Residuals(NamedTuple):
    """The inputs and results of a forward pass that its backward pass reads; the results as in `Evaluation`."""

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    lse: Tensor
    pivot: Tensor | None = None
    factor: Tensor | None = None


class Gradients(NamedTuple):
    """The gradients of one call; sinks: None where it has none."""

    query: Tensor
    key: Tensor
    value: Tensor
    sinks: Tensor | None = None


GradientsByStatistic = Mapping[Statistic, tuple[Tensor, Tensor]]  # value and gradient of each statistic that has one
ForwardPass = Callable[[Tensor, Tensor, Tensor, Geometry], Evaluation]
BackwardPass = Callable[[Residuals, Tensor, Geometry, GradientsByStatistic], Gradients]


def differentiable_pass(
    query: Tensor, key: Tensor, value: Tensor, geometry: Geometry, forward: ForwardPass, backward: BackwardPass
) -> Evaluation:
    """`forward(query, key, value, geometry)`, whose output carries gradients, and its statistics if differentiable."""
    inputs = (query, key, value, geometry.sinks)
    refuse_transforms(*inputs)
    if not torch.is_grad_enabled() or not any(x is not None and x.requires_grad for x in inputs):
        return forward(query, key, value, geometry)
    output, lse, *tensors = _Recomputed.apply(*inputs, geometry, forward, backward)
    return Evaluation(output, lse, dict(zip(geometry.statistics, tensors, strict=True)))


class _Recomputed(torch.autograd.Function):
    """Returns output, lse and statistics in one tuple."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None,
        geometry: Geometry,
        forward: ForwardPass,
        backward: BackwardPass,
    ) -> Any:
        output, lse, tensors, pivot, factor = forward(query, key, value, geometry)
        tensors = {s: x.clone() if x is lse else x for s, x in tensors.items()}
        saved = tuple(tensors.values()) if geometry.differentiable else ()
        ctx.save_for_backward(query, key, value, sinks, output, lse, pivot, factor, *saved)
        # Sinks are saved, as autograd must notice a write into them before the backward pass.
        ctx.geometry = geometry if sinks is None else dataclasses.replace(geometry, sinks=None, memo={})
        ctx.backward_pass = backward
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(lse, *(() if geometry.differentiable else tensors.values()))
        return output, lse, *tensors.values()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, _: None, *grads: Tensor | None) -> Any:
        with torch.no_grad():
            gradients = _Recomputed.gradients(ctx, grad_output, grads)
        if torch.is_grad_enabled():  # create_graph
            sources = (*ctx.saved_tensors, grad_output, *grads)
            gradients = _Last.apply(*gradients, *(x for x in sources if x is not None and x.requires_grad))
        return *gradients, None, None, None

    @staticmethod
    def gradients(ctx: Any, grad_output: Tensor | None, grads: tuple[Tensor | None, ...]) -> Gradients:
        query, key, value, sinks, output, lse, pivot, factor, *values = ctx.saved_tensors
        residuals = Residuals(query, key, value, output, lse, pivot, factor)
        geometry = ctx.geometry if sinks is None else dataclasses.replace(ctx.geometry, sinks=sinks, memo={})
        triples = zip(geometry.statistics, values, grads, strict=False)  # no values: not differentiable
        of_statistics = {s: (x, grad) for s, x, grad in triples if grad is not None}
        if grad_output is None:
            grad_output = torch.zeros_like(residuals.output)
        with full_precision(residuals.query.device):
            return ctx.backward_pass(residuals, grad_output, geometry, of_statistics)


class _Last(torch.autograd.Function):
    """Gradients that require grad, as they depend on the inputs, and raise where their own are asked for.

    The lse is a constant in them, so what autograd could derive would be wrong, and no graph at all would drop in
    silence what a loss has of a gradient.
    """

    @staticmethod
    def forward(ctx: Any, *gradients_and_sources: Tensor | None) -> Any:
        return gradients_and_sources[: len(Gradients._fields)]

    @staticmethod
    def backward(ctx: Any, *_: Any) -> NoReturn:
        raise_second_derivative()


def refuse_transforms(*inputs: Tensor | None) -> None:
    """Raise RuntimeError for inputs that torch.func or forward-mode differentiation follows: kernels would drop it."""
    for x in inputs:
        inner = x
        while inner is not None and _functorch.is_functorch_wrapped_tensor(inner):
            if _functorch.is_gradtrackingtensor(inner):
                raise RuntimeError(NO_TRANSFORMS)
            inner = _functorch.get_unwrapped(inner)
        if x is not None and forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None:
            raise RuntimeError(NO_TRANSFORMS)


NO_TRANSFORMS = (
    "attnstats: torch.func.grad, vjp, jacrev, jvp and forward-mode differentiation cannot follow its kernels; use "
    "backward() or torch.autograd.grad, or, but around a vmap, backend='reference', in O(Tq * Tk) memory"
)


def raise_second_derivative(*_: Any) -> NoReturn:
    raise RuntimeError(
        "attnstats: the derivative of attention's gradients is not implemented, nor is it in torch's flash attention; "
        "backend='reference' has it, in O(Tq * Tk) memory"
    )
