"""Adds up the results that forward.py wrote for each split of the keys.

    program (i_block):

        rows [BM] of all (B, Hq, Tq)      split 0 | split 1 | ...      once for lse, output and each statistic

With w_i = exp(lse_i - lse) and lse = log sum_i exp(lse_i): output and distance statistics are sum_i w_i x_i, the
entropy is sum_i w_i (H_i - ln w_i), the maximum is the largest. A sink is one more term of the sum for lse.
"""

import triton
import triton.language as tl

from .tiles import LN2, wide


@triton.jit
def combine(
    output_parts, lse_parts, row_parts, output, lse, rows, sinks,
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
    for i_split in range(n_splits):
        b_part = tl.load(lse_parts + wide(i_split) * n_rows + o_row, mask=m_row, other=float("-inf"))
        b_top = tl.maximum(b_top, b_part)
    m_live = b_top != float("-inf")
    b_sink = tl.full((BM,), float("-inf"), tl.float32)
    if sinks is not None:
        b_sink = tl.load(sinks + o_row // n_queries % n_query_heads, mask=m_row, other=float("-inf")) * LN2
        b_top = tl.maximum(b_top, b_sink)
    b_pivot = tl.where(m_live, b_top, 0.0)
    b_sum = tl.exp(b_sink - b_pivot)
    for i_split in range(n_splits):
        b_part = tl.load(lse_parts + wide(i_split) * n_rows + o_row, mask=m_row, other=float("-inf"))
        b_sum += tl.exp(b_part - b_pivot)
    b_lse = b_pivot + tl.log(tl.where(m_live, b_sum, 1.0))
    tl.store(lse + o_row, tl.where(m_live, b_lse, float("-inf")), mask=m_row)

    b_out = tl.zeros((BM, BLOCK_VALUE_DIM), tl.float32)
    for i_split in range(n_splits):
        b_part = tl.load(lse_parts + wide(i_split) * n_rows + o_row, mask=m_row, other=float("-inf"))
        p_part = output_parts + wide(i_split) * n_rows * VALUE_DIM
        b_out += tl.exp(b_part - b_lse)[:, None] * tl.load(p_part + o_out, mask=m_out, other=0.0)
    tl.store(output + o_out, b_out.to(output.dtype.element_ty), mask=m_out)

    for j in tl.static_range(LOOP_ROWS + ENTROPY + MAX_LOGIT):
        b_row = tl.zeros((BM,), tl.float32)
        if j == LOOP_ROWS + ENTROPY:
            b_row += float("-inf")
        for i_split in range(n_splits):
            b_part = tl.load(lse_parts + wide(i_split) * n_rows + o_row, mask=m_row, other=float("-inf"))
            b_log = b_part - b_lse
            b_w = tl.exp(b_log)
            b_x = tl.load(row_parts + (wide(j) * n_splits + i_split) * n_rows + o_row, mask=m_row, other=0.0)
            if j < LOOP_ROWS:
                b_row += b_w * b_x
            elif j < LOOP_ROWS + ENTROPY:
                b_row += b_w * (b_x - tl.where(b_w > 0, b_log, 0.0))
            else:
                b_row = tl.maximum(b_row, b_x)
        tl.store(rows + j * wide(n_rows) + o_row, b_row, mask=m_row)
