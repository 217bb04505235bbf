"""Which part of a corpus is this process's: all of it, or a share under torchrun or `accelerate launch`.

Batches are dealt out whole, in turn, so that every batch has the same rows, and thus the same bits, on any number of
processes. The processes meet only at the ends: nothing is sent but "I am here". Called by corpus.py and the commands.
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
    """This process among `count`; `local` is its number on its machine."""

    rank: int = 0
    count: int = 1
    local: int = 0

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def of(self, batches: Sequence[T]) -> list[T]:
        """The batches that are this process's.

        Example:
            >>> Shard(rank=1, count=2).of(["a", "b", "c", "d"])
            ['b', 'd']
        """
        return list(batches[self.rank :: self.count])

    def first(self, action: Callable[[], T]) -> T | None:
        """Let the first process do something while the others wait: its result there, None elsewhere.

        What it raises reaches all: an InputError as it is, anything else as one that says what happened.
        """
        found, failed = None, None
        if self.is_first:
            try:
                found = action()
            except BaseException as error:
                failed = error
        if self.count > 1:
            said = [None if failed is None else str(failed) or type(failed).__name__]
            torch.distributed.broadcast_object_list(said)
            if failed is None and said[0] is not None:
                raise InputError(said[0])
        if failed is not None:
            raise failed
        return found

    def wait(self) -> None:
        """Until every process is here."""
        if self.count > 1:
            torch.distributed.barrier()


def from_environment() -> Shard:
    """What a launcher told this process by RANK, WORLD_SIZE and LOCAL_RANK; the only process without one.

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
