"""Which backend does the work, and the one way in: arguments validated, the backend called in full precision.

A backend is a module (`reference`, `tiled`, `ops`) with `attend`, `from_lse` and `plan`. Called by attention.py, and
by library.py when a compiled graph runs, so that both do the same.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from attnstats import arguments, reference, tiled
from attnstats.geometry import Evaluation, Geometry, full_precision
from attnstats.statistics import Statistic


def geometry_of(
    query: Tensor, key: Tensor, value: Tensor | None, statistics: tuple[Statistic, ...], given: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor | None, Geometry]:
    """The geometry of a dense or, with cu_seqlens_q among `given`, a packed call; its tensors with a batch dimension."""
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
    backend: str,
    given: dict[str, Any],
) -> tuple[Evaluation, Geometry]:
    """Output, lse and statistics with a batch dimension, packed calls too."""
    query, key, checked, geometry = geometry_of(query, key, value, statistics, given)
    with full_precision(geometry.device):
        return choose(backend, geometry).attend(query, key, checked, geometry, statistics), geometry


def from_lse(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    statistics: tuple[Statistic, ...],
    lse_base: str,
    lse_layout: str | None,
    backend: str,
    given: dict[str, Any],
) -> tuple[Tensor, dict[Statistic, Tensor], Geometry]:
    """The lse in natural logarithm, and the statistics, with a batch dimension."""
    query, key, _, geometry = geometry_of(query, key, None, statistics, given)
    lse = arguments.natural_lse(lse, lse_base, lse_layout, geometry)
    with torch.no_grad(), full_precision(geometry.device):
        return lse, choose(backend, geometry).from_lse(query, key, lse, geometry, statistics), geometry


def choose(name: str, geometry: Geometry) -> ModuleType:
    """The module that does the work. Raises ValueError where it can't."""
    if name not in ("auto", "reference", "tiled", "triton"):
        raise ValueError(f"backend must be 'auto', 'reference', 'tiled' or 'triton', got {name!r}")
    if name == "reference":
        return reference
    if geometry.dense_mask is not None:
        raise ValueError(
            "attn_mask: a mask that depends on the query takes O(Tq * Tk) memory; use is_causal, key_padding_mask "
            "or a bool mask of shape (B, 1, 1, Tk), or backend='reference'"
        )
    if name == "tiled" or (name == "auto" and geometry.device.type == "cpu"):
        return tiled
    from attnstats import ops

    reason = ops.unavailable(geometry)
    if name == "auto":
        return tiled if reason else ops
    if reason:
        raise ValueError(f"backend='triton': {reason}; backend='tiled' would work")
    return ops
