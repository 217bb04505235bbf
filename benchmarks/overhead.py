"""The time of a call on the host before a kernel starts: `python -m benchmarks.overhead`, in microseconds over SDPA's.

Runs anywhere: the launch itself is a stub, tensors are small and on the CPU, so the time is that of Python, the
allocation of buffers and the few small PyTorch operations around the kernels (on the CPU they also compute here; on a
GPU they are only launched). Triton's own launcher comes on top. Medians of rounds that take turns.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any
from unittest import mock

import torch

import attnstats
from attnstats import FAI, WAAD
from attnstats.triton import backend
from attnstats.triton.launch import launching_with

ROUNDS, CALLS = 15, 200
REQUESTS: dict[str, list[Any]] = {
    "attention": [],
    "attention + WAAD + FAI": [WAAD(10), FAI(10, 100)],
    "attention + Received": ["received"],
}


def calls() -> dict[str, Callable[[], Any]]:
    query = torch.zeros(1, 8, 16, 64, dtype=torch.bfloat16)
    key = torch.zeros(1, 2, 16, 64, dtype=torch.bfloat16)

    def ours(statistics: list[Any]) -> Callable[[], Any]:
        return lambda: attnstats.attention(query, key, key, statistics=statistics, enable_gqa=True, backend="triton")

    tiny = torch.zeros(1, 1, 1, 16)
    sdpa: dict[str, Callable[[], Any]] = {
        "SDPA": lambda: torch.nn.functional.scaled_dot_product_attention(tiny, tiny, tiny)
    }
    return sdpa | {name: ours(statistics) for name, statistics in REQUESTS.items()}


def _nothing(*_: object) -> None:
    """Takes the place of a launch."""


def measured(rounds: int = ROUNDS, count: int = CALLS) -> dict[str, float]:
    """Microseconds per call."""
    seconds: dict[str, list[float]] = {}
    with torch.no_grad(), launching_with(_nothing), mock.patch.object(backend, "unavailable", _nothing):
        for _ in range(rounds):
            for name, call in calls().items():
                call()
                start = time.perf_counter()
                for _ in range(count):
                    call()
                seconds.setdefault(name, []).append((time.perf_counter() - start) / count)
    return {name: 1e6 * median(times) for name, times in seconds.items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    times = measured()
    for name, microseconds in times.items():
        print(f"{name:24} {microseconds:6.1f} us, {microseconds - times['SDPA']:6.1f} over SDPA")
