"""A folder of finished requests, one file each, which a worker writes and anybody reads, also while it is written.

A full disk or a full quota costs records, which are counted and logged, and nothing else.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from attnstats.integrations.vllm import records
from attnstats.integrations.vllm.configuration import OF_RANK
from attnstats.integrations.vllm.records import RequestStatistics

log = logging.getLogger(__name__)

SUFFIX = ".safetensors"
LOCK = ".lock"
RECOUNT = 10.0  # seconds at least between two looks at a full folder


class RequestWriter:
    """The one writer of a folder.

    Attributes:
        bytes: those of all records in the folder, as far as is known: others may delete some, which is looked up when
            the quota is full.
        lost: how many requests could not be written.
    """

    def __init__(self, folder: Path, quota_mb: float, clock: Callable[[], float] = time.monotonic):
        """Raises ValueError: the folder can't be written, or another engine writes into it."""
        self.folder = folder
        self.lost = 0
        self._quota = quota_mb * 1e6
        self._clock = clock
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = (folder / LOCK).open("w")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"folder {folder}: another engine writes its requests there; name another") from error
        except OSError as error:
            raise ValueError(f"folder {folder}: {error.strerror}; name one that can be written") from error
        for unfinished in folder.glob("*.part"):
            unfinished.unlink()
        self._count()

    def _count(self) -> None:
        begin = self._clock()
        self.bytes = sum(status.st_size for _, status in _records_in(self.folder))
        end = self._clock()
        self._next_count = end + max(RECOUNT, 20 * (end - begin))  # the engine waits meanwhile

    def write(self, request_id: str, record: bytes) -> None:
        """Write a record whole, or count it as lost."""
        target = self.folder / (urllib.parse.quote(request_id, safe="") + SUFFIX)
        beside = target.with_suffix(".part")
        more = len(record) - _size(target)
        if self.bytes + more > self._quota and self._clock() >= self._next_count:
            self._count()
        if self.bytes + more > self._quota:
            self.lose(f"the folder holds {self.bytes / 1e6:.1f} MB of its quota_mb of {self._quota / 1e6:g}")
            return
        try:
            beside.write_bytes(record)
            beside.replace(target)
        except OSError as error:
            beside.unlink(missing_ok=True)
            self.lose(f"{error.strerror}")
            return
        self.bytes += more

    def lose(self, reason: str) -> None:
        """Count a request that is not written; the first, the tenth, the hundredth and so on are logged."""
        self.lost += 1
        if str(self.lost).strip("0") == "1":
            log.error("attnstats: %d requests are not in %s, the last because: %s", self.lost, self.folder, reason)

    def close(self) -> None:
        self._lock.close()


class RequestStore(Mapping[str, RequestStatistics]):
    """The requests in a folder that a server writes, by id, in the order in which they finished.

    Each is read when it is asked for. Ids are vLLM's inner ones: that of the user's with eight letters behind it, and
    of several completions the number of each before it, as in `0_chatcmpl-17-1a2b3c4d`.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        """Raises ValueError: no such folder."""
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise ValueError(f"folder {self.folder}: there is none; an engine's setting `folder` names it")

    def _written(self) -> list[list[Path]]:
        """The folders of the workers of each engine that wrote here; tensor-parallel ones have one for each rank."""
        written = [[self.folder]]
        for first in self.folder.glob(OF_RANK.format(0, "*")):
            ranks = first.name.rpartition("-")[2]
            if ranks.isdecimal() and first.is_dir():  # the file of a request may be named so by a client
                written.append([self.folder / OF_RANK.format(rank, ranks) for rank in range(int(ranks))])
        return written

    def _names(self) -> list[str]:
        """The files of requests that all ranks have written, in the order in which they finished."""
        found = {}
        for folders in self._written():
            of_ranks = [{file.name: status.st_mtime_ns for file, status in _records_in(each)} for each in folders]
            for name in set.intersection(*map(set, of_ranks)):
                found[name] = max(times[name] for times in of_ranks)
        return sorted(found, key=lambda name: (found[name], name))

    def __getitem__(self, request_id: str) -> RequestStatistics:
        """Raises KeyError: there is none. ValueError: its file can't be read."""
        name = urllib.parse.quote(request_id, safe="") + SUFFIX
        for folders in self._written():
            try:
                return records.merged([records.decode((each / name).read_bytes()) for each in folders])
            except FileNotFoundError:
                continue
            except ValueError as error:
                raise ValueError(f"{folders[0] / name}: {error}") from error
        raise KeyError(request_id)

    def __iter__(self) -> Iterator[str]:
        return (urllib.parse.unquote(name.removesuffix(SUFFIX)) for name in self._names())

    def __len__(self) -> int:
        return len(self._names())

    def of(self, external_id: str) -> list[RequestStatistics]:
        """The completions of the request with this id of the user's, such as a server's answer has."""
        numbered = {}
        for request_id in self:
            inner = request_id[: -len("-1a2b3c4d")]
            number, _, rest = inner.partition("_")
            if external_id in (inner, request_id):
                numbered[0] = request_id
            elif rest == external_id and number.isdigit():
                numbered[int(number)] = request_id
        return [self[request_id] for _, request_id in sorted(numbered.items())]

    def __repr__(self) -> str:
        return f"RequestStore of {len(self)} requests in {self.folder}"


def _records_in(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """The files of records; those that somebody deletes meanwhile are left out."""
    for file in folder.glob(f"*{SUFFIX}"):
        with contextlib.suppress(FileNotFoundError):
            yield file, file.stat()


def _size(file: Path) -> int:
    """In bytes; 0 for none."""
    try:
        return file.stat().st_size
    except OSError:
        return 0
