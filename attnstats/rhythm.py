"""What is read off the curves of responses: changes of WAAD, peaks, and the three couplings between peaks (Sec. 4).

Pure functions on the curves of single responses, which come from heads.class_mean: differences and peaks are taken
after averaging over heads, never before. Couplings are over all responses of a corpus, with a permutation test and a
bootstrap, both seeded. Called by analyze.py and couplings.py.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

CURVES = ("waad", "fai", "receiver_fai", "entropy")
Null = Literal["shuffle", "shift"]


def delta(waad: Tensor) -> Tensor:
    """`|WAAD[t] - WAAD[t + 1]|` along the last axis of a response (Eq. 14); 0 for its last token.

    Example:
        >>> import torch
        >>> delta(torch.tensor([1.0, 4.0, 2.0]))
        tensor([3., 2., 0.])
    """
    return torch.nn.functional.pad(waad.diff().abs(), (0, 1))


def top(values: Tensor, count: int, valid: Tensor | None = None) -> list[int]:
    """Indices of the `count` largest of a 1-D tensor, largest first, ties to the lower index.

    Fewer where fewer are valid: a placeholder is never among them.
    """
    order = values.argsort(stable=True, descending=True)
    if valid is not None:
        order = order[valid[order]]
    return order[:count].tolist()


@dataclass(frozen=True)
class PeakRule:
    """Which tokens of a curve are its peaks; every condition must hold.

    The default is `scipy.signal.find_peaks` without a threshold: strict local maxima. Of equal neighbours that form a
    maximum the middle one is the peak, of two middle ones the left. The ends of a curve, and tokens beside one that is
    not valid, are never maxima.

    Attributes:
        maxima: only local maxima. Without it, and with a quantile, peaks are simply the highest tokens.
        quantile: only values at or above this quantile of the valid ones, in [0, 1); 0: all.
        prominence: only maxima that stand out by so many standard deviations of the valid values; 0: all.
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
        curve: of one response.
        valid: (T,) bool, where the curve has a value; None: everywhere. NaN is never valid.

    Example:
        >>> import torch
        >>> peaks(torch.tensor([5.0, 1.0, 3.0, 3.0, 0.0, 2.0, 1.0])).nonzero().flatten().tolist()
        [2, 5]
    """
    from scipy.signal import find_peaks

    values = curve.detach().double().cpu().numpy()
    there = ~np.isnan(values)
    if valid is not None:
        there &= valid.cpu().numpy()
    found = there.copy()
    if rule.maxima:
        # What is not valid is higher than everything: no maximum stands beside it.
        walled = np.where(there, values, np.inf)
        wanted = rule.prominence * values[there].std() if rule.prominence and there.any() else None
        found[:] = False
        found[find_peaks(walled, prominence=wanted)[0]] = True
        found &= there
    if rule.quantile and there.any():
        found &= values >= np.quantile(values[there], rule.quantile)
    return torch.from_numpy(found).to(curve.device)


@dataclass(frozen=True, eq=False)
class Curves:
    """The curves of one response, each (T,), for its T tokens.

    Attributes:
        waad: mean over the local heads. fai: mean over the global heads. receiver_fai: mean over the receiver heads.
        entropy: in nats, of the distribution that each token was drawn from; NaN where it is not known.
        fai_valid, receiver_valid: (T,) bool, where FAI has queries; None: everywhere.
    """

    waad: Tensor
    fai: Tensor
    receiver_fai: Tensor
    entropy: Tensor
    fai_valid: Tensor | None = None
    receiver_valid: Tensor | None = None

    def valid(self, name: str) -> Tensor:
        """Where the curve of this name has a value."""
        known = {"fai": self.fai_valid, "receiver_fai": self.receiver_valid}.get(name)
        finite: Tensor = getattr(self, name).isfinite()
        return finite if known is None else finite & known


def all_peaks(curves: Sequence[Curves], rule: PeakRule = PeakRule()) -> list[dict[str, Tensor]]:
    """Per response the peaks of every curve, by the names in `CURVES`."""
    return [{name: peaks(getattr(c, name), c.valid(name), rule) for name in CURVES} for c in curves]


def densities(curves: Sequence[Curves], rule: PeakRule = PeakRule()) -> dict[str, float]:
    """The share of a curve's valid tokens that are its peaks, over all responses; NaN where none is valid."""
    found = all_peaks(curves, rule)
    shares = {}
    for name in CURVES:
        tokens = sum(int(c.valid(name).sum()) for c in curves)
        marked = sum(int(marks[name].sum()) for marks in found)
        shares[name] = marked / tokens if tokens else math.nan
    return shares


