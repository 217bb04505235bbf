"""The catalogue: every statistic as data.

A statistic says how the map A is weighted and over which distances that weight varies; it computes nothing.
`reference` makes the formula executable, `tiled/` and `kernels/` evaluate it in O(T) memory. They read the traits of a
statistic (`Statistic`), attributes that every one has. docs/statistics.md has the recipes for new ones.

Notation: `A[t, s]` is the softmaxed attention of query position t to key position s, `d = t - s` their
distance, `c[t]` is 1 where query t counts (`query_mask`). Equations: Li et al., arXiv 2510.13554v2.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Literal, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

__all__ = [
    "FAI",
    "LSE",
    "WAAD",
    "ColumnStatistic",
    "Entropy",
    "LocalMass",
    "MaxLogit",
    "MeanDistance",
    "PooledMap",
    "Received",
    "RowStatistic",
    "SegmentMass",
    "SinkMass",
    "Statistic",
    "TopKeys",
    "WholeRowStatistic",
]

# Every class of statistics in this process by its key. A compiled graph holds no objects and names a class by its key.
DEFINED: WeakValueDictionary[str, type[Statistic]] = WeakValueDictionary()

OPEN_HORIZON = 2**31 - 1  # what a kernel's weight receives for "no upper bound"; every setting is below it
MAX_TOP_KEYS = 16
BAND_LIMIT = 1024  # wider bands are computed from all pairs: a band's buffers grow with the square of its width

Axis = Literal["row", "column", "map"]
Method = Literal["weight", "row", "first_keys", "segments", "top", "pooled", "lse"]


@dataclass(frozen=True)
class Statistic:
    """Base of all statistics. Frozen and hashable: results are keyed by statistic.

    Traits, which subclasses override:
        axis: "row" for a value per query, (B, Hq, Tq), or several, (B, Hq, Tq, ..); "column" for one per key,
            (B, Hq, Tk); "map" for (B, Hq, I, J).
        method: how it is computed: "weight", a sum of A weighted by distance; "row", a function of whole rows;
            "first_keys", the mass on the first keys; "segments", the mass on segments of keys; "top", the largest
            entries; "pooled", sums over segments; "lse". None: no backend computes it.
        uses_distance: it is not defined where queries and keys share no positions (cross-attention).
        needs_positions: its value depends on where in the sequence a key stands.
        from_lse: it is a function of (query, key, lse).
        differentiable: it can carry gradients.
        grows: it can be kept up to date while the sequence grows; False where it depends on the end.
        band: (lo, hi), the distances over which the weight varies; None: all.
        tail: the weight outside the band.
        horizon: (lo, hi) of a column mean: its value is divided by the counted queries at these distances; hi None: all
            from lo on; None: a sum.
        averages: its values may be averaged, over heads for instance.
        last_queries: only the last so many counted queries of each sequence count; None: all.
        far: (distance, weight) where a column statistic has this one weight, not 0, from that distance on, so that the
            kernels need not evaluate it; None: it varies, or is 0.
        kernel_weight: the weight as a `@triton.jit` function; None: the function of this name in kernels/weights.py.
    """

    name: ClassVar[str]
    key: ClassVar[str]  # of the class in DEFINED
    axis: ClassVar[Axis] = "row"
    method: ClassVar[Method | None] = None
    uses_distance: ClassVar[bool] = False
    from_lse: ClassVar[bool] = True
    averages: ClassVar[bool] = True
    kernel_weight: ClassVar[Any] = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" not in cls.__dict__:
            cls.name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", cls.__name__).lower()
        cls.key = f"{cls.__module__}:{cls.__qualname__}"
        while cls.key in DEFINED:  # a namesake, or this class before dataclass gave it slots
            cls.key += "'"
        DEFINED[cls.key] = cls

    @property
    def needs_positions(self) -> bool:
        return self.uses_distance or self.method in ("first_keys", "segments", "top")

    @property
    def differentiable(self) -> bool:
        return False

    @property
    def grows(self) -> bool:
        return True

    @property
    def band(self) -> tuple[int, int] | None:
        return None

    @property
    def tail(self) -> float:
        return 0.0

    @property
    def horizon(self) -> tuple[int, int | None] | None:
        return None

    @property
    def last_queries(self) -> int | None:
        return None

    @property
    def far(self) -> tuple[int, float] | None:
        return None

    @property
    def is_banded(self) -> bool:
        """True if the band is narrow enough to be the cheaper way; bands are of all queries that count."""
        return self.band is not None and max(map(abs, self.band)) < BAND_LIMIT and self.last_queries is None

    @property
    def is_mean(self) -> bool:
        """True for a mean over a key's counted queries."""
        return self.horizon is not None

    @property
    def summed(self) -> Statistic:
        """The statistic whose results add up over parts of the queries: the sum of a mean, else itself."""
        return Summed(self) if self.is_mean else self

    def shape(self, query_length: Any, key_length: Any, segments: Any = None) -> tuple[Any, ...]:
        """The shape of a result behind its heads; segments: how many the call's `segment_boundaries` make."""
        return (key_length if self.axis == "column" else query_length,)

    @property
    def per_query(self) -> int:
        """The number of dimensions that a row statistic has behind its queries."""
        return 0

    def returned(self, tensor: Tensor) -> Any:
        """What a call returns for a backend's tensor."""
        return tensor

    def weight(self, distance: Tensor) -> Tensor:
        """The weight at each signed distance, elementwise; distances are whole numbers in float64."""
        raise TypeError(f"{type(self).__name__} defines no weight(distance)")

    def weight_as(self, distance: Tensor, dtype: torch.dtype) -> Tensor:
        """The weight in a dtype, from float64 distances: fractional weights of integers have torch's default dtype."""
        return self.weight(distance.double()).to(dtype)

    def row(self, weights: Tensor, scores: Tensor) -> Tensor:
        """The statistic (..., Tq) of whole rows of A (..., Tq, Tk) and of their scores.

        A key that a row doesn't see has A = 0 and score -inf. Keys that none of the rows sees may be missing.
        """
        raise TypeError(f"{type(self).__name__} defines no row(weights, scores)")


