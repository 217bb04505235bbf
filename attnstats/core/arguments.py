"""The border of the public functions: `Options` in, a `Geometry` out, or one error that names what is wrong.

Every error says which argument, what came and what would work. Nothing behind this module validates again, and
nothing here touches the numbers in query, key and value. A Geometry is read when results and gradients are asked for,
so its masks and boundaries are copies: the caller may write into theirs as soon as the call returns.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from attnstats.core import packing
from attnstats.core.geometry import Geometry
from attnstats.core.options import Heads, Options, Window
from attnstats.core.packing import INTEGERS, check_integer
from attnstats.core.patterns import read_causal_bias
from attnstats.statistics import OPEN_HORIZON, PooledMap, SegmentMass, Statistic, TopKeys
from attnstats.statistics import resolve as resolve_statistics
from attnstats.tensors import check_plain

UNTRIED = ("mps",)  # devices that plain PyTorch may well run on, but no test of ours ever did
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

MAX_POSITIONS = 2**24  # what float32 counts, in which backends return them
CACHED_CALLS = 256
_CACHE: dict[Any, Geometry] = {}


def resolve(query: Tensor, key: Tensor, value: Tensor | None, options: Options) -> Geometry:
    """Validate a call, packed tensors as `batch_of_one` views. Raises TypeError or ValueError naming the argument."""
    statistics = resolve_statistics(options.statistics)
    cache_key = _cache_key(query, key, value, statistics, options)
    try:
        cached = _CACHE.get(cache_key)
        if cached is not None:
            return cached
    except TypeError:  # a list or a dict among the facts
        cache_key = None
    _check_differentiable(statistics, options.differentiable)
    _check_tensors(query, key, value, options.enable_gqa)
    _check_positions(statistics, key.shape[2])
    packed = options.cu_seqlens_q is not None
    geometry = Geometry(
        statistics=statistics,
        batch=query.shape[0],
        query_heads=query.shape[1],
        key_heads=key.shape[1],
        query_length=query.shape[2],
        key_length=key.shape[2],
        head_dim=query.shape[3],
        value_dim=query.shape[3] if value is None else value.shape[3],
        dtype=query.dtype,
        device=query.device,
        **(_packed_positions if packed else _positions)(query, key, statistics, options),
        scale=_scale(options.scale, query.shape[3]),
        softcap=_softcap(options.softcap),
        sinks=_sinks(options.sinks, query),
        heads=heads_by_statistic(options.heads, statistics, query.shape[1]),
        dropout_p=_dropout(options.dropout_p),
        differentiable=options.differentiable,
        prefers=options.prefers,
    )
    if cache_key is not None:
        if len(_CACHE) >= CACHED_CALLS:
            _CACHE.clear()
        _CACHE[cache_key] = geometry
    return geometry


def plain(query: Any, key: Any, value: Any, options: Options, lse: Any = None) -> Options:
    """The options of a call that has plain tensors alone, a causal bias turned into positions.

    Raises:
        TypeError: for other subclasses of Tensor, by argument and name. ValueError: a causal bias of other lengths.
    """
    bias = None
    if isinstance(query, Tensor) and isinstance(key, Tensor) and options.attn_mask is not None:
        bias = read_causal_bias(options.attn_mask, query.shape[-2], key.shape[-2])
    if bias is not None:
        if options.query_offset not in (None, bias.query_offset):
            raise ValueError(
                f"attn_mask: this causal bias puts the first query at position {bias.query_offset}, query_offset says "
                f"{options.query_offset}"
            )
        options = options._replace(attn_mask=None, is_causal=True, query_offset=bias.query_offset)
    check_plain(
        query=query,
        key=key,
        value=value,
        lse=lse,
        attn_mask=options.attn_mask,
        key_padding_mask=options.key_padding_mask,
        query_mask=options.query_mask,
        query_weight=options.query_weight,
        segment_boundaries=options.segment_boundaries,
        sinks=options.sinks,
        cu_seqlens_q=options.cu_seqlens_q,
        cu_seqlens_k=options.cu_seqlens_k,
    )
    return options


def with_dropout_seed(geometry: Geometry, seed: Tensor | None = None) -> Geometry:
    """The same call with a seed for its dropout, if it has any; seed None: one is drawn."""
    if geometry.dropout_p == 0:
        return geometry
    return dataclasses.replace(geometry, dropout_seed=draw_seed(geometry.device) if seed is None else seed)


def draw_seed(device: torch.device) -> Tensor:
    """(1,) int64 from the default generator of the device."""
    return torch.randint(2**62, (1,), device=device, dtype=torch.int64)


def _cache_key(
    query: Tensor, key: Tensor, value: Tensor | None, statistics: tuple[Statistic, ...], options: Options
) -> Any:
    """The facts that decide a call without masks, which is validated once; None: the call can't be cached."""
    of_call = (
        options.attn_mask,
        options.key_padding_mask,
        options.query_mask,
        options.query_weight,
        options.segment_boundaries,
        options.sinks,
        options.cu_seqlens_q,
    )
    if [x for x in of_call if x is not None]:
        return None
    settings = (
        options.is_causal,
        options.scale,
        options.enable_gqa,
        options.softcap,
        options.window_size,
        options.query_offset,
        options.heads,
        options.dropout_p,
        options.differentiable,
        options.prefers,
    )
    try:
        tensors = [None if x is None else (x.shape, x.dtype, x.device) for x in (query, key, value)]
    except AttributeError:  # no tensor
        return None
    return *tensors, statistics, settings, *map(type, settings)


