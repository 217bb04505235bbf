"""First contact with a GPU, benchmarks/gpu/first.py, without one: all of it small on a CPU, and a run that is cut."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from attnstats.flash import providers
from attnstats.triton.configs import Config, candidates
from benchmarks import compile_report, spills
from benchmarks.gpu import __main__ as script
from benchmarks.gpu import contenders, correctness, counters, environment, first, report, sweep, timing, workers
from benchmarks.gpu.contenders import BESIDE, PROVIDERS
from benchmarks.gpu.part import Part
from tests.process import ROOT, python

CPU = torch.device("cpu")
# What a machine with torch, Triton, transformers and pytest need not have.
ABSENT = {
    "accelerate", "datasets", "gguf", "hypothesis", "matplotlib", "pandas", "playwright", "psutil", "pyarrow", "rich",
    "scipy", "trl", "xdist",
}  # fmt: skip
HIDE = f"""
import sys
from importlib.machinery import PathFinder

class Hiding(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {ABSENT!r} else PathFinder.find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Hiding
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the working tree as it travels to another machine: without git and without what was compiled."""
    tree = tmp_path_factory.mktemp("copy")
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "countdown", "couplings")
    for folder in ("attnstats", "kernels", "benchmarks", "tests"):
        shutil.copytree(ROOT / folder, tree / folder, symlinks=True, ignore=ignore)
    (tree / "hidden").mkdir()
    (tree / "hidden" / "sitecustomize.py").write_text(HIDE)
    return tree


@pytest.mark.slow
def test_smoke_runs_all_of_it_with_nothing_installed(tree):
    path = os.pathsep.join(map(str, (tree / "hidden", tree)))
    command = ["-m", "benchmarks.gpu", "first", "--smoke", "--minutes", "30", "--results", "results"]
    told = python(*command, cwd=tree, PYTHONPATH=path, OMP_NUM_THREADS="1", ATTNSTATS_COMMIT="abc123")
    document = json.loads((tree / "results" / "smoke.json").read_text())
    assert list(document["sections"]) == ["first"]
    section = document["sections"]["first"]
    assert section["finished"]
    assert section["failures"] == {}
    assert section["failed"] == {}
    assert section["left_out"] == [["counters", "needs CUDA"]]
    assert list(section["steps"]) == list(first.STEPS)
    assert all(f"  {step}: " in told for step in first.STEPS)
    assert section["conditions"]["commit"] == "abc123"
    assert section["conditions"]["attnstats"] == "0.1.0"
    assert sorted(section["ceilings"]) == ["copy", "exp2", "matmul"]
    kinds = [name.partition(":")[0] for name in section["checks"]]
    assert {kind: kinds.count(kind) for kind in kinds} == {
        "case": 10, "gradients": 1, "capture": 1, "compile": 1, "provider": 1, "repeat": 4,
    }  # fmt: skip
    rows = {row["contender"]: row for row in section["rows"]}
    assert {name for name, row in rows.items() if row.get("ms")} == {
        contenders.DEFAULT, providers.CPU.name, providers.CPU.name + BESIDE, contenders.BARE, contenders.FUSED,
        contenders.POINTERS, contenders.AUTO, contenders.BAND, contenders.COLUMN,
    }  # fmt: skip
    text = (tree / "results" / "smoke.md").read_text()
    assert "its figures mean nothing" in text
    assert "Steps: ceilings" in text
    assert "commit abc123" in text


def test_on_a_gpu_it_checks_thirteen_cases_and_every_provider():
    names = [name for name in first.tasks(smoke=False) if not name.startswith(first.WARM)]
    asked = [name for name in names if not name.startswith("provider")]
    assert len(asked) == 13
    told = {f"provider: {name}" for name in PROVIDERS if name != providers.CPU.name}
    assert set(names) - set(asked) == told | {f"provider: {name}, packed" for name in first.PACKED}
    # Kernels that are timed or repeated later are compiled beside the checks.
    warmed = [name for name in first.tasks(smoke=False) if name.startswith(first.WARM)]
    assert len(warmed) == len(first.REPEATED) + 6
    for way in first.WAYS:
        assert {dim for dim, name in first.REPEATED if name == way} == {64, 128, 256}
    assert correctness.REPEATS == 300


def test_at_8k_every_provider_is_timed_bare_and_with_a_band():
    case = first._timed(smoke=False)
    assert case.shape.length == 8192
    names = set(timing.members(case, torch.device("cuda")))
    on_cuda = {name for name, provider in PROVIDERS.items() if provider.device == "cuda"}
    ours = {contenders.BARE, contenders.FUSED, contenders.POINTERS, contenders.AUTO, contenders.BAND, contenders.COLUMN}
    assert names == on_cuda | {name + BESIDE for name in on_cuda} | ours | {contenders.DEFAULT}


# A run that is cut


@pytest.fixture
def part(tmp_path: Path) -> Part:
    return Part(tmp_path / "section.json", 60.0, smoke=False)


def test_every_step_is_saved_and_one_without_time_is_dropped_by_name(part, monkeypatch, capsys):
    seen: dict[str, Any] = {}

    def look(name: str, shares: list[float]) -> Any:
        def run(part: Part) -> None:
            seen[name] = json.loads(part.file.read_text())["steps"] if part.file.exists() else {}
            shares.append(part.left())
            if name == "fails":
                raise ValueError("no")

        return run

    shares: list[float] = []
    steps = {
        "one": first.Step(look("one", shares), 0.25, 1.0),
        "fails": first.Step(look("fails", shares), 0.25, 1.0),
        "long": first.Step(look("long", shares), 0.25, 1000.0),
        "last": first.Step(look("last", shares), 0.25, 1.0),
    }
    monkeypatch.setattr(first, "STEPS", steps)
    with pytest.raises(RuntimeError, match="steps that raised: fails"):
        first.run(part)
    assert [list(seen[name]) for name in ("one", "fails", "last")] == [[], ["one"], ["one", "fails"]]
    assert "long" not in seen
    kept = json.loads(part.file.read_text())
    assert list(kept["steps"]) == ["one", "fails", "last"]
    assert kept["failures"] == {"fails": "ValueError: no"}
    assert kept["left_out"] == [["long", "no time left"]]
    # A quarter each at first; what a step leaves goes to the later ones.
    assert shares == pytest.approx([15.0, 20.0, 60.0], abs=1.0)
    assert part.left() > 50
    assert "fails: ValueError: no" in capsys.readouterr().out
    # Started again after a crash, it goes on with what is not done.
    seen.clear()
    with pytest.raises(RuntimeError, match="steps that raised: fails"):
        first.run(Part(part.file, 60.0, smoke=False))
    assert seen == {}


def test_a_run_that_is_cut_has_written_what_it_saw(monkeypatch, tmp_path):
    def sections(*_: Any) -> Any:
        yield {"conditions": {"device": "Card 1"}, "steps": {"ceilings": 4.0}, "ceilings": {"copy": 1e12}}
        assert "1 TB/s copied" in (tmp_path / "card-1.md").read_text()
        assert "ceilings" in json.loads((tmp_path / "card-1.json").read_text())["sections"]["first"]
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "sections_of", sections)
    with pytest.raises(KeyboardInterrupt):
        script.orchestrate(["first"], 60.0, tmp_path, smoke=False)


def test_workers_answers_are_kept_as_they_come(part, monkeypatch):
    def answers(module: str, names: list[str], seconds: float, smoke: bool, keep: Any) -> Any:
        keep({"case: D = 128": {"ok": True, "seconds": 1.0}})
        assert json.loads(part.file.read_text())["passed"] == 1
        wrong = {"ok": False, "failure": "AssertionError: waad", "seconds": 1.0}
        found = {"case: D = 128": {"ok": True, "seconds": 1.0}, "case: packed": wrong, first.WARM + "x": wrong}
        return found | {f"provider: {contenders.CUDNN}": {"ok": True, "value": {"left_out": "no cuDNN"}}}

    monkeypatch.setattr(workers, "perform_all", answers)
    first._correctness(part)
    section = json.loads(part.file.read_text())
    assert section["failed"] == {"case: packed": "AssertionError: waad"}
    assert set(section["checks"]) == {"case: D = 128", "case: packed"}
    assert section["failures"] == {first.WARM + "x": "AssertionError: waad"}
    assert [f"provider: {contenders.CUDNN}", "no cuDNN"] in part.section["left_out"]
    assert ["compile: torch.compile", "no time left"] in part.section["left_out"]
    assert report.incorrect({"first": section}) == ["case: packed: AssertionError: waad"]


def perform(name: str, smoke: bool) -> str:
    """What the worker of the next test does."""
    return name


def test_workers_say_what_they_have_so_far():
    seen: list[list[str]] = []
    results = workers.perform_all(__name__, ["a", "b"], 300.0, True, lambda answers: seen.append(list(answers)))
    assert list(results) == ["a", "b"]
    assert seen
    assert all(names in (["a"], ["a", "b"]) for names in seen)


HANGS = """
import json, sys, time
from pathlib import Path
file = Path(sys.argv[1])
section = json.loads(file.read_text()) if file.exists() else {}
if "repeat: band" not in section.get("failures", {}):
    file.write_text("{}")
    file.with_suffix(".flight").write_text("repeat: band")
    time.sleep(600)
section["finished"] = True
file.write_text(json.dumps(section))
"""


def test_what_hangs_is_ended_and_the_part_goes_on_without_it(monkeypatch, tmp_path):
    monkeypatch.setattr(script, "PATIENCE", 1.0)
    monkeypatch.setattr(script, "STUCK", 0.005)
    monkeypatch.setattr(script, "_command", lambda name, file, *_: [sys.executable, "-c", HANGS, str(file)])
    section = list(script.sections_of("first", tmp_path / "section.json", 100.0, smoke=False))[-1]
    assert section["finished"]
    assert section["failures"] == {"repeat: band": "ended after 1 s"}


def test_compiling_a_kernel_is_not_taken_for_hanging():
    assert script.PATIENCE > script.GRACE  # of a short part, as the ceilings are
    assert script.STUCK * 60 * script.FIRST_MINUTES > script.PATIENCE


def test_starting_python_counts_as_time_of_a_part(monkeypatch, tmp_path):
    monkeypatch.setattr(script.time, "time", lambda: 1000.0)
    command = script._command("first", tmp_path / "section.json", 50.0, smoke=False)
    assert command[command.index("--until") + 1] == "1050.0"


def test_other_work_is_in_flight_and_ends_before_its_memory_is_given_back(monkeypatch):
    """With CUDA's streams replaced by a list of what happens to them."""
    happened: list[str] = []

    class Stream(contextlib.nullcontext[None]):
        def synchronize(self) -> None:
            happened.append("waited")

    class Event:
        def query(self) -> bool:
            return len(happened) != 40  # what was queued first is still in flight at the second call

        def record(self) -> None: ...

    fakes = {"Stream": Stream, "Event": Event, "stream": lambda stream: stream, "synchronize": lambda: None}
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch, "randn", lambda *_, **__: None)
    monkeypatch.setattr(torch, "mm", lambda *_, out: happened.append("matmul"))
    with correctness._busy(torch.device("cuda")) as refill:
        refill()
        refill()
        assert happened == ["matmul"] * 40
    assert happened[40:] == ["waited"]


