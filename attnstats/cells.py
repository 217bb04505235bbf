"""HTML of results for the cells of a notebook: text, a frame, and curves, without scripts or styles of the page."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

WIDTH, HEIGHT = 720, 64  # of a curve, in pixels
STROKE = "#2c5aa0"


def text(lines: str) -> str:
    """A text as it is."""
    return f'<pre style="background:#fff;color:#000">{html.escape(lines)}</pre>'


def table(make_frame: Callable[[], Any]) -> str:
    """A pandas frame as its own class shows it, cut in the middle; empty where pandas isn't installed."""
    try:
        return str(make_frame()._repr_html_())
    except ImportError:
        return ""


def curves(named: Mapping[str, Sequence[float]]) -> str:
    """A curve for each name, on a linear scale from its lowest to its highest value, which are written beside it."""
    parts = []
    for name, values in named.items():
        finite = [value for value in values if value == value]
        low, high = min(finite, default=0.0), max(finite, default=0.0)
        span = high - low or 1.0
        shares = [None if value != value else (value - low) / span for value in values]
        label = html.escape(f"{name}: {low:.3g} to {high:.3g}")
        parts.append(f"<div>{label}</div>{curve(shares, STROKE)}")
    return f'<div style="background:#fff;color:#000">{"".join(parts)}</div>'


def curve(shares: Sequence[float | None], stroke: str) -> str:
    """The highest value of each stretch of a curve as a line, 0 at the bottom and 1 at the top, interrupted at None."""
    highest = highest_of_stretches(shares, min(len(shares), WIDTH // 2))
    step = WIDTH / max(1, len(highest))
    path, is_down = [], False
    for i, share in enumerate(highest):
        if share is not None:
            path.append(f"{'L' if is_down else 'M'}{step * (i + 0.5):.1f} {HEIGHT * (1 - share):.1f}")
        is_down = share is not None
    line = f'<path d="{" ".join(path)}" fill="none" stroke="{stroke}" stroke-width="1.5"/>'
    return f'<svg viewBox="0 -2 {WIDTH} {HEIGHT + 4}" width="{WIDTH}" style="max-width:100%">{line}</svg>'


def highest_of_stretches(values: Sequence[float | None], count: int) -> list[float | None]:
    """The highest value of each of `count` stretches of a curve; None for a stretch without values."""
    bounds = [i * len(values) // count for i in range(count + 1)]
    return [max((v for v in values[a:b] if v is not None), default=None) for a, b in pairwise(bounds)]
