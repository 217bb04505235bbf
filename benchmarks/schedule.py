"""How long code of a Hopper kernel takes: its machine code, played on one of a multiprocessor's four schedulers.

The four are alike, and so are the four warps of a warp group, so one of them stands for all. A warp issues in order, at
the earliest when the stall count of its instruction before has passed, the scoreboards that this one waits for are
clear and the unit that it needs is free: all of that is in the machine code. Matmuls of WGMMA go on beside it until the
code waits for them, a barrier holds a program's warps together, and warps of programs that are resident side by side
share the units: the warp that issued last goes on as long as it can, then comes the youngest (Huerta et al., arXiv
2503.20481). So what overlaps is what this code lets overlap.

Not played: cache misses, bank conflicts, queues of the memory system, and branches (all of the code runs).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

from benchmarks.sass import Instruction, macs

# An instruction's unit and the clocks that a warp takes of it: 32 lanes over a scheduler's quarter of the results per
# clock in the CUDA programming guide's table of arithmetic throughput, compute capability 9.0. HMMA: 16x8x16 at 62 % of
# WGMMA's rate (Luo et al., arXiv 2402.13499).
UNITS: tuple[tuple[str, float, str], ...] = (
    ("mufu", 8, r"MUFU"),
    ("fma", 1, r"F(FMA|MUL|ADD)2?|H(FMA|MUL|ADD)2\w*"),
    ("fma", 2, r"IMAD"),
    ("tensor", 6.5, r"HMMA"),
    ("shared", 4, r"SHFL|REDUX|LDSM|STSM|LDS|STS|LDG|STG|LDL|STL|LDGSTS|ATOMS"),
    ("issue", 1, r"U\w+|R2UR|S2R|S2UR|CS2R|BAR|BRA|EXIT|NOP|\w*DEPBAR|WARPGROUP|MEMBAR|FENCE|SYNCS|HGMMA|LDC"),
    ("alu", 2, r".*"),
)
# Clocks until the result is there: L2, HBM, shared memory, HMMA from Luo et al. on an H100; others as on Ampere.
L2_LATENCY, HBM_LATENCY = 262, 479
LATENCIES: tuple[tuple[float, str], ...] = (
    (33, r"LDSM|LDS|LDL|SYNCS|HMMA"),
    (24, r"SHFL|REDUX|S2R|S2UR|R2UR|LDC|MEMBAR|FENCE|MUFU"),
    (16, r".*"),
)
SHARED_BYTES = 128  # per clock and multiprocessor
TENSOR_MACS = 2048  # of 16 bits, per clock and multiprocessor
MATMUL, BARRIER = 32, 24  # clocks from a matmul's end, and from the last warp's arrival, until the code goes on
WARM_UP = 2  # passes before the measured ones


class Played(NamedTuple):
    cycles: float  # that a multiprocessor takes for each pass of each program
    busy: dict[str, float]  # the share of the time that a unit is taken


@cache
def unit(opcode: str) -> tuple[str, float]:
    name, clocks, _ = next(row for row in UNITS if re.fullmatch(row[2], opcode.split(".")[0]))
    if name == "shared":  # a port for the four schedulers
        clocks = max(clocks, 4 * moved_bytes(opcode) / SHARED_BYTES)
    return name, clocks


@cache
def latency(opcode: str, memory: float) -> float:
    if opcode.startswith(("LDG.", "LDGSTS", "LDGDEPBAR")):
        return memory
    return next(row[0] for row in LATENCIES if re.fullmatch(row[1], opcode.split(".")[0]))


def operand_bytes(instruction: Instruction) -> int:
    """What a WGMMA reads from shared memory, in full: B always, A unless it is in registers."""
    m, n, k = map(int, re.findall(r"\d+", instruction.opcode)[:3])
    first = instruction.operands.split(",")[1]
    return 2 * k * (n + (m if "gdesc" in first else 0))


def moved_bytes(opcode: str) -> int:
    """What an instruction of one warp moves to or from shared memory, or by the same path."""
    if opcode.startswith(("LDSM", "STSM")):
        return 128 * (int(opcode[-1]) if opcode[-1] in "24" else 1)
    width = re.search(r"\.(64|128)\b", opcode)
    return 4 * int(width[1] if width else 32)


@dataclass
class _Warp:
    program: int
    group: int  # within the program
    ready: float = 0.0  # when the next instruction may be issued
    issued: int = 0
    boards: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))  # ends of what each waits for
    matmuls: list[float] = field(default_factory=list)  # ends of the committed groups
    begun: float = 0.0  # the start of the last matmul
    waiting: bool = False  # at a barrier


def play(
    code: Sequence[Instruction], programs: int, warps: int, passes: int = 10, memory: float = L2_LATENCY
) -> Played:
    """Passes through `code`, as a loop, by programs of `warps` warps that are resident side by side.

    They start together, as those of a launch do. memory: clocks until a load has come.
    """
    code = _without_retries(code)
    groups = max(1, warps // 4)
    crew = [_Warp(p, g) for p in range(programs) for g in range(groups)]
    free: dict[str, float] = defaultdict(float)  # when a unit is free again
    taken: dict[str, float] = defaultdict(float)  # clocks of each
    barriers: dict[tuple[int, str], list[_Warp]] = defaultdict(list)
    for program in range(programs):
        barriers[program, "turn 0"].append(_Warp(program, 0))  # the first warp group has the first turn
    begin, done = -1.0, 0  # of what is measured: while all are in their loop
    needed = passes * len(code) * len(crew)
    last = None
    while True:
        if all(w.waiting for w in crew):  # for what comes only with code that isn't played
            for warp in crew:
                warp.waiting = False
            continue
        times = [(_earliest(w, code[w.issued % len(code)], free), w is not last, -i) for i, w in enumerate(crew)]
        at, _, place = min(time for time, w in zip(times, crew, strict=True) if not w.waiting)
        last = warp = crew[-place]
        total = sum(w.issued for w in crew)
        if begin < 0 and total >= WARM_UP * len(code) * len(crew):
            begin, done, taken = at, total, defaultdict(float)
        if begin >= 0 and total - done >= needed:
            break
        instruction = code[warp.issued % len(code)]
        _issue(warp, instruction, at, free, taken, memory)
        if instruction.opcode.startswith("BAR."):
            _arrive(warp, instruction, groups, at, barriers)
        warp.issued += 1
    # Matmuls' operands and everything else go through one port; here it only must not be overbooked.
    taken["shared"] += taken.pop("reads", 0.0)
    span = max(at - begin, taken["shared"])
    measured = (total - done) / len(code) / groups
    return Played(span / measured, {name: clocks / span for name, clocks in taken.items()})


def _without_retries(code: Sequence[Instruction]) -> list[Instruction]:
    """Without what is skipped when a try-wait on a memory barrier succeeds at once."""
    kept: list[Instruction] = []
    until = 0
    for before, instruction in zip((code[-1], *code), code, strict=False):
        skips = "TRYWAIT" in before.opcode and instruction.target and instruction.target > instruction.address
        if instruction.address >= until:
            kept.append(instruction)
            until = instruction.target or 0 if skips and (instruction.target or 0) <= code[-1].address else until
    return kept


def _earliest(warp: _Warp, instruction: Instruction, free: dict[str, float]) -> float:
    """When an instruction can be issued."""
    opcode, operands = instruction.opcode, instruction.operands
    times = [warp.ready, free["issue"], free[unit(opcode)[0]]]
    for board, ends in warp.boards.items():
        if instruction.control >> 11 + board & 1:
            times += ends
    if opcode.startswith("DEPBAR") and (match := re.match(r"SB(\d), 0x(\w+)", operands)):
        ends = sorted(warp.boards[int(match[1])])
        times += ends[: max(0, len(ends) - int(match[2], 16))]
    if opcode.startswith("WARPGROUP.DEPBAR"):
        allowed = int(operands.split(",")[-1], 16)
        times += warp.matmuls[: max(0, len(warp.matmuls) - allowed)]
    if opcode.startswith("HGMMA"):
        times.append(warp.begun)  # one at most waits to begin, so warps take turns
    return max(times)


def _issue(
    warp: _Warp, instruction: Instruction, at: float, free: dict[str, float], taken: dict[str, float], memory: float
) -> None:
    opcode = instruction.opcode
    name, clocks = unit(opcode)
    end = at + latency(opcode, memory)
    free["issue"] = at + 1
    taken["issue"] += 1
    if name != "issue":
        free[name] = at + clocks
        taken[name] += clocks
        end += clocks - 1
    if opcode.startswith("HGMMA"):
        clocks, reads = 4 * macs(opcode) / TENSOR_MACS, operand_bytes(instruction) / SHARED_BYTES
        warp.begun = max(at, free["tensor"])
        free["tensor"] = warp.begun + max(clocks, reads)
        taken["tensor"] += clocks
        taken["reads"] += reads
        if "gsb0" in instruction.operands:
            warp.matmuls = [*warp.matmuls[-7:], free["tensor"] + MATMUL]
    for shift, when in ((5, end), (8, min(end, at + 16))):  # the scoreboards of the result and of the operands
        if (board := instruction.control >> shift & 7) != 7:
            warp.boards[board] = [e for e in warp.boards[board] if e > at] + [when]
    warp.ready = at + max(1, instruction.control & 15)


def _arrive(
    warp: _Warp, instruction: Instruction, groups: int, at: float, barriers: dict[tuple[int, str], list[_Warp]]
) -> None:
    """At a barrier. One that a register names gives turns: a warp group waits for its own and ends that of the next."""
    name, *count = (part.strip() for part in instruction.operands.split(","))
    arrives = instruction.opcode.startswith("BAR.ARV")
    if name.startswith("R"):
        name = f"turn {(warp.group + arrives) % groups}"
    needed = int(count[0], 16) // 128 if count and count[0].startswith("0x") else groups
    here = barriers[warp.program, name]
    here.append(warp)
    warp.waiting = not arrives
    if len(here) >= needed:
        for other in here:
            if other.waiting:
                other.waiting, other.ready = False, max(other.ready, at + BARRIER)
        here.clear()
