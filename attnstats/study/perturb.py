"""The perturbation test: replace tokens at positions of high and of low FAI, and compare the text that follows.

Anchors should decide what is written after them (Eq. 11, Table 1). `perturb` forces each of the likeliest tokens at
chosen positions of one response, continues greedily, all in one batch, and compares the content words with those of the
response. `summarise` is over the responses of a corpus.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from attnstats.chance import FEWEST, Chance, Groups, too_few
from attnstats.rhythm import top
from attnstats.study.generation import Sampling, end_tokens, generate, until_end
from attnstats.study.models import LoadedModel

# English words without content; all other words, and numbers, are content words.
_STOP_WORDS = """
a about after all also am an and any are as at be been before being both but by can could did do does doing down each
for from further had has have having he her here hers him his how i if in into is it its itself just let let's may me
more most my no nor not now of off on once only or other our ours out over own same she should so some such than that
that's the their theirs them then there there's these they this those through to too under until up us very was we were
what when where which while who whom whose why will with would you your yours
"""
STOP_WORDS = frozenset(_STOP_WORDS.split())
_WORD = re.compile(r"\w+(?:['\u2019.,]\w+)*")


@dataclass(frozen=True)
class Perturbation:
    """Settings of the perturbation test.

    Attributes:
        positions: number of positions of highest, and of lowest FAI per response.
        candidates: number of likeliest tokens forced at each; the token that was written can be one of them.
        tokens: length of the texts that are compared; a position needs as many response tokens after it.
    """

    positions: int = 3
    candidates: int = 3
    tokens: int = 64

    def __post_init__(self) -> None:
        for name in ("positions", "candidates", "tokens"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {value!r}")


class Positions(NamedTuple):
    """Positions in the response of high FAI, highest first, and of low FAI, lowest first."""

    high: list[int]
    low: list[int]


def choose_positions(fai: Tensor, valid: Tensor, settings: Perturbation) -> Positions | None:
    """The positions of highest and of lowest FAI; None if the response has too few for both.

    Only valid positions with `settings.tokens` response tokens after them are chosen. Ties go to the lower index.

    Args:
        fai, valid: (R,), over the response's tokens.

    Example:
        >>> import torch
        >>> fai = torch.tensor([0.0, 0.1, 0.5, 0.2, 0.3, 0.9])
        >>> choose_positions(fai, torch.ones(6, dtype=torch.bool), Perturbation(positions=2, tokens=1))
        Positions(high=[2, 4], low=[0, 1])
    """
    allowed = valid & (torch.arange(len(fai), device=fai.device, dtype=torch.int64) < len(fai) - settings.tokens)
    if int(allowed.sum()) < 2 * settings.positions:
        return None
    return Positions(top(fai, settings.positions, allowed), top(-fai, settings.positions, allowed))


def content_words(text: str) -> frozenset[str]:
    """The words and numbers of a text in lower case, without stop words.

    Example:
        >>> sorted(content_words("She sold 48 rolls; don't add the 1,200 that she'd not sold."))
        ['1,200', '48', 'add', "don't", 'rolls', "she'd", 'sold']
    """
    return frozenset(_WORD.findall(text.lower())) - STOP_WORDS


def overlap(one: str, other: str) -> float:
    """Jaccard overlap of the content words of two texts (Eq. 11): 1 if neither has any, 0 if only one has.

    Example:
        >>> overlap("She sold 48 rolls.", "48 rolls were left")
        0.5
    """
    a, b = content_words(one), content_words(other)
    return len(a & b) / len(a | b) if a | b else 1.0


class Overlaps(NamedTuple):
    """Overlaps of one response, and True where the candidate was the token written: (positions, candidates + 1) each.

    Candidates are in order of likelihood. The last column has a value where the token that was written is among the
    others, so that it can be left out, and is NaN elsewhere.
    """

    high: Tensor
    low: Tensor
    high_written: Tensor
    low_written: Tensor


def perturb(
    loaded: LoadedModel, prompt: list[int], response: list[int], chosen: Positions, settings: Perturbation
) -> Overlaps:
    """Force the likeliest tokens at each chosen position and compare the text that follows with the response.

    Both texts begin right after the position and have `settings.tokens` tokens, fewer if an end token comes before. All
    continuations run in one batch, after one pass over the prompt and the response.
    """
    ids = prompt + response
    positions = [len(prompt) + i for i in (*chosen.high, *chosen.low)]
    cache, logits = _read(loaded, ids, positions)
    forced: list[tuple[int, int]] = []  # position, token
    for position, row in zip(positions, logits, strict=True):
        likeliest = row.argsort(descending=True, stable=True)[: settings.candidates + 1].tolist()
        has_written = ids[position] in likeliest[: settings.candidates]
        forced += [(position, token) for token in likeliest[: settings.candidates + has_written]]
    texts = _continuations(loaded, ids, forced, cache, settings.tokens)
    overlaps = torch.full((len(positions), settings.candidates + 1), torch.nan, dtype=torch.float64, device="cpu")
    written = torch.zeros(overlaps.shape, dtype=torch.bool, device="cpu")
    column = dict.fromkeys(positions, 0)
    for (position, token), text in zip(forced, texts, strict=True):
        original = _decode(loaded, ids[position + 1 : position + 1 + settings.tokens])
        place = positions.index(position), column[position]
        overlaps[place] = overlap(text, original)
        written[place] = token == ids[position]
        column[position] += 1
    count = len(chosen.high)
    return Overlaps(overlaps[:count], overlaps[count:], written[:count], written[count:])


def _read(loaded: LoadedModel, ids: list[int], positions: list[int]) -> tuple[dict[str, Any], Tensor]:
    """The cache of all tokens before the last position, by transformers' name for it, and logits at each position."""
    rows = torch.tensor(positions, device=loaded.device, dtype=torch.int64) - 1
    with torch.no_grad():
        output = loaded.model(
            input_ids=torch.tensor([ids[: max(positions)]], device=loaded.device, dtype=torch.int64),
            use_cache=True,
            logits_to_keep=rows,
        )
    caches = {name: getattr(output, name, None) for name in ("cache", "past_key_values")}
    name = next((name for name, cache in caches.items() if cache is not None), None)
    return {name: caches[name]} if name else {}, output.logits[0].float()


