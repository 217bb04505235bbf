"""Statistics of attention inside or beside a flash-style pass, without ever holding the T x T map."""

from typing import TYPE_CHECKING, Any

from attnstats import distributed, presets, reference
from attnstats.core.geometry import AttentionResult
from attnstats.functional import attention, explain, statistics_from_lse, varlen_attention
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
from attnstats.transformers.attach import attach, detach
from attnstats.transformers.capture import capture

if TYPE_CHECKING:
    from attnstats import nn
    from attnstats.sdpa import patch_sdpa

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


def __getattr__(name: str) -> Any:
    """What `import attnstats` can do without until it is asked for."""
    if name == "nn":
        import attnstats.nn

        return attnstats.nn
    if name == "patch_sdpa":
        from attnstats.sdpa import patch_sdpa

        return patch_sdpa
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
