"""Mean maps of the local and of the global heads (Eq. 8), small enough to show: pooled, and exact near the diagonal.

A T x T map is never made: it is pooled into at most 256 x 256 cells and over sentences (PooledMap), and the band of the
nearest keys is read one distance at a time, by a statistic with weight 1 at one distance that costs O(T). Only rows of
the response are read. The maps need head classes, so they take a second forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from attnstats.heads import HeadClasses
from attnstats.segments import boundaries
from attnstats.statistics import PooledMap, RowStatistic
from attnstats.transformers.capture import capture

CELLS = 256  # rows and columns of a pooled map at most, and parts of a response
BAND = 64  # distances of the exact band: 2 maps of 2,000 tokens are 1 MB


@dataclass(frozen=True)
class AtDistance(RowStatistic):
    """The attention to the key `distance` tokens back, `A[t, t - distance]`; 0 before the first token.

    `of` names the class of heads, so that one pass can record it for two classes.

    Example:
        >>> import torch
        >>> AtDistance(2).weight(torch.arange(4)).tolist()
        [False, False, True, False]
    """

    distance: int
    of: str = ""

    @property
    def parameters(self) -> tuple[int, ...]:
        return (self.distance,)

    @property
    def band(self) -> tuple[int, int]:
        return self.distance, self.distance

    def weight(self, distance: Tensor) -> Tensor:
        return distance == self.distance


@dataclass(frozen=True)
class MapOf(PooledMap):
    """A PooledMap of the class of heads that `of` names."""

    of: str = ""


@dataclass(frozen=True, eq=False)
class Maps:
    """Two mean maps of one sequence: R response tokens, I x J cells, D distances, N of M parts in the response.

    Attributes:
        rows: (I + 1,) int64, boundaries of the query segments, which cover the response.
        columns: (J + 1,) int64, boundaries of the key segments, which cover prompt and response; the start of the
            response is one.
        local_map, global_map: (I, J) float32, the attention of a query of segment i to segment j, a mean over the
            queries; a row sums to 1 (less with sinks).
        local_band, global_band: (R, D) float32, `A[t, t - d]` for tokens t of the response and d = 0, 1, ...
        parts: (M + 1,) int64, boundaries of the prompt's parts and of the response's sentences (`part_boundaries`).
        local_shares, global_shares: (N, M) float32, the attention of a query of a part of the response to each part, a
            mean over the queries; SegmentMass over the parts, averaged.
    """

    rows: Tensor
    columns: Tensor
    local_map: Tensor
    global_map: Tensor
    local_band: Tensor
    global_band: Tensor
    parts: Tensor
    local_shares: Tensor
    global_shares: Tensor


def cell_boundaries(start: int, length: int, cells: int = CELLS) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Boundaries of query and key segments of one size, at most `cells` of each, both with a boundary at `start`.

    Args:
        start: first position of the response, 0 <= start < length.
        length: number of positions of prompt and response.

    Returns:
        Boundaries of the queries from `start` to `length`, and of the keys from 0 to `length`; the first segment of
        keys and the last of both can be shorter.

    Example:
        >>> cell_boundaries(3, 9, cells=5)
        ((3, 5, 7, 9), (0, 1, 3, 5, 7, 9))
    """
    size = 1
    while -(-start // size) - (start - length) // size > cells:
        size += 1
    queries = (*range(start, length, size), length)
    before = tuple(range(start % size, start, size))
    keys = before + queries if not start or start % size == 0 else (0, *before, *queries)
    return queries, keys


def question_tokens(tokens: Sequence[str], question: str) -> tuple[int, int] | None:
    """The first token of the last place of a question in a text, and the first after it; None: it is not there.

    Example:
        >>> question_tokens(["user", "\\n", " How", " many", "?\\n", "so"], "How many?")
        (2, 5)
    """
    place = "".join(tokens).rfind(question)
    if not question or place < 0:
        return None
    ends = list(accumulate(map(len, tokens)))
    first = next(i for i, end in enumerate(ends) if end > place)
    return first, next(i for i, end in enumerate(ends) if end >= place + len(question)) + 1


def part_boundaries(tokens: Sequence[str], start: int, question: str) -> tuple[int, ...]:
    """Boundaries of parts to take shares of attention on: the first token, which is often a sink, the question and what
    is around it, and the sentences of the response, from CELLS sentences on several together.

    Args:
        tokens: the text that each token adds.
        start: first token of the response.

    Example:
        >>> part_boundaries(["<s>", "user", " How", " many", "?", "so", " 2", ".", " Yes", "."], 5, "How many?")
        (0, 1, 2, 5, 8, 10)
    """
    span = question_tokens(tokens[:start], question) or ()
    before = {bound for bound in (0, 1, *span, start) if bound <= start}
    sentences = [bound for bound in boundaries(tokens, start=start) if bound >= start]
    step = -(-(len(sentences) - 1) // CELLS)
    return tuple(sorted({*before, *sentences[:-1:step], len(tokens)}))


def mean_maps(
    model: Any,
    ids: Tensor,
    response: Tensor,
    classes: HeadClasses,
    layers: tuple[int, ...],
    parts: Sequence[int],
    distances: int = BAND,
) -> Maps:
    """The maps of a sequence on the CPU, from one forward pass that stops after the last layer of `layers`.

    Args:
        model: a transformers model that `attnstats.capture` takes.
        ids: (1, T) int64, prompt and response.
        response: (T,) bool, the response: the last positions, at least one.
        classes: classes of the heads of `layers`.
        parts: boundaries of parts, from 0 to T; the start of the response is one.
        distances: width of the exact band, at least 1; at most T.
    """
    length, start = ids.shape[1], int(response.nonzero()[0])
    queries, keys = cell_boundaries(start, length)
    rows = queries if start == 0 else (0, *queries)
    chosen = {"local": classes.local, "global": classes.global_}
    pooled = {name: MapOf(rows, keys, name) for name in chosen}
    sentences = tuple(bound for bound in parts if bound >= start)
    shares = {
        name: MapOf(sentences if start == 0 else (0, *sentences), tuple(parts), f"{name} parts") for name in chosen
    }
    bands = {name: [AtDistance(d, name) for d in range(min(distances, length))] for name in chosen}
    with (
        torch.no_grad(),
        capture(
            model,
            statistics=[*pooled.values(), *shares.values(), *bands["local"], *bands["global"]],
            layers=layers,
            heads={s: chosen[name] for name in chosen for s in (pooled[name], shares[name], *bands[name])},
            reduce=("layers", "heads"),
            stop_after_last_layer=True,
            backend="tiled",  # it takes every statistic, on every device
        ) as run,
    ):
        run.forward(input_ids=ids, use_cache=False)

    def mean_of(statistic: MapOf, bounds: tuple[int, ...]) -> Tensor:
        sizes = _bounds(bounds).diff()[:, None]
        return run[statistic][0].float().cpu()[-len(sizes) :] / sizes

    def band_of(name: str) -> Tensor:
        return torch.stack([run[s][0].float().cpu()[start:] for s in bands[name]], dim=1)

    return Maps(
        rows=_bounds(queries),
        columns=_bounds(keys),
        local_map=mean_of(pooled["local"], queries),
        global_map=mean_of(pooled["global"], queries),
        local_band=band_of("local"),
        global_band=band_of("global"),
        parts=_bounds(parts),
        local_shares=mean_of(shares["local"], sentences),
        global_shares=mean_of(shares["global"], sentences),
    )


def _bounds(bounds: Sequence[int]) -> Tensor:
    return torch.tensor(bounds, dtype=torch.int64, device="cpu")