def _continuations(
    loaded: LoadedModel, ids: list[int], forced: list[tuple[int, int]], cache: dict[str, Any], tokens: int
) -> list[str]:
    """The text that the model writes greedily after each forced token."""
    layers = [layer for kept in cache.values() for layer in getattr(kept, "layers", [None])]
    if any(type(layer).__name__ != "DynamicLayer" for layer in layers):
        cache = {}  # it can't be cut back to a position, so every row is read anew
    else:
        lengths = [position for position, _ in forced]
        for layer in layers:
            layer.keys, layer.values = (_rows(tensor, lengths) for tensor in (layer.keys, layer.values))
    prompts = [[*ids[:position], token] for position, token in forced]
    ends = end_tokens(loaded)
    return [_decode(loaded, until_end(row, ends)) for row in generate(loaded, prompts, Sampling(tokens), **cache)]


def _rows(cached: Tensor, lengths: list[int]) -> Tensor:
    """A row for each length, with so many first positions of the cache's only row at its right end, after zeros."""
    rows = cached.new_zeros(len(lengths), cached.shape[1], max(lengths), cached.shape[3])
    for row, length in zip(rows, lengths, strict=True):
        row[:, rows.shape[2] - length :] = cached[0, :, :length]
    return rows


def _decode(loaded: LoadedModel, ids: list[int]) -> str:
    return str(loaded.tokenizer.decode(ids, skip_special_tokens=True))


@dataclass(frozen=True)
class OverlapTest:
    """The perturbation test over a corpus (Table 1): a trial is a response. The defaults are those of no trial.

    Attributes:
        high, low: mean overlap after high- and after low-FAI positions, over trials; in the paper 0.534 and 0.631.
        lower: share of the trials whose overlap is lower after high-FAI positions; in the paper 0.8714, 61 of 70.
        p_value: share of sign flips of the differences whose mean is at least that of `low - high`: one-sided.
        difference_low, difference_high: 95 % bootstrap interval of `low - high`.
        count: number of trials; p_value and the interval are NaN if they are fewer than rhythm.FEWEST.
    """

    high: float = math.nan
    low: float = math.nan
    lower: float = math.nan
    p_value: float = math.nan
    difference_low: float = math.nan
    difference_high: float = math.nan
    count: int = 0

    @property
    def reason(self) -> str:
        """Why the test has no interval and no p; empty if it has them."""
        return too_few(self.count, "trials")


def summarise(trials: Iterable[Overlaps], chance: Chance, written: bool = True) -> OverlapTest:
    """The perturbation test over the responses of a corpus.

    Args:
        written: keep the token that was written where it is one of the likeliest (Eq. 11); False: leave it out, and the
            next likeliest takes its place.
    """
    sums = Groups(5)  # per trial: overlap after high and low, their difference, whether high is lower, and 1
    for t in trials:
        high, low = _mean(t.high, t.high_written, written), _mean(t.low, t.low_written, written)
        sums.add(high, low, low - high, high < low, 1)
    if not sums.count:
        return OverlapTest()
    high, low, difference, lower, count = sums.rows.sum(0).tolist()
    means = OverlapTest(high / count, low / count, lower / count, count=sums.count)
    if sums.count < FEWEST:
        return means
    rng = np.random.default_rng(chance.seed)
    signs = rng.choice([-1.0, 1.0], size=(chance.permutations, len(sums.rows)))
    reached = int((signs @ sums.rows[:, 2] >= difference - 1e-9).sum())
    resampled = sums.resampled(chance.resamples, rng)
    least, most = np.quantile(resampled[2] / resampled[4], [0.025, 0.975])
    p_value = (1 + reached) / (1 + chance.permutations)
    return replace(means, p_value=p_value, difference_low=float(least), difference_high=float(most))


def _mean(overlaps: Tensor, is_written: Tensor, written: bool) -> float:
    """Mean over the positions of the mean over their candidates."""
    candidates = overlaps.shape[1] - 1
    means = []
    for row, flags in zip(overlaps, is_written, strict=True):
        kept = row[:candidates] if written else row[~flags][:candidates]
        means.append(kept[~kept.isnan()].mean().item())
    return sum(means) / len(means)
