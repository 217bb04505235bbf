"""The band beside the diagonal, in plain PyTorch: statistics whose weight is constant beyond a distance, in O(T).

Blocks of rows meet overlapping windows of keys in one batched matmul. Read along its diagonals the product is
the band itself, [rows, distance]: no causal mask is needed, and nothing outside is exponentiated. Rows are sums
along a row of it, columns sums along its antidiagonals.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from attnstats.core.geometry import Geometry
from attnstats.core.scores import softcap_, subtract_lse_
from attnstats.statistics import Statistic
from attnstats.tiled.sweep import heads_of

BAND_ROWS = 64  # rows of a block: each computes BAND_ROWS - 1 scores more than the band is wide
BLOCK_ELEMENTS = 2**18  # scores of the blocks that are worked on together


def evaluate(
    query: Tensor, key: Tensor, lse: Tensor, geometry: Geometry, statistics: tuple[Statistic, ...]
) -> dict[Statistic, Tensor]:
    """Row statistics, and columns as sums (`Geometry.finish` divides), from the same scores."""
    band = _Band.of(geometry, statistics)
    tensors = geometry.zeros(statistics)
    rows_of = [s for s in band.spans if s.axis == "row"]
    columns_of = [s for s in band.spans if s.axis == "column"]
    counts = geometry.query_counts()
    space = _Workspace.of(geometry, band)
    for batch, heads, key_head in heads_of(geometry):
        hidden = _fill_keys_(space.keys, key[batch, key_head], band, geometry, batch)
        for head in range(heads.start, heads.stop):
            for start, weights in _band_blocks(query[batch, head], hidden, lse[batch, head], band, geometry, space):
                rows = slice(start, start + len(weights))
                for s in rows_of:
                    lo, hi = band.spans[s]
                    near = weights[:, band.behind - hi : band.behind - lo + 1]
                    tensors[s][batch, head, rows] = near @ band.weights[s].flip(0)
                if counts is not None:
                    of_rows = counts[batch, rows, None]
                    weights.masked_fill_(of_rows == 0, 0.0)  # NaN in what doesn't count doesn't count
                    if geometry.query_weight is not None:
                        weights.mul_(of_rows)
                for s in columns_of:
                    _add_columns_(tensors[s][batch, head], space.band, geometry.offset + start, len(weights), band, s)
    tails = {s: geometry.tail_of(s) for s in statistics if s.axis == "row"}
    if any(tails.values()):
        mass = geometry.row_mass(lse)
        tensors |= {s: tensors[s] + tail * mass for s, tail in tails.items() if tail}
    return tensors


def gradients(
    query: Tensor, key: Tensor, lse: Tensor, geometry: Geometry, grads: Mapping[Statistic, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """The part of dQ and dK from pairs in the band, and the row sums of A dA, (B, Hq, Tq), of rows whose A sums to 1.

    grads: of the sums of each statistic, in all heads (`Geometry.gradient_of_sums`). With dA its weights times its
    gradient, the softmax gives `A * (dA - rowsum(A dA))`: the first term lies within the band, the second is the
    caller's to take off all pairs. In rows that see no key outside the band both are done here, and the sum is 0: there
    they may cancel to their last digits. A tail is the same for all pairs of a row, so it cancels.
    """
    band = _Band.of(geometry, tuple(grads))
    grad_query, grad_key = (torch.zeros_like(x, dtype=geometry.accumulator) for x in (query, key))
    row_sums = torch.zeros_like(lse, dtype=geometry.accumulator)
    first, end = geometry.seen()
    place = torch.arange(geometry.query_length, device=geometry.device, dtype=torch.int64) + geometry.offset
    whole = (first >= place - band.behind) & (end <= place + band.ahead + 1)
    space = _Workspace.of(geometry, band)
    of_keys = torch.zeros_like(space.keys)
    received = {s: space.keys.new_zeros(len(space.keys)) for s in band.spans if s.axis == "column"}
    for batch, heads, key_head in heads_of(geometry):
        hidden = _fill_keys_(space.keys, key[batch, key_head], band, geometry, batch)
        inside, positions = _inside(space.keys, band, geometry)
        of_keys.zero_()
        for head in range(heads.start, heads.stop):
            for s, x in received.items():
                x[inside] = grads[s][batch, head, positions]
            for start, weights in _band_blocks(query[batch, head], hidden, lse[batch, head], band, geometry, space):
                rows = slice(start, start + len(weights))
                of_pairs = _of_pairs(geometry, band, grads, received, batch, head, rows)
                of_rows = torch.linalg.vecdot(weights, of_pairs)
                of_pairs -= torch.where(whole[rows], of_rows, 0.0)[:, None]
                row_sums[batch, head, rows] = of_rows.masked_fill_(whole[rows], 0.0)
                weights.mul_(of_pairs)
                grad_query[batch, head, rows] = _through_scores(space, start, len(weights), geometry.scale, of_keys)
        grad_key[batch, key_head, positions] = of_keys[inside]
    return grad_query, grad_key, row_sums


def _of_pairs(
    geometry: Geometry,
    band: _Band,
    grads: Mapping[Statistic, Tensor],
    received: Mapping[Statistic, Tensor],
    batch: int,
    head: int,
    rows: slice,
) -> Tensor:
    """[rows, width] dA, the weights times their gradients; `received` has those of columns, by workspace row."""
    shape = rows.stop - rows.start, band.width
    of_pairs = torch.zeros(shape, dtype=geometry.accumulator, device=geometry.device)
    for s, (lo, hi) in band.spans.items():
        near = of_pairs[:, band.behind - hi : band.behind - lo + 1]
        if s.axis == "row":
            near.addcmul_(grads[s][batch, head, rows, None], band.weights[s].flip(0))
            continue
        of_column = received[s][rows.start + band.behind - hi :].as_strided(near.shape, (1, 1))
        if s not in band.unweighted:
            of_column = of_column * band.weights[s].flip(0)
        counts = geometry.query_counts()
        if counts is not None:
            of_column = of_column * counts[batch, rows, None]
        near += of_column
    return of_pairs


def _through_scores(space: _Workspace, start: int, rows: int, scale: float, of_keys: Tensor) -> Tensor:
    """[rows, D] dQ of rows from `start` on, from the dS that `space.band` holds of them; adds dK to `of_keys`."""
    blocks = -(-rows // BAND_ROWS)
    scores, diagonals = space.scores[:blocks].zero_(), space.diagonals(blocks)
    width = space.band.shape[1]
    diagonals.copy_(space.band[width : width + blocks * BAND_ROWS].view_as(diagonals))
    scores.mul_(scale)
    parts = torch.bmm(scores.mT, space.queries.unflatten(0, (-1, BAND_ROWS))[:blocks])
    for offset in range(0, parts.shape[1], BAND_ROWS):  # windows overlap, but not BAND_ROWS keys of each
        part = parts[:, offset : offset + BAND_ROWS]
        target = of_keys[start + offset :].as_strided(part.shape, space.apart())
        target += part
    return torch.bmm(scores, space.windows(start, blocks)).flatten(0, 1)[:rows]


class _Workspace(NamedTuple):
    """Buffers that all heads share: fresh ones of this size would be mapped and unmapped for each."""

    keys: Tensor  # [blocks * BAND_ROWS + width - 1, D], beginning `behind` positions before the first query
    queries: Tensor  # [step, D]
    scores: Tensor  # [step / BAND_ROWS, BAND_ROWS, window]
    band: Tensor  # [width + step + width, width], zeros above and below the rows in use

    @staticmethod
    def of(geometry: Geometry, band: _Band) -> _Workspace:
        window = BAND_ROWS + band.width - 1
        blocks = -(-geometry.query_length // BAND_ROWS)
        together = min(blocks, max(1, BLOCK_ELEMENTS // (BAND_ROWS * window)))
        step = together * BAND_ROWS
        shapes = (
            (blocks * BAND_ROWS + band.width - 1, geometry.head_dim),
            (step, geometry.head_dim),
            (together, BAND_ROWS, window),
            (band.width + step + band.width, band.width),
        )
        return _Workspace(*[torch.zeros(s, dtype=geometry.accumulator, device=geometry.device) for s in shapes])

    def apart(self) -> tuple[int, int, int]:
        """The strides of keys [blocks, .., D] that begin BAND_ROWS apart."""
        dim = self.keys.shape[1]
        return BAND_ROWS * dim, dim, 1

    def windows(self, start: int, blocks: int) -> Tensor:
        """[blocks, window, D] the keys of each block of rows from `start` on."""
        return self.keys[start:].as_strided((blocks, self.scores.shape[2], self.keys.shape[1]), self.apart())

    def diagonals(self, blocks: int) -> Tensor:
        """[blocks, BAND_ROWS, width] the part of the scores that lies in the band."""
        _, rows, window = self.scores.shape
        return self.scores.as_strided((blocks, rows, self.band.shape[1]), (rows * window, window + 1, 1))


def _fill_keys_(keys: Tensor, key: Tensor, band: _Band, geometry: Geometry, batch: int) -> Tensor:
    """Copy one head's keys to the rows where the band reads them.

    Returns [len(keys)] bool, True in rows without a key, or with one that no query may see.
    """
    inside, positions = _inside(keys, band, geometry)
    keys[inside] = key[positions]
    hidden = torch.ones(len(keys), dtype=torch.bool, device=key.device)
    hidden[inside] = False if geometry.key_mask is None else ~geometry.key_mask[batch, positions]
    return hidden


def _inside(keys: Tensor, band: _Band, geometry: Geometry) -> tuple[slice, slice]:
    """The rows of `_Workspace.keys` that hold a key, and the keys' positions."""
    first = geometry.offset - band.behind  # the position at index 0
    begin = max(0, -first)
    inside = slice(begin, max(begin, min(len(keys), geometry.key_length - first)))
    return inside, slice(inside.start + first, inside.stop + first)


