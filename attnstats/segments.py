"""Sentences of a response as segments of its tokens, and how they attend to each other.

A segment is a run of tokens; a splitter of one's own may make steps, lines or clauses of a text instead of sentences.
`attention` sums A over pairs of segments (PooledMap) in one forward pass, T x T never held; heads.segment_received and
HeadProfile find receiver heads in it, as thought anchors are found (Bogdan et al., arXiv 2506.19143).
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from attnstats.heads import HeadProfile, segment_received
from attnstats.statistics import MeanDistance, PooledMap
from attnstats.transformers.capture import capture
from attnstats.transformers.selection import Layers

Splitter = Callable[[str], Sequence[str]]

# A sentence ends with . ! ? or their like, with what closes a quotation or bracket behind it, before a space or the
# end; and at a line break. Not after the number of a list item, an initial or one of these abbreviations.
_CLOSING = "\"')\\]\u201d\u2019\u300d\uff09"
_WIDE = "\u3002\uff01\uff1f"  # the full stop, exclamation and question mark of Chinese and Japanese
_END = re.compile(rf"(?:(?<![.!?\u2026])[.!?\u2026]+[{_CLOSING}]*(?=\s|$)|[{_WIDE}]+[{_CLOSING}]*|\n)\s*")
LONGEST_ABBREVIATION = 12
_NO_END = re.compile(
    r"^\s*\d+\.$|(?:^|[\s(])(?:[A-HJ-Z]|e\.g|i\.e|etc|vs|cf|approx|Mr|Mrs|Ms|Dr|Prof|St|No|Fig|Eq|Sec)\.$"
)


def sentences(text: str) -> list[str]:
    """The sentences of a text, each with the blanks behind it; joined, they are the text.

    Example:
        >>> sentences("Dr. Wu has 3.5 kg. How much is left?\\n1. Add it up.")
        ['Dr. Wu has 3.5 kg. ', 'How much is left?\\n', '1. Add it up.']
    """
    found, start = [], 0
    for end in _END.finditer(text):
        if "\n" not in end.group():
            tail = text[max(start, end.start() - LONGEST_ABBREVIATION) : end.end()].rstrip()
            # What was cut off before it must not look like the start of a line.
            cut = "x" if end.start() - LONGEST_ABBREVIATION > start else ""
            if _NO_END.search(cut + tail):
                continue
        if text[start : end.end()].strip():
            found.append(text[start : end.end()])
            start = end.end()
    if text[start:].strip() or not found:
        return [*found, text[start:]] if text[start:] else found
    return [*found[:-1], found[-1] + text[start:]]


def boundaries(tokens: Sequence[str], split: Splitter = sentences, start: int = 0) -> tuple[int, ...]:
    """Where the segments of a text begin, in tokens, with the number of tokens at the end.

    A token belongs to the segment that its first character that isn't blank is in; a blank one to the segment of its
    first character. Segments without a token of their own vanish.

    Args:
        tokens: the text that each token adds (analyze.pieces); empty ones belong to what is before them.
        split: a text to its parts, which joined are the text again.
        start: first token of the response; what is before it is one segment, and only what follows is split.

    Raises:
        ValueError: no tokens, `start` outside them, or parts that don't make up the text.

    Example:
        >>> boundaries(["So", " 2", ".", " It", " is", " so", "."])
        (0, 3, 7)
        >>> boundaries(["How", "?", " One", ".", " Two", "."], start=2)
        (0, 2, 4, 6)
    """
    if not 0 <= start < len(tokens):
        raise ValueError(f"start must be a token's number, 0 to {len(tokens) - 1}, got {start}")
    text = "".join(tokens[start:])
    parts = list(split(text))
    if "".join(parts) != text:
        raise ValueError("split: its parts, joined, are not the text that it was given; let each keep its blanks")
    ends = list(accumulate(map(len, parts)))
    found = [0] if start == 0 else [0, start]
    position, current = 0, 0
    for index, token in enumerate(tokens[start:], start):
        blank = len(token) - len(token.lstrip())
        first = position + (blank if blank < len(token) else 0)
        segment = bisect_right(ends, first) if token else current
        if segment > current:
            current = segment
            if index > start:
                found.append(index)
        position += len(token)
    return (*found, len(tokens))


@dataclass(frozen=True, eq=False)
class SegmentAttention:
    """How S segments of a sequence attend to each other in each of L x H heads.

    Attributes:
        layers: numbers of the L layers.
        boundaries: S + 1 tokens.
        pooled: (L, H, S, S) float32, A summed over query segment i and key segment j.
        mean_distance: (L, H, T), the statistic MeanDistance of each row.
    """

    layers: tuple[int, ...]
    boundaries: tuple[int, ...]
    pooled: Tensor
    mean_distance: Tensor

    @property
    def sizes(self) -> Tensor:
        """(S,) tokens of each segment."""
        return torch.tensor([end - begin for begin, end in pairwise(self.boundaries)])

    def per_query(self) -> Tensor:
        """(L, H, S, S): what a token of segment i gives to segment j, a mean over its tokens; rows sum to 1."""
        return self.pooled / self.sizes[:, None]

    def per_pair(self) -> Tensor:
        """(L, H, S, S): the mean of A over all pairs of a token in i and a token in j, as thought anchors take it."""
        return self.pooled / (self.sizes[:, None] * self.sizes)

    def received(self, ignore: int = 4) -> Tensor:
        """(L, H, S) float64: heads.segment_received, NaN where no segment is far enough behind."""
        return segment_received(self.pooled, self.sizes, ignore)

    def add_to(self, profile: HeadProfile, ignore: int = 4, first: int = 0) -> HeadProfile:
        """The profile with this sequence: distances of its tokens, kurtosis of what its segments receive.

        Args:
            first: the first segment that counts: 1 leaves out the prompt that `boundaries(start=...)` put into one.
        """
        received = self.received(ignore)
        valid = received[0, 0].isfinite() & (torch.arange(len(self.sizes)) >= first)
        counted = torch.arange(self.boundaries[-1]) >= self.boundaries[first]
        return profile.add(self.mean_distance, counted, received, valid)


def attention(model: Any, ids: Tensor, boundaries: Sequence[int], layers: Layers = "all") -> SegmentAttention:
    """Attention between the segments of one sequence, in one forward pass.

    Args:
        model: a transformers model that `attnstats.capture` takes.
        ids: (1, T) int64.
        boundaries: (0, ..., T), increasing; `boundaries` makes them of a text.
        layers: as `attnstats.capture` takes them.

    Raises:
        ValueError: `ids` aren't one sequence, or the boundaries don't fit it.
    """
    if ids.dim() != 2 or len(ids) != 1:
        raise ValueError(f"ids must be (1, T), one sequence, got {tuple(ids.shape)}")
    pooled, distance = PooledMap(tuple(boundaries), tuple(boundaries)), MeanDistance()
    pooled.boundaries(ids.shape[1], ids.shape[1])
    with (
        torch.no_grad(),
        capture(model, statistics=[pooled, distance], layers=layers, stop_after_last_layer=True) as run,
    ):
        run.forward(input_ids=ids, use_cache=False)
    return SegmentAttention(
        layers=run.layers,
        boundaries=tuple(boundaries),
        pooled=run[pooled][:, 0].float().cpu(),
        mean_distance=run[distance][:, 0].float().cpu(),
    )
