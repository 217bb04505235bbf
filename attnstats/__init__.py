"""Statistics of attention inside or beside a flash-style pass, without ever holding the T x T map."""

from attnstats import distributed, nn, presets, reference
from attnstats.attention import attention, explain, statistics_from_lse, varlen_attention
from attnstats.capture import capture
from attnstats.geometry import AttentionResult
from attnstats.hooks import attach, detach
from attnstats.patch import patch_sdpa
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
    "attach",
    "attention",
    "capture",
    "detach",
    "distributed",
    "explain",
    "nn",
    "patch_sdpa",
    "presets",
    "reference",
    "statistics_from_lse",
    "varlen_attention",
]
