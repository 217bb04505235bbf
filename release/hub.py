"""The kernels and their launchers as a folder for Hugging Face's Kernels hub: `python -m release.hub FOLDER`.

The hub loads a kernel from any folder, in several versions at once, under a name of its own. So every import inside it
must be relative, and its operators are registered under that name. Nothing of it is kept in the repository: it is
`attnstats.functional` with all that it imports, in which `from attnstats.x import y` becomes `from ..x import y`.

    build.toml, flake.nix, CARD.md, torch-ext/attnstats/    what kernel-builder builds from
    build/torch-cpu/ torch-cuda/ torch-rocm/                what it would build: the same sources, with metadata.json
"""

from __future__ import annotations

import argparse
import ast
import base64
import hashlib
import json
import re
import shutil
from pathlib import Path, PurePosixPath

from attnstats import __version__, statistics

PACKAGE = Path(__file__).parent.parent / "attnstats"
NAME = PACKAGE.name
ENTRY = PurePosixPath("functional.py")
BACKENDS = ("cpu", "cuda", "rocm")  # on a CPU: PyTorch, and the kernels in Triton's interpreter
VERSION = int(__version__.split(".", maxsplit=1)[0])  # of the hub's API; 0 is one that still changes
PUBLIC = (
    *("AttentionResult", "Explanation", "Statistics", "attention", "explain", "statistics_from_lse"),
    *("varlen_attention", *statistics.__all__),
)
IMPORT = re.compile(rf"from {NAME}\b\.?")

INIT = '''"""Statistics of attention inside or beside a flash-style pass, without ever holding the T x T map."""

from .functional import attention, explain, statistics_from_lse, varlen_attention
from .results import AttentionResult, Explanation, Statistics
from .statistics import *

__all__ = {public}
'''

# Older versions of the package `kernels` look for the kernel one folder below its files.
BELOW = '''"""The kernel of the folder above, for older versions of `kernels`."""

import importlib.util
import sys
from pathlib import Path

name = "{identifier}"
if name not in sys.modules:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent.parent / "__init__.py")
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
__all__ = sys.modules[name].__all__
globals().update({{public: getattr(sys.modules[name], public) for public in __all__}})
'''

BUILD = """[general]
name = "{name}"
version = {version}
edition = 5
license = "Apache-2.0"
backends = {backends}

[torch-noarch]
"""

FLAKE = """{
  inputs.kernel-builder.url = "github:huggingface/kernels";
  outputs =
    { self, kernel-builder, ... }:
    kernel-builder.lib.genKernelFlakeOutputs {
      inherit self;
      path = ./.;
    };
}
"""

CARD = """---
library_name: kernels
license: apache-2.0
---

# {name}

Statistics of attention (WAAD, FAI, entropy, received attention, ...) in Triton, inside or beside a FlashAttention-style
pass: exact, in O(T) memory. These are the kernels of attnstats {package_version} with what launches them; the package
itself captures models, draws reports and serves trainers.

```python
import torch
from kernels import get_local_kernel

attnstats = get_local_kernel("path/to/this/folder")
query, key, value = torch.randn(3, 1, 8, 1024, 64, device="cuda", dtype=torch.bfloat16)
output, stats = attnstats.attention(query, key, value, statistics=[attnstats.WAAD(10), attnstats.FAI(10, 100)])
stats["waad"].shape  # (1, 8, 1024)
```

Functions: `attention`, `varlen_attention`, `statistics_from_lse`, `explain`. Statistics: {statistics}.
"""


def sources() -> dict[PurePosixPath, str]:
    """The modules that the entry needs, by their paths below the package, with relative imports."""
    modules: dict[PurePosixPath, str] = {}
    found = [ENTRY]
    while found:
        path = found.pop()
        if path not in modules:
            text = (PACKAGE / path).read_text(encoding="utf-8")
            modules[path] = relative(text, path)
            found += imported(text, path)
    modules[PurePosixPath("__init__.py")] = INIT.format(public=json.dumps(sorted(PUBLIC), indent=4))
    return modules


