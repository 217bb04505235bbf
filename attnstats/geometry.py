"""Who sees whom: lengths, positions, padding and counted queries of one attention call, validated once.

`Geometry.resolve` is the border: it turns the arguments of the public functions into a `Geometry`, or raises
an error that names the argument. Everything behind it trusts a Geometry, and what it derives costs O(T).
Used by every backend; `reference` only takes the plain facts and derives the rest from dense masks itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from attnstats.statistics import (
    LSE,
    ColumnStatistic,
    DistanceWeighted,
    PooledMap,
    Statistic,
    Statistics,
)

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True, eq=False)
class Geometry:
    """One attention call without its numbers.

    Attributes:
        query_offset: position of the first query; the keys stand at 0 .. key_length - 1. None where queries and
            keys share no positions (cross-attention), so that no distance is defined.
        key_mask: (B, Tk) bool, True where a key may be seen; None: all.
        query_real: (B, Tq) bool, True where a query isn't padding; None: all.
        query_mask: (B, Tq) bool, True where a query counts (the paper's response R); None: all.
        dense_mask: the caller's attn_mask where it depends on the query, (B|1, Hq|1, Tq|1, Tk), bool (True: may
            be seen) or additive. Only `reference` takes it.
    """

    batch: int
    query_heads: int
    key_heads: int
    query_length: int
    key_length: int
    head_dim: int
    value_dim: int
    dtype: torch.dtype
    device: torch.device
    scale: float
    is_causal: bool
    query_offset: int | None
    key_mask: Tensor | None = None
    query_real: Tensor | None = None
    query_mask: Tensor | None = None
    dense_mask: Tensor | None = None

    @property
    def group(self) -> int:
        """Query heads per key head."""
        return self.query_heads // self.key_heads

    @property
    def accumulator(self) -> torch.dtype:
        """The dtype of lse and of the statistics."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def offset(self) -> int:
        """`query_offset`, and 0 where positions have no meaning and only have to be consistent."""
        return self.query_offset or 0

    def live(self) -> Tensor:
        """(B, Tq) bool: the query sees at least one key. From the masks, never from an lse."""
        position = torch.arange(self.query_length, device=self.device) + self.offset
        if self.key_mask is None:
            return torch.ones(self.batch, self.query_length, dtype=torch.bool, device=self.device)
        if not self.is_causal:
            return self.key_mask.any(-1, keepdim=True).expand(self.batch, self.query_length)
        seen = self.key_mask.cumsum(-1) > 0
        return seen[:, position.clamp(max=self.key_length - 1)]

    def counted(self, last: int | None = None) -> Tensor | None:
        """(B, Tq) bool: the query counts in column statistics, only the `last` of them if given; None: all."""
        counted = self.query_real if self.query_mask is None else self.query_mask
        if counted is not None and self.query_mask is not None and self.query_real is not None:
            counted = self.query_mask & self.query_real
        if last is None:
            return counted
        if counted is None:
            counted = torch.ones(self.batch, self.query_length, dtype=torch.bool, device=self.device)
        rank_from_end = counted.flip(-1).cumsum(-1).flip(-1)
        return counted & (rank_from_end <= last)

    def queries_at_distance(self, lo: int, hi: int | None) -> Tensor:
        """(B, Tk) int64, |T(s)|: counted queries t with `lo <= t - s <= hi` (the denominator of Eq. 10)."""
        counted = self.counted()
        if counted is None:
            counted = torch.ones(1, self.query_length, dtype=torch.bool, device=self.device)
        before = torch.nn.functional.pad(counted.cumsum(-1), (1, 0))  # [B, Tq + 1]: counted among the first i
        key = torch.arange(self.key_length, device=self.device) - self.offset
        first = (key + lo).clamp(0, self.query_length)
        hi = None if hi is None else min(hi, self.offset + self.query_length)  # int64 holds key + hi
        end = (key + hi + 1).clamp(0, self.query_length) if hi is not None else torch.full_like(key, self.query_length)
        return (before[:, torch.maximum(first, end)] - before[:, first]).expand(self.batch, -1)

    def validity(self, statistic: Statistic) -> Tensor:
        """Where a value is more than a placeholder: (B, Tq) for rows, (B, Tk) for columns, (B, I, J) for a map."""
        key_real = torch.ones(self.batch, self.key_length, dtype=torch.bool, device=self.device)
        if self.key_mask is not None:
            key_real = self.key_mask
        if isinstance(statistic, ColumnStatistic):
            horizon = statistic.horizon
            return key_real if horizon is None else key_real & (self.queries_at_distance(*horizon) > 0)
        counted = self.counted()
        rows = self.live() if counted is None else self.live() & counted
        if not isinstance(statistic, PooledMap):
            return rows
        query_bounds, key_bounds = statistic.boundaries(self.query_length, self.key_length)
        return _any_per_segment(rows, query_bounds)[:, :, None] & _any_per_segment(key_real, key_bounds)[:, None, :]

    def shape_of(self, statistic: Statistic) -> tuple[int, ...]:
        """The shape of a statistic's tensor."""
        if isinstance(statistic, ColumnStatistic):
            return self.batch, self.query_heads, self.key_length
        if isinstance(statistic, PooledMap):
            query_bounds, key_bounds = statistic.boundaries(self.query_length, self.key_length)
            return self.batch, self.query_heads, len(query_bounds) - 1, len(key_bounds) - 1
        return self.batch, self.query_heads, self.query_length

    def finish(self, statistic: Statistic, tensor: Tensor) -> Tensor:
        """From sums to what is returned: means over counted queries, zeros where there is nothing but padding."""
        if isinstance(statistic, (LSE, PooledMap)):
            return tensor
        if isinstance(statistic, ColumnStatistic):
            if self.key_mask is not None:
                tensor = tensor.masked_fill(~self.key_mask[:, None], 0.0)
            if statistic.horizon is None:
                return tensor
            return tensor / self.queries_at_distance(*statistic.horizon).clamp(min=1)[:, None]
        if self.key_mask is None and self.query_real is None:
            return tensor
        rows = self.live() if self.query_real is None else self.live() & self.query_real
        return tensor.masked_fill(~rows[:, None], 0.0)

    def visible_pairs(self) -> int:
        """Pairs (t, s) that the causal mask lets through, of one head, padding included."""
        if not self.is_causal:
            return self.query_length * self.key_length
        first, last = self.offset + 1, self.offset + self.query_length  # keys that the first and last query see
        inside = min(last, self.key_length)
        rising = max(0, inside - first + 1)
        return (first + inside) * rising // 2 + (self.query_length - rising) * self.key_length

    @staticmethod
    def resolve(
        query: Tensor,
        key: Tensor,
        value: Tensor | None,
        statistics: tuple[Statistic, ...],
        *,
        attn_mask: Tensor | None = None,
        is_causal: bool = True,
        scale: float | None = None,
        enable_gqa: bool = False,
        query_mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        query_offset: int | None = None,
    ) -> Geometry:
        """Validate the arguments of `attnstats.attention`. Raises TypeError or ValueError naming the argument."""
        _check_tensors(query, key, value, enable_gqa)
        batch, query_heads, query_length, head_dim = query.shape
        key_length = key.shape[2]
        if query_offset is None:
            if is_causal and query_length > key_length:
                raise ValueError(
                    f"is_causal: queries are the last positions, so Tq <= Tk; got Tq={query_length}, Tk={key_length}. "
                    "Pass query_offset to place them elsewhere, or is_causal=False"
                )
            if is_causal or query_length == key_length:
                query_offset = key_length - query_length
        elif not isinstance(query_offset, int) or isinstance(query_offset, bool) or query_offset < 0:
            raise ValueError(f"query_offset must be an integer >= 0, got {query_offset!r}")
        if scale is not None and not (type(scale) in (int, float) and abs(scale) < float("inf")):
            raise ValueError(f"scale must be a finite number or None (1 / sqrt(head_dim)), got {scale!r}")

        for statistic in statistics:
            if isinstance(statistic, DistanceWeighted) and statistic.uses_distance and query_offset is None:
                raise ValueError(
                    f"statistics: {statistic} needs distances, and Tq={query_length} != Tk={key_length} with "
                    "is_causal=False is taken as cross-attention. Pass query_offset if queries and keys share positions"
                )
            if isinstance(statistic, PooledMap):
                statistic.boundaries(query_length, key_length)

        _check_mask("query_mask", query_mask, (batch, query_length), query.device)
        _check_mask("key_padding_mask", key_padding_mask, (batch, key_length), query.device)
        query_real = None
        if key_padding_mask is not None and query_offset is not None:  # padding positions aren't queries either
            position = torch.arange(query_length, device=query.device) + query_offset
            query_real = key_padding_mask[:, position.clamp(max=key_length - 1)] | (position >= key_length)
        key_mask, dense_mask = _split_mask(attn_mask, query, key_length)
        if key_mask is None:
            key_mask = key_padding_mask
        elif key_padding_mask is not None:
            key_mask = key_mask & key_padding_mask
        return Geometry(
            batch=batch,
            query_heads=query_heads,
            key_heads=key.shape[1],
            query_length=query_length,
            key_length=key_length,
            head_dim=head_dim,
            value_dim=head_dim if value is None else value.shape[3],
            dtype=query.dtype,
            device=query.device,
            scale=head_dim**-0.5 if scale is None else float(scale),
            is_causal=is_causal,
            query_offset=query_offset,
            key_mask=key_mask,
            query_real=query_real,
            query_mask=query_mask,
            dense_mask=dense_mask,
        )


