"""Column sums over every visible query, from (query, key, lse): open horizons, received attention, pooled maps.

    program (i_sequence, i_head, i_block):

        keys [BN, D], resident     queries of segment 0   [ tile ][ tile ]...
                                           of segment 1   [ tile ][ tile ]...

Key-stationary: one matmul per tile instead of the forward's two and no online softmax, since A = exp2(Q K^T - lse2).
From some distance on each weight is constant. There the tile of A is accumulated elementwise, once for all statistics
and without a mask, and reduced once per segment; nearer tiles are weighted and reduced one by one.
Queries that must not count, or see nothing, have lse2 = +inf in the copy that is passed here, so their A is exactly 0
and no query mask is read; COUNTED: some don't count, and a NaN in them is none of a key's business. Padding among
the keys spoils only its own column, which is stored as 0.

Columns are stored as [COLUMNS, B, heads, Tk] float32; there is one segment, all queries. A pooled map has p_bounds,
the segments' n + 1 boundaries, and cuts each block of keys into pieces at the boundaries of key segments: piece i of
block b holds the keys p_pieces[p_block[b] + i] .. of the next one, and [pieces, B, heads, segments] is stored.
"""

import triton
import triton.language as tl

from .tiles import (
    FIELDS,
    extent,
    head_pointer,
    inside,
    keys_present,
    load_tile,
    scores,
    weigh,
    wide,
)


@triton.jit
def near(
    b_sum, b_kt, o_key, p_q, q_strides, p_lse2, offset, first, last, left, right, scale2, cap2,
    COLUMNS: tl.constexpr, J: tl.constexpr, BM: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """Add to b_sum [BN], statistic J's, what the queries first .. last give, whether or not they see all keys."""
    for start in range(first, last, BM):
        o_row = start + tl.arange(0, BM)
        b_q = load_tile(p_q, q_strides, start, last, BM, DIM, BLOCK_DIM, True)  # [BM, BLOCK_DIM]
        b_lse2 = tl.load(p_lse2 + o_row, mask=o_row < last, other=float("inf"))
        b_x = scores(b_q, b_kt, scale2, cap2) - b_lse2[:, None]  # [BM, BN]
        distance = offset + o_row[:, None] - o_key[None, :]
        m_seen = inside((b_lse2 < float("inf"))[:, None], distance, left, right)
        b_a = tl.exp2(tl.where(m_seen, b_x, float("-inf")))
        b_sum += tl.sum(b_a * weigh(distance.to(tl.float32), COLUMNS, J), 0)
    return b_sum


@triton.jit
def far(
    b_sum, b_kt, p_q, q_strides, p_lse2, first, last, scale2, cap2,
    COUNTED: tl.constexpr, BM: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """Add the A of whole tiles of queries, which see every key, to b_sum [BM, BN]."""
    for start in range(first, last, BM):
        b_q = load_tile(p_q, q_strides, start, last, BM, DIM, BLOCK_DIM, False)  # [BM, BLOCK_DIM]
        b_lse2 = tl.load(p_lse2 + start + tl.arange(0, BM))
        b_x = scores(b_q, b_kt, scale2, cap2) - b_lse2[:, None]
        if COUNTED:
            b_x = tl.where((b_lse2 < float("inf"))[:, None], b_x, float("-inf"))
        b_sum += tl.exp2(b_x)
    return b_sum


@triton.jit
def column(
    p_q, p_k, p_lse2, p_columns, p_key_mask, p_cu_q, p_cu_k, p_heads, p_bounds, p_block, p_pieces,
    n_batch, n_all_heads, n_heads, group, query_offset, n_queries, n_keys, longest, n_segments,
    left, right, reach, scale2, cap2,
    q_strides, k_strides,
    COLUMNS: tl.constexpr, FAR: tl.constexpr, FAR_WEIGHTS: tl.constexpr, COUNTED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """FAR: from this distance on statistic j has the weight FAR_WEIGHTS[j]; None: never. reach: the farthest
    distance at which any weight is not 0; None: there is none."""
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
    # Transposed here, not in the loop: there it would go through shared memory again and again.
    b_kt = tl.trans(load_tile(p_k_head, k_strides, k_start, keys, BN, DIM, BLOCK_DIM, True))  # [BLOCK_DIM, BN]
    m_key = keys_present(p_key_mask, i_batch, o_key, keys)
    o_place = wide(i_batch) * n_heads + i_place
    position = k_start - offset  # of the block's first key, as a row
    for i_segment in range(n_segments):
        first, last = 0, rows
        if p_bounds is not None:
            first = tl.load(p_bounds + i_segment)
            last = tl.load(p_bounds + i_segment + 1)
        # The rows first .. last see keys of the block; those in whole .. edge see all, at constant weights.
        if right is not None:
            first = tl.minimum(tl.maximum(first, position - right), last)
        if left is not None:
            last = tl.maximum(tl.minimum(last, position + BN + left), first)
        if reach is not None:
            last = tl.maximum(tl.minimum(last, position + BN + reach), first)
        edge = last
        if left is not None:
            edge = tl.minimum(last, position + left + 1)
        whole = last
        if FAR is not None:
            whole = first
            if right is not None:
                whole = tl.maximum(whole, position + BN - 1 - right)
            whole = tl.maximum(whole, position + BN - 1 + FAR)
            whole = tl.minimum(first + tl.cdiv(whole - first, BM) * BM, last)
        edge = whole + tl.maximum(edge - whole, 0) // BM * BM

        # One statistic after the other: together they would take more registers than there are.
        sums = ()
        for j in tl.static_range(len(COLUMNS) // FIELDS):
            b_sum = tl.zeros((BN,), tl.float32)
            for part in tl.range(0, 2, num_stages=1):
                b_sum = near(
                    b_sum, b_kt, o_key, p_q_head, q_strides, p_lse2_head, offset,
                    tl.where(part == 0, first, edge), tl.where(part == 0, whole, last),
                    left, right, scale2, cap2, COLUMNS, j, BM, DIM, BLOCK_DIM,
                )  # fmt: skip
            sums = sums + (b_sum,)
        b_far = tl.zeros((BM, BN), tl.float32)
        if FAR is not None:
            b_far = far(
                b_far, b_kt, p_q_head, q_strides, p_lse2_head, whole, edge, scale2, cap2,
                COUNTED, BM, DIM, BLOCK_DIM,
            )  # fmt: skip
        b_far_sum = tl.sum(b_far, 0)
        if p_bounds is None:
            for j in tl.static_range(len(COLUMNS) // FIELDS):
                b_column = sums[j]
                if FAR is not None:
                    b_column += FAR_WEIGHTS[j] * b_far_sum
                p_column = p_columns + ((wide(j) * n_batch * n_heads) + o_place) * n_keys + k_begin
                tl.store(p_column + o_key, tl.where(m_key, b_column, 0.0), mask=o_key < keys)
        else:
            b_column = tl.where(m_key, sums[0] + b_far_sum, 0.0)
            for i_piece in range(tl.load(p_block + i_block), tl.load(p_block + i_block + 1)):
                m_piece = (o_key >= tl.load(p_pieces + i_piece)) & (o_key < tl.load(p_pieces + i_piece + 1))
                p_piece = p_columns + (wide(i_piece) * n_batch * n_heads + o_place) * n_segments
                tl.store(p_piece + i_segment, tl.sum(tl.where(m_piece, b_column, 0.0)))
