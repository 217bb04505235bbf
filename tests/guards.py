"""Allocations filled with NaN and between bands of NaN, so that a kernel's stray reads and writes show."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GUARD = 256
MAKERS = {
    torch.ops.aten.empty.memory_format: torch.nan,
    torch.ops.aten.new_empty.default: torch.nan,
    torch.ops.aten.empty_permuted.default: torch.nan,
    torch.ops.aten.zeros.default: 0.0,
    torch.ops.aten.new_zeros.default: 0.0,
}


class Largest(TorchDispatchMode):
    """While it is entered, `largest` is the number of elements of the largest storage that an operation allocated."""

    largest = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        inputs, outputs = ([x for x in tree_leaves(tree) if isinstance(x, Tensor)] for tree in (args, result))
        views = {x.untyped_storage().data_ptr() for x in inputs}
        for x in outputs:
            if x.untyped_storage().data_ptr() not in views:
                self.largest = max(self.largest, x.untyped_storage().nbytes() // x.element_size())
        return result


class Guarded(Largest):
    """Inside, every new float tensor is filled with NaN and lies between NaN; `check` looks for writes around it."""

    def __init__(self) -> None:
        super().__init__()
        self.rooms: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = super().__torch_dispatch__(function, types, args, kwargs)
        if function not in MAKERS or not made.is_floating_point():
            return made
        room = torch.full((made.numel() + 2 * GUARD,), torch.nan, dtype=made.dtype, device=made.device)
        inside = room[GUARD : GUARD + made.numel()]
        self.fill(inside, MAKERS[function])
        self.rooms.append((room, inside))
        return inside.as_strided(made.shape, made.stride(), inside.storage_offset())

    def fill(self, made: Tensor, value: float) -> None:
        made.fill_(value)

    def check(self) -> None:
        assert self.rooms, "nothing was allocated inside"
        for room, _ in self.rooms:
            assert room[:GUARD].isnan().all(), "written before a buffer"
            assert room[-GUARD:].isnan().all(), "written behind a buffer"
