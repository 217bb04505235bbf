"""The border of the public functions: arguments in, a `Geometry` out, or one error that names what is wrong.

Every error says which argument, what came and what would work. Nothing behind this module validates again, and
nothing here touches the numbers in query, key and value. Called by attention.py and reference.py.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from attnstats.core.geometry import Geometry
from attnstats.core.packing import Packing
from attnstats.statistics import LSE, ColumnStatistic, DistanceWeighted, Entropy, MaxLogit, PooledMap, Statistic

INTEGERS = (int, torch.SymInt)  # a length in a graph is a symbol
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

Window = tuple[int | None, int | None]
Heads = Sequence[int] | Mapping[Any, Sequence[int]]  # by Statistic or name


KNOWN_CALLS = 256
_KNOWN: dict[Any, Geometry] = {}


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
    softcap: float | None = None,
    window_size: Window | None = None,
    sinks: Tensor | None = None,
    query_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    query_offset: int | None = None,
    heads: Heads | None = None,
) -> Geometry:
    """Validate the arguments of `attnstats.attention`. Raises TypeError or ValueError naming the argument."""
    # A call without masks is known by its shapes: the same one is not validated twice.
    facts = None
    if attn_mask is sinks is query_mask is key_padding_mask is None:
        settings = (is_causal, scale, enable_gqa, softcap, window_size, query_offset, heads)
        facts = (_facts(query), _facts(key), _facts(value), statistics, settings, *map(type, settings))
        try:
            known = _KNOWN.get(facts)
        except TypeError:  # a list or a dict, which can't be looked up
            facts = None
        else:
            if known is not None:
                return known
    _check_tensors(query, key, value, enable_gqa)
    batch, query_heads, query_length, head_dim = query.shape
    key_length = key.shape[2]
    left, right = _window(window_size, is_causal)
    if query_offset is None:
        if is_causal and query_length > key_length:
            raise ValueError(
                f"is_causal: queries are the last positions, so Tq <= Tk; got Tq={query_length}, Tk={key_length}. "
                "Pass query_offset to place them elsewhere, or is_causal=False"
            )
        if is_causal or query_length == key_length:
            query_offset = key_length - query_length
    else:
        check_length("query_offset", query_offset)
    if query_offset is None:
        across = f"Tq={query_length} != Tk={key_length} with is_causal=False is taken as cross-attention"
        _refuse_distances(statistics, across + ". Pass query_offset if queries and keys share positions")
        if (left, right) != (None, None):
            raise ValueError(f"window_size {window_size} needs positions, and {across}. Pass query_offset")
    for statistic in statistics:
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
    geometry = Geometry(
        batch=batch,
        query_heads=query_heads,
        key_heads=key.shape[1],
        query_length=query_length,
        key_length=key_length,
        head_dim=head_dim,
        value_dim=head_dim if value is None else value.shape[3],
        dtype=query.dtype,
        device=query.device,
        scale=_scale(scale, head_dim),
        query_offset=query_offset,
        left=left,
        right=right,
        softcap=_softcap(softcap),
        sinks=_sinks(sinks, query),
        key_mask=key_mask,
        query_real=query_real,
        query_mask=query_mask,
        dense_mask=dense_mask,
        heads=_heads(heads, statistics, query_heads),
    )
    if facts is not None:
        if len(_KNOWN) >= KNOWN_CALLS:
            _KNOWN.clear()
        _KNOWN[facts] = geometry
    return geometry


def _facts(x: Tensor | None) -> Any:
    return (x.shape, x.dtype, x.device) if isinstance(x, Tensor) else None if x is None else [x]


def resolve_packed(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    statistics: tuple[Statistic, ...],
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    is_causal: bool = True,
    scale: float | None = None,
    enable_gqa: bool = False,
    softcap: float | None = None,
    window_size: Window | None = None,
    sinks: Tensor | None = None,
    query_mask: Tensor | None = None,
    heads: Heads | None = None,
) -> Geometry:
    """Validate the arguments of `attnstats.varlen_attention`, whose tensors arrive as (1, heads, total, dim)."""
    _check_tensors(query, key, value, enable_gqa)
    _, query_heads, query_length, head_dim = query.shape
    packing, shared = _packing(
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, query_length, key.shape[2], query.device
    )
    left, right = _window(window_size, is_causal)
    if not (is_causal or shared):
        across = "cu_seqlens_k that differ from cu_seqlens_q with is_causal=False are taken as cross-attention"
        _refuse_distances(statistics, across)
        if (left, right) != (None, None):
            raise ValueError(f"window_size {window_size} needs positions, and {across}")
    if any(isinstance(statistic, PooledMap) for statistic in statistics):
        raise ValueError("statistics: PooledMap is one map of one sequence; call attention for each packed sequence")
    if query_mask is not None:
        if isinstance(query_mask, Tensor):
            query_mask = query_mask[None]
        _check_mask("query_mask", query_mask, (1, query_length), query.device)
    return Geometry(
        batch=1,
        query_heads=query_heads,
        key_heads=key.shape[1],
        query_length=query_length,
        key_length=key.shape[2],
        head_dim=head_dim,
        value_dim=head_dim if value is None else value.shape[3],
        dtype=query.dtype,
        device=query.device,
        scale=_scale(scale, head_dim),
        query_offset=0,
        left=left,
        right=right,
        softcap=_softcap(softcap),
        sinks=_sinks(sinks, query),
        query_mask=query_mask,
        packing=packing,
        heads=_heads(heads, statistics, query_heads),
    )


def with_dropout(geometry: Geometry, dropout_p: float, seed: Tensor | None = None, seeded: bool = True) -> Geometry:
    """The same call with its dropout, and with a seed for it: one that was drawn before, or a new one."""
    check_dropout(dropout_p)
    if dropout_p == 0:
        return geometry
    if seed is None and seeded:
        seed = draw_seed(geometry.device)
    return dataclasses.replace(geometry, dropout_p=float(dropout_p), dropout_seed=seed)


def check_dropout(dropout_p: float) -> None:
    if type(dropout_p) not in (int, float) or not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must be a number in [0, 1), 0 for no dropout; got {dropout_p!r}")


def draw_seed(device: torch.device) -> Tensor:
    """(1,) int64 from the default generator of the device."""
    return torch.randint(2**62, (1,), device=device)


def check_differentiable(statistics: tuple[Statistic, ...], differentiable: bool) -> None:
    if not isinstance(differentiable, bool):
        raise TypeError(f"differentiable must be True or False, got {differentiable!r}")
    for s in statistics if differentiable else ():
        if isinstance(s, ColumnStatistic) and s.last_queries is not None:
            raise ValueError(f"differentiable: {s} of the last queries carries no gradients; Received() does")
        if not isinstance(s, (DistanceWeighted, Entropy, LSE)):
            raise ValueError(
                f"differentiable: {s} carries no gradients; distance-weighted statistics, Entropy and LSE do. "
                "Ask for it in a call with differentiable=False"
            )


def batch_of_one(**tensors: Tensor) -> tuple[Tensor, ...]:
    """Packed tensors (total, heads, dim) as views (1, heads, total, dim)."""
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        if x.dim() != 3:
            raise ValueError(f"{name} must have 3 dimensions (total length, heads, head_dim), got {tuple(x.shape)}")
    return tuple(x.transpose(0, 1)[None] for x in tensors.values())


def from_lse(statistics: tuple[Statistic, ...]) -> tuple[Statistic, ...]:
    """The statistics of a call that starts from an lse."""
    if any(isinstance(statistic, MaxLogit) for statistic in statistics):
        raise ValueError("statistics: MaxLogit is not a function of the lse; ask attnstats.attention for it")
    return statistics


def natural_lse(lse: Tensor, base: str, layout: str | None, geometry: Geometry) -> Tensor:
    """An lse as a kernel returned it, as (B, Hq, Tq) in natural logarithm, -inf where a row sees nothing.

    Dense calls take (B, Hq, Tq), packed ones (Hq, total) or (total, Hq); a last dimension of 1 is dropped.
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
    lse = lse.detach().to(geometry.accumulator).reshape(shape)
    if geometry.packing is not None:
        lse = (lse.T if layout == "TH" or (layout is None and shape != (heads, length)) else lse)[None]
    if base == "2":
        lse = lse * math.log(2.0)
    return lse if geometry.all_live else lse.masked_fill(~geometry.live()[:, None], -torch.inf)


