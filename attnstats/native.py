"""Statistics on the CPU by the compiled sums of csrc/, where setup.py could build them: what `tiled` tries first.

The library is optional. It has a plain C interface, so one build serves every Python and torch; it shares torch's
threads, because it asks for libgomp by the name under which torch has loaded its own. `enabled = False`, or
ATTNSTATS_NATIVE=0 in the environment, leaves all to plain PyTorch.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
from ctypes import POINTER, Structure, c_float, c_int64, c_void_p

import torch
from torch import Tensor

from attnstats.diagonal import is_narrow
from attnstats.geometry import Geometry
from attnstats.statistics import ColumnStatistic, DistanceWeighted, Entropy, MaxLogit, Statistic

VERSION = 1  # of the interface; a library that says another is not used
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ROW_SUM, COLUMN_SUM, ENTROPY, MAX_LOGIT = range(4)
UNBOUNDED = 2**40  # a distance beyond all others

enabled = os.environ.get("ATTNSTATS_NATIVE", "1") != "0"
lanes = 0  # floats of the widest vectors to use, 4, 8 or 16; 0: what the machine has


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
        ("counted", c_void_p),
    )


class _Call(Structure):
    _fields_ = (
        ("query", _Tensor),
        ("key", _Tensor),
        ("lse", _Tensor),
        ("type", c_int64),
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


def takes(geometry: Geometry, statistic: Statistic) -> bool:
    """Whether the library is there and can compute this one."""
    return (
        enabled
        and geometry.device.type == "cpu"
        and geometry.dtype in TYPES
        and isinstance(statistic, (DistanceWeighted, Entropy, MaxLogit))
        and _library() is not None
    )


def evaluate(
    query: Tensor, key: Tensor, lse: Tensor, geometry: Geometry, statistics: tuple[Statistic, ...]
) -> dict[Statistic, Tensor]:
    """Statistics that it takes, as sums (`Geometry.finish` divides), all from the same scores."""
    query, key = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key))
    lse = lse.to(torch.float32)
    left, right = _window(geometry)
    tensors: dict[Statistic, Tensor] = {s: lse.new_empty(geometry.shape_of(s)) for s in statistics}
    weights = [_weights(s, geometry, left, right) for s in statistics]
    counted = [_counted(s, geometry) for s in statistics]
    key_mask = None if geometry.key_mask is None else geometry.key_mask.contiguous()
    asked = (_Statistic * len(statistics))(
        *(
            _Statistic(_kind(s), tensors[s].data_ptr(), _pointer(w), farthest, 0 if w is None else len(w), _pointer(c))
            for s, (farthest, w), c in zip(statistics, weights, counted, strict=True)
        )
    )
    call = _Call(
        query=_Tensor.of(query),
        key=_Tensor.of(key),
        lse=_Tensor.of(lse[..., None]),
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
        key_mask=_pointer(key_mask),
        count=len(asked),
        statistics=asked,
        threads=torch.get_num_threads(),
        lanes=lanes,
    )
    library = _library()
    assert library is not None
    if library.attnstats_evaluate(ctypes.byref(call)):
        raise MemoryError("attnstats: no memory for the statistics' working space")
    mass = geometry.row_mass(lse) if any(_tail(s) for s in statistics) else None
    return {s: x if mass is None or not _tail(s) else x.add_(mass, alpha=_tail(s)) for s, x in tensors.items()}


def _window(geometry: Geometry) -> tuple[int, int]:
    return tuple(UNBOUNDED if reach is None else min(reach, UNBOUNDED) for reach in (geometry.left, geometry.right))  # type: ignore[return-value]


def _kind(statistic: Statistic) -> int:
    if isinstance(statistic, DistanceWeighted):
        return COLUMN_SUM if isinstance(statistic, ColumnStatistic) else ROW_SUM
    return ENTROPY if isinstance(statistic, Entropy) else MAX_LOGIT


def _tail(statistic: Statistic) -> float:
    """What is summed as a share of the row's mass, so that the band suffices; over a wide band that would cost digits."""
    return statistic.tail if isinstance(statistic, DistanceWeighted) and is_narrow(statistic) else 0.0


def _weights(statistic: Statistic, geometry: Geometry, left: int, right: int) -> tuple[int, Tensor | None]:
    """The farthest distance and the weights, less the tail, from there down; None where the weight is always 1."""
    if not isinstance(statistic, DistanceWeighted) or not statistic.uses_distance:
        return 0, None
    farthest = min(geometry.offset + geometry.query_length - 1, left)
    nearest = max(geometry.offset - geometry.key_length + 1, -right)
    if statistic.band is not None and statistic.tail == _tail(statistic):
        nearest, farthest = max(nearest, statistic.band[0]), min(farthest, statistic.band[1])
    if nearest > farthest:  # no key is that near
        return 0, torch.zeros(1)
    distance = torch.arange(farthest, nearest - 1, -1)
    return farthest, statistic.weight(distance).to(torch.float32).sub(_tail(statistic)).contiguous()


def _counted(statistic: Statistic, geometry: Geometry) -> Tensor | None:
    if not isinstance(statistic, ColumnStatistic):
        return None
    counted = geometry.counted(statistic.last_queries)
    return None if counted is None else counted.contiguous()


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


@functools.cache
def _library() -> ctypes.CDLL | None:
    """None where setup.py found no compiler, or what it built does not load or fit here."""
    spec = importlib.util.find_spec("attnstats._native")
    if spec is None or spec.origin is None:
        return None
    try:
        library = ctypes.CDLL(spec.origin)
        library.attnstats_version.restype = library.attnstats_evaluate.restype = c_int64
        library.attnstats_evaluate.argtypes = (POINTER(_Call),)
    except (OSError, AttributeError):
        return None
    return library if library.attnstats_version() == VERSION else None
