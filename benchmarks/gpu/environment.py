"""Conditions of a result: device, driver, versions, clocks, commit and date. Recorded with every part."""

from __future__ import annotations

import datetime
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch

import attnstats
from benchmarks.summary import version

ROOT = Path(__file__).parents[2]
COMMIT = ROOT / "benchmarks" / "gpu" / "commit.txt"  # `git archive` writes the commit into it
SMI = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "power.draw", "temperature.gpu")


def conditions(device: torch.device) -> dict[str, Any]:
    found: dict[str, Any] = {
        "device": platform.processor() or platform.machine(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit(),
        "attnstats": attnstats.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "triton": version("triton"),
        "transformers": version("transformers"),
        "ptxas": ptxas_version(device),
        "cpu_threads": os.cpu_count(),
        "interpreter": device.type == "cpu",
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "device": properties.name,
            "capability": ".".join(map(str, torch.cuda.get_device_capability(device))),
            "processors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "l2_mib": l2_bytes(device) / 2**20,
            "cuda": torch.version.cuda or torch.version.hip,
            "cudnn": torch.backends.cudnn.version(),
            "clocks": clocks(),
        }
    return found


def clocks() -> dict[str, str] | None:
    """The current state of this process's device by nvidia-smi; None where there is no nvidia-smi."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", f"--query-gpu={','.join(SMI)}", "--format=csv,noheader"]
    command += ["-i", os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] or "0"]
    told = output_of(command)
    return dict(zip(SMI, map(str.strip, told.split(",")), strict=False)) if told else None


def l2_bytes(device: torch.device) -> int:
    """Size of the L2 cache; an H100's 50 MB where torch doesn't know it."""
    if device.type != "cuda":
        return 0
    return getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or 50 * 2**20


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program can have; an H100's where torch doesn't know it."""
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 0) or 227 * 1024


def ptxas_version(device: torch.device) -> str | None:
    """Of the ptxas that Triton assembles with for this device: newer architectures have one of their own."""
    if device.type != "cuda" or torch.version.hip:
        return None
    try:
        from triton.backends.nvidia.compiler import get_ptxas

        major, minor = torch.cuda.get_device_capability(device)
        told = output_of([get_ptxas(10 * major + minor).path, "--version"])
    except (ImportError, RuntimeError):
        return None
    return told.strip().splitlines()[-1] if told else None


def commit() -> str | None:
    """The commit that runs, with "+changes" where tracked files differ from it; None: nobody knows.

    ATTNSTATS_COMMIT says it for a copy of the working tree, and commit.txt in an archive made by git.
    """
    if given := os.environ.get("ATTNSTATS_COMMIT"):
        return given.strip()
    if not (ROOT / ".git").exists():  # git would answer for a repository around this folder
        told = COMMIT.read_text().strip() if COMMIT.exists() else ""
        return told if told and "$" not in told else None
    if not (told := output_of(["git", "-C", str(ROOT), "rev-parse", "HEAD"])):
        return None
    dirty = output_of(["git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no"])
    return told.strip() + ("+changes" if dirty else "")


def tool(name: str) -> str | None:
    """The path of one of CUDA's tools, if it is installed."""
    return shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")


class Ran(NamedTuple):
    status: int
    output: str  # and errors, by line


def ran(command: list[str], seconds: float, **environment: str) -> Ran | None:
    """A program run from the project's folder; None: it did not end in time.

    Output goes to a file: programs started by the one that is killed would keep a pipe open.
    """
    with tempfile.TemporaryFile("w+") as output:
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=os.environ | environment, stdout=output, stderr=subprocess.STDOUT,
                check=False, timeout=seconds,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return None
        output.seek(0)
        return Ran(done.returncode, output.read())


def output_of(command: list[str]) -> str:
    """Standard output, or nothing where the command can't run."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
