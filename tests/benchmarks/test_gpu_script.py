"""benchmarks/gpu without a GPU: all of it small on a CPU, its arithmetic, and how it lives with failures."""

import importlib.util
import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from triton.backends.nvidia.compiler import get_ptxas

from attnstats import Received, reference
from benchmarks.contenders import STATISTICS, Answer
from benchmarks.gpu import __main__ as script
from benchmarks.gpu import (
    contenders,
    correctness,
    end_to_end,
    environment,
    floors,
    measure,
    report,
    sweep,
    timing,
    workers,
)  # fmt: skip
from benchmarks.gpu.contenders import CONTENDERS, PACKED, Inputs
from benchmarks.gpu.floors import Ceilings, Shape
from benchmarks.gpu.measure import Entrant, race, ratio
from benchmarks.gpu.part import OUT_OF_MEMORY, Part, in_flight
from tests.cases import EVERY
from tests.process import python

CPU = torch.device("cpu")
H100 = Ceilings(copy=3.35e12, matmul=989e12, exp2=16 * 132 * 1.83e9)  # as published


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("smoke")
    command = ["-m", "benchmarks.gpu", "--smoke", "--minutes", "30", "--results", str(folder)]
    python(*command, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    return json.loads((folder / "smoke.json").read_text()), folder


@pytest.mark.slow
def test_smoke_runs_every_part(smoke):
    document, folder = smoke
    assert list(document["sections"]) == script.EVERY
    for name, section in document["sections"].items():
        assert section["finished"], name
        assert section["failures"] == {}, name
        assert section["conditions"]["torch"] == str(torch.__version__)
        assert all(why == "needs CUDA" for _, why in section["left_out"]), name
    text = (folder / "smoke.md").read_text()
    assert "its figures mean nothing" in text
    assert all(
        f"## {title}" in text for title in ("Targets", "Ceilings", "Correctness", "Timing", "End to end", "Sweep")
    )
    if importlib.util.find_spec("matplotlib"):
        assert (folder / "smoke.png").stat().st_size > 10000


@pytest.mark.slow
def test_smoke_leaves_no_section_empty(smoke):
    sections = smoke[0]["sections"]
    assert sorted(sections["ceilings"]["ceilings"]) == ["copy", "exp2", "matmul"]
    assert all(value > 0 for value in sections["ceilings"]["ceilings"].values())
    assert sections["correctness"]["failed"] == {}
    assert sections["correctness"]["passed"] == len(correctness.tasks(smoke=True)) >= 10
    for case in timing.cases(smoke=True):
        rows = {row["contender"]: row for row in sections["timing"]["rows"] if row["case"] == case.name}
        members = timing.members(case, CPU)
        assert set(rows) == set(members)
        for name, row in rows.items():
            if row.get("failure"):
                assert members[name].device == "cuda", (name, row["failure"])
            else:
                assert row["ms"] > 0
                assert row["floor_ms"] > 0
                assert row["against"] == "float64"
                assert row["errors"]
    for case in end_to_end.cases(smoke=True):
        rows = {row["contender"]: row for row in sections["end_to_end"]["rows"] if row["case"] == case.name}
        expected = {end_to_end.FORWARD, end_to_end.IN_PASS, end_to_end.BESIDE, end_to_end.CAPTURE}
        assert set(rows) == expected | ({end_to_end.MAPS, end_to_end.HOOKS} if case.paper else set())
        for name, row in rows.items():
            assert row["ms"] > 0
            assert "overhead" in row
            # In float32 all ways agree; a pass of its own has no log-probs, the plain forward pass nothing else.
            told = {"log_probs"} - ({"log_probs"} if row["separate"] else set())
            assert set(row["errors"]) == told | (set() if name == end_to_end.FORWARD else {"waad", "fai"})
            assert max(row["errors"].values()) < 1e-4, (name, row["errors"])
    for job in sweep.jobs(smoke=True):
        rows = [row for row in sections["sweep"]["rows"] if row["job"] == job.name]
        assert len(rows) == 1 + len(sweep.candidates(job, smoke=True))
        assert all(row["over_shipped"] > 0 for row in rows)


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu", "ceilings"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert script.main() == 2
    assert "--smoke" in capsys.readouterr().err


# Floors


@pytest.mark.parametrize(
    ("length", "forward", "column", "band"), [(2048, 35, 17, 6.5), (8192, 556, 278, 26), (32768, 8890, 4450, 104)]
)
def test_floors_are_those_of_the_design(length, forward, column, band):
    shape = Shape(length)
    assert floors.forward(shape, H100) * 1e6 == pytest.approx(forward, rel=0.01)
    assert floors.column(shape, H100) * 1e6 == pytest.approx(column, rel=0.03)  # 17.4 is printed as 17
    assert floors.band(shape, H100) * 1e6 == pytest.approx(band, rel=0.01)


def test_floor_of_decoding_is_memory():
    shape = Shape(32768, batch=8, queries=1)
    assert shape.pairs == 8 * 32 * 32768
    assert floors.forward(shape, H100) == floors.forward_bytes(shape) / H100.copy


# Targets


def row(case: str, group: str, name: str, rounds: list[float], ours: bool) -> dict[str, Any]:
    shape = Shape({"T = 8k": 8192, "T = 32k": 32768}[case])
    results = {"case": case, "length": shape.length, "main": True, "group": group, "contender": name, "ours": ours}
    results |= {"shape": shape._asdict(), "ms": sorted(rounds)[len(rounds) // 2], "rounds": rounds}
    results |= {"host_us": 50.0, "peak_mib": 10.0}
    return results | ({"bytes": floors.band_bytes(shape)} if group == "band" else {})


def document(fused: float, band: float, column: float, bare: float, added: float) -> dict[str, Any]:
    """Attention takes 1 ms at 8k and 10 ms at 32k; the arguments are ours, as shares of it."""
    rows = []
    for case, unit in (("T = 8k", 1.0), ("T = 32k", 10.0)):
        flash, fast = [1.2 * unit] * 3, [unit, 1.5 * unit, 0.9 * unit]
        rows += [
            row(case, "attention", contenders.FLASH, flash, False),
            row(case, "attention", contenders.CUDNN, fast, False),
            row(case, "attention", contenders.BARE, [1.2 * unit / bare] * 3, True),
            row(case, "statistics", contenders.FUSED, [2 * unit] * 3, True),
            row(case, "statistics", contenders.CUDNN + contenders.BESIDE, [x * fused for x in fast], True),
            row(case, "statistics", "FlexAttention", [3 * unit] * 3, False),
            row(case, "band", contenders.BAND, [band] * 3, True),
            row(case, "column", contenders.COLUMN, [column * 1.2 * unit / bare] * 3, True),
            row(case, "column", "FlexAttention, keys as queries", [0.9 * unit] * 3, False),
        ]
    models = {"case": "Qwen3-4B", "paper": True, "low_ms": 1.0, "high_ms": 1.0, "ms": 1.0, "separate": False}
    model_rows = [
        models | {"contender": "log-probs", "ours": False, "overhead": 0.0},
        models | {"contender": "+ attnstats in the pass", "ours": True, "overhead": 2 * added},
        models | {"contender": "+ attnstats beside the fastest attention", "ours": True, "overhead": added},
        models | {"contender": "eager", "ours": False, "overhead": 1.7, "separate": True},
    ]
    return {
        "sections": {
            "ceilings": {"ceilings": H100._asdict()},
            "timing": {"rows": rows},
            "end_to_end": {"rows": model_rows},
        }
    }


def test_targets_that_are_hit():
    results = report.targets(document(fused=1.01, band=0.034, column=0.7, bare=0.95, added=0.004))
    verdicts = {target.what: target.verdict for target in results}
    # The band takes as long at 32k as at 8k in this document: four times the bandwidth.
    assert set(verdicts.values()) == {"hit"}, verdicts
    assert len(verdicts) == 2 + 1 + 2 * 4
    first = results[0]
    assert first.measured == pytest.approx(0.01)  # paired by rounds, which a ratio of medians would be, too
    assert first.note == f"{contenders.CUDNN}{contenders.BESIDE} over {contenders.CUDNN}"


def test_targets_that_are_missed():
    results = report.targets(document(fused=1.06, band=0.2, column=0.9, bare=0.85, added=0.006))
    assert {target.verdict for target in results} == {"missed"}
    told = [str(target) for target in results]
    assert f"{told[0]}".startswith(
        "T = 8k: WAAD + FAI of all heads over the fastest attention: 6.00 %, target <= 5.00 %"
    )
    assert any(
        "Qwen3-4B, over its forward pass: 0.60 %, target <= 0.50 %: missed (attnstats beside the fastest" in t
        for t in told
    )


def test_a_limit_is_itself_a_hit_except_against_rivals():
    assert report.Target("", 0.05, 0.05).verdict == "hit"
    assert report.Target("", 0.7, 0.7, least=True).verdict == "hit"
    assert report.Target("", 1.0, 1.0, strict=True).verdict == "missed"


def test_what_was_not_measured_says_why():
    made = document(1.01, 0.034, 0.7, 0.95, 0.004)
    for entry in made["sections"]["timing"]["rows"]:
        if entry["contender"] == contenders.COLUMN:
            del entry["ms"], entry["rounds"]
            entry["failure"] = "OutOfResources: shared memory"
    by_name = {target.what: target for target in report.targets(made)}
    target = by_name["T = 8k: column over our forward"]
    assert (target.verdict, target.note) == ("not measured", "OutOfResources: shared memory")
    assert {t.verdict for t in report.targets({"sections": {}})} == {"not measured"}


def test_report_holds_floors_failures_and_what_was_left_out(tmp_path):
    made = document(1.01, 0.034, 0.7, 0.95, 0.004)
    section = made["sections"]["timing"]
    out = {k: v for k, v in section["rows"][0].items() if k not in ("ms", "rounds")}
    section["rows"].append(out | {"contender": "eager", "group": "statistics", "failure": OUT_OF_MEMORY})
    section |= {"left_out": [["T = 64k", "no time left"]], "failures": {"T = 8k: eager": OUT_OF_MEMORY}}
    report.write(made, tmp_path / "card.json")
    kept = json.loads((tmp_path / "card.json").read_text())
    bare = next(r for r in kept["sections"]["timing"]["rows"] if r["contender"] == contenders.BARE)
    assert bare["share_of_floor"] == pytest.approx(0.556 / (1.2 / 0.95), rel=0.01)
    assert {target["verdict"] for target in kept["targets"]} == {"hit"}
    text = (tmp_path / "card.md").read_text()
    assert f"| eager | {OUT_OF_MEMORY} |" in text
    assert "- left out: T = 64k: no time left" in text
    assert "**attnstats without statistics** | 1.263 | 1.263 | 44% |" in text


def test_wrong_answers_are_incorrect():
    made = document(1.01, 0.034, 0.7, 0.95, 0.004)
    assert report.incorrect(made["sections"]) == []
    made["sections"]["timing"]["rows"][3] |= {"failure": "wrong: waad by 1"}
    made["sections"]["timing"]["rows"][5] |= {"failure": "wrong: a rival's"}
    made["sections"]["correctness"] = {"failed": {"case: causal": "waad: 1 > 0"}}
    assert report.incorrect(made["sections"]) == [
        "case: causal: waad: 1 > 0",
        "T = 8k, attnstats fused: wrong: waad by 1",
    ]


# Contenders


def inputs_for(length: int, queries: int | None = None) -> Inputs:
    draw = torch.Generator().manual_seed(0)
    query = torch.randn(1, 4, length, 16, generator=draw)[:, :, -(queries or length) :]
    key, value = (torch.randn(1, 2, length, 16, generator=draw) for _ in range(2))
    _, stats = reference.attention(query.double(), key.double(), value.double(), enable_gqa=True)
    return Inputs(query, key, value, stats.lse.float())


RUNNABLE = [name for name, c in CONTENDERS.items() if c.device != "cuda" and "without" not in name]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name", [n for n in RUNNABLE if n not in (contenders.FUSED, contenders.BAND, contenders.COLUMN)]
)
def test_every_rival_equals_the_reference(name):
    """Over several blocks and chunks, the last one not whole."""
    inputs, case = inputs_for(300), timing.Case("", Shape(300, 4, 2, 16))
    errors, against = timing.errors_of(CONTENDERS[name], inputs, timing.truth_of(case, inputs), case)
    assert against == "float64"
    assert errors
    assert max(errors.values()) < 1e-4, errors


def test_the_plain_band_beside_another_attention_is_right():
    inputs = inputs_for(150)
    answer = contenders.plain_beside(inputs)
    _, truth = reference.attention(*(x.double() for x in inputs[:3]), statistics=STATISTICS, enable_gqa=True)
    assert answer.waad is not None
    assert float((answer.waad - truth["waad"]).abs().max()) < 1e-4


def test_counts_of_decoding_are_of_the_queries_there_are():
    inputs = inputs_for(300, queries=30)
    arguments = {"statistics": [*STATISTICS, Received()], "enable_gqa": True}
    _, stats = reference.attention(*(x.double() for x in inputs[:3]), **arguments)
    counted = stats.valid["fai"]
    position, key = torch.arange(270, 300), torch.arange(300)[:, None]
    right = ((position >= key + 10) & (position <= key + 100)).sum(-1)
    assert torch.equal(contenders.counts(inputs), right.clamp(min=1))
    assert torch.equal(counted[0], right > 0)


def test_a_wrong_contender_is_noticed():
    inputs, case = inputs_for(60), timing.Case("", Shape(60, 4, 2, 16))
    truth = timing.truth_of(case, inputs)
    right = contenders.chunked(inputs)
    assert right.fai is not None
    for broken in (right._replace(fai=right.fai * 1.1), right._replace(output=right.output * torch.nan)):
        liar = contenders.Contender("statistics", lambda _, broken=broken: broken)
        errors, _ = timing.errors_of(liar, inputs, truth, case)
        assert any(not error <= timing.TOLERANCE[name] for name, error in errors.items())


def test_what_cannot_be_is_not_tried(part):
    shared = {"main": True, "contender": "eager"}
    part.section["rows"] = [
        shared | {"case": "T = 4k", "length": 4096, "ms": 100.0},
        shared | {"case": "T = 8k", "length": 8192, "failure": OUT_OF_MEMORY},
    ]
    reasons = {n: timing.reason_to_skip(part, timing.Case("", Shape(n)), "eager") for n in (2048, 4096, 8192, 16384)}
    assert reasons == {2048: None, 4096: None, 8192: None, 16384: "out of memory at T = 8k already"}
    assert timing.reason_to_skip(part, timing.Case("", Shape(32768)), "another") is None
    part.section["rows"] = part.section["rows"][:1]
    assert timing.reason_to_skip(part, timing.Case("", Shape(32768)), "eager") == "over 3 s a call"


def test_packed_answers_are_compared_by_sequence():
    case = timing.Case("", Shape(30, 2, 1, 16), False, sequences=2)
    inputs = timing.inputs_of(case, torch.device("cpu"), 1)[0]
    errors, _ = timing.errors_of(PACKED[contenders.AUTO], inputs, timing.truth_of(case, inputs), case)
    assert set(errors) == {"output", "waad", "fai"}
    assert max(errors.values()) < 1e-2  # in half precision


# The clock


class Card:
    """What a part takes for a GPU: time passes only when a contender says so, a call leaves 3 MiB."""

    def __init__(self) -> None:
        self.now = 0.0
        self.slept: list[int] = []

    def event(self, enable_timing: bool) -> Any:
        assert enable_timing
        made = SimpleNamespace(synchronize=lambda: None)
        made.record = lambda: setattr(made, "at", self.now)
        made.elapsed_time = lambda end: (end.at - made.at) * 1e3
        return made


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    made = Card()
    monkeypatch.setattr("benchmarks.gpu.measure.time.perf_counter", lambda: made.now)
    fakes = {
        "Event": made.event, "_sleep": made.slept.append, "synchronize": lambda: None, "empty_cache": lambda: None,
        "memory_allocated": lambda: 2**20, "max_memory_allocated": lambda: 4 * 2**20,
        "reset_peak_memory_stats": lambda: None,
    }  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr("benchmarks.gpu.part.usable", lambda _: True)
    return made


@pytest.fixture
def part(card: Card, tmp_path: Path) -> Part:
    made = Part(tmp_path / "section.json", 60.0, smoke=False)
    assert made.device.type == "cuda"
    return made


def test_race_times_in_turns_on_rotating_inputs(card, part):
    order: list[tuple[str, int]] = []

    def contender(name: str, seconds: float) -> Entrant:
        def call(i: int) -> None:
            order.append((name, i))
            card.now += seconds * (1 + i)  # the inputs differ

        return Entrant(call)

    def fails(i: int) -> None:
        raise torch.cuda.OutOfMemoryError("tried to allocate")

    entrants = {"fast": contender("fast", 0.001), "none": Entrant(fails), "slow": contender("slow", 0.004)}
    results = race(part, "case", entrants, 3, 1.0)
    assert results["none"] == {"failure": OUT_OF_MEMORY}
    assert list(results) == list(entrants)
    assert results["fast"]["ms"] == pytest.approx(2.0)
    assert results["fast"]["host_us"] == pytest.approx(2000)
    assert results["fast"]["peak_mib"] == 3.0
    assert results["slow"]["ms"] == pytest.approx(8.0)
    assert ratio(results["slow"], results["fast"]) == pytest.approx(4.0)
    for name in ("fast", "slow"):
        assert {i for mine, i in order if mine == name} == {0, 1, 2}
    changes = [name for i, (name, _) in enumerate(order) if not i or order[i - 1][0] != name]
    assert len(changes) > 20  # they take turns
    assert card.slept
    assert max(card.slept) <= 0.05 * measure.CLOCK
    assert part.section["failures"] == {"case: none": OUT_OF_MEMORY}


def test_attempt_contains_failures_and_does_not_repeat_them(part):
    calls = []

    def fails(why: str) -> None:
        calls.append(why)
        raise ValueError(f"{why}\nand more")

    assert part.attempt("a", fails, "no") == (None, "ValueError: no")
    assert part.attempt("a", fails, "no") == (None, "ValueError: no")
    assert part.attempt("b", lambda: 7) == (7, None)
    assert calls == ["no"]
    assert json.loads(part.file.read_text())["failures"] == {"a": "ValueError: no"}
    assert not in_flight(part.file).exists()


def test_conditions_of_a_card(monkeypatch):
    properties = SimpleNamespace(
        name="NVIDIA H100 80GB HBM3", multi_processor_count=132, total_memory=80 * 2**30, L2_cache_size=50 * 2**20
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(environment.shutil, "which", lambda name: "/bin/" + name)
    told = {
        "nvidia-smi": "580.1, 1980 MHz, 1980 MHz, 2619 MHz, 700.00 W, 80.1 W, 31",
        "git": "abc",
        "ptxas": "ptxas\nV12.9",
        "ptxas-blackwell": "ptxas\nV13.4",
    }
    monkeypatch.setattr(environment, "output_of", lambda command: told[Path(command[0]).name])
    results = environment.conditions(torch.device("cuda"))
    assert results["device"] == "NVIDIA H100 80GB HBM3"
    assert results["clocks"]["driver_version"] == "580.1"
    assert results["clocks"]["power.limit"] == "700.00 W"
    assert results["commit"] == "abc+changes"
    assert results["ptxas"] == told[Path(get_ptxas(90).path).name].splitlines()[1]  # of the two that Triton has
    json.dumps(results)
    assert timing.input_sets(Shape(1024), torch.device("cuda")) == 9
    assert timing.input_sets(Shape(131072), torch.device("cuda")) == 2


# Processes


def perform(name: str, smoke: bool) -> str:
    """What the workers of the next test do."""
    if name == "dies":
        print("the last words", file=sys.stderr)
        sys.stderr.flush()
        os._exit(9)
    if name == "raises":
        raise RuntimeError("no")
    if name == "hangs":
        time.sleep(60)
    print("noise")
    return name.upper()


def test_workers_survive_what_they_perform():
    results = workers.perform_all(__name__, ["a", "dies", "raises", "b"], 300.0, smoke=True)
    oks = {name: answer["ok"] for name, answer in results.items()}
    assert oks == {"a": True, "dies": False, "raises": False, "b": True}
    assert results["b"]["value"] == "B"
    assert results["dies"]["failure"] == "the process died: the last words"
    assert results["raises"]["failure"] == "RuntimeError: no"


def test_workers_end_with_their_time():
    assert workers.perform_all(__name__, ["hangs", "a"], 3.0, smoke=True) == {}


@pytest.mark.parametrize(
    ("says", "status", "verdict"),
    [("ERROR SUMMARY: 0 errors", 0, "said"), ("ERROR SUMMARY: 2 errors", 99, "error"), ("no driver", 1, "left_out")],
)
def test_what_the_sanitizer_says(says, status, verdict, monkeypatch, tmp_path):
    program = tmp_path / "compute-sanitizer"
    program.write_text(f"#!/bin/sh\necho $3 $4 '{says}'\nexit {status}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    if verdict == "error":
        with pytest.raises(AssertionError, match=r"memcheck: .*2 errors"):
            correctness.sanitize("memcheck")
    else:
        assert says in correctness.sanitize("memcheck")[verdict]
        assert "--error-exitcode 99" in correctness.sanitize("memcheck")[verdict]


def test_without_a_sanitizer_it_is_left_out(monkeypatch):
    monkeypatch.setattr(environment.shutil, "which", lambda *_, **__: None)
    assert "not installed" in correctness.sanitize("memcheck")["left_out"]


CHILD = """
import json, os, sys
from pathlib import Path
file = Path(sys.argv[1])
section = json.loads(file.read_text()) if file.exists() else {"runs": 0}
section["runs"] += 1
file.write_text(json.dumps(section))
if "case: culprit" not in section.get("failures", {}):
    file.with_suffix(".flight").write_text("case: culprit")
    print("illegal access", file=sys.stderr)
    sys.stderr.flush()
    os._exit(7)
section["finished"] = True
file.write_text(json.dumps(section))
"""


def test_a_part_that_dies_goes_on_without_what_it_died_of(monkeypatch, tmp_path):
    monkeypatch.setattr(script, "_command", lambda name, file, *_: [sys.executable, "-c", CHILD, str(file)])
    section = list(script.sections_of("timing", tmp_path / "section.json", 30.0, smoke=True))[-1]
    assert section["finished"]
    assert section["runs"] == 2
    assert section["failures"] == {"case: culprit": "its process died with status 7: illegal access"}


def test_a_part_without_an_end_is_ended(monkeypatch, tmp_path):
    monkeypatch.setattr(script, "GRACE", 0.2)
    monkeypatch.setattr(script, "_command", lambda *_: [sys.executable, "-c", "import time; time.sleep(60)"])
    section = list(script.sections_of("timing", tmp_path / "section.json", 0.3, smoke=False))[-1]
    assert "ended after" in section["error"]
    assert "finished" not in section


RESULT = """
import json, sys
from pathlib import Path
name, file = sys.argv[1], Path(sys.argv[2])
section = {"conditions": {"device": "Card 1"}, "finished": True, "nothing": float("inf"), "rows": []}
section["ceilings"] = {"copy": 1e12}
if name == "sweep":
    section["rows"] = [{"this": "is no row"}]
    section["finished"] = False
file.write_text(json.dumps(section))
"""


def test_parts_run_apart_fill_one_file(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(script, "_command", lambda name, file, *_: [sys.executable, "-c", RESULT, name, str(file)])
    (tmp_path / "card-1.json").write_text('{"layout": -1}')
    assert script.orchestrate(["ceilings", "timing"], 60.0, tmp_path, smoke=False) == 0
    assert (tmp_path / "card-1.old.json").read_text() == '{"layout": -1}'
    assert script.orchestrate(["end_to_end"], 60.0, tmp_path, smoke=False) == 0
    kept = json.loads((tmp_path / "card-1.json").read_text())
    assert list(kept["sections"]) == ["ceilings", "timing", "end_to_end"]
    assert kept["sections"]["ceilings"]["nothing"] is None
    # A section that no table can be made of is kept all the same.
    assert script.orchestrate(["sweep"], 60.0, tmp_path, smoke=False) == 2
    assert "KeyError" in capsys.readouterr().err
    kept = json.loads((tmp_path / "card-1.json").read_text())
    assert kept["sections"]["sweep"]["rows"] == [{"this": "is no row"}]


# What is measured


def test_the_papers_heads_are_thirty_per_cent_each_and_apart():
    case = end_to_end.Case("Qwen3-4B", 8704, None, True)
    choice = end_to_end.choose(case, 36, 32, torch.device("cpu"))
    waad, fai = ({(layer, head) for layer, heads in x.items() for head in heads} for x in (choice.waad, choice.fai))
    assert choice.layers == [12, 15, 18, 21, 24]
    assert len(waad) == len(fai) == 48
    assert not waad & fai
    assert choice.counted.sum() == 8192
    assert choice.heads(3) == {}


def test_means_are_over_heads_of_all_layers():
    results = [("waad", torch.ones(1, 3, 5)), ("fai", torch.zeros(1, 1, 5)), ("waad", torch.full((1, 1, 5), 5.0))]
    means = end_to_end.means_of(results)
    assert torch.equal(means["waad"], torch.full((1, 5), 2.0))


def test_the_sweep_knows_the_middle_and_stays_on_the_chip():
    for job in sweep.jobs(smoke=False):
        tiles = {(c.BM, c.BN) for c in sweep.candidates(job, smoke=False)}
        assert ((16, 64) if job.kernel == "decode" else (64, 64)) in tiles, job
    assert (128, 64) in {(c.BM, c.BN) for c in sweep.candidates(sweep.jobs(smoke=False)[0], smoke=False)}


def test_the_sweep_tries_the_common_head_size_first_and_every_kernel_of_it(monkeypatch):
    monkeypatch.setattr(sweep, "architecture", lambda device: "one that nothing was compiled for")
    tasks = sweep.all_tasks(smoke=False)
    order = sweep.in_order(tasks)
    assert sorted(order) == sorted(tasks)
    dims = [tasks[name][0].head_dim for name in order]
    assert dims == sorted(dims, key=[128, 64, 256].index)
    assert len({tasks[name][0].name for name in order[:7]}) == 7


def test_the_best_of_a_sweep_is_the_best_over_all_that_share_an_entry():
    def row(job: str, keys: int, over: float, kernel: str = "forward") -> dict[str, Any]:
        config = {"BM": 128, "BN": keys, "num_warps": 8, "num_stages": 3}
        return {"job": job, "kernel": kernel, "head_dim": 128, "over_shipped": over} | config

    rows = [
        row("bare", 64, 0.9),
        row("bare", 32, 0.8),
        row("paper", 64, 1.0),
        row("paper", 32, 1.2),
        row("paper", 16, 0.1),
    ]
    rows += [
        row("column", 64, 0.7, "column"),
        {"job": "column", "shipped": True, "over_shipped": 1.0, "kernel": "column"},
    ]
    rows += [{"job": "bare", "kernel": "forward", "failure": "OutOfResources"}]
    results = sweep.best(rows)
    config, over = results["forward"][128]
    assert config == sweep.Config(128, 64, 8, 3)
    assert over == pytest.approx(0.95)
    assert results["column"][128][1] == 0.7
    loop = [row("loop", 64, 1.5, "forward_loop"), row("loop", 32, 0.3, "forward_loop")]
    results = sweep.best(rows + loop)
    assert results["forward"] == results["forward_loop"]
    assert results["forward"][128] == (sweep.Config(128, 32, 8, 3), pytest.approx((0.8 + 1.2 + 0.3) / 3))


def test_correctness_covers_kernels_dtypes_and_features():
    names = list(correctness.tasks(smoke=False))
    for dtype in correctness.DTYPES:
        assert sum(name.endswith((dtype, f"{dtype}, from lse")) for name in names) >= 2 * len(correctness.FEATURES)
        assert sum(name.startswith("repeat") and dtype in name for name in names) >= len(correctness.PASSES)
    assert {EVERY[i].name for i in correctness.KINDS if i < len(EVERY)} == {
        "waad",
        "mean_distance",
        "entropy",
        "max_logit",
        "fai",
        "received",
    }
    assert isinstance(Answer(), tuple)