@dataclass(frozen=True)
class DistanceWeighted(Statistic):
    """A sum of A weighted by a function of the signed distance d = t - s.

    A subclass defines `weight` and says where it varies:

    - `band = (lo, hi)`: below lo and above hi the weight is the constant `tail`, so the sum is `tail` times
      the mass of the row plus a sum over the band alone, which costs O(T);
    - `band = None`: it varies everywhere, and every visible pair is looked at once.

    The kernels use the function of the same name in `kernels/weights.py`, called with `parameters`. A class
    defined elsewhere sets `kernel_weight` to its own `@triton.jit` function `(distance, a, b) -> float32`;
    without one it runs on the reference and tiled backends.
    """

    method: ClassVar[Method | None] = "weight"
    uses_distance: ClassVar[bool] = True  # False: the weight is constant, so positions need no meaning

    @property
    def differentiable(self) -> bool:
        return self.last_queries is None

    @property
    def parameters(self) -> tuple[float, ...]:
        """The numbers, two at most, that the kernel's weight takes."""
        return tuple(getattr(self, field.name) for field in dataclasses.fields(self))


@dataclass(frozen=True)
class RowStatistic(DistanceWeighted):
    """Per query: `sum_s A[t, s] * weight(t - s)`, shape (B, Hq, Tq)."""


@dataclass(frozen=True)
class ColumnStatistic(DistanceWeighted):
    """Per key: `sum_t c[t] * A[t, s] * weight(t - s)`, shape (B, Hq, Tk). The tail must be 0.

    With a `horizon = (lo, hi)` (hi None: open) it is a mean instead: the sum is divided by the number of
    counted queries at distance lo..hi, where the weight must be 1, and is 0 and not valid where there is none.
    """

    axis: ClassVar[Axis] = "column"

    @property
    def grows(self) -> bool:
        return self.last_queries is None


@dataclass(frozen=True)
class WholeRowStatistic(Statistic):
    """Per query: any function of the whole row of A and of its scores, shape (B, Hq, Tq).

    A subclass defines `row`. It runs on the reference and tiled backends; the kernels compute Entropy and MaxLogit.
    """

    method: ClassVar[Method | None] = "row"


