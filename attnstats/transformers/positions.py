"""Positions of queries and keys where places in a cache are not enough.

An `AttentionCall` counts places: a key's is its index in the cache, and queries stand behind them. Distances come out
right where the positions that the model is given differ from places by one offset per batch row, or per packed
sequence. `compare` tells. For the cache that lost keys in the middle, whose positions only the caller knows, a
`PlacedCall` computes what depends on positions with every key put at its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from attnstats import functional
from attnstats.core.geometry import without_rows
from attnstats.errors import InputError
from attnstats.results import AttentionResult, Statistics
from attnstats.statistics import Statistic
from attnstats.transformers.calls import NO_STATISTICS, AttentionCall, Request
from attnstats.transformers.masks import MaskDescription

PRUNED = (
    "a cache that lost keys (SnapKV, H2O, StreamingLLM) does not say which: set run.key_positions, or capture "
    "statistics without positions (Entropy, Received), not live"
)

UNKNOWN = torch.iinfo(torch.int64).min  # of a row without a real query


def text_positions(ids: Any) -> Tensor | None:
    """(B | 1, T) out of a model's position_ids; None where there are none, or coordinates in images instead."""
    if not isinstance(ids, Tensor):
        return None
    if ids.dim() == 3:
        return ids[0] if len(ids) == 4 else None  # Qwen-VL puts the text's before the three coordinates
    return ids if ids.dim() == 2 else ids[None]


def compare(mask: MaskDescription, positions: Tensor) -> tuple[Tensor, Tensor]:
    """(B,) by how much the positions of a row's real queries exceed their places, and whether it is one number."""
    place = torch.arange(mask.query_length, device=positions.device, dtype=torch.int64) + mask.query_offset
    offset = positions - place
    if mask.segments is not None:
        inside = mask.segments.to(offset.device).diff() == 0
        return offset[:, 0], ~((offset.diff() != 0) & inside).any(-1)
    real = mask.real_queries
    if real is None:
        return offset[:, 0], (offset == offset[:, :1]).all(-1)
    real = real.to(offset.device)
    offset = offset.expand(len(real), -1)
    first = offset.gather(1, real.int().argmax(1, keepdim=True))
    return first[:, 0].masked_fill(~real.any(1), UNKNOWN), ((offset == first) | ~real).all(-1)


def agree(mask: MaskDescription, positions: Tensor, offset: Tensor | None = None) -> Tensor:
    """() bool: distances of places are those of positions, also to the keys that were cached before.

    Args:
        offset: (B,) what `compare` gave when the last of these keys were cached; None: unknown. Where it is, positions
            must count the cached tokens, all of them or those that are not padding on the left.
    """
    difference, constant = compare(mask, positions)
    if not isinstance(mask.query_offset, Tensor) and mask.query_offset == 0:
        return constant.all()
    right, settled, device = constant.all(), difference == UNKNOWN, difference.device
    if offset is not None and (len(offset) == len(difference) or 1 in (len(offset), len(difference))):
        offset = offset.to(device)
        right = right & ((difference == offset) | settled | (offset == UNKNOWN)).all()
        settled = settled | (offset != UNKNOWN)
    counted = ((difference == 0) | settled).all()
    if mask.attention_mask is not None:
        padding = (~mask.attention_mask.to(device)).int().cumprod(-1).sum(-1)
        counted = counted | ((difference == -padding) | settled).all()
    if isinstance(mask.query_offset, Tensor):
        counted = counted | (mask.query_offset == 0)
    return right & counted


def holds_every_key(mask: MaskDescription) -> bool:
    """False if keys are missing behind the first one: the last key is not where the last query is."""
    if isinstance(mask.query_offset, Tensor):  # a static cache loses none
        return True
    missing = mask.query_offset + mask.query_length - mask.key_offset - mask.key_length
    return missing <= 0 if mask.right == 0 else missing == 0


def disagreement(where: str, mask: MaskDescription, positions: Tensor | None) -> str:
    """The message for a call whose positions are not those of its places."""
    if positions is None or not holds_every_key(mask):
        return (
            f"{where} has queries at {mask.query_offset} .. {mask.query_offset + mask.query_length - 1}, but "
            f"{mask.key_length} keys from {mask.key_offset} on; {PRUNED}"
        )
    _, constant = compare(mask, positions)
    if not bool(constant.all()):
        row = int((~constant).int().argmax())
        return (
            f"{where}: position_ids of batch row {row} restart or have gaps, and queries see keys across; packed rows "
            "need attention_mask=None and use_cache=False, padding belongs to the left"
        )
    cached = f"the cache holds {mask.query_offset} tokens before them"
    return f"{where}: position_ids {_first(positions)}, but {cached}; {PRUNED}"


