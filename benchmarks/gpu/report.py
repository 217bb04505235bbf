"""Writes the parts' results as JSON, Markdown and a plot, with a verdict on each target.

Nothing is measured here: `enrich` adds the floors that follow from the measured ceilings, and `targets` compares
figures with the targets. A missing figure is "not measured", with the reason.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.gpu import floors
from benchmarks.gpu.contenders import AUTO, BAND, BARE, COLUMN, FLASH, FUSED
from benchmarks.gpu.measure import ratio
from benchmarks.gpu.sweep import best
from benchmarks.summary import short, table

LAYOUT = 1  # of the JSON: another number where the entries of a section change
LONG = ("T = 8k", "T = 32k")  # the cases that targets are set for
OVERHEADS = {"T = 8k": 0.05, "T = 32k": 0.013}
PAPER, BANDWIDTH, COLUMN_OVER_FORWARD, OVER_FLASH = 0.005, 0.70, 0.8, 0.9
GROUPS = {
    "attention": "attention alone",
    "statistics": "attention, WAAD and FAI of every head",
    "band": "WAAD and FAI from an lse",
    "column": "received attention from an lse",
}
COUNTERS = (  # of ncu, shown; the JSON has all
    "Duration", "Compute (SM) Throughput", "Memory Throughput", "DRAM Throughput", "L2 Cache Throughput",
    "Registers Per Thread", "Theoretical Occupancy", "Achieved Occupancy", "Warp Cycles Per Issued Instruction",
)  # fmt: skip
TOP = 4  # configurations shown of a sweep


class Target(NamedTuple):
    what: str
    measured: float | None
    limit: float
    least: bool = False  # the limit is a least one
    note: str = ""  # the contender, or why nothing was measured
    strict: bool = False
    percent: bool = True

    @property
    def verdict(self) -> str:
        if self.measured is None:
            return "not measured"
        if self.strict:
            return "hit" if self.measured < self.limit else "missed"
        return "hit" if (self.measured >= self.limit if self.least else self.measured <= self.limit) else "missed"

    def __str__(self) -> str:
        def shown(value: float) -> str:
            return f"{value * 100:.2f} %" if self.percent else f"{value:.3f}x"

        sign = "<" if self.strict else ">=" if self.least else "<="
        note = f" ({self.note})" if self.note else ""
        measured = "" if self.measured is None else f"{shown(self.measured)}, "
        return f"{self.what}: {measured}target {sign} {shown(self.limit)}: {self.verdict}{note}"


def targets(document: dict[str, Any]) -> list[Target]:
    rows = _rows(document["sections"])
    found: list[Target] = []
    for case in LONG:
        mine = [row for row in rows if row["case"] == case]
        found.append(_overhead(case, mine))
    found += _paper(document["sections"].get("end_to_end", {}).get("rows", []))
    copy = _measured_ceilings(document["sections"]).get("copy")
    for case in LONG:
        by_name = {row["contender"]: row for row in rows if row["case"] == case}
        found += [
            _bandwidth(case, by_name.get(BAND), copy),
            _column(case, by_name),
            _against_rivals(case, by_name),
            _forward(case, by_name),
        ]
    return found


def _rows(sections: dict[str, Any]) -> list[dict[str, Any]]:
    """Those of the part "timing"; of first contact where it did not run."""
    return sections.get("timing", sections.get("first", {})).get("rows", [])


def _measured_ceilings(sections: dict[str, Any]) -> dict[str, float]:
    return sections.get("ceilings", sections.get("first", {})).get("ceilings", {})


def _timed(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row.get("ms")]


def _why(*rows: dict[str, Any] | None) -> str:
    return "; ".join(row["failure"] for row in rows if row and row.get("failure")) or "it did not run"


def _overhead(case: str, rows: list[dict[str, Any]]) -> Target:
    what, limit = f"{case}: WAAD + FAI of all heads over the fastest attention", OVERHEADS[case]
    alone = [row for row in rows if row["group"] == "attention"]
    ours = [row for row in rows if row["group"] == "statistics" and row["ours"]]
    if not _timed(alone) or not _timed(ours):
        return Target(what, None, limit, note=_why(*ours, *alone))
    fastest, best = (min(_timed(group), key=lambda row: row["ms"]) for group in (alone, ours))
    note = f"{best['contender']} over {fastest['contender']}"
    return Target(what, ratio(best, fastest) - 1, limit, note=note)


def _paper(rows: list[dict[str, Any]]) -> list[Target]:
    found = []
    for case in dict.fromkeys(row["case"] for row in rows if row["paper"]):
        ours = [row for row in rows if row["case"] == case and row["ours"]]
        what = f"{case}, over its forward pass"
        measured = [row for row in ours if row.get("overhead") is not None]
        if not measured:
            found.append(Target(what, None, PAPER, note=_why(*ours)))
            continue
        best = min(measured, key=lambda row: row["overhead"])
        found.append(Target(what, best["overhead"], PAPER, note=best["contender"].removeprefix("+ ")))
    return found or [Target("the paper's workload over a model's forward pass", None, PAPER, note=_why())]


def _bandwidth(case: str, band: dict[str, Any] | None, copy: float | None) -> Target:
    what = f"{case}: band, share of the measured copy bandwidth"
    if copy is None or not band or not band.get("ms"):
        return Target(what, None, BANDWIDTH, True, _why(band) if copy else "no ceilings measured")
    return Target(what, band["bytes"] / (band["ms"] / 1e3) / copy, BANDWIDTH, True)


def _column(case: str, mine: dict[str, Any]) -> Target:
    what, pair = f"{case}: column over our forward", (mine.get(COLUMN), mine.get(BARE))
    if len(_timed(row for row in pair if row)) < 2:
        return Target(what, None, COLUMN_OVER_FORWARD, note=_why(*pair), percent=False)
    return Target(what, ratio(*pair), COLUMN_OVER_FORWARD, percent=False)  # type: ignore[arg-type]


def _against_rivals(case: str, mine: dict[str, Any]) -> Target:
    what, ours = f"{case}: column over its fastest rival", mine.get(COLUMN)
    rivals = [row for row in mine.values() if row["group"] == "column" and not row["ours"]]
    if not ours or not ours.get("ms") or not _timed(rivals):
        return Target(what, None, 1.0, note=_why(ours, *rivals), strict=True, percent=False)
    fastest = min(_timed(rivals), key=lambda row: row["ms"])
    return Target(what, ratio(ours, fastest), 1.0, note=fastest["contender"], strict=True, percent=False)


def _forward(case: str, mine: dict[str, Any]) -> Target:
    what, pair = f"{case}: speed of our forward, in FlashAttention 2's", (mine.get(FLASH), mine.get(BARE))
    if len(_timed(row for row in pair if row)) < 2:
        return Target(what, None, OVER_FLASH, True, _why(*pair), percent=False)
    return Target(what, ratio(*pair), OVER_FLASH, True, percent=False)  # type: ignore[arg-type]


def incorrect(sections: dict[str, Any]) -> list[str]:
    """Errors on this device: failed checks, wrong answers of ours."""
    checks = [check for section in sections.values() for check in section.get("failed", {}).items()]
    rows = [row for name in ("first", "timing") for row in sections.get(name, {}).get("rows", [])]
    # Ours alone: beside a private operator of torch's, that operator may be wrong.
    alone = (BARE, FUSED, AUTO, BAND, COLUMN)
    wrong = [r for r in rows if r["contender"] in alone and str(r.get("failure", "")).startswith("wrong")]
    return [f"{name}: {why}" for name, why in checks] + [
        f"{row['case']}, {row['contender']}: {row['failure']}" for row in wrong
    ]


def enrich(document: dict[str, Any]) -> None:
    """Add each timing's floor and share of it, from the ceilings of the same device."""
    measured = _measured_ceilings(document["sections"])
    if len(measured) < len(floors.Ceilings._fields):
        return
    ceilings = floors.Ceilings(**measured)
    sections = document["sections"]
    for row in (row for name in ("first", "timing") for row in sections.get(name, {}).get("rows", [])):
        floor = {"band": floors.band, "column": floors.column}.get(row["group"], floors.forward)
        row["floor_ms"] = round(floor(floors.Shape(**row["shape"]), ceilings) * 1e3, 6)
        if row.get("ms"):
            row["share_of_floor"] = round(row["floor_ms"] / row["ms"], 4)