@dataclass(frozen=True)
class Summed(ColumnStatistic):
    """The sum that a column mean divides, so that parts of a sequence can be added up; not in the catalogue."""

    of: Any

    @property
    def kernel_weight(self) -> Any:
        return self.of.kernel_weight

    @property
    def band(self) -> tuple[int, int] | None:
        return self.of.band

    @property
    def far(self) -> tuple[int, float] | None:
        return self.of.far

    @property
    def last_queries(self) -> int | None:
        return self.of.last_queries

    @property
    def parameters(self) -> tuple[float, ...]:
        return self.of.parameters

    def weight(self, distance: Tensor) -> Tensor:
        return self.of.weight(distance)


@dataclass(frozen=True)
class WAAD(RowStatistic):
    """Windowed average attention distance in tokens: `sum_s A[t, s] * min(|t - s|, window)`, Eq. 9."""

    window: int = 10

    def __post_init__(self) -> None:
        _require_integer(self, "window", 1)

    @property
    def band(self) -> tuple[int, int]:
        return 1 - self.window, self.window - 1

    @property
    def tail(self) -> float:
        return float(self.window)

    def weight(self, distance: Tensor) -> Tensor:
        return distance.abs().clamp(max=self.window)


@dataclass(frozen=True)
class LocalMass(RowStatistic):
    """Mass on the nearest keys: `sum_s A[t, s] * [|t - s| < window]`."""

    window: int = 10

    def __post_init__(self) -> None:
        _require_integer(self, "window", 1)

    @property
    def band(self) -> tuple[int, int]:
        return 1 - self.window, self.window - 1

    def weight(self, distance: Tensor) -> Tensor:
        return distance.abs() < self.window


@dataclass(frozen=True)
class MeanDistance(RowStatistic):
    """Attention distance of a row, in tokens: `sum_s A[t, s] * |t - s|`; its mean over t is a head's (Eq. 7)."""

    def weight(self, distance: Tensor) -> Tensor:
        return distance.abs()


@dataclass(frozen=True)
class FAI(ColumnStatistic):
    """Future attention influence: the mean of A[t, s] over counted queries t with `lo <= t - s <= hi`, Eq. 10.

    `hi=None` leaves the horizon open: to the end of the sequence.
    """

    lo: int = 10
    hi: int | None = 100

    def __post_init__(self) -> None:
        _require_integer(self, "lo", 0)
        if self.hi is not None:
            _require_integer(self, "hi", 0)
            if self.lo > self.hi:
                raise ValueError(
                    f"FAI: lo must be <= hi, got lo={self.lo}, hi={self.hi}; hi=None leaves the horizon open"
                )

    @property
    def band(self) -> tuple[int, int] | None:
        return None if self.hi is None else (self.lo, self.hi)

    @property
    def horizon(self) -> tuple[int, int | None]:
        return self.lo, self.hi

    @property
    def far(self) -> tuple[int, float] | None:
        return (self.lo, 1.0) if self.hi is None else None

    @property
    def parameters(self) -> tuple[int, int]:
        return self.lo, OPEN_HORIZON if self.hi is None else self.hi

    def weight(self, distance: Tensor) -> Tensor:
        above = distance >= self.lo
        return above if self.hi is None else above & (distance <= self.hi)


@dataclass(frozen=True)
class Received(ColumnStatistic):
    """Attention a key received, `sum_t c[t] * A[t, s]` (H2O); with `last=w` from the last w queries (SnapKV)."""

    uses_distance: ClassVar[bool] = False

    last: int | None = None

    def __post_init__(self) -> None:
        if self.last is not None:
            _require_integer(self, "last", 1)

    @property
    def far(self) -> tuple[int, float]:
        return -OPEN_HORIZON, 1.0

    @property
    def last_queries(self) -> int | None:
        return self.last

    @property
    def parameters(self) -> tuple[float, ...]:
        return ()

    def weight(self, distance: Tensor) -> Tensor:
        return torch.ones_like(distance)


