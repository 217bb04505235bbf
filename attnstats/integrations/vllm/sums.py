"""The sums of one step over its captured layers, of all its requests in one call for each layer.

`CompiledSums` reads the pages of the cache where they lie (attnstats/tiled/steps.py) and adds layers up as they come.
`GatheredSums` copies keys out of their pages and calls the package's packed attention: for statistics, dtypes and
layouts of a cache that the compiled code doesn't know.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnstats import functional
from attnstats.core.options import Options
from attnstats.statistics import Statistic
from attnstats.tiled import steps


class KeyCache(NamedTuple):
    """A layer's paged cache.

    Attributes:
        block_size: in tokens.
        read: the keys (blocks, block size, key heads, D) of some blocks, by their numbers.
        pages: the same of all blocks as a view of the cache; None: it can't be viewed so.
    """

    block_size: int
    read: Callable[[Tensor], Tensor]
    pages: Tensor | None


class WatchedLayer(NamedTuple):
    """A captured layer.

    Attributes:
        number: in the model.
        statistics: those that it has chosen heads for.
        heads: of each statistic that is of some heads only.
        query_heads: their number.
        options: of its calls: scale, softcap, window and sinks.
        left: how far behind itself a query sees; None: all the way.
    """

    number: int
    statistics: tuple[Statistic, ...]
    heads: dict[Statistic, tuple[int, ...]]
    query_heads: int
    options: Options
    left: int | None


class RequestRows(NamedTuple):
    """The rows of one request in a step.

    Attributes:
        recording: what its sums are added to.
        place: in the batch.
        begin, end: positions of its queries.
        new: (end - begin,) bool, False for a query that was recorded before the request was preempted; None: all are
            new.
    """

    recording: Any
    place: int
    begin: int
    end: int
    new: Tensor | None


class Addend(NamedTuple):
    """What one or more layers add to each request of a step.

    Attributes:
        layer: its number; of layers that are added up any of them.
        starts: by request the position of the first number.
        parts: by request (1, heads, ...), or (1, ...) where heads are added up.
    """

    statistic: Statistic
    layer: int
    starts: Sequence[int]
    parts: Sequence[Tensor]


@dataclass(frozen=True)
class StepBatch:
    """The recorded requests of a step, as the metadata of some layers have them.

    Attributes:
        index: of their queries among those of all requests; None: all of them, in order.
        count: queries of all requests.
        counted: of their queries, (n,) bool, those that are new; None: all are.
    """

    rows: list[RequestRows]
    index: Tensor | None
    count: int
    block_table: Tensor
    counted: Tensor | None

    @classmethod
    def of(cls, rows: list[RequestRows], metadata: Any) -> StepBatch:
        starts = metadata.query_start_loc.tolist()
        table, index = metadata.block_table[: len(starts) - 1], None
        if len(rows) < len(starts) - 1:
            table = table[[each.place for each in rows]]
            tokens = torch.arange(starts[-1], dtype=torch.int64, device=table.device)
            index = torch.cat([tokens[starts[each.place] : starts[each.place + 1]] for each in rows])
        counted = None
        if any(each.new is not None for each in rows):
            counted = torch.cat(
                [torch.ones(e.end - e.begin, dtype=torch.bool) if e.new is None else e.new for e in rows]
            )
        return cls(rows, index, starts[-1], table, counted)

    def queries(self, query: Tensor) -> Tensor:
        """(n, H, D) those of the recorded requests."""
        return query[: self.count] if self.index is None else query[self.index]

    def lengths(self) -> list[int]:
        return [each.end - each.begin for each in self.rows]


class CompiledSums:
    """Of statistics that `steps.computes` is True for."""

    def __init__(self, batch: StepBatch, statistics: Sequence[Statistic], reduce: Sequence[str], query_heads: int):
        self.batch = batch
        self._reduce = reduce
        bounds, keys = [0, *accumulate(batch.lengths())], [each.end for each in batch.rows]
        self._plan = steps.StepPlan(statistics, query_heads, batch.block_table, bounds, keys, batch.counted)
        self._results: dict[tuple[Statistic, int | None], Tensor] = {}
        self._layers: dict[tuple[Statistic, int | None], WatchedLayer] = {}

    def add(self, layer: WatchedLayer, query: Tensor, cache: KeyCache, masks: dict[Statistic, Tensor]) -> None:
        """masks: (Hq,) bool, of each statistic that is of some of the layer's heads only."""
        results = {}
        for s in layer.statistics:
            # Of chosen heads that stay apart each layer has others.
            together = "layers" in self._reduce and ("heads" in self._reduce or s not in layer.heads)
            key = s, None if together else layer.number
            if key not in self._results:
                self._results[key], self._layers[key] = self._plan.zeros(s), layer
            results[s] = self._results[key]
        options = layer.options
        assert cache.pages is not None
        assert options.scale is not None
        self._plan.add(
            results,
            self.batch.queries(query),
            cache.pages,
            scale=options.scale,
            left=layer.left,
            softcap=options.softcap,
            sinks=options.sinks,
            heads=masks,
        )

    def addends(self) -> Iterator[Addend]:
        for (s, key), x in self._results.items():
            layer = self._layers[s, key]
            if "heads" in self._reduce:
                x = x.sum(0)
            elif s in layer.heads:
                x = x[list(layer.heads[s])]
            starts = self._plan.first_key.get(s) or [each.begin for each in self.batch.rows]
            yield Addend(s, layer.number, starts, x[None].split(self._plan.widths[s], -1))


class GatheredSums:
    """Of any statistics, for layers that have the same window."""

    def __init__(self, batch: StepBatch, reduce: Sequence[str], left: int | None, block_size: int):
        self.batch = batch
        self._reduce = reduce
        self._results: dict[tuple[Statistic, int], Tensor] = {}
        self._first_keys = [0 if left is None else max(0, each.begin - left) for each in batch.rows]
        blocks, slots, used = [], [], 0
        for i, (each, first) in enumerate(zip(batch.rows, self._first_keys, strict=True)):
            own = batch.block_table[i, first // block_size : -(-each.end // block_size)]
            offset = used * block_size + first % block_size
            slots.append(torch.arange(offset, offset + each.end - first, dtype=torch.int64, device=own.device))
            blocks.append(own)
            used += len(own)
        self._blocks, self._slots = torch.cat(blocks).long(), torch.cat(slots)
        self._keys = [len(each) for each in slots]
        self._cu_seqlens = _boundaries(batch.lengths()), _boundaries(self._keys)

    def add(self, layer: WatchedLayer, query: Tensor, cache: KeyCache, masks: dict[Statistic, Tensor]) -> None:
        key = cache.read(self._blocks).flatten(0, 1)[self._slots]
        options = layer.options._replace(
            statistics=tuple([s.summed for s in layer.statistics]),
            heads={s.summed: heads for s, heads in layer.heads.items()} or None,
            query_mask=self.batch.counted,
            cu_seqlens_q=self._cu_seqlens[0],
            cu_seqlens_k=self._cu_seqlens[1],
        )
        results = functional.attend(self.batch.queries(query), key, key, options).statistics.tensors
        for s in layer.statistics:
            x = results[s.summed]
            self._results[s, layer.number] = x.sum(0) if "heads" in self._reduce else x

    def addends(self) -> Iterator[Addend]:
        for (s, layer), x in self._results.items():
            column = s.axis == "column"
            starts = self._first_keys if column else [each.begin for each in self.batch.rows]
            widths = self._keys if column else self.batch.lengths()
            yield Addend(s, layer, starts, x[None].split(widths, -1 - s.per_query))


def _boundaries(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device="cpu")
