"""Token credit written out token by token, on lists of numbers: what credit.py is compared with.

A response is a list with one entry per response token; `respond` takes a row apart and puts it together. Numbers are
floats or, for the golden files, exact `Fraction`s: nothing here rounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

Number = Any  # float or Fraction

# Which signals each credit takes, in their order.
SIGNALS = {
    "local_chunk": ("waad",),
    "global_anchor": ("fai", "valid"),
    "coupled_rhythm": ("waad", "fai", "valid"),
    "high_entropy": ("entropy",),
    "high_entropy_selection": ("entropy",),
}


def respond(mask: Sequence[bool], credit: Callable[..., list[Number]], *signals: Sequence[Number]) -> list[Number]:
    """The credit of one row: computed on its response tokens alone, 1 elsewhere."""
    tokens = [t for t, counted in enumerate(mask) if counted]
    gamma: list[Number] = [1] * len(mask)
    for t, weight in zip(tokens, credit(*([signal[t] for t in tokens] for signal in signals)), strict=True):
        gamma[t] = weight
    return gamma


def top(values: Sequence[Number], q: float, valid: Sequence[bool] | None = None, bottom: bool = False) -> set[int]:
    """One after the other, the best that is left."""
    chosen: set[int] = set()
    for _ in range(math.ceil(Fraction(str(q)) * len(values))):
        best = None
        for t, value in enumerate(values):
            if t in chosen or (valid is not None and not valid[t]):
                continue
            if best is None or (value < values[best] if bottom else value > values[best]):
                best = t
        if best is not None:
            chosen.add(best)
    return chosen


def delta(waad: Sequence[Number]) -> list[Number]:
    changes: list[Number] = []
    for t in range(len(waad)):
        changes.append(abs(waad[t] - waad[t + 1]) if t + 1 < len(waad) else 0)
    return changes


def lower_median(values: Sequence[Number]) -> Number:
    return sorted(values)[(len(values) - 1) // 2]


class Sets(NamedTuple):
    anchor: set[int]
    dominated: set[int]
    intro_of: dict[int, int]


def coupled_sets(
    waad: Sequence[Number],
    fai: Sequence[Number],
    valid: Sequence[bool],
    q: float = 0.4,
    k: int = 3,
    tau_waad: Number | None = None,
    tau_delta: Number | None = None,
) -> Sets:
    changes = delta(waad)
    if tau_waad is None and waad:
        tau_waad = lower_median(waad)
    if tau_delta is None and len(waad) > 1:
        tau_delta = lower_median(changes[:-1])
    anchor = top(fai, q, valid)
    dominated: set[int] = set()
    intro_of: dict[int, int] = {}
    for t in sorted(anchor):
        window = [s for s in range(t - k, t) if s >= 0]
        if not window:
            continue
        intro = window[0]
        for s in window:
            if changes[s] >= changes[intro]:
                intro = s
        if waad[t] <= tau_waad and changes[intro] >= tau_delta:
            dominated.add(t)
            intro_of[t] = intro
    return Sets(anchor, dominated, intro_of)


def amplified(length: int, chosen: set[int], amp: Number) -> list[Number]:
    return [amp if t in chosen else 1 for t in range(length)]


def local_chunk(waad: Sequence[Number], q: float = 0.4, amp: Number = 1.5, bottom: bool = False) -> list[Number]:
    return amplified(len(waad), top(delta(waad), q, bottom=bottom), amp)


def global_anchor(
    fai: Sequence[Number], valid: Sequence[bool], q: float = 0.4, amp: Number = 1.5, bottom: bool = False
) -> list[Number]:
    return amplified(len(fai), top(fai, q, valid, bottom), amp)


def high_entropy(entropy: Sequence[Number], q: float = 0.4, amp: Number = 1.5, bottom: bool = False) -> list[Number]:
    return amplified(len(entropy), top(entropy, q, bottom=bottom), amp)


def high_entropy_selection(entropy: Sequence[Number], q: float = 0.2) -> list[Number]:
    chosen = top(entropy, q)
    return [1 if t in chosen else 0 for t in range(len(entropy))]


def coupled_rhythm(
    waad: Sequence[Number],
    fai: Sequence[Number],
    valid: Sequence[bool],
    amp: Number = 1.5,
    alpha: Number = 0.5,
    **settings: Any,
) -> list[Number]:
    sets = coupled_sets(waad, fai, valid, **settings)
    gamma: list[Number] = []
    for t in range(len(waad)):
        weight: Number = 1
        if t in sets.anchor and t not in sets.dominated:
            weight += amp - 1
        if t in sets.dominated:
            weight += (1 - alpha) * (amp - 1)
        if t in sets.intro_of.values():
            weight += alpha * (amp - 1)
        gamma.append(weight)
    return gamma


def mean_kept(gamma: Sequence[Number]) -> list[Number]:
    """One row's response tokens."""
    return [weight * len(gamma) / sum(gamma) for weight in gamma]


def shaped(advantage: Number, gamma: Sequence[Number], sign: str = "both") -> list[Number]:
    if (sign == "positive" and not advantage > 0) or (sign == "negative" and not advantage < 0):
        return [advantage for _ in gamma]
    return [advantage * weight for weight in gamma]