@dataclass(frozen=True)
class Entropy(WholeRowStatistic):
    """Entropy of a row in nats: `-sum_s A[t, s] * ln A[t, s]`, shape (B, Hq, Tq)."""

    differentiable: ClassVar[bool] = True

    def row(self, weights: Tensor, scores: Tensor) -> Tensor:
        # entr's derivative at 0 is infinite, and what reaches a score through it is A times that: 0.
        return torch.special.entr(torch.where(weights == 0, 1.0, weights)).sum(-1)


@dataclass(frozen=True)
class MaxLogit(WholeRowStatistic):
    """Largest scaled score of a row, `max_s scale * q_t . k_s`, shape (B, Hq, Tq). Needs the attention pass itself."""

    from_lse: ClassVar[bool] = False

    def row(self, weights: Tensor, scores: Tensor) -> Tensor:
        return scores.amax(-1)


@dataclass(frozen=True)
class LSE(Statistic):
    """Natural log of the sum of exp(score) over a row, shape (B, Hq, Tq); -inf for a row that sees no key."""

    method: ClassVar[Method | None] = "lse"
    differentiable: ClassVar[bool] = True


@dataclass(frozen=True)
class SinkMass(Statistic):
    """Mass on the first `count` keys that are not padding, shape (B, Hq, Tq)."""

    method: ClassVar[Method | None] = "first_keys"

    count: int = 4

    def __post_init__(self) -> None:
        _require_integer(self, "count", 1)


@dataclass(frozen=True)
class SegmentMass(Statistic):
    """Mass on segments of keys: `sum of A[t, s]` over s in segment i, shape (B, Hq, Tq, S).

    Segment i is the keys `boundaries[i] .. boundaries[i + 1] - 1`, positions from 0 on; what lies before the first and
    behind the last boundary is in none. The last may be None: everything since. `boundaries=None` takes those of the
    call's argument `segment_boundaries`, which may differ by batch row. `SegmentMass((0, n, None))` is the share on a
    context of n tokens against that on new tokens (Lookback Lens, arXiv 2407.07071).
    """

    method: ClassVar[Method | None] = "segments"
    differentiable: ClassVar[bool] = True

    boundaries: tuple[int | None, ...] | None = None

    def __post_init__(self) -> None:
        bounds: Any = self.boundaries
        if bounds is None:
            return
        if isinstance(bounds, list):
            bounds = tuple(bounds)
            object.__setattr__(self, "boundaries", bounds)  # a statistic is a key, and a list has no hash
        if not isinstance(bounds, tuple) or len(bounds) < 2:
            raise ValueError(f"SegmentMass: boundaries must be a tuple of two positions or more, got {bounds!r}")
        closed = bounds[:-1] if bounds[-1] is None else bounds
        if not all(type(bound) is int for bound in closed):
            raise ValueError(f"SegmentMass: boundaries must hold integers, and the last may be None; got {bounds}")
        if closed[0] < 0 or any(a > b for a, b in pairwise(closed)):
            raise ValueError(f"SegmentMass: boundaries must not decrease and begin at 0 or later, got {bounds}")
        if closed[-1] >= OPEN_HORIZON:
            raise ValueError(f"SegmentMass: boundaries must be below 2**31 - 1, got {closed[-1]}")

    @property
    def ends(self) -> tuple[int, ...]:
        """The boundaries as numbers, an open end being OPEN_HORIZON."""
        assert self.boundaries is not None
        return tuple(OPEN_HORIZON if bound is None else bound for bound in self.boundaries)

    @property
    def per_query(self) -> int:
        return 1

    def shape(self, query_length: Any, key_length: Any, segments: Any = None) -> tuple[Any, ...]:
        return query_length, segments if self.boundaries is None else len(self.boundaries) - 1


def refuse_boundaries_of_the_call(statistics: Iterable[Statistic], caller: str) -> None:
    """Raise ValueError for a SegmentMass without boundaries, where calls have no argument for them."""
    for s in statistics:
        if isinstance(s, SegmentMass) and s.boundaries is None:
            raise ValueError(f"statistics: {caller} has no segment_boundaries; give SegmentMass((0, n, None)) its own")


