"""Checks of the kernels on this device: the part "correctness", and the tasks of its workers.

    case      every kernel, dtype and feature against float64, by the comparison and the tolerances of tests/cases.py
    gradients the backward kernels, likewise
    repeat    every shipped configuration 300 times, bitwise, while other work is in flight
    memory    what a call allocates doubles with the length
    graph     a call captured into a CUDA graph replays to the same bits
    sanitizer compute-sanitizer's memcheck and racecheck on small shapes, where it is installed

Run as `python -m benchmarks.gpu.correctness` it makes the few small calls that the sanitizer watches.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import attnstats
from attnstats import FAI, WAAD, Entropy, MaxLogit, MeanDistance, PooledMap, Received
from benchmarks.gpu import workers
from benchmarks.gpu.environment import ran, tool
from benchmarks.gpu.measure import peak_mib
from benchmarks.gpu.part import Part, device_of
from tests.cases import Case, check, check_gradients

# One of each kind of pass of tests.cases: bands and loops of rows and columns, the free ones, a pooled map, segments
# and largest keys, in attention's loop and in a pass of their own.
KINDS = (1, 3, 4, 5, 9, 12, 14, 16, 17, 18)
LENGTH = 333  # three blocks of 128 rows and five of 64 keys or more, none of them whole
FEATURES: dict[str, dict[str, Any]] = {
    "causal, all statistics": {"asked": ()},
    "full": {"is_causal": False},
    "one head per group": {"key_heads": 3, "group": 1},
    "groups of 5": {"key_heads": 1, "group": 5},
    "queries last": {"query_length": 70},
    "decode": {"query_length": 1},
    "decode, keys in parts": {"query_length": 3, "key_length": 2500},
    "decode, keys in parts, padding": {"query_length": 1, "key_length": 2500, "padding": "left"},
    "queries between": {"query_length": 100, "query_offset": 90},
    "left padding": {"padding": "left"},
    "right padding": {"padding": "right"},
    "holes, not causal": {"padding": "holes", "is_causal": False},
    "some queries count": {"counted": "some", "padding": "left"},
    "queries count by weight": {"weighted": True, "padding": "left"},
    "softcap": {"softcap": 5.0},
    "window": {"window_size": (40, 0)},
    "window on both sides": {"window_size": (70, 20), "is_causal": False},
    "sinks": {"sinks": True},
    "packed": {"packed": ((150, 150), (5, 70), (1, 1), (0, 0), (97, 97))},
    "some heads": {"heads": "some"},
    "other heads per statistic": {"heads": "split"},
    "heads innermost": {"layout": "bthd"},
    "views into NaN": {"layout": "guarded", "padding": "left"},
    "all of it": {"softcap": 5.0, "window_size": (90, 0), "sinks": True, "padding": "left", "counted": "some"},
    "large scores": {"spread": 40.0},
}
DTYPES = {"bfloat16": 128, "float16": 64, "float32": 64}  # and the head size of its features
HEAD_DIMS = {"bfloat16": (16, 64, 80, 96, 192, 256), "float16": (128, 256), "float32": (32, 128, 256)}
TRAINED = {  # and the features whose gradients are checked
    "bfloat16": ("causal", "groups of 5", "queries last", "left padding", "window", "softcap", "packed", "D = 256"),
    "float16": ("causal",),
    "float32": ("causal",),
}
REPEATED = {"bfloat16": (64, 128, 256), "float32": (64, 128, 256), "float16": (128,)}
REPEATS, REPEATED_LENGTH = 300, 1333  # enough blocks for many programs of many iterations
PASSES: dict[str, tuple[Any, ...]] = {
    "forward": (),
    "decode": (WAAD(10), FAI(10, 100), Entropy()),
    "forward and band": (WAAD(10), FAI(10, 100)),
    "forward and loop": (MeanDistance(), Entropy(), MaxLogit()),
    "band from lse": (WAAD(10), FAI(10, 100)),
    "loop from lse": (MeanDistance(), Entropy()),
    "column from lse": (Received(), FAI(0, None)),
    "pooled from lse": (PooledMap(3, 4),),
    "backward": (),
    "backward of statistics": (WAAD(10), FAI(10, 100), Entropy()),
}
SANITIZERS = ("memcheck", "racecheck")
FOUND = 99  # compute-sanitizer's exit status when it found something, as asked for


def tasks(smoke: bool) -> dict[str, Callable[[], Any]]:
    """Everything that workers perform, by name: what takes longest and what matters most first.

    Workers compile side by side, so tasks that need the same kernels are kept apart: the later one finds them compiled.
    """
    found: dict[str, Callable[[], Any]] = {}
    if not smoke:
        found |= {f"sanitizer: {name}": functools.partial(sanitize, name) for name in SANITIZERS}
        found["graph: attention"] = _graph
        found |= {f"memory: {way}": functools.partial(_memory, way == "from lse") for way in ("attention", "from lse")}
    dtypes = {"float16": (16,)} if smoke else REPEATED
    cases = {name: case for dtype in dtypes for name, case in _cases(dtype, smoke).items()}
    found |= {f"case: {name}": functools.partial(_check, case, smoke, False) for name, case in cases.items()}
    for name, case in cases.items():
        if smoke or name.startswith(TRAINED[case.dtype]):
            found[f"gradients: {name}"] = functools.partial(check_gradients, case, "triton", device_of(smoke))
    for dtype, dims in dtypes.items():
        for way, dim in itertools.product(PASSES, dims):
            found[f"repeat: {way}, {dtype}, D = {dim}"] = functools.partial(repeat, way, dtype, dim, smoke, REPEATS)
    return found | {
        f"case: {name}, from lse": functools.partial(_check, case, smoke, True) for name, case in cases.items()
    }


def run(part: Part) -> None:
    names = list(tasks(part.smoke))
    found = workers.perform_all(__name__, names, part.left(), part.smoke, functools.partial(keep, part))
    keep(part, found)
    if part.smoke:
        for name in (*(f"sanitizer: {name}" for name in SANITIZERS), "memory", "graph"):
            part.leave_out(name, "needs CUDA")
    for name in names:
        if name not in found:
            part.leave_out(name, "no time left")


def keep(part: Part, found: workers.Answers) -> None:
    """Add workers' answers to the part's checks, and save."""
    checks = part.section.setdefault("checks", {})
    for name, answer in found.items():
        if why := (answer.get("value") or {}).get("left_out"):
            part.leave_out(name, why)
        else:
            checks[name] = answer
    part.section["failed"] = {name: check["failure"] for name, check in checks.items() if not check["ok"]}
    part.section["passed"] = sum(check["ok"] for check in checks.values())
    part.save()


def perform(name: str, smoke: bool) -> dict[str, Any] | None:
    with torch.no_grad():
        return tasks(smoke)[name]()


def _cases(dtype: str, smoke: bool) -> dict[str, Case]:
    if smoke:
        small = functools.partial(Case, batch=1, key_heads=1, query_length=20, key_length=20, asked=KINDS)
        return {"causal, float16": small(dtype="float16"), "left padding, float32": small(padding="left")}
    base = functools.partial(Case, query_length=LENGTH, key_length=LENGTH, dtype=dtype)
    dim = DTYPES[dtype]
    found = {f"{name}, {dtype}": base(**_sizes(dim) | changes) for name, changes in FEATURES.items()}
    for dim in HEAD_DIMS[dtype]:
        found[f"D = {dim}, {dtype}"] = base(head_dim=dim, value_dim=dim, asked=KINDS)
    found[f"Dv < D, {dtype}"] = base(head_dim=128, value_dim=64, asked=KINDS)
    return found


def _sizes(dim: int) -> dict[str, Any]:
    return {"head_dim": dim, "value_dim": dim, "asked": KINDS}


def _check(case: Case, smoke: bool, from_lse: bool) -> None:
    check(case, "triton", device_of(smoke), from_lse)


def repeat(way: str, dtype: str, dim: int, smoke: bool, repeats: int) -> None:
    """The same bits every time, while a second stream keeps the processors busy."""
    device = device_of(smoke)
    length = 20 if smoke else REPEATED_LENGTH
    sizes = (1, 70 if smoke else 2500) if way == "decode" else (length, length)
    case = Case(1, *((1, 2) if smoke else (2, 4)), *sizes, dim, dim, dtype)
    call = functools.partial(_tensors, way, case.tensors(device))
    first = [x.clone(memory_format=torch.contiguous_format) for x in call()]
    differing = torch.zeros((), dtype=torch.int64, device=device)
    repeats = min(repeats, 2) if smoke else repeats
    with _busy(device) as refill:
        for _ in range(repeats):
            refill()
            pairs = zip(first, call(), strict=True)
            differing += torch.stack([(_bits(mine) != _bits(x)).any() for mine, x in pairs]).any()
    assert not int(differing), f"{int(differing)} of {repeats} repeats differ in their bits"


def _tensors(way: str, inputs: tuple[Tensor, Tensor, Tensor]) -> list[Tensor]:
    query, key, value = inputs
    asked = PASSES[way]
    if way.endswith("from lse"):
        # Not this call's lse but a given one: these passes take any numbers.
        lse = torch.full(query.shape[:3], 6.0, device=query.device)
        stats = attnstats.statistics_from_lse(
            query, key, lse, statistics=asked, enable_gqa=True, check=False, backend="triton"
        )
        return [stats[s] for s in asked]
    if way.startswith("backward"):
        return _gradients(inputs, asked)
    output, stats = attnstats.attention(query, key, value, statistics=asked, enable_gqa=True, backend="triton")
    return [output.contiguous(), stats.lse, *(stats[s] for s in asked)]


def _gradients(inputs: tuple[Tensor, Tensor, Tensor], asked: tuple[Any, ...]) -> list[Tensor]:
    """Of a weighted sum of the output and of the sums of the statistics."""
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in inputs]
        output, stats = attnstats.attention(
            *leaves, statistics=asked, differentiable=bool(asked), enable_gqa=True, backend="triton"
        )
        weights = inputs[0].detach()  # as good as any of the output's shape
        loss = (output * weights).sum() + sum(stats[s].sum() for s in asked)
        return list(torch.autograd.grad(loss, leaves))


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


@contextlib.contextmanager
def _busy(device: torch.device) -> Iterator[Callable[[], None]]:
    """Yields what queues matmuls on a stream of their own, so many at a time that some are always in flight."""
    if device.type != "cuda":
        yield lambda: None
        return
    stream, done = torch.cuda.Stream(), torch.cuda.Event()
    one, other, out = (torch.randn(2048, 2048, device=device, dtype=torch.bfloat16) for _ in range(3))
    torch.cuda.synchronize()

    def refill() -> None:
        if done.query():
            with torch.cuda.stream(stream):
                for _ in range(40):  # a millisecond of an H100: a few repeats
                    torch.mm(one, other, out=out)
                done.record()

    try:
        yield refill
    finally:
        stream.synchronize()  # else the next tensor may get the memory that they still write to


def _memory(from_lse: bool) -> dict[str, Any]:
    """Peaks of three lengths, each twice the one before."""
    peaks = []
    asked = [WAAD(10), FAI(10, 100), MeanDistance(), Entropy(), Received(), FAI(0, None)]
    for length in (4096, 8192, 16384):
        query, key = (torch.randn(1, heads, length, 64, device="cuda", dtype=torch.bfloat16) for heads in (4, 2))
        lse = torch.full((1, 4, length), 6.0, device="cuda")
        call: Callable[..., Any] = functools.partial(attnstats.attention, query, key, key)
        if from_lse:
            call = functools.partial(attnstats.statistics_from_lse, query, key, lse)
        peaks.append(peak_mib(functools.partial(call, statistics=asked, enable_gqa=True, backend="triton")))
    ratios = [later / earlier for earlier, later in itertools.pairwise(peaks)]
    assert max(ratios) < 2.2, f"peaks of {', '.join(f'{peak:.1f}' for peak in peaks)} MiB at T = 4k, 8k, 16k"
    return {"peak_mib": [round(peak, 2) for peak in peaks]}


def _graph() -> None:
    """Inputs that change under a captured call give what a plain call gives."""
    case = Case(1, 2, 4, LENGTH, LENGTH, 64, 64, "bfloat16")
    inputs, others = case.tensors("cuda"), dataclasses.replace(case, seed=1).tensors("cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        _tensors("forward and band", inputs)  # compiles, and settles what is read once
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = _tensors("forward and band", inputs)
    for mine, other in zip(inputs, others, strict=True):
        mine.copy_(other)
    graph.replay()
    torch.cuda.synchronize()
    for mine, right in zip(captured, _tensors("forward and band", others), strict=True):
        assert torch.equal(_bits(mine), _bits(right)), "a captured call replays to other bits"


def sanitize(name: str) -> dict[str, Any]:
    program = tool("compute-sanitizer")
    if program is None:
        return {"left_out": "compute-sanitizer is not installed"}
    command = [program, "--tool", name, "--error-exitcode", str(FOUND), sys.executable, "-m", __name__]
    # With torch's caching allocator small buffers share a block, and what is written between them is no error.
    done = ran(command, 100, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    if done is None:
        return {"left_out": "not finished after 100 s"}
    told = [line for line in done.output.splitlines() if line.strip()] or ["it said nothing"]
    assert done.status != FOUND, f"{name}: {' | '.join(told[-2:])}"[:300]
    if done.status:
        return {"left_out": f"could not run: {told[-1]}"[:300]}
    return {"said": told[-1]}


def main() -> None:
    """Small calls of every kernel."""
    with torch.no_grad():
        for case in (
            Case(1, 1, 2, 70, 70, 64, 64, "bfloat16", asked=KINDS),
            Case(1, 1, 2, 70, 70, 64, 64, "bfloat16", asked=KINDS, padding="left", counted="some"),
        ):
            for from_lse in (False, True):
                check(case, "triton", "cuda", from_lse)


if __name__ == "__main__":
    main()
