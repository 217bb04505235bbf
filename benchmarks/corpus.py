"""Time and memory of summarising a corpus: `python -m benchmarks.corpus [--prompts 100000]`.

A store as `attnstats analyze` leaves it before it concludes, of prompts of 300 tokens (100 and 200 of the response)
with five layers of nine heads, is summarised as the command does: head profile, tables, couplings, page. The items are
a few files under many names, so that a store of 45 GB fits on any disk: reading is from the page cache. Prints seconds
and memory per stage and keeps them in results/corpus.json, with the load of the machine: on a busy one the seconds are
those of waiting, and CPU seconds are what it took.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from attnstats import heads, report
from attnstats.chance import Coupling
from attnstats.curves import delta
from attnstats.study import findings, outputs
from attnstats.study.analysis import Analyses, Analysis, Settings
from attnstats.study.maps import BAND, Maps, cell_boundaries
from attnstats.study.store import Store, begin
from benchmarks.summary import commit, cpu

RESULT = Path(__file__).parent / "results" / "corpus.json"
LAYERS, HEADS, PROMPT, RESPONSE, SENTENCE = 5, 9, 100, 200, 20
DISTINCT = 256
LINKS = 30_000  # names of a file; ext4 allows 65,000
T = TypeVar("T")


def synthetic(seed: int) -> Analysis:
    """An analysis of random numbers, as large as one of SmolLM2."""
    draw = torch.Generator().manual_seed(seed)
    length = PROMPT + RESPONSE

    def rand(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=draw)

    waad, fai, mean_distance, received = rand(4, LAYERS, HEADS, length)
    position = torch.arange(length)
    response, fai_valid, received_valid = position >= PROMPT, position < length - 10, position < length - 4
    distance = heads.head_distance(mean_distance * (1 + rand(LAYERS, HEADS, 1)), response)
    layers = tuple(range(10, 10 + LAYERS))
    classes = heads.classify(distance, layers=layers)
    mean_waad = heads.class_mean(waad, classes.local) * 10
    rows, columns = map(torch.tensor, cell_boundaries(PROMPT, length))
    cells = len(rows) - 1, len(columns) - 1
    shares = RESPONSE // SENTENCE, RESPONSE // SENTENCE + 2
    tokens = [f" w{(seed * 31 + i * i) % 997}" for i in range(length)]
    return Analysis(
        question=f"Question {seed}: how many are left?",
        token_ids=position,
        tokens=tokens,
        shown=tokens,
        response=response,
        layers=layers,
        head_waad=waad,
        head_fai=fai,
        head_mean_distance=mean_distance,
        head_received=received / 10,
        received_valid=received_valid,
        received_kurtosis=heads.kurtosis(received, response & received_valid),
        distance=distance,
        classes=classes,
        waad=mean_waad,
        fai=heads.class_mean(fai, classes.global_) * fai_valid / 10,
        fai_valid=fai_valid,
        delta=delta(mean_waad[response]),
        entropy=torch.cat([torch.tensor([torch.nan]), rand(length - 1)]),
        maps=Maps(
            rows,
            columns,
            rand(*cells),
            rand(*cells),
            rand(RESPONSE, BAND),
            rand(RESPONSE, BAND),
            torch.tensor((0, 1, *range(PROMPT, length + 1, SENTENCE))),
            rand(*shares),
            rand(*shares),
        ),
    )


def fill(store: Store, count: int) -> None:
    """Items for `count` prompts: DISTINCT files, or more if a file may not have so many names."""
    distinct = min(count, max(DISTINCT, -(-count // LINKS)))
    for index in range(distinct):
        store.write(index, *synthetic(index).stored())
    for index in range(distinct, count):
        os.link(store.path(index % distinct), store.path(index))


class Stages:
    """Seconds and memory of each stage."""

    def __init__(self) -> None:
        self.figures: dict[str, dict[str, float]] = {}

    def run(self, name: str, call: Callable[[], T]) -> T:
        wall, cpu = time.perf_counter(), time.process_time()
        result = call()
        figures = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
        self.figures[name] = {key: round(value, 1) for key, value in figures.items()}
        self.figures[name]["resident_mib_so_far"] = round(outputs.peak_memory().get("resident", 0) / 2**20)
        print(f"{name}: {self.figures[name]}", file=sys.stderr, flush=True)
        return result


def summarised(store: Store, count: int) -> dict[str, dict[str, float]]:
    """Summarise a store as `attnstats analyze` does; the figures of each stage."""
    analyses, stages = Analyses(store, count), Stages()
    profile = stages.run("profile", lambda: findings.profile(analyses.head_summaries()))
    couplings = stages.run(
        "tables and couplings", lambda: findings.tabulate(store.folder, analyses.outlines(), profile)
    )
    stages.run("page", lambda: _page(store.folder, analyses, couplings))
    stages.run("a question of the tables", lambda: question(store.folder))
    return stages.figures


def _page(folder: Path, analyses: Analyses, couplings: tuple[Coupling, ...]) -> None:
    sections: dict[str, Any] = {name: {} for name in ("settings", "versions", "timings_seconds", "peak_memory_bytes")}
    text = report.render(analyses, Settings(), {"model": {"name": "synthetic"}, **sections}, couplings)
    (folder / outputs.REPORT).write_text(text, encoding="utf-8")


def question(folder: Path) -> float:
    """Mean WAAD of all tokens of the responses, by a pyarrow data set, which reads the table in parts."""
    import pyarrow.compute as pc
    import pyarrow.dataset

    tokens = pyarrow.dataset.dataset(folder / "tokens.parquet")
    total, count = 0.0, 0
    for batch in tokens.to_batches(columns=["waad"], filter=pc.field("is_response")):
        total += pc.sum(batch["waad"]).as_py() or 0.0
        count += len(batch)
    return total / count


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=100_000)
    parser.add_argument("--folder", type=Path, help="where the store is made; default: a temporary folder")
    options = parser.parse_args()
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    load_before = [round(load, 1) for load in os.getloadavg()]
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        store = begin(Path(folder) / "run", {}, resume=False)
        fill(store, options.prompts)
        bytes_of_item = store.path(0).stat().st_size
        stages = summarised(store, options.prompts)
        tables = {path.name: path.stat().st_size for path in sorted(store.folder.iterdir()) if path.is_file()}
        store.close()
    total = {key: round(sum(stage[key] for stage in stages.values()), 1) for key in ("seconds", "cpu_seconds")}
    record = {
        "prompts": options.prompts,
        "tokens_each": PROMPT + RESPONSE,
        "bytes_of_an_item": bytes_of_item,
        "stages": stages,
        "total": total,
        "bytes_of_files": {name: size for name, size in tables.items() if not name.startswith(".")},
        "versions": {**outputs.versions(), "pyarrow": importlib.metadata.version("pyarrow")},
        "machine": {
            "cpu": cpu(),
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "load_before": load_before,
            "load_after": [round(load, 1) for load in os.getloadavg()],
        },
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(record, indent=1) + "\n", encoding="ascii")
    print(json.dumps(total))
    return 0


if __name__ == "__main__":
    sys.exit(main())
