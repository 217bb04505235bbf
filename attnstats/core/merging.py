"""Column statistics of parts of the queries, merged into those of all.

A mean per key is merged through its sum: `Statistics.counts` has the number of counted queries behind each mean.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import pad


def merge_columns(parts: Sequence[tuple[Tensor, Tensor | None]]) -> tuple[Tensor, Tensor | None]:
    """One (value, count) of the queries of all parts, such as `(stats["fai"], stats.counts["fai"])`.

    Args:
        parts: values (..., H, Tk) with counts (..., Tk), or with None where the values are sums. A part with fewer
            keys has the first ones, as with a cache that grows.

    Example:
        >>> import torch
        >>> early = torch.tensor([[0.5, 0.25]]), torch.tensor([2, 1])
        >>> late = torch.tensor([[0.2, 0.25, 0.75]]), torch.tensor([1, 3, 1])
        >>> merge_columns([early, late])
        (tensor([[0.4000, 0.2500, 0.7500]]), tensor([3, 4, 1]))
    """
    length = max(value.shape[-1] for value, _ in parts)
    counts = [None if count is None else pad(count, (0, length - count.shape[-1])) for _, count in parts]
    values = [pad(value, (0, length - value.shape[-1])) for value, _ in parts]
    total = sum((as_sum(v, c) for v, c in zip(values[1:], counts[1:], strict=True)), as_sum(values[0], counts[0]))
    of_means = [count for count in counts if count is not None]
    count = sum(of_means[1:], of_means[0]) if of_means else None
    return as_mean(total, count), count


def as_sum(value: Tensor, count: Tensor | None) -> Tensor:
    """The sum over queries behind a mean (..., H, Tk): value times count (..., Tk); a sum (count None) as it is."""
    return value if count is None else value * count.unsqueeze(-2)


def as_mean(total: Tensor, count: Tensor | None) -> Tensor:
    """The inverse of `as_sum`; 0 where nothing was counted."""
    return total if count is None else total / divisors(count).unsqueeze(-2)


def divisors(count: Tensor) -> Tensor:
    """The counts, or sums of weights, with 1 where nothing was counted."""
    return count.masked_fill(count == 0, 1)