class Top(NamedTuple):
    """The result of `TopKeys(k)`, as torch.topk names it."""

    values: Tensor  # (B, Hq, Tq, k), from the largest down; 0 where a query sees fewer keys
    indices: Tensor  # (B, Hq, Tq, k) int64, the keys' positions; -1 where a query sees fewer keys


@dataclass(frozen=True)
class TopKeys(Statistic):
    """The k largest A[t, s] of a row, 16 at most, and their keys' positions, ties to the lower position: a `Top`.

    How often the first is the token that is generated next finds retrieval and copying heads (arXiv 2404.15574).
    """

    method: ClassVar[Method | None] = "top"
    averages: ClassVar[bool] = False

    k: int = 1

    def __post_init__(self) -> None:
        _require_integer(self, "k", 1)
        if self.k > MAX_TOP_KEYS:
            raise ValueError(f"TopKeys: k must be at most {MAX_TOP_KEYS}, got {self.k}")

    @property
    def per_query(self) -> int:
        return 2

    def shape(self, query_length: Any, key_length: Any, segments: Any = None) -> tuple[Any, ...]:
        return query_length, 2, self.k  # backends return values and indices in one tensor

    def returned(self, tensor: Tensor) -> Top:
        return Top(tensor[..., 0, :], tensor[..., 1, :].long())


