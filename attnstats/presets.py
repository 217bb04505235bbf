"""The settings of the paper, one frozen record per version of it: arXiv 2510.13554 v2 (default) and v1.

A preset is what `attnstats analyze --preset` starts from; every field can be replaced by an option. It holds
numbers only: statistics.py defines what they mean, heads.py and rhythm.py apply them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Preset:
    """Settings of one version of the paper.

    Attributes:
        name: how the command line calls it.
        window: W of WAAD (Def. 4.1).
        fai_lo, fai_hi: horizon of FAI in tokens (Def. 4.2).
        layers: which layers are sampled; "middle-third" is five, evenly spaced (Sec. 4.1).
        head_share: share of the heads called local, and of those called global (Sec. 4.1).
        sign: advantages of which sign the credit weights scale (Sec. 5.2).
    """

    name: str
    window: int = 10
    fai_lo: int = 10
    fai_hi: int = 100
    layers: str = "middle-third"
    head_share: float = 0.30
    sign: Literal["both", "positive", "negative"] = "both"


paper_v2 = Preset("paper_v2")
paper_v1 = Preset("paper_v1", fai_hi=50, sign="positive")

PRESETS = {preset.name: preset for preset in (paper_v2, paper_v1)}