class Evaluation(NamedTuple):
    """What a backend returns: output (B, Hq, Tq, Dv), lse (B, Hq, Tq), and a tensor per statistic."""

    output: Tensor
    lse: Tensor
    tensors: dict[Statistic, Tensor]


class Step(NamedTuple):
    """One pass of a plan, for `attnstats.explain`: what runs, what it computes, and what it costs over all heads."""

    runs: str
    computes: str
    flops: int
    scratch_bytes: int


class AttentionResult(NamedTuple):
    """What `attnstats.attention` returns; unpacks as `output, statistics`."""

    output: Tensor
    statistics: Statistics


def full_precision(device: torch.device) -> torch.autocast:
    """Autocast off: it would round the scores of float32 inputs to half precision, away from their lse."""
    return torch.autocast(device.type, enabled=False)


def divisor_of(lse: Tensor) -> Tensor:
    """The lse with +inf for rows that see nothing, so that exp(score - lse) is exactly 0 there, not NaN."""
    return lse.masked_fill(lse == -torch.inf, torch.inf)


def _any_per_segment(flags: Tensor, bounds: tuple[int, ...]) -> Tensor:
    """(B, T) bool to (B, n): any flag set in [bounds[i], bounds[i + 1])."""
    before = torch.nn.functional.pad(flags.cumsum(-1), (1, 0))
    return before[:, list(bounds)].diff(dim=-1) > 0


