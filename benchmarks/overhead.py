"""The time of a call on the host until its kernels are started: `python -m benchmarks.overhead`, in microseconds.

Runs anywhere that has a C compiler. Triton compiles for an H100, binds and launches as it would there, down to the CUDA
driver, which is one that does nothing (idle_driver.c); the attention kernel of `flash` is a stub. Tensors are small and
on the CPU, so the few small PyTorch operations around the kernels compute here; on a GPU they are only launched, which
takes longer: `operations` counts them. Medians of rounds that take turns, best on a machine that does nothing else.
For a process without TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import attnstats
from attnstats import FAI, WAAD
from attnstats.flash import providers
from attnstats.triton import backend

ROUNDS, CALLS = 15, 200
BOTH: list[Any] = [WAAD(10), FAI(10, 100)]
REQUESTS: dict[str, tuple[str, list[Any]]] = {
    "triton: attention": ("triton", []),
    "triton: attention + WAAD + FAI": ("triton", BOTH),
    "triton: attention + Received": ("triton", ["received"]),
    "flash: attention": ("flash", []),
    "flash: attention + WAAD + FAI": ("flash", BOTH),
    "flash: attention + Received": ("flash", ["received"]),
}
FROM_LSE = "triton: WAAD + FAI from an lse"
NO_OPERATIONS = ("aten.view", "aten.detach", "aten.select", "aten.unbind", "aten.expand", "aten.empty")


@contextlib.contextmanager
def idle_driver() -> Iterator[Callable[[], int]]:
    """Inside, Triton launches for a GPU that isn't there. Yields the count of launches so far."""
    import triton

    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "libcuda.so.1"
        source = Path(__file__).with_name("idle_driver.c")
        compiler = [os.environ.get("CC", "cc"), "-shared", "-fPIC", "-O2", "-w", "-Wl,-soname,libcuda.so.1"]
        subprocess.run([*compiler, "-o", str(library), str(source)], check=True)
        count: Any = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL).idle_launches
        with mock.patch.dict(os.environ, {"TRITON_LIBCUDA_PATH": folder}):
            from triton.backends.nvidia.driver import CudaDriver

            driver = CudaDriver()
            driver.get_current_device = lambda: 0
            driver.get_current_stream = lambda device: 0
            driver.get_device_capability = lambda device=0: (9, 0)
            triton.runtime.driver.set_active(driver)
            # What a kernel needs of the device's memory for itself.
            triton.set_allocator(lambda size, _alignment, _stream: torch.empty(size, dtype=torch.uint8))
            yield count


class Operations(TorchDispatchMode):
    """Counts the operations that a GPU would be given."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not str(function).startswith(NO_OPERATIONS):
            self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def calls() -> dict[str, Callable[[], Any]]:
    query = torch.zeros(1, 8, 16, 64, dtype=torch.bfloat16)
    key = torch.zeros(1, 2, 16, 64, dtype=torch.bfloat16)
    lse = torch.zeros(1, 8, 16)

    def ours(name: str, statistics: list[Any]) -> Callable[[], Any]:
        return lambda: attnstats.attention(query, key, key, statistics=statistics, enable_gqa=True, backend=name)

    def beside() -> Any:
        return attnstats.statistics_from_lse(
            query, key, lse, statistics=BOTH, enable_gqa=True, backend="triton", check=False
        )

    return {"SDPA": sdpa} | {name: ours(*request) for name, request in REQUESTS.items()} | {FROM_LSE: beside}


TINY = torch.zeros(1, 1, 1, 16)


def sdpa() -> torch.Tensor:
    return torch.nn.functional.scaled_dot_product_attention(TINY, TINY, TINY)


@contextlib.contextmanager
def started() -> Iterator[None]:
    """Inside, the kernels take CPU tensors, and the attention of `flash` takes SDPA's time."""
    results = torch.zeros(1, 8, 16, 64, dtype=torch.bfloat16), torch.zeros(1, 8, 16)

    def attention(*_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        sdpa()
        return results

    stub = providers.CPU._replace(refuses=lambda *_: iter(()), forward=attention)
    with (
        torch.no_grad(),
        mock.patch.object(backend, "unavailable", return_value=None),
        mock.patch.object(providers, "CPU", stub),
    ):
        yield


def measured(rounds: int = ROUNDS, count: int = CALLS) -> dict[str, dict[str, float]]:
    """Microseconds, launches and operations per call."""
    rows: dict[str, dict[str, float]] = {}
    seconds: dict[str, list[float]] = {}
    with idle_driver() as launches, started():
        every = calls()
        for name, call in every.items():
            call()
            before = launches()
            with Operations() as operations:
                call()
            rows[name] = {"launches": launches() - before, "operations": len(operations.names)}
        for _ in range(rounds):
            for name, call in every.items():
                call()
                start = time.perf_counter()
                for _ in range(count):
                    call()
                seconds.setdefault(name, []).append((time.perf_counter() - start) / count)
    return {name: {"us": 1e6 * median(seconds[name]), **row} for name, row in rows.items()}


def main() -> None:
    import triton

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--calls", type=int, default=CALLS)
    parser.add_argument("--json", action="store_true", help="print nothing else")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = measured(arguments.rounds, arguments.calls)
    if arguments.json:
        print(json.dumps(rows))
        return
    print(f"Triton {triton.__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    for name, row in rows.items():
        over = row["us"] - rows["SDPA"]["us"]
        print(f"{name:32} {row['us']:6.1f} us, {over:6.1f} over SDPA; ", end="")
        print(f"{row['launches']} launches of ours, {row['operations']} operations of PyTorch")


if __name__ == "__main__":
    main()
