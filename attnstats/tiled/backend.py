"""The backend "tiled": attention and its statistics in PyTorch at O(T) memory, the default without a GPU.

Attention is torch's flash kernel for the CPU (`cpu_flash`), which also returns the lse; on other devices, and for what
that kernel can't do, a sweep over blocks of rows. The statistics follow from (query, key, lse): those whose weight is
constant beyond a distance from the keys near the diagonal (`band`, O(T) time), all others from every visible pair
(`sweep`). On a CPU `native` does both at once where it was compiled. Torch's kernel also gives the gradients of its own
output, and with the keys near the diagonal those of statistics of a narrow band; all others come from a sweep.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from itertools import groupby

import torch
from torch import Tensor

from attnstats.core.autograd import Gradients, GradientsByStatistic, Residuals, differentiable_pass
from attnstats.core.geometry import Evaluation, Geometry, without_rows
from attnstats.core.passes import Pass
from attnstats.core.scores import sink_mass, softcap_, subtract_lse_
from attnstats.statistics import Statistic
from attnstats.tiled import band, cpu_flash, native, row_lse, sweep

NAME = "tiled"
COMPUTES = frozenset({"weight", "row", "first_keys", "segments", "top", "pooled", "lse"})
READS_PAGES: frozenset[str] = frozenset()

Evaluate = Callable[[Tensor, Tensor, Tensor, Geometry, tuple[Statistic, ...]], dict[Statistic, Tensor]]


def attend(query: Tensor, key: Tensor, value: Tensor, geometry: Geometry) -> Evaluation:
    """Output, lse and statistics. Gradients go through the output and, if differentiable, through the statistics."""
    return differentiable_pass(query, key, value, geometry, _attend, gradients)


def _attend(query: Tensor, key: Tensor, value: Tensor, geometry: Geometry) -> Evaluation:
    output, lse = _attention(query, key, value, geometry)
    results = from_lse(query, key, row_lse.refined(query, key, lse, geometry, geometry.statistics), geometry)
    for s in (s for s in results if s.method == "lse"):
        results[s] = lse[:, list(geometry.heads[s])] if s in geometry.heads else lse
    return Evaluation(output, lse, results)


def gradients(
    residuals: Residuals, grad_output: Tensor, geometry: Geometry, of_statistics: GradientsByStatistic
) -> Gradients:
    """Gradients of what `attend` returned; `of_statistics` has each statistic that carries one, with its value."""
    own = cpu_flash.takes_gradients(residuals.lse, geometry, of_statistics)
    return (cpu_flash if own else sweep).gradients(residuals, grad_output, geometry, of_statistics)


def from_lse(query: Tensor, key: Tensor, lse: Tensor, geometry: Geometry) -> dict[Statistic, Tensor]:
    """The statistics of `A = exp(scores - lse)`; lse (B, Hq, Tq), -inf for rows that see no key.

    MaxLogit is not a function of the lse: it costs the scores once more here.
    """
    results: dict[Statistic, Tensor] = {}
    for heads, of_heads in groupby(_statistic_passes(geometry), key=lambda each: each.heads):
        if heads is None:
            results |= _evaluate(query, key, lse, geometry, tuple(of_heads))
        else:
            of_query, of_key = list(heads), [head // geometry.group for head in heads]
            inputs = query[:, of_query], key[:, of_key], lse[:, of_query]
            results |= _evaluate(*inputs, geometry.subset(heads), tuple(of_heads))
    return {s: results[s] for s in geometry.statistics}


def _attention(query: Tensor, key: Tensor, value: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """Output and lse."""
    if geometry.packing is None:
        return (cpu_flash if cpu_flash.takes(geometry) else sweep).attention(query, key, value, geometry)
    lse = query.new_full(query.shape[:3], -torch.inf, dtype=geometry.accumulator)
    parts, done = [], 0
    for queries, keys, alone in geometry.sequences():
        part, lse[:, :, queries] = _attention(query[:, :, queries], key[:, :, keys], value[:, :, keys], alone)
        parts += [_zero_output(query, geometry, queries.start - done), part]
        done = queries.stop
    parts.append(_zero_output(query, geometry, geometry.query_length - done))
    return torch.cat(parts, dim=2), lse


def _zero_output(query: Tensor, geometry: Geometry, rows: int) -> Tensor:
    """The output of rows that belong to no sequence, or to one without keys."""
    return query.new_zeros(geometry.batch, geometry.query_heads, rows, geometry.value_dim)


def _evaluate(
    query: Tensor, key: Tensor, lse: Tensor, geometry: Geometry, passes: tuple[Pass, ...]
) -> dict[Statistic, Tensor]:
    """The statistics of passes over all heads of the tensors."""
    results: dict[Statistic, Tensor] = {}
    if geometry.packing is None:
        for each in passes:
            results |= _EVALUATE[each.run](query, key, lse, geometry, each.statistics)
        if (has_nan := lse.isnan()).any():  # also where no key of the row is in the band
            rows = (s for s in results if s.axis == "row" and s.from_lse)
            results |= {s: without_rows(s, results[s], has_nan, torch.nan) for s in rows}
        return {s: geometry.finish(s, x) for s, x in results.items()}
    statistics = [s for each in passes for s in each.statistics]
    results = geometry.zeros(statistics)
    results |= {s: torch.full_like(results[s], -torch.inf) for s in statistics if s.method == "lse"}
    for queries, keys, batch in geometry.batches():
        inputs = [
            x[0, :, tokens].unflatten(1, (batch.batch, -1)).transpose(0, 1)
            for x, tokens in ((query, queries), (key, keys), (lse, queries))
        ]
        for s, x in _evaluate(inputs[0], inputs[1], inputs[2], batch, passes).items():
            results[s][0, :, keys if s.axis == "column" else queries] = x.transpose(0, 1).flatten(1, 2)
    return results


def _first_keys(
    query: Tensor, key: Tensor, lse: Tensor, geometry: Geometry, statistics: tuple[Statistic, ...]
) -> dict[Statistic, Tensor]:
    def weights(products: Tensor, rows: slice) -> Tensor:
        return subtract_lse_(softcap_(products.mul_(geometry.scale), geometry.softcap), lse[:, :, rows]).exp_()

    return {s: sink_mass(query, key, geometry, s, weights) for s in statistics}  # type: ignore[arg-type]


_EVALUATE: dict[str, Evaluate] = {
    "compiled": native.evaluate,
    "band": band.evaluate,
    "sweep": sweep.evaluate,
    "first_keys": _first_keys,
    "lse": lambda query, key, lse, geometry, statistics: dict.fromkeys(statistics, lse.to(geometry.accumulator)),
}


def passes(geometry: Geometry, attends: bool) -> list[Pass]:
    """The passes of `attend`, or of `from_lse`."""
    attention: Iterable[Pass] = ()
    if attends:
        alone = [geometry] if geometry.packing is None else [each for _, _, each in geometry.sequences()]
        runs = dict.fromkeys("cpu_flash" if cpu_flash.takes(each) else "row_blocks" for each in alone)
        attention = (Pass(run, attends=True) for run in runs)
    return [*attention, *(each for each in _statistic_passes(geometry) if each.run != "lse")]


def _statistic_passes(geometry: Geometry) -> tuple[Pass, ...]:
    """The passes over (query, key, lse); statistics of the same heads and the same loop go together."""
    heads = tuple(map(geometry.heads.get, geometry.statistics))
    return _passes_of(geometry.statistics, heads, native.takes(geometry))


@functools.lru_cache(maxsize=256)
def _passes_of(
    statistics: tuple[Statistic, ...], heads: tuple[tuple[int, ...] | None, ...], compiled: bool
) -> tuple[Pass, ...]:
    together: dict[tuple[str, tuple[int, ...] | None], list[Statistic]] = {}
    for of_heads in dict.fromkeys(heads):
        for s in (s for s, own in zip(statistics, heads, strict=True) if own == of_heads):
            together.setdefault((_loop(s, compiled), of_heads), []).append(s)
    return tuple(Pass(run, tuple(members), of_heads) for (run, of_heads), members in together.items())


def _loop(statistic: Statistic, compiled: bool) -> str:
    """The loop that computes a statistic."""
    if compiled and native.computes(statistic):
        return "compiled"
    if statistic.method == "weight" and statistic.is_banded:
        return "band"
    return str(statistic.method) if statistic.method in ("first_keys", "lse") else "sweep"


def cost(each: Pass, geometry: Geometry) -> tuple[str, int, int]:
    """The description of a pass, its floating-point operations and its scratch memory in bytes."""
    if each.heads is not None:
        geometry = geometry.subset(each.heads)
    heads = geometry.batch * geometry.query_heads
    pairs = geometry.visible_pairs() * geometry.query_heads
    if each.attends:
        description = "torch's flash attention for CPU" if each.run == "cpu_flash" else "attention, blocks of rows"
        return description, 2 * pairs * (geometry.head_dim + geometry.value_dim), 0
    if each.run == "compiled":
        return native.cost(geometry, each.statistics)
    if each.run == "band":
        return band.cost(geometry, each.statistics)
    if each.run == "sweep":
        pairs = max(geometry.visible_pairs(s.last_queries) for s in each.statistics) * geometry.query_heads
        return "sweep, blocks of rows", 2 * pairs * geometry.head_dim, sweep.SCRATCH_BYTES
    keys = sum(min(s.count, geometry.key_length) for s in each.statistics)  # type: ignore[attr-defined]
    rows = heads * geometry.query_length
    return "first keys, gathered", 2 * rows * keys * geometry.head_dim, 4 * rows * keys
