"""Which kernel, or which loop of it, computes each statistic. Made and read by the backend "triton" (ops.py)."""

from __future__ import annotations

import functools
from typing import NamedTuple

from attnstats.core.geometry import Geometry
from attnstats.statistics import (
    LSE,
    ColumnStatistic,
    DistanceWeighted,
    Entropy,
    MaxLogit,
    MeanDistance,
    PooledMap,
    RowStatistic,
    SinkMass,
    Statistic,
)
from attnstats.tiled.band import is_narrow

Heads = tuple[int, ...] | None  # of a statistic; None: all


class Plan(NamedTuple):
    moment: tuple[MeanDistance, ...]  # forward's main loop; under a causal mask it is a first moment of the positions
    loop_rows: tuple[DistanceWeighted, ...]  # forward's main loop, any weight
    entropy: tuple[Statistic, ...]
    max_logit: tuple[Statistic, ...]
    band_rows: tuple[DistanceWeighted, ...]  # forward's epilogue, or the band kernel
    band_columns: tuple[DistanceWeighted, ...]
    columns: tuple[ColumnStatistic, ...]  # the column kernel
    maps: tuple[PooledMap, ...]  # the column kernel, once per map
    sinks: tuple[SinkMass, ...]  # plain PyTorch on a few keys
    lse: tuple[Statistic, ...]

    @staticmethod
    @functools.lru_cache(maxsize=256)
    def of(statistics: tuple[Statistic, ...], causal: bool) -> Plan:
        moment = tuple(s for s in statistics if type(s) is MeanDistance and causal)
        rows = [s for s in statistics if isinstance(s, RowStatistic)]
        columns = [s for s in statistics if isinstance(s, ColumnStatistic)]
        return Plan(
            moment=moment,
            loop_rows=tuple(s for s in rows if not is_narrow(s) and s not in moment),
            entropy=tuple(s for s in statistics if isinstance(s, Entropy)),
            max_logit=tuple(s for s in statistics if isinstance(s, MaxLogit)),
            band_rows=tuple(s for s in rows if is_narrow(s)),
            band_columns=tuple(s for s in columns if is_narrow(s)),
            columns=tuple(s for s in columns if not is_narrow(s)),
            maps=tuple(s for s in statistics if isinstance(s, PooledMap)),
            sinks=tuple(s for s in statistics if isinstance(s, SinkMass)),
            lse=tuple(s for s in statistics if isinstance(s, LSE)),
        )

    def without_bands(self) -> Plan:
        return self._replace(band_rows=(), band_columns=())

    @property
    def bands(self) -> tuple[DistanceWeighted, ...]:
        return (*self.band_rows, *self.band_columns)

    @property
    def has_passes_beside(self) -> bool:
        return bool(self.columns or self.maps or self.sinks or self.lse)

    @property
    def in_loop(self) -> tuple[Statistic, ...]:
        """What forward can compute from an lse."""
        return (*self.moment, *self.loop_rows, *self.entropy)

    @property
    def in_rows(self) -> tuple[Statistic, ...]:
        """What the forward kernel stores per query, in its order."""
        return (*self.moment, *self.loop_rows, *self.band_rows, *self.entropy, *self.max_logit)

    @property
    def in_forward(self) -> tuple[Statistic, ...]:
        return (*self.in_rows, *self.band_columns)

    def band_passes(self, geometry: Geometry) -> dict[Heads, Plan]:
        """The band kernel's passes: statistics of the same heads go together."""
        wanted = dict.fromkeys(geometry.heads.get(s) for s in self.bands)
        return {
            heads: self._replace(
                band_rows=tuple(s for s in self.band_rows if geometry.heads.get(s) == heads),
                band_columns=tuple(s for s in self.band_columns if geometry.heads.get(s) == heads),
            )
            for heads in wanted
        }

    def column_passes(self, geometry: Geometry) -> dict[tuple[int | None, Heads], tuple[ColumnStatistic, ...]]:
        """The column kernel's passes: statistics that count the same queries of the same heads go together."""
        passes: dict[tuple[int | None, Heads], tuple[ColumnStatistic, ...]] = {}
        for s in self.columns:
            counting = s.last_queries, geometry.heads.get(s)
            passes[counting] = (*passes.get(counting, ()), s)
        return passes

    def reach(self, geometry: Geometry) -> tuple[int, int]:
        """How far the band goes behind and ahead of a query."""
        return _reach(self.bands, geometry)

    def rows_behind(self, geometry: Geometry) -> int:
        """How far behind a query rows need it."""
        return _reach(self.band_rows, geometry)[0]

    def bound(self, geometry: Geometry) -> bool:
        """Whether the window hides keys that the band would reach."""
        return geometry.left is not None and any(s.band is not None and s.band[1] > geometry.left for s in self.bands)

    def reach_of_heads(self, geometry: Geometry) -> tuple[int, ...] | None:
        """How far the band goes behind a query of each head, -1: nowhere; None: as far in all of them."""
        if not any(s in geometry.heads for s in self.bands):
            return None
        reach = [-1] * geometry.query_heads
        for s in self.bands:
            behind, _ = _reach((s,), geometry)
            for head in geometry.heads.get(s, range(geometry.query_heads)):
                reach[head] = max(reach[head], behind)
        return tuple(reach)


class GradientPlan(NamedTuple):
    """Which statistics that carry gradients have a weight in which list of the backward kernels."""

    far_rows: tuple[RowStatistic, ...]
    near_rows: tuple[RowStatistic, ...]  # those with a band: looked at near the diagonal alone
    entropy: bool
    far_columns: tuple[ColumnStatistic, ...]
    near_columns: tuple[ColumnStatistic, ...]

    @staticmethod
    @functools.lru_cache(maxsize=256)
    def of(statistics: tuple[Statistic, ...]) -> GradientPlan:
        rows = [s for s in statistics if isinstance(s, RowStatistic)]
        columns = [s for s in statistics if isinstance(s, ColumnStatistic)]
        return GradientPlan(
            far_rows=tuple(s for s in rows if s.band is None),
            near_rows=tuple(s for s in rows if s.band is not None),
            entropy=any(isinstance(s, Entropy) for s in statistics),
            far_columns=tuple(s for s in columns if s.band is None),
            near_columns=tuple(s for s in columns if s.band is not None),
        )

    @property
    def weighs(self) -> bool:
        """Whether there is anything to do for a tile."""
        return self.entropy or bool(self.rows or self.columns)

    @property
    def rows(self) -> tuple[RowStatistic, ...]:
        """In the kernels' order."""
        return (*self.far_rows, *self.near_rows)

    @property
    def columns(self) -> tuple[ColumnStatistic, ...]:
        return (*self.far_columns, *self.near_columns)

    def reach(self, geometry: Geometry) -> tuple[int, int]:
        """How far weights with a band go behind and ahead of a query."""
        return _reach((*self.near_rows, *self.near_columns), geometry)


def _reach(statistics: tuple[DistanceWeighted, ...], geometry: Geometry) -> tuple[int, int]:
    bands = [s.band for s in statistics if s.band]
    behind, ahead = max((hi for _, hi in bands), default=0), max((-lo for lo, _ in bands), default=0)
    behind = behind if geometry.left is None else min(behind, geometry.left)
    return max(0, behind), max(0, ahead if geometry.right is None else min(ahead, geometry.right))
