"""The first two minutes on a GPU that has not run this package: the part "first".

    ceilings     measured rates of the card, as the part "ceilings" measures them
    correctness  thirteen cases against float64 or another way to compute the same, and every attention kernel of
                 attnstats.flash; workers compile side by side, also what later steps run
    repeats      300 calls of forward, band, column and backward, bitwise, with other work in flight on another stream
    timing       at T = 8k every attention kernel bare and with the band from its lse, and ours
    counters     one pass of Nsight Compute over our kernels

The section is saved after every step, and while workers answer. A step that has too little time left is dropped by
name; what a step doesn't use goes to the later ones.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

import attnstats
from attnstats.flash import providers
from attnstats.triton.configs import describing
from benchmarks.contenders import STATISTICS
from benchmarks.gpu import ceilings, correctness, counters, end_to_end, timing, workers
from benchmarks.gpu.contenders import PROVIDERS, alone
from benchmarks.gpu.correctness import LENGTH, REPEATS, repeat
from benchmarks.gpu.part import Part, device_of, message_of
from tests.cases import Case, check, check_gradients

WAYS = ("forward and band", "band from lse", "column from lse", "backward")  # of correctness.PASSES
REPEATED = tuple(itertools.product((128, 64, 256), WAYS))
KINDS = (1, 4, 9, 12)  # of tests.cases.EVERY: rows and columns, of a band and whole
PACKED = (providers.FLASH_2.name, providers.FLASH_3.name, providers.FLASH_4.name)  # that take packed sequences
WARM = "warm: "  # before the names of tasks that only fill the caches


class Step(NamedTuple):
    run: Callable[[Part], None]
    share: float  # of the time
    least: float  # seconds: with less it is not begun


def run(part: Part) -> None:
    done = part.section.setdefault("steps", {})  # seconds of each
    pending = [name for name in STEPS if name not in done]
    for i, name in enumerate(pending):
        step = STEPS[name]
        if part.out_of_time(name, 0.0 if part.smoke else step.least):
            continue
        share = part.left() * step.share / sum(STEPS[later].share for later in pending[i:])
        began = time.monotonic()
        with part.share(share):
            try:
                step.run(part)
            except Exception as error:
                part.section["failures"][name] = message_of(error)
        done[name] = round(time.monotonic() - began, 1)
        part.save()
        print(f"  {name}: {_in_a_line(name, part.section)}, {done[name]:.0f} s", flush=True)
    if failed := [name for name in STEPS if name in part.section["failures"]]:
        raise RuntimeError(f"steps that raised: {', '.join(failed)}")


def _in_a_line(name: str, section: dict[str, Any]) -> str:
    if name in section["failures"]:
        return section["failures"][name]
    counts = {
        "correctness": f"{section.get('passed', 0)} passed, {len(section.get('failed', {}))} failed",
        "repeats": f"{len(section.get('failed', {}))} failed checks so far",
        "timing": f"{sum('ms' in row for row in section.get('rows', []))} timed",
        "counters": f"{len(section.get('counters', []))} launches",
    }
    return counts.get(name, "done")


# Correctness


def tasks(smoke: bool) -> dict[str, Callable[[], Any]]:
    """What workers perform, by name: the checks, and then what later steps will have to find compiled."""
    device = device_of(smoke)
    found: dict[str, Callable[[], Any]] = {}
    for name, case in _cases(smoke).items():
        found[f"case: {name}"] = functools.partial(check, case, "triton", device, name.endswith("lse"))
    found["case: without descriptors"] = functools.partial(_by_pointers, _sized(smoke, 128), device)
    found["gradients: plain"] = functools.partial(check_gradients, _sized(smoke, 128), "triton", device)
    model = end_to_end.Case("tiny", 20, None, True) if smoke else end_to_end.Case("Qwen3-4B", 1000, 4, True)
    found["capture: a small model"] = functools.partial(end_to_end.check_capture, model, device)
    found["compile: torch.compile"] = functools.partial(_compiled, smoke)
    for name in (name for name, provider in PROVIDERS.items() if provider.device == device.type):
        # Memory-efficient attention is for float32, and has no groups of heads.
        changes = {"dtype": "float32", "key_heads": 4, "group": 1} if name == providers.EFFICIENT.name else {}
        found[f"provider: {name}"] = functools.partial(_provider, name, _sized(smoke, 128, **changes), device)
        if name in PACKED:
            packed = _cases(smoke)["packed"]
            found[f"provider: {name}, packed"] = functools.partial(_provider, name, packed, device)
    if not smoke:
        ours = (n for n, c in timing.members(_timed(smoke), device).items() if c.ours and not c.device)
        found |= {WARM + n: functools.partial(timing.perform, f"{_timed(smoke).name}: {n}", smoke) for n in ours}
        for dim, way in REPEATED:
            found[f"{WARM}{way}, D = {dim}"] = functools.partial(repeat, way, "bfloat16", dim, smoke, 0)
    return found


def perform(name: str, smoke: bool) -> Any:
    with torch.no_grad():
        return tasks(smoke)[name]()


def _correctness(part: Part) -> None:
    names = [name for name in tasks(part.smoke) if name not in part.section.get("checks", {})]

    def keep(answers: workers.Answers) -> None:
        for name in [name for name in answers if name.startswith(WARM)]:
            answer = answers.pop(name)
            if not answer["ok"]:
                part.section["failures"][name] = answer["failure"]
        correctness.keep(part, answers)

    found = workers.perform_all(__name__, names, part.left(), part.smoke, keep)
    keep(dict(found))
    for name in names:
        if name not in found:
            part.leave_out(name, "no time left")


def _sized(smoke: bool, dim: int, **changes: Any) -> Case:
    """One call in bfloat16, in which the interpreter's products of tiles are those of float32."""
    length, dim = (20, 16) if smoke else (LENGTH, dim)
    sizes = {"query_length": length, "key_length": length, "head_dim": dim, "value_dim": dim}
    heads = {"batch": 1, "key_heads": 1} if smoke else {"batch": 2, "key_heads": 2, "group": 4}
    return Case(**sizes | heads | {"dtype": "bfloat16", "asked": KINDS} | changes)


