"""Ways to get attention together with WAAD(10) and FAI(10, 100), all with one signature, and the cases they run in.

Every contender is a plain function of (query, key, value), causal, grouped heads un-repeated. What depends on
the length alone (masks, block masks, distance weights) is prepared once and neither timed nor counted as its
memory, and each expression is the fastest of the plain ones tried.
"""

from __future__ import annotations

import functools
import os
import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import pad, scaled_dot_product_attention

import attnstats
from attnstats import FAI, WAAD

BATCH, HEADS, HEAD_DIM = 1, 9, 64
WINDOW, LO, HI = 10, 10, 100
STATISTICS = (WAAD(WINDOW), FAI(LO, HI))
CHUNK = 256  # query rows; the fastest of 32 .. 512 at T = 4096


class Case(NamedTuple):
    length: int
    key_heads: int
    dtype: torch.dtype = torch.float32

    @property
    def layout(self) -> str:
        return "MHA" if self.key_heads == HEADS else f"GQA {HEADS}/{self.key_heads}"

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def __str__(self) -> str:
        return f"T{self.length}-{self.layout}-{self.dtype_name}".replace(" ", "")

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self.length)
        heads = (HEADS, self.key_heads, self.key_heads)
        query, key, value = (torch.randn(BATCH, h, self.length, HEAD_DIM, generator=generator) for h in heads)
        return query.to(self.dtype), key.to(self.dtype), value.to(self.dtype)


class Answer(NamedTuple):
    output: Tensor | None = None
    waad: Tensor | None = None
    fai: Tensor | None = None
    received: Tensor | None = None


def sdpa(query: Tensor, key: Tensor, value: Tensor) -> Answer:
    """Attention alone, the denominator of all ratios."""
    return Answer(scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True))


def ours(query: Tensor, key: Tensor, value: Tensor) -> Answer:
    output, stats = attnstats.attention(query, key, value, statistics=STATISTICS, enable_gqa=True)
    return Answer(output, stats["waad"], stats["fai"])


# Eager


class _Dense(NamedTuple):
    """[T, T] tensors of the distance: additive causal mask, WAAD's weight, FAI's horizon."""

    mask: Tensor
    near: Tensor
    horizon: Tensor


@functools.lru_cache(maxsize=1)
def dense(length: int, dtype: torch.dtype, device: torch.device) -> _Dense:
    position = torch.arange(length, device=device, dtype=torch.int32)
    distance = position[:, None] - position
    mask = torch.zeros(length, length, dtype=dtype, device=device).masked_fill_(distance < 0, torch.finfo(dtype).min)
    return _Dense(mask, distance.clamp(0, WINDOW).to(dtype), ((distance >= LO) & (distance <= HI)).to(dtype))


def counts(rows: int, length: int, device: torch.device) -> Tensor:
    """[length] queries at distance LO..HI of each key, at least 1; the queries are the last `rows` positions."""
    key = torch.arange(length, device=device)
    return (key + HI + 1).clamp(length - rows, length).sub((key + LO).clamp(length - rows, length)).clamp(min=1)


def repeated(x: Tensor, query: Tensor) -> Tensor:
    """Keys or values with a head for each head of the queries."""
    group = query.shape[1] // x.shape[1]
    return x if group == 1 else x.repeat_interleave(group, dim=1)


def eager(query: Tensor, key: Tensor, value: Tensor) -> Answer:
    """The map as transformers' eager attention makes it, and both statistics computed from it."""
    key, value = repeated(key, query), repeated(value, query)
    mask = dense(query.shape[2], query.dtype, query.device).mask
    scores = query @ key.mT * query.shape[3] ** -0.5 + mask
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    del scores
    return Answer(weights @ value, *read_off(weights))


def read_off(weights: Tensor) -> tuple[Tensor, Tensor]:
    """WAAD and FAI of maps [B, H, T, T]."""
    length, device = weights.shape[2], weights.device
    _, near, horizon = dense(length, weights.dtype, device)
    waad = torch.einsum("bhts,ts->bht", weights, near)
    return waad, (weights * horizon).sum(-2, dtype=torch.float32) / counts(length, length, device)


def chunked(query: Tensor, key: Tensor, value: Tensor) -> Answer:
    """Eager for CHUNK query rows at a time: O(T) memory. Skips future keys, and distances that carry no weight."""
    length, device = query.shape[2], query.device
    key, value = repeated(key, query), repeated(value, query)
    output = torch.empty_like(query)
    waad, fai = (query.new_zeros(query.shape[:3], dtype=torch.float32) for _ in range(2))
    for start in range(0, length, CHUNK):
        end = min(start + CHUNK, length)
        rows, first = slice(start, end), max(0, start - HI)
        distance = torch.arange(start, end, device=device)[:, None] - torch.arange(end, device=device)
        scores = query[:, :, rows] @ key[:, :, :end].mT * query.shape[3] ** -0.5
        weights = scores.masked_fill_(distance < 0, -torch.inf).softmax(-1, dtype=torch.float32)
        output[:, :, rows] = weights.to(query.dtype) @ value[:, :, :end]
        near, distance = weights[..., first:], distance[:, first:]
        waad[:, :, rows] = WINDOW - (near * (WINDOW - distance).clamp(0)).sum(-1)
        fai[:, :, first:end] += (near * ((distance >= LO) & (distance <= HI))).sum(-2)
    return Answer(output, waad, fai / counts(length, length, device))


