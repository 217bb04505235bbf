"""The statistics that can colour a token: WAAD, FAI, entropy, delta and gamma, each with unit, scale and explanation.

The page, the terminal and the figures share this table, so that all of them show the same number in the same unit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from attnstats.errors import InputError
from attnstats.report.marks import coupled_gamma
from attnstats.report.scale import Domain
from attnstats.study.analysis import Analysis, Settings


@dataclass(frozen=True)
class Column:
    """A statistic of the response's tokens with the way it is shown.

    Attributes:
        key: its name on the command line and in the page's data.
        unit: unit of the values.
        digits: number of decimals.
        about: explanation in a sentence or two; {window} and {horizon} stand for settings.
        read: (R,) float64 in the unit, NaN where it has no value.
        is_log: True for a logarithmic scale.
        low: start of a linear scale; None: the median, so that half of the tokens stay pale.
    """

    key: str
    title: str
    unit: str
    digits: int
    about: str
    read: Callable[[Analysis], Tensor]
    is_log: bool = False
    low: float | None = 0.0

    def domain(self, values: Tensor) -> Domain:
        return Domain.of(values, is_log=self.is_log, low=self.low)

    def explained(self, settings: Settings) -> str:
        return self.about.format(window=settings.window, horizon=horizon(settings))


def _fai(analysis: Analysis) -> Tensor:
    percent = analysis.fai.double() * 100
    return percent.masked_fill(~analysis.fai_valid, torch.nan)[analysis.response]


COLUMNS = (
    Column(
        "waad", "WAAD", "tokens", 2,
        "How far the token looks back: the mean distance of its attention, capped at {window} tokens, over the local "
        "heads. It is high where a new chunk begins (preplan), and falls within the chunk.",
        lambda a: a.waad[a.response].double(), low=None,
    ),
    Column(
        "fai", "FAI", "% of attention", 3,
        "How much later tokens look at this one: the mean attention it gets from {horizon} further on, over the global "
        "heads. It is high for the tokens that the rest of the response relies on (anchors). The scale is logarithmic.",
        _fai, is_log=True,
    ),
    Column(
        "entropy", "Entropy", "nats", 2,
        "How uncertain the model was: the entropy of the distribution that the token was drawn from.",
        lambda a: a.entropy[a.response].double(),
    ),
    Column(
        "delta", "Delta", "tokens", 2,
        "How much WAAD changes from this token to the next (Eq. 14): high where a chunk begins or ends.",
        lambda a: a.delta.double(), low=None,
    ),
    Column(
        "gamma", "Gamma", "times", 2,
        "The factor by which the coupled rhythm multiplies the token's advantage in training (Eq. 19): above 1 for "
        "anchors and for the tokens that lead into them.",
        coupled_gamma, low=1.0,
    ),
)  # fmt: skip


def find(name: str, option: str = "--color-by") -> Column:
    """The column with a name that a user typed. Raises InputError."""
    for column in COLUMNS:
        if column.key == name.lower():
            return column
    raise InputError(f"{option} {name}: no such column; there are {', '.join(column.key for column in COLUMNS)}")


def horizon(settings: Settings) -> str:
    """FAI's horizon in words."""
    if settings.fai_hi is None:
        return f"{settings.fai_lo} tokens or more"
    return f"{settings.fai_lo} to {settings.fai_hi} tokens"
