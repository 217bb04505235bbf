"""The curves of a response as one inline SVG, panels above each other on a common axis of tokens.

Returns markup that is safe to insert: every text goes through `escape`, numbers are formatted here, and colours
come from the report's style sheet by class. Called by the report alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape
from torch import Tensor

from attnstats import rhythm

WIDTH, PANEL, GAP = 960, 150, 44
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 26, 40
LABELLED, LONGEST_LABEL = 5, 12
USUAL = 0.98  # the share of values that the axis must cover
TICKS = (1, 2, 5)


@dataclass(frozen=True, eq=False)
class Curve:
    """One statistic along a response: values (T,), which of them are valid (T,), and their unit."""

    name: str
    title: str
    unit: str
    values: Tensor
    valid: Tensor

    def top(self, count: int) -> list[int]:
        return rhythm.top(self.values, count, self.valid)


def draw(curves: Sequence[Curve], texts: Sequence[str], notes: Sequence[str], no_future: str = "") -> Markup:
    """The curves over the tokens of a response.

    Args:
        texts: the tokens, made visible; the highest ones are named in the chart.
        notes: what the pointer over a token shows.
        no_future: what to write over the tail where a curve is not defined.
    """
    length = len(texts)
    height = TOP + len(curves) * PANEL + (len(curves) - 1) * GAP + BOTTOM
    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="{escape(" and ".join(c.title for c in curves))} along the {length} tokens of the response">'
    ]
    for row, curve in enumerate(curves):
        parts += _panel(curve, TOP + row * (PANEL + GAP), texts, no_future)
    parts += _axis(length, height)
    step = _step(length)
    parts += [
        f'<rect class="hit" x="{_x(i, length) - step / 2:.1f}" y="{TOP}" width="{step:.2f}" '
        f'height="{height - TOP - BOTTOM}"><title>{escape(note)}</title></rect>'
        for i, note in enumerate(notes)
    ]
    return Markup("".join([*parts, "</svg>"]))


def _panel(curve: Curve, y: int, texts: Sequence[str], no_future: str) -> list[str]:
    length = len(texts)
    least, most, tick = axis_range(curve)

    def at(value: float) -> float:
        return y + PANEL * (1 - (min(value, most) - least) / (most - least))

    title = f"{escape(curve.title)} <tspan>({escape(curve.unit)})</tspan>"
    parts = [f'<text class="panel" x="{LEFT}" y="{y - 11}">{title}</text>']
    for i in range(round((most - least) / tick) + 1):
        value = least + i * tick
        parts.append(f'<path class="grid" d="M{LEFT} {at(value):.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 8}" y="{at(value) + 4:.1f}" text-anchor="end">{value:g}</text>')
    points = [f"{_x(i, length):.1f} {at(float(curve.values[i])):.1f}" for i in curve.valid.nonzero()[:, 0].tolist()]
    if points:
        parts.append(f'<path class="line {curve.name}" d="M{"L".join(points)}"/>')
    parts += _unknown(curve, y, length, no_future)
    return parts + _labels(curve, at, most, texts)


def axis_range(curve: Curve) -> tuple[float, float, float]:
    """Least and greatest value of the axis and the step of its ticks.

    The axis covers the valid values but for a few far above the rest: FAI of the last tokens is a mean over one
    or two queries, and would press everything else to the ground. Those are drawn at the top with their value.
    """
    known = curve.values[curve.valid].double()
    if not len(known):
        return 0.0, 1.0, 1.0
    low, high = float(known.min()), float(known.max())
    usual = float(known.quantile(USUAL))
    high = min(high, usual + (usual - low) * 0.75)
    tick = tick_step(max(high - low, 1e-9), 4)
    least = math.floor(low / tick + 1e-6) * tick
    return least, max(math.ceil(high / tick - 1e-6) * tick, least + tick), tick


def _unknown(curve: Curve, y: int, length: int, no_future: str) -> list[str]:
    """The tail where the curve has no value: nothing comes late enough to look back at it."""
    if curve.valid.all():
        return []
    known = curve.valid.nonzero()
    x = _x(int(known[-1]), length) if len(known) else float(LEFT)
    edge = WIDTH - RIGHT
    parts = [f'<rect class="unknown" x="{x:.1f}" y="{y}" width="{edge - x:.1f}" height="{PANEL}"/>']
    if no_future:
        parts.append(f'<text class="tick" text-anchor="end" x="{edge}" y="{y - 11}">{escape(no_future)}</text>')
    return parts


def _labels(curve: Curve, at: Callable[[float], float], most: float, texts: Sequence[str]) -> list[str]:
    """A ring and the token at the highest points, as many as find room."""
    parts: list[str] = []
    placed: list[tuple[float, float]] = []
    for i in curve.top(LABELLED):
        value = float(curve.values[i])
        x, y = _x(i, len(texts)), at(value)
        parts.append(f'<circle class="peak {curve.name}" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>')
        text = texts[i].strip() or "space"
        text = text if len(text) <= LONGEST_LABEL else f"{text[: LONGEST_LABEL - 1]}…"
        text += f" {value:.2f}↑" if value > most else ""
        width = 7.5 * len(text) + 14
        if all(abs(x - other) > (width + taken) / 2 for other, taken in placed):
            placed.append((x, width))
            # Beside a point at the very top, or the label would run into the panel's title.
            anchor, dx, dy = ("end", -9, 4) if value > most else ("middle", 0, -8)
            x = x + dx if anchor == "end" else min(max(x, LEFT + width / 2), WIDTH - RIGHT - width / 2)
            label = f'<text class="label" text-anchor="{anchor}" x="{x:.1f}" y="{y + dy:.1f}">{escape(text)}</text>'
            parts.append(label)
    return parts


def _axis(length: int, height: int) -> list[str]:
    y = height - BOTTOM
    tick = max(1, int(tick_step(length, 8)))
    marks = [1, *range(tick, length + 1, tick)] if tick > 1 else range(1, length + 1)
    parts = [
        f'<text class="tick" text-anchor="middle" x="{_x(i - 1, length):.1f}" y="{y + 17}">{i}</text>' for i in marks
    ]
    centre = (LEFT + WIDTH - RIGHT) / 2
    return [*parts, f'<text class="tick" text-anchor="middle" x="{centre}" y="{y + 34}">token of the response</text>']


def tick_step(span: float, most: int) -> float:
    """The smallest of 1, 2, 5 times a power of ten that divides `span` into `most` parts or fewer."""
    power = 10.0 ** math.floor(math.log10(span / most))
    return next((power * unit for unit in TICKS if span / (power * unit) <= most), power * 10)


def _step(length: int) -> float:
    return (WIDTH - LEFT - RIGHT) / max(1, length - 1)


def _x(index: int, length: int) -> float:
    return LEFT + index * _step(length)
