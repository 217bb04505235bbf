"""What every statistic costs beside attention, alone and together: `python -m benchmarks.every_statistic`.

Part of `make bench`, with its heads, causal, float32, on the CPU: the forward pass at 1,024 and 4,096 tokens, and with
gradients at 2,048, where the loss is the sum of the output and of each statistic. Ratios over SDPA of the same round,
medians over rounds that take turns. Writes statistics.md into benchmarks/results.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import attnstats
from attnstats import (
    FAI,
    LSE,
    WAAD,
    Entropy,
    LocalMass,
    MaxLogit,
    MeanDistance,
    PooledMap,
    Received,
    SegmentMass,
    SinkMass,
    Statistic,
    TopKeys,
)
from benchmarks.contenders import Case
from benchmarks.summary import in_turn, over, table

RESULT = Path(__file__).parent / "results" / "statistics.md"
KEY_HEADS, ROUNDS = 3, 11
LENGTHS, WITH_GRADIENTS = (1024, 4096), 2048
REQUESTS: tuple[tuple[Statistic, ...], ...] = (
    (),
    (WAAD(10),),
    (FAI(10, 100),),
    (WAAD(10), FAI(10, 100)),
    (LocalMass(),),
    (MeanDistance(),),
    (Entropy(),),
    (MaxLogit(),),
    (Entropy(), MaxLogit()),
    (LSE(),),
    (SinkMass(),),
    (SegmentMass((0, 2, 4, 6, 8, 10, 12, 14, None)),),
    (TopKeys(),),
    (TopKeys(16),),
    (FAI(0, None),),
    (Received(),),
    (Received(64),),
    (PooledMap(64, 64),),
    (WAAD(10), FAI(10, 100), MeanDistance(), Entropy(), Received()),
)


def forward(length: int) -> dict[str, Callable[[], Any]]:
    query, key, value = Case(length, KEY_HEADS).inputs()

    def of(statistics: Sequence[Statistic]) -> Callable[[], Any]:
        options: dict[str, Any] = {"statistics": statistics, "is_causal": True, "enable_gqa": True}
        return lambda: attnstats.attention(query, key, value, **options)

    sdpa = {"SDPA": lambda: scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)}
    return sdpa | {name(request): of(request) for request in REQUESTS}


def with_gradients(length: int) -> dict[str, Callable[[], Any]]:
    query, key, value = leaves = [x.requires_grad_() for x in Case(length, KEY_HEADS).inputs()]
    options: dict[str, Any] = {"is_causal": True, "enable_gqa": True}

    def sdpa() -> Any:
        return torch.autograd.grad(scaled_dot_product_attention(query, key, value, **options).sum(), leaves)

    def of(statistics: Sequence[Statistic]) -> Callable[[], Any]:
        def call() -> Any:
            asked = {"statistics": statistics, "differentiable": bool(statistics)}
            output, stats = attnstats.attention(query, key, value, **asked, **options)
            loss: Tensor = output.sum()
            for s in statistics:
                loss = loss + stats[s].sum()
            return torch.autograd.grad(loss, leaves)

        return call

    return {"SDPA": sdpa} | {name(x): of(x) for x in REQUESTS if all(s.differentiable for s in x)}


def name(request: Sequence[Statistic]) -> str:
    return " + ".join(map(str, request)) or "no statistic"


def measured(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every round."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds + 1):
        for name in in_turn(list(calls), i):
            start = time.perf_counter()
            calls[name]()
            if i:  # the first is to warm up
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratios(lengths: Sequence[int], longest: int, rounds: int) -> dict[str, list[str]]:
    """By request: a ratio over SDPA for each length, and with gradients at `longest`, "-" where it has none."""
    columns = [measured(forward(length), rounds) for length in lengths] + [measured(with_gradients(longest), rounds)]
    return {name(x): [f"{over(c[name(x)], c['SDPA']):.2f}" if name(x) in c else "-" for c in columns] for x in REQUESTS}


def main(lengths: Sequence[int] = LENGTHS, longest: int = WITH_GRADIENTS, rounds: int = ROUNDS) -> str:
    header = ["statistics", *(f"T = {n}" for n in lengths), f"with gradients, T = {longest}"]
    rows = [(request, *cells) for request, cells in ratios(lengths, longest, rounds).items()]
    head = f"Time over that of SDPA; B1 H9/3 D64, causal, float32, {torch.get_num_threads()} threads, torch "
    return "\n".join([f"{head}{torch.__version__}", "", *table(header, rows, ["statistics"]), ""])


if __name__ == "__main__":
    text = main()
    RESULT.write_text(text)
    sys.stdout.write(text)
