"""Writes the golden files of token credit: `python -m tests.make_golden` remakes tests/golden/credit byte for byte.

From small causal maps A, whose entries are multiples of 1/64, everything is computed in exact fractions and rounded
to float64 once, when it is written. Values that decide a set are either equal by construction or clearly apart, so
that another implementation's rounding can't change a set. docs/credit.md describes the format.
"""

from __future__ import annotations

import itertools
import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from tests import plain_credit as plain

FOLDER = Path(__file__).parent / "golden" / "credit"
UNIT = 64

Rows = list[list[Fraction]]
Mask = Sequence[bool]


@dataclass(frozen=True)
class Golden:
    """The input of a golden file."""

    name: str
    description: str
    mask: Mask
    maps: list[Rows]  # two local heads, then two global ones
    entropy: list[Fraction]
    window: int = 4
    lo: int = 1
    hi: int = 6
    q: float = 0.4
    amp: float = 1.5
    alpha: float = 0.5
    k: int = 3
    tau_waad: float | None = None
    tau_delta: float | None = None

    @property
    def coupled(self) -> dict[str, Any]:
        return {"q": self.q, "k": self.k, "tau_waad": self.tau_waad, "tau_delta": self.tau_delta}


@dataclass(frozen=True)
class Curves:
    """Over all tokens of the sequence."""

    waad: list[Fraction]
    fai: list[Fraction]
    valid: list[bool]


def curves(golden: Golden) -> Curves:
    length, response = len(golden.mask), [t for t, counted in enumerate(golden.mask) if counted]
    local, far = golden.maps[:2], golden.maps[2:]
    waad = [
        sum((rows[t][s] * min(t - s, golden.window) for rows in local for s in range(t + 1)), Fraction(0)) / len(local)
        for t in range(length)
    ]
    later = [[t for t in response if s + golden.lo <= t <= s + golden.hi] for s in range(length)]
    fai = [
        sum((rows[t][s] for rows in far for t in queries), Fraction(0)) / (len(far) * max(1, len(queries)))
        for s, queries in enumerate(later)
    ]
    return Curves(waad, fai, [bool(queries) for queries in later])


def sets(golden: Golden, curve: Curves) -> tuple[list[int], plain.Sets]:
    """Tloc and the sets of coupled rhythm, as positions in the sequence."""
    tokens = [t for t, counted in enumerate(golden.mask) if counted]
    waad, fai = ([signal[t] for t in tokens] for signal in (curve.waad, curve.fai))
    valid = [curve.valid[t] for t in tokens]
    chunk = plain.top(plain.delta(waad), golden.q)
    coupled = plain.coupled_sets(waad, fai, valid, **golden.coupled)
    placed = plain.Sets(
        {tokens[t] for t in coupled.anchor},
        {tokens[t] for t in coupled.dominated},
        {tokens[t]: tokens[s] for t, s in coupled.intro_of.items()},
    )
    return sorted(tokens[t] for t in chunk), placed


def written(golden: Golden) -> str:
    """The file's text."""
    curve = curves(golden)
    chunk, coupled = sets(golden, curve)
    change = plain.respond(golden.mask, plain.delta, curve.waad)
    waad = [value for value, counted in zip(curve.waad, golden.mask, strict=True) if counted]
    changes = plain.delta(waad)[:-1]
    shared = weights(golden, curve)
    record = {
        "format": "attnstats token credit",
        "version": 1,
        "name": golden.name,
        "description": golden.description,
        "mask": list(golden.mask),
        "window": golden.window,
        "horizon": [golden.lo, golden.hi],
        "heads": {"local": [0, 1], "global": [2, 3]},
        "A": golden.maps,
        "entropy": golden.entropy,
        "waad": curve.waad,
        "fai": curve.fai,
        "valid": curve.valid,
        "delta": [value if counted else 0 for value, counted in zip(change, golden.mask, strict=True)],
        "settings": golden.coupled,
        "tau_waad": plain.lower_median(waad) if golden.tau_waad is None else golden.tau_waad,
        "tau_delta": plain.lower_median(changes) if changes and golden.tau_delta is None else golden.tau_delta,
        "sets": {
            "chunk": chunk,
            "anchor": sorted(coupled.anchor),
            "dominated": sorted(coupled.dominated),
            "intro": sorted(set(coupled.intro_of.values())),
            "intro_of": sorted(map(list, coupled.intro_of.items())),
        },
        "gamma": shared,
        "advantages": [
            {"advantage": advantage, "sign": sign, "shaped": plain.shaped(advantage, shared[4]["weights"], sign)}
            for advantage in (1.0, -0.5)
            for sign in ("both", "positive", "negative")
        ],
    }
    text = json.dumps(record, indent=1, default=float)
    return re.sub(r"\[\s+([^][{}]*?)\s+\]", lambda found: f"[{' '.join(found[1].split())}]", text) + "\n"


def weights(golden: Golden, curve: Curves) -> list[dict[str, Any]]:
    """Every credit with the file's settings and some besides."""
    share, bonus = {"q": golden.q, "amp": golden.amp}, {"alpha": golden.alpha}
    wanted: list[tuple[str, dict[str, Any]]] = [
        ("local_chunk", share),
        ("local_chunk", {**share, "bottom": True}),
        ("global_anchor", share),
        ("global_anchor", {**share, "bottom": True}),
        ("coupled_rhythm", {**golden.coupled, "amp": golden.amp, **bonus}),
        ("coupled_rhythm", {**golden.coupled, "amp": 2.0, "alpha": 0.25}),
        ("coupled_rhythm", {**golden.coupled, "amp": golden.amp, **bonus, "keep_mean": True}),
        ("high_entropy", share),
        ("high_entropy_selection", {"q": 0.2}),
    ]
    return [
        {"credit": name, "settings": chosen, "weights": gamma(golden, curve, name, chosen)} for name, chosen in wanted
    ]


