"""Keys in the pages of an engine's KV cache, as the `block_table` of vLLM and FlashAttention describes them.

`read` validates; `Pages` says which of a request's keys a step can change (`Layout`), and copies them out of the cache
for backends that can't read pages.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from attnstats.core.packing import believes, check_boundaries, check_integers, read_boundaries


class Layout(NamedTuple):
    """The last keys of each request, laid end to end.

    Attributes:
        first_key: (B,) int32, the position of the first of them.
        cu_seqlens: (B + 1,) int32, the requests' boundaries.
        total: the length of the axis, `cu_seqlens[-1]` or, where nobody looked, no less.
    """

    first_key: Tensor
    cu_seqlens: Tensor
    total: int

    def places_in(self, longer: Layout) -> Tensor:
        """(total,) int64, the index of each key in a layout that has as many keys of each request or more."""
        index = torch.arange(self.total, dtype=torch.int64, device=self.cu_seqlens.device)
        ahead = longer.cu_seqlens[1:] - self.cu_seqlens[1:]  # both end with a request's last key
        return (index + ahead[_request_of(index, self.cu_seqlens)]).clamp(max=max(longer.total - 1, 0))


@dataclass(frozen=True, eq=False)
class Pages:
    """The pages of a step's requests.

    Attributes:
        block_table: (B, n) int, the pages of each request in order.
        queries: (B + 1,) int, the boundaries of the requests' new tokens.
        lengths: (B,) int, the keys of each request, those of its new tokens included.
        query_length: new tokens of all requests, and of none.
    """

    block_table: Tensor
    queries: Tensor
    lengths: Tensor
    query_length: int

    def layout(self, reach: int | None) -> Layout:
        """The keys of each request's new tokens and so many before them, as far as there are; None: all.

        Without a reach it waits for the device, as the number of keys is nowhere else.
        """
        new = self.queries.diff()
        kept = self.lengths.to(new.dtype)
        if reach is not None:
            kept = torch.minimum(kept, new + reach)
        kept = kept.masked_fill(new <= 0, 0)
        cu_seqlens = torch.nn.functional.pad(kept.cumsum(0), (1, 0)).to(torch.int32)
        if reach is None or not believes(cu_seqlens.device):
            total = int(cu_seqlens[-1])
        else:
            total = self.query_length + reach * len(new)
        return Layout((self.lengths - kept).to(torch.int32), cu_seqlens, total)

    def gather(self, key_cache: Tensor, layout: Layout) -> Tensor:
        """(total, Hkv, D) a copy of the layout's keys.

        Raises:
            ValueError: a page that isn't in the cache. On a GPU nobody looks.
        """
        blocks, size = key_cache.shape[:2]
        index = torch.arange(layout.total, dtype=torch.int64, device=key_cache.device)
        request = _request_of(index, layout.cu_seqlens)
        position = index + (layout.first_key - layout.cu_seqlens[:-1])[request]
        page = self.block_table[request, (position // size).clamp(0, self.block_table.shape[1] - 1)]
        if not believes(key_cache.device) and layout.total:
            low, high = (int(x) for x in torch.aminmax(page))
            if low < 0 or high >= blocks:
                raise ValueError(
                    f"block_table must name pages of key_cache, 0 .. {blocks - 1}, for all keys that are read; got "
                    f"{low if low < 0 else high}"
                )
        return _rows_of(key_cache, page.long(), position % size)


class PagedKeys(NamedTuple):
    """A layout's keys in their pages."""

    cache: Tensor  # (blocks, block_size, Hkv, D)
    pages: Pages
    layout: Layout

    @property
    def page_size(self) -> int:
        return self.cache.shape[1]

    def stand_in(self) -> Tensor:
        """(total, Hkv, D) of the keys' shape, dtype and device alone."""
        return self.cache[0, :1].expand(self.layout.total, -1, -1)

    def copied(self) -> Tensor:
        """(total, Hkv, D)."""
        return self.pages.gather(self.cache, self.layout)


