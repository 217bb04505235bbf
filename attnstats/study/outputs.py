"""The output folder of a run: taking its place whole, the tables in it, and reading it again.

A run works in `<out>.part`, which can be resumed, and is renamed to `<out>` at the end: an interrupted run leaves older
results untouched. tables.py writes the tables in it.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import platform
import shutil
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import attnstats
from attnstats.chance import Coupling
from attnstats.errors import InputError
from attnstats.study import tables
from attnstats.study.analysis import Analyses, Settings
from attnstats.study.store import ITEMS, RUN, Store, begin, corrupt, read_json, require_same

FORMAT = 2  # of the files of a run; to be raised where programs from before could not read them
SUMMARY, PROFILE, REPORT, COMPARISON = "summary.json", "heads.json", "report.html", "comparison.html"
FILES = (REPORT, *tables.FILES, PROFILE, SUMMARY, RUN, ITEMS)


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
    foreign = min(names - {*FILES, COMPARISON}, default=None) or Store(target).foreign()
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


def load(folder: Path) -> tuple[Analyses, Settings, dict[str, Any], list[Coupling]]:
    """The analyses, settings, summary and couplings of a finished run.

    Raises:
        InputError: no such folder, not one of `attnstats analyze`, one of another format, or one that is damaged.
    """
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "no such folder"
        raise InputError(f"{folder}: {what}; name one that `attnstats analyze --out` has written")
    if not (folder / SUMMARY).is_file() or not (folder / RUN).is_file():
        raise InputError(f"{folder}: has no {SUMMARY} and {RUN}; name a folder that `attnstats analyze` has finished")
    summary = read_json(folder / SUMMARY)
    if "settings" in summary:  # else it is no summary of a run, in any format
        _check_format(folder, summary)
    try:
        settings = Settings(**{key: value for key, value in summary["settings"].items() if key != "preset"})
        count, couplings = int(summary["prompts"]), list(map(_coupling, summary["couplings"]))
        sections = [dict(summary[name]) for name in ("model", "versions", "timings_seconds", "peak_memory_bytes")]
        sections.append(dict(summary.get("near_ties", {})))
        if not all(isinstance(value, (int, float)) for section in sections[2:] for value in section.values()):
            raise TypeError("seconds, bytes and near-ties must be numbers")
        if count < 1:
            raise ValueError("there must be a prompt")
        if not isinstance(summary.get("left_out", []), list):
            raise TypeError("left_out must be a list")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise corrupt(folder / SUMMARY, f"no settings, prompts and timings in it: {error}") from error
    return Analyses(Store(folder), count), settings, summary, couplings


def _check_format(folder: Path, summary: dict[str, Any]) -> None:
    """Raises InputError if a run is of another format than FORMAT, with both versions and what to do."""
    found = summary.get("format", 1)  # the first had no number
    if not isinstance(found, int):
        raise corrupt(folder / SUMMARY, f"format must be a number, it is {found!r}")
    if found == FORMAT:
        return
    recorded = summary.get("versions")
    theirs = recorded.get("attnstats", "unknown") if isinstance(recorded, dict) else "unknown"
    age, remedy = ("a newer", "update attnstats") if found > FORMAT else ("an older", "run `attnstats analyze` again")
    raise InputError(
        f"{folder}: a run of {age} version: attnstats {theirs} wrote it in format {found}, and this attnstats "
        f"{attnstats.__version__} reads format {FORMAT}; {remedy}"
    )


def coupling_record(coupling: Coupling) -> dict[str, Any]:
    """A coupling for summary.json: null for NaN, which JSON does not have, and the reason for no interval and no p."""
    numbers = {key: None if value != value else value for key, value in dataclasses.asdict(coupling).items()}
    return {**numbers, "reason": coupling.reason or None}


def _coupling(record: dict[str, Any]) -> Coupling:
    """The coupling of a record. Raises TypeError for any other record."""
    own = {key: value for key, value in record.items() if key != "reason"}
    fields: dict[str, Any] = {key: math.nan if value is None else value for key, value in own.items()}
    if not all(isinstance(value, str if key == "name" else (int, float)) for key, value in fields.items()):
        raise TypeError("couplings must have a name and numbers")
    return Coupling(**fields)


def write_summary(folder: Path, summary: dict[str, Any]) -> None:
    """Write summary.json so that every JSON parser reads it: ASCII, without NaN."""
    text = json.dumps({"format": FORMAT, **summary}, indent=2, ensure_ascii=True, allow_nan=False)
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
