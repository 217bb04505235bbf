"""The output folder of a run: taking its place whole, the tables in it, and reading it again.

A run works in `<out>.part`, which can be resumed, and is renamed to `<out>` at the end: an interrupted run leaves older
results untouched. Tables hold all prompts (column `prompt`), as CSV and Parquet, and are written prompt by prompt.
"""

from __future__ import annotations

import csv
import errno
import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import attnstats
from attnstats.errors import InputError
from attnstats.study.analysis import Analyses, Analysis, Settings
from attnstats.study.store import ITEMS, RUN, Store, begin, corrupt, read_json, require_same
from attnstats.study.text import spreadsheet_cell

TOKENS, HEADS, SUMMARY, PROFILE, REPORT = "tokens", "heads", "summary.json", "heads.json", "report.html"
TABLES = tuple(f"{name}.{kind}" for name in (TOKENS, HEADS) for kind in ("csv", "parquet"))
TEXTS = {"token", "class"}  # text columns
ROW_GROUP = 65_536  # rows of a Parquet row group
FILES = (REPORT, *TABLES, PROFILE, SUMMARY, RUN, ITEMS)


def workplace(out: Path) -> Path:
    """The folder that a run works in before it becomes `out`.

    Raises:
        InputError: `out` can't be written, or holds files that are not of a run.
    """
    try:
        target = out.expanduser().resolve()
        for old in sorted(
            target.parent.glob(f".{target.name}.old-*")
        ):  # left by a kill between the two renames of `finish`
            if target.exists():
                shutil.rmtree(old)
            else:
                old.rename(target)
        _require_ours(target, out)
        target.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(target.parent, os.W_OK):
            raise InputError(f"--out {out}: {os.strerror(errno.EACCES)}; name a folder that can be written")
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"--out {out}: {reason}; name a folder that can be written") from error
    return target.with_name(f"{target.name}.part")


def _require_ours(target: Path, out: Path) -> None:
    """Raises InputError if `target` holds anything that is not of a run."""
    if not target.exists():
        return
    if not target.is_dir():
        raise InputError(f"--out {out}: is a file; name a folder")
    names = {entry.name for entry in target.iterdir()}
    foreign = min(names - set(FILES), default=None) or Store(target).foreign()
    if foreign is None and names and RUN not in names:
        foreign = min(names)
    if foreign is not None:
        raise InputError(f"--out {out}: holds {foreign}, which is not ours to replace; name another folder")


def open_store(out: Path, identity: dict[str, Any], *, resume: bool) -> Store:
    """The store beside `out`, new or resumed; a finished run that has lost items is moved back there.

    Raises:
        InputError: as `workplace` and `store.begin`.
    """
    work, target = workplace(out), out.expanduser().resolve()
    if resume and not work.exists() and (target / RUN).is_file():
        require_same(target, identity)
        target.rename(work)
    return begin(work, identity, resume=resume)


def is_finished(out: Path, identity: dict[str, Any], total: int) -> bool:
    """True if `out` has all results of this run. Raises InputError if they are of another one."""
    target = out.expanduser().resolve()
    if workplace(out).exists() or not (target / SUMMARY).is_file():
        return False
    require_same(target, identity)
    return Store(target).indices() == list(range(total))


