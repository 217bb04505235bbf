"""Allocations filled with NaN and between bands of NaN, so that a kernel's stray reads and writes show."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

GUARD = 256
MAKERS = {
    torch.ops.aten.empty.memory_format: torch.nan,
    torch.ops.aten.new_empty.default: torch.nan,
    torch.ops.aten.empty_permuted.default: torch.nan,
    torch.ops.aten.zeros.default: 0.0,
    torch.ops.aten.new_zeros.default: 0.0,
}


class Guarded(TorchDispatchMode):
    """Inside, every new float tensor is filled with NaN and lies between NaN; `check` looks for writes around it."""

    def __init__(self) -> None:
        super().__init__()
        self.rooms: list[tuple[Tensor, Tensor]] = []
        self.largest = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        if isinstance(made, Tensor):
            self.largest = max(self.largest, made.untyped_storage().nbytes())
        if function not in MAKERS or not made.is_floating_point():
            return made
        room = torch.full((made.numel() + 2 * GUARD,), torch.nan, dtype=made.dtype, device=made.device)
        inside = room[GUARD : GUARD + made.numel()]
        inside.fill_(MAKERS[function])
        self.rooms.append((room, inside))
        return inside.as_strided(made.shape, made.stride(), inside.storage_offset())

    def check(self) -> None:
        assert self.rooms, "nothing was allocated inside"
        for room, _ in self.rooms:
            assert room[:GUARD].isnan().all(), "written before a buffer"
            assert room[-GUARD:].isnan().all(), "written behind a buffer"
