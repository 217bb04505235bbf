"""The passes of a call on the backend "triton", and which list of which kernel computes each statistic."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

from attnstats.core.geometry import Geometry
from attnstats.core.passes import Pass
from attnstats.statistics import Entropy, MaxLogit, MeanDistance, Statistic, TopKeys

Heads = tuple[int, ...] | None  # of a pass; None: all

# The whole-row statistics that the forward kernel computes, in the order in which it stores them, and the constant that
# switches each on in forward and combine.
WHOLE_ROWS: dict[type[Statistic], str] = {Entropy: "ENTROPY", MaxLogit: "MAX_LOGIT"}


RIDING_MARKS = (
    16  # segments that fit into one narrow matmul of the forward kernel's loop; more have a pass of their own
)


def passes(geometry: Geometry, attends: bool, splits: int) -> tuple[Pass, ...]:
    """The launches of `attend`, or of `from_lse`, in order; splits: parts into which the keys are cut, 0 for none."""
    heads = tuple(map(geometry.heads.get, geometry.statistics))
    segments = sum(geometry.shape_of(s)[-1] for s in geometry.statistics if s.method == "segments")
    return _passes(geometry.statistics, heads, attends, bool(splits), segments <= RIDING_MARKS)


@functools.lru_cache(maxsize=256)
def _passes(
    statistics: tuple[Statistic, ...], heads: tuple[Heads, ...], attends: bool, split: bool, few_segments: bool
) -> tuple[Pass, ...]:
    of = dict(zip(statistics, heads, strict=True))
    bands = [s for s in statistics if s.is_banded]
    loop = [s for s in statistics if _is_loop_row(s) and (attends or s.from_lse)]
    riding: list[Statistic] = []
    if few_segments and not (attends and split):
        riding += [s for s in statistics if s.method == "segments"]
    if attends and not split:
        riding += [s for s in statistics if isinstance(s, TopKeys) and s.k == 1]
    loop += riding
    in_epilogue = bands if attends and not split else []
    planned = []
    if not in_epilogue:
        for of_band in dict.fromkeys(of[s] for s in bands):
            planned.append(Pass("band", tuple(s for s in bands if of[s] == of_band), of_band))
    if attends:
        chosen = tuple(s for s in statistics if s in loop or s in in_epilogue)
        planned.insert(0, Pass("decode" if split else "forward", chosen, attends=True))
    else:
        for of_rows in dict.fromkeys(of[s] for s in loop):
            together = tuple(s for s in loop if of[s] == of_rows)
            planned.append(Pass("decode" if split else "rows", together, of_rows))
    columns = [s for s in statistics if s.axis == "column" and not s.is_banded]
    for last, of_column in dict.fromkeys((s.last_queries, of[s]) for s in columns):
        together = tuple(s for s in columns if (s.last_queries, of[s]) == (last, of_column))
        planned.append(Pass("column", together, of_column, last_queries=last))
    apart = [s for s in statistics if s.method in ("segments", "top") and s not in riding]
    apart += [s for s in statistics if s.method in ("pooled", "first_keys", "lse")]
    planned += [Pass(str(s.method), (s,), of[s]) for s in apart]
    return tuple(planned)


def _is_loop_row(statistic: Statistic) -> bool:
    """True for row statistics of the forward kernel's main loop."""
    if statistic.method == "weight":
        return statistic.axis == "row" and not statistic.is_banded
    return statistic.method == "row"


