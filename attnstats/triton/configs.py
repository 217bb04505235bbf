"""Tile sizes and launch options of every kernel: a table by architecture, kernel, dtype and head size.

A table instead of autotuning: nothing is measured at a user's first call, and the same call always gives the same bits.
They compile with no spills, or few (`python -m benchmarks.compile_report` says which, and why). To find better entries
run `python -m benchmarks.gpu sweep` on a GPU, which prints rows in this form, then
`python -m benchmarks.compile_report --update`.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from typing import Literal, NamedTuple, TypeVar

import torch

T = TypeVar("T")
Backward = Literal["backward_queries", "backward_keys", "weighted_queries", "weighted_keys"]
Kernel = Literal["forward", "forward_loop", "decode", "column", "pooled", "band", "top"] | Backward


class Config(NamedTuple):
    """Tile sizes (BM queries, BN keys) and launch options of one kernel."""

    BM: int
    BN: int
    num_warps: int = 4
    num_stages: int = 2


TileTable = dict[Kernel, dict[int, Config]]

# An entry is for head sizes up to its key, a power of two. "forward_loop" is forward with statistics in its main loop;
# it has forward's tiles, because with others a statistic could change the output's last bit. "decode" is for a few
# queries and many keys; its BM, and band's, count the packed rows of a group's heads. "weighted" are the backward
# kernels that do more per score than for plain attention: gradients of statistics, a softcap, dropout.
HALF: TileTable = {
    "forward": {128: Config(128, 128, 8, 2), 256: Config(128, 64, 8, 2)},
    "forward_loop": {128: Config(128, 128, 8, 2), 256: Config(128, 64, 8, 2)},
    "decode": {128: Config(16, 64, 4, 2), 256: Config(16, 32, 4, 2)},
    "column": {128: Config(64, 128, 4, 3), 256: Config(64, 128, 8, 2)},
    "pooled": {128: Config(64, 64, 4, 3), 256: Config(64, 64, 8, 2)},
    "band": {128: Config(128, 64, 4, 1), 256: Config(256, 64, 8, 2)},
    "top": {128: Config(64, 64, 4, 2), 256: Config(64, 32, 4, 2)},
    "backward_queries": {128: Config(128, 64, 8, 2), 256: Config(128, 32, 8, 2)},
    "backward_keys": {64: Config(64, 128, 8, 2), 128: Config(32, 128, 8, 2), 256: Config(32, 128, 8, 2)},
    "weighted_queries": {128: Config(128, 32, 8, 2), 256: Config(64, 16, 4, 2)},
    "weighted_keys": {64: Config(32, 128, 8, 2), 256: Config(16, 128, 8, 1)},
}
# Tiles of float32 are twice as large, and IEEE matmuls run without tensor cores.
FLOAT32: TileTable = {
    "forward": {64: Config(32, 32, 8, 1), 128: Config(32, 16, 8, 2), 256: Config(16, 16, 8, 2)},
    "forward_loop": {64: Config(32, 32, 8, 1), 128: Config(32, 16, 8, 2), 256: Config(16, 16, 8, 2)},
    "decode": {256: Config(16, 16, 4, 1)},
    "column": {64: Config(32, 32, 8, 2), 128: Config(16, 32, 8, 1), 256: Config(16, 16, 8, 1)},
    "pooled": {64: Config(32, 32, 8, 2), 128: Config(16, 32, 8, 1), 256: Config(16, 16, 8, 1)},
    "band": {64: Config(32, 16, 8, 2), 128: Config(16, 16, 8, 1), 256: Config(16, 16, 8, 1)},
    "top": {64: Config(16, 32, 8, 1), 128: Config(16, 32, 8, 1), 256: Config(16, 16, 8, 1)},
    "backward_queries": {64: Config(32, 32, 8, 1), 256: Config(16, 16, 8, 1)},
    "backward_keys": {64: Config(32, 32, 8, 1), 128: Config(16, 32, 8, 1), 256: Config(16, 16, 8, 1)},
    "weighted_queries": {64: Config(32, 16, 8, 1), 256: Config(16, 16, 8, 1)},
    "weighted_keys": {64: Config(16, 32, 8, 1), 256: Config(16, 16, 8, 1)},
}
# Entries of an architecture that differ from HALF.
_SM_80: TileTable = {
    "forward": {64: Config(128, 64, 8, 3), 128: Config(128, 64, 8, 2), 256: Config(32, 32, 4, 2)},
    "forward_loop": {64: Config(128, 64, 8, 3), 128: Config(128, 64, 8, 2), 256: Config(32, 32, 4, 2)},
    "column": {64: Config(64, 128, 4, 3), 128: Config(64, 128, 4, 2), 256: Config(64, 64, 8, 2)},
    "top": {128: Config(64, 64, 4, 2), 256: Config(64, 32, 8, 1)},
    "band": {128: Config(256, 64, 8, 2), 256: Config(128, 64, 8, 2)},
    "backward_queries": {64: Config(128, 64, 8, 2), 128: Config(64, 64, 8, 2), 256: Config(32, 32, 4, 2)},
    "backward_keys": {64: Config(32, 128, 8, 2), 128: Config(16, 128, 8, 2), 256: Config(64, 64, 8, 1)},
    "weighted_queries": {128: Config(128, 32, 8, 2), 256: Config(32, 32, 4, 1)},
    "weighted_keys": {64: Config(16, 128, 8, 2), 128: Config(32, 64, 8, 2), 256: Config(64, 64, 8, 1)},
}
_SM_86: TileTable = _SM_80 | {  # 99 KB of shared memory, not 163
    "band": {128: Config(256, 64, 8, 2), 256: Config(128, 64, 8, 1)},
    "backward_keys": {64: Config(32, 128, 8, 2), 128: Config(16, 128, 8, 2), 256: Config(32, 64, 8, 1)},
    "weighted_queries": {64: Config(128, 32, 8, 1), 128: Config(64, 64, 8, 2), 256: Config(32, 32, 4, 1)},
    "weighted_keys": {64: Config(16, 128, 8, 2), 128: Config(32, 64, 8, 2), 256: Config(32, 64, 8, 1)},
}
_SM_120: TileTable = _SM_86 | {
    "forward": {64: Config(128, 64, 8, 3), 128: Config(128, 32, 8, 2), 256: Config(32, 32, 4, 2)},
    "forward_loop": {64: Config(128, 64, 8, 3), 128: Config(128, 32, 8, 2), 256: Config(32, 32, 4, 2)},
    "backward_keys": {64: Config(32, 128, 8, 2), 128: Config(16, 128, 8, 1), 256: Config(32, 64, 8, 1)},
}
_SM_100: TileTable = {
    "forward": {64: Config(128, 64, 8, 2), 128: Config(128, 32, 8, 2), 256: Config(64, 64, 8, 2)},
    "forward_loop": {64: Config(128, 64, 8, 2), 128: Config(128, 32, 8, 2), 256: Config(64, 64, 8, 2)},
    "column": {64: Config(128, 64, 8, 3), 128: Config(64, 128, 8, 3), 256: Config(64, 64, 4, 2)},
    "band": {256: Config(128, 64, 8, 2)},
    "backward_keys": {64: Config(64, 128, 8, 1), 128: Config(64, 64, 4, 1), 256: Config(64, 64, 8, 1)},
    "weighted_queries": {128: Config(128, 32, 8, 2), 256: Config(64, 32, 8, 2)},
    "weighted_keys": {64: Config(32, 64, 8, 2), 128: Config(32, 32, 4, 2), 256: Config(32, 32, 4, 1)},
}
_GFX942: TileTable = {  # 64 KB of shared memory, and waves of 64 threads
    "forward": {128: Config(128, 64, 4, 1), 256: Config(64, 32, 4, 1)},
    "forward_loop": {128: Config(128, 64, 4, 1), 256: Config(64, 32, 4, 1)},
    "decode": {256: Config(16, 32, 4, 1)},
    "column": {128: Config(64, 128, 4, 1), 256: Config(64, 128, 8, 1)},
    "pooled": {128: Config(64, 64, 4, 1), 256: Config(64, 64, 8, 1)},
    "band": {256: Config(128, 64, 4, 1)},
    "top": {256: Config(64, 32, 4, 1)},
    "backward_queries": {64: Config(128, 64, 8, 1), 128: Config(128, 32, 8, 1), 256: Config(64, 16, 8, 1)},
    "backward_keys": {64: Config(32, 128, 8, 1), 128: Config(16, 128, 8, 1), 256: Config(16, 64, 4, 1)},
    "weighted_queries": {64: Config(128, 16, 8, 1), 128: Config(64, 32, 4, 1), 256: Config(64, 16, 8, 1)},
    "weighted_keys": {64: Config(16, 64, 4, 1), 128: Config(16, 128, 8, 1), 256: Config(16, 64, 4, 1)},
}
BY_ARCHITECTURE: dict[str, TileTable] = {
    "sm_80": _SM_80,
    **dict.fromkeys(("sm_86", "sm_89"), _SM_86),
    **dict.fromkeys(("sm_120", "sm_121"), _SM_120),
    **dict.fromkeys(("sm_100", "sm_103"), _SM_100),
    **dict.fromkeys(("gfx90a", "gfx942", "gfx950"), _GFX942),
}

# Architectures whose kernels load by tensor descriptors (kernels/tiles.py, `streamed`). Others read operands from
# registers, for which what threads copied is no matter.
DESCRIBING = ("sm_90", "sm_100", "sm_103")

INTERPRETED = Config(32, 16)  # small, so that short sequences span several tiles
SPLIT_KEYS = 1024  # keys per split when decoding: fixed, so that the bits don't depend on the batch
INTERPRETED_SPLIT_KEYS = 32
MAX_DECODED = 16  # queries; more fill a tile of the plain forward
MAX_PACKED_HEADS = 8  # more would leave too few positions per tile, and a slot for each

_forced: dict[Kernel, Config] = {}
_target: list[str] = []
_describing: list[bool] = []
_version = [0]


@functools.cache
def interpreted() -> bool:
    """True if Triton's interpreter runs the kernels. Triton reads the variable when it is first imported."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def table_version() -> int:
    """A number that changes with what `configured`, `targeting` and `describing` say."""
    return _version[0]


