"""reliability/faults.py: where faults are put, in what order they are drawn, and what counts as found."""

import ast
import json
from pathlib import Path

import pytest

from reliability import faults
from reliability.sites import changes, faults_in
from tests.process import ROOT, python

SOURCE = b'''
def f(x: int, y=2, *, mask=None):
    """Text with 1 + 1."""
    if x < 3 and not y:
        raise ValueError(f"{x + 1}")
    z = np.where(mask, min(x, 5), -y)  # a comment, 1 + 1
    z -= tl.load(x + 1, mask=mask, other=0.0)
    return z[1:x].clamp(min=0)
'''
EXPECTED = {
    ("constant", "2", "3"),
    ("comparison", "<", "<="),
    ("operator", "and", "or"),
    ("not removed", "not y", "(y)"),
    ("mask dropped", "np.where(mask, min(x, 5), -y)", "min(x, 5)"),
    ("arguments swapped", "mask, min(x, 5)", "min(x, 5), mask"),
    ("clamp removed", "min(x, 5)", "x"),
    ("clamp removed", "min(x, 5)", "5"),
    ("sign", "-y", "(y)"),
    ("operator", "-=", "+="),
    ("mask dropped", "tl.load(x + 1, mask=mask, other=0.0)", "tl.load(x + 1)"),
    ("operator", "+", "-"),
    ("off by one", "x", "(x) + 1"),
    ("clamp removed", "z[1:x].clamp(min=0)", "z[1:x]"),
}
CPP = b"""
#include <cmath>
static int f(int a, int b) {
    if (a <= b && !b) return larger(a, b + 1);  // a < b
    return g(a, b);
}
"""
EXPECTED_CPP = {
    ("comparison", "<=", "<"),
    ("operator", "&&", "||"),
    ("not removed", "!", ""),
    ("operator", "+", "-"),
    ("constant", "1", "2"),
    ("clamp removed", "larger(a, b + 1)", "(a)"),
    ("clamp removed", "larger(a, b + 1)", "(b + 1)"),
    ("bounds", "larger(", "smaller("),
    ("arguments swapped", "g(a, b", "g(b, a"),
}


def test_faults_of_python():
    found = [fault for fault in faults_in("x.py", SOURCE) if changes(fault, SOURCE)]
    kinds = {(fault.kind, fault.before, fault.after) for fault in found}
    assert kinds >= EXPECTED
    # Not in annotations, docstrings, comments or messages of errors.
    assert {fault.line for fault in found} == {2, 4, 6, 7, 8}
    for fault in found:
        ast.parse(fault.put_into(SOURCE))


def test_faults_of_cpp():
    found = faults_in("x.cpp", CPP)
    assert {(fault.kind, fault.before, fault.after) for fault in found} >= EXPECTED_CPP
    assert {fault.line for fault in found} == {4, 5}


def test_there_are_enough_places():
    for area, (patterns, number, tests) in faults.AREAS.items():
        paths = [path for pattern in patterns for path in ROOT.glob(pattern)]
        assert paths, area
        assert sum(len(faults_in(str(path.relative_to(ROOT)), path.read_bytes())) for path in paths) >= 2 * number
        assert all(list(ROOT.glob(pattern)) for pattern in tests), area
    assert sum(area.number for area in faults.AREAS.values()) >= 200
    assert min(faults.AREAS[area].number for area in ("kernels", "csrc")) >= 50


def test_a_fault_is_the_same_wherever_its_line_stands():
    def identities(source):
        return [fault.identity for fault in faults_in("x.py", source)]

    before = identities(SOURCE)
    assert len(set(before)) == len(before)
    assert identities(b"\n\nBEFORE = len('')\n" + SOURCE) == before


def test_equivalent_faults_have_a_reason_and_a_place():
    for identity, reason in faults.equivalent().items():
        path = ROOT / identity[0]
        assert reason
        assert identity in {fault.identity for fault in faults_in(identity[0], path.read_bytes())}, identity


# A package that stands for ours.
TOY = "def double(x):\n    return x * 2\n\ndef unused(x):\n    return x * 2\n"
TOY_TEST = """
import attnstats

def test_double():
    assert attnstats.double(3) == 6

def test_nothing():
    pass
"""
# What is replaced in it, and by what.
CHANGED = {
    "x * 2": "x + 2",
    "return": "((",
    "return x": "while True: x",
    "def double": "import os; os.abort()\ndef double",
}
RUN = """
import json, sys, time
from pathlib import Path
from reliability import server
server.IMPORTED_BEFORE = ("torch", "pytest")
server.warm_up()
for tree in map(Path, sys.argv[1:]):
    limits = {"tests/test_toy.py::test_double": 1.0, "tests/test_toy.py::test_nothing": 1.0}
    child = server.Child(lambda: server.run_tests(tree, ["tests/test_toy.py"], limits), tree / "log", 30.0, 60.0)
    while (ended := child.ended()) is None:
        time.sleep(0.01)
    print(json.dumps(ended))
items = server.Child(lambda: server.record(Path(sys.argv[1]), "tests/test_toy.py"), tree / "log", 30.0, 60.0)
while (ended := items.ended()) is None:
    time.sleep(0.01)
print(json.dumps(ended))
"""


@pytest.fixture
def toys(tmp_path: Path) -> list[Path]:
    """A tree for each of CHANGED, and before them one without a fault."""
    trees = []
    for i, (before, after) in enumerate({"": "", **CHANGED}.items()):
        tree = tmp_path / str(i)
        (tree / "attnstats").mkdir(parents=True)
        (tree / "attnstats" / "__init__.py").write_text(TOY.replace(before, after, 1) if before else TOY)
        (tree / "tests").mkdir()
        (tree / "tests" / "test_toy.py").write_text(TOY_TEST)
        trees.append(tree)
    return trees


def test_verdicts_of_a_toy(toys):
    *verdicts, recorded = map(json.loads, python("-c", RUN, *map(str, toys)).splitlines())
    assert verdicts[0] == {"failed": "", "passed": 2, "status": 0, "seconds": verdicts[0]["seconds"]}
    assert verdicts[1]["failed"] == "tests/test_toy.py::test_double"
    assert verdicts[2]["failed"] == "import: SyntaxError"
    assert verdicts[3]["died"] == "timeout"
    assert verdicts[4]["died"] == "SIGABRT"
    assert [item["executes"] for item in recorded["items"].values()] == [["attnstats/__init__.py:double"], []]