# FlexAttention: statistics as log-sum-exps of passes with other scores.
#
# Compiled for the CPU it returns no lse, and a score_mod that reads a tensor is miscompiled for dynamic shapes
# (torch 2.13). So a sink key stands in front of the real ones, the values are indicators of "real" and "sink"
# in their last two columns, and the ratio of these columns is exp(lse of the real keys - score of the sink).
# The lse enters a pass as one more column of query and key.

INDICATORS = 16  # columns, of which two are used: a width the template vectorises


class _Blocks(NamedTuple):
    causal: Any
    near: Any
    horizon: Any


@functools.lru_cache(maxsize=1)
def _blocks(length: int) -> _Blocks:
    def of(visible: Callable[..., Tensor]) -> Any:
        return create_block_mask(visible, None, None, length, length + 1, device="cpu")

    return _Blocks(
        causal=of(lambda b, h, t, s: s <= t + 1),
        near=of(lambda b, h, t, s: (s == 0) | ((s <= t + 1) & (s > t + 1 - WINDOW))),
        horizon=of(lambda b, h, s, t: (t == 0) | ((t - 1 >= s + LO) & (t - 1 <= s + HI))),
    )


def _indicators(keys: Tensor) -> Tensor:
    """[B, H, 1 + T, INDICATORS] values, the sink first."""
    values = keys.new_zeros(*keys.shape[:2], keys.shape[2] + 1, INDICATORS)
    values[:, :, 1:, -2] = 1
    values[:, :, 0, -1] = 1
    return values


def _flex_attention(query: Tensor, key: Tensor, value: Tensor, blocks: Any) -> tuple[Tensor, Tensor]:
    """Output and lse; the sink's score is 0."""
    value = torch.cat([pad(value, (0, 0, 1, 0)), _indicators(key)], -1)
    mixed = flex_attention(query, pad(key, (0, 0, 1, 0)), value, block_mask=blocks, enable_gqa=True)
    real, sink = mixed[..., -2], mixed[..., -1]
    return mixed[..., :-INDICATORS] / real[..., None], real.log() - sink.log()


def _flex_waad(query: Tensor, key: Tensor, lse: Tensor, blocks: Any) -> Tensor:
    """WAAD = W - exp(lse' - lse), lse' over the window with scores + log(W - d); the sink's score is lse."""

    def log_weighted(score: Tensor, b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return torch.where(s == 0, score, score + (WINDOW - 1 - t + s).clamp(min=1).float().log())

    scale = query.shape[3] ** -0.5
    values = _indicators(key)
    query = torch.cat([query, lse[..., None] / scale], -1)
    key = torch.cat([pad(key, (0, 0, 1, 0)), values[..., -1:]], -1)
    mixed = flex_attention(query, key, values, score_mod=log_weighted, block_mask=blocks, scale=scale)
    return WINDOW - mixed[..., -2] / mixed[..., -1]


def _flex_fai(query: Tensor, key: Tensor, lse: Tensor, blocks: Any) -> Tensor:
    """Sums over queries: query and key swapped, scores less the lse of the query; the sink's score is 0."""
    scale = query.shape[3] ** -0.5
    values = _indicators(query)
    query = pad(torch.cat([query, -lse[..., None] / scale], -1), (0, 0, 1, 0))
    mixed = flex_attention(pad(key, (0, 1), value=1.0), query, values, block_mask=blocks, scale=scale)
    return mixed[..., -2] / mixed[..., -1]


@functools.cache
def _compiled() -> tuple[Callable[..., Any], ...]:
    return tuple(torch.compile(f, dynamic=True) for f in (_flex_attention, _flex_waad, _flex_fai))


def flex(query: Tensor, key: Tensor, value: Tensor) -> Answer:
    """Three compiled FlexAttention calls."""
    attention, waad, fai = _compiled()
    blocks = _blocks(query.shape[2])
    output, lse = attention(query, key, value, blocks.causal)
    # Repeated, so that both layouts share one compiled statistic: a tenth of a millisecond against seven seconds.
    by_head, length = repeated(key, query), query.shape[2]
    received = fai(query, by_head, lse, blocks.horizon)
    return Answer(output, waad(query, by_head, lse, blocks.near), received / counts(length, length, query.device))


def can_compile() -> bool:
    """True if there is what torch.compile needs on the CPU: a C++ compiler and Python's headers."""
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    return shutil.which(os.environ.get("CXX", "g++")) is not None and headers.exists()


Contender = Callable[[Tensor, Tensor, Tensor], Answer]

CONTENDERS: dict[str, Contender] = {
    "SDPA alone": sdpa,
    "attnstats": ours,
    "FlexAttention, compiled": flex,
    "eager, query chunks": chunked,
    "eager": eager,
}
if not can_compile():
    del CONTENDERS["FlexAttention, compiled"]

CASES = [
    Case(length, key_heads, dtype)
    for length in (1024, 2048, 4096)
    for key_heads in (HEADS, 3)
    for dtype in (torch.float32, torch.bfloat16)
]


def contenders(case: Case) -> list[str]:
    """Names of the contenders of a case: all in float32, attention alone and attnstats in bfloat16."""
    return list(CONTENDERS) if case.dtype == torch.float32 else ["SDPA alone", "attnstats"]
