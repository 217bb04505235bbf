"""The notebooks of examples/notebooks run from top to bottom, and have small outputs that tell nothing of a machine."""

import json
import re

import pytest

from tests.make_notebooks import NOTEBOOKS, executed
from tests.process import ROOT

LARGEST = 200_000  # bytes
OF_A_MACHINE = re.compile(r"(?<![\w.])/(?:home|root|Users|tmp|work|opt|usr|var)/|[A-Z]:\\\\|site-packages|Traceback")


def kinds(notebook):
    """Of each code cell what its outputs are."""
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return [[sorted(output.get("data", [output["output_type"]])) for output in cell["outputs"]] for cell in cells]


def test_there_are_three_and_the_documentation_has_them():
    page = (ROOT / "docs" / "examples.md").read_text(encoding="utf-8")
    assert len(NOTEBOOKS) == 3
    assert all(f"(../examples/notebooks/{path.name})" in page for path in NOTEBOOKS)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_committed_is_small_in_order_and_of_no_machine(path):
    text = path.read_text(encoding="utf-8")
    notebook = json.loads(text)
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(text) < LARGEST
    assert not OF_A_MACHINE.search(text)
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert all("execution" not in cell["metadata"] for cell in code)
    assert notebook["metadata"]["language_info"] == {"name": "python"}


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_and_shows_what_is_committed(path, tmp_path, monkeypatch):
    pytest.importorskip("nbclient", reason="pip install '.[docs]'")
    pytest.importorskip("ipykernel", reason="pip install '.[docs]'")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))  # not what its user has it do at each start
    assert kinds(executed(path, tmp_path)) == kinds(json.loads(path.read_text(encoding="utf-8")))
