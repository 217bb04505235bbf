"""Gradients of attention and of its statistics, from (query, key, value, output, lse) and the output's gradient.

    program (i_sequence, i_head, i_block) of `backward_queries`: dQ, and delta, which `backward_keys` reads
        queries [BM, D], resident     keys      [ masked ] | every row sees every key | [ masked, or near ]

    program (i_sequence, i_key_head, i_block) of `backward_keys`: dK, dV
        keys [BN, D], resident        queries of the group's heads, one head after the other

With A = exp2(scores - lse2) and dA = dO V^T + what statistics ask of A: dS = A * (dA - rowsum(A dA)), dQ = dS K,
dK = dS^T Q, dV = A^T dO. Both kernels take A and dS of a tile from `step`; `backward_keys` computes them transposed, so
that no result of a matmul is transposed to be an operand. No atomics: each gradient has one program that adds it up.

A statistic of rows asks g[t] * w(t - s), one of columns c[t] * g[s] * w(t - s), the entropy -g[t] * (ln A + 1); g
arrives per query head, [statistics, B, Hq, T] float32. What is the same along a row is no business of a tile: it is
part of delta, by way of `p_shift`. Weights with a band are 0 beyond it, less their tail: `backward_queries` looks at
the lists NEAR_ROWS and NEAR_COLUMNS in masked tiles alone, among which are those near the diagonal. The row sums of
columns take a pass over their keys before dQ's. Where no statistic has a gradient all of it is gone.
"""

import triton
import triton.language as tl

from .tiles import (
    FIELDS,
    LN2,
    LOG2_ZERO,
    dot,
    extent,
    head_pointer,
    kept,
    key_range,
    keys_present,
    load_lse2,
    load_tile,
    scores,
    store_tile,
    weigh,
    wide,
)


@triton.jit
def of_queries(b_x, TRANSPOSED: tl.constexpr):
    """[BM, 1], or [1, BM] where a tile has the keys as its rows."""
    if TRANSPOSED:
        return b_x[None, :]
    else:
        return b_x[:, None]


@triton.jit
def of_keys(b_x, TRANSPOSED: tl.constexpr):
    if TRANSPOSED:
        return b_x[:, None]
    else:
        return b_x[None, :]


@triton.jit
def load_each(p_first, n_between, o_place, m_place, COUNT: tl.constexpr):
    """A tuple of COUNT vectors, n_between apart."""
    loaded = ()
    for j in tl.static_range(COUNT):
        loaded = loaded + (tl.load(p_first + j * n_between + o_place, mask=m_place, other=0.0),)
    return loaded


