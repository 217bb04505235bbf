"""Device functions that the kernels share: loading a tile, scores, visibility, and the step along the band.

Conventions, here and in every kernel: `i_` is an index, `o_` a vector of positions or offsets, `p_` a pointer, `b_` a
block held in registers, `m_` a mask, `n_` a count. A kernel's arguments have the names of the Python side; groups of
them are defined in arguments.py. An argument that is None switches its feature off when the kernel is compiled. Scores
live in the exp2 domain: `b_x` is score * log2(e), so that A = exp2(b_x - pivot) * factor. Where a pass of ours computed
the row, pivot and factor are its maximum and 1 over its sum; where the lse came with the call, lse * log2(e) and None.
A list of weights is one flat constexpr tuple, FIELDS values per statistic: function, two parameters, tail, digest of
the function's source.
"""

import triton
import triton.language as tl

from .arguments import Head, PagedHead, Rows, Sequence, Stream

FIELDS = tl.constexpr(5)
FAR = tl.constexpr(1.0e9)  # further than any key
LN2 = tl.constexpr(0.6931471805599453)
LARGEST = tl.constexpr(3.4028234663852886e38)  # finite float32
LOG2E = tl.constexpr(1.4426950408889634)
LOG2_ZERO = tl.constexpr(-1.0e4)  # exp2 of it is exactly 0, and 0 * LOG2_ZERO is not NaN as 0 * -inf is
PHILOX_ROUNDS = tl.constexpr(7)  # the fewest that pass BigCrush: Salmon et al., Parallel random numbers, 2011


@triton.jit
def weigh(distance, WEIGHTS: tl.constexpr, J: tl.constexpr):
    """Weight J of a flat list, less its tail, at each distance (float32)."""
    return WEIGHTS[FIELDS * J](distance, WEIGHTS[FIELDS * J + 1], WEIGHTS[FIELDS * J + 2]) - WEIGHTS[FIELDS * J + 3]


@triton.jit
def wide(number):
    """The number as a 64-bit scalar. An argument may be a plain constant (Triton specialises 1), which has no .to()."""
    return tl.zeros((), tl.int64) + number


