"""The sums of one step over its captured layers, of all its requests in one call for each layer.

`CompiledSums` reads the pages of the cache where they lie (attnstats/tiled/steps.py) and adds layers up as they come.
So does `PagedSums` on a GPU, by the package's kernels.
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
from attnstats.paged import paged_statistics
from attnstats.statistics import Statistic
from attnstats.tiled import steps

# What a step's metadata says of causal attention, as far as a backend has a word for it.
CAUSAL = {"causal": True, "mm_prefix_query_range_tensor": None, "rswa_prefix_lens": None, "dynamic_causal": None}


class KeyCache(NamedTuple):
    """A layer's paged cache.

    Attributes:
        block_size: in tokens.
        read: the keys (blocks, block size, key heads, D) of some blocks, by their numbers.
        pages: the same of all blocks as a view of the cache; None: it can't be viewed so.
        lse: of a cache on a GPU, computes the log-sum-exps (Hq, n) of the step's queries by the engine's kernel, or
            None if that has none.
    """

    block_size: int
    read: Callable[[Tensor], Tensor]
    pages: Tensor | None
    lse: Callable[[], Tensor | None] | None = None


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
        request, recording: whose they are, and what its sums are added to.
        place: in the batch.
        row: of its first query among those of the step.
        begin, end: positions of its queries.
        new: (end - begin,) bool, False for a query that was recorded before the request was preempted; None: all are
            new.
        drafts: how many of the last queries are of drafts, which may be rejected.
    """

    request: Any
    recording: Any
    place: int
    row: int
    begin: int
    end: int
    new: Tensor | None
    drafts: int = 0

    @property
    def queries(self) -> slice:
        """Among those of the step."""
        return slice(self.row, self.row + self.end - self.begin)


