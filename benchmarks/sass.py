"""Reads a kernel's machine code: its loops, and the instructions of each by class. Pure functions on text.

Takes the listing of `cuobjdump -sass` (NVIDIA) or the assembly that Triton keeps (AMD). A loop is a branch to an
earlier address and all that lies between; code that runs in some iterations only is counted as if it ran in all.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

CLASSES = ("tensor", "mufu", "fma", "shuffle", "local", "memory", "other")

# The first match decides. FMA stands for everything of the FP32 pipe. On AMD a cross-lane move is a shuffle whether
# it goes through LDS (ds_bpermute, ds_swizzle) or is folded into another instruction (DPP).
_NVIDIA = (
    ("tensor", r"HGMMA|HMMA|IMMA|DMMA|UTC\w*MMA|QGMMA|OMMA|QMMA"),
    ("mufu", r"MUFU"),
    ("fma", r"FFMA|FMUL|FADD|FFMA2|FMUL2|FADD2"),
    ("shuffle", r"SHFL|REDUX"),
    ("local", r"LDL|STL"),
    ("memory", r"LD[GSCT]\w*|LDSM|LDTM|LD|ST[GST]\w*|STSM|STTM|ST|U?LDGSTS|UTMA\w*|ATOM\w*|RED\w*|UBLKCP"),
)
_AMD = (
    ("tensor", r"v_s?mfmac?_\w+"),
    ("mufu", r"v_(exp|log|rcp|rsq|sqrt|sin|cos)\w*"),
    ("shuffle", r"ds_(bpermute|permute|swizzle)\w*|v_\w+_dpp|v_permlane\w*|v_readlane\w*"),
    ("fma", r"v_(pk_)?(fma|fmac|fmamk|fmaak|mul|add|sub|subrev|mac|mad)_(legacy_)?f32\w*"),
    ("local", r"scratch_\w+|buffer_(load|store)\w*_offen_scratch"),
    ("memory", r"(global|flat|buffer|ds|s)_(load|store|read|write|atomic)\w*"),
)
# Waiting, labelling and doing nothing: not work of the loop, and not the same from one compiler to the next.
_IDLE = re.compile(r"NOP|s_nop|s_setprio|s_delay_alu|WARPSYNC|NANOSLEEP")


class Instruction(NamedTuple):
    address: int
    opcode: str  # with modifiers: MUFU.EX2
    operands: str
    target: int | None = None  # where a branch goes
    packed: int = 1  # elements per lane: 2 for v_pk_fma_f32 and FFMA2
    control: int = 0b000000_111_111_0_0001  # scoreboards: waited for, set by reading, by writing; yield; stall count


@dataclass(frozen=True)
class Loop:
    first: int
    last: int  # address of the branch back
    body: tuple[Instruction, ...]  # without what belongs to a loop inside
    innermost: bool
    depth: int

    @property
    def counts(self) -> dict[str, int]:
        return counts(self.body)

    @property
    def macs_per_warp(self) -> int:
        """Multiply-adds of the tensor instructions of one iteration whose shape their name tells, per warp."""
        return macs_per_warp(self.body)


def parse_nvidia(listing: str) -> list[Instruction]:
    """The instructions of the first function in a listing of cuobjdump."""
    found = []
    text = r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);"
    encoding = r"(?:\s*/\* 0x\w+ \*/\s*/\* 0x(\w+) \*/)?"  # of 128 bits, of which the upper half says how to schedule
    for match in re.finditer(text + encoding, listing, re.MULTILINE):
        opcode, operands = match[2], match[3].strip()
        target = re.search(r"\b(0x[0-9a-f]+)$", operands) if opcode.startswith("BRA") else None
        packed = 2 if re.match(r"(FFMA|FMUL|FADD)2", opcode) else 1
        control = int(match[4], 16) >> 41 & 0x1FFFF if match[4] else Instruction._field_defaults["control"]
        goal = int(target[1], 16) if target else None
        found.append(Instruction(int(match[1], 16), opcode, operands, goal, packed, control))
    return found


def parse_amd(assembly: str) -> list[Instruction]:
    """The instructions of the first function in an assembly text; addresses are running numbers."""
    labels: dict[str, int] = {}
    rows: list[tuple[str, str]] = []
    for line in assembly.splitlines():
        code = line.split(";")[0].rstrip()
        if label := re.match(r"^([.\w$]+):", code):
            labels[label[1]] = len(rows)
        elif instruction := re.match(r"^\s+([a-z]\w+)\s*(.*)$", code):
            rows.append((instruction[1], instruction[2]))
        if re.match(r"\s*\.(end_amdhsa_kernel|section\s+\.AMDGPU)", code):
            break
    return [
        Instruction(
            i,
            opcode + ("_dpp" if re.search(r"\b(row_|quad_perm|wave_)", operands) and "_dpp" not in opcode else ""),
            operands,
            labels.get(operands.strip()) if opcode.startswith(("s_cbranch", "s_branch")) else None,
            2 if opcode.startswith("v_pk_") else 1,
        )
        for i, (opcode, operands) in enumerate(rows)
        if opcode.startswith(("v_", "s_", "ds_", "global_", "flat_", "buffer_", "scratch_"))
    ]


def loops(instructions: Sequence[Instruction]) -> list[Loop]:
    """By address. Two branches back to one place are one loop; a branch to itself (the end's padding) is none.

    Waits that the assembler moved behind the last exit jump back into the code they left: no loops either.
    """
    end = max((i.address for i in instructions if re.match(r"EXIT|s_endpgm", i.opcode)), default=0)
    spans: dict[int, int] = {}
    for instruction in instructions:
        if instruction.target is not None and instruction.target < instruction.address <= end:
            spans[instruction.target] = max(instruction.address, spans.get(instruction.target, 0))
    found = []
    for first, last in sorted(spans.items()):
        inner = [(a, b) for a, b in spans.items() if first <= a and b <= last and (a, b) != (first, last)]
        depth = sum(a <= first and last <= b for a, b in spans.items()) - 1
        body = tuple(
            i for i in instructions if first <= i.address <= last and not any(a <= i.address <= b for a, b in inner)
        )
        found.append(Loop(first, last, body, not inner, depth))
    return found


def outside(instructions: Sequence[Instruction], found: Iterable[Loop]) -> list[Instruction]:
    """The instructions outside all loops: prologue, epilogue."""
    spans = [(loop.first, loop.last) for loop in found]
    return [i for i in instructions if not any(a <= i.address <= b for a, b in spans)]


def kind_of(opcode: str) -> str | None:
    """The class of an instruction, None for one that does nothing."""
    if _IDLE.match(opcode):
        return None
    stem = opcode.split(".")[0]
    table = _AMD if stem[0].islower() else _NVIDIA
    return next((name for name, pattern in table if re.fullmatch(pattern, stem)), "other")


def counts(instructions: Iterable[Instruction]) -> dict[str, int]:
    """Instructions by class, every class named."""
    tally = Counter(kind_of(i.opcode) for i in instructions)
    return {name: tally[name] for name in CLASSES}


def operations(instructions: Iterable[Instruction], kind: str) -> int:
    """Results per lane of one class: a packed instruction makes two."""
    return sum(i.packed for i in instructions if kind_of(i.opcode) == kind)


def macs_per_warp(instructions: Iterable[Instruction]) -> int:
    return sum(macs(instruction.opcode) for instruction in instructions)


def macs(opcode: str) -> int:
    """Multiply-adds per warp of a tensor instruction; 0 where its name doesn't tell (UTCHMMA), and for all others.

    HGMMA.64x64x16: a group of four warps. HMMA.16816: 16x8x16, one warp. v_mfma_f32_32x32x8_bf16: one wave.
    """
    if match := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", opcode):
        return int(match[1]) * int(match[2]) * int(match[3]) // 4
    if match := re.match(r"HMMA\.(16|8)(8)(\d+)", opcode):
        return int(match[1]) * int(match[2]) * int(match[3])
    if match := re.match(r"v_mfma_f32_(\d+)x(\d+)x(\d+)", opcode):
        return int(match[1]) * int(match[2]) * int(match[3])
    return 0


def digest(loop: Loop) -> str:
    """Names the loop's opcodes in order: equal for loops that differ in registers and addresses alone."""
    return hashlib.sha256(" ".join(i.opcode for i in loop.body).encode()).hexdigest()[:12]


def serialised(loop: Loop) -> bool:
    """True if each asynchronous matmul of Hopper waits for the one before (ptxas warnings C7510 to C7515)."""
    issued = sum(i.opcode.startswith("HGMMA") for i in loop.body)
    waited = sum(i.opcode.startswith("WARPGROUP.DEPBAR") for i in loop.body)
    return issued >= 4 and 2 * waited > issued


def forbidden(instruction: Instruction) -> bool:
    """TF32, which would not reproduce scores, and atomics on memory, whose order is never the same; not the exchange by
    which a program publishes its tensor descriptors."""
    found = re.search(r"TF32|xf32|^(ATOM|RED)G?\b|_atomic", instruction.opcode)
    return bool(found) and not instruction.opcode.startswith("ATOMG.E.EXCH")
