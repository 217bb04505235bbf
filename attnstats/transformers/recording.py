"""Where captured statistics are kept: of one forward pass, or added up over the steps of a generation.

Both keep sums, by layer or over layers, per head or over heads, and `read` turns them into means. `Pass` takes what an
attention call returns; `Generation` places rows and columns by absolute position, so that a prompt in chunks, single
tokens, beams that change places and rejected tokens all end where one teacher-forced pass would. Used by capture.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnstats.distributed import gather_heads, local_heads
from attnstats.errors import InputError
from attnstats.results import AttentionResult
from attnstats.statistics import (
    ColumnStatistic,
    DistanceWeighted,
    PooledMap,
    Statistic,
)
from attnstats.transformers.calls import Call, Heads, reach_of
from attnstats.transformers.selection import Choice

UNDONE_ROWS = 64  # how many of the last tokens can be taken back


@dataclass(frozen=True)
class Ranks:
    """Tensor parallel: each rank of the group has `count` query heads of a layer, `chosen` are those of the model."""

    group: Any
    count: int
    chosen: Choice


class Store:
    """Sums of statistics: one tensor by statistic and layer, or by statistic where layers are added up.

    Attributes:
        ranks: who has the other heads, where they are spread over ranks.
    """

    def __init__(self, reduce: tuple[str, ...], device: torch.device | None):
        self.reduce = reduce
        self.device = device
        self.ranks: Ranks | None = None
        self.heads: dict[Statistic, dict[int, int]] = {}
        self.nan: dict[Statistic, dict[int, Tensor]] = {}  # bool per chosen head
        self._copies: list[Any] = []

    def counted(self, statistic: Statistic, layer: int, x: Tensor) -> tuple[int | None, Tensor]:
        """The key of the sum that x (B, heads, ...) belongs to, and what is added to it."""
        count = x.shape[1]
        if self.ranks is not None:
            chosen = self.ranks.chosen[statistic][layer]
            x = x if _has_some(chosen, self.ranks) else x[:, :0]
            size = torch.distributed.get_world_size(self.ranks.group)
            count = size * self.ranks.count if chosen is None else len(chosen)
        self.heads.setdefault(statistic, {})[layer] = count
        nan = x.sum((0, *range(2, x.dim()))).isnan()
        of_layers = self.nan.setdefault(statistic, {})
        of_layers[layer] = of_layers[layer] | nan if layer in of_layers else nan
        return None if "layers" in self.reduce else layer, x.sum(1) if "heads" in self.reduce else x

    def mean(self, statistic: Statistic, sums: dict[int | None, Tensor]) -> Tensor:
        """(L, B, heads, ...), without L where layers are reduced and without heads where they are."""
        heads = self.heads[statistic]
        lengths = {x.shape[-1] for x in sums.values()}
        if len(lengths) > 1:
            raise InputError(
                f"{statistic}: layers had different numbers of keys in this step, {sorted(lengths)}, because some keep "
                "only a window of them; capture with live=True, or layers of one kind"
            )
        if "layers" in self.reduce:
            (total,) = sums.values()
            return total / (sum(heads.values()) if "heads" in self.reduce else len(heads))
        if "heads" in self.reduce:
            sums = {layer: x / heads[layer] for layer, x in sums.items() if layer is not None}
        first = next(iter(sums.values()))
        return torch.stack([x.to(first.device) for _, x in sorted(sums.items(), key=lambda item: item[0] or 0)])

    def of_all_ranks(self, statistic: Statistic, sums: dict[int | None, Tensor]) -> dict[int | None, Tensor]:
        """Sums over the heads of all ranks, or the heads of all ranks; every rank takes part."""
        if self.ranks is None:
            return sums
        group, count, chosen = self.ranks.group, self.ranks.count, self.ranks.chosen
        whole: dict[int | None, Tensor] = {}
        for layer, x in sums.items():
            if "heads" in self.reduce:
                whole[layer] = x.contiguous().clone()
                torch.distributed.all_reduce(whole[layer], group=group)
            else:
                heads = next(iter(chosen[statistic].values())) if layer is None else chosen[statistic][layer]
                whole[layer] = gather_heads(x, heads, count, group=group)
        return whole

    def broken(self, statistic: Statistic, chosen: dict[int, tuple[int, ...] | None]) -> dict[int, list[int]]:
        """The heads of each layer, by their number, that gave a NaN here."""
        found: dict[int, list[int]] = {}
        for layer, flags in self.nan[statistic].items():
            heads = chosen[layer]
            if self.ranks is not None:
                first = torch.distributed.get_rank(self.ranks.group) * self.ranks.count
                here = range(first, first + self.ranks.count)
                heads = tuple(head for head in (here if heads is None else heads) if head in here)
            places = flags.nonzero().flatten().tolist()
            if places:
                found[layer] = places if heads is None else [heads[place] for place in places]
        return found

    def away(self, x: Tensor) -> Tensor:
        """x on the device where results are kept; a copy off a GPU runs beside it and is waited for when read."""
        if self.device is None or x.device == self.device:
            return x
        if self.device.type != "cpu" or x.device.type != "cuda":
            return x.to(self.device)
        kept = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        kept.copy_(x, non_blocking=True)
        self._copies.append(torch.cuda.current_stream(x.device).record_event())
        return kept

    def wait(self) -> None:
        """Until every copy has arrived."""
        for event in self._copies:
            event.synchronize()
        self._copies.clear()


class Pass(Store):
    """One forward pass; the next one starts a new one."""

    def __init__(self, reduce: tuple[str, ...], device: torch.device | None):
        super().__init__(reduce, device)
        self.sums: dict[Statistic, dict[int | None, Tensor]] = {}
        self.validity: dict[Statistic, Tensor] = {}  # layers see the same padding

    def attend(
        self, layer: int, call: Call, wanted: tuple[Statistic, ...], query_mask: Tensor | None, heads: Heads
    ) -> AttentionResult:
        result = call.attend(wanted, query_mask, heads)
        statistics = result.statistics
        for s in wanted:
            key, x = self.counted(s, layer, statistics[s])
            of_layers = self.sums.setdefault(s, {})
            if key in of_layers and key is None:
                if of_layers[key].shape != x.shape:
                    raise InputError(
                        f"{s}: layers have different numbers of keys or heads in this step, {of_layers[key].shape[-1]} "
                        f"and {x.shape[-1]} keys; capture with live=True, or layers of one kind"
                    )
                of_layers[key] = of_layers[key] + x.to(of_layers[key].device)
            else:
                of_layers[key] = x if key is None else self.away(x)
            if s not in self.validity:
                self.validity[s] = statistics.valid[s]
        return result

    def finish(self) -> None:
        self.sums = {s: self.of_all_ranks(s, sums) for s, sums in self.sums.items()}
        if "layers" in self.reduce:
            self.sums = {s: {key: self.away(x) for key, x in sums.items()} for s, sums in self.sums.items()}

    def read(self, statistic: Statistic) -> Tensor:
        self.wait()
        return self.mean(statistic, self.sums[statistic])

    def valid(self, statistic: Statistic) -> Tensor:
        return self.validity[statistic]


class Line:
    """A tensor (..., T) that grows along its last dimension by doubling."""

    def __init__(self, like: Tensor):
        self._room = _zeros(like, max(256, 2 * like.shape[-1]))
        self.length = 0

    @property
    def values(self) -> Tensor:
        return self._room[..., : self.length]

    def add(self, start: int, x: Tensor) -> None:
        """Add x from `start` on; what was never added to is 0 (False)."""
        end = start + x.shape[-1]
        if end > self._room.shape[-1]:
            grown = _zeros(self._room, max(end, 2 * self._room.shape[-1]))
            grown[..., : self.length] = self.values
            self._room = grown
        target = self._room[..., start:end]
        x = x.to(target.device)
        if x.dtype == torch.bool:
            target |= x
        else:
            target += x
        self.length = max(self.length, end)

    def cut(self, length: int) -> None:
        self._room[..., length : self.length] = 0
        self.length = min(self.length, length)

    def rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Let `change` choose or repeat batch rows, the dimension in front."""
        self._room = change(self._room)


