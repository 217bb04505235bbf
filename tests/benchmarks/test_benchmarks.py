"""The benchmarks' own parts, small: every contender is right, turns are fair, the report divides what it says.

Speed is not looked at here; `make bench` does that.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from attnstats.core import library
from attnstats.statistics import CATALOGUE
from attnstats.study import tables
from benchmarks import corpus, every_statistic, last_queries, mask_reading, memory, overhead, report, whole_model
from benchmarks.contenders import CONTENDERS, HEADS, Case, contenders
from benchmarks.summary import Series
from benchmarks.test_attention import inputs_of, turns, verify
from tests.process import python
from tests.tiny import small_llama


@pytest.fixture
def uncompiled() -> Iterator[None]:
    """FlexAttention by its own eager path, which needs no C++ compiler."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CONTENDERS)
@pytest.mark.parametrize("key_heads", [HEADS, 3])
def test_every_contender_equals_the_reference(name: str, key_heads: int) -> None:
    case = Case(300, key_heads)
    with torch.no_grad():
        verify(CONTENDERS[name](*inputs_of(case)), case)


def test_verify_notices_a_small_error() -> None:
    case = Case(64, HEADS)
    answer = CONTENDERS["attnstats"](*inputs_of(case))
    assert answer.waad is not None
    answer.waad[0, 0, 5] += 1e-4
    with pytest.raises(AssertionError, match="waad is wrong"):
        verify(answer, case)


def test_turns_interleave_and_rotate() -> None:
    order: list[tuple[Case, int, str]] = [p.values for p in turns()]  # type: ignore[misc]
    for case in {case for case, _, _ in order}:
        names = contenders(case)
        mine = [(turn, name) for other, turn, name in order if other == case]
        rounds = [mine[i : i + len(names)] for i in range(0, len(mine), len(names))]
        assert len(rounds) >= 7
        for turn, members in enumerate(rounds):
            assert sorted(members) == sorted((turn, name) for name in names)
        assert {members[0][1] for members in rounds} == set(names)


HOG = """
import torch
from benchmarks import memory
from benchmarks.contenders import CONTENDERS, HEADS, Case
CONTENDERS["hog"] = lambda query, key, value: torch.ones(16 * 2**20)
print(memory.peak("hog", Case(16, HEADS)))
"""


def test_peak_counts_what_a_call_allocates() -> None:
    """In a process of its own: what other tests have freed would be counted, too."""
    mib = python("-c", HOG).strip()
    if not memory.RESET.exists():  # not Linux
        assert mib == "None"
    else:
        assert 60 <= float(mib) <= 80  # 64 MiB and noise


def document(times: dict[str, list[float]], dtype: str = "float32") -> dict[str, Any]:
    benchmarks = [
        {
            "extra_info": {
                "contender": name, "length": 4096, "layout": "MHA", "dtype": dtype, "turn": turn, "peak_mib": 12.3
            },
            "stats": {"median": seconds},
        }
        for name, series in times.items()
        for turn, seconds in reversed(list(enumerate(series)))
    ]  # fmt: skip
    machine = {"cpu": {"brand_raw": "CPU"}, "python_version": "3.12.1"} | dict.fromkeys(report.VERSIONS, "1")
    return {
        "benchmarks": benchmarks,
        "machine_info": machine,
        "commit_info": {"id": "0123456789abcdef", "dirty": True},
        "datetime": "2026-11-23T10:00:00",
    }


TIMES = {"SDPA alone": [1.0, 2.0, 1.0], "attnstats": [1.1, 2.2, 5.0], "eager": [9.9, 22.0, 60.0]}


def test_ratios_pair_the_rounds() -> None:
    results = report.collect(document(TIMES))
    ours, eager = (results[4096, "MHA", "float32", name] for name in ("attnstats", "eager"))
    assert ours.over(results[4096, "MHA", "float32", "SDPA alone"]) == pytest.approx(1.1)
    assert eager.over(ours) == pytest.approx(10.0)
    hit, near = report.targets(results)
    assert "1.10x of SDPA alone" in hit
    assert hit.endswith("hit")
    assert "10.0x faster" in near


def test_report_writes_both_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, results = tmp_path / "bench.json", tmp_path / "results"
    whole = document(TIMES)
    whole["benchmarks"] += document({"SDPA alone": [1.0], "attnstats": [1.5]}, "bfloat16")["benchmarks"]
    source.write_text(json.dumps(whole))
    monkeypatch.setattr("sys.argv", ["report", str(source), "--results", str(results)])
    report.main()
    kept = json.loads((results / "cpu.json").read_text())
    assert kept["conditions"]["commit"] == "0123456789abcdef+changes"
    assert {tuple(s["seconds"]) for s in kept["series"] if s["contender"] == "eager"} == {(9.9, 22.0, 60.0)}
    text = (results / "cpu.md").read_text()
    assert "| 4096 | MHA | **attnstats** | 2200.0 | 1.10 | 1.00 | 12 | 1500.0 | 1.50 |" in text