def check_length(name: str, length: int | None) -> None:
    check_integer(name, length)
    if length is not None and length < 0:
        raise ValueError(f"{name} must be an integer >= 0, got {length!r}")


def check_integer(name: str, length: int | None) -> None:
    if length is not None and (not isinstance(length, INTEGERS) or isinstance(length, bool)):
        raise ValueError(f"{name} must be an integer >= 0, got {length!r}")


def check_settings(is_causal: bool, scale: float | None, softcap: float | None, window_size: Window | None) -> None:
    """Of a call that is traced, what can't be told from its graph any more."""
    _scale(scale, 1)
    _softcap(softcap)
    _window(window_size, is_causal)


def check_lse(base: str, layout: str | None) -> None:
    if layout not in (None, "HT", "TH"):
        raise ValueError(f"lse_layout must be 'HT', 'TH' or None (by its shape), got {layout!r}")
    if base not in ("e", "2"):
        raise ValueError(f"lse_base must be 'e' or '2', got {base!r}")


def _refuse_distances(statistics: tuple[Statistic, ...], reason: str) -> None:
    for statistic in statistics:
        if isinstance(statistic, DistanceWeighted) and statistic.uses_distance:
            raise ValueError(f"statistics: {statistic} needs distances, and {reason}")


def _scale(scale: float | None, head_dim: int) -> float:
    if scale is None:
        return head_dim**-0.5
    if type(scale) not in (int, float) or not abs(scale) < float("inf"):
        raise ValueError(f"scale must be a finite number or None (1 / sqrt(head_dim)), got {scale!r}")
    return float(scale)


