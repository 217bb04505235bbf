"""Statistics of a step of an inference engine on the CPU, straight from the pages of its keys (csrc/step.h).

New tokens see all keys of their request up to their own. No lse is needed: a row's scores are kept while it is summed.
One call does all requests of a step, so that a decoding step of many short requests costs what their keys cost.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping, Sequence
from ctypes import POINTER, Structure, c_float, c_int64, c_void_p
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from attnstats.core import library as compiled
from attnstats.core.library import UNBOUNDED
from attnstats.statistics import Entropy, MaxLogit, Statistic
from attnstats.tiled.native import COLUMN_SUM, INPUTS, OF_ROWS, ROW_SUM, TYPES

lanes = 0  # floats of the widest vectors to use, 4, 8 or 16; 0: the machine's widest


class _StepStatistic(Structure):
    _fields_ = (
        ("kind", c_int64),
        ("result", c_void_p),
        ("heads", c_void_p),
        ("weights", c_void_p),
        ("farthest", c_int64),
        ("distances", c_int64),
        ("tail", c_float),
        ("width", c_int64),
        ("first_key", c_void_p),
        ("columns", c_void_p),
    )


class _Step(Structure):
    _fields_ = (
        ("query", c_void_p),
        ("query_row", c_int64),
        ("query_head", c_int64),
        ("cache", c_void_p),
        ("of_block", c_int64),
        ("of_row", c_int64),
        ("of_head", c_int64),
        ("of_element", c_int64),
        ("type", c_int64),
        ("block_table", c_void_p),
        ("table_row", c_int64),
        ("queries", c_void_p),
        ("lengths", c_void_p),
        *((name, c_int64) for name in ("requests", "rows", "heads", "group", "dim", "block_size", "left")),
        ("scale", c_float),
        ("softcap", c_float),
        ("sinks", c_void_p),
        ("counted", c_void_p),
        ("count", c_int64),
        ("statistics", POINTER(_StepStatistic)),
        ("threads", c_int64),
        ("lanes", c_int64),
    )


def computes(statistics: Sequence[Statistic]) -> bool:
    """True if the library is installed and has code for all of them."""
    return (
        compiled.enabled
        and _library() is not None
        and all((s.method == "weight" and s.grows) or isinstance(s, (Entropy, MaxLogit)) for s in statistics)
    )


def takes(query: Tensor, key_cache: Tensor) -> bool:
    """True for tensors that it reads."""
    return query.device.type == "cpu" and query.dtype in INPUTS and key_cache.dtype == query.dtype


class StepPlan:
    """The requests of a step, and what its layers add up of them.

    Attributes:
        first_key: of each column statistic the position of each request's first column.
        widths: how many numbers each request has: new tokens, or columns, the last of them of its last key.
    """

    def __init__(
        self,
        statistics: Sequence[Statistic],
        heads: int,
        block_table: Tensor,
        queries: list[int],
        lengths: list[int],
        counted: Tensor | None = None,
    ):
        """Statistics are those that `computes` is True for.

        Args:
            heads: query heads.
            block_table: (B, pages) int; key s of request i is in row s % block_size of block `block_table[i, s //
                block_size]`.
            queries: B + 1 boundaries of the new tokens, which are packed by request.
            lengths: the keys of each request, those of its new tokens included.
            counted: (total_q,) bool, the new tokens that count in columns; None: all.
        """
        self.heads = heads
        self.first_key: dict[Statistic, list[int]] = {}
        self.widths: dict[Statistic, list[int]] = {}
        self._places: dict[Statistic, Tensor] = {}
        self._table = block_table.to(torch.int32).contiguous()
        self._bounds = torch.tensor([*queries, *lengths], dtype=torch.int32, device="cpu")
        self._queries, self._requests, self._longest = queries[-1], len(lengths), max(lengths)
        self._counted = None if counted is None else counted.contiguous()
        new = [b - a for a, b in pairwise(queries)]
        for s in statistics:
            if s.axis != "column":
                self.widths[s] = new
                continue
            reach = self._longest if s.band is None else s.band[1]
            firsts = [max(0, length - count - reach) for length, count in zip(lengths, new, strict=True)]
            widths = [length - first for length, first in zip(lengths, firsts, strict=True)]
            self.first_key[s], self.widths[s] = firsts, widths
            self._places[s] = torch.tensor([[0, *accumulate(widths[:-1])], firsts], dtype=torch.int64, device="cpu")

    def zeros(self, statistic: Statistic) -> Tensor:
        """(Hq, n) the numbers of all requests end to end, to which layers are added."""
        return torch.zeros(self.heads, sum(self.widths[statistic]), dtype=torch.float32, device="cpu")

    def add(
        self,
        results: Mapping[Statistic, Tensor],
        query: Tensor,
        key_cache: Tensor,
        *,
        scale: float,
        left: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        heads: Mapping[Statistic, Tensor] | None = None,
    ) -> None:
        """Add a layer's sums to results as `zeros` makes them; means are summed.

        Args:
            query: (total_q, Hq, D) new tokens.
            key_cache: (blocks, block_size, Hkv, D) with the keys of the new tokens in it, strides as they come.
            left: a token sees so many keys before its own; None: all.
            heads: of each statistic that is added for some heads only, (Hq,) bool.
        """
        library = _library()
        assert library is not None
        query = query if query.stride(-1) == 1 else query.contiguous()
        sinks = None if sinks is None else sinks.float().contiguous()
        requests = (_StepStatistic * len(results))()
        kept = []  # the tensors that pointers go to
        for (s, result), request in zip(results.items(), requests, strict=True):
            request.kind = OF_ROWS.get(type(s), COLUMN_SUM if s.axis == "column" else ROW_SUM)
            request.result, request.width = result.data_ptr(), result.shape[1]
            if s.method == "weight":
                weights, request.tail = _weights(s, self._longest)
                kept.append(weights)
                request.weights, request.distances, request.farthest = (
                    weights.data_ptr(),
                    len(weights),
                    len(weights) - 1,
                )
            if s in self._places:
                request.columns, request.first_key = (x.data_ptr() for x in self._places[s])
            if heads is not None and s in heads:
                request.heads = heads[s].data_ptr()
        of_block, of_row, of_head, of_element = key_cache.stride()
        step = _Step(
            query=query.data_ptr(),
            query_row=query.stride(0),
            query_head=query.stride(1),
            cache=key_cache.data_ptr(),
            of_block=of_block,
            of_row=of_row,
            of_head=of_head,
            of_element=of_element,
            type=TYPES[query.dtype],
            block_table=self._table.data_ptr(),
            table_row=self._table.shape[1],
            queries=self._bounds.data_ptr(),
            lengths=self._bounds.data_ptr() + self._bounds.element_size() * (self._requests + 1),
            requests=self._requests,
            rows=self._queries,
            heads=self.heads,
            group=self.heads // key_cache.shape[2],
            dim=query.shape[2],
            block_size=key_cache.shape[1],
            left=UNBOUNDED if left is None else left,
            scale=scale,
            softcap=softcap or 0.0,
            sinks=None if sinks is None else sinks.data_ptr(),
            counted=None if self._counted is None else self._counted.data_ptr(),
            count=len(requests),
            statistics=requests,
            threads=torch.get_num_threads(),
            lanes=lanes,
        )
        if library.attnstats_step(ctypes.byref(step)) < 0:
            raise MemoryError("attnstats: no memory for the statistics' working space")


_WEIGHTS: dict[Statistic, tuple[Tensor, float]] = {}


def _weights(statistic: Statistic, longest: int) -> tuple[Tensor, float]:
    """The weights less the tail, from the farthest distance down to 0, and the tail. Those without a band grow with
    the requests, by doubling."""
    known = _WEIGHTS.get(statistic)
    if known is not None and (statistic.band is not None or len(known[0]) >= longest):
        return known
    count = max(1024, 2 * longest) if statistic.band is None else statistic.band[1] + 1
    distances = torch.arange(count - 1, -1, -1, dtype=torch.int64, device="cpu")
    tail = 0.0 if statistic.band is None else statistic.tail
    known = _WEIGHTS[statistic] = (statistic.weight_as(distances, torch.float32) - tail).contiguous(), tail
    return known


@functools.cache
def _library() -> ctypes.CDLL | None:
    library = compiled.load()
    if library is not None:
        library.attnstats_step.restype, library.attnstats_step.argtypes = c_int64, (POINTER(_Step),)
    return library
