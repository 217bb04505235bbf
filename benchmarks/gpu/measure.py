"""The clock: CUDA events on a GPU, perf_counter elsewhere; contenders take turns, medians and ratios of rounds.

A batch is a few calls between two events, on rotating inputs that together exceed the L2 cache. Before it the GPU
is kept busy for as long as the host needs to queue the batch, so that the time is the GPU's; the host's own time per
call is that of queueing. Contenders run their batches in turns, each round starting with another one, and ratios pair
batches of the same round, so that a drifting clock affects all alike.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch

from benchmarks.gpu.part import Part
from benchmarks.summary import in_turn, over

BATCH_SECONDS = 0.003  # of GPU time between two events, whose resolution is half a microsecond
MOST_CALLS = 40  # in a batch: a thousand kernels fit the launch queue
ROUNDS = (5, 25)  # fewest and most
CLOCK = 1.98e9  # of an H100 at its fastest; `_sleep` counts cycles, so that a slower one waits longer


class Entrant(NamedTuple):
    call: Callable[[int], Any]  # given the index of the inputs
    around: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext


class Batch(NamedTuple):
    seconds: float
    host: float


def race(part: Part, prefix: str, entrants: dict[str, Entrant], inputs: int, seconds: float) -> dict[str, Any]:
    """Time the entrants in turns. By name {ms, low_ms, high_ms, rounds, host_us, peak_mib} or {failure}."""
    found: dict[str, Any] = {}
    calls: dict[str, int] = {}
    warm: dict[str, Batch] = {}
    peaks: dict[str, float | None] = {}
    for name, entrant in entrants.items():
        outcome = part.attempt(f"{prefix}: {name}", _warm_up, part, entrant, inputs)
        if outcome.value is None:
            found[name] = {"failure": outcome.failure}
            continue
        warm[name], peaks[name] = outcome.value
        calls[name] = 1 if part.smoke else max(1, min(MOST_CALLS, round(BATCH_SECONDS / warm[name].seconds)))
    share = seconds / max(1, len(warm))
    fewest, most = (2, 2) if part.smoke else ROUNDS
    quota = {name: max(2, min(most, int(share / (calls[name] * max(w.seconds, w.host))))) for name, w in warm.items()}
    quota = {name: max(count, fewest) if warm[name].seconds < share else count for name, count in quota.items()}
    batches: dict[str, list[Batch]] = {name: [] for name in warm}
    names = list(warm)
    for turn in range(max(quota.values(), default=0)):
        for name in in_turn(names, turn):
            if turn < quota[name] and name not in found:
                batch = part.attempt(
                    f"{prefix}: {name}", _batch, part, entrants[name], inputs, calls[name], warm[name].host, turn
                )
                if batch.value is None:
                    found[name] = {"failure": batch.failure}
                else:
                    batches[name].append(batch.value)
    for name in names:
        if name not in found:
            found[name] = _summary(batches[name], peaks[name])
    return {name: found[name] for name in entrants}


def ratio(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Median over rounds of one's time divided by the other's in the same round."""
    return over(one["rounds"], other["rounds"])


def single(part: Part, call: Callable[[], Any], seconds: float) -> float:
    """Seconds per call of one call alone, its median over rounds."""
    entrant = Entrant(lambda _: call())
    warm, _ = _warm_up(part, entrant, 1)
    calls = 1 if part.smoke else max(1, min(MOST_CALLS, round(BATCH_SECONDS / warm.seconds)))
    rounds = 2 if part.smoke else max(ROUNDS[0], min(ROUNDS[1], int(seconds / (calls * warm.seconds))))
    return statistics.median(_batch(part, entrant, 1, calls, warm.host).seconds for _ in range(rounds))


def _warm_up(part: Part, entrant: Entrant, inputs: int) -> tuple[Batch, float | None]:
    """Compile, warm up, estimate the time; and the bytes that one call allocates, its result included."""
    if part.device.type != "cuda":
        return _batch(part, entrant, inputs, 1, 0.0), None
    with torch.no_grad(), entrant.around():
        entrant.call(0)
        peak = peak_mib(lambda: entrant.call(0))
    return _batch(part, entrant, inputs, 1, 0.0), peak


def peak_mib(call: Callable[[], Any]) -> float:
    """MiB that a call allocates on the GPU at its peak, its result included."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    _ = call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _batch(part: Part, entrant: Entrant, inputs: int, calls: int, host: float, turn: int = 0) -> Batch:
    """Seconds per call of `calls` calls in a row; the inputs go on from where the last turn left them."""
    order = [i % inputs for i in range(turn * calls, (turn + 1) * calls)]
    with torch.no_grad(), entrant.around():
        if part.device.type != "cuda":
            started = time.perf_counter()
            for i in order:
                entrant.call(i)
            took = (time.perf_counter() - started) / calls
            return Batch(took, took)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        _hold_up(min(0.05, 1.5 * host * calls))
        start.record()
        started = time.perf_counter()
        for i in order:
            entrant.call(i)
        queued = (time.perf_counter() - started) / calls
        end.record()
        end.synchronize()
        return Batch(start.elapsed_time(end) / 1e3 / calls, queued)


def _hold_up(seconds: float) -> None:
    """Keep the GPU busy. Where torch lost its private `_sleep`, times of short calls include the host's."""
    if seconds > 0 and hasattr(torch.cuda, "_sleep"):
        torch.cuda._sleep(int(seconds * CLOCK))


def _summary(batches: list[Batch], peak: float | None) -> dict[str, Any]:
    rounds = [batch.seconds * 1e3 for batch in batches]
    low, middle, high = statistics.quantiles(rounds, n=4, method="inclusive")
    return {
        "ms": round(middle, 6),
        "low_ms": round(low, 6),
        "high_ms": round(high, 6),
        "rounds": [round(ms, 6) for ms in rounds],
        "host_us": round(statistics.median(batch.host for batch in batches) * 1e6, 1),
        "peak_mib": None if peak is None else round(peak, 1),
    }
