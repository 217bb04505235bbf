"""Tensors and numbers of a call in the form that kernels take them (kernels/arguments.py), and buffers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from ctypes import c_float
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnstats.core.geometry import LOG2E, Geometry, divisor_of, pivot_of
from attnstats.core.scores import softcap_
from attnstats.kernels.arguments import Dropout, PageTable, Score, Sequences, Sizes, Visibility
from attnstats.statistics import CATALOGUE, Statistic, Summed
from attnstats.triton.configs import describes, interpreted
from attnstats.triton.plan import Heads

# If as many blocks for each packed sequence as the longest has are so many times as many as there can be, each program
# searches for its sequence instead, which takes a load for each doubling of their number.
WORTH_A_SEARCH = 1.5
FARTHEST = 2**30  # a distance that a 32-bit position can be added to; no sequence is as long


class RowLse(NamedTuple):
    """What normalises each row, contiguous (B, Hq, Tq): A = exp(score - lse) or exp2(score2 - pivot) * factor.

    Attributes:
        lse: natural log, -inf for rows that see no key.
        pivot: in the exp2 domain, +inf for rows that see no key.
        factor: None, as the pivot then is: they are those of the lse and 1.
    """

    lse: Tensor
    pivot: Tensor | None = None
    factor: Tensor | None = None

    @property
    def pivot_or_lse(self) -> Tensor:
        """For kernels that take either, as they see by the factor whether there is a pivot."""
        return self.lse if self.pivot is None else self.pivot

    def pivots(self, geometry: Geometry) -> Tensor:
        return pivot_of(self.lse, geometry.all_live) if self.pivot is None else self.pivot

    def of_heads(self, heads: Tensor | None) -> RowLse:
        """That of some heads; None: all."""
        if heads is None:
            return self
        return RowLse(*(None if x is None else x.index_select(1, heads) for x in self))  # type: ignore[arg-type]

    def sink_share(self, geometry: Geometry) -> Tensor:
        """(B, Hq, Tq) float64, the sink's A in each row."""
        assert geometry.sinks is not None
        sinks = geometry.sinks.double()[:, None]
        if self.factor is None:
            return (sinks - divisor_of(self.lse)).exp()
        factor = self.factor.double()
        assert self.pivot is not None
        return torch.where(factor < 2**-100, 1.0, (sinks * LOG2E - self.pivot.double() + factor.log2()).exp2())

    def log_factor(self) -> Tensor | float:
        """ln factor (B, Hq, Tq); of a row whose A is 0 a finite number."""
        return 0.0 if self.factor is None else self.factor.clamp(min=torch.finfo(torch.float32).tiny).log()

    def weights(self, products: Tensor, rows: slice, geometry: Geometry) -> Tensor:
        """A of products q . k (B, Hq, rows, keys), from scores as the kernels have them.

        A product less the pivot is rounded once there, by an FMA; here by a difference of products first.
        """
        pivot = self.pivots(geometry)[:, :, rows].double()
        if geometry.softcap is None:
            scale2 = c_float(geometry.scale * LOG2E).value
            of_pivot = (pivot / scale2).float()
            rest = torch.where(pivot.isfinite(), of_pivot.double() * scale2 - pivot, 0.0).float()
            log2 = products.sub_(of_pivot[..., None]).mul_(scale2).add_(rest[..., None])
        else:
            log2 = softcap_(products.mul_(geometry.scale), geometry.softcap).mul_(LOG2E).sub_(pivot[..., None])
        weights = log2.exp2_()
        return weights if self.factor is None else weights.mul_(self.factor[:, :, rows, None])


def power_of_two(number: int) -> int:
    """The next power of two that is not smaller."""
    return 1 << (max(number, 1) - 1).bit_length()


def block_dim(dim: int) -> int:
    """Head size of a tile in registers: a power of two, at least the 16 of a matmul."""
    return max(16, power_of_two(dim))


def bounded(distance: int) -> int:
    """The distance, or the farthest that the kernels can compute with."""
    return max(-FARTHEST, min(distance, FARTHEST))


def as_input(x: Tensor) -> Tensor:
    """The tensor in a form that kernels take.

    The interpreter gets no bfloat16, on which its arithmetic is wrong (it works on bit patterns), and rows are never so
    far apart that an offset within a tile passes 32 bits.
    """
    if x.requires_grad:
        x = x.detach()
    if max(x.stride()[2:]) > 2**22:
        x = x.contiguous()
    return x.float() if interpreted() and x.dtype == torch.bfloat16 else x


def described(geometry: Geometry, *streams: Tensor) -> bool:
    """True if a kernel can load tiles of these tensors by descriptors: rows are contiguous, and each starts at a
    multiple of 16 bytes. Packed sequences are loaded by pointers: their programs, of which most may be empty, would
    each need memory for the descriptors.
    """
    if geometry.packing is not None or not describes(geometry.device, geometry.dtype):
        return False
    for x in streams:
        batch, head, row, element = x.stride()
        if element != 1 or row == 0 or ((batch | head | row) * x.element_size() | x.data_ptr()) % 16:
            return False
    return True


def flags(mask: Tensor | None) -> Tensor | None:
    """A bool mask as contiguous uint8."""
    return None if mask is None else mask.to(torch.uint8, memory_format=torch.contiguous_format)


def counts(geometry: Geometry) -> Tensor | None:
    """(B, Tq) contiguous, how much each query counts in columns: uint8, or float32 with a query_weight; None: 1."""
    if geometry.query_weight is None:
        return flags(geometry.query_mask)
    weights = geometry.query_counts()
    assert weights is not None
    return weights.float().contiguous()


