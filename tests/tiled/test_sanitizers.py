"""The compiled sums under AddressSanitizer and UndefinedBehaviorSanitizer, compiled anew and run in another process.

A thread's buffers are cut from one allocation. Here each is followed by a gap that may not be touched.
"""

import os
import re
import shutil
import subprocess
import sys

import pytest

from tests.process import ROOT

FLAGS = "-std=c++17 -O1 -g -fopenmp -ffp-contract=fast -fvisibility=hidden -Wno-psabi -fno-omit-frame-pointer"
SANITIZED = "-fsanitize=address,undefined -fno-sanitize-recover=all -fPIC -shared"
CASES = "tests/tiled/test_native.py"
PROGRAM = """
import pathlib, sys
import pytest
from attnstats.core import library
from attnstats.tiled import native
library.path = lambda: pathlib.Path(sys.argv[1])
assert native._library() is not None
sys.exit(pytest.main(["-q", "-x", "-s", "-p", "no:cacheprovider", "-p", "no:xdist", *sys.argv[2:]]))
"""
OVERFLOW = "heap-buffer-overflow"
GAP = """
#include <sanitizer/asan_interface.h>
#include <cstdint>
static float* behind(float* at, int64_t count) {
    ASAN_POISON_MEMORY_REGION(at + count, 64);
    return at + count + 16;
}
"""
# A fault of each kind that has to be found: where, what is written, what it becomes, and what the sanitizer says.
FAULTS = {
    "behind a result": ("native.cpp", "to[i * numbers + n] =", "to[i * numbers + n + 1] =", OVERFLOW),
    "an absent row": ("tile.h", "i < task.rows; ++i) {", "i <= task.rows; ++i) {", OVERFLOW),
    "behind a buffer": ("tile.h", "j < KEYS; ++j) {", "j <= KEYS; ++j) {", "use-after-poison"),
    "undefined": (
        "native.cpp",
        "= omp_get_thread_num();\n#endif\n        const Room",
        "= call.rows << 63;\n#endif\n        const Room",
        "runtime error: ",
    ),
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ and its libasan"),
]


def run(folder, *arguments, fault=None):
    """Tests with sums that are compiled from a copy of csrc/, in which a fault can be put."""
    source = folder / "csrc"
    shutil.copytree(ROOT / "csrc", source)
    if fault is not None:
        file, before, after = fault
        text = (source / file).read_text()
        assert text.count(before) == 1
        (source / file).write_text(text.replace(before, after))
    native = (source / "native.cpp").read_text()
    native, buffers = re.subn(r"at \+= (sizes\.\w+)", r"at = behind(at, \1)", native)
    native, totals = re.subn(r"(int64_t total\(\) const \{ return )", rf"\1 {16 * buffers} + ", native)
    assert buffers >= 6
    assert totals == 1
    (source / "native.cpp").write_text(GAP + native)
    library = folder / "_native.so"
    command = ["g++", *FLAGS.split(), *SANITIZED.split(), str(source / "native.cpp"), "-o", str(library)]
    subprocess.run(command, check=True, capture_output=True)
    found = subprocess.run(["g++", "-print-file-name=libasan.so"], check=True, capture_output=True, text=True)
    environment = os.environ | {
        "LD_PRELOAD": found.stdout.strip(),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:exitcode=99",
        "UBSAN_OPTIONS": "print_stacktrace=1:exitcode=99",
        "PYTHONPATH": str(ROOT),
        "TRITON_INTERPRET": "1",
    }
    command = [sys.executable, "-c", PROGRAM, str(library), *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False)


def test_no_access_outside_and_nothing_undefined(tmp_path):
    chosen = "instruction_sets or many_chunks or bands_of_any_reach or nan_and_inf or mask or query or as_alone"
    done = run(tmp_path, CASES, "tests/tiled/test_steps.py", "tests/core/test_patterns.py", "-k", chosen)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found(name, tmp_path):
    *fault, message = FAULTS[name]
    done = run(tmp_path, CASES, "-k", "instruction_sets", fault=fault)
    assert done.returncode not in (0, 1), done.stdout[-3000:]  # 1: a test failed, and no sanitizer spoke
    assert message in done.stderr, done.stderr[-3000:]
