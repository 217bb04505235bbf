"""Gradients of attention and of its statistics, from (query, key, value, output), each row's pivot and factor, and the
output's gradient.

    program (i_sequence, i_head, i_block) of `backward_queries`: dQ, and delta, which `backward_keys` reads
        queries [BM, D], resident     keys      [ masked ] | every row sees every key | [ masked, or near ]

    program (i_sequence, i_key_head, i_block) of `backward_keys`: dK, dV
        keys [BN, D], resident        queries of the group's heads, one head after the other

In registers stay the resident tiles and the accumulators of their gradients, which are written at the end. Of d_key and
d_value one may be None: then the other is computed alone.

With A = exp2(score - pivot) * factor, where the pivot is the lse if factor is None, and dA = dO V^T + the gradients
that statistics have for A: dS = A * (dA - rowsum(A dA)), dQ = dS K, dK = dS^T Q, dV = A^T dO. Both kernels take A and
dS of a tile from `step`; `backward_keys` computes them transposed, so that no result of a matmul is transposed to be an
operand. No atomics: one program adds up a gradient.

A row statistic's gradient for A is g[t] * w(t - s), a column statistic's g[s] * w(t - s) for queries t that count, and
the entropy's -g[t] * (ln A + 1); g arrives per query head, [statistics, B, Hq, T] float32. Row-constant terms, the
entropy's ln factor among them, are folded into delta, through `grads.shift`. Weights with a band, less their tail, are
0 beyond it: `backward_queries` evaluates the lists NEAR_ROWS and NEAR_COLUMNS in masked tiles alone, which include
those near the diagonal. The row sums of columns take a pass over their keys before dQ's. Without gradients of
statistics none of this is compiled.
"""

import triton
import triton.language as tl

