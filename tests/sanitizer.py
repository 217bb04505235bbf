"""Every load and store of a kernel in Triton's interpreter, checked element by element.

Inside `Sanitizer` an assertion fails where a kernel reads or writes anything but elements of the tensors that it got
(the gaps of a strided tensor are none), reads what was allocated and never written, writes to a tensor that it also
got under another name, or reads or writes what another of its programs writes: programs run in no order on a GPU.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from tests.guards import Guarded

# NaNs that arithmetic on other NaNs does not make, by dtype: the integer type of that size, and the bits.
UNWRITTEN: dict[torch.dtype, tuple[torch.dtype, int]] = {
    torch.float16: (torch.int16, 0x7E5A),
    torch.bfloat16: (torch.int16, 0x7FDA),
    torch.float32: (torch.int32, 0x7FC0DEAD),
    torch.float64: (torch.int64, 0x7FF80000DEADBEEF),
}
NOBODY, SEVERAL = -1, -2


class Buffer:
    """The memory of a launch's tensors that share a storage."""

    def __init__(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self.size, self.begin = tensor.element_size(), storage.data_ptr()
        count = storage.nbytes() // self.size
        self.end = self.begin + count * self.size
        self.owners = np.zeros(count, np.int32)  # tensors that have the element
        self.writer = np.full(count, NOBODY, np.int32)  # the program
        self.reader = np.full(count, NOBODY, np.int32)
        bits = UNWRITTEN.get(tensor.dtype)
        self.unwritten = np.zeros(count, bool)
        if bits is not None:
            flat = torch.empty(0, dtype=bits[0]).set_(storage)
            self.unwritten = (flat == bits[1]).numpy()

    def add(self, tensor: Tensor) -> None:
        assert tensor.element_size() == self.size
        places = np.array([tensor.storage_offset()])
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
            places = np.unique(places[:, None] + np.arange(size) * stride)
        self.owners[places] += 1


class Sanitizer(Guarded):
    """As `Guarded`, and watches kernels. `launched` are their names; `loads` and `stores` count elements."""

    def __init__(self) -> None:
        super().__init__()
        self.launched: list[str] = []
        self.loads = self.stores = 0
        self.buffers: list[Buffer] = []

    def fill(self, made: Tensor, value: float) -> None:
        kind, bits = UNWRITTEN[made.dtype]
        if value != value:
            made.view(kind).fill_(bits)
        else:
            made.fill_(value)

    def __enter__(self) -> Sanitizer:
        from triton.runtime import interpreter

        self.patch = pytest.MonkeyPatch()
        run, builder = interpreter.GridExecutor.__call__, interpreter.InterpreterBuilder
        load, store = builder.create_masked_load, builder.create_masked_store

        def watched_run(executor: Any, *args: Any, **kwargs: Any) -> Any:
            self.buffers = self._buffers([x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)])
            self.launched.append(executor.fn.__name__)
            return run(executor, *args, **kwargs)

        def watched_load(this: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
            self._check_load(this.grid_idx[0], *self._places(pointers, mask, "reads"))
            return load(this, pointers, mask, *rest)

        def watched_store(this: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
            self._check_store(this.grid_idx[0], *self._places(pointers, mask, "writes"))
            return store(this, pointers, value, mask, *rest)

        self.patch.setattr(interpreter.GridExecutor, "__call__", watched_run)
        self.patch.setattr(builder, "create_masked_load", watched_load)
        self.patch.setattr(builder, "create_masked_store", watched_store)
        for name in [name for name in vars(builder) if "atomic" in name or "descriptor" in name]:
            self.patch.setattr(builder, name, None)  # would pass unseen
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.patch.undo()

    def _buffers(self, tensors: list[Tensor]) -> list[Buffer]:
        by_storage: dict[int, Buffer] = {}
        for x in {(x.data_ptr(), x.shape, x.stride()): x for x in tensors if x.numel()}.values():
            by_storage.setdefault(x.untyped_storage().data_ptr(), Buffer(x)).add(x)
        return list(by_storage.values())

    def _places(self, pointers: Any, mask: Any, does: str) -> tuple[list[tuple[Buffer, Any]], int]:
        addresses, mask = np.broadcast_arrays(pointers.data, mask.data)
        addresses = addresses[mask.astype(bool)].astype(np.int64)
        found, inside = [], 0
        for buffer in self.buffers:
            of_buffer = addresses[(addresses >= buffer.begin) & (addresses < buffer.end)]
            if len(of_buffer):
                places, rest = np.divmod(of_buffer - buffer.begin, buffer.size)
                assert not rest.any(), f"{does} between two elements"
                assert buffer.owners[places].all(), f"{does} beside a tensor's elements"
                found.append((buffer, places))
                inside += len(places)
        assert inside == len(addresses), f"{does} outside of every tensor"
        return found, inside

    def _check_load(self, program: int, found: list[tuple[Buffer, Any]], count: int) -> None:
        self.loads += count
        for buffer, places in found:
            assert not buffer.unwritten[places].any(), "reads what was never written"
            others = (buffer.writer[places] != NOBODY) & (buffer.writer[places] != program)
            assert not others.any(), "reads what another program wrote"
            reader = buffer.reader[places]
            buffer.reader[places] = np.where((reader == NOBODY) | (reader == program), program, SEVERAL)

    def _check_store(self, program: int, found: list[tuple[Buffer, Any]], count: int) -> None:
        self.stores += count
        for buffer, places in found:
            assert (buffer.owners[places] == 1).all(), "writes to a tensor that it also got under another name"
            for users, what in ((buffer.writer, "wrote"), (buffer.reader, "read")):
                others = (users[places] != NOBODY) & (users[places] != program)
                assert not others.any(), f"writes what another program {what}"
            buffer.writer[places] = program
            buffer.unwritten[places] = False