# Providers


def test_every_provider_of_the_backend_flash_is_there():
    tables = (*providers.BY_ARCHITECTURE.values(), providers.ELSEWHERE, (providers.CPU,))
    assert set(PROVIDERS) == {provider.name for table in tables for provider in table}


def test_a_provider_is_alone_and_its_implementation_active_for_its_calls_only(monkeypatch):
    happened: list[str] = []
    attention, restore = torch.nn.attention, lambda: happened.append("restored")
    monkeypatch.setattr(attention, "activate_flash_attention_impl", happened.append, raising=False)
    monkeypatch.setattr(attention, "restore_flash_attention_impl", restore, raising=False)
    monkeypatch.setenv(providers.LEFT_OUT, "cuDNN")

    def fail() -> None:
        with contenders.alone("FlashAttention 3"):
            assert happened == ["FA3"]
            left_out = os.environ[providers.LEFT_OUT].split(",")
            assert sorted([*left_out, "FlashAttention 3"]) == sorted(PROVIDERS)
            raise ValueError("in the call")

    with pytest.raises(ValueError, match="in the call"):
        fail()
    assert happened == ["FA3", "restored"]
    assert os.environ[providers.LEFT_OUT] == "cuDNN"


def test_a_provider_that_cannot_run_is_left_out_and_a_wrong_one_fails(monkeypatch):
    case = first._sized(smoke=True, dim=16)
    assert "left_out" in first._provider(contenders.CUDNN, case, CPU)
    assert first._provider(providers.CPU.name, case, CPU) is None

    right = providers.CPU

    def shifted(*arguments: Any) -> Any:
        output, lse = right.forward(*arguments)
        return output, lse + 0.1

    def broken(*arguments: Any) -> Any:
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(providers, "settings", lambda: (object(),))  # else the choice is remembered
    for forward, error in ((shifted, AssertionError), (broken, RuntimeError)):
        monkeypatch.setattr(providers, "CPU", right._replace(forward=forward))
        with pytest.raises(error, match=r"WAAD|no kernel image"):
            first._provider(right.name, case, CPU)


