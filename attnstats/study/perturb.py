"""The perturbation test: other tokens at high- and at low-FAI positions, and how much of the text after them stays.

Tokens that later ones keep looking at should be those that decide what is written (Eq. 11, Table 1). `perturb` forces
each of the likeliest tokens at chosen positions of one response, continues greedily, all in one batch, and compares
the content words. `summarise` is over the responses of a corpus. Called by commands/couplings.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from attnstats.rhythm import Chance, top
from attnstats.study.generation import end_tokens, generate
from attnstats.study.models import LoadedModel

# Words of English that carry no content; what else a text has are content words, numbers among them.
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
    """What is perturbed.

    Attributes:
        positions: how many positions of highest, and of lowest FAI per response.
        candidates: how many tokens are forced at each: the likeliest there, the one written among them or not.
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


class Choice(NamedTuple):
    """Positions in the response, highest FAI first and lowest FAI first."""

    high: list[int]
    low: list[int]


def choose(fai: Tensor, valid: Tensor, settings: Perturbation) -> Choice | None:
    """The positions of highest and of lowest FAI; None where a response has too few to tell them apart.

    Only positions that are valid, with `settings.tokens` response tokens after them. Ties go to the lower index.

    Args:
        fai, valid: (R,), of the response's tokens.

    Example:
        >>> import torch
        >>> fai = torch.tensor([0.0, 0.1, 0.5, 0.2, 0.3, 0.9])
        >>> choose(fai, torch.ones(6, dtype=torch.bool), Perturbation(positions=2, tokens=1))
        Choice(high=[2, 4], low=[0, 1])
    """
    allowed = valid & (torch.arange(len(fai), device=fai.device) < len(fai) - settings.tokens)
    if int(allowed.sum()) < 2 * settings.positions:
        return None
    return Choice(top(fai, settings.positions, allowed), top(-fai, settings.positions, allowed))


def content_words(text: str) -> frozenset[str]:
    """The words and numbers of a text in lower case, without stop words.

    Example:
        >>> sorted(content_words("She sold 48 rolls; don't add the 1,200 that she'd not sold."))
        ['1,200', '48', 'add', "don't", 'rolls', "she'd", 'sold']
    """
    return frozenset(_WORD.findall(text.lower())) - STOP_WORDS


def overlap(one: str, other: str) -> float:
    """Jaccard overlap of the content words of two texts (Eq. 11): 1 where neither has any, 0 where one has none.

    Example:
        >>> overlap("She sold 48 rolls.", "48 rolls were left")
        0.5
    """
    a, b = content_words(one), content_words(other)
    return len(a & b) / len(a | b) if a | b else 1.0


class Overlaps(NamedTuple):
    """Overlaps of one response, (positions, candidates) float64 each, and where the candidate is the token written.

    One more candidate than was asked for stands at a position whose likeliest tokens have the one written among them,
    so that it can be left out; NaN where there is none. Likeliest first.
    """

    high: Tensor
    low: Tensor
    high_written: Tensor
    low_written: Tensor


def perturb(
    loaded: LoadedModel, prompt: list[int], response: list[int], choice: Choice, settings: Perturbation
) -> Overlaps:
    """Force the likeliest tokens at each chosen position and compare what follows with what was written.

    Both texts begin right after the position and are of `settings.tokens` tokens, fewer where an end token comes
    before. All continuations run in one batch, behind one pass over the prompt and the response.
    """
    ids = prompt + response
    positions = [len(prompt) + i for i in (*choice.high, *choice.low)]
    cache, logits = _read(loaded, ids, positions)
    forced: list[tuple[int, int]] = []  # position, token
    for position, row in zip(positions, logits, strict=True):
        likeliest = row.argsort(descending=True, stable=True)[: settings.candidates + 1].tolist()
        among = ids[position] in likeliest[: settings.candidates]
        forced += [(position, token) for token in likeliest[: settings.candidates + among]]
    texts = _continuations(loaded, ids, forced, cache, settings.tokens)
    found = torch.full((len(positions), settings.candidates + 1), torch.nan, dtype=torch.float64)
    written = torch.zeros(found.shape, dtype=torch.bool)
    column = dict.fromkeys(positions, 0)
    for (position, token), text in zip(forced, texts, strict=True):
        original = _decode(loaded, ids[position + 1 : position + 1 + settings.tokens])
        place = positions.index(position), column[position]
        found[place] = overlap(text, original)
        written[place] = token == ids[position]
        column[position] += 1
    count = len(choice.high)
    return Overlaps(found[:count], found[count:], written[:count], written[count:])


