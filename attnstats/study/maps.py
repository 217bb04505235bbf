"""Mean maps of the local and of the global heads (Eq. 8), small enough to show: pooled, and exact near the diagonal.

A T x T map is never made: it is pooled into at most 256 x 256 cells (PooledMap), and the band of the nearest keys is
read one distance at a time, by a statistic with weight 1 at one distance that costs O(T). Only rows of the response are
read. The maps need head classes, so they take a second forward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnstats.heads import HeadClasses
from attnstats.statistics import PooledMap, RowStatistic
from attnstats.transformers.capture import capture

CELLS = 256  # rows and columns of a pooled map at most
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
    """Two mean maps of one sequence: R response tokens, I x J cells, D distances.

    Attributes:
        rows: (I + 1,) int64, boundaries of the query segments, which cover the response.
        columns: (J + 1,) int64, boundaries of the key segments, which cover prompt and response; the start of the
            response is one.
        local_map, global_map: (I, J) float32, the attention of a query of segment i to segment j, a mean over the
            queries; a row sums to 1 (less with sinks).
        local_band, global_band: (R, D) float32, `A[t, t - d]` for tokens t of the response and d = 0, 1, ...
    """

    rows: Tensor
    columns: Tensor
    local_map: Tensor
    global_map: Tensor
    local_band: Tensor
    global_band: Tensor


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


def mean_maps(
    model: Any, ids: Tensor, response: Tensor, classes: HeadClasses, layers: tuple[int, ...], distances: int = BAND
) -> Maps:
    """The maps of a sequence on the CPU, from one forward pass that stops after the last layer of `layers`.

    Args:
        model: a transformers model that `attnstats.capture` takes.
        ids: (1, T) int64, prompt and response.
        response: (T,) bool, the response: the last positions, at least one.
        classes: classes of the heads of `layers`.
        distances: width of the exact band, at least 1; at most T.
    """
    length, start = ids.shape[1], int(response.nonzero()[0])
    queries, keys = cell_boundaries(start, length)
    rows = queries if start == 0 else (0, *queries)
    chosen = {"local": classes.local, "global": classes.global_}
    pooled = {name: MapOf(rows, keys, name) for name in chosen}
    bands = {name: [AtDistance(d, name) for d in range(min(distances, length))] for name in chosen}
    with (
        torch.no_grad(),
        capture(
            model,
            statistics=[*pooled.values(), *bands["local"], *bands["global"]],
            layers=layers,
            heads={s: chosen[name] for name in chosen for s in (pooled[name], *bands[name])},
            reduce=("layers", "heads"),
            stop_after_last_layer=True,
            backend="tiled",  # it takes every statistic, on every device
        ) as run,
    ):
        run.forward(input_ids=ids, use_cache=False)
    sizes = torch.tensor(queries, dtype=torch.int64, device="cpu").diff()[:, None]

    def of_class(name: str) -> tuple[Tensor, Tensor]:
        sums = run[pooled[name]][0].float().cpu()[-len(sizes) :]
        return sums / sizes, torch.stack([run[s][0].float().cpu()[start:] for s in bands[name]], dim=1)

    local_map, local_band = of_class("local")
    global_map, global_band = of_class("global")
    return Maps(
        torch.tensor(queries, dtype=torch.int64, device="cpu"),
        torch.tensor(keys, dtype=torch.int64, device="cpu"),
        local_map,
        global_map,
        local_band,
        global_band,
    )