def gamma(golden: Golden, curve: Curves, name: str, settings: dict[str, Any]) -> list[Any]:
    exact = {key: Fraction(value) if key in ("amp", "alpha") else value for key, value in settings.items()}
    keep_mean = exact.pop("keep_mean", False)

    def credit(*signals: list[Any]) -> list[Any]:
        row = getattr(plain, name)(*signals, **exact)
        return plain.mean_kept(row) if keep_mean else row

    known: dict[str, Sequence[Any]] = {
        "waad": curve.waad,
        "fai": curve.fai,
        "valid": curve.valid,
        "entropy": golden.entropy,
    }
    signals = [known[signal] for signal in plain.SIGNALS[name]]
    return [Fraction(weight) for weight in plain.respond(golden.mask, credit, *signals)]


# Maps


def drawn_rows(draw: random.Random, mask: Mask, padding: int, local: bool) -> Rows:
    """UNIT parts of attention per row, most of them near the token in a local head; padding attends to nothing."""
    rows = []
    for t in range(len(mask)):
        row = [0] * len(mask)
        if t >= padding:
            near = local and draw.random() < 0.6
            for _ in range(UNIT):
                back = draw.random() * (2.5 if near else t - padding + 1)
                row[max(padding, t - int(back))] += 1
        rows.append([Fraction(part, UNIT) for part in row])
    return rows


def drawn_entropy(draw: random.Random, length: int) -> list[Fraction]:
    return [Fraction(int(draw.random() * 4096), 1024) for _ in range(length)]


def drawn(
    name: str,
    description: str,
    mask: Mask,
    interesting: Callable[[plain.Sets], bool] = lambda coupled: True,
    padding: int = 0,
    **settings: Any,
) -> Golden:
    """The first of a fixed series of random maps whose values are apart and whose sets are interesting."""
    for seed in itertools.count():
        draw = random.Random(seed)  # random() is the same in every version of Python
        maps = [drawn_rows(draw, mask, padding, local) for local in (True, True, False, False)]
        golden = Golden(name, description, mask, maps, drawn_entropy(draw, len(mask)), **settings)
        curve = curves(golden)
        if apart(golden, curve) and interesting(sets(golden, curve)[1]):
            return golden
    raise AssertionError("unreachable")


def apart(golden: Golden, curve: Curves) -> bool:
    """True if no two values that are compared are equal or close."""
    tokens = [t for t, counted in enumerate(golden.mask) if counted]
    waad = [curve.waad[t] for t in tokens]
    compared: list[list[Any]] = [
        waad + [Fraction(tau) for tau in (golden.tau_waad,) if tau is not None],
        plain.delta(waad)[:-1] + [Fraction(tau) for tau in (golden.tau_delta,) if tau is not None],
        [curve.fai[t] for t in tokens if curve.valid[t]],
        [golden.entropy[t] for t in tokens],
    ]
    return all(b - a > 1e-6 for values in compared for a, b in itertools.pairwise(sorted(values)))


def previous_token(length: int) -> Rows:
    """Every token looks at the one before it alone: ties everywhere, and nothing that rounds."""
    return [[Fraction(int(s == max(0, t - 1))) for s in range(length)] for t in range(length)]


def response(prompt: int, length: int, holes: Sequence[int] = ()) -> list[bool]:
    return [t >= prompt and t not in holes for t in range(length)]


def all_golden() -> list[Golden]:
    return [
        drawn(
            "rhythm",
            "A prompt of 3 tokens and a response of 9; some anchors are dominated and some are not.",
            response(3, 12),
            lambda coupled: 0 < len(coupled.dominated) < len(coupled.anchor),
        ),
        drawn(
            "overlaps",
            "Two dominated anchors share their intro token, which is an anchor too: a set, and terms that add.",
            response(2, 12),
            lambda coupled: (
                len(set(coupled.intro_of.values())) < len(coupled.intro_of)
                and bool(set(coupled.intro_of.values()) & coupled.anchor)
            ),
            q=0.5,
        ),
        drawn(
            "holes",
            "Two tokens of padding, a prompt of 2, a response of 6 with 2 tokens between that the policy didn't write.",
            response(4, 12, holes=(7, 8)),
            lambda coupled: any(t - s > 2 and s < 7 for t, s in coupled.intro_of.items()),
            padding=2,
            lo=0,
            hi=4,
        ),
        Golden(
            "ties",
            "Every token looks at the one before it: WAAD is constant, delta is 0, FAI ties. The lower index is taken.",
            response(2, 12),
            [previous_token(12)] * 4,
            [Fraction(1)] * 12,
            lo=1,
            hi=2,
        ),
        drawn("short", "A response of 2 tokens, too short for any FAI: no anchors.", response(6, 8), lo=10, hi=100),
        drawn("one_token", "A response of 1 token, which has no successor.", response(5, 6), lo=0, hi=4),
        drawn(
            "defaults",
            "The paper's window and horizon: only one response token has FAI.",
            response(1, 12),
            window=10,
            lo=10,
            hi=100,
        ),
        drawn(
            "thresholds",
            "Thresholds, share, amplification, alpha and k other than the defaults.",
            response(3, 12),
            lambda coupled: 0 < len(coupled.dominated) < len(coupled.anchor),
            q=0.6,
            amp=2.0,
            alpha=0.75,
            k=1,
            tau_waad=2.25,
            tau_delta=0.125,
        ),
    ]


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for golden in all_golden():
        (FOLDER / f"{golden.name}.json").write_text(written(golden), encoding="utf-8")


if __name__ == "__main__":
    main()
