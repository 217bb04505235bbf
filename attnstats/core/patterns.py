"""Reading a Tq x Tk attention mask back into the few facts that it was made from.

Modules hand attention whole masks for what is said in O(T): which keys are padding, that attention is causal, how far
it looks. `recognise` compares every element, in blocks of rows, and takes no hint; a mask that is anything else stays
unrecognised. Used by nn.py, patch.py and, for masks of a user's own, masks.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

BLOCK = 2**20  # elements that are compared at a time
REMEMBERED = 16  # views of one mask

# Every layer of a model passes the same mask: {mask: {(version, shape, ...): what it is}}
_RECOGNISED: WeakIdKeyDictionary = WeakIdKeyDictionary()


class Sided:
    """What is said of a mask by how far behind and ahead of itself a query sees; None: all the way."""

    left: int | None
    right: int | None

    @property
    def is_causal(self) -> bool:
        return self.right == 0

    @property
    def window_size(self) -> tuple[int | None, int | None] | None:
        """As `attnstats.attention` takes it."""
        return None if self.left is None and not self.right else (self.left, self.right)


@dataclass(frozen=True, eq=False)
class Recognised(Sided):
    """Query i sees key j where `keep` is True and, with an offset, `-right <= i + offset - j <= left`.

    Attributes:
        keep: (..., Tk) bool, in the mask's leading dimensions without that of heads; None: all keys.
        offset: position of the first query; None: every query sees the same keys, and positions have no meaning.
        left, right: how far behind and ahead of itself a query sees; None: all the way.
    """

    keep: Tensor | None
    offset: int | None
    left: int | None = None
    right: int | None = None


def recognise(
    mask: Tensor, query_length: int, *, true_hides: bool = False, hidden: float = -math.inf
) -> Recognised | None:
    """What the mask says, or None where that is not a key mask, a causal mask or a window, or of these two at once.

    Queries are the last positions of the keys or, where only that fits, those at which attention is causal.

    Args:
        mask: (..., Hq | 1, Tq | 1, Tk), bool, or float with 0 for visible and `hidden` or less for hidden. One that
            requires a gradient is a bias that is learned, whatever it is now: None.
        query_length: Tq.
        true_hides: True in a bool mask hides a key (nn.MultiheadAttention); else it shows one (SDPA).
        hidden: what stands for -inf; transformers adds the smallest finite number.
    """
    if mask.requires_grad:
        return None
    if mask.is_inference():  # has no version; torch.compile breaks the graph here, before it would trace what follows
        return _recognise(mask, query_length, true_hides, hidden)
    owner = mask if mask._base is None else mask._base
    known = _RECOGNISED.setdefault(owner, {})
    layout = mask._version, mask.shape, mask.stride(), mask.storage_offset(), mask.dtype
    facts = (*layout, query_length, true_hides, hidden)
    if facts not in known:
        if len(known) >= REMEMBERED:
            known.clear()
        known[facts] = _recognise(mask, query_length, true_hides, hidden)
    return known[facts]


def refusal(name: str, mask: Tensor) -> str:
    """The error for a mask that was not recognised."""
    return (
        f"{name}: this {mask.dtype} mask of shape {tuple(mask.shape)} is neither causal, nor a window, nor the same "
        "for every query and head, nor of these two at once, in bool or in 0 and -inf; other masks and biases take "
        "O(Tq * Tk) memory: pass allow_dense=True"
    )


def keys_kept(mask: Tensor, *, true_hides: bool, hidden: float = -math.inf) -> Tensor | None:
    """A mask as bool with True for visible; None where it holds more than 0 and what stands for -inf."""
    if mask.dtype == torch.bool:
        return ~mask if true_hides else mask
    visible = mask == 0
    return visible if not mask.requires_grad and bool((visible | (mask <= hidden)).all()) else None


class _Outline(NamedTuple):
    keep: Tensor  # (..., Tk) the keys that any query sees
    ahead: int  # how far ahead and behind of its index any query sees
    behind: int


def _recognise(mask: Tensor, query_length: int, true_hides: bool, hidden: float) -> Recognised | None:
    mask = mask.detach()
    key_length = mask.shape[-1]
    outline = _outline(mask, true_hides, hidden)
    if outline is None:
        return None
    if mask.shape[-2] == 1:
        found = Recognised(outline.keep, None)
        return _tidy(found) if _equals(mask, found, true_hides) else None
    key = torch.arange(key_length, device=mask.device)
    last = max(0, key_length - query_length)
    # Last, where it is causal (the slots of a cache lie behind it), and first.
    for offset in dict.fromkeys((last, min(max(0, outline.ahead), last), 0)):
        ahead, behind = outline.ahead - offset, outline.behind + offset
        right = None if ahead >= key_length - 1 - offset else ahead
        left = None if behind >= offset + query_length - 1 else behind
        keep = outline.keep
        if right is not None:  # which keys are padding is not known of those that nobody could see
            keep = keep | (key >= offset + query_length + right)
        if left is not None:
            keep = keep | (key < offset - left)
        found = Recognised(keep, None if left is right is None else offset, left, right)
        if (right is None or right >= 0) and (left is None or left >= 0) and _equals(mask, found, true_hides):
            return _tidy(found)
    return None


def _tidy(found: Recognised) -> Recognised:
    assert found.keep is not None
    keep = None if bool(found.keep.all()) else found.keep.clone()  # a view would keep the mask alive
    return replace(found, keep=keep)


def _outline(mask: Tensor, true_hides: bool, hidden: float) -> _Outline | None:
    """None where the mask holds more than 0 and what stands for -inf."""
    key_length = mask.shape[-1]
    keep = torch.zeros((*mask.shape[:-3], key_length), dtype=torch.bool, device=mask.device)
    ahead, behind = -mask.shape[-2], -key_length
    for rows in _blocks(mask):
        shown = keys_kept(mask[..., rows, :], true_hides=true_hides, hidden=hidden)
        if shown is None:
            return None
        keep |= shown.flatten(-3, -2).any(-2)
        seen = shown.flatten(0, -3).any(0) if shown.dim() > 2 else shown  # (rows, Tk) by anybody
        index = torch.arange(rows.start, rows.stop, device=mask.device)
        sees = seen.any(-1)
        if bool(sees.any()):
            first, last = seen.byte().argmax(-1), key_length - 1 - seen.flip(-1).byte().argmax(-1)
            ahead = max(ahead, int((last - index)[sees].max()))
            behind = max(behind, int((index - first)[sees].max()))
    return _Outline(keep, ahead, behind)


def _equals(mask: Tensor, found: Recognised, true_hides: bool) -> bool:
    """Whether every element of the mask, which holds nothing but 0 and -inf, is what was found."""
    assert found.keep is not None
    key = torch.arange(mask.shape[-1], device=mask.device)
    for rows in _blocks(mask):
        visible = found.keep[..., None, None, :]
        if found.offset is not None:
            distance = torch.arange(rows.start, rows.stop, device=mask.device)[:, None] + found.offset - key
            if found.right is not None:
                visible = visible & (distance >= -found.right)
            if found.left is not None:
                visible = visible & (distance <= found.left)
        block = mask[..., rows, :]
        shown = block == 0 if mask.dtype != torch.bool else ~block if true_hides else block
        if not torch.equal(shown, visible.expand(block.shape)):
            return False
    return True


def _blocks(mask: Tensor) -> Iterator[slice]:
    rows = mask.shape[-2]
    step = max(1, BLOCK * rows // max(1, mask.numel()))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))
