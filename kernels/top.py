"""The largest entries of each row of A and their keys, from (query, key, lse).

    program (i_sequence, i_head, i_block):

        queries [BM, D], resident     keys  [ tile ][ tile ][ tile ]...

One program owns BM rows of a head and streams the keys past them. In registers stay the query tile and a list of the
KEPT largest scores so far with their keys, in no order. A tile is searched for its largest score, which takes the place
of the least one of the list where it is larger, until no row finds a larger one: few tiles of a long row have any. Of
equal scores the key that came first stays.

At the end each entry goes to its rank. Stored are values of A and keys, [B, heads, Tq, KEPT] float32; 0 and -1 where a
row sees fewer keys.
"""

import triton
import triton.language as tl

from .arguments import Sizes, Strides, Tile
from .tiles import (
    dot,
    head_of,
    hide,
    key_range,
    keys_present,
    load_pivot,
    load_tile,
    place_of,
    sequence_of,
    softcapped,
    streamed,
    wide,
)


@triton.jit
def largest(b_score, o_key):
    """The largest score of each row, and its key; of equal ones the first."""
    b_largest = tl.max(b_score, 1)
    return b_largest, tl.min(tl.where(b_score == b_largest[:, None], o_key[None, :], 2147483647), 1)


@triton.jit
def search(
    b_kept, b_keys, b_q, o_position, keys, first, last, sequence, visible, score,
    EDGE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The list [BM, KEPT] of scores and keys after the keys first .. last. EDGE as in `forward.visit`."""
    BN: tl.constexpr = TILE.BN
    for start in range(first, last, BN):
        o_key = start + tl.arange(0, BN)
        b_k = load_tile(keys, start, sequence.n_keys, BN, TILE.DIM, TILE.BLOCK_DIM, EDGE)  # [BN, BLOCK_DIM]
        b_score, _ = softcapped(dot(b_q, tl.trans(b_k)), score)
        if EDGE or visible.key_mask is not None:
            m_key = keys_present(visible.key_mask, sequence.i_batch, o_key, sequence.n_keys)[None, :]
            if EDGE:
                b_score = hide(b_score, m_key, o_position[:, None], o_key[None, :], visible)
            else:
                b_score = tl.where(m_key, b_score, float("-inf"))
        b_found, i_found = largest(b_score, o_key)
        b_least = tl.min(b_kept, 1)
        m_larger = b_found > b_least
        while tl.max(m_larger.to(tl.int32), 0) > 0:
            # Of the least scores of a list the key that came last gives way.
            m_least = b_kept == b_least[:, None]
            b_last = tl.max(tl.where(m_least, b_keys, -2147483647), 1)
            m_place = m_least & (b_keys == b_last[:, None]) & m_larger[:, None]
            b_kept = tl.where(m_place, b_found[:, None], b_kept)
            b_keys = tl.where(m_place, i_found[:, None], b_keys)
            b_score = tl.where((o_key[None, :] == i_found[:, None]) & m_larger[:, None], float("-inf"), b_score)
            b_found, i_found = largest(b_score, o_key)
            b_least = tl.min(b_kept, 1)
            m_larger = b_found > b_least
    return b_kept, b_keys


@triton.jit(do_not_specialize=Sizes._fields)
def top(
    query, key, pivot, factor, values, places, sequences, heads,
    n_batch, n_sequences, n_query_heads, n_heads, group, query_offset, n_queries, n_keys, n_blocks, n_even,
    visible, score, strides,
    COUNT: tl.constexpr, KEPT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """COUNT of the KEPT entries of a list, a power of two, are used."""
    TILE: tl.constexpr = Tile(1, BM, BN, DIM, BLOCK_DIM)
    sizes = Sizes(
        n_batch, n_sequences, n_query_heads, n_heads, group, query_offset, n_queries, n_keys, n_blocks, n_even
    )
    strides = Strides(*strides)  # Triton 3.6 loses the types of nested arguments in loops
    i_program = tl.program_id(0)
    i_block = n_blocks - 1 - i_program % n_blocks  # under a causal mask the longest rows first
    i_place = i_program // n_blocks % n_heads  # among the heads of what is stored
    i_sequence = i_program // (n_blocks * n_heads)
    i_head = i_place
    if heads is not None:
        i_head = tl.load(heads + i_place)
    i_sequence, i_block = place_of(i_sequence, i_block, sequences.cu_seqlens_q, sizes.n_queries, sizes, BM)
    sequence = sequence_of(i_sequence, sequences, sizes)
    if sequences.cu_seqlens_q is not None:
        if i_block * BM >= sequence.n_queries:
            return
    i_batch, q_begin = sequence.i_batch, sequence.q_begin
    o_row = i_block * BM + tl.arange(0, BM)
    m_row = o_row < sequence.n_queries
    position = sequence.offset + i_block * BM
    o_position = sequence.offset + o_row
    queries = head_of(query, strides.query, i_batch, i_head, q_begin)
    keys = head_of(key, strides.key, i_batch, i_head // sizes.group, sequence.k_begin)
    keys = streamed(keys, sequence.n_keys, BN, DIM, BLOCK_DIM, DESCRIBED)
    b_q = load_tile(queries, i_block * BM, sequence.n_queries, BM, DIM, BLOCK_DIM, True)
    first, whole, edge, end = key_range(position, 0, sequence.n_keys, visible, BM, BN)

    o_kept = tl.arange(0, KEPT)[None, :]
    b_kept = tl.zeros((BM, KEPT), tl.float32) + tl.where(o_kept < COUNT, float("-inf"), float("inf"))
    b_keys = tl.zeros((BM, KEPT), tl.int32) - 1 - o_kept  # all different
    if visible.left is not None:
        if first < whole:
            b_kept, b_keys = search(
                b_kept, b_keys, b_q, o_position, keys, first, whole, sequence, visible, score, True, TILE
            )  # fmt: skip
    if whole < edge:
        b_kept, b_keys = search(
            b_kept, b_keys, b_q, o_position, keys, whole, edge, sequence, visible, score, False, TILE
        )  # fmt: skip
    if edge < end:
        b_kept, b_keys = search(
            b_kept, b_keys, b_q, o_position, keys, edge, end, sequence, visible, score, True, TILE
        )  # fmt: skip

    o_lse = (wide(i_batch) * sizes.n_query_heads + i_head) * sizes.n_queries + q_begin + o_row
    b_pivot = load_pivot(pivot, o_lse, m_row, factor is None)[:, None]
    unit = score.scale2
    if score.cap2 is not None:
        unit = 1.0
    b_kept = tl.where(o_kept < COUNT, b_kept, float("-inf"))
    m_found = (b_keys >= 0) & (b_pivot == b_pivot)
    b_a = tl.exp2(tl.fma(b_kept, unit, -b_pivot))
    if factor is not None:
        b_a *= tl.load(factor + o_lse, mask=m_row, other=0.0)[:, None]
    b_a = tl.where(b_keys >= 0, b_a, b_pivot * 0.0)
    b_a = tl.where(b_pivot == float("inf"), 0.0, b_a)
    b_rank = tl.zeros((BM, KEPT), tl.int32)
    for i in tl.static_range(COUNT):
        b_other = tl.max(tl.where(o_kept == i, b_kept, float("-inf")), 1)[:, None]
        b_other_key = tl.max(tl.where(o_kept == i, b_keys, -2147483647), 1)[:, None]
        m_before = (b_other > b_kept) | ((b_other == b_kept) & (b_other_key < b_keys))
        b_rank += m_before.to(tl.int32)
    o_flat = (wide(i_batch) * n_heads + i_place) * sizes.n_queries + q_begin + o_row
    o_stored = o_flat[:, None] * COUNT + b_rank
    m_stored = m_row[:, None] & (o_kept < COUNT)
    tl.store(values + o_stored, b_a, mask=m_stored)
    tl.store(places + o_stored, tl.where(m_found, b_keys, -1).to(tl.float32), mask=m_stored)