def _cases(smoke: bool) -> dict[str, Case]:
    found: dict[str, Case] = {}
    for dim in (128, 64, 256):
        case = _sized(smoke, dim)
        found |= {f"D = {dim}": case, f"D = {dim}, from an lse": case}
    sequences = ((9, 9), (1, 1), (11, 11)) if smoke else ((150, 150), (5, 70), (1, 1), (0, 0), (97, 97))
    decoded = {"query_length": 1, "key_length": 40 if smoke else 2500}
    return found | {
        "left padding": _sized(smoke, 128, padding="left"),
        "packed": _sized(smoke, 128, packed=sequences),
        "decoding": _sized(smoke, 128, **decoded),
    }


def _by_pointers(case: Case, device: torch.device) -> None:
    """The other way to load tiles, where descriptors are the usual one."""
    with describing(False):
        check(case, "triton", device)
        check_gradients(case, "triton", device)


def _compiled(smoke: bool) -> None:
    """A call in torch.compile has the bits of a plain one."""
    query, key, value = _sized(smoke, 128).tensors(device_of(smoke))

    def call() -> list[torch.Tensor]:
        output, stats = attnstats.attention(query, key, value, statistics=STATISTICS, enable_gqa=True, backend="triton")
        return [output, stats.lse, *(stats[s] for s in STATISTICS)]

    # Inductor would build C++ for a CPU.
    traced = torch.compile(call, fullgraph=True, backend="aot_eager" if smoke else "inductor")
    for mine, right in zip(traced(), call(), strict=True):
        assert torch.equal(mine, right), "torch.compile changes bits"


def _provider(name: str, case: Case, device: torch.device) -> dict[str, Any] | None:
    """The backend flash with one provider. One that isn't installed, or refuses the call, is left out and not wrong."""
    with alone(name):
        try:
            attnstats.explain(*case.views(case.tensors(device)), backend="flash", **case.arguments(device))
        except (ImportError, ValueError) as error:
            return {"left_out": message_of(error)}
        check(case, "flash", device)
        check_gradients(case, "flash", device)
    return None


# The steps after it


def _repeats(part: Part) -> None:
    for dim, way in REPEATED[:4] if part.smoke else REPEATED:
        name = f"repeat: {way}, D = {dim}"
        if name in part.section.get("checks", {}) or part.out_of_time(name):
            continue
        began = time.monotonic()
        arguments = way, "bfloat16", 16 if part.smoke else dim, part.smoke, REPEATS
        failure = part.attempt(name, repeat, *arguments).failure
        answer: dict[str, Any] = {"ok": failure is None, "seconds": round(time.monotonic() - began, 2)}
        correctness.keep(part, {name: answer | ({"failure": failure} if failure else {})})


def _timed(smoke: bool) -> timing.Case:
    return timing.cases(smoke)[0]._replace(rivals=False)


def _timing(part: Part) -> None:
    part.section["rows"] = timing.measured(part, _timed(part.smoke), part.left(), set())


def _counters(part: Part) -> None:
    if part.smoke:
        counters.main()
    answer = {"left_out": "needs CUDA"} if part.smoke else counters.measure(part.left())
    if "left_out" in answer:
        part.leave_out("counters", answer["left_out"])
    part.section["counters"] = answer.get("kernels", [])


STEPS = {
    "ceilings": Step(ceilings.run, 0.08, 2),
    "correctness": Step(_correctness, 0.45, 10),
    "repeats": Step(_repeats, 0.12, 3),
    "timing": Step(_timing, 0.20, 6),
    "counters": Step(_counters, 0.15, 10),
}
