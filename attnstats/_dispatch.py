"""The choice of a backend, and the way into it: arguments validated, the backend called in full precision.

A backend is a module with `attend`, `from_lse`, `passes` and `cost`, with `COMPUTES`, the methods of statistics that it
knows, `READS_PAGES`, the passes from an lse that read keys in pages, and, but for `reference`, which autograd
differentiates, with `gradients`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from attnstats import reference
from attnstats.core import arguments
from attnstats.core.autograd import GradientsByStatistic, Residuals
from attnstats.core.geometry import Evaluation, Geometry, full_precision
from attnstats.core.lse import check_lse, check_values, natural_lse
from attnstats.core.options import Options, is_packed
from attnstats.core.paging import PagedKeys
from attnstats.flash.providers import settings
from attnstats.results import Explanation, PassCost
from attnstats.statistics import Statistic
from attnstats.tiled import backend as tiled

BACKENDS = ("auto", "reference", "tiled", "flash", "triton")


def attend(query: Tensor, key: Tensor, value: Tensor, options: Options) -> tuple[Evaluation, Geometry]:
    """Output, lse and statistics with a batch dimension, packed calls too."""
    query, key, value, geometry = _batched(query, key, value, options)
    geometry = arguments.with_dropout_seed(geometry, options.dropout_seed)
    backend = choose(options.backend, geometry)
    if geometry.dense_mask is not None:
        geometry.live()  # `valid` reads it later, when the caller may have written into the mask
    with full_precision(geometry.device):
        return backend.attend(query, key, value, geometry), geometry


def from_lse(
    query: Tensor, key: Tensor | PagedKeys, lse: Tensor, options: Options
) -> tuple[dict[Statistic, Tensor], Tensor, Geometry]:
    """The statistics and the lse in natural logarithm, with a batch dimension. Pages are copied for passes that can't
    read them."""
    paged, key = (key, key.stand_in()) if isinstance(key, PagedKeys) else (None, key)
    query, key, _, geometry = _batched(query, key, None, options)
    _check_from_lse(geometry)
    check_lse(options.lse_base, options.lse_layout)
    lse = natural_lse(lse, options.lse_base, options.lse_layout, geometry)
    backend = choose(options.backend, geometry, attends=False)
    if paged:
        key, geometry = _from_pages(paged, geometry, backend, options.check)
    with torch.no_grad(), full_precision(geometry.device):
        if options.check:
            check_values(query, key, lse, geometry, options.lse_base)
        lse = geometry.nan_without_softmax(lse)
        results = backend.from_lse(query, key, lse, geometry)
    return results, lse, geometry


def _from_pages(paged: PagedKeys, geometry: Geometry, backend: ModuleType, check: bool) -> tuple[Tensor, Geometry]:
    """The key of a call and its geometry: the cache where all passes read pages, else a copy of what they need."""
    runs = {each.run for each in backend.passes(geometry, False)}
    if check or not runs or not runs <= backend.READS_PAGES:
        (key,) = arguments.batch_of_one(key=paged.copied())
        return key, geometry
    return paged.cache.transpose(1, 2), dataclasses.replace(geometry, paged=paged, memo={})


def explain(query: Tensor, key: Tensor, value: Tensor | None, options: Options) -> Explanation:
    """The passes that `attend` or, without a value, `from_lse` makes."""
    query, key, value, geometry = _batched(query, key, value, options)
    if value is None:
        _check_from_lse(geometry)
    backend, reason = _choose(options.backend, geometry, attends=value is not None)
    costs = []
    for each in backend.passes(geometry, value is not None):
        description, flops, scratch_bytes = backend.cost(each, geometry)
        work = each.run, description, each.attends, each.statistics, each.heads
        costs.append(PassCost(*work, flops, scratch_bytes))
    return Explanation(backend.NAME, reason, tuple(costs))


def gradients(
    residuals: Residuals, grad_output: Tensor, of_statistics: GradientsByStatistic, options: Options
) -> list[Tensor]:
    """For query, key, value, and for sinks and a float attn_mask where there are any.

    Query, key and value in `residuals` are as the call got them; output, lse and `grad_output` have a batch dimension.
    """
    query, key, value, geometry = _batched(*residuals[:3], options)
    geometry = arguments.with_dropout_seed(geometry, options.dropout_seed)
    residuals = residuals._replace(query=query, key=key, value=value)
    with torch.no_grad(), full_precision(geometry.device):
        backend = choose(options.backend, geometry)
        if backend is reference:
            return _by_autograd(residuals, geometry, grad_output, of_statistics)
        gradients = backend.gradients(residuals, grad_output, geometry, of_statistics)
    return [x for x in gradients if x is not None]


def geometry_of(query: Tensor, key: Tensor, options: Options) -> Geometry:
    """The geometry of a call from the shapes of its query and key."""
    return _batched(query, key, None, options)[3]


def _batched(
    query: Tensor, key: Tensor, value: Tensor | None, options: Options
) -> tuple[Tensor, Tensor, Any, Geometry]:
    """The tensors of a call with a batch dimension, and its geometry. A missing value stays None."""
    if is_packed(options):
        query, key = arguments.batch_of_one(query=query, key=key)
        if value is not None:
            (value,) = arguments.batch_of_one(value=value)
    return query, key, value, arguments.resolve(query, key, value, options)


def _check_from_lse(geometry: Geometry) -> None:
    for statistic in geometry.statistics:
        if not statistic.from_lse:
            raise ValueError(
                f"statistics: {type(statistic).__name__} is not a function of the lse; ask attnstats.attention for it"
            )


def _by_autograd(
    residuals: Residuals, geometry: Geometry, grad_output: Tensor, of_statistics: GradientsByStatistic
) -> list[Tensor]:
    """The reference's gradients, which are those of its operations."""
    bias = geometry.dense_mask
    if bias is not None and bias.dtype == torch.bool:
        bias = None
    with _autograd():
        inputs = (*residuals[:3], geometry.sinks, bias)
        leaves = [None if x is None else x.detach().requires_grad_() for x in inputs]
        query, key, value = (x for x in leaves[:3] if x is not None)
        dense = geometry.dense_mask if bias is None else leaves[4]
        again = dataclasses.replace(
            geometry, statistics=tuple(of_statistics), differentiable=True, sinks=leaves[3], dense_mask=dense, memo={}
        )
        output, _, tensors, *_ = reference.attend(query, key, value, again)
        outputs = [output, *tensors.values()]
        grads = [grad_output, *(grad for _, grad in of_statistics.values())]
        return list(torch.autograd.grad(outputs, [x for x in leaves if x is not None], grads))


