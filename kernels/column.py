"""Column sums over every visible query, from (query, key, lse): open horizons, received attention, pooled maps.

    program (i_sequence, i_head, i_block):

        keys [BN, D], resident     queries of segment 0   [ tile ][ tile ]...
                                           of segment 1   [ tile ][ tile ]...

Key-stationary: one matmul per tile instead of the forward's two and no online softmax, since
A = exp2(Q K^T - pivot) * factor.
From some distance on each weight is constant. There the tile of A is accumulated once for all statistics and without a
mask; nearer tiles are weighted, one statistic after the other. Both accumulate elementwise, to be reduced once per
segment.
Queries that don't count, or see no key, have the pivot +inf in the copy that is passed here, so their A is exactly 0
and no query mask is read. COUNTED says that some may not count: their scores are hidden, because a NaN among them
would reach the keys, and of each sequence only the queries from the first that counts to the last are visited.
Padding among the keys affects only its own column, which is stored as 0.

Columns are stored as [COLUMNS, B, heads, Tk] float32; there is one segment, all queries. A pooled map has the bounds of
query segments, and cuts each block of keys into pieces at the boundaries of key segments: piece i of block b holds the
keys pieces[first_piece[b] + i] .. of the next one, and [pieces, B, heads, n_segments] is stored.
"""

import triton
import triton.language as tl

from .arguments import Sizes, Strides, Tile
from .tiles import (
    FIELDS,
    head_of,
    hide,
    keys_present,
    load_tile,
    place_of,
    query_range,
    scores_above,
    sequence_of,
    streamed,
    weigh,
    wide,
)