def test_what_is_not_installed_is_a_row_and_no_failure(part, monkeypatch):
    def absent(name: str) -> None:
        raise ImportError(f"No module named {name}")

    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", absent, raising=False)
    monkeypatch.setattr(torch.nn.attention, "restore_flash_attention_impl", lambda: None, raising=False)
    name = "FlashAttention 3"
    members = {n: contenders.CONTENDERS[n] for n in (name, name + BESIDE)}
    monkeypatch.setattr(timing, "members", lambda case, device: members)
    monkeypatch.setattr(timing, "truth_of", lambda case, inputs: None)
    monkeypatch.setattr(Part, "synchronize", lambda self: None)
    rows = timing._measure(part, first._timed(smoke=False), [None], 1.0, set())
    assert [row["failure"] for row in rows] == ["not installed: No module named FA3"] * 2
    assert part.section["failures"] == {}


# Nsight Compute

TABLE = """==PROF== Connected to process 7
==PROF== Profiling "forward": 0%....100% - 9 passes
"ID","Process ID","Kernel Name","Grid Size","Section Name","Metric Name","Metric Unit","Metric Value","Rule Name"
"0","7","forward","(64, 32, 1)","GPU Speed Of Light Throughput","Duration","ms","1.46",""
"0","7","forward","(64, 32, 1)","GPU Speed Of Light Throughput","DRAM Throughput","%","3.10",""
"0","7","forward","(64, 32, 1)","SpeedOfLight","","","","SOLBottleneck"
"1","7","band","(32, 8, 1)","GPU Speed Of Light Throughput","Duration","us","41,5",""
==PROF== Disconnected from process 7
"""


