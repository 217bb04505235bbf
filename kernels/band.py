"""Band statistics from (query, key, lse): every weight that is constant beyond a distance, in O(T) time.

    program (i_sequence, i_head .. i_head + HEADS, i_block):

        queries          keys, in tiles of BN
        [HEADS x BM, D]  x  [ BEHIND | BM | AHEAD ]

One program owns BM positions of HEADS query heads that share a key head: their rows are packed into one tile,
so that a key tile is read once for all of them. With p_heads, HEADS is 1 and the heads are those listed. Rows are
stored at the end, [ROWS, B, heads, Tq]; columns go to their slots as they come (tiles.band_sweep). Q is read once,
K 1 + (BEHIND + AHEAD) / BM times, from L2 but for the first.
"""

import triton
import triton.language as tl

from .tiles import FIELDS, band_sweep, extent, head_pointer, load_packed, packed_rows, row_mass, wide


@triton.jit
def band(
    p_q, p_k, p_lse2, p_rows, p_columns, p_counted, p_key_mask, p_sinks, p_cu_q, p_cu_k, p_heads,
    n_batch, n_all_heads, n_heads, group, query_offset, n_queries, n_keys, longest, left, right, scale2, cap2,
    q_strides, k_strides,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BEHIND: tl.constexpr, ROWS_BEHIND: tl.constexpr, AHEAD: tl.constexpr,
    HEADS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    n_blocks = tl.cdiv(longest, BM)
    i_program = tl.program_id(0)
    i_block = i_program % n_blocks
    if p_heads is None:
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
        i_head = tl.load(p_heads + i_place)
        i_key_head = i_head // group
        n_packed = 1
    i_batch, q_begin, rows, k_begin, keys, offset = extent(i_sequence, p_cu_q, p_cu_k, query_offset, n_queries, n_keys)
    behind = BEHIND
    if p_cu_q is not None:  # the grid is that of the longest sequence
        behind = tl.where(i_block * BM < rows, BEHIND, -1)
    o_head, o_row, m_row = packed_rows(i_block, n_packed, rows, HEADS, BM)
    # 64 bits: (B * Hq) * Tq passes 2^31 at a million positions
    o_flat = (wide(i_batch) * n_heads + i_place + o_head) * n_queries + q_begin + o_row
    b_q = load_packed(
        head_pointer(p_q, q_strides, i_batch, i_head, q_begin), q_strides, o_head, o_row, m_row, DIM, BLOCK_DIM
    )
    o_lse = (wide(i_batch) * n_all_heads + i_head + o_head) * n_queries + q_begin + o_row
    b_lse2 = tl.load(p_lse2 + o_lse, mask=m_row, other=float("inf"))
    m_counted = None
    if p_counted is not None:
        m_counted = tl.load(p_counted + wide(i_batch) * n_queries + q_begin + o_row, mask=m_row, other=0) != 0
    sums = band_sweep(
        b_q, b_lse2, m_counted, i_block,
        head_pointer(p_k, k_strides, i_batch, i_key_head, k_begin), k_strides, p_key_mask, p_columns,
        i_batch, i_place, n_batch, n_heads, n_packed, offset + i_block * BM, behind, k_begin, keys, n_keys,
        left, right, scale2, cap2,
        ROWS, COLUMNS, BEHIND, ROWS_BEHIND, AHEAD, HEADS, BM, BN, DIM, BLOCK_DIM,
    )  # fmt: skip
    b_mass = row_mass(b_lse2, p_sinks, i_head, o_head, m_row)
    for j in tl.static_range(len(ROWS) // FIELDS):
        p_row = p_rows + wide(j) * n_batch * n_heads * n_queries
        tl.store(p_row + o_flat, sums[j] + ROWS[FIELDS * j + 3] * b_mass, mask=m_row)
