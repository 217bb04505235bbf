"""Which backend does the work, and the one way in: arguments validated, the backend called in full precision.

A backend is a module (`reference`, `tiled`, `ops`) with `attend`, `from_lse` and `plan`. Called by attention.py, and
by library.py when a compiled graph runs, so that both do the same.
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
from attnstats.core.geometry import Evaluation, Geometry, full_precision
from attnstats.statistics import Statistic
from attnstats.tiled import backend as tiled

NAMES = ("auto", "reference", "tiled", "triton")


def geometry_of(
    query: Tensor, key: Tensor, value: Tensor | None, statistics: tuple[Statistic, ...], given: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor | None, Geometry]:
    """The geometry of a dense or, with cu_seqlens_q among `given`, a packed call; its tensors with a batch."""
    if "cu_seqlens_q" not in given:
        return query, key, value, arguments.resolve(query, key, value, statistics, **given)
    query, key = arguments.batch_of_one(query=query, key=key)
    if value is not None:
        (value,) = arguments.batch_of_one(value=value)
    return query, key, value, arguments.resolve_packed(query, key, value, statistics, **given)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    statistics: tuple[Statistic, ...],
    given: dict[str, Any],
    dropout_p: float,
    differentiable: bool,
    backend: str,
    dropout_seed: Tensor | None = None,
) -> tuple[Evaluation, Geometry]:
    """Output, lse and statistics with a batch dimension, packed calls too. Draws a seed where dropout needs one."""
    arguments.check_differentiable(statistics, differentiable)
    query, key, checked, geometry = geometry_of(query, key, value, statistics, given)
    geometry = arguments.with_dropout(geometry, dropout_p, dropout_seed)
    with full_precision(geometry.device):
        module = choose(backend, geometry)
        return module.attend(query, key, checked, geometry, statistics, differentiable), geometry


def from_lse(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    statistics: tuple[Statistic, ...],
    lse_base: str,
    lse_layout: str | None,
    given: dict[str, Any],
    backend: str,
) -> tuple[Tensor, dict[Statistic, Tensor], Geometry]:
    """The lse in natural logarithm, and the statistics, with a batch dimension."""
    arguments.from_lse(statistics)
    query, key, _, geometry = geometry_of(query, key, None, statistics, given)
    lse = arguments.natural_lse(lse, lse_base, lse_layout, geometry)
    with torch.no_grad(), full_precision(geometry.device):
        return lse, choose(backend, geometry).from_lse(query, key, lse, geometry, statistics), geometry


def gradients(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    grad_output: Tensor,
    statistics: tuple[Statistic, ...],
    of_statistics: dict[Statistic, tuple[Tensor, Tensor]],
    given: dict[str, Any],
    dropout_p: float,
    backend: str,
    dropout_seed: Tensor | None,
) -> list[Tensor]:
    """For query, key, value, and for sinks and a float attn_mask where there are any; all as `attend` had them."""
    query, key, checked, geometry = geometry_of(query, key, value, statistics, given)
    geometry = arguments.with_dropout(geometry, dropout_p, dropout_seed)
    assert checked is not None
    with torch.no_grad(), full_precision(geometry.device):
        module = choose(backend, geometry)
        if module is reference:
            return _by_autograd(query, key, checked, geometry, grad_output, of_statistics)
        found = module.gradients(query, key, checked, output, lse, grad_output, geometry, of_statistics)
    return [x for x in found if x is not None]


def _by_autograd(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    geometry: Geometry,
    grad_output: Tensor,
    of_statistics: dict[Statistic, tuple[Tensor, Tensor]],
) -> list[Tensor]:
    """The reference's gradients, which are those of its operations."""
    bias = geometry.dense_mask
    if bias is not None and bias.dtype == torch.bool:
        bias = None
    with _autograd():
        leaves = [None if x is None else x.detach().requires_grad_() for x in (query, key, value, geometry.sinks, bias)]
        query, key, value = leaves[:3]  # type: ignore[assignment]
        dense = geometry.dense_mask if bias is None else leaves[4]
        again = dataclasses.replace(geometry, sinks=leaves[3], dense_mask=dense, memo={})
        output, _, tensors = reference.attend(query, key, value, again, tuple(of_statistics), True)
        outputs = [output, *tensors.values()]
        grads = [grad_output, *(grad for _, grad in of_statistics.values())]
        return list(torch.autograd.grad(outputs, [x for x in leaves if x is not None], grads))


@contextmanager
def _autograd() -> Iterator[None]:
    """Autograd inside of an operator's body, which is called with it switched off twice."""
    keys, off = torch._C.DispatchKey, torch._C._dispatch_tls_local_exclude_set()
    for key in (keys.AutogradFunctionality, keys.AutogradOther, keys.AutogradNestedTensor):
        off = off.remove(key)
    with torch.enable_grad(), torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), off):
        yield


def choose(name: str, geometry: Geometry) -> ModuleType:
    """The module that does the work. Raises ValueError where it can't."""
    check(name)
    if name == "reference":
        return reference
    if geometry.dense_mask is not None:
        raise ValueError(
            "attn_mask: a mask that depends on the query takes O(Tq * Tk) memory; use is_causal, key_padding_mask "
            "or a bool mask of shape (B, 1, 1, Tk), or backend='reference'"
        )
    if name == "tiled" or (name == "auto" and geometry.device.type == "cpu"):
        return tiled
    from attnstats.triton import backend as ops

    reason = ops.unavailable(geometry)
    if name == "auto":
        return tiled if reason else ops
    if reason:
        raise ValueError(f"backend='triton': {reason}; backend='tiled' would work")
    return ops


def check(name: str) -> None:
    if name not in NAMES:
        raise ValueError(f"backend must be 'auto', 'reference', 'tiled' or 'triton', got {name!r}")
