"""The catalogue: every statistic as data, and the container its results come in.

A statistic says how the map A is weighted and where that weight varies; it computes nothing. `reference`
makes the formula executable, `tiled` and `kernels/` evaluate it in O(T) memory. To add a
distance-weighted statistic, write its dataclass here and its weight in `kernels/weights.py` under the same
name; nothing else changes.

Notation: `A[t, s]` is the softmaxed attention of query position t to key position s, `d = t - s` their
distance, `c[t]` is 1 where query t counts (`query_mask`). Equations: Li et al., arXiv 2510.13554v2.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, TypeGuard
from weakref import WeakValueDictionary

import torch
from torch import Tensor

# Every class of statistics there is in this process, by its key: what a compiled graph, which holds no objects, names.
DEFINED: WeakValueDictionary[str, type[Statistic]] = WeakValueDictionary()

OPEN_HORIZON = 2**31 - 1  # what a kernel's weight receives for "no upper bound"; every setting is below it


@dataclass(frozen=True)
class Statistic:
    """Base of all statistics. Frozen and hashable: a statistic is the key under which its result is found."""

    name: ClassVar[str]
    key: ClassVar[str]  # of the class in DEFINED

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" not in cls.__dict__:
            cls.name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", cls.__name__).lower()
        cls.key = f"{cls.__module__}:{cls.__qualname__}"
        while cls.key in DEFINED:  # a namesake, or this class before dataclass gave it slots
            cls.key += "'"
        DEFINED[cls.key] = cls


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

    kernel_weight: ClassVar[Any] = None
    uses_distance: ClassVar[bool] = True  # False: the weight is constant, so positions need no meaning

    @property
    def band(self) -> tuple[int, int] | None:
        return None

    @property
    def tail(self) -> float:
        return 0.0

    @property
    def parameters(self) -> tuple[int, ...]:
        """The integers, two at most, that the kernel's weight takes."""
        return tuple(getattr(self, field.name) for field in dataclasses.fields(self))

    def weight(self, distance: Tensor) -> Tensor:
        """The weight at each signed distance (integer tensor of any shape), elementwise."""
        raise TypeError(f"{type(self).__name__} defines no weight(distance)")


@dataclass(frozen=True)
class RowStatistic(DistanceWeighted):
    """Per query: `sum_s A[t, s] * weight(t - s)`, shape (B, Hq, Tq)."""


@dataclass(frozen=True)
class ColumnStatistic(DistanceWeighted):
    """Per key: `sum_t c[t] * A[t, s] * weight(t - s)`, shape (B, Hq, Tk). The tail must be 0.

    With a `horizon = (lo, hi)` (hi None: open) it is a mean instead: the sum is divided by the number of
    counted queries at distance lo..hi, where the weight must be 1, and is 0 and not valid where there is none.
    """

    @property
    def horizon(self) -> tuple[int, int | None] | None:
        return None

    @property
    def far(self) -> tuple[int, float] | None:
        """(distance, weight) if from that distance on the weight is constant and not 0; the kernels then save it."""
        return None

    @property
    def last_queries(self) -> int | None:
        """Where set, only the last so many counted queries of each sequence count."""
        return None


@dataclass(frozen=True)
class Summed(ColumnStatistic):
    """The sum that a column mean divides, so that parts of a sequence can be added up; not in the catalogue."""

    of: ColumnStatistic

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
    def parameters(self) -> tuple[int, ...]:
        return self.of.parameters

    def weight(self, distance: Tensor) -> Tensor:
        return self.of.weight(distance)


def is_mean(statistic: Statistic) -> TypeGuard[ColumnStatistic]:
    """Whether a statistic is a mean over a key's counted queries."""
    return isinstance(statistic, ColumnStatistic) and statistic.horizon is not None


def summed(statistic: Statistic) -> Statistic:
    """A statistic whose results add up over parts of the queries: of a mean its sum, else itself."""
    return Summed(statistic) if is_mean(statistic) else statistic


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
    def parameters(self) -> tuple[int, ...]:
        return ()

    def weight(self, distance: Tensor) -> Tensor:
        return torch.ones_like(distance)


@dataclass(frozen=True)
class Entropy(Statistic):
    """Entropy of a row in nats: `-sum_s A[t, s] * ln A[t, s]`, shape (B, Hq, Tq)."""


@dataclass(frozen=True)
class MaxLogit(Statistic):
    """Largest scaled score of a row, `max_s scale * q_t . k_s`, shape (B, Hq, Tq). Needs the attention pass itself."""


@dataclass(frozen=True)
class LSE(Statistic):
    """Natural log of the sum of exp(score) over a row, shape (B, Hq, Tq); -inf for a row that sees no key."""


@dataclass(frozen=True)
class SinkMass(Statistic):
    """Mass on the first `count` keys that are not padding, shape (B, Hq, Tq)."""

    count: int = 4

    def __post_init__(self) -> None:
        _require_integer(self, "count", 1)