def _band_blocks(
    query: Tensor, hidden: Tensor, lse: Tensor, band: _Band, geometry: Geometry, space: _Workspace
) -> Iterator[tuple[int, Tensor]]:
    """For one head, yield the first row and A as [rows, width], a part of `space.band` between rows of zeros."""
    length, dim = query.shape
    together = len(space.scores)
    for start in range(0, length, together * BAND_ROWS):
        rows = min(together * BAND_ROWS, length - start)
        blocks = -(-rows // BAND_ROWS)
        space.queries[:rows].copy_(query[start : start + rows])
        of_blocks = space.queries.view(-1, BAND_ROWS, dim)[:blocks]
        torch.bmm(of_blocks, space.windows(start, blocks).mT, out=space.scores[:blocks])
        diagonals = space.diagonals(blocks)
        weights = space.band[band.width : band.width + blocks * BAND_ROWS]
        softcap_(torch.mul(diagonals, geometry.scale, out=weights.view_as(diagonals)), geometry.softcap)
        subtract_lse_(weights[:rows], lse[start : start + rows]).exp_()
        first = geometry.offset + start
        # Without a key mask only the first and the last rows reach beyond the keys.
        reach_before = rows if geometry.key_mask is not None else min(rows, max(0, band.behind - first))
        reach_behind = max(reach_before, min(rows, geometry.key_length - band.ahead - first))
        for edge in (slice(0, reach_before), slice(reach_behind, rows)):
            size = edge.stop - edge.start
            if size > 0:
                outside = hidden[start + edge.start :].as_strided((size, band.width), (1, 1))
                weights[edge].masked_fill_(outside, 0.0)
        space.band[band.width + rows :].zero_()
        yield start, weights[:rows]


def _add_columns_(column: Tensor, padded: Tensor, first: int, rows: int, band: _Band, statistic: Statistic) -> None:
    """Add to `column` [Tk] the sums over a block of rows, the first of them at position `first`.

    A key's weights lie on an antidiagonal of the band: one row further down, one column further left.
    """
    lo, hi = band.spans[statistic]
    start = (band.width - hi + lo) * band.width + band.behind - lo
    antidiagonals = padded.as_strided((rows + hi - lo, hi - lo + 1), (band.width, band.width - 1), start)
    received = antidiagonals
    if statistic not in band.unweighted:
        weights = band.weights[statistic]
        received = torch.where(weights == 0, 0.0, antidiagonals * weights)  # 0 * NaN is NaN
    received = received.sum(1)
    skip = max(0, hi - first)
    keys = slice(first - hi + skip, min(first - lo + rows, len(column)))
    if keys.start < keys.stop:
        column[keys] += received[skip : skip + keys.stop - keys.start]


def width_of(geometry: Geometry, statistics: tuple[Statistic, ...]) -> int:
    """The number of distances in the band."""
    return _Band.of(geometry, statistics).width


def cost(geometry: Geometry, statistics: tuple[Statistic, ...]) -> tuple[str, int, int]:
    """The description of `evaluate`, its floating-point operations and its scratch memory in bytes."""
    band = _Band.of(geometry, statistics)
    window = BAND_ROWS + band.width - 1
    rows = geometry.batch * geometry.query_heads * geometry.query_length
    scratch = 4 * 2 * BLOCK_ELEMENTS + 4 * geometry.head_dim * geometry.query_length
    description = f"band, blocks of {BAND_ROWS} rows x {window} keys"
    return description, 2 * rows * window * geometry.head_dim, scratch


class _Band(NamedTuple):
    """Distances `-ahead .. behind`, laid out as [rows, distance] with column j at distance `behind - j`.

    Attributes:
        width: the number of distances.
        spans: (lo, hi), the part of each statistic's band that lies within this one; empty ones are left out.
        weights: [hi - lo + 1] each statistic's weight less its tail, from distance lo upwards.
        unweighted: column means over the whole band, whose weight is 1 throughout.
    """

    behind: int
    ahead: int
    width: int
    spans: dict[Statistic, tuple[int, int]]
    weights: dict[Statistic, Tensor]
    unweighted: frozenset[Statistic]

    @staticmethod
    def of(geometry: Geometry, statistics: tuple[Statistic, ...]) -> _Band:
        """The union of the statistics' bands, as far as there are keys that can be seen."""
        cached = geometry.memo.get(("band", statistics))
        if cached is None:
            cached = geometry.memo["band", statistics] = _Band._of(geometry, statistics)
        return cached

    @staticmethod
    def _of(geometry: Geometry, statistics: tuple[Statistic, ...]) -> _Band:
        bands = {s: s.band for s in statistics if s.band}
        behind = min(max(hi for _, hi in bands.values()), geometry.offset + geometry.query_length - 1)
        ahead = max(-lo for lo, _ in bands.values())
        if geometry.left is not None:
            behind = min(behind, geometry.left)
        if geometry.right is not None:
            ahead = min(ahead, geometry.right)
        behind, ahead = max(0, behind), max(0, min(ahead, geometry.key_length - 1 - geometry.offset))
        clipped = {s: (max(lo, -ahead), min(hi, behind)) for s, (lo, hi) in bands.items()}
        spans = {s: (lo, hi) for s, (lo, hi) in clipped.items() if lo <= hi}
        weights = {
            s: s.weight_as(torch.arange(lo, hi + 1, device=geometry.device, dtype=torch.int64), geometry.accumulator)
            - geometry.tail_of(s)
            for s, (lo, hi) in spans.items()
        }
        unweighted = frozenset(s for s in spans if s.horizon == s.band)
        return _Band(behind, ahead, behind + ahead + 1, spans, weights, unweighted)
