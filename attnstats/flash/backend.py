"""The backend "flash": the fastest attention at hand that returns an lse, and our kernels for statistics beside it.

`providers` has the attention kernels, in an order by architecture; the first that takes a call runs it. Statistics come
from its lse, by the kernels of `triton`. The backward pass is the provider's own, unless statistics carry gradients:
then it is that of `triton`, which needs no more than the lse of inputs in 16 bits.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from attnstats.core.autograd import Gradients, GradientsByStatistic, Residuals, differentiable_pass
from attnstats.core.geometry import Evaluation, Geometry, needs_pivot
from attnstats.core.lse import check_values
from attnstats.core.packing import Packing
from attnstats.core.passes import Pass
from attnstats.core.scores import beside_sinks, sink_gradient, with_sinks
from attnstats.flash import providers
from attnstats.flash.providers import Provider
from attnstats.statistics import Statistic
from attnstats.triton import backend as triton
from attnstats.triton import launch
from attnstats.triton.configs import MAX_DECODED, architecture, table_version

NAME = "flash"
COMPUTES = triton.COMPUTES
READS_PAGES = triton.READS_PAGES
CHECKED = "ATTNSTATS_CHECK_LSE"  # an environment variable: 1 to compare rows of each lse with scores, on the device
OTHERS = f"choose backend='triton', or set {providers.LEFT_OUT} to its name to leave it out"


def unavailable(geometry: Geometry) -> str | None:
    """The reason why this backend can't take a call that `triton` can, or None."""
    for s in geometry.statistics:
        if not s.from_lse:
            return f"{type(s).__name__} is not a function of the lse"
    if geometry.differentiable and needs_pivot(geometry.dtype):
        return f"gradients of statistics of {geometry.dtype} need more than a rounded lse"
    if _choose(geometry) is None:
        reasons = [f"{each.name}: {why}" for each, why in _refusals(geometry)]
        return "; ".join(reasons) or f"no attention kernel is left by {providers.LEFT_OUT}"
    return None


def better_fused(geometry: Geometry) -> str | None:
    """The reason why `triton` is to be preferred where the choice is free, or None."""
    if geometry.query_length <= MAX_DECODED and geometry.packing is None:
        return "few queries, whose keys are split in the same way whatever the batch"
    if geometry.prefers:
        return None
    in_loop = [s for s in triton.passes(geometry, True)[0].statistics if not s.is_banded]
    return f"{in_loop[0]} comes out of the same pass" if in_loop else None


def provider_of(geometry: Geometry) -> Provider:
    """The one that runs the call. Raises ValueError where there is none."""
    chosen = _choose(geometry)
    if chosen is None:
        raise ValueError(f"backend='flash': {unavailable(geometry)}; backend='triton' would work")
    return chosen


def choice(geometry: Geometry) -> str:
    """The provider, and why none before it was taken."""
    before = (f"not {each.name}: {why}" for each, why in _refusals(geometry))
    return "; ".join([provider_of(geometry).name, *before])


def _choose(geometry: Geometry) -> Provider | None:
    key = ("provider", table_version(), providers.settings())
    if key not in geometry.memo:
        place = architecture(geometry.device)
        taken = (each for each in _candidates(geometry) if each.reason_against(geometry, place) is None)
        geometry.memo[key] = next(taken, None)
    chosen: Provider | None = geometry.memo[key]
    return chosen


def _refusals(geometry: Geometry) -> Iterator[tuple[Provider, str]]:
    """The providers up to the first that takes the call, each with its reason."""
    for each in _candidates(geometry):
        why = each.reason_against(geometry, architecture(geometry.device))
        if why is None:
            return
        yield each, why


def _candidates(geometry: Geometry) -> Iterator[Provider]:
    without = {name.strip().casefold() for name in os.environ.get(providers.LEFT_OUT, "").split(",")}
    every: tuple[Provider, ...] = (providers.CPU,)
    if geometry.device.type != "cpu":
        every = providers.BY_ARCHITECTURE.get(architecture(geometry.device), providers.ELSEWHERE)
    first = sorted(every, key=lambda each: each.name != geometry.prefers)
    return (each for each in first if each.name.casefold() not in without)


def attend(query: Tensor, key: Tensor, value: Tensor, geometry: Geometry) -> Evaluation:
    """Output, lse and statistics. Gradients go through the output and, if differentiable, through the statistics."""
    provider = provider_of(geometry)  # of both passes, whatever is chosen by the time of the backward pass
    forward, backward = functools.partial(_attend, provider), functools.partial(_gradients, provider)
    return differentiable_pass(query, key, value, geometry, forward, backward)


def _attend(provider: Provider, query: Tensor, key: Tensor, value: Tensor, geometry: Geometry) -> Evaluation:
    output, lse = _attention(provider, query, key, value, geometry)
    return Evaluation(output, lse, from_lse(query, key, lse, geometry) if geometry.statistics else {})


