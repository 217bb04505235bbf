"""Device helpers that the kernels share: who sees whom, loading a tile, scores, and the step along the band.

Conventions, here and in every kernel: `i_` is a program's index, `o_` a vector of positions or offsets, `p_` a
pointer, `b_` a block held in registers, `m_` a mask, `n_` a length. A pointer or bound that is None switches its
feature off when the kernel is compiled. Scores live in the exp2 domain: `b_x` is score * log2(e), so that
A = exp2(b_x - lse2) with lse2 = lse * log2(e). A list of weights arrives as one flat constexpr tuple, FIELDS values
per statistic: function, two parameters, tail, digest of the function's source.
"""

import triton
import triton.language as tl

FIELDS = tl.constexpr(5)
FAR = tl.constexpr(1.0e9)  # further than any key
LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)
LOG2_ZERO = tl.constexpr(-1.0e4)  # exp2 of it is exactly 0, and 0 * LOG2_ZERO is not NaN as 0 * -inf is
PHILOX_ROUNDS = tl.constexpr(7)  # the fewest that pass BigCrush: Salmon et al., Parallel random numbers, 2011


@triton.jit
def weigh(distance, WEIGHTS: tl.constexpr, J: tl.constexpr):
    """Weight J of a flat list, less its tail, at each distance (float32)."""
    return WEIGHTS[FIELDS * J](distance, WEIGHTS[FIELDS * J + 1], WEIGHTS[FIELDS * J + 2]) - WEIGHTS[FIELDS * J + 3]


@triton.jit
def wide(number):
    """As a 64-bit scalar. An argument may be a plain constant (Triton specialises 1), which has no .to()."""
    return tl.zeros((), tl.int64) + number


@triton.jit
def extent(i_sequence, p_cu_q, p_cu_k, query_offset, n_queries, n_keys):
    """Batch row, first query, number of queries, first key, number of keys, position of the first query.

    The boundaries of packed sequences are forced inside the tensors: nobody may have checked them.
    """
    if p_cu_q is None:
        return i_sequence, 0, n_queries, 0, n_keys, query_offset
    else:
        q_begin = tl.minimum(tl.maximum(tl.load(p_cu_q + i_sequence), 0), n_queries)
        q_end = tl.minimum(tl.maximum(tl.load(p_cu_q + i_sequence + 1), q_begin), n_queries)
        k_begin = tl.minimum(tl.maximum(tl.load(p_cu_k + i_sequence), 0), n_keys)
        k_end = tl.minimum(tl.maximum(tl.load(p_cu_k + i_sequence + 1), k_begin), n_keys)
        queries, keys = q_end - q_begin, k_end - k_begin
        return i_sequence * 0, q_begin, queries, k_begin, keys, keys - queries


@triton.jit
def head_pointer(p_base, strides, i_batch, i_head, begin):
    """Where row `begin` of a (batch, head) stands. In 64 bits: B * H * T * D passes 2^31."""
    return p_base + wide(i_batch) * strides[0] + wide(i_head) * strides[1] + wide(begin) * strides[2]


@triton.jit
def packed_rows(i_block, n_heads, n_rows, HEADS: tl.constexpr, BM: tl.constexpr):
    """Head, row and existence of each row of a tile that packs BM positions of HEADS heads."""
    o_packed = tl.arange(0, HEADS * BM)
    o_head = o_packed // BM
    o_row = i_block * BM + o_packed % BM
    return o_head, o_row, (o_head < n_heads) & (o_row < n_rows)


