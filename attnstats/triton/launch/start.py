"""Starts a kernel, with the tiles that fit the device."""

from __future__ import annotations

import contextlib
import functools
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch

from attnstats.core.geometry import Geometry
from attnstats.kernels.arguments import Near, Score, Sizes, Visibility
from attnstats.triton.configs import Config, Kernel, candidates, interpreted, table_version
from attnstats.triton.launch.arguments import block_dim, sequences, visibility, window

T = TypeVar("T")
Reach = Near | tuple[int, ...] | int | None


@dataclass(frozen=True, eq=False)
class Launch:
    """A kernel with all that calls of one geometry pass to it in the same way.

    Attributes:
        constants: those that are compiled in.
        config: its BM counts positions.
        shared: numbers that are the same in every call, and that Triton does not specialise for.
    """

    kernel: Any
    programs: int
    device: torch.device
    constants: dict[str, Any]
    config: Config
    shared: dict[str, int | None] = field(default_factory=dict)

    @functools.cached_property
    def order(self) -> tuple[Callable[[dict[str, Any]], tuple[Any, ...]], int, tuple[Any, ...], tuple[Any, ...]]:
        """What takes the other arguments in the kernel's order, how many of them come before the shared ones, these,
        and the constants, which are last."""
        names: list[str] = self.kernel.arg_names
        others = [name for name in names if name not in self.shared and name not in self.constants]
        before = next((i for i, name in enumerate(names) if name in self.shared), 0)
        constants = names[len(others) + len(self.shared) :]
        assert [*others[:before], *self.shared, *others[before:], *constants] == names
        return operator.itemgetter(*others), before, (*self.shared.values(),), (*map(self.constants.get, constants),)

    @functools.cached_property
    def compiled(self) -> dict[Any, Any]:
        """Triton's compiled kernels, by what it compiled in of the other arguments: one dictionary for all lengths."""
        kinds = [None if x is None else x.bit_length() < 32 for x in self.shared.values()]
        return _COMPILED.setdefault((self.kernel, self.device, self.config, *self.constants.items(), *kinds), {})


_COMPILED: dict[Any, dict[Any, Any]] = {}


@functools.cache
def _specialiser(device: torch.device) -> Callable[[tuple[Any, ...]], Any] | None:
    """What Triton compiles in of such arguments on the current device: types, None, 1, multiples of 16, aligned
    pointers, and what the target adds. Asked of Triton itself, as a kernel that was compiled for others gives wrong
    results; with it the settings for which it compiles another kernel, as some profilers need. None: it can't be asked.
    """
    if interpreted():
        return None
    try:
        from triton import knobs
        from triton.compiler import make_backend
        from triton.runtime import driver
        from triton.runtime.jit import native_specialize_impl

        backend = make_backend(driver.active.get_current_target())
        native_specialize_impl(backend, (), False, True, True)
    except (ImportError, AttributeError, TypeError):  # another version's
        return None
    runtime, compilation = knobs.runtime, knobs.compilation

    def specialise(values: tuple[Any, ...]) -> tuple[Any, ...]:
        settings = runtime.debug, compilation.instrumentation_mode, runtime.add_stages_inspection_hook
        return native_specialize_impl(backend, values, False, True, True), *settings

    return specialise


def _set_allocator() -> None:
    """Give Triton, if nobody else did, what it allocates a program's descriptors with. It keeps that per context, and
    the backward pass runs in threads of its own."""
    from triton.runtime import _allocation

    if isinstance(_allocation._allocator.get(), _allocation.NullAllocator):
        _allocation.set_allocator(_scratch)


def _scratch(size: int, _alignment: int, _stream: int | None) -> torch.Tensor:
    """Bytes on the current device: PyTorch aligns them to 512, and reuses them in the order of the stream."""
    return torch.empty(size, dtype=torch.uint8, device="cuda")


class Prepared(NamedTuple):
    """The parts of a launch that calls of one geometry share."""

    launch: Launch
    visible: Visibility  # without the key mask
    score: Score
    slots: int = 0  # of each band column
    reach: Reach = None  # how far from the diagonal weights are not 0, by head in a tuple of them; None: no limit


def prepare(
    geometry: Geometry,
    kernel: Any,
    programs: int,
    constants: dict[str, Any],
    config: Config,
    sizes: Sizes,
    score: Score,
    slots: int = 0,
    reach: Reach = None,
) -> Prepared:
    launch = Launch(kernel, programs, geometry.device, constants, config, sizes._asdict())
    return Prepared(launch, window(geometry), score, slots, reach)


def start_prepared(prepared: Prepared, geometry: Geometry, **arguments: Any) -> None:
    """Start with these arguments and those that all but `combine` take."""
    arguments["sequences"] = sequences(geometry)
    arguments["visible"] = visibility(prepared.visible, geometry)
    arguments["score"] = prepared.score
    start(prepared.launch, arguments)


def remembered(geometry: Geometry, prepare: Callable[..., T], *arguments: Any) -> T:
    """`prepare(geometry, *arguments)`, made once per geometry and table of tiles."""
    key = prepare, table_version(), *arguments
    prepared: T | None = geometry.memo.get(key)
    if prepared is None:
        prepared = geometry.memo[key] = prepare(geometry, *arguments)
    return prepared


# (kernel, device, dtype, head size) to the configurations that did not fit.
_TOO_LARGE: dict[tuple[Any, ...], set[Config]] = {}


def fitting(kernel: Kernel, geometry: Geometry, dim: int, run: Callable[[Config], T]) -> T:
    """Run with the table's configuration or, where the device lacks the shared memory, with a smaller one."""
    configs, too_large = remembered(geometry, _configurations, kernel, dim)
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


def _configurations(geometry: Geometry, kernel: Kernel, dim: int) -> tuple[tuple[Config, ...], set[Config]]:
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


def start(launch: Launch, arguments: dict[str, Any]) -> None:
    """The one place where a kernel starts: on the device of its tensors, which may not be the current one."""
    if launch.programs == 0:  # packed sequences without a token
        return
    if _starters:
        _starters[-1](launch, arguments | launch.shared)
    elif launch.device.type != "cuda" or launch.device.index == torch.cuda.current_device():
        _start(launch, arguments)
    else:
        with torch.cuda.device(launch.device):
            _start(launch, arguments)


def _start(launch: Launch, arguments: dict[str, Any]) -> None:
    """Triton's own launcher takes five times as long as a launch does, so it finds each compiled kernel only once."""
    if launch.constants.get("DESCRIBED"):
        _set_allocator()
    key, specialise = None, _specialiser(launch.device)
    if specialise is not None:
        values_of, before, shared, constants = launch.order
        values = values_of(arguments)
        key = specialise(values)
        compiled = launch.compiled.get(key)
        if compiled is not None and not launch.kernel.pre_run_hooks:
            compiled[launch.programs, 1, 1](*values[:before], *shared, *values[before:], *constants)
            return
    compiled = launch.kernel.run(
        grid=(launch.programs,),
        warmup=False,
        num_warps=launch.config.num_warps,
        num_stages=launch.config.num_stages,
        # Pinned: without fusion score * scale - lse is rounded twice, and Triton's default is about to change.
        enable_fp_fusion=True,
        **arguments,
        **launch.shared,
        **launch.constants,
    )
    if key is not None and compiled is not None:  # a hook of Triton's may keep it from compiling
        launch.compiled[key] = compiled
