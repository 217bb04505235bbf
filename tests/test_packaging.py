"""The distribution: what a wheel holds, and under which names it can be imported.

Wheel, sdist and editable install are built from a copy of the tree without the network, and looked at from
subprocesses, since this process has already imported the package. `kernels` belongs to another project.
"""

from __future__ import annotations

import json
import shutil
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.process import ROOT, python

NOT_SOURCE = (".*", "__pycache__", "*.egg-info", "*.so", "build", "dist", "out")
COMPILED = "attnstats/tiled/_native.abi3.so"

FIND = """
import importlib.util, json, site, sys
for finder in [finder for finder in sys.meta_path if "__editable__" in getattr(finder, "__module__", "")]:
    sys.meta_path.remove(finder)  # another editable install of ours, in the environment that runs the tests
    sys.modules.pop(finder.__module__, None)
if sys.argv[1]:
    sys.path.insert(0, sys.argv[1])
    site.addsitedir(sys.argv[1])  # its .pth files: they are what makes an install editable
def where(name):
    spec = importlib.util.find_spec(name)
    return [] if spec is None else [spec.origin or "", *map(str, spec.submodule_search_locations or [])]
print(json.dumps({name: where(name) for name in ("attnstats", "attnstats.kernels", "attnstats.report", "kernels")}))
"""


def run(code: str, *arguments: str, cwd: Path = ROOT, path: str = "", **environment: str) -> str:
    return python("-c", code, *arguments, cwd=cwd, PYTHONPATH=path, **environment)


def find(site: str, cwd: Path, path: str = "") -> dict[str, list[str]]:
    """Where a fresh interpreter in `cwd` finds our names, when `site` is the site-packages that has attnstats."""
    return dict(json.loads(run(FIND, site, cwd=cwd, path=path)))


def is_ours(locations: list[str], folder: Path) -> bool:
    return any(location.startswith(str(folder)) for location in locations)


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, because setuptools writes into the tree that it builds."""
    copy = tmp_path_factory.mktemp("packaging") / "tree"
    shutil.copytree(ROOT, copy, symlinks=True, ignore=shutil.ignore_patterns(*NOT_SOURCE))
    return copy


def build(hook: str, tree: Path, into: Path, **environment: str) -> Path:
    into.mkdir()
    code = f"import sys, setuptools.build_meta as b; print(b.{hook}(sys.argv[1]))"
    run(code, str(into), cwd=tree, **environment)
    (artefact,) = into.iterdir()
    return artefact


@pytest.fixture(scope="session")
def wheel(tree: Path) -> Path:
    """The wheel as an index would serve it: built from the sdist, not from the tree."""
    return build("build_wheel", unpack(tree, tree.parent / "unpacked"), tree.parent / "wheel")


def unpack(tree: Path, into: Path) -> Path:
    """The tree as its sdist has it."""
    with tarfile.open(build("build_sdist", tree, into.with_suffix(".sdist"))) as archive:
        archive.extractall(into, filter="data")
    (unpacked,) = into.iterdir()
    return unpacked


@pytest.fixture(scope="session")
def installed(wheel: Path) -> Path:
    target = wheel.parent.parent / "site"
    python("-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", str(target), str(wheel))
    return target


@pytest.fixture(scope="session")
def editable(tree: Path) -> Path:
    """An editable install as a folder of its own: what pip would put into site-packages."""
    artefact = build("build_editable", tree, tree.parent / "editable_wheel")
    target = tree.parent / "editable_site"
    with zipfile.ZipFile(artefact) as archive:
        archive.extractall(target)
    return target


@pytest.fixture(scope="session")
def other_kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that offers a regular package `kernels`, as Hugging Face's does."""
    folder = tmp_path_factory.mktemp("other")
    (folder / "kernels").mkdir()
    (folder / "kernels" / "__init__.py").write_text("")
    return folder


