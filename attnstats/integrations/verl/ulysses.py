"""verl's Ulysses exchange, for the attention of layers that don't call verl's patched FlashAttention."""

from __future__ import annotations

import torch
from torch import Tensor
from verl.utils.ulysses import (
    gather_heads_scatter_seq,
    gather_seq_scatter_heads,
    get_ulysses_sequence_parallel_group,
    get_ulysses_sequence_parallel_world_size,
)

from attnstats.transformers.exchange import HeadExchange


def exchange_of(position_ids: Tensor) -> HeadExchange:
    """The exchange of the packed row of which this rank has a part, with position_ids (1, T / n)."""
    group = get_ulysses_sequence_parallel_group()
    parts = [torch.empty_like(position_ids) for _ in range(get_ulysses_sequence_parallel_world_size())]
    torch.distributed.all_gather(parts, position_ids.contiguous(), group=group)
    return HeadExchange(group, torch.cat(parts, -1), _to_heads, _to_rows)


def _to_heads(x: Tensor) -> Tensor:
    repeats = max(get_ulysses_sequence_parallel_world_size() // x.shape[1], 1)
    return gather_seq_scatter_heads(x.repeat_interleave(repeats, dim=1), seq_dim=2, head_dim=1)


def _to_rows(x: Tensor) -> Tensor:
    return gather_heads_scatter_seq(x, head_dim=2, seq_dim=1)