@dataclass(frozen=True)
class PooledMap(Statistic):
    """A summed over segments: `sum of c[t] * A[t, s]` over t in query segment i and s in key segment j, (B, Hq, I, J).

    Each argument is a number of uniform bins (bin i of n over length T is `[i * T // n, (i + 1) * T // n)`) or
    the tuple (or list) of n + 1 increasing boundaries, `(0, ..., T)`.
    """

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
        return (
            self._boundaries("query_segments", query_length),
            self._boundaries("key_segments", key_length),
        )

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
    cls.name: cls for cls in (WAAD, LocalMass, MeanDistance, Entropy, MaxLogit, LSE, SinkMass, FAI, Received, PooledMap)
}


def resolve(statistics: Iterable[Statistic | str]) -> tuple[Statistic, ...]:
    """The statistics asked for, names replaced by the catalogue's defaults, each once.

    Raises:
        TypeError, ValueError: what is neither a `Statistic` nor a name of the catalogue.
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
        resolved[item] = None
    return tuple(resolved)


def needing_distances(statistics: Iterable[Statistic]) -> list[Statistic]:
    """Those that mean nothing where queries and keys share no positions."""
    return [s for s in statistics if isinstance(s, DistanceWeighted) and s.uses_distance]


class ByStatistic(Mapping[Statistic, Tensor]):
    """Tensors keyed by statistic, and by name where the name is unambiguous: `stats["waad"]`, `stats[WAAD(20)]`."""

    def __init__(self, tensors: Mapping[Statistic, Tensor]):
        self._tensors = dict(tensors)
        self._statistics = tuple(self._tensors)  # torch.compile can return keys that are elsewhere too

    def __getitem__(self, key: Statistic | str) -> Tensor:
        if isinstance(key, Statistic):
            matches = [key] if key in self._tensors else []
        else:
            matches = [statistic for statistic in self._tensors if statistic.name == key]
        if len(matches) != 1:
            found = ", ".join(map(str, matches or self._tensors)) or "none"
            raise KeyError(f"{key!r} is {'ambiguous' if matches else 'not among the statistics computed'}: {found}")
        return self._tensors[matches[0]]

    def __contains__(self, key: object) -> bool:
        return key in self._tensors or any(statistic.name == key for statistic in self._tensors)

    def __iter__(self) -> Iterator[Statistic]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{s}: {tuple(x.shape)}' for s, x in self._tensors.items())})"


class Statistics(ByStatistic):
    """The statistics of one attention call.

    Attributes:
        lse: (B, Hq, Tq), natural log, float32 (float64 for float64 inputs); -inf for a row that sees no key.
        valid: per statistic a bool tensor without the head axis, (B, Tq), (B, Tk) or (B, I, J): False where a
            value is a placeholder (0): rows that see no key or aren't counted, padding, an empty T(s).
        counts: per column statistic that is a mean, (B, Tk) int64 without the head axis: the counted queries |T(s)|
            behind it, 0 for padding. Value times count is the sum, which adds up over shards of the queries. Sums
            (`Received`) have no entry: they add up as they are.
    """

    def __init__(
        self,
        tensors: Mapping[Statistic, Tensor],
        validity: Callable[[Statistic], Tensor],
        counting: Callable[[ColumnStatistic], Tensor],
        lse: Tensor,
    ):
        super().__init__(tensors)
        self.lse = lse
        self._validity = validity
        self._counting = counting
        self._valid: ByStatistic | None = None
        self._counts: ByStatistic | None = None

    @property
    def valid(self) -> ByStatistic:  # a dozen small operations, which most calls never need
        if self._valid is None:  # not a cached_property, whose lock can't be traced
            self._valid = ByStatistic({statistic: self._validity(statistic) for statistic in self})
        return self._valid

    @property
    def counts(self) -> ByStatistic:
        if self._counts is None:
            means = [s for s in self if is_mean(s)]
            self._counts = ByStatistic({statistic: self._counting(statistic) for statistic in means})
        return self._counts

    def changed(
        self, values: Callable[[Statistic, Tensor], Tensor], facts: Callable[[Statistic, Tensor], Tensor]
    ) -> Statistics:
        """The same with every tensor, the lse as that of `LSE()`, put through `values`, and valid and counts through
        `facts`. Keeps nothing of the tensors that were there before.
        """
        validity, counting = self._validity, self._counting
        return Statistics(
            {statistic: values(statistic, tensor) for statistic, tensor in self.items()},
            lambda s: facts(s, validity(s)),
            lambda s: facts(s, counting(s)),
            values(LSE(), self.lse),
        )


def _require_integer(owner: Statistic, field: str, least: int) -> None:
    value = getattr(owner, field)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{type(owner).__name__}: {field} must be an integer >= {least}, got {value!r}")
    if value >= OPEN_HORIZON:
        raise ValueError(f"{type(owner).__name__}: {field} must be below 2**31 - 1, got {value}")
