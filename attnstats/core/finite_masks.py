"""Additive masks that hide a key by a large finite number, such as -10000 or the smallest of a dtype.

Such a mask hides what it should only if the scores are small beside it. That is proven here from a bound of the scores,
in O(T D), and where each row keeps a key; a row that has none attends to the keys which it should not.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attnstats.core.geometry import rows_before
from attnstats.core.patterns import MaskPattern, recognise
from attnstats.core.visibility import seen_keys

# What a refusal adds for additive masks.
FINITE = (
    ". A finite number counts as -inf where no score of these queries and keys can make up for it and every row keeps "
    "another key"
)
SLACK = 1.02  # of the bound, for scores in bfloat16


def recognise_finite(mask: Tensor, query: Tensor, key: Tensor, scale: float | None) -> MaskPattern | None:
    """The pattern of a mask, as `recognise`, whose hidden keys have an A that is exactly 0; None where that isn't sure.

    Args:
        mask: (..., Hq | 1, Tq | 1, Tk), bool or additive.
        query, key: (B, H, T, D).
        scale: None: 1 / sqrt(D).
    """
    if mask.dtype == torch.bool or mask.requires_grad:
        return None
    pattern = recognise(mask, query.shape[2], hidden=-_lead(query.detach(), key.detach(), scale))
    if pattern is None or not _every_row_sees_a_key(pattern, query.shape[2], mask.shape[-1]):
        return None
    return pattern


def _lead(query: Tensor, key: Tensor, scale: float | None) -> float:
    """How far a mask must lower a score so that A = exp(score - maximum) underflows beside any visible key; inf: no
    number is far enough."""
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    longest = [torch.linalg.vector_norm(x, dim=-1, dtype=wide).amax(-1) for x in (query, key)]  # (B, H)
    of_keys = longest[1].repeat_interleave(longest[0].shape[1] // longest[1].shape[1], dim=1)
    scale = query.shape[-1] ** -0.5 if scale is None else abs(scale)
    largest = float((longest[0] * of_keys).max()) * scale * SLACK
    smallest = torch.finfo(wide).smallest_normal * torch.finfo(wide).eps  # not 0, and exp rounds half of it to 0
    lead = 2 * largest + 1 - math.log(smallest)
    return lead if math.isfinite(lead) else math.inf


def _every_row_sees_a_key(pattern: MaskPattern, query_length: int, key_length: int) -> bool:
    key_mask = pattern.key_mask
    if pattern.query_offset is None:
        return key_mask is None or bool(key_mask.any(-1).all())
    device = torch.device("cpu") if key_mask is None else key_mask.device
    position = torch.arange(query_length, dtype=torch.int64, device=device) + pattern.query_offset
    length = torch.tensor(key_length, dtype=torch.int64, device=device)
    first, end = seen_keys(position, length, pattern.left, pattern.right)
    if key_mask is None:
        return bool((end > first).all())
    before = rows_before(key_mask)
    return bool((before[..., end] > before[..., first]).all())
