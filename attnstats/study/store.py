"""A folder of results, prompt by prompt, from which a killed run is resumed and which several processes can fill.

A response is written when it has been generated (items/00007.json), its statistics when they have been computed
(items/00007.safetensors); each file appears whole or not at all. run.json says which model and settings the results are
of, so that a run is only resumed with the same; a lock lets one process at a time begin it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from attnstats.errors import InputError

if TYPE_CHECKING:
    from filelock import FileLock

Item = tuple[dict[str, Tensor], dict[str, Any]]  # the results of a prompt: tensors and texts by name

RUN, ITEMS, LOCK = "run.json", "items", ".lock"
_TEXTS = "attnstats"  # the key of the texts in the header of a safetensors file
_ITEM = re.compile(r"\d{6,}\.(json|safetensors)")


class Store:
    """The results of one run.

    Args:
        folder: must exist; `begin` makes a new one or takes one to resume.
        lock: held until `close`, so that no other process begins or resumes the run.
    """

    def __init__(self, folder: Path, lock: FileLock | None = None):
        self.folder = folder
        self._lock = lock

    def close(self) -> None:
        """Release the lock."""
        if self._lock is not None:
            (self.folder / LOCK).unlink(missing_ok=True)
            self._lock.release()
            self._lock = None

    def has_response(self, index: int) -> bool:
        return self._path(index, "json").is_file()

    def has(self, index: int) -> bool:
        return self.path(index).is_file()

    def write_response(self, index: int, prompt: list[int], response: list[int]) -> None:
        """Write the token ids of a prompt and its response."""
        text = json.dumps({"prompt": prompt, "response": response})
        _whole(self._path(index, "json"), lambda part: part.write_text(text, encoding="ascii"))

    def response(self, index: int) -> tuple[list[int], list[int]]:
        """The token ids of a prompt and of its response. Raises InputError if they cannot be read."""
        record = read_json(self._path(index, "json"))
        try:
            prompt, response = ([int(token) for token in record[name]] for name in ("prompt", "response"))
            if not prompt or not response or min(*prompt, *response) < 0:
                raise ValueError
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise corrupt(self._path(index, "json"), "no token ids of a prompt and a response") from error
        return prompt, response

    def write(self, index: int, tensors: dict[str, Tensor], texts: dict[str, Any]) -> None:
        """Write the results of a prompt: tensors by name, and `texts`, which JSON must be able to hold."""
        from safetensors.torch import save_file

        header = {_TEXTS: json.dumps(texts, ensure_ascii=True, allow_nan=False)}
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        _whole(self.path(index), lambda part: save_file(contiguous, str(part), metadata=header))

    def read(self, index: int, names: Collection[str] | None = None) -> Item:
        """The tensors and texts of a prompt; the file is read only as far as the tensors of these names (None: all).

        Raises:
            InputError: they cannot be read.
        """
        from safetensors import SafetensorError, safe_open

        path = self.path(index)
        try:
            with safe_open(str(path), framework="pt") as file:
                chosen = file.keys() if names is None else names
                return {name: file.get_tensor(name) for name in chosen}, json.loads(file.metadata()[_TEXTS])
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise corrupt(path, str(error)) from error

    def discard_empty(self) -> bool:
        """Remove the folder if it has no items; True if it was removed."""
        empty = not self.folder.exists() or not any(_ITEM.fullmatch(path.name) for path in self._items())
        if empty:
            self.close()
            shutil.rmtree(self.folder, ignore_errors=True)
        return empty

    def foreign(self) -> str | None:
        """The name of a file among the items that isn't one, or None."""
        names = (path.name for path in self._items() if not _ITEM.fullmatch(path.name))
        return next((f"{ITEMS}/{name}" for name in sorted(names)), None)

    def sweep(self) -> None:
        """Remove the partial files of killed writers."""
        for path in self._items():
            if path.name.startswith("."):
                path.unlink(missing_ok=True)

    def _items(self) -> list[Path]:
        folder = self.folder / ITEMS
        return list(folder.iterdir()) if folder.is_dir() else []

    def indices(self, suffix: str = "safetensors") -> list[int]:
        """The numbers of the prompts with results, ascending; those with a response for the suffix "json"."""
        names = (path for path in self._items() if _ITEM.fullmatch(path.name))
        return sorted(int(path.stem) for path in names if path.suffix == f".{suffix}")

    def kept(self) -> str:
        """What the store holds, in words; empty if it holds nothing.

        Example:
            >>> Store(Path("absent")).kept()
            ''
        """
        results, answers = len(self.indices()), len(self.indices("json"))
        if not answers:
            return f"{results} result{'' if results == 1 else 's'}" if results else ""
        return f"{answers} answer{'' if answers == 1 else 's'}, {results} of them with statistics"

    def __iter__(self) -> Iterator[Item]:
        return self.items()

    def items(self, names: Collection[str] | None = None) -> Iterator[Item]:
        """The items in order, one at a time, each with the tensors of these names (None: all)."""
        return (self.read(index, names) for index in self.indices())

    def path(self, index: int) -> Path:
        """The file with the results of a prompt."""
        return self._path(index, "safetensors")

    def _path(self, index: int, suffix: str) -> Path:
        return self.folder / ITEMS / f"{index:06d}.{suffix}"


