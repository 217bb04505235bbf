"""Captured statistics: sums by layer or over layers, per head or over heads, and the means that are read.

`PassRecording` holds one forward pass; live.py has the recording of a whole generation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnstats.distributed import gather_heads, local_heads
from attnstats.errors import InputError
from attnstats.statistics import Statistic
from attnstats.transformers.calls import AttentionCall, Request
from attnstats.transformers.selection import ChosenHeads

Sums = dict[int | None, Tensor]  # by layer; None: layers are added up


@dataclass(frozen=True)
class Ranks:
    """Tensor parallel: each rank of the group has `count` query heads of a layer, `chosen` are those of the model."""

    group: Any
    count: int
    chosen: ChosenHeads


class Recording:
    """Sums of statistics by layer, or over layers, and the counts that make means of them.

    Attributes:
        ranks: the tensor-parallel group that has the other heads; None: all heads are here.
    """

    def __init__(self, reduce: tuple[str, ...], device: torch.device | None):
        self.over_layers = "layers" in reduce
        self.over_heads = "heads" in reduce
        self.device = device
        self.ranks: Ranks | None = None
        self._head_counts: dict[Statistic, dict[int, int]] = {}
        self._has_nan: dict[Statistic, dict[int, Tensor]] = {}  # bool per chosen head
        self._copies: list[Any] = []

    def addends(self, layer: int, results: Mapping[Statistic, Tensor]) -> dict[Statistic, Tensor]:
        """The addend to the sums of each result (B, heads, ...) of a layer; notes its head count and its NaN."""
        addends = {}
        for statistic, x in results.items():
            count = x.shape[1]
            if self.ranks is not None:
                chosen = self.ranks.chosen[statistic][layer]
                if chosen is not None and not local_heads(chosen, self.ranks.count, group=self.ranks.group):
                    x = x[:, :0]
                size = torch.distributed.get_world_size(self.ranks.group)
                count = size * self.ranks.count if chosen is None else len(chosen)
            self._head_counts.setdefault(statistic, {})[layer] = count
            nan = x.sum((0, *range(2, x.dim()))).isnan()
            of_layers = self._has_nan.setdefault(statistic, {})
            of_layers[layer] = of_layers[layer] | nan if layer in of_layers else nan
            addends[statistic] = x.sum(1) if self.over_heads else x
        return addends

    def mean(self, statistic: Statistic, sums: Sums) -> Tensor:
        """(L, B, heads, ...), without L where layers are reduced and without heads where they are."""
        counts = self._head_counts[statistic]
        if self.over_layers:
            (total,) = sums.values()
            return total / (sum(counts.values()) if self.over_heads else len(counts))
        _check_shapes(statistic, *sums.values())
        if self.over_heads:
            sums = {layer: x / counts[layer] for layer, x in sums.items() if layer is not None}
        first = next(iter(sums.values()))
        return torch.stack([x.to(first.device) for _, x in sorted(sums.items(), key=lambda item: item[0] or 0)])

    def over_ranks(self, statistic: Statistic, sums: Sums) -> Sums:
        """Sums over the heads of all ranks, or the heads of all ranks; every rank takes part."""
        if self.ranks is None:
            return sums
        group, count, chosen = self.ranks.group, self.ranks.count, self.ranks.chosen
        whole: Sums = {}
        for layer, x in sums.items():
            if self.over_heads:
                whole[layer] = x.contiguous().clone()
                torch.distributed.all_reduce(whole[layer], group=group)
            else:
                heads = next(iter(chosen[statistic].values())) if layer is None else chosen[statistic][layer]
                whole[layer] = gather_heads(x, heads, count, group=group)
        return whole

    def heads_with_nan(self, statistic: Statistic, chosen: dict[int, tuple[int, ...] | None]) -> dict[int, list[int]]:
        """The heads of each layer, by their number in the model, that gave a NaN on this rank."""
        by_layer: dict[int, list[int]] = {}
        for layer, flags in self._has_nan[statistic].items():
            heads = chosen[layer]
            if self.ranks is not None:
                first = torch.distributed.get_rank(self.ranks.group) * self.ranks.count
                here = range(first, first + self.ranks.count)
                heads = tuple(head for head in (here if heads is None else heads) if head in here)
            places = flags.nonzero().flatten().tolist()
            if places:
                by_layer[layer] = places if heads is None else [heads[place] for place in places]
        return by_layer

    def to_device(self, x: Tensor) -> Tensor:
        """x on the device of the results; a copy off a GPU runs in the background, and `wait` waits for it."""
        if self.device is None or x.device == self.device:
            return x
        if self.device.type != "cpu" or x.device.type != "cuda":
            return x.to(self.device)
        copied = torch.empty(x.shape, dtype=x.dtype, pin_memory=True, device="cpu")
        copied.copy_(x, non_blocking=True)
        self._copies.append(torch.cuda.current_stream(x.device).record_event())
        return copied

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy or a pickle."""
        self.wait()
        return self.__dict__.copy()

    def wait(self) -> None:
        """Wait until every copy has arrived."""
        for event in self._copies:
            event.synchronize()
        self._copies.clear()


