"""The tables of `attnstats couplings`, the paper's with its numbers beside ours, and the same numbers as JSON."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from typing import Any

from rich import box
from rich.console import RenderableType
from rich.table import Table

from attnstats.chance import Coupling
from attnstats.heads import SHAPED
from attnstats.study.couplings import CorpusTables, Row
from attnstats.study.perturb import OverlapTest

# Li et al., arXiv 2510.13554v2: Qwen3-4B-Base on 70 GSM8K problems.
TABLE_2 = ((0.3608, 0.2386), (0.6084, 0.2241), (0.5253, 0.3687))  # observed, random
TABLE_10 = {"top third": (0.38, 2.96, 0.60), "middle third": (0.26, 1.27, 0.26), "bottom third": (0.52, 1.05, 0.37)}
TABLE_1 = (0.534, 0.631, 0.8714)  # overlap after high, after low FAI; share of trials with less after high
DENSITIES = {"fai": "22.4 %", "waad": "about 18 %: half of 36.87 %"}
UNRANKED = f"no response has {SHAPED} values of what they receive"
COUPLINGS = ("1: entropy", "2: same peaks", "3: follow")  # in the order of Table 2
NAMES = {"waad": "WAAD", "fai": "FAI", "receiver_fai": "receiver FAI", "entropy": "entropy"}


def render(tables: CorpusTables, tests: dict[str, OverlapTest]) -> Iterator[RenderableType]:
    """The tables, in the paper's order."""
    if tests:
        yield table_1(tests)
    yield table_2(tables)
    yield peaks(tables)
    if any(row.setting == "layers" for row in tables.rows):
        yield table_10(tables)
    yield table_20(tables)
    yield variants(tables)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    return table


def table_1(tests: dict[str, OverlapTest]) -> Table:
    table = _table(
        "Table 1: overlap of content words after a token was replaced",
        "tokens forced", "at high FAI", "at low FAI", "lower at high FAI", "p", "low - high, 95 %", "trials",
    )  # fmt: skip
    for name, test in tests.items():
        table.add_row(
            name, f"{test.high:.3f}", f"{test.low:.3f}", _percent(test.lower), _p(test.p_value),
            _interval(test.difference_low, test.difference_high, "{:+.3f}".format), str(test.count),
        )  # fmt: skip
    table.add_row("the paper", *(f"{value:.3f}" for value in TABLE_1[:2]), _percent(TABLE_1[2]), "", "", "70")
    return _with_reasons(table, tests.values())


def table_2(tables: CorpusTables) -> Table:
    table = _table(
        f"Table 2: couplings over {tables.responses} responses, {tables.tokens} tokens",
        "coupling", "observed", "random", "lift", "95 %", "p", "peaks", "paper:", "random", "lift",
    )  # fmt: skip
    for i, (ours, (observed, random)) in enumerate(zip(tables.rows[0].couplings or (), TABLE_2, strict=False), 1):
        table.add_row(
            f"{i}: {ours.name}", f"{ours.observed:.4f}", f"{ours.random:.4f}", _lift(ours.lift),
            _interval(ours.low, ours.high, _lift), _p(ours.p_value), str(ours.count),
            f"{observed:.4f}", f"{random:.4f}", _lift((observed - random) / random),
        )  # fmt: skip
    return _with_reasons(table, tables.rows[0].couplings or ())


def peaks(tables: CorpusTables) -> Table:
    table = _table("Peaks per token, heads and sets", "share of", "ours", "paper")
    for name, density in tables.rows[0].densities.items():
        table.add_row(NAMES[name], _percent(density), DENSITIES.get(name, "not given"))
    table.add_section()
    table.add_row("receiver heads that are global heads", f"{tables.receivers_global} of {tables.receivers}", "")
    if tables.unranked:
        table.add_row(f"heads not ranked as receivers: {UNRANKED}", str(tables.unranked), "")
    for name, share in tables.sets.items():
        table.add_row(f"tokens in the sets of Eq. 14-18: {name}", _percent(share), "")
    return table


def table_10(tables: CorpusTables) -> Table:
    table = _table("Table 10: lift (p) by depth", "heads of", *(c for name in COUPLINGS for c in (name, "paper")))
    for row in tables.rows:
        if row.setting == "layers" and row.value in TABLE_10 and row.couplings:
            both = zip(row.couplings, TABLE_10[row.value], strict=True)
            table.add_row(row.value, *(cell for ours, paper in both for cell in (_cell(ours), _lift(paper))))
    shown = [row.couplings or () for row in tables.rows if row.setting == "layers" and row.value in TABLE_10]
    return _with_reasons(table, itertools.chain.from_iterable(shown))


