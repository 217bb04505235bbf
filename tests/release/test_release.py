"""What `make release` compares: the contents of sdists and wheels with what git tracks, and versions with each other.

`make release` itself installs from package indexes, which takes minutes; what it builds with is tested in
tests/test_packaging.py.
"""

from __future__ import annotations

import importlib
import re
import tarfile
import zipfile
from pathlib import Path

import pytest

import attnstats
from tests.process import ROOT

release = importlib.import_module("release.__main__")
FILES = {"attnstats/__init__.py", "attnstats/py.typed", "csrc/native.cpp"}
WHEEL = "attnstats-0.1.0-cp310-abi3-manylinux_2_24_x86_64.whl"
PURE = "attnstats-0.1.0-py3-none-any.whl"
SDIST = "attnstats-0.1.0.tar.gz"


def archive(path: Path, names: set[str]) -> None:
    """Write a wheel or an sdist with empty files of these names."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path, "w") as wheel:
            for name in names:
                wheel.writestr(name, "")
        return
    with tarfile.open(path, "w:gz") as sdist:
        for name in (*names, *(f"{prefix}x" for prefix in release.GENERATED)):
            sdist.addfile(tarfile.TarInfo(f"attnstats-0.1.0/{name}"))


def test_tracked_files_are_named_as_in_the_package() -> None:
    files = release.tracked()
    assert {"attnstats/kernels/weights.py", "attnstats/report/report.css", "csrc/tile.h"} <= files
    assert not [file for file in files if not file.startswith(("attnstats/", "csrc/"))]
    assert "attnstats/kernels" not in files


def test_expected_contents_by_kind() -> None:
    compiled, pure, sdist = (release.expected(Path(name), FILES) for name in (WHEEL, PURE, SDIST))
    assert compiled - pure == {release.LIBRARY}
    assert "attnstats-0.1.0.dist-info/licenses/LICENSE" in pure
    assert FILES - pure == {"csrc/native.cpp"}
    assert sdist > FILES
    for name in release.OF_SDIST:
        assert (ROOT / name).is_file()


@pytest.mark.parametrize("name", [WHEEL, PURE, SDIST])
def test_missing_and_stray_files_are_named(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    expected = release.expected(path, FILES)
    archive(path, expected)
    release.check_contents(path, expected)
    archive(path, expected - {"attnstats/py.typed"} | {"tests/test_nan.py"})
    with pytest.raises(SystemExit, match=r"lacks \['attnstats/py.typed'\], and has \['tests/test_nan.py'\]"):
        release.check_contents(path, expected)


def test_one_version_everywhere() -> None:
    """cffconvert, which `make release` runs, checks the rest of CITATION.cff."""
    (cited,) = re.findall(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    (declared,) = re.findall(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert cited == declared == attnstats.__version__