def test_wheel_holds_every_module_and_template(wheel: Path) -> None:
    in_tree = {
        path.relative_to(ROOT).as_posix()
        for pattern in ("*.py", "*.jinja", "*.css", "*.js", "py.typed")
        for folder in (ROOT / "attnstats", ROOT / "attnstats" / "kernels")
        for path in folder.rglob(pattern)
    }
    with zipfile.ZipFile(wheel) as archive:
        in_wheel = {name for name in archive.namelist() if ".dist-info/" not in name} - {COMPILED}
        (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        (entry_points,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
        assert b"attnstats = attnstats.cli.main:main" in archive.read(entry_points)
        assert b"License-Expression: Apache-2.0" in archive.read(metadata)
        assert any(name.endswith("licenses/LICENSE") for name in archive.namelist())
    assert {"attnstats/__init__.py", "attnstats/kernels/weights.py", "attnstats/report/report.html.jinja"} <= in_wheel
    assert in_wheel == in_tree


def test_sdist_holds_what_it_is_built_from_and_no_tests(tree: Path, tmp_path: Path) -> None:
    unpacked = unpack(tree, tmp_path / "unpacked")
    folders = {path.name for path in unpacked.iterdir() if path.is_dir()}
    assert folders == {"attnstats", "attnstats.egg-info", "csrc"}
    assert {path.name for path in (unpacked / "csrc").iterdir()} == {path.name for path in (ROOT / "csrc").iterdir()}
    assert (unpacked / "CITATION.cff").exists()


LOAD = """
import pathlib, torch, attnstats.tiled.native
library = attnstats.tiled.native._library()
if library is not None and pathlib.Path(torch.__file__).with_name("lib").joinpath("libgomp.so.1").exists():
    maps = open("/proc/self/maps").read()
    assert len({line.split()[-1] for line in maps.splitlines() if "libgomp" in line}) == 1, "threads are torch's own"
print(attnstats.tiled.native.__file__, library is not None)
"""


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("g++"), reason="needs g++ on Linux")
def test_wheel_holds_the_compiled_sums(wheel: Path, installed: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        assert COMPILED in archive.namelist()
    assert wheel.name.split("-")[2:4] == ["cp310", "abi3"]
    assert wheel.name.split("-")[4].startswith("linux_")
    file, loaded = run(LOAD, cwd=tmp_path, path=str(installed)).split()
    assert is_ours([file], installed)
    assert loaded == "True"


@pytest.mark.parametrize("hook", ["build_wheel", "build_editable"])
def test_installs_without_a_compiler(hook: str, tree: Path, tmp_path: Path) -> None:
    unpacked = unpack(tree, tmp_path / "unpacked")
    no_compiler = dict.fromkeys(("CC", "CXX", "LDSHARED", "LDCXXSHARED"), "/nonexistent/compiler")
    artefact = build(hook, unpacked, tmp_path / "wheel", **no_compiler)
    with zipfile.ZipFile(artefact) as archive:
        assert not [name for name in archive.namelist() if name.endswith(".so")]
        archive.extractall(tmp_path / "site")
    assert not list((unpacked / "attnstats").glob("*.so"))
    path = tmp_path / "site" if hook == "build_wheel" else unpacked
    file, loaded = run(LOAD, cwd=tmp_path, path=str(path)).split()
    assert is_ours([file], path)
    assert loaded == "False"


def test_a_pure_wheel_is_for_any_system_and_works(tree: Path, tmp_path: Path) -> None:
    unpacked = unpack(tree, tmp_path / "unpacked")
    wheel = build("build_wheel", unpacked, tmp_path / "wheel", ATTNSTATS_PURE="1")
    assert wheel.name.split("-")[2:] == ["py3", "none", "any.whl"]
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if name.endswith(".so")]
        archive.extractall(tmp_path / "site")
    file, loaded = run(LOAD, cwd=tmp_path, path=str(tmp_path / "site")).split()
    assert is_ours([file], tmp_path / "site")
    assert loaded == "False"


def test_kernels_is_ours_only_below_attnstats_in_a_wheel(installed: Path, tmp_path: Path) -> None:
    found = find(str(installed), tmp_path)
    assert found["attnstats"][0] == str(installed / "attnstats" / "__init__.py")
    assert found["attnstats.kernels"][-1] == str(installed / "attnstats" / "kernels")
    assert found["attnstats.report"][0] == str(installed / "attnstats" / "report" / "__init__.py")
    assert not is_ours(found["kernels"], installed)
    assert not is_ours(found["kernels"], ROOT / "kernels")


def test_kernels_is_ours_only_below_attnstats_when_editable(editable: Path, tree: Path, tmp_path: Path) -> None:
    found = find(str(editable), tmp_path)
    assert found["attnstats"][0] == str(tree / "attnstats" / "__init__.py")
    assert found["attnstats.kernels"][-1] == str(tree / "attnstats" / "kernels")
    assert found["attnstats.report"][0] == str(tree / "attnstats" / "report" / "__init__.py")
    assert not is_ours(found["kernels"], tree)


def test_kernels_is_ours_only_below_attnstats_in_the_root(other_kernels: Path) -> None:
    """The root comes first on sys.path, the other package later: a folder without `__init__.py` never wins."""
    found = find("", ROOT, path=str(other_kernels))
    assert found["attnstats"][0] == str(ROOT / "attnstats" / "__init__.py")
    assert found["attnstats.kernels"][-1] == str(ROOT / "attnstats" / "kernels")
    assert found["kernels"] == [str(other_kernels / "kernels" / "__init__.py"), str(other_kernels / "kernels")]


def test_transformers_does_not_mistake_the_folder_for_the_other_package() -> None:
    """Standing in the root, without Hugging Face's package, `kernels` is at most an empty namespace."""
    code = """
import importlib.metadata, importlib.util
from transformers.utils import is_kernels_available
spec = importlib.util.find_spec("kernels")
if spec is not None and spec.origin is None:
    assert spec.loader is None or type(spec.loader).__name__ == "NamespaceLoader", spec
    assert not is_kernels_available()
"""
    run(code)
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_import_leaves_out_what_is_heavy() -> None:
    """`import attnstats` needs torch; packages that only some users need are imported when they are used."""
    heavy = ("transformers", "triton", "pandas", "jinja2", "rich", "scipy", "safetensors", "accelerate", "matplotlib")
    code = f"""
import sys, torch
before = set(sys.modules)
import attnstats
print(sorted({set(heavy)} & (set(sys.modules) - before)))
"""
    assert run(code).strip() == "[]"


def test_works_without_triton_and_transformers() -> None:
    code = """
import sys
for name in ("triton", "transformers", "pandas", "jinja2", "rich", "safetensors"):
    sys.modules[name] = None
import torch, attnstats
q, k, v = torch.randn(1, 4, 9, 16), torch.randn(1, 2, 9, 16), torch.randn(1, 2, 9, 16)
output, stats = attnstats.attention(q, k, v, statistics=["waad", "fai"], enable_gqa=True)
assert output.shape == q.shape and stats["waad"].shape == (1, 4, 9) and stats["fai"].shape == (1, 4, 9)
"""
    run(code)
