"""Compile what `attnstats.ops` would launch, for any target, on a machine without a GPU.

Run in a process without TRITON_INTERPRET. `recorded` swaps the launch for a recorder, so that signatures,
specialisations and configurations are those of real calls; `compiled` builds one of them. Used by test_compile.py.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from attnstats import ops

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.uint8: "*u8",
}


class Launch(NamedTuple):
    kernel: Any
    arguments: tuple[Any, ...]  # positional, tuples of strides included
    constants: dict[str, Any]
    config: ops.Config


class Resources(NamedTuple):
    registers: int
    spilled_bytes: int
    shared_bytes: int


@contextlib.contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Collect launches instead of making them; outputs keep what their memory held."""
    launches: list[Launch] = []
    original = ops._launch

    def record(kernel: Any, grid: Any, tensors: Any, sizes: Any, strides: Any, constants: Any, config: Any) -> None:
        launches.append(Launch(kernel, (*tensors, *sizes, *strides), constants, config))

    ops._launch = record
    try:
        yield launches
    finally:
        ops._launch = original


def compiled(launch: Launch, target: str) -> Any:
    """Triton's compiled kernel, with its text in `.asm`."""
    names = launch.kernel.arg_names
    signature: dict[str, Any] = {}
    constants: dict[Any, Any] = {}
    attributes: dict[Any, Any] = {}
    for i, (name, argument) in enumerate(zip(names, launch.arguments, strict=False)):
        if isinstance(argument, tuple):
            kinds = [_describe((i, j), part, constants, attributes) for j, part in enumerate(argument)]
            signature[name] = tuple(kinds)
        else:
            signature[name] = _describe((i,), argument, constants, attributes)
    for name, value in launch.constants.items():
        signature[name] = "constexpr"
        constants[(names.index(name),)] = value
    source = ASTSource(launch.kernel, signature, constants, attributes)
    options = {"num_warps": launch.config.num_warps, "num_stages": launch.config.num_stages}
    return triton.compiler.compile(source, target=TARGETS[target], options=options)


def resources(kernel: Any) -> Resources:
    """Registers per thread, spilled bytes and shared memory, off the cubin."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        usage = subprocess.run([tool, "--dump-resource-usage", cubin.name], capture_output=True, text=True, check=True)
    amounts = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage.stdout))
    return Resources(int(amounts["REG"]), int(amounts["STACK"]) + int(amounts["LOCAL"]), kernel.metadata.shared)


def _describe(path: tuple[int, ...], argument: Any, constants: dict[Any, Any], attributes: dict[Any, Any]) -> str:
    """The type of an argument as Triton's launcher specialises it: None and 1 are constants, 16 divides."""
    if isinstance(argument, torch.Tensor):
        attributes[path] = [["tt.divisibility", 16]]
        return POINTERS[argument.dtype]
    if argument is None or (isinstance(argument, int) and argument == 1):
        constants[path] = argument
        return "constexpr"
    if isinstance(argument, float):
        return "fp32"
    if argument % 16 == 0:
        attributes[path] = [["tt.divisibility", 16]]
    return "i32" if argument < 2**31 else "i64"
