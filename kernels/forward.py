"""Attention with its row statistics in one pass, the band as an epilogue; or the rows alone from an lse.

    program (i_batch, i_head, i_block):

        queries [BM, D]   keys  0 .. full: every row sees every key | full .. end: masked
                          [ tile ][ tile ][ tile ][ tile ]          | [ tile ][ tile ]
                                            <-- epilogue: the band once more, tiles still in L2

One program owns BM rows of one head and streams the keys past them with an online softmax. What stays in
registers: the query tile, the output accumulator, the running maximum and sum, and one accumulator per
statistic of the loop (MeanDistance, Entropy; MaxLogit is the maximum itself). Band statistics cost the loop
nothing: when it is done the lse is known, and `tiles.band_sweep` revisits the keys near the diagonal.

With FROM_LSE there is no value, no maximum and no output: the pivot of exp2 is the given lse.
Row sums are stored as [LOOP_ROWS, BAND_ROWS, entropy, maximum; B, Hq, Tq] float32.
"""

import triton
import triton.language as tl

from attnstats.kernels.tiles import (
    FIELDS,
    band_sweep,
    dot,
    head_pointer,
    keys_present,
    load_tile,
    weigh,
    wide,
    zeros_for,
)

LN2 = tl.constexpr(0.6931471805599453)
LOG2_ZERO = tl.constexpr(-1.0e4)  # exp2 of it is exactly 0, and 0 * LOG2_ZERO is not NaN as 0 * -inf is