def batch_of_one(**tensors: Tensor) -> tuple[Tensor, ...]:
    """Packed tensors (total, heads, dim) as views (1, heads, total, dim)."""
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        if x.dim() != 3:
            raise ValueError(f"{name} must have 3 dimensions (total length, heads, head_dim), got {tuple(x.shape)}")
    return tuple(x.transpose(0, 1)[None] for x in tensors.values())


def check_traced(statistics: tuple[Statistic, ...], options: Options) -> None:
    """Raise for settings of a traced call whose Python types its graph no longer shows."""
    for name in ("query_offset", "max_seqlen_q", "max_seqlen_k"):
        check_integer(name, getattr(options, name))
    _scale(options.scale, 1)
    _softcap(options.softcap)
    window_sides(options.window_size, options.is_causal)
    _dropout(options.dropout_p)
    _check_differentiable(statistics, options.differentiable)


def _dropout(dropout_p: float) -> float:
    if type(dropout_p) not in (int, float) or not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must be a number in [0, 1), 0 for no dropout; got {dropout_p!r}")
    return float(dropout_p)


def _check_differentiable(statistics: tuple[Statistic, ...], differentiable: bool) -> None:
    if not isinstance(differentiable, bool):
        raise TypeError(f"differentiable must be True or False, got {differentiable!r}")
    for s in statistics if differentiable else ():
        if s.last_queries is not None:
            raise ValueError(f"differentiable: {s} of the last queries carries no gradients; Received() does")
        if not s.differentiable:
            raise ValueError(
                f"differentiable: {s} carries no gradients; distance-weighted statistics, Entropy, LSE and SegmentMass "
                "do. "
                "Ask for it in a call with differentiable=False"
            )


def _check_positions(statistics: tuple[Statistic, ...], key_length: int) -> None:
    if key_length > MAX_POSITIONS and any(isinstance(s, TopKeys) for s in statistics):
        raise ValueError(f"statistics: TopKeys numbers at most {MAX_POSITIONS} keys, got {key_length}")


def _positions(query: Tensor, key: Tensor, statistics: tuple[Statistic, ...], options: Options) -> dict[str, Any]:
    """The fields of a dense call's geometry that say which keys a query sees and which queries count."""
    batch, query_length, key_length = query.shape[0], query.shape[2], key.shape[2]
    window_size, is_causal, query_offset = options.window_size, options.is_causal, options.query_offset
    left, right = window_sides(window_size, is_causal)
    if query_offset is None:
        if is_causal and query_length > key_length:
            raise ValueError(
                f"is_causal: queries are the last positions, so Tq <= Tk; got Tq={query_length}, Tk={key_length}. "
                "Pass query_offset to place them elsewhere, or is_causal=False"
            )
        if is_causal or query_length == key_length:
            query_offset = key_length - query_length
    else:
        packing.check_length("query_offset", query_offset)
    if query_offset is None:
        across = f"Tq={query_length} != Tk={key_length} with is_causal=False is taken as cross-attention"
        refuse_distances(statistics, across + ". Pass query_offset if queries and keys share positions")
        if (left, right) != (None, None):
            raise ValueError(f"window_size {window_size} needs positions, and {across}. Pass query_offset")
    for statistic in statistics:
        if isinstance(statistic, PooledMap):
            statistic.boundaries(query_length, key_length)

    _check_mask("query_mask", options.query_mask, (batch, query_length), query.device)
    _check_mask("key_padding_mask", options.key_padding_mask, (batch, key_length), query.device)
    real_keys, real_queries = options.key_padding_mask, None
    if real_keys is not None and query_offset is not None:  # padding positions aren't queries either
        position = torch.arange(query_length, device=query.device, dtype=torch.int64) + query_offset
        real_queries = real_keys[:, position.clamp(max=key_length - 1)] | (position >= key_length)
    key_mask, dense_mask = _split_mask(options.attn_mask, query, key_length)
    query_weight = _weight(options.query_weight, (batch, query_length), statistics, query)
    # A sequence whose first query's position is given may grow: boundaries may lie ahead.
    ends = None if options.query_offset is not None else [key_length] * batch
    return {
        "query_offset": query_offset,
        "left": left,
        "right": right,
        "key_mask": _both(key_mask, real_keys),
        "real_queries": real_queries,
        "query_mask": _counted(_both(options.query_mask, real_queries), query_weight),
        "query_weight": query_weight,
        "segment_ends": _segment_ends(options.segment_boundaries, statistics, batch, ends, query.device),
        "dense_mask": dense_mask,
    }