def _zeros(like: Tensor, length: int) -> Tensor:
    shape = (*like.shape[:-1], length)
    if not torch.is_inference_mode_enabled():
        return torch.zeros(shape, dtype=like.dtype, device=like.device)
    with torch.inference_mode(False):  # the next step may be outside of it, and adds in place
        return torch.zeros(shape, dtype=like.dtype, device=like.device)


class Step(NamedTuple):
    """What is needed to take back what the last tokens gave to the keys before them."""

    call: Call
    wanted: tuple[Statistic, ...]
    counted: Tensor | None
    heads: Heads


class Generation(Store):
    """All steps since the sequence began at position 0.

    Attributes:
        length: tokens that went through the model.
        tokens: (B, length) of them, where the model was called with ids.
    """

    def __init__(self, reduce: tuple[str, ...], device: torch.device | None):
        super().__init__(reduce, device)
        self.length = 0
        self.lines: dict[Statistic, dict[int | None, Line]] = {}
        self.counted_queries: Line | None = None  # (B, T) bool
        self.real: Line | None = None
        self.tokens: Line | None = None
        self._last: dict[int, Step] = {}
        self._begin = 0

    def attend(
        self, layer: int, call: Call, wanted: tuple[Statistic, ...], query_mask: Tensor | None, heads: Heads
    ) -> AttentionResult:
        near: tuple[Statistic, ...] = tuple(s for s in wanted if isinstance(s, DistanceWeighted) and s.band is not None)
        reach = reach_of(near)
        if not call.can_look_near(reach):
            near = ()
        asked = tuple(s.summed for s in wanted if s not in near)
        of_heads = {s.summed: chosen for s, chosen in heads.items()}
        result = call.attend(asked, query_mask, {s: h for s, h in of_heads.items() if s in asked})
        found, starts = dict(result.statistics), dict.fromkeys(asked, call.first_key)
        if near:
            sums = tuple(s.summed for s in near)
            some = {s: h for s, h in of_heads.items() if s in sums}
            with torch.no_grad():
                start, beside = call.near(result.statistics.lse.detach(), sums, reach, query_mask, some)
            found |= dict(beside)
            starts |= dict.fromkeys(sums, start)
        for s in wanted:
            own = s.summed
            key, x = self.counted(s, layer, found[own])
            lines = self.lines.setdefault(s, {})
            if key not in lines:
                lines[key] = Line(x)
            lines[key].add(starts[own] if isinstance(s, ColumnStatistic) else call.begin, x)
        self._begin = call.begin
        if self.length < call.end:
            self._witness(call, query_mask)
        self._remember(layer, call, wanted, query_mask, heads)
        return result

    def note(self, start: int, ids: Tensor | None) -> None:
        """These tokens go through the model now; None: it was given embeddings."""
        if ids is None or (self.tokens is None and start > 0):
            self.tokens = None
            return
        if self.tokens is None:
            self.tokens = Line(ids)
        self.tokens.add(start, ids)

    def forget(self) -> None:
        """Nothing will be taken back any more, so what that needs is let go: the cache."""
        self._last.clear()

    def finish(self) -> None:
        """A forward pass came to its end."""

    def read(self, statistic: Statistic) -> Tensor:
        sums = {layer: line.values[..., : self.length] for layer, line in self.lines[statistic].items()}
        mean = self.mean(statistic, self.of_all_ranks(statistic, sums))
        if statistic.is_mean:
            count = self._count(statistic).clamp(min=1)
            mean = mean / (count if "heads" in self.reduce else count[:, None])
        return mean if self.device is None else mean.to(self.device)

    def valid(self, statistic: Statistic) -> Tensor:
        assert self.counted_queries is not None
        assert self.real is not None
        if not isinstance(statistic, ColumnStatistic):
            return self.counted_queries.values.clone()
        real = self.real.values
        return real & (self._count(statistic) > 0) if statistic.is_mean else real.clone()

    def _count(self, statistic: Statistic) -> Tensor:
        """(B, T), the number of counted queries at a key's horizon, |T(s)| of Eq. 10."""
        assert self.counted_queries is not None
        assert statistic.horizon is not None
        lo, hi = statistic.horizon
        counted = self.counted_queries.values
        before = torch.nn.functional.pad(counted.cumsum(-1), (1, 0))
        position = torch.arange(self.length, device=counted.device)
        first = (position + lo).clamp(max=self.length)
        end = torch.full_like(first, self.length) if hi is None else (position + hi + 1).clamp(max=self.length)
        return before[:, torch.maximum(first, end)] - before[:, first]

    def _witness(self, call: Call, query_mask: Tensor | None) -> None:
        """Note once per step which of its queries count and which of its keys are real."""
        batch = call.query.shape[0]
        new = torch.ones(batch, call.end - call.begin, dtype=torch.bool, device=call.query.device)
        real = new if call.mask.real_queries is None else call.mask.real_queries.to(new.device)
        counted = real if query_mask is None else real & query_mask.to(real.device)
        if self.counted_queries is None or self.real is None:
            self.counted_queries, self.real = Line(new), Line(new)
        self.counted_queries.add(call.begin, counted)
        self.real.add(call.begin, real)
        self.length = call.end

    # Rows that move, tokens that are taken back

    def select(self, change: Callable[[Tensor], Tensor]) -> None:
        """The cache's batch rows were chosen anew: `change` does the same to a tensor with the batch in front."""
        for lines in self.lines.values():
            for line in lines.values():
                line.rows(change)
        for line in self._kept():
            line.rows(change)
        self._last.clear()

    def _kept(self) -> list[Line]:
        return [line for line in (self.counted_queries, self.real, self.tokens) if line is not None]

    def cut(self, length: int) -> None:
        """The tokens from position `length` on were rejected."""
        if length >= self.length:
            return
        columns = any(isinstance(s, ColumnStatistic) for s in self.lines)
        if columns and (length < max(self._begin, self.length - UNDONE_ROWS) or not self._last):
            raise RuntimeError(
                f"attnstats.capture(live=True): the cache was cut from {self.length} to {length} tokens; only "
                f"tokens of the last step, {UNDONE_ROWS} at most and once, can be taken back. Start a new generation"
            )
        for layer, step in self._last.items():
            self._take_back(layer, step, length)
        for lines in self.lines.values():
            for line in lines.values():
                line.cut(length)
        for kept in self._kept():
            kept.cut(length)
        self.length = length
        self._last.clear()

    def _remember(
        self, layer: int, call: Call, wanted: tuple[Statistic, ...], query_mask: Tensor | None, heads: Heads
    ) -> None:
        columns: tuple[Statistic, ...] = tuple(s for s in wanted if isinstance(s, ColumnStatistic))
        rows = min(UNDONE_ROWS, call.query.shape[2])
        if columns:
            counted = None if query_mask is None else query_mask[:, -rows:]
            own = {s: chosen for s, chosen in heads.items() if s in columns}
            self._last[layer] = Step(call.last(rows), columns, counted, own)

    def _take_back(self, layer: int, step: Step, length: int) -> None:
        call = step.call
        rejected = torch.arange(call.begin, call.end, device=call.query.device) >= length
        rejected = rejected.expand(call.query.shape[0], -1)
        if step.counted is not None:
            rejected = rejected & step.counted.to(rejected.device)
        own = {s: s.summed for s in step.wanted}
        heads = {own[s]: chosen for s, chosen in step.heads.items()}
        with torch.no_grad():
            found = call.attend(tuple(own.values()), rejected, heads).statistics
        for s in step.wanted:
            key, x = self.counted(s, layer, found[own[s]])
            self.lines[s][key].add(call.first_key, -x)


def _has_some(heads: tuple[int, ...] | None, ranks: Ranks) -> bool:
    return heads is None or bool(local_heads(heads, ranks.count, group=ranks.group))


def grows(statistic: Statistic) -> bool:
    """Whether a statistic can be kept up to date token by token."""
    if isinstance(statistic, ColumnStatistic):
        return statistic.last_queries is None
    return not isinstance(statistic, PooledMap)
