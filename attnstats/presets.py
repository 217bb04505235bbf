"""The settings of the paper, a frozen record for each version: arXiv 2510.13554 v2 (default) and v1.

`attnstats analyze --preset` starts from one; every field can be replaced by an option.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Preset:
    """Settings of one version of the paper.

    Attributes:
        name: its name on the command line.
        window: W of WAAD (Def. 4.1).
        fai_lo, fai_hi: horizon of FAI in tokens (Def. 4.2).
        layers: the layers that are read; "middle-third" is five, evenly spaced (Sec. 4.1).
        head_share: share of the heads that are local, and share that are global (Sec. 4.1).
        q: share of a response's tokens that a credit amplifies (Table 16).
        amp: weight of an amplified token (Eq. 15, 17, 19).
        alpha: share of a dominated anchor's bonus that goes to its intro token (Eq. 19); the paper gives no value.
        k: number of tokens before an anchor that can dominate it (Eq. 18); the paper says 1, 2 or 3.
        sign: sign of the advantages that are scaled (Table 7a).

    Example:
        >>> import torch
        >>> from attnstats import credit
        >>> waad, fai, mask = torch.rand(2, 50), torch.rand(2, 50), torch.ones(2, 50, dtype=torch.bool)
        >>> gamma = credit.coupled_rhythm(waad, fai, mask, **paper_v2.coupled)
        >>> gamma = credit.local_chunk(waad, mask, **paper_v2.credit)
        >>> credit.shape_advantages(torch.tensor([1.0, -1.0]), gamma, paper_v2.sign).shape
        torch.Size([2, 50])
    """

    name: str
    window: int = 10
    fai_lo: int = 10
    fai_hi: int = 100
    layers: str = "middle-third"
    head_share: float = 0.30
    q: float = 0.4
    amp: float = 1.5
    alpha: float = 0.5
    k: int = 3
    sign: Literal["both", "positive", "negative"] = "both"

    @property
    def credit(self) -> dict[str, Any]:
        """The settings of every credit."""
        return {"q": self.q, "amp": self.amp}

    @property
    def coupled(self) -> dict[str, Any]:
        """The settings of `credit.coupled_rhythm`."""
        return {**self.credit, "alpha": self.alpha, "k": self.k}


paper_v2 = Preset("paper_v2")
paper_v1 = Preset("paper_v1", fai_hi=50, sign="positive")

PRESETS = {preset.name: preset for preset in (paper_v2, paper_v1)}