class LayerCall(NamedTuple):
    """What a captured layer shows of a step.

    Attributes:
        masks: (Hq,) bool, of each statistic that is of some of the layer's heads only.
        query: (n, Hq, D) those of all requests, and of padding.
    """

    layer: WatchedLayer
    masks: dict[Statistic, Tensor]
    query: Tensor
    cache: KeyCache
    metadata: Any

    def copied(self, rows: list[RequestRows]) -> LayerCall:
        """With copies of the queries of these requests alone: the next layer may write over the step's."""
        cache = self.cache
        if cache.lse is not None:
            lse = cache.lse()
            of_rows = None if lse is None else torch.cat([lse[:, each.queries] for each in rows], dim=1)
            cache = cache._replace(lse=lambda: of_rows)
        return self._replace(query=torch.cat([self.query[each.queries] for each in rows]), cache=cache)


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
        index: of their queries among those shown; None: all of them, in order, are of the step's requests.
        count: queries of all requests.
        counted: of their queries, (n,) bool, those that are new; None: all are.
    """

    rows: list[RequestRows]
    index: Tensor | None
    count: int
    block_table: Tensor
    counted: Tensor | None

    @classmethod
    def of(cls, rows: list[RequestRows], count: int | None, metadata: Any) -> StepBatch:
        """count: queries of all requests, known without a look at the device; None: others are shown than the step's.

        Raises:
            ValueError: the step's queries don't see all keys before them and no others.
        """
        for name, value in CAUSAL.items():
            if getattr(metadata, name, value) is not value:
                raise ValueError(f"the step has {name}, and only causal attention is recorded")
        places, lengths = [each.place for each in rows], [each.end - each.begin for each in rows]
        table, index = metadata.block_table, None
        table = table[: len(rows)] if places == list(range(len(rows))) else table[places]
        if sum(lengths) != count:
            parts = [
                torch.arange(q.start, q.stop, dtype=torch.int64, device=table.device)
                for q in (each.queries for each in rows)
            ]
            index = torch.cat(parts)
        counted = None
        if any(each.new is not None for each in rows):
            counted = torch.cat(
                [torch.ones(e.end - e.begin, dtype=torch.bool, device="cpu") if e.new is None else e.new for e in rows]
            )
        return cls(rows, index, sum(lengths), table, counted)

    def queries(self, query: Tensor) -> Tensor:
        """(n, H, D) those of the recorded requests."""
        return query[: self.count] if self.index is None else query[self.index]

    def lengths(self) -> list[int]:
        return [each.end - each.begin for each in self.rows]


class PagedSums:
    """Of any statistics, for layers that have the same window: on a GPU, whose numbers are read once all layers ran."""

    def __init__(self, batch: StepBatch, metadata: Any, reduce: Sequence[str]):
        self.batch = batch
        self._reduce = reduce
        self._sums: dict[Any, tuple[Statistic, WatchedLayer, Tensor]] = {}
        self._columns: dict[Any, tuple[Tensor, Tensor]] = {}
        lengths = batch.lengths()
        self._longest = max(lengths)
        if batch.index is None:
            self._queries, self._keys = metadata.query_start_loc[: len(lengths) + 1], metadata.seq_lens[: len(lengths)]
        else:
            device = batch.block_table.device
            self._queries = _boundaries(lengths).to(device, non_blocking=True)
            ends = torch.tensor([each.end for each in batch.rows], dtype=torch.int32, device="cpu")
            self._keys = ends.to(device, non_blocking=True)
        self._counted = None if batch.counted is None else batch.counted.to(self._keys.device, non_blocking=True)

    def add(self, call: LayerCall) -> None:
        layer, cache = call.layer, call.cache
        assert cache.pages is not None
        assert cache.lse is not None
        lse = cache.lse() if all(s.from_lse for s in layer.statistics) else None
        options = layer.options
        result = paged_statistics(
            self.batch.queries(call.query),
            cache.pages,
            block_table=self.batch.block_table,
            cu_seqlens_q=self._queries,
            seqused_k=self._keys,
            statistics=layer.statistics,
            lse=None if lse is None else self.batch.queries(lse.transpose(0, 1)),
            lse_layout="TH",
            max_seqlen_q=self._longest,
            scale=options.scale,
            softcap=options.softcap,
            window_size=options.window_size,
            sinks=options.sinks,
            query_mask=self._counted,
            heads=layer.heads or None,
        )
        for s in layer.statistics:
            column = s.axis == "column"
            x = result.columns[s] if column else result.rows.tensors[s]
            x = x.sum(0) if "heads" in self._reduce else x
            # Which keys columns have depends on all statistics of the layer.
            key = s, layer.statistics, None if _are_added_up(s, layer, self._reduce) else layer.number
            if key in self._sums:
                self._sums[key][2].add_(x)
                continue
            self._sums[key] = s, layer, x.clone()
            if column:
                self._columns[key] = result.first_key, result.cu_seqlens_k

    def addends(self) -> Iterator[Addend]:
        for key, (s, layer, x) in self._sums.items():
            starts, widths = [each.begin for each in self.batch.rows], self.batch.lengths()
            if key in self._columns:
                first_key, cu_seqlens = self._columns[key]
                starts, widths = first_key.tolist(), cu_seqlens.diff().tolist()
                x = x[..., : sum(widths)]  # behind them is nothing
            yield Addend(s, layer.number, starts, x.cpu()[None].split(widths, -1 - s.per_query))


class CompiledSums:
    """Of statistics that `steps.computes` is True for."""

    def __init__(self, batch: StepBatch, statistics: Sequence[Statistic], reduce: Sequence[str], query_heads: int):
        self.batch = batch
        self._reduce = reduce
        bounds, keys = [0, *accumulate(batch.lengths())], [each.end for each in batch.rows]
        self._plan = steps.StepPlan(statistics, query_heads, batch.block_table, bounds, keys, batch.counted)
        self._results: dict[tuple[Statistic, int | None], Tensor] = {}
        self._layers: dict[tuple[Statistic, int | None], WatchedLayer] = {}

    def add(self, call: LayerCall) -> None:
        layer, results = call.layer, {}
        for s in layer.statistics:
            key = s, None if _are_added_up(s, layer, self._reduce) else layer.number
            if key not in self._results:
                self._results[key], self._layers[key] = self._plan.zeros(s), layer
            results[s] = self._results[key]
        options = layer.options
        assert call.cache.pages is not None
        assert options.scale is not None
        self._plan.add(
            results,
            self.batch.queries(call.query),
            call.cache.pages,
            scale=options.scale,
            left=layer.left,
            softcap=options.softcap,
            sinks=options.sinks,
            heads=call.masks,
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

    def add(self, call: LayerCall) -> None:
        layer = call.layer
        key = call.cache.read(self._blocks).flatten(0, 1)[self._slots]
        options = layer.options._replace(
            statistics=tuple([s.summed for s in layer.statistics]),
            heads={s.summed: heads for s, heads in layer.heads.items()} or None,
            query_mask=self.batch.counted,
            cu_seqlens_q=self._cu_seqlens[0],
            cu_seqlens_k=self._cu_seqlens[1],
        )
        results = functional.attend(self.batch.queries(call.query), key, key, options).statistics.tensors
        for s in layer.statistics:
            x = results[s.summed]
            self._results[s, layer.number] = x.sum(0) if "heads" in self._reduce else x

    def addends(self) -> Iterator[Addend]:
        for (s, layer), x in self._results.items():
            column = s.axis == "column"
            starts = self._first_keys if column else [each.begin for each in self.batch.rows]
            widths = self._keys if column else self.batch.lengths()
            yield Addend(s, layer, starts, x[None].split(widths, -1 - s.per_query))


def _are_added_up(statistic: Statistic, layer: WatchedLayer, reduce: Sequence[str]) -> bool:
    """True if layers become one sum. Of chosen heads that stay apart each layer has others."""
    return "layers" in reduce and ("heads" in reduce or statistic not in layer.heads)


def _boundaries(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device="cpu")