@contextmanager
def _autograd() -> Iterator[None]:
    """A context with autograd on inside an operator's body, where grad mode and dispatch keys switch it off."""
    keys, off = torch._C.DispatchKey, torch._C._dispatch_tls_local_exclude_set()
    for key in (keys.AutogradFunctionality, keys.AutogradOther, keys.AutogradNestedTensor):
        off = off.remove(key)
    with torch.enable_grad(), torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), off):
        yield


def choose(name: str, geometry: Geometry, attends: bool = True) -> ModuleType:
    """The backend that does the work of `attend`, or of `from_lse`. Raises ValueError for a call that it can't take."""
    on_provider = name == "auto" and geometry.device.type != "cpu"  # `flash` itself asks again
    key = "backend", name, attends, settings() if on_provider else None
    chosen = geometry.memo.get(key)
    if chosen is None:
        chosen = geometry.memo[key] = _choose(name, geometry, attends)[0]
    return chosen


def _choose(name: str, geometry: Geometry, attends: bool) -> tuple[ModuleType, str]:
    """The backend that does the work, and why it is this one."""
    check_backend(name)
    if name == "reference":
        return _computing(reference, geometry), "as asked"
    if geometry.dense_mask is not None:
        raise ValueError(
            "attn_mask: a mask that depends on the query takes O(Tq * Tk) memory; use is_causal, key_padding_mask "
            "or a bool mask of shape (B, 1, 1, Tk), or backend='reference'"
        )
    if geometry.batch * geometry.query_length == 0:
        return _computing(reference, geometry), "there are no queries"
    if name == "tiled" or (name == "auto" and geometry.device.type == "cpu"):
        return _computing(tiled, geometry), "as asked" if name == "tiled" else "CPU tensors"
    from attnstats.flash import backend as flash
    from attnstats.triton import backend as triton

    unavailable = triton.unavailable(geometry)
    if name == "auto":
        if unavailable:
            return _computing(tiled, geometry), unavailable
        reason = flash.better_fused(geometry) or flash.unavailable(geometry) if attends else "from an lse"
        if reason is None:
            return _computing(flash, geometry), flash.choice(geometry)
        return _computing(triton, geometry), f"GPU tensors; {reason}"
    if name == "flash" and attends:
        reason = unavailable or flash.unavailable(geometry)
        if reason:
            raise ValueError(f"backend='flash': {reason}; backend={'tiled' if unavailable else 'triton'!r} would work")
        return _computing(flash, geometry), f"as asked; {flash.choice(geometry)}"
    if unavailable:
        raise ValueError(f"backend={name!r}: {unavailable}; backend='tiled' would work")
    return _computing(flash if name == "flash" else triton, geometry), "as asked"


def _computing(backend: ModuleType, geometry: Geometry) -> ModuleType:
    """The backend. Raises ValueError for a statistic whose method it does not declare."""
    for statistic in geometry.statistics:
        if statistic.method not in backend.COMPUTES:
            methods = ", ".join(sorted(backend.COMPUTES))
            raise ValueError(
                f"statistics: backend {backend.NAME!r} doesn't compute {statistic}, whose method is "
                f"{statistic.method!r}; it knows {methods}"
            )
    return backend


def check_backend(name: str) -> None:
    """Raise ValueError for an unknown name."""
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}, got {name!r}")
