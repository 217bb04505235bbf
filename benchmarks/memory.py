"""Peak memory of one contender, in a process of its own: `python -m benchmarks.memory NAME` prints it as JSON.

Measured is resident memory: after one call that pays for initialisation, the operating system's high-water mark is
reset, and read again after a second call; its difference to the memory resident in between is the peak, the result
included. Freed memory is returned at once, so none hides in the allocator. Linux only; elsewhere there is no figure.
"""

from __future__ import annotations

import functools
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.contenders import CASES, CONTENDERS, Case, contenders

RESET = Path("/proc/self/clear_refs")
STATUS = Path("/proc/self/status")


@functools.cache
def peaks(name: str) -> dict[str, float | None]:
    """MiB by `str` of a case, for all cases the contender runs in."""
    return alone("benchmarks.memory", name)


def alone(*module: str) -> Any:
    """The JSON that `python -m *module` prints, run in a process that returns freed memory at once."""
    # glibc keeps freed blocks below this threshold; above it they are mapped, and unmapped when freed.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    command = [sys.executable, "-m", *module]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return json.loads(done.stdout)


def peak(name: str, case: Case) -> float | None:
    """MiB that one call of a contender adds at its peak."""
    inputs = case.inputs()
    with torch.no_grad():
        return added(lambda: CONTENDERS[name](*inputs))


def added(call: Callable[[], Any]) -> float | None:
    """MiB that a call adds at its peak to what was resident before it."""
    if not RESET.exists():
        return None
    call()
    gc.collect()
    RESET.write_text("5")
    before = _resident("VmRSS")
    _ = call()
    return (_resident("VmHWM") - before) / 1024


def _resident(field: str) -> int:
    """KiB."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1])


if __name__ == "__main__":
    name = sys.argv[1]
    print(json.dumps({str(case): peak(name, case) for case in CASES if name in contenders(case)}))
