"""What reading a T x T mask costs beside the call that it is for: `python -m benchmarks.mask_reading [LENGTH]`.

The call is attention with WAAD(10) and FAI(10, 100), causal, of the heads of `make bench`; every call reads its mask
anew. Prints the processor time of both and their ratio, the median over rounds of times of the same round, with the
compiled comparison and in plain PyTorch, on the CPU.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor

from attnstats.core import library
from attnstats.core.patterns import recognise
from benchmarks.contenders import Case, ours
from benchmarks.summary import over, table

KEY_HEADS, ROUNDS = 3, 15


def masks(length: int) -> dict[str, Tensor]:
    """Causal masks (1, 1, T, T), with a tenth of the keys hidden or none."""
    causal = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
    padded = causal.clone()
    padded[..., : length // 10] = False
    flags = {"causal": causal, "causal, padded": padded}
    floats = {f"{name}, float32": torch.zeros(x.shape).masked_fill(~x, -math.inf) for name, x in flags.items()}
    return {f"{name}, bool": x for name, x in flags.items()} | floats


def measured(length: int, rounds: int = ROUNDS) -> dict[tuple[str, str], tuple[list[float], list[float]]]:
    """Seconds of every round, of reading and of the call, by mask and by the way in which it is compared."""
    inputs = Case(length, KEY_HEADS).inputs()
    seconds: dict[tuple[str, str], tuple[list[float], list[float]]] = {}
    enabled = library.enabled
    for way in ("compiled", "plain"):
        library.enabled = enabled and way == "compiled"
        for name, mask in masks(length).items():
            of_reading, of_call = seconds[name, way] = ([], [])
            for i in range(rounds + 1):
                pair = _seconds(recognise, mask, length), _seconds(ours, *inputs)
                if i:  # the first is to warm up
                    of_reading.append(pair[0])
                    of_call.append(pair[1])
    library.enabled = enabled
    return seconds


def _seconds(function: Callable[..., Any], *arguments: Any) -> float:
    start = time.process_time()
    function(*arguments)
    return time.process_time() - start


def main(length: int) -> None:
    rows = [
        (name, way, f"{1e3 * median(reading):.2f}", f"{1e3 * median(call):.0f}", f"{over(reading, call):.4f}")
        for (name, way), (reading, call) in measured(length).items()
    ]
    print(f"T = {length}, B1 H9/3 D64, causal, float32; milliseconds of processor time\n")
    print(*table(["mask", "comparison", "reading", "call", "ratio"], rows, ["mask", "comparison"]), sep="\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 4096)
