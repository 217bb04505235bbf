"""The public functions: attention that returns its statistics, and statistics beside any attention kernel.

Each puts its arguments into one record, `Options`. `core.arguments` validates it and a backend does the work
(_dispatch.py); a traced call becomes an operator of _operators.py, which does the same when the graph runs.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from torch import Tensor

from attnstats import _dispatch, _operators
from attnstats._operators import refuse_script, refuse_trace
from attnstats.core.arguments import plain
from attnstats.core.geometry import Validity, as_autocast, as_result, as_statistics
from attnstats.core.options import Heads, Options, Window, check_names
from attnstats.results import AttentionResult, Explanation, Statistics
from attnstats.statistics import Statistic

Backend = Literal["auto", "reference", "tiled", "flash", "triton"]


@refuse_script
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    statistics: Iterable[Statistic | str] = (),
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = True,
    scale: float | None = None,
    enable_gqa: bool = False,
    softcap: float | None = None,
    window_size: Window | None = None,
    sinks: Tensor | None = None,
    query_mask: Tensor | None = None,
    query_weight: Tensor | None = None,
    segment_boundaries: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    query_offset: int | None = None,
    heads: Heads | None = None,
    differentiable: bool = False,
    backend: Backend = "auto",
) -> AttentionResult:
    """Scaled dot product attention and statistics of its map, in O(T) memory.

    The output is that of `torch.nn.functional.scaled_dot_product_attention`, and so are its gradients; the
    statistics carry none unless asked to. Causal masks are aligned to the end: with Tq=2, Tk=5 the queries see

        1 1 1 1 0
        1 1 1 1 1

    Args:
        query: (B, Hq, Tq, D), float16, bfloat16, float32 or float64, strides as they come.
        key: (B, Hkv, Tk, D); Hq must be a multiple of Hkv.
        value: (B, Hkv, Tk, Dv).
        statistics: instances of the catalogue (`WAAD(10)`, `FAI(10, 100)`, ...), or names for the defaults.
        attn_mask: bool, True where a key may be seen, broadcastable to (B, 1, 1, Tk). Masks that depend on the
            query would cost O(Tq * Tk): only `backend="reference"` takes them, also additive ones. A causal bias of
            torch.nn.attention.bias stands for is_causal and query_offset.
        dropout_p: the share of the map, in [0, 1), that is dropped before it meets the values, the rest being scaled
            by 1 / (1 - dropout_p). Statistics and lse are those of the map before. Like SDPA it drops whenever it
            is not 0: pass 0 in evaluation. `torch.manual_seed` governs it; backends draw different masks.
        is_causal: query t sees keys s <= t.
        scale: multiplies the scores; default 1 / sqrt(D).
        enable_gqa: allow fewer key than query heads; heads are never repeated in memory.
        softcap: scores become `softcap * tanh(score / softcap)`; default: they stay.
        window_size: (left, right), query t sees keys `t - left .. t + right`; None or -1 for no limit. A sliding
            window of w tokens, the query's own included, is (w - 1, 0).
        sinks: (Hq,) float below inf, a logit per head that takes part in the softmax and belongs to no key. The lse
            counts it;
            statistics are of the mass on keys, which then is less than 1.
        query_mask: (B, Tq) bool, which queries count in column statistics (the response, say); default all.
        query_weight: (B, Tq) float u, how much each query counts there: sums are `sum_t u[t] * A[t, s]`, means divide
            by the sum of u over T(s) and need u >= 0. Where u is 0 a query doesn't count, as where query_mask is False.
            It carries no gradient.
        segment_boundaries: (B, S + 1) int, those of `SegmentMass()` for each batch row; a last one of -1 is open. Those
            of a CUDA tensor are not read, and must not decrease.
        key_padding_mask: (B, Tk) bool, True for real tokens. In self-attention (is_causal, or Tq = Tk) padding
            positions are no queries either: their statistics are 0 and they don't count.
        query_offset: position of the first query, the first key being at 0; default Tk - Tq, the queries last.
        heads: the query heads to compute statistics of, `[0, 5]`, or such lists by statistic or name,
            `{"waad": [0, 5], "fai": [2]}`; results have these heads in this order. Default: all.
        differentiable: statistics carry gradients into query, key and sinks, for a loss on the map's shape:
            all but MaxLogit, SinkMass, TopKeys, PooledMap and Received(last=...). `.lse` never does, LSE() does. The
            backward pass recomputes the map by tiles, in O(T) memory; columns cost it one more matmul per pair.
        backend: "reference" (eager), "tiled" (plain PyTorch), "flash" (FlashAttention or cuDNN, with kernels for
            the statistics), "triton" (kernels), "auto" (flash on a GPU, triton for what it can't take, else tiled).

    Under `torch.autocast` query, key and value are cast as SDPA casts them.

    Returns:
        `output` (B, Hq, Tq, Dv), 0 for rows that see no key, and `statistics`: rows (B, Hq, Tq), columns
        (B, Hq, Tk), maps (B, Hq, I, J) by statistic or name, with `.lse` (B, Hq, Tq) in natural log and `.valid`.

    Raises:
        TypeError, ValueError: naming the argument, what came and what would work.

    Example:
        >>> import torch, attnstats
        >>> query, key, value = torch.zeros(3, 1, 2, 4, 16)
        >>> output, stats = attnstats.attention(query, key, value, statistics=[attnstats.WAAD(2)])
        >>> stats["waad"][0, 0]  # uniform attention to all that came before
        tensor([0.0000, 0.5000, 1.0000, 1.2500])

    Source: Li et al., arXiv 2510.13554v2, Eq. 3 (A), Eq. 9 (WAAD), Eq. 10 (FAI).
    """
    options = Options(
        statistics=statistics,
        attn_mask=attn_mask,
        key_padding_mask=key_padding_mask,
        query_offset=query_offset,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=enable_gqa,
        softcap=softcap,
        window_size=window_size,
        sinks=sinks,
        query_mask=query_mask,
        query_weight=query_weight,
        segment_boundaries=segment_boundaries,
        heads=heads,
        dropout_p=dropout_p,
        differentiable=differentiable,
        backend=backend,
    )
    return attend(query, key, value, options)


@refuse_script
def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    statistics: Iterable[Statistic | str] = (),
    dropout_p: float = 0.0,
    is_causal: bool = True,
    scale: float | None = None,
    enable_gqa: bool = False,
    softcap: float | None = None,
    window_size: Window | None = None,
    sinks: Tensor | None = None,
    query_mask: Tensor | None = None,
    query_weight: Tensor | None = None,
    segment_boundaries: Tensor | None = None,
    heads: Heads | None = None,
    differentiable: bool = False,
    backend: Backend = "auto",
) -> AttentionResult:
    """`attention` for sequences of different lengths, packed end to end without padding.

    Sequence i has the queries `cu_seqlens_q[i] : cu_seqlens_q[i + 1]` and the keys likewise; its queries are its last
    positions, and nothing is seen or counted across sequences. Statistics are those of each sequence on its own.

    Args:
        query: (total_q, Hq, D), float16, bfloat16, float32 or float64, strides as they come.
        key: (total_k, Hkv, D).
        value: (total_k, Hkv, Dv).
        cu_seqlens_q: (n + 1,) int32, boundaries of n sequences from 0 on; equal ones make an empty sequence. Tokens
            after the last boundary belong to no sequence: their output is 0.
        cu_seqlens_k: the same for key and value; default cu_seqlens_q.
        max_seqlen_q, max_seqlen_k: no sequence is longer. Without them every call reads a CUDA tensor of boundaries,
            which waits for the device; with them it is trusted, and all results of a longer sequence are NaN. On the
            CPU a longer one is an error.
        query_mask: (total_q,) bool, which queries count in column statistics; default all.
        query_weight: (total_q,) float, how much each of them counts.
        segment_boundaries: (n, S + 1) int, those of `SegmentMass()` for each sequence, counted from its first key.

    The other arguments are those of `attention`.

    Returns:
        `output` (total_q, Hq, Dv) and `statistics`: rows and `.lse` (Hq, total_q), columns (Hq, total_k).

    Raises:
        TypeError, ValueError: naming the argument, what came and what would work. PooledMap is refused.

    Example:
        >>> import torch, attnstats
        >>> query, key, value = torch.zeros(3, 5, 1, 16)
        >>> cu_seqlens = torch.tensor([0, 2, 5], dtype=torch.int32)
        >>> inputs = dict(query=query, key=key, value=value, cu_seqlens_q=cu_seqlens)
        >>> _, stats = attnstats.varlen_attention(**inputs, statistics=["mean_distance"])
        >>> stats["mean_distance"]
        tensor([[0.0000, 0.5000, 0.0000, 0.5000, 1.0000]])

    Source: as `attention`.
    """
    options = Options(
        statistics=statistics,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=enable_gqa,
        softcap=softcap,
        window_size=window_size,
        sinks=sinks,
        query_mask=query_mask,
        query_weight=query_weight,
        segment_boundaries=segment_boundaries,
        heads=heads,
        dropout_p=dropout_p,
        differentiable=differentiable,
        backend=backend,
    )
    return attend(query, key, value, options)


@refuse_script
def statistics_from_lse(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    *,
    statistics: Iterable[Statistic | str],
    lse_base: Literal["e", "2"] = "e",
    lse_layout: Literal["HT", "TH"] | None = None,
    cu_seqlens_q: Tensor | None = None,
    check: bool | None = None,
    backend: Backend = "auto",
    **arguments: Any,
) -> Statistics:
    """Statistics beside an attention kernel of your own, from the log-sum-exp it returned.

    All but MaxLogit, which isn't a function of the lse. Masks, scale, softcap and sinks must be those the kernel used:
    with the sinks' share a row of exp(score - lse) must sum to 1 over its visible keys. A few rows of each head are
    checked. Where the sum is not 1 (check=False, and an lse that counts keys that aren't passed), WAAD is off by
    `window * (1 - that sum)` unless the window holds the whole sequence; statistics whose weight is 0 far away are
    those of the keys that are passed.

    Args:
        query, key: as `attention` takes and casts them, or with cu_seqlens_q as `varlen_attention` does.
        lse: (B, Hq, Tq), packed (Hq, total_q) or (total_q, Hq), a last dimension of 1 is dropped; float32 or float64:
            the log of the row sums of exp(score). Its value in rows that see no key is ignored (kernels give -inf, +inf
            or 0 there).
        lse_base: "e" for natural logs, "2" for logs to base 2. docs/kernels.md has a line for each kernel library.
        lse_layout: of a packed lse, "HT" for (Hq, total_q) or "TH"; needed only where both are the same number.
        cu_seqlens_q: packed sequences, see `varlen_attention`; None: a batch.
        check: compare the lse of a few rows of each head with that of their scores, in O(T), and raise an error that
            says what a wrong one looks like. None: on the CPU alone and not in a traced graph (torch.compile,
            torch.export), because a check waits for the device; True: there too, when the graph runs. False: for an lse
            that counts keys which aren't passed, as of parts that were merged.
        arguments: the other keyword arguments of `attention`, or of `varlen_attention`.

    The returned value and the source are those of `attention` and `varlen_attention`.

    Raises:
        TypeError, ValueError: naming the argument, what came and what would work.
    """
    check_names("statistics_from_lse", cu_seqlens_q is not None, arguments)
    options = Options(
        statistics=statistics,
        cu_seqlens_q=cu_seqlens_q,
        lse_base=lse_base,
        lse_layout=lse_layout,
        check=_checks(check, query),
        backend=backend,
        **arguments,
    )
    return from_lse(query, key, lse, options)


def explain(
    query: Tensor,
    key: Tensor,
    value: Tensor | None = None,
    *,
    statistics: Iterable[Statistic | str] = (),
    cu_seqlens_q: Tensor | None = None,
    dropout_p: float = 0.0,
    differentiable: bool = False,
    backend: Backend = "auto",
    **arguments: Any,
) -> Explanation:
    """The passes of `attention` on these tensors, or with `value=None` those of `statistics_from_lse`; runs nothing.

    Takes the other arguments of `attention`, with cu_seqlens_q those of `varlen_attention`, and raises their errors.

    Returns:
        The backend and its passes in the order in which they run, each with the results that it computes, its tiles,
        floating-point operations and scratch memory over all heads. It prints as text.

    Example:
        >>> import torch, attnstats
        >>> query = torch.zeros(1, 8, 1024, 64)
        >>> attnstats.explain(query, query, query, statistics=["waad"], backend="tiled")
        backend: tiled (as asked)
          torch's flash attention for CPU
            output, lse: 1.07 GFLOP, 0.0 MB of scratch
          band, ...
            waad: 0.08 GFLOP, ... MB of scratch
    """
    check_names("explain", cu_seqlens_q is not None, arguments)
    options = Options(
        statistics=statistics,
        cu_seqlens_q=cu_seqlens_q,
        dropout_p=dropout_p,
        differentiable=differentiable,
        backend=backend,
        **arguments,
    )
    return _dispatch.explain(query, key, value, plain(query, key, value, options))


def _checks(check: bool | None, query: Tensor) -> bool:
    if check is None:
        return not _operators.is_tracing(query) and isinstance(query, Tensor) and query.device.type == "cpu"
    if not isinstance(check, bool):
        raise TypeError(f"check must be True, False or None (on the CPU), got {check!r}")
    return check


def attend(query: Tensor, key: Tensor, value: Tensor, options: Options) -> AttentionResult:
    """`attention`, or `varlen_attention` where the options have cu_seqlens_q."""
    options = plain(query, key, value, options)
    query, key, value = as_autocast(query, key, value)
    if _operators.is_tracing(query):
        return _operators.attention(query, key, value, options)
    if options.statistics:
        refuse_trace()
    return as_result(*_dispatch.attend(query, key, value, options))


def from_lse(query: Tensor, key: Tensor, lse: Tensor, options: Options) -> Statistics:
    """`statistics_from_lse`."""
    options = plain(query, key, None, options, lse)
    query, key = as_autocast(query, key)  # as the kernel had them
    if _operators.is_tracing(query):
        return _operators.statistics_from_lse(query, key, lse, options)
    refuse_trace()
    return as_statistics(*_dispatch.from_lse(query, key, lse, options))


def placeholders(query: Tensor, key: Tensor, lse: Tensor, options: Options) -> tuple[Validity, Validity]:
    """`Statistics.valid` and `.counts` of a call, by statistic, for values that were computed by other calls."""
    options = options._replace(heads=None)
    if _operators.is_tracing(query):
        return _operators.placeholders(lse, key, options)
    geometry = _dispatch.geometry_of(query, key, options)
    return geometry.validity, geometry.counts