@triton.jit
def of_columns(
    distance, m_counted, column_grads,
    COLUMNS: tl.constexpr, NEAR_COLUMNS: tl.constexpr, EDGE: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """What statistics of columns ask of a tile of A. m_counted: queries that count, None: all."""
    N: tl.constexpr = len(COLUMNS) // FIELDS
    b_asked = tl.zeros(distance.shape, tl.float32)
    for j in tl.static_range(N):
        b_asked += of_keys(column_grads[j], TRANSPOSED) * weigh(distance, COLUMNS, j)
    if EDGE:
        for j in tl.static_range(len(NEAR_COLUMNS) // FIELDS):
            b_asked += of_keys(column_grads[N + j], TRANSPOSED) * weigh(distance, NEAR_COLUMNS, j)
    if m_counted is not None:
        b_asked = tl.where(of_queries(m_counted, TRANSPOSED), b_asked, 0.0)
    return b_asked


@triton.jit
def weights(
    b_q, b_k, b_lse2, m_key, o_position, o_key, left, right, scale2, cap2,
    EDGE: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """Scores and log2 A of a tile, -inf where a key isn't seen. m_key None: all keys may be."""
    if TRANSPOSED:
        b_x = scores(b_k, tl.trans(b_q), scale2, cap2)  # [BN, BM]
    else:
        b_x = scores(b_q, tl.trans(b_k), scale2, cap2)  # [BM, BN]
    b_log = b_x - of_queries(b_lse2, TRANSPOSED)
    if EDGE and left is not None:
        m_seen = of_queries(o_position, TRANSPOSED) <= of_keys(o_key + left, TRANSPOSED)
        b_log = tl.where(m_seen, b_log, float("-inf"))
    if EDGE and right is not None:
        m_seen = of_queries(o_position, TRANSPOSED) >= of_keys(o_key - right, TRANSPOSED)
        b_log = tl.where(m_seen, b_log, float("-inf"))
    if m_key is not None:
        b_log = tl.where(of_keys(m_key, TRANSPOSED), b_log, float("-inf"))
    return b_x, b_log


@triton.jit
def step(
    b_q, b_k, b_do, b_v, b_lse2, b_delta, row_grads, column_grads, m_counted, m_key, o_position, o_key,
    p_seed, i_flat_head, q_begin, k_begin, offset, left, right, scale2, cap2, dropout,
    ROWS: tl.constexpr, NEAR_ROWS: tl.constexpr, ENTROPY: tl.constexpr,
    COLUMNS: tl.constexpr, NEAR_COLUMNS: tl.constexpr, EDGE: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """A of a tile as it met the values, and dS without the scale; [BM, BN], or TRANSPOSED."""
    N_ROWS: tl.constexpr = len(ROWS) // FIELDS
    N_NEAR: tl.constexpr = len(NEAR_ROWS) // FIELDS
    b_x, b_log = weights(b_q, b_k, b_lse2, m_key, o_position, o_key, left, right, scale2, cap2, EDGE, TRANSPOSED)
    b_a = tl.exp2(b_log)
    if TRANSPOSED:
        b_da = dot(b_v, tl.trans(b_do))
    else:
        b_da = dot(b_do, tl.trans(b_v))
    b_met = b_a
    if p_seed is not None:
        o_query = of_queries(q_begin + o_position - offset, TRANSPOSED)
        m_kept = kept(p_seed, i_flat_head, o_query, of_keys(k_begin + o_key, TRANSPOSED), dropout)
        b_met = tl.where(m_kept, b_a * (1.0 / (1.0 - dropout)), 0.0)
        b_da = tl.where(m_kept, b_da * (1.0 / (1.0 - dropout)), 0.0)
    distance = (of_queries(o_position, TRANSPOSED) - of_keys(o_key, TRANSPOSED)).to(tl.float32)
    for j in tl.static_range(N_ROWS):
        b_da += of_queries(row_grads[j], TRANSPOSED) * weigh(distance, ROWS, j)
    if EDGE:
        for j in tl.static_range(N_NEAR):
            b_da += of_queries(row_grads[N_ROWS + j], TRANSPOSED) * weigh(distance, NEAR_ROWS, j)
    if ENTROPY:
        b_ln = LN2 * tl.maximum(b_log, LOG2_ZERO)
        b_da -= of_queries(row_grads[N_ROWS + N_NEAR], TRANSPOSED) * b_ln
    if len(COLUMNS) + (len(NEAR_COLUMNS) if EDGE else 0) > 0:
        b_da += of_columns(distance, m_counted, column_grads, COLUMNS, NEAR_COLUMNS, EDGE, TRANSPOSED)
    b_ds = b_a * (b_da - of_queries(b_delta, TRANSPOSED))
    if cap2 is not None:
        b_tanh = b_x * (1.0 / cap2)
        b_ds *= 1.0 - b_tanh * b_tanh
    return b_met, b_ds


@triton.jit
def column_delta(
    b_delta, b_q, b_lse2, m_counted, o_position, p_k, k_strides, p_key_mask, p_column_grads,
    i_batch, n_between, first, last, n_keys, left, right, scale2, cap2,
    COLUMNS: tl.constexpr, NEAR_COLUMNS: tl.constexpr, BN: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """b_delta [BM] and the row sums of A times what columns ask of it, over the keys first .. last."""
    for start in range(first, last, BN):
        o_key = start + tl.arange(0, BN)
        m_key = keys_present(p_key_mask, i_batch, o_key, n_keys)
        b_k = load_tile(p_k, k_strides, start, n_keys, BN, DIM, BLOCK_DIM, True)  # [BN, BLOCK_DIM]
        column_grads = load_each(p_column_grads, n_between, o_key, m_key, (len(COLUMNS) + len(NEAR_COLUMNS)) // FIELDS)
        _, b_log = weights(b_q, b_k, b_lse2, m_key, o_position, o_key, left, right, scale2, cap2, True, False)
        distance = (o_position[:, None] - o_key[None, :]).to(tl.float32)
        b_asked = of_columns(distance, m_counted, column_grads, COLUMNS, NEAR_COLUMNS, True, False)
        b_delta += tl.sum(tl.exp2(b_log) * b_asked, 1)
    return b_delta


@triton.jit
def over_keys(
    b_dq, b_q, b_do, b_lse2, b_delta, row_grads, m_counted, o_position,
    p_k, p_v, k_strides, v_strides, p_key_mask, p_column_grads, p_seed,
    i_batch, i_flat_head, n_between, q_begin, k_begin, offset, first, last, n_keys, left, right, scale2, cap2, dropout,
    ROWS: tl.constexpr, NEAR_ROWS: tl.constexpr, ENTROPY: tl.constexpr,
    COLUMNS: tl.constexpr, NEAR_COLUMNS: tl.constexpr, EDGE: tl.constexpr, BN: tl.constexpr,
    DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_VALUE_DIM: tl.constexpr,
):  # fmt: skip
    """Add dS K of the keys first .. last to b_dq [BM, BLOCK_DIM]. EDGE as in `forward.visit`, or near the diagonal."""
    for start in range(first, last, BN):
        o_key = start + tl.arange(0, BN)
        b_k = load_tile(p_k, k_strides, start, n_keys, BN, DIM, BLOCK_DIM, EDGE)  # [BN, BLOCK_DIM]
        b_v = load_tile(p_v, v_strides, start, n_keys, BN, VALUE_DIM, BLOCK_VALUE_DIM, EDGE)
        m_key = None
        if EDGE or p_key_mask is not None:
            m_key = keys_present(p_key_mask, i_batch, o_key, n_keys)
        column_grads = load_each(
            p_column_grads, n_between, o_key, o_key < n_keys, (len(COLUMNS) + len(NEAR_COLUMNS)) // FIELDS
        )
        _, b_ds = step(
            b_q, b_k, b_do, b_v, b_lse2, b_delta, row_grads, column_grads, m_counted, m_key, o_position, o_key,
            p_seed, i_flat_head, q_begin, k_begin, offset, left, right, scale2, cap2, dropout,
            ROWS, NEAR_ROWS, ENTROPY, COLUMNS, NEAR_COLUMNS, EDGE, False,
        )  # fmt: skip
        b_dq = dot(b_ds.to(b_k.dtype), b_k, b_dq)
    return b_dq


@triton.jit
def backward_queries(
    p_q, p_k, p_v, p_out, p_do, p_dq, p_lse, p_delta, p_shift, p_row_grads, p_column_grads,
    p_counted, p_key_mask, p_cu_q, p_cu_k, p_seed,
    n_batch, n_query_heads, group, query_offset, n_queries, n_keys, longest,
    left, right, behind, ahead, scale, scale2, cap2, dropout,
    q_strides, k_strides, v_strides, out_strides, do_strides, dq_strides,
    ROWS: tl.constexpr, NEAR_ROWS: tl.constexpr, ENTROPY: tl.constexpr,
    COLUMNS: tl.constexpr, NEAR_COLUMNS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_VALUE_DIM: tl.constexpr,
):  # fmt: skip
    """behind, ahead: how far from the diagonal NEAR weights reach; None: there are none."""
    n_blocks = tl.cdiv(longest, BM)
    i_program = tl.program_id(0)
    i_block = n_blocks - 1 - i_program % n_blocks  # under a causal mask the longest rows first
    i_head = i_program // n_blocks % n_query_heads
    i_sequence = i_program // (n_blocks * n_query_heads)
    i_batch, q_begin, rows, k_begin, keys, offset = extent(i_sequence, p_cu_q, p_cu_k, query_offset, n_queries, n_keys)
    q_start = i_block * BM
    if p_cu_q is not None:  # the grid is that of the longest sequence
        keys = tl.where(q_start < rows, keys, 0)
    i_flat_head = i_batch * n_query_heads + i_head
    o_row = q_start + tl.arange(0, BM)
    m_row = o_row < rows
    o_position = offset + o_row
    o_flat = wide(i_flat_head) * n_queries + q_begin + o_row  # in [B, Hq, Tq]
    p_k_head = head_pointer(p_k, k_strides, i_batch, i_head // group, k_begin)
    p_v_head = head_pointer(p_v, v_strides, i_batch, i_head // group, k_begin)
    b_q = load_tile(
        head_pointer(p_q, q_strides, i_batch, i_head, q_begin), q_strides, q_start, rows, BM, DIM, BLOCK_DIM, True
    )
    b_do = load_tile(
        head_pointer(p_do, do_strides, i_batch, i_head, q_begin), do_strides, q_start, rows,
        BM, VALUE_DIM, BLOCK_VALUE_DIM, True,
    )  # fmt: skip
    b_out = load_tile(
        head_pointer(p_out, out_strides, i_batch, i_head, q_begin), out_strides, q_start, rows,
        BM, VALUE_DIM, BLOCK_VALUE_DIM, True,
    )  # fmt: skip
    b_lse2 = load_lse2(p_lse + o_flat, m_row)
    b_delta = tl.sum(b_out.to(tl.float32) * b_do.to(tl.float32), 1)
    if p_shift is not None:
        b_delta += tl.load(p_shift + o_flat, mask=m_row, other=0.0)
    n_row_grads: tl.constexpr = (len(ROWS) + len(NEAR_ROWS)) // FIELDS + ENTROPY
    row_grads = load_each(p_row_grads, wide(n_batch) * n_query_heads * n_queries, o_flat, m_row, n_row_grads)
    m_counted = None
    if p_counted is not None:
        m_counted = tl.load(p_counted + wide(i_batch) * n_queries + q_begin + o_row, mask=m_row, other=0) != 0

    position = offset + q_start
    first, whole, edge, end = key_range(position, 0, keys, left, right, BM, BN)
    n_between = wide(n_batch) * n_query_heads * n_keys  # between the gradients of two columns
    p_grads_head = p_column_grads
    if len(COLUMNS) + len(NEAR_COLUMNS) > 0:
        p_grads_head = p_column_grads + wide(i_flat_head) * n_keys + k_begin
        near_first, near_end = first, end
        if len(COLUMNS) == 0:
            near_first = tl.maximum(first, (position - behind) // BN * BN)
            near_end = tl.minimum(end, position + BM + ahead)
        if near_first < near_end:
            b_delta = column_delta(
                b_delta, b_q, b_lse2, m_counted, o_position, p_k_head, k_strides, p_key_mask, p_grads_head,
                i_batch, n_between, near_first, near_end, keys, left, right, scale2, cap2,
                COLUMNS, NEAR_COLUMNS, BN, DIM, BLOCK_DIM,
            )  # fmt: skip
    tl.store(p_delta + o_flat, b_delta, mask=m_row)
    if behind is not None:
        edge = tl.maximum(tl.minimum(edge, (position - behind) // BN * BN), whole)

    b_dq = tl.zeros((BM, BLOCK_DIM), tl.float32)
    if left is not None:
        # Guarded, here and below, for the reason that forward.py gives.
        if first < whole:
            b_dq = over_keys(
                b_dq, b_q, b_do, b_lse2, b_delta, row_grads, m_counted, o_position,
                p_k_head, p_v_head, k_strides, v_strides, p_key_mask, p_grads_head, p_seed,
                i_batch, i_flat_head, n_between, q_begin, k_begin, offset, first, whole, keys,
                left, right, scale2, cap2, dropout,
                ROWS, NEAR_ROWS, ENTROPY, COLUMNS, NEAR_COLUMNS, True, BN, DIM, BLOCK_DIM, VALUE_DIM, BLOCK_VALUE_DIM,
            )  # fmt: skip
    if whole < edge:
        b_dq = over_keys(
            b_dq, b_q, b_do, b_lse2, b_delta, row_grads, m_counted, o_position,
            p_k_head, p_v_head, k_strides, v_strides, p_key_mask, p_grads_head, p_seed,
            i_batch, i_flat_head, n_between, q_begin, k_begin, offset, whole, edge, keys,
            left, right, scale2, cap2, dropout,
            ROWS, NEAR_ROWS, ENTROPY, COLUMNS, NEAR_COLUMNS, False, BN, DIM, BLOCK_DIM, VALUE_DIM, BLOCK_VALUE_DIM,
        )  # fmt: skip
    if edge < end:
        b_dq = over_keys(
            b_dq, b_q, b_do, b_lse2, b_delta, row_grads, m_counted, o_position,
            p_k_head, p_v_head, k_strides, v_strides, p_key_mask, p_grads_head, p_seed,
            i_batch, i_flat_head, n_between, q_begin, k_begin, offset, edge, end, keys,
            left, right, scale2, cap2, dropout,
            ROWS, NEAR_ROWS, ENTROPY, COLUMNS, NEAR_COLUMNS, True, BN, DIM, BLOCK_DIM, VALUE_DIM, BLOCK_VALUE_DIM,
        )  # fmt: skip
    store_tile(
        head_pointer(p_dq, dq_strides, i_batch, i_head, q_begin), dq_strides, q_start, rows, b_dq * scale,
        BM, DIM, BLOCK_DIM,
    )  # fmt: skip


@triton.jit
def over_queries(
    b_dk, b_dv, b_k, b_v, column_grads, o_key,
    p_q, p_do, q_strides, do_strides, p_lse, p_delta, p_row_grads, p_counted, p_seed,
    i_flat_head, n_between, q_begin, k_begin, offset, first, last, left, right, scale2, cap2, dropout,
    ROWS: tl.constexpr, NEAR_ROWS: tl.constexpr, ENTROPY: tl.constexpr,
    COLUMNS: tl.constexpr, NEAR_COLUMNS: tl.constexpr, BM: tl.constexpr,
    DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_VALUE_DIM: tl.constexpr,
):  # fmt: skip
    """Add what the queries first .. last of a head give to b_dk [BN, BLOCK_DIM] and b_dv [BN, BLOCK_VALUE_DIM].

    Keys that don't exist or are padding have rows of their own in the tile, which aren't stored. A second loop for
    tiles without a mask would save 4 instructions per score, but costs the registers that a larger tile needs.
    """
    for start in range(first, last, BM):
        o_row = start + tl.arange(0, BM)
        m_row = o_row < last
        b_q = load_tile(p_q, q_strides, start, last, BM, DIM, BLOCK_DIM, True)  # [BM, BLOCK_DIM]
        b_do = load_tile(p_do, do_strides, start, last, BM, VALUE_DIM, BLOCK_VALUE_DIM, True)
        b_lse2 = load_lse2(p_lse + o_row, m_row)
        b_delta = tl.load(p_delta + o_row, mask=m_row, other=0.0)
        n_row_grads: tl.constexpr = (len(ROWS) + len(NEAR_ROWS)) // FIELDS + ENTROPY
        row_grads = load_each(p_row_grads, n_between, o_row, m_row, n_row_grads)
        m_counted = None
        if p_counted is not None:
            m_counted = tl.load(p_counted + o_row, mask=m_row, other=0) != 0
        b_met, b_ds = step(
            b_q, b_k, b_do, b_v, b_lse2, b_delta, row_grads, column_grads, m_counted, None, offset + o_row, o_key,
            p_seed, i_flat_head, q_begin, k_begin, offset, left, right, scale2, cap2, dropout,
            ROWS, NEAR_ROWS, ENTROPY, COLUMNS, NEAR_COLUMNS, True, True,
        )  # fmt: skip
        b_dv = dot(b_met.to(b_do.dtype), b_do, b_dv)
        b_dk = dot(b_ds.to(b_q.dtype), b_q, b_dk)
    return b_dk, b_dv


@triton.jit
def backward_keys(
    p_q, p_k, p_v, p_do, p_dk, p_dv, p_lse, p_delta, p_row_grads, p_column_grads,
    p_counted, p_key_mask, p_cu_q, p_cu_k, p_seed,
    n_batch, n_query_heads, group, query_offset, n_queries, n_keys, longest,
    left, right, scale, scale2, cap2, dropout,
    q_strides, k_strides, v_strides, do_strides, dk_strides, dv_strides,
    ROWS: tl.constexpr, NEAR_ROWS: tl.constexpr, ENTROPY: tl.constexpr,
    COLUMNS: tl.constexpr, NEAR_COLUMNS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_VALUE_DIM: tl.constexpr,
):  # fmt: skip
    n_blocks = tl.cdiv(longest, BN)
    n_key_heads = n_query_heads // group
    i_program = tl.program_id(0)
    i_block = i_program % n_blocks  # under a causal mask the first keys have the most queries
    i_key_head = i_program // n_blocks % n_key_heads
    i_sequence = i_program // (n_blocks * n_key_heads)
    i_batch, q_begin, rows, k_begin, keys, offset = extent(i_sequence, p_cu_q, p_cu_k, query_offset, n_queries, n_keys)
    k_start = i_block * BN
    if p_cu_q is not None:  # the grid is that of the longest sequence
        rows = tl.where(k_start < keys, rows, 0)
    o_key = k_start + tl.arange(0, BN)
    p_k_head = head_pointer(p_k, k_strides, i_batch, i_key_head, k_begin)
    p_v_head = head_pointer(p_v, v_strides, i_batch, i_key_head, k_begin)
    b_k = load_tile(p_k_head, k_strides, k_start, keys, BN, DIM, BLOCK_DIM, True)  # [BN, BLOCK_DIM]
    b_v = load_tile(p_v_head, v_strides, k_start, keys, BN, VALUE_DIM, BLOCK_VALUE_DIM, True)

    # The rows first .. last see keys of the block.
    position = k_start - offset  # of the block's first key, as a row
    first, last = rows * 0, rows
    if right is not None:
        first = tl.minimum(tl.maximum(first, position - right), last)
    if left is not None:
        last = tl.maximum(tl.minimum(last, position + BN + left), first)

    b_dk = tl.zeros((BN, BLOCK_DIM), tl.float32)
    b_dv = tl.zeros((BN, BLOCK_VALUE_DIM), tl.float32)
    n_between = wide(n_batch) * n_query_heads * n_queries
    p_counted_batch = p_counted
    if p_counted is not None:
        p_counted_batch = p_counted + wide(i_batch) * n_queries + q_begin
    for i_member in range(group):
        i_head = i_key_head * group + i_member
        i_flat_head = i_batch * n_query_heads + i_head
        o_head = wide(i_flat_head) * n_queries + q_begin
        p_q_head = head_pointer(p_q, q_strides, i_batch, i_head, q_begin)
        p_do_head = head_pointer(p_do, do_strides, i_batch, i_head, q_begin)
        p_row_head = p_row_grads
        if p_row_grads is not None:
            p_row_head = p_row_grads + o_head
        p_column_head = p_column_grads
        if p_column_grads is not None:
            p_column_head = p_column_grads + wide(i_flat_head) * n_keys + k_begin
        column_grads = load_each(
            p_column_head, wide(n_batch) * n_query_heads * n_keys, o_key, o_key < keys,
            (len(COLUMNS) + len(NEAR_COLUMNS)) // FIELDS,
        )  # fmt: skip
        if first < last:
            b_dk, b_dv = over_queries(
                b_dk, b_dv, b_k, b_v, column_grads, o_key,
                p_q_head, p_do_head, q_strides, do_strides, p_lse + o_head, p_delta + o_head, p_row_head,
                p_counted_batch, p_seed, i_flat_head, n_between, q_begin, k_begin, offset, first, last,
                left, right, scale2, cap2, dropout,
                ROWS, NEAR_ROWS, ENTROPY, COLUMNS, NEAR_COLUMNS, BM, DIM, BLOCK_DIM, VALUE_DIM, BLOCK_VALUE_DIM,
            )  # fmt: skip
    m_key = keys_present(p_key_mask, i_batch, o_key, keys)[:, None]
    p_dk_head = head_pointer(p_dk, dk_strides, i_batch, i_key_head, k_begin)
    p_dv_head = head_pointer(p_dv, dv_strides, i_batch, i_key_head, k_begin)
    b_dk = tl.where(m_key, b_dk * scale, 0.0)
    b_dv = tl.where(m_key, b_dv, 0.0)
    store_tile(p_dk_head, dk_strides, k_start, keys, b_dk, BN, DIM, BLOCK_DIM)
    store_tile(p_dv_head, dv_strides, k_start, keys, b_dv, BN, VALUE_DIM, BLOCK_VALUE_DIM)
