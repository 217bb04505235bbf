"""Peaks of the curves of responses, and the three couplings between WAAD, FAI and entropy peaks (Sec. 4).

Pure functions on the curves of single responses, which are means over heads (heads.class_mean): differences and peaks
are taken after averaging, never before. A coupling is over all responses of a corpus; chance.py has its tests.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from attnstats.chance import Chance, Coupling, CouplingSum, Marked
from attnstats.credit import coupled_sets
from attnstats.curves import delta, top_share

CURVES = ("waad", "fai", "receiver_fai", "entropy")


def top(values: Tensor, count: int, valid: Tensor | None = None) -> list[int]:
    """Indices of the `count` largest valid values of a 1-D tensor, largest first, ties to the lower index."""
    order = values.argsort(stable=True, descending=True)
    if valid is not None:
        order = order[valid[order]]
    return order[:count].tolist()


@dataclass(frozen=True)
class PeakRule:
    """Conditions that a token must meet, all of them, to be a peak of a curve.

    The default is `scipy.signal.find_peaks` without a threshold: strict local maxima. The peak of a plateau is its
    middle token, the left one of two. The ends of a curve, and tokens beside one that is not valid, are never maxima.

    Attributes:
        maxima: only local maxima; False: all tokens at or above the quantile.
        quantile: only values at or above this quantile of the valid ones, in [0, 1); 0: all.
        prominence: only maxima of at least this prominence, in standard deviations of the valid values; 0: all.
    """

    maxima: bool = True
    quantile: float = 0.0
    prominence: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.quantile < 1:
            raise ValueError(f"quantile must be in [0, 1), got {self.quantile}")
        if not 0 <= self.prominence < float("inf"):
            raise ValueError(f"prominence must be at least 0, got {self.prominence}")
        if not self.maxima and (self.prominence or not self.quantile):
            raise ValueError("maxima=False needs a quantile above 0, and no prominence, which only maxima have")

    def __str__(self) -> str:
        parts = ["local maxima" if self.maxima else "tokens"]
        if self.quantile:
            parts.append(f"at or above quantile {self.quantile:g}")
        if self.prominence:
            parts.append(f"prominence {self.prominence:g} sd")
        return ", ".join(parts)


def peaks(curve: Tensor, valid: Tensor | None = None, rule: PeakRule = PeakRule()) -> Tensor:
    """The peaks of a curve, (T,) bool for a curve (T,).

    Args:
        curve: the curve of one response.
        valid: (T,) bool, where the curve has a value; None: everywhere. NaN is never valid.

    Example:
        >>> import torch
        >>> peaks(torch.tensor([5.0, 1.0, 3.0, 3.0, 0.0, 2.0, 1.0])).nonzero().flatten().tolist()
        [2, 5]
    """
    from scipy.signal import find_peaks

    values = curve.detach().double().cpu().numpy()
    has_value = ~np.isnan(values)
    if valid is not None:
        has_value &= valid.cpu().numpy()
    marks = has_value
    if rule.maxima:
        # Tokens without a value become higher than all others: no maximum is beside them.
        walled = np.where(has_value, values, np.inf)
        prominence = rule.prominence * values[has_value].std() if rule.prominence and has_value.any() else None
        marks = np.zeros_like(has_value)
        marks[find_peaks(walled, prominence=prominence)[0]] = True
        marks &= has_value
    if rule.quantile and has_value.any():
        marks = marks & (values >= np.quantile(values[has_value], rule.quantile))
    return torch.from_numpy(marks).to(curve.device)


@dataclass(frozen=True, eq=False)
class Curves:
    """The curves of one response of T tokens, each (T,).

    Attributes:
        waad: mean over the local heads. fai: mean over the global heads. receiver_fai: mean over the receiver heads.
        entropy: entropy of the distribution that each token was drawn from, in nats; NaN where unknown.
        fai_valid, receiver_valid: (T,) bool, where FAI has queries; None: everywhere.
    """

    waad: Tensor
    fai: Tensor
    receiver_fai: Tensor
    entropy: Tensor
    fai_valid: Tensor | None = None
    receiver_valid: Tensor | None = None

    def valid(self, name: str) -> Tensor:
        """(T,) bool, True where the curve of this name has a value."""
        valid = {"fai": self.fai_valid, "receiver_fai": self.receiver_valid}.get(name)
        finite: Tensor = getattr(self, name).isfinite()
        return finite if valid is None else finite & valid


@dataclass(frozen=True, eq=False)
class Sets:
    """The token sets of one response that credit amplifies, (T,) bool each (Sec. 5.2).

    Attributes:
        chunk: Tloc, the top share of delta: chunk boundaries, where WAAD changes most to the next token (Eq. 14).
        anchor: Tglob, the top share of FAI (Eq. 16).
        dominated: anchors with a low WAAD shortly after a large change of it (Eq. 18).
        intro: the tokens that lead to them, one per dominated anchor.
    """

    chunk: Tensor
    anchor: Tensor
    dominated: Tensor
    intro: Tensor


def sets(curves: Curves, q: float = 0.4, k: int = 3) -> Sets:
    """The sets of a response, as credit.py defines them.

    Args:
        q: share of the tokens that are chunk boundaries, and that are anchors.
        k: the number of tokens before an anchor that can dominate it.

    Example:
        >>> import torch
        >>> waad = torch.tensor([4.0, 9.0, 2.0, 2.0, 2.0])
        >>> fai = torch.tensor([0.1, 0.2, 0.9, 0.1, 0.1])
        >>> found = sets(Curves(waad, fai, fai, waad), q=0.2)
        >>> [found.chunk.nonzero().item(), found.dominated.nonzero().item(), found.intro.nonzero().item()]
        [1, 2, 1]
    """
    waad, fai, valid = curves.waad[None], curves.fai[None], curves.valid("fai")[None]
    mask = torch.ones_like(valid)
    coupled = coupled_sets(waad, fai, mask, valid=valid, q=q, k=k)
    chunk = top_share(delta(waad), mask, q)
    return Sets(chunk[0], coupled.anchor[0], coupled.dominated[0], coupled.intro[0])


class CorpusRhythm:
    """The couplings and peak densities of a corpus whose responses come one at a time, in memory that stays the same.

    Args:
        reach: how far `offsets` looks, in tokens; None: there are no offsets.
    """

    def __init__(self, rule: PeakRule = PeakRule(), chance: Chance = Chance(), reach: int | None = None):
        self.responses = 0
        self._rule, self._reach = rule, reach
        self._entropy = CouplingSum("entropy at WAAD peaks", chance)
        self._same = CouplingSum("receiver FAI peaks that are global FAI peaks", chance)
        self._follow = CouplingSum("FAI peaks at or just after a WAAD peak", chance, shuffled=True)
        self._offsets = {
            (of, near, offset): CouplingSum(f"{of} peaks with {near} at {offset:+d}", chance, shuffled=True)
            for of, near in itertools.permutations(CURVES, 2)
            for offset in (range(-reach, reach + 1) if reach is not None else ())
        }
        self._tokens, self._peaks = dict.fromkeys(CURVES, 0), dict.fromkeys(CURVES, 0)

    def add(self, curves: Curves) -> None:
        """Count one more response."""
        self.responses += 1
        valid = {name: curves.valid(name) for name in CURVES}
        marks = {name: peaks(getattr(curves, name), valid[name], self._rule) for name in CURVES}
        for name in CURVES:
            self._tokens[name] += int(valid[name].sum())
            self._peaks[name] += int(marks[name].sum())
        self._entropy.add(Marked.of(marks["waad"], curves.entropy, valid["entropy"]))
        self._same.add(Marked.of(marks["receiver_fai"], marks["fai"], valid["fai"] & valid["receiver_fai"]))
        self._follow.add(Marked.of(marks["fai"], marks["waad"] | _moved(marks["waad"], -1), valid["fai"]))
        for (of, near, offset), total in self._offsets.items():
            total.add(Marked.of(marks[of], _moved(marks[near], offset), valid[of]))

    def couplings(self) -> tuple[Coupling, Coupling, Coupling]:
        """The paper's three couplings, as of the function `couplings`. Raises ValueError without responses."""
        if not self.responses:
            raise ValueError("curves is empty: couplings are over one response or more")
        return self._entropy.result(), self._same.result(), self._follow.result()

    def densities(self) -> dict[str, float]:
        """The share of each curve's valid tokens that are peaks; NaN where no token is valid."""
        return {name: self._peaks[name] / tokens if tokens else math.nan for name, tokens in self._tokens.items()}

    def offsets(self) -> dict[tuple[str, str, int], Coupling]:
        """The share of one curve's peaks with a peak of another at an offset of -reach..reach tokens (Table 20).

        The key (of, near, +1) has the share of the peaks of `of` with a peak of `near` at the next token. Random is the
        exact mean over all ways of placing the peaks of `of`.
        """
        return {key: total.result() for key, total in self._offsets.items()}


