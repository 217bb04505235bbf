"""Modelled time of a kernel: the work in its machine code for each unit of a GPU, divided by the unit's rate.

Read from the binary are instructions by class, multiply-adds, registers and shared memory. Modelled is that the units
overlap perfectly when at least two groups of four warps are resident (their times add up when there is one, or when
the assembler serialised the tensor-core instructions), that programs start in order as soon as there is room, and that
memory moves at a constant rate. Latencies, cache misses, falling clocks and launches are left out, so a modelled time
is a lower bound. No figure of this file was measured on a GPU.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Hardware:
    """Rates are per clock and multiprocessor (compute unit on AMD) unless they say otherwise."""

    name: str
    processors: int
    clock: float  # Hz, boost
    macs: int  # 16-bit multiply-adds of the tensor cores
    macs_fp32: int  # the same with float32 inputs; 0: there are none without TF32
    mufu: int  # exp2
    fma: int  # FP32 results
    issue: float  # instructions issued, of one warp each
    lanes: int  # threads in a warp
    hbm: float  # bytes per second
    l2: float  # bytes per second
    registers: int  # 32-bit, per multiprocessor
    shared: int  # bytes per multiprocessor
    shared_per_program: int
    shared_reserved: int  # bytes per program that the driver takes
    warps: int  # resident at most


# A100: NVIDIA A100 whitepaper (312 TFLOPS bf16, 1410 MHz, 108 SMs, 5120 bytes per clock from L2, 2.04 TB/s with 80 GB).
# H100 SXM: NVIDIA H100 whitepaper (989 TFLOPS, 132 SMs, 1830 MHz); 3.0 of its 3.35 TB/s of HBM are what is measured;
# L2 taken as wide as the A100's. B200: NVIDIA Blackwell architecture brief (2250 TFLOPS, 148 SMs, 8 TB/s); L2 as wide
# again. MI300X: AMD CDNA 3 whitepaper (1307 TFLOPS bf16, 163 fp32, 304 CUs, 2100 MHz, 5.3 TB/s, 128 bytes per clock of
# each of 16 channels of 8 L2s); a wave of 64 takes a SIMD 4 clocks, 16 for exp. MUFU and FMA rates: CUDA programming
# guide, arithmetic instructions; shared memory and registers: its table of compute capabilities.
_KB = 1024
HARDWARE = {
    "sm_80": Hardware(
        "A100 SXM",
        108,
        1.41e9,
        1024,
        0,
        16,
        64,
        4,
        32,
        2.04e12,
        5120 * 1.41e9,
        65536,
        164 * _KB,
        163 * _KB,
        1 * _KB,
        64,
    ),
    "sm_90": Hardware(
        "H100 SXM",
        132,
        1.83e9,
        2048,
        0,
        16,
        128,
        4,
        32,
        3.0e12,
        5120 * 1.83e9,
        65536,
        228 * _KB,
        227 * _KB,
        1 * _KB,
        64,
    ),
    "sm_100": Hardware(
        "B200", 148, 1.85e9, 4096, 0, 16, 128, 4, 32, 8.0e12, 5120 * 1.85e9, 65536, 228 * _KB, 227 * _KB, 1 * _KB, 64
    ),
    "gfx942": Hardware(
        "MI300X", 304, 2.1e9, 1024, 128, 16, 128, 1, 64, 5.3e12, 16 * 8 * 128 * 2.1e9, 131072, 64 * _KB, 64 * _KB, 0, 32
    ),
}


class Work(NamedTuple):
    """Work of one pass through a piece of code, of one warp; multiply-adds of the whole program."""

    instructions: int
    mufu: int
    fma: int  # results per lane
    macs: int


class Cycles(NamedTuple):
    tensor: float
    mufu: float
    fma: float
    issue: float

    def time(self, overlapped: bool) -> float:
        beside = max(self.mufu, self.fma, self.issue)
        return max(self.tensor, beside) if overlapped else self.tensor + beside

    def bound(self) -> str:
        return max(zip(self, self._fields, strict=True))[1]


class Times(NamedTuple):
    """Seconds. `total` is the modelled time, `bound` names what it is bound by."""

    processors: float  # multiprocessors busy and equally so
    quantised: float  # the same with whole programs dealt to places: waves, and the long rows of a causal triangle
    hbm: float
    l2: float
    total: float
    bound: str


def cycles(work: Work, warps: int, hardware: Hardware, fp32: bool) -> Cycles:
    """Of one multiprocessor that does nothing else."""
    macs = hardware.macs_fp32 if fp32 else hardware.macs
    threads = warps * hardware.lanes
    return Cycles(
        work.macs / macs if macs else 0.0,
        work.mufu * threads / hardware.mufu,
        work.fma * threads / hardware.fma,
        work.instructions * warps / hardware.issue,
    )


def resident(registers: int, shared: int, warps: int, hardware: Hardware) -> int:
    """Programs that fit a multiprocessor; 0 if one does not. Registers are given out by 8 per thread."""
    if shared > hardware.shared_per_program:
        return 0
    by_registers = hardware.registers // (-(-registers // 8) * 8 * warps * hardware.lanes)
    by_shared = hardware.shared // (shared + hardware.shared_reserved) if shared else hardware.warps
    return max(0, min(by_registers, by_shared, hardware.warps // warps))


def makespan(durations: list[float], places: int) -> float:
    """The time at which the last program ends if each, in order, takes the place that is free first."""
    free = [0.0] * min(places, len(durations))
    for duration in durations:
        heapq.heappush(free, heapq.heappop(free) + duration)
    return max(free)


def model(
    programs: list[float],
    places: int,
    hbm_bytes: float,
    l2_bytes: float,
    unit: str,
    overlapped: bool,
    hardware: Hardware,
) -> Times:
    """The time of a launch. programs: cycles of each, in launch order, of a multiprocessor that does nothing else.

    Programs that share a multiprocessor run slower by as many as they are, also when some places have run dry:
    the tail is overestimated. HBM overlaps with the multiprocessors if there is another program to compute.
    """
    busy = sum(programs) / hardware.processors / hardware.clock
    quantised = makespan([places * p for p in programs], places * hardware.processors) / hardware.clock
    hbm, l2 = hbm_bytes / hardware.hbm, l2_bytes / hardware.l2
    bounds = {unit: busy, "waves": quantised, "HBM": hbm, "L2": l2}
    if quantised < 1.1 * busy:
        del bounds["waves"]  # the unit is what matters
    total = max(quantised, hbm, l2) if overlapped else quantised + max(hbm, l2)
    return Times(busy, quantised, hbm, l2, total, max(bounds, key=lambda name: bounds[name]))


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
