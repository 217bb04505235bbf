"""Statistics of attention inside or beside a flash-style pass, without ever holding the T x T map."""

from attnstats import reference
from attnstats.attention import attention, statistics_from_lse
from attnstats.geometry import AttentionResult
from attnstats.statistics import (
    FAI,
    LSE,
    WAAD,
    ColumnStatistic,
    Entropy,
    LocalMass,
    MaxLogit,
    MeanDistance,
    PooledMap,
    Received,
    RowStatistic,
    SinkMass,
    Statistic,
    Statistics,
)

__version__ = "0.1.0"

__all__ = [
    "FAI",
    "LSE",
    "WAAD",
    "AttentionResult",
    "ColumnStatistic",
    "Entropy",
    "LocalMass",
    "MaxLogit",
    "MeanDistance",
    "PooledMap",
    "Received",
    "RowStatistic",
    "SinkMass",
    "Statistic",
    "Statistics",
    "attention",
    "reference",
    "statistics_from_lse",
]