def _first(positions: Tensor) -> str:
    listed = ", ".join(map(str, positions[:4, 0].tolist()))
    return f"begin at {listed}{', ...' if len(positions) > 4 else ''}"


class CachedPositions:
    """What is known of the positions of the keys in a cache, over the passes of a run.

    Attributes:
        keys: those that the caller passed, by layer, None for all: (B | 1, Hkv | 1, n).
    """

    def __init__(self) -> None:
        self.keys: dict[int | None, Tensor] = {}
        self._given: Tensor | None = None  # (B | 1, Tq) of this pass
        self._agreeing: list[MaskDescription] = []  # masks of this pass whose places agree with them
        self._places: dict[int | None, tuple[int, Tensor]] = {}
        self._offset: Tensor | None = None  # what `compare` gave for the last tokens in the cache
        self._next_offset: Tensor | None = None  # of this pass's tokens

    @property
    def passed(self) -> Any:
        """`keys` in the shapes that the caller may pass."""
        by_layer = {layer: x[:, 0] if x.shape[1] == 1 else x for layer, x in self.keys.items()}
        return by_layer.get(None, by_layer or None)

    def set_keys(self, keys: Any) -> None:
        """Set what the caller passes, a tensor or one for each layer. Raises TypeError."""
        by_layer: Any = keys if isinstance(keys, Mapping) else {} if keys is None else {None: keys}
        for layer, x in by_layer.items():
            if not isinstance(x, Tensor) or x.is_floating_point() or x.dtype == torch.bool or x.dim() not in (2, 3):
                got = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
                raise TypeError(
                    "key_positions must be integers (B, Tk) or (B, key heads, Tk), the positions of the cached keys, a "
                    f"dict of such tensors by layer, or None; got {got}{'' if layer is None else f' for layer {layer}'}"
                )
        self.keys = {k: x.long() if x.dim() == 3 else x.long()[:, None] for k, x in by_layer.items()}

    def begin(self, position_ids: Any, resumed: bool) -> None:
        """A pass begins; it goes on with the cache of the last one if resumed."""
        self._given = text_positions(position_ids)
        self._agreeing, self._places = [], {}
        if not resumed:
            self._offset = None
        self._next_offset = None

    def place(self, layer: int, call: AttentionCall, seen: int | None) -> AttentionCall:
        """The call, or where key positions are set one by these. Raises InputError for positions that are not known.

        Args:
            seen: tokens that a live run holds, which has columns over all of them; None: the run is not live.
        """
        mask, offset = call.mask, call.mask.query_offset
        if self._given is not None and self._given.shape[1] != mask.query_length:
            shape = tuple(self._given.shape)
            raise InputError(f"{call.where}: position_ids {shape} are not those of its {mask.query_length} queries")
        if not isinstance(offset, Tensor) and offset == 0:
            self.keys = {}
        if self.keys:
            return self._placed(layer, call, seen)
        if not holds_every_key(mask):
            raise InputError(disagreement(call.where, mask, None))
        if self._given is None or any(mask is other for other in self._agreeing):
            return call
        if torch.compiler.is_compiling():
            torch._assert_async(agree(mask, self._given), f"attnstats: position_ids and cache disagree: {PRUNED}")
            return call
        if not bool(agree(mask, self._given, self._offset)):
            raise InputError(disagreement(call.where, mask, self._given))
        self._agreeing.append(mask)
        self._next_offset = compare(mask, self._given)[0]
        return call

    def end(self) -> None:
        """The pass is complete, and its tokens are cached."""
        self._offset = self._next_offset
        if self.keys and self._given is not None:
            new = self._given[:, None]
            for layer, keys in self.keys.items():
                batch = max(len(keys), len(new))
                added = [x.to(keys.device).expand(batch, keys.shape[1], -1) for x in (keys, new)]
                self.keys[layer] = torch.cat(added, -1)
        self.leave()

    def leave(self) -> None:
        """The pass is over, also after an exception."""
        self._given, self._agreeing, self._places = None, [], {}

    def select_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """The cache's batch rows were selected or repeated by `change`."""
        self.keys = {layer: keys if len(keys) == 1 else change(keys) for layer, keys in self.keys.items()}
        if self._offset is not None and len(self._offset) > 1:
            self._offset = change(self._offset)

    def truncate(self, removed: int) -> None:
        """The cache dropped its last `removed` tokens."""
        self.keys = {layer: keys[..., :-removed] for layer, keys in self.keys.items()}

    def _placed(self, layer: int, call: AttentionCall, seen: int | None) -> PlacedCall:
        if torch.compiler.is_compiling():
            raise InputError("run.key_positions: a compiled model cannot have them; call the model itself")
        name = None if None in self.keys else layer
        if name not in self.keys:
            raise InputError(f"run.key_positions names layers {sorted(map(str, self.keys))}, and not {layer}")
        if self._given is None:  # the model counts the keys in its cache
            mask = call.mask
            self._given = (
                torch.arange(mask.query_length, device=call.query.device, dtype=torch.int64)[None] + mask.query_offset
            )
        if name not in self._places:
            start = seen
            if seen == 0:  # the keys of every layer begin at 0
                earliest = min(int(keys.min()) for keys in self.keys.values())
                start = max(0, int(self._given[:, 0].max()) - earliest)
            self._places[name] = places(call, self.keys[name], self._given, start)
        start, place = self._places[name]
        fields = {field.name: getattr(call, field.name) for field in dataclasses.fields(call)}
        return PlacedCall(**fields, start=start, place=place.to(call.key.device), by_place=seen is not None)


