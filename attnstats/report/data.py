"""The data of the page: analyses as plain values, quantised where a picture needs no more, within a size budget.

Attention is a byte, logarithmic from 1e-5 to 1 in steps of 4.6 %; other values have four digits. Token text is made
visible here. `embedded` writes a value so that an HTML parser finds no markup in it.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnstats.cells import highest_of_stretches
from attnstats.report.columns import COLUMNS
from attnstats.report.marks import marks
from attnstats.report.scale import Domain
from attnstats.study.analysis import Analysis, Settings
from attnstats.study.maps import Maps, question_tokens
from attnstats.study.text import LONGEST, shortened, token_text, visible

MAX_BYTES = 19 * 2**20  # of all data, so that a page is below 20 MB
MAX_TOKENS, MAX_HEADS, MAX_CHARACTERS = 10_000, 20_000, 20_000  # of a response, of a prompt, of a question
WITHOUT_SCRIPT = 20_000  # tokens that the page shows without scripts
MAX_PROMPTS = 200
SPARK_POINTS = 80
PROMPT_PARTS = ("first token", "around the question", "rest of the prompt", "question")  # in the order of bands
FLOOR, CODES = 1e-5, 254  # the least attention that is distinguished from 0; steps from there to 1


@dataclass(frozen=True)
class Shown:
    """The data of each prompt on the page, and the parts that were left out.

    Attributes:
        prompts, maps: JSON by the prompt's number; None where maps are left out, nothing where there are none.
        cards: entries of the index. plain: responses for browsers without scripts, of the first prompts.
        left_out: sentences.
    """

    prompts: dict[int, str]
    maps: dict[int, str | None]
    cards: list[dict[str, Any]]
    plain: list[dict[str, Any]]
    left_out: list[str]


def sample(count: int) -> list[int]:
    """The indices of the prompts to show: all, or MAX_PROMPTS of them, spread evenly over `count`."""
    shown = min(count, MAX_PROMPTS)
    return [i * count // shown for i in range(shown)]


def fit(analyses: Sequence[Analysis]) -> Shown:
    """As many analyses of a sample, in order, as fit MAX_BYTES, and the maps of as many as fit beside them.

    They are read one at a time.
    """
    count = len(analyses)
    shown = Shown({}, {}, [], [], [])
    if count > MAX_PROMPTS:
        shown.left_out.append(f"All but {MAX_PROMPTS:,} of {count:,} prompts, which are spread evenly over them.")
    room, room_without_script = MAX_BYTES, WITHOUT_SCRIPT
    for number, analysis in ((i + 1, analyses[i]) for i in sample(count)):
        data = prompt(analysis)
        text = embedded(data)
        if len(text) > room:
            shown.left_out.append(f"All from prompt {number} of {count} on.")
            break
        room -= len(text)
        shown.prompts[number] = text
        shown.cards.append(card(number, data))
        if room_without_script > 0:
            shown.plain.append(plain(number, data))
            room_without_script -= len(data["breaks"])
        cut = sum(len(token) > LONGEST for token in analysis.shown)
        if cut:
            tokens = "token" if cut == 1 else "tokens"
            shown.left_out.append(f"Prompt {number}: the text of {cut} {tokens} after {LONGEST} characters.")
        length, kept = int(analysis.response.sum()), len(data["breaks"])
        if kept < length:
            shown.left_out.append(f"Prompt {number}: its response from token {kept + 1} to {length}.")
        if not data["heads"]:
            shown.left_out.append(f"Prompt {number}: its {analysis.distance.numel()} heads.")
        if analysis.maps is not None:
            shown.maps[number] = embedded(maps(analysis, analysis.maps))
        _drop_maps(shown.maps, room)
    without = [number for number, text in shown.maps.items() if text is None]
    if without:
        shown.left_out.append(f"The maps of {len(without)} of the prompts, the first of them prompt {without[0]}.")
    return shown


def _drop_maps(texts: dict[int, str | None], room: int) -> None:
    """Drop maps from the end until the rest fit."""
    size = sum(len(text) for text in texts.values() if text)
    for number in reversed(texts):
        if size <= room:
            break
        size -= len(texts[number] or "")
        texts[number] = None


def plain(number: int, data: dict[str, Any]) -> dict[str, Any]:
    """A response coloured by WAAD, for browsers without scripts."""
    values, domain = data["values"]["waad"], data["domains"]["waad"]
    scale = Domain(domain["low"], domain["high"], domain["log"])
    tokens = zip(data["tokens"][data["start"] :], data["breaks"], values, strict=True)
    return {
        "number": number,
        "question": data["question"],
        "tokens": [(text, "\n" * breaks, scale.shade(value)) for text, breaks, value in tokens],
    }


def columns(settings: Settings) -> list[dict[str, Any]]:
    """The columns that a page offers, with what they mean under these settings."""
    names = ("key", "title", "unit", "digits")
    return [{name: getattr(c, name) for name in names} | {"about": c.explained(settings)} for c in COLUMNS]


def prompt(analysis: Analysis) -> dict[str, Any]:
    """One prompt and its response, up to MAX_TOKENS tokens; values in the units of `columns`."""
    start = analysis.response_start
    stop = min(len(analysis.tokens), start + MAX_TOKENS)
    kept = slice(0, stop - start)
    values = {column.key: column.read(analysis) for column in COLUMNS}
    domains = {column.key: column.domain(values[column.key]) for column in COLUMNS}
    marked = marks(analysis)
    return {
        "question": visible(shortened(analysis.question, MAX_CHARACTERS)),
        "start": start,
        "tokens": list(map(token_text, analysis.shown[:stop])),
        "breaks": [text.count("\n") for text in analysis.tokens[start:stop]],
        "values": {key: short(tensor[kept]) for key, tensor in values.items()},
        "domains": {key: domain(each) for key, each in domains.items()},
        "preplan": marked.preplan[kept],
        "anchor": marked.anchor[kept],
        "intro": marked.intro[kept],
        "heads": heads(analysis) if analysis.distance.numel() <= MAX_HEADS else None,
    }


def heads(analysis: Analysis) -> dict[str, Any]:
    """The layer x head picture: mean distances in tokens, and classes by their first letter."""
    distance = analysis.distance
    return {
        "layers": list(analysis.layers),
        "distance": list(map(short, distance)),
        "classes": list(map(analysis.classes.letters, analysis.layers)),
        "domain": domain(Domain.of(distance.flatten(), is_log=True, pale=0.0)),
    }


def maps(analysis: Analysis, mean: Maps) -> dict[str, Any]:
    """Both mean maps: the segments' boundaries, and attention as bytes, row by row."""
    pooled = torch.cat([mean.local_map.flatten(), mean.global_map.flatten()])
    return {
        "rows": mean.rows.tolist(),
        "columns": mean.columns.tolist(),
        "distances": mean.local_band.shape[1],
        "local": {"map": coded(mean.local_map), "band": coded(mean.local_band)},
        "global": {"map": coded(mean.global_map), "band": coded(mean.global_band)},
        "most": _short(float(pooled.max())),
        "parts": parts(analysis, mean),
    }