@dataclass(frozen=True, eq=False)
class Sets:
    """The tokens of one response that credit is about, (T,) bool each (Sec. 5.2).

    Attributes:
        preplan: Tloc, the top share of delta: where WAAD changes most to the next token (Eq. 14).
        anchor: Tglob, the top share of FAI (Eq. 16).
        dominated: anchors that follow such a change with a low WAAD of their own (Eq. 18).
        intro: the tokens that lead to them, one per dominated anchor.
    """

    preplan: Tensor
    anchor: Tensor
    dominated: Tensor
    intro: Tensor


def sets(curves: Curves, q: float = 0.4, k: int = 3) -> Sets:
    """The sets of a response, as credit.py defines them.

    Args:
        q: share of the tokens that are preplan, and that are anchors.
        k: how many tokens before an anchor can lead to it.

    Example:
        >>> import torch
        >>> waad = torch.tensor([4.0, 9.0, 2.0, 2.0, 2.0])
        >>> fai = torch.tensor([0.1, 0.2, 0.9, 0.1, 0.1])
        >>> found = sets(Curves(waad, fai, fai, waad), q=0.2)
        >>> [found.preplan.nonzero().item(), found.dominated.nonzero().item(), found.intro.nonzero().item()]
        [1, 2, 1]
    """
    from attnstats.credit import coupled_sets  # which takes delta from here
    from attnstats.curves import top_share

    waad, fai, valid = curves.waad[None], curves.fai[None], curves.valid("fai")[None]
    everywhere = torch.ones_like(valid)
    coupled = coupled_sets(waad, fai, everywhere, valid=valid, q=q, k=k)
    preplan = top_share(delta(waad), everywhere, q)
    return Sets(preplan[0], coupled.anchor[0], coupled.dominated[0], coupled.intro[0])


@dataclass(frozen=True)
class Coupling:
    """How much more often, or higher, than by chance something is at the marked tokens; NaN where there are none.

    Attributes:
        observed: mean over the marked tokens of all responses. random: the same by chance.
        p_value: share of the permutations, one of them what was observed, that reach what was observed: one-sided.
        low, high: 95 % bootstrap interval of the lift, responses drawn with replacement.
        count: marked tokens.
    """

    name: str
    observed: float
    random: float
    p_value: float
    low: float
    high: float
    count: int

    @property
    def lift(self) -> float:
        """(observed - random) / random, Table 2."""
        return (self.observed - self.random) / self.random if self.random else math.nan


@dataclass(frozen=True)
class Chance:
    """What a coupling is compared with, and how often.

    Attributes:
        permutations: how often marks are placed anew within their response, count kept.
        null: "shuffle" places each mark anywhere; "shift" moves all of a response's marks round by one offset, which
            keeps the distances between them.
        resamples: of the bootstrap.
        seed: of both.
    """

    permutations: int = 2000
    null: Null = "shuffle"
    resamples: int = 2000
    seed: int = 0

    def __post_init__(self) -> None:
        if self.permutations < 1 or self.resamples < 1:
            raise ValueError(
                f"permutations and resamples must be at least 1, got {self.permutations}, {self.resamples}"
            )
        if self.null not in ("shuffle", "shift"):
            raise ValueError(f"null must be 'shuffle' or 'shift', got {self.null!r}")


def couplings(
    curves: Sequence[Curves],
    rule: PeakRule = PeakRule(),
    chance: Chance = Chance(),
) -> tuple[Coupling, Coupling, Coupling]:
    """The paper's three couplings over the responses of a corpus (Table 2).

    1. Mean token entropy at WAAD peaks, against over all response tokens.
    2. Share of receiver FAI peaks that are global FAI peaks, against the share of global FAI peaks among all tokens.
    3. Share of FAI peaks at a WAAD peak or right after one, against the same with FAI peaks shuffled.

    Means are over tokens, not of responses' means. Tokens without a value (FAI's last `lo`) count nowhere. The random
    value of 3 is the exact mean over all ways of placing each response's peaks.

    Raises:
        ValueError: no responses.
    """
    if not curves:
        raise ValueError("curves is empty: couplings are over one response or more")
    found = all_peaks(curves, rule)
    entropy, same, follow = [], [], []
    for c, marks in zip(curves, found, strict=True):
        both = c.valid("fai") & c.valid("receiver_fai")
        entropy.append(Marked.of(marks["waad"], c.entropy, c.valid("entropy")))
        same.append(Marked.of(marks["receiver_fai"], marks["fai"], both))
        at_or_after = marks["waad"] | _moved(marks["waad"], -1)
        follow.append(Marked.of(marks["fai"], at_or_after, c.valid("fai")))
    return (
        coupling("entropy at WAAD peaks", entropy, chance),
        coupling("receiver FAI peaks that are global FAI peaks", same, chance),
        coupling("FAI peaks at or just after a WAAD peak", follow, chance, shuffled=True),
    )