def read(query: Tensor, key_cache: Tensor, block_table: Tensor, cu_seqlens_q: Tensor, seqused_k: Tensor) -> Pages:
    """The pages of a step. Raises TypeError or ValueError naming the argument.

    Lengths are read on the CPU alone: on a GPU a look at them waits for the device.
    """
    for name, x, shape in (
        ("query", query, "(total_q, heads, head_dim)"),
        ("key_cache", key_cache, "(blocks, block_size, key heads, head_dim)"),
    ):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        if x.dim() != shape.count(",") + 1:
            raise ValueError(f"{name} must have the dimensions {shape}, got {tuple(x.shape)}")
    if key_cache.dtype != query.dtype:
        remedy = "; quantized caches are not read: keep keys in the model's dtype (vLLM: kv_cache_dtype='auto')"
        quantized = remedy if key_cache.dtype.itemsize == 1 else ""
        raise TypeError(f"key_cache must have query's dtype {query.dtype}, got {key_cache.dtype}{quantized}")
    if key_cache.device != query.device:
        raise ValueError(f"key_cache must be on query's device {query.device}, got {key_cache.device}")
    if 0 in key_cache.shape:
        raise ValueError(f"key_cache is empty: {tuple(key_cache.shape)}")
    _, size, key_heads, dim = key_cache.shape
    if query.shape[2] != dim or query.shape[1] % key_heads:
        raise ValueError(
            f"key_cache must have query's head_dim {query.shape[2]}, and key heads of which query's {query.shape[1]} "
            f"heads are a multiple; got {tuple(key_cache.shape)}, read as (blocks, block_size, key heads, head_dim). "
            "Of a cache with heads before rows (HND) pass key_cache.transpose(1, 2)"
        )
    check_boundaries("cu_seqlens_q", cu_seqlens_q, query.device)
    requests = len(cu_seqlens_q) - 1
    check_integers("seqused_k", seqused_k, "(requests,)", 1, query.device)
    check_integers("block_table", block_table, "(requests, pages)", 2, query.device)
    for name, x in (("seqused_k", seqused_k), ("block_table", block_table)):
        if len(x) != requests:
            raise ValueError(f"{name} must have a row for each of cu_seqlens_q's {requests} requests, got {len(x)}")
    if block_table.shape[1] == 0:
        raise ValueError(f"block_table must have a page for each request, got {tuple(block_table.shape)}")
    if not believes(query.device):
        _check_lengths(read_boundaries("cu_seqlens_q", cu_seqlens_q, len(query)), seqused_k, block_table, size)
    return Pages(block_table, cu_seqlens_q, seqused_k, len(query))


def _check_lengths(boundaries: list[int], seqused_k: Tensor, block_table: Tensor, size: int) -> None:
    pages = block_table.shape[1]
    for i, ((begin, end), keys) in enumerate(zip(pairwise(boundaries), seqused_k.tolist(), strict=True)):
        if keys < end - begin:
            raise ValueError(
                f"seqused_k counts all keys of a request, those of its new tokens included: request {i} has "
                f"{end - begin} new tokens, got {keys}"
            )
        if begin < end and keys > pages * size:
            raise ValueError(
                f"block_table must have a page for every {size} keys: request {i} has {keys} keys, which take "
                f"{-(-keys // size)} pages, got {pages}"
            )


def _request_of(index: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The request of each index; past the last boundary that of the last one."""
    return torch.searchsorted(cu_seqlens[1:], index, right=True).clamp(max=len(cu_seqlens) - 2)


def _rows_of(key_cache: Tensor, block: Tensor, row: Tensor) -> Tensor:
    """(n, Hkv, D) rows of blocks, copied whole: a block is a whole number of row strides in every layout of a cache."""
    blocks, size = key_cache.shape[:2]
    of_block, of_row = key_cache.stride()[:2]
    if of_row == 0 or of_block % of_row:
        return key_cache[block, row]
    ratio = of_block // of_row
    rows = key_cache.as_strided(((blocks - 1) * ratio + size, *key_cache.shape[2:]), (of_row, *key_cache.stride()[2:]))
    return rows.index_select(0, block * ratio + row)
