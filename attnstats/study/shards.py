"""This process's share of a corpus: all of it, or a part under torchrun or `accelerate launch`.

Whole batches are dealt out in turn, so that every batch has the same rows, and thus the same bits, on any number of
processes. The processes only wait for each other; no data is sent.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch

from attnstats.errors import InputError

T = TypeVar("T")
LONGEST_WAIT = timedelta(days=7)  # for the slowest process of a large corpus


@dataclass(frozen=True)
class Shard:
    """This process among `count` processes; `local` is its number on its machine."""

    rank: int = 0
    count: int = 1
    local: int = 0

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def of(self, batches: Sequence[T]) -> list[T]:
        """The batches of this process.

        Example:
            >>> Shard(rank=1, count=2).of(["a", "b", "c", "d"])
            ['b', 'd']
        """
        return list(batches[self.rank :: self.count])

    def first(self, action: Callable[[], T]) -> T | None:
        """Run `action` in the first process while the others wait: its result there, None elsewhere.

        An exception is raised in all processes, in the others as an InputError with its message.
        """
        result, failure = None, None
        if self.is_first:
            try:
                result = action()
            except BaseException as error:
                failure = error
        if self.count > 1:
            message = [None if failure is None else str(failure) or type(failure).__name__]
            torch.distributed.broadcast_object_list(message)
            if failure is None and message[0] is not None:
                raise InputError(message[0])
        if failure is not None:
            raise failure
        return result

    def wait(self) -> None:
        """Return once every process has called this."""
        if self.count > 1:
            torch.distributed.barrier()


def from_environment() -> Shard:
    """The shard that a launcher set by RANK, WORLD_SIZE and LOCAL_RANK; without one, the only process.

    Raises:
        InputError: the variables contradict each other.
    """
    try:
        count = int(os.environ.get("WORLD_SIZE", "1"))
        rank, local = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
    except ValueError as error:
        raise InputError(f"RANK, WORLD_SIZE, LOCAL_RANK: {error}; start with torchrun or accelerate launch") from error
    if count <= 1:
        return Shard()
    if not 0 <= rank < count:
        raise InputError(f"RANK {rank} is not below WORLD_SIZE {count}; start with torchrun or accelerate launch")
    if not torch.distributed.is_initialized():
        try:
            torch.distributed.init_process_group("gloo", timeout=LONGEST_WAIT)
        except ValueError as error:
            raise InputError(f"WORLD_SIZE {count}: {error}; start with torchrun or accelerate launch") from error
    return Shard(rank, count, local)
