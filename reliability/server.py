"""Runs pytest in children of a process that has imported torch, Triton and transformers already, but not attnstats.

A child changes to a tree, imports attnstats from there and runs the tests that it is given, in that order. So that a
tree with a fault costs no imports, and no state is left of the one before.
"""

from __future__ import annotations

import contextlib
import cProfile
import importlib
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType
from typing import Any

IMPORTED_BEFORE = (
    "torch", "triton", "triton.language", "torch._dynamo", "transformers", "transformers.models.llama.modeling_llama",
    "pytest", "hypothesis", "hypothesis.strategies", "numpy", "scipy.stats", "pandas", "pyarrow.parquet",
)  # fmt: skip
SETTINGS = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
PYTEST = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:benchmark", "--no-header", "-W", "ignore"]


def warm_up() -> None:
    """Import what every child needs; `attnstats` must come from the child's tree."""
    os.environ.update(SETTINGS)
    for name in IMPORTED_BEFORE:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    importlib.import_module("torch").set_num_threads(1)
    assert not any(name.split(".")[0] in ("attnstats", "tests") for name in sys.modules)


class Child:
    """A forked process that runs a function, within limits; its result is a small JSON file."""

    def __init__(self, run: Callable[[], Any], log: Path, cpu_seconds: float, seconds: float) -> None:
        self.result, self.log = log.with_suffix(".json"), log
        self.result.unlink(missing_ok=True)
        self.begun, self.seconds = time.monotonic(), seconds
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self._be(run, cpu_seconds)

    def _be(self, run: Callable[[], Any], cpu_seconds: float) -> None:
        code = 1
        try:
            os.setpgid(0, 0)
            descriptor = os.open(self.log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
            for stream in (1, 2):
                os.dup2(descriptor, stream)
            resource.setrlimit(resource.RLIMIT_CPU, (int(cpu_seconds) + 1, resource.RLIM_INFINITY))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            self.result.write_text(json.dumps(run()))
            code = 0
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
        finally:
            os._exit(code)

    def ended(self) -> dict[str, Any] | None:
        """None while it runs; then its result, with `died` where it left none."""
        pid, status, usage = os.wait4(self.pid, os.WNOHANG)
        if pid == 0:
            if time.monotonic() - self.begun < self.seconds:
                return None
            self.stop()
            _, status, usage = os.wait4(self.pid, 0)
            status = signal.SIGXCPU
        self.stop()  # what it started
        result = json.loads(self.result.read_text()) if self.result.exists() else {"died": _cause(status)}
        self.result.unlink(missing_ok=True)
        return result | {"seconds": round(usage.ru_utime + usage.ru_stime, 1)}

    def stop(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)


def _cause(status: int) -> str:
    number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    if number in (signal.SIGXCPU, signal.SIGKILL):
        return "timeout"
    return signal.Signals(number).name if number else f"exit {os.waitstatus_to_exitcode(status)}"


class Selected:
    """A pytest plugin that runs the items named, in that order, and notes the first that fails.

    Each has the seconds of processor time that are given with its name; the process is ended when it takes more.
    """

    def __init__(self, limits: dict[str, float] | None) -> None:
        self.limits, self.failed, self.passed = limits, "", 0

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        if self.limits is not None:
            place = {name: i for i, name in enumerate(self.limits)}
            items[:] = sorted((x for x in items if x.nodeid in place), key=lambda x: place[x.nodeid])

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        if self.limits is not None:
            limit = int(time.process_time() + self.limits[nodeid]) + 1
            resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and not self.failed:
            self.failed = report.nodeid
        self.passed += report.passed and report.when == "call"

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed and not self.failed:
            self.failed = f"collection of {report.nodeid}"


class Recorder(Selected):
    """Also notes which functions of the tree each item executes, and how long it takes."""

    def __init__(self, tree: Path) -> None:
        super().__init__(None)
        self.tree = f"{tree}/"
        self.items: dict[str, dict[str, Any]] = {}

    def pytest_runtest_protocol(self, item: Any, nextitem: Any) -> None:
        self._stop()
        self.item, self.begun = item.nodeid, time.process_time()
        self.profile = cProfile.Profile(subcalls=False, builtins=False)
        self.profile.enable()

    def pytest_sessionfinish(self) -> None:
        self._stop()

    def _stop(self) -> None:
        if hasattr(self, "item"):
            self.profile.disable()
            codes = [x.code for x in self.profile.getstats() if isinstance(x.code, CodeType)]
            ours = {(c.co_filename, c.co_name) for c in codes if c.co_filename.startswith(self.tree)}
            executed = sorted(f"{_place(path.removeprefix(self.tree))}:{name}" for path, name in ours)
            executed = [x for x in executed if not x.startswith("tests/")]
            self.items[self.item] = {"seconds": time.process_time() - self.begun, "executes": executed}
            del self.item


@contextlib.contextmanager
def inside(tree: Path) -> Iterator[None]:
    """The tree as the current folder, and attnstats imported from it."""
    os.chdir(tree)
    sys.path.insert(0, str(tree))
    os.environ["PYTHONPATH"] = str(tree)
    attnstats = importlib.import_module("attnstats")
    assert str(attnstats.__file__).startswith(str(tree)), attnstats.__file__
    yield


def run_tests(tree: Path, files: list[str], limits: dict[str, float]) -> dict[str, Any]:
    """{"failed": the first item that fails, or ""; "passed": how many passed; "status": pytest's}."""
    plugin = Selected(limits)
    try:
        with inside(tree):
            import pytest

            status = int(pytest.main([*PYTEST, *files], plugins=[plugin]))
    except Exception as error:
        return {"failed": f"import: {type(error).__name__}", "passed": 0, "status": 1}
    return {"failed": plugin.failed, "passed": plugin.passed, "status": status}


def record(tree: Path, file: str) -> dict[str, Any]:
    """{"items": {item: seconds and the functions "path:name" that it executes}, "status": pytest's}."""
    plugin = Recorder(tree)
    with inside(tree):
        import pytest

        status = int(pytest.main([*(x for x in PYTEST if x != "-x"), file], plugins=[plugin]))
    return {"items": plugin.items, "status": status}


def _place(path: str) -> str:
    """The file itself, where the path goes through the link attnstats/kernels."""
    return path.removeprefix("attnstats/") if path.startswith("attnstats/kernels/") else path
