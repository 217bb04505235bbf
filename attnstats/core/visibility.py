"""The window around a query, causality included, as one comparison of distances."""

from __future__ import annotations

from torch import Tensor


def within(distance: Tensor, left: int | None, right: int | None) -> Tensor | None:
    """True where `-right <= distance <= left`, for distances t - s of query t and key s; None where neither limits.

    Example:
        >>> import torch
        >>> within(torch.tensor([-1, 0, 1, 2, 3]), left=2, right=0)
        tensor([False,  True,  True,  True, False])
    """
    if right is None:
        return None if left is None else distance <= left
    return distance >= -right if left is None else (distance >= -right) & (distance <= left)