@triton.jit
def near(
    b_sum, b_kt, o_key, queries, p_pivot, p_factor, offset, first, last, visible, score,
    COLUMNS: tl.constexpr, J: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Add the terms of statistic J of the queries first .. last, which may not see all keys, to b_sum [BM, BN]."""
    for start in range(first, last, TILE.BM):
        o_row = start + tl.arange(0, TILE.BM)
        b_q = load_tile(queries, start, last, TILE.BM, TILE.DIM, TILE.BLOCK_DIM, True)  # [BM, BLOCK_DIM]
        b_pivot = tl.load(p_pivot + o_row, mask=o_row < last, other=float("inf"))
        b_x, _ = scores_above(b_q, b_kt, b_pivot[:, None], score)  # [BM, BN]
        distance = offset + o_row[:, None] - o_key[None, :]
        b_a = tl.exp2(hide(b_x, (b_pivot != float("inf"))[:, None], distance, 0, visible))
        if p_factor is not None:
            b_a *= tl.load(p_factor + o_row, mask=o_row < last, other=0.0)[:, None]
        b_w = weigh(distance.to(tl.float32), COLUMNS, J)
        b_sum += tl.where(b_w == 0, 0.0, b_a * b_w)  # 0 * NaN is NaN
    return b_sum


@triton.jit
def far(b_sum, b_kt, queries, p_pivot, p_factor, first, last, score, COUNTED: tl.constexpr, TILE: tl.constexpr):
    """Add the A of whole tiles of queries, which see every key, to b_sum [BM, BN]."""
    for start in range(first, last, TILE.BM):
        b_q = load_tile(queries, start, last, TILE.BM, TILE.DIM, TILE.BLOCK_DIM, False)  # [BM, BLOCK_DIM]
        o_row = start + tl.arange(0, TILE.BM)
        b_pivot = tl.load(p_pivot + o_row)
        b_x, _ = scores_above(b_q, b_kt, b_pivot[:, None], score)
        if COUNTED:
            b_x = tl.where((b_pivot != float("inf"))[:, None], b_x, float("-inf"))
        b_a = tl.exp2(b_x)
        if p_factor is not None:  # an FMA with the sum
            b_a *= tl.load(p_factor + o_row)[:, None]
        b_sum += b_a
    return b_sum


@triton.jit(do_not_specialize=(*Sizes._fields, "n_segments"))
def column(
    query, key, pivot, factor, columns, sequences, counted, heads,
    n_batch, n_sequences, n_query_heads, n_heads, group, query_offset, n_queries, n_keys, n_blocks, n_even,
    n_segments, segments, visible, reach, score, strides,
    COLUMNS: tl.constexpr, FAR: tl.constexpr, FAR_WEIGHTS: tl.constexpr, COUNTED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """counted: [sequences, 2] int32, the queries first .. end - 1 that may count; None: all. FAR: from this distance on
    statistic j has the weight FAR_WEIGHTS[j]; None: never. reach: the farthest distance at which any weight is not 0;
    None: there is none. n_segments: of queries; None: no segments."""
    TILE: tl.constexpr = Tile(1, BM, BN, DIM, BLOCK_DIM)
    sizes = Sizes(
        n_batch, n_sequences, n_query_heads, n_heads, group, query_offset, n_queries, n_keys, n_blocks, n_even
    )
    strides = Strides(*strides)  # Triton 3.6 loses the types of nested arguments in loops
    i_program = tl.program_id(0)
    i_block = i_program % n_blocks  # under a causal mask the first keys have the most queries
    i_place = i_program // n_blocks % n_heads  # among the heads of what is stored
    i_sequence = i_program // (n_blocks * n_heads)
    i_head = i_place
    if heads is not None:
        i_head = tl.load(heads + i_place)
    i_sequence, i_block = place_of(i_sequence, i_block, sequences.cu_seqlens_k, sizes.n_keys, sizes, BN)
    k_start = i_block * BN
    sequence = sequence_of(i_sequence, sequences, sizes)
    if sequences.cu_seqlens_q is not None:
        if k_start >= sequence.n_keys:
            return
    i_batch, n_keys = sequence.i_batch, sequence.n_keys
    o_key = k_start + tl.arange(0, BN)
    keys = head_of(key, strides.key, i_batch, i_head // sizes.group, sequence.k_begin)
    queries = head_of(query, strides.query, i_batch, i_head, sequence.q_begin)
    queries = streamed(queries, sequence.n_queries, BM, DIM, BLOCK_DIM, DESCRIBED)
    o_head = (wide(i_batch) * sizes.n_query_heads + i_head) * sizes.n_queries + sequence.q_begin
    p_pivot = pivot + o_head
    p_factor = factor
    if factor is not None:
        p_factor = factor + o_head
    # Transposed here, not in the loop: there it would go through shared memory again and again.
    b_kt = tl.trans(load_tile(keys, k_start, n_keys, BN, DIM, BLOCK_DIM, True))  # [BLOCK_DIM, BN]
    m_key = keys_present(visible.key_mask, i_batch, o_key, n_keys)
    o_place = wide(i_batch) * n_heads + i_place
    position = k_start - sequence.offset  # of the block's first key, as a row
    n_passes = 1
    if segments is not None:
        n_passes = n_segments
    for i_segment in range(n_passes):
        first, last = 0, sequence.n_queries
        if segments is not None:
            first = tl.load(segments.query_bounds + i_segment)
            last = tl.load(segments.query_bounds + i_segment + 1)
        # The rows first .. last see keys of the block; those in whole .. edge see all, at constant weights.
        first, last = query_range(position, first, last, visible, BN)
        if counted is not None:
            first = tl.maximum(first, tl.load(counted + 2 * i_sequence))
            last = tl.maximum(tl.minimum(last, tl.load(counted + 2 * i_sequence + 1)), first)
        if reach is not None:
            last = tl.maximum(tl.minimum(last, position + BN + reach), first)
        edge = last
        if visible.left is not None:
            edge = tl.minimum(last, position + visible.left + 1)
        whole = last
        if FAR is not None:
            whole = first
            if visible.right is not None:
                whole = tl.maximum(whole, position + BN - 1 - visible.right)
            whole = tl.maximum(whole, position + BN - 1 + FAR)
            whole = tl.minimum(first + tl.cdiv(whole - first, BM) * BM, last)
        edge = whole + tl.maximum(edge - whole, 0) // BM * BM

        # One statistic after the other: together they would take more registers than there are.
        sums = ()
        for j in tl.static_range(len(COLUMNS) // FIELDS):
            b_sum = tl.zeros((BM, BN), tl.float32)
            for part in tl.range(0, 2, num_stages=1):
                b_sum = near(
                    b_sum, b_kt, o_key, queries, p_pivot, p_factor, sequence.offset,
                    tl.where(part == 0, first, edge), tl.where(part == 0, whole, last), visible, score,
                    COLUMNS, j, TILE,
                )  # fmt: skip
            sums = sums + (tl.sum(b_sum, 0),)
        b_far = tl.zeros((BM, BN), tl.float32)
        if FAR is not None:
            b_far = far(b_far, b_kt, queries, p_pivot, p_factor, whole, edge, score, COUNTED, TILE)
        b_far_sum = tl.sum(b_far, 0)
        if segments is None:
            for j in tl.static_range(len(COLUMNS) // FIELDS):
                b_column = sums[j]
                if FAR is not None:
                    b_column += FAR_WEIGHTS[j] * b_far_sum
                p_column = columns + ((wide(j) * sizes.n_batch * n_heads) + o_place) * sizes.n_keys + sequence.k_begin
                tl.store(p_column + o_key, tl.where(m_key, b_column, 0.0), mask=o_key < n_keys)
        else:
            b_column = tl.where(m_key, sums[0] + b_far_sum, 0.0)
            for i_piece in range(tl.load(segments.first_piece + i_block), tl.load(segments.first_piece + i_block + 1)):
                p_bounds = segments.pieces + i_piece
                m_piece = (o_key >= tl.load(p_bounds)) & (o_key < tl.load(p_bounds + 1))
                p_piece = columns + (wide(i_piece) * sizes.n_batch * n_heads + o_place) * n_segments
                tl.store(p_piece + i_segment, tl.sum(tl.where(m_piece, b_column, 0.0)))