def corpus_rhythm(
    curves: Iterable[Curves],
    rule: PeakRule = PeakRule(),
    chance: Chance = Chance(),
    reach: int | None = None,
) -> CorpusRhythm:
    """The CorpusRhythm of these responses; each is taken once."""
    corpus = CorpusRhythm(rule, chance, reach)
    for of_response in curves:
        corpus.add(of_response)
    return corpus


def couplings(
    curves: Iterable[Curves],
    rule: PeakRule = PeakRule(),
    chance: Chance = Chance(),
) -> tuple[Coupling, Coupling, Coupling]:
    """The paper's three couplings over the responses of a corpus (Table 2); each response is taken once.

    1. Mean token entropy at WAAD peaks, against the mean over all response tokens.
    2. Share of receiver FAI peaks that are global FAI peaks, against the share of global FAI peaks among all tokens.
    3. Share of FAI peaks at a WAAD peak or right after one, against the same share with the FAI peaks shuffled.

    Means are over the tokens of all responses. Tokens without a value (FAI's last `lo`) are left out. The random value
    of 3 is the exact mean over all ways of placing each response's peaks.

    Raises:
        ValueError: no responses.
    """
    return corpus_rhythm(curves, rule, chance).couplings()


def _moved(marks: Tensor, offset: int) -> Tensor:
    """`marks[t + offset]` at t; False beyond the ends."""
    moved = torch.zeros_like(marks)
    length = len(marks)
    if abs(offset) < length:
        moved[max(0, -offset) : length - max(0, offset)] = marks[max(0, offset) : length - max(0, -offset)]
    return moved
