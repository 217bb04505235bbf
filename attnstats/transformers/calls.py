"""One attention call of a transformers model, as `attnstats.attention` or `varlen_attention` computes it.

An `AttentionCall` joins the tensors with the `MaskDescription` of masks.py: windows and padding become arguments,
packed rows and chunks become packed sequences, and a mask that isn't understood is an error or, where that is allowed,
goes through the eager reference. The observer of a model says which statistics to compute on the way.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from attnstats.core import arguments
from attnstats.core.geometry import AttentionResult
from attnstats.errors import InputError
from attnstats.functional import Backend, attention, statistics_from_lse, varlen_attention
from attnstats.statistics import ColumnStatistic, DistanceWeighted, SinkMass, Statistic, Statistics, is_mean, summed
from attnstats.transformers.masks import MaskDescription

NO_HEADS: Mapping[Statistic, tuple[int, ...]] = {}  # every statistic of all heads


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """The tensors (B, H, T, D) of one call, its mask, and what else goes into a score.

    Attributes:
        where: how errors name the call.
        cross: queries and keys are different sequences, so that distances mean nothing.
        scores: scale, softcap and sinks of `attnstats.attention`.
        dropout_p: likewise; statistics from an lse don't take it.
        bias: (1 | B, Hq, Tq, Tk), added to the scores; None: nothing is.
        real_queries: (B, Tq) bool, the queries of cross-attention that aren't padding; None: all.
    """

    where: str
    query: Tensor
    key: Tensor
    value: Tensor
    mask: MaskDescription
    cross: bool = False
    scores: dict[str, Any] = field(default_factory=dict)
    bias: Tensor | None = None
    backend: Backend = "auto"
    allow_dense: bool = False
    real_queries: Tensor | None = None
    dropout_p: float = 0.0

    @property
    def begin(self) -> int:
        """Position of the first query, which is also how many came before it."""
        return self.mask.query_offset

    @property
    def end(self) -> int:
        return self.mask.query_offset + self.query.shape[2]

    @property
    def first_key(self) -> int:
        """Position of the first key that is there; a sliding cache has dropped those before."""
        return self.mask.key_offset

    def attend(
        self,
        statistics: tuple[Statistic, ...] = (),
        query_mask: Tensor | None = None,
        heads: Mapping[Statistic, tuple[int, ...]] = NO_HEADS,
    ) -> AttentionResult:
        """Output (B, Hq, Tq, Dv) and statistics, columns over the keys `first_key .. end`."""
        mask = self.mask
        if (mask.query_length, mask.key_length) != (self.query.shape[2], self.key.shape[2]):
            raise InputError(
                f"{self.where} has {self.query.shape[2]} queries and {self.key.shape[2]} keys, but its mask was made "
                f"for {mask.query_length} and {mask.key_length}; attention_mask must be (B, T) with T the cached and "
                "new tokens together"
            )
        if mask.chunks is not None or mask.key_offset > 0:
            self._check(statistics)
        if self.bias is not None or mask.unknown:
            return self._attend_dense(statistics, query_mask, heads)
        if mask.segments is not None or mask.chunks is not None:
            return self._attend_packed(statistics, query_mask, heads)
        key, value = self._used()
        return attention(
            self.query,
            key,
            value,
            statistics=statistics,
            query_mask=query_mask,
            heads=heads or None,
            dropout_p=self.dropout_p,
            backend=self.backend,
            **self._arguments(),
            **self.scores,
        )

    def last(self, rows: int) -> AttentionCall:
        """The call of its last queries alone, without dropout; it keeps no more of the queries alive."""
        mask, dense = self.mask, self.mask.dense
        of_rows = replace(
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
            mask=of_rows,
            bias=bias,
            dropout_p=0.0,
        )

    def can_skip_keys(self, reach: int) -> bool:
        """True if `near` would look at less than all keys."""
        mask = self.mask
        plain = self.bias is None and not mask.unknown and mask.segments is None and mask.chunks is None
        return plain and not self.cross and self.end - self.first_key > reach + self.query.shape[2]

    def near(
        self,
        lse: Tensor,
        statistics: tuple[Statistic, ...],
        reach: int,
        query_mask: Tensor | None,
        heads: Mapping[Statistic, tuple[int, ...]],
    ) -> tuple[int, Statistics]:
        """Band statistics off the last keys alone, and the position of the first of these keys."""
        key, _ = self._used()
        skipped = max(0, self.begin - reach - self.first_key)
        settings = self._arguments() | self.scores
        settings["query_offset"] -= skipped
        if settings["key_padding_mask"] is not None:
            settings["key_padding_mask"] = settings["key_padding_mask"][:, skipped:]
        results = statistics_from_lse(
            self.query,
            key[:, :, skipped:],
            lse,
            statistics=statistics,
            query_mask=query_mask,
            heads=heads or None,
            backend=self.backend,
            **settings,
        )
        return self.first_key + skipped, results

    def _check(self, statistics: tuple[Statistic, ...]) -> None:
        """Raise InputError for statistics of first or last tokens that chunks or a sliding cache hide."""
        for s in statistics:
            if self.mask.chunks is not None and (
                isinstance(s, SinkMass) or (isinstance(s, ColumnStatistic) and s.last_queries is not None)
            ):
                raise InputError(
                    f"{self.where} attends within chunks, and {s} would be each chunk's own; capture layers of "
                    "full attention, or leave it out"
                )
            if self.first_key > 0 and isinstance(s, SinkMass):
                raise InputError(
                    f"{self.where} has a sliding cache that has dropped the first keys, which SinkMass looks at; leave "
                    "SinkMass out, or run the whole sequence in one pass"
                )

    def _used(self) -> tuple[Tensor, Tensor]:
        """Keys and values without the unused slots of a static cache."""
        used = self.mask.used_keys
        if used == self.key.shape[2]:
            return self.key, self.value
        return self.key[:, :, :used], self.value[:, :, :used]

    def _arguments(self) -> dict[str, Any]:
        """The mask as arguments of `attnstats.attention`, made once for all layers that share it."""
        device = self.key.device
        cached: dict[str, Any] | None = self.mask.memo.get((self.cross, device))
        if cached is None:
            cached = self.mask.memo[self.cross, device] = _arguments(self.mask, self.cross, device)
        return cached

    def _attend_dense(
        self,
        statistics: tuple[Statistic, ...],
        query_mask: Tensor | None,
        heads: Mapping[Statistic, tuple[int, ...]],
    ) -> AttentionResult:
        """Through the eager reference, which holds the map."""
        reasons = []
        if self.mask.unknown:
            reasons.append(f"the attention mask {' with '.join(self.mask.unknown)}")
        if self.bias is not None:
            reasons.append(f"a position bias {tuple(self.bias.shape)} added to its scores")
        what = f"{self.where} has {' and '.join(reasons)}"
        if not self.allow_dense:
            raise InputError(
                f"{what}, which has no description in O(T) memory; pass allow_dense=True to compute it on the whole "
                "map, eagerly"
            )
        warnings.warn(f"{what}: computed on the whole map, eagerly, in O(Tq * Tk) memory", RuntimeWarning, stacklevel=2)
        settings = self._arguments() | self.scores
        settings |= {"is_causal": False, "window_size": None, "attn_mask": self._dense_mask()}
        if settings["key_padding_mask"] is not None and self.mask.used_keys < self.key.shape[2]:
            settings["key_padding_mask"] = self.mask.key_mask
        return attention(
            self.query,
            self.key,
            self.value,
            statistics=statistics,
            query_mask=query_mask,
            heads=heads or None,
            dropout_p=self.dropout_p,
            backend="reference",
            **settings,
        )

    def _dense_mask(self) -> Tensor:
        """(B, H | 1, Tq, Tk), bool or additive, with the position bias."""
        assert self.mask.dense is not None or not self.mask.unknown
        dtype = self.query.dtype
        rows = torch.arange(self.query.shape[2], device=self.query.device)
        mask = self.mask.dense() if self.mask.unknown and self.mask.dense else self.mask.visible(rows)[:, None]
        mask = mask[..., : self.mask.key_length].to(self.query.device)
        if self.bias is not None:
            bias = self.bias.to(dtype)
            return bias.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else bias + mask
        if mask.dtype == torch.bool:
            return mask
        return mask.to(dtype).masked_fill(mask <= torch.finfo(mask.dtype).min, -torch.inf)

    # Packed rows and chunks

    def _attend_packed(
        self,
        statistics: tuple[Statistic, ...],
        query_mask: Tensor | None,
        heads: Mapping[Statistic, tuple[int, ...]],
    ) -> AttentionResult:
        if self.cross:
            raise InputError(f"{self.where} is cross-attention in blocks, which cannot be computed")
        batch, _, length, _ = self.query.shape
        key, value = self._used()
        cu_seqlens_q, cu_seqlens_k = self._boundaries()
        query_packed, key_packed, value_packed = (x.transpose(1, 2).flatten(0, 1) for x in (self.query, key, value))
        chunked = self.mask.chunks is not None
        # A chunk hides keys from queries, but these queries still count: the mean over T(s) is taken afterwards.
        sums = {s: summed(s) if chunked else s for s in statistics}
        if query_mask is None:
            query_mask = self.mask.real_queries
        output, results = varlen_attention(
            query_packed,
            key_packed,
            value_packed,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
            statistics=tuple(sums.values()),
            query_mask=None if query_mask is None else query_mask.flatten(),
            heads={sums[s]: of_s for s, of_s in heads.items()} or None,
            is_causal=self.mask.right == 0,
            window_size=(self.mask.left, self.mask.right),
            enable_gqa=True,
            backend=self.backend,
            dropout_p=self.dropout_p,
            **self.scores,
        )

        def rows(x: Tensor) -> Tensor:  # (H, B * T) to (B, H, T)
            return x.unflatten(-1, (batch, -1)).movedim(-2, 0)

        tensors = {s: rows(results[sums[s]]) for s in statistics}
        output = output.unflatten(0, (batch, length)).transpose(1, 2)
        if not chunked:

            def of_batch(x: Tensor) -> Tensor:  # (B * T) to (B, T)
                return x.unflatten(-1, (batch, -1))

            unpacked = Statistics(
                tensors, lambda s: of_batch(results.valid[s]), lambda s: of_batch(results.counts[s]), rows(results.lse)
            )
            return AttentionResult(output, unpacked)
        settings = self._arguments() | self.scores
        whole = arguments.resolve(self.query, key, None, statistics, **settings, query_mask=query_mask)
        tensors = {s: whole.finish(s, x) if is_mean(s) else x for s, x in tensors.items()}
        return AttentionResult(output, Statistics(tensors, whole.validity, whole.counts, rows(results.lse)))

    def _boundaries(self) -> tuple[Tensor, Tensor]:
        """cu_seqlens of queries and of keys of all batch rows laid end to end, int32."""
        cached = self.mask.memo.get("boundaries")
        if cached is None:
            cached = self.mask.memo["boundaries"] = _boundaries(self.mask, self.query.shape[0], self.where)
        return cached[0].to(self.query.device), cached[1].to(self.query.device)


def _arguments(mask: MaskDescription, cross: bool, device: torch.device) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "is_causal": mask.right == 0,
        "window_size": (mask.left, mask.right),
        "query_offset": mask.query_offset - mask.key_offset,
        "key_padding_mask": None if mask.key_mask is None else mask.key_mask[:, : mask.used_keys].to(device),
        "enable_gqa": True,
    }
    if cross:  # a padded key is no query
        key_mask = settings["key_padding_mask"]
        settings |= {"query_offset": None, "key_padding_mask": None}
        settings["attn_mask"] = None if key_mask is None else key_mask[:, None, None]
    return settings


def _boundaries(mask: MaskDescription, batch: int, where: str) -> tuple[Tensor, Tensor]:
    """Each batch row is a list of blocks, its padding before and after among them: as queries that see no key."""
    query = torch.arange(mask.query_length) + mask.query_offset
    key = torch.arange(mask.used_keys) + mask.key_offset
    key_mask = torch.ones(batch, len(key), dtype=torch.bool)
    if mask.key_mask is not None:
        key_mask = mask.key_mask[:, : mask.used_keys].cpu()
    lengths: list[tuple[int, int]] = []
    for row in range(batch):
        if mask.segments is not None:
            of_key = mask.segments[row % len(mask.segments)].cpu()
            of_query = of_key
        else:
            assert mask.chunks is not None
            first = int(mask.chunks.first[row])
            of_query, of_key = (query - first) // mask.chunks.size, (key - first) // mask.chunks.size
        real = key_mask[row].nonzero().flatten()
        begin = int(real[0]) if len(real) else len(key)
        end = int(real[-1]) + 1 if len(real) else len(key)
        if end - begin != len(real):
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
    """How far behind a query these band statistics look."""
    bands = [s.band for s in statistics if isinstance(s, DistanceWeighted) and s.band is not None]
    return max((hi for _, hi in bands), default=0)
