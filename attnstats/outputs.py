"""What `attnstats analyze` leaves behind: one folder that appears whole or not at all.

`replacing` gives a folder to write into beside the one that was asked for, and puts it in its place at the
end; an interrupted run leaves the old output as it was. All prompts share the tables (column `prompt`) and the
tensor file (prefix of the name). The report is drawn by report/. Called by cli.py.
"""

from __future__ import annotations

import csv
import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import attnstats
from attnstats.analyze import Analysis
from attnstats.errors import InputError
from attnstats.text import spreadsheet_cell

TOKENS, HEADS, TENSORS, SUMMARY, REPORT = "tokens.csv", "heads.csv", "stats.safetensors", "summary.json", "report.html"
FILES = (REPORT, TOKENS, HEADS, TENSORS, SUMMARY)


@contextmanager
def replacing(out: Path) -> Iterator[Path]:
    """A folder beside `out` to write into; when the block ends well it takes the place of `out`.

    Raises:
        InputError: before the block, where `out` can't be written, or holds what isn't ours to replace.
    """
    target = Path(out).expanduser().resolve()
    try:
        if target.is_dir():
            others = sorted({entry.name for entry in target.iterdir()} - set(FILES))
            if others:
                raise InputError(f"--out {out}: holds {others[0]}, which is not ours to replace; name another folder")
        elif target.exists():
            raise InputError(f"--out {out}: is a file; name a folder")
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{target.name}.part-", dir=target.parent))
    except OSError as error:
        raise InputError(f"--out {out}: {error.strerror or error}; name a folder that can be written") from error
    try:
        yield beside
        beside.chmod(0o777 & ~_umask())
        if target.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old-", dir=target.parent))
            target.rename(old)  # an empty folder may be renamed over
            try:
                beside.rename(target)
            except BaseException:
                old.rename(target)
                raise
            shutil.rmtree(old)
        else:
            beside.rename(target)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_tables(folder: Path, analyses: Sequence[Analysis]) -> None:
    """tokens.csv and heads.csv, all prompts in each."""
    import pandas

    for name, table in ((TOKENS, token_rows), (HEADS, head_rows)):
        frame = pandas.concat([pandas.DataFrame(table(i, a)) for i, a in enumerate(analyses)])
        # Text is always quoted: a bare carriage return in a token would end the row.
        frame.to_csv(
            folder / name, index=False, encoding="utf-8", errors="backslashreplace", quoting=csv.QUOTE_NONNUMERIC
        )


def token_rows(prompt: int, analysis: Analysis) -> dict[str, Any]:
    """The columns of tokens.csv. delta is that of the response; entropy is unknown for the first token."""
    start = analysis.response_start
    return {
        "prompt": prompt,
        "position": range(len(analysis.tokens)),
        "token": [spreadsheet_cell(token) for token in analysis.tokens],
        "is_response": analysis.response.numpy(),
        "waad": analysis.waad.numpy(),
        "fai": analysis.fai.numpy(),
        "fai_valid": analysis.fai_valid.numpy(),
        "delta": [None] * start + analysis.delta.tolist(),
        "entropy": [None, *analysis.entropy[1:].tolist()],
    }


def head_rows(prompt: int, analysis: Analysis) -> list[dict[str, Any]]:
    """The rows of heads.csv: mean distance in tokens over the response, and the class it leads to."""
    return [
        {
            "prompt": prompt,
            "layer": layer,
            "head": head,
            "mean_distance": analysis.distance[i, head].item(),
            "class": analysis.classes.name(i, head),
        }
        for i, layer in enumerate(analysis.layers)
        for head in range(analysis.distance.shape[1])
    ]


def write_tensors(folder: Path, analyses: Sequence[Analysis]) -> None:
    """stats.safetensors: `<prompt>.<name>`, per head (layers, heads, T) and as class means (T,)."""
    from safetensors.torch import save_file

    tensors = {}
    for number, analysis in enumerate(analyses):
        fields = {
            "token_ids": analysis.token_ids,
            "response": analysis.response,
            "layers": torch.tensor(analysis.layers),
            "head_waad": analysis.head_waad,
            "head_fai": analysis.head_fai,
            "head_mean_distance": analysis.head_mean_distance,
            "distance": analysis.distance,
            "local": analysis.classes.local,
            "global": analysis.classes.global_,
            "waad": analysis.waad,
            "fai": analysis.fai,
            "fai_valid": analysis.fai_valid,
            "delta": analysis.delta,
            "entropy": analysis.entropy,
        }
        tensors.update({f"{number}.{name}": tensor.contiguous() for name, tensor in fields.items()})
    save_file(tensors, str(folder / TENSORS))
    (folder / TENSORS).chmod(0o666 & ~_umask())  # safetensors writes for the owner alone


def write_summary(folder: Path, summary: dict[str, Any]) -> None:
    """summary.json, readable by every JSON parser: no NaN, no lone surrogates."""
    text = json.dumps(summary, indent=2, ensure_ascii=True, allow_nan=False)
    (folder / SUMMARY).write_text(text + "\n", encoding="ascii")


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