def _weight(
    query_weight: Tensor | None, shape: tuple[int, ...], statistics: tuple[Statistic, ...], query: Tensor
) -> Tensor | None:
    """A copy of query_weight in the statistics' dtype."""
    if query_weight is None:
        return None
    if not isinstance(query_weight, Tensor) or not query_weight.is_floating_point():
        got = query_weight.dtype if isinstance(query_weight, Tensor) else type(query_weight).__name__
        raise TypeError(f"query_weight must be a float tensor, got {got}; a bool one is a query_mask")
    if tuple(query_weight.shape) != shape:
        raise ValueError(f"query_weight must have shape {shape}, got {tuple(query_weight.shape)}")
    if query_weight.device != query.device:
        raise ValueError(f"query_weight must be on query's device {query.device}, got {query_weight.device}")
    if query_weight.requires_grad:
        raise ValueError("query_weight carries no gradient; pass query_weight.detach()")
    weight = query_weight.to(torch.float64 if query.dtype == torch.float64 else torch.float32, copy=True)
    if query_weight.device.type == "cpu":  # on a GPU a look at them would wait for it
        if not weight.sum(-1).isfinite().all():
            raise ValueError(
                f"query_weight must be finite, and so must its sum in {weight.dtype}; got {_largest(weight):.3g}"
            )
        means = [s for s in statistics if s.is_mean]
        if means and (query_weight < 0).any():
            lowest = float(query_weight.min())
            raise ValueError(f"query_weight must be >= 0 where a mean divides by its sum, as {means[0]}; got {lowest}")
    return weight


def _largest(weight: Tensor) -> float:
    """The number that stands out: NaN, or the largest."""
    return float(weight[weight.isnan()][0] if weight.isnan().any() else weight.abs().max())


def _counted(query_mask: Tensor | None, query_weight: Tensor | None) -> Tensor | None:
    """The queries that count: those of the mask whose weight isn't 0."""
    if query_weight is None:
        return query_mask
    weighs = query_weight != 0
    return weighs if query_mask is None else query_mask & weighs


def _segment_ends(
    boundaries: Tensor | None,
    statistics: tuple[Statistic, ...],
    sequences: int,
    ends: list[int] | None,
    device: torch.device,
) -> Tensor | None:
    """A copy (sequences, S + 1) int64 of segment_boundaries, OPEN_HORIZON for an open end.

    ends: the number of keys of each sequence, that boundaries may not pass; None: they may.
    """
    by_segments = [s for s in statistics if isinstance(s, SegmentMass)]
    for s in by_segments:
        if s.boundaries is None and boundaries is None:
            raise ValueError(
                f"segment_boundaries: {s} takes them from the call; pass them, or SegmentMass((0, n, None))"
            )
        last = None if s.boundaries is None else max(bound for bound in s.boundaries if bound is not None)
        if last is not None and ends and last > max(ends):
            raise ValueError(f"statistics: {s} has a boundary past the end, {last} of {max(ends)} keys")
    if boundaries is None:
        return None
    if not any(s.boundaries is None for s in by_segments):
        raise ValueError("segment_boundaries: no statistic takes them; ask for SegmentMass() without boundaries")
    if not isinstance(boundaries, Tensor) or boundaries.dtype not in (torch.int32, torch.int64):
        got = boundaries.dtype if isinstance(boundaries, Tensor) else type(boundaries).__name__
        raise TypeError(f"segment_boundaries must be an int32 or int64 tensor, got {got}")
    if boundaries.dim() != 2 or len(boundaries) != sequences or boundaries.shape[1] < 2:
        raise ValueError(
            f"segment_boundaries must have shape ({sequences}, S + 1) with S >= 1, got {tuple(boundaries.shape)}"
        )
    if boundaries.device != device:
        raise ValueError(f"segment_boundaries must be on query's device {device}, got {boundaries.device}")
    copy = boundaries.long().clone()
    copy[:, -1].masked_fill_(copy[:, -1] == -1, OPEN_HORIZON)
    if device.type == "cpu":
        for i, row in enumerate(copy.tolist()):
            if row[0] < 0 or any(a > b for a, b in pairwise(row)):
                raise ValueError(
                    f"segment_boundaries must not decrease and begin at 0 or later, got {boundaries[i].tolist()} in "
                    f"row {i}"
                )
            last = max(bound for bound in row if bound != OPEN_HORIZON) if row[0] != OPEN_HORIZON else 0
            if ends and last > ends[i]:
                raise ValueError(f"segment_boundaries has {last} in row {i}, which is past its end of {ends[i]} keys")
    return copy


