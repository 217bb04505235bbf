"""Column sums over every visible query, from (query, key, lse): open horizons, received attention, pooled maps.

    program (i_sequence, i_head, i_block):

        keys [BN, D], resident     queries of segment 0   [ tile ][ tile ]...
                                           of segment 1   [ tile ][ tile ]...

Key-stationary: one matmul per tile instead of the forward's two and no online softmax, since
A^T = exp2(K Q^T - lse2). The tile of A^T is accumulated elementwise and reduced once per segment.
Queries that must not count, or see nothing, have lse2 = +inf in the copy that is passed here, so their A is
exactly 0 and no query mask is needed. Padding among the keys spoils only its own column, which is stored as 0.

Columns are stored as [COLUMNS, B, heads, Tk] float32; there is one segment, all queries. A pooled map has p_bounds,
the segments' n + 1 boundaries, and cuts each block of keys into pieces at the boundaries of key segments: piece i of
block b holds the keys p_pieces[p_block[b] + i] .. of the next one, and [pieces, B, heads, segments] is stored.
"""

import triton
import triton.language as tl

from attnstats.kernels.tiles import (
    FIELDS,
    extent,
    head_pointer,
    inside,
    keys_present,
    load_tile,
    scores,
    weigh,
    wide,
    zeros_for,
)


@triton.jit
def gather(
    sums, b_k, o_key, p_q, q_strides, p_lse2, offset, first, last, n_queries, left, right, scale2, cap2,
    COLUMNS: tl.constexpr, EDGE: tl.constexpr, BM: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """Stream the queries first .. last past the keys. EDGE: some pairs of them don't see each other."""
    for start in range(first, last, BM):
        o_row = start + tl.arange(0, BM)
        b_q = load_tile(p_q, q_strides, start, n_queries, BM, DIM, BLOCK_DIM, True)  # [BM, BLOCK_DIM]
        b_lse2 = tl.load(p_lse2 + o_row, mask=o_row < last, other=float("inf"))
        b_log_a = scores(b_k, tl.trans(b_q), scale2, cap2) - b_lse2[None, :]  # [BN, BM]
        distance = offset + o_row[None, :] - o_key[:, None]
        if EDGE:
            b_log_a = tl.where(inside(distance == distance, distance, left, right), b_log_a, float("-inf"))
        b_a = tl.exp2(b_log_a)
        updated = ()
        for j in tl.static_range(len(COLUMNS) // FIELDS):
            b_w = weigh(distance, COLUMNS, j)
            updated = updated + (sums[j] + b_a * b_w,)
        sums = updated
    return sums


@triton.jit
def column(
    p_q, p_k, p_lse2, p_columns, p_key_mask, p_cu_q, p_cu_k, p_heads, p_bounds, p_block, p_pieces,
    n_batch, n_all_heads, n_heads, group, query_offset, n_queries, n_keys, longest, n_segments,
    left, right, scale2, cap2,
    q_strides, k_strides,
    COLUMNS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    n_blocks = tl.cdiv(longest, BN)
    i_program = tl.program_id(0)
    i_block = i_program % n_blocks  # under a causal mask the first keys have the most queries
    i_place = i_program // n_blocks % n_heads  # among the heads of what is stored
    i_sequence = i_program // (n_blocks * n_heads)
    i_head = i_place
    if p_heads is not None:
        i_head = tl.load(p_heads + i_place)
    i_batch, q_begin, rows, k_begin, keys, offset = extent(i_sequence, p_cu_q, p_cu_k, query_offset, n_queries, n_keys)
    k_start = i_block * BN
    if p_cu_q is not None:  # the grid is that of the longest sequence
        rows = tl.where(k_start < keys, rows, 0)
    o_key = k_start + tl.arange(0, BN)
    p_k_head = head_pointer(p_k, k_strides, i_batch, i_head // group, k_begin)
    p_q_head = head_pointer(p_q, q_strides, i_batch, i_head, q_begin)
    p_lse2_head = p_lse2 + (wide(i_batch) * n_all_heads + i_head) * n_queries + q_begin
    b_k = load_tile(p_k_head, k_strides, k_start, keys, BN, DIM, BLOCK_DIM, True)
    m_key = keys_present(p_key_mask, i_batch, o_key, keys)
    o_place = wide(i_batch) * n_heads + i_place
    for i_segment in range(n_segments):
        first, last = 0, rows
        if p_bounds is not None:
            first = tl.load(p_bounds + i_segment)
            last = tl.load(p_bounds + i_segment + 1)
        # The rows first .. last see keys of the block; those in whole .. edge see all of them.
        if right is not None:
            first = tl.minimum(tl.maximum(first, k_start - right - offset), last)
        whole = first
        if left is not None:
            last = tl.maximum(tl.minimum(last, k_start + BN + left - offset), first)
        edge = last
        if right is not None:
            partly = tl.maximum(k_start + BN - 1 - right - offset - first, 0)
            whole = tl.minimum(first + tl.cdiv(partly, BM) * BM, last)
        if left is not None:
            edge = whole + tl.maximum(tl.minimum(last, k_start + left - offset + 1) - whole, 0) // BM * BM
        sums = zeros_for(len(COLUMNS) // FIELDS, (BN, BM))
        sums = gather(
            sums, b_k, o_key, p_q_head, q_strides, p_lse2_head, offset, whole, edge, rows,
            left, right, scale2, cap2, COLUMNS, False, BM, DIM, BLOCK_DIM,
        )  # fmt: skip
        if right is not None:
            sums = gather(
                sums, b_k, o_key, p_q_head, q_strides, p_lse2_head, offset, first, whole, rows,
                left, right, scale2, cap2, COLUMNS, True, BM, DIM, BLOCK_DIM,
            )  # fmt: skip
        if left is not None:
            sums = gather(
                sums, b_k, o_key, p_q_head, q_strides, p_lse2_head, offset, edge, last, rows,
                left, right, scale2, cap2, COLUMNS, True, BM, DIM, BLOCK_DIM,
            )  # fmt: skip
        if p_bounds is None:
            for j in tl.static_range(len(COLUMNS) // FIELDS):
                p_column = p_columns + ((wide(j) * n_batch * n_heads) + o_place) * n_keys + k_begin
                tl.store(p_column + o_key, tl.where(m_key, tl.sum(sums[j], 1), 0.0), mask=o_key < keys)
        else:
            b_column = tl.where(m_key, tl.sum(sums[0], 1), 0.0)
            for i_piece in range(tl.load(p_block + i_block), tl.load(p_block + i_block + 1)):
                m_piece = (o_key >= tl.load(p_pieces + i_piece)) & (o_key < tl.load(p_pieces + i_piece + 1))
                p_piece = p_columns + (wide(i_piece) * n_batch * n_heads + o_place) * n_segments
                tl.store(p_piece + i_segment, tl.sum(tl.where(m_piece, b_column, 0.0)))