def installed(folder: Path, name: str, text: str, status: int) -> None:
    (folder / "said").write_text(text)
    program = folder / name
    program.write_text(f'#!/bin/sh\necho "$@" > {folder}/asked\ncat {folder}/said\nexit {status}\n')
    program.chmod(0o755)


def test_counters_are_those_of_each_launch(monkeypatch, tmp_path, part):
    installed(tmp_path, "ncu", TABLE, 0)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    first._counters(part)
    launches = part.section["counters"]
    assert [launch["kernel"] for launch in launches] == ["forward", "band"]
    assert launches[0]["counters"] == {"Duration": "1.46 ms", "DRAM Throughput": "3.10 %"}
    asked = (tmp_path / "asked").read_text()
    assert "--clock-control none" in asked  # the card's settings are not ours to change
    assert asked.strip().endswith("-m benchmarks.gpu.counters")
    text = "\n".join(report._write_first(part.section))
    assert "| forward | (64, 32, 1) | 1.46 ms | 3.10 % |" in text


def test_a_profiler_that_may_not_read_counters_says_why(monkeypatch, tmp_path, part):
    installed(tmp_path, "ncu", "==PROF== Connected\n==ERROR== ERR_NVGPUCTRPERM no permission\n==PROF== bye\n", 1)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    first._counters(part)
    why = "ncu ended with status 1: ==ERROR== ERR_NVGPUCTRPERM no permission"
    assert part.section["left_out"] == [["counters", why]]
    monkeypatch.setattr(environment.shutil, "which", lambda *_, **__: None)
    assert counters.measure(1.0) == {"left_out": "ncu is not installed"}


def test_a_program_that_does_not_end_is_none():
    assert environment.ran([sys.executable, "-c", "import time; time.sleep(60)"], 0.2) is None
    assert environment.ran([sys.executable, "-c", "print(7); raise SystemExit(3)"], 60.0) == (3, "7\n")


# Commit


def test_the_commit_without_git_is_a_variable_or_a_file(monkeypatch, tmp_path):
    monkeypatch.delenv("ATTNSTATS_COMMIT", raising=False)
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)  # a repository around the folder is not ours
    monkeypatch.setattr(environment, "ROOT", tmp_path / "copy")
    monkeypatch.setattr(environment, "COMMIT", tmp_path / "copy" / "commit.txt")
    (tmp_path / "copy").mkdir()
    assert environment.commit() is None
    environment.COMMIT.write_text("$Format:%H$\n")  # as it is in a copy of the working tree
    assert environment.commit() is None
    environment.COMMIT.write_text("0123abc\n")
    assert environment.commit() == "0123abc"
    monkeypatch.setenv("ATTNSTATS_COMMIT", "feed+changes")
    assert environment.commit() == "feed+changes"


