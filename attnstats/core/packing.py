"""Sequences laid end to end along one axis, as flash-attention's `cu_seqlens` describe them.

`Packing` says for each position which sequence it belongs to and where that sequence lies. Positions past the last
sequence belong to none: they see nothing. Made by `arguments.resolve`, held by a `Geometry`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor


class Line(NamedTuple):
    """What each position of one axis knows, int64 tensors that broadcast to its length.

    Attributes:
        position: of a query among the keys of its sequence, and of a key among the queries, which come last.
        own_end: one past its sequence's last index on this axis.
        begin, length: where its sequence lies on the other axis.
    """

    position: Tensor
    own_end: Tensor
    begin: Tensor
    length: Tensor


@dataclass(frozen=True, eq=False)
class Packing:
    """Where each of n sequences lies.

    Attributes:
        queries, keys: (n + 1,) int32 each, the sequences' boundaries; equal ones make an empty sequence.
        max_queries, max_keys: no sequence is longer.
    """

    queries: Tensor
    keys: Tensor
    max_queries: int
    max_keys: int

    @property
    def count(self) -> int:
        return len(self.queries) - 1

    def along_queries(self, length: int) -> Line:
        return _line(self.queries, self.keys, length)

    def along_keys(self, length: int) -> Line:
        return _line(self.keys, self.queries, length)

    def slices(self) -> Iterator[tuple[slice, slice]]:
        """Each sequence's queries and keys. Waits for the device."""
        for (a, b), (c, d) in zip(_pairs(self.queries), _pairs(self.keys), strict=True):
            yield slice(a, b), slice(c, d)


def _line(own: Tensor, other: Tensor, length: int) -> Line:
    index = torch.arange(length, device=own.device)
    own, other = own.long(), other.long()
    sequence = torch.searchsorted(own[1:], index, right=True)  # as many as there are: past the last one
    after = (sequence + 1).clamp(max=len(own) - 1)
    own_end, other_end = own[after], other[after]
    # Aligned at the end: query own_end - 1 and key other_end - 1 stand at the same position.
    position = index - own_end + other_end - other[sequence]
    return Line(position, own_end, other[sequence], other_end - other[sequence])


def _pairs(boundaries: Tensor) -> Iterator[tuple[int, int]]:
    values = boundaries.tolist()
    return pairwise(values)
