"""The model beside published speeds of other attention kernels: `python -m benchmarks.calibrate`, without a GPU.

Prints results/calibration.json, which has what was read from their machine code. To read it again:

    python -m benchmarks.calibrate FOLDER

with compiled kernels FOLDER/*.cubin, as Triton's and CuTe DSL's caches have them, and beside each a .json of the same
name: {"kernel": a name in KERNELS, "compiler": "Triton 3.6.0", "tile": [queries, keys], "warps": those that compute,
"shared": bytes}. Of several with the same kernel and compiler the one that the model finds fastest counts.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results" / "calibration.json"


class Kernel(NamedTuple):
    dim: int
    layout: str  # causal or full
    published: dict[tuple[int, int], int]  # by tokens and heads of all sequences: 10^12 operations per second, H100 SXM
    source: str


_FA3 = "arXiv 2407.08608, figure 5"
# Forward passes in 16 bits; as many key heads as query heads. The code that was read: the tutorial's kernel, written
# anew after triton-lang/triton at 003da478, with pointers in tiles of 64 or 128 x 32 or 64, 4 warps and 3 or 4 stages,
# with TMA also in wider ones up to 128 x 128 with 8 warps, from 2 stages; the FlexAttention template of torch 2.13 with
# its tile for an H100; flash-attn-4 4.0.0b36.
KERNELS = {
    "Triton tutorial 06, D 64, full": Kernel(64, "full", {(2048, 256): 396, (8192, 64): 401}, _FA3),
    "Triton tutorial 06, D 64, causal": Kernel(64, "causal", {(2048, 256): 342, (8192, 64): 376}, _FA3),
    "Triton tutorial 06, D 128, full": Kernel(128, "full", {(2048, 128): 389, (8192, 32): 392}, _FA3),
    "Triton tutorial 06, D 128, causal": Kernel(128, "causal", {(2048, 128): 323, (8192, 32): 369}, _FA3),
    "Triton tutorial 06 with TMA, D 128, full": Kernel(
        128, "full", {(2048, 128): 428, (8192, 128): 464}, "facebookexperimental/triton#206"
    ),
    "FlexAttention, D 128, full": Kernel(128, "full", {(2048, 128): 370, (8192, 32): 402}, "pytorch/benchmark#2443"),
    "FlashAttention 4, D 128, causal": Kernel(128, "causal", {(2048, 32): 460, (4096, 32): 572}, "mlc-ai/pith-train#2"),
    "Triton tutorial 06, backward": Kernel(128, "causal", {}, "no speed on an H100 was found"),
}


def read(cubin: Path) -> tuple[str, str, dict[str, Any]]:
    """Kernel, compiler, and a record as compile_report's of what stands in the machine code."""
    from benchmarks import compile_report
    from benchmarks.aot import disassembled

    said = json.loads(cubin.with_suffix(".json").read_text())
    kernel, (bm, bn) = KERNELS[said["kernel"]], said["tile"]
    used = disassembled(cubin, said["shared"])
    shape = {"BM": bm, "BN": bn, "DIM": kernel.dim, "BLOCK_DIM": kernel.dim, "BLOCK_VALUE_DIM": kernel.dim}
    record = {
        "kernel": "forward",
        "config": [bm, bn, said["warps"], said.get("stages", 0)],
        "registers": used.registers,
        "spilled_bytes": used.spilled_bytes,
        "shared_bytes": used.shared_bytes,
        "shape": shape | {"with_value": 1},
    }
    return said["kernel"], said["compiler"], record | compile_report.read(_case(kernel), record, used.listing)


def modelled(kernel: Kernel, record: dict[str, Any], length: int, heads: int) -> float:
    """10^12 operations per second."""
    from benchmarks.compile_report import timed

    times = timed(_case(kernel), record, length, heads, heads)
    pairs = length**2 / (2 if kernel.layout == "causal" else 1)
    return 4 * pairs * kernel.dim * heads / times["total"] / 1e6 if times else 0.0


def errors(records: dict[str, dict[str, Any]]) -> dict[tuple[str, str, int], float]:
    """Modelled over published speed, less one, by kernel, compiler and length."""
    return {
        (name, compiler, length): modelled(KERNELS[name], record, length, heads) / value - 1
        for name in KERNELS
        for compiler, record in records.get(name, {}).items()
        for (length, heads), value in KERNELS[name].published.items()
    }


def error() -> str:
    """How far off the model is, in words."""
    found = errors(committed()).values()
    return (
        f"The model's error on these kernels is {min(found):+.0%} to {max(found):+.0%}. Clocks, rates and latencies "
        "are published ones; none was fitted. But how warps take turns and start (schedule.py) was chosen among rules "
        "that hardware could have, with the rows of 8192 tokens without a mask in view; the others were computed once, "
        "afterwards. Where there are several tiles to choose from, as in the tutorial's autotuning, the one that the "
        "model finds fastest counts. The figures are of Triton's versions of 2024 and 2025 on other hosts, which "
        "differ by up to 25 %. No program as short as the band's is among these kernels: its error is not known."
    )


def committed() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = json.loads(RESULTS.read_text())
    return found


def _case(kernel: Kernel) -> Any:
    from benchmarks.compile_report import TIMED, Case

    return Case(TIMED, kernel.dim, "bfloat16", "attention", kernel.layout)


def table() -> Table:
    records = committed()
    found = Table(
        "kernel", "machine code", "tile, warps, programs per SM", "T", "published", "modelled", "error", "source",
        title="The model beside published speeds: TFLOPS of forward passes on an H100",
    )  # fmt: skip
    for (name, compiler, length), error in errors(records).items():
        record = records[name][compiler]
        bm, bn, warps, _ = record["config"]
        published = next(value for (tokens, _), value in KERNELS[name].published.items() if tokens == length)
        speeds = (str(published), f"{published * (1 + error):.0f}", f"{error:+.0%}")
        tile = f"{bm} x {bn}, {warps}, {record['resident']}"
        found.add_row(name, compiler, tile, str(length), *speeds, KERNELS[name].source)
    for name in [name for name in KERNELS if name not in records]:
        found.add_row(name, "", "", "", "", "", "not calibrated", KERNELS[name].source)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="compiled kernels to read")
    arguments = parser.parse_args()
    if arguments.folder:
        records: dict[str, dict[str, Any]] = {}
        for cubin in sorted(arguments.folder.glob("*.cubin")):
            name, compiler, record = read(cubin)
            shape = list(KERNELS[name].published)[-1]
            best = records.setdefault(name, {}).setdefault(compiler, record)
            if modelled(KERNELS[name], record, *shape) > modelled(KERNELS[name], best, *shape):
                records[name][compiler] = record
        RESULTS.write_text(json.dumps(records, indent=1, sort_keys=True) + "\n")
    Console(width=160).print(table(), error())


if __name__ == "__main__":
    main()