def parts(analysis: Analysis, mean: Maps) -> dict[str, Any]:
    """Shares of attention on parts of prompt and response, for each sentence of the response.

    `names` are those of the prompt's parts, "" for sentences; `shares` has a number for each of `kinds`, and `pairs` a
    byte for every part.
    """
    start = analysis.response_start
    bounds = mean.parts.tolist()
    span = question_tokens(analysis.tokens[:start], analysis.question) or (start, start)
    before = [
        "first token" if bound == 0 else "question" if span[0] <= bound < span[1] else "around the question"
        for bound in bounds[:-1] if bound < start
    ]  # fmt: skip
    if "question" not in before:
        before = ["rest of the prompt" if name == "around the question" else name for name in before]
    kinds = [*dict.fromkeys(sorted(before, key=PROMPT_PARTS.index)), "answer before it", "the sentence itself"]
    sums = {}
    for name, shares in (("local", mean.local_shares), ("global", mean.global_shares)):
        rows = []
        for i, row in enumerate(shares.double()):
            own = len(before) + i
            of_prompt = [row[: len(before)][[part == kind for part in before]].sum() for kind in kinds[:-2]]
            rows.append(short(torch.stack([*of_prompt, row[len(before) : own].sum(), row[own]])))
        sums[name] = {"shares": rows, "pairs": coded(shares)}
    return {"bounds": bounds, "names": before + [""] * (len(bounds) - 1 - len(before)), "kinds": kinds, **sums}


def card(number: int, data: dict[str, Any]) -> dict[str, Any]:
    """The entry of a prompt in the index: its question, its length, and small versions of both curves."""
    return {
        "number": number,
        "question": data["question"][:160],
        "length": len(data["values"]["waad"]),
        "waad": spark(data["values"]["waad"]),
        "fai": spark(data["values"]["fai"]),
    }


def spark(values: Sequence[float | None]) -> list[int | None]:
    """At most SPARK_POINTS points of a curve, from 0 to 99: the highest value of each stretch, so that peaks stay.

    Example:
        >>> spark([3.0, 1.0, 2.0, None])
        [99, 0, 50, None]
    """
    scale = Domain.of(torch.tensor([v for v in values if v is not None], dtype=torch.float64, device="cpu"), pale=0.0)
    highest = highest_of_stretches(values, min(SPARK_POINTS, len(values)))
    return [None if value is None else round(99 * scale.share(value)) for value in highest]


def coded(attention: Tensor) -> str:
    """Attention from 0 to 1 as base64 of a byte each: 0 below FLOOR, else 1 + its place among CODES steps.

    Example:
        >>> import torch
        >>> list(base64.b64decode(coded(torch.tensor([0.0, 1e-5, 0.1, 1.0]))))
        [0, 1, 204, 255]
    """
    place = (attention.double().clamp(FLOOR, 1.0) / FLOOR).log10() / -math.log10(FLOOR)
    codes = (1 + (place * CODES).round()) * (attention >= FLOOR)
    return base64.b64encode(codes.to(torch.uint8).contiguous().numpy().tobytes()).decode()


def embedded(value: Any) -> str:
    """JSON for a `<script type="application/json">`: ASCII, without `<`, `>` and `&`, which could end the element."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def short(values: Tensor) -> list[float | None]:
    """Values with the four digits that the page needs; None for those that are not finite."""
    return [_short(value) for value in values.tolist()]


def _short(value: float) -> float | None:
    """A value with the four digits that the page needs; None if it is not finite."""
    if not math.isfinite(value):
        return None
    short = float(f"{value:.4g}")
    return int(short) if short == int(short) else short


def domain(of: Domain) -> dict[str, Any]:
    """A scale as the page reads it."""
    low, high = _short(of.low), _short(of.high)
    if low == high:  # a scale of no length has no place for a value
        low, high = of.low, of.high
    return {"low": low, "high": high, "log": of.is_log}
