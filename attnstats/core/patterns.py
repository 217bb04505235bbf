"""Reading a Tq x Tk attention mask back into the few facts it was made from.

Modules pass whole masks to say what O(T) numbers can say: which keys are padding, that attention is causal, how far
it looks. `recognise` reads a pattern off a few rows and columns, then compares every element with it, and takes no
hint. It remembers nothing: whoever made the mask may write into it, and numpy, `.data` and kernels do so without a
trace. Any other mask is not recognised: it needs the whole map, and `allow_whole_map` raises or warns.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnstats.core.library import first_difference
from attnstats.core.visibility import within

BLOCK = 2**18  # elements that are compared at a time


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
    read = _read
    if torch.compiler.is_compiling():  # not above the function: it imports torch's compiler, and with it Triton
        read = torch.compiler.disable(_read, reason="what a mask shows decides how attention is computed")
    return read(mask, query_length, true_hides, hidden)


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


def _read(mask: Tensor, query_length: int, true_hides: bool, hidden: float) -> MaskPattern | None:
    """`recognise`, not traced."""
    leading, mask = mask.shape[:-3], mask.detach()
    for dim in range(mask.dim() - 2):
        if mask.stride(dim) == 0:  # expanded: the same elements
            mask = mask.narrow(dim, 0, 1)
    if mask.numel() == 0:
        return MaskPattern()
    entries = _Entries.of(mask, true_hides, hidden)
    pattern = None if entries is None else _recognise(entries, query_length)
    if pattern is None or pattern.key_mask is None:
        return pattern
    hides = not bool(pattern.key_mask.all())
    return pattern._replace(key_mask=pattern.key_mask.expand(*leading, -1).clone() if hides else None)


class _Entries(NamedTuple):
    """A mask and what its elements mean.

    Attributes:
        mask: (..., Hq | 1, Tq | 1, Tk).
        visible, concealed: the elements of a key that is seen and of one that isn't. Other elements that mean the same
            are compared more slowly.
    """

    mask: Tensor
    visible: float
    concealed: float
    true_hides: bool
    hidden: float

    @staticmethod
    def of(mask: Tensor, true_hides: bool, hidden: float) -> _Entries | None:
        """None where the first or the last row holds other numbers than 0 and those that count as -inf."""
        if mask.dtype == torch.bool:
            return _Entries(mask, not true_hides, true_hides, true_hides, hidden)
        lowest = torch.minimum(mask[..., 0, :].amin(), mask[..., -1, :].amin()).item()
        if lowest == 0:
            lowest = -math.inf
        return _Entries(mask, 0.0, lowest, true_hides, hidden) if lowest <= hidden else None

    @property
    def one_head(self) -> Tensor:
        return self.mask[..., 0, :, :]

    def shown(self, elements: Tensor) -> Tensor:
        """As bool, True for visible."""
        return elements == self.visible

    def show(self, elements: Tensor, expected: Tensor) -> bool:
        """True if elements of the mask show just the keys that are True in `expected`, which broadcasts to them."""
        expected = expected.expand(elements.shape)
        if elements.dtype == torch.bool:
            return _same(elements, ~expected if self.true_hides else expected)
        return _same(self.shown(elements), expected) and _same(elements <= self.hidden, ~expected)

    def of_keys(self, key_mask: Tensor) -> Tensor:
        """The elements that stand for a bool tensor, True for visible."""
        elements = torch.full(key_mask.shape, self.concealed, dtype=self.mask.dtype, device=self.mask.device)
        return elements.masked_fill_(key_mask, self.visible)


class _Extent(NamedTuple):
    ahead: int  # the farthest that any query sees ahead of its index
    behind: int  # and behind it


def _recognise(entries: _Entries, query_length: int) -> MaskPattern | None:
    """`recognise`, with a key mask that may hide nothing."""
    mask = entries.mask
    key_length = mask.shape[-1]
    first, last = (entries.shown(entries.one_head[..., row, :]) for row in (0, -1))
    if torch.equal(first, last):  # first, as a window whose edge lies in the padding would fit too
        pattern = MaskPattern(first)
        if _equals(entries, pattern):
            return pattern
    if mask.shape[-2] == 1:
        return None
    key = torch.arange(key_length, device=mask.device, dtype=torch.int64)
    for offset in _offsets(entries, query_length):
        key_mask = _seen_in_place(entries, offset)
        extent = _extent(entries, key_mask)
        if extent is None:
            continue
        ahead, behind = extent.ahead - offset, extent.behind + offset
        right = None if ahead >= key_length - 1 - offset else ahead
        left = None if behind >= offset + query_length - 1 else behind
        if right is not None:  # keys that no query can see may be padding or not
            key_mask = key_mask | (key >= offset + query_length + right)
        if left is not None:
            key_mask = key_mask | (key < offset - left)
        pattern = MaskPattern(key_mask, None if left is right is None else offset, left, right)
        if (right is None or right >= 0) and (left is None or left >= 0) and _equals(entries, pattern):
            return pattern
    return None


def _offsets(entries: _Entries, query_length: int) -> Iterator[int]:
    """Positions that the first query may have: the queries are the last keys, or stand before the unused slots of a
    cache (where the mask is causal), or are the first keys."""
    last = max(0, entries.mask.shape[-1] - query_length)
    yield last
    if last > 0:
        extent = _extent(entries, _last_row(entries))
        ahead = 0 if extent is None else min(max(0, extent.ahead), last)
        if 0 < ahead < last:
            yield ahead
        yield 0


def _seen_in_place(entries: _Entries, offset: int) -> Tensor:
    """(..., Tk) bool: the query at a key's own position sees it, or the nearest one there is."""
    rows, key_length = entries.mask.shape[-2:]
    key = torch.arange(key_length, device=entries.mask.device, dtype=torch.int64)
    row = (key - offset).clamp(0, rows - 1).expand(*entries.one_head.shape[:-2], 1, -1)
    return entries.shown(entries.one_head.gather(-2, row))[..., 0, :]


