"""The table of ratios from pytest-benchmark's JSON: `python -m benchmarks.report out/bench.json`, part of `make bench`.

Prints the table and writes cpu.json (every timing, with versions) and cpu.md (the README's table) into a folder,
benchmarks/results by default. A ratio is the median over rounds of one contender's time divided by another's in the
same round, so that a machine that slows down for a while slows both; it isn't exactly the quotient of printed times.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import summary
from benchmarks.summary import Series, verdict

BASE, OURS, EAGER = "SDPA alone", "attnstats", "eager"
HEADER = ("T", "heads", "contender", "ms", "x SDPA", "x attnstats", "peak MiB", "bf16 ms", "bf16 x SDPA")
TEXT = ("heads", "contender")
VERSIONS = ("attnstats", "torch", "triton", "threads", "cores")


Key = tuple[int, str, str, str]  # length, layout, dtype, contender


def collect(document: dict[str, Any]) -> dict[Key, Series]:
    """The series of pytest-benchmark's document, whose benchmarks are single rounds."""
    found: dict[Key, Series] = {}
    for benchmark in sorted(document["benchmarks"], key=lambda b: b["extra_info"]["turn"]):
        info = benchmark["extra_info"]
        key = info["length"], info["layout"], info["dtype"], info["contender"]
        series = found.setdefault(key, Series(info["contender"], info["peak_mib"], []))
        series.seconds.append(benchmark["stats"]["median"])
    # By length, MHA first; contenders as they came in the first round.
    return dict(sorted(found.items(), key=lambda item: (item[0][0], item[0][1] != "MHA")))


def conditions(document: dict[str, Any]) -> dict[str, Any]:
    machine, commit = document["machine_info"], document["commit_info"]
    return {
        "date": document["datetime"][:10],
        "commit": commit.get("id", "unknown") + ("+changes" if commit.get("dirty") else ""),
        "cpu": machine["cpu"].get("brand_raw", "unknown"),
        "python": machine["python_version"],
        **{name: machine[name] for name in VERSIONS},
    }


def rows(found: dict[Key, Series]) -> list[tuple[str, ...]]:
    table: list[tuple[str, ...]] = []
    for (length, layout, dtype, contender), series in found.items():
        if dtype != "float32":
            continue
        base, ours = found[length, layout, dtype, BASE], found[length, layout, dtype, OURS]
        half = found.get((length, layout, "bfloat16", contender))
        half_base = found.get((length, layout, "bfloat16", BASE))
        table.append(
            (
                str(length),
                layout,
                contender,
                f"{series.median * 1e3:.1f}",
                f"{series.over(base):.2f}",
                f"{series.over(ours):.2f}",
                series.peak,
                f"{half.median * 1e3:.1f}" if half else "",
                f"{half.over(half_base):.2f}" if half and half_base else "",
            )
        )
    return table


AT_MOST = {1024: 1.25, 4096: 1.10}  # times SDPA alone, float32
AT_LEAST = {4096: 10.0}  # times faster than eager


def targets(found: dict[Key, Series]) -> list[str]:
    """Hit or missed, by length and layout."""
    lines = []
    for length, layout in dict.fromkeys(key[:2] for key in found):
        base, ours, eager = (found.get((length, layout, "float32", name)) for name in (BASE, OURS, EAGER))
        where = f"T = {length}, {layout}"
        if length in AT_MOST and base and ours:
            cost, most = ours.over(base), AT_MOST[length]
            lines.append(f"{where}: {cost:.2f}x of SDPA alone; target <= {most:.2f}x {verdict(cost <= most)}")
        if length in AT_LEAST and eager and ours:
            gain, least = eager.over(ours), AT_LEAST[length]
            lines.append(f"{where}: {gain:.1f}x faster than eager; target >= {least:.0f}x {verdict(gain >= least)}")
    return lines


def markdown(table: list[tuple[str, ...]], notes: list[str], where: dict[str, Any]) -> str:
    lines = [line.replace("| attnstats |", "| **attnstats** |") for line in summary.table(HEADER, table, TEXT)]
    measured = summary.measured(
        "B1 H9 D64, causal, WAAD(10) + FAI(10, 100), float32 unless it says bf16.",
        where,
        "Peak: resident memory that the call adds, its result included.",
    )
    return summary.markdown(lines, measured, notes)


def write(found: dict[Key, Series], where: dict[str, Any], notes: list[str], folder: Path) -> None:
    cases = [(dict(zip(("length", "layout", "dtype"), key, strict=False)), series) for key, series in found.items()]
    summary.write(folder / "cpu.json", where, notes, cases)
    (folder / "cpu.md").write_text(markdown(rows(found), notes, where))


def main() -> None:
    parser = argparse.ArgumentParser(description="Print and keep the results of `make bench`.")
    parser.add_argument("source", type=Path, help="pytest-benchmark's JSON")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results", help="folder to write")
    arguments = parser.parse_args()
    document = json.loads(arguments.source.read_text())
    found, where = collect(document), conditions(document)
    notes = targets(found)
    table = Table(title="Attention with WAAD(10) + FAI(10, 100); times are medians")
    for name in HEADER:
        table.add_column(name, justify="left" if name in TEXT else "right", no_wrap=True)
    for row in rows(found):
        table.add_row(*row, style="bold" if row[2] == OURS else None, end_section=row[2] == EAGER)
    console = Console(width=max(Console().width, 120))  # a pipe has 80, too few
    console.print(table)
    console.print(*notes, sep="\n", highlight=False)
    write(found, where, notes, arguments.results)
    console.print(f"kept in {arguments.results}", highlight=False)


if __name__ == "__main__":
    main()
