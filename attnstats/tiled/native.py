"""Statistics on the CPU by the compiled sums of csrc/, where setup.py could build them (core/library.py).

`enabled = False`, or ATTNSTATS_NATIVE=0 in the environment, leaves all sums to plain PyTorch.
"""

from __future__ import annotations

import ctypes
import functools
from ctypes import POINTER, Structure, c_float, c_int64, c_void_p
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnstats.core import library as compiled
from attnstats.core.geometry import Geometry
from attnstats.core.library import UNBOUNDED
from attnstats.statistics import Entropy, MaxLogit, SegmentMass, Statistic, TopKeys
from attnstats.tiled import band

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
INPUTS = {torch.float32, torch.bfloat16, torch.float16}
ROW_SUM, COLUMN_SUM, ENTROPY, MAX_LOGIT, SEGMENTS, TOP_KEYS = range(6)  # kinds of the interface
OF_ROWS: dict[type[Statistic], int] = {Entropy: ENTROPY, MaxLogit: MAX_LOGIT, SegmentMass: SEGMENTS, TopKeys: TOP_KEYS}

enabled = compiled.enabled
lanes = 0  # floats of the widest vectors to use, 4, 8 or 16; 0: the machine's widest


class _Tensor(Structure):
    _fields_ = (("data", c_void_p), ("batch", c_int64), ("head", c_int64), ("row", c_int64))

    @staticmethod
    def of(x: Tensor) -> _Tensor:
        return _Tensor(x.data_ptr(), *x.stride()[:3])


class _Statistic(Structure):
    _fields_ = (
        ("kind", c_int64),
        ("result", c_void_p),
        ("weights", c_void_p),
        ("farthest", c_int64),
        ("distances", c_int64),
        ("query_weight", c_void_p),
        ("width", c_int64),
        ("boundaries", c_void_p),
    )


class _Call(Structure):
    _fields_ = (
        ("query", _Tensor),
        ("key", _Tensor),
        ("lse", _Tensor),
        ("type", c_int64),
        ("lse_type", c_int64),
        ("batch", c_int64),
        ("heads", c_int64),
        ("group", c_int64),
        ("rows", c_int64),
        ("keys", c_int64),
        ("dim", c_int64),
        ("offset", c_int64),
        ("left", c_int64),
        ("right", c_int64),
        ("scale", c_float),
        ("softcap", c_float),
        ("key_mask", c_void_p),
        ("count", c_int64),
        ("statistics", POINTER(_Statistic)),
        ("threads", c_int64),
        ("lanes", c_int64),
    )


def takes(geometry: Geometry) -> bool:
    """True if the library is installed and takes tensors of this device and dtype."""
    return enabled and geometry.device.type == "cpu" and geometry.dtype in INPUTS and _library() is not None


def computes(statistic: Statistic) -> bool:
    """True for the statistics that the library has code for."""
    return statistic.method == "weight" or type(statistic) in OF_ROWS


def evaluate(
    query: Tensor, key: Tensor, lse: Tensor, geometry: Geometry, statistics: tuple[Statistic, ...]
) -> dict[Statistic, Tensor]:
    """Statistics that `computes` is True for, as sums (`Geometry.finish` divides), all from the same scores."""
    library = _library()
    assert library is not None
    query, key = [x if x.stride(-1) == 1 else x.contiguous() for x in (query, key)]
    tensors: dict[Statistic, Tensor] = {
        s: torch.empty(geometry.shape_of(s), dtype=geometry.accumulator, device=geometry.device) for s in statistics
    }
    query_weights = _query_weights(geometry, statistics)
    key_mask = None if geometry.key_mask is None else geometry.key_mask.contiguous()
    template = geometry.memo.get(("native", statistics))
    if template is None:
        template = geometry.memo["native", statistics] = _template(geometry, statistics)
    requests = type(template.requests).from_buffer_copy(template.requests)
    for s, request in zip(statistics, requests, strict=True):
        request.result = tensors[s].data_ptr()
        if s in query_weights:
            request.query_weight = query_weights[s].data_ptr()
    call = _Call.from_buffer_copy(template.call)
    call.query, call.key, call.lse = _Tensor.of(query), _Tensor.of(key), _Tensor.of(lse[..., None])
    call.lse_type = TYPES[lse.dtype]
    call.statistics, call.threads, call.lanes = requests, torch.get_num_threads(), lanes
    if key_mask is not None:
        call.key_mask = key_mask.data_ptr()
    if library.attnstats_evaluate(ctypes.byref(call)) < 0:
        raise MemoryError("attnstats: no memory for the statistics' working space")
    if template.tails:
        mass = geometry.row_mass(lse)
        for s, tail in template.tails.items():
            tensors[s].add_(mass, alpha=tail)
    return tensors