def longest(geometry: Geometry) -> tuple[int, int]:
    """Queries and keys of the longest sequence."""
    if geometry.packing is None:
        return geometry.query_length, geometry.key_length
    return geometry.packing.max_queries, geometry.packing.max_keys


def sequences(geometry: Geometry) -> Sequences:
    packing = geometry.packing
    if packing is None:
        return Sequences()
    limits = (packing.max_queries, packing.max_keys) if packing.believed else (None, None)
    return Sequences(packing.queries, packing.keys, *limits)


def pages(geometry: Geometry) -> PageTable:
    if geometry.paged is None:
        return PageTable()
    block_table = geometry.paged.pages.block_table
    if block_table.stride(1) != 1:
        block_table = block_table.contiguous()
    return PageTable(block_table, geometry.paged.layout.first_key, block_table.stride(0))


def sizes(geometry: Geometry, block: int, by_keys: bool = False) -> Sizes:
    """Those of a kernel whose programs own blocks of so many queries or, by_keys, of keys."""
    packing, tokens = geometry.packing, geometry.key_length if by_keys else geometry.query_length
    n_blocks, n_even = -(-tokens // block), None
    if packing is not None:
        n_even = -(-longest(geometry)[by_keys] // block)
        n_blocks = (tokens + packing.count * (block - 1)) // block
        if n_even * packing.count <= WORTH_A_SEARCH * n_blocks:
            n_blocks = n_even * packing.count
        else:
            n_even = 0
    return Sizes(
        geometry.batch,
        None if packing is None else packing.count,
        geometry.query_heads,
        None,
        geometry.group,
        geometry.offset,
        geometry.query_length,
        geometry.key_length,
        n_blocks,
        n_even,
    )


def window(geometry: Geometry) -> Visibility:
    """Visibility without the key mask."""
    left, right = geometry.left, geometry.right
    return Visibility(None if left is None else bounded(left), None if right is None else bounded(right), None)


def visibility(window: Visibility, geometry: Geometry) -> Visibility:
    """The window with the key mask."""
    return window if geometry.key_mask is None else window._replace(key_mask=flags(geometry.key_mask))


def score(geometry: Geometry, scale: float | None = None) -> Score:
    cap2 = None if geometry.softcap is None else geometry.softcap * LOG2E
    return Score(scale, geometry.scale * LOG2E, cap2)


def dropout(geometry: Geometry) -> Dropout | None:
    return None if geometry.dropout_seed is None else Dropout(geometry.dropout_seed, geometry.dropout_p)


def sinks(geometry: Geometry) -> Tensor | None:
    return None if geometry.sinks is None else geometry.sinks.detach().float()


def head_count(geometry: Geometry, heads: Heads) -> int:
    return geometry.query_heads if heads is None else len(heads)


def buffer(geometry: Geometry, shape: tuple[int, ...], fill: float = 0.0, of_keys: bool = False) -> Tensor:
    """A float32 buffer (..., Tq) or (..., Tk) that a kernel fills; see `filled`."""
    return filled(torch.empty(shape, dtype=torch.float32, device=geometry.device), geometry, -1, fill, of_keys)


def filled(x: Tensor, geometry: Geometry, tokens: int, fill: float = 0.0, of_keys: bool = False) -> Tensor:
    """x with what no kernel writes, along its dimension of tokens: `fill` past the last packed sequence, and NaN in
    sequences that are longer than the call said."""
    packing = geometry.packing
    if packing is None:
        return x
    if not packing.believed:
        return x.fill_(fill)
    index = torch.arange(x.shape[tokens], dtype=torch.int64, device=x.device)
    within = index < (packing.keys if of_keys else packing.queries)[-1]
    line = torch.where(within, torch.nan, fill).to(x.dtype)
    return x.copy_(line if tokens == -1 else line[:, None])


def on_device(numbers: tuple[int, ...] | None, device: torch.device) -> Tensor | None:
    """The numbers as int32."""
    return None if numbers is None else _constant(numbers, device)


@functools.lru_cache(maxsize=256)
def _constant(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """Made once: a copy from the host can't be captured into a CUDA graph."""
    return torch.tensor(numbers, dtype=torch.int32, device=device)


def dims(geometry: Geometry, with_value: bool = True) -> dict[str, int]:
    """The constants of head sizes."""
    constants = {"DIM": geometry.head_dim, "BLOCK_DIM": block_dim(geometry.head_dim)}
    if with_value:
        constants |= {"VALUE_DIM": geometry.value_dim, "BLOCK_VALUE_DIM": block_dim(geometry.value_dim)}
    return constants


def weights(statistics: Iterable[Any], tail_of: Callable[[Any], float] = lambda _: 0.0) -> tuple[Any, ...]:
    """The statistics' weights, less their tails, as the flat constexpr tuple of kernels/tiles.py."""
    flat: list[Any] = []
    for s in statistics:
        weight = kernel_weight(s)
        # Triton's cache key of a tuple names the functions in it but not their source: the digest does.
        digest = getattr(weight, "cache_key", "")
        flat += [weight, *(*s.parameters, 0, 0)[:2], tail_of(s), digest]
    return tuple(flat)


def kernel_weight(statistic: Statistic) -> Any:
    """The device function of a statistic's weight: its own, or for the catalogue the one of its name; None: none."""
    from attnstats.kernels import weights

    if isinstance(statistic, Summed):
        return kernel_weight(statistic.of)
    if statistic.kernel_weight is None and CATALOGUE.get(statistic.name) is type(statistic):
        return getattr(weights, statistic.name, None)
    return statistic.kernel_weight
