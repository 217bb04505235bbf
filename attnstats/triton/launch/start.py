"""Starts a kernel, with the tiles that fit the device."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch

from attnstats.core.geometry import Geometry
from attnstats.kernels.arguments import Near, Score, Sizes, Visibility
from attnstats.triton.configs import Config, Kernel, candidates, table_version
from attnstats.triton.launch.arguments import block_dim, score, sequences, visibility, window

T = TypeVar("T")


class Launch(NamedTuple):
    kernel: Any
    programs: int
    device: torch.device
    constants: dict[str, Any]
    config: Config  # its BM counts positions


class Prepared(NamedTuple):
    """The parts of a launch that calls of one geometry share."""

    launch: Launch
    sizes: Sizes
    visible: Visibility  # without the key mask
    score: Score
    slots: int = 0  # of each band column
    reach: Near | int | None = None  # how far from the diagonal weights are not 0; None: no limit


def prepare(
    geometry: Geometry,
    kernel: Any,
    programs: int,
    constants: dict[str, Any],
    config: Config,
    sizes: Sizes,
    slots: int = 0,
    reach: Near | int | None = None,
) -> Prepared:
    launch = Launch(kernel, programs, geometry.device, constants, config)
    return Prepared(launch, sizes, window(geometry), score(geometry), slots, reach)


def start_prepared(prepared: Prepared, geometry: Geometry, **tensors: Any) -> None:
    """Start with these tensors and the arguments that all but `combine` take."""
    start(
        prepared.launch,
        sequences=sequences(geometry),
        **prepared.sizes._asdict(),
        visible=visibility(prepared.visible, geometry),
        score=prepared.score,
        **tensors,
    )


def remembered(geometry: Geometry, prepare: Callable[..., T], *arguments: Any) -> T:
    """`prepare(geometry, *arguments)`, made once per geometry."""
    key = prepare, *arguments
    prepared: T | None = geometry.memo.get(key)
    if prepared is None:
        prepared = geometry.memo[key] = prepare(geometry, *arguments)
    return prepared


# (kernel, device, dtype, head size) to the configurations that did not fit.
_TOO_LARGE: dict[tuple[Any, ...], set[Config]] = {}


def fitting(kernel: Kernel, geometry: Geometry, dim: int, run: Callable[[Config], T]) -> T:
    """Run with the table's configuration or, where the device lacks the shared memory, with a smaller one."""
    configs, too_large = remembered(geometry, _configurations, kernel, dim, table_version())
    for config in configs:
        if config not in too_large:
            try:
                return run(config)
            except _out_of_resources():
                too_large.add(config)
    raise ValueError(
        f"query: head_dim {dim} in {geometry.dtype} needs more shared memory than {geometry.device} has, in every "
        f"configuration of the {kernel} kernel; backend='tiled' would work"
    )


def _configurations(
    geometry: Geometry, kernel: Kernel, dim: int, _version: int
) -> tuple[tuple[Config, ...], set[Config]]:
    where = (kernel, geometry.device, geometry.dtype, block_dim(dim))
    return tuple(candidates(*where)), _TOO_LARGE.setdefault(where, set())


@functools.cache
def _out_of_resources() -> type[Exception]:
    from triton.runtime.errors import OutOfResources

    return OutOfResources


Starter = Callable[[Launch, dict[str, Any]], None]
_starters: list[Starter] = []


@contextlib.contextmanager
def launching_with(starter: Starter) -> Iterator[None]:
    """Inside, `starter(launch, arguments)` takes the place of every start of a kernel."""
    _starters.append(starter)
    try:
        yield
    finally:
        _starters.remove(starter)


def start(launch: Launch, **arguments: Any) -> None:
    """The one place where a kernel starts: on the device of its tensors, which may not be the current one."""
    kernel, programs, device, constants, config = launch
    if programs == 0:  # packed sequences without a token
        return
    if _starters:
        _starters[-1](launch, arguments)
        return
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel.run(
            grid=(programs,),
            warmup=False,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            # Pinned: without fusion score * scale - lse is rounded twice, and Triton's default is about to change.
            enable_fp_fusion=True,
            **arguments,
            **constants,
        )
