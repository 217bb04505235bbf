"""Marks of a response: its preplan tokens, its anchors, and the tokens that lead into locally dominated anchors.

Preplan tokens are those of highest WAAD, anchors those of highest FAI (Analysis.preplan, Analysis.anchors). A locally
dominated anchor (Eq. 18) has an intro token up to three tokens before it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from attnstats import credit, rhythm
from attnstats.presets import paper_v2
from attnstats.study.analysis import Analysis

SHARE = 0.10  # of the response's tokens that are marked by default


@dataclass(frozen=True)
class Marks:
    """Marks of each of the R tokens of a response.

    Attributes:
        preplan: rank by WAAD, 0 the highest.
        anchor: rank by FAI, 0 the highest; None where FAI has no value.
        intro: the token that leads into a locally dominated anchor (of the highest 40 % by FAI); None for other tokens.
    """

    preplan: list[int | None]
    anchor: list[int | None]
    intro: list[int | None]

    def among(self, ranks: list[int | None], share: float = SHARE) -> list[int]:
        """The tokens among the `ceil(share * R)` highest."""
        count = math.ceil(share * len(ranks))
        return [i for i, rank in enumerate(ranks) if rank is not None and rank < count]


def marks(analysis: Analysis) -> Marks:
    """The marks of a response."""
    waad, fai, valid, mask = _curves(analysis)
    sets = credit.coupled_sets(waad[None], fai[None], mask[None], valid=valid[None], q=paper_v2.q)
    return Marks(
        preplan=_ranks(waad, mask),
        anchor=_ranks(fai, valid),
        intro=[t - lead if lead else None for t, lead in enumerate(sets.lead[0].tolist())],
    )


def coupled_gamma(analysis: Analysis) -> Tensor:
    """(R,) float64, the token weights of the coupled rhythm (Eq. 19) with the paper's settings."""
    waad, fai, valid, mask = (curve[None] for curve in _curves(analysis))
    return credit.coupled_rhythm(waad.double(), fai.double(), mask, valid=valid, **paper_v2.coupled)[0]


def _curves(analysis: Analysis) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """WAAD, FAI, its validity and a mask of ones over the response."""
    waad, fai, valid = (x[analysis.response] for x in (analysis.waad, analysis.fai, analysis.fai_valid))
    return waad, fai, valid, torch.ones_like(valid)


def _ranks(values: Tensor, valid: Tensor) -> list[int | None]:
    ranks: list[int | None] = [None] * len(values)
    for rank, i in enumerate(rhythm.top(values, len(values), valid)):
        ranks[i] = rank
    return ranks
