"""The folder for Hugging Face's Kernels hub: whole, without absolute imports, and with the numbers of attnstats.

`make` installs the package `kernels` in a folder of its own, as transformers would import it wherever it is found.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import sys
from pathlib import Path, PurePosixPath

import pytest

from attnstats import statistics
from release import hub
from tests.process import ROOT, python

KERNELS = Path(sys.prefix) / "hub"
MISSING = f"{KERNELS}: `make` installs Hugging Face's kernels there"

COMPARE = """
import sys
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[2])
import kernels
import attnstats

copy = kernels.get_local_kernel(Path(sys.argv[1]))
assert Path(copy.__file__).is_relative_to(sys.argv[1]) and copy.__name__.startswith("_attnstats_"), copy
assert copy.attention is not attnstats.attention
torch.manual_seed(0)
query, key, value = torch.randn(1, 4, 40, 16), torch.randn(1, 2, 40, 16), torch.randn(1, 2, 40, 16)
options = {"enable_gqa": True, "backend": "triton"}


def tensors(module, differentiable):
    leaves = [x.clone().requires_grad_() for x in (query, key, value)]
    statistics = [module.WAAD(5), module.FAI(2, 9), module.FAI(2, None), module.Entropy(), module.Received()]
    output, stats = module.attention(*leaves, statistics=statistics, differentiable=differentiable, **options)
    loss = output.square().sum() + (sum(stats[s].square().sum() for s in statistics) if differentiable else 0.0)
    gradients = torch.autograd.grad(loss, leaves)
    inputs = query, key, stats.lse.detach()
    beside = module.statistics_from_lse(*inputs, statistics=statistics, **options)
    packed = dict(cu_seqlens_q=torch.tensor([0, 7, 40], dtype=torch.int32), enable_gqa=True, backend="triton")
    tokens = [x[0].transpose(0, 1) for x in (query, key, value)]
    _, varlen = module.varlen_attention(*tokens, statistics=statistics, **packed)
    return [output, stats.lse, *gradients, *(found[s] for found in (stats, beside, varlen) for s in statistics)]


for differentiable in (False, True):
    for ours, theirs in zip(tensors(attnstats, differentiable), tensors(copy, differentiable), strict=True):
        assert torch.equal(ours, theirs)
assert not torch.equal(copy.attention(query, key, value, **options).output, torch.zeros_like(query))

# In a graph: each has operators of its own.
torch.compile(lambda: copy.attention(query, key, value, statistics=[copy.WAAD(5)], enable_gqa=True), backend="eager",
              fullgraph=True)()
assert hasattr(getattr(torch.ops, copy.__name__), "attention") and copy.__name__ != "attnstats"

# As an older version of `kernels` looks for it.
import importlib.util
path = Path(copy.__file__).parent / "attnstats" / "__init__.py"
spec = importlib.util.spec_from_file_location("below", path)
below = importlib.util.module_from_spec(spec)
spec.loader.exec_module(below)
assert below.attention is copy.attention and below.__all__ == copy.__all__
print("equal")
"""

CHECK = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from kernels._rust import Build, Digest, DigestAlgorithm, Metadata

folder = Path(sys.argv[1])
names = [str(backend) for backend in Build.open(folder).general.backends]
variants = sorted(path.name for path in (folder / "build").iterdir())
assert variants == sorted(f"torch-{name}" for name in names), (variants, names)
for path in (folder / "build").iterdir():
    metadata = Metadata.read_from_file(path / "metadata.json")
    assert f"torch-{metadata.backend.backend_type}" == path.name and metadata.name.python_name == "attnstats"
    metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, path))
print(len(variants))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kernel, written over an older one."""
    folder = tmp_path_factory.mktemp("hub") / "attnstats"
    (folder / "build" / "torch-metal").mkdir(parents=True)
    python("-m", "release.hub", str(folder))
    return folder