def in_a_line(name: str, section: dict[str, Any]) -> str:
    if section.get("error"):
        return f"came to no end: {section['error']}"
    if name in ("correctness", "first"):
        return f"{section.get('passed', 0)} passed, {len(section.get('failed', {}))} failed"
    if name == "ceilings":
        return ", ".join(_ceilings(section.get("ceilings", {})))
    rows = section.get("rows", [])
    return f"{len(_timed(rows))} measured, {sum('failure' in row for row in rows)} not"


# Writing


def save(document: dict[str, Any], path: Path) -> None:
    """Write the document, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(_finite(document), indent=1, allow_nan=False) + "\n")
    beside.replace(path)


def _finite(value: Any) -> Any:
    """JSON has no infinity."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write(document: dict[str, Any], path: Path) -> str | None:
    """Write JSON, Markdown and the plot; return why there is no plot, if there is none."""
    enrich(document)
    document["targets"] = [target._asdict() | {"verdict": target.verdict} for target in targets(document)]
    save(document, path)
    path.with_suffix(".md").write_text(markdown(document))
    rows = [row for row in document["sections"].get("timing", {}).get("rows", []) if row["main"] and row.get("ms")]
    if not rows:
        return None
    try:
        plot(rows, document, path.with_suffix(".png"))
    except ImportError as error:
        return f"no plot: {error}; pip install '.[bench]' has matplotlib"
    return None


