"""A response in a notebook: its tokens in colour and the curve beside them, in HTML of its own.

It has the scale, columns and marks of the page. There are no scripts and no styles for the rest of the notebook, and
text of a model is escaped and `visible`.
"""

from __future__ import annotations

import html
from dataclasses import dataclass

from attnstats import cells
from attnstats.report.columns import Column
from attnstats.report.marks import marks
from attnstats.report.scale import LIGHT, Domain, as_hex, ink, ramp
from attnstats.study.analysis import Analysis
from attnstats.study.text import PART, shortened, visible

TOKENS = 2000  # that are shown; a notebook keeps what it showed
SCALE = ramp(LIGHT)
STYLE = "font: 14px/1.7 ui-monospace, monospace; background: #fff; color: #000; padding: 8px; white-space: pre-wrap"


@dataclass(frozen=True)
class Shaded:
    """A response shaded by a column, with the column's curve."""

    analysis: Analysis
    column: Column

    def __repr__(self) -> str:
        values = self.column.read(self.analysis)
        return f"{self.column.title} of {len(values)} tokens, in {self.column.unit}; a notebook shows it in colour"

    def _repr_html_(self) -> str:
        read = self.column.read(self.analysis)
        values, domain = read.tolist(), self.column.domain(read)
        more = f"<div>… and {len(values) - TOKENS} tokens more</div>" if len(values) > TOKENS else ""
        ends = (f"{end:.3g}" for end in (domain.low, domain.high))
        scale = "".join(f'<span style="background:{as_hex(shade)}"> </span>' for shade in SCALE)
        legend = f"{self.column.title} {next(ends)} {scale} {next(ends)} {html.escape(self.column.unit)}"
        height = Domain.of(read, pale=0.0)
        shares = [None if value != value else height.share(value) for value in values]
        curve = cells.curve(shares, as_hex(SCALE[-4]))
        return (
            f'<div style="{STYLE}"><div>{legend}   <b style="text-decoration:overline">over</b> preplan: highest WAAD'
            f'   <b style="text-decoration:underline">under</b> anchor: highest FAI</div>{curve}'
            f"<div>{self._tokens(values, domain)}</div>{more}</div>"
        )

    def _tokens(self, values: list[float], domain: Domain) -> str:
        marked = marks(self.analysis)
        preplan, anchors = set(marked.among(marked.preplan)), set(marked.among(marked.anchor))
        start, spans = self.analysis.response_start, []
        for i, value in enumerate(values[:TOKENS]):
            token = visible(shortened(self.analysis.shown[start + i]))
            shade = SCALE[domain.shade(value)] if value == value else SCALE[0]
            style = f"background:{as_hex(shade)};color:{as_hex(ink(shade))}"
            if lines := " ".join(name for name, among in (("overline", preplan), ("underline", anchors)) if i in among):
                style += f";font-weight:bold;text-decoration:{lines}"
                token = token or PART  # a marked token must be visible
            said = "no value" if value != value else f"{value:.{self.column.digits}f} {self.column.unit}"
            spans.append(f'<span style="{style}" title="{i + 1}: {html.escape(said)}">{html.escape(token)}</span>')
        return "".join(spans)
