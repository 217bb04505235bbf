"""The requests that a server recorded, read as the analyses of a run: for `attnstats report`, `load` and `couplings`.

They have what `attnstats analyze` makes of a prompt, but for maps, from records of every head
(`configuration.of_preset`). Texts come from the tokenizer that the records name; the model is not needed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from attnstats.errors import InputError
from attnstats.heads import RECEIVED
from attnstats.integrations.vllm.records import Model, RequestStatistics
from attnstats.integrations.vllm.store import RequestStore
from attnstats.statistics import FAI, WAAD, MeanDistance, Statistic
from attnstats.study.analysis import Analysis, HeadSummary, Outline, Settings
from attnstats.study.couplings import name_of
from attnstats.study.pipeline import Measured, assemble
from attnstats.study.store import Item
from attnstats.study.text import counted

COUPLED = (WAAD, FAI, MeanDistance)  # what couplings are of
WAY = 'record requests with the setting preset="paper_v2"'


class Served(NamedTuple):
    """What requests must have in common to be read together.

    Attributes:
        model: but for the engine, which may be another version's.
    """

    model: Model
    layers: tuple[int, ...]
    heads: int
    statistics: tuple[Statistic, ...]


class ServedRequests(Sequence[Analysis]):
    """The finished requests of a folder, in their order; each is read when it is asked for.

    Requests that came since are not among them.

    Attributes:
        settings: window and horizon of the records.
        newest: the last of them.
        left_out: in words, what is not read, and why.
    """

    def __init__(self, folder: Path):
        """Raises InputError: there is no such folder, or no request in it that can be read."""
        try:
            self._store = RequestStore(folder)
        except ValueError as error:
            raise InputError(str(error)) from error
        self._ids: list[str] = []
        newest: RequestStatistics | None = None
        reasons: dict[str, int] = {}
        common = None
        for request_id in reversed(list(self._store)):  # the newest says which model and settings
            try:
                result = self._store[request_id]
                reason = _fault(result)
            except (KeyError, OSError):  # deleted meanwhile
                continue
            except ValueError:
                reason = "in files that are damaged, or of another version of attnstats"
            if reason is None:
                model = result.model._replace(engine="")
                kind = Served(model, result.layers, _heads(result), result.statistics)
                common, newest = (kind, result) if common is None else (common, newest)
                reason = None if kind == common else "of another model, or with other settings"
            if reason is None:
                self._ids.append(request_id)
            else:
                reasons[reason] = reasons.get(reason, 0) + 1
        self._ids.reverse()
        what = [f"{counted(count, 'request')} {reason}" for reason, count in reasons.items()]
        if newest is None:
            raise InputError(f"{folder}: no request that can be read: {'; '.join(what) or 'it is empty'}; {WAY}")
        self.left_out = ["maps, of which a server records none", *what]
        self.newest: RequestStatistics = newest
        self.settings = Settings(_of_kind(newest, WAAD)[0].window, *_horizon(newest), layers=newest.layers)

    def __len__(self) -> int:
        return len(self._ids)

    @overload
    def __getitem__(self, place: int) -> Analysis: ...

    @overload
    def __getitem__(self, place: slice) -> list[Analysis]: ...

    def __getitem__(self, place: int | slice) -> Analysis | list[Analysis]:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        return self._analysis(self._result(self._ids[place]))

    def _result(self, request_id: str) -> RequestStatistics:
        try:
            return self._store[request_id]
        except (KeyError, OSError) as error:
            raise InputError(
                f"{self._store.folder}: request {request_id!r} was deleted meanwhile; read the folder again"
            ) from error

    def outlines(self) -> Iterator[Outline]:
        """The outlines in order, one at a time."""
        return iter(self)

    def head_summaries(self) -> Iterator[HeadSummary]:
        """The head summaries in order, one at a time."""
        return (analysis.head_summary for analysis in self)

    @property
    def names(self) -> set[str]:
        """The names of the tensors that `items` has."""
        of_statistics = {name_of(s) for s in self.newest.statistics if isinstance(s, COUPLED)}
        return {"layers", "entropy", *of_statistics, *(f"valid.{name}" for name in of_statistics)}

    def items(self, names: Collection[str]) -> Iterator[Item]:
        """The tensors of each response, by the names that `study.couplings` has for them, as far as there are any."""
        for request_id in self._ids:
            result = self._result(request_id)
            response = slice(result.prompt, None)
            tensors = {
                "layers": torch.tensor(result.layers, dtype=torch.int64, device="cpu"),
                "entropy": _entropy(result)[response],
            }
            for s in result.statistics:
                if isinstance(s, COUPLED):
                    tensors[name_of(s)] = result[s][:, 0, :, response]
                    tensors[f"valid.{name_of(s)}"] = result.valid[s][0, response]
            yield {name: tensors[name] for name in names if name in tensors}, {}

    @property
    def model(self) -> dict[str, Any]:
        """What summary.json says of a model."""
        return {"name": self.newest.model.name, "dtype": self.newest.model.dtype, "engine": self.newest.model.engine}

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        name = self.newest.model.tokenizer
        try:
            return AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise InputError(f"{self._store.folder}: the tokenizer {name} can't be loaded: {error}") from error

    def _analysis(self, result: RequestStatistics) -> Analysis:
        ids = result.tokens[0].tolist()
        prompt, response = ids[: result.prompt], ids[result.prompt :]
        waad, fai = WAAD(self.settings.window), FAI(self.settings.fai_lo, self.settings.fai_hi)
        measured = Measured(
            waad=_rows(result, waad),
            fai=result[fai][:, 0],
            mean_distance=_rows(result, MeanDistance()),
            received=result[RECEIVED][:, 0],
            fai_valid=result.valid[fai][0],
            received_valid=result.valid[RECEIVED][0],
            entropy=_entropy(result),
            layers=result.layers,
        )
        return assemble(
            self._tokenizer, question_in(self._tokenizer, prompt), prompt, response, measured, self.settings.head_share
        )


def question_in(tokenizer: Any, prompt: list[int]) -> str:
    """The text of a prompt that somebody asked, as far as the special tokens of a chat tell; else all of its text."""
    special = set(tokenizer.all_special_ids)
    parts = [list(part) for is_special, part in groupby(prompt, special.__contains__) if not is_special]
    # Behind the last one, and in those of one word, are the names of roles.
    texts = [text for part in parts[:-1] if len((text := tokenizer.decode(part).strip()).split()) > 1]
    whole: str = tokenizer.decode(prompt, skip_special_tokens=True)
    return texts[-1].removeprefix("user\n") if texts else whole


def _fault(result: RequestStatistics) -> str | None:
    """Why a request can't be read, to be said of several; None: it can."""
    if result.reduce or any(chosen is not None for of in result.heads.values() for chosen in of.values()):
        return "of which not every head was recorded"
    missing = [s for s in (MeanDistance(), RECEIVED) if s not in result.statistics]
    if missing or not _of_kind(result, WAAD) or len(_of_kind(result, FAI)) < 2:
        return "without the statistics of a preset"
    if result.tokens.shape[1] - result.prompt < 2:
        return "with fewer than two tokens in the answer that went through the model"
    if not all(bool(result.valid[s][0, result.prompt :].all()) for s in result.statistics if s.axis != "column"):
        return "with tokens of the answer that were found in the cache"
    return None


def _heads(result: RequestStatistics) -> int:
    return int(result[MeanDistance()].shape[2])


def _rows(result: RequestStatistics, statistic: Statistic) -> Tensor:
    """(L, H, T), NaN where a token was found in the cache: a 0 there is a placeholder."""
    values: Tensor = result[statistic][:, 0]
    return values.masked_fill(~result.valid[statistic][0], torch.nan)


def _entropy(result: RequestStatistics) -> Tensor:
    """(T,), NaN where it was not recorded."""
    if result.token_entropy is not None:
        return result.token_entropy
    return torch.full((result.tokens.shape[1],), torch.nan, dtype=torch.float32, device="cpu")


def _of_kind(result: RequestStatistics, kind: type[Any]) -> list[Any]:
    return [s for s in result.statistics if type(s) is kind]


def _horizon(result: RequestStatistics) -> tuple[int, int | None]:
    """That of the first FAI, as presets have it."""
    fai = next(s for s in _of_kind(result, FAI) if s != RECEIVED)
    return fai.lo, fai.hi
