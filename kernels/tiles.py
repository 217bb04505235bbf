"""Device helpers that the kernels share: loading a tile, scores, what is visible, and the step along the band.

Conventions, here and in every kernel: `i_` is a program's index, `o_` a vector of positions or offsets, `p_` a
pointer, `b_` a block held in registers, `m_` a mask, `n_` a length. Scores live in the exp2 domain: `b_x` is
score * log2(e), so that A = exp2(b_x - lse2) with lse2 = lse * log2(e). A list of weights arrives as one flat
constexpr tuple, FIELDS values per statistic: function, two parameters, tail, digest of the function's source.
"""

import triton
import triton.language as tl

FIELDS = tl.constexpr(5)


@triton.jit
def weigh(distance, WEIGHTS: tl.constexpr, J: tl.constexpr):
    """Weight J of a flat list, less its tail, at each distance."""
    return WEIGHTS[FIELDS * J](distance, WEIGHTS[FIELDS * J + 1], WEIGHTS[FIELDS * J + 2]) - WEIGHTS[FIELDS * J + 3]


@triton.jit
def wide(number):
    """As a 64-bit scalar. An argument may be a plain constant (Triton specialises 1), which has no .to()."""
    return tl.zeros((), tl.int64) + number


@triton.jit
def head_pointer(p_base, strides, i_batch, i_head):
    """Where a (batch, head) begins. In 64 bits: B * H * T * D passes 2^31."""
    return p_base + i_batch.to(tl.int64) * strides[0] + i_head.to(tl.int64) * strides[1]


@triton.jit
def load_tile(
    p_head, strides, start, n_rows,
    ROWS: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, CHECKED: tl.constexpr,
):  # fmt: skip
    """[ROWS, BLOCK_DIM] the rows from `start` on, 0 beyond DIM and, if CHECKED, where there is no such row.

    The start moves a scalar 64-bit pointer; what a loop repeats are offsets within a tile, which don't change.
    """
    o_row, o_dim = tl.arange(0, ROWS), tl.arange(0, BLOCK_DIM)
    p_tile = p_head + wide(start) * strides[2]
    pointers = p_tile + o_row.to(tl.int64)[:, None] * strides[2] + o_dim.to(tl.int64)[None, :] * strides[3]
    if CHECKED:
        m_row = (start + o_row >= 0) & (start + o_row < n_rows)
        return tl.load(pointers, mask=m_row[:, None] & (o_dim < DIM)[None, :], other=0.0)
    if DIM < BLOCK_DIM:
        return tl.load(pointers, mask=(o_dim < DIM)[None, :], other=0.0)
    return tl.load(pointers)


@triton.jit
def dot(b_a, b_b, b_acc=None):
    """Matmul in float32. IEEE, not TF32: scores that are computed twice have to match their lse."""
    return tl.dot(b_a, b_b, acc=b_acc, input_precision="ieee", out_dtype=tl.float32)


@triton.jit
def keys_present(p_key_mask, i_batch, o_key, n_keys, MASKED_KEYS: tl.constexpr):
    """[len(o_key)] bool: the key exists and isn't padding. p_key_mask is (B, n_keys) uint8."""
    m_key = (o_key >= 0) & (o_key < n_keys)
    if MASKED_KEYS:
        m_key &= tl.load(p_key_mask + i_batch.to(tl.int64) * n_keys + o_key, mask=m_key, other=0) != 0
    return m_key


@triton.jit
def zeros_for(COUNT: tl.constexpr, SHAPE: tl.constexpr):
    """A tuple of COUNT float32 accumulators."""
    accumulators = ()
    for _ in tl.static_range(COUNT):
        accumulators = accumulators + (tl.zeros(SHAPE, tl.float32),)
    return accumulators


@triton.jit
def band_sweep(
    b_q,  # [HEADS * BM, BLOCK_DIM], the rows of HEADS heads of one group
    b_lse2,  # [HEADS * BM], +inf for rows that don't exist
    m_counted,  # [HEADS * BM] bool: counts in columns
    o_position,  # [HEADS * BM] position of each row
    p_k, k_strides, p_key_mask, p_columns,
    i_batch, i_block, i_head, n_batch, n_query_heads, n_heads, query_offset, n_keys, scale2,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BEHIND: tl.constexpr, AHEAD: tl.constexpr,
    CAUSAL: tl.constexpr, MASKED_KEYS: tl.constexpr,
    HEADS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """Walk the keys at distance -AHEAD .. BEHIND of a query block; return row sums, store column sums.

        keys      first                          first query's position
                  |<------ BEHIND, in BN ------>|<-- BM -->|<- AHEAD ->|
        block     [ tile ][ tile ][ tile ]...   [ tile ]...

    Row sums are of A * (weight - tail). A key's column sum comes from several query blocks: each writes its
    part to the slot `how many blocks of BM the key lies behind the queries, plus those AHEAD`, [COLUMNS, slots,
    B, Hq, Tk], so that no two programs write to one place and the sum over slots is always the same.
    """
    tl.static_assert(BM % BN == 0, "a tile of keys must lie in one block of BM, or it would need two slots")
    N_ROWS: tl.constexpr = len(ROWS) // FIELDS
    N_COLUMNS: tl.constexpr = len(COLUMNS) // FIELDS
    SLOTS_AHEAD: tl.constexpr = (AHEAD + BM - 1) // BM
    SLOTS: tl.constexpr = SLOTS_AHEAD + 1 + (BEHIND + BM - 1) // BM
    block_start = query_offset + i_block * BM
    first = -tl.minimum((BEHIND + BN - 1) // BN, tl.cdiv(block_start, BN)) * BN
    last = tl.minimum(BM + AHEAD, n_keys - block_start)
    sums = zeros_for(N_ROWS, (HEADS * BM,))
    for relative in range(first, last, BN):
        start = block_start + relative
        o_key = start + tl.arange(0, BN)
        b_k = load_tile(p_k, k_strides, start, n_keys, BN, DIM, BLOCK_DIM, True)  # [BN, BLOCK_DIM]
        b_x = dot(b_q, tl.trans(b_k)) * scale2  # [HEADS * BM, BN]
        m_seen = keys_present(p_key_mask, i_batch, o_key, n_keys, MASKED_KEYS)[None, :]
        distance = o_position[:, None] - o_key[None, :]
        if CAUSAL:
            m_seen = m_seen & (distance >= 0)
        # Hidden before exp2: a padded score of 0 less an lse of -90 would overflow.
        b_a = tl.exp2(tl.where(m_seen, b_x - b_lse2[:, None], float("-inf")))
        updated = ()
        for j in tl.static_range(N_ROWS):
            b_w = weigh(distance, ROWS, j)
            updated = updated + (sums[j] + tl.sum(b_a * b_w, 1),)
        sums = updated
        if N_COLUMNS > 0:
            b_a = tl.where(m_counted[:, None], b_a, 0.0)
            slot = SLOTS_AHEAD - ((relative + BM * SLOTS) // BM - SLOTS)  # floor division of a signed number
            o_head = tl.arange(0, HEADS)
            m_store = (o_head < n_heads)[:, None] & ((o_key >= 0) & (o_key < n_keys))[None, :]
            for j in tl.static_range(N_COLUMNS):
                b_w = weigh(distance, COLUMNS, j)
                b_sum = tl.sum(tl.reshape(b_a * b_w, (HEADS, BM, BN)), 1)  # [HEADS, BN]
                row = (wide(j * SLOTS + slot) * n_batch + i_batch) * n_query_heads + i_head + o_head
                tl.store(p_columns + row[:, None] * n_keys + o_key[None, :], b_sum, mask=m_store)
    return sums
