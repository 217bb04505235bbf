"""Pieces of a score that every plain PyTorch loop shares."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from attnstats.core.geometry import Geometry, divisor_of
from attnstats.core.visibility import within
from attnstats.statistics import SinkMass

FIRST_KEYS = 64  # first keys that are gathered together
FEWEST_KEYS = 16  # for fewer, BLAS takes another order of summation than for the whole map, which errs more


def softcap_(scores: Tensor, softcap: float | None) -> Tensor:
    """`softcap * tanh(scores / softcap)` in place; None: unchanged."""
    return scores if softcap is None else scores.div_(softcap).tanh_().mul_(softcap)


def subtract_lse_(scores: Tensor, lse: Tensor) -> Tensor:
    """ln A = scores [.., T, S] - lse [.., T] in place, -inf in a row that sees no key (lse -inf), not NaN.

    A float64 lse is taken off float32 scores in two steps: rounded to float32, then what the rounding left.
    """
    divisor = divisor_of(lse)
    rounded = divisor.to(scores.dtype)
    scores.sub_(rounded[..., None])
    if lse.dtype != scores.dtype:
        scores.sub_(torch.where(rounded.isfinite(), divisor - rounded, 0.0).to(scores.dtype)[..., None])
    return scores


def with_sinks(lse: Tensor, sinks: Tensor) -> Tensor:
    """The lse [.., H, T] of the keys with the sinks [H] counted, for rows that see a key."""
    return torch.logaddexp(lse, sinks.to(lse.dtype)[:, None])


def beside_sinks(output: Tensor, lse: Tensor, counted: Tensor) -> Tensor:
    """The output (B, H, T, Dv) of a softmax with this lse, where sinks count in the softmax too: a row is only scaled.

    counted: the lse [.., H, T] with the sinks, -inf for rows that see no key.
    """
    return (output * (lse - divisor_of(counted)).exp()[..., None]).to(output.dtype)


def sink_gradient(share: Tensor, delta: Tensor, geometry: Geometry) -> Tensor:
    """[Hq] the gradient for the sinks from their shares of the rows and delta, the row sums of A dA, (B, Hq, Tq)."""
    assert geometry.sinks is not None
    return -(share * delta).sum((0, 2)).to(geometry.sinks.dtype)


def sink_mass(
    query: Tensor, key: Tensor, geometry: Geometry, statistic: SinkMass, weights_of: Callable[[Tensor, slice], Tensor]
) -> Tensor:
    """The mass on the first keys of each sequence, at most `count`, which are gathered; no other key is read.

    weights_of: A of products q . k [B, Hq, rows, keys] and a slice of the rows.
    """
    mass = torch.zeros(query.shape[:3], dtype=geometry.accumulator, device=query.device)
    if geometry.packing is None:
        return _add_sink_mass_(
            mass, query, key, geometry, statistic, lambda products: weights_of(products, slice(None))
        )
    for queries, keys, alone in geometry.sequences():

        def of_rows(products: Tensor, rows: slice = queries) -> Tensor:
            return weights_of(products, rows)

        _add_sink_mass_(mass[:, :, queries], query[:, :, queries], key[:, :, keys], alone, statistic, of_rows)
    return mass


def _add_sink_mass_(
    mass: Tensor,
    query: Tensor,
    key: Tensor,
    geometry: Geometry,
    statistic: SinkMass,
    weights_of: Callable[[Tensor], Tensor],
) -> Tensor:
    gathered_keys = min(max(statistic.count, FEWEST_KEYS), geometry.key_length)
    place = torch.arange(gathered_keys, dtype=torch.int64, device=geometry.device).expand(geometry.batch, gathered_keys)
    first, is_counted = place, place < statistic.count
    if geometry.key_mask is not None:
        first = geometry.key_mask.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[:, :gathered_keys]
        is_counted = is_counted & geometry.key_mask.gather(1, first)
    position = torch.arange(geometry.query_length, dtype=torch.int64, device=geometry.device)[:, None] + geometry.offset
    query = query.to(geometry.accumulator)
    for keys, counted in zip(first.split(FIRST_KEYS, 1), is_counted.split(FIRST_KEYS, 1), strict=True):
        visible = counted[:, None]
        inside = within(position - keys[:, None], geometry.left, geometry.right)
        if inside is not None:
            visible = visible & inside
        index = keys[:, None, :, None].expand(-1, geometry.key_heads, -1, geometry.head_dim)
        gathered = key.gather(2, index).to(geometry.accumulator).repeat_interleave(geometry.group, dim=1)
        mass += weights_of(query @ gathered.mT).masked_fill(~visible[:, None], 0.0).sum(-1)
    return mass
