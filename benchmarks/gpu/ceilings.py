"""Measured rates of the card: copy bandwidth, bf16 matmul, exp2. Shares in the results are of these."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from benchmarks.gpu.environment import clocks
from benchmarks.gpu.measure import single
from benchmarks.gpu.part import Part

BLOCK = 4096  # elements of a program: 32 independent chains per thread of four warps


@triton.jit
def exp2_chain(p_x, n_steps, BLOCK: tl.constexpr):
    """Nothing but exp2 in registers: x -> 2^-x, which stays between 0 and 1."""
    o_x = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b_x = tl.load(p_x + o_x)
    for _ in range(n_steps):
        b_x = tl.exp2(-b_x)
    tl.store(p_x + o_x, b_x)


def run(part: Part) -> None:
    seconds = part.left() / 4
    measured = part.section["ceilings"] = {}
    for name, measure in (("copy", _copy), ("matmul", _matmul), ("exp2", _exp2)):
        outcome = part.attempt(name, measure, part, seconds)
        if outcome.value is not None:
            measured[name] = outcome.value
    part.section["clocks_under_load"] = _under_load(part)


def _copy(part: Part, seconds: float) -> float:
    """Bytes per second of a device-to-device copy, read and written counted."""
    size = 2**16 if part.smoke else 2**30
    source = torch.empty(size, dtype=torch.uint8, device=part.device)
    target = torch.empty_like(source)
    return 2 * size / single(part, lambda: target.copy_(source), seconds)


def _square(part: Part) -> tuple[Tensor, Tensor]:
    size = 64 if part.smoke else 8192
    one, other = (torch.randn(size, size, device=part.device, dtype=torch.bfloat16) for _ in range(2))
    return one, other


def _matmul(part: Part, seconds: float) -> float:
    """Floating-point operations per second of a large square bf16 matmul, sustained."""
    one, other = _square(part)
    return 2 * len(one) ** 3 / single(part, lambda: one @ other, seconds)


def _exp2(part: Part, seconds: float) -> float:
    """exp2 per second, with every processor busy."""
    programs, steps = (2, 3) if part.smoke else (16 * torch.cuda.get_device_properties(0).multi_processor_count, 4000)
    block = 64 if part.smoke else BLOCK
    x = torch.rand(programs * block, device=part.device)
    return programs * block * steps / single(part, lambda: exp2_chain[(programs,)](x, steps, BLOCK=block), seconds)


def _under_load(part: Part) -> dict[str, str] | None:
    """Clocks and power while matmuls run, which is when they are throttled."""
    if part.device.type != "cuda":
        return None
    one, other = _square(part)
    for _ in range(500):  # a little less than a second on an H100
        one @ other
    found = clocks()
    torch.cuda.synchronize()
    return found
