"""Reading a Tq x Tk attention mask back into the few facts it was made from.

Modules pass whole masks to say what O(T) numbers can say: which keys are padding, that attention is causal, how far
it looks. `recognise` compares every element, in blocks of rows, and takes no hint. Any other mask is not recognised:
it needs the whole map, and `allow_whole_map` raises or warns.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from attnstats.core.visibility import within

BLOCK = 2**20  # elements that are compared at a time
CACHED_VIEWS = 16  # of one mask

# Every layer of a model passes the same mask: {mask: {(version, shape, ...): its pattern}}
_PATTERNS: WeakIdKeyDictionary = WeakIdKeyDictionary()


class MaskPattern(NamedTuple):
    """Query i sees key j where `key_mask` is True and, with a query_offset, `-right <= i + query_offset - j <= left`.

    Attributes:
        key_mask: (..., Tk) bool, in the mask's leading dimensions without that of heads; None: all keys.
        query_offset: position of the first query; None: every query sees the same keys, and positions have no meaning.
        left, right: how far behind and ahead of itself a query sees; None: no limit. Causal is right = 0.
    """

    key_mask: Tensor | None = None
    query_offset: int | None = None
    left: int | None = None
    right: int | None = None


def is_causal_bias(x: Any) -> bool:
    """True for a CausalBias, by its name: its module, torch.nn.attention.bias, imports Triton."""
    return type(x).__name__ == "CausalBias" and type(x).__module__ == "torch.nn.attention.bias"


CAUSAL = MaskPattern(query_offset=0, right=0)


def recognise(
    mask: Tensor, query_length: int, *, true_hides: bool = False, hidden: float = -math.inf
) -> MaskPattern | None:
    """The pattern of a mask, or None where it is not a key mask, causal, a window, or a key mask and one of these.

    Queries are the last positions of the keys or, where only that fits, those at which attention is causal.

    Args:
        mask: (..., Hq | 1, Tq | 1, Tk), bool, or float with 0 for visible and `hidden` or less for hidden. A mask that
            requires a gradient is a learned bias and never recognised.
        query_length: Tq.
        true_hides: True in a bool mask hides a key (nn.MultiheadAttention); else it shows one (SDPA).
        hidden: the largest number that counts as -inf; transformers adds the smallest finite number.
    """
    if mask.requires_grad:
        return None
    if mask.is_inference():  # has no version; torch.compile breaks the graph here, before it would trace what follows
        return _recognise(mask, query_length, true_hides, hidden)
    owner = mask if mask._base is None else mask._base
    cache = _PATTERNS.setdefault(owner, {})
    layout = mask._version, mask.shape, mask.stride(), mask.storage_offset(), mask.dtype
    view = (*layout, query_length, true_hides, hidden)
    if view not in cache:
        if len(cache) >= CACHED_VIEWS:
            cache.clear()
        cache[view] = _recognise(mask, query_length, true_hides, hidden)
    return cache[view]


def read_causal_bias(mask: Any, query_length: int, key_length: int) -> MaskPattern | None:
    """The pattern of `causal_upper_left` and `causal_lower_right` of torch.nn.attention.bias; None for anything else.

    Their storage holds no numbers: what they say is in their attributes.
    """
    if not is_causal_bias(mask):
        return None
    lower_right = mask.variant.name == "LOWER_RIGHT"
    lengths = mask.seq_len_q, mask.seq_len_kv
    name = f"causal_{mask.variant.name.lower()}{lengths}"
    if lengths != (query_length, key_length):
        raise ValueError(f"attn_mask: {name} is for other lengths than Tq={query_length}, Tk={key_length}")
    if lower_right and query_length > key_length:
        raise ValueError(
            f"attn_mask: {name} leaves the first {query_length - key_length} queries without a key; leave them out, "
            "or pass causal_upper_left if queries and keys begin together"
        )
    return CAUSAL._replace(query_offset=key_length - query_length if lower_right else 0)


def allow_whole_map(name: str, mask: Tensor, allow_dense: bool, *, where: str = "", stacklevel: int) -> None:
    """Warn that a mask which was not recognised takes the whole map; raise ValueError without `allow_dense`."""
    if not allow_dense:
        raise ValueError(
            f"{name}: this {mask.dtype} mask of shape {tuple(mask.shape)} is neither causal, nor a window, nor the "
            "same for every query and head, nor of these two at once, in bool or in 0 and -inf; other masks and biases "
            f"take O(Tq * Tk) memory: pass allow_dense=True{where}"
        )
    message = f"{name} of shape {tuple(mask.shape)}: attention on the whole map, in O(Tq * Tk) memory"
    warnings.warn(message, stacklevel=stacklevel + 1)


def visible_elements(mask: Tensor, *, true_hides: bool, hidden: float = -math.inf) -> Tensor | None:
    """A mask as bool with True for visible; None where it holds other numbers than 0 and those that count as -inf."""
    if mask.dtype == torch.bool:
        return ~mask if true_hides else mask
    visible = mask == 0
    return visible if not mask.requires_grad and bool((visible | (mask <= hidden)).all()) else None


class _Extent(NamedTuple):
    key_mask: Tensor  # (..., Tk) the keys that any query sees
    ahead: int  # the farthest that any query sees ahead of its index
    behind: int  # and behind it


def _recognise(mask: Tensor, query_length: int, true_hides: bool, hidden: float) -> MaskPattern | None:
    mask = mask.detach()
    key_length = mask.shape[-1]
    extent = _extent(mask, true_hides, hidden)
    if extent is None:
        return None
    pattern = MaskPattern(extent.key_mask)
    if _equals(mask, pattern, true_hides):  # first, as a window whose edge lies in the padding would fit too
        return _compact(pattern)
    if mask.shape[-2] == 1:
        return None
    key = torch.arange(key_length, device=mask.device, dtype=torch.int64)
    last = max(0, key_length - query_length)
    # Queries at the end of the keys, before the unused slots of a cache (where the mask is causal), or at the start.
    for offset in dict.fromkeys((last, min(max(0, extent.ahead), last), 0)):
        ahead, behind = extent.ahead - offset, extent.behind + offset
        right = None if ahead >= key_length - 1 - offset else ahead
        left = None if behind >= offset + query_length - 1 else behind
        key_mask = extent.key_mask
        if right is not None:  # keys that no query can see may be padding or not
            key_mask = key_mask | (key >= offset + query_length + right)
        if left is not None:
            key_mask = key_mask | (key < offset - left)
        pattern = MaskPattern(key_mask, None if left is right is None else offset, left, right)
        if (right is None or right >= 0) and (left is None or left >= 0) and _equals(mask, pattern, true_hides):
            return _compact(pattern)
    return None


def _compact(pattern: MaskPattern) -> MaskPattern:
    """The pattern with a copy of its key mask, as a view would keep the mask alive; without one that hides no key."""
    assert pattern.key_mask is not None
    return pattern._replace(key_mask=None if bool(pattern.key_mask.all()) else pattern.key_mask.clone())


def _extent(mask: Tensor, true_hides: bool, hidden: float) -> _Extent | None:
    """The extent of a mask; None where it holds other numbers than 0 and those that count as -inf."""
    key_length = mask.shape[-1]
    key_mask = torch.zeros((*mask.shape[:-3], key_length), dtype=torch.bool, device=mask.device)
    ahead, behind = -mask.shape[-2], -key_length
    for rows in _blocks(mask):
        visible = visible_elements(mask[..., rows, :], true_hides=true_hides, hidden=hidden)
        if visible is None:
            return None
        key_mask |= visible.flatten(-3, -2).any(-2)
        of_any = visible.flatten(0, -3).any(0) if visible.dim() > 2 else visible  # (rows, Tk)
        index = torch.arange(rows.start, rows.stop, device=mask.device, dtype=torch.int64)
        live = of_any.any(-1)
        if bool(live.any()):
            first, last = of_any.byte().argmax(-1), key_length - 1 - of_any.flip(-1).byte().argmax(-1)
            ahead = max(ahead, int((last - index)[live].max()))
            behind = max(behind, int((index - first)[live].max()))
    return _Extent(key_mask, ahead, behind)


def _equals(mask: Tensor, pattern: MaskPattern, true_hides: bool) -> bool:
    """True if every element of the mask, which is bool or holds 0 and -inf alone, is as in the pattern."""
    assert pattern.key_mask is not None
    key = torch.arange(mask.shape[-1], device=mask.device, dtype=torch.int64)
    for rows in _blocks(mask):
        expected = pattern.key_mask[..., None, None, :]
        if pattern.query_offset is not None:
            position = (
                torch.arange(rows.start, rows.stop, device=mask.device, dtype=torch.int64)[:, None]
                + pattern.query_offset
            )
            window = within(position - key, pattern.left, pattern.right)
            expected = expected if window is None else expected & window
        block = mask[..., rows, :]
        visible = block == 0 if mask.dtype != torch.bool else ~block if true_hides else block
        if not torch.equal(visible, expected.expand(block.shape)):
            return False
    return True


def _blocks(mask: Tensor) -> Iterator[slice]:
    rows = mask.shape[-2]
    step = max(1, BLOCK * rows // max(1, mask.numel()))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))
