"""Machine code of every shipped configuration, and a model of its time: `python -m benchmarks.compile_report`.

Needs no GPU. Compiles what attnstats/triton/launch would launch for each target, reads registers, spills and loops from
the machine code (sass.py), models the time of a few shapes on an H100 (schedule.py, model.py), checks the budgets
(budgets.py) and compares with what results/compile.json has of the same Triton. The exit status is 1 if a budget that
was met is broken, one is missed that isn't a known miss, or a known miss got worse. `--update` writes this Triton's
part of results/compile.json, and compile.md with all parts; with another Triton on PYTHONPATH it writes that one's.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import dataclasses
import json
import multiprocessing
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import calibrate, sass
from benchmarks.budgets import BUDGETS, FASTEST, HOPPER, Budget
from benchmarks.model import CARDS, HBM, L2, column_tiles, forward_tiles, model, resident, seconds
from benchmarks.schedule import HBM_LATENCY, L2_LATENCY, play

RESULTS = Path(__file__).parent / "results"
LENGTHS = (2048, 8192, 32768)
HEADS, KEY_HEADS = 32, 8  # of the modelled shapes; batch 1, causal
TIMED = "sm_90"  # the one target whose machine code schedule.py plays
SLACK = 1.02  # a known miss may get worse by this factor before it fails: compilers differ a little

# Names of requests: the statistics, and True for attention, False for statistics from an lse.
REQUESTS: dict[str, tuple[str, bool]] = {
    "attention": ("", True),
    "attention + WAAD + FAI": ("WAAD(10), FAI(10, 100)", True),
    "attention + Entropy": ("Entropy()", True),
    "attention + MeanDistance": ("MeanDistance()", True),
    "attention + Entropy + MeanDistance + MaxLogit": ("Entropy(), MeanDistance(), MaxLogit()", True),
    "attention + SegmentMass": ("SegmentMass((0, 64, 128, 192, 256, 320, 384, 448, None))", True),
    "attention + TopKeys(1)": ("TopKeys()", True),
    "band WAAD + FAI": ("WAAD(10), FAI(10, 100)", False),
    "column Received": ("Received()", False),
    "column FAI(10, open)": ("FAI(10, None)", False),
    "rows Entropy + MeanDistance": ("Entropy(), MeanDistance()", False),
    "rows SegmentMass": ("SegmentMass((0, 64, 128, 192, 256, 320, 384, 448, None))", False),
    "top TopKeys(1)": ("TopKeys()", False),
    "top TopKeys(8)": ("TopKeys(8)", False),
}
ALL = tuple(REQUESTS)
BACKWARD = {  # statistics that have gradients
    "gradients": "",
    "gradients, of statistics too": "WAAD(10), FAI(10, 100), FAI(10, None), Entropy(), MeanDistance()",
}
MAIN = (
    "attention",
    "attention + WAAD + FAI",
    "attention + Entropy + MeanDistance + MaxLogit",
    "band WAAD + FAI",
    "column Received",
)
OF_KEYS = ("attention + SegmentMass", "attention + TopKeys(1)", "top TopKeys(8)")


@dataclass(frozen=True)
class Case:
    target: str
    dim: int
    dtype: str
    request: str
    layout: str = "causal"

    @property
    def name(self) -> str:
        return f"{self.target} D{self.dim} {self.dtype} {self.layout}: {self.request}"


_PAPER, _, _BAND, _COLUMN = MAIN[1:]
CASES = (
    *(Case("sm_90", 128, "bfloat16", request) for request in ALL),
    *(Case("sm_90", dim, "bfloat16", request) for dim in (64, 256) for request in (*MAIN, *OF_KEYS)),
    *(Case("sm_90", 128, "bfloat16", request, "weighted queries") for request in (_PAPER, _BAND, _COLUMN)),
    *(Case("sm_90", 64, "float16", request, "full, padded") for request in (_PAPER, _COLUMN)),
    *(Case("sm_90", 128, "bfloat16", request, "window, softcap, sinks") for request in (_PAPER, _COLUMN)),
    *(Case("sm_90", 128, "bfloat16", request, "packed") for request in (_PAPER, _BAND, _COLUMN, *BACKWARD)),
    *(
        Case(target, dim, "float16" if target == "gfx942" else "bfloat16", _BAND, "pages")
        for target in CARDS
        for dim in (64, 128, 256)
    ),
    Case("sm_90", 128, "float32", _BAND, "pages"),
    Case("sm_90", 128, "bfloat16", "attention", "decode"),
    Case("sm_90", 128, "bfloat16", "attention", "tiles of forward_loop"),
    *(Case("sm_90", dim, "float32", request) for dim in (64, 128, 256) for request in (_PAPER, _BAND, _COLUMN)),
    *(Case("sm_90", dim, "bfloat16", request) for dim in (64, 128, 256) for request in BACKWARD),
    *(
        Case(target, dim, "float16" if target == "gfx942" else "bfloat16", request)
        for target in CARDS
        if target != "sm_90"
        for dim in (64, 128, 256)
        for request in (*MAIN[1:], *OF_KEYS, *BACKWARD)
    ),
    *(Case("sm_90", dim, "float32", request) for dim in (64, 256) for request in OF_KEYS),
    *(Case("sm_90", 128, "bfloat16", request, "window, softcap, sinks") for request in BACKWARD),
    *(Case("sm_90", 64, "float16", request, "full, padded") for request in BACKWARD),
    *(Case("sm_90", 128, "bfloat16", request, "dropout") for request in ("attention", "gradients")),
    *(Case("sm_90", dim, "float32", "gradients") for dim in (64, 128, 256)),
)


def compiled_case(case: Case) -> list[dict[str, Any]]:
    """Compiles a case's launches. Runs in a process without TRITON_INTERPRET."""
    import torch

    import attnstats
    from attnstats.core.arguments import resolve, with_dropout_seed
    from attnstats.core.autograd import Residuals
    from attnstats.core.options import Options
    from attnstats.core.paging import PagedKeys, Pages
    from attnstats.kernels.tiles import FIELDS
    from attnstats.triton import backend
    from attnstats.triton.configs import candidates, configured, targeting
    from benchmarks.aot import compiled, recorded, resources

    text, attends = REQUESTS.get(case.request) or (BACKWARD[case.request], False)
    statistics = eval(f"({text}{',' if text else ''})", vars(attnstats))
    dtype = getattr(torch, case.dtype)
    queries, keys = (1, 4096) if case.layout == "decode" else (512, 512)
    query = torch.empty(2, 8, queries, case.dim, dtype=dtype)
    key = torch.empty(2, 2, keys, case.dim, dtype=dtype)
    options: dict[str, Any] = {}
    if case.layout == "full, padded":
        options = {"is_causal": False, "key_padding_mask": torch.ones(2, keys, dtype=torch.bool)}
    elif case.layout == "window, softcap, sinks":
        options = {"window_size": (255, 0), "softcap": 30.0, "sinks": torch.zeros(8)}
    elif case.layout == "weighted queries":
        options = {"query_weight": torch.ones(2, 512)}
    elif case.layout in ("packed", "pages"):
        query, key = (x.reshape(1, -1, 2 * x.shape[2], case.dim) for x in (query, key))
        options = {"cu_seqlens_q": torch.tensor([0, 512, 1024], dtype=torch.int32), "max_seqlen_q": 512}
    paged = None
    if case.layout == "pages":
        table, boundaries = torch.zeros(2, 64, dtype=torch.int32), options["cu_seqlens_q"]
        pages = Pages(table, boundaries, torch.tensor([1000, 1000], dtype=torch.int32), 1024)
        paged = PagedKeys(torch.empty(256, 16, 2, case.dim, dtype=dtype), pages, pages.layout(100))
        key = paged.stand_in().transpose(0, 1)[None]
        options |= {"cu_seqlens_k": paged.layout.cu_seqlens, "max_seqlen_k": paged.layout.total}
    dropout_p = 0.1 if case.layout == "dropout" else 0.0
    call = Options(statistics=statistics, enable_gqa=True, dropout_p=dropout_p, **options)
    geometry = with_dropout_seed(resolve(query, key, key, call))
    if paged:
        key, geometry = paged.cache.transpose(1, 2), dataclasses.replace(geometry, paged=paged, memo={})
    rows = torch.zeros(query.shape[:3])
    tiles: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if case.layout == "tiles of forward_loop":
        with targeting(case.target):
            tiles = configured("forward", next(candidates("forward_loop", query.device, dtype, case.dim)))
    with recorded(case.target) as launches, tiles:
        if attends:
            backend.attend(query, key, key, geometry)
        elif case.request in BACKWARD:
            residuals = Residuals(query, key, key, query, rows, rows, rows)
            backend.gradients(residuals, query, geometry, dict.fromkeys(statistics, (rows, rows)))
        else:
            backend.from_lse(query, key, rows, geometry)
    found = []
    for launch in launches:
        used = resources(compiled(launch, case.target))
        shape = {name: value for name, value in launch.constants.items() if isinstance(value, int)}
        shape["with_value"] = int("FROM_LSE" in shape and not shape["FROM_LSE"])
        for name, value in launch.constants.items():
            if isinstance(value, tuple):
                shape[name] = len(value) // FIELDS.value
        record = {
            "kernel": launch.kernel.__name__,
            "config": list(launch.config),
            "registers": used.registers,
            "spilled_bytes": used.spilled_bytes,
            "shared_bytes": used.shared_bytes,
            "shape": shape,
        }
        found.append(record | read(case, record, used.listing))
    return found