def begin(folder: Path, identity: dict[str, Any], *, resume: bool, option: str = "--out") -> Store:
    """A new store, or with `resume` the one that a run of the same identity left.

    Args:
        identity: everything that decides the results, as JSON can hold it: model, settings, prompts, versions.

    Raises:
        InputError: the folder has results and `resume` isn't given, or they are of another identity, or another process
            is at work, or the folder can't be written.
    """
    identity = json.loads(json.dumps(identity))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        store = Store(folder, _locked(folder, option))
        try:
            _begin(store, identity, resume, option)
        except BaseException:
            store.close()
            raise
    except OSError as error:
        raise InputError(f"{option} {folder}: {error.strerror or error}; name a folder that can be written") from error
    return store


def _locked(folder: Path, option: str) -> FileLock:
    from filelock import FileLock, Timeout

    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise InputError(f"{option} {folder}: another process is at work there; wait for it, or stop it") from error
    return lock


def _begin(store: Store, identity: dict[str, Any], resume: bool, option: str) -> None:
    folder = store.folder
    if (folder / RUN).is_file():
        if not resume:
            raise InputError(
                f"{option} {folder}: holds an unfinished run with {store.kept() or 'no answer'}; "
                "go on with it by --resume, or delete it"
            )
        require_same(folder, identity)
        store.sweep()
        return
    # A run killed right at its start leaves a folder without run.json and without items.
    foreign = any(path.name not in (LOCK, ITEMS) and not path.name.startswith(f".{RUN}") for path in folder.iterdir())
    if foreign or any(store._items()):
        raise InputError(f"{option} {folder}: is there and isn't an unfinished run of ours; name another folder")
    _whole(folder / RUN, lambda part: part.write_text(json.dumps(identity, indent=2) + "\n", encoding="ascii"))
    (folder / ITEMS).mkdir(exist_ok=True)


def require_same(folder: Path, identity: dict[str, Any]) -> None:
    """Raises InputError if the results of a folder are of another identity."""
    try:
        before = read_json(folder / RUN)
    except InputError as error:
        raise InputError(f"{folder / RUN}: cannot be read; delete the folder {folder} and run again") from error
    _same(before, json.loads(json.dumps(identity)), folder)


def _same(before: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    for key in sorted({*before, *now}):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            _same(old, new, folder)
        elif old != new:
            raise InputError(
                f"--resume: {folder} was begun with {key} {_short(old)}, this run has {_short(new)}; "
                "repeat its options, or name another --out"
            )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a results folder. Raises InputError."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise corrupt(path, str(error)) from error
    if not isinstance(record, dict):
        raise corrupt(path, "not a JSON object")
    return record


def corrupt(path: Path, why: str) -> InputError:
    """The error for a file of a run that can't be read."""
    return InputError(f"{path}: cannot be read ({why}); delete this file and run again with --resume")


def _whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` make a file under another name, then rename it to `path`. Raises InputError if that fails."""
    from safetensors import SafetensorError

    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(part)
        part.chmod(0o666 & ~umask())  # safetensors makes files for the owner only
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be written ({error}); make room and go on with --resume") from error
    finally:
        part.unlink(missing_ok=True)


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