def _softcap(softcap: float | None) -> float | None:
    if softcap is None:
        return None
    if type(softcap) not in (int, float) or not 0 < softcap < float("inf"):
        raise ValueError(f"softcap must be a finite number > 0 or None (no cap), got {softcap!r}")
    return float(softcap)


def _window(window_size: Window | None, is_causal: bool) -> Window:
    """How far a query sees to the left and to the right, None: all the way."""
    if window_size is None:
        return None, 0 if is_causal else None
    sides = tuple(window_size) if isinstance(window_size, (tuple, list)) else ()
    whole = all(side is None or (isinstance(side, INTEGERS) and not isinstance(side, bool)) for side in sides)
    if len(sides) != 2 or not whole or any(side is not None and not -1 <= side < 2**31 - 1 for side in sides):
        raise ValueError(
            f"window_size must be (left, right), integers >= 0, or None or -1 for no limit; got {window_size!r}. "
            "A sliding window of w tokens is (w - 1, 0)"
        )
    left, right = (None if side == -1 else side for side in sides)
    return left, 0 if is_causal else right


def _sinks(sinks: Tensor | None, query: Tensor) -> Tensor | None:
    if sinks is None:
        return None
    if not isinstance(sinks, Tensor) or not sinks.is_floating_point():
        raise TypeError(f"sinks must be a float tensor, got {getattr(sinks, 'dtype', type(sinks).__name__)}")
    if sinks.shape != query.shape[1:2]:
        raise ValueError(
            f"sinks must have the shape {(query.shape[1],)}, a logit per query head; got {tuple(sinks.shape)}"
        )
    if sinks.device != query.device:
        raise ValueError(f"sinks must be on query's device {query.device}, got {sinks.device}")
    return sinks


def _heads(
    heads: Heads | None, statistics: tuple[Statistic, ...], query_heads: int
) -> dict[Statistic, tuple[int, ...]]:
    """The heads of each statistic that isn't asked of all."""
    if heads is None:
        return {}
    if not isinstance(heads, Mapping):
        checked = _head_list("heads", heads, query_heads)
        return dict.fromkeys(statistics, checked)
    chosen: dict[Statistic, tuple[int, ...]] = {}
    for name, of_heads in heads.items():
        matches = [s for s in statistics if s == name or s.name == name]
        if not matches:
            raise ValueError(
                f"heads: {name!r} is not among the statistics asked for: {', '.join(map(str, statistics))}"
            )
        chosen |= dict.fromkeys(matches, _head_list(f"heads[{name!r}]", of_heads, query_heads))
    return chosen