def _last_row(entries: _Entries) -> Tensor:
    """(..., Tk) bool: the keys that the last query sees which sees any."""
    seen = entries.shown(entries.one_head[..., -1, :])
    row = entries.mask.shape[-2] - 1
    while row > 0 and not bool(seen.any()):
        row -= 1
        seen = entries.shown(entries.one_head[..., row, :])
    return seen


def _extent(entries: _Entries, seen: Tensor) -> _Extent | None:
    """The extent of a window, by the queries that see the last and the first of the keys (..., Tk) that are seen.

    None: no key is seen.
    """
    found = seen.any(-1)
    if not bool(found.any()):
        return None
    rows, key_length = entries.mask.shape[-2:]
    first_key, last_key = seen.byte().argmax(-1), key_length - 1 - seen.flip(-1).byte().argmax(-1)

    def queries(key: Tensor) -> Tensor:
        """(..., Tq) uint8: they see the key."""
        index = key[..., None, None].expand(*key.shape, rows, 1)
        return entries.shown(entries.one_head.gather(-1, index))[..., 0].byte()

    ahead = last_key - queries(last_key).argmax(-1)
    behind = rows - 1 - queries(first_key).flip(-1).argmax(-1) - first_key
    return _Extent(int(ahead[found].max()), int(behind[found].max()))


def _equals(entries: _Entries, pattern: MaskPattern) -> bool:
    """True if every element of the mask is as in the pattern: its bytes, and from where they differ its meaning."""
    mask, key_mask, offset = entries.mask, pattern.key_mask, pattern.query_offset
    assert key_mask is not None
    key = torch.arange(mask.shape[-1], device=mask.device, dtype=torch.int32)
    first = end = None
    if offset is not None:
        first = None if pattern.left is None else offset - pattern.left
        end = None if pattern.right is None else offset + pattern.right + 1
    lines, concealed = entries.of_keys(key_mask), entries.of_keys(torch.zeros_like(key, dtype=torch.bool))
    for rows in _blocks(mask, first_difference(mask, lines, concealed, first, end)):
        expected = key_mask[..., None, None, :]
        if offset is not None:
            position = torch.arange(rows.start, rows.stop, device=mask.device, dtype=torch.int32)[:, None] + offset
            window = within(position - key, pattern.left, pattern.right)
            expected = expected if window is None else expected & window
        if not entries.show(mask[..., rows, :], expected):
            return False
    return True


def _same(x: Tensor, y: Tensor) -> bool:
    """torch.equal of bool tensors of one shape, eight at a time where it can, as it compares one after the other."""
    if x.numel() % 8 == 0 and x.is_contiguous() and y.is_contiguous() and x.storage_offset() % 8 == 0:
        words = [z.flatten().view(torch.int64) for z in (x, y)]
        if torch.equal(*words):
            return True
    return torch.equal(x, y)  # a True may be another byte than 1


def _blocks(mask: Tensor, start: int) -> Iterator[slice]:
    """Slices of the rows from `start` on."""
    rows = mask.shape[-2]
    step = max(1, BLOCK * rows // mask.numel())
    for begin in range(start, rows, step):
        yield slice(begin, min(begin + step, rows))
