"""What a run leaves behind: a folder that takes its place whole, and the tables that others read.

A run works in `<out>.part`, which a killed run leaves to be resumed, and at the end becomes `<out>`: an interrupted run
leaves older results as they were. Tables hold all prompts (column `prompt`), as CSV and as Parquet, and are written
prompt by prompt. The report is drawn by report/. Called by commands/.
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
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import attnstats
from attnstats.analyze import Analyses, Analysis, Settings
from attnstats.errors import InputError
from attnstats.store import ITEMS, RUN, Store, begin, corrupt, read_json, umask
from attnstats.text import spreadsheet_cell

TOKENS, HEADS, SUMMARY, PROFILE, REPORT = "tokens", "heads", "summary.json", "heads.json", "report.html"
TABLES = tuple(f"{name}.{kind}" for name in (TOKENS, HEADS) for kind in ("csv", "parquet"))
FILES = (REPORT, *TABLES, PROFILE, SUMMARY, RUN, ITEMS)


def workplace(out: Path) -> Path:
    """The folder that a run works in before it becomes `out`.

    Raises:
        InputError: `out` can't be written, or holds what isn't ours to replace.
    """
    target = out.expanduser().resolve()
    try:
        if target.is_dir():
            others = sorted({entry.name for entry in target.iterdir()} - set(FILES))
            if others:
                raise InputError(f"--out {out}: holds {others[0]}, which is not ours to replace; name another folder")
        elif target.exists():
            raise InputError(f"--out {out}: is a file; name a folder")
        target.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(target.parent, os.W_OK):
            raise InputError(f"--out {out}: {os.strerror(errno.EACCES)}; name a folder that can be written")
    except OSError as error:
        raise InputError(f"--out {out}: {error.strerror or error}; name a folder that can be written") from error
    return target.with_name(f"{target.name}.part")


def open_store(work: Path, out: Path, identity: dict[str, Any], *, resume: bool) -> Store:
    """A store in `work`, new or resumed; a finished run at `out` is opened again by moving there.

    Raises:
        InputError: see store.begin.
    """
    finished = out.expanduser().resolve()
    if resume and not work.exists() and (finished / RUN).is_file():
        begin(finished, identity, resume=True)
        finished.rename(work)
    return begin(work, identity, resume=resume)


def finish(work: Path, out: Path) -> None:
    """Give the finished folder its name; what had it goes."""
    target = out.expanduser().resolve()
    if not target.exists():
        work.rename(target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old-", dir=target.parent))
    target.rename(old)  # an empty folder may be renamed over
    try:
        work.rename(target)
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
    except (KeyError, TypeError, AttributeError) as error:
        raise corrupt(folder / SUMMARY, f"no settings and prompts in it: {error}") from error
    analyses = Analyses(Store(folder))
    if len(analyses) != count:
        raise InputError(f"{folder}: results of {len(analyses)} prompts where {SUMMARY} names {count}; "
                         "run again with --resume")  # fmt: skip
    return analyses, settings, summary


def write_tables(folder: Path, analyses: Sequence[Analysis]) -> None:
    """tokens and heads as .csv and .parquet, all prompts in each."""
    _write_table(folder, TOKENS, analyses, token_rows)
    _write_table(folder, HEADS, analyses, head_rows)


def _write_table(
    folder: Path, name: str, analyses: Sequence[Analysis], rows: Callable[[int, Analysis], dict[str, Any]]
) -> None:
    import pandas
    import pyarrow
    import pyarrow.parquet

    with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
        writer = None
        try:
            for prompt, analysis in enumerate(analyses):
                table = pandas.DataFrame(rows(prompt, analysis))
                kept = pyarrow.Table.from_pandas(table, preserve_index=False)
                if writer is None:
                    writer = pyarrow.parquet.ParquetWriter(folder / f"{name}.parquet", kept.schema)
                writer.write_table(kept)
                # A spreadsheet runs formulas. Text is always quoted: a bare carriage return would end the row.
                for column in table.select_dtypes(["object", "str"]):
                    table[column] = table[column].map(spreadsheet_cell)
                table.to_csv(file, index=False, header=prompt == 0, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
        finally:
            if writer is not None:
                writer.close()


def token_rows(prompt: int, analysis: Analysis) -> dict[str, Any]:
    """The columns of tokens. delta is that of the response, NaN before it; entropy is unknown for the first token.

    A lone surrogate, which UTF-8 has no bytes for, is written as its escape.
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
    """The columns of heads: mean distance in tokens over the response, and the class it leads to."""
    layers, heads = analysis.distance.shape
    return {
        "prompt": prompt,
        "layer": [layer for layer in analysis.layers for _ in range(heads)],
        "head": list(range(heads)) * layers,
        "mean_distance": analysis.distance.flatten().numpy(),
        "class": [analysis.classes.name(i, head) for i in range(layers) for head in range(heads)],
    }


def write_summary(folder: Path, summary: dict[str, Any]) -> None:
    """summary.json, readable by every JSON parser: no NaN, no lone surrogates."""
    text = json.dumps(summary, indent=2, ensure_ascii=True, allow_nan=False)
    path = folder / SUMMARY
    path.write_text(text + "\n", encoding="ascii")
    path.chmod(0o666 & ~umask())


def versions() -> dict[str, str]:
    """Versions of everything that can change a number."""
    found = {"attnstats": attnstats.__version__, "python": platform.python_version()}
    for package in ("torch", "triton", "transformers", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def peak_memory() -> dict[str, int]:
    """Peak memory of this process so far, in bytes: resident (not on Windows), and on the GPU where one was used."""
    peak: dict[str, int] = {}
    try:
        import resource  # POSIX has it
    except ImportError:
        pass
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        peak["resident"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        peak["gpu"] = torch.cuda.max_memory_allocated()
    return peak