def finish(store: Store, out: Path) -> None:
    """Rename the finished folder to `out` in place of an older run.

    Raises:
        InputError: `out` holds files that are not of a run; both folders are kept.
    """
    target = out.expanduser().resolve()
    _require_ours(target, out)
    store.close()
    if not target.exists():
        store.folder.rename(target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old-", dir=target.parent))
    target.rename(old)  # mkdtemp's folder is empty, so it can be renamed over
    try:
        store.folder.rename(target)
    except BaseException:
        old.rename(target)
        raise
    shutil.rmtree(old)


def load(folder: Path) -> tuple[Analyses, Settings, dict[str, Any]]:
    """The analyses, settings and summary of a finished run.

    Raises:
        InputError: no such folder, not one of `attnstats analyze`, or one that is damaged.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; name one that `attnstats analyze --out` has written")
    if not (folder / SUMMARY).is_file() or not (folder / RUN).is_file():
        raise InputError(f"{folder}: has no {SUMMARY} and {RUN}; name a folder that `attnstats analyze` has finished")
    summary = read_json(folder / SUMMARY)
    try:
        settings = Settings(**{key: value for key, value in summary["settings"].items() if key != "preset"})
        count = len(summary["prompts"])
        sections = [dict(summary[name]) for name in ("model", "versions", "timings_seconds", "peak_memory_bytes")]
        if not all(isinstance(value, (int, float)) for section in sections[2:] for value in section.values()):
            raise TypeError("seconds and bytes must be numbers")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise corrupt(folder / SUMMARY, f"no settings, prompts and timings in it: {error}") from error
    return Analyses(Store(folder), count), settings, summary


def write_tables(folder: Path, analyses: Sequence[Analysis]) -> None:
    """Write tokens and heads as .csv and .parquet, with all prompts in each; each analysis is read once."""
    with _table(folder / TOKENS) as add_tokens, _table(folder / HEADS) as add_heads:
        for prompt, analysis in enumerate(analyses):
            add_tokens(token_rows(prompt, analysis))
            add_heads(head_rows(prompt, analysis))


@contextmanager
def _table(path: Path) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A function that appends rows, given as columns, to path.csv and path.parquet."""
    import pandas
    import pyarrow
    import pyarrow.parquet

    writer, waiting = None, []

    def add(columns: dict[str, Any]) -> None:
        table = pandas.DataFrame(columns)
        waiting.append(table.copy())
        # Cells must not run as formulas. Text is always quoted: a bare carriage return would end the row.
        for column in TEXTS & set(table.columns):
            table[column] = table[column].map(spreadsheet_cell)
        table.to_csv(file, index=False, header=file.tell() == 0, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
        if sum(map(len, waiting)) >= ROW_GROUP:
            flush()

    def flush() -> None:
        nonlocal writer
        if waiting:
            group = pyarrow.Table.from_pandas(pandas.concat(waiting), preserve_index=False)
            writer = writer or pyarrow.parquet.ParquetWriter(path.with_suffix(".parquet"), group.schema)
            writer.write_table(group)
            waiting.clear()

    with path.with_suffix(".csv").open("w", encoding="utf-8", newline="") as file:
        try:
            yield add
            flush()
        finally:
            if writer is not None:
                writer.close()


def token_rows(prompt: int, analysis: Analysis) -> dict[str, Any]:
    """The columns of the tokens table. delta is NaN before the response, entropy for the first token.

    A lone surrogate, which UTF-8 can't encode, is written as its escape.
    """
    delta = torch.full_like(analysis.waad, torch.nan)
    delta[analysis.response] = analysis.delta
    return {
        "prompt": prompt,
        "position": range(len(analysis.tokens)),
        "token": [token.encode("utf-8", "backslashreplace").decode() for token in analysis.tokens],
        "is_response": analysis.response.numpy(),
        "waad": analysis.waad.numpy(),
        "fai": analysis.fai.numpy(),
        "fai_valid": analysis.fai_valid.numpy(),
        "delta": delta.numpy(),
        "entropy": analysis.entropy.numpy(),
    }


def head_rows(prompt: int, analysis: Analysis) -> dict[str, Any]:
    """The columns of the heads table: mean distance over the response in tokens, and class."""
    layers, heads = analysis.distance.shape
    return {
        "prompt": prompt,
        "layer": [layer for layer in analysis.layers for _ in range(heads)],
        "head": list(range(heads)) * layers,
        "mean_distance": analysis.distance.flatten().numpy(),
        "class": [analysis.classes.name(i, head) for i in range(layers) for head in range(heads)],
    }


def write_summary(folder: Path, summary: dict[str, Any]) -> None:
    """Write summary.json so that every JSON parser reads it: ASCII, without NaN."""
    text = json.dumps(summary, indent=2, ensure_ascii=True, allow_nan=False)
    (folder / SUMMARY).write_text(text + "\n", encoding="ascii")


def versions() -> dict[str, str]:
    """Versions of everything that can change a number."""
    installed = {"attnstats": attnstats.__version__, "python": platform.python_version()}
    for package in ("torch", "triton", "transformers", "numpy"):
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            installed[package] = "not installed"
    return installed


def peak_memory() -> dict[str, int]:
    """Peak memory of this process so far, in bytes: resident (not on Windows), and of the GPU if one was used."""
    peak: dict[str, int] = {}
    try:
        import resource  # POSIX only
    except ImportError:
        pass
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        peak["resident"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        peak["gpu"] = torch.cuda.max_memory_allocated()
    return peak
