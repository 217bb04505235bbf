"""One pass of Nsight Compute over our kernels at T = 8k: what limits each, by the card's own counters.

`measure` runs this module under ncu and reads its table; run as a program it makes the calls that ncu watches. Their
kernels should be in Triton's cache. Clocks are left as they are.
"""

from __future__ import annotations

import csv
import sys
from typing import Any

import torch

from benchmarks.gpu import correctness, timing
from benchmarks.gpu.contenders import BAND, COLUMN, CONTENDERS, FUSED
from benchmarks.gpu.environment import ran, tool

KERNELS = ("forward", "band", "column", "backward_queries", "backward_keys")
SECTIONS = ("SpeedOfLight", "LaunchStats", "Occupancy", "WarpStateStats")


def measure(seconds: float) -> dict[str, Any]:
    """{"kernels": a dict of counters for each launch} or {"left_out": why}."""
    program = tool("ncu")
    if program is None:
        return {"left_out": "ncu is not installed"}
    options = ["--csv", "--clock-control", "none", "--target-processes", "application-only"]
    options += [x for section in SECTIONS for x in ("--section", section)]
    options += ["--kernel-name", f"regex:^({'|'.join(KERNELS)})$"]
    done = ran([program, *options, sys.executable, "-m", __name__], seconds)
    if done is None:
        return {"left_out": f"not finished after {seconds:.0f} s"}
    if kernels := parsed(done.output):
        return {"kernels": kernels}
    told = [line for line in done.output.splitlines() if line.strip()] or ["it said nothing"]
    errors = [line for line in told if "==ERROR==" in line] or told[-1:]
    return {"left_out": f"ncu ended with status {done.status}: {errors[0]}"[:300]}


def parsed(output: str) -> list[dict[str, Any]]:
    """The launches in ncu's CSV, which has a line for each counter: {"kernel", "grid", "counters": {name: value}}."""
    lines = output.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID",')), len(lines))
    launches: dict[str, dict[str, Any]] = {}
    for row in csv.DictReader(line for line in lines[start:] if line.startswith('"')):
        empty: dict[str, Any] = {"kernel": row["Kernel Name"], "grid": row.get("Grid Size"), "counters": {}}
        launch = launches.setdefault(row["ID"], empty)
        if row.get("Metric Name"):  # other lines are ncu's advice
            launch["counters"][row["Metric Name"]] = f"{row['Metric Value']} {row['Metric Unit']}".strip()
    return list(launches.values())


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    smoke = device.type == "cpu"
    case = timing.cases(smoke)[0]
    inputs = timing.inputs_of(case, device, 1)[0]
    with torch.no_grad():
        for name in (FUSED, BAND, COLUMN):
            CONTENDERS[name].run(inputs)
    correctness.repeat("backward", "bfloat16", case.shape.head_dim, smoke, repeats=0)


if __name__ == "__main__":
    main()