def places(call: AttentionCall, key_positions: Tensor, positions: Tensor, start: int | None) -> tuple[int, Tensor]:
    """The place of the first query, and those of all keys, (B, Hkv | 1, Tk), by positions; hidden keys behind the last.

    Args:
        key_positions: (B | 1, Hkv | 1, n), of the keys that were cached before.
        positions: (B | 1, Tq), of the queries and their keys.
        start: the place of the first query; None: just so far that every key has one.
    """
    mask, length = call.mask, call.query.shape[2]
    batch, heads, _, _ = call.key.shape
    cached = mask.readable_keys - length
    what = f"run.key_positions {tuple(key_positions.shape)}"
    plain = mask.left is None and mask.segments is None and mask.chunks is None and not mask.unknown
    if not plain or mask.key_offset or call.bias is not None:
        raise InputError(f"{call.where} has a window, a mask in blocks or a bias, so that {what} cannot be used")
    sizes = key_positions.shape
    if sizes[2] != cached or sizes[0] not in (1, batch) or sizes[1] not in (1, heads):
        raise InputError(
            f"{what} must be (B, Tk) or (B, key heads, Tk) for the {cached} keys that {call.where} has cached, with "
            f"B {batch} or 1 and {heads} key heads"
        )
    difference, constant = compare(mask, positions)
    if not bool(constant.all()):
        raise InputError(disagreement(call.where, mask, positions))
    first = difference + mask.query_offset
    behind = first[:, None, None] - key_positions.to(first.device)
    behind = behind.expand(batch, -1, -1)
    hidden = torch.zeros(batch, 1, mask.readable_keys, dtype=torch.bool, device=first.device)
    if mask.key_mask is not None:
        hidden = ~mask.key_mask[:, None, : mask.readable_keys].to(first.device)
    real = (~hidden[..., cached:]).int()
    padding = real.argmax(-1, keepdim=True)  # queries before a row's first real one; their places are free
    seen = behind.masked_fill(hidden[..., :cached], 1)
    if cached and bool((seen + padding < 1).any()):
        raise InputError(
            f"{what}: a cached key stands at or behind the queries, whose position_ids {_first(positions)}"
        )
    farthest = max(0, int(seen.max())) if cached else 0
    start = farthest if start is None else start
    if farthest > start:
        raise InputError(
            f"{what}: a key is {farthest} positions before the queries, but only {start} tokens were seen; let the "
            "whole sequence run inside the `with`"
        )
    end = start + length
    new = torch.arange(start, end, device=first.device, dtype=torch.int64).expand(*behind.shape[:2], -1)
    place = torch.cat([start - behind, new], -1).masked_fill(hidden, end)
    ordered = place.sort(-1).values
    if bool(((ordered.diff() == 0) & (ordered[..., 1:] < end)).any()):
        raise InputError(f"{what}: two keys of a head have the same position")
    return start, place


