"""The log-sum-exp of another attention kernel: its layout, its base, rows that see no key, and whether it is one.

`check_values` recomputes a few rows of each head, so it costs O(T), and tells a mistake from rounding: the limit is
above the error of every kernel that accumulates in float32, and of eager attention in half precision, and far below
what a wrong base or a lost mask makes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnstats.core.geometry import Geometry, rows_before
from attnstats.core.scores import softcap_, with_sinks

LN2 = math.log(2.0)
ROWS = 5  # of each head and batch row that are checked
CHUNK = 2**22  # elements of the keys that are widened at a time
# The errors of honest kernels. exp: torch's flash attention for the CPU is good to 2^-14, as is the polynomial by which
# FlashAttention 4 spares the special-function unit. Products of tf32: each factor is cut to 10 bits. tanh.approx of
# softcaps: 2^-11. Sums of D products: D roundings, cut instead of rounded in tensor cores.
EXPONENTIAL, TF32, TANH, ROUNDING = 2**-11, 2**-9, 2**-10, 2**-22


def check_lse(base: str, layout: str | None) -> None:
    """Raise ValueError for an unknown base or layout."""
    if layout not in (None, "HT", "TH"):
        raise ValueError(f"lse_layout must be 'HT', 'TH' or None (by its shape), got {layout!r}")
    if base not in ("e", "2"):
        raise ValueError(f"lse_base must be 'e' or '2', got {base!r}")


def natural_lse(lse: Tensor, base: str, layout: str | None, geometry: Geometry) -> Tensor:
    """The lse that a kernel returned as (B, Hq, Tq), contiguous, in natural logarithm, -inf for rows that see no key.

    Args:
        lse: (B, Hq, Tq), packed (Hq, total) or (total, Hq); a last dimension of 1 is dropped.

    Raises:
        TypeError, ValueError: a wrong base, layout, shape, dtype or device.
    """
    check_lse(base, layout)
    heads, length = geometry.query_heads, geometry.query_length
    shapes: list[tuple[int, ...]] = [(geometry.batch, heads, length)]
    if geometry.packing is not None:
        by_layout = {"HT": (heads, length), "TH": (length, heads)}
        shapes = [by_layout[layout]] if layout else list(by_layout.values())
    if not isinstance(lse, Tensor):
        raise TypeError(f"lse must be a tensor, got {type(lse).__name__}")
    shape = tuple(lse.shape)
    if shape not in shapes and shape[-1:] == (1,):
        shape = shape[:-1]
    if shape not in shapes:
        raise ValueError(f"lse must have the shape {' or '.join(map(str, shapes))}, got {tuple(lse.shape)}")
    if geometry.packing is not None and heads == length > 1 and layout is None:
        raise ValueError(f"lse of shape {shape} is ambiguous, as many heads as tokens; pass lse_layout='HT' or 'TH'")
    if lse.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"lse must be float32 or float64, got {lse.dtype}; in less its error is over 1 % of A")
    if lse.device != geometry.device:
        raise ValueError(f"lse must be on query's device {geometry.device}, got {lse.device}")
    lse = lse.detach().to(geometry.accumulator, copy=True).reshape(shape)
    if geometry.packing is not None:
        lse = (lse.T if layout == "TH" or (layout is None and shape != (heads, length)) else lse)[None]
    if base == "2":
        lse = lse * LN2
    lse = lse.contiguous()
    return lse if geometry.all_live else lse.masked_fill(~geometry.live()[:, None], -torch.inf)


def check_values(query: Tensor, key: Tensor, lse: Tensor, geometry: Geometry, base: str) -> None:
    """Raise ValueError where an lse isn't that of the scores, with the mistake that it looks like.

    It waits for the device. Rows with NaN or inf are passed over: they show in the results themselves.

    Args:
        lse: as `natural_lse` returned it, from a `base` of "e" or "2".
    """
    if not lse.numel() or not key.numel():
        return
    rows = _Rows.of(geometry)
    given = rows.take(lse).double()
    quick = _exact(query, key, geometry, rows, geometry.accumulator).lse.double()
    checked = rows.exist & ~given.isnan()
    if bool(((given - quick).abs() <= EXPONENTIAL)[checked & quick.isfinite()].all()):
        return
    exact = _exact(query, key, geometry, rows, torch.float64)
    returned = given / LN2 if base == "2" else given
    checked &= exact.lse.isfinite()
    of_many = checked & (exact.lse > exact.largest)  # the lse of a single key is its score, which may be rounded
    half = _half_precision(returned[of_many])
    limit = _largest_rounding(exact, geometry, half is None)
    excess = ((given - exact.lse).abs() - limit).masked_fill(~checked, 0.0)
    if bool((excess <= 0).all()):
        return

    batch, which, row = (int(i) for i in torch.unravel_index(excess.argmax(), excess.shape))
    place = f"{'token' if geometry.packing else f'batch row {batch}, query'} {int(rows.places[batch, row])}"
    mistakes = _mistakes(query, key, lse, given, geometry, base, rows, exact)
    by_numbers = _by_numbers(given, exact.lse, limit, checked, half)
    looks = (text for text, found, right in mistakes if bool(((found - right).abs() <= limit)[checked].all()))
    raise ValueError(
        "lse: not the natural log of the sum of exp(score) over the keys that a query sees: in head "
        f"{which}, {place} it is {float(given[batch, which, row]):.6g} and not "
        f"{float(exact.lse[batch, which, row]):.6g}. "
        f"{next(looks, by_numbers)}. check=False takes it as it is, "
        "as for an lse of merged parts, which counts keys that aren't passed"
    )


class _Rows(NamedTuple):
    """Rows of each batch row, spread evenly over those that see a key and are no padding."""

    places: Tensor  # (B, n)
    exist: Tensor  # (B, 1, 1) bool: there are any

    @staticmethod
    def of(geometry: Geometry) -> _Rows:
        real = geometry.live()
        if geometry.real_queries is not None:
            real = real & geometry.real_queries
        before = rows_before(real)
        count = before[:, -1:]
        n = min(ROWS, geometry.query_length)
        part = torch.arange(n, dtype=torch.int64, device=geometry.device)
        ordinal = 1 + (count - 1).clamp(min=0) * part // max(1, n - 1)
        places = (torch.searchsorted(before, ordinal) - 1).clamp(max=geometry.query_length - 1)
        return _Rows(places, (count > 0)[..., None])

    def take(self, x: Tensor) -> Tensor:
        """x[b, h, places[b]] of (B, H, T, ...)."""
        return torch.stack([of_row[:, places] for of_row, places in zip(x, self.places, strict=True)])


class _Exact(NamedTuple):
    """Of rows, each (B, Hq, n)."""

    lse: Tensor
    largest: Tensor  # score
    size: Tensor  # largest sum of the magnitudes of a score's products, to which its rounding is proportional


def _exact(query: Tensor, key: Tensor, geometry: Geometry, rows: _Rows, dtype: torch.dtype) -> _Exact:
    """`dtype`: in which it is computed; `size` only in float64."""
    taken = rows.take(query).to(dtype) * geometry.scale
    first, end = (x.expand(geometry.query_length)[rows.places][..., None] for x in geometry.seen())
    index = torch.arange(geometry.key_length, dtype=torch.int64, device=geometry.device)
    visible = (index >= first) & (index < end)  # (B, n, Tk)
    if geometry.key_mask is not None:
        visible = visible & geometry.key_mask[:, None]
    hidden = ~visible[:, None, None]
    bias = None
    if geometry.dense_mask is not None:
        shape = (geometry.batch, geometry.query_heads, geometry.query_length, geometry.key_length)
        bias = rows.take(geometry.dense_mask.expand(shape))
    step = max(1, CHUNK * geometry.key_heads // key.numel())
    parts = []
    for start in range(0, geometry.key_heads, step):
        heads = slice(start * geometry.group, min(start + step, geometry.key_heads) * geometry.group)
        of_keys = key[:, start : start + step].to(dtype)
        of_rows = taken[:, heads].reshape(*of_keys.shape[:2], -1, geometry.head_dim)  # (B, key heads, group * n, D)
        shape = (*of_keys.shape[:2], geometry.group, -1, geometry.key_length)
        scores = softcap_(of_rows @ of_keys.mT, geometry.softcap).view(shape)
        if bias is not None:
            of_pairs = bias[:, heads].unflatten(1, (-1, geometry.group))
            if bias.dtype == torch.bool:
                of_pairs = torch.zeros_like(scores).masked_fill_(~of_pairs, -torch.inf)
            scores = scores + of_pairs
        scores = scores.masked_fill(hidden, -torch.inf)
        size = scores
        if dtype == torch.float64:
            size = (of_rows.abs() @ of_keys.abs().mT).view(shape).masked_fill(hidden, 0.0)
        parts.append([x.flatten(1, 2) for x in (scores.logsumexp(-1), scores.amax(-1), size.amax(-1))])
    lse, largest, size = (torch.cat(of_all, dim=1) for of_all in zip(*parts, strict=True))
    if geometry.sinks is not None:
        lse = with_sinks(lse, geometry.sinks)
    return _Exact(lse, largest, size)


def _half_precision(returned: Tensor) -> torch.dtype | None:
    """The dtype to which all these numbers are rounded."""
    for dtype in (torch.bfloat16, torch.float16):
        if len(returned) and bool(((returned.to(dtype).double() - returned).abs() <= 1e-6 * returned.abs()).all()):
            return dtype
    return None


def _largest_rounding(exact: _Exact, geometry: Geometry, eager: bool) -> Tensor:
    """(B, Hq, n) the largest error of a kernel that is right; eager: it may round scores to the dtype of the inputs."""
    limit = EXPONENTIAL + ROUNDING * geometry.head_dim * (exact.size + exact.lse.abs())
    if geometry.dtype == torch.float32 and geometry.device.type != "cpu":
        limit = limit + TF32 * exact.size
    if geometry.softcap is not None:
        limit = limit + TANH * exact.size.clamp(max=geometry.softcap)
    if eager and geometry.dtype in (torch.float16, torch.bfloat16):
        # The mean of |score| under A, to first order: the difference to the largest is at most the entropy.
        limit = limit + torch.finfo(geometry.dtype).eps * (exact.largest.abs() + math.log(geometry.key_length))
    return limit


def _mistakes(
    query: Tensor, key: Tensor, lse: Tensor, given: Tensor, geometry: Geometry, base: str, rows: _Rows, exact: _Exact
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """What each mistake looks like, and two tensors that agree if it is this one."""
    if base == "e":
        yield "It looks like a log to base 2: pass lse_base='2'", given * LN2, exact.lse
    else:
        yield "It looks like a natural log: pass lse_base='e'", given / LN2, exact.lse
    yield "It is zero everywhere, as a buffer that no kernel filled", given, torch.zeros_like(given)
    for text, changed in _other_calls(geometry):
        if any(_differ(getattr(geometry, name), value) for name, value in changed.items()):
            other = dataclasses.replace(geometry, memo={}, **changed)
            of_other = _exact(query, key, other, rows, torch.float64).lse
            yield f"It looks like that of a kernel {text}", given, of_other
    by_rows = lse.reshape(geometry.batch, geometry.query_length, geometry.query_heads).transpose(1, 2)
    for text, ordered in (
        ("(T, H), reshaped instead of transposed", by_rows),
        ("in reverse", lse.flip(-1)),
    ):
        yield f"Its rows look out of order: {text}", rows.take(ordered).double(), exact.lse
    yield "It looks like each row's largest score", given, exact.largest
    yield "It looks like sums of exp(score) without their log", given, exact.lse.exp()
    yield (
        "It looks like the log of sums of exp(score - largest score), without that score",
        given,
        (exact.lse - exact.largest),
    )


def _other_calls(geometry: Geometry) -> Iterator[tuple[str, dict[str, Any]]]:
    """What another kernel did, and the fields of the geometry of that."""
    last = geometry.key_length - geometry.query_length
    yield "without the causal mask", {"right": None}
    yield "with a causal mask, for is_causal=False", {"right": 0}
    yield "without window_size", {"left": None, "right": 0 if geometry.is_causal else None}
    yield "without the mask of padding", {"key_mask": None}
    yield "without attn_mask", {"dense_mask": None}
    yield "without sinks", {"sinks": None}
    yield "without softcap", {"softcap": None}
    yield f"without scale={geometry.scale:.4g}", {"scale": 1.0}
    yield f"with scale 1 / sqrt(head_dim), not {geometry.scale:.4g}", {"scale": geometry.head_dim**-0.5}
    if geometry.packing is None:
        yield f"whose first query is at 0, not at {geometry.offset}", {"query_offset": 0}
        yield f"whose first query is at Tk - Tq, not at {geometry.offset}", {"query_offset": last}
    yield "that takes the packed sequences for one", {"packing": None, "query_offset": last}


def _differ(old: Any, new: Any) -> bool:
    return old is not new and (new is None or old is None or old != new)


def _by_numbers(given: Tensor, exact: Tensor, limit: Tensor, checked: Tensor, half: torch.dtype | None) -> str:
    """What it looks like from the numbers alone."""
    if half is not None:
        rounding = torch.finfo(half).eps * exact.abs()
        if bool(((given - exact).abs() <= limit + rounding)[checked].all()):
            return f"It looks rounded to {half}: keep the float32 that the kernel computed"
    pairs = ((given[:, :, None] - exact[:, None]).abs() <= limit[:, None]) | ~checked[:, :, None]
    if bool(pairs.all(-1).all(0).any(-1).all()):
        return "Its heads look out of order"
    pairs = ((given[:, None] - exact[None]).abs() <= limit[None]) | ~checked[:, None]
    if bool(pairs.flatten(2).all(-1).any(-1).all()):
        return "Its batch rows look out of order"
    if bool((given >= exact - limit)[checked].all()):
        return "It looks as if it counted keys that aren't passed, or that the arguments hide"
    if bool((given <= exact + limit)[checked].all()):
        return "It looks as if it left out keys that are passed"
    return "Query, key, masks, scale, softcap and sinks must be those that the kernel used"
