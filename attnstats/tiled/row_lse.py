"""The lse as the statistics need it: of large scores with more digits than float32 has, NaN where a row has no softmax.

Half a unit in the last place of an lse of 1,000 is 3e-5. All of a row's A = exp(score - lse) would be off by that much,
in one direction, where a softmax that divides by its own sum has no such error. So rows whose lse is large are summed
once more, over the scores that the statistics are computed from, and their lse is kept in float64.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attnstats.core.geometry import Geometry
from attnstats.statistics import RowStatistic, Statistic
from attnstats.tiled import native, sweep


@dataclass(frozen=True)
class RowMass(RowStatistic):
    """The sum of a row of A."""

    uses_distance: ClassVar[bool] = False

    def weight(self, distance: Tensor) -> Tensor:
        return torch.ones_like(distance)


def refined(query: Tensor, key: Tensor, lse: Tensor, geometry: Geometry, statistics: Iterable[Statistic]) -> Tensor:
    """The lse (B, Hq, Tq) of this call's own attention as the statistics need it.

    float32 as it came where no row needs more digits; else float64, and these rows sum to 1 with their sink. NaN for
    rows with a NaN or inf among their scores.
    """
    statistics = [s for s in statistics if s.from_lse and s.method != "lse"]
    if not statistics or lse.numel() == 0:
        return lse
    low, high = torch.aminmax(lse)
    if low >= -sweep.LARGE and high <= sweep.LARGE:
        return lse
    lse = geometry.nan_without_softmax(lse)
    if lse.dtype == torch.float64:
        return lse
    is_large = (lse.abs() > sweep.LARGE) & lse.isfinite()
    heads = _heads_of(statistics, geometry) & set(is_large.any(2).any(0).nonzero()[:, 0].tolist())
    if not heads:
        return lse
    exact = lse.double()
    index = sorted(heads)
    if geometry.packing is None:
        of_key = [head // geometry.group for head in index]
        exact[:, index] += _excess(query[:, index], key[:, of_key], lse[:, index], geometry.subset(tuple(index)))
    else:
        for queries, keys, alone in geometry.sequences():
            exact[:, :, queries] = refined(query[:, :, queries], key[:, :, keys], lse[:, :, queries], alone, statistics)
    return torch.where(is_large, exact, lse)


def _heads_of(statistics: Iterable[Statistic], geometry: Geometry) -> set[int]:
    return {head for s in statistics for head in geometry.heads.get(s, range(geometry.query_heads))}


def _excess(query: Tensor, key: Tensor, lse: Tensor, geometry: Geometry) -> Tensor:
    """The exact lse less the given one, float64."""
    evaluate = native.evaluate if native.takes(geometry) else sweep.evaluate
    mass = evaluate(query, key, lse, geometry, (RowMass(),))[RowMass()].double()
    if geometry.sinks is not None:
        mass += (geometry.sinks.double()[:, None] - lse).exp()
    return mass.log()
