"""One attention call of a transformers model, as `attnstats.attention` or `varlen_attention` computes it.

An `AttentionCall` joins the tensors with the `MaskDescription` of masks.py in one `Options`: windows and padding are
set there, packed rows and chunks become packed sequences, and a mask that isn't understood is an error or, where that
is allowed, goes through the eager reference. The observer of a model makes the `Request` for statistics.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from attnstats import functional
from attnstats.core.merging import as_mean
from attnstats.core.options import Options
from attnstats.errors import InputError
from attnstats.results import AttentionResult, Statistics
from attnstats.statistics import SegmentMass, Statistic
from attnstats.transformers import blocks
from attnstats.transformers.masks import MaskDescription, is_unreadable


class Request(NamedTuple):
    """The statistics that a call computes beside its output.

    Attributes:
        query_mask: (B, Tq) bool, the queries that count in column statistics; None: all.
        query_weight: (B, Tq) how much each of them counts; None: 1.
        segment_boundaries: (B, S + 1) those of SegmentMass(); None: there are none.
        heads: of each statistic that is computed for some heads only; None: there is none.
    """

    statistics: tuple[Statistic, ...] = ()
    query_mask: Tensor | None = None
    query_weight: Tensor | None = None
    segment_boundaries: Tensor | None = None
    heads: dict[Statistic, tuple[int, ...]] | None = None

    def only(self, statistics: tuple[Statistic, ...]) -> Request:
        """The request for some of its statistics."""
        heads = {s: heads for s, heads in (self.heads or {}).items() if s in statistics}
        takes_bounds = SegmentMass() in statistics
        bounds = self.segment_boundaries if takes_bounds else None
        return self._replace(statistics=statistics, heads=heads or None, segment_boundaries=bounds)

    def summed(self) -> Request:
        """The request for the sums of means, which add up over parts of the queries."""
        heads = {s.summed: heads for s, heads in (self.heads or {}).items()}
        return self._replace(statistics=tuple([s.summed for s in self.statistics]), heads=heads or None)


NO_STATISTICS = Request()


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """The tensors (B, H, T, D) of one call, its mask, and the other settings of its scores.

    Attributes:
        where: how errors name the call.
        options: scale, softcap, sinks, dropout and backend.
        cross: queries and keys are different sequences, so that distances mean nothing.
        bias: (1 | B, Hq, Tq, Tk), added to the scores; None: no bias.
        real_queries: (B, Tq) bool, the queries of cross-attention that aren't padding; None: all.
    """

    where: str
    query: Tensor
    key: Tensor
    value: Tensor
    mask: MaskDescription
    options: Options
    cross: bool = False
    bias: Tensor | None = None
    allow_dense: bool = False
    real_queries: Tensor | None = None

    has_own_keys: ClassVar[bool] = False  # True where other layers may have keys at other positions

    @property
    def begin(self) -> int:
        """Position of the first query, which is the number of tokens before it."""
        assert not isinstance(self.mask.query_offset, Tensor)
        return self.mask.query_offset

    @property
    def end(self) -> int:
        return self.begin + self.query.shape[2]

    @property
    def first_key(self) -> int:
        """Position of the first key; a sliding cache has dropped those before."""
        return self.mask.key_offset

    @property
    def earlier_keys(self) -> Tensor | None:
        """(B, T) bool, T >= begin, False where a token before the first query is padding; None: none is."""
        mask = self.mask.attention_mask
        return None if mask is None else mask[:, : self.begin]

    def attend(self, request: Request = NO_STATISTICS) -> AttentionResult:
        """Output (B, Hq, Tq, Dv) and statistics, columns over the keys `first_key .. end`."""
        mask = self.mask
        if (mask.query_length, mask.key_length) != (self.query.shape[2], self.key.shape[2]):
            raise InputError(
                f"{self.where} has {self.query.shape[2]} queries and {self.key.shape[2]} keys, but its mask was made "
                f"for {mask.query_length} and {mask.key_length}; {self._cause_of_other_lengths()}"
            )
        if mask.chunks is not None or mask.key_offset > 0:
            self._check(request.statistics)
        options = self._options(request)
        if self.bias is not None or mask.unknown:
            return self._attend_dense(options)
        if isinstance(mask.query_offset, Tensor) and self.query.shape[2] == 1 and not request.statistics:
            return self._attend_single(options)
        if mask.segments is not None or mask.chunks is not None:
            return self._attend_packed(request, options)
        return functional.attend(self.query, *self._used(), options)

    def last(self, rows: int) -> AttentionCall:
        """The call of its last queries alone, without dropout; keeps neither the others nor the caller's mask alive."""
        mask, dense = self.mask, None
        if mask.unknown and mask.dense is not None:
            of_last = mask.dense()[..., -rows:, :].clone()
            dense = lambda: of_last  # noqa: E731
        of_rows = replace(
            mask,
            query_offset=mask.query_offset + mask.query_length - rows,
            query_length=rows,
            dense=dense,
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
            options=self.options._replace(dropout_p=0.0),
            bias=bias,
        )

    def _cause_of_other_lengths(self) -> str:
        offset = self.mask.query_offset
        if not isinstance(offset, Tensor) and 0 < offset == self.mask.key_offset:  # no cached key is in the window
            return (
                "in a sliding window of 1 token, transformers' dynamic cache keeps every key, and the model attends to "
                "all of them; pass cache_implementation='static', or set sliding_window to 2 or more"
            )
        return "attention_mask must be (B, T) with T the cached and new tokens together"

    def _check(self, statistics: tuple[Statistic, ...]) -> None:
        """Raise InputError for statistics of first or last tokens, or that number keys from the first one on, where
        chunks or a sliding cache hide these."""
        for s in statistics:
            numbers = s.method in ("first_keys", "segments", "top")
            if self.mask.chunks is not None and (numbers or s.last_queries is not None):
                raise InputError(
                    f"{self.where} attends within chunks, and {s} would be each chunk's own; capture layers of "
                    "full attention, or leave it out"
                )
            if self.first_key > 0 and numbers:
                kind = type(s).__name__
                raise InputError(
                    f"{self.where} has a sliding cache that has dropped the first keys, from which {kind} counts; "
                    f"leave it out, or run the whole sequence in one pass"
                )

    def _used(self) -> tuple[Tensor, Tensor]:
        """Keys and values without the unused slots of a static cache."""
        used = self.mask.readable_keys
        if used == self.key.shape[2]:
            return self.key, self.value
        return self.key[:, :, :used], self.value[:, :, :used]

    def _options(self, request: Request) -> Options:
        """The options with the request and those of the mask, which are made once for all layers that share it."""
        key = self.cross, self.key.device
        # What a graph writes into an object becomes one of its outputs.
        of_mask = None if torch.compiler.is_compiling() else self.mask.memo.get(key)
        if of_mask is None:
            of_mask = _options_of(self.mask, *key)
            if not torch.compiler.is_compiling():
                self.mask.memo[key] = of_mask
        return self.options._replace(**request._asdict(), **of_mask)

    def _attend_dense(self, options: Options) -> AttentionResult:
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
        if not torch.compiler.is_compiling():  # where a warning can't be traced
            message = f"{what}: computed on the whole map, eagerly, in O(Tq * Tk) memory"
            warnings.warn(message, RuntimeWarning, stacklevel=2)
        key_mask = self.mask.key_mask if options.key_padding_mask is not None else None
        options = options._replace(
            is_causal=False,
            window_size=None,
            attn_mask=self._dense_mask(),
            key_padding_mask=None if key_mask is None else key_mask.to(self.key.device),
            backend="reference",
        )
        return functional.attend(self.query, self.key, self.value, options)

    def _dense_mask(self) -> Tensor:
        """(B, H | 1, Tq, Tk), bool or additive, with the position bias."""
        assert self.mask.dense is not None or not self.mask.unknown
        dtype = self.query.dtype
        rows = torch.arange(self.query.shape[2], device=self.query.device, dtype=torch.int64)
        mask = self.mask.dense() if self.mask.unknown and self.mask.dense else self.mask.visible(rows)[:, None]
        mask = mask[..., : self.mask.key_length].to(self.query.device)
        if self.bias is not None:
            bias = self.bias.to(dtype)
            return bias.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else bias + mask
        if mask.dtype == torch.bool:
            return mask
        return mask.to(dtype).masked_fill(mask <= torch.finfo(mask.dtype).min, -torch.inf)

    def _attend_single(self, options: Options) -> AttentionResult:
        """Of a single query whose place is a tensor: by the keys that it sees, which takes no look at that number."""
        seen = self.mask.visible(torch.zeros(1, dtype=torch.long, device=self.key.device))[:, 0]
        options = options._replace(
            is_causal=False,
            window_size=None,
            position=None,
            query_offset=None,
            key_padding_mask=seen.expand(self.query.shape[0], -1),
        )
        return functional.attend(self.query, self.key, self.value, options)

    # Packed rows and chunks

    def _attend_packed(self, request: Request, options: Options) -> AttentionResult:
        if self.cross:
            raise InputError(f"{self.where} is cross-attention in blocks, which cannot be computed")
        if options.segment_boundaries is not None:
            raise InputError(
                f"segment_boundaries: {self.where} has packed rows, where positions begin anew in each sequence; pass "
                "SegmentMass((0, n, None)) with boundaries for all of them"
            )
        batch, _, length, _ = self.query.shape
        query, key, value = (x.transpose(1, 2).flatten(0, 1) for x in (self.query, *self._used()))
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k = self._boundaries()
        if options.query_mask is None:
            options = options._replace(query_mask=self.mask.real_queries)
        chunked = self.mask.chunks is not None
        # A chunk hides keys from queries, but these queries still count: the mean over T(s) is taken afterwards.
        of_blocks = request.summed() if chunked else request
        packed = options._replace(
            statistics=of_blocks.statistics,
            heads=of_blocks.heads,
            query_mask=None if options.query_mask is None else options.query_mask.flatten(),
            query_weight=None if options.query_weight is None else options.query_weight.flatten(),
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
            max_seqlen_q=max_seqlen_q,
            max_seqlen_k=max_seqlen_k,
            query_offset=None,
            position=None,
            key_padding_mask=None,
        )
        output, results = functional.attend(query, key, value, packed)

        # (H, B * T, ..) to (B, H, T, ..), and without heads (B * T) to (B, T), which movedim leaves as it is.
        def by_row(x: Tensor, tokens: int = -1) -> Tensor:
            return x.unflatten(tokens, (batch, -1)).movedim(tokens - 1, 0)

        results = results.changed(lambda s, x: by_row(x, -1 - s.per_query), lambda _, x: by_row(x))
        output = output.unflatten(0, (batch, length)).transpose(1, 2)
        if not chunked:
            return AttentionResult(output, results)
        validity, counting = functional.placeholders(self.query, self._used()[0], results.lse, options)
        tensors = {s: results.tensors[s.summed] for s in request.statistics}
        for s in (s for s in tensors if s.is_mean):
            tensors[s] = as_mean(tensors[s], counting(s))
        return AttentionResult(output, Statistics(tensors, validity, counting, results.lse))

    def _boundaries(self) -> tuple[Tensor, Tensor, int | None, int | None]:
        """cu_seqlens of queries and of keys of all batch rows laid end to end, int32, and the longest sequence of each,
        so that only a pass's first layer has to wait for the device; None where numbers can't be read."""
        batch, device = self.query.shape[0], self.query.device
        if is_unreadable(self.query):
            return *blocks.boundaries(self.mask, batch, device, self.where), None, None
        memo = self.mask.memo
        if ("boundaries", device) not in memo:
            queries, keys = blocks.boundaries(self.mask, batch, device, self.where)
            longest = torch.stack([queries.diff().max(), keys.diff().max()]).tolist()
            memo["boundaries", device] = queries, keys, *longest
        boundaries: tuple[Tensor, Tensor, int, int] = memo["boundaries", device]
        return boundaries


def _options_of(mask: MaskDescription, cross: bool, device: torch.device) -> dict[str, Any]:
    """The options that a mask decides."""
    key_mask = None if mask.key_mask is None else mask.key_mask[:, : mask.readable_keys].to(device)
    if cross:  # a padded key is no query
        positions: dict[str, Any] = {"attn_mask": None if key_mask is None else key_mask[:, None, None]}
    else:
        place = mask.query_offset - mask.key_offset
        name = "position" if isinstance(place, Tensor) else "query_offset"
        positions = {name: place, "key_padding_mask": key_mask}
    return {"is_causal": mask.right == 0, "window_size": (mask.left, mask.right), "enable_gqa": True, **positions}