@triton.jit
def place_of(i_batch, i_block, cu_seqlens, n_tokens, sizes, BLOCK: tl.constexpr):
    """The sequence of a program and its block there: i_batch and i_block or, if sequences are packed, those of block
    i_block among the blocks of all of them.

    Either each sequence has n_even blocks. Or block i of sequence s, which begins at token b, is block
    (b + s * (BLOCK - 1)) // BLOCK + i of all: that leaves room for as many blocks as each sequence has, whatever the
    lengths, which the host may not know, and for less than one more. Those that are too many start past the end of
    their sequence.
    """
    if cu_seqlens is None:
        return i_batch, i_block
    else:
        n_even = sizes.n_even
        low = tl.where(n_even > 0, i_block // tl.maximum(n_even, 1), 0)
        high = tl.where(n_even > 0, low + 1, sizes.n_sequences)
        while high - low > 1:
            middle = (low + high) // 2
            begin = tl.minimum(tl.maximum(tl.load(cu_seqlens + middle), 0), n_tokens)
            m_before = (begin + middle * (BLOCK - 1)) // BLOCK <= i_block
            low = tl.where(m_before, middle, low)
            high = tl.where(m_before, high, middle)
        begin = tl.minimum(tl.maximum(tl.load(cu_seqlens + low), 0), n_tokens)
        first = tl.where(n_even > 0, low * n_even, (begin + low * (BLOCK - 1)) // BLOCK)
        # No less than 0: boundaries that nobody has read may begin anywhere.
        return low, tl.maximum(i_block - first, 0)


@triton.jit
def sequence_of(i_sequence, sequences, sizes):
    """The Sequence of a program.

    The boundaries of packed sequences are clamped to the tensors, because the host may not have read them, and a
    sequence that is longer than the host was told has no queries and keys: all results keep their fill.
    """
    if sequences.cu_seqlens_q is None:
        return Sequence(i_sequence, 0, sizes.n_queries, 0, sizes.n_keys, sizes.query_offset)
    else:
        p_q, p_k = sequences.cu_seqlens_q + i_sequence, sequences.cu_seqlens_k + i_sequence
        q_begin = tl.minimum(tl.maximum(tl.load(p_q), 0), sizes.n_queries)
        q_end = tl.minimum(tl.maximum(tl.load(p_q + 1), q_begin), sizes.n_queries)
        k_begin = tl.minimum(tl.maximum(tl.load(p_k), 0), sizes.n_keys)
        k_end = tl.minimum(tl.maximum(tl.load(p_k + 1), k_begin), sizes.n_keys)
        queries, keys = q_end - q_begin, k_end - k_begin
        if sequences.max_queries is not None:
            m_fits = (queries <= sequences.max_queries) & (keys <= sequences.max_keys)
            queries, keys = tl.where(m_fits, queries, 0), tl.where(m_fits, keys, 0)
        return Sequence(i_sequence * 0, q_begin, queries, k_begin, keys, keys - queries)


@triton.jit
def anew(number):
    """The same number, which the compiler can't know: grids have one axis. What is computed from it after a loop is not
    kept in registers from before."""
    return number + tl.program_id(1)


@triton.jit
def head_of(p_tensor, strides, i_batch, i_head, begin):
    """The Head of a tensor from row `begin` on. In 64 bits: B * H * T * D passes 2^31."""
    p_head = p_tensor + wide(i_batch) * strides[0] + wide(i_head) * strides[1] + wide(begin) * strides[2]
    return Head(p_head, strides)


@triton.jit
def paged_head_of(p_cache, strides, i_sequence, i_head, pages):
    """The PagedHead of a sequence."""
    p_table = pages.block_table + wide(i_sequence) * pages.n_pages
    return PagedHead(p_cache + wide(i_head) * strides[1], strides, p_table, tl.load(pages.first_key + i_sequence))


@triton.jit
def streamed(head, n_rows, ROWS: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, DESCRIBED: tl.constexpr):
    """The Stream of a head's first n_rows rows if DESCRIBED, else the Head.

    The memory unit of Hopper and later then computes addresses and bounds, which takes no registers, and matmuls may
    read what it wrote without a fence. What threads copy asynchronously needs one, and Triton before 3.7.1 leaves it
    out.
    """
    if DESCRIBED:
        tiles = tl.make_tensor_descriptor(
            head.pointer, [n_rows, DIM], [wide(head.strides[2]), 1], [ROWS, BLOCK_DIM]
        )  # fmt: skip
        return Stream(tiles)
    else:
        return head


@triton.jit
def load_packed(head, rows, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """[HEADS * BM, BLOCK_DIM] the Rows of several heads from `head` on, 0 where there is none."""
    o_dim = tl.arange(0, BLOCK_DIM)
    o_element = rows.o_head.to(tl.int64) * head.strides[1] + rows.o_row.to(tl.int64) * head.strides[2]
    pointers = head.pointer + o_element[:, None] + o_dim[None, :].to(tl.int64) * head.strides[3]
    return tl.load(pointers, mask=rows.m_row[:, None] & (o_dim < DIM)[None, :], other=0.0)


@triton.jit
def load_tile(
    head, start, n_rows, ROWS: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, CHECKED: tl.constexpr
):  # fmt: skip
    """[ROWS, BLOCK_DIM] a head's rows from `start` on, 0 beyond DIM and, if CHECKED, where there is no such row. Of a
    Stream n_rows is that of its descriptor.

    The start moves a scalar 64-bit pointer; what a loop repeats are offsets within a tile, which don't change. Those
    are 32 bits (the launcher sees to it): with 64 the main loop of 128 x 128 tiles takes 70 instructions more.
    """
    if len(head) == 1:  # Triton 3.6 has no isinstance, and returns no tuple with a None from a function
        return head[0].load([start, 0])
    else:
        o_row, o_dim = tl.arange(0, ROWS), tl.arange(0, BLOCK_DIM)
        p_tile = head.pointer + wide(start) * head.strides[2]
        pointers = p_tile + (o_row[:, None] * head.strides[2] + o_dim[None, :] * head.strides[3])
        if CHECKED:
            m_row = (start + o_row >= 0) & (start + o_row < n_rows)
            return tl.load(pointers, mask=m_row[:, None] & (o_dim < DIM)[None, :], other=0.0)
        if DIM < BLOCK_DIM:
            return tl.load(pointers, mask=(o_dim < DIM)[None, :], other=0.0)
        return tl.load(pointers)


@triton.jit
def load_paged(
    head, start, n_rows, ROWS: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, PAGE: tl.constexpr,
    CHECKED: tl.constexpr,
):  # fmt: skip
    """As `load_tile`, of a PagedHead. A tile may begin in the middle of a page and span several."""
    o_row, o_dim = start + tl.arange(0, ROWS), tl.arange(0, BLOCK_DIM)
    o_key = head.first_key + o_row
    m_row = (o_row >= 0) & (o_row < n_rows)
    if CHECKED:
        b_block = tl.load(head.block_table + o_key // PAGE, mask=m_row, other=0)
    else:
        b_block = tl.load(head.block_table + o_key // PAGE)
    o_place = b_block.to(tl.int64) * head.strides[0] + (o_key % PAGE).to(tl.int64) * head.strides[2]
    pointers = head.pointer + (o_place[:, None] + (o_dim * head.strides[3])[None, :])
    if CHECKED:
        return tl.load(pointers, mask=m_row[:, None] & (o_dim < DIM)[None, :], other=0.0)
    if DIM < BLOCK_DIM:
        return tl.load(pointers, mask=(o_dim < DIM)[None, :], other=0.0)
    return tl.load(pointers)


@triton.jit
def store_tile(head, start, n_rows, b_x, ROWS: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """Write b_x [ROWS, BLOCK_DIM] to where `load_tile` would read it, in the pointer's type."""
    o_row, o_dim = tl.arange(0, ROWS), tl.arange(0, BLOCK_DIM)
    p_tile = head.pointer + wide(start) * head.strides[2]
    pointers = p_tile + (o_row[:, None] * head.strides[2] + o_dim[None, :] * head.strides[3])
    m_element = (start + o_row < n_rows)[:, None] & (o_dim < DIM)[None, :]
    tl.store(pointers, b_x.to(head.pointer.dtype.element_ty), mask=m_element)


@triton.jit
def load_pivot(p_pivot, o_row, m_row, IS_LSE: tl.constexpr):
    """Pivots, or what they are where an lse is passed for them: lse * log2(e), and +inf for rows that see no key. Rows
    that don't exist have +inf too, so that their A is exactly 0."""
    if IS_LSE:
        b_lse = tl.load(p_pivot + o_row, mask=m_row, other=float("-inf"))
        return tl.where(b_lse == float("-inf"), float("inf"), b_lse * LOG2E)
    else:
        return tl.load(p_pivot + o_row, mask=m_row, other=float("inf"))


@triton.jit
def load_counts(pointers, m_row):
    """Whether each query counts in columns, from uint8, or how much, from float32."""
    b_counts = tl.load(pointers, mask=m_row, other=0)
    if b_counts.dtype == tl.uint8:
        return b_counts != 0
    else:
        return b_counts


@triton.jit
def counted(b_x, b_counts):
    """b_x as `load_counts` says; 0 for what doesn't count, also of NaN."""
    if b_counts.dtype == tl.int1:
        return tl.where(b_counts, b_x, 0.0)
    else:
        return tl.where(b_counts != 0.0, b_x * b_counts, 0.0)


@triton.jit
def kept(dropout, i_flat_head, o_query, o_key):
    """True where dropout keeps A; it depends on a query's and a key's place in the tensors, not on the tiling.

    o_query and o_key broadcast to the tile. One of the four numbers of a Philox counter is used.
    """
    o_none = o_key * 0
    seed = tl.load(dropout.seed)
    o_bits, _, _, _ = tl.philox(seed, o_none + o_query, o_key, o_none + i_flat_head, o_none, PHILOX_ROUNDS)
    return (o_bits >> 8).to(tl.float32) * 5.9604644775390625e-08 >= dropout.p  # 24 bits, all that float32 holds


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
def softcapped(b_dot, score):
    """Two factors of a score in the exp2 domain: softcap * tanh(scale * a . b / softcap) * log2(e) and 1, or a . b and
    scale * log2(e), which the online softmax folds into exp2's argument."""
    if score.cap2 is None:
        return b_dot, score.scale2
    else:
        return score.cap2 * tanh(b_dot * (score.scale2 / score.cap2)), 1.0


@triton.jit
def softcap_slope(b_x, score):
    """The softcap's derivative at the capped scores b_x."""
    b_tanh = b_x * (1.0 / score.cap2)
    return 1.0 - b_tanh * b_tanh


@triton.jit
def scores_above(b_a, b_b, b_pivot, score):
    """scale * a . b * log2(e), softcapped, less the pivot, which broadcasts to the tile; and the capped scores.

    An FMA by name, so that a score is rounded once, after the subtraction, whatever the compiler fuses.
    """
    b_x, unit = softcapped(dot(b_a, b_b), score)
    return tl.fma(b_x, unit, -b_pivot), b_x


@triton.jit
def keys_present(key_mask, i_batch, o_key, n_keys):
    """[len(o_key)] bool: the key exists and isn't padding."""
    m_key = (o_key >= 0) & (o_key < n_keys)
    if key_mask is not None:
        m_key &= tl.load(key_mask + wide(i_batch) * n_keys + o_key, mask=m_key, other=0) != 0
    return m_key


@triton.jit
def hide(b_x, m_seen, o_query, o_key, visible):
    """Scores, -inf where m_seen is False or the key is outside the query's window. m_seen None: True everywhere.

    Positions broadcast to the tile; a distance t - s passes as `distance, 0`.
    """
    if visible.left is not None:
        m_near = o_query <= o_key + visible.left
        m_seen = m_near if m_seen is None else m_seen & m_near
    if visible.right is not None:
        m_near = o_query >= o_key - visible.right
        m_seen = m_near if m_seen is None else m_seen & m_near
    if m_seen is not None:
        b_x = tl.where(m_seen, b_x, float("-inf"))
    return b_x


@triton.jit
def see_a_key(m_row, position, first, end, sequence, visible, TILE: tl.constexpr):
    """Of the rows m_row of a tile, the BM from `position` on, those that see one of the keys first .. end."""
    o_position = position + tl.arange(0, TILE.HEADS * TILE.BM) % TILE.BM
    b_first, b_end = o_position * 0 + first, o_position * 0 + end
    if visible.left is not None:
        b_first = tl.maximum(b_first, o_position - visible.left)
    if visible.right is not None:
        b_end = tl.minimum(b_end, o_position + visible.right + 1)
    m_row &= b_first < b_end
    if visible.key_mask is not None:
        b_count = b_first * 0
        if tl.max(m_row.to(tl.int32), 0) > 0:  # few programs read their mask again
            for start in range(first, end, TILE.BN):
                o_key = start + tl.arange(0, TILE.BN)
                m_key = keys_present(visible.key_mask, sequence.i_batch, o_key, sequence.n_keys)[None, :]
                m_key &= (o_key[None, :] >= b_first[:, None]) & (o_key[None, :] < b_end[:, None])
                b_count += tl.sum(m_key.to(tl.int32), 1)
        m_row &= b_count > 0
    return m_row


@triton.jit
def key_range(position, first, end, visible, BM: tl.constexpr, BN: tl.constexpr):
    """first, whole, edge, end: the BM rows from `position` on see keys of first .. end alone, and each of them sees
    every key of whole .. edge, which are whole tiles."""
    whole, edge = first, end
    if visible.left is not None:
        first = tl.maximum(first, (position - visible.left) // BN * BN)
        whole = tl.maximum(first, tl.cdiv(position + BM - 1 - visible.left, BN) * BN)
    if visible.right is not None:
        end = tl.minimum(end, position + BM + visible.right)
        edge = tl.minimum(edge, position + visible.right + 1)
    whole = tl.minimum(whole, tl.maximum(end, first))
    return first, whole, tl.maximum(edge // BN * BN, whole), end


@triton.jit
def query_range(position, first, last, visible, BN: tl.constexpr):
    """Of the queries first .. last, those that see keys of a block of BN; position: its first key's, as a row."""
    if visible.right is not None:
        first = tl.minimum(tl.maximum(first, position - visible.right), last)
    if visible.left is not None:
        last = tl.maximum(tl.minimum(last, position + BN + visible.left), first)
    return first, last


@triton.jit
def zeros_for(COUNT: tl.constexpr, SHAPE: tl.constexpr):
    """A tuple of COUNT float32 accumulators."""
    accumulators = ()
    for _ in tl.static_range(COUNT):
        accumulators = accumulators + (tl.zeros(SHAPE, tl.float32),)
    return accumulators


@triton.jit
def packed_rows(i_block, n_heads, n_rows, HEADS: tl.constexpr, BM: tl.constexpr):
    """The Rows of a tile that packs BM positions of HEADS heads, n_heads of which exist."""
    o_packed = tl.arange(0, HEADS * BM)
    o_head = o_packed // BM
    o_row = i_block * BM + o_packed % BM
    return Rows(o_head, o_row, (o_head < n_heads) & (o_row < n_rows))


@triton.jit
def band_step(
    sums,  # per row statistic [BN, HEADS * BM]; (): no row statistic needs the tile
    relative,
    block_start,
    b_qt,  # [BLOCK_DIM, HEADS * BM], the rows of HEADS heads of one group
    b_pivot,  # [HEADS * BM], +inf for rows that don't exist
    b_factor,  # [HEADS * BM]; None: 1
    b_counts,  # [HEADS * BM] as `load_counts`; None: every row counts
    o_row,  # [HEADS * BM] float32, each row's place in its block of BM
    keys, sequence, slots, visible, score,
    EDGE: tl.constexpr, BAND: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Add the tile of keys at block_start + relative. EDGE: a key may not exist or may be hidden from a row.

    The tile is transposed, [BN, HEADS * BM]: a column is a sum along a tile's row, within few threads, and rows
    accumulate elementwise until the last tile.
    """
    BM: tl.constexpr = TILE.BM
    BN: tl.constexpr = TILE.BN
    SLOTS_AHEAD: tl.constexpr = (BAND.AHEAD + BM - 1) // BM
    SLOTS: tl.constexpr = SLOTS_AHEAD + 1 + (BAND.BEHIND + BM - 1) // BM
    start = block_start + relative
    o_tile = tl.arange(0, BN)
    o_key = start + o_tile
    if TILE.PAGE > 0:
        b_k = load_paged(keys, start, sequence.n_keys, BN, TILE.DIM, TILE.BLOCK_DIM, TILE.PAGE, EDGE)
    else:
        b_k = load_tile(keys, start, sequence.n_keys, BN, TILE.DIM, TILE.BLOCK_DIM, EDGE)  # [BN, BLOCK_DIM]
    b_x, _ = scores_above(b_k, b_qt, b_pivot[None, :], score)  # [BN, HEADS * BM]
    o_near = (relative + o_tile).to(tl.float32)
    m_key = o_key >= 0
    if EDGE:
        m_key = keys_present(visible.key_mask, sequence.i_batch, o_key, sequence.n_keys)
        if visible.right is not None:  # an absent key lies in every row's future: one comparison hides both
            o_near = tl.where(m_key, o_near, FAR)
    distance = o_row[None, :] - o_near[:, None]
    if EDGE:
        m_exists = m_key[:, None] if visible.right is None else None
        # Hidden before exp2: a padded score of 0 less an lse of -90 would overflow.
        b_x = hide(b_x, m_exists, distance, 0, visible)
    b_a = tl.exp2(b_x)
    updated = ()
    for j in tl.static_range(len(sums)):
        updated = updated + (sums[j] + b_a * weigh(distance, BAND.ROWS, j),)
    if len(BAND.COLUMNS) > 0:
        if b_factor is not None:
            b_a *= b_factor[None, :]
        if b_counts is not None:
            b_a = counted(b_a, b_counts[None, :])
        slot = SLOTS_AHEAD - ((relative + o_tile + BM * SLOTS) // BM - SLOTS)  # floor division of a signed number
        o_head = tl.arange(0, TILE.HEADS)
        m_store = (m_key & (slot >= 0) & (slot < SLOTS))[:, None] & (o_head < slots.n_packed)[None, :]
        o_place = (slot.to(tl.int64) * slots.n_batch + sequence.i_batch) * slots.n_heads + slots.i_head
        o_column = (o_place[:, None] + o_head[None, :]) * slots.n_keys + (sequence.k_begin + o_key)[:, None]
        for j in tl.static_range(len(BAND.COLUMNS) // FIELDS):
            b_w = weigh(distance, BAND.COLUMNS, j)
            b_part = tl.where(b_w == 0, 0.0, b_a * b_w)  # 0 * NaN is NaN
            b_sum = tl.sum(tl.reshape(b_part, (BN, TILE.HEADS, BM)), 2)  # [BN, HEADS]
            p_column = slots.pointer + wide(j * SLOTS) * slots.n_batch * slots.n_heads * slots.n_keys
            tl.store(p_column + o_column, b_sum, mask=m_store)
    return updated


@triton.jit
def band_sweep(
    b_q, b_pivot, b_factor, b_counts, keys, sequence, block_start, behind, slots, visible, score,
    BAND: tl.constexpr, TILE: tl.constexpr,
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
    BM: tl.constexpr = TILE.BM
    BN: tl.constexpr = TILE.BN
    LAST: tl.constexpr = BM - (BM + BN - 1) // BN * BN
    NEAR: tl.constexpr = LAST - (max(BAND.ROWS_BEHIND + LAST, 0) + BN - 1) // BN * BN
    n_keys = sequence.n_keys
    first = LAST - tl.maximum(tl.cdiv(tl.minimum(behind, block_start) + LAST, BN), 0) * BN
    last = tl.minimum(BM + BAND.AHEAD, n_keys - block_start)
    last = tl.where(behind < 0, LAST, last)
    if visible.left is None and visible.key_mask is None:
        # Whole tiles of keys behind the block are seen by all its rows; the first tile may begin before key 0.
        inner = tl.minimum(tl.where(block_start + first < 0, first + BN, first), LAST)
        inner = tl.where(block_start <= n_keys, inner, LAST)
    else:
        inner = first * 0 + LAST
    near = tl.maximum(inner, NEAR)
    before = (inner - first) // BN  # tiles, and after them those from LAST on
    b_qt = tl.trans(b_q)
    o_row = tl.arange(0, TILE.HEADS * BM) % BM
    # A row that doesn't exist is far before every key: its query of 0 times an inf or NaN in a key is NaN.
    n_rows = sequence.offset + sequence.n_queries - block_start
    o_row = tl.where(o_row < n_rows, o_row.to(tl.float32), -FAR)
    sums = zeros_for(len(BAND.ROWS) // FIELDS, (BN, TILE.HEADS * BM))
    if len(BAND.COLUMNS) > 0:
        for relative in range(inner, near, BN):
            band_step(
                (), relative, block_start, b_qt, b_pivot, b_factor, b_counts, o_row,
                keys, sequence, slots, visible, score, False, BAND, TILE,
            )  # fmt: skip
    for relative in range(near, LAST, BN):
        sums = band_step(
            sums, relative, block_start, b_qt, b_pivot, b_factor, b_counts, o_row,
            keys, sequence, slots, visible, score, False, BAND, TILE,
        )  # fmt: skip
    for i_tile in range(before + tl.cdiv(tl.maximum(last - LAST, 0), BN)):
        relative = tl.where(i_tile < before, first, LAST - before * BN) + i_tile * BN
        sums = band_step(
            sums, relative, block_start, b_qt, b_pivot, b_factor, b_counts, o_row,
            keys, sequence, slots, visible, score, True, BAND, TILE,
        )  # fmt: skip
    reduced = ()
    for j in tl.static_range(len(BAND.ROWS) // FIELDS):
        b_row = tl.sum(sums[j], 0)
        if b_factor is not None:
            b_row *= b_factor
        reduced = reduced + (b_row,)
    return reduced


@triton.jit
def load_sinks(pointers, m_row):
    """Sinks and the same in the exp2 domain, finite where they are."""
    b_sink = tl.load(pointers, mask=m_row, other=float("-inf"))
    return b_sink, tl.minimum(b_sink * LOG2E, LARGEST)


@triton.jit
def row_mass(b_pivot, b_factor, sinks, i_head, rows):
    """The sum of a row's A: 1 less the sink's share, 0 where it sees no key (pivot = +inf), NaN where that is NaN."""
    b_mass = tl.where(b_pivot == float("inf"), 0.0, 1.0 + 0.0 * b_pivot)
    if sinks is not None:
        _, b_sink2 = load_sinks(sinks + i_head + rows.o_head, rows.m_row)
        b_share = tl.exp2(b_sink2 - b_pivot)
        if b_factor is not None:
            b_share = tl.where(b_factor < 1.0e-30, 1.0, b_share * b_factor)  # of a sink so far ahead exp2 overflows
        b_mass -= b_share
    return b_mass
