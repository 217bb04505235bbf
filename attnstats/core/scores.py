"""Pieces of a score that every plain PyTorch loop shares."""

from __future__ import annotations

import torch
from torch import Tensor

from attnstats.core.geometry import Geometry, divisor_of
from attnstats.core.visibility import within
from attnstats.statistics import SinkMass

FIRST_KEYS = 64  # first keys that are gathered together


def softcap_(scores: Tensor, softcap: float | None) -> Tensor:
    """`softcap * tanh(scores / softcap)` in place; None: unchanged."""
    return scores if softcap is None else scores.div_(softcap).tanh_().mul_(softcap)


def with_sinks(lse: Tensor, sinks: Tensor) -> Tensor:
    """The lse [.., H, T] of the keys with the sinks [H] counted; a row that sees no key keeps -inf."""
    counted = torch.logaddexp(lse, sinks.to(lse.dtype)[:, None])
    return torch.where(lse == -torch.inf, lse, counted)


def sink_gradient(lse: Tensor, delta: Tensor, geometry: Geometry) -> Tensor | None:
    """[Hq] the gradient for the sinks from delta (B, Hq, Tq), the row sums of A dA; None without sinks."""
    if geometry.sinks is None:
        return None
    share = (geometry.sinks.to(lse.dtype)[:, None] - divisor_of(lse)).exp()
    return -(share * delta).sum((0, 2)).to(geometry.sinks.dtype)


def sink_mass(query: Tensor, key: Tensor, lse: Tensor, geometry: Geometry, statistic: SinkMass) -> Tensor:
    """The mass on the first keys of each sequence, at most `count`, which are gathered; no other key is read."""
    if geometry.packing is not None:
        mass = torch.zeros_like(lse)
        for queries, keys, alone in geometry.sequences():
            mass[:, :, queries] = sink_mass(query[:, :, queries], key[:, :, keys], lse[:, :, queries], alone, statistic)
        return mass
    count = min(statistic.count, geometry.key_length)
    if geometry.key_mask is None:
        first = torch.arange(count, device=geometry.device, dtype=torch.int64).expand(geometry.batch, count)
        is_key = torch.ones_like(first, dtype=torch.bool)
    else:
        first = geometry.key_mask.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[:, :count]
        is_key = geometry.key_mask.gather(1, first)
    position = torch.arange(geometry.query_length, device=geometry.device, dtype=torch.int64)[:, None] + geometry.offset
    divisor = divisor_of(lse)[..., None]
    scaled = query.to(geometry.accumulator) * geometry.scale
    mass = torch.zeros_like(lse)
    for keys, keys_exist in zip(first.split(FIRST_KEYS, 1), is_key.split(FIRST_KEYS, 1), strict=True):
        visible = keys_exist[:, None]
        inside = within(position - keys[:, None], geometry.left, geometry.right)
        if inside is not None:
            visible = visible & inside
        index = keys[:, None, :, None].expand(-1, geometry.key_heads, -1, geometry.head_dim)
        gathered = key.gather(2, index).to(geometry.accumulator).repeat_interleave(geometry.group, dim=1)
        scores = softcap_(scaled @ gathered.mT, geometry.softcap)
        mass += scores.masked_fill_(~visible[:, None], -torch.inf).sub_(divisor).exp_().sum(-1)
    return mass