@dataclass(frozen=True)
class PooledMap(Statistic):
    """A summed over segments: `sum of c[t] * A[t, s]` over t in query segment i and s in key segment j, (B, Hq, I, J).

    Each argument is a number of uniform bins (bin i of n over length T is `[i * T // n, (i + 1) * T // n)`) or
    the tuple (or list) of n + 1 increasing boundaries, `(0, ..., T)`.
    """

    axis: ClassVar[Axis] = "map"
    method: ClassVar[Method | None] = "pooled"
    grows: ClassVar[bool] = False

    query_segments: int | tuple[int, ...] = 64
    key_segments: int | tuple[int, ...] = 64

    def __post_init__(self) -> None:
        for field in ("query_segments", "key_segments"):
            value = getattr(self, field)
            if isinstance(value, list):
                value = tuple(value)
                object.__setattr__(self, field, value)  # a statistic is a key, and a list has no hash
            if not isinstance(value, tuple):
                _require_integer(self, field, 1)
            elif not all(isinstance(bound, int) and not isinstance(bound, bool) for bound in value):
                raise ValueError(f"PooledMap: {field} must hold integers, got {value}")
            elif len(value) < 2 or value[0] != 0 or any(a >= b for a, b in pairwise(value)):
                raise ValueError(f"PooledMap: {field} must increase from 0 to the length, got {value}")

    def boundaries(self, query_length: int, key_length: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The boundaries of the query and of the key segments. Raises ValueError where they don't fit the lengths."""
        return self._boundaries("query_segments", query_length), self._boundaries("key_segments", key_length)

    def shape(self, query_length: Any, key_length: Any, segments: Any = None) -> tuple[Any, ...]:
        return tuple(x if isinstance(x, int) else len(x) - 1 for x in (self.query_segments, self.key_segments))

    def _boundaries(self, field: str, length: int) -> tuple[int, ...]:
        segments = getattr(self, field)
        if isinstance(segments, tuple):
            if segments[-1] != length:
                raise ValueError(f"PooledMap: {field} must end at the length {length}, got {segments[-1]}")
            return segments
        if segments > length:
            raise ValueError(f"PooledMap: {field}={segments} bins are more than the length {length}")
        return tuple(i * length // segments for i in range(segments + 1))


CATALOGUE: dict[str, type[Statistic]] = {
    cls.name: cls
    for cls in (
        WAAD,
        LocalMass,
        MeanDistance,
        Entropy,
        MaxLogit,
        LSE,
        SinkMass,
        SegmentMass,
        TopKeys,
        FAI,
        Received,
        PooledMap,
    )
}


def resolve(statistics: Iterable[Statistic | str]) -> tuple[Statistic, ...]:
    """The statistics of a list, names replaced by the catalogue's defaults, each once.

    Raises:
        TypeError, ValueError: what is neither a `Statistic` nor a name of the catalogue, and a class of the caller's
            own that breaks the contract of its base.
    """
    if isinstance(statistics, (str, Statistic)):
        raise TypeError(f"statistics must be a list, got {statistics!r}; write [{statistics!r}]")
    if not isinstance(statistics, Iterable):
        raise TypeError(f"statistics must be a list, got {statistics!r}; write [] for none")
    resolved: dict[Statistic, None] = {}
    item: Any
    for item in statistics:
        if isinstance(item, str):
            if item not in CATALOGUE:
                raise ValueError(f"statistics: unknown name {item!r}; the catalogue has {', '.join(CATALOGUE)}")
            item = CATALOGUE[item]()
        elif not isinstance(item, Statistic):
            hint = f"; write {item.__name__}()" if isinstance(item, type) else ""
            raise TypeError(f"statistics: expected a Statistic or a name, got {item!r}{hint}")
        elif CATALOGUE.get(item.name) is not type(item) and not torch.compiler.is_compiling():
            _check_contract(item)
        resolved[item] = None
    return tuple(resolved)


@functools.lru_cache(maxsize=256)
def _check_contract(statistic: Statistic) -> None:
    """Raise for a statistic of a user's own that no backend could compute, or would compute wrongly."""
    kind = type(statistic)
    if statistic.method is None or (statistic.method == "row" and kind.row is Statistic.row):
        missing = " and define row(weights, scores)" if statistic.method else ""
        raise TypeError(
            f"statistics: no backend computes {statistic}; derive {kind.__name__} from attnstats.RowStatistic or "
            f"ColumnStatistic, which have a weight(distance), or from WholeRowStatistic{missing}"
        )
    if statistic.method != "weight":
        return
    lo, hi = statistic.band or (0, 0)
    if lo > hi:
        raise ValueError(f"statistics: {statistic}: band must be (lo, hi) with lo <= hi, got {statistic.band}")
    if statistic.axis == "column" and statistic.tail != 0:
        raise ValueError(f"statistics: {statistic}: the tail of a column statistic must be 0, got {statistic.tail}")
    with _disable_current_modes():  # real numbers, also while a graph is traced
        _check_weight(statistic, lo, hi)


def _check_weight(statistic: Statistic, lo: int, hi: int) -> None:
    """Raise where the weight contradicts what the statistic says of it."""
    around = torch.arange(lo - 64, hi + 65, dtype=torch.float64, device="cpu")
    distance = torch.nn.functional.pad(torch.nn.functional.pad(around, (1, 0), value=-(2**20)), (0, 1), value=2**20)
    weight = statistic.weight(distance)
    if not isinstance(weight, Tensor) or weight.shape != distance.shape or weight.is_complex():
        got = f"{weight.dtype} {tuple(weight.shape)}" if isinstance(weight, Tensor) else type(weight).__name__
        raise ValueError(
            f"statistics: {statistic}: weight(distance) must be real and of distance's shape {tuple(distance.shape)}, "
            f"got {got}"
        )
    if not bool(weight.isfinite().all()):
        at = int(distance[~weight.isfinite()][0])
        raise ValueError(f"statistics: {statistic}: weight must be finite at every distance, it is not at {at}")
    outside = (distance < lo) | (distance > hi)
    varies = outside & (weight.double() != statistic.tail)
    if statistic.band is not None and bool(varies.any()):
        at = int(distance[varies][0])
        raise ValueError(
            f"statistics: {statistic}: weight must be the tail {statistic.tail} outside the band {statistic.band}, "
            f"it is {weight[varies][0].item()} at distance {at}; band=None looks at every distance"
        )
    if statistic.horizon is not None:
        first, last = statistic.horizon
        within = (distance >= first) & (distance <= (2**30 if last is None else last))
        if bool((weight.double()[within] != 1).any()):
            raise ValueError(f"statistics: {statistic}: weight must be 1 within the horizon {statistic.horizon}")


def _require_integer(owner: Statistic, field: str, least: int) -> None:
    value = getattr(owner, field)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{type(owner).__name__}: {field} must be an integer >= {least}, got {value!r}")
    if value >= OPEN_HORIZON:
        raise ValueError(f"{type(owner).__name__}: {field} must be below 2**31 - 1, got {value}")