def read(case: Case, record: dict[str, Any], listing: str) -> dict[str, Any]:
    """Forbidden instructions of the machine code, and each loop that does matmuls."""
    instructions = (sass.parse_amd if case.target.startswith("gfx") else sass.parse_nvidia)(listing)
    heavy = [loop for loop in sass.loops(instructions) if loop.innermost and _weight(loop)]
    most = max(map(_weight, heavy), default=0)
    heavy = [loop for loop in heavy if 16 * _weight(loop) >= most]
    shape, warps = record["shape"], record["config"][2]
    programs = resident(record["registers"], record["shared_bytes"], warps, CARDS[case.target])
    rows = shape.get("BM", 0) * shape.get("HEADS", 1)
    depth = shape.get("BLOCK_DIM", 0) + shape["with_value"] * shape.get("BLOCK_VALUE_DIM", 0)
    described: list[dict[str, Any]] = []
    before_band = len(heavy)
    if shape.get("BAND_ROWS") and shape["with_value"]:
        before_band = 2 + ("window" in case.layout)
    for i_loop, loop in enumerate(heavy):
        # The loops of the forward's epilogue have one matmul, on tiles of their own, and come last.
        band = record["kernel"] == "band" or i_loop >= before_band or _weight(loop) < 0.7 * most
        elements = rows * (shape.get("BAND_BN", shape["BN"]) if band else shape["BN"])
        total = sum(loop.counts.values())
        described.append(
            {
                "role": "band" if band else "main",
                "elements": elements,
                "macs": loop.macs_per_warp * warps or elements * (shape["BLOCK_DIM"] if band else depth),
                "serialised": sass.serialised(loop),
                "instructions": loop.counts | _fma(loop.body),
                "per_element": round(total * warps * CARDS[case.target].lanes / elements, 3),
                "matmul": sorted({i.opcode.split(".")[0] for i in loop.body if sass.kind_of(i.opcode) == "tensor"}),
                "opcodes": sass.digest(loop),
            }
            | _played(case, loop.body, programs, warps)
        )
    tiles = sorted((x for x in described if x["role"] == "main"), key=lambda x: x["per_element"])
    for described_loop in tiles[1:]:
        described_loop["role"] = "edge"  # the same with masks
    once = sass.outside(instructions, heavy)
    return {
        "resident": programs,
        "loops": described,
        "once": {"macs": sass.macs_per_warp(once) * warps} | _played(case, once, programs, warps, HBM_LATENCY),
        "local": sum(sass.kind_of(i.opcode) == "local" for i in instructions),
        "forbidden": sorted({i.opcode for i in instructions if sass.forbidden(i)}),
    }


