"""Sequences laid end to end along one axis, as flash-attention's `cu_seqlens` describe them.

`read` validates the boundaries; `Packing` gives for each position its sequence and where that sequence lies. Tokens
past `cu_seqlens[-1]` belong to no sequence and see nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnstats.core.options import Options

INTEGERS = (int, torch.SymInt)  # a length in a graph is a symbol


class Line(NamedTuple):
    """The sequence of each position of one axis, int64 tensors that broadcast to the axis' length.

    Attributes:
        position: a query's position among the keys of its sequence, or a key's among the queries, which come last.
        own_end: one past the last index of its sequence on this axis.
        begin, length: first index and length of its sequence on the other axis.
    """

    position: Tensor
    own_end: Tensor
    begin: Tensor
    length: Tensor


@dataclass(frozen=True, eq=False)
class Packing:
    """The boundaries of n packed sequences.

    Attributes:
        queries, keys: (n + 1,) int32 each, the sequences' boundaries; equal ones make an empty sequence.
        max_queries, max_keys: no sequence is longer.
        believed: the call said so, and nobody compared it with the boundaries. Then all results of a sequence that is
            longer are NaN.
    """

    queries: Tensor
    keys: Tensor
    max_queries: int
    max_keys: int
    believed: bool = False

    @property
    def count(self) -> int:
        return len(self.queries) - 1

    def longer(self) -> Tensor:
        """(n,) bool: the sequence has more queries or keys than there should be."""
        return (self.queries.diff() > self.max_queries) | (self.keys.diff() > self.max_keys)

    def within_longer(self, boundaries: Tensor, length: int) -> Tensor:
        """(length,) bool: the position, by queries or keys, lies in a sequence that is longer than there should be."""
        index = torch.arange(length, dtype=torch.int32, device=boundaries.device)
        sequence = torch.searchsorted(boundaries[1:], index, right=True)
        return torch.nn.functional.pad(self.longer(), (0, 1))[sequence]  # one more, of tokens past the last sequence

    def along_queries(self, length: int) -> Line:
        return _line(self.queries, self.keys, length)

    def along_keys(self, length: int) -> Line:
        return _line(self.keys, self.queries, length)

    def slices(self) -> Iterator[tuple[slice, slice]]:
        """Each sequence's queries and keys. Waits for the device."""
        for (a, b), (c, d) in zip(pairwise(self.queries.tolist()), pairwise(self.keys.tolist()), strict=True):
            yield slice(a, b), slice(c, d)


def check_length(name: str, length: int | None) -> None:
    """Raise ValueError for anything but None and an integer >= 0."""
    check_integer(name, length)
    if length is not None and length < 0:
        raise ValueError(f"{name} must be an integer >= 0, got {length!r}")


def check_integer(name: str, length: int | None) -> None:
    """Raise ValueError for anything but None and an integer; a traced length has no number to compare."""
    if length is not None and (not isinstance(length, INTEGERS) or isinstance(length, bool)):
        raise ValueError(f"{name} must be an integer >= 0, got {length!r}")


def check_integers(name: str, x: Any, shape: str, dims: int, device: torch.device, least: int = 0) -> None:
    """Raise for what isn't an int32 or int64 tensor of so many dimensions, and at least so many rows, on the device."""
    if not isinstance(x, Tensor) or x.dtype not in (torch.int32, torch.int64) or x.dim() != dims or len(x) < least:
        got = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name} must be an int32 or int64 tensor of shape {shape}, got {got}")
    if x.device != device:
        raise ValueError(f"{name} must be on query's device {device}, got {x.device}")


def check_boundaries(name: str, cu_seqlens: Any, device: torch.device) -> None:
    """Raise for what isn't a tensor of boundaries on the device."""
    check_integers(name, cu_seqlens, "(sequences + 1,)", 1, device, least=2)


