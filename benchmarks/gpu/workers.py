"""Helper processes: named tasks of a module, side by side, each fault contained in the process that it ends.

Compiling kernels is work for the CPU and takes most of the time of correctness and sweep; later processes find a
worker's kernels in Triton's cache. A worker reads one name at a time from its standard input and answers with one line
of JSON: the result of `MODULE.perform(name, smoke)`, or the failure. A worker that dies is replaced, and the task that
it died of is a failure.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from benchmarks.gpu.environment import ROOT
from benchmarks.gpu.part import device_of, message_of, release_memory, usable

MARK = "RESULT "  # of the lines that are answers: kernels and libraries print, too
MOST = 16


Answers = dict[str, dict[str, Any]]  # by name: "ok", "seconds", and "value" or "failure"


def perform_all(
    module: str, names: Sequence[str], seconds: float, smoke: bool, keep: Callable[[Answers], None] = lambda _: None
) -> Answers:
    """The answers; names that no worker finished are missing. `keep` is given those so far, whenever there are more."""
    waiting, found = deque(names), Answers()
    deadline = time.monotonic() + seconds
    count = 1 if smoke else max(1, min(MOST, len(names), os.cpu_count() or 1))
    threads = [threading.Thread(target=_serve, args=(module, waiting, found, deadline, smoke)) for _ in range(count)]
    for thread in threads:
        thread.start()
    kept = 0
    for thread in threads:
        while thread.is_alive():
            thread.join(0.5)
            if len(found) > kept:
                kept = len(found)
                keep(dict(found))
    return found


def _serve(module: str, waiting: deque[str], found: Answers, deadline: float, smoke: bool) -> None:
    """One worker after the other, until nothing waits or the time is over."""
    while waiting and time.monotonic() < deadline:
        with tempfile.TemporaryFile("w+") as errors, _worker(module, smoke, errors, deadline) as process:
            while waiting and time.monotonic() < deadline:
                with contextlib.suppress(IndexError):  # another thread took the last one
                    name = waiting.popleft()
                    answer = _ask(process, name)
                    if answer is None and time.monotonic() >= deadline:
                        return  # killed by the clock: not finished, not failed
                    if answer is None:
                        errors.seek(0)
                        last = (errors.read().strip().splitlines() or ["no message"])[-1]
                        answer = {"ok": False, "failure": f"the process died: {last}"[:300]}
                    lost = answer.pop("lost", False)
                    found[name] = answer
                    if lost or process.poll() is not None:
                        break


@contextlib.contextmanager
def _worker(module: str, smoke: bool, errors: Any, deadline: float) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "benchmarks.gpu.workers", module, *(["--smoke"] if smoke else [])]
    # One thread each: the processes are the pool.
    environment = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
    )
    clock = threading.Timer(max(0.0, deadline - time.monotonic()), process.kill)
    clock.start()
    try:
        yield process
    finally:
        clock.cancel()
        process.kill()
        process.communicate()


def _ask(process: subprocess.Popen[str], name: str) -> dict[str, Any] | None:
    """The answer, or None where the process ended instead."""
    assert process.stdin is not None
    assert process.stdout is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(name + "\n")
        process.stdin.flush()
    for line in process.stdout:
        if line.startswith(MARK):
            return json.loads(line.removeprefix(MARK))
    process.wait()
    return None


def main() -> None:
    module, smoke = importlib.import_module(sys.argv[1]), "--smoke" in sys.argv
    for line in sys.stdin:
        started = time.monotonic()
        answer: dict[str, Any] = {"ok": True}
        try:
            answer["value"] = module.perform(line.strip(), smoke)
        except Exception as error:
            answer = {"ok": False, "failure": message_of(error)}
        if not answer["ok"]:
            release_memory()
            # With the CUDA context lost, this process can do nothing more.
            answer["lost"] = not usable(device_of(smoke))
        answer["seconds"] = round(time.monotonic() - started, 2)
        print(MARK + json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
