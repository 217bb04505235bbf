"""Starts the parts, each in a process of its own, ends them in time and writes their results.

The package's docstring describes the parts and how to run them.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
# Of the time. "first" runs when it is named, the others also without names.
SHARES = {"first": 0.3, "ceilings": 0.03, "correctness": 0.32, "timing": 0.33, "end_to_end": 0.17, "sweep": 0.15}
EVERY = [name for name in SHARES if name != "first"]
MINUTES, FIRST_MINUTES = 5.5, 2.0
GRACE = 15.0  # seconds a part may take over its share before it is ended
# What is attempted for longer than this share of a part's time, and these seconds, is ended; the part goes on without.
STUCK, PATIENCE = 0.4, 30.0
TRIES = 3  # starts of a part whose process died; each leaves out what the last one died of
POISONED = 75  # exit status of a part that lost its device


def main() -> int:
    arguments = parse()
    if arguments.smoke:
        # Before anything imports Triton; a GPU that is there has no part in it.
        os.environ |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    if arguments.child:
        return child(arguments.parts[0], arguments.child, arguments.until - time.time(), arguments.smoke)

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started ends as well
    import torch

    if not arguments.smoke and not torch.cuda.is_available():
        print("no CUDA device here; with --smoke everything runs small on the CPU", file=sys.stderr)
        return 2
    results = arguments.results or (ROOT / "out" / "gpu-smoke" if arguments.smoke else ROOT / "benchmarks" / "results")
    return orchestrate(
        [name for name in SHARES if name in arguments.parts], arguments.minutes * 60, results, arguments.smoke
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="Correctness and speed on a GPU.")
    parser.add_argument("parts", nargs="*", help=f"some of {', '.join(SHARES)}, in this order; default all but first")
    minutes = f"for all parts together (default {MINUTES}; {FIRST_MINUTES} for first alone)"
    parser.add_argument("--minutes", type=float, help=minutes)
    parser.add_argument("--results", type=Path, help="folder to write (default benchmarks/results)")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on a CPU, kernels in Triton's interpreter")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, default=0.0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.parts if name not in SHARES]:
        parser.error(f"no part {unknown[0]!r}; the parts are {', '.join(SHARES)}")
    arguments.parts = arguments.parts or EVERY
    arguments.minutes = arguments.minutes or (FIRST_MINUTES if arguments.parts == ["first"] else MINUTES)
    return arguments


def child(name: str, file: Path, seconds: float, smoke: bool) -> int:
    import torch

    from benchmarks.gpu.environment import conditions
    from benchmarks.gpu.part import Part, Poisoned, message_of

    torch.set_grad_enabled(False)
    part = Part(file, seconds, smoke)
    part.section["conditions"] = conditions(part.device)
    part.save()
    try:
        importlib.import_module(f"benchmarks.gpu.{name}").run(part)
        part.section["finished"] = True
    except Poisoned:
        return POISONED
    except Exception as error:
        traceback.print_exc()
        part.section["error"] = message_of(error)
    part.save()
    return 0


def orchestrate(names: list[str], seconds: float, results: Path, smoke: bool) -> int:
    from benchmarks.gpu import report

    began = time.monotonic()
    document: dict[str, Any] = {"layout": report.LAYOUT, "sections": {}}
    fresh: dict[str, Any] = {}  # of this run; the document also holds what others of the device left
    path: Path | None = None
    for i, name in enumerate(names):
        left = seconds - (time.monotonic() - began)
        share = left * SHARES[name] / sum(SHARES[other] for other in names[i:])
        print(f"{name}: up to {share:.0f} s", flush=True)
        steps = None
        with tempfile.TemporaryDirectory() as folder:
            for section in sections_of(name, Path(folder) / "section.json", share, smoke):
                fresh[name] = section
                if path is None and section.get("conditions"):
                    path = results / f"{'smoke' if smoke else _slug(section['conditions']['device'])}.json"
                    document = _existing(path, document)
                if path is not None:
                    document["sections"] |= fresh
                    report.save(document, path)
                    if section.get("steps") != steps:
                        steps = section["steps"]
                        _report(document, path, last=False)  # for a run that is cut
        print(f"{name}: {report.in_a_line(name, fresh[name])}, {fresh[name]['seconds']:.0f} s", flush=True)
        if path is not None:
            _report(document, path, last=i == len(names) - 1)
    if wrong := report.incorrect(fresh):
        print("NOT CORRECT:", *wrong, sep="\n  ", file=sys.stderr)
        return 1
    return 0 if all(section.get("finished") for section in fresh.values()) else 2


def _report(document: dict[str, Any], path: Path, last: bool) -> None:
    """Judge and draw. The measurements are on disk already, so that an error in a table doesn't end the run."""
    from benchmarks.gpu import report

    try:
        problem = report.write(document, path)
        if last:
            told = [str(target) for target in report.targets(document)]
            print(*told, *([problem] if problem else []), f"kept in {path.with_suffix('.md')}", sep="\n", flush=True)
    except Exception:
        traceback.print_exc()


