"""Adds up the results that forward.py wrote for each split of the keys.

    program (i_block):

        rows [BM] of all (B, Hq, Tq)      split 0 | split 1 | ...      once for lse, output and each statistic

Split i has A = exp2(score - pivot_i) * factor_i, so its share of the row is w_i = exp2(pivot_i - top) / factor_i over
the sum of these: output and distance statistics are sum_i w_i x_i, the entropy is sum_i w_i (H_i - ln w_i), the maximum
is the largest. A sink is one more term of the sum. Neither these shares nor the row's own pivot and factor, which are
stored for later passes, have an error of the size of the lse's rounding.
"""

import triton
import triton.language as tl

from .tiles import LN2, load_sinks, wide


@triton.jit
def load_part(pivots, factors, o_part, m_row):
    """Of a split: the pivots, the sums of exp2(score - pivot), and which rows see a key in it; -inf and 0 where not."""
    b_pivot = tl.load(pivots + o_part, mask=m_row, other=float("inf"))
    b_factor = tl.load(factors + o_part, mask=m_row, other=1.0)
    m_sees = b_pivot != float("inf")
    return tl.where(m_sees, b_pivot, float("-inf")), tl.where(m_sees, 1.0 / b_factor, 0.0), m_sees


@triton.jit(do_not_specialize=("n_rows", "n_splits", "n_query_heads", "n_queries"))
def combine(
    output_parts, pivots, factors, row_parts, output, lse, pivot, factor, rows, sinks,
    n_rows, n_splits, n_query_heads, n_queries,
    LOOP_ROWS: tl.constexpr, ENTROPY: tl.constexpr, MAX_LOGIT: tl.constexpr,
    BM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_VALUE_DIM: tl.constexpr,
):  # fmt: skip
    o_row = wide(tl.program_id(0)) * BM + tl.arange(0, BM)
    m_row = o_row < n_rows
    o_dim = tl.arange(0, BLOCK_VALUE_DIM)
    m_out = m_row[:, None] & (o_dim < VALUE_DIM)[None, :]
    o_out = o_row[:, None] * VALUE_DIM + o_dim[None, :]

    b_top = tl.full((BM,), float("-inf"), tl.float32)
    m_live = o_row < 0
    for i_split in range(n_splits):
        b_pivot, _, m_sees = load_part(pivots, factors, wide(i_split) * n_rows + o_row, m_row)
        b_top = tl.maximum(b_top, b_pivot)
        m_live |= m_sees
    b_keys_top = b_top
    b_sink = tl.full((BM,), float("-inf"), tl.float32)
    b_sink_lse = b_sink
    if sinks is not None:
        b_sink_lse, b_sink = load_sinks(sinks + o_row // n_queries % n_query_heads, m_row)
        b_top = tl.maximum(b_top, b_sink)
    b_top = tl.where(b_top == float("-inf"), 0.0, b_top)  # rows of NaN too
    b_sum = tl.exp2(b_sink - b_top)
    for i_split in range(n_splits):
        b_pivot, b_part, _ = load_part(pivots, factors, wide(i_split) * n_rows + o_row, m_row)
        b_sum += tl.exp2(b_pivot - b_top) * b_part
    b_sum = tl.where(b_sum == 0.0, float("nan"), b_sum)  # all scores are -inf, and there is no sink
    b_sum = tl.where(m_live, b_sum, 1.0)
    b_lse = tl.maximum((b_top + tl.log2(b_sum)) * LN2, b_sink_lse, propagate_nan=tl.PropagateNan.ALL)
    tl.store(lse + o_row, tl.where(m_live, b_lse, float("-inf")), mask=m_row)
    b_nan = b_sum * 0.0
    b_pivot = tl.where(b_keys_top == float("-inf"), 0.0, b_keys_top)
    tl.store(pivot + o_row, tl.where(m_live, b_pivot + b_nan, float("inf")), mask=m_row)
    tl.store(factor + o_row, tl.where(m_live & (b_nan == 0.0), tl.exp2(b_keys_top - b_top) / b_sum, 1.0), mask=m_row)

    b_out = tl.zeros((BM, BLOCK_VALUE_DIM), tl.float32)
    for i_split in range(n_splits):
        b_pivot, b_part, _ = load_part(pivots, factors, wide(i_split) * n_rows + o_row, m_row)
        b_w = tl.exp2(b_pivot - b_top) * b_part / b_sum
        p_part = output_parts + wide(i_split) * n_rows * VALUE_DIM
        b_out += b_w[:, None] * tl.load(p_part + o_out, mask=m_out, other=0.0)
    tl.store(output + o_out, b_out.to(output.dtype.element_ty), mask=m_out)

    for j in tl.static_range(LOOP_ROWS + ENTROPY + MAX_LOGIT):
        b_row = tl.zeros((BM,), tl.float32)
        if j == LOOP_ROWS + ENTROPY:
            b_row += float("-inf")
        for i_split in range(n_splits):
            b_pivot, b_part, _ = load_part(pivots, factors, wide(i_split) * n_rows + o_row, m_row)
            b_w = tl.exp2(b_pivot - b_top) * b_part / b_sum
            b_x = tl.load(row_parts + (wide(j) * n_splits + i_split) * n_rows + o_row, mask=m_row, other=0.0)
            if j < LOOP_ROWS:
                b_row += b_w * b_x
            elif j < LOOP_ROWS + ENTROPY:
                b_log = b_pivot - b_top + tl.log2(tl.where(b_w > 0, b_part, 1.0)) - tl.log2(b_sum)
                b_row += b_w * (b_x - tl.where(b_w > 0, b_log * LN2, 0.0))
            else:
                b_row = tl.maximum(b_row, b_x, propagate_nan=tl.PropagateNan.ALL)
        tl.store(rows + j * wide(n_rows) + o_row, b_row, mask=m_row)
