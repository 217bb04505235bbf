"""Every script in examples/, run as a user would, small enough for seconds; what it prints must hold."""

from __future__ import annotations

import csv
import importlib
import re

import pytest

from tests.process import ROOT, python

CREDITS = ("grpo", "coupled", "local", "global", "random", "entropy")


def run(script: str, *arguments: str) -> str:
    return python(str(ROOT / "examples" / script), *arguments, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")


def numbers(pattern: str, text: str) -> list[float]:
    return [float(found) for found in re.findall(pattern, text)]


SCRIPTS = {
    "bring_your_own_kernel.py": 120,
    "capture.py": 120,
    "countdown_grpo.py": 300,
    "entropy_penalty.py": 120,
    "live_generation.py": 120,
}
MODULES = {"countdown.py": 200}  # which scripts import


def test_every_example_is_run_and_short():
    most_lines = SCRIPTS | MODULES
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == set(most_lines)
    for script, most in most_lines.items():
        text = (ROOT / "examples" / script).read_text()
        assert script in MODULES or f"python examples/{script}" in text
        assert len(text.splitlines()) <= most


def test_capture():
    text = run("capture.py", "--top", "3")
    assert "layers 10, 12, 15, 18, 20: 13 local heads" in text
    rows = re.findall(r"^ *'.*' +\d+ +(\S+) +'.*' +\d+ +(\S+)$", text, re.MULTILINE)
    assert len(rows) == 3
    for column in zip(*rows, strict=True):
        assert list(column) == sorted(column, reverse=True)


def test_live_generation_stops_and_equals_teacher_forcing():
    text = run("live_generation.py", "--max-tokens", "40", "--anchor", "1e-4", "--seen-by", "3")
    assert "is an anchor" in text
    streamed = re.findall(r"^ *'.*'  +\d\.\d\d  #*$", text, re.MULTILINE)
    assert len(streamed) == 13  # the first that 3 later ones can have seen at a distance of 10 or more
    assert re.search(r"^13 of \d+ tokens were decoded one by one", text, re.MULTILINE)
    waad, fai = numbers(r"(?m)^  (?:waad|fai) +(\S+)$", text)
    assert waad < 1e-4
    assert fai < 1e-5


def test_the_penalty_lowers_entropy_and_not_the_fit():
    text = run("entropy_penalty.py", "--steps", "160", "--length", "16", "--lag", "1")
    first, *_, last = ([float(x) for x in line.split()] for line in text.splitlines() if re.match(r" *\d", line))
    assert first[1:3] == first[3:5]  # the same start
    _, plain, entropy, penalised, sharper = last
    assert sharper < 0.8 * entropy
    assert max(plain, penalised) < 1.0 < first[1]


@pytest.mark.parametrize("kernel", ["running-softmax", "flex"])
def test_bring_your_own_kernel(kernel):
    text = run("bring_your_own_kernel.py", "--kernel", kernel, "--length", "300", "--window", "127")
    differences = numbers(r"(?m)^  \w+ +(\S+)$", text)
    assert len(differences) == 5
    assert max(differences) < 1e-4


def test_countdown_trains_with_every_credit_that_is_not_there_yet_and_plots(tmp_path):
    (tmp_path / "local-7.csv").write_text("step,held_out,reward\n0,0.25,\n2,,0.5\n2,0.75,\n")  # finished before
    size = ["--steps", "2", "--every", "2", "--batch", "16", "--warm-up", "3", "--puzzles", "80", "--held-out", "8"]
    text = run("countdown_grpo.py", *size, "--seeds", "7", "--out", str(tmp_path))
    assert set(re.findall(r"^(\w+), seed 7: .*% -> .*%", text, re.MULTILINE)) == set(CREDITS) - {"local"}
    assert re.search(r"^local +solved at the end: 75.0%: 75.0%$", text, re.MULTILINE)
    assert re.search(r"^local +reward of the last third of training: 50.0%: 50.0%$", text, re.MULTILINE)
    for kind in set(CREDITS) - {"local"}:
        with (tmp_path / f"{kind}-7.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert [row["step"] for row in rows if row["held_out"]] == ["0", "2"]
        trained = [row for row in rows if row["reward"]]
        assert [row["step"] for row in trained] == ["2"]
        assert (trained[0]["rhythm/gamma"] == "") == (kind == "grpo")
    assert "</svg>" in (tmp_path / "countdown.svg").read_text()


def test_countdown_measures_what_the_credit_costs(tmp_path):
    size = ["--batch", "16", "--warm-up", "3", "--puzzles", "80", "--held-out", "8", "--cost", "2"]
    text = run("countdown_grpo.py", *size, "--out", str(tmp_path))
    found = re.findall(r"^(wall|CPU) time .*, 2 pairs: GRPO .* s, coupled .* s; paired median", text, re.MULTILINE)
    assert found == ["wall", "CPU"]


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("2+5=7,7*9=63!(2+5)*9", True),
        ("!9*(5+2)", True),
        ("!9*(5+2)\nmore", True),
        ("more\n!9*(5+2)", False),
        ("(2+5)*9", False),  # nothing after a mark
        ("!7*9", False),  # not the three numbers
        ("!(2+5)*9+0", False),
        ("!2+5*9", False),
        ("!(2+5)*9!", False),
        ("!(2+5)*", False),
        ("!((((((((((((2+5)))))))))))*9", False),
        ("!2**5**9**9", False),
        ("!__import__('os')", False),
        ("!02+5", False),
        ("!" + "-" * 23 + "1", False),
        ("", False),
    ],
)
def test_countdown_judges_what_follows_the_mark(answer, right, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    countdown = importlib.import_module("countdown")
    assert countdown.solves(countdown.Puzzle((2, 5, 9), 63), answer) is right
