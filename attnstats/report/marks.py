"""Which tokens stand out, and which anchor was led in by which token: what the page marks and joins by arcs.

Preplan tokens are those of highest WAAD, anchors those of highest FAI (Analysis.preplan, Analysis.anchors); an anchor
that is locally dominated (Eq. 18) has an intro token up to three tokens before it. Used by the page, the terminal and
the figures.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnstats import rhythm
from attnstats.analyze import Analysis

SHARE = 0.10  # of the response's tokens that are marked; credit takes 40 %, which is too many to look at
REACH = 3  # k of Eq. 18


@dataclass(frozen=True)
class Marks:
    """Per token of the response, R of them.

    Attributes:
        preplan: rank by WAAD, 0 the highest.
        anchor: rank by FAI, 0 the highest; None where FAI has no value.
        intro: the token that leads in where this one, were it an anchor, is locally dominated; else None.
    """

    preplan: list[int | None]
    anchor: list[int | None]
    intro: list[int | None]

    def among(self, ranks: list[int | None], share: float = SHARE) -> list[int]:
        """The tokens among the `ceil(share * R)` highest."""
        count = -int(-share * len(ranks) // 1)
        return [i for i, rank in enumerate(ranks) if rank is not None and rank < count]


def marks(analysis: Analysis) -> Marks:
    """The marks of a response."""
    waad, fai = analysis.waad[analysis.response], analysis.fai[analysis.response]
    return Marks(
        preplan=_ranks(waad, torch.ones_like(waad, dtype=torch.bool)),
        anchor=_ranks(fai, analysis.fai_valid[analysis.response]),
        intro=_intros(waad.tolist(), analysis.delta.tolist()),
    )


def _ranks(values: Tensor, valid: Tensor) -> list[int | None]:
    ranks: list[int | None] = [None] * len(values)
    for rank, i in enumerate(rhythm.top(values, len(values), valid)):
        ranks[i] = rank
    return ranks


def _intros(waad: list[float], delta: list[float]) -> list[int | None]:
    """Eq. 18 with lower medians as thresholds; the last token has no delta and is in no median of it."""
    low, jump = _lower_median(waad), _lower_median(delta[:-1])
    intros: list[int | None] = []
    for t, value in enumerate(waad):
        window = range(max(0, t - REACH), t)
        nearest = max(window, key=lambda i: (delta[i], i), default=None)
        intros.append(nearest if nearest is not None and value <= low and delta[nearest] >= jump else None)
    return intros


def _lower_median(values: list[float]) -> float:
    return sorted(values)[(len(values) - 1) // 2] if values else float("inf")


def coupled_gamma(analysis: Analysis, share: float = 0.4, amp: float = 1.5, alpha: float = 0.5) -> Tensor:
    """(R,) float64, the token weights of the coupled rhythm (Eq. 19)."""
    found = marks(analysis)
    gamma = torch.ones(len(found.anchor), dtype=torch.float64)
    anchors = found.among(found.anchor, share)
    for t in anchors:
        gamma[t] += (amp - 1) * (1 if found.intro[t] is None else 1 - alpha)
    for t in {found.intro[t] for t in anchors} - {None}:
        gamma[t] += alpha * (amp - 1)
    return gamma