def cost(geometry: Geometry, statistics: tuple[Statistic, ...]) -> tuple[str, int, int]:
    """The description of `evaluate`, its floating-point operations and its scratch memory in bytes."""
    library = _library()
    assert library is not None
    template = _template(geometry, statistics)
    query_weights = _query_weights(geometry, statistics)
    for s, request in zip(statistics, template.requests, strict=True):
        if s in query_weights:
            request.query_weight = query_weights[s].data_ptr()
    call = _Call.from_buffer_copy(template.call)
    call.statistics, call.threads, call.lanes = template.requests, torch.get_num_threads(), lanes
    scratch = library.attnstats_scratch_bytes(ctypes.byref(call))
    if all(s.method == "weight" and s.is_banded for s in statistics):
        return "band, compiled", band.cost(geometry, statistics)[1], scratch
    pairs = max(geometry.visible_pairs(s.last_queries) for s in statistics if not s.is_banded)
    flops = 2 * pairs * geometry.query_heads * geometry.head_dim
    return "sweep, compiled", flops, scratch


def _query_weights(geometry: Geometry, statistics: tuple[Statistic, ...]) -> dict[Statistic, Tensor]:
    """Of the column statistics that not every query counts for as much, float32."""
    counts = {s: geometry.query_counts(s.last_queries) for s in statistics if s.axis == "column"}
    return {s: x.float().contiguous() for s, x in counts.items() if x is not None}


class _Weights(NamedTuple):
    """A statistic's weights less its tail, from the farthest distance down; None: 1 everywhere."""

    farthest: int
    weights: Tensor | None


class _Template(NamedTuple):
    """The parts of a call that depend on its geometry alone.

    Attributes:
        call: without its tensors.
        requests: one for each statistic, without their results.
        weights, boundaries: the tensors that the requests point into.
        tails: the weights that are added as a share of the row's mass.
    """

    call: _Call
    requests: Any
    weights: list[_Weights]
    boundaries: list[Tensor]
    tails: dict[Statistic, float]


def _template(geometry: Geometry, statistics: tuple[Statistic, ...]) -> _Template:
    requests = (_Statistic * len(statistics))()
    weights = [_weights(s, geometry) for s in statistics]
    boundaries = []
    for request, s, (farthest, by_distance) in zip(requests, statistics, weights, strict=True):
        request.kind, request.farthest, request.width = _kind(s), farthest, 1
        if isinstance(s, TopKeys):
            request.width = s.k
        elif isinstance(s, SegmentMass):
            bounds = geometry.boundaries_of(s).expand(geometry.batch, -1).contiguous()
            boundaries.append(bounds)
            request.width, request.boundaries = bounds.shape[1] - 1, bounds.data_ptr()
        if by_distance is not None:
            request.weights, request.distances = by_distance.data_ptr(), len(by_distance)
    left, right = _window(geometry)
    call = _Call(
        type=TYPES[geometry.dtype],
        batch=geometry.batch,
        heads=geometry.query_heads,
        group=geometry.group,
        rows=geometry.query_length,
        keys=geometry.key_length,
        dim=geometry.head_dim,
        offset=geometry.offset,
        left=left,
        right=right,
        scale=geometry.scale,
        softcap=geometry.softcap or 0.0,
        count=len(statistics),
    )
    return _Template(call, requests, weights, boundaries, {s: tail for s in statistics if (tail := _tail(s, geometry))})


def _window(geometry: Geometry) -> tuple[int, int]:
    """`left` and `right` of the interface, whose distances are never None."""
    left, right = (UNBOUNDED if reach is None else min(reach, UNBOUNDED) for reach in (geometry.left, geometry.right))
    return left, right


def _kind(statistic: Statistic) -> int:
    if statistic.method == "weight":
        return COLUMN_SUM if statistic.axis == "column" else ROW_SUM
    return OF_ROWS[type(statistic)]


def _tail(statistic: Statistic, geometry: Geometry) -> float:
    """The weight that is added as a share of the row's mass, so that the band suffices; 0 for wide bands."""
    return geometry.tail_of(statistic) if statistic.is_banded else 0.0


def _weights(statistic: Statistic, geometry: Geometry) -> _Weights:
    if statistic.method != "weight" or not statistic.uses_distance:
        return _Weights(0, None)
    left, right = _window(geometry)
    farthest = min(geometry.offset + geometry.query_length - 1, left)
    nearest = max(geometry.offset - geometry.key_length + 1, -right)
    tail = _tail(statistic, geometry)
    if statistic.band is not None and statistic.tail == tail:
        nearest, farthest = max(nearest, statistic.band[0]), min(farthest, statistic.band[1])
    if nearest > farthest:  # no key is within the band
        return _Weights(0, torch.zeros(1, dtype=torch.float32, device="cpu"))
    distances = torch.arange(farthest, nearest - 1, -1, dtype=torch.int64, device="cpu")
    weights = statistic.weight_as(distances, torch.float32)
    return _Weights(farthest, (weights - tail if tail else weights).contiguous())


@functools.cache
def _library() -> ctypes.CDLL | None:
    library = compiled.load()
    if library is not None:
        for function in (library.attnstats_evaluate, library.attnstats_scratch_bytes):
            function.restype, function.argtypes = c_int64, (POINTER(_Call),)
    return library
