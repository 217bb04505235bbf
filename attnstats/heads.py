"""Local and global heads: the lowest and the highest share of heads by mean attention distance (Sec. 4.1).

Pure functions on tensors. Statistics are linear in A, so the mean of a statistic over a class of heads is the
statistic of that class's mean map (Eq. 8); `class_mean` is that mean. Called by analyze.py, and by anyone with
per-head statistics from `attnstats.capture`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class HeadClasses:
    """Which heads are local and which are global: two bool tensors (layers, heads) without a head in common."""

    local: Tensor
    global_: Tensor

    def name(self, layer: int, head: int) -> str:
        """ "local", "global" or "middle" for the head at these indices of the tensors."""
        if self.local[layer, head]:
            return "local"
        return "global" if self.global_[layer, head] else "middle"


def head_distance(mean_distance: Tensor, counted: Tensor) -> Tensor:
    """Mean attention distance of each head in tokens, over the rows that count (Eq. 7).

    Args:
        mean_distance: (..., T), the statistic MeanDistance per row.
        counted: (T,) bool, the rows that count (the response), at least one.
    """
    if not counted.any():
        raise ValueError("counted: no row counts, so that heads have no mean distance")
    return mean_distance[..., counted].double().mean(-1)


def classify(distance: Tensor, share: float = 0.30) -> HeadClasses:
    """The `max(1, floor(share * heads))` heads of least and of most distance, among all heads of all layers.

    The local heads are chosen first and the global ones among the rest, so that no head is both; there are always
    enough for both. Of heads that tie the first in (layer, head) order is taken.

    Args:
        distance: (layers, heads), mean attention distance, finite; two heads or more.
        share: in (0, 0.5].

    Example:
        >>> import torch
        >>> classes = classify(torch.tensor([[1.0, 5.0], [9.0, 5.0]]), share=0.25)
        >>> classes.local.tolist(), classes.global_.tolist()
        ([[True, False], [False, False]], [[False, False], [True, False]])
    """
    if distance.dim() != 2 or distance.numel() < 2:
        raise ValueError(f"distance must be (layers, heads) with two heads or more, got {tuple(distance.shape)}")
    if not 0 < share <= 0.5:
        raise ValueError(f"share must be in (0, 0.5], got {share}; beyond it heads would be local and global at once")
    if not distance.isfinite().all():
        raise ValueError("distance has NaN or infinite entries; the model's attention overflowed")
    flat = distance.flatten()
    # 0.29 * 100 is 28.999999999999996: a share is meant as the decimal that was written.
    count = max(1, math.floor(round(share * flat.numel(), 9)))
    none = torch.zeros_like(flat, dtype=torch.bool)
    local = none.index_fill(0, flat.argsort(stable=True)[:count], True)
    farthest = flat.masked_fill(local, -torch.inf).argsort(stable=True, descending=True)
    global_ = none.index_fill(0, farthest[:count], True)
    return HeadClasses(local.view_as(distance), global_.view_as(distance))


def class_mean(statistic: Tensor, chosen: Tensor) -> Tensor:
    """One mean over all chosen (layer, head): (layers, heads, T) and a bool (layers, heads) give (T,)."""
    return statistic[chosen].double().mean(0).to(statistic.dtype)
