"""A quantity at marked tokens against chance: a permutation test and a bootstrap over responses, both seeded.

Responses come one at a time and are not kept: memory does not grow with their number.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

Null = Literal["shuffle", "shift"]
# Below so many responses there is no interval and no p. A bootstrap draws responses: of one it draws the same each
# time, of four the ends of a 95 % interval are single responses.
FEWEST = 5
ONE_BY_ONE = 1000  # responses that are permuted and resampled singly


def too_few(count: int, what: str) -> str:
    """The reason why a mean over `count` responses has no interval and no p; empty if it has them.

    Example:
        >>> too_few(1, "responses with a peak")
        'no interval and no p over fewer than 5 responses with a peak'
    """
    return "" if count >= FEWEST else f"no interval and no p over fewer than {FEWEST} {what}"


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


class Marked(NamedTuple):
    """The marks and values of the eligible tokens of one response, in order."""

    marks: npt.NDArray[np.bool_]
    values: npt.NDArray[np.float64]

    @classmethod
    def of(cls, marks: Tensor, values: Tensor, eligible: Tensor) -> Marked:
        return cls(marks[eligible].cpu().numpy(), values[eligible].double().cpu().numpy())


class Groups:
    """Rows of numbers, one of each response up to ONE_BY_ONE of them; further ones are added to these rows in turn.

    Responses are independent, and so are groups of them: draws with replacement and flips of signs may be of groups.
    """

    def __init__(self, columns: int):
        self.count = 0
        self._rows = np.zeros((ONE_BY_ONE, columns))

    def add(self, *row: float) -> None:
        self._rows[self.count % ONE_BY_ONE] += row
        self.count += 1

    @property
    def rows(self) -> npt.NDArray[np.float64]:
        return self._rows[: self.count]

    def resampled(self, draws: int, rng: np.random.Generator) -> npt.NDArray[np.float64]:
        """(columns, draws) sums of as many rows as there are, drawn with replacement."""
        drawn = rng.integers(len(self.rows), size=(draws, len(self.rows)))
        return np.stack([column[drawn].sum(1) for column in self.rows.T])


class CouplingSum:
    """The mean value at marks, against that at all tokens or, if `shuffled`, at marks placed anew in each response.

    Responses come one at a time. The marks of the first ONE_BY_ONE are placed anew in every permutation; for the sum
    over all further ones, which is normal as a sum of many, a number of its mean and variance is drawn.
    """

    def __init__(self, name: str, chance: Chance, shuffled: bool = False):
        self._name, self._chance, self._shuffled = name, chance, shuffled
        self._rng = np.random.default_rng(chance.seed)
        # Per response: the sum at marks and their number, then the sum and the number that give the mean by chance.
        self._sums = Groups(4)
        self._placed = np.zeros(chance.permutations)
        self._with_marks = 0
        self._mean = self._variance = 0.0

    def add(self, response: Marked) -> None:
        """Count one more response."""
        if not len(response.values):
            return
        self._sums.add(*_sums(response, self._shuffled))
        if not response.marks.any():
            return
        self._with_marks += 1
        if self._with_marks <= ONE_BY_ONE:
            self._placed += _placed_anew(response, self._chance, self._rng)
        else:
            mean, variance = _moments_anew(response, self._chance)
            self._mean += mean
            self._variance += variance

    def result(self) -> Coupling:
        """The coupling over the responses so far."""
        totals = self._sums.rows.sum(0)
        if not totals[1] or not totals[3]:
            return Coupling(self._name, math.nan, math.nan, math.nan, math.nan, math.nan, 0, 0)
        observed, random = float(totals[0] / totals[1]), float(totals[2] / totals[3])
        count, with_marks = int(totals[1]), self._with_marks
        if with_marks < FEWEST:
            return Coupling(self._name, observed, random, math.nan, math.nan, math.nan, count, with_marks)
        rng = copy.deepcopy(self._rng)
        placed = self._placed
        if with_marks > ONE_BY_ONE:
            placed = placed + rng.normal(self._mean, math.sqrt(self._variance), size=len(placed))
        # Sums of the same numbers in another order differ in their last bits.
        reached = int((placed >= totals[0] - 1e-9 * max(1.0, abs(totals[0]))).sum())
        resampled = self._sums.resampled(self._chance.resamples, rng)
        with np.errstate(divide="ignore", invalid="ignore"):
            expected = resampled[2] / resampled[3]
            lifts = (resampled[0] / resampled[1] - expected) / expected
        lifts = lifts[np.isfinite(lifts)]
        low, high = np.quantile(lifts, [0.025, 0.975]) if len(lifts) else (math.nan, math.nan)
        p_value = (1 + reached) / (1 + self._chance.permutations)
        return Coupling(self._name, observed, random, p_value, float(low), float(high), count, with_marks)


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
        return _rotated(response)[rng.integers(size, size=chance.permutations)]
    if set(np.unique(values)) <= {0.0, 1.0}:
        ones = int(values.sum())
        return rng.hypergeometric(ones, size - ones, count, size=chance.permutations).astype(np.float64)
    drawn = rng.random((chance.permutations, size)).argpartition(count - 1, axis=1)[:, :count]
    return values[drawn].sum(1)


def _moments_anew(response: Marked, chance: Chance) -> tuple[float, float]:
    """The mean and the variance of the sum of the values at marks over all ways of placing them anew."""
    marks, values = response
    size, count = len(values), int(marks.sum())
    if chance.null == "shift":
        sums = _rotated(response)
        return float(sums.mean()), float(sums.var())
    left_over = (size - count) / max(1, size - 1)  # without replacement the variance is less
    return float(count * values.mean()), float(count * left_over * values.var())


def _rotated(response: Marked) -> npt.NDArray[np.float64]:
    """(T,) sums of the values at marks that are rotated by 0, 1, ... tokens."""
    size = len(response.values)
    return response.values[(np.arange(size)[:, None] + np.flatnonzero(response.marks)) % size].sum(1)
