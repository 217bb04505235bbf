"""Attention with statistics against its rivals in the same run, and either from an lse: the part "timing".

A case is a shape; its contenders are first compared with float64 (on two heads, up to 16k tokens; beyond that with
our own kernel), then timed in turns. Cases run in the order of their weight, so that those left out for lack of time
matter least. Rows of the section hold one contender in one case.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import attnstats
from attnstats import Received, reference
from benchmarks.contenders import STATISTICS, Answer
from benchmarks.gpu import contenders, floors, workers
from benchmarks.gpu.contenders import AUTO, CONTENDERS, PACKED, Contender, Inputs, Packed
from benchmarks.gpu.environment import l2_bytes
from benchmarks.gpu.floors import Shape
from benchmarks.gpu.measure import Entrant, race
from benchmarks.gpu.part import OUT_OF_MEMORY, Part, device_of, wrong

TRUTH_LENGTH = 16384  # up to which a head's map in float64 is affordable: 2 GiB, a few times over
WARMING = 0.3  # of the time at most, for compiling side by side
SLOWEST = 3.0  # seconds a call may be expected to take
# In bfloat16, absolute for output and WAAD, of the largest value for the columns. Rivals read statistics off rounded
# weights or scores. A coarse sieve: the part "correctness" holds ours to far less.
TOLERANCE = {"output": 6e-2, "waad": 0.3, "fai": 0.1, "received": 0.05}
OUR_TOLERANCE = {"output": 4e-2, "waad": 0.02, "fai": 0.01, "received": 0.01}


class Case(NamedTuple):
    name: str
    shape: Shape
    rivals: bool = True  # all of them, or only torch's kernels and ours
    weight: float = 1.0  # of the time
    sequences: int = 0  # packed, if any


def cases(smoke: bool) -> list[Case]:
    if smoke:
        small = functools.partial(Shape, query_heads=2, key_heads=1, head_dim=16)
        return [
            Case("T = 33", small(33)),
            Case("packed", small(17), False, sequences=2),
            Case("decode", small(40, queries=1), False),
        ]
    lengths = {8192: 3.0, 32768: 3.0, 2048: 1.0, 131072: 1.5, 1024: 1.0, 4096: 1.0, 16384: 1.0, 65536: 1.0}
    named = {f"T = {length // 1024}k": (Shape(length), weight) for length, weight in lengths.items()}
    main = [Case(name, shape, True, weight) for name, (shape, weight) in named.items()]
    others = [
        Case("D = 64, T = 8k", Shape(8192, head_dim=64), False),
        Case("D = 256, T = 8k", Shape(8192, query_heads=16, key_heads=8, head_dim=256), False),
        Case("MHA, T = 8k", Shape(8192, key_heads=32), False),
        Case("packed, 8 x 2k", Shape(2048, batch=8), False, sequences=8),
        Case("decode, 8 x 32k", Shape(32768, batch=8, queries=1), False),
    ]
    return [*main[:2], *others, *main[2:]]


def run(part: Part) -> None:
    rows = part.section.setdefault("rows", [])
    done = part.section.setdefault("cases", [])
    pending = [case for case in cases(part.smoke) if case.name not in done]
    warmed = _warm_caches(part, pending)
    while pending:
        case = pending.pop(0)
        # After a crash the case is measured again, without the contender that crashed.
        rows[:] = [row for row in rows if row["case"] != case.name]
        if part.out_of_time(case.name, 0.0 if part.smoke else 8.0):
            continue
        share = part.left() * case.weight / (case.weight + sum(other.weight for other in pending))
        rows += measured(part, case, share, warmed)
        done.append(case.name)
        part.save()


def measured(part: Part, case: Case, share: float, warmed: set[str]) -> list[Any]:
    """The rows of a case, within `share` seconds; contenders that torch.compile makes run if they are in `warmed`."""
    sets = 2 if part.smoke else input_sets(case.shape, part.device)
    outcome = part.attempt(f"{case.name}: inputs", inputs_of, case, part.device, sets)
    rows = [] if outcome.value is None else _measure(part, case, outcome.value, share, warmed)
    contenders.forget()
    return rows


def _measure(part: Part, case: Case, inputs: list[Any], share: float, warmed: set[str]) -> list[Any]:
    """One row per contender."""
    entrants: dict[str, Entrant] = {}
    rows: dict[str, dict[str, Any]] = {}
    expected = part.attempt(f"{case.name}: float64", truth_of, case, inputs[0])
    truth: Any = expected.value
    for name, contender in members(case, part.device).items():
        row = rows[name] = _head(case, name, contender)
        if not contender.runs_on(part.device):
            row["failure"] = "needs CUDA"
        elif why := contenders.missing(contender):
            row["failure"] = why
        elif contender.square and case.shape.queries is not None and not case.sequences:
            row["failure"] = "not for decoding"
        elif case.shape.length > contender.longest:
            row["failure"] = f"left out: over {contender.longest} tokens"
        elif reason := reason_to_skip(part, case, name):
            row["failure"] = f"left out: {reason}"
        elif contender.compiled and not part.smoke and f"{case.name}: {name}" not in warmed:
            row["failure"] = "left out: not compiled in time, or not at all"
        else:
            outcome = part.attempt(f"{case.name}: {name}", errors_of, contender, inputs[0], truth, case)
            if outcome.value is None:
                row["failure"] = outcome.failure
                continue
            errors, row["against"] = outcome.value
            row["errors"] = errors
            tolerance = OUR_TOLERANCE if contender.ours else TOLERANCE
            if failure := wrong(errors, tolerance):
                row["failure"] = failure
            else:
                entrants[name] = Entrant(_call(contender, inputs), contender.around)
    for name, found in race(part, case.name, entrants, len(inputs), 0.6 * share).items():
        rows[name] |= found
    return list(rows.values())


def members(case: Case, device: torch.device) -> dict[str, Contender]:
    """Those of CUDA are named on a CPU too."""
    every = PACKED if case.sequences else {n: c for n, c in CONTENDERS.items() if case.rivals or c.many}
    return {n: c for n, c in every.items() if c.device != "cpu" or device.type == "cpu"}


def _warm_caches(part: Part, pending: list[Case]) -> set[str]:
    """Have workers compile, side by side, what torch.compile and Triton keep on disk. The names that ran."""
    if part.smoke:
        return set()
    names = [
        f"{case.name}: {name}"
        for case in pending
        for name, contender in members(case, part.device).items()
        if (contender.compiled or (contender.ours and case.shape.length <= 8192))
        and case.shape.length <= contender.longest
        and not contenders.missing(contender)
    ]
    found = workers.perform_all(__name__, names, WARMING * part.left(), part.smoke)
    for name, answer in found.items():
        if not answer["ok"]:
            part.section["failures"].setdefault(f"compiling {name}", answer["failure"])
    return {name for name, answer in found.items() if answer["ok"]}


def perform(name: str, smoke: bool) -> None:
    """One call of one contender in one case, for what it leaves in the caches."""
    case_name, _, contender_name = name.partition(": ")
    case = next(case for case in cases(smoke) if case.name == case_name)
    device = device_of(smoke)
    contender = members(case, device)[contender_name]
    with torch.no_grad(), contender.around():
        contender.run(inputs_of(case, device, 1)[0])


def _call(contender: Contender, inputs: list[Any]) -> Callable[[int], Any]:
    return lambda i: contender.run(inputs[i])


def _head(case: Case, name: str, contender: Contender) -> dict[str, Any]:
    row = {
        "case": case.name,
        "length": case.shape.length,
        "main": case.rivals,
        "group": contender.group,
        "contender": name,
        "ours": contender.ours,
        "shape": case.shape._asdict(),
    }
    return row | ({"bytes": floors.band_bytes(case.shape)} if contender.group == "band" else {})


def reason_to_skip(part: Part, case: Case, name: str) -> str | None:
    """The reason not to try a contender, by its results at other lengths; time grows quadratically. None: try it."""
    if part.smoke or not case.rivals:
        return None
    for row in part.section["rows"]:
        if row["contender"] == name and row["main"]:
            growth = case.shape.length / row["length"]
            if growth > 1 and row.get("failure") == OUT_OF_MEMORY:
                return f"{OUT_OF_MEMORY} at {row['case']} already"
            if row.get("ms", 0.0) / 1e3 * growth**2 > SLOWEST:
                return f"over {SLOWEST:.0f} s a call"
    return None


def input_sets(shape: Shape, device: torch.device) -> int:
    """The number of inputs that together exceed twice the L2 cache."""
    return max(2, min(16, -(-2 * l2_bytes(device) // (shape.query_bytes + 2 * shape.key_bytes))))


def inputs_of(case: Case, device: torch.device, sets: int) -> list[Any]:
    shape = case.shape
    dtype = torch.float16 if device.type == "cpu" else torch.bfloat16  # the interpreter's bfloat16 is float32 anyway
    generator = torch.Generator(device).manual_seed(shape.length)

    def drawn(heads: int, length: int) -> Tensor:
        size = (length * case.sequences, heads) if case.sequences else (shape.batch, heads, length)
        return torch.randn(*size, shape.head_dim, generator=generator, device=device, dtype=dtype)

    found: list[Any] = []
    for _ in range(sets):
        query = drawn(shape.query_heads, shape.rows)
        key, value = drawn(shape.key_heads, shape.length), drawn(shape.key_heads, shape.length)
        if case.sequences:
            bounds = torch.arange(case.sequences + 1, dtype=torch.int32, device=device) * shape.length
            found.append(Packed(query, key, value, bounds, shape.length))
        else:
            _, stats = attnstats.attention(query, key, value, enable_gqa=True, backend="triton")
            found.append(Inputs(query, key, value, stats.lse))
    return found


def truth_of(case: Case, inputs: Any) -> dict[int, Answer] | Answer:
    """By head, in float64, of the first and the last head; for long sequences our own of all heads."""
    asked = (*STATISTICS, Received())
    if case.sequences:
        bounds = inputs.bounds.tolist()
        first, last = bounds[-2], bounds[-1]
        inputs = Inputs(*(x[first:last].transpose(0, 1)[None] for x in inputs[:3]))
    query, key, value = inputs[:3]
    if query.shape[2] * key.shape[2] > TRUTH_LENGTH**2:
        output, stats = attnstats.attention(query, key, value, statistics=asked, enable_gqa=True, backend="triton")
        return Answer(output, stats["waad"], stats["fai"], stats["received"])
    found = {}
    group = query.shape[1] // key.shape[1]
    for head in (0, query.shape[1] - 1):
        q, kv = slice(head, head + 1), slice(head // group, head // group + 1)
        wide = (query[-1:, q].double(), key[-1:, kv].double(), value[-1:, kv].double())
        output, stats = reference.attention(*wide, statistics=asked)
        found[head] = Answer(*(x[0, 0] for x in (output, stats["waad"], stats["fai"], stats["received"])))
    return found


def errors_of(contender: Contender, inputs: Any, truth: Any, case: Case) -> tuple[dict[str, float], str]:
    """The worst errors of a contender's answer, and the answer that they are measured against."""
    with torch.no_grad(), contender.around():
        answer = contender.run(inputs)
    if truth is None:
        return {}, "nothing: float64 failed"
    if case.sequences:
        # The last sequence: output [total, H, D], rows and columns [H, total].
        assert answer.output is not None
        length = case.shape.length
        statistics = (x if x is None else x[None, :, -length:] for x in answer[1:])
        answer = Answer(answer.output.transpose(0, 1)[None, :, -length:], *statistics)
    whole = isinstance(truth, Answer)
    errors: dict[str, float] = {}
    for name, found in answer._asdict().items():
        if found is None:
            continue
        for head, expected in {None: truth}.items() if whole else truth.items():
            right = getattr(expected, name).double()
            mine = (found if head is None else found[-1, head]).double()
            error = (mine - right).abs().max()
            if name in ("fai", "received"):
                error = error / right.abs().max()
            errors[name] = max(errors.get(name, 0.0), float(error)) if error == error else float("inf")
    return errors, AUTO.split()[0] if whole else "float64"
