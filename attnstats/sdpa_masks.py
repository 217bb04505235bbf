"""Reading a Tq x Tk attention mask back into the few facts that it was made from.

Modules hand SDPA whole masks for what is said in O(T): which keys are padding, and that attention is causal.
`recognise` compares every element, in blocks of rows, and takes no hint; a mask that is anything else stays
unrecognised. Used by nn.py and patch.py, whose masks say what torch says; those of transformers are in masks.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

BLOCK = 2**20  # elements that are compared at a time
REMEMBERED = 16  # views of one mask

# Every layer of a model passes the same mask: {mask: {(version, shape, ...): what it is}}
_RECOGNISED: WeakIdKeyDictionary = WeakIdKeyDictionary()


@dataclass(frozen=True, eq=False)
class Recognised:
    """Query i sees the keys j <= i + offset (offset None: every key) for which `keep` is True.

    Attributes:
        keep: (..., Tk) bool, in the mask's leading dimensions without that of heads; None: all keys.
    """

    keep: Tensor | None
    offset: int | None


def recognise(mask: Tensor, query_length: int, *, true_hides: bool = False) -> Recognised | None:
    """What the mask says, or None where that is not a key mask, a causal mask, or both at once.

    Args:
        mask: (..., Hq | 1, Tq | 1, Tk), bool, or float with 0 for visible and -inf for hidden. One that requires a
            gradient is a bias that is learned, whatever it is now: None.
        query_length: Tq.
        true_hides: True in a bool mask hides a key (nn.MultiheadAttention); else it shows one (SDPA).
    """
    if mask.requires_grad:
        return None
    if mask.is_inference():  # has no version; torch.compile breaks the graph here, before it would trace what follows
        return _recognise(mask, query_length, true_hides)
    owner = mask if mask._base is None else mask._base
    known = _RECOGNISED.setdefault(owner, {})
    facts = (mask._version, mask.shape, mask.stride(), mask.storage_offset(), mask.dtype, query_length, true_hides)
    if facts not in known:
        if len(known) >= REMEMBERED:
            known.clear()
        known[facts] = _recognise(mask, query_length, true_hides)
    return known[facts]


def refusal(name: str, mask: Tensor) -> str:
    """The error for a mask that was not recognised."""
    return (
        f"{name}: this {mask.dtype} mask of shape {tuple(mask.shape)} is neither causal (query i sees keys j <= i, or "
        "j <= i + Tk - Tq) nor the same for every query and head, nor both at once, in bool or in 0 and -inf; other "
        "masks and biases take O(Tq * Tk) memory: pass allow_dense=True"
    )


def keys_kept(mask: Tensor, *, true_hides: bool) -> Tensor | None:
    """A mask over keys, bool or float, as bool with True for visible; None where it holds more than 0 and -inf."""
    if mask.dtype == torch.bool:
        return ~mask if true_hides else mask
    visible = mask == 0
    return visible if not mask.requires_grad and bool((visible | (mask == -torch.inf)).all()) else None


def _recognise(mask: Tensor, query_length: int, true_hides: bool) -> Recognised | None:
    key_length = mask.shape[-1]
    keep = keys_kept(mask[..., 0, -1, :].detach(), true_hides=true_hides)
    if keep is None:
        return None
    if mask.shape[-2] == 1:
        return _as_found(keep, None) if _equals(mask, keep, None, true_hides) else None
    for offset in dict.fromkeys((None, 0, max(0, key_length - query_length))):
        # The last row knows which keys are padding, but not of those that it doesn't see.
        seen = keep
        if offset is not None:
            seen = keep | (torch.arange(key_length, device=mask.device) >= query_length + offset)
        if _equals(mask, seen, offset, true_hides):
            return _as_found(seen, offset)
    return None


def _as_found(keep: Tensor, offset: int | None) -> Recognised:
    return Recognised(None if bool(keep.all()) else keep.clone(), offset)  # a view would keep the mask alive


def _equals(mask: Tensor, keep: Tensor, offset: int | None, true_hides: bool) -> bool:
    """Whether every element of the mask is what keep and offset say."""
    key = torch.arange(mask.shape[-1], device=mask.device)
    for rows in _blocks(mask):
        visible = keep[..., None, None, :]
        if offset is not None:
            visible = visible & (key <= torch.arange(rows.start, rows.stop, device=mask.device)[:, None] + offset)
        if mask.dtype == torch.bool:
            expected = ~visible if true_hides else visible
        else:
            expected = torch.zeros(visible.shape, dtype=mask.dtype, device=mask.device)
            expected = expected.masked_fill_(~visible, -torch.inf)
        block = mask[..., rows, :]
        if not torch.equal(block, expected.expand(block.shape)):
            return False
    return True


def _blocks(mask: Tensor) -> Iterator[slice]:
    rows = mask.shape[-2]
    step = max(1, BLOCK * rows // max(1, mask.numel()))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))
