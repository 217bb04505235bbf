"""OpenMP's settings for the command line, which `import attnstats` makes before it imports torch.

OpenMP reads them once, when torch loads it. In a program of someone else, and where the user has set them, nothing is
changed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import MutableMapping, Sequence
from pathlib import Path

# What the kernel grants a container: quota and period of cgroup v2 in one file, those of v1 in two.
QUOTAS = (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"))


def is_command_line(arguments: Sequence[str], command: Sequence[str]) -> bool:
    """True if the process is `attnstats` or `python -m attnstats`.

    Args:
        arguments: `sys.argv`, whose first entry is `-m` while Python looks for the module.
        command: `sys.orig_argv`.

    Example:
        >>> is_command_line(["/usr/bin/attnstats", "analyze"], ["python", "/usr/bin/attnstats", "analyze"])
        True
        >>> is_command_line(["-m", "report", "out"], ["python", "-u", "-m", "attnstats", "report", "out"])
        True
        >>> is_command_line(["train.py", "attnstats"], ["python", "train.py", "attnstats"])
        False
    """
    program = arguments[0] if arguments else ""
    if program == "-m" and "-m" in command:
        return command[command.index("-m") + 1 :][:1] == ["attnstats"]
    return Path(program).stem == "attnstats"


def configure(environment: MutableMapping[str, str], processors: int) -> None:
    """Set what the user left open.

    Threads that spin while they wait for the next operation cost eight times the time when anything else runs on the
    cores; more threads than processors wait for each other.
    """
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    environment.setdefault("OMP_NUM_THREADS", str(processors))


def processors(environment: MutableMapping[str, str], cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """The processors of this process: its share of those that the system lets it run on and its container has."""
    affinity = getattr(os, "sched_getaffinity", None)
    count = len(affinity(0)) if affinity else os.cpu_count() or 1
    for names in QUOTAS:
        try:
            quota, period = (int(text) for name in names for text in (cgroup / name).read_text().split())
        except (OSError, ValueError):  # absent, or `max` for no limit
            continue
        if quota > 0 and period > 0:
            count = min(count, -(-quota // period))
    together = environment.get("LOCAL_WORLD_SIZE", "")  # processes of a launcher on this machine
    return max(1, count // int(together) if together.isdecimal() and int(together) else count)


if is_command_line(sys.argv, sys.orig_argv):
    configure(os.environ, processors(os.environ))
