"""vLLM's attention backend for CPUs, whose captured layers show their queries and their paged cache.

A layer of an engine without settings is vLLM's own. The cache of keys is packed for the machine's instructions; how is
found out by vLLM's own function that fills it, not assumed.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from vllm import _custom_ops as ops
from vllm.config import get_current_vllm_config
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl

from attnstats.integrations.vllm.configuration import is_recorded
from attnstats.integrations.vllm.recorder import Watched
from attnstats.integrations.vllm.sums import KeyCache


class WatchedBackend(CPUAttentionBackend):
    """vLLM's backend; layers of an engine with settings can be watched."""

    @staticmethod
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        return WatchedImpl if is_recorded(get_current_vllm_config()) else CPUAttentionBackendImpl


class WatchedImpl(Watched, CPUAttentionBackendImpl):
    """The attention of one layer, which can be watched."""

    @property
    def left(self) -> int | None:
        """How far behind itself a query sees; None: all the way."""
        return None if self.sliding_window < 0 else self.sliding_window - 1

    def key_cache(self, layer: Any, query: Tensor, kv_cache: Tensor, metadata: Any) -> KeyCache:
        return _key_cache(layer.isa, kv_cache)


def _key_cache(isa: str, kv_cache: Tensor) -> KeyCache:
    count, heads, size, both = kv_cache.shape
    dim = both // 2
    place = places(isa, size, dim, kv_cache.dtype)
    strides = affine(isa, size, dim, kv_cache.dtype)
    if strides is None:
        return KeyCache(size, lambda blocks: _read(kv_cache[blocks].flatten(2), place, size, dim), None)
    of_block, of_head = kv_cache.stride()[:2]
    pages = kv_cache.as_strided((count, size, heads, dim), (of_block, strides[0], of_head, strides[1]))
    return KeyCache(size, pages.__getitem__, pages)


def _read(blocks: Tensor, place: Tensor, size: int, dim: int) -> Tensor:
    return blocks[..., place].unflatten(-1, (size, dim)).transpose(1, 2)


@functools.cache
def affine(isa: str, size: int, dim: int, dtype: torch.dtype) -> tuple[int, int] | None:
    """The strides of tokens and of numbers in a head's part of a block; None: it has none."""
    place = places(isa, size, dim, dtype).view(size, dim)
    of_row, of_element = int(place[1, 0]), int(place[0, 1])
    row, element = (torch.arange(n, dtype=torch.int64, device="cpu") for n in (size, dim))
    return (of_row, of_element) if torch.equal(place, row[:, None] * of_row + element * of_element) else None


@functools.cache
def places(isa: str, size: int, dim: int, dtype: torch.dtype) -> Tensor:
    """(size * dim,) where in a head's part of a block the numbers of its keys, token by token, lie.

    Numbers that any dtype holds are put through vLLM's function for that, one base-32 digit of each place at a time.

    Raises:
        ValueError: numbers are not only put elsewhere.
    """
    digits = [torch.arange(size * dim, dtype=torch.int64, device="cpu") // 32**i % 32 for i in range(4)]
    slots = torch.arange(size, dtype=torch.int64, device="cpu")
    place = torch.zeros(size * dim, dtype=torch.int64, device="cpu")
    for i, digit in enumerate(digits):
        keys = digit.to(dtype).view(size, 1, dim)
        cache = torch.zeros(1, 1, 2 * size, dim, dtype=dtype, device="cpu")
        key_cache, value_cache = cache.chunk(2, dim=2)
        ops.cpu_attn_reshape_and_cache(keys, keys.clone(), key_cache, value_cache, slots, isa)
        place += 32**i * key_cache.flatten().long()
    where = torch.empty_like(place)
    where[place] = torch.arange(size * dim, dtype=torch.int64, device="cpu")
    if not torch.equal(place.sort().values, torch.arange(size * dim, dtype=torch.int64, device="cpu")):
        raise ValueError(f"attnstats can't read the keys in vLLM's cache for {isa!r} in {dtype}: they are converted")
    return where