def _attention(
    provider: Provider, query: Tensor, key: Tensor, value: Tensor, geometry: Geometry
) -> tuple[Tensor, Tensor]:
    """Output, and lse with the sinks."""
    output, lse = _run(provider, provider.forward, query, key, value, without_sinks(geometry))
    rows = (geometry.batch, geometry.query_heads, geometry.query_length)
    if output.shape != (*rows, geometry.value_dim) or lse.shape != rows:
        raise RuntimeError(
            f"attnstats: {provider.name} returned output {tuple(output.shape)} and lse {tuple(lse.shape)}, not "
            f"{(*rows, geometry.value_dim)} and {rows}; {OTHERS}"
        )
    lse = lse.to(geometry.accumulator)
    if not geometry.all_live:
        lse = lse.masked_fill(~geometry.live()[:, None], -torch.inf)
    if os.environ.get(CHECKED) == "1":
        check_values(query, key, lse, without_sinks(geometry), "e")
    lse = geometry.nan_without_softmax(lse)
    if geometry.sinks is not None:
        counted = with_sinks(lse, geometry.sinks).masked_fill(lse == -torch.inf, -torch.inf)
        output, lse = beside_sinks(output, lse, counted), counted
    if geometry.packing is not None:
        output = _of_sequences(output, geometry.packing.queries, geometry.packing)
        if geometry.packing.believed:
            longer = geometry.packing.within_longer(geometry.packing.queries, geometry.query_length)
            lse = lse.masked_fill(longer, torch.nan)
    return output, lse.contiguous()


def _of_sequences(x: Tensor, boundaries: Tensor, packing: Packing) -> Tensor:
    """x (B, H, T, D) where kernels write: 0 past the last sequence, NaN in one that is longer than the call said."""
    index = torch.arange(x.shape[2], dtype=torch.int32, device=x.device)
    x = x.masked_fill((index >= boundaries[-1])[:, None], 0.0)
    if packing.believed:
        x = x.masked_fill_(packing.within_longer(boundaries, x.shape[2])[:, None], torch.nan)
    return x


def without_sinks(geometry: Geometry) -> Geometry:
    """The call as a provider gets it."""
    if geometry.sinks is None:
        return geometry
    return dataclasses.replace(geometry, sinks=None, memo={})


def _run(provider: Provider, step: Any, *arguments: Any) -> Any:
    try:
        return step(*arguments)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise RuntimeError(f"attnstats: {provider.name} failed: {error}; {OTHERS}") from error


def gradients(
    residuals: Residuals, grad_output: Tensor, geometry: Geometry, of_statistics: GradientsByStatistic
) -> Gradients:
    """Gradients of what `attend` returned; `of_statistics` has each statistic that carries one, with its value."""
    return _gradients(provider_of(geometry), residuals, grad_output, geometry, of_statistics)


def _gradients(
    provider: Provider,
    residuals: Residuals,
    grad_output: Tensor,
    geometry: Geometry,
    of_statistics: GradientsByStatistic,
) -> Gradients:
    if of_statistics:
        return triton.gradients(residuals, grad_output, geometry, of_statistics)
    grads = _run(provider, provider.backward, residuals, grad_output, without_sinks(geometry))
    grad_query, grad_key, grad_value = grads
    if geometry.packing is not None:
        grad_query = _of_sequences(grad_query, geometry.packing.queries, geometry.packing)
        grad_key, grad_value = (
            _of_sequences(x, geometry.packing.keys, geometry.packing) for x in (grad_key, grad_value)
        )
    if geometry.sinks is None:
        return Gradients(grad_query, grad_key, grad_value)
    share = launch.RowLse(residuals.lse).sink_share(geometry)
    delta = (grad_output.to(geometry.accumulator) * residuals.output).sum(-1)
    return Gradients(grad_query, grad_key, grad_value, sink_gradient(share, delta, geometry))


def from_lse(query: Tensor, key: Tensor, lse: Tensor, geometry: Geometry) -> dict[Statistic, Tensor]:
    """The statistics of `A = exp(scores - lse)`; lse (B, Hq, Tq), -inf for rows that see no key."""
    return triton.from_lse(query, key, lse, geometry)


def passes(geometry: Geometry, attends: bool) -> list[Pass]:
    """The launches of `attend`, or of `from_lse`."""
    return [*([Pass("provider", attends=True)] if attends else ()), *triton.passes(geometry, False)]


def cost(each: Pass, geometry: Geometry) -> tuple[str, int, int]:
    """The description of a pass with its tiles, its floating-point operations and its scratch memory in bytes."""
    if not each.attends:
        return triton.cost(each, geometry)
    pairs = geometry.visible_pairs() * geometry.batch * geometry.query_heads
    return provider_of(geometry).name, 2 * pairs * (geometry.head_dim + geometry.value_dim), 0