def _played(
    case: Case, code: Sequence[sass.Instruction], programs: int, warps: int, memory: float = L2_LATENCY
) -> dict[str, Any]:
    """The clocks that a multiprocessor takes for one pass of one program, and the unit that is busiest."""
    if case.target != TIMED or not programs:
        return {}
    played = play(code, programs, warps, memory=memory)
    busiest = max(played.busy, key=lambda unit: played.busy[unit])
    return {"cycles": round(played.cycles), "busiest": f"{busiest} {played.busy[busiest]:.0%}"}


def _weight(loop: sass.Loop) -> int:
    """The amount of matmul in a loop. In float32 NVIDIA computes it with FMA alone."""
    counts = loop.counts
    return loop.macs_per_warp or counts["tensor"] or (counts["fma"] if counts["fma"] > 256 else 0)


def _fma(instructions: Sequence[sass.Instruction]) -> dict[str, int]:
    ffma = sum(i.opcode.startswith(("FFMA", "v_fma", "v_pk_fma")) for i in instructions)
    return {"fma results": sass.operations(instructions, "fma"), "ffma": ffma}


def timed(
    case: Case, record: dict[str, Any], length: int, heads: int = HEADS, key_heads: int = KEY_HEADS
) -> dict[str, Any] | None:
    """The modelled time of a launch, in microseconds, of one sequence; None where there is no model."""
    shape, kernel = record["shape"], record["kernel"]
    modelled = case.target == TIMED and case.layout in ("causal", "full") and not kernel.startswith("backward")
    if not modelled or not record["loops"] or not record["resident"]:
        return None
    bm, bn = shape["BM"], shape["BN"]
    tensor = case.dtype != "float32"

    def cost(part: dict[str, Any]) -> float:
        return seconds(part["cycles"], part["macs"] if tensor else 0)

    by_role = {role: [cost(x) for x in record["loops"] if x["role"] == role] for role in ("main", "edge", "band")}
    main = (by_role["main"] or by_role["band"])[0]
    edge, fixed = max([main, *by_role["edge"]]), cost(record["once"])
    band = sum(n * c for n, c in zip(_band_trips(record), by_role["band"], strict=True))
    row_bytes = shape["DIM"] * (4 if case.dtype == "float32" else 2)

    blocks = range(-(-length // (bn if kernel == "column" else bm)))
    programs: list[float] = []
    l2 = 0.0
    for block in blocks if kernel == "column" else reversed(blocks):  # the longest first, as they are launched
        whole, partly = 0, 0
        if case.layout == "full":
            whole = -(-length // bn)
        elif kernel != "band":
            count = forward_tiles if kernel == "forward" else column_tiles
            whole, partly = count(block, length, length, 0, bm, bn)
        programs.append(whole * main + partly * edge + band + fixed)
        streamed = bm if kernel == "column" else bn * (1 + shape["with_value"])
        l2 += row_bytes * ((whole + partly) * streamed + _band_steps(shape) * _band_width(shape) + bm + bn)
    tiles = heads // shape.get("HEADS", 1)
    once_read = length * (heads * (row_bytes + 4) + key_heads * row_bytes)  # q, lse, k
    once_read += shape["with_value"] * length * (heads + key_heads) * row_bytes  # output, v
    columns = shape.get("BAND_COLUMNS", shape.get("COLUMNS", 0))
    rows = shape.get("BAND_ROWS", shape.get("ROWS", 0)) + shape.get("LOOP_ROWS", 0)
    floor = once_read + 4 * (rows + columns) * length * heads
    slots = -(-shape.get("BEHIND", 0) // bm) if _band_steps(shape) else 0  # beyond the one that counts as the result
    slot_bytes = 4 * columns * length * heads
    times = model(programs * tiles, record["resident"], floor + slot_bytes * slots, l2 * tiles)
    beside = 2 * slot_bytes * (slots + 1) / L2 if slots else 0.0  # zeroed before, summed after: they fit L2
    found = times._asdict() | {"total": times.total + beside, "beside": beside, "floor": floor / HBM}
    return {name: round(1e6 * value, 2) if isinstance(value, float) else value for name, value in found.items()}


def _band_width(shape: dict[str, int]) -> int:
    return shape.get("BAND_BN", shape["BN"])


def _band_steps(shape: dict[str, int]) -> int:
    """Key tiles of the band of one query block."""
    if not any(shape.get(name) for name in ("ROWS", "BAND_ROWS", "BAND_COLUMNS")):
        return 0
    return -(-shape["BEHIND"] // _band_width(shape)) + -(-shape["BM"] // _band_width(shape))


def _band_trips(record: dict[str, Any]) -> list[int]:
    """The number of iterations of each band loop, less the steps that the compiler unrolled (known by their matmuls).

    In the order of the code: the far keys, those nearer than a row statistic reaches (one tile), the diagonal.
    """
    loops = [loop for loop in record["loops"] if loop["role"] == "band"]
    if not loops:
        return []
    shape = record["shape"]
    steps = _band_steps(shape) - record["once"]["macs"] // loops[0]["macs"]
    diagonal = min(steps, -(-shape["BM"] // _band_width(shape))) if len(loops) > 1 else 0
    middle = [-(-shape.get("ROWS_BEHIND", 1) // _band_width(shape))] * (len(loops) - 2)
    return [max(0, steps - diagonal - sum(middle)), *middle, *([diagonal] if len(loops) > 1 else [])]


def measured(cases: tuple[Case, ...], workers: int) -> dict[str, list[dict[str, Any]]]:
    """Records by the name of the case, compiled in processes of their own."""
    os.environ.pop("TRITON_INTERPRET", None)  # read by Triton when it is imported, which only the workers do
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        return dict(zip([case.name for case in cases], pool.map(compiled_case, cases), strict=True))


def report(cases: tuple[Case, ...], workers: int) -> dict[str, Any]:
    """The whole document: versions, what was read from the binaries, modelled times, budgets."""
    import triton

    from benchmarks.aot import assemblers

    records = measured(cases, workers)
    times = {}
    for case in cases:
        for record in records[case.name]:
            for length in LENGTHS:
                if modelled := timed(case, record, length):
                    times[f"{case.name} / {record['kernel']} / T {length}"] = modelled
    document = {
        "versions": {"triton": triton.__version__, "ptxas": assemblers()},
        "shapes": f"H100, batch 1, {HEADS} query heads, {KEY_HEADS} key heads, causal; microseconds",
        "binaries": records,
        "modelled": times,
    }
    return document | {"budgets": [_judged(budget, document) for budget in BUDGETS if budget.applies(document)]}


def _judged(budget: Budget, document: dict[str, Any]) -> dict[str, Any]:
    value = budget.measure(document)
    met = value <= budget.limit
    status = "met" if met else "missed, known" if budget.bound else "missed"
    known = {"name": budget.name, "limit": budget.limit, "source": budget.source}
    return known | {"value": round(value, 4), "status": status}


def complaints(document: dict[str, Any], committed: dict[str, Any] | None) -> list[str]:
    """Reasons to fail the run."""
    found = [f"{b['name']}: {b['value']} > {b['limit']}" for b in document["budgets"] if b["status"] == "missed"]
    if committed is None or committed["versions"] != document["versions"]:
        return found  # another compiler: only the absolute budgets apply
    before = {b["name"]: b for b in committed["budgets"]}
    for budget in document["budgets"]:
        old = before.get(budget["name"], budget)
        if budget["status"] != "met" and old["status"] == "met":
            found.append(f"{budget['name']}: was met at {old['value']}, now {budget['value']} > {budget['limit']}")
        elif budget["status"] != "met" and budget["value"] > SLACK * old["value"]:
            found.append(f"{budget['name']}: known miss got worse, {old['value']} to {budget['value']}")
    for name, launches in document["binaries"].items():
        for new, old in zip(launches, committed["binaries"].get(name, launches), strict=False):
            for loop, was in zip(new["loops"], old["loops"], strict=False):
                if loop["role"] == "main" and loop["per_element"] > SLACK * was["per_element"]:
                    found.append(f"{name}: {was['per_element']} to {loop['per_element']} instructions per element")
    return found


def budget_table(documents: Sequence[dict[str, Any]]) -> Table:
    names = [document["versions"]["triton"] for document in documents]
    table = Table("budget", "limit", "from", *(f"Triton {name}" for name in names), title="Budgets")
    rows: dict[tuple[str, str, str], list[str]] = {}
    for i, document in enumerate(documents):
        for b in document["budgets"]:
            row = rows.setdefault((b["name"], f"{b['limit']:g}", b["source"]), [""] * len(documents))
            row[i] = f"{b['value']:.4g}, {b['status']}"
    for head, cells in rows.items():
        table.add_row(*head, *cells)
    return table


def beside_table(document: dict[str, Any]) -> Table:
    """What WAAD + FAI of all heads cost beside the fastest attention."""
    table = Table("T", "band, modelled us", "attention, published us", "band / attention", title="Beside attention")
    for length, operations in FASTEST.items():
        name = f"{HOPPER}band WAAD + FAI / band / T {length}"
        if name in document["modelled"]:
            band, attention = document["modelled"][name]["total"], 1e6 * 2 * length**2 * 128 * HEADS / operations
            table.add_row(str(length), f"{band:.1f}", f"{attention:.0f}", f"{band / attention:.1%}")
    return table


def tables(document: dict[str, Any]) -> list[Table]:
    binaries = Table(
        "configuration", "kernel", "BM BN warps stages", "registers", "spilled", "shared KB", "programs per SM",
        "loop", *sass.CLASSES, "per element", "matmul", "clocks", "busiest unit",
        title="Read from the binaries; instructions of one pass through a loop; its clocks on an H100 are modelled",
    )  # fmt: skip
    for name, launches in document["binaries"].items():
        for r in launches:
            config = " ".join(map(str, (r["shape"].get("BM", r["config"][0]), *r["config"][1:])))
            used = (r["registers"], r["spilled_bytes"], r["shared_bytes"] // 1024, r["resident"])
            head: tuple[Any, ...] = (name, r["kernel"], config, *used)
            for loop in r["loops"] or [None]:
                row = []
                if loop:
                    row = [loop["role"], *(loop["instructions"][c] for c in sass.CLASSES), f"{loop['per_element']:.2f}"]
                    row += [" ".join(loop["matmul"]), loop.get("cycles", ""), loop.get("busiest", "")]
                binaries.add_row(*map(str, (*head, *row)))
                head = ("",) * len(head)
    times = Table(
        "configuration", "kernel", "T", "multiprocessors", "waves", "HBM", "L2", "time", "bound",
        title=f"Modelled: {document['shapes']}",
    )  # fmt: skip
    for name, t in document["modelled"].items():
        case, kernel, length = name.split(" / ")
        numbers = (f"{t[part]:.1f}" for part in ("processors", "quantised", "hbm", "l2", "total"))
        times.add_row(case, kernel, length.removeprefix("T "), *numbers, t["bound"])
    return [beside_table(document), binaries, times]


def markdown(documents: Sequence[dict[str, Any]]) -> str:
    versions = "; ".join(
        ", ".join(f"{name} {version}" for name, version in document["versions"].items()) for document in documents
    )
    parts = [
        "# Compiled kernels",
        f"Written by `python -m benchmarks.compile_report --update` with {versions}; no GPU was there. Registers, "
        "spills, shared memory and instructions are read from the machine code. Times are modelled from it, for an "
        "H100 alone (benchmarks/schedule.py and model.py say how); none was measured.",
        *_sections([calibrate.table()]),
        calibrate.error(),
        *_sections([budget_table(documents)]),
    ]
    for document in documents:
        parts += [f"# Triton {document['versions']['triton']}", *_sections(tables(document))]
    parts.append("# Attempts, and bounds of what is missed")
    missed = {b["name"] for document in documents for b in document["budgets"] if b["status"] != "met"}
    for budget in BUDGETS:
        if budget.tried or budget.name in missed:
            bound = f" Bound: {budget.bound}" if budget.name in missed else ""
            parts.append(f"- {budget.name} ({'missed' if budget.name in missed else 'met'}). {budget.tried}{bound}")
    return "\n\n".join(parts) + "\n"


def _sections(found: Sequence[Table]) -> list[str]:
    parts = []
    for table in found:
        columns = [[str(column.header), "--", *map(str, column.cells)] for column in table.columns]
        lines = list(zip(*columns, strict=True))
        parts += [f"## {table.title}", "\n".join("| " + " | ".join(line) + " |" for line in lines)]
    return parts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help="write results/compile.json and compile.md")
    parser.add_argument("--only", default="", help="compile the cases whose name contains this")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that compile")
    arguments = parser.parse_args()
    cases = tuple(case for case in CASES if arguments.only in case.name)
    document = report(cases, arguments.workers)
    console = Console(width=200 if not sys.stdout.isatty() else None)
    for table in (budget_table([document]), *tables(document)):
        console.print(table)
    path, version = RESULTS / "compile.json", document["versions"]["triton"]
    by_version = json.loads(path.read_text()) if path.exists() else {}
    found = complaints(document, None if arguments.update else by_version.get(version))
    if arguments.update:
        by_version = dict(sorted((by_version | {version: document}).items()))
        path.write_text(json.dumps(by_version, indent=1) + "\n")
        path.with_suffix(".md").write_text(markdown(list(by_version.values())))
    for line in found:
        console.print(f"[red]{line}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