def read_boundaries(name: str, cu_seqlens: Tensor, length: int) -> list[int]:
    """The boundaries as numbers; waits for the device. Raises ValueError for what doesn't lie within the length."""
    values: list[int] = cu_seqlens.tolist()
    decreases = any(b < a for a, b in pairwise(values))
    if values[0] != 0 or decreases or values[-1] > length:
        fault = "start at 0" if values[0] else "not decrease" if decreases else f"end at most at {length}"
        raise ValueError(f"{name} must {fault}, got {_short(values)}")
    return values


def read(options: Options, query_length: int, key_length: int, device: torch.device) -> tuple[Packing, bool]:
    """The packing of a call, and True if queries and keys have the same sequences.

    The boundaries are read in every call, as numpy and kernels write without a trace. For those of a CUDA tensor this
    waits for the device, so there a maximal length that is given is believed; the kernels stay inside the tensors.
    """
    cu_seqlens_q, cu_seqlens_k = options.cu_seqlens_q, options.cu_seqlens_k
    max_seqlen_q, max_seqlen_k = options.max_seqlen_q, options.max_seqlen_k
    assert cu_seqlens_q is not None
    same = cu_seqlens_k is None or cu_seqlens_k is cu_seqlens_q
    if cu_seqlens_k is None:
        cu_seqlens_k = cu_seqlens_q
        max_seqlen_k = max_seqlen_q if max_seqlen_k is None else max_seqlen_k
        if key_length != query_length:
            raise ValueError(
                f"cu_seqlens_k: query has {query_length} tokens and key {key_length}, so both need boundaries; got None"
            )
    check_length("max_seqlen_q", max_seqlen_q)
    check_length("max_seqlen_k", max_seqlen_k)
    boundaries: list[list[int]] = []
    longest: list[int] = []
    sides = (("q", cu_seqlens_q, max_seqlen_q, query_length), ("k", cu_seqlens_k, max_seqlen_k, key_length))
    for side, cu, max_seqlen, length in sides:
        name = f"cu_seqlens_{side}"
        check_boundaries(name, cu, device)
        if max_seqlen is not None and believes(device):
            longest.append(min(max_seqlen, length))
            continue
        values = read_boundaries(name, cu, length)
        steps = [b - a for a, b in pairwise(values)]
        if max_seqlen is not None and max_seqlen < max(steps):
            raise ValueError(f"max_seqlen_{side} must be at least the longest sequence, {max(steps)}; got {max_seqlen}")
        boundaries.append(values)
        longest.append(max(steps))
    if len(cu_seqlens_q) != len(cu_seqlens_k):
        raise ValueError(
            f"cu_seqlens_k must have as many sequences as cu_seqlens_q, {len(cu_seqlens_q) - 1}; "
            f"got {len(cu_seqlens_k) - 1}"
        )
    shared = same or (len(boundaries) == 2 and boundaries[0] == boundaries[1])
    queries, keys = (cu.to(torch.int32, copy=True) for cu in (cu_seqlens_q, cu_seqlens_k))
    max_queries, max_keys = longest
    return Packing(queries, keys, max_queries, max_keys, believed=len(boundaries) < 2), shared


def believes(device: torch.device) -> bool:
    """True where a look at the boundaries would wait for the device."""
    return device.type != "cpu"


def _short(values: list[int]) -> str:
    return str(values) if len(values) <= 12 else f"[{', '.join(map(str, values[:6]))}, ..., {values[-1]}]"


def _line(own: Tensor, other: Tensor, length: int) -> Line:
    index = torch.arange(length, device=own.device, dtype=torch.int64)
    own, other = own.long(), other.long()
    sequence = torch.searchsorted(own[1:], index, right=True)  # as many as there are: past the last one
    after = (sequence + 1).clamp(max=len(own) - 1)
    own_end, other_end = own[after], other[after]
    # Aligned at the end: query own_end - 1 and key other_end - 1 stand at the same position.
    position = index - own_end + other_end - other[sequence]
    return Line(position, own_end, other[sequence], other_end - other[sequence])
