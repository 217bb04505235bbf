"""A part of the script: its device, its time, the section of the results that it fills, and contained failures.

A section is plain JSON:

    seconds, finished, conditions      of the run that filled it
    left_out                           [what, why], for lack of time or of something that the machine lacks
    failures                           {name: message} of what was attempted and raised
    ...                                the part's own entries

`attempt` writes beside the section what it runs, so that a crash of the process is known to be its failure.
"""

from __future__ import annotations

import contextlib
import gc
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

OUT_OF_MEMORY = "out of memory"


class Outcome(NamedTuple):
    """The result of an attempt: a value, or the reason why there is none."""

    value: Any
    failure: str | None = None


class Poisoned(BaseException):
    """The CUDA context is lost, and the process can only end. No `except Exception` catches it."""


class Part:
    def __init__(self, file: Path, seconds: float, smoke: bool) -> None:
        self.file = file
        self.smoke = smoke
        self.device = device_of(smoke)
        self.section: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
        self.section.setdefault("left_out", [])
        self.section.setdefault("failures", {})
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds that remain of this part's share, or of a step's."""
        return self._end - time.monotonic()

    @contextlib.contextmanager
    def share(self, seconds: float) -> Iterator[None]:
        """A step of the part: within it at most `seconds` are left."""
        end = self._end
        self._end = min(end, time.monotonic() + seconds)
        try:
            yield
        finally:
            self._end = end

    def leave_out(self, what: str, why: str) -> None:
        if [what, why] not in self.section["left_out"]:
            self.section["left_out"].append([what, why])

    def out_of_time(self, what: str, needed: float = 1.0) -> bool:
        """True if less than `needed` seconds are left; then `what` is noted as left out."""
        if self.left() < needed:
            self.leave_out(what, "no time left")
            return True
        return False

    def attempt(self, name: str, call: Callable[..., Any], *args: Any) -> Outcome:
        """Run `call`; an exception becomes a message. A name that failed before, even by a crash, isn't tried again."""
        failures = self.section["failures"]
        if name in failures:
            return Outcome(None, failures[name])
        flight = in_flight(self.file)
        flight.write_text(name)
        failure = None
        try:
            value = call(*args)
            self.synchronize()
        except Exception as error:
            failure = message_of(error)
        flight.unlink()
        if failure is None:
            return Outcome(value)
        # After the except block: its traceback would keep the tensors of the failed call alive.
        failures[name] = failure
        self.save()
        release_memory()
        if not usable(self.device):
            raise Poisoned(name)
        return Outcome(None, failure)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def save(self) -> None:
        beside = self.file.with_suffix(".part")
        beside.write_text(json.dumps(self.section))
        beside.replace(self.file)


def device_of(smoke: bool) -> torch.device:
    return torch.device("cpu" if smoke else "cuda")


def usable(device: torch.device) -> bool:
    """True if the device still works; after an illegal access nothing does."""
    try:
        torch.ones(1, device=device).add_(1).item()
    except Exception:
        return False
    return True


def in_flight(file: Path) -> Path:
    """The file with the name that the part that fills `file` is attempting."""
    return file.with_suffix(".flight")


def attempted_for(file: Path) -> float:
    """Seconds since the part that fills `file` began what it is attempting; 0 between attempts."""
    try:
        return time.time() - in_flight(file).stat().st_mtime
    except FileNotFoundError:
        return 0.0


def wrong(errors: dict[str, float], tolerance: dict[str, float]) -> str | None:
    """The failure of an answer with these errors; None: it is right."""
    beyond = [f"{name} by {error:.2g}" for name, error in errors.items() if not error <= tolerance[name]]
    return f"wrong: {', '.join(beyond)}" if beyond else None


def message_of(error: Exception) -> str:
    """One line; out of memory is a result of its own."""
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return OUT_OF_MEMORY
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:300]


def release_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