def markdown(document: dict[str, Any]) -> str:
    sections = document["sections"]
    lines = [*_heading(sections), "", "## Targets", "", *(f"- {target}" for target in targets(document)), ""]
    writers = {
        "first": _write_first, "ceilings": _write_ceilings, "correctness": _write_correctness, "timing": _write_timing,
        "end_to_end": _write_models, "sweep": _write_sweep,
    }  # fmt: skip
    for name, writer in writers.items():
        if section := sections.get(name):
            lines += [f"## {name.replace('_', ' ').capitalize()}", "", *_provenance(section), *writer(section)]
            lines += [f"- left out: {what}: {why}" for what, why in section.get("left_out", [])]
            lines += [f"- failed: {what}: {why}" for what, why in section.get("failures", {}).items()]
            lines += [""]
    return "\n".join(lines)


def _heading(sections: dict[str, Any]) -> list[str]:
    conditions: dict[str, Any] = next((s["conditions"] for s in reversed(sections.values()) if s.get("conditions")), {})
    lines = [f"# {conditions.get('device', 'unknown device')}"]
    if conditions.get("interpreter"):
        lines += ["", "**A smoke run on a CPU, kernels in Triton's interpreter: its figures mean nothing.**"]
    return lines


def _provenance(section: dict[str, Any]) -> list[str]:
    c = section.get("conditions", {})
    clocks = c.get("clocks") or {}
    commit = c.get("commit") or "unknown"
    parts = [
        c.get("date"),
        f"commit {short(commit)}",
        *(f"{name} {c[name]}" for name in ("torch", "triton", "transformers", "cuda", "cudnn") if c.get(name)),
        f"ptxas {c['ptxas']}" if c.get("ptxas") else None,
        f"driver {clocks['driver_version']}" if clocks else None,
        ", ".join(f"{k} {v}" for k, v in clocks.items() if k != "driver_version") if clocks else None,
        f"{section.get('seconds', 0):.0f} s",
    ]
    lines = ["; ".join(str(part) for part in parts if part) + ".", ""]
    if section.get("error"):
        lines += [f"**Came to no end: {section['error']}**", ""]
    return lines