def _both(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    """True where both masks are, never the caller's own tensor; None: everywhere."""
    if first is None or second is None:
        given = second if first is None else first
        return None if given is None else given.clone()
    return first & second


def _packed_positions(
    query: Tensor, key: Tensor, statistics: tuple[Statistic, ...], options: Options
) -> dict[str, Any]:
    """`_positions` of packed sequences."""
    sequences, shared = packing.read(options, query.shape[2], key.shape[2], query.device)
    window_size, query_mask = options.window_size, options.query_mask
    left, right = window_sides(window_size, options.is_causal)
    if not (options.is_causal or shared):
        across = "cu_seqlens_k that differ from cu_seqlens_q with is_causal=False are taken as cross-attention"
        refuse_distances(statistics, across)
        if (left, right) != (None, None):
            raise ValueError(f"window_size {window_size} needs positions, and {across}")
    if any(statistic.axis == "map" for statistic in statistics):
        raise ValueError("statistics: PooledMap is one map of one sequence; call attention for each packed sequence")
    if query_mask is not None:
        if isinstance(query_mask, Tensor):
            query_mask = query_mask[None]
        _check_mask("query_mask", query_mask, (1, query.shape[2]), query.device)
    query_weight = options.query_weight
    if isinstance(query_weight, Tensor):
        query_weight = query_weight[None]
    query_weight = _weight(query_weight, (1, query.shape[2]), statistics, query)
    ends = None if query.device.type != "cpu" or options.grows else sequences.keys.diff().tolist()
    return {
        "query_offset": 0,
        "left": left,
        "right": right,
        "query_mask": _counted(_both(query_mask, None), query_weight),
        "query_weight": query_weight,
        "segment_ends": _segment_ends(options.segment_boundaries, statistics, sequences.count, ends, query.device),
        "packing": sequences,
    }


def refuse_distances(statistics: tuple[Statistic, ...], reason: str) -> None:
    """Raise ValueError, with the reason, for statistics that need positions of queries and keys."""
    for statistic in statistics:
        if statistic.uses_distance:
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


def window_sides(window_size: Window | None, is_causal: bool) -> Window:
    """`left` and `right`, how far behind and ahead of itself a query sees; None: no limit."""
    if window_size is None:
        return None, 0 if is_causal else None
    sides = tuple(window_size) if isinstance(window_size, (tuple, list)) else ()
    integers = all(side is None or (isinstance(side, INTEGERS) and not isinstance(side, bool)) for side in sides)
    if len(sides) != 2 or not integers or any(side is not None and not -1 <= side < 2**31 - 1 for side in sides):
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
    if sinks.device.type == "cpu" and not (sinks < torch.inf).all():  # on a GPU a look at them would wait for it
        raise ValueError(f"sinks must be finite, or -inf for none, got {sinks[~(sinks < torch.inf)][0].item()}")
    return sinks if sinks.requires_grad else sinks.clone()


def heads_by_statistic(
    heads: Heads | None, statistics: tuple[Statistic, ...], query_heads: int
) -> dict[Statistic, tuple[int, ...]]:
    """The heads of each statistic that is computed for some heads only."""
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


def _check_tensors(query: Tensor, key: Tensor, value: Tensor | None, enable_gqa: bool) -> None:
    tensors = [("query", query), ("key", key), *([] if value is None else [("value", value)])]
    for name, x in tensors:
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        if x.dim() != 4:
            raise ValueError(f"{name} must have 4 dimensions (batch, heads, length, head_dim), got {tuple(x.shape)}")
        no_queries = query.shape[0] * query.shape[2] == 0
        if 0 in (x.shape[1], x.shape[3]) or (0 in x.shape and not no_queries):
            raise ValueError(f"{name} is empty: {tuple(x.shape)}; only the batch and the queries may be")
        if x.dtype not in DTYPES:
            raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}")
        if x.dtype != query.dtype:
            raise TypeError(f"{name} must have query's dtype {query.dtype}, got {x.dtype}")
        if x.device.type in UNTRIED:
            raise ValueError(
                f"{name}: device {x.device.type!r} is not supported, no backend was ever run on one; use CPU"
            )
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
