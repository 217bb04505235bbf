"""Python in processes of their own: programs that must succeed, and pairs of ranks."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing.spawn import spawn

ROOT = Path(__file__).resolve().parent.parent


def python(*arguments: str, cwd: Path = ROOT, **environment: str) -> str:
    """What `python *arguments` prints; it must end with status 0 within fifteen minutes."""
    command = [sys.executable, *arguments]
    variables = os.environ | environment
    done = subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def two_ranks(function: Callable[..., None], *arguments: Any, count: int = 2) -> None:
    """Run `function(rank, *arguments)` in two processes, or more, that torch.distributed finds by their environment."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn(_on_rank, (count, port, function, arguments), nprocs=count)


def _on_rank(rank: int, count: int, port: int, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in ranks.items()})
    torch.set_num_threads(1)
    function(rank, *arguments)
    torch.distributed.destroy_process_group()
