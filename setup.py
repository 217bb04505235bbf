"""What goes into the wheel, and what is compiled; everything else about the distribution is declared in pyproject.toml.

The packages are listed, not searched for: `attnstats.kernels` is the folder kernels/ seen through the symlink
attnstats/kernels. It has no `__init__.py`, because a package `kernels` at the root would hide Hugging Face's
package of that name, which transformers imports. tests/test_packaging.py fails when a module is missing here.

`attnstats.tiled._native` is a library with a plain C interface that attnstats/core/library.py loads with ctypes;
it uses nothing of Python, so one build serves every version. It is optional: without a compiler the install is pure
Python, and slower. With ATTNSTATS_PURE=1 the wheel is for any system, and has none.
The code picks its instruction set when it runs, so no flag here may name the machine that builds.
"""

import os

from setuptools import Extension, setup

PARTS = ("integrations.sglang", "integrations.verl", "integrations.vllm", "triton.launch")
FOLDERS = ("cli", "core", "flash", "integrations", "kernels", "report", "study", "tiled", "transformers", "triton")
PURE = os.environ.get("ATTNSTATS_PURE") == "1"
FLAGS = ["-std=c++17", "-O3", "-g0", "-fopenmp", "-ffp-contract=fast", "-fvisibility=hidden", "-Wno-psabi"]

setup(
    packages=["attnstats", *(f"attnstats.{folder}" for folder in FOLDERS + PARTS)],
    package_data={"attnstats": ["py.typed"], "attnstats.report": ["*.jinja", "*.css", "*.js"]},
    ext_modules=[]
    if PURE
    else [
        Extension(
            "attnstats.tiled._native",
            sources=["csrc/native.cpp"],
            depends=["csrc/call.h", "csrc/mask.h", "csrc/step.h", "csrc/tile.h"],
            extra_compile_args=FLAGS,
            extra_link_args=["-fopenmp"],
            py_limited_api=True,
            optional=True,
        )
    ],
    options={} if PURE else {"bdist_wheel": {"py_limited_api": "cp310"}},
)
