"""The least time that a pass can take, from the card's measured rates: the time of its busiest resource.

Floors of the shapes of docs and reports: with an H100's published rates and D = 128 they are matmul for forward and
column, and memory for the band. Bytes are those of inputs and outputs, each once, whatever a kernel really moves.
"""

from __future__ import annotations

from typing import NamedTuple


class Ceilings(NamedTuple):
    copy: float  # bytes per second, read and written
    matmul: float  # floating-point operations per second in bfloat16
    exp2: float  # per second


class Shape(NamedTuple):
    length: int
    query_heads: int = 32
    key_heads: int = 8
    head_dim: int = 128
    batch: int = 1
    queries: int | None = None  # the last ones of `length`; None: all
    element_bytes: int = 2

    @property
    def rows(self) -> int:
        return self.length if self.queries is None else self.queries

    @property
    def pairs(self) -> int:
        """Visible (query, key) pairs under the causal mask, over batch and heads."""
        rows = self.rows
        return self.batch * self.query_heads * (rows * self.length - rows * (rows - 1) // 2)

    @property
    def query_bytes(self) -> int:
        return self.batch * self.query_heads * self.rows * self.head_dim * self.element_bytes

    @property
    def key_bytes(self) -> int:
        return self.batch * self.key_heads * self.length * self.head_dim * self.element_bytes

    @property
    def row_bytes(self) -> int:
        """Of one float32 per row: an lse, a statistic."""
        return 4 * self.batch * self.query_heads * self.rows

    @property
    def column_bytes(self) -> int:
        return 4 * self.batch * self.query_heads * self.length


def forward_bytes(shape: Shape) -> int:
    """Queries, keys, values; output and lse."""
    return 2 * shape.query_bytes + 2 * shape.key_bytes + shape.row_bytes


def band_bytes(shape: Shape) -> int:
    """Queries, keys and lse; WAAD and FAI."""
    return shape.query_bytes + shape.key_bytes + 2 * shape.row_bytes + shape.column_bytes


def forward(shape: Shape, ceilings: Ceilings) -> float:
    """Seconds: two matmuls of `pairs`, an exp2 for each pair."""
    return max(
        4 * shape.pairs * shape.head_dim / ceilings.matmul,
        shape.pairs / ceilings.exp2,
        forward_bytes(shape) / ceilings.copy,
    )


def column(shape: Shape, ceilings: Ceilings) -> float:
    """Seconds: one matmul of `pairs`, an exp2 for each pair."""
    return max(
        2 * shape.pairs * shape.head_dim / ceilings.matmul,
        shape.pairs / ceilings.exp2,
        (shape.query_bytes + shape.key_bytes + shape.row_bytes + shape.column_bytes) / ceilings.copy,
    )


def band(shape: Shape, ceilings: Ceilings) -> float:
    """Seconds: memory; its matmuls are O(T)."""
    return band_bytes(shape) / ceilings.copy