def _ceilings(measured: dict[str, float]) -> list[str]:
    units = {"copy": (1e12, "TB/s copied"), "matmul": (1e12, "TFLOPS of bf16 matmul"), "exp2": (1e12, "T exp2/s")}
    return [f"{value / units[name][0]:.3g} {units[name][1]}" for name, value in measured.items()]


def _write_ceilings(section: dict[str, Any]) -> list[str]:
    lines = [f"- {line}" for line in _ceilings(section.get("ceilings", {}))]
    if loaded := section.get("clocks_under_load"):
        lines += [f"- under matmuls: {', '.join(f'{k} {v}' for k, v in loaded.items() if k != 'driver_version')}"]
    return lines


def _write_correctness(section: dict[str, Any]) -> list[str]:
    failed = section.get("failed", {})
    lines = [f"{section.get('passed', 0)} checks passed, {len(failed)} failed.", ""]
    kinds: dict[str, int] = {}
    for name, check in section.get("checks", {}).items():
        kinds[name.partition(":")[0]] = kinds.get(name.partition(":")[0], 0) + check["ok"]
    lines += [f"- {kind}: {count} passed" for kind, count in kinds.items()]
    return lines + [f"- **WRONG** {name}: {why}" for name, why in failed.items()]


def _write_first(section: dict[str, Any]) -> list[str]:
    steps = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in section.get("steps", {}).items())
    lines = [f"Steps: {steps}.", "", *_write_ceilings(section), "", *_write_correctness(section), ""]
    lines += _write_timing(section)
    launches = section.get("counters", [])
    shown = [name for name in COUNTERS if any(name in launch["counters"] for launch in launches)]
    if launches:
        cells = [(x["kernel"], x["grid"], *(x["counters"].get(name, "") for name in shown)) for x in launches]
        lines += [*table(("kernel", "grid", *shown), cells, text=("kernel", "grid")), ""]
    return lines


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _write_timing(section: dict[str, Any]) -> list[str]:
    lines = []
    for case in dict.fromkeys(row["case"] for row in section.get("rows", [])):
        mine = [row for row in section["rows"] if row["case"] == case]
        shape = floors.Shape(**mine[0]["shape"])
        heads = f"Hq{shape.query_heads} Hkv{shape.key_heads} D{shape.head_dim}"
        lines += [f"### {case}", "", f"B{shape.batch} {heads}, causal, bf16.", ""]
        alone = _timed(row for row in mine if row["group"] == "attention")
        fastest = min(alone, key=lambda row: row["ms"], default=None)
        header = ("contender", "ms", "x fastest attention", "share of floor", "host us", "peak MiB")
        for group, title in GROUPS.items():
            members = [row for row in mine if row["group"] == group]
            if members:
                cells = [_cells(row, fastest) for row in members]
                lines += [*table((title, *header[1:]), cells), ""]
    return lines


def _cells(row: dict[str, Any], fastest: dict[str, Any] | None) -> tuple[str, ...]:
    name = f"**{row['contender']}**" if row["ours"] else row["contender"]
    if not row.get("ms"):
        return name, row.get("failure", "not timed"), "", "", "", ""
    over = ratio(row, fastest) if fastest else None
    return (
        name,
        f"{row['ms']:.4g}",
        _number(over, ".3f"),
        _number(row.get("share_of_floor"), ".0%"),
        _number(row.get("host_us"), ".0f"),
        _number(row.get("peak_mib"), ".0f"),
    )


