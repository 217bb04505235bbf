"""report.html: one file that shows where a response looks far back (WAAD) and what it keeps looking at (FAI).

Self-contained, without scripts, and under a content security policy that allows its one style sheet and nothing
else: token text is untrusted. `render` turns analyses into the values that report.html.jinja lays out; charts.py
draws the curves. Called by cli.py.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnstats.analyze import Analysis, Settings
from attnstats.report.charts import Curve, draw
from attnstats.rhythm import Coupling
from attnstats.text import PART, visible

# Upper ends of the shades, as shares of the response's tokens: half of them stay white, so that peaks stand out.
SHADES = (0.50, 0.65, 0.78, 0.88, 0.95, 0.985)
# What keeps the file below 20 MB: a token takes about 700 bytes, a head 120.
MAX_TOKENS, MAX_HEADS, MAX_CHARACTERS = 20_000, 20_000, 20_000
LISTED = 6
CONTEXT = 5


def render(
    analyses: Sequence[Analysis], settings: Settings, summary: dict[str, Any], couplings: Sequence[Coupling] = ()
) -> str:
    """The report as HTML. Parts that would make it too large are left out, and it says so."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    style = (Path(__file__).parent / "report.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    environment = Environment(
        loader=PackageLoader("attnstats.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    shown, left_out = _within_limits(analyses)
    return environment.get_template("report.html.jinja").render(
        style=style,
        policy=f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'",
        prompts=[_prompt(number, analysis, limit, settings) for number, (analysis, limit) in enumerate(shown, 1)],
        left_out=left_out,
        settings=settings,
        horizon=_horizon(settings),
        facts=_facts(summary),
        model=visible(str(summary["model"]["name"])),
    )


def _within_limits(analyses: Sequence[Analysis]) -> tuple[list[tuple[Analysis, int]], list[str]]:
    """The analyses to show, each with the number of its response's tokens to show, and what that leaves out."""
    shown: list[tuple[Analysis, int]] = []
    tokens, cells = MAX_TOKENS, MAX_HEADS
    for analysis in analyses:
        if tokens <= 0 or cells < analysis.distance.numel():
            break
        limit = min(tokens, int(analysis.response.sum()))
        shown.append((analysis, limit))
        tokens -= limit
        cells -= analysis.distance.numel()
    left_out = [
        f"The response to prompt {number} is shown up to its token {limit} of {int(analysis.response.sum())}."
        for number, (analysis, limit) in enumerate(shown, 1)
        if limit < int(analysis.response.sum())
    ]
    if len(shown) < len(analyses):
        left_out.append(f"Prompts {len(shown) + 1} to {len(analyses)} are left out.")
    return shown, left_out


def _prompt(number: int, analysis: Analysis, limit: int, settings: Settings) -> dict[str, Any]:
    start = analysis.response_start
    shown = slice(start, start + limit)
    texts = [visible(text, newline="↵", tab="⇥") or PART for text in analysis.tokens[shown]]
    fai_valid = analysis.fai_valid[shown]
    waad = Curve("waad", "WAAD", "tokens", analysis.waad[shown], torch.ones(limit, dtype=torch.bool))
    fai = Curve("fai", "FAI", "% of attention", analysis.fai[shown] * 100, fai_valid)
    entropy = [f"{value:.2f}" if value == value else "unknown" for value in analysis.entropy[shown].tolist()]
    notes = [
        f"token {i + 1}: {text}\nWAAD {w:.2f} tokens\nFAI {f'{f:.3f} %' if ok else 'undefined'}\nentropy {e} nats"
        for i, (text, w, f, ok, e) in enumerate(
            zip(texts, waad.values.tolist(), fai.values.tolist(), fai_valid.tolist(), entropy, strict=True)
        )
    ]
    breaks = ["\n" * text.count("\n") for text in analysis.tokens[shown]]
    question = analysis.question
    cut = question[:MAX_CHARACTERS] + ("…" if len(question) > MAX_CHARACTERS else "")
    return {
        "number": number,
        "question": visible(cut),
        "length": int(analysis.response.sum()),
        "blocks": [_block(curve, texts, breaks, notes) for curve in (waad, fai)],
        "chart": draw((waad, fai), texts, notes, no_future=_no_future(settings)),
        "lists": [_list(curve, texts) for curve in (waad, fai)],
        "heads": _heads(analysis),
        "local": int(analysis.classes.local.sum()),
        "global": int(analysis.classes.global_.sum()),
        "total": analysis.distance.numel(),
    }


def _block(curve: Curve, texts: list[str], breaks: list[str], notes: list[str]) -> dict[str, Any]:
    """The response with one curve as the shade behind each token, and the legend of its shades."""
    limits = shade_limits(curve.values[curve.valid])
    shades = torch.bucketize(curve.values, torch.tensor(limits), right=False) * curve.valid
    tokens = zip(texts, breaks, notes, shades.tolist(), curve.valid.tolist(), strict=True)
    return {
        "curve": curve,
        "tokens": [
            {"text": text, "breaks": line, "note": note, "shade": shade, "valid": ok}
            for text, line, note, shade, ok in tokens
        ],
        "legend": [f"≤ {_short(limits[0])}", *(f"> {_short(limit)}" for limit in limits)],
    }


def shade_limits(values: Tensor) -> list[float]:
    """The values at which a token's shade becomes one darker: quantiles of the response's valid values."""
    if not len(values):
        return [0.0] * len(SHADES)
    return torch.quantile(values.double(), torch.tensor(SHADES, dtype=torch.float64)).tolist()


def _list(curve: Curve, texts: list[str]) -> dict[str, Any]:
    """The tokens where the curve is highest, each in its context."""
    return {
        "curve": curve,
        "items": [
            {
                "before": "".join(texts[max(0, i - CONTEXT) : i]),
                "token": texts[i],
                "after": "".join(texts[i + 1 : i + 1 + CONTEXT]),
                "index": i + 1,
                "value": _short(float(curve.values[i])),
            }
            for i in curve.top(LISTED)
        ],
    }


def _heads(analysis: Analysis) -> list[dict[str, Any]]:
    return [
        {
            "layer": layer,
            "cells": [
                {"distance": f"{value:.0f}", "name": analysis.classes.name(row, head)}
                for head, value in enumerate(analysis.distance[row].tolist())
            ],
        }
        for row, layer in enumerate(analysis.layers)
    ]


def _facts(summary: dict[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """The summary's small sections as (title, [(key, value)]) for the last part of the page."""
    peak = {key: f"{value / 2**20:.0f} MiB" for key, value in summary["peak_memory_bytes"].items()}
    seconds = {key: f"{value:.1f} s" for key, value in summary["timings_seconds"].items()}
    sections = {
        "Model": summary["model"],
        "Settings": summary["settings"],
        "Versions": summary["versions"],
        "Time": seconds,
        "Peak memory": peak,
    }
    return [
        (title, [(key.replace("_", " "), visible(_value(value))) for key, value in section.items()])
        for title, section in sections.items()
    ]


def _value(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "open" if value is None else str(value)


def _horizon(settings: Settings) -> str:
    if settings.fai_hi is None:
        return f"{settings.fai_lo} tokens or more"
    return f"{settings.fai_lo} to {settings.fai_hi} tokens"


def _no_future(settings: Settings) -> str:
    return f"shaded: no token of the response is {settings.fai_lo} or more further on" if settings.fai_lo else ""


def _short(value: float) -> str:
    return f"{value:.2f}" if abs(value) >= 0.1 else f"{value:.3f}"
