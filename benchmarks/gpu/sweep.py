"""Tile sizes, warps and stages, for the table of attnstats/triton/configs.py: the part "sweep".

A job is a kernel with a set of statistics and a head size; its candidates are compiled and compared with the
shipped configuration by workers side by side, then timed one by one at T = 8k. Where results/candidates.json knows
the device's architecture and the job (benchmarks/spills.py), candidates are those that are known to be free of spills.
A row holds one candidate: its time as a ratio of the shipped configuration's, or why it can't run (registers, shared
memory) or is wrong. `best` gives the entries that the table should have by these rows.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import attnstats
from attnstats import FAI, WAAD, Entropy, MaxLogit, MeanDistance, PooledMap, Received
from attnstats.triton.configs import Config, Kernel, architecture, configured
from benchmarks.gpu import workers
from benchmarks.gpu.environment import shared_memory
from benchmarks.gpu.measure import Entrant, race, ratio
from benchmarks.gpu.part import Part

SHIPPED = "shipped"
LENGTH, SMOKE_LENGTH = 8192, 20
WORKERS_SHARE = 0.55  # of the time, for compiling
CANDIDATES = Path(__file__).parents[1] / "results" / "candidates.json"


class Job(NamedTuple):
    kernel: Kernel
    statistics: tuple[Any, ...]
    from_lse: bool
    head_dim: int
    queries: int | None = None  # None: as many as keys

    @property
    def asked(self) -> str:
        return "+".join(s.name for s in self.statistics) or "no statistics"

    @property
    def name(self) -> str:
        return f"{self.kernel}, D = {self.head_dim}, {self.asked}"


def jobs(smoke: bool) -> list[Job]:
    paper = (WAAD(10), FAI(10, 100))
    if smoke:
        return [Job("forward", paper, False, 16), Job("band", paper, True, 16), Job("column", (Received(),), True, 16)]
    found = []
    for dim in (128, 64, 256):
        found += [
            Job("forward", paper, False, dim),
            Job("forward", (), False, dim),
            Job("column", (Received(),), True, dim),
            Job("band", paper, True, dim),
            Job("forward_loop", (MeanDistance(), Entropy(), MaxLogit()), False, dim),
            Job("decode", paper, False, dim, queries=1),
            Job("pooled", (PooledMap(8, 8),), True, dim),
        ]
    return found


def text_of(config: Config) -> str:
    return f"{config.BM}x{config.BN}, {config.num_warps} warps, {config.num_stages} stages"


def record() -> dict[str, dict[str, dict[str, Any]]]:
    """By target, job and candidate the spilled bytes and the shared memory, as far as they were compiled."""
    return json.loads(CANDIDATES.read_text()) if CANDIDATES.exists() else {}


def free_of_spills(job: Job) -> list[Config]:
    """The candidates that are known to run well on this device, or all where nothing is known of the job."""
    device = torch.device("cuda")
    known = record().get(architecture(device), {}).get(job.name)
    every = candidates(job, smoke=False)
    if not known:
        return every
    limit = shared_memory(device)
    found = {text for text, x in known.items() if not x["spilled"] and x["shared"] <= limit}
    return [config for config in every if text_of(config) in found]


def candidates(job: Job, smoke: bool) -> list[Config]:
    """Configurations worth trying: none that surely exceeds registers or shared memory."""
    if smoke:
        return [Config(16, 32, 4, 2)]
    if job.kernel == "decode":
        # A tile holds the few rows of one group, whose number doesn't depend on the table.
        return [Config(16, *rest) for rest in itertools.product((64, 32, 128), (4, 2, 8), (3, 2, 4))]
    found = []
    heights = (64, 128, 256) if job.kernel == "band" else (64, 128)  # of all heads that share a tile in the band
    for rows, keys, warps, stages in itertools.product(heights, (32, 64, 128), (4, 8), (2, 3, 4)):
        tile, dim = rows * keys, job.head_dim
        attends = job.kernel in ("forward", "forward_loop")
        resident, streamed = (keys, rows) if job.kernel in ("column", "pooled") else (rows, keys)
        shared = 2 * dim * (resident + stages * streamed * (2 if attends else 1))
        accumulated = rows * dim if attends else tile  # floats that live through the loop
        registers = (tile + accumulated) / (32 * warps)
        if shared <= 227 * 1024 and registers <= 224 and not (warps == 8 and tile <= 64 * 32):
            found.append(Config(rows, keys, warps, stages))
    # Middling tiles first: the time may end before the list.
    return sorted(found, key=lambda c: (abs(math.log2(c.BM * c.BN) - 13), abs(c.num_stages - 3)))


def run(part: Part) -> None:
    rows = part.section["rows"] = []
    by_name = all_tasks(part.smoke)
    tried = workers.perform_all(__name__, in_order(by_name), WORKERS_SHARE * part.left(), part.smoke)
    every = jobs(part.smoke)
    for i, job in enumerate(every):
        mine = {name: config for name, (of, config) in by_name.items() if of == job}
        untried = [name for name in mine if name not in tried]
        if untried:
            part.leave_out(f"{len(untried)} of {len(mine)} candidates for {job.name}", "no time left")
        rows += [
            {"job": job.name, **config._asdict(), "failure": tried[name]["failure"]}
            for name, config in mine.items()
            if name in tried and not tried[name]["ok"]
        ]
        runnable = {name: config for name, config in mine.items() if name in tried and tried[name]["ok"]}
        if runnable and not part.out_of_time(f"timing of {job.name}", 0.0 if part.smoke else 2.0):
            rows += _race(part, job, {SHIPPED: None} | runnable, part.left() / (len(every) - i))
        part.save()


def best(rows: list[dict[str, Any]]) -> dict[str, dict[int, tuple[Config, float]]]:
    """By kernel and head size the candidate with the least time, and that as a ratio of the shipped one's.

    Jobs that share tiles get the least mean over them, of candidates that ran in all. forward_loop has forward's, so
    that asking for statistics changes no bit of the output.
    """
    jobs: dict[tuple[str, int], dict[str, dict[Config, float]]] = {}
    for row in rows:
        if row.get("over_shipped") and not row.get("shipped"):
            config = Config(*(row[field] for field in Config._fields))
            kernel = "forward" if row["kernel"] == "forward_loop" else row["kernel"]
            by_job = jobs.setdefault((kernel, row["head_dim"]), {})
            by_job.setdefault(row["job"], {})[config] = row["over_shipped"]
    found: dict[str, dict[int, tuple[Config, float]]] = {}
    for (kernel, dim), by_job in jobs.items():
        everywhere = set.intersection(*(set(ratios) for ratios in by_job.values()))
        means = {c: sum(ratios[c] for ratios in by_job.values()) / len(by_job) for c in everywhere}
        if means:
            config = min(means, key=lambda c: means[c])
            found.setdefault(kernel, {})[dim] = config, means[config]
    return found | ({"forward_loop": found["forward"]} if "forward" in found else {})


def perform(name: str, smoke: bool) -> None:
    """Compile a candidate and compare it with the shipped configuration, on a short sequence."""
    job, config = all_tasks(smoke)[name]
    with torch.no_grad():
        # A multiple of 16, as T = 8k is: Triton compiles others anew. Many keys, or few queries would not be cut into
        # splits.
        inputs = _inputs(job, smoke, SMOKE_LENGTH if smoke else 608 if job.queries is None else LENGTH, 1)[0]
        for mine, right in zip(_call(job, config, inputs), _call(job, None, inputs), strict=True):
            # Another order of the same sums; bf16 outputs differ by a rounding.
            error = float((mine.float() - right.float()).abs().max() / right.float().abs().max())
            assert error <= 0.02, f"differs from the shipped configuration by {error:.2g} of the largest value"


def _race(part: Part, job: Job, runnable: dict[str, Any], seconds: float) -> list[dict[str, Any]]:
    outcome = part.attempt(f"{job.name}: inputs", _inputs, job, part.smoke, SMOKE_LENGTH if part.smoke else LENGTH, 2)
    if outcome.value is None:
        return []
    inputs = outcome.value
    entrants = {name: _entrant(job, config, inputs) for name, config in runnable.items()}
    # A few milliseconds each are enough to rank them.
    found = race(part, job.name, entrants, len(inputs), min(seconds, 0.08 * len(runnable)))
    shipped = found[SHIPPED]
    rows = []
    for name, times in found.items():
        row = (
            {"job": job.name, "kernel": job.kernel, "head_dim": job.head_dim}
            | (runnable[name]._asdict() if runnable[name] else {"shipped": True})
            | times
        )
        if times.get("ms") and shipped.get("ms"):
            row["over_shipped"] = round(ratio(times, shipped), 4)
        rows.append(row)
    return rows


def _entrant(job: Job, config: Any, inputs: list[Any]) -> Entrant:
    return Entrant(lambda i: _call(job, config, inputs[i]))


def _call(job: Job, config: Any, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    query, key, lse = inputs
    arguments: dict[str, Any] = {"statistics": job.statistics, "enable_gqa": True, "backend": "triton"}
    call: Callable[..., Any] = functools.partial(attnstats.attention, query, key, key)
    if job.from_lse:
        call = functools.partial(attnstats.statistics_from_lse, query, key, lse)
    if config is None:
        found = call(**arguments)
    else:
        with configured(job.kernel, config):
            found = call(**arguments)
    if job.from_lse:
        return [found[s] for s in job.statistics]
    return [found.output, *(found.statistics[s] for s in job.statistics)]


def _inputs(job: Job, smoke: bool, length: int, sets: int) -> list[tuple[Tensor, ...]]:
    device = "cpu" if smoke else "cuda"
    dtype = torch.float16 if smoke else torch.bfloat16
    heads, key_heads = (2, 1) if smoke else (32, 8) if job.head_dim <= 128 else (16, 8)
    found: list[tuple[Tensor, ...]] = []
    for _ in range(sets):
        query = torch.randn(1, heads, job.queries or length, job.head_dim, device=device, dtype=dtype)
        key = torch.randn(1, key_heads, length, job.head_dim, device=device, dtype=dtype)
        _, stats = attnstats.attention(query, key, key, enable_gqa=True, backend="triton")
        found.append((query, key, stats.lse))
    return found


def all_tasks(smoke: bool) -> dict[str, tuple[Job, Any]]:
    return {
        f"{job.name}: {text_of(config)}": (job, config)
        for job in jobs(smoke)
        for config in (candidates(job, smoke) if smoke else free_of_spills(job))
    }


def in_order(tasks: dict[str, tuple[Job, Any]]) -> list[str]:
    """Tasks in order: head size by head size, and within one the jobs take turns."""
    by_dim: dict[int, dict[str, list[str]]] = {}
    for name, (job, _) in tasks.items():
        by_dim.setdefault(job.head_dim, {}).setdefault(job.name, []).append(name)
    return [
        name
        for by_job in by_dim.values()
        for together in itertools.zip_longest(*by_job.values())
        for name in together
        if name is not None
    ]
