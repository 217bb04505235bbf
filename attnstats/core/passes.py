"""The record of one pass over the inputs: a backend plans it, its execution follows it and `explain` shows it."""

from __future__ import annotations

from typing import NamedTuple

from attnstats.statistics import Statistic


class Pass(NamedTuple):
    """One loop or kernel over the inputs.

    Attributes:
        run: its name in the backend's tables.
        statistics: those that it computes.
        heads: the query heads that it computes them of; None: all.
        attends: it gives output and lse too.
        last_queries: only so many of the last counted queries of each sequence count; None: all.
    """

    run: str
    statistics: tuple[Statistic, ...] = ()
    heads: tuple[int, ...] | None = None
    attends: bool = False
    last_queries: int | None = None
