"""Kernel arguments and device values that belong together, as NamedTuples.

The first nine are filled by the launcher. Triton passes the fields one by one: a field, or a whole group, that is None
switches its feature off when the kernel is compiled. Of a number in a group it compiles in whether it is 1 and whether
16 divides it, as loads of several elements need to know of strides. `Sizes` alone is made in the kernel, of arguments
of its own: of these nothing is compiled in, so that every length and offset runs the same machine code. The others are
made on the device. Names are those of the Python side; `n_` is a count, `i_` an index, and capitals are
constants.
"""

from typing import Any, NamedTuple


class Strides(NamedTuple):
    """The strides of tensors (B, heads, T, head size), each in elements of all four dimensions.

    All in one group behind the pointers: with each tensor's beside its pointer ptxas assigns other registers.
    """

    query: Any
    key: Any
    value: Any = None
    output: Any = None
    d_output: Any = None
    d_query: Any = None
    d_key: Any = None
    d_value: Any = None
    marks: Any = None


class Sequences(NamedTuple):
    """The boundaries of packed sequences, (sequences + 1,) int32. All None: each batch row is one sequence.

    Kernels ask a field for None, not the group: Triton 3.6 compares no tuple that has a None.
    """

    cu_seqlens_q: Any = None
    cu_seqlens_k: Any = None
    max_queries: Any = None  # a sequence with more of either is left out; None: there is none
    max_keys: Any = None


class PageTable(NamedTuple):
    """Where in a paged cache the keys of packed sequences are, whose strides are (blocks, heads, rows, head size). All
    None: they lie one after the other."""

    block_table: Any = None  # (sequences, pages)
    first_key: Any = None  # (sequences,) int32, the place in its pages of each sequence's key 0
    n_pages: Any = None  # the row stride of block_table


class Sizes(NamedTuple):
    """Arguments that kernels take one by one, not specialised."""

    n_batch: Any
    n_sequences: Any  # packed; None: each batch row is one
    n_query_heads: Any
    n_heads: Any  # that `band` and `column` compute; None for the others
    group: Any  # query heads per key head
    query_offset: Any  # position of the first query
    n_queries: Any  # of a batch row
    n_keys: Any
    n_blocks: Any  # of a head's queries, or keys in a key-stationary kernel, in a batch row or all packed sequences
    n_even: Any  # blocks of each packed sequence, as many as the longest has; 0: of each as many as it has


class Visibility(NamedTuple):
    """A query may see the keys from `left` positions behind it to `right` ahead of it; None: no limit."""

    left: Any
    right: Any
    key_mask: Any  # (B, Tk) uint8, 0 for padding; None: no padding


class Score(NamedTuple):
    """Factors of a score; scale2 and cap2 are the scale and the softcap times log2(e)."""

    scale: Any  # None but for the backward kernels, which alone read it
    scale2: Any
    cap2: Any  # None: no softcap


class Dropout(NamedTuple):
    seed: Any  # (1,) int64
    p: Any


class Segments(NamedTuple):
    """The cuts of a pooled map (kernels/column.py). Without: all queries are one segment."""

    query_bounds: Any  # (n_segments + 1,) int32
    first_piece: Any  # (blocks of keys + 1,) int32
    pieces: Any  # (pieces + 1,) int32


class StatisticGradients(NamedTuple):
    """Gradients for sums, [statistics, B, Hq, T] float32; None: there are none."""

    rows: Any
    columns: Any
    shift: Any  # [B, Hq, Tq] the part that is the same along a row, added to delta


class Near(NamedTuple):
    """The distances from the diagonal that weights with a band reach. Without: there are none."""

    behind: Any
    ahead: Any


class Head(NamedTuple):
    """One head of one sequence of a tensor."""

    pointer: Any
    strides: Any


class PagedHead(NamedTuple):
    """One head of one sequence whose keys lie in pages."""

    pointer: Any  # of the head in block 0
    strides: Any
    block_table: Any  # the sequence's row
    first_key: Any


class Stream(NamedTuple):
    """A Head of which nothing but tiles are read, all of one shape."""

    tiles: Any  # a tensor descriptor


