"""Band statistics from (query, key, lse): every weight that is constant beyond a distance, in O(T) time.

    program (i_sequence, i_head .. i_head + HEADS, i_block):

        queries          keys, in tiles of BN
        [HEADS x BM, D]  x  [ BEHIND | BM | AHEAD ]

One program owns BM positions of HEADS query heads that share a key head: their rows are packed into one tile, so that
a key tile is read once for all of them. With a subset of heads HEADS is 1. In registers stay the query tile and one
accumulator per row statistic, stored at the end as [ROWS, B, heads, Tq] float32; columns go to their slots as they come
(tiles.band_sweep). Q is read once, K 1 + (BEHIND + AHEAD) / BM times, from L2 but for the first.

With PAGE keys per page `key` is a paged cache, and the keys of a sequence are the last of an inference engine's
request: those that the band of its new tokens needs. Columns have these keys alone.
"""

import triton
import triton.language as tl

from .arguments import Band, PageTable, Sizes, Slots, Strides, Tile
from .tiles import (
    FIELDS,
    anew,
    band_sweep,
    head_of,
    load_counts,
    load_packed,
    load_pivot,
    packed_rows,
    paged_head_of,
    place_of,
    row_mass,
    sequence_of,
    wide,
)


@triton.jit(do_not_specialize=Sizes._fields)
def band(
    query, key, pivot, factor, rows, columns, query_counts, sinks, sequences, pages, heads,
    n_batch, n_sequences, n_query_heads, n_heads, group, query_offset, n_queries, n_keys, n_blocks, n_even,
    visible, score, strides,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BEHIND: tl.constexpr, ROWS_BEHIND: tl.constexpr, AHEAD: tl.constexpr,
    HEADS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    PAGE: tl.constexpr,
):  # fmt: skip
    sizes = Sizes(
        n_batch, n_sequences, n_query_heads, n_heads, group, query_offset, n_queries, n_keys, n_blocks, n_even
    )
    strides = Strides(*strides)  # Triton 3.6 loses the types of nested arguments in loops
    i_program = tl.program_id(0)
    i_block = i_program % n_blocks
    if heads is None:
        parts = tl.cdiv(group, HEADS)
        i_part = i_program // n_blocks % parts
        i_key_head = i_program // (n_blocks * parts) % (n_heads // group)
        i_sequence = i_program // (n_blocks * parts * (n_heads // group))
        i_head = i_key_head * group + i_part * HEADS
        i_place = i_head  # among the heads of what is stored
        n_packed = tl.minimum(HEADS, group - i_part * HEADS)
    else:
        i_place = i_program // n_blocks % n_heads
        i_sequence = i_program // (n_blocks * n_heads)
        i_head = tl.load(heads + i_place)
        i_key_head = i_head // group
        n_packed = 1
    i_sequence, i_block = place_of(i_sequence, i_block, sequences.cu_seqlens_q, sizes.n_queries, sizes, BM)
    sequence = sequence_of(i_sequence, sequences, sizes)
    if sequences.cu_seqlens_q is not None:
        if i_block * BM >= sequence.n_queries:
            return
    i_batch, q_begin = sequence.i_batch, sequence.q_begin
    q_rows = packed_rows(i_block, n_packed, sequence.n_queries, HEADS, BM)
    o_head, o_row, m_row = q_rows
    b_q = load_packed(head_of(query, strides.query, i_batch, i_head, q_begin), q_rows, DIM, BLOCK_DIM)
    o_lse = (wide(i_batch) * sizes.n_query_heads + i_head + o_head) * sizes.n_queries + q_begin + o_row
    b_pivot = load_pivot(pivot, o_lse, m_row, factor is None)
    b_factor = None
    if factor is not None:
        b_factor = tl.load(factor + o_lse, mask=m_row, other=0.0)
    b_counts = None
    if query_counts is not None:
        b_counts = load_counts(query_counts + wide(i_batch) * sizes.n_queries + q_begin + o_row, m_row)
    if PAGE > 0:
        keys = paged_head_of(key, strides.key, i_sequence, i_key_head, PageTable(*pages))
    else:
        keys = head_of(key, strides.key, i_batch, i_key_head, sequence.k_begin)
    sums = band_sweep(
        b_q, b_pivot, b_factor, b_counts, keys, sequence, sequence.offset + i_block * BM, BEHIND,
        Slots(columns, i_place, n_packed, sizes.n_batch, n_heads, sizes.n_keys), visible, score,
        Band(ROWS, COLUMNS, BEHIND, ROWS_BEHIND, AHEAD), Tile(HEADS, BM, BN, DIM, BLOCK_DIM, None, None, PAGE),
    )  # fmt: skip
    q_rows = packed_rows(anew(i_block), n_packed, sequence.n_queries, HEADS, BM)
    o_head, o_row, m_row = q_rows
    o_flat = (wide(i_batch) * n_heads + i_place + o_head) * sizes.n_queries + q_begin + o_row
    o_lse = (wide(i_batch) * sizes.n_query_heads + i_head + o_head) * sizes.n_queries + q_begin + o_row
    b_pivot = load_pivot(pivot, o_lse, m_row, factor is None)  # read again: with it kept, Triton 3.6 spills
    b_mass = row_mass(b_pivot, b_factor, sinks, i_head, q_rows)
    for j in tl.static_range(len(ROWS) // FIELDS):
        p_row = rows + wide(j) * sizes.n_batch * n_heads * sizes.n_queries
        tl.store(p_row + o_flat, sums[j] + ROWS[FIELDS * j + 3] * b_mass, mask=m_row)
