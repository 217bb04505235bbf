"""Sentences of a response as segments of its tokens, and the attention between them.

A segment is a run of tokens; a splitter of one's own can make steps, lines or clauses instead of sentences. `attention`
sums A over pairs of segments (PooledMap) in one forward pass without the T x T map; heads.segment_received and
HeadProfile find receiver heads in it, as for thought anchors (Bogdan et al., arXiv 2506.19143).
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attnstats import cells
from attnstats.heads import HeadProfile, segment_received
from attnstats.statistics import MeanDistance, PooledMap
from attnstats.transformers.capture import capture
from attnstats.transformers.selection import Layers

if TYPE_CHECKING:
    from pandas import DataFrame

NAMED = 3  # segments that a repr names
Splitter = Callable[[str], Sequence[str]]

# A sentence ends with . ! ? or similar and closing quotes or brackets, before a space or the end, and at a line break;
# not after the number of a list item, an initial or one of these abbreviations.
_CLOSING = "\"')\\]\u201d\u2019\u300d\uff09"
_WIDE = "\u3002\uff01\uff1f"  # the full stop, exclamation and question mark of Chinese and Japanese
_END = re.compile(rf"(?:(?<![.!?\u2026])[.!?\u2026]+[{_CLOSING}]*(?=\s|$)|[{_WIDE}]+[{_CLOSING}]*|\n)\s*")
LONGEST_ABBREVIATION = 12
_NO_END = re.compile(
    r"^\s*\d+\.$|(?:^|[\s(])(?:[A-HJ-Z]|e\.g|i\.e|etc|vs|cf|approx|Mr|Mrs|Ms|Dr|Prof|St|No|Fig|Eq|Sec)\.$"
)


def sentences(text: str) -> list[str]:
    """The sentences of a text, each with the blanks after it; joined, they are the text.

    Example:
        >>> sentences("Dr. Wu has 3.5 kg. How much is left?\\n1. Add it up.")
        ['Dr. Wu has 3.5 kg. ', 'How much is left?\\n', '1. Add it up.']
    """
    parts, start = [], 0
    for end in _END.finditer(text):
        if "\n" not in end.group():
            tail = text[max(start, end.start() - LONGEST_ABBREVIATION) : end.end()].rstrip()
            # Where the tail does not begin the text it must not look like the start of a line.
            cut = "x" if end.start() - LONGEST_ABBREVIATION > start else ""
            if _NO_END.search(cut + tail):
                continue
        if text[start : end.end()].strip():
            parts.append(text[start : end.end()])
            start = end.end()
    if text[start:].strip() or not parts:
        return [*parts, text[start:]] if text[start:] else parts
    return [*parts[:-1], parts[-1] + text[start:]]


def boundaries(tokens: Sequence[str], split: Splitter = sentences, start: int = 0) -> tuple[int, ...]:
    """The first token of each segment of a text, then the number of tokens.

    A token belongs to the segment of its first non-blank character, a blank token to the segment of its first
    character, an empty one to the segment before it. Segments without a token of their own are dropped.

    Args:
        tokens: the text that each token adds (study.reading.pieces).
        split: splits a text into parts that are the text again when joined.
        start: first token of the response; the tokens before it are one segment, and only the rest is split.

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
    first_tokens = [0] if start == 0 else [0, start]
    position, current = 0, 0
    for index, token in enumerate(tokens[start:], start):
        blank = len(token) - len(token.lstrip())
        first = position + (blank if blank < len(token) else 0)
        segment = bisect_right(ends, first) if token else current
        if segment > current:
            current = segment
            if index > start:
                first_tokens.append(index)
        position += len(token)
    return (*first_tokens, len(tokens))


@dataclass(frozen=True, eq=False, repr=False)
class SegmentAttention:
    """Attention between the S segments of a sequence in each of L x H heads.

    Attributes:
        layers: numbers of the L layers.
        boundaries: the first token of each segment, then the number of tokens.
        pooled: (L, H, S, S) float32, A summed over query segment i and key segment j.
        mean_distance: (L, H, T), the statistic MeanDistance of each row.
    """

    layers: tuple[int, ...]
    boundaries: tuple[int, ...]
    pooled: Tensor
    mean_distance: Tensor

    @property
    def sizes(self) -> Tensor:
        """(S,) number of tokens of each segment."""
        return torch.tensor([end - begin for begin, end in pairwise(self.boundaries)], dtype=torch.int64, device="cpu")

    def per_query(self) -> Tensor:
        """(L, H, S, S): attention to segment j of a token in segment i, a mean over its tokens; rows sum to 1."""
        return self.pooled / self.sizes[:, None]

    def per_pair(self) -> Tensor:
        """(L, H, S, S): mean of A over all pairs of a token in i and a token in j, as for thought anchors."""
        return self.pooled / (self.sizes[:, None] * self.sizes)

    def received(self, ignore: int = 4) -> Tensor:
        """(L, H, S) float64: heads.segment_received, NaN where no segment is far enough after."""
        return segment_received(self.pooled, self.sizes, ignore)

    def to_frame(self, ignore: int = 4) -> DataFrame:
        """One row per layer, head and segment: its first token, its number of tokens, and what it receives."""
        import pandas

        layers, heads, count, _ = self.pooled.shape
        levels = [self.layers, range(heads), range(count)]
        index = pandas.MultiIndex.from_product(levels, names=["layer", "head", "segment"])
        columns = {
            "first_token": list(self.boundaries[:-1]) * (layers * heads),
            "tokens": self.sizes.tolist() * (layers * heads),
            "received": self.received(ignore).flatten().numpy(),
        }
        return pandas.DataFrame(columns, index)

    def __repr__(self) -> str:
        _, heads, count, _ = self.pooled.shape
        where = f"layers {', '.join(map(str, self.layers))}, {heads} heads each"
        lines = [f"SegmentAttention of {count} segments, {self.boundaries[-1]} tokens; {where}"]
        mean = self.received().flatten(0, 1).mean(0)
        order = [
            i for i in mean.nan_to_num(nan=-1.0).argsort(stable=True, descending=True).tolist() if mean[i] == mean[i]
        ]
        if order:
            named = (
                f"{i} ({mean[i]:.2g}, tokens {self.boundaries[i]} to {self.boundaries[i + 1] - 1})"
                for i in order[:NAMED]
            )
            lines.append(f"  most received per pair from segments 4 or more later: {', '.join(named)}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return cells.text(repr(self)) + cells.table(self.to_frame)

    def add_to(self, profile: HeadProfile, ignore: int = 4, first: int = 0) -> HeadProfile:
        """The profile with this sequence added: distances of its tokens, kurtosis of what its segments receive.

        Args:
            first: the first segment that counts; 1 leaves out the prompt, which `boundaries(start=...)` makes one.
        """
        received = self.received(ignore)
        valid = received[0, 0].isfinite() & (torch.arange(len(self.sizes), dtype=torch.int64, device="cpu") >= first)
        counted = torch.arange(self.boundaries[-1], dtype=torch.int64, device="cpu") >= self.boundaries[first]
        return profile.add(self.mean_distance, counted, received, valid)


def attention(model: Any, ids: Tensor, boundaries: Sequence[int], layers: Layers = "all") -> SegmentAttention:
    """Attention between the segments of one sequence, in one forward pass.

    Args:
        model: a transformers model that `attnstats.capture` takes.
        ids: (1, T) int64.
        boundaries: (0, ..., T), increasing; see `boundaries`.
        layers: the layers to read, as for `attnstats.capture`.

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
