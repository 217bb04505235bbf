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

from attnstats.integrations.vllm.configuration import KEY, WORKER, requested
from attnstats.integrations.vllm.recorder import KeyCache, Watch


class WatchedBackend(CPUAttentionBackend):
    """vLLM's backend; layers of an engine with settings can be watched."""

    @staticmethod
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        config = get_current_vllm_config()
        if requested(config) is None:
            return CPUAttentionBackendImpl
        worker = config.parallel_config.worker_cls
        if worker != WORKER:
            raise ValueError(
                f"additional_config[{KEY!r}] needs worker_cls={WORKER!r}; "
                f"got {worker!r}. attnstats.integrations.vllm.engine_arguments has both settings"
            )
        return WatchedImpl


class WatchedImpl(CPUAttentionBackendImpl):
    """The attention of one layer, which shows its inputs to `watch` where the layer is recorded."""

    watch: Watch | None = None

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        output = super().forward(layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs)
        if self.watch is not None and attn_metadata is not None:
            self.watch(query, KeyCache(kv_cache.shape[2], functools.partial(_keys, layer.isa, kv_cache)), attn_metadata)
        return output

    @property
    def left(self) -> int | None:
        """How far behind itself a query sees; None: all the way."""
        return None if self.sliding_window < 0 else self.sliding_window - 1


def _keys(isa: str, kv_cache: Tensor, blocks: Tensor) -> Tensor:
    """(blocks, block size, key heads, D) the keys of some blocks of the cache."""
    size, dim = kv_cache.shape[2], kv_cache.shape[3] // 2
    keys = kv_cache[blocks].flatten(2)[..., : size * dim]
    return keys[..., places(isa, size, dim, kv_cache.dtype)].unflatten(-1, (size, dim)).transpose(1, 2)


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
