"""One attention call of a transformers model, as `attnstats.attention` or `varlen_attention` computes it.

A `Call` joins the tensors with the `MaskDescription` of masks.py: windows and padding become arguments, packed rows and
chunks become packed sequences, and a mask that isn't understood is an error or, where that is allowed, goes through the
eager reference. Made by hooks.py, used by capture.py, which says what statistics to compute on the way.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from attnstats.core import arguments
from attnstats.core.options import Options
from attnstats.errors import InputError
from attnstats.functional import Backend, attention, statistics_from_lse, varlen_attention
from attnstats.results import AttentionResult, Statistics
from attnstats.statistics import ColumnStatistic, DistanceWeighted, SinkMass, Statistic
from attnstats.transformers.masks import MaskDescription

Heads = Mapping[Statistic, tuple[int, ...]]


@dataclass(frozen=True, eq=False)
class Call:
    """The tensors (B, H, T, D) of one call, who sees whom, and what else goes into a score.

    Attributes:
        where: how errors name the call.
        across: queries and keys are different sequences, so that distances mean nothing (cross-attention).
        settings: scale, softcap and sinks of `attnstats.attention`.
        dropout_p: likewise; statistics from an lse don't take it.
        bias: (1 | B, Hq, Tq, Tk), added to the scores; None: nothing is.
        target: (B, Tq) bool, which queries of cross-attention aren't padding; None: all.
    """

    where: str
    query: Tensor
    key: Tensor
    value: Tensor
    mask: MaskDescription
    across: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)
    bias: Tensor | None = None
    backend: Backend = "auto"
    allow_dense: bool = False
    target: Tensor | None = None
    dropout_p: float = 0.0

    @property
    def begin(self) -> int:
        """Position of the first query, which is also how many came before it."""
        return self.mask.query_offset

    @property
    def end(self) -> int:
        return self.begin + self.query.shape[2]

    @property
    def first_key(self) -> int:
        """Position of the first key that is there; a sliding cache has dropped those before."""
        return self.mask.key_offset

    @property
    def real(self) -> Tensor | None:
        """(B, keys) bool, False where a key is padding; None: none is."""
        return None if self.mask.padding is None else self.mask.padding[:, : self.mask.seen]

    def attend(
        self, statistics: tuple[Statistic, ...] = (), query_mask: Tensor | None = None, heads: Heads | None = None
    ) -> AttentionResult:
        """Output (B, Hq, Tq, Dv) and statistics, columns over the keys `first_key .. end`."""
        self._check()
        if self.mask.chunks is not None:
            for s in statistics:
                if isinstance(s, SinkMass) or (isinstance(s, ColumnStatistic) and s.last_queries is not None):
                    raise InputError(
                        f"{self.where} attends within chunks, and {s} would be each chunk's own; capture layers of "
                        "full attention, or leave it out"
                    )
        if self.first_key > 0 and any(isinstance(s, SinkMass) for s in statistics):
            raise InputError(
                f"{self.where} has a sliding cache that has dropped the first keys, which SinkMass looks at; leave "
                "SinkMass out, or run the whole sequence in one pass"
            )
        asked: dict[str, Any] = {"statistics": statistics, "query_mask": query_mask, "heads": heads or None}
        if self.bias is not None or self.mask.unknown:
            return self._dense(asked)
        if self.mask.segments is not None or self.mask.chunks is not None:
            return self._packed(asked)
        key, value = self._seen()
        others = self._arguments() | asked
        return attention(self.query, key, value, **others, dropout_p=self.dropout_p, backend=self.backend)

    def last(self, rows: int) -> Call:
        """The call of its last queries alone, without dropout; it keeps no more of the queries alive."""
        mask, dense = self.mask, self.mask.dense
        some = replace(
            mask,
            query_offset=self.end - rows,
            query_length=rows,
            dense=None if dense is None else lambda: dense()[..., -rows:, :],
            memo={},
        )
        query = self.query if rows == self.query.shape[2] else self.query[:, :, -rows:].clone()
        bias = None if self.bias is None else self.bias[..., -rows:, :]
        return replace(
            self,
            query=query.detach(),
            key=self.key.detach(),
            value=self.value.detach(),
            mask=some,
            bias=bias,
            dropout_p=0.0,
        )

    def can_look_near(self, reach: int) -> bool:
        """Whether `near` would look at less than all keys."""
        mask = self.mask
        plain = self.bias is None and not mask.unknown and mask.segments is None and mask.chunks is None
        return plain and not self.across and self.end - self.first_key > reach + self.query.shape[2]

    def near(
        self, lse: Tensor, statistics: tuple[Statistic, ...], reach: int, query_mask: Tensor | None, heads: Heads | None
    ) -> tuple[int, Statistics]:
        """Band statistics off the last keys alone, and the position of the first of them."""
        key, _ = self._seen()
        skipped = max(0, self.begin - reach - self.first_key)
        others = self._arguments()
        others["query_offset"] -= skipped
        if others["key_padding_mask"] is not None:
            others["key_padding_mask"] = others["key_padding_mask"][:, skipped:]
        found = statistics_from_lse(
            self.query,
            key[:, :, skipped:],
            lse,
            statistics=statistics,
            query_mask=query_mask,
            heads=heads or None,
            backend=self.backend,
            **others,
        )
        return self.first_key + skipped, found

    def _seen(self) -> tuple[Tensor, Tensor]:
        seen = self.mask.seen
        if seen == self.key.shape[2]:
            return self.key, self.value
        return self.key[:, :, :seen], self.value[:, :, :seen]

    def _check(self) -> None:
        announced = (self.mask.query_length, self.mask.key_length)
        arrived = (self.query.shape[2], self.key.shape[2])
        if announced != arrived:
            raise InputError(
                f"{self.where} has {arrived[0]} queries and {arrived[1]} keys, but its mask was made for "
                f"{announced[0]} and {announced[1]}; attention_mask must be (B, T) with T the cached and new tokens "
                "together"
            )

    def _arguments(self) -> dict[str, Any]:
        mask = self.mask
        real = self.real
        geometry: dict[str, Any] = {
            "is_causal": mask.is_causal,
            "window_size": mask.window_size,
            "query_offset": mask.query_offset - mask.key_offset,
            "key_padding_mask": None if real is None else real.to(self.key.device),
            "enable_gqa": True,
        }
        if self.across:  # a padded key is no query
            geometry |= {"query_offset": None, "key_padding_mask": None}
            geometry["attn_mask"] = None if real is None else real.to(self.key.device)[:, None, None]
        return geometry | dict(self.settings)

    def _dense(self, asked: dict[str, Any]) -> AttentionResult:
        """Through the eager reference, which holds the map."""
        what = f"the attention mask {' with '.join(self.mask.unknown)}" if self.mask.unknown else ""
        if self.bias is not None:
            what = " and ".join(filter(None, (what, f"a position bias {tuple(self.bias.shape)} added to its scores")))
        if not self.allow_dense:
            raise InputError(
                f"{self.where} has {what}, which has no description in O(T) memory; pass allow_dense=True to compute "
                "it on the whole map, eagerly"
            )
        message = f"{self.where} has {what}: computed on the whole map, eagerly, in O(Tq * Tk) memory"
        warnings.warn(message, RuntimeWarning, stacklevel=2)
        assert self.mask.dense is not None or not self.mask.unknown
        rows = torch.arange(self.query.shape[2], device=self.query.device)
        mask = self.mask.dense() if self.mask.unknown and self.mask.dense else self.mask.visible(rows)[:, None]
        mask = mask[..., : self.mask.key_length].to(self.query.device)
        if self.bias is not None:
            if mask.dtype == torch.bool:
                mask = self.bias.to(self.query.dtype).masked_fill(~mask, -torch.inf)
            else:
                mask = self.bias.to(self.query.dtype) + mask
        elif mask.dtype != torch.bool:
            mask = mask.to(self.query.dtype).masked_fill(mask <= torch.finfo(mask.dtype).min, -torch.inf)
        arguments = self._arguments() | {"is_causal": False, "window_size": None, "attn_mask": mask}
        if arguments["key_padding_mask"] is not None and self.mask.seen < self.key.shape[2]:
            arguments["key_padding_mask"] = self.mask.padding
        others = arguments | asked
        others |= {"dropout_p": self.dropout_p, "backend": "reference"}
        return attention(self.query, self.key, self.value, **others)

    # Packed rows and chunks

    def _packed(self, asked: dict[str, Any]) -> AttentionResult:
        if self.across:
            raise InputError(f"{self.where} is cross-attention in blocks, which cannot be computed")
        batch, _, length, _ = self.query.shape
        key, value = self._seen()
        boundaries = self._boundaries()
        flat = [x.transpose(1, 2).flatten(0, 1) for x in (self.query, key, value)]
        statistics = asked["statistics"]
        chunked = self.mask.chunks is not None
        # A chunk hides keys from queries, but these queries still count: the mean over T(s) is taken afterwards.
        sums = {s: s.summed if chunked else s for s in statistics}
        query_mask = asked["query_mask"]
        if query_mask is None and self.mask.padding is not None:
            query_mask = self.mask.real_queries
        output, found = varlen_attention(
            *flat,
            cu_seqlens_q=boundaries[0],
            cu_seqlens_k=boundaries[1],
            statistics=tuple(sums.values()),
            query_mask=None if query_mask is None else query_mask.flatten(),
            heads=None if asked["heads"] is None else {sums[s]: heads for s, heads in asked["heads"].items()},
            is_causal=self.mask.is_causal,
            window_size=self.mask.window_size,
            enable_gqa=True,
            backend=self.backend,
            dropout_p=self.dropout_p,
            **self.settings,
        )

        def rows(x: Tensor) -> Tensor:  # (H, B * T) to (B, H, T)
            return x.unflatten(-1, (batch, -1)).movedim(-2, 0)

        tensors = {s: rows(found[sums[s]]) for s in statistics}
        output = output.unflatten(0, (batch, length)).transpose(1, 2)
        if not chunked:

            def of_batch(x: Tensor) -> Tensor:  # (B * T) to (B, T)
                return x.unflatten(-1, (batch, -1))

            results = Statistics(
                tensors, lambda s: of_batch(found.valid[s]), lambda s: of_batch(found.counts[s]), rows(found.lse)
            )
            return AttentionResult(output, results)
        whole = arguments.resolve(
            self.query, key, None, Options(statistics=statistics, **self._arguments(), query_mask=query_mask)
        )
        tensors = {s: whole.finish(s, x) if s.is_mean else x for s, x in tensors.items()}
        return AttentionResult(output, Statistics(tensors, whole.validity, whole.counts, rows(found.lse)))

    def _boundaries(self) -> tuple[Tensor, Tensor]:
        """cu_seqlens of queries and of keys of all batch rows laid end to end, int32."""
        known = self.mask.memo.get("boundaries")
        if known is None:
            known = self.mask.memo["boundaries"] = _boundaries(self.mask, self.query.shape[0], self.where)
        return known[0].to(self.query.device), known[1].to(self.query.device)


def _boundaries(mask: MaskDescription, batch: int, where: str) -> tuple[Tensor, Tensor]:
    """Each batch row is a list of blocks, its padding before and after among them: as queries that see no key."""
    query = torch.arange(mask.query_length) + mask.query_offset
    key = torch.arange(mask.seen) + mask.key_offset
    real = torch.ones(batch, len(key), dtype=torch.bool)
    if mask.padding is not None:
        real = mask.padding[:, : mask.seen].cpu()
    lengths: list[tuple[int, int]] = []
    for row in range(batch):
        if mask.segments is not None:
            of_key = mask.segments[row % len(mask.segments)].cpu()
            of_query = of_key
        else:
            assert mask.chunks is not None
            first = int(mask.chunks.first[row])
            of_query, of_key = (query - first) // mask.chunks.size, (key - first) // mask.chunks.size
        present = real[row].nonzero().flatten()
        begin = int(present[0]) if len(present) else len(key)
        end = int(present[-1]) + 1 if len(present) else len(key)
        if end - begin != len(present):
            raise InputError(
                f"{where} has padding between the real tokens of batch row {row} and attends in blocks, which cannot "
                "be computed; pad on one side"
            )
        blocks = torch.unique(torch.cat([of_key[begin:end], of_query]))
        inside = (query >= key[begin]) & (query <= key[end - 1]) if begin < end else torch.zeros_like(query).bool()
        before = int((query < key[begin]).sum()) if begin < end else len(query)
        lengths += [(before, 0), (0, begin)]
        lengths += [(int((of_query[inside] == b).sum()), int((of_key[begin:end] == b).sum())) for b in blocks.tolist()]
        lengths += [(len(query) - before - int(inside.sum()), 0), (0, len(key) - end)]
    sums = torch.tensor([(0, 0), *lengths]).cumsum(0).int()
    return sums[:, 0].contiguous(), sums[:, 1].contiguous()


def reach_of(statistics: tuple[Statistic, ...]) -> int:
    """How far behind a query its band statistics look."""
    bands = [s.band for s in statistics if isinstance(s, DistanceWeighted) and s.band is not None]
    return max((hi for _, hi in bands), default=0)