def test_a_corpus_is_summarised_and_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "RESULT", tmp_path / "results" / "corpus.json")
    monkeypatch.setattr(corpus, "DISTINCT", 3)
    monkeypatch.setattr("sys.argv", ["corpus", "--prompts", "8", "--folder", str(tmp_path)])
    assert corpus.main() == 0
    record = json.loads(corpus.RESULT.read_text())
    assert list(record["stages"]) == ["profile", "tables and couplings", "page", "a question of the tables"]
    assert set(record["bytes_of_files"]) == {*tables.FILES, "report.html", "run.json"}
    assert record["total"]["seconds"] > 0


def test_overhead_times_every_call() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.overhead", "--rounds", "1", "--calls", "1", "--json"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    rows = json.loads(run.stdout)
    assert list(rows) == ["SDPA", *overhead.REQUESTS, overhead.FROM_LSE]
    assert all(0 < row["us"] < 1e6 for row in rows.values())
    assert [row["launches"] for row in rows.values()] == [0, 1, 1, 2, 0, 1, 1, 1]
    assert rows["flash: attention + WAAD + FAI"]["operations"] <= 5  # of attention, the lse, and three of slots


@pytest.fixture
def tiny_model(monkeypatch: pytest.MonkeyPatch) -> Any:
    """In the place of SmolLM2: as many layers, and nothing else."""
    sizes = {"vocab_size": 200, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = small_llama(num_hidden_layers=whole_model.LAYERS, initializer_range=0.3, **sizes)
    monkeypatch.setattr(whole_model, "load", lambda: model)
    return model


def test_a_whole_model_is_read_rightly_and_timed(tiny_model: Any, tmp_path: Path) -> None:
    results = {s.contender: s for s in whole_model.measure(2, length=150, prompt=20, new=4)}  # verifies all
    assert set(results) == {*whole_model.FORWARD, *whole_model.DECODING}
    assert all(len(series.seconds) == 2 for series in results.values())
    assert tiny_model.config._attn_implementation == "sdpa"
    notes = whole_model.targets(results)
    whole_model.write(results, notes, whole_model.here(), tmp_path)
    kept = json.loads((tmp_path / "model.json").read_text())
    assert kept["targets"] == notes
    assert len(kept["series"]) == len(results)
    assert f"| {whole_model.BASE} | " in (tmp_path / "model.md").read_text()


def test_a_wrong_reading_of_a_whole_model_is_noticed(tiny_model: Any) -> None:
    ids = whole_model.tokens(tiny_model, 64)
    with torch.no_grad():
        truth = whole_model.hooks(tiny_model, ids)
        whole_model.verify(whole_model.captured("all")(tiny_model, ids), truth)
        with pytest.raises(AssertionError):
            whole_model.verify(whole_model.captured("middle-third")(tiny_model, ids), truth)


def test_ratios_of_a_whole_model_pair_the_rounds_that_both_have() -> None:
    base = Series("base", None, [1.0, 2.0, 1.0, 9.0])
    assert Series("eager", None, [10.0, 22.0, 60.0]).over(base) == pytest.approx(11.0)


def test_last_queries_are_measured_on_both_paths(capsys: pytest.CaptureFixture[str]) -> None:
    last_queries.main(64)
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()[4:]] == ["compiled", "plain"]


def test_reading_of_masks_is_measured_on_both_paths(capsys: pytest.CaptureFixture[str]) -> None:
    before = library.enabled
    mask_reading.main(64)
    ways = [line.split(" | ")[1] for line in capsys.readouterr().out.splitlines()[4:]]
    assert ways == ["compiled"] * 4 + ["plain"] * 4
    assert library.enabled == before


def test_every_statistic_is_timed() -> None:
    lines = every_statistic.main((64,), 16, rounds=1).splitlines()[4:]
    cells = [line.strip("| ").split(" | ") for line in lines]
    assert [cell[0] for cell in cells] == [every_statistic.name(x) for x in every_statistic.REQUESTS]
    assert {s.name for request in every_statistic.REQUESTS for s in request} == set(CATALOGUE)
    has_gradients = [all(s.differentiable for s in request) for request in every_statistic.REQUESTS]
    assert [cell[2] != "-" for cell in cells] == has_gradients