@dataclass(frozen=True, eq=False)  # one object for the same statistics, which finds what is remembered for it at once
class Plan:
    """The statistics of a pass by the list of the forward or the band kernel that computes them."""

    moment: tuple[Statistic, ...]  # forward's main loop; under a causal mask it is a first moment of the positions
    loop_rows: tuple[Statistic, ...]  # forward's main loop, any weight
    whole_rows: tuple[Statistic, ...]  # forward's main loop, in the order of WHOLE_ROWS
    segments: tuple[Statistic, ...]  # forward's main loop
    top: tuple[Statistic, ...]  # forward's main loop, where it attends: TopKeys(1) or nothing
    band_rows: tuple[Statistic, ...]  # forward's epilogue, or the band kernel
    band_columns: tuple[Statistic, ...]

    @staticmethod
    @functools.lru_cache(maxsize=256)
    def of(statistics: tuple[Statistic, ...], causal: bool) -> Plan:
        moment = tuple(s for s in statistics if type(s) is MeanDistance and causal)
        return Plan(
            moment=moment,
            loop_rows=tuple(s for s in statistics if s.method == "weight" and _is_loop_row(s) and s not in moment),
            whole_rows=tuple(s for kind in WHOLE_ROWS for s in statistics if type(s) is kind),
            segments=tuple(s for s in statistics if s.method == "segments"),
            top=tuple(s for s in statistics if s.method == "top"),
            band_rows=tuple(s for s in statistics if s.is_banded and s.axis == "row"),
            band_columns=tuple(s for s in statistics if s.is_banded and s.axis == "column"),
        )

    @functools.cached_property
    def bands(self) -> tuple[Statistic, ...]:
        return (*self.band_rows, *self.band_columns)

    @functools.cached_property
    def in_loop(self) -> tuple[Statistic, ...]:
        """The row statistics of the main loop that can be computed from an lse."""
        whole = (s for s in self.whole_rows if s.from_lse)
        return (*self.moment, *self.loop_rows, *whole, *self.segments, *self.top)

    @functools.cached_property
    def in_rows(self) -> tuple[Statistic, ...]:
        """The row statistics of one number that the forward kernel stores, in its order."""
        return (*self.moment, *self.loop_rows, *self.band_rows, *self.whole_rows)

    @property
    def whole_row_constants(self) -> dict[str, int]:
        """1 for each constant of WHOLE_ROWS whose statistic is asked for, else 0."""
        return {constant: sum(type(s) is kind for s in self.whole_rows) for kind, constant in WHOLE_ROWS.items()}

    def reach(self, geometry: Geometry) -> tuple[int, int]:
        """The distances that the band reaches behind and ahead of a query."""
        return _reach(self.bands, geometry)

    def rows_behind(self, geometry: Geometry) -> int:
        """The distance that row statistics of the band reach behind a query."""
        return _reach(self.band_rows, geometry)[0]

    def bound(self, geometry: Geometry, tile: int) -> bool:
        """True if the window's end matters to the band, whose tiles are `tile` positions and keys together.

        It hides keys that have a weight, or keys of weight 0 in a tile of rows: their scores are not among those whose
        maximum is the pivot, so their A may be inf, and 0 * inf is NaN.
        """
        left = geometry.left
        if left is None or not self.bands:
            return False
        if self.band_rows and left < self.reach(geometry)[0] + tile:
            return True
        return any(s.band is not None and (s.band[1] > left or geometry.tail_of(s) != s.tail) for s in self.bands)

    def reach_of_heads(self, geometry: Geometry) -> tuple[int, ...] | None:
        """The distance that the band reaches behind a query of each head, -1 for none; None: the same in all heads."""
        if not any(s in geometry.heads for s in self.bands):
            return None
        reach = [-1] * geometry.query_heads
        for s in self.bands:
            behind, _ = _reach((s,), geometry)
            for head in geometry.heads.get(s, range(geometry.query_heads)):
                reach[head] = max(reach[head], behind)
        return tuple(reach)


class GradientPlan(NamedTuple):
    """The statistics that carry gradients by the list of the backward kernels that has their weight."""

    far_rows: tuple[Statistic, ...]
    near_rows: tuple[Statistic, ...]  # those with a narrow band: looked at near the diagonal alone
    entropy: bool
    far_columns: tuple[Statistic, ...]
    near_columns: tuple[Statistic, ...]

    @staticmethod
    @functools.lru_cache(maxsize=256)
    def of(statistics: tuple[Statistic, ...]) -> GradientPlan:
        rows = [s for s in statistics if s.method == "weight" and s.axis == "row"]
        columns = [s for s in statistics if s.axis == "column"]
        return GradientPlan(
            far_rows=tuple(s for s in rows if not s.is_banded),
            near_rows=tuple(s for s in rows if s.is_banded),
            entropy=any(s.method == "row" for s in statistics),
            far_columns=tuple(s for s in columns if not s.is_banded),
            near_columns=tuple(s for s in columns if s.is_banded),
        )

    @property
    def weighs(self) -> bool:
        """True if a tile has anything to add for statistics."""
        return self.entropy or bool(self.rows or self.columns)

    @property
    def rows(self) -> tuple[Statistic, ...]:
        """The row statistics in the kernels' order."""
        return (*self.far_rows, *self.near_rows)

    @property
    def columns(self) -> tuple[Statistic, ...]:
        """The column statistics in the kernels' order."""
        return (*self.far_columns, *self.near_columns)

    def reach(self, geometry: Geometry) -> tuple[int, int]:
        """The distances that weights with a band reach behind and ahead of a query."""
        return _reach((*self.near_rows, *self.near_columns), geometry)


def _reach(statistics: tuple[Statistic, ...], geometry: Geometry) -> tuple[int, int]:
    bands = [s.band for s in statistics if s.band]
    behind, ahead = max((hi for _, hi in bands), default=0), max((-lo for lo, _ in bands), default=0)
    behind = behind if geometry.left is None else min(behind, geometry.left)
    return max(0, behind), max(0, ahead if geometry.right is None else min(ahead, geometry.right))
