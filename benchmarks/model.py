"""Modelled time of a launch on an H100, from what its loops take (schedule.py) and the memory that it moves.

Programs start in order as soon as there is room and share a multiprocessor evenly; memory moves at a constant rate.
Left out are cache misses, launches and the tail's spare room. No constant was fitted to attention: each is published.
calibrate.py compares modelled with published times of other attention kernels; no figure here was measured.
"""

from __future__ import annotations

import heapq
from typing import NamedTuple

from benchmarks.schedule import TENSOR_MACS


class Card(NamedTuple):
    """What decides how many programs are resident on a multiprocessor (compute unit on AMD)."""

    name: str
    lanes: int  # threads in a warp
    registers: int  # of 32 bits
    warps: int
    shared: int  # bytes
    shared_per_program: int
    shared_reserved: int  # bytes of each program that the driver takes


# CUDA programming guide, technical specifications per compute capability; AMD CDNA 3 whitepaper.
CARDS = {
    "sm_80": Card("A100", 32, 65536, 64, 164 << 10, 163 << 10, 1 << 10),
    "sm_86": Card("RTX 3090", 32, 65536, 48, 100 << 10, 99 << 10, 1 << 10),
    "sm_89": Card("RTX 4090", 32, 65536, 48, 100 << 10, 99 << 10, 1 << 10),
    "sm_90": Card("H100", 32, 65536, 64, 228 << 10, 227 << 10, 1 << 10),
    "sm_100": Card("B200", 32, 65536, 64, 228 << 10, 227 << 10, 1 << 10),
    "sm_120": Card("RTX 5090", 32, 65536, 48, 100 << 10, 99 << 10, 1 << 10),
    "gfx942": Card("MI300X", 64, 131072, 32, 64 << 10, 64 << 10, 0),
}

# H100 SXM. The clock falls under load, most of all while the tensor cores work: at the whitepaper's boost of 1.83 GHz
# they would compute 989 TFLOPS, where cuBLAS reaches 716 with 8192 x 8192 matrices ("Outperforming cuBLAS on H100: a
# worklog", cudaforfun.substack.com; 794 is the most that stas00/ml-engineering found for any shape). So clocks in which
# they work are as long as 716 TFLOPS make them, and all others as short as the boost's. HBM: 3.0 of 3.35 TB/s are what
# is measured. L2: measured by OpenXLA (GpuDotFusionCostModel).
PROCESSORS = 132
CLOCK = 1.83e9
TENSOR_CLOCK = 716e12 / (2 * TENSOR_MACS * PROCESSORS)
HBM = 3.0e12
L2 = 6.65e12


class Times(NamedTuple):
    """Seconds. `total` is the modelled time, `bound` names what it is bound by."""

    processors: float  # multiprocessors busy and equally so
    quantised: float  # the same with whole programs dealt to places: waves, and the long rows of a causal triangle
    hbm: float
    l2: float
    total: float
    bound: str


def seconds(cycles: float, macs: float) -> float:
    """Of a multiprocessor's clocks, in which its tensor cores do `macs` multiply-adds."""
    tensor = min(cycles, macs / TENSOR_MACS)
    return tensor / TENSOR_CLOCK + (cycles - tensor) / CLOCK


def resident(registers: int, shared: int, warps: int, card: Card) -> int:
    """Programs that fit a multiprocessor; 0 if one does not. Registers are given out by 8 per thread."""
    if shared > card.shared_per_program:
        return 0
    by_registers = card.registers // (-(-registers // 8) * 8 * warps * card.lanes)
    by_shared = card.shared // (shared + card.shared_reserved) if shared else card.warps
    return max(0, min(by_registers, by_shared, card.warps // warps))


def makespan(durations: list[float], places: int) -> float:
    """The time at which the last program ends if each, in order, takes the place that is free first."""
    free = [0.0] * min(places, len(durations))
    for duration in durations:
        heapq.heappush(free, heapq.heappop(free) + duration)
    return max(free)


def model(programs: list[float], places: int, hbm_bytes: float, l2_bytes: float) -> Times:
    """The time of a launch. programs: seconds that each, in launch order, takes of a multiprocessor.

    places: programs side by side on a multiprocessor, each of which then takes as many times as long, also when some
    places have run dry: the tail is overestimated. Memory moves beside the computation, that of this multiprocessor or
    of others.
    """
    busy = sum(programs) / PROCESSORS
    quantised = makespan([places * p for p in programs], places * PROCESSORS)
    hbm, l2 = hbm_bytes / HBM, l2_bytes / L2
    bounds = {"multiprocessors": busy, "waves": quantised, "HBM": hbm, "L2": l2}
    if quantised < 1.1 * busy:
        del bounds["waves"]
    return Times(busy, quantised, hbm, l2, max(quantised, hbm, l2), max(bounds, key=lambda name: bounds[name]))


def forward_tiles(block: int, queries: int, keys: int, offset: int, bm: int, bn: int) -> tuple[int, int]:
    """Key tiles that every row of a query block sees whole, and those with a masked pair, under a causal mask."""
    end = min(keys, offset + (block + 1) * bm)
    whole = min(keys, offset + block * bm + 1) // bn
    return whole, -(-end // bn) - whole


def column_tiles(block: int, queries: int, keys: int, offset: int, bm: int, bn: int) -> tuple[int, int]:
    """Query tiles that see a block of bn keys whole, and the others, under a causal mask."""
    first = max(0, block * bn - offset)
    partly = -(-max(0, block * bn + bn - 1 - offset - first) // bm)
    whole = max(0, queries - first - partly * bm)
    return whole // bm, partly + (whole % bm > 0)