def offsets(
    curves: Sequence[Curves],
    rule: PeakRule = PeakRule(),
    chance: Chance = Chance(),
    reach: int = 1,
) -> dict[tuple[str, str, int], Coupling]:
    """How often a peak of one curve has a peak of another at an offset of -reach..reach tokens (Table 20).

    The key (of, near, +1) is: of the peaks of curve `of`, those with a peak of `near` at the next token. Random is the
    exact mean over all ways of placing the peaks of `of`.
    """
    found = all_peaks(curves, rule)
    table = {}
    for of, near in itertools.permutations(CURVES, 2):
        for offset in range(-reach, reach + 1):
            marked = [
                Marked.of(marks[of], _moved(marks[near], offset), c.valid(of))
                for c, marks in zip(curves, found, strict=True)
            ]
            table[of, near, offset] = coupling(f"{of} peaks with {near} at {offset:+d}", marked, chance, shuffled=True)
    return table


def _moved(marks: Tensor, offset: int) -> Tensor:
    """At t, what `marks` has at t + offset; False beyond the ends."""
    moved = torch.zeros_like(marks)
    length = len(marks)
    if abs(offset) < length:
        moved[max(0, -offset) : length - max(0, offset)] = marks[max(0, offset) : length - max(0, -offset)]
    return moved


class Marked(NamedTuple):
    """The tokens of one response that count, in order: which are marked, and the value at each."""

    marks: npt.NDArray[np.bool_]
    values: npt.NDArray[np.float64]

    @classmethod
    def of(cls, marks: Tensor, values: Tensor, eligible: Tensor) -> Marked:
        return cls(marks[eligible].cpu().numpy(), values[eligible].double().cpu().numpy())


def coupling(name: str, responses: Sequence[Marked], chance: Chance, shuffled: bool = False) -> Coupling:
    """The mean value at marks, against that at all tokens or, `shuffled`, at marks placed anew in each response."""
    rng = np.random.default_rng(chance.seed)
    # Per response: the sum at marks, marks, and what stands for chance as a sum and a count.
    sums = np.array([_sums(r, shuffled) for r in responses if len(r.values)]).reshape(-1, 4)
    totals = sums.sum(0)
    if not totals[1] or not totals[3]:
        return Coupling(name, math.nan, math.nan, math.nan, math.nan, math.nan, 0)
    observed, random = totals[0] / totals[1], totals[2] / totals[3]
    placed = np.zeros(chance.permutations)
    for response in responses:
        if response.marks.any():
            placed += _placed_anew(response, chance, rng)
    # Sums of the same numbers in another order differ in their last bits.
    reached = int((placed >= totals[0] - 1e-9 * max(1.0, abs(totals[0]))).sum())
    drawn = rng.integers(len(sums), size=(chance.resamples, len(sums)))
    resampled = np.stack([column[drawn].sum(1) for column in sums.T])
    with np.errstate(divide="ignore", invalid="ignore"):
        expected = resampled[2] / resampled[3]
        lifts = (resampled[0] / resampled[1] - expected) / expected
    lifts = lifts[np.isfinite(lifts)]
    low, high = np.quantile(lifts, [0.025, 0.975]) if len(lifts) else (math.nan, math.nan)
    p_value = (1 + reached) / (1 + chance.permutations)
    return Coupling(name, float(observed), float(random), p_value, float(low), float(high), int(totals[1]))


def _sums(response: Marked, shuffled: bool) -> tuple[float, float, float, float]:
    at_marks, marks = response.values[response.marks].sum(), response.marks.sum()
    if shuffled:
        return at_marks, marks, marks * response.values.mean(), marks
    return at_marks, marks, response.values.sum(), len(response.values)


def _placed_anew(response: Marked, chance: Chance, rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """Sums of the values at marks, for each permutation."""
    marks, values = response
    size, count = len(values), int(marks.sum())
    if chance.null == "shift":
        at = np.flatnonzero(marks)
        sums = values[(np.arange(size)[:, None] + at) % size].sum(1)
        return sums[rng.integers(size, size=chance.permutations)]
    if set(np.unique(values)) <= {0.0, 1.0}:
        ones = int(values.sum())
        return rng.hypergeometric(ones, size - ones, count, size=chance.permutations).astype(np.float64)
    drawn = rng.random((chance.permutations, size)).argpartition(count - 1, axis=1)[:, :count]
    return values[drawn].sum(1)
