"""The log-sum-exp of another attention kernel: its layout, its base, and rows that see no key."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attnstats.core.geometry import Geometry


def check_lse(base: str, layout: str | None) -> None:
    """Raise ValueError for an unknown base or layout."""
    if layout not in (None, "HT", "TH"):
        raise ValueError(f"lse_layout must be 'HT', 'TH' or None (by its shape), got {layout!r}")
    if base not in ("e", "2"):
        raise ValueError(f"lse_base must be 'e' or '2', got {base!r}")


def natural_lse(lse: Tensor, base: str, layout: str | None, geometry: Geometry) -> Tensor:
    """The lse that a kernel returned as (B, Hq, Tq) in natural logarithm, -inf for rows that see no key.

    Args:
        lse: (B, Hq, Tq), packed (Hq, total) or (total, Hq); a last dimension of 1 is dropped.

    Raises:
        TypeError, ValueError: a wrong base, layout, shape, dtype or device.
    """
    check_lse(base, layout)
    heads, length = geometry.query_heads, geometry.query_length
    shapes: list[tuple[int, ...]] = [(geometry.batch, heads, length)]
    if geometry.packing is not None:
        by_layout = {"HT": (heads, length), "TH": (length, heads)}
        shapes = [by_layout[layout]] if layout else list(by_layout.values())
    if not isinstance(lse, Tensor):
        raise TypeError(f"lse must be a tensor, got {type(lse).__name__}")
    shape = tuple(lse.shape)
    if shape not in shapes and shape[-1:] == (1,):
        shape = shape[:-1]
    if shape not in shapes:
        raise ValueError(f"lse must have the shape {' or '.join(map(str, shapes))}, got {tuple(lse.shape)}")
    if geometry.packing is not None and heads == length > 1 and layout is None:
        raise ValueError(f"lse of shape {shape} is ambiguous, as many heads as tokens; pass lse_layout='HT' or 'TH'")
    if lse.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"lse must be float32 or float64, got {lse.dtype}; in less its error is over 1 % of A")
    if lse.device != geometry.device:
        raise ValueError(f"lse must be on query's device {geometry.device}, got {lse.device}")
    lse = lse.detach().to(geometry.accumulator).reshape(shape)
    if geometry.packing is not None:
        lse = (lse.T if layout == "TH" or (layout is None and shape != (heads, length)) else lse)[None]
    if base == "2":
        lse = lse * math.log(2.0)
    return lse if geometry.all_live else lse.masked_fill(~geometry.live()[:, None], -torch.inf)
