"""What a token can be coloured by: WAAD, FAI, entropy, delta and gamma, each with its unit, scale and one sentence.

One table for the page, the terminal and the figures, so that all of them show the same number in the same unit.
`find` is the border for a name that a person typed.
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
    """A statistic of the response's tokens as it is shown.

    Attributes:
        key: its name on the command line and in the page's data.
        unit: of the values.
        digits: decimals that are shown.
        about: what it says, in a sentence; {window} and {horizon} stand for settings.
        read: (R,) float64 in the unit, NaN where it has no value.
        is_log: whether its scale is logarithmic.
        low: where a linear scale starts; None: where half of the tokens stay pale.
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
        "heads. It jumps where a new chunk of thought begins (preplan), and decays inside it.",
        lambda a: a.waad[a.response].double(), low=None,
    ),
    Column(
        "fai", "FAI", "% of attention", 3,
        "How much later tokens look at this one: the mean attention it gets from {horizon} further on, over the global "
        "heads. What is high is what the rest leans on (anchors). The scale is logarithmic.",
        _fai, is_log=True,
    ),
    Column(
        "entropy", "Entropy", "nats", 2,
        "How undecided the model was: the entropy of the distribution that the token was drawn from.",
        lambda a: a.entropy[a.response].double(),
    ),
    Column(
        "delta", "Delta", "tokens", 2,
        "How much WAAD changes from this token to the next (Eq. 14): high where a chunk begins or ends.",
        lambda a: a.delta.double(), low=None,
    ),
    Column(
        "gamma", "Gamma", "times", 2,
        "What the coupled rhythm multiplies the token's advantage by in training (Eq. 19): more than 1 for anchors and "
        "for the tokens that lead into them.",
        coupled_gamma, low=1.0,
    ),
)  # fmt: skip


def find(name: str, option: str = "--color-by") -> Column:
    """The column of that name. Raises InputError, which names those there are."""
    for column in COLUMNS:
        if column.key == name.lower():
            return column
    raise InputError(f"{option} {name}: no such column; there are {', '.join(column.key for column in COLUMNS)}")


def horizon(settings: Settings) -> str:
    """FAI's horizon in words."""
    if settings.fai_hi is None:
        return f"{settings.fai_lo} tokens or more"
    return f"{settings.fai_lo} to {settings.fai_hi} tokens"