@triton.jit
def load_packed(p_head, strides, o_head, o_row, m_row, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """[HEADS * BM, BLOCK_DIM] the rows of `packed_rows`, 0 where there is none."""
    o_dim = tl.arange(0, BLOCK_DIM)
    o_element = o_head.to(tl.int64) * strides[1] + o_row.to(tl.int64) * strides[2]
    pointers = p_head + o_element[:, None] + o_dim[None, :].to(tl.int64) * strides[3]
    return tl.load(pointers, mask=m_row[:, None] & (o_dim < DIM)[None, :], other=0.0)


@triton.jit
def load_tile(
    p_head, strides, start, n_rows,
    ROWS: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, CHECKED: tl.constexpr,
):  # fmt: skip
    """[ROWS, BLOCK_DIM] the rows from `start` on, 0 beyond DIM and, if CHECKED, where there is no such row.

    The start moves a scalar 64-bit pointer; what a loop repeats are offsets within a tile, which don't change. Those
    are 32 bits (launch.py sees to it): with 64 the main loop of 128 x 128 tiles takes 70 instructions more.
    """
    o_row, o_dim = tl.arange(0, ROWS), tl.arange(0, BLOCK_DIM)
    p_tile = p_head + wide(start) * strides[2]
    pointers = p_tile + (o_row[:, None] * strides[2] + o_dim[None, :] * strides[3])
    if CHECKED:
        m_row = (start + o_row >= 0) & (start + o_row < n_rows)
        return tl.load(pointers, mask=m_row[:, None] & (o_dim < DIM)[None, :], other=0.0)
    if DIM < BLOCK_DIM:
        return tl.load(pointers, mask=(o_dim < DIM)[None, :], other=0.0)
    return tl.load(pointers)


@triton.jit
def store_tile(
    p_head, strides, start, n_rows, b_x, ROWS: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr
):  # fmt: skip
    """Write b_x [ROWS, BLOCK_DIM] to where `load_tile` would read it, in the pointer's type."""
    o_row, o_dim = tl.arange(0, ROWS), tl.arange(0, BLOCK_DIM)
    p_tile = p_head + wide(start) * strides[2]
    pointers = p_tile + (o_row[:, None] * strides[2] + o_dim[None, :] * strides[3])
    m_element = (start + o_row < n_rows)[:, None] & (o_dim < DIM)[None, :]
    tl.store(pointers, b_x.to(p_head.dtype.element_ty), mask=m_element)


@triton.jit
def load_lse2(pointers, m_row):
    """lse * log2(e), and +inf for rows that see nothing or don't exist, so that their A is exactly 0."""
    b_lse = tl.load(pointers, mask=m_row, other=float("-inf"))
    return tl.where(b_lse == float("-inf"), float("inf"), b_lse * LOG2E)


@triton.jit
def kept(p_seed, i_flat_head, o_query, o_key, dropout):
    """Whether dropout leaves the weight of a query on a key, by their places in the tensors: in no tiling another.

    o_query and o_key broadcast to the tile. One of the four numbers of a Philox counter is used.
    """
    o_none = o_key * 0
    o_bits, _, _, _ = tl.philox(tl.load(p_seed), o_none + o_query, o_key, o_none + i_flat_head, o_none, PHILOX_ROUNDS)
    return (o_bits >> 8).to(tl.float32) * 5.9604644775390625e-08 >= dropout  # 24 bits, all that float32 holds


@triton.jit
def dot(b_a, b_b, b_acc=None):
    """Matmul in float32. IEEE, not TF32: scores that are computed twice have to match their lse."""
    return tl.dot(b_a, b_b, acc=b_acc, input_precision="ieee", out_dtype=tl.float32)


@triton.jit
def tanh(b_y):
    """To 3 ulp. Small arguments by a polynomial, fitted to y in [0, 0.6]: 1 - 2 / (1 + e^2y) cancels there."""
    b_z = b_y * b_y
    b_small = (b_z * -0.00627637848549664 + 0.02111620658184426) * b_z - 0.053875136201774934
    b_small = (b_small * b_z + 0.13332923986538944) * b_z - 0.33333330430806973
    b_small = b_y + b_y * (b_z * b_small)
    b_large = 1.0 - 2.0 / (1.0 + tl.exp2(tl.abs(b_y) * 2.8853900817779268))
    return tl.where(b_z < 0.36, b_small, tl.where(b_y < 0, -b_large, b_large))


@triton.jit
def scores(b_a, b_b, scale2, cap2):
    """softcap * tanh(scale * a . b / softcap) * log2(e), or scale * a . b * log2(e) where cap2 is None."""
    b_x = dot(b_a, b_b)
    if cap2 is None:
        b_x *= scale2
    else:
        b_x = cap2 * tanh(b_x * (scale2 / cap2))
    return b_x


@triton.jit
def keys_present(p_key_mask, i_batch, o_key, n_keys):
    """[len(o_key)] bool: the key exists and isn't padding. p_key_mask is (B, n_keys) uint8, or None."""
    m_key = (o_key >= 0) & (o_key < n_keys)
    if p_key_mask is not None:
        m_key &= tl.load(p_key_mask + wide(i_batch) * n_keys + o_key, mask=m_key, other=0) != 0
    return m_key


@triton.jit
def inside(m_seen, distance, left, right):
    """m_seen where also -right <= distance <= left; None: no bound."""
    if left is not None:
        m_seen = m_seen & (distance <= left)
    if right is not None:
        m_seen = m_seen & (distance >= -right)
    return m_seen


@triton.jit
def key_range(position, first, end, left, right, BM: tl.constexpr, BN: tl.constexpr):
    """first, whole, edge, end: BM rows from `position` on see keys of first .. end alone, and each of them sees every
    key of whole .. edge, which are whole tiles."""
    whole, edge = first, end
    if left is not None:
        first = tl.maximum(first, (position - left) // BN * BN)
        whole = tl.maximum(first, tl.cdiv(position + BM - 1 - left, BN) * BN)
    if right is not None:
        end = tl.minimum(end, position + BM + right)
        edge = tl.minimum(edge, position + right + 1)
    whole = tl.minimum(whole, tl.maximum(end, first))
    return first, whole, tl.maximum(edge // BN * BN, whole), end


@triton.jit
def zeros_for(COUNT: tl.constexpr, SHAPE: tl.constexpr):
    """A tuple of COUNT float32 accumulators."""
    accumulators = ()
    for _ in tl.static_range(COUNT):
        accumulators = accumulators + (tl.zeros(SHAPE, tl.float32),)
    return accumulators


@triton.jit
def band_step(
    sums,  # per row statistic [BN, HEADS * BM]
    relative,
    b_qt,  # [BLOCK_DIM, HEADS * BM], the rows of HEADS heads of one group
    b_lse2,  # [HEADS * BM], +inf for rows that don't exist
    m_counted,  # [HEADS * BM] bool: counts in columns; None: every row
    o_row,  # [HEADS * BM] float32, each row's place in its block of BM
    p_k, k_strides, p_key_mask, p_columns,
    i_batch, i_head, n_batch, n_all_heads, n_heads, block_start, k_begin, n_keys, n_all_keys,
    left, right, scale2, cap2,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BEHIND: tl.constexpr, AHEAD: tl.constexpr, EDGE: tl.constexpr,
    HEADS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """The tile of keys at block_start + relative. EDGE: some may not exist or may not be seen by a row.

    The tile is transposed, [BN, HEADS * BM]: a column is a sum along a tile's row, within few threads, and rows
    accumulate elementwise until the last tile.
    """
    SLOTS_AHEAD: tl.constexpr = (AHEAD + BM - 1) // BM
    SLOTS: tl.constexpr = SLOTS_AHEAD + 1 + (BEHIND + BM - 1) // BM
    start = block_start + relative
    o_tile = tl.arange(0, BN)
    o_key = start + o_tile
    b_k = load_tile(p_k, k_strides, start, n_keys, BN, DIM, BLOCK_DIM, EDGE)  # [BN, BLOCK_DIM]
    b_x = scores(b_k, b_qt, scale2, cap2) - b_lse2[None, :]  # [BN, HEADS * BM]
    o_near = (relative + o_tile).to(tl.float32)
    m_key = o_key >= 0
    if EDGE:
        m_key = keys_present(p_key_mask, i_batch, o_key, n_keys)
        if right is not None:  # a key that isn't there lies in every row's future: one comparison hides both
            o_near = tl.where(m_key, o_near, FAR)
    distance = o_row[None, :] - o_near[:, None]
    if EDGE:
        m_seen = m_key[:, None]
        if right is not None:
            m_seen = distance == distance
        # Hidden before exp2: a padded score of 0 less an lse of -90 would overflow.
        b_x = tl.where(inside(m_seen, distance, left, right), b_x, float("-inf"))
    b_a = tl.exp2(b_x)
    updated = ()
    for j in tl.static_range(len(ROWS) // FIELDS):
        b_w = weigh(distance, ROWS, j)
        updated = updated + (sums[j] + b_a * b_w,)
    if len(COLUMNS) > 0:
        if m_counted is not None:
            b_a = tl.where(m_counted[None, :], b_a, 0.0)
        slot = SLOTS_AHEAD - ((relative + o_tile + BM * SLOTS) // BM - SLOTS)  # floor division of a signed number
        o_head = tl.arange(0, HEADS)
        m_store = (m_key & (slot >= 0) & (slot < SLOTS))[:, None] & (o_head < n_heads)[None, :]
        o_place = (slot.to(tl.int64) * n_batch + i_batch) * n_all_heads + i_head
        o_column = (o_place[:, None] + o_head[None, :]) * n_all_keys + (k_begin + o_key)[:, None]
        for j in tl.static_range(len(COLUMNS) // FIELDS):
            b_w = weigh(distance, COLUMNS, j)
            b_sum = tl.sum(tl.reshape(b_a * b_w, (BN, HEADS, BM)), 2)  # [BN, HEADS]
            p_column = p_columns + wide(j * SLOTS) * n_batch * n_all_heads * n_all_keys
            tl.store(p_column + o_column, b_sum, mask=m_store)
    return updated


@triton.jit
def band_sweep(
    b_q, b_lse2, m_counted, i_block,
    p_k, k_strides, p_key_mask, p_columns,
    i_batch, i_head, n_batch, n_all_heads, n_heads, block_start, behind, k_begin, n_keys, n_all_keys,
    left, right, scale2, cap2,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BEHIND: tl.constexpr, ROWS_BEHIND: tl.constexpr, AHEAD: tl.constexpr,
    HEADS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """Walk the keys at distance -AHEAD .. behind of a query block; return row sums, store column sums.

        keys      first                              block_start, the first query's position
                  |<- columns alone ->|<-- rows too -->|<-- BM -->|<- AHEAD ->|
                  [ tile ][ tile ]...  [ tile ]...  [ tile ]...
        relative -behind                            LAST

    behind is BEHIND or, for a head that needs less, less; -1: nothing is needed.
    Row sums are of A * (weight - tail). A key's column sum comes from several query blocks: each writes its
    part to the slot `how many blocks of BM the key lies behind the queries, plus those AHEAD`, [COLUMNS, slots,
    B, heads, all keys], so that no two programs write to one place and the sum over slots is always the same.
    """
    # Tiles end where the block does: with BM < BN the last one then holds all keys that a row statistic looks at.
    LAST: tl.constexpr = BM - (BM + BN - 1) // BN * BN
    NEAR: tl.constexpr = LAST - (max(ROWS_BEHIND + LAST, 0) + BN - 1) // BN * BN
    first = LAST - tl.maximum(tl.cdiv(tl.minimum(behind, block_start) + LAST, BN), 0) * BN
    last = tl.minimum(BM + AHEAD, n_keys - block_start)
    last = tl.where(behind < 0, LAST, last)
    if left is None and p_key_mask is None:
        # Whole tiles of keys behind the block are seen by all its rows; the first tile may begin before key 0.
        inner = tl.minimum(tl.where(block_start + first < 0, first + BN, first), LAST)
        inner = tl.where(block_start <= n_keys, inner, LAST)
    else:
        inner = first * 0 + LAST
    near = tl.maximum(inner, NEAR)
    before = (inner - first) // BN  # tiles, and after them those from LAST on
    b_qt = tl.trans(b_q)
    o_row = (tl.arange(0, HEADS * BM) % BM).to(tl.float32)
    sums = zeros_for(len(ROWS) // FIELDS, (BN, HEADS * BM))
    if len(COLUMNS) > 0:
        for relative in range(inner, near, BN):
            band_step(
                (), relative, b_qt, b_lse2, m_counted, o_row, p_k, k_strides, p_key_mask, p_columns,
                i_batch, i_head, n_batch, n_all_heads, n_heads, block_start, k_begin, n_keys, n_all_keys,
                left, right, scale2, cap2, (), COLUMNS, BEHIND, AHEAD, False, HEADS, BM, BN, DIM, BLOCK_DIM,
            )  # fmt: skip
    for relative in range(near, LAST, BN):
        sums = band_step(
            sums, relative, b_qt, b_lse2, m_counted, o_row, p_k, k_strides, p_key_mask, p_columns,
            i_batch, i_head, n_batch, n_all_heads, n_heads, block_start, k_begin, n_keys, n_all_keys,
            left, right, scale2, cap2, ROWS, COLUMNS, BEHIND, AHEAD, False, HEADS, BM, BN, DIM, BLOCK_DIM,
        )  # fmt: skip
    for i_tile in range(before + tl.cdiv(tl.maximum(last - LAST, 0), BN)):
        sums = band_step(
            sums, tl.where(i_tile < before, first, LAST - before * BN) + i_tile * BN, b_qt, b_lse2, m_counted, o_row,
            p_k, k_strides, p_key_mask, p_columns,
            i_batch, i_head, n_batch, n_all_heads, n_heads, block_start, k_begin, n_keys, n_all_keys,
            left, right, scale2, cap2, ROWS, COLUMNS, BEHIND, AHEAD, True, HEADS, BM, BN, DIM, BLOCK_DIM,
        )  # fmt: skip
    reduced = ()
    for j in tl.static_range(len(ROWS) // FIELDS):
        reduced = reduced + (tl.sum(sums[j], 0),)
    return reduced


@triton.jit
def row_mass(b_lse2, p_sinks, i_head, o_head, m_row):
    """What a row's A sums to: 1 less the sink's share, 0 where it sees nothing (lse2 = +inf)."""
    b_mass = tl.where(b_lse2 < float("inf"), 1.0, 0.0)
    if p_sinks is not None:
        b_mass -= tl.exp2(tl.load(p_sinks + i_head + o_head, mask=m_row, other=float("-inf")) - b_lse2)
    return b_mass