def _check_tensors(query: Tensor, key: Tensor, value: Tensor | None, enable_gqa: bool) -> None:
    tensors = {"query": query, "key": key} | ({} if value is None else {"value": value})
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        if x.dim() != 4:
            raise ValueError(f"{name} must have 4 dimensions (batch, heads, length, head_dim), got {tuple(x.shape)}")
        if 0 in x.shape:
            raise ValueError(f"{name} is empty: {tuple(x.shape)}")
        if x.dtype not in DTYPES:
            raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}")
        if x.dtype != query.dtype:
            raise TypeError(f"{name} must have query's dtype {query.dtype}, got {x.dtype}")
        if x.device != query.device:
            raise ValueError(f"{name} must be on query's device {query.device}, got {x.device}")
        if x.shape[0] != query.shape[0]:
            raise ValueError(f"{name} must have query's batch size {query.shape[0]}, got {x.shape[0]}")
    if key.shape[3] != query.shape[3]:
        raise ValueError(f"key must have query's head_dim {query.shape[3]}, got {key.shape[3]}")
    if value is not None and value.shape[1:3] != key.shape[1:3]:
        raise ValueError(
            f"value must have key's heads and length {tuple(key.shape[1:3])}, got {tuple(value.shape[1:3])}"
        )
    query_heads, key_heads = query.shape[1], key.shape[1]
    if query_heads % key_heads:
        raise ValueError(f"key: the {query_heads} query heads must be a multiple of its heads, got {key_heads}")
    if query_heads != key_heads and not enable_gqa:
        raise ValueError(
            f"enable_gqa=False needs as many key heads as query heads, got {key_heads} and {query_heads}; pass True"
        )


def _check_mask(name: str, mask: Tensor | None, shape: tuple[int, int], device: torch.device) -> None:
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"{name} must be a bool tensor, got {got}; write {name}.bool()")
    if tuple(mask.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(mask.shape)}")
    if mask.device != device:
        raise ValueError(f"{name} must be on query's device {device}, got {mask.device}")


def _split_mask(attn_mask: Tensor | None, query: Tensor, key_length: int) -> tuple[Tensor | None, Tensor | None]:
    """An SDPA mask as (mask over keys, None) where it is one, else as (None, dense mask)."""
    if attn_mask is None:
        return None, None
    full = (query.shape[0], query.shape[1], query.shape[2], key_length)
    if not isinstance(attn_mask, Tensor):
        raise TypeError(f"attn_mask must be a tensor, got {type(attn_mask).__name__}")
    mask = attn_mask[(None,) * (4 - attn_mask.dim())] if attn_mask.dim() < 4 else attn_mask
    fits = mask.dim() == 4 and all(a in (1, b) for a, b in zip(mask.shape, full, strict=True))
    if not fits or mask.shape[3] != key_length:
        raise ValueError(f"attn_mask must broadcast to {full}, got {tuple(attn_mask.shape)}")
    if mask.dtype != torch.bool and mask.dtype != query.dtype:
        raise TypeError(f"attn_mask must be bool or query's dtype {query.dtype}, got {mask.dtype}")
    if mask.device != query.device:
        raise ValueError(f"attn_mask must be on query's device {query.device}, got {mask.device}")
    if mask.dtype == torch.bool and mask.shape[1] == mask.shape[2] == 1:
        return mask[:, 0, 0].expand(full[0], key_length), None
    return None, mask