def table_20(tables: CorpusTables) -> Table:
    reach = sorted({offset for _, _, offset in tables.offsets})
    columns = (f"{offset:+d}" for offset in reach)
    table = _table(
        "Table 20: lift (p) of a peak near a peak, by offset in tokens", "of peaks of", "with one of", *columns
    )
    table.columns[1].justify = "left"
    for of, near in dict.fromkeys((of, near) for of, near, _ in tables.offsets):
        table.add_row(NAMES[of], NAMES[near], *(_cell(tables.offsets[of, near, offset]) for offset in reach))
    return _with_reasons(table, tables.offsets.values())


def variants(tables: CorpusTables) -> Table:
    table = _table(
        "What the paper leaves open: lift (p) under other settings",
        "setting", "value", "WAAD peaks", "FAI peaks", *COUPLINGS,
    )  # fmt: skip
    table.columns[1].justify = "left"
    for row in tables.rows:
        if row.couplings is None:
            table.add_row(row.setting, row.value, "no heads", "of a kind")
            continue
        densities = (_percent(row.densities["waad"]), _percent(row.densities["fai"]))
        table.add_row(row.setting, row.value, *densities, *map(_cell, row.couplings))
    _with_reasons(table, itertools.chain.from_iterable(row.couplings or () for row in tables.rows))
    if any(row.couplings is None for row in tables.rows):
        table.caption = f"{table.caption}; no heads: {UNRANKED}" if table.caption else f"no heads: {UNRANKED}"
    return table


def _with_reasons(table: Table, rows: Iterable[Coupling | OverlapTest]) -> Table:
    """The table with a line under it that says why some of its rows have a dash for an interval and for p."""
    if reasons := {row.reason for row in rows if row.reason}:
        table.caption = f"-: {'; '.join(sorted(reasons))}"
    table.caption_justify = "left"
    return table


def _interval(low: float, high: float, shown: Callable[[float], str]) -> str:
    return "-" if math.isnan(low) else f"{shown(low)} .. {shown(high)}"


def _cell(coupling: Coupling) -> str:
    return f"{_lift(coupling.lift)} ({_p(coupling.p_value)})"


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{100 * share:.1f} %"


def _lift(lift: float) -> str:
    return "-" if math.isnan(lift) else f"{100 * lift:+.0f} %"


def _p(p_value: float) -> str:
    return "-" if math.isnan(p_value) else f"{p_value:.4f}" if p_value < 0.01 else f"{p_value:.2f}"


def as_json(tables: CorpusTables, tests: dict[str, OverlapTest]) -> dict[str, Any]:
    """All numbers of the tables as JSON, with null for NaN."""
    return {
        "responses": tables.responses,
        "response_tokens": tables.tokens,
        "heads": {
            "layers": len(tables.profiles.tokens.layers),
            "per_layer": tables.profiles.tokens.distance.shape[1],
            "local": tables.local,
            "global": tables.global_,
            "receivers": tables.receivers,
            "not_ranked_as_receivers": tables.unranked,
            "receivers_that_are_global": tables.receivers_global,
        },
        "perturbation": {
            name: _finite({**asdict(test), "reason": test.reason or None}) for name, test in tests.items()
        },
        "couplings": _row(tables.rows[0])["couplings"],
        "densities": _finite(tables.rows[0].densities),
        "sets": _finite(tables.sets),
        "offsets": [
            {"of": of, "near": near, "offset": offset, **_coupling(coupling)}
            for (of, near, offset), coupling in tables.offsets.items()
        ],
        "settlements": [_row(row) for row in tables.rows],
    }


def _row(row: Row) -> dict[str, Any]:
    return {
        "setting": row.setting,
        "value": row.value,
        "densities": _finite(row.densities),
        "couplings": [_coupling(coupling) for coupling in row.couplings or ()],
    }


def _coupling(coupling: Coupling) -> dict[str, Any]:
    """A coupling with its lift, and the reason if it has no interval and no p."""
    return _finite({**asdict(coupling), "lift": coupling.lift, "reason": coupling.reason or None})


def _finite(record: dict[str, Any]) -> dict[str, Any]:
    """A record with rounded numbers, and None for those that are not finite."""

    def number(value: Any) -> Any:
        if not isinstance(value, float):
            return value
        return round(value, 6) if math.isfinite(value) else None

    return {key: number(value) for key, value in record.items()}
