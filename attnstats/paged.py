"""Statistics of the steps of an inference engine, from its paged KV cache.

A step's rows are final. Columns are what the step adds to each key's sum: `core/paging.py` finds the keys that it can
add to, and backends see them as packed sequences whose queries come last.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from attnstats import _dispatch
from attnstats._operators import is_tracing, refuse_script, refuse_trace
from attnstats.core import arguments, paging
from attnstats.core.options import Heads, Options, Window
from attnstats.results import ByStatistic, Statistics
from attnstats.statistics import LSE, Statistic, resolve
from attnstats.tensors import check_plain

Backend = Literal["auto", "reference", "tiled", "flash", "triton"]


@dataclass(frozen=True)
class PagedStatistics:
    """What one step of an engine adds to the statistics of its requests.

    Attributes:
        rows: (Hq, total_q) and `.lse`, of the new tokens.
        columns: (Hq, total_k) sums over the new tokens that count, to be added to those of the steps before. Those of
            request i are `[:, cu_seqlens_k[i] : cu_seqlens_k[i + 1]]`, of its keys `first_key[i] .. seqused_k[i] - 1`;
            the step adds nothing to other keys.
        counts: of each column statistic that is a mean (total_k,), what the step adds to its counted queries |T(s)|, by
            which the sum is divided in the end.
        first_key: (B,) int32, position of the first key that columns have.
        cu_seqlens_k: (B + 1,) int32, the requests' boundaries in columns and counts.
    """

    rows: Statistics
    columns: ByStatistic
    counts: ByStatistic
    first_key: Tensor
    cu_seqlens_k: Tensor


@refuse_script
def paged_statistics(
    query: Tensor,
    key_cache: Tensor,
    *,
    block_table: Tensor,
    cu_seqlens_q: Tensor,
    seqused_k: Tensor,
    statistics: Iterable[Statistic | str],
    lse: Tensor | None = None,
    lse_base: Literal["e", "2"] = "e",
    lse_layout: Literal["HT", "TH"] = "HT",
    max_seqlen_q: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    window_size: Window | None = None,
    sinks: Tensor | None = None,
    query_mask: Tensor | None = None,
    query_weight: Tensor | None = None,
    segment_boundaries: Tensor | None = None,
    heads: Heads | None = None,
    check: bool = False,
    backend: Backend = "auto",
) -> PagedStatistics:
    """Statistics of one step of an inference engine, which keeps its keys in pages as vLLM does.

    A request's new tokens are its last positions: a whole prompt, a chunk of one, or a token that was generated.
    They see all keys of the request up to their own. Added up over the steps, results are those of one pass over the
    whole sequence.

    With an lse, WAAD and LocalMass read `window` keys before the new tokens and FAI `hi`. So a token that is decoded
    reads `(hi + 1) * Hkv * D` numbers, however long its request is: 103 KB with FAI(10, 100), 4 key heads of 128 and
    bfloat16. Every other statistic, and every one without an lse, reads all keys of the request, or those that
    window_size leaves: 1 KB for each. Kernels on a GPU read the former from their pages; otherwise keys are copied out
    of them, which on a GPU waits for the device.

    Args:
        query: (total_q, Hq, D) the new tokens, packed by request, strides as they come.
        key_cache: (blocks, block_size, Hkv, D) with the keys of the new tokens in it, in query's dtype; strides as they
            come. vLLM's FlashAttention layout is `kv_cache.unbind(...)[0]`; of a cache with heads before rows (HND)
            pass `.transpose(1, 2)`. In another packing: the pages of the step, unpacked, and a block_table of those.
            Slots past the end of a request are never looked at.
        block_table: (B, pages) int32 or int64; key s of request i is in row `s % block_size` of block
            `block_table[i, s // block_size]`. On a GPU its entries and its width are not checked.
        cu_seqlens_q: (B + 1,) int32 or int64, boundaries of the requests' new tokens, from 0 on; equal ones for a
            request without any. Tokens after the last boundary belong to no request.
        seqused_k: (B,) int32 or int64, keys of each request, those of its new tokens included.
        statistics: as of `attention`; all but those that depend on the end, PooledMap and Received(last=...).
        lse: of the engine's attention, as `statistics_from_lse` takes it; MaxLogit can't be had from it, and makes a
            pass of its own. None: one more attention pass gives it.
        lse_base: "e" for natural logs, "2" for logs to base 2.
        lse_layout: "HT" for (Hq, total_q), as FlashAttention returns it, or "TH".
        max_seqlen_q: no request has more new tokens. Without it every call reads a CUDA tensor of boundaries, which
            waits for the device; with it, it is trusted, and all results of a request with more are NaN.
        scale, softcap, window_size, sinks: as of `attention`; those that the engine's attention has.
        query_mask, query_weight: (total_q,), which new tokens count in columns, and how much.
        segment_boundaries: (B, S + 1) int, those of `SegmentMass()` for each request.
        heads: as of `attention`.
        check: compare the lse of a few rows with that of their scores, as `statistics_from_lse` does; reads all keys.
        backend: as of `attention`.

    Returns:
        `rows`, the statistics of the new tokens, and `columns`, what the step adds to the sums of each key. With
        `hi` the largest horizon among the column statistics, they have the keys of each request from
        `first_key = max(0, seqused_k - new tokens - hi)` on; for an open horizon all keys, for `Received` those within
        window_size.

    Raises:
        TypeError, ValueError: naming the argument, what came and what would work.

    Example:
        >>> import torch, attnstats
        >>> key_cache = torch.zeros(4, 16, 1, 8)  # the pages of all requests
        >>> step = dict(
        ...     block_table=torch.tensor([[2, 0], [3, 1]], dtype=torch.int32),
        ...     cu_seqlens_q=torch.tensor([0, 1, 2], dtype=torch.int32),  # each decodes one token
        ...     seqused_k=torch.tensor([20, 5], dtype=torch.int32),
        ... )
        >>> result = attnstats.paged_statistics(
        ...     torch.zeros(2, 1, 8), key_cache, **step, statistics=[attnstats.LocalMass(2), attnstats.FAI(1, 3)]
        ... )
        >>> result.rows["local_mass"]  # 2 of 20 keys, 2 of 5
        tensor([[0.1000, 0.4000]])
        >>> result.first_key, result.cu_seqlens_k
        (tensor([16,  1], dtype=torch.int32), tensor([0, 4, 8], dtype=torch.int32))
        >>> result.columns["fai"][0, 4:]  # of keys 1 .. 4 of the second request
        tensor([0.2000, 0.2000, 0.2000, 0.0000])

    Source: as `attention`.
    """
    check_plain(
        query=query,
        key_cache=key_cache,
        block_table=block_table,
        cu_seqlens_q=cu_seqlens_q,
        seqused_k=seqused_k,
        lse=lse,
        sinks=sinks,
        query_mask=query_mask,
        query_weight=query_weight,
        segment_boundaries=segment_boundaries,
    )
    if is_tracing(query):
        raise RuntimeError("attnstats.paged_statistics can't be traced; call it outside of the compiled graph")
    refuse_trace()
    statistics = resolve(statistics)
    _refuse_ends(statistics)
    pages = paging.read(query, key_cache, block_table, cu_seqlens_q, seqused_k)
    by_statistic = arguments.heads_by_statistic(heads, statistics, query.shape[1])
    left = arguments.window_sides(window_size, is_causal=True)[0]
    attends = lse is None or not all(s.from_lse for s in statistics)
    whole_rows = attends or check or backend == "reference"
    changed_before = _changed_before(statistics, left)
    read_before = _read_before(statistics, left, whole_rows, changed_before)
    read = pages.layout(read_before)
    options = Options(
        statistics=tuple(s.summed for s in statistics),
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=read.cu_seqlens,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=None if max_seqlen_q is None else read.total,
        scale=scale,
        enable_gqa=True,
        softcap=softcap,
        window_size=window_size,
        sinks=sinks,
        query_mask=query_mask,
        query_weight=query_weight,
        segment_boundaries=segment_boundaries,
        heads={s.summed: of_heads for s, of_heads in by_statistic.items()} or None,
        backend=backend,
        lse_base=lse_base,
        lse_layout=lse_layout,
        check=check,
        grows=True,
    )
    keys = paging.PagedKeys(key_cache, pages, read)
    if lse is None or attends:
        # The output is not asked for: keys stand for the values, which the engine need not show.
        key = keys.copied()
        if lse is not None:  # what is wrong with it is an error here, too
            _dispatch.from_lse(query, key, lse, options._replace(statistics=(LSE(),), heads=None))
        evaluation, geometry = _dispatch.attend(query.detach(), key, key, options)
        results, lse = evaluation.tensors, evaluation.lse
    else:
        results, lse, geometry = _dispatch.from_lse(query, keys, lse, options)
    rows = {s: results[s][0] for s in statistics if s.axis == "row"}
    columns = {s: results[s.summed][0] for s in statistics if s.axis == "column"}
    counts = {s: geometry.counts(s)[0] for s in columns if s.is_mean}
    changed = read
    if changed_before != read_before:
        changed = pages.layout(changed_before)
        place = changed.places_in(read)
        columns = {s: x[:, place] for s, x in columns.items()}
        counts = {s: x[place] for s, x in counts.items()}
    return PagedStatistics(
        Statistics(rows, lambda s: geometry.validity(s)[0], lambda s: geometry.counts(s)[0], lse[0]),
        ByStatistic(columns),
        ByStatistic(counts),
        changed.first_key,
        changed.cu_seqlens,
    )


def _changed_before(statistics: tuple[Statistic, ...], left: int | None) -> int | None:
    """How many keys before the new tokens get something from them; None: all do.

    A window bounds what is added to sums, but queries count for means also where they don't see the key.
    """
    return _farthest(_reach(s) if s.is_mean else _within(left, _reach(s)) for s in statistics if s.axis == "column")


def _read_before(
    statistics: tuple[Statistic, ...], left: int | None, whole_rows: bool, changed: int | None
) -> int | None:
    """How many keys before the new tokens are read, the changed ones among them; None: all. whole_rows: all that a
    query sees."""
    if any(s.method in ("first_keys", "segments", "top") for s in statistics):
        return None  # they number keys from the first one on
    rows = (None if whole_rows else _reach(s) for s in (*statistics, LSE()))
    return _farthest([changed, *(_within(left, reach) for reach in rows)])


def _reach(statistic: Statistic) -> int | None:
    """The farthest distance that a statistic from an lse looks at; None: there is none."""
    if statistic.method == "lse":
        return 0
    if statistic.band is None or not (statistic.axis == "column" or statistic.is_banded):
        return None
    # A row that ends with its band would count as one without keys outside of it (`Geometry.tail_of`).
    return max(0, statistic.band[1] + (statistic.axis == "row"))


def _within(left: int | None, reach: int | None) -> int | None:
    return reach if left is None else left if reach is None else min(left, reach)


def _farthest(reaches: Iterable[int | None]) -> int | None:
    farthest = 0
    for reach in reaches:
        if reach is None:
            return None
        farthest = max(farthest, reach)
    return farthest


def _refuse_ends(statistics: tuple[Statistic, ...]) -> None:
    """Raise ValueError for statistics that steps don't add up to."""
    for s in statistics:
        if not s.grows:
            raise ValueError(
                f"statistics: {s} depends on the end of the sequence, and steps of it don't add up; leave it out"
            )
