"""Drawn calls and models on every path against float64, each known by a seed and an index.

    make fuzz N=1000                           so many more cases of seed 0
    python -m reliability.fuzz --seed 3 --cases 1000
    python -m reliability.fuzz --case 3:17     one of them again; where it fails, shrunk
    python -m reliability.fuzz --trial "Trial('tiled', Case(query_length=1))"
    python -m reliability.fuzz --again         those that had a fault
    python -m reliability.fuzz --score         the cases that ran, by path

A result is a line of out/fuzz.jsonl. A case depends on its seed and index alone, so a run goes on behind the last line.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

if not torch.cuda.is_available():  # before Triton is imported
    os.environ["TRITON_INTERPRET"] = "1"

from reliability import trials
from reliability.trials import PATHS, Trial
from tests.cases import Case

T = TypeVar("T")
ROOT = Path(__file__).resolve().parent.parent
LEDGER = ROOT / "out" / "fuzz.jsonl"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Seeded:
    """Draws by the seed and the index of a case."""

    def __init__(self, seed: int, index: int) -> None:
        self._random = random.Random(f"{seed}:{index}")

    def integer(self, low: int, high: int) -> int:
        return self._random.randint(low, high)

    def pick(self, options: Sequence[T]) -> T:
        return self._random.choice(options)


def trial_of(seed: int, index: int) -> Trial:
    return trials.drawn(Seeded(seed, index))


def fault(trial: Trial) -> str:
    """What is wrong, in one line; empty: nothing."""
    try:
        trial.run(DEVICE)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:300]
    return ""


def shrunk(trial: Trial) -> Trial:
    """The trial with as many of its fields as possible at their defaults, or small, that still has a fault."""
    kind = _kind(fault(trial))
    smaller = True
    while smaller:
        smaller = False
        for candidate in _smaller(trial):
            if _kind(fault(candidate)) == kind:
                trial, smaller = candidate, True
                break
    return trial


def _kind(message: str) -> str:
    """A fault without its numbers."""
    return re.split(r"[0-9]", message, maxsplit=1)[0]


def _smaller(trial: Trial) -> Iterator[Trial]:
    if trial.also:
        yield dataclasses.replace(trial, also="")
    of = trial.of
    for field in dataclasses.fields(of):
        value = getattr(of, field.name)
        candidates: list[Any] = [field.default] if value != field.default else []
        if isinstance(value, int) and not isinstance(value, bool):
            at_least = 0 if field.name in ("seed", "query_offset", "new") else 1
            candidates = [x for x in (at_least, value // 2, value - 1) if at_least <= x < value]
        elif field.name == "asked":
            candidates = [(i,) for i in value or range(15)] if len(value) != 1 else []
        elif field.name == "packed" and len(value) > 1:
            candidates += [value[:i] + value[i + 1 :] for i in range(len(value))]
        elif field.name in ("window_size", "spread"):
            candidates = candidates[:1]
        for candidate in candidates:
            changes = {field.name: candidate}
            if isinstance(of, Case) and field.name == "query_length" and of.query_length == of.key_length:
                changes["key_length"] = candidate
            try:
                changed = dataclasses.replace(of, **changes)
            except ValueError:
                continue
            if changed != of:
                yield dataclasses.replace(trial, of=changed)


def entries() -> list[dict[str, Any]]:
    """The last line of the ledger of each case; one that a killed run left half written is no result."""
    if not LEDGER.exists():
        return []
    read = [json.loads(line) for line in LEDGER.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    return list({(e["seed"], e["index"]): e for e in read}.values())


def run(cases: Iterable[tuple[int, int]]) -> int:
    """Run cases, each a seed and an index; returns how many have a fault."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    faults = 0
    LEDGER.parent.mkdir(exist_ok=True)
    with LEDGER.open("a", encoding="utf-8") as ledger:
        ledger.write("\n")  # behind what a killed run left half written
        for number, (seed, index) in enumerate(cases, 1):
            start, trial = time.perf_counter(), trial_of(seed, index)
            found = fault(trial)
            entry: dict[str, Any] = {"seed": seed, "index": index, "path": trial.path, "also": trial.also}
            entry |= {"seconds": round(time.perf_counter() - start, 3), "commit": commit}
            if isinstance(trial.of, trials.Model):
                entry["family"] = trial.of.family
            if found:
                faults += 1
                entry |= {"fault": found, "trial": str(trial)}
                print(f"{found}\n  python -m reliability.fuzz --case {seed}:{index}", flush=True)
            ledger.write(json.dumps(entry) + "\n")
            ledger.flush()
            if number % 100 == 0:
                print(f"{number} cases, {faults} faults", flush=True)
    return faults


def score() -> str:
    """A table of what ran, by path."""
    ran = entries()
    lines = ["| path | cases | minutes | faults |", "|---|---:|---:|---:|"]
    for name, of in ((path, [e for e in ran if e["path"] == path]) for path in PATHS):
        lines.append(f"| {name} | {len(of):,} | {_minutes(of)} | {sum('fault' in e for e in of)} |")
    lines.append(f"| all | {len(ran):,} | {_minutes(ran)} | {sum('fault' in e for e in ran)} |")
    also = Counter(e["also"] for e in ran if e["also"])
    families = {e["family"] for e in ran if "family" in e}
    lines += ["", "; ".join(f"{name}: {count:,}" for name, count in also.most_common())]
    lines += [f"{len(families)} families; seeds {sorted({e['seed'] for e in ran})}; commits {_commits(ran)}"]
    return "\n".join(lines)


def _minutes(ran: list[dict[str, Any]]) -> str:
    return f"{sum(e['seconds'] for e in ran) / 60:.1f}"


def _commits(ran: list[dict[str, Any]]) -> str:
    return ", ".join(f"{commit} ({count:,})" for commit, count in Counter(e["commit"] for e in ran).items())


def repeat(trial: Trial) -> int:
    print(f'python -m reliability.fuzz --trial "{trial}"')
    found = fault(trial)
    print(found or "passes")
    if not found:
        return 0
    small = shrunk(trial)
    print(f'shrunk: python -m reliability.fuzz --trial "{small}"\n{fault(small)}')
    return 1


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m reliability.fuzz", description="Differential fuzzing.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, default=1000, help="how many more of the seed's cases (default: 1000)")
    parser.add_argument("--case", metavar="SEED:INDEX", help="run this one again, and shrink it where it fails")
    parser.add_argument("--trial", metavar="EXPRESSION", help="run what this expression makes")
    parser.add_argument("--again", action="store_true", help="run those that had a fault again")
    parser.add_argument("--score", action="store_true", help="print what ran, by path")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)  # the calls are too small for more
    if given.score:
        print(score())
        return 0
    if given.case:
        seed, index = map(int, given.case.split(":"))
        return repeat(trial_of(seed, index))
    if given.trial:
        return repeat(eval(given.trial, vars(trials)))
    ran = entries()
    if given.again:
        return 1 if run([(e["seed"], e["index"]) for e in ran if "fault" in e]) else 0
    begin = 1 + max((e["index"] for e in ran if e["seed"] == given.seed), default=-1)
    return 1 if run((given.seed, index) for index in range(begin, begin + given.cases)) else 0


if __name__ == "__main__":
    sys.exit(main())
