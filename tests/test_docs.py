"""The documentation's site builds without a broken link, has every public name, and mentions only what exists."""

import importlib
import importlib.util
import inspect
import pkgutil
import re
import zlib

import pytest

import attnstats
from tests.process import ROOT, python

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
MODULES = (
    *("credit", "distributed", "errors", "finding", "heads", "identity", "nn", "presets", "reference", "results"),
    *("rhythm", "segments", "study.analysis", "study.models", "study.outputs", "report.figures"),
    *("integrations.roll", "integrations.settings", "integrations.sglang", "integrations.trl"),
    *("integrations.verl", "integrations.vllm"),
)
LINK = re.compile(r"\]\((?![a-z]+:)([^)#\s]*)(#[^)\s]*)?\)")
FOLDERS = ("attnstats", "benchmarks", "csrc", "docs", "examples", "kernels", "release", "reliability", "tests")
PATH = re.compile(rf"(?<![\w/.:-])(?:{'|'.join(FOLDERS)})/[\w./-]*\w")
FILE = re.compile(r"(?<![\w/.<>-])\w+\.(?:py|cpp)(?!\w)")
MODULE = re.compile(r"python -m ((?:attnstats|benchmarks|release|reliability|tests)[\w.]*)")
NAME = re.compile(r"(?<![\w/.-])attnstats(?:\.\w+)+(?!\w*[/-])")
TARGET = re.compile(r"`make (\w+)")
FETCHED = re.compile(r"<(?:script|img|iframe|source)[^>]+src=\"(?:https?:)?//|<link[^>]+href=\"(?:https?:)?//")


def exists(name):
    """True for a dotted name of a module of attnstats, or of a class, function or attribute in one."""
    try:
        pkgutil.resolve_name(name)
    except (ImportError, AttributeError):  # or of a plug-in whose framework is not installed
        if (ROOT / f"{name.replace('.', '/')}.py").is_file():
            return True
        module, _, attribute = name.rpartition(".")
        whole, file = (ROOT / f"{part.replace('.', '/')}.py" for part in (name, module))
        return whole.is_file() or (file.is_file() and f"\nclass {attribute}(" in file.read_text())
    return True


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built as `make docs` builds it: a link or an anchor that leads nowhere is an error."""
    pytest.importorskip("mkdocstrings", reason="pip install '.[docs]'")
    folder = tmp_path_factory.mktemp("site")
    python("-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder), NO_MKDOCS_2_WARNING="1")
    return folder


@pytest.fixture(scope="module")
def documented(site):
    """Every name that has a heading in the API reference."""
    inventory = (site / "objects.inv").read_bytes().split(b"\n", 4)[4]
    return {line.split(" ")[0] for line in zlib.decompress(inventory).decode().splitlines()}


def public_names(module):
    """The functions and classes in a module's `__all__`, or without one those that it defines without an underscore."""
    members = inspect.getmembers(module, lambda member: inspect.isfunction(member) or inspect.isclass(member))
    if hasattr(module, "__all__"):
        return [name for name, _ in members if name in module.__all__]
    return [name for name, member in members if member.__module__ == module.__name__ and not name.startswith("_")]


@pytest.mark.slow
def test_the_reference_has_every_name_of_the_package(documented):
    missing = {f"attnstats.{name}" for name in attnstats.__all__} - documented
    assert not missing


@pytest.mark.parametrize("name", MODULES)
def test_the_reference_has_every_public_function_and_class(documented, name):
    module = importlib.import_module(f"attnstats.{name}")
    names = {f"{module.__name__}.{name}" for name in public_names(module)}
    missing = names - documented
    assert names
    assert not missing


def test_pages_fetch_nothing_from_the_network(site):
    fetching = [page.name for page in site.rglob("*.html") if FETCHED.search(page.read_text())]
    assert not fetching


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page):
    links = [match[1] for match in LINK.finditer(page.read_text()) if match[1]]
    assert not [link for link in links if not (page.parent / link).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_names_files_commands_and_targets_that_are_mentioned_exist(page):
    text = LINK.sub("", page.read_text())
    names = {path.name for folder in FOLDERS for path in (ROOT / folder).rglob("*.*")}
    makefile = (ROOT / "Makefile").read_text()
    absent = [path for path in PATH.findall(text) if not (ROOT / path).exists()]
    absent += [file for file in FILE.findall(text) if file not in names | {"setup.py", "noxfile.py"}]
    absent += [module for module in MODULE.findall(text) if importlib.util.find_spec(module.rstrip(".")) is None]
    absent += [name for name in NAME.findall(text) if not exists(name)]
    absent += [target for target in TARGET.findall(text) if f"\n{target}:" not in makefile]
    assert not absent
