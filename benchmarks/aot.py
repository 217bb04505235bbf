"""Compile what attnstats/triton/launch would launch, for any target, on a machine without a GPU.

For a process without TRITON_INTERPRET. `recorded` collects launches instead of making them, so that signatures,
specialisations and configurations are those of real calls; `compiled` builds one of them.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from attnstats.triton import launch
from attnstats.triton.configs import Config, targeting

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


class Recorded(NamedTuple):
    kernel: Any
    arguments: dict[str, Any]  # groups are NamedTuples
    constants: dict[str, Any]
    config: Config


class Resources(NamedTuple):
    registers: int
    spilled_bytes: int
    shared_bytes: int
    listing: str  # of the machine code


@contextlib.contextmanager
def recorded(target: str) -> Iterator[list[Recorded]]:
    """Collect launches instead of making them, configured for `target`; outputs are left uninitialised."""
    launches: list[Recorded] = []

    def record(launched: launch.Launch, arguments: dict[str, Any]) -> None:
        launches.append(Recorded(launched.kernel, arguments, launched.constants, launched.config))

    with targeting(target), launch.launching_with(record):
        yield launches


def compiled(recorded: Recorded, target: str) -> Any:
    """Triton's compiled kernel, with its text in `.asm`."""
    kernel, config, backend = recorded.kernel, recorded.config, make_backend(TARGETS[target])
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True}
    # What the kernel is specialised for is what Triton's own launcher would find.
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound = bind(**recorded.arguments, **recorded.constants, **options)
    parsed, signature, constants, attributes = kernel._pack_args(backend, options, *bound)
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compiler.compile(source, target=TARGETS[target], options=parsed.__dict__)


def resources(kernel: Any) -> Resources:
    """Registers per thread, spilled bytes, shared memory and machine code of a compiled kernel."""
    shared = kernel.metadata.shared
    if "amdgcn" in kernel.asm:
        text = kernel.asm["amdgcn"]
        found = {name: int(number) for name, number in re.findall(r"\.(\w+):\s+(\d+)\s*$", text, re.MULTILINE)}
        # The accumulation registers count within vgpr_count on CDNA 3. A stack is for what was spilled.
        return Resources(found["vgpr_count"], found["private_segment_fixed_size"], shared, text)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        return disassembled(Path(cubin.name), shared)


def disassembled(cubin: Path, shared: int) -> Resources:
    """The same of a file; shared memory given at launch is not in it."""
    amounts = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", _cuobjdump("--dump-resource-usage", str(cubin))))
    spilled = int(amounts["STACK"]) + int(amounts["LOCAL"])
    return Resources(int(amounts["REG"]), spilled, shared, _cuobjdump("-sass", str(cubin)))


def assemblers() -> str:
    """The versions of ptxas, by target: they decide registers and schedules as much as Triton does.

    Triton ships two, and which one assembles for a target differs between its versions.
    """
    from triton.backends.nvidia.compiler import get_ptxas

    targets: dict[str, list[str]] = {}
    for name, target in TARGETS.items():
        if target.backend == "cuda":
            tool = get_ptxas(target.arch).path
            text = subprocess.run([tool, "--version"], capture_output=True, text=True, check=True).stdout
            match = re.search(r"\bV(\d[\d.]+)", text)
            assert match
            targets.setdefault(match[1], []).append(name)
    return ", ".join(f"{version} for {' '.join(names)}" for version, names in targets.items())


def _cuobjdump(option: str, path: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, option, path], capture_output=True, text=True, check=True).stdout
