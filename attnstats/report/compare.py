"""The page of two runs: responses to the same prompts side by side, linked token by token, and what differs.

Prompts are the same where their questions are. Tokens are linked where the responses have the same text, and a value's
difference is taken at linked tokens alone. Scales are common to both runs, so that equal shades are equal values.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import accumulate
from typing import Any

import torch

from attnstats.errors import InputError
from attnstats.heads import HeadProfile
from attnstats.report import data, template
from attnstats.report.columns import COLUMNS
from attnstats.report.marks import marks
from attnstats.report.scale import SHADES, Domain
from attnstats.study.analysis import Analysis, Settings
from attnstats.study.text import shortened, token_text, visible

SCRIPTS = ("page.js", "index.js", "compare.js")
CHANGED = 10  # heads whose distance changes most, that are named
EXHAUSTIVE = 25_000_000  # pairs of tokens up to which every token may start a common run of tokens


@dataclass(frozen=True)
class ComparedRun:
    """A finished run to compare.

    Attributes:
        folder: where it lies, as the user named it.
        questions: of all its prompts.
        analyses: one per question, read when asked for.
        profile: of its heads, over all responses.
    """

    folder: str
    questions: Sequence[str]
    analyses: Sequence[Analysis]
    settings: Settings
    summary: dict[str, Any]
    profile: HeadProfile

    @property
    def model(self) -> str:
        return visible(shortened(str(self.summary["model"]["name"])))


def render(first: ComparedRun, second: ComparedRun) -> str:
    """The page of two runs as HTML.

    Raises:
        InputError: no prompt is in both.
    """
    both = pairs(first, second)
    cards, texts, left_out = _fit(first, second, both)
    runs = (first, second)
    page = {
        "columns": data.columns(first.settings),
        "shades": SHADES,
        "total": len(both),
        "cards": cards,
        "heads": heads(first.profile, second.profile, first.settings, second.settings),
    }
    return template.fill(
        "compare.html.jinja",
        SCRIPTS,
        page=data.embedded(page),
        prompts=texts,
        left_out=left_out,
        total=len(both),
        runs=[
            {
                "letter": letter,
                "model": run.model,
                "folder": visible(shortened(run.folder)),
                "count": len(run.questions),
                "alone": len(run.questions) - len(both),
            }
            for letter, run in zip("AB", runs, strict=True)
        ],
        facts=facts(first, second),
        apart=[name for name in ("window", "fai_lo", "fai_hi", "layers", "head_share")
               if getattr(first.settings, name) != getattr(second.settings, name)],
    )  # fmt: skip


def pairs(first: ComparedRun, second: ComparedRun) -> list[tuple[int, int]]:
    """The indices of the same prompts in both runs, in the order of the first; one that comes twice is paired twice.

    Raises:
        InputError: there are none.
    """
    places = defaultdict(list)
    for index, question in enumerate(second.questions):
        places[question].append(index)
    both = [(i, places[question].pop(0)) for i, question in enumerate(first.questions) if places[question]]
    if not both:
        one, other = (visible(shortened(run.questions[0], 60), newline=" ") for run in (first, second))
        raise InputError(
            f"{first.folder} and {second.folder}: have no prompt in common, the first ones are “{one}” and “{other}”; "
            "name two runs of the same prompts"
        )
    return both


def _fit(
    first: ComparedRun, second: ComparedRun, both: Sequence[tuple[int, int]]
) -> tuple[list[Any], dict[int, str], list[str]]:
    """Index cards, and the JSON of as many pairs of a sample as fit data.MAX_BYTES, by number; what was left out."""
    cards: list[Any] = []
    texts: dict[int, str] = {}
    left_out: list[str] = []
    room, count = data.MAX_BYTES, len(both)
    if count > data.MAX_PROMPTS:
        left_out.append(f"All but {data.MAX_PROMPTS:,} of {count:,} prompts, which are spread evenly over them.")
    for place in data.sample(count):
        number, (i, j) = place + 1, both[place]
        values = pair(first.analyses[i], second.analyses[j])
        text = data.embedded(values)
        if len(text) > room:
            left_out.append(f"All from prompt {number} of {count} on.")
            break
        room -= len(text)
        texts[number] = text
        cards.append(_card(number, values))
        for letter, side in zip("AB", values["sides"], strict=True):
            if side["length"] > len(side["tokens"]):
                shown = f"its response in {letter} from token {len(side['tokens']) + 1} to {side['length']}"
                left_out.append(f"Prompt {number}: {shown}.")
    return cards, texts, left_out


def _card(number: int, values: dict[str, Any]) -> dict[str, Any]:
    one, two = values["sides"]
    return {
        "number": number,
        "question": values["question"][:160],
        "length": f"{one['length']} and {two['length']}",
        "one": data.spark(one["values"]["waad"]),
        "two": data.spark(two["values"]["waad"]),
    }


def pair(one: Analysis, other: Analysis) -> dict[str, Any]:
    """Both responses to a prompt: values, common scales, links of tokens, and the length of their common start."""
    sides = [_side(analysis) for analysis in (one, other)]
    kept = [analysis.tokens[analysis.response_start :][: data.MAX_TOKENS] for analysis in (one, other)]
    joined = links(*kept)
    columns = {
        column.key: column.domain(torch.cat([column.read(analysis) for analysis in (one, other)])) for column in COLUMNS
    }
    return {
        "question": visible(shortened(one.question, data.MAX_CHARACTERS)),
        "sides": sides,
        "domains": {key: data.domain(domain) for key, domain in columns.items()},
        "links": joined,
        "same": next((i for i, (a, b) in enumerate(zip(*kept, strict=False)) if a != b), min(map(len, kept))),
    }


def _side(analysis: Analysis) -> dict[str, Any]:
    start = analysis.response_start
    tokens = analysis.shown[start:][: data.MAX_TOKENS]
    marked = marks(analysis)
    return {
        "start": start,
        "length": len(analysis.tokens) - start,
        "tokens": list(map(token_text, tokens)),
        "breaks": [text.count("\n") for text in analysis.tokens[start:][: data.MAX_TOKENS]],
        "values": {c.key: data.short(c.read(analysis)[: data.MAX_TOKENS]) for c in COLUMNS},
        "preplan": marked.among(marked.preplan),
        "anchor": marked.among(marked.anchor),
    }


def links(one: Sequence[str], other: Sequence[str]) -> list[int | None]:
    """For each token of `one` the token of `other` with the same text at the same place; None: there is none.

    Of equal texts in other tokens it is the token that has the first character. Of other texts it is the token in a
    longest common run of tokens.

    Example:
        >>> links(["so", " 2", "2", "."], ["so", " 22", "."])
        [0, 1, 1, 2]
        >>> links(["so", " it", " is", "."], ["so", " is", " it", "."])
        [0, 2, None, 3]
    """
    if "".join(one) == "".join(other):
        starts = [0, *accumulate(map(len, other))][: len(other)]
        places = [0, *accumulate(map(len, one))][: len(one)]
        return list(range(len(one))) if list(one) == list(other) else [bisect_right(starts, x) - 1 for x in places]
    found: list[int | None] = [None] * len(one)
    matcher = SequenceMatcher(None, one, other, autojunk=len(one) * len(other) > EXHAUSTIVE)
    for i, j, size in matcher.get_matching_blocks():
        found[i : i + size] = range(j, j + size)
    return found


def heads(first: HeadProfile, second: HeadProfile, *settings: Settings) -> dict[str, Any]:
    """Mean distances and classes of both runs' heads over all responses, of the layers that both captured.

    `apart` says why there is nothing to compare: no layer in common, or another number of heads.
    """
    profiles = (first, second)
    layers = sorted(set(first.layers) & set(second.layers))
    counts = [profile.distance.shape[1] for profile in profiles]
    if not layers or counts[0] != counts[1]:
        described = [
            f"{letter} has {count} heads in layers {', '.join(map(str, profile.layers))}"
            for letter, profile, count in zip("AB", profiles, counts, strict=True)
        ]
        return {"apart": "; ".join(described)}
    distances, classes = [], []
    for profile, setting in zip(profiles, settings, strict=True):
        rows = [profile.layers.index(layer) for layer in layers]
        named = profile.classes(setting.head_share)
        distances.append(profile.distance[rows])
        classes.append(list(map(named.letters, layers)))
    change = (distances[1] / distances[0].clamp_min(1e-9)).clamp_min(1e-9).log2()
    largest = change.abs().flatten().argsort(descending=True, stable=True)[:CHANGED].tolist()
    return {
        "layers": layers,
        "distance": [[data.short(row) for row in distance] for distance in distances],
        "classes": classes,
        "domain": data.domain(Domain.of(torch.cat(distances).flatten(), is_log=True, pale=0.0)),
        "changed": [divmod(place, counts[0]) for place in largest],
    }


def facts(first: ComparedRun, second: ComparedRun) -> list[tuple[str, str, str, bool]]:
    """Rows of model, settings and versions: the name, the value in both runs, and whether they differ."""
    rows = []
    for section in ("model", "settings", "versions"):
        one, other = (run.summary[section] for run in (first, second))
        for key in dict.fromkeys([*one, *other]):
            name = f"{key} of {section}" if key == "name" else key.replace("_", " ")
            before, after = template.fact(one.get(key, "-")), template.fact(other.get(key, "-"))
            rows.append((template.fact(name), before, after, before != after))
    return rows