class Sequence(NamedTuple):
    """The place of one sequence in the tensors."""

    i_batch: Any
    q_begin: Any  # its first query in the batch row
    n_queries: Any
    k_begin: Any
    n_keys: Any
    offset: Any  # position of its first query


class Rows(NamedTuple):
    """The rows of a query tile, vectors of [HEADS * BM]."""

    o_head: Any  # among the heads of the tile
    o_row: Any  # in the sequence
    m_row: Any  # exists


class Softmax(NamedTuple):
    """The online softmax of a query tile so far."""

    b_out: Any  # [rows, BLOCK_VALUE_DIM]
    b_sum: Any  # [rows, CHUNK] sum of a = exp2(score - maximum)
    b_log: Any  # [rows, CHUNK] sum of a * log2(a)
    b_moment: Any  # [rows, CHUNK] sum of a * distance
    sums: Any  # [rows] per row statistic of the loop
    b_marked: Any  # [rows, MARKS] sum of a times each key's marks
    b_argmax: Any  # [rows] the key of the maximum, -1 where there is none
    b_rest: Any  # [rows] what b_max lacks of it, from rounding
    b_max: Any  # [rows]


class QueryBlock(NamedTuple):
    """Queries of a tile of the backward pass."""

    b_q: Any  # [BM, BLOCK_DIM]
    b_do: Any  # [BM, BLOCK_VALUE_DIM] gradients for the output
    b_pivot: Any  # [BM], +inf for rows that see no key or don't exist
    b_factor: Any  # [BM]; None: 1
    b_delta: Any  # [BM]
    row_grads: Any  # [BM] per row statistic, and for the entropy
    b_counts: Any  # [BM] as `load_counts`; None: every query counts
    o_position: Any  # [BM]


class KeyBlock(NamedTuple):
    """Keys of a tile of the backward pass."""

    b_k: Any  # [BN, BLOCK_DIM]
    b_v: Any  # [BN, BLOCK_VALUE_DIM]
    column_grads: Any  # [BN] per column statistic
    m_key: Any  # [BN] bool: may be seen; None: every key
    o_key: Any  # [BN]


class Stack(NamedTuple):
    """Vectors along one head's rows, n_between elements apart."""

    pointer: Any
    n_between: Any


class Slots(NamedTuple):
    """The buffer to which a query tile writes band columns, [COLUMNS, slots, n_batch, n_heads, n_keys] float32."""

    pointer: Any
    i_head: Any  # the tile's first head, n_packed of which exist
    n_packed: Any
    n_batch: Any
    n_heads: Any
    n_keys: Any


class Tile(NamedTuple):
    """Constants of a kernel's tiles."""

    HEADS: Any  # that share a query tile
    BM: Any
    BN: Any
    DIM: Any
    BLOCK_DIM: Any  # DIM rounded up to a power of two
    VALUE_DIM: Any = None
    BLOCK_VALUE_DIM: Any = None
    PAGE: Any = 0  # keys per page; 0: they aren't in pages


class Loop(NamedTuple):
    """Constants of forward's main loop."""

    ROWS: Any  # weights of row statistics
    MOMENT: Any  # mean distance under a causal mask
    ENTROPY: Any
    FROM_LSE: Any  # rows from an lse: no value, no output
    CHUNK: Any  # columns in which row sums are kept
    MARKS: Any  # numbers per key that rows of A are multiplied with
    TOP: Any  # the key of the maximum is asked for


class Weights(NamedTuple):
    """Constants of statistics that have gradients; NEAR weights, less their tail, are 0 beyond a band."""

    ROWS: Any
    NEAR_ROWS: Any
    ENTROPY: Any
    COLUMNS: Any
    NEAR_COLUMNS: Any


class Band(NamedTuple):
    """Constants of statistics with a band."""

    ROWS: Any  # weights of row statistics
    COLUMNS: Any
    BEHIND: Any  # how far the band goes behind a query
    ROWS_BEHIND: Any  # how far row statistics need it
    AHEAD: Any
