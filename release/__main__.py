"""Build what is published into dist/, and check it: `make release`.

    attnstats-*.tar.gz                   the sdist
    attnstats-*-abi3-manylinux*.whl      with the compiled sums
    attnstats-*-py3-none-any.whl         without, for all other systems
    hub/attnstats/                       the kernels for Hugging Face's hub (hub.py)

The wheels are built from the sdist. What each file holds is compared with what git tracks, and each is installed into a
fresh environment and called there, without transformers, without Triton and without a compiler in reach.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sysconfig
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from venv import EnvBuilder

from release import hub

ROOT = Path(__file__).parent.parent
REQUIREMENTS = Path(__file__).with_name("requirements.txt")
DIST, WORK = ROOT / "dist", ROOT / "out" / "release"
LIBRARY = "attnstats/tiled/_native.abi3.so"
Variables = Mapping[str, str]
NONE: Variables = MappingProxyType({})
OF_SDIST = ("CHANGELOG.md", "CITATION.cff", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py")
GENERATED = ("PKG-INFO", "setup.cfg", "attnstats.egg-info/")
OF_WHEEL = ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE", "top_level.txt")

CALL = """
import importlib.util, os, sys
import torch, attnstats
from attnstats.core import library

compiled, triton = (word == "True" for word in sys.argv[1:3])
assert attnstats.__file__.startswith(sys.prefix), attnstats.__file__
assert (library.load() is not None) == compiled, library.path()
assert (importlib.util.find_spec("triton") is not None) == triton
assert importlib.util.find_spec("transformers") is None
torch.manual_seed(0)
query, key, value = torch.randn(1, 4, 70, 16), torch.randn(1, 2, 70, 16), torch.randn(1, 2, 70, 16)
options = {"statistics": ["waad", "fai", "entropy", "received"], "enable_gqa": True}
exact = attnstats.attention(query.double(), key.double(), value.double(), backend="reference", **options)
for backend in ("auto", "tiled", *(["triton"] if triton else [])):
    output, stats = attnstats.attention(query, key, value, backend=backend, **options)
    torch.testing.assert_close(output.double(), exact.output, atol=1e-5, rtol=1e-5)
    for name in options["statistics"]:
        torch.testing.assert_close(stats[name].double(), exact.statistics[name], atol=1e-4, rtol=1e-5)
"""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m release", description=__doc__.splitlines()[0])
    parser.add_argument("--torch", default="torch", help="what pip is asked for")
    torch = shlex.split(parser.parse_args().torch)
    for folder in (DIST, WORK):
        shutil.rmtree(folder, ignore_errors=True)
    say(1, "installing the tools, in an environment of their own")
    tools = environment("tools")
    pip(tools, "install", "--requirement", REQUIREMENTS)
    run(tools / "cffconvert", "--validate", "--infile", ROOT / "CITATION.cff", cwd=WORK, quiet=True)
    say(2, "building the sdist, and wheels from it")
    built = build(tools)
    run(tools / "twine", "check", "--strict", *built, quiet=True)
    say(3, "looking at what they hold")
    for path in built:
        check_contents(path, expected(path, tracked()))
    say(4, "installing each, and calling it")
    install(*built, torch)
    say(5, "writing the kernels for the hub")
    hub.write(DIST / "hub" / hub.NAME)
    shutil.rmtree(WORK)
    changed = git("status", "--porcelain").strip()
    for path in (*built, DIST / "hub" / hub.NAME):
        print(path.relative_to(ROOT))
    if changed:
        print(f"not a release: the tree has changes that are not committed:\n{changed}")


def build(tools: Path) -> tuple[Path, Path, Path]:
    """The sdist, the wheel with the compiled sums and the wheel without them."""
    command = (tools / "python", "-m", "build", "--outdir")
    run(*command, DIST, "--sdist", ROOT, quiet=True)
    (sdist,) = DIST.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(WORK, filter="data")
    unpacked = WORK / sdist.name.removesuffix(".tar.gz")
    run(*command, WORK / "wheel", "--wheel", unpacked, quiet=True)
    (wheel,) = (WORK / "wheel").iterdir()
    # torch brings libgomp. A second one beside it would be a second pool of threads.
    repair = (tools / "auditwheel", "repair", "--exclude", "libgomp.so.1", "--wheel-dir", DIST, wheel)
    run(*repair, quiet=True, variables={"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"})
    (compiled,) = DIST.glob("*.whl")
    shutil.rmtree(unpacked / "build")  # or the library would be found there
    run(*command, DIST, "--wheel", unpacked, quiet=True, variables={"ATTNSTATS_PURE": "1"})
    (pure,) = set(DIST.glob("*.whl")) - {compiled}
    return sdist, compiled, pure


def tracked() -> set[str]:
    """The files of the package and of csrc/, as a wheel or an sdist has them."""
    files = git("ls-files", "attnstats", "csrc", "kernels").split()
    return {f"attnstats/{file}" if file.startswith("kernels/") else file for file in files} - {"attnstats/kernels"}


def expected(path: Path, files: set[str]) -> set[str]:
    """What the sdist or the wheel at a path has to hold, generated files left out."""
    if path.suffix != ".whl":
        return files | set(OF_SDIST)
    library = set() if path.name.endswith("-none-any.whl") else {LIBRARY}
    name = "-".join(path.name.split("-")[:2])
    return {x for x in files if not x.startswith("csrc/")} | library | {f"{name}.dist-info/{x}" for x in OF_WHEEL}


def check_contents(path: Path, files: set[str]) -> None:
    """Raise SystemExit if an sdist or a wheel holds other files than these."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as archive:
            held = {name for name in archive.namelist() if not name.endswith("/")}
    else:
        with tarfile.open(path) as archive:
            names = (member.name.partition("/")[2] for member in archive if not member.isdir())
            held = {name for name in names if not name.startswith(GENERATED)}
    if held != files:
        raise SystemExit(f"{path.name}: lacks {sorted(files - held)}, and has {sorted(held - files)}")