@triton.jit
def visit(
    b_out, b_max, b_sum, b_log, sums,  # the running state
    b_q, o_position, p_k, p_v, p_key_mask, k_strides, v_strides, i_batch, first, last, n_keys, scale2,
    LOOP_ROWS: tl.constexpr, ENTROPY: tl.constexpr, CAUSAL: tl.constexpr, MASKED_KEYS: tl.constexpr,
    FROM_LSE: tl.constexpr, EDGE: tl.constexpr, BN: tl.constexpr,
    DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_VALUE_DIM: tl.constexpr,
):  # fmt: skip
    """Stream the keys first .. last. EDGE: some of them may not exist or lie in a row's future."""
    for start in range(first, last, BN):
        o_key = start + tl.arange(0, BN)
        b_k = load_tile(p_k, k_strides, start, n_keys, BN, DIM, BLOCK_DIM, EDGE)  # [BN, BLOCK_DIM]
        b_score = dot(b_q, tl.trans(b_k))  # [BM, BN], not scaled yet: the scale folds into exp2's argument
        distance = o_position[:, None] - o_key[None, :]
        if EDGE or MASKED_KEYS:
            m_seen = keys_present(p_key_mask, i_batch, o_key, n_keys, MASKED_KEYS)[None, :]
            if EDGE and CAUSAL:
                m_seen = m_seen & (distance >= 0)
            b_score = tl.where(m_seen, b_score, float("-inf"))
        if FROM_LSE:
            b_pivot = b_max
        else:
            b_new_max = tl.maximum(b_max, tl.max(b_score, 1) * scale2)
            # A row that has seen nothing yet keeps a finite pivot: (-inf) - (-inf) is NaN.
            b_pivot = tl.where(b_new_max == float("-inf"), 0.0, b_new_max)
            b_rescale = tl.exp2(b_max - b_pivot)
        b_log_a = b_score * scale2 - b_pivot[:, None]
        b_a = tl.exp2(b_log_a)
        if ENTROPY:
            if not FROM_LSE:  # sum of a * log2(a) moves with the pivot
                b_old_pivot = tl.where(b_max == float("-inf"), b_pivot, b_max)
                b_log = (b_log + b_sum * (b_old_pivot - b_pivot)) * b_rescale
            b_log += tl.sum(b_a * tl.maximum(b_log_a, LOG2_ZERO), 1)
        updated = ()
        for j in tl.static_range(len(LOOP_ROWS) // FIELDS):
            b_w = weigh(distance, LOOP_ROWS, j)
            b_row = tl.sum(b_a * b_w, 1)
            if FROM_LSE:
                updated = updated + (sums[j] + b_row,)
            else:
                updated = updated + (sums[j] * b_rescale + b_row,)
        sums = updated
        if not FROM_LSE:
            b_sum = b_sum * b_rescale + tl.sum(b_a, 1)
            b_v = load_tile(p_v, v_strides, start, n_keys, BN, VALUE_DIM, BLOCK_VALUE_DIM, EDGE)
            b_out = dot(b_a.to(b_v.dtype), b_v, b_out * b_rescale[:, None])
            b_max = b_new_max
    return b_out, b_max, b_sum, b_log, sums


@triton.jit
def forward(
    p_q, p_k, p_v, p_out, p_lse, p_counted, p_key_mask, p_rows, p_columns,
    n_batch, n_query_heads, group, query_offset, n_queries, n_keys, scale2,
    q_strides, k_strides, v_strides, out_strides,
    LOOP_ROWS: tl.constexpr, ENTROPY: tl.constexpr, MAX_LOGIT: tl.constexpr,
    BAND_ROWS: tl.constexpr, BAND_COLUMNS: tl.constexpr, BEHIND: tl.constexpr, AHEAD: tl.constexpr,
    CAUSAL: tl.constexpr, MASKED_KEYS: tl.constexpr, MASKED_QUERIES: tl.constexpr, FROM_LSE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BAND_BN: tl.constexpr,
    DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_VALUE_DIM: tl.constexpr,
):  # fmt: skip
    n_blocks = tl.cdiv(n_queries, BM)
    i_program = tl.program_id(0)
    i_block = n_blocks - 1 - i_program % n_blocks  # under a causal mask the longest rows first
    i_head = i_program // n_blocks % n_query_heads
    i_batch = i_program // (n_blocks * n_query_heads)

    o_row = i_block * BM + tl.arange(0, BM)
    m_row = o_row < n_queries
    o_position = query_offset + o_row
    p_q_head = head_pointer(p_q, q_strides, i_batch, i_head)
    p_k_head = head_pointer(p_k, k_strides, i_batch, i_head // group)
    p_v_head = p_k_head  # not read with FROM_LSE
    if not FROM_LSE:
        p_v_head = head_pointer(p_v, v_strides, i_batch, i_head // group)
    b_q = load_tile(p_q_head, q_strides, i_block * BM, n_queries, BM, DIM, BLOCK_DIM, True)
    o_flat = (i_batch * n_query_heads + i_head).to(tl.int64) * n_queries + o_row  # in [B, Hq, Tq]

    end = n_keys
    whole = n_keys  # keys that every row of the block sees
    if CAUSAL:
        end = tl.minimum(n_keys, query_offset + (i_block + 1) * BM)
        whole = tl.minimum(n_keys, query_offset + i_block * BM + 1)
    whole = whole // BN * BN

    b_out = tl.zeros((BM, BLOCK_VALUE_DIM), tl.float32)
    b_sum = tl.zeros((BM,), tl.float32)
    b_log = tl.zeros((BM,), tl.float32)
    sums = zeros_for(len(LOOP_ROWS) // FIELDS, (BM,))
    if FROM_LSE:
        b_max = tl.load(p_lse + o_flat, mask=m_row, other=float("inf"))
    else:
        b_max = tl.full((BM,), float("-inf"), tl.float32)
    for EDGE in tl.static_range(2):
        b_out, b_max, b_sum, b_log, sums = visit(
            b_out, b_max, b_sum, b_log, sums, b_q, o_position, p_k_head, p_v_head, p_key_mask, k_strides, v_strides,
            i_batch, whole if EDGE else 0, end if EDGE else whole, n_keys, scale2,
            LOOP_ROWS, ENTROPY, CAUSAL, MASKED_KEYS, FROM_LSE, EDGE == 1, BN,
            DIM, BLOCK_DIM, VALUE_DIM, BLOCK_VALUE_DIM,
        )  # fmt: skip

    m_live = b_sum != 0.0  # a row of NaN is not one that sees nothing
    b_sum = tl.where(m_live, b_sum, 1.0)
    b_inverse = 1.0 / b_sum
    b_lse2 = b_max
    if not FROM_LSE:
        b_lse2 = tl.where(m_live, b_max + tl.log2(b_sum), float("inf"))
        tl.store(p_lse + o_flat, tl.where(m_live, b_lse2 * LN2, float("-inf")), mask=m_row)
        o_dim = tl.arange(0, BLOCK_VALUE_DIM)
        p_out_head = head_pointer(p_out, out_strides, i_batch, i_head)
        pointers = p_out_head + o_row.to(tl.int64)[:, None] * out_strides[2] + o_dim[None, :] * out_strides[3]
        b_out = (b_out * b_inverse[:, None]).to(p_out.dtype.element_ty)
        tl.store(pointers, b_out, mask=m_row[:, None] & (o_dim < VALUE_DIM)[None, :])

    n_flat = wide(n_batch) * n_query_heads * n_queries
    N_LOOP: tl.constexpr = len(LOOP_ROWS) // FIELDS
    N_BAND: tl.constexpr = len(BAND_ROWS) // FIELDS
    for j in tl.static_range(N_LOOP):
        tl.store(p_rows + j * n_flat + o_flat, sums[j] if FROM_LSE else sums[j] * b_inverse, mask=m_row)
    if ENTROPY:
        b_entropy = -LN2 * b_log
        if not FROM_LSE:
            b_entropy = LN2 * (tl.log2(b_sum) - b_log * b_inverse)
        tl.store(p_rows + (N_LOOP + N_BAND) * n_flat + o_flat, b_entropy, mask=m_row)
    if MAX_LOGIT:
        tl.store(p_rows + (N_LOOP + N_BAND + ENTROPY) * n_flat + o_flat, b_max * LN2, mask=m_row)

    if len(BAND_ROWS) + len(BAND_COLUMNS) > 0:
        m_counted = m_row
        if MASKED_QUERIES:
            m_counted &= tl.load(p_counted + i_batch.to(tl.int64) * n_queries + o_row, mask=m_row, other=0) != 0
        b_lse2 = tl.where(m_row, b_lse2, float("inf"))
        near = band_sweep(
            b_q, b_lse2, m_counted, o_position, p_k_head, k_strides, p_key_mask, p_columns,
            i_batch, i_block, i_head, n_batch, n_query_heads, 1, query_offset, n_keys, scale2,
            BAND_ROWS, BAND_COLUMNS, BEHIND, AHEAD, CAUSAL, MASKED_KEYS, 1, BM, BAND_BN, DIM, BLOCK_DIM,
        )  # fmt: skip
        for j in tl.static_range(N_BAND):
            tail = tl.where(b_lse2 < float("inf"), BAND_ROWS[FIELDS * j + 3], 0.0)
            tl.store(p_rows + (N_LOOP + j) * n_flat + o_flat, near[j] + tail, mask=m_row)