from .arguments import KeyBlock, QueryBlock, Sizes, Stack, Strides, Tile, Weights
from .tiles import (
    FIELDS,
    LN2,
    LOG2_ZERO,
    counted,
    dot,
    head_of,
    hide,
    kept,
    key_range,
    keys_present,
    load_counts,
    load_pivot,
    load_tile,
    place_of,
    query_range,
    scores_above,
    sequence_of,
    softcap_slope,
    store_tile,
    streamed,
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
    """[1, BN], or [BN, 1] where a tile has the keys as its rows."""
    if TRANSPOSED:
        return b_x[:, None]
    else:
        return b_x[None, :]


@triton.jit
def stack_of(p_grads, i_flat_head, begin, n_rows, sizes):
    """The Stack of a head of [statistics, B, Hq, n_rows] gradients, from row `begin` on."""
    return Stack(p_grads + wide(i_flat_head) * n_rows + begin, wide(sizes.n_batch) * sizes.n_query_heads * n_rows)


@triton.jit
def load_each(stack, o_place, m_place, COUNT: tl.constexpr):
    """A tuple of COUNT vectors of a Stack."""
    loaded = ()
    for j in tl.static_range(COUNT):
        loaded = loaded + (tl.load(stack.pointer + j * stack.n_between + o_place, mask=m_place, other=0.0),)
    return loaded


@triton.jit
def of_columns(distance, b_counts, column_grads, EDGE: tl.constexpr, WEIGHTS: tl.constexpr, TRANSPOSED: tl.constexpr):
    """The gradients that column statistics have for a tile of A."""
    N: tl.constexpr = len(WEIGHTS.COLUMNS) // FIELDS
    b_grad = tl.zeros(distance.shape, tl.float32)
    for j in tl.static_range(N):
        b_grad += of_keys(column_grads[j], TRANSPOSED) * weigh(distance, WEIGHTS.COLUMNS, j)
    if EDGE:
        for j in tl.static_range(len(WEIGHTS.NEAR_COLUMNS) // FIELDS):
            b_grad += of_keys(column_grads[N + j], TRANSPOSED) * weigh(distance, WEIGHTS.NEAR_COLUMNS, j)
    if b_counts is not None:
        b_grad = counted(b_grad, of_queries(b_counts, TRANSPOSED))
    return b_grad


@triton.jit
def log2_a(b_q, b_k, b_pivot, m_key, o_position, o_key, visible, score, EDGE: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Capped scores and log2 (A / factor) of a tile, -inf where a key is hidden. m_key None: no key is padding."""
    if TRANSPOSED:
        b_log, b_x = scores_above(b_k, tl.trans(b_q), of_queries(b_pivot, True), score)  # [BN, BM]
    else:
        b_log, b_x = scores_above(b_q, tl.trans(b_k), of_queries(b_pivot, False), score)  # [BM, BN]
    m_seen = None
    if m_key is not None:
        m_seen = of_keys(m_key, TRANSPOSED)
    if EDGE:
        b_log = hide(b_log, m_seen, of_queries(o_position, TRANSPOSED), of_keys(o_key, TRANSPOSED), visible)
    elif m_seen is not None:
        b_log = tl.where(m_seen, b_log, float("-inf"))
    return b_x, b_log


@triton.jit
def step(
    queries, keys, i_flat_head, sequence, visible, score, dropout,
    EDGE: tl.constexpr, WEIGHTS: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """A of a tile as it met the values, and dS without the scale; [BM, BN], or TRANSPOSED."""
    N_ROWS: tl.constexpr = len(WEIGHTS.ROWS) // FIELDS
    N_NEAR: tl.constexpr = len(WEIGHTS.NEAR_ROWS) // FIELDS
    o_position, o_key, row_grads = queries.o_position, keys.o_key, queries.row_grads
    b_x, b_log = log2_a(
        queries.b_q, keys.b_k, queries.b_pivot, keys.m_key, o_position, o_key, visible, score, EDGE, TRANSPOSED
    )
    b_a = tl.exp2(b_log)
    if queries.b_factor is not None:
        b_a *= of_queries(queries.b_factor, TRANSPOSED)
    if TRANSPOSED:
        b_da = dot(keys.b_v, tl.trans(queries.b_do))
    else:
        b_da = dot(queries.b_do, tl.trans(keys.b_v))
    b_met = b_a
    if dropout is not None:
        o_query = of_queries(sequence.q_begin + o_position - sequence.offset, TRANSPOSED)
        m_kept = kept(dropout, i_flat_head, o_query, of_keys(sequence.k_begin + o_key, TRANSPOSED))
        b_met = tl.where(m_kept, b_a * (1.0 / (1.0 - dropout.p)), 0.0)
        b_da = tl.where(m_kept, b_da * (1.0 / (1.0 - dropout.p)), 0.0)
    distance = (of_queries(o_position, TRANSPOSED) - of_keys(o_key, TRANSPOSED)).to(tl.float32)
    for j in tl.static_range(N_ROWS):
        b_da += of_queries(row_grads[j], TRANSPOSED) * weigh(distance, WEIGHTS.ROWS, j)
    if EDGE:
        for j in tl.static_range(N_NEAR):
            b_da += of_queries(row_grads[N_ROWS + j], TRANSPOSED) * weigh(distance, WEIGHTS.NEAR_ROWS, j)
    if WEIGHTS.ENTROPY:
        b_ln = LN2 * tl.maximum(b_log, LOG2_ZERO)
        b_da -= of_queries(row_grads[N_ROWS + N_NEAR], TRANSPOSED) * b_ln
    if len(WEIGHTS.COLUMNS) + (len(WEIGHTS.NEAR_COLUMNS) if EDGE else 0) > 0:
        b_da += of_columns(distance, queries.b_counts, keys.column_grads, EDGE, WEIGHTS, TRANSPOSED)
    b_ds = b_a * (b_da - of_queries(queries.b_delta, TRANSPOSED))
    if score.cap2 is not None:
        b_ds *= softcap_slope(b_x, score)
    return b_met, b_ds


@triton.jit
def column_delta(
    b_delta, b_q, b_pivot, b_factor, b_counts, o_position, keys, column_grads, first, last, sequence, visible, score,
    WEIGHTS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """b_delta [BM] and the row sums of A times the gradients of column statistics, over the keys first .. last."""
    N_COLUMNS: tl.constexpr = (len(WEIGHTS.COLUMNS) + len(WEIGHTS.NEAR_COLUMNS)) // FIELDS
    b_sum = tl.zeros((TILE.BM,), tl.float32)
    for start in range(first, last, TILE.BN):
        o_key = start + tl.arange(0, TILE.BN)
        m_key = keys_present(visible.key_mask, sequence.i_batch, o_key, sequence.n_keys)
        b_k = load_tile(keys, start, sequence.n_keys, TILE.BN, TILE.DIM, TILE.BLOCK_DIM, True)  # [BN, BLOCK_DIM]
        grads = load_each(column_grads, o_key, m_key, N_COLUMNS)
        _, b_log = log2_a(b_q, b_k, b_pivot, m_key, o_position, o_key, visible, score, True, False)
        distance = (o_position[:, None] - o_key[None, :]).to(tl.float32)
        b_sum += tl.sum(tl.exp2(b_log) * of_columns(distance, b_counts, grads, True, WEIGHTS, False), 1)
    if b_factor is not None:
        b_sum *= b_factor
    return b_delta + b_sum


@triton.jit
def over_keys(
    b_dq, queries, keys, values, column_grads, i_flat_head, first, last, sequence, visible, score, dropout,
    EDGE: tl.constexpr, WEIGHTS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Add dS K of the keys first .. last to b_dq [BM, BLOCK_DIM]. EDGE as in `forward.visit`, or near the diagonal."""
    BN: tl.constexpr = TILE.BN
    N_COLUMNS: tl.constexpr = (len(WEIGHTS.COLUMNS) + len(WEIGHTS.NEAR_COLUMNS)) // FIELDS
    n_keys = sequence.n_keys
    for start in range(first, last, BN):
        o_key = start + tl.arange(0, BN)
        b_k = load_tile(keys, start, n_keys, BN, TILE.DIM, TILE.BLOCK_DIM, EDGE)  # [BN, BLOCK_DIM]
        b_v = load_tile(values, start, n_keys, BN, TILE.VALUE_DIM, TILE.BLOCK_VALUE_DIM, EDGE)
        m_key = None
        if EDGE or visible.key_mask is not None:
            m_key = keys_present(visible.key_mask, sequence.i_batch, o_key, n_keys)
        grads = load_each(column_grads, o_key, o_key < n_keys, N_COLUMNS)
        key_block = KeyBlock(b_k, b_v, grads, m_key, o_key)
        _, b_ds = step(queries, key_block, i_flat_head, sequence, visible, score, dropout, EDGE, WEIGHTS, False)
        b_dq = dot(b_ds.to(b_k.dtype), b_k, b_dq)
    return b_dq


@triton.jit(do_not_specialize=Sizes._fields)
def backward_queries(
    query, key, value, output, d_output, d_query, pivot, factor, delta, grads, query_counts, sequences,
    n_batch, n_sequences, n_query_heads, n_heads, group, query_offset, n_queries, n_keys, n_blocks, n_even,
    visible, near, score, dropout, strides,
    ROWS: tl.constexpr, NEAR_ROWS: tl.constexpr, ENTROPY: tl.constexpr,
    COLUMNS: tl.constexpr, NEAR_COLUMNS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_VALUE_DIM: tl.constexpr,
    DESCRIBED: tl.constexpr,
):  # fmt: skip
    WEIGHTS: tl.constexpr = Weights(ROWS, NEAR_ROWS, ENTROPY, COLUMNS, NEAR_COLUMNS)
    TILE: tl.constexpr = Tile(1, BM, BN, DIM, BLOCK_DIM, VALUE_DIM, BLOCK_VALUE_DIM)
    sizes = Sizes(
        n_batch, n_sequences, n_query_heads, n_heads, group, query_offset, n_queries, n_keys, n_blocks, n_even
    )
    strides = Strides(*strides)  # Triton 3.6 loses the types of nested arguments in loops
    i_program = tl.program_id(0)
    i_block = n_blocks - 1 - i_program % n_blocks  # under a causal mask the longest rows first
    i_head = i_program // n_blocks % sizes.n_query_heads
    i_sequence = i_program // (n_blocks * sizes.n_query_heads)
    i_sequence, i_block = place_of(i_sequence, i_block, sequences.cu_seqlens_q, sizes.n_queries, sizes, BM)
    q_start = i_block * BM
    sequence = sequence_of(i_sequence, sequences, sizes)
    if sequences.cu_seqlens_q is not None:
        if q_start >= sequence.n_queries:
            return
    i_batch, q_begin, n_queries = sequence.i_batch, sequence.q_begin, sequence.n_queries
    i_flat_head = i_batch * sizes.n_query_heads + i_head
    o_row = q_start + tl.arange(0, BM)
    m_row = o_row < n_queries
    o_position = sequence.offset + o_row
    o_flat = wide(i_flat_head) * sizes.n_queries + q_begin + o_row  # in [B, Hq, Tq]
    keys = head_of(key, strides.key, i_batch, i_head // sizes.group, sequence.k_begin)
    values = head_of(value, strides.value, i_batch, i_head // sizes.group, sequence.k_begin)
    keys = streamed(keys, sequence.n_keys, BN, DIM, BLOCK_DIM, DESCRIBED)
    values = streamed(values, sequence.n_keys, BN, VALUE_DIM, BLOCK_VALUE_DIM, DESCRIBED)
    head = head_of(query, strides.query, i_batch, i_head, q_begin)
    b_q = load_tile(head, q_start, n_queries, BM, DIM, BLOCK_DIM, True)
    head = head_of(d_output, strides.d_output, i_batch, i_head, q_begin)
    b_do = load_tile(head, q_start, n_queries, BM, VALUE_DIM, BLOCK_VALUE_DIM, True)
    head = head_of(output, strides.output, i_batch, i_head, q_begin)
    b_out = load_tile(head, q_start, n_queries, BM, VALUE_DIM, BLOCK_VALUE_DIM, True)
    b_pivot = load_pivot(pivot, o_flat, m_row, factor is None)
    b_factor = None
    if factor is not None:
        b_factor = tl.load(factor + o_flat, mask=m_row, other=1.0)
    b_delta = tl.sum(b_out.to(tl.float32) * b_do.to(tl.float32), 1)
    if grads.shift is not None:
        b_delta += tl.load(grads.shift + o_flat, mask=m_row, other=0.0)
    row_grads = ()
    if grads.rows is not None:
        N_ROWS: tl.constexpr = (len(ROWS) + len(NEAR_ROWS)) // FIELDS + ENTROPY
        row_grads = load_each(stack_of(grads.rows, 0, 0, sizes.n_queries, sizes), o_flat, m_row, N_ROWS)
    b_counts = None
    if query_counts is not None:
        b_counts = load_counts(query_counts + wide(i_batch) * sizes.n_queries + q_begin + o_row, m_row)

    position = sequence.offset + q_start
    first, whole, edge, end = key_range(position, 0, sequence.n_keys, visible, BM, BN)
    column_grads = None
    if grads.columns is not None:
        column_grads = stack_of(grads.columns, i_flat_head, sequence.k_begin, sizes.n_keys, sizes)
        near_first, near_end = first, end
        if len(COLUMNS) == 0:
            near_first = tl.maximum(first, (position - near.behind) // BN * BN)
            near_end = tl.minimum(end, position + BM + near.ahead)
        if near_first < near_end:
            b_delta = column_delta(
                b_delta, b_q, b_pivot, b_factor, b_counts, o_position, keys, column_grads, near_first, near_end,
                sequence, visible, score, WEIGHTS, TILE,
            )  # fmt: skip
    tl.store(delta + o_flat, b_delta, mask=m_row)
    if near is not None:
        edge = tl.maximum(tl.minimum(edge, (position - near.behind) // BN * BN), whole)

    queries = QueryBlock(b_q, b_do, b_pivot, b_factor, b_delta, row_grads, b_counts, o_position)
    b_dq = tl.zeros((BM, BLOCK_DIM), tl.float32)
    if visible.left is not None:
        # Guarded, here and below, for the reason that forward.py gives.
        if first < whole:
            b_dq = over_keys(
                b_dq, queries, keys, values, column_grads, i_flat_head, first, whole,
                sequence, visible, score, dropout, True, WEIGHTS, TILE,
            )  # fmt: skip
    if whole < edge:
        b_dq = over_keys(
            b_dq, queries, keys, values, column_grads, i_flat_head, whole, edge,
            sequence, visible, score, dropout, False, WEIGHTS, TILE,
        )  # fmt: skip
    if edge < end:
        b_dq = over_keys(
            b_dq, queries, keys, values, column_grads, i_flat_head, edge, end,
            sequence, visible, score, dropout, True, WEIGHTS, TILE,
        )  # fmt: skip
    d_q = head_of(d_query, strides.d_query, i_batch, i_head, q_begin)
    store_tile(d_q, q_start, n_queries, b_dq * score.scale, BM, DIM, BLOCK_DIM)


@triton.jit
def over_queries(
    b_dk, b_dv, b_k, b_v, column_grads, o_key, queries, d_out, p_pivot, p_factor, p_delta, row_grads, p_query_counts,
    i_flat_head, first, last, sequence, visible, score, dropout,
    OF_KEYS: tl.constexpr, OF_VALUES: tl.constexpr, WEIGHTS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Add the terms of a head's queries first .. last to b_dk [BN, BLOCK_DIM], b_dv [BN, BLOCK_VALUE_DIM], or both.

    Keys that don't exist or are padding have rows of their own in the tile, which aren't stored. A second loop for
    tiles without a mask would save 4 instructions per score, but costs the registers that a larger tile needs.
    """
    BM: tl.constexpr = TILE.BM
    N_ROWS: tl.constexpr = (len(WEIGHTS.ROWS) + len(WEIGHTS.NEAR_ROWS)) // FIELDS + WEIGHTS.ENTROPY
    for start in range(first, last, BM):
        o_row = start + tl.arange(0, BM)
        m_row = o_row < last
        b_q = load_tile(queries, start, last, BM, TILE.DIM, TILE.BLOCK_DIM, True)  # [BM, BLOCK_DIM]
        b_do = load_tile(d_out, start, last, BM, TILE.VALUE_DIM, TILE.BLOCK_VALUE_DIM, True)
        b_pivot = load_pivot(p_pivot, o_row, m_row, p_factor is None)
        b_factor = None
        if p_factor is not None:
            b_factor = tl.load(p_factor + o_row, mask=m_row, other=1.0)
        b_delta = tl.load(p_delta + o_row, mask=m_row, other=0.0)
        grads = load_each(row_grads, o_row, m_row, N_ROWS)
        b_counts = None
        if p_query_counts is not None:
            b_counts = load_counts(p_query_counts + o_row, m_row)
        query_block = QueryBlock(b_q, b_do, b_pivot, b_factor, b_delta, grads, b_counts, sequence.offset + o_row)
        key_block = KeyBlock(b_k, b_v, column_grads, None, o_key)
        b_met, b_ds = step(query_block, key_block, i_flat_head, sequence, visible, score, dropout, True, WEIGHTS, True)
        if OF_VALUES:
            b_dv = dot(b_met.to(b_do.dtype), b_do, b_dv)
        if OF_KEYS:
            b_dk = dot(b_ds.to(b_q.dtype), b_q, b_dk)
    return b_dk, b_dv


@triton.jit(do_not_specialize=Sizes._fields)
def backward_keys(
    query, key, value, d_output, d_key, d_value, pivot, factor, delta, grads, query_counts, sequences,
    n_batch, n_sequences, n_query_heads, n_heads, group, query_offset, n_queries, n_keys, n_blocks, n_even,
    visible, score, dropout, strides,
    ROWS: tl.constexpr, NEAR_ROWS: tl.constexpr, ENTROPY: tl.constexpr,
    COLUMNS: tl.constexpr, NEAR_COLUMNS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_VALUE_DIM: tl.constexpr,
    DESCRIBED: tl.constexpr,
):  # fmt: skip
    WEIGHTS: tl.constexpr = Weights(ROWS, NEAR_ROWS, ENTROPY, COLUMNS, NEAR_COLUMNS)
    TILE: tl.constexpr = Tile(1, BM, BN, DIM, BLOCK_DIM, VALUE_DIM, BLOCK_VALUE_DIM)
    sizes = Sizes(
        n_batch, n_sequences, n_query_heads, n_heads, group, query_offset, n_queries, n_keys, n_blocks, n_even
    )
    strides = Strides(*strides)  # Triton 3.6 loses the types of nested arguments in loops
    n_key_heads = sizes.n_query_heads // sizes.group
    i_program = tl.program_id(0)
    i_block = i_program % n_blocks  # under a causal mask the first keys have the most queries
    i_key_head = i_program // n_blocks % n_key_heads
    i_sequence = i_program // (n_blocks * n_key_heads)
    i_sequence, i_block = place_of(i_sequence, i_block, sequences.cu_seqlens_k, sizes.n_keys, sizes, BN)
    k_start = i_block * BN
    sequence = sequence_of(i_sequence, sequences, sizes)
    if sequences.cu_seqlens_q is not None:
        if k_start >= sequence.n_keys:
            return
    i_batch, q_begin, k_begin, n_keys = sequence.i_batch, sequence.q_begin, sequence.k_begin, sequence.n_keys
    o_key = k_start + tl.arange(0, BN)
    keys = head_of(key, strides.key, i_batch, i_key_head, k_begin)
    values = head_of(value, strides.value, i_batch, i_key_head, k_begin)
    b_k = load_tile(keys, k_start, n_keys, BN, DIM, BLOCK_DIM, True)  # [BN, BLOCK_DIM]
    b_v = load_tile(values, k_start, n_keys, BN, VALUE_DIM, BLOCK_VALUE_DIM, True)
    first, last = query_range(k_start - sequence.offset, sequence.n_queries * 0, sequence.n_queries, visible, BN)
    first = first // BM * BM  # aligned tiles take fewer masks

    b_dk = tl.zeros((BN, BLOCK_DIM), tl.float32)
    b_dv = tl.zeros((BN, BLOCK_VALUE_DIM), tl.float32)
    p_query_counts = query_counts
    if query_counts is not None:
        p_query_counts = query_counts + wide(i_batch) * sizes.n_queries + q_begin
    for i_member in range(sizes.group):
        i_head = i_key_head * sizes.group + i_member
        i_flat_head = i_batch * sizes.n_query_heads + i_head
        o_head = wide(i_flat_head) * sizes.n_queries + q_begin
        queries = head_of(query, strides.query, i_batch, i_head, q_begin)
        d_out = head_of(d_output, strides.d_output, i_batch, i_head, q_begin)
        queries = streamed(queries, last, BM, DIM, BLOCK_DIM, DESCRIBED)
        d_out = streamed(d_out, last, BM, VALUE_DIM, BLOCK_VALUE_DIM, DESCRIBED)
        p_factor = factor
        if factor is not None:
            p_factor = factor + o_head
        row_grads = None
        if grads.rows is not None:
            row_grads = stack_of(grads.rows, i_flat_head, q_begin, sizes.n_queries, sizes)
        column_grads = ()
        if grads.columns is not None:
            N_COLUMNS: tl.constexpr = (len(COLUMNS) + len(NEAR_COLUMNS)) // FIELDS
            column_stack = stack_of(grads.columns, i_flat_head, k_begin, sizes.n_keys, sizes)
            column_grads = load_each(column_stack, o_key, o_key < n_keys, N_COLUMNS)
        if first < last:
            b_dk, b_dv = over_queries(
                b_dk, b_dv, b_k, b_v, column_grads, o_key, queries, d_out, pivot + o_head, p_factor, delta + o_head,
                row_grads, p_query_counts, i_flat_head, first, last,
                sequence, visible, score, dropout, d_key is not None, d_value is not None, WEIGHTS, TILE,
            )  # fmt: skip
    m_key = keys_present(visible.key_mask, i_batch, o_key, n_keys)[:, None]
    if d_key is not None:
        d_k = head_of(d_key, strides.d_key, i_batch, i_key_head, k_begin)
        store_tile(d_k, k_start, n_keys, tl.where(m_key, b_dk * score.scale, 0.0), BN, DIM, BLOCK_DIM)
    if d_value is not None:
        d_v = head_of(d_value, strides.d_value, i_batch, i_key_head, k_begin)
        store_tile(d_v, k_start, n_keys, tl.where(m_key, b_dv, 0.0), BN, VALUE_DIM, BLOCK_VALUE_DIM)