def test_git_writes_the_commit_into_an_archive():
    attributes = (ROOT / ".gitattributes").read_text()
    assert f"{environment.COMMIT.relative_to(environment.ROOT)} export-subst" in attributes
    assert environment.COMMIT.read_text() == "$Format:%H$\n"


# Makefile


def test_make_gpu_runs_the_python_that_is_there_and_installs_nothing():
    def told(*arguments: str) -> subprocess.CompletedProcess[str]:
        outside = {name: x for name, x in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
        command = ["make", "-n", *arguments]  # not as a part of the `make test` that runs this
        return subprocess.run(command, cwd=ROOT, env=outside, capture_output=True, text=True, check=False)

    assert told("gpu", "PYTHON=python3", "VENV=", "PARTS=first").stdout == "python3 -m benchmarks.gpu first\n"
    assert told("gpu").stdout.endswith(".venv/bin/python -m benchmarks.gpu \n")
    assert "there is only `make gpu`" in told("test", "VENV=").stderr


# The full run


def test_it_takes_six_minutes_with_the_last_part_over_its_time():
    assert 60 * script.MINUTES + script.GRACE + 15 <= 360
    assert 60 * script.FIRST_MINUTES == 120
    assert sum(script.SHARES[name] for name in script.EVERY) == pytest.approx(1.0)


def test_tasks_that_share_kernels_are_compiled_apart():
    names = list(correctness.tasks(smoke=False))
    for i, name in enumerate(names):
        if name.startswith("case: ") and not name.endswith("from lse"):
            assert names.index(f"{name}, from lse") - i > workers.MOST
    assert sum(name.startswith("gradients: ") for name in names) >= sum(map(len, correctness.TRAINED.values()))


def test_the_sweep_has_time_for_candidates_free_of_spills_alone(monkeypatch, tmp_path):
    job = sweep.jobs(smoke=False)[0]
    every = sweep.candidates(job, smoke=False)
    fine, spills, large = map(sweep.text_of, every[:3])
    amounts = ((fine, 0, 1000), (spills, 8, 1000), (large, 0, 10**6))
    known = {text: {"spilled": spilled, "shared": shared} for text, spilled, shared in amounts}
    monkeypatch.setattr(sweep, "CANDIDATES", tmp_path / "candidates.json")
    monkeypatch.setattr(sweep, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(sweep, "shared_memory", lambda device: 232448)
    assert sweep.free_of_spills(job) == every  # nothing is known yet
    sweep.CANDIDATES.write_text(json.dumps({"sm_90": {job.name: known}}))
    assert sweep.free_of_spills(job) == every[:1]
    monkeypatch.setattr(sweep, "architecture", lambda device: "sm_80")
    assert sweep.free_of_spills(job) == every


def test_what_is_recorded_of_candidates_is_of_jobs_that_there_are():
    jobs = {job.name: job for job in sweep.jobs(smoke=False)}
    for by_job in sweep.record().values():
        for name, known in by_job.items():
            assert set(known) <= {sweep.text_of(config) for config in sweep.candidates(jobs[name], smoke=False)}
    requests = {spills.REQUESTS.get((job.kernel, job.asked)) for job in jobs.values()}
    assert requests - {None} == set(spills.REQUESTS.values()) <= set(compile_report.REQUESTS)


def test_a_candidate_is_compiled_as_the_sweep_launches_it(monkeypatch):
    launched: list[Any] = []

    def compiled_case(case: Any) -> list[dict[str, Any]]:
        launched.append((case.name, next(candidates("forward", CPU, torch.bfloat16, case.dim))))
        sizes = {"spilled_bytes": 8, "shared_bytes": 98304}
        return [{"kernel": "column"} | sizes, {"kernel": "forward"} | sizes | {"spilled_bytes": 0}]

    monkeypatch.setattr(spills, "compiled_case", compiled_case)
    job, config = sweep.jobs(smoke=False)[0], Config(128, 64, 8, 2)
    found = spills.compiled("sm_90", "attention + WAAD + FAI", job, config)
    assert found == {"spilled": 0, "shared": 98304}
    assert launched == [("sm_90 D128 bfloat16 causal: attention + WAAD + FAI", config)]