@contextlib.contextmanager
def configured(kernel: Kernel, config: Config) -> Iterator[None]:
    """Launch `kernel` with `config`, whatever the table says."""
    before = dict(_forced)
    _forced[kernel] = config
    _version[0] += 1
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)
        _version[0] += 1


def targeting(architecture: str) -> contextlib.AbstractContextManager[None]:
    """Use the table's entries for `architecture`, for example "sm_90" or "gfx942", whatever the device is."""
    return _said(_target, architecture)


def describing(by_descriptors: bool) -> contextlib.AbstractContextManager[None]:
    """Load by tensor descriptors where strides are aligned, or by pointers alone, whatever the device is."""
    return _said(_describing, by_descriptors)


@contextlib.contextmanager
def _said(stack: list[T], value: T) -> Iterator[None]:
    """Inside the `with` the value is the last of the stack, which decides."""
    stack.append(value)
    _version[0] += 1
    try:
        yield
    finally:
        stack.pop()
        _version[0] += 1


def describes(device: torch.device, dtype: torch.dtype) -> bool:
    """True if kernels load by tensor descriptors on the device. The environment variable ATTNSTATS_DESCRIPTORS=0 says
    no. Not in the interpreter, and not in float32, whose matmuls read registers, unless `describing`."""
    if _describing:
        return _describing[-1]
    if dtype == torch.float32 or interpreted() or os.environ.get("ATTNSTATS_DESCRIPTORS") == "0":
        return False
    return architecture(device) in DESCRIBING


