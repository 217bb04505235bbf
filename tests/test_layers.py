"""Arrows point down: a module imports layers below its own, and there is no circle, inside functions either."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# From the bottom up. Modules of one line may import each other, as long as there is no circle.
LAYERS = (
    ("errors", "statistics", "tensors", "wrappers", "cells", "_threads"),
    ("results", "identity", "curves", "chance"),
    ("core", "heads", "credit"),
    ("reference", "tiled", "triton", "distributed", "rhythm", "presets"),
    ("flash",),
    ("_dispatch",),
    ("_operators",),
    ("functional", "paged"),
    ("nn", "sdpa", "transformers"),
    ("",),  # attnstats itself, which imports what users import by name
    ("segments",),
    ("study", "integrations"),
    ("report",),
    ("run", "finding"),
    ("cli",),
    ("__main__",),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
SEPARATE = {"reference", "tiled", "triton"}  # backends know nothing of each other


def modules(folder: Path, package: str) -> dict[str, ast.Module]:
    """Every module below a folder, by its dotted name; a package by its own."""
    found = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        name = ".".join([package, *(part for part in parts if part != "__init__")])
        found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def imports(name: str, tree: ast.Module, known: set[str]) -> set[str]:
    """The modules among `known` that a module imports anywhere in its text."""
    imported: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*name.split(".")[: -node.level], *filter(None, [node.module])])
            imported |= {f"{base}.{a.name}" if f"{base}.{a.name}" in known else base for a in node.names}
    return {module for module in imported if module in known and module != name}


TREES = modules(ROOT / "attnstats", "attnstats")
TREES |= modules(ROOT / "kernels", "attnstats.kernels")
GRAPH = {name: imports(name, tree, set(TREES)) for name, tree in TREES.items()}


def layer(module: str) -> str:
    """The folder or top-level module that a module is part of."""
    return module.removeprefix("attnstats").removeprefix(".").partition(".")[0]


@pytest.mark.parametrize("module", [name for name in GRAPH if layer(name) not in ("", "kernels")])
def test_imports_point_down(module):
    own = layer(module)
    assert own in LEVEL, f"{module}: give {own} a place in LAYERS, and docs/design.md a line"
    for imported in GRAPH[module]:
        other = layer(imported)
        if other == own:
            continue
        if other == "kernels":
            assert own == "triton", f"{module} imports {imported}: only attnstats.triton launches kernels"
            continue
        assert LEVEL[other] <= LEVEL[own], f"{module} imports {imported}, which stands above it"
        assert not {own, other} <= SEPARATE, f"{module} imports {imported}, another backend"


def test_there_is_no_circle():
    without_root = {name: needed - {"attnstats"} for name, needed in GRAPH.items() if name != "attnstats"}
    try:
        TopologicalSorter(without_root).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_device_code_stands_alone():
    for name, tree in TREES.items():
        if layer(name) != "kernels":
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                assert all(alias.name.split(".")[0] == "triton" for alias in node.names), name
            elif isinstance(node, ast.ImportFrom):
                assert node.level or node.module.split(".")[0] in ("triton", "typing", "__future__"), name


def test_integrations_are_imported_by_what_users_start_alone():
    importers = {layer(name) for name, needed in GRAPH.items() if any(layer(m) == "integrations" for m in needed)}
    assert importers == {"integrations", "run", "cli"}


def test_no_function_hides_a_module():
    """`attnstats.attention` is a function; no module of the same name stands behind it."""
    import attnstats

    top = {path.stem for path in (ROOT / "attnstats").iterdir() if path.suffix == ".py" or path.is_dir()}
    assert not [name for name in attnstats.__all__ if callable(getattr(attnstats, name)) and name in top]


def test_no_class_has_two_homes():
    homes: dict[str, list[str]] = {}
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                homes.setdefault(node.name, []).append(name)
    assert {name: places for name, places in homes.items() if len(places) > 1} == {}