def _head_list(name: str, heads: Sequence[int], query_heads: int) -> tuple[int, ...]:
    listed = tuple(heads) if isinstance(heads, (list, tuple, range)) else None
    if listed is None or not all(isinstance(head, int) and not isinstance(head, bool) for head in listed):
        raise TypeError(f"{name} must be a list of integers, got {heads!r}")
    if not listed or len(set(listed)) != len(listed) or not all(0 <= head < query_heads for head in listed):
        raise ValueError(f"{name} must name different heads of 0 .. {query_heads - 1}, at least one; got {listed}")
    return listed


# (version, boundaries) of cu_seqlens that were read already: every layer of a model passes the same tensor.
_READ: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _packing(
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    query_length: int,
    key_length: int,
    device: torch.device,
) -> tuple[Packing, bool]:
    """The packing, and whether queries and keys have the same sequences.

    The boundaries of a CUDA tensor are read once, which waits for the device; not at all where both maximal lengths
    are given, and then the kernels still stay inside the tensors.
    """
    same = cu_seqlens_k is None or cu_seqlens_k is cu_seqlens_q
    if cu_seqlens_k is None:
        cu_seqlens_k = cu_seqlens_q
        max_seqlen_k = max_seqlen_q if max_seqlen_k is None else max_seqlen_k
        if key_length != query_length:
            raise ValueError(
                f"cu_seqlens_k: query has {query_length} tokens and key {key_length}, so both need boundaries; got None"
            )
    check_length("max_seqlen_q", max_seqlen_q)
    check_length("max_seqlen_k", max_seqlen_k)
    boundaries: list[list[int]] = []
    longest: list[int] = []
    sides = (("q", cu_seqlens_q, max_seqlen_q, query_length), ("k", cu_seqlens_k, max_seqlen_k, key_length))
    for side, cu, given, length in sides:
        name = f"cu_seqlens_{side}"
        if not isinstance(cu, Tensor) or cu.dtype not in (torch.int32, torch.int64) or cu.dim() != 1 or len(cu) < 2:
            got = f"{cu.dtype} {tuple(cu.shape)}" if isinstance(cu, Tensor) else type(cu).__name__
            raise TypeError(f"{name} must be an int32 or int64 tensor of shape (sequences + 1,), got {got}")
        if cu.device != device:
            raise ValueError(f"{name} must be on query's device {device}, got {cu.device}")
        if given is not None and device.type != "cpu":
            longest.append(min(given, length))
            continue
        values = _read(cu)
        steps = [b - a for a, b in pairwise(values)]
        if values[0] != 0 or min(steps) < 0 or values[-1] > length:
            fault = "start at 0" if values[0] else "not decrease" if min(steps) < 0 else f"end at most at {length}"
            raise ValueError(f"{name} must {fault}, got {_short(values)}")
        if given is not None and given < max(steps):
            raise ValueError(f"max_seqlen_{side} must be at least the longest sequence, {max(steps)}; got {given}")
        boundaries.append(values)
        longest.append(max(steps))
    if len(cu_seqlens_q) != len(cu_seqlens_k):
        raise ValueError(
            f"cu_seqlens_k must have as many sequences as cu_seqlens_q, {len(cu_seqlens_q) - 1}; "
            f"got {len(cu_seqlens_k) - 1}"
        )
    shared = same or (len(boundaries) == 2 and boundaries[0] == boundaries[1])
    return Packing(cu_seqlens_q.int(), cu_seqlens_k.int(), *longest), shared


def _read(cu_seqlens: Tensor) -> list[int]:
    version = None if cu_seqlens.is_inference() else cu_seqlens._version
    known = _READ.get(cu_seqlens)
    if known is None or version is None or known[0] != version:
        known = _READ[cu_seqlens] = (version, cu_seqlens.tolist())
    return known[1]


def _short(values: list[int]) -> str:
    return str(values) if len(values) <= 12 else f"[{', '.join(map(str, values[:6]))}, ..., {values[-1]}]"


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
