"""A folder of results, one prompt at a time, that a killed run goes on from and that several processes fill.

A response is written when it has been generated (items/00007.json), its statistics when they have been computed
(items/00007.safetensors); each file appears whole or not at all. run.json says what the results are of, so that a
run is never continued with another model or other settings. Called by corpus.py; outputs.py makes tables of it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from attnstats.errors import InputError

RUN, ITEMS = "run.json", "items"
_TEXTS = "attnstats"  # the key of the texts in the header of a safetensors file


class Store:
    """The results of one run.

    Args:
        folder: must exist; `begin` makes one, or finds one to go on with.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def has_response(self, index: int) -> bool:
        return self._path(index, "json").is_file()

    def has(self, index: int) -> bool:
        return self.path(index).is_file()

    def write_response(self, index: int, prompt: list[int], response: list[int]) -> None:
        """Keep the token ids of a prompt and of what was generated."""
        text = json.dumps({"prompt": prompt, "response": response})
        _whole(self._path(index, "json"), lambda part: part.write_text(text, encoding="ascii"))

    def response(self, index: int) -> tuple[list[int], list[int]]:
        """The token ids of a prompt and of its response. Raises InputError where they cannot be read."""
        record = read_json(self._path(index, "json"))
        try:
            return list(map(int, record["prompt"])), list(map(int, record["response"]))
        except (KeyError, TypeError, ValueError) as error:
            raise corrupt(self._path(index, "json"), "no token ids of a prompt and a response") from error

    def write(self, index: int, tensors: dict[str, Tensor], texts: dict[str, Any]) -> None:
        """Keep the results of a prompt: tensors by name, and whatever of `texts` JSON can hold."""
        from safetensors.torch import save_file

        header = {_TEXTS: json.dumps(texts, ensure_ascii=True, allow_nan=False)}
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        _whole(self.path(index), lambda part: save_file(contiguous, str(part), metadata=header))

    def read(self, index: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The tensors and texts of a prompt. Raises InputError where they cannot be read."""
        from safetensors import SafetensorError, safe_open

        path = self.path(index)
        try:
            with safe_open(str(path), framework="pt") as file:
                names = file.keys()
                return {name: file.get_tensor(name) for name in names}, json.loads(file.metadata()[_TEXTS])
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise corrupt(path, str(error)) from error

    def discard_empty(self) -> bool:
        """Remove the folder where nothing has been kept in it yet; whether it was removed."""
        empty = not self.folder.exists() or not any((self.folder / ITEMS).glob("*.json"))
        if empty:
            shutil.rmtree(self.folder, ignore_errors=True)
        return empty

    def indices(self) -> list[int]:
        """The prompts whose results are here, in order."""
        found = (self.folder / ITEMS).glob("*.safetensors")
        return sorted(int(path.stem) for path in found if path.stem.isdecimal())

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], dict[str, Any]]]:
        return (self.read(index) for index in self.indices())

    def path(self, index: int) -> Path:
        """The file of a prompt's results."""
        return self._path(index, "safetensors")

    def _path(self, index: int, suffix: str) -> Path:
        return self.folder / ITEMS / f"{index:06d}.{suffix}"


def begin(folder: Path, identity: dict[str, Any], *, resume: bool, option: str = "--out") -> Store:
    """The store to work in: a new one, or with `resume` the one that a run of the same identity left.

    Args:
        identity: all that decides the results, as JSON holds it: model, settings, prompts, versions.

    Raises:
        InputError: results are there and `resume` isn't given, or they are of something else, or can't be written.
    """
    identity = json.loads(json.dumps(identity))
    try:
        if (folder / RUN).is_file():
            if not resume:
                done = len(Store(folder).indices())
                raise InputError(
                    f"{option} {folder}: holds an unfinished run with {done} prompts done; "
                    "go on with it by --resume, or delete it"
                )
            _same(read_json(folder / RUN), identity, folder)
            return Store(folder)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise InputError(f"{option} {folder}: is there and isn't an unfinished run of ours; name another folder")
        (folder / ITEMS).mkdir(parents=True, exist_ok=True)
        _whole(folder / RUN, lambda part: part.write_text(json.dumps(identity, indent=2) + "\n", encoding="ascii"))
    except OSError as error:
        raise InputError(f"{option} {folder}: {error.strerror or error}; name a folder that can be written") from error
    return Store(folder)


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
    """A JSON object from a file of a results folder. Raises InputError."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise corrupt(path, str(error)) from error
    if not isinstance(record, dict):
        raise corrupt(path, "not a JSON object")
    return record


def corrupt(path: Path, why: str) -> InputError:
    return InputError(f"{path}: cannot be read ({why}); delete this file and run again with --resume")


def _whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` make a file beside `path`, then give it that name."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(part)
        part.chmod(0o666 & ~umask())  # safetensors writes for the owner alone
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
