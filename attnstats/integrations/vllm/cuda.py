"""vLLM's FlashAttention for NVIDIA GPUs, whose captured layers show their queries and their paged cache.

Written against the source of vLLM 0.32 and not run on a GPU. A layer of an engine without settings is vLLM's own.
vLLM does not ask its kernel for the log-sum-exps, so a captured layer calls it once more for these.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.utils.torch_utils import canonicalize_singleton_dim_strides
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends import fa_utils
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)

from attnstats.integrations.vllm.configuration import is_recorded, requested
from attnstats.integrations.vllm.recorder import Watched
from attnstats.integrations.vllm.sums import KeyCache


class WatchedFlashBuilder(FlashAttentionMetadataBuilder):
    """vLLM's builder of metadata; with settings it says that CUDA graphs can't hold attention.

    A graph is replayed without Python. vLLM then leaves attention out of its graphs (cudagraph_mode PIECEWISE), and
    refuses to start with FULL.
    """

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        if requested(vllm_config) is not None:
            return AttentionCGSupport.NEVER
        return super().get_cudagraph_support(vllm_config, kv_cache_spec)


class WatchedFlashBackend(FlashAttentionBackend):
    """vLLM's backend; layers of an engine with settings can be watched."""

    @staticmethod
    def get_impl_cls() -> type[FlashAttentionImpl]:
        return WatchedFlashImpl if is_recorded(get_current_vllm_config()) else FlashAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[FlashAttentionMetadataBuilder]:
        return WatchedFlashBuilder


class WatchedFlashImpl(Watched, FlashAttentionImpl):
    """The attention of one layer, which can be watched."""

    @property
    def left(self) -> int | None:
        """How far behind itself a query sees; None: all the way."""
        return None if self.sliding_window[0] < 0 else self.sliding_window[0]

    def key_cache(self, layer: Any, query: Tensor, kv_cache: Tensor, metadata: Any) -> KeyCache:
        # (blocks, heads, size, keys and values) in every layout, of which strides tell.
        pages = kv_cache.transpose(1, 2)[..., : self.head_size]
        return KeyCache(pages.shape[1], pages.__getitem__, pages, lambda: self._log_sum_exps(query, pages, metadata))

    def _log_sum_exps(self, query: Tensor, pages: Tensor, metadata: Any) -> Tensor | None:
        """(Hq, n) float32, of the step's queries."""
        if self.fa4_hd256:
            return None  # its kernel wants pages and lengths of its own
        keys = canonicalize_singleton_dim_strides(pages)
        _, lse = fa_utils.flash_attn_varlen_func(
            q=query[: metadata.num_actual_tokens],
            k=keys,
            v=keys,  # the output is not used
            max_seqlen_q=metadata.max_query_len,
            cu_seqlens_q=metadata.query_start_loc,
            max_seqlen_k=metadata.max_seq_len,
            seqused_k=metadata.seq_lens,
            softmax_scale=self.scale,
            causal=True,
            window_size=list(self.sliding_window),
            softcap=self.logits_soft_cap,
            block_table=metadata.block_table,
            return_softmax_lse=True,
            fa_version=self.vllm_flash_attn_version,
        )
        # Sinks are added here, so that it does not matter whether a kernel's lse has them.
        return lse if self.sinks is None else torch.logaddexp(lse, self.sinks.to(lse.dtype)[:, None])
