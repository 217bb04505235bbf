"""Versions and hardware that a result depends on, recorded by pytest-benchmark beside the timings."""

from __future__ import annotations

import os
from typing import Any

import torch

import attnstats
from benchmarks.summary import version

collect_ignore = ["gpu"]  # no tests and no doctests, and it needs Triton


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    machine_info["attnstats"] = attnstats.__version__
    machine_info["threads"] = torch.get_num_threads()
    machine_info["cores"] = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    for package in ("torch", "triton"):
        machine_info[package] = version(package)
