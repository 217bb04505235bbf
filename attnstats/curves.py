"""Curves over the response tokens of a batch: the change of WAAD, the top share of a signal, medians, and checks.

A row of (B, T) holds one response: its masked tokens in order, whatever lies before, between and after them. Everything
works on all rows at once, without a loop over rows or tokens and without sorting.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from attnstats.tensors import check_plain

SLACK = 1e-9  # floating-point excess of a share times a length over the number that was meant, at most


@torch.no_grad()
def delta(waad: Tensor, mask: Tensor | None = None) -> Tensor:
    """`|WAAD[t] - WAAD[t + 1]|`, where t + 1 is the next response token (Eq. 14).

    Args:
        waad: (B, T) floating, finite within the mask; (..., T) without a mask.
        mask: (B, T) bool, the response tokens; None: all tokens along the last axis, unchecked.

    Returns:
        A tensor like waad, 0 for the last response token and outside the mask.

    Raises:
        TypeError, ValueError: as `local_chunk`.

    Example:
        >>> import torch
        >>> delta(torch.tensor([1.0, 4.0, 2.0]))
        tensor([3., 2., 0.])
        >>> delta(torch.tensor([[9.0, 1.0, 9.0, 4.0]]), torch.tensor([[False, True, False, True]]))
        tensor([[0., 3., 0., 0.]])
    """
    if mask is None:
        return torch.nn.functional.pad(waad.diff().abs(), (0, 1))
    check_signal("waad", waad, mask)
    return delta_unchecked(waad, mask).to(waad.dtype)


@torch.no_grad()
def top_share(values: Tensor, mask: Tensor, q: float, valid: Tensor | None = None, bottom: bool = False) -> Tensor:
    """TopQ: the `ceil(q * n)` largest of a row's n response tokens, ties to the lower index (Eq. 14, 16).

    Args:
        values: (B, T) floating, finite where within the mask and valid.
        mask: (B, T) bool, the response tokens.
        q: the share, in [0, 1], read as the decimal that was written: 0.28 of 25 tokens are 7.
        valid: (B, T) bool, the tokens that can be chosen; None: all. n counts the other response tokens too.
        bottom: choose the smallest instead.

    Returns:
        (B, T) bool, False outside the mask.

    Raises:
        TypeError, ValueError: as `local_chunk`.

    Example:
        >>> import torch
        >>> top_share(torch.tensor([[1.0, 5.0, 5.0, 5.0, 2.0]]), torch.ones(1, 5, dtype=torch.bool), 0.4)
        tensor([[False,  True,  True, False, False]])
    """
    check_signal("values", values, mask, valid)
    return top_share_unchecked(values, mask, q, valid, bottom)


@dataclass(frozen=True, eq=False)
class Responses:
    """The places of response tokens when each row is packed to the left; a last slot takes all other tokens.

    Attributes:
        slot: [B, T] int64, the slot of each token; T outside the mask.
        length: [B, 1] int32.
    """

    slot: Tensor
    length: Tensor

    @staticmethod
    def of(mask: Tensor) -> Responses:
        count = mask.cumsum(1, dtype=torch.int32)  # in int64 it takes ten times as long
        return Responses(torch.where(mask, count - 1, mask.shape[1]).long(), count[:, -1:])

    def gather(self, values: Tensor) -> Tensor:
        """[B, T + 1] the response's values in order, then 0; the last slot has some value from outside the mask."""
        return values.new_zeros(len(values), values.shape[1] + 1).scatter_(1, self.slot, values)

    def spread(self, gathered: Tensor) -> Tensor:
        """[B, T] the inverse of `gather`; outside the mask the value of the last slot."""
        return gathered.gather(1, self.slot)

    def delta(self, curve: Tensor) -> Tensor:
        """[B, T + 1] delta of a gathered curve, 0 in the last slot."""
        steps = torch.arange(curve.shape[1], device=curve.device, dtype=torch.int64)
        return delta(curve).masked_fill_(steps >= self.length - 1, 0)


def delta_unchecked(waad: Tensor, mask: Tensor) -> Tensor:
    """`delta` of checked arguments, in float32 where waad has sixteen bits."""
    responses = Responses.of(mask)
    return responses.spread(responses.delta(responses.gather(waad.to(working_dtype(waad.dtype)))))