@dataclass(frozen=True, eq=False, kw_only=True)
class PlacedCall(AttentionCall):
    """A call whose cached keys stand at positions of their own.

    Output and statistics without positions are those of the cache as it is. The others are computed from its lse, with
    the keys laid out at their places.

    Attributes:
        start: place of the first query.
        place: (B, Hkv | 1, Tk) those of the keys; the end for keys that are hidden.
        by_place: columns are over places; False: over the keys as they are cached.
    """

    start: int
    place: Tensor
    by_place: bool

    has_own_keys: ClassVar[bool] = True

    @property
    def begin(self) -> int:
        return self.start

    @property
    def end(self) -> int:
        return self.start + self.query.shape[2]

    @property
    def first_key(self) -> int:
        return 0

    @property
    def earlier_keys(self) -> Tensor:
        return self._occupied().any(1)

    def attend(self, request: Request = NO_STATISTICS) -> AttentionResult:
        placed = [s for s in request.statistics if s.needs_positions or (self.by_place and s.axis == "column")]
        others = [s for s in request.statistics if s not in placed]
        output, results = super().attend(request.only(tuple(others)))
        if not placed:
            return AttentionResult(output, results)
        for s in placed:
            if s.method == "first_keys":
                raise InputError(
                    f"{self.where} has a cache that may have lost the first keys, which {s} looks at; leave it out"
                )
            if s.method in ("segments", "top") and not self.by_place:
                raise InputError(
                    f"{self.where} has cached keys whose positions are known among themselves alone, and {s} counts "
                    "from the first key of the sequence; let the whole sequence run inside a capture with live=True"
                )
        lse = results.lse.detach()
        with torch.no_grad():
            parts = self._parts(request.only(tuple(placed)), lse)
        tensors = dict(results.tensors)
        real = self.mask.real_queries
        for s in placed:
            tensors[s] = torch.cat([part.tensors[s] for part in parts], 1)
            if s.axis == "row" and real is not None:
                tensors[s] = without_rows(s, tensors[s], ~real.to(lse.device))
            heads = (request.heads or {}).get(s)
            if heads is not None and len(parts) > 1:
                tensors[s] = tensors[s][:, list(heads)]

        def without_heads(of: Callable[[Statistics], Mapping[Statistic, Tensor]]) -> Callable[[Statistic], Tensor]:
            """What holds for every head."""
            return lambda s: torch.stack([of(part)[s] for part in ([results] if s in others else parts)]).amin(0)

        valid, counts = without_heads(lambda part: part.valid), without_heads(lambda part: part.counts)
        return AttentionResult(output, Statistics(tensors, valid, counts, lse))

    def last(self, rows: int) -> AttentionCall:
        last = super().last(rows)
        assert isinstance(last, PlacedCall)
        return replace(last, start=self.end - rows)

    def _parts(self, request: Request, lse: Tensor) -> list[Statistics]:
        """The statistics of all heads, or of those of each key head in turn where these have keys at other places."""
        key, _ = self._used()
        batch, key_heads, _, head_dim = key.shape
        occupied = self._occupied()
        count = self.place.shape[1]
        options = self._options(request if count == 1 else request._replace(heads=None))
        if self.mask.real_queries is not None:  # a key may stand where a query on the left is padding
            real = self.mask.real_queries.to(self.query.device)
            options = options._replace(query_mask=real if options.query_mask is None else real & options.query_mask)
        options = options._replace(query_offset=self.start, dropout_p=0.0)
        parts = []
        for i in range(count):
            place = self.place[:, i]
            of_keys, of_queries = (
                slice(i * heads // count, (i + 1) * heads // count) for heads in (key_heads, self.query.shape[1])
            )
            own = key[:, of_keys]
            laid_out = own.new_zeros(batch, own.shape[1], self.end + 1, head_dim)
            laid_out.scatter_(2, place[:, None, :, None].expand_as(own), own)
            sinks = options.sinks
            part = functional.from_lse(
                self.query[:, of_queries],
                laid_out[:, :, :-1],
                lse[:, of_queries],
                options._replace(key_padding_mask=occupied[:, i], sinks=None if sinks is None else sinks[of_queries]),
            )
            parts.append(part if self.by_place else part.changed(*_over_keys(place)))
        return parts

    def _occupied(self) -> Tensor:
        """(B, Hkv | 1, places) bool: a key that is not hidden stands there."""
        occupied = torch.zeros(*self.place.shape[:2], self.end + 1, dtype=torch.bool, device=self.place.device)
        return occupied.scatter_(2, self.place, True)[..., :-1]


def _over_keys(place: Tensor) -> tuple[Any, Any]:
    """The changes that bring columns over places to the order of the keys, with and without a dimension of heads."""

    def with_heads(statistic: Statistic, x: Tensor) -> Tensor:
        if statistic.axis != "column":
            return x
        return torch.nn.functional.pad(x, (0, 1)).gather(-1, place[:, None].expand(-1, x.shape[1], -1))

    def without_heads(statistic: Statistic, x: Tensor) -> Tensor:
        return torch.nn.functional.pad(x, (0, 1)).gather(-1, place) if statistic.axis == "column" else x

    return with_heads, without_heads
