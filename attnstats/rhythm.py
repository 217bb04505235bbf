"""Peaks of the curves of responses, and the three couplings between WAAD, FAI and entropy peaks (Sec. 4).

Pure functions on the curves of single responses, which are means over heads (heads.class_mean): differences and peaks
are taken after averaging, never before. A coupling is over all responses of a corpus, with a permutation test and a
bootstrap, both seeded.
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

from attnstats.credit import coupled_sets
from attnstats.curves import delta, top_share

CURVES = ("waad", "fai", "receiver_fai", "entropy")
Null = Literal["shuffle", "shift"]
# Below so many responses there is no interval and no p. A bootstrap draws responses: of one it draws the same each
# time, of four the ends of a 95 % interval are single responses.
FEWEST = 5


def too_few(count: int, what: str) -> str:
    """The reason why a mean over `count` responses has no interval and no p; empty if it has them.

    Example:
        >>> too_few(1, "responses with a peak")
        'no interval and no p over fewer than 5 responses with a peak'
    """
    return "" if count >= FEWEST else f"no interval and no p over fewer than {FEWEST} {what}"


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


def all_peaks(curves: Sequence[Curves], rule: PeakRule = PeakRule()) -> list[dict[str, Tensor]]:
    """The peaks of every curve of each response, by the names in `CURVES`."""
    return [{name: peaks(getattr(c, name), c.valid(name), rule) for name in CURVES} for c in curves]


def densities(curves: Sequence[Curves], rule: PeakRule = PeakRule()) -> dict[str, float]:
    """The share of each curve's valid tokens that are peaks, over all responses; NaN where no token is valid."""
    marks = all_peaks(curves, rule)
    shares = {}
    for name in CURVES:
        tokens = sum(int(c.valid(name).sum()) for c in curves)
        count = sum(int(of_response[name].sum()) for of_response in marks)
        shares[name] = count / tokens if tokens else math.nan
    return shares


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


@dataclass(frozen=True)
class Coupling:
    """The mean of a quantity at marked tokens beside its mean by chance; NaN where no token is marked.

    Attributes:
        observed: mean over the marked tokens of all responses. random: the mean by chance.
        p_value: share of the permutations, the observed one counted, whose mean is at least the observed: one-sided.
        low, high: 95 % bootstrap interval of the lift; responses are drawn with replacement.
        count: number of marked tokens. responses: number of responses with one; p_value, low and high are NaN if they
            are fewer than FEWEST.
    """

    name: str
    observed: float
    random: float
    p_value: float
    low: float
    high: float
    count: int
    responses: int

    @property
    def reason(self) -> str:
        """Why the coupling has no interval and no p; empty if it has them."""
        return too_few(self.responses, "responses with a peak")

    @property
    def lift(self) -> float:
        """(observed - random) / random, Table 2."""
        return (self.observed - self.random) / self.random if self.random else math.nan


@dataclass(frozen=True)
class Chance:
    """The null hypothesis of the permutation test, and the number of draws of the test and of the bootstrap.

    Attributes:
        permutations: number of times the marks are placed anew within their response, count kept.
        null: "shuffle" places each mark anywhere; "shift" rotates all marks of a response by one offset, which keeps
            the distances between them.
        resamples: number of bootstrap samples.
        seed: seed of both.
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

    1. Mean token entropy at WAAD peaks, against the mean over all response tokens.
    2. Share of receiver FAI peaks that are global FAI peaks, against the share of global FAI peaks among all tokens.
    3. Share of FAI peaks at a WAAD peak or right after one, against the same share with the FAI peaks shuffled.

    Means are over the tokens of all responses. Tokens without a value (FAI's last `lo`) are left out. The random value
    of 3 is the exact mean over all ways of placing each response's peaks.

    Raises:
        ValueError: no responses.
    """
    if not curves:
        raise ValueError("curves is empty: couplings are over one response or more")
    entropy, same, follow = [], [], []
    for c, marks in zip(curves, all_peaks(curves, rule), strict=True):
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
    """The share of one curve's peaks with a peak of another at an offset of -reach..reach tokens (Table 20).

    The key (of, near, +1) has the share of the peaks of `of` with a peak of `near` at the next token. Random is the
    exact mean over all ways of placing the peaks of `of`.
    """
    peaks_of = all_peaks(curves, rule)
    table = {}
    for of, near in itertools.permutations(CURVES, 2):
        for offset in range(-reach, reach + 1):
            marked = [
                Marked.of(marks[of], _moved(marks[near], offset), c.valid(of))
                for c, marks in zip(curves, peaks_of, strict=True)
            ]
            table[of, near, offset] = coupling(f"{of} peaks with {near} at {offset:+d}", marked, chance, shuffled=True)
    return table


def _moved(marks: Tensor, offset: int) -> Tensor:
    """`marks[t + offset]` at t; False beyond the ends."""
    moved = torch.zeros_like(marks)
    length = len(marks)
    if abs(offset) < length:
        moved[max(0, -offset) : length - max(0, offset)] = marks[max(0, offset) : length - max(0, -offset)]
    return moved


class Marked(NamedTuple):
    """The marks and values of the eligible tokens of one response, in order."""

    marks: npt.NDArray[np.bool_]
    values: npt.NDArray[np.float64]

    @classmethod
    def of(cls, marks: Tensor, values: Tensor, eligible: Tensor) -> Marked:
        return cls(marks[eligible].cpu().numpy(), values[eligible].double().cpu().numpy())


def coupling(name: str, responses: Sequence[Marked], chance: Chance, shuffled: bool = False) -> Coupling:
    """The mean value at marks, against that at all tokens or, if `shuffled`, at marks placed anew in each response."""
    rng = np.random.default_rng(chance.seed)
    # Per response: the sum at marks and their number, then the sum and the number that give the mean by chance.
    sums = np.array([_sums(r, shuffled) for r in responses if len(r.values)]).reshape(-1, 4)
    totals = sums.sum(0)
    if not totals[1] or not totals[3]:
        return Coupling(name, math.nan, math.nan, math.nan, math.nan, math.nan, 0, 0)
    observed, random = float(totals[0] / totals[1]), float(totals[2] / totals[3])
    count, with_marks = int(totals[1]), int((sums[:, 1] > 0).sum())
    if with_marks < FEWEST:
        return Coupling(name, observed, random, math.nan, math.nan, math.nan, count, with_marks)
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
    return Coupling(name, observed, random, p_value, float(low), float(high), count, with_marks)


def _sums(response: Marked, shuffled: bool) -> tuple[float, float, float, float]:
    at_marks, marks = response.values[response.marks].sum(), response.marks.sum()
    if shuffled:
        return at_marks, marks, marks * response.values.mean(), marks
    return at_marks, marks, response.values.sum(), len(response.values)


def _placed_anew(response: Marked, chance: Chance, rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """The sum of the values at marks in each permutation."""
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
