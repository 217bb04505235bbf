"""Lets a CUDA build of torch be imported without NVIDIA's libraries, which are several times its size.

    python -m reliability.without_cuda SITE_PACKAGES

Writes into torch/lib a library for each one that torch is linked to and that is not there. Its functions return 100,
which says that there is no device, and those for the text of an error a text. So torch runs on the CPU as its CPU build
does; needs gcc, readelf and nm.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

NVIDIA = ("libcu", "libnccl", "libnv")
NO_DEVICE = "int {}(void) {{ return 100; }}\n"
TEXT = 'const char* {}(void) {{ return "no device"; }}\n'
# Libraries whose symbols carry no version, or another than the library's name: prefix of the symbols, or version.
UNVERSIONED = {"libnccl": "nccl", "libcusparseLt": "cusparseLt", "libcufile": "cuFile"}
VERSIONS = {"libnvshmem_host": "NVSHMEM"}


def main() -> None:
    folder = Path(sys.argv[1]) / "torch" / "lib"
    needed: set[str] = set()
    undefined: dict[str, set[str]] = defaultdict(set)  # by version, "" for none
    for library in folder.glob("lib*.so"):
        needed |= set(re.findall(r"NEEDED\).*\[(.*)\]", _output("readelf", "-d", str(library))))
        for symbol, version in re.findall(r" U ([^@\s]+)@*(\S*)$", _output("nm", "-D", str(library)), re.MULTILINE):
            undefined[version].add(symbol)
    for name in sorted(needed):
        if name.startswith(NVIDIA) and not (folder / name).exists():
            stem = name.split(".so")[0]
            version = VERSIONS.get(stem, name)
            symbols = undefined.get(version, set())
            if stem in UNVERSIONED:
                version, symbols = "", {x for x in undefined[""] if x.startswith(UNVERSIONED[stem])}
            _stand_in(folder / name, sorted(symbols), version)


def _stand_in(library: Path, symbols: list[str], version: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        source, script = Path(folder, "stand_in.c"), Path(folder, "versions")
        source.write_text("".join(map(_function, symbols)))
        script.write_text(f"{version} {{ global: *; }};")
        command = ["gcc", "-w", "-fno-builtin", "-shared", "-fPIC", str(source), "-o", str(library)]
        command += [f"-Wl,-soname,{library.name}", *([f"-Wl,--version-script={script}"] if version else [])]
        subprocess.run(command, check=True)


def _function(symbol: str) -> str:
    return (TEXT if re.search("(Error|Status)(String|Name)$", symbol) else NO_DEVICE).format(symbol)


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    main()
