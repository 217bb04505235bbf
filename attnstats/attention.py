"""The public functions: attention that returns its statistics, and statistics beside any attention kernel.

Arguments are validated by `Geometry.resolve`; the work is done by a backend (`reference`, `tiled`, `ops`),
each of which offers `attend` and `from_lse`. Nothing here touches numbers.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Iterable
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from attnstats import reference, tiled
from attnstats.geometry import AttentionResult, Geometry, full_precision
from attnstats.statistics import MaxLogit, Statistic, Statistics, resolve

Backend = Literal["auto", "reference", "tiled", "triton"]


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    statistics: Iterable[Statistic | str] = (),
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = True,
    scale: float | None = None,
    enable_gqa: bool = False,
    query_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    query_offset: int | None = None,
    backend: Backend = "auto",
) -> AttentionResult:
    """Scaled dot product attention and statistics of its map, in O(T) memory.

    The output is that of `torch.nn.functional.scaled_dot_product_attention`, and so are its gradients; the
    statistics carry none. Causal masks are aligned to the end: with Tq=2, Tk=5 the queries see

        1 1 1 1 0
        1 1 1 1 1

    Args:
        query: (B, Hq, Tq, D), float16, bfloat16, float32 or float64, strides as they come.
        key: (B, Hkv, Tk, D); Hq must be a multiple of Hkv.
        value: (B, Hkv, Tk, Dv).
        statistics: instances of the catalogue (`WAAD(10)`, `FAI(10, 100)`, ...), or names for the defaults.
        attn_mask: bool, True where a key may be seen, broadcastable to (B, 1, 1, Tk). Masks that depend on the
            query would cost O(Tq * Tk): only `backend="reference"` takes them, also additive ones.
        dropout_p: as SDPA has it; only 0 so far.
        is_causal: query t sees keys s <= t.
        scale: multiplies the scores; default 1 / sqrt(D).
        enable_gqa: allow fewer key than query heads; heads are never repeated in memory.
        query_mask: (B, Tq) bool, which queries count in column statistics (the response, say); default all.
        key_padding_mask: (B, Tk) bool, True for real tokens. In self-attention (is_causal, or Tq = Tk) padding
            positions are no queries either: their statistics are 0 and they don't count.
        query_offset: position of the first query, the first key being at 0; default Tk - Tq, the queries last.
        backend: "reference" (eager), "tiled" (plain PyTorch), "triton" (kernels), "auto" (triton on a GPU,
            else tiled).

    Returns:
        `output` (B, Hq, Tq, Dv), 0 for rows that see no key, and `statistics`: rows (B, Hq, Tq), columns
        (B, Hq, Tk), maps (B, Hq, I, J) by statistic or name, with `.lse` (B, Hq, Tq) in natural log and `.valid`.

    Raises:
        TypeError, ValueError: naming the argument, what came and what would work.

    Example:
        >>> import torch, attnstats
        >>> query, key, value = torch.zeros(3, 1, 2, 4, 16)
        >>> output, stats = attnstats.attention(query, key, value, statistics=[attnstats.WAAD(2)])
        >>> stats["waad"][0, 0]  # uniform attention to all that came before
        tensor([0.0000, 0.5000, 1.0000, 1.2500])

    Source: Li et al., arXiv 2510.13554v2, Eq. 3 (A), Eq. 9 (WAAD), Eq. 10 (FAI).
    """
    wanted = resolve(statistics)
    if dropout_p != 0:
        raise ValueError(f"dropout_p must be 0, got {dropout_p}: dropout is not supported")
    geometry = Geometry.resolve(
        query,
        key,
        value,
        wanted,
        attn_mask=attn_mask,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=enable_gqa,
        query_mask=query_mask,
        key_padding_mask=key_padding_mask,
        query_offset=query_offset,
    )
    with full_precision(geometry.device):
        output, lse, tensors = _backend(backend, geometry).attend(query, key, value, geometry, wanted)
    return AttentionResult(output, Statistics(tensors, {s: geometry.validity(s) for s in wanted}, lse))


def statistics_from_lse(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    *,
    statistics: Iterable[Statistic | str],
    lse_base: Literal["e", "2"] = "e",
    attn_mask: Tensor | None = None,
    is_causal: bool = True,
    scale: float | None = None,
    enable_gqa: bool = False,
    query_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    query_offset: int | None = None,
    backend: Backend = "auto",
) -> Statistics:
    """Statistics beside an attention kernel of your own, from the log-sum-exp it returned.

    All but MaxLogit, which isn't a function of the lse. Masks and scale must be those the kernel used: a row of
    exp(score - lse) must sum to 1 over its visible keys. Where it doesn't (an lse that counts a sink, or keys that
    aren't passed), WAAD is off by `window * (1 - that sum)`; statistics whose weight ends in 0 are of what is there.

    Args:
        lse: (B, Hq, Tq) float32 or float64: the log of the row sums of exp(score). What stands in rows that see
            no key is ignored (kernels disagree: -inf, +inf and 0 all occur).
        lse_base: "e" for natural logs, "2" for logs to base 2.

    The other arguments, the returned value and the source are those of `attention`.

    Raises:
        TypeError, ValueError: naming the argument, what came and what would work.
    """
    wanted = _from_lse(statistics)
    geometry = Geometry.resolve(
        query,
        key,
        None,
        wanted,
        attn_mask=attn_mask,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=enable_gqa,
        query_mask=query_mask,
        key_padding_mask=key_padding_mask,
        query_offset=query_offset,
    )
    lse = _natural_lse(lse, lse_base, geometry)
    with torch.no_grad(), full_precision(geometry.device):
        tensors = _backend(backend, geometry).from_lse(query, key, lse, geometry, wanted)
    return Statistics(tensors, {s: geometry.validity(s) for s in wanted}, lse)


def explain(
    query: Tensor,
    key: Tensor,
    value: Tensor | None = None,
    *,
    statistics: Iterable[Statistic | str] = (),
    backend: Backend = "auto",
    **arguments: Any,
) -> None:
    """Print what `attention` would run on these tensors, or with `value=None` what `statistics_from_lse` would.

    Every pass with its tiles, what it computes, its floating-point operations and its scratch memory, over all
    heads. Takes the other arguments of `attention` and raises its errors.

    Example:
        >>> import torch, attnstats
        >>> query = torch.zeros(1, 8, 1024, 64)
        >>> attnstats.explain(query, query, query, statistics=["waad", "received"], backend="tiled")
        backend: tiled
          torch's flash attention for CPU
            output, lse: 1.07 GFLOP, 0.0 MB of scratch
          band, blocks of 64 rows x 73 keys
            waad: 0.08 GFLOP, 2.4 MB of scratch
          sweep, blocks of rows
            received: 0.54 GFLOP, 3.1 MB of scratch
    """
    wanted = _from_lse(statistics) if value is None else resolve(statistics)
    known = set(inspect.signature(Geometry.resolve).parameters)
    if unknown := sorted(set(arguments) - known):
        raise TypeError(f"explain: unknown argument {unknown[0]!r}; it takes those of attnstats.attention")
    geometry = Geometry.resolve(query, key, value, wanted, **arguments)
    module = _backend(backend, geometry)
    lines = [f"backend: {'triton' if module not in (reference, tiled) else module.__name__.rpartition('.')[2]}"]
    for step in module.plan(geometry, wanted, value is not None):
        lines += [
            f"  {step.runs}",
            f"    {step.computes}: {step.flops / 1e9:.2f} GFLOP, {step.scratch_bytes / 1e6:.1f} MB of scratch",
        ]
    sys.stdout.write("\n".join(lines) + "\n")


def _from_lse(statistics: Iterable[Statistic | str]) -> tuple[Statistic, ...]:
    wanted = resolve(statistics)
    if any(isinstance(statistic, MaxLogit) for statistic in wanted):
        raise ValueError("statistics: MaxLogit is not a function of the lse; ask attnstats.attention for it")
    return wanted


def _natural_lse(lse: Tensor, base: str, geometry: Geometry) -> Tensor:
    shape = (geometry.batch, geometry.query_heads, geometry.query_length)
    if not isinstance(lse, Tensor) or tuple(lse.shape) != shape:
        raise ValueError(f"lse must be a tensor of shape {shape}, got {getattr(lse, 'shape', type(lse).__name__)}")
    if lse.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"lse must be float32 or float64, got {lse.dtype}; in less its error is over 1 % of A")
    if lse.device != geometry.device:
        raise ValueError(f"lse must be on query's device {geometry.device}, got {lse.device}")
    if base not in ("e", "2"):
        raise ValueError(f"lse_base must be 'e' or '2', got {base!r}")
    lse = lse.detach().to(geometry.accumulator)
    if base == "2":
        lse = lse * math.log(2.0)
    if geometry.key_mask is None:
        return lse
    return lse.masked_fill(~geometry.live()[:, None], -torch.inf)


def _backend(name: str, geometry: Geometry) -> ModuleType:
    """The module that does the work. Raises ValueError where it can't."""
    if name not in ("auto", "reference", "tiled", "triton"):
        raise ValueError(f"backend must be 'auto', 'reference', 'tiled' or 'triton', got {name!r}")
    if name == "reference":
        return reference
    if geometry.dense_mask is not None:
        raise ValueError(
            "attn_mask: a mask that depends on the query takes O(Tq * Tk) memory; use is_causal, key_padding_mask "
            "or a bool mask of shape (B, 1, 1, Tk), or backend='reference'"
        )
    if name == "tiled":
        return tiled
    from attnstats import ops

    reason = ops.unavailable(geometry)
    if name == "auto":
        return tiled if reason or geometry.device.type == "cpu" else ops
    if reason:
        raise ValueError(f"backend='triton': {reason}; backend='tiled' would work")
    return ops
