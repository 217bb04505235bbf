"""What is read off the two curves of a response: how WAAD changes, and where a curve is highest.

Pure functions on tensors, used by analyze.py. Curves come from heads.class_mean: differences are taken
after averaging over heads, never before.
"""

from __future__ import annotations

import torch
from torch import Tensor


def delta(waad: Tensor) -> Tensor:
    """`|WAAD[t] - WAAD[t + 1]|` along the last axis of a response (Eq. 14); 0 for its last token.

    Example:
        >>> import torch
        >>> delta(torch.tensor([1.0, 4.0, 2.0]))
        tensor([3., 2., 0.])
    """
    return torch.nn.functional.pad(waad.diff().abs(), (0, 1))


def top(values: Tensor, count: int, valid: Tensor | None = None) -> list[int]:
    """Indices of the `count` largest of a 1-D tensor, largest first, ties to the lower index.

    Fewer where fewer are valid: a placeholder is never among them.
    """
    order = values.argsort(stable=True, descending=True)
    if valid is not None:
        order = order[valid[order]]
    return order[:count].tolist()
