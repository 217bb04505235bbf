"""Attention in blocks, packed rows or chunks, as packed sequences: where each block begins and ends.

Shapes depend on lengths alone, never on numbers, so that graphs have these boundaries too. Blocks that a row doesn't
have are empty sequences.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnstats.errors import InputError
from attnstats.transformers.masks import MaskDescription, is_unreadable


def boundaries(mask: MaskDescription, batch: int, device: torch.device, where: str) -> tuple[Tensor, Tensor]:
    """cu_seqlens of queries and of keys of all batch rows laid end to end, int32.

    Padding on either side is a block of queries that see no key. Raises InputError for padding between real tokens,
    in a graph RuntimeError when it runs; `where` names the call.
    """
    query_length, key_length = mask.query_length, mask.readable_keys
    begin, end = _real_keys(mask, batch, device, where)
    starts = _starts(mask, device).expand(batch, -1)
    edges = torch.cat([begin, torch.minimum(torch.maximum(starts, begin), end), end], dim=1)
    of_query = (edges - mask.query_offset).clamp(0, query_length)
    of_key = (edges - mask.key_offset).clamp(0, key_length)

    # Per row: queries before the first real key, keys before it, the blocks, queries and keys behind the last.
    none = torch.zeros_like(begin)
    queries, keys = none + query_length, none + key_length
    rows = torch.arange(batch, dtype=torch.int64, device=device)[:, None]
    cu_seqlens_q = torch.cat([none, of_query[:, :1], of_query, queries, queries], dim=1) + rows * query_length
    cu_seqlens_k = torch.cat([none, none, of_key, of_key[:, -1:], keys], dim=1) + rows * key_length
    pairs = torch.stack([cu_seqlens_q.flatten(), cu_seqlens_k.flatten()], dim=1).int()
    if not is_unreadable(pairs):
        pairs = torch.unique_consecutive(pairs, dim=0)
    return pairs[:, 0].contiguous(), pairs[:, 1].contiguous()


def _starts(mask: MaskDescription, device: torch.device) -> Tensor:
    """(B | 1, n) positions at which blocks begin, ascending; a block may be named several times."""
    if mask.segments is not None:
        ids = mask.segments.to(device)
        first = torch.nn.functional.pad(ids[:, 1:] == ids[:, :-1], (1, 0), value=False)
        position = torch.arange(ids.shape[1], dtype=torch.int64, device=device)
        return position.masked_fill(first, 0).cummax(-1).values
    assert mask.chunks is not None
    size, first = mask.chunks.size, mask.chunks.first.to(device)[:, None]
    chunk = torch.div(mask.key_offset - first, size, rounding_mode="floor")
    count = mask.readable_keys // size + 2
    return first + (chunk + torch.arange(count, dtype=torch.int64, device=device)) * size


def _real_keys(mask: MaskDescription, batch: int, device: torch.device, where: str) -> tuple[Tensor, Tensor]:
    """(B, 1) positions of the first real key that a query sees, and behind the last; without any the same."""
    index = torch.arange(mask.readable_keys, dtype=torch.int64, device=device)
    real = (index < mask.used_keys).expand(batch, -1)
    if mask.key_mask is not None:
        real = real & mask.key_mask[:, : mask.readable_keys].to(device)
    count = real.sum(1, keepdim=True)
    last = (real * (index + 1)).amax(1, keepdim=True)
    first = (last - count).clamp(min=0)
    apart = (real & (index < first)).any(1)
    if is_unreadable(apart):
        torch._assert_async(~apart.any(), f"{where} {APART}")
    elif bool(apart.any()):
        raise InputError(f"{where} {APART}, in batch row {int(apart.nonzero()[0])}")
    return first + mask.key_offset, last + mask.key_offset


APART = "has padding between real tokens and attends in blocks, which cannot be computed; pad on one side"
