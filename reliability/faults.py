"""Small faults put into the source by seed, one at a time: do the tests notice?

    make faults                          draw 230 faults, run the tests that execute each, print the score
    python -m reliability.faults --areas credit rhythm --seed 1
    python -m reliability.faults --score print the score of all that was run at this commit

A fault is killed when a test fails, the tree can't be imported, or the tests don't end within their time. The tests
of a fault are those that executed its function in a recorded run (C++: that called the compiled sums), the quick files
first; they stop at the first failure. `--whole` runs the rest of the suite for survivors. Each result is a line of
out/faults/ledger.jsonl, and a run goes on where the last one stopped. The source is that of a commit.

Equivalent faults, which change nothing that a caller could notice, are in reliability/equivalent.jsonl with the reason.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import re
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePath
from statistics import median
from typing import Any, NamedTuple

from reliability import server
from reliability.sites import Fault, changes, faults_in

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "out" / "faults"
EQUIVALENT = Path(__file__).with_name("equivalent.jsonl")
LIBRARY = "attnstats/tiled/_native.abi3.so"
COMPILE = (
    *("g++", "-std=c++17", "-O2", "-g0", "-fopenmp", "-ffp-contract=fast", "-fvisibility=hidden", "-Wno-psabi"),
    *("-fPIC", "-shared", "csrc/native.cpp", "-o", LIBRARY),
)
RECORD_LIMIT = 3600.0, 7200.0  # seconds of processor time, and by the clock
# The quickest tests of what every backend shares, and those in which kernels do most.
SHARED = (
    "tests/core/*.py",
    *(f"tests/test_{x}.py" for x in ("statistics", "reference", "contracts", "identities", "extremes")),
)
TILED = ("tests/tiled/test_native.py", "tests/tiled/test_backend.py", "tests/test_nan.py")
KERNELS = (
    "tests/triton/*.py",
    *(f"tests/test_{x}.py" for x in ("dropout", "differentiable", "features", "nan", "extremes")),
)
WHOLE = ("tests/*.py", "tests/*/*.py", "attnstats/*.py", "attnstats/*/*.py", "README.md", "docs/*.md")


class Area(NamedTuple):
    """Files that faults are drawn from, how many, and the test files that cover them."""

    files: tuple[str, ...]
    number: int
    tests: tuple[str, ...]


AREAS = {
    "credit": Area(("attnstats/credit.py",), 10, ("tests/test_credit.py", "attnstats/credit.py")),
    "rhythm": Area(
        ("attnstats/rhythm.py", "attnstats/curves.py", "attnstats/chance.py"),
        10,
        (
            "tests/test_rhythm.py",
            "tests/test_chance.py",
            "attnstats/rhythm.py",
            "attnstats/curves.py",
            "tests/test_credit.py",
        ),
    ),
    "segments": Area(("attnstats/segments.py",), 10, ("tests/test_segments.py", "attnstats/segments.py")),
    "statistics": Area(("attnstats/statistics.py", "attnstats/results.py"), 10, SHARED),
    "reference": Area(("attnstats/reference.py",), 10, (*SHARED, "tests/test_ownership.py")),
    "core": Area(
        ("attnstats/core/*.py",), 15, (*SHARED, *TILED, "tests/test_operators.py", "tests/flash/test_providers.py")
    ),
    "functional": Area(
        ("attnstats/functional.py", "attnstats/_dispatch.py", "attnstats/_operators.py"),
        10,
        (*SHARED, "tests/test_operators.py", "tests/test_functional.py"),
    ),
    "transformers": Area(("attnstats/transformers/*.py",), 15, ("tests/transformers/*.py", "tests/test_recipes.py")),
    "tiled": Area(
        ("attnstats/tiled/*.py",), 10, (*TILED, *SHARED, "tests/test_features.py", "tests/test_differentiable.py")
    ),
    "triton": Area(("attnstats/triton/*.py", "attnstats/triton/launch/*.py"), 10, (*SHARED, *KERNELS)),
    "flash": Area(("attnstats/flash/*.py",), 10, ("tests/flash/*.py",)),
    "csrc": Area(("csrc/*",), 55, (*TILED, "tests/core/test_library.py", "tests/core/test_patterns.py")),
    "kernels": Area(("kernels/*.py",), 55, KERNELS),
}
# What tests of the compiled sums execute, and those of the comparison of masks.
NATIVE, MASKS = "attnstats/tiled/native.py:evaluate", "attnstats/core/library.py:first_difference"


IMPORT_LIMIT, ITEM_LIMIT, SLOWER = 120.0, 30.0, 5.0  # seconds of processor time, and times what an item took


class Item(NamedTuple):
    """A test, and what it did when it was recorded."""

    name: str
    seconds: float
    executes: frozenset[str]  # "path:function"

    @property
    def file(self) -> str:
        return self.name.split("::")[0]

    @property
    def is_elsewhere(self) -> bool:
        """What it does of ours it does in other processes."""
        return not any(x.startswith(("attnstats/", "kernels/")) for x in self.executes)


class Recorded(NamedTuple):
    """The items of a test file, and which functions there were when it was recorded: "path:function"."""

    items: list[Item]
    functions: frozenset[str]

    @staticmethod
    def of(line: dict[str, Any]) -> Recorded:
        items = [Item(name, x["seconds"], frozenset(x["executes"])) for name, x in line["items"].items()]
        return Recorded(items, frozenset(line["functions"]))


class Drawn(NamedTuple):
    """A fault at its place in the draw.

    Attributes:
        key: of its results: what it changes, and the function around it.
    """

    area: str
    fault: Fault
    key: str


class Run(NamedTuple):
    drawn: Drawn
    tree: Path
    child: server.Child
    tests: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--areas", nargs="*", choices=AREAS, default=list(AREAS), metavar="AREA", help=", ".join(AREAS))
    parser.add_argument("--count", type=int, help="faults of each area, instead of the usual number")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commit", default="HEAD", help="whose source and tests are used")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--score", action="store_true", help="run nothing")
    parser.add_argument("--whole", action="store_true", help="survivors meet the rest of the suite, too")
    options = parser.parse_args()
    commit = _git("rev-parse", options.commit).strip()
    areas = {area: options.count or AREAS[area].number for area in options.areas}
    OUT.mkdir(parents=True, exist_ok=True)
    if not options.score:
        server.warm_up()
        with tempfile.TemporaryDirectory(prefix="faults-") as folder:
            campaign = Campaign(commit, Path(folder), options.workers, options.whole)
            for area, number in areas.items():
                campaign.run(draw(commit, area, options.seed), number)
            campaign.finish()
    print(score({area: (draw(commit, area, options.seed), number) for area, number in areas.items()}))


def draw(commit: str, area: str, seed: int) -> Iterator[Drawn]:
    """All faults of an area at a commit. Their order depends on the seed and on each fault alone, so that a change of
    the source moves no other fault."""
    sources, faults = {}, []
    for path in _git("ls-tree", "-r", "--name-only", commit).splitlines():
        if any(PurePath(path).match(p) and PurePath(path).parent == PurePath(p).parent for p in AREAS[area].files):
            sources[path] = _git("show", f"{commit}:{path}").encode()
            for fault in faults_in(path, sources[path]):
                order, around = _digest(repr((seed, fault.identity))), _digest(fault.around)
                faults.append(Drawn(area, fault, f"{order} {around}"))
    faults.sort(key=lambda drawn: drawn.key)
    return (drawn for drawn in faults if changes(drawn.fault, sources[drawn.fault.path]))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Campaign:
    """Runs faults, `workers` at a time, each in a copy of a commit's tree."""

    def __init__(self, commit: str, folder: Path, workers: int, whole: bool) -> None:
        self.commit, self.folder, self.whole = commit, folder, whole
        self.free = [self._tree(f"tree{i}") for i in range(workers)]
        self.running: list[Run] = []
        self.recorded: dict[str, Recorded] = {}

    def run(self, faults: Iterable[Drawn], number: int) -> None:
        """Run the first `number` that compile, less those whose result is known."""
        results = ledger()
        for drawn in faults:
            if number == 0:
                break
            result = results.get(drawn.key, {})
            if result.get("result") == "does not compile":
                continue
            again = result.get("result") == "survived" and (
                result["commit"] != self.commit or (self.whole and not result["whole"])
            )
            if drawn.fault.identity in equivalent() or (result and not again):
                number -= 1
            else:
                number -= self._start(drawn)

    def finish(self) -> None:
        while self.running:
            self._wait()

    def _start(self, drawn: Drawn) -> bool:
        """False if the fault does not compile."""
        while not self.free:
            self._wait()
        tree, fault = self.free.pop(), drawn.fault
        items = self._items(drawn)
        _write(tree / fault.path, fault.put_into((tree / fault.path).read_bytes()))
        if drawn.area == "csrc" and not self._compile(tree):
            self._note(drawn, "does not compile", "", 0, 0.0)
            self._restore(tree, fault)
            return False
        limits = {item.name: ITEM_LIMIT + SLOWER * item.seconds for item in items}
        files = list(dict.fromkeys(item.file for item in items))
        log = self.folder / f"{tree.name}.log"
        seconds = 10 * (IMPORT_LIMIT + sum(limits.values()))
        child = server.Child(lambda: server.run_tests(tree, files, limits), log, IMPORT_LIMIT, seconds)
        self.running.append(Run(drawn, tree, child, len(items)))
        return True

    def _wait(self) -> None:
        """Until one more run has ended."""
        while True:
            for run in self.running:
                if (ended := run.child.ended()) is not None:
                    self.running.remove(run)
                    self._judge(run, ended)
                    self._restore(run.tree, run.drawn.fault)
                    return
            time.sleep(0.02)

    def _judge(self, run: Run, ended: dict[str, Any]) -> None:
        result, by = "survived", ""
        if "died" in ended:
            result, by = ("timeout" if ended["died"] == "timeout" else "killed"), ended["died"]
        elif ended["failed"] or ended["status"] not in (0, 5):
            result, by = "killed", ended["failed"] or f"pytest's status {ended['status']}"
        elif ended["passed"] < run.tests // 2:
            raise RuntimeError(f"{run.drawn.fault.name}: {ended['passed']} of {run.tests} tests ran, none failed")
        self._note(run.drawn, result, by, ended.get("passed", 0), ended["seconds"])

    def _note(self, drawn: Drawn, result: str, by: str, passed: int, seconds: float) -> None:
        line = {
            "key": drawn.key,
            "commit": self.commit,
            "area": drawn.area,
            "result": result,
            "by": by,
            "passed": passed,
            "whole": self.whole,
            "seconds": seconds,
            **{field: getattr(drawn.fault, field) for field in ("path", "line", "scope", "kind", "before", "after")},
            "text": drawn.fault.text,
            "number": drawn.fault.number,
        }
        with (OUT / "ledger.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(f"{drawn.area:12} {result:16} {seconds:6.1f} s  {drawn.fault.name}  [{by}]", flush=True)

    def _items(self, drawn: Drawn) -> list[Item]:
        """The tests that execute the fault's function, or outside of functions anything of its file, quick files
        first."""
        fault = drawn.fault
        patterns = AREAS[drawn.area].tests
        files = self._files((*patterns, *WHOLE)) if self.whole else self._files(patterns)
        function = f"{fault.path}:{fault.scope}"
        if drawn.area == "csrc":
            function = MASKS if fault.path == "csrc/mask.h" else NATIVE
        items = [item for file in dict.fromkeys(files) for item in self._record(file, function)]
        if drawn.area == "csrc" or fault.scope:
            chosen = [item for item in items if function in item.executes or item.is_elsewhere]
        else:
            chosen = [item for item in items if any(x.startswith(f"{fault.path}:") for x in item.executes)]
        chosen = chosen or items  # a function of which only the first call of a process runs, or none
        seconds = {file: median(x.seconds for x in chosen if x.file == file) for file in {x.file for x in chosen}}
        return sorted(chosen, key=lambda item: (seconds[item.file], item.file))

    def _files(self, patterns: Iterable[str]) -> list[str]:
        tree = self.folder / "tree0"
        found = (path for pattern in patterns for path in sorted(tree.glob(pattern)))
        return [str(path.relative_to(tree)) for path in found if path.name not in ("__init__.py", "conftest.py")]

    def _record(self, file: str, function: str) -> list[Item]:
        """The items of a test file, recorded when it has changed, or when there was no such function yet."""
        tree = self.folder / "clean"
        if not tree.exists():
            self._tree("clean")
        digest = hashlib.sha256((tree / file).read_bytes()).hexdigest()[:16]
        kept = OUT / "executes" / f"{file.replace('/', '.')}.{digest}.json"
        if file not in self.recorded and kept.exists():
            self.recorded[file] = Recorded.of(json.loads(kept.read_text()))
        if file not in self.recorded or (function in self._functions() - self.recorded[file].functions):
            kept.parent.mkdir(exist_ok=True)
            child = server.Child(lambda: server.record(tree, file), self.folder / "record.log", *RECORD_LIMIT)
            while (ended := child.ended()) is None:
                time.sleep(0.05)
            if ended.get("status") not in (0, 5):
                raise RuntimeError(f"{file} fails without a fault:\n{child.log.read_text()[-3000:]}")
            print(f"recorded {file}: {len(ended['items'])} items, {ended['seconds']} s", flush=True)
            line = {"items": ended["items"], "functions": sorted(self._functions())}
            kept.write_text(json.dumps(line))
            self.recorded[file] = Recorded.of(line)
        return self.recorded[file].items

    @functools.cache  # noqa: B019 - a campaign lives as long as the process
    def _functions(self) -> frozenset[str]:
        """Each function of a tree, as path:name."""
        tree = self.folder / "clean"
        return frozenset(
            f"{path.relative_to(tree)}:{name}"
            for folder in ("attnstats", "kernels")
            for path in (tree / folder).glob("**/*.py")
            for name in re.findall(r"^ *def (\w+)", path.read_text(), re.MULTILINE)
        )

    def _tree(self, name: str) -> Path:
        tree = self.folder / name
        tree.mkdir()
        archive = subprocess.run(["git", "archive", self.commit], cwd=ROOT, capture_output=True, check=True).stdout
        subprocess.run(["tar", "-x"], cwd=tree, input=archive, check=True)
        assert self._compile(tree)
        return tree

    def _compile(self, tree: Path) -> bool:
        return subprocess.run(COMPILE, cwd=tree, capture_output=True, check=False).returncode == 0

    def _restore(self, tree: Path, fault: Fault) -> None:
        source = _git("show", f"{self.commit}:{fault.path}").encode()
        _write(tree / fault.path, source)
        if fault.path.startswith("csrc/"):
            assert self._compile(tree)
        self.free.append(tree)


def ledger() -> dict[str, dict[str, Any]]:
    """The last result of each fault, by its key."""
    file = OUT / "ledger.jsonl"
    lines = map(json.loads, file.read_text().splitlines()) if file.exists() else ()
    return {line["key"]: line for line in lines}


@functools.cache
def equivalent() -> dict[tuple[str, ...], str]:
    """The reasons why faults change nothing that a caller could notice, by their identity."""
    lines = [json.loads(line) for line in EQUIVALENT.read_text().splitlines()]
    return {tuple(line["fault"]): line["reason"] for line in lines}


def score(areas: dict[str, tuple[Iterable[Drawn], int]]) -> str:
    """A table in Markdown, and the survivors; `areas` has the faults and how many of them count."""
    results, survivors, total = ledger(), [], Counter[str]()
    lines = ["| area | faults | killed | of them by time | equivalent | survived | not run | score |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for area, (faults, number) in areas.items():
        seen = Counter[str]()
        for drawn in faults:
            if seen.total() == number:
                break
            result = results.get(drawn.key, {}).get("result", "not run")
            if result != "does not compile":
                seen["equivalent" if drawn.fault.identity in equivalent() else result] += 1
            if result == "survived" and drawn.fault.identity not in equivalent():
                survivors.append(f"- {drawn.fault.name} in `{drawn.fault.text}`")
        total += seen
        lines.append(_row(area, seen))
    return "\n".join([*lines, _row("all", total), "", *survivors])


def _row(area: str, seen: Counter[str]) -> str:
    killed, run = seen["killed"] + seen["timeout"], seen.total() - seen["equivalent"] - seen["not run"]
    cells = (seen.total(), killed, seen["timeout"], seen["equivalent"], seen["survived"], seen["not run"])
    return f"| {area} | {' | '.join(map(str, cells))} | {f'{100 * killed / run:.1f} %' if run else '-'} |"


def _write(path: Path, source: bytes) -> None:
    """With a time of its own: a compiled module is known by its source's time in seconds, and size."""
    path.write_bytes(source)
    moment = time.time_ns() // 1000 % 10**9
    os.utime(path, (moment, moment))


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    main()