def sections_of(name: str, file: Path, seconds: float, smoke: bool) -> Any:
    """Yield the part's section so far, repeatedly while it runs, and at its end."""
    from benchmarks.gpu.part import attempted_for, in_flight

    began, patience = time.monotonic(), max(PATIENCE, STUCK * seconds)
    for attempt in range(TRIES):
        left = seconds - (time.monotonic() - began)
        if attempt and left < 5:
            break
        command = _command(name, file, left, smoke)
        with tempfile.TemporaryFile("w+") as errors:
            # A group of its own: what the part leaves running must not be in the next one's way.
            environment = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "1"}  # else a pool that outlives its use
            process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=errors, start_new_session=True)
            try:
                ended, stuck = None, False
                while ended is None and not stuck and time.monotonic() - began < seconds + (120 if smoke else GRACE):
                    try:
                        ended = process.wait(timeout=1 if smoke else 3)
                    except subprocess.TimeoutExpired:
                        yield _read(file) | {"seconds": time.monotonic() - began}
                        stuck = not smoke and attempted_for(file) > patience
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            errors.seek(0)
            last = (errors.read().strip().splitlines() or ["it said nothing"])[-1]
        section = _read(file)
        if ended == 0:
            break
        attempted = in_flight(file).read_text() if in_flight(file).exists() else ""
        what = f"its process died with status {ended}: {last}"
        if ended is None:
            what = f"ended after {patience:.0f} s" if stuck else f"ended after {seconds + GRACE:.0f} s"
        if ended != POISONED:
            section.setdefault("failures", {})[attempted or name] = what[:300]
        if (ended is None and not stuck) or (not attempted and ended != POISONED):
            section["error"] = what[:300]
            file.write_text(json.dumps(section))
            break
        in_flight(file).unlink(missing_ok=True)
        file.write_text(json.dumps(section))
    yield _read(file) | {"seconds": round(time.monotonic() - began, 1)}


def _command(name: str, file: Path, seconds: float, smoke: bool) -> list[str]:
    # A time of the clock, so that starting Python counts.
    until = str(time.time() + seconds)
    command = [sys.executable, "-m", "benchmarks.gpu", name, "--child", str(file), "--until", until]
    return command + ["--smoke"] * smoke


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text()) if file.exists() else {}


def _existing(path: Path, empty: dict[str, Any]) -> dict[str, Any]:
    """Results of earlier runs on this device. A file of another layout is renamed and left alone."""
    document = _read(path)
    if document and document.get("layout") != empty["layout"]:
        path.rename(path.with_suffix(".old.json"))
    return document if document.get("layout") == empty["layout"] else empty


def _slug(device: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


if __name__ == "__main__":
    sys.exit(main())
