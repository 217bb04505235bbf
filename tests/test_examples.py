"""Every script in examples/, run as a user would, small enough for seconds; what it prints must hold."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(script: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / script), *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def numbers(pattern: str, text: str) -> list[float]:
    return [float(found) for found in re.findall(pattern, text)]


def test_every_example_is_run_and_short():
    scripts = {path.name for path in (ROOT / "examples").glob("*.py")}
    assert scripts == {"bring_your_own_kernel.py", "capture.py", "entropy_penalty.py", "live_generation.py"}
    for script in scripts:
        text = (ROOT / "examples" / script).read_text()
        assert f"python examples/{script}" in text
        assert len(text.splitlines()) < 120


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
