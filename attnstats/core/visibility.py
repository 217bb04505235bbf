"""The window around a query, causality included, as one comparison of distances."""

from __future__ import annotations

import torch
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


def seen_keys(position: Tensor, length: Tensor, left: int | None, right: int | None) -> tuple[Tensor, Tensor]:
    """int64 `first` and `end`: a query at `position` sees the keys first .. end - 1 of 0 .. length - 1; both broadcast.

    Example:
        >>> first, end = seen_keys(torch.arange(4), torch.tensor(3), left=1, right=0)
        >>> first.tolist(), end.tolist()
        ([0, 0, 1, 2], [1, 2, 3, 3])
    """
    first, end = torch.zeros_like(position), length
    if left is not None:
        first = torch.minimum((position - left).clamp(min=0), length)
    if right is not None:
        end = torch.minimum((position + right + 1).clamp(min=0), length)
    return first, torch.maximum(first, end)
