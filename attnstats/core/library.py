"""The library that setup.py compiles from csrc/, where it finds a compiler, and the comparison of masks in it.

It is optional, and has a plain C interface, so one build serves every Python and torch. It shares torch's threads,
because it asks for libgomp by the name under which torch has loaded its own (a torch that calls it otherwise gets a
second pool beside it). `enabled = False`, or ATTNSTATS_NATIVE=0 in the environment, leaves all to plain PyTorch.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
import os
from ctypes import POINTER, Structure, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

VERSION = 5  # of the interface; a library of another version is not used
FOLDER = Path(__file__).parent.parent / "tiled"  # nowhere else, as another installation's may differ from this one's
UNBOUNDED = 2**40  # larger than any distance
ALONE = 2**18  # bytes that one thread compares in less time than others take to start

enabled = os.environ.get("ATTNSTATS_NATIVE", "1") != "0"


class _Mask(Structure):
    _fields_ = (
        ("data", c_void_p),
        ("matrices", c_void_p),
        ("count", c_int64),
        ("heads", c_int64),
        ("rows", c_int64),
        ("stride", c_int64),
        ("width", c_int64),
        ("element", c_int64),
        ("first", c_int64),
        ("end", c_int64),
        ("lines", c_void_p),
        ("concealed", c_void_p),
        ("threads", c_int64),
    )


def path() -> Path | None:
    beside = (FOLDER / ("_native" + suffix) for suffix in importlib.machinery.EXTENSION_SUFFIXES)
    return next((path for path in beside if path.exists()), None)


@functools.cache
def load() -> ctypes.CDLL | None:
    """None if there is no library, as setup.py found no compiler, or if it does not load or is of another version."""
    where = path()
    if where is None:
        return None
    try:
        library = ctypes.CDLL(str(where))
        library.attnstats_version.restype = c_int64
        library.attnstats_first_difference.restype = c_int64
        library.attnstats_first_difference.argtypes = (POINTER(_Mask),)
    except (OSError, AttributeError):
        return None
    return library if library.attnstats_version() == VERSION else None


def first_difference(mask: Tensor, lines: Tensor, concealed: Tensor, first: int | None, end: int | None) -> int:
    """The first row whose bytes aren't those expected; the number of rows if there is none, 0 if none was compared.

    Args:
        mask: (..., H, Tq, Tk) on the CPU.
        lines: (..., Tk) what row i has at the keys first + i .. end + i - 1; None: from the first key, to the last.
        concealed: (Tk,) what it has at the others.
    """
    library = load() if enabled else None
    if library is None or mask.device.type != "cpu" or mask.stride(-1) != 1:
        return 0
    size, rows = mask.element_size(), mask.shape[-2]
    matrices = torch.zeros((), dtype=torch.int64, device="cpu")
    for count, stride in zip(mask.shape[:-2], mask.stride(), strict=False):
        matrices = matrices[..., None] + torch.arange(count, dtype=torch.int64, device="cpu") * (stride * size)
    matrices, lines, concealed = matrices.flatten(), lines.contiguous(), concealed.contiguous()
    call = _Mask(
        data=mask.data_ptr(),
        matrices=matrices.data_ptr(),
        count=len(matrices),
        heads=mask.shape[-3],
        rows=rows,
        stride=mask.stride(-2) * size,
        width=mask.shape[-1] * size,
        element=size,
        first=-UNBOUNDED if first is None else first * size,
        end=UNBOUNDED if end is None else end * size,
        lines=lines.data_ptr(),
        concealed=concealed.data_ptr(),
        threads=torch.get_num_threads() if mask.numel() * size > ALONE else 1,
    )
    found: int = library.attnstats_first_difference(ctypes.byref(call))
    return found
