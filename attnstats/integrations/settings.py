"""The settings of a token credit, the curves that it needs, and gamma from both, independent of any framework.

`RhythmCredit` chooses among the formulas of credit.py and says which statistics of which heads and layers a trainer has
to read; how it reads them is up to the module of each framework.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor

from attnstats import FAI, WAAD, credit, presets
from attnstats.statistics import Statistic
from attnstats.transformers.selection import Layers

CreditKind = Literal["coupled", "local", "global", "random", "entropy", "entropy-selection"]
KINDS: tuple[CreditKind, ...] = get_args(CreditKind)
WITH_WAAD, WITH_FAI = ("coupled", "local"), ("coupled", "global")
WITH_ENTROPY = ("entropy", "entropy-selection")


class Signals(NamedTuple):
    """The curves that a credit needs, (B, T) over the completion's tokens each; None: not needed.

    `fai_valid` is bool, True where FAI has a value. Entropy is in nats, of the distribution, temperature included, that
    the token was drawn from.
    """

    waad: Tensor | None = None
    fai: Tensor | None = None
    fai_valid: Tensor | None = None
    entropy: Tensor | None = None


@dataclass(frozen=True)
class RhythmCredit:
    """The choice of tokens that get more of the advantage, and of what it is read from; the paper's v2 by default.

    Attributes:
        kind: "coupled", "local" and "global" are the paper's credits by attention (Eq. 15, 17, 19); "random",
            "entropy" and "entropy-selection" are its baselines.
        q: share of a response's tokens that is amplified; None: 0.4. For "entropy-selection" the share that keeps its
            gradient; None: 0.2.
        amp: weight of an amplified token, at least 1.
        alpha: share of a dominated anchor's bonus that its intro token gets ("coupled").
        k: number of tokens before an anchor that can dominate it ("coupled").
        tau_waad, tau_delta: thresholds of "coupled"; None: each response's median.
        sign: sign of the advantages that are scaled, "both", "positive" or "negative".
        keep_mean: divide each response's weights by their mean, so that the credit only shifts weight between tokens.
        window: W of WAAD. lo, hi: the horizon of FAI, in tokens; hi None: to the end of the response.
        layers: the layers that are read, as for `attnstats.capture`.
        head_share: share of their heads that are local, and share that are global; None: all are both (Table 14).
        reprofile_every: number of optimizer steps after which the heads are classified anew.
    """

    kind: CreditKind = "coupled"
    q: float | None = None
    amp: float = 1.5
    alpha: float = 0.5
    k: int = 3
    tau_waad: float | None = None
    tau_delta: float | None = None
    sign: credit.Sign = "both"
    keep_mean: bool = False
    window: int = 10
    lo: int = 10
    hi: int | None = 100
    layers: Layers = "middle-third"
    head_share: float | None = 0.30
    reprofile_every: int = 50

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(map(repr, KINDS))}; got {self.kind!r}")
        if self.head_share is not None and not 0 < self.head_share <= 0.5:
            raise ValueError(f"head_share must be in (0, 0.5], or None for all heads; got {self.head_share!r}")
        every = self.reprofile_every
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise ValueError(f"reprofile_every must be a number of optimizer steps, 1 or more; got {every!r}")
        mask = torch.ones(1, 3, dtype=torch.bool, device="cpu")
        zeros = torch.zeros(1, 3, dtype=torch.float32, device="cpu")
        self.gamma(Signals(zeros, zeros, mask, zeros), mask)  # credit.py checks the other numbers
        credit.shape_advantages(
            torch.ones(1, dtype=torch.float32, device="cpu"),
            torch.ones(1, 3, dtype=torch.float32, device="cpu"),
            sign=self.sign,
        )
        self.statistics  # noqa: B018

    @classmethod
    def from_preset(cls, preset: presets.Preset, **changes: Any) -> RhythmCredit:
        """The settings of a version of the paper, with some changed.

        Example:
            >>> from attnstats import presets
            >>> RhythmCredit.from_preset(presets.paper_v1, kind="global").hi
            50
        """
        own = {field.name for field in fields(cls)}
        of_preset = {field.name: getattr(preset, field.name) for field in fields(preset) if field.name in own}
        if changes.get("kind") == "entropy-selection":
            del of_preset["q"]  # its default is that of Wang et al., not the paper's
        return cls(**of_preset | {"lo": preset.fai_lo, "hi": preset.fai_hi} | changes)

    @property
    def statistics(self) -> dict[str, Statistic]:
        """The statistics of the attention that the credit needs: "waad", "fai", both or none."""
        statistics: dict[str, Statistic] = {}
        if self.kind in WITH_WAAD:
            statistics["waad"] = WAAD(self.window)
        if self.kind in WITH_FAI:
            statistics["fai"] = FAI(self.lo, self.hi)
        return statistics

    @property
    def reads(self) -> bool:
        """True if the credit needs a pass of the policy."""
        return bool(self.statistics) or self.kind in WITH_ENTROPY

    def gamma(self, signals: Signals, mask: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The weights (B, T) of the tokens of `mask`, (B, T) bool; 1 outside it."""
        waad, fai, valid, entropy = (cast(Tensor, signal) for signal in signals)  # the credit's own are there
        q = (0.2 if self.kind == "entropy-selection" else 0.4) if self.q is None else self.q
        shared: dict[str, Any] = {"q": q, "amp": self.amp, "keep_mean": self.keep_mean}
        if self.kind == "random":
            return credit.random_tokens(mask, generator=generator, **shared)
        if self.kind == "entropy":
            return credit.high_entropy(entropy, mask, **shared)
        if self.kind == "entropy-selection":
            return credit.high_entropy_selection(entropy, mask, q=q)
        if self.kind == "local":
            return credit.local_chunk(waad, mask, **shared)
        if self.kind == "global":
            return credit.global_anchor(fai, mask, valid=valid, **shared)
        shared |= {"alpha": self.alpha, "k": self.k, "tau_waad": self.tau_waad, "tau_delta": self.tau_delta}
        return credit.coupled_rhythm(waad, fai, mask, valid=valid, **shared)


def logged(signals: Signals, gamma: Tensor, mask: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """The values to log, by name, each with the mask of the tokens that its mean is over."""
    values = {"amplified": ((gamma > 1).float(), mask), "gamma": (gamma, mask)}
    if signals.waad is not None:
        values["waad"] = signals.waad, mask
    if signals.fai is not None and signals.fai_valid is not None:
        values["fai"] = signals.fai, mask & signals.fai_valid
    return values
