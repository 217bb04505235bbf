"""Band statistics from (query, key, lse): every weight that is constant beyond a distance, in O(T) time.

    program (i_batch, i_head .. i_head + HEADS, i_block):

        queries          keys, in tiles of BN
        [HEADS x BM, D]  x  [ BEHIND | BM | AHEAD ]

One program owns BM positions of HEADS query heads that share a key head: their rows are packed into one tile,
so that a key tile is read once for all of them. Rows are stored at the end, [ROWS, B, Hq, Tq]; columns go to
their slots as they come (tiles.band_sweep). Q is read once, K 1 + (BEHIND + AHEAD) / BM times.
"""

import triton
import triton.language as tl

from attnstats.kernels.tiles import FIELDS, band_sweep, head_pointer, wide


@triton.jit
def band(
    p_q, p_k, p_lse2, p_counted, p_key_mask, p_rows, p_columns,
    n_batch, n_query_heads, group, query_offset, n_queries, n_keys, scale2,
    q_strides, k_strides,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BEHIND: tl.constexpr, AHEAD: tl.constexpr,
    CAUSAL: tl.constexpr, MASKED_KEYS: tl.constexpr, MASKED_QUERIES: tl.constexpr,
    HEADS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    n_blocks = tl.cdiv(n_queries, BM)
    parts = tl.cdiv(group, HEADS)
    i_program = tl.program_id(0)
    i_block = i_program % n_blocks
    i_part = i_program // n_blocks % parts
    i_key_head = i_program // (n_blocks * parts) % (n_query_heads // group)
    i_batch = i_program // (n_blocks * parts * (n_query_heads // group))
    i_head = i_key_head * group + i_part * HEADS
    n_heads = tl.minimum(HEADS, group - i_part * HEADS)

    o_packed = tl.arange(0, HEADS * BM)
    o_head = o_packed // BM
    o_row = i_block * BM + o_packed % BM
    m_row = (o_head < n_heads) & (o_row < n_queries)
    # 64 bits: (B * Hq) * Tq passes 2^31 at a million positions
    o_flat = (i_batch * n_query_heads + i_head + o_head).to(tl.int64) * n_queries + o_row

    p_head = head_pointer(p_q, q_strides, i_batch, i_head)
    o_dim = tl.arange(0, BLOCK_DIM)
    o_element = o_head.to(tl.int64) * q_strides[1] + o_row.to(tl.int64) * q_strides[2]
    pointers = p_head + o_element[:, None] + o_dim[None, :].to(tl.int64) * q_strides[3]
    b_q = tl.load(pointers, mask=m_row[:, None] & (o_dim < DIM)[None, :], other=0.0)  # [HEADS * BM, BLOCK_DIM]
    b_lse2 = tl.load(p_lse2 + o_flat, mask=m_row, other=float("inf"))
    m_counted = m_row
    if MASKED_QUERIES:
        m_counted &= tl.load(p_counted + i_batch.to(tl.int64) * n_queries + o_row, mask=m_row, other=0) != 0

    sums = band_sweep(
        b_q, b_lse2, m_counted, query_offset + o_row,
        head_pointer(p_k, k_strides, i_batch, i_key_head), k_strides, p_key_mask, p_columns,
        i_batch, i_block, i_head, n_batch, n_query_heads, n_heads, query_offset, n_keys, scale2,
        ROWS, COLUMNS, BEHIND, AHEAD, CAUSAL, MASKED_KEYS, HEADS, BM, BN, DIM, BLOCK_DIM,
    )  # fmt: skip
    n_flat = wide(n_batch) * n_query_heads * n_queries
    for j in tl.static_range(len(ROWS) // FIELDS):
        tail = tl.where(b_lse2 < float("inf"), ROWS[FIELDS * j + 3], 0.0)  # a row that sees nothing has no mass
        tl.store(p_rows + j * n_flat + o_flat, sums[j] + tail, mask=m_row)