def _write_models(section: dict[str, Any]) -> list[str]:
    lines = [
        "Shares are of a forward pass with log-probs. The paper reports 2.0-3.3 % of a training step, which is many "
        "passes, for its own pass with eager attention (Table 8).",
        "",
    ]
    for case in dict.fromkeys(row["case"] for row in section.get("rows", [])):
        cells = []
        for row in (r for r in section["rows"] if r["case"] == case):
            name = f"**{row['contender']}**" if row["ours"] else row["contender"]
            if row.get("ms"):
                spread = f"{row['low_ms']:.4g} - {row['high_ms']:.4g}"
                over = _number(row.get("overhead"), "+.2%") if row["contender"] != "log-probs" else ""
                cells.append((name, f"{row['ms']:.4g}", spread, over, _number(row.get("peak_mib"), ".0f")))
            else:
                cells.append((name, row.get("failure", "not timed"), "", "", ""))
        lines += [f"### {case}", ""]
        lines += [*table(("forward pass", "ms", "quartiles", "added to log-probs", "peak MiB"), cells), ""]
    return lines


def _write_sweep(section: dict[str, Any]) -> list[str]:
    lines = [
        "The best by head size, as rows of attnstats/triton/configs.py, and their time over the shipped one's:",
        "",
        "```",
    ]
    for kernel, by_dim in best(section.get("rows", [])).items():
        entries = ", ".join(f"{dim}: Config{tuple(config)}" for dim, (config, _) in sorted(by_dim.items()))
        over = ", ".join(f"{ratio:.3f}" for _, (_, ratio) in sorted(by_dim.items()))
        lines.append(f'"{kernel}": {{{entries}}},  # {over}')
    lines += ["```", ""]
    for job in dict.fromkeys(row["job"] for row in section.get("rows", [])):
        mine = sorted(
            _timed(r for r in section["rows"] if r["job"] == job), key=lambda r: r.get("over_shipped") or r["ms"]
        )
        cells = []
        for place, row in enumerate(mine, 1):
            if place <= TOP or row.get("shipped"):
                what = "**shipped**" if row.get("shipped") else f"{row['BM']}x{row['BN']}"
                options = "" if row.get("shipped") else f"{row['num_warps']} warps, {row['num_stages']} stages"
                cells.append((f"{place}. {what}", options, f"{row['ms']:.4g}", _number(row.get("over_shipped"), ".3f")))
        unable = sum(r["job"] == job and not r.get("ms") for r in section["rows"])
        lines += [f"### {job}", "", f"{len(mine)} timed, {unable} can't run.", ""]
        lines += [*table(("tiles", "options", "ms", "x shipped"), cells), ""]
    return lines


def plot(rows: list[dict[str, Any]], document: dict[str, Any], path: Path) -> None:
    """Time over length by contender, and what statistics add to the fastest attention."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 5.5), layout="constrained")
    for name in dict.fromkeys(row["contender"] for row in rows if row["group"] in ("attention", "statistics")):
        mine = sorted((row for row in rows if row["contender"] == name), key=lambda row: row["length"])
        style = "-o" if mine[0]["ours"] else ":x" if mine[0]["group"] == "attention" else "--s"
        left.plot([row["length"] for row in mine], [row["ms"] for row in mine], style, markersize=4, label=name)
    by_case: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_case.setdefault(row["case"], []).append(row)
    added: dict[str, list[tuple[int, float]]] = {}
    for members in by_case.values():
        alone = [row for row in members if row["group"] == "attention"]
        if not alone:
            continue
        fastest = min(alone, key=lambda row: row["ms"])
        for row in members:
            if row["group"] == "statistics":
                added.setdefault(row["contender"], []).append((row["length"], ratio(row, fastest)))
    for name, points in added.items():
        points.sort()
        right.plot(*zip(*points, strict=True), "-o" if "attnstats" in name else "--s", markersize=4, label=name)
    left.set(xscale="log", yscale="log", xlabel="tokens", ylabel="ms", title="Time of a call")
    right.set(
        xscale="log",
        yscale="log",
        xlabel="tokens",
        ylabel="x fastest attention alone",
        title="WAAD and FAI of all heads",
    )
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    conditions = document["sections"]["timing"].get("conditions", {})
    commit = (conditions.get("commit") or "")[:9]
    title = f"{conditions.get('device')}, torch {conditions.get('torch')}, commit {commit}, {conditions.get('date')}"
    figure.suptitle(title + (" (smoke run: means nothing)" if conditions.get("interpreter") else ""), fontsize=10)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
