"""What `Received(last=32)` costs beside `Received()`, from an lse: `python -m benchmarks.last_queries [LENGTH]`.

Prints the processor time of both and their ratio, with the compiled sums and in plain PyTorch, on the CPU.
"""

from __future__ import annotations

import sys
import time
from statistics import median

import torch
from torch import Tensor

import attnstats
from attnstats import Received
from attnstats.tiled import native
from benchmarks.summary import over, table

HEADS, DIM, LAST, ROUNDS = 2, 64, 32, 3


def measured(length: int, rounds: int = ROUNDS) -> dict[str, tuple[list[float], list[float]]]:
    """Seconds of every round, of all queries and of the last, by the way in which they are computed."""
    query, key = torch.randn(2, 1, HEADS, length, DIM)
    lse = attnstats.attention(query, key, key, statistics=["lse"]).statistics.lse
    seconds: dict[str, tuple[list[float], list[float]]] = {}
    enabled = native.enabled
    for name in ("compiled", "plain"):
        native.enabled = enabled and name == "compiled"
        of_all, of_last = seconds[name] = ([], [])
        for _ in range(rounds):
            of_all.append(_seconds(query, key, lse, Received()))
            of_last.append(_seconds(query, key, lse, Received(LAST)))
    native.enabled = enabled
    return seconds


def _seconds(query: Tensor, key: Tensor, lse: Tensor, statistic: Received) -> float:
    start = time.process_time()
    attnstats.statistics_from_lse(query, key, lse, statistics=[statistic])
    return time.process_time() - start


def main(length: int) -> None:
    rows = [
        (name, f"{1e3 * median(of_all):.0f}", f"{1e3 * median(of_last):.1f}", f"{over(of_last, of_all):.3f}")
        for name, (of_all, of_last) in measured(length).items()
    ]
    print(f"T = {length}, {HEADS} heads, D {DIM}, causal, float32; milliseconds of processor time\n")
    print(*table(["sums", "Received()", f"Received(last={LAST})", "ratio"], rows), sep="\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 8192)
