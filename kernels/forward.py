"""Attention with its row statistics in one pass, the band as an epilogue; or the rows alone from an lse.

    program (i_split, i_sequence, i_head .. i_head + HEADS, i_block):

        queries          keys  first .. whole: masked | whole .. edge: every row sees every key | edge .. end: masked
        [HEADS x BM, D]        [ tile ][ tile ]       | [ tile ][ tile ][ tile ][ tile ]        | [ tile ][ tile ]
                                                                     <-- epilogue: the band once more, tiles in L2

One program owns BM rows of HEADS heads that share a key head, and streams the keys past them with an online softmax. In
registers stay the query tile, the output accumulator, the running maximum and sum, and one accumulator per statistic of
the loop (MeanDistance, Entropy; MaxLogit is the maximum itself). Written are output, lse and row statistics. Band
statistics cost the loop nothing: after it the lse is known, and `tiles.band_sweep` revisits the keys near the diagonal.

When decoding (a few queries, many keys) the keys are cut into splits of SPLIT_KEYS: each program writes the normalised
results of its split, combine.py adds them up, and there is no epilogue. SPLIT_KEYS = 0: no splits.

MARKS are numbers of each key, [MARKS] of them, that rows of A are multiplied with in one more, narrow matmul: 1 where
the key lies in a segment. TOP keeps the key of the maximum, whose A is 1 over the row's sum.

MOMENT is MeanDistance under a causal mask: a first moment of the positions, one FMA per element. All row sums of the
loop are kept in CHUNK columns and reduced after it.

With FROM_LSE there is no value, no maximum and no output: `pivot` is lse2. Else the pass stores, for later ones, each
row's pivot, its maximum (+inf where it sees no key), and its factor, 1 over its sum: A = exp2(score - pivot) * factor
has no error of the size of the lse's rounding, which is 1e-4 of A where the lse is in the thousands. A row whose scores
are all -inf has A = 0 beside a sink, and is NaN without one; of a split its pivot is -inf.
Row sums are stored as [mean distance, LOOP_ROWS, BAND_ROWS, entropy, maximum, A of TOP and its key; splits, B, Hq, Tq]
float32, and what MARKS give as [splits, B, Hq, Tq, MARKS].
"""

import triton
import triton.language as tl

from .arguments import Band, Loop, Sizes, Slots, Softmax, Strides, Tile, Visibility
from .tiles import (
    FIELDS,
    LARGEST,
    LN2,
    LOG2_ZERO,
    anew,
    band_sweep,
    dot,
    head_of,
    hide,
    kept,
    key_range,
    keys_present,
    load_counts,
    load_packed,
    load_sinks,
    load_tile,
    packed_rows,
    place_of,
    see_a_key,
    sequence_of,
    softcapped,
    streamed,
    weigh,
    wide,
    zeros_for,
)

UNIT = tl.constexpr(4096.0)  # A of 1 where it is rounded to float16, which ends at 65504