def candidates(kernel: Kernel, device: torch.device, dtype: torch.dtype, block_dim: int) -> Iterator[Config]:
    """The table's entry, then smaller ones for a device that has too little shared memory for it."""
    if kernel in _forced:
        yield _forced[kernel]
        return
    if interpreted():
        yield INTERPRETED
        return
    table = FLOAT32
    if dtype != torch.float32:
        table = HALF | BY_ARCHITECTURE.get(architecture(device), {})
    rows = table[kernel]
    config = next(config for widest, config in rows.items() if block_dim <= widest)
    yield config
    for stages in range(config.num_stages - 1, 0, -1):
        yield config._replace(num_stages=stages)
    while config.BN > 16:
        config = config._replace(BN=config.BN // 2, num_stages=1)
        yield config


def band_width(config: Config, dtype: torch.dtype) -> int:
    """Keys per step of the forward's epilogue: with 64 the tile is one that Hopper's and Blackwell's matmuls have.

    In float32 more keys than the main loop has would spill.
    """
    return config.BN if interpreted() or dtype == torch.float32 else 64


def keys_apart(dtype: torch.dtype, block_dim: int) -> bool:
    """True if dK and dV take a launch of `backward_keys` each.

    At head size 256 the accumulators of both leave no registers for a tile that tensor cores take whole. Apart they
    compute A twice, 5 matmuls for 4, with half the instructions or less.
    """
    return dtype != torch.float32 and block_dim > 128


def chunk(device: torch.device) -> int:
    """The number of columns in which the forward kernel keeps its row sums.

    In mma's layouts a thread holds whole sets of 8 columns of a row, so that sums over chunks of 8 stay within it.
    Elsewhere chunks would move data between threads, and a row is reduced at once.
    """
    return 1 if architecture(device).startswith(("sm_10", "gfx")) else 8


def architecture(device: torch.device) -> str:
    """The name by which tables know the device, or what `targeting` says."""
    if _target:
        return _target[-1]
    return "sm_90" if device.type == "cpu" else _of_gpu(device.index or 0)


@functools.cache
def _of_gpu(index: int) -> str:
    if torch.version.hip:
        return torch.cuda.get_device_properties(index).gcnArchName.partition(":")[0]
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"