def install(sdist: Path, compiled: Path, pure: Path, torch: list[str]) -> None:
    """Install each file as a user would, and call it. Raises SystemExit if one doesn't work."""
    first = environment("compiled")
    pip(first, "install", *torch)
    pip(first, "install", compiled)
    call(first, compiled=True, triton=True)
    run(first / "attnstats", "--version", quiet=True)
    pip(first, "uninstall", "--yes", "triton")
    call(first, compiled=True, triton=False)
    pip(first, "uninstall", "--yes", "attnstats")
    for name, file in (("pure", pure), ("no_compiler", sdist)):
        other = environment(name)
        (packages(name) / "torch.pth").write_text(f"{packages('compiled')}\n")  # not again: it is large
        pip(other, "install", "--no-deps", file, variables={"CC": "/nonexistent", "CXX": "/nonexistent"})
        call(other, compiled=False, triton=False)


def call(programs: Path, compiled: bool, triton: bool) -> None:
    """Import attnstats in an environment and call it, with no compiler in reach."""
    variables = {"PATH": "", "TRITON_INTERPRET": "1", "PYTHONPATH": ""}
    run(programs / "python", "-c", CALL, compiled, triton, cwd=WORK, variables=variables)


def environment(name: str) -> Path:
    """The folder of the programs of a new environment."""
    EnvBuilder(with_pip=True).create(WORK / name)
    return WORK / name / "bin"


def packages(name: str) -> Path:
    """Where the packages of an environment are."""
    return Path(sysconfig.get_path("purelib", vars={"base": str(WORK / name)}))


def pip(programs: Path, *arguments: str | Path, variables: Variables = NONE) -> None:
    run(programs / "python", "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments, variables=variables)


def run(*command: object, cwd: Path = ROOT, quiet: bool = False, variables: Variables = NONE) -> None:
    """Run a command; quiet: print what it says only if it fails. Raises SystemExit if it does."""
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=cwd, env={**os.environ, **variables}, capture_output=quiet, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{done.stdout or ''}{done.stderr or ''}failed: {shlex.join(words)[:500]}")


def git(*arguments: str) -> str:
    """What git prints."""
    return subprocess.run(("git", *arguments), cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout


def say(step: int, what: str) -> None:
    print(f"[{step}/5] {what}", flush=True)


if __name__ == "__main__":
    main()
