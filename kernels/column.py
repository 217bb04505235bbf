"""Column sums over every visible query, from (query, key, lse): open horizons, received attention, pooled maps.

    program (i_batch, i_key_head, i_block):

        keys [BN, D], resident     queries of head 0, segment 0   [ tile ][ tile ]...
                                             head 0, segment 1   [ tile ][ tile ]...
                                             head 1, segment 0   ...

Key-stationary: one matmul per tile instead of the forward's two and no online softmax, since
A^T = exp2(K Q^T - lse2). The tile of A^T is accumulated elementwise and reduced once per head and segment.
Queries that must not count, or see nothing, have lse2 = +inf in the copy that is passed here, so their A is
exactly 0 and no query mask is needed. Padding among the keys spoils only its own column, which is stored as 0.

Columns are stored as [COLUMNS, segments, B, Hq, Tk] float32; p_bounds holds the segments' n + 1 boundaries.
"""

import triton
import triton.language as tl

from attnstats.kernels.tiles import FIELDS, dot, head_pointer, keys_present, load_tile, weigh, wide, zeros_for


@triton.jit
def gather(
    sums, b_k, o_key, p_q, q_strides, p_lse2, query_offset, first, last, n_queries, scale2,
    COLUMNS: tl.constexpr, CAUSAL: tl.constexpr, BM: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """Stream the queries first .. last past the keys. CAUSAL: some pairs of them lie in the future."""
    for start in range(first, last, BM):
        o_row = start + tl.arange(0, BM)
        b_q = load_tile(p_q, q_strides, start, n_queries, BM, DIM, BLOCK_DIM, True)  # [BM, BLOCK_DIM]
        b_lse2 = tl.load(p_lse2 + o_row, mask=o_row < last, other=float("inf"))
        b_log_a = dot(b_k, tl.trans(b_q)) * scale2 - b_lse2[None, :]  # [BN, BM]
        distance = query_offset + o_row[None, :] - o_key[:, None]
        if CAUSAL:
            b_log_a = tl.where(distance >= 0, b_log_a, float("-inf"))
        b_a = tl.exp2(b_log_a)
        updated = ()
        for j in tl.static_range(len(COLUMNS) // FIELDS):
            b_w = weigh(distance, COLUMNS, j)
            updated = updated + (sums[j] + b_a * b_w,)
        sums = updated
    return sums


@triton.jit
def column(
    p_q, p_k, p_lse2, p_key_mask, p_bounds, p_columns,
    n_batch, n_query_heads, group, n_segments, query_offset, n_queries, n_keys, scale2,
    q_strides, k_strides,
    COLUMNS: tl.constexpr, CAUSAL: tl.constexpr, MASKED_KEYS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    n_blocks = tl.cdiv(n_keys, BN)
    n_key_heads = n_query_heads // group
    i_program = tl.program_id(0)
    i_block = i_program % n_blocks  # under a causal mask the first keys have the most queries
    i_key_head = i_program // n_blocks % n_key_heads
    i_batch = i_program // (n_blocks * n_key_heads)

    o_key = i_block * BN + tl.arange(0, BN)
    p_k_head = head_pointer(p_k, k_strides, i_batch, i_key_head)
    b_k = load_tile(p_k_head, k_strides, i_block * BN, n_keys, BN, DIM, BLOCK_DIM, True)
    m_key = keys_present(p_key_mask, i_batch, o_key, n_keys, MASKED_KEYS)
    for i_member in range(group):
        i_head = i_key_head * group + i_member
        i_flat = (i_batch * n_query_heads + i_head).to(tl.int64)
        p_q_head = head_pointer(p_q, q_strides, i_batch, i_head)
        for i_segment in range(n_segments):
            first = tl.load(p_bounds + i_segment)
            last = tl.load(p_bounds + i_segment + 1)
            whole = first  # from here on every query sees every key of the block
            if CAUSAL:
                first = tl.minimum(tl.maximum(first, i_block * BN - query_offset), last)
                edge = tl.maximum(i_block * BN + BN - 1 - query_offset - first, 0)
                whole = tl.minimum(first + tl.cdiv(edge, BM) * BM, last)
            sums = zeros_for(len(COLUMNS) // FIELDS, (BN, BM))
            for EDGE in tl.static_range(2 if CAUSAL else 1):
                sums = gather(
                    sums, b_k, o_key, p_q_head, q_strides, p_lse2 + i_flat * n_queries, query_offset,
                    whole if EDGE == 0 else first, last if EDGE == 0 else whole, n_queries, scale2,
                    COLUMNS, EDGE == 1, BM, DIM, BLOCK_DIM,
                )  # fmt: skip
            for j in tl.static_range(len(COLUMNS) // FIELDS):
                o_row = wide(j * n_segments + i_segment) * n_batch * n_query_heads + i_flat
                b_column = tl.where(m_key, tl.sum(sums[j], 1), 0.0)
                tl.store(p_columns + o_row * n_keys + o_key, b_column, mask=o_key < n_keys)