def _read(loaded: LoadedModel, ids: list[int], positions: list[int]) -> tuple[tuple[str, Any], Tensor]:
    """The cache of all before the last position, by the name transformers has for it, and logits at each position."""
    rows = torch.tensor(positions, device=loaded.device) - 1
    with torch.no_grad():
        output = loaded.model(
            input_ids=torch.tensor([ids[: max(positions)]], device=loaded.device), use_cache=True, logits_to_keep=rows
        )
    name = next((name for name in ("cache", "past_key_values") if getattr(output, name, None) is not None), "")
    return (name, getattr(output, name, None)), output.logits[0].float()


def _continuations(
    loaded: LoadedModel, ids: list[int], forced: list[tuple[int, int]], cache: tuple[str, Any], tokens: int
) -> list[str]:
    """The text that the model writes greedily after each forced token."""
    name, kept = cache
    layers = getattr(kept, "layers", None)
    behind: dict[str, Any] = {}
    # A cache that can't be cut back to a position is left: every row is then read anew.
    if layers is not None and all(type(layer).__name__ == "DynamicLayer" for layer in layers):
        lengths = [position for position, _ in forced]
        for layer in layers:
            layer.keys, layer.values = (_rows(each, lengths) for each in (layer.keys, layer.values))
        behind = {name: kept}
    prompts = [[*ids[:position], token] for position, token in forced]
    ends = end_tokens(loaded)
    return [_decode(loaded, _until(row, ends)) for row in generate(loaded, prompts, max_tokens=tokens, **behind)]


def _rows(cached: Tensor, lengths: list[int]) -> Tensor:
    """The first so many positions of a cache's one row for each row, moved to the right end; zeros before them."""
    rows = cached.new_zeros(len(lengths), cached.shape[1], max(lengths), cached.shape[3])
    for row, length in zip(rows, lengths, strict=True):
        row[:, rows.shape[2] - length :] = cached[0, :, :length]
    return rows


def _until(ids: list[int], ends: set[int]) -> list[int]:
    return next((ids[:index] for index, token in enumerate(ids) if token in ends), ids)


def _decode(loaded: LoadedModel, ids: list[int]) -> str:
    return str(loaded.tokenizer.decode(ids, skip_special_tokens=True))


@dataclass(frozen=True)
class Table1:
    """The perturbation test over a corpus: a trial is a response.

    Attributes:
        high, low: mean overlap after high- and after low-FAI positions, over trials; in the paper 0.534 and 0.631.
        lower: share of the trials whose overlap is lower at high-FAI positions; in the paper 0.8714, 61 of 70.
        p_value: share of sign flips of the trials' differences that reach the mean of `low - high`: one-sided.
        difference_low, difference_high: 95 % bootstrap interval of `low - high`.
        count: trials.
    """

    high: float
    low: float
    lower: float
    p_value: float
    difference_low: float
    difference_high: float
    count: int


def summarise(trials: Sequence[Overlaps], chance: Chance, written: bool = True) -> Table1:
    """Table 1 of a corpus.

    Args:
        written: the token that was written is among the candidates where it is one of the likeliest (Eq. 11); False:
            it never is, and the next in order takes its place.
    """
    pairs = [
        (_mean(t.high, t.high_written, written), _mean(t.low, t.low_written, written)) for t in trials
    ]  # of a position's candidates first, all positions alike
    if not pairs:
        return Table1(math.nan, math.nan, math.nan, math.nan, math.nan, math.nan, 0)
    high, low = np.array(pairs).T
    difference = low - high
    rng = np.random.default_rng(chance.seed)
    signs = rng.choice([-1.0, 1.0], size=(chance.permutations, len(pairs)))
    reached = int((signs @ difference >= difference.sum() - 1e-9).sum())
    resampled = difference[rng.integers(len(pairs), size=(chance.resamples, len(pairs)))].mean(1)
    least, most = np.quantile(resampled, [0.025, 0.975])
    return Table1(
        high=float(high.mean()),
        low=float(low.mean()),
        lower=float((high < low).mean()),
        p_value=(1 + reached) / (1 + chance.permutations),
        difference_low=float(least),
        difference_high=float(most),
        count=len(pairs),
    )


def _mean(overlaps: Tensor, is_written: Tensor, written: bool) -> float:
    """Mean over the positions of the mean over their candidates."""
    candidates = overlaps.shape[1] - 1
    means = []
    for row, flags in zip(overlaps, is_written, strict=True):
        kept = row[:candidates] if written else row[~flags][:candidates]
        means.append(kept[~kept.isnan()].mean().item())
    return sum(means) / len(means)
