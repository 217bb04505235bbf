"""report.html: one file that shows where a response looks far back (WAAD) and what later tokens look at (FAI).

It is self-contained, under a content security policy that allows only its one script and its one style sheet, because
token text is untrusted. data.py makes the data of the page, the scripts draw it (page.js first, start.js last, joined
into one), and columns.py and scale.py hold what the page shares with the terminal and the figures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from attnstats.heads import SHAPED
from attnstats.report import data, scale, template
from attnstats.report.columns import horizon
from attnstats.report.marks import SHARE
from attnstats.study.analysis import Analysis, Settings
from attnstats.study.text import shortened, visible

READ = ("text", "chat")  # subjects that the model reads, whose responses exist already; it answers prompts
SCRIPTS = ("page.js", "index.js", "tokens.js", "curves.js", "maps.js", "heads.js", "parts.js", "search.js", "start.js")


def render(
    analyses: Sequence[Analysis], settings: Settings, summary: dict[str, Any], couplings: Sequence[Any] | None = None
) -> str:
    """The report as HTML. Parts that would make it too large are left out, and the page names them.

    Args:
        analyses: one or more; a sample of many is shown.
        summary: model, settings, versions, timings_seconds and peak_memory_bytes, as summary.json has them, `near_ties`
            of greedy decoding, and `subject` and `left_out` of responses that were not generated.
        couplings: objects with the fields of attnstats.rhythm.Coupling, none if no head is a receiver. None: no such
            part of the page.

    Raises:
        ValueError: there is no analysis.
    """
    if not analyses:
        raise ValueError("analyses: there is none to show; give one or more")
    shown = data.fit(analyses)
    return template.fill(
        "report.html.jinja",
        SCRIPTS,
        page=data.embedded(_page(settings, shown, len(analyses))),
        total=len(analyses),
        prompts=shown.prompts,
        maps=shown.maps,
        plain=shown.plain,
        left_out=shown.left_out,
        subject=summary.get("subject") if summary.get("subject") in READ else None,
        unread=[template.fact(each) for each in summary.get("left_out", ())],
        couplings=None if couplings is None else [_coupling(coupling) for coupling in couplings],
        shaped=SHAPED,
        settings=settings,
        horizon=horizon(settings),
        facts=_facts(summary),
        model=visible(shortened(str(summary["model"]["name"]))),
    )


def _page(settings: Settings, shown: data.Shown, total: int) -> dict[str, Any]:
    return {
        "columns": data.columns(settings),
        "shades": scale.SHADES,
        "share": SHARE,
        "floor": data.FLOOR,
        "codes": data.CODES,
        "window": settings.window,
        "lo": settings.fai_lo,
        "headShare": settings.head_share,
        "total": total,
        "maps": bool(shown.maps),
        "cards": shown.cards,
    }


def _coupling(coupling: Any) -> dict[str, str]:
    """A row of the couplings table as text."""

    def number(value: float | None, form: str = ".4g") -> str:
        return "-" if value is None or math.isnan(value) else f"{value:{form}}".replace("%", " %")

    def percent(value: float | None) -> str:
        return number(value, "+.1%")

    return {
        "name": visible(shortened(str(coupling.name))),
        "observed": number(coupling.observed),
        "random": number(coupling.random),
        "lift": percent(coupling.lift),
        "interval": "-" if math.isnan(coupling.low) else f"{percent(coupling.low)} … {percent(coupling.high)}",
        "p_value": number(coupling.p_value, ".2g"),
        "count": str(coupling.count),
        "reason": coupling.reason,
    }


def _facts(summary: dict[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """The sections of the summary as (title, [(key, value)]) for the last part of the page."""
    sections = {
        "Model": summary["model"],
        "Settings": summary["settings"],
        "Versions": summary["versions"],
        "Time": {key: f"{value:.1f} s" for key, value in summary["timings_seconds"].items()},
        "Near-ties": {
            key: value if isinstance(value, int) else f"{value:.3g}"
            for key, value in summary.get("near_ties", {}).items()
        },
        "Peak memory": {key: f"{value / 2**20:.0f} MiB" for key, value in summary["peak_memory_bytes"].items()},
    }
    return [
        (title, [(template.fact(key.replace("_", " ")), template.fact(value)) for key, value in section.items()])
        for title, section in sections.items()
        if section
    ]