@triton.jit
def halves(b_x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The left and the right half of [ROWS, COLUMNS]; in the layouts of mma nothing moves between threads."""
    return tl.split(tl.permute(tl.reshape(b_x, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


@triton.jit
def add_products(b_acc, b_a, b_b, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr):
    """b_acc [ROWS, CHUNK] and the sum of a * b over chunks of columns: one FMA per element, and no shuffle."""
    if CHUNK == 1:
        b_acc += tl.sum(b_a * b_b, 1, keep_dims=True)
    elif COLUMNS == CHUNK:
        b_acc += b_a * b_b
    else:
        b_left_a, b_right_a = halves(b_a, ROWS, COLUMNS)
        b_left_b, b_right_b = halves(b_b, ROWS, COLUMNS)
        b_acc = add_products(b_acc, b_left_a, b_left_b, ROWS, COLUMNS // 2, CHUNK)
        b_acc = add_products(b_acc, b_right_a, b_right_b, ROWS, COLUMNS // 2, CHUNK)
    return b_acc


@triton.jit
def sum_chunks(b_a, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr):
    """[ROWS, CHUNK] the sum over chunks of columns."""
    if CHUNK == 1:
        b_sum = tl.sum(b_a, 1, keep_dims=True)
    elif COLUMNS == CHUNK:
        b_sum = b_a
    else:
        b_left, b_right = halves(b_a, ROWS, COLUMNS)
        b_sum = sum_chunks(b_left, ROWS, COLUMNS // 2, CHUNK) + sum_chunks(b_right, ROWS, COLUMNS // 2, CHUNK)
    return b_sum


@triton.jit
def add_moments(
    b_moment, b_a, BASE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """b_moment + chunks of a * (columns between the chunk and the tile's end)."""
    if CHUNK == 1:
        o_from_end = (BASE + COLUMNS - 1 - tl.arange(0, COLUMNS)).to(tl.float32)
        b_moment += tl.sum(b_a * o_from_end[None, :], 1, keep_dims=True)
    elif COLUMNS == CHUNK:
        if BASE > 0:
            b_moment += b_a * BASE
    else:
        b_left, b_right = halves(b_a, ROWS, COLUMNS)
        b_moment = add_moments(b_moment, b_left, BASE + COLUMNS // 2, ROWS, COLUMNS // 2, CHUNK)
        b_moment = add_moments(b_moment, b_right, BASE, ROWS, COLUMNS // 2, CHUNK)
    return b_moment


@triton.jit
def visit(
    state, b_q, q_rows, o_position, o_flat_head, keys, values, marks, first, last, sequence, visible, score, dropout,
    EDGE: tl.constexpr, LOOP: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Stream the keys first .. last. EDGE: a key may not exist or may be hidden from a row."""
    ROWS: tl.constexpr = TILE.HEADS * TILE.BM
    BN: tl.constexpr = TILE.BN
    CHUNK: tl.constexpr = LOOP.CHUNK
    b_out, b_max = state.b_out, state.b_max
    b_sum, b_log, b_moment, sums = state.b_sum, state.b_log, state.b_moment, state.sums
    b_marked, b_argmax, b_rest = state.b_marked, state.b_argmax, state.b_rest
    for start in range(first, last, BN):
        o_key = start + tl.arange(0, BN)
        b_k = load_tile(keys, start, sequence.n_keys, BN, TILE.DIM, TILE.BLOCK_DIM, EDGE)  # [BN, BLOCK_DIM]
        b_score, unit = softcapped(dot(b_q, tl.trans(b_k)), score)  # [rows, BN]
        distance = o_position[:, None] - o_key[None, :]
        if EDGE or visible.key_mask is not None:
            m_key = keys_present(visible.key_mask, sequence.i_batch, o_key, sequence.n_keys)[None, :]
            if EDGE:
                b_score = hide(b_score, m_key, distance, 0, visible)
            else:
                b_score = tl.where(m_key, b_score, float("-inf"))
        if LOOP.FROM_LSE:
            b_pivot = b_max
        else:
            b_largest = tl.max(b_score, 1)
            b_new_max = tl.maximum(b_max, b_largest * unit)
            if LOOP.TOP:
                b_rounded = tl.fma(b_largest, unit, -(b_largest * unit))  # what the maximum lacks
                m_new = (b_largest * unit > b_max) | ((b_largest * unit == b_max) & (b_rounded > b_rest))
                i_first = tl.min(tl.where(b_score == b_largest[:, None], o_key[None, :], 2147483647), 1)
                b_argmax = tl.where(m_new, i_first, b_argmax)
                b_rest = tl.where(m_new, b_rounded, b_rest)
            # A row that has seen no key yet keeps a finite pivot: (-inf) - (-inf) is NaN.
            b_pivot = tl.where(b_new_max == float("-inf"), 0.0, b_new_max)
            b_rescale = tl.exp2(b_max - b_pivot)
        b_log_a = tl.fma(b_score, unit, -b_pivot[:, None])
        b_a = tl.exp2(b_log_a)
        b_here = sum_chunks(b_a, ROWS, BN, CHUNK)  # the same sum whatever statistics are requested
        if LOOP.MOMENT:
            # The distance is that of the tile's end and the rest within the tile: nothing large cancels.
            if not LOOP.FROM_LSE:
                b_moment *= b_rescale[:, None]
            b_moment = add_moments(b_moment, b_a, 0, ROWS, BN, CHUNK)
            o_from_end = (CHUNK - 1 - tl.arange(0, CHUNK))[None, :]
            b_from_end = (o_position - (start + BN - 1)).to(tl.float32)
            b_moment += b_here * (b_from_end[:, None] + o_from_end.to(tl.float32))
        if LOOP.ENTROPY:
            if not LOOP.FROM_LSE:  # sum of a * log2(a) moves with the pivot
                b_moved = tl.maximum(b_max - b_pivot, LOG2_ZERO)  # there is no sum yet where that is -inf
                b_log = (b_log + b_sum * b_moved[:, None]) * b_rescale[:, None]
            b_log_a = tl.maximum(b_log_a, LOG2_ZERO)  # a score may be -inf in a whole tile, too
            b_log = add_products(b_log, b_a, b_log_a, ROWS, BN, CHUNK)
        if not LOOP.FROM_LSE:
            b_sum = b_sum * b_rescale[:, None] + b_here
        updated = ()
        for j in tl.static_range(len(LOOP.ROWS) // FIELDS):
            b_w = weigh(distance.to(tl.float32), LOOP.ROWS, j)
            b_row = tl.sum(b_a * b_w, 1)
            if LOOP.FROM_LSE:
                updated = updated + (sums[j] + b_row,)
            else:
                updated = updated + (sums[j] * b_rescale + b_row,)
        sums = updated
        if LOOP.MARKS > 0:
            b_marks = load_tile(marks, start, sequence.n_keys, BN, LOOP.MARKS, LOOP.MARKS, EDGE)
            if not LOOP.FROM_LSE:
                b_marked *= b_rescale[:, None]
            if LOOP.FROM_LSE:  # A is divided by its row's sum already: far from the subnormal numbers of float16
                b_marked = dot((b_a * UNIT).to(b_marks.dtype), b_marks, b_marked)
            else:
                b_marked = dot(b_a.to(b_marks.dtype), b_marks, b_marked)
        if not LOOP.FROM_LSE:
            if dropout is not None:
                o_query = (sequence.q_begin + q_rows.o_row)[:, None]
                m_kept = kept(dropout, o_flat_head[:, None], o_query, (sequence.k_begin + o_key)[None, :])
                b_a = tl.where(m_kept, b_a, 0.0)
            b_v = load_tile(values, start, sequence.n_keys, BN, TILE.VALUE_DIM, TILE.BLOCK_VALUE_DIM, EDGE)
            b_out = dot(b_a.to(b_v.dtype), b_v, b_out * b_rescale[:, None])
            b_max = b_new_max
    return Softmax(b_out, b_sum, b_log, b_moment, sums, b_marked, b_argmax, b_rest, b_max)


@triton.jit(do_not_specialize=Sizes._fields)
def forward(
    query, key, value, output, lse, pivot, factor, rows, columns, marks, marked, query_counts, sinks, sequences, reach,
    n_batch, n_sequences, n_query_heads, n_heads, group, query_offset, n_queries, n_keys, n_blocks, n_even,
    visible, score, dropout, strides,
    MOMENT: tl.constexpr, LOOP_ROWS: tl.constexpr, ENTROPY: tl.constexpr, MAX_LOGIT: tl.constexpr,
    MARKS: tl.constexpr, TOP: tl.constexpr,
    BAND_ROWS: tl.constexpr, BAND_COLUMNS: tl.constexpr,
    BEHIND: tl.constexpr, ROWS_BEHIND: tl.constexpr, AHEAD: tl.constexpr, BAND_BOUND: tl.constexpr,
    FROM_LSE: tl.constexpr, SPLIT_KEYS: tl.constexpr, CHUNK: tl.constexpr,
    HEADS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BAND_BN: tl.constexpr,
    DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_VALUE_DIM: tl.constexpr,
    DESCRIBED: tl.constexpr,
):  # fmt: skip
    tl.static_assert(SPLIT_KEYS % BN == 0, "a split is whole tiles of keys")
    LOOP: tl.constexpr = Loop(LOOP_ROWS, MOMENT, ENTROPY, FROM_LSE, CHUNK, MARKS, TOP)
    TILE: tl.constexpr = Tile(HEADS, BM, BN, DIM, BLOCK_DIM, VALUE_DIM, BLOCK_VALUE_DIM)
    sizes = Sizes(
        n_batch, n_sequences, n_query_heads, n_heads, group, query_offset, n_queries, n_keys, n_blocks, n_even
    )
    strides = Strides(*strides)  # Triton 3.6 loses the types of nested arguments in loops
    parts = tl.cdiv(sizes.group, HEADS)
    n_key_heads = sizes.n_query_heads // sizes.group
    i_program = tl.program_id(0)
    i_block = n_blocks - 1 - i_program % n_blocks  # under a causal mask the longest rows first
    i_part = i_program // n_blocks % parts
    i_key_head = i_program // (n_blocks * parts) % n_key_heads
    i_sequence = i_program // (n_blocks * parts * n_key_heads) % sizes.n_batch
    i_split = i_program // (n_blocks * parts * n_key_heads * sizes.n_batch)
    i_head = i_key_head * sizes.group + i_part * HEADS
    i_sequence, i_block = place_of(i_sequence, i_block, sequences.cu_seqlens_q, sizes.n_queries, sizes, BM)
    sequence = sequence_of(i_sequence, sequences, sizes)
    if sequences.cu_seqlens_q is not None:
        if i_block * BM >= sequence.n_queries:
            return
    i_batch, q_begin, n_keys = sequence.i_batch, sequence.q_begin, sequence.n_keys
    n_packed = tl.minimum(HEADS, sizes.group - i_part * HEADS)
    q_rows = packed_rows(i_block, n_packed, sequence.n_queries, HEADS, BM)
    o_head, o_row, m_row = q_rows
    o_position = sequence.offset + o_row
    o_flat_head = i_batch * sizes.n_query_heads + i_head + o_head
    o_flat = (wide(i_batch) * sizes.n_query_heads + i_head + o_head) * sizes.n_queries + q_begin + o_row  # [B, Hq, Tq]
    n_flat = wide(sizes.n_batch) * sizes.n_query_heads * sizes.n_queries
    queries = head_of(query, strides.query, i_batch, i_head, q_begin)
    keys = head_of(key, strides.key, i_batch, i_key_head, sequence.k_begin)
    stream = streamed(keys, n_keys, BN, DIM, BLOCK_DIM, DESCRIBED)
    values = keys  # not read with FROM_LSE
    if not FROM_LSE:
        values = head_of(value, strides.value, i_batch, i_key_head, sequence.k_begin)
        values = streamed(values, n_keys, BN, VALUE_DIM, BLOCK_VALUE_DIM, DESCRIBED)
    key_marks = keys  # not read without MARKS
    if MARKS > 0:
        key_marks = head_of(marks, strides.marks, i_batch, 0, sequence.k_begin)
        key_marks = streamed(key_marks, n_keys, BN, MARKS, MARKS, DESCRIBED)
    if HEADS == 1:
        b_q = load_tile(queries, i_block * BM, sequence.n_queries, BM, DIM, BLOCK_DIM, True)
    else:
        b_q = load_packed(queries, q_rows, DIM, BLOCK_DIM)

    # The rows see keys first .. end, and every row sees every key of whole .. edge, all of them whole tiles.
    position = sequence.offset + i_block * BM
    first, end = 0, n_keys
    if SPLIT_KEYS > 0:
        first = i_split * SPLIT_KEYS
        end = tl.minimum(first + SPLIT_KEYS, n_keys)
    first, whole, edge, end = key_range(position, first, end, visible, BM, BN)

    b_zero = tl.zeros((HEADS * BM, CHUNK), tl.float32)
    if FROM_LSE:
        b_max = tl.load(pivot + o_flat, mask=m_row, other=float("inf"))
    else:
        b_max = tl.full((HEADS * BM,), float("-inf"), tl.float32)
    b_out = tl.zeros((HEADS * BM, BLOCK_VALUE_DIM), tl.float32)
    b_marked = b_zero
    if MARKS > 0:
        b_marked = tl.zeros((HEADS * BM, MARKS), tl.float32)
    b_argmax = tl.full((HEADS * BM,), -1, tl.int32)
    b_rest = tl.full((HEADS * BM,), float("-inf"), tl.float32)
    sums = zeros_for(len(LOOP_ROWS) // FIELDS, (HEADS * BM,))
    state = Softmax(b_out, b_zero, b_zero, b_zero, sums, b_marked, b_argmax, b_rest, b_max)
    if visible.left is not None:
        # Guarded: a loop that may run no time at all makes ptxas wait for each of Hopper's matmuls on its own.
        if first < whole:
            state = visit(
                state, b_q, q_rows, o_position, o_flat_head, stream, values, key_marks, first, whole,
                sequence, visible, score, dropout, True, LOOP, TILE,
            )  # fmt: skip
    if whole < edge:
        state = visit(
            state, b_q, q_rows, o_position, o_flat_head, stream, values, key_marks, whole, edge,
            sequence, visible, score, dropout, False, LOOP, TILE,
        )  # fmt: skip
    if edge < end:
        state = visit(
            state, b_q, q_rows, o_position, o_flat_head, stream, values, key_marks, edge, end,
            sequence, visible, score, dropout, True, LOOP, TILE,
        )  # fmt: skip

    b_out, b_sum, b_log, b_moment, sums, b_marked, b_argmax, b_rest, b_max = state
    q_rows = packed_rows(anew(i_block), n_packed, sequence.n_queries, HEADS, BM)
    o_head, o_row, m_row = q_rows
    o_flat = (wide(i_batch) * sizes.n_query_heads + i_head + o_head) * sizes.n_queries + q_begin + o_row  # [B, Hq, Tq]
    b_sum, b_log, b_moment = tl.sum(b_sum, 1), tl.sum(b_log, 1), tl.sum(b_moment, 1)
    b_pivot = b_max
    b_inverse = tl.full((HEADS * BM,), 1.0, tl.float32)
    b_factor = b_inverse
    b_mass = b_inverse  # the sum of each row's A
    if not FROM_LSE:
        b_sink_lse = tl.full((HEADS * BM,), float("-inf"), tl.float32)
        b_sink = b_sink_lse
        if sinks is not None:
            b_sink_lse, b_sink = load_sinks(sinks + i_head + o_head, m_row)
        m_infinite = see_a_key(b_sum == 0.0, position, first, end, sequence, visible, TILE)
        m_live = m_infinite | (b_sum != 0.0)  # neither scores of -inf nor NaN are those of a row that sees no key
        if SPLIT_KEYS == 0:  # else combine.py does, which knows the whole row
            b_sum = tl.where(m_infinite & (b_sink == float("-inf")), float("nan"), b_sum)
        b_divisor = tl.where(b_sum == 0.0, 1.0, b_sum)
        b_above = tl.log2(b_divisor)  # of lse2 above the maximum
        b_inverse = 1.0 / b_divisor
        b_nan = b_sum * 0.0  # NaN for rows without a softmax, else 0
        b_mass = tl.where(b_sum == 0.0, 0.0, 1.0 + b_nan)
        if sinks is not None:
            b_pivot = tl.where(b_max == float("-inf"), 0.0, b_max)  # finite where the sink has all the mass
            b_sink = tl.where(m_live, tl.minimum(b_sink - b_max, LARGEST), float("-inf"))
            b_top = tl.maximum(b_sink, 0.0)  # above the maximum
            b_total = b_sum * tl.exp2(-b_top) + tl.exp2(b_sink - b_top)
            b_above = tl.where(m_live, b_top + tl.log2(b_total), 0.0)
            b_inverse = tl.exp2(-b_top) / tl.where(m_live, b_total, 1.0)
            b_mass = b_sum * b_inverse
        # A NaN is in the pivot alone: a hidden key has A = 0 * factor in such a row, too.
        b_pivot = tl.where(m_live & m_row, b_pivot + b_nan, float("inf"))
        b_factor = tl.where(b_nan == 0.0, b_inverse, 1.0)
        b_max += b_nan
        if lse is not None:
            b_lse = (b_max + b_above) * LN2
            if sinks is not None:
                b_lse = tl.maximum(
                    b_lse, b_sink_lse, propagate_nan=tl.PropagateNan.ALL
                )  # which may pass 3e38 / log2(e)
            tl.store(lse + o_flat, tl.where(m_live, b_lse, float("-inf")), mask=m_row)
        if pivot is not None:
            tl.store(pivot + i_split * n_flat + o_flat, b_pivot, mask=m_row)
            tl.store(factor + i_split * n_flat + o_flat, b_factor, mask=m_row)
        o_dim = tl.arange(0, BLOCK_VALUE_DIM)
        out = head_of(output, strides.output, i_batch, i_head, q_begin)
        p_out = out.pointer + i_split * n_flat * VALUE_DIM
        o_element = o_head.to(tl.int64) * out.strides[1] + o_row.to(tl.int64) * out.strides[2]
        pointers = p_out + o_element[:, None] + o_dim[None, :] * out.strides[3]
        if dropout is not None:
            b_out *= 1.0 / (1.0 - dropout.p)
        b_out = (b_out * b_inverse[:, None]).to(output.dtype.element_ty)
        tl.store(pointers, b_out, mask=m_row[:, None] & (o_dim < VALUE_DIM)[None, :])

    N_LOOP: tl.constexpr = len(LOOP_ROWS) // FIELDS
    N_BAND: tl.constexpr = len(BAND_ROWS) // FIELDS
    p_rows = rows
    n_stored = n_flat  # between one statistic's rows and the next one's
    if SPLIT_KEYS > 0:
        n_stored = n_flat * tl.cdiv(sizes.n_keys, SPLIT_KEYS)
        p_rows += i_split * n_flat
    if MOMENT:
        tl.store(p_rows + o_flat, b_moment * b_inverse, mask=m_row)
        p_rows += n_stored
    for j in tl.static_range(N_LOOP):
        tl.store(p_rows + j * n_stored + o_flat, sums[j] * b_inverse, mask=m_row)
    if ENTROPY:
        b_entropy = -LN2 * b_log
        if not FROM_LSE:  # -sum A log2 A, where log2 A = log2 a - b_above
            b_entropy = LN2 * (b_above * b_mass - b_log * b_inverse)
        tl.store(p_rows + (N_LOOP + N_BAND) * n_stored + o_flat, b_entropy, mask=m_row)
    if MAX_LOGIT:
        tl.store(p_rows + (N_LOOP + N_BAND + ENTROPY) * n_stored + o_flat, b_max * LN2, mask=m_row)

    if TOP:
        p_top = p_rows + (N_LOOP + N_BAND + ENTROPY + MAX_LOGIT) * n_stored + o_flat
        b_argmax = tl.where(b_mass == b_mass, b_argmax, -1)  # none in a row of NaN
        tl.store(p_top, tl.where(b_argmax >= 0, tl.exp2(b_rest) * b_inverse, b_mass * 0.0), mask=m_row)
        tl.store(p_top + n_stored, b_argmax.to(tl.float32), mask=m_row)
    if MARKS > 0:
        p_marked = marked + (i_split * n_flat + o_flat)[:, None] * MARKS + tl.arange(0, MARKS)[None, :]
        if FROM_LSE:
            b_marked *= 1.0 / UNIT
        else:
            b_marked *= b_inverse[:, None]
        tl.store(p_marked, b_marked, mask=m_row[:, None])

    if len(BAND_ROWS) + len(BAND_COLUMNS) > 0:
        tl.static_assert(SPLIT_KEYS == 0, "the epilogue needs a whole row")
        behind = BEHIND
        if reach is not None:  # of these heads; BEHIND is the largest of all
            o_place = tl.arange(0, HEADS)
            behind = tl.max(tl.load(reach + i_head + o_place, mask=o_place < n_packed, other=-1), 0)
        b_counts = None
        if query_counts is not None:
            b_counts = load_counts(query_counts + wide(i_batch) * sizes.n_queries + q_begin + o_row, m_row)
        near = band_sweep(
            b_q, b_pivot, None if FROM_LSE else b_factor, b_counts,
            streamed(keys, n_keys, BAND_BN, DIM, BLOCK_DIM, DESCRIBED), sequence, position, behind,
            Slots(columns, i_head, n_packed, sizes.n_batch, sizes.n_query_heads, sizes.n_keys),
            Visibility(visible.left if BAND_BOUND else None, visible.right, visible.key_mask), score,
            Band(BAND_ROWS, BAND_COLUMNS, BEHIND, ROWS_BEHIND, AHEAD), Tile(HEADS, BM, BAND_BN, DIM, BLOCK_DIM),
        )  # fmt: skip
        for j in tl.static_range(N_BAND):
            b_row = near[j] + BAND_ROWS[FIELDS * j + 3] * b_mass
            tl.store(p_rows + (N_LOOP + j) * n_stored + o_flat, b_row, mask=m_row)