@pytest.mark.parametrize(
    ("line", "path", "expected"),
    [
        ("from attnstats import reference", "functional.py", "from . import reference"),
        ("from attnstats.statistics import *  # why", "functional.py", "from .statistics import *  # why"),
        ("from attnstats.core.lse import x", "triton/launch/start.py", "from ...core.lse import x"),
        ("from attnstats.triton.plan import x", "triton/launch/__init__.py", "from ...triton.plan import x"),
        ("if x:\n  from attnstats.core import (\n    y)", "core/wire.py", "if x:\n  from ..core import (\n    y)"),
        ("from .tiles import x", "kernels/band.py", "from .tiles import x"),
        ("from attnstats_other import x", "nn.py", "from attnstats_other import x"),
        ('"""from attnstats import x"""', "nn.py", '"""from attnstats import x"""'),
    ],
)
def test_imports_become_relative(line: str, path: str, expected: str) -> None:
    assert hub.relative(line, PurePosixPath(path)) == expected


def test_what_has_no_relative_form_is_refused() -> None:
    with pytest.raises(ValueError, match=r"attnstats/nn.py: 'import attnstats.core' has no relative form"):
        hub.relative("import attnstats.core", PurePosixPath("nn.py"))
    with pytest.raises(ValueError, match="imports capture of attnstats, which is no module of it"):
        hub.imported("from attnstats import capture", PurePosixPath("nn.py"))


def test_the_folder_has_all_kernels_and_imports_nothing_but_torch_and_triton(folder: Path) -> None:
    sources = folder / "torch-ext" / "attnstats"
    paths = {path.relative_to(sources).as_posix(): path for path in sources.rglob("*") if path.is_file()}
    assert {f"kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")} <= set(paths)
    assert not [path for path in paths if path.startswith(("transformers", "study", "report", "cli", "integrations"))]
    allowed = sys.stdlib_module_names | {"torch", "triton"}
    for path in paths.values():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= allowed, path
            elif isinstance(node, ast.ImportFrom) and not node.level:
                assert (node.module or "").split(".")[0] in allowed, path
    variant = folder / "build" / "torch-cuda"
    built = {path.relative_to(variant).as_posix() for path in variant.rglob("*") if path.is_file()}
    assert built == set(paths) | {"metadata.json", "attnstats/__init__.py"}


def test_public_names_are_those_that_are_imported(folder: Path) -> None:
    tree = ast.parse((folder / "torch-ext" / "attnstats" / "__init__.py").read_text())
    (names,) = (ast.literal_eval(node.value) for node in tree.body if isinstance(node, ast.Assign))
    imported = {a.name for node in tree.body if isinstance(node, ast.ImportFrom) for a in node.names} - {"*"}
    assert imported == set(names) - set(statistics.__all__)
    assert {"attention", "WAAD", "FAI"} <= set(names)


def test_another_content_has_another_name() -> None:
    sources = {PurePosixPath("__init__.py"): "one"}
    files = [hub.variant(sources | change, "cpu") for change in ({}, {PurePosixPath("a.py"): "two"})]
    first, second = (json.loads(x[PurePosixPath("metadata.json")])["id"] for x in files)
    assert first != second


def test_kernels_reads_its_settings_metadata_and_digests(folder: Path, tmp_path: Path) -> None:
    assert KERNELS.is_dir(), MISSING
    assert python("-c", CHECK, str(folder), str(KERNELS), cwd=tmp_path, PYTHONPATH=str(ROOT)) == "3\n"


def test_the_example_of_the_documentation_runs(folder: Path, tmp_path: Path) -> None:
    assert KERNELS.is_dir(), MISSING
    (code,) = re.findall(
        r"<!-- code: hub -->\n```python\n(.*?)```", (ROOT / "docs" / "release.md").read_text(), re.DOTALL
    )
    shutil.copytree(folder, tmp_path / "dist" / "hub" / "attnstats")
    paths = f"{KERNELS}{os.pathsep}{ROOT}"
    printed = python("-c", code + "print(stats['waad'].shape)", cwd=tmp_path, HF_HUB_OFFLINE="1", PYTHONPATH=paths)
    assert printed == "torch.Size([1, 8, 1024])\n"


def test_kernels_loads_it_and_its_numbers_are_ours(folder: Path, tmp_path: Path) -> None:
    assert KERNELS.is_dir(), MISSING
    variables = {"TRITON_INTERPRET": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    assert python("-c", COMPARE, str(folder), str(KERNELS), cwd=tmp_path, **variables) == "equal\n"