def relative(text: str, path: PurePosixPath) -> str:
    """The text of a module in which the imports of the package are relative.

    Args:
        text: of the module.
        path: below the package, for example triton/plan.py.

    Raises:
        ValueError: an import that has no relative form.

    Example:
        >>> print(relative("from attnstats.core.lse import check_lse  # why", PurePosixPath("triton/plan.py")))
        from ..core.lse import check_lse  # why
    """
    lines = text.splitlines(keepends=True)
    for node in _imports(text):
        line = lines[node.lineno - 1]
        if isinstance(node, ast.Import):
            raise ValueError(f"{NAME}/{path}: {line.strip()!r} has no relative form; write `from {NAME} import ...`")
        if not node.level:
            start = node.col_offset
            lines[node.lineno - 1] = line[:start] + IMPORT.sub(f"from {'.' * len(path.parts)}", line[start:], count=1)
    return "".join(lines)


def imported(text: str, path: PurePosixPath) -> set[PurePosixPath]:
    """The modules that a module of the package imports anywhere in its text, and the packages around them.

    Raises:
        ValueError: a name of the package itself, whose `__init__.py` imports far more than the kernels need.
    """
    found = set()
    for node in _imports(text):
        if isinstance(node, ast.ImportFrom):
            above = path.parents[node.level - 1].parts if node.level else ()
            base = PurePosixPath(*above, *(node.module or "").split(".")[0 if node.level else 1 :])
            for name in (alias.name for alias in node.names):
                module = _file(base / name) or _file(base)
                if module is None:
                    raise ValueError(f"{NAME}/{path} imports {name} of {NAME}, which is no module of it")
                packages = (_file(folder) for folder in module.parents)
                found |= {module, *filter(None, packages)}
    return found


def _imports(text: str) -> list[ast.Import | ast.ImportFrom]:
    """The imports of the package, absolute and relative ones."""
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import | ast.ImportFrom)]
    return [node for node in nodes if getattr(node, "level", 0) or NAME in _roots(node)]


def _roots(node: ast.Import | ast.ImportFrom) -> set[str]:
    """The packages that an absolute import names."""
    names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
    return {name.split(".")[0] for name in names}


def _file(module: PurePosixPath) -> PurePosixPath | None:
    """The file of a module or package below ours; None if there is none, and for the package itself."""
    candidates = (module.with_suffix(".py"), module / "__init__.py") if module.parts else ()
    return next((path for path in candidates if (PACKAGE / path).is_file()), None)


def write(folder: Path) -> None:
    """Write the kernel into a folder, which is emptied first."""
    shutil.rmtree(folder, ignore_errors=True)
    modules = sources()
    _write(folder / "torch-ext" / NAME, modules)
    for backend in BACKENDS:
        _write(folder / "build" / f"torch-{backend}", variant(modules, backend))
    settings = {"name": NAME, "version": VERSION, "package_version": __version__}
    backends, names = json.dumps(BACKENDS), ", ".join(f"`{name}`" for name in statistics.__all__)
    (folder / "build.toml").write_text(BUILD.format(backends=backends, **settings))
    (folder / "flake.nix").write_text(FLAKE)
    (folder / "CARD.md").write_text(CARD.format(statistics=names, **settings))


def variant(modules: dict[PurePosixPath, str], backend: str) -> dict[PurePosixPath, str]:
    """The files of a build for cpu, cuda or rocm."""
    content = hashlib.sha256(json.dumps({str(path): modules[path] for path in sorted(modules)}).encode()).hexdigest()
    identifier = f"_{NAME}_{backend}_{content[:8]}"
    files = modules | {PurePosixPath(NAME, "__init__.py"): BELOW.format(identifier=identifier)}
    digests = {str(path): hashlib.sha256(files[path].encode()).digest() for path in sorted(files)}
    metadata = {
        "id": identifier,
        "name": NAME,
        "version": VERSION,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {
            "algorithm": "sha256",
            "files": {path: base64.b64encode(digest).decode() for path, digest in digests.items()},
        },
    }
    return files | {PurePosixPath("metadata.json"): json.dumps(metadata, indent=2) + "\n"}


def _write(folder: Path, files: dict[PurePosixPath, str]) -> None:
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(text.encode())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    write(parser.parse_args().folder)
