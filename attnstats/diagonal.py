"""The band beside the diagonal, in plain PyTorch: statistics whose weight is constant beyond a distance, in O(T).

Blocks of rows meet overlapping windows of keys in one batched matmul. Read along its diagonals the product is
the band itself, [rows, distance]: no causal mask is needed, and nothing outside is exponentiated. Rows are sums
along a row of it, columns sums along its antidiagonals.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from attnstats.geometry import Geometry, Step, divisor_of
from attnstats.statistics import ColumnStatistic, DistanceWeighted, RowStatistic, Statistic
from attnstats.sweep import heads_of

BAND_LIMIT = 1024  # wider bands are swept: the buffer of a band grows with the square of its width
BAND_ROWS = 64  # rows of a block: each computes BAND_ROWS - 1 scores more than the band is wide
BLOCK_ELEMENTS = 2**18  # scores of the blocks that are worked on together


def is_narrow(statistic: DistanceWeighted) -> bool:
    """Whether the band is the cheaper way."""
    return statistic.band is not None and statistic.band[1] - statistic.band[0] < BAND_LIMIT


def evaluate(
    query: Tensor, key: Tensor, lse: Tensor, geometry: Geometry, statistics: tuple[DistanceWeighted, ...]
) -> dict[Statistic, Tensor]:
    """Row statistics, and columns as sums (`Geometry.finish` divides), from the same scores."""
    band = _Band.of(geometry, statistics)
    divisor = divisor_of(lse)
    tensors = {s: lse.new_zeros(geometry.shape_of(s)) for s in statistics}
    met = [s for s in statistics if band.clip(s)[0] <= band.clip(s)[1]]
    by_distance = {s: band.weight(s, lse) for s in met}
    counted = geometry.counted()
    for batch, heads, key_head in heads_of(geometry):
        keys, hidden = _padded_keys(key[batch, key_head], band, geometry, batch)
        for head in range(heads.start, heads.stop):
            blocks = _band_blocks(query[batch, head], keys, hidden, divisor[batch, head], band, geometry)
            for start, weights, padded in blocks:
                rows = slice(start, start + len(weights))
                for s in met:
                    if isinstance(s, RowStatistic):
                        lo, hi = band.clip(s)
                        near = weights[:, band.behind - hi : band.behind - lo + 1]
                        tensors[s][batch, head, rows] = near @ by_distance[s].flip(0)
                if counted is not None:
                    weights.mul_(counted[batch, rows, None])
                for s in met:
                    if isinstance(s, ColumnStatistic):
                        first, lo = geometry.offset + start, band.clip(s)[0]
                        _add_columns_(tensors[s][batch, head], padded, first, len(weights), band, lo, by_distance[s])
    live = geometry.live()[:, None].to(lse.dtype)
    return {s: tensors[s] + s.tail * live if s.tail else tensors[s] for s in statistics}


def _padded_keys(key: Tensor, band: _Band, geometry: Geometry, batch: int) -> tuple[Tensor, Tensor]:
    """The keys from `behind` before the first query on, zeros where there are none, and which of them are hidden."""
    blocks = -(-geometry.query_length // BAND_ROWS)
    length = blocks * BAND_ROWS + band.width - 1
    first = geometry.offset - band.behind  # the position at index 0
    begin = max(0, -first)
    inside = slice(begin, max(begin, min(length, geometry.key_length - first)))
    positions = slice(inside.start + first, inside.stop + first)
    keys = key.new_zeros(length, geometry.head_dim, dtype=geometry.accumulator)
    keys[inside] = key[positions]
    hidden = torch.ones(length, dtype=torch.bool, device=key.device)
    hidden[inside] = False if geometry.key_mask is None else ~geometry.key_mask[batch, positions]
    return keys, hidden


def _band_blocks(
    query: Tensor, keys: Tensor, hidden: Tensor, divisor: Tensor, band: _Band, geometry: Geometry
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """For one head, yield (first row, A as [rows, width], the buffer that holds it between rows of zeros)."""
    length, dim = query.shape
    window = BAND_ROWS + band.width - 1
    step = max(1, BLOCK_ELEMENTS // (BAND_ROWS * window)) * BAND_ROWS
    step = min(step, -(-length // BAND_ROWS) * BAND_ROWS)
    scaled = keys.new_zeros(step, dim)
    padded = keys.new_zeros(band.width + step + band.width, band.width)
    for start in range(0, length, step):
        rows = min(step, length - start)
        blocks = -(-rows // BAND_ROWS)
        scaled[:rows].copy_(query[start : start + rows]).mul_(geometry.scale)  # in float32: the copy comes first
        windows = keys[start:].as_strided((blocks, window, dim), (BAND_ROWS * dim, dim, 1))
        scores = torch.bmm(scaled.view(-1, BAND_ROWS, dim)[:blocks], windows.mT)
        diagonals = scores.as_strided((blocks, BAND_ROWS, band.width), (BAND_ROWS * window, window + 1, 1))
        padded[band.width :].view(-1)[: diagonals.numel()].view_as(diagonals).copy_(diagonals)
        weights = padded[band.width : band.width + rows]
        weights.sub_(divisor[start : start + rows, None]).exp_()
        first = geometry.offset + start
        inside = first >= band.behind and first + rows + band.ahead <= geometry.key_length
        if geometry.key_mask is not None or not inside:
            weights.masked_fill_(hidden[start:].as_strided((rows, band.width), (1, 1)), 0.0)
        padded[band.width + rows :].zero_()
        yield start, weights, padded


def _add_columns_(
    column: Tensor, padded: Tensor, first: int, rows: int, band: _Band, lo: int, by_distance: Tensor
) -> None:
    """Add to `column` [Tk] what it receives from a block of rows, the first of them at position `first`.

    A key's weights stand on an antidiagonal of the band: one row further down, one column further left.
    """
    hi = lo + len(by_distance) - 1
    start = (band.width - hi + lo) * band.width + band.behind - lo
    antidiagonals = padded.as_strided((rows + hi - lo, hi - lo + 1), (band.width, band.width - 1), start)
    received = (antidiagonals * by_distance).sum(1)
    skip = max(0, hi - first)
    keys = slice(first - hi + skip, min(first - lo + rows, len(column)))
    if keys.start < keys.stop:
        column[keys] += received[skip : skip + keys.stop - keys.start]


def plan(geometry: Geometry, statistics: tuple[DistanceWeighted, ...]) -> Step:
    """What `evaluate` does."""
    band = _Band.of(geometry, statistics)
    window = BAND_ROWS + band.width - 1
    rows = geometry.batch * geometry.query_heads * geometry.query_length
    scratch = 4 * 2 * BLOCK_ELEMENTS + 4 * geometry.head_dim * geometry.query_length
    names = ", ".join(s.name for s in statistics)
    runs = f"band, blocks of {BAND_ROWS} rows x {window} keys"
    return Step(runs, names, 2 * rows * window * geometry.head_dim, scratch)


class _Band(NamedTuple):
    """Distances `-ahead .. behind`, laid out as [rows, distance] with column j at distance `behind - j`."""

    behind: int
    ahead: int

    @staticmethod
    def of(geometry: Geometry, statistics: tuple[DistanceWeighted, ...]) -> _Band:
        """The union of the statistics' bands, as far as there are keys."""
        bands = [s.band for s in statistics if s.band]
        behind = min(max(hi for _, hi in bands), geometry.offset + geometry.query_length - 1)
        ahead = 0 if geometry.is_causal else max(-lo for lo, _ in bands)
        return _Band(max(0, behind), max(0, min(ahead, geometry.key_length - 1 - geometry.offset)))

    @property
    def width(self) -> int:
        return self.behind + self.ahead + 1

    def clip(self, statistic: DistanceWeighted) -> tuple[int, int]:
        """The statistic's own band within this one; empty where the second is less than the first."""
        lo, hi = statistic.band or (0, -1)
        return max(lo, -self.ahead), min(hi, self.behind)

    def weight(self, statistic: DistanceWeighted, like: Tensor) -> Tensor:
        """[hi - lo + 1] the statistic's weight less its tail, from distance lo upwards."""
        lo, hi = self.clip(statistic)
        return statistic.weight(torch.arange(lo, hi + 1, device=like.device)).to(like.dtype) - statistic.tail
