"""Shared by the benchmarks: turns, ratios of the same round, Markdown tables and the files of results."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import statistics
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from attnstats.chance import Coupling


class Series(NamedTuple):
    """The times of a contender in one case."""

    contender: str
    peak_mib: float | None
    seconds: list[float]  # by round

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def over(self, other: Series) -> float:
        return over(self.seconds, other.seconds)

    @property
    def peak(self) -> str:
        return "-" if self.peak_mib is None else f"{self.peak_mib:.0f}"


def over(mine: list[float], theirs: list[float]) -> float:
    """The median of the ratios of the same round, over the rounds that both have."""
    return statistics.median(a / b for a, b in zip(mine, theirs, strict=False))


def in_turn(names: list[str], turn: int) -> list[str]:
    """The names in the order of a round: each round starts with another one."""
    first = turn % len(names)
    return names[first:] + names[:first]


def verdict(hit: bool) -> str:
    return "hit" if hit else "missed"


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def commit() -> str:
    command = ["git", "describe", "--always", "--dirty=+changes", "--abbrev=12"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, check=False)
    return done.stdout.strip()


def short(commit: str) -> str:
    return f"{commit[:9]}{'+changes' if commit.endswith('+changes') else ''}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]], text: Sequence[str] | None = None) -> list[str]:
    """Lines of a Markdown table; all columns but `text`, by default the first one, are aligned to the right."""
    left = header[:1] if text is None else text
    alignment = ["--" if name in left else "--:" for name in header]
    return ["| " + " | ".join(cells) + " |" for cells in (header, alignment, *rows)]


def coupling_row(coupling: Coupling) -> dict[str, Any]:
    """The numbers of a coupling, as results keep them."""
    return {
        "observed": coupling.observed,
        "random": coupling.random,
        "lift": coupling.lift,
        "low": coupling.low,
        "high": coupling.high,
        "p": coupling.p_value,
        "peaks": coupling.count,
    }


def measured(before: str, conditions: dict[str, Any], after: str) -> str:
    """A paragraph with the machine, the versions, the commit and the date between two sentences."""
    versions = [f"{name} {conditions[name]}" for name in ("attnstats", "torch", "transformers") if name in conditions]
    return (
        f"{before} {conditions['cpu']}, {conditions['threads']} threads; {', '.join(versions)}, "
        f"Python {conditions['python']}; commit {short(conditions['commit'])}, {conditions['date']}. {after}"
    )


def markdown(lines: list[str], paragraph: str, notes: list[str]) -> str:
    return "\n".join([*lines, "", paragraph, "", *(f"- {note}" for note in notes), ""])


def write(path: Path, conditions: dict[str, Any], notes: list[str], rows: list[tuple[dict[str, Any], Series]]) -> None:
    """Write JSON with one line for each of `rows`, which are a case and a series."""
    lines = []
    for case, series in rows:
        peak = series.peak_mib and round(series.peak_mib, 1)
        seconds = [round(x, 6) for x in series.seconds]
        lines.append(json.dumps(case | series._replace(peak_mib=peak, seconds=seconds)._asdict()))
    head = json.dumps({"conditions": conditions, "targets": notes}, indent=1)
    separated = ",\n  ".join(lines)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{head[:-2]},\n "series": [\n  {separated}\n ]\n}}\n')