def top_share_unchecked(
    values: Tensor, mask: Tensor, q: float, valid: Tensor | None = None, bottom: bool = False
) -> Tensor:
    """`top_share` of checked tensors."""
    if not 0 <= q <= 1:
        raise ValueError(f"q must be a share in [0, 1], got {q}")
    most = math.ceil(q * mask.shape[1] - SLACK)
    if most == 0:
        return torch.zeros_like(mask)
    allowed = mask if valid is None else mask & valid
    count = (mask.sum(1, keepdim=True).double() * q - SLACK).ceil().int()
    values = values.to(working_dtype(values.dtype))
    values = -values if bottom else values
    least = _largest(values, allowed, count, most)  # -inf where fewer are allowed
    above = allowed & (values > least)
    equal = allowed & (values == least)
    left = count - above.sum(1, keepdim=True, dtype=torch.int32)
    return above | (equal & (equal.cumsum(1, dtype=torch.int32) <= left))


def lower_median(gathered: Tensor, length: Tensor) -> Tensor:
    """[B, 1] median of the first `length` [B, 1] values of each row [B, T]; the lower of two middle values."""
    first = torch.arange(gathered.shape[1], device=gathered.device, dtype=torch.int64) < length
    return _largest(gathered, first, length // 2 + 1, gathered.shape[1] // 2 + 1)


def _largest(values: Tensor, among: Tensor, rank: Tensor, most: int) -> Tensor:
    """[B, 1] each row's value of rank `rank` [B, 1], 1 being the largest, among the entries in `among` [B, T].

    `topk` takes a fifth of the time of sorting but has one rank for all rows, so some of the entries that are not in
    `among` are set to infinity until the rank is `most` in every row. There are enough of them when `most` is the rank
    in a row where all entries are in `among`.
    """
    spare = (~among).cumsum(1, dtype=torch.int32)
    padded = torch.where(among, values, torch.where(spare <= most - rank, torch.inf, -torch.inf))
    return padded.topk(most, 1, sorted=False).values.amin(1, keepdim=True)


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in: float32 for sixteen-bit values, else the same."""
    return torch.promote_types(dtype, torch.float32)


def check_mask(name: str, mask: Tensor) -> None:
    """Raises TypeError or ValueError for a mask that is not bool (B, T) with T of at least 1."""
    check_plain(**{name: mask})
    if mask.dtype != torch.bool:
        raise TypeError(f"{name} must be a bool tensor, got {mask.dtype}; write {name}.bool() if its 1s are the tokens")
    if mask.dim() != 2:
        raise ValueError(f"{name} must be (B, T), got {tuple(mask.shape)}; write {name}[None] for one response")
    if mask.shape[1] == 0:
        raise ValueError(f"{name} must be (B, T) with T of at least 1, got {tuple(mask.shape)}")


def check_signal(name: str, values: Tensor, mask: Tensor, valid: Tensor | None = None) -> None:
    """Raises TypeError or ValueError unless values are floating, shaped like the mask, and finite where they count."""
    check_mask("mask", mask)
    check_plain(**{name: values})
    if not values.is_floating_point():
        raise TypeError(f"{name} must be a floating tensor, got {values.dtype}")
    if valid is not None:
        check_mask("valid", valid)
    for other, tensor in ((name, values), ("valid", valid)):
        if tensor is not None and tensor.shape != mask.shape:
            raise ValueError(f"{other} must have the shape of mask {tuple(mask.shape)}, got {tuple(tensor.shape)}")
    if torch.compiler.is_compiling():  # a graph can't raise
        return
    counted = mask if valid is None else mask & valid
    low, high = values.masked_fill(~counted, 0).aminmax() if len(values) else (values.new_zeros(()),) * 2
    if not (low > -torch.inf) & (high < torch.inf):  # NaN is neither; the only wait for a GPU
        row, token = (counted & ~values.isfinite()).nonzero()[0].tolist()
        raise ValueError(
            f"{name}: row {row} is {values[row, token].item()} at token {token}, which the mask counts; "
            "the model's attention overflowed, or the curve was not computed there"
        )
