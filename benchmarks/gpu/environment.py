"""Conditions of a result: device, driver, versions, clocks, commit and date. Recorded with every part."""

from __future__ import annotations

import datetime
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

import attnstats
from benchmarks.summary import version

ROOT = Path(__file__).parents[2]
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
        "ptxas": ptxas_version(),
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


def ptxas_version() -> str | None:
    """Of the ptxas that Triton assembles with."""
    path = os.environ.get("TRITON_PTXAS_PATH")
    if path is None:
        try:
            import triton
        except ImportError:
            return None
        path = str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas")
    told = output_of([path, "--version"])
    return told.strip().splitlines()[-1] if told else None


def commit() -> str | None:
    """The checked-out commit, with "+changes" where files differ from it."""
    if not (told := output_of(["git", "-C", str(ROOT), "rev-parse", "HEAD"])):
        return None
    dirty = output_of(["git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no"])
    return told.strip() + ("+changes" if dirty else "")


def output_of(command: list[str]) -> str:
    """Standard output, or nothing where the command can't run."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