class PassRecording(Recording):
    """One forward pass."""

    def __init__(self, reduce: tuple[str, ...], device: torch.device | None):
        super().__init__(reduce, device)
        self._sums: dict[Statistic, Sums] = {}
        self._valid: dict[Statistic, Tensor] = {}  # layers have the same padding, unless they have own keys
        # By layer the number of keys that are in use, where a graph can't cut off the unused slots of a static cache.
        self._used: dict[int | None, Tensor] = {}

    def attend(self, layer: int, call: AttentionCall, request: Request) -> Tensor:
        """The output of the call, whose statistics are recorded."""
        output, results = call.attend(request)
        used = call.mask.used_keys
        if isinstance(used, Tensor):
            self._used[None if self.over_layers else layer] = used
        for s, x in self.addends(layer, results.tensors).items():
            sums = self._sums.setdefault(s, {})
            if not self.over_layers:
                sums[layer] = x if self.device is None else self.to_device(x)
            elif None in sums:
                _check_shapes(s, sums[None], x)
                sums[None] = sums[None] + x.to(sums[None].device)
            else:
                sums[None] = x
            if s not in self._valid:
                self._valid[s] = results.valid[s]
            elif call.has_own_keys:
                self._valid[s] = self._valid[s] & results.valid[s].to(self._valid[s].device)
        return output

    def finish(self) -> None:
        """The forward pass is complete: add up the ranks and move the sums to the device of the results."""
        if self.ranks is not None:
            self._sums = {s: self.over_ranks(s, sums) for s, sums in self._sums.items()}
        if self.over_layers and self.device is not None:
            self._sums = {s: {key: self.to_device(x) for key, x in sums.items()} for s, sums in self._sums.items()}

    def read(self, statistic: Statistic) -> Tensor:
        self.wait()
        sums = {layer: self._in_use(statistic, layer, x) for layer, x in self._sums[statistic].items()}
        return self.mean(statistic, sums)

    def valid(self, statistic: Statistic) -> Tensor:
        return self._in_use(statistic, next(iter(self._sums[statistic])), self._valid[statistic])

    def _in_use(self, statistic: Statistic, layer: int | None, x: Tensor) -> Tensor:
        """Columns without the unused slots of a static cache; in a graph with them."""
        if statistic.axis != "column" or layer not in self._used or torch.compiler.is_compiling():
            return x
        return x[..., : int(self._used[layer])]


def _check_shapes(statistic: Statistic, *tensors: Tensor) -> None:
    first, *rest = (x.shape[1:] for x in tensors)
    if any(shape != first for shape in rest):  # not a set of shapes: a graph would be compiled for each length
        shapes = sorted({tuple(x.shape[1:]) for x in tensors})
        raise InputError(
            f"{statistic}: layers had different numbers of keys or heads in this step, {shapes}, because some keep "
            "only a window of the keys; capture with live=True, or layers of one kind"
        )
