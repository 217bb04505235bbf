"""A finished run of `attnstats analyze`, or what a server recorded, as one object: `attnstats.load`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import cached_property
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from attnstats import cells, report
from attnstats.chance import Coupling
from attnstats.errors import InputError
from attnstats.heads import HeadProfile
from attnstats.report import notebook
from attnstats.report.columns import find
from attnstats.study import findings, outputs, tables
from attnstats.study.analysis import Analyses, Analysis, Settings
from attnstats.study.store import RUN
from attnstats.study.text import counted, shortened, visible

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

    from attnstats.integrations.vllm.analyses import ServedRequests

Kind = Literal["rhythm", "maps", "heads"]
SHOWN = 3  # prompts that a run's own text and its cell in a notebook name
WIDTH = 90  # characters of a line


def load(folder: str | PathLike[str]) -> FinishedRun:
    """`attnstats.load`."""
    if not isinstance(folder, (str, PathLike)):
        raise TypeError(f"folder: must be the path of a run, got {type(folder).__name__}")
    path = Path(folder)
    return ServedRun(path) if holds_requests(path) else FinishedRun(path)


def holds_requests(folder: Path) -> bool:
    """True for a folder of requests that a server recorded, with a folder in it for each of several ranks."""
    records = ("*.safetensors", "rank-*/*.safetensors")
    return folder.is_dir() and not (folder / RUN).exists() and any(any(folder.glob(each)) for each in records)


class FinishedRun(Sequence[Analysis]):
    """The analyses of a run, one per prompt, with its tables and figures. Each is read when it is asked for.

    Attributes:
        folder: where it lies.
        analyses: those of the run, with their `outlines`.
        settings: window, horizon, layers and so on.
        summary: what summary.json has: model, versions, seconds, errors.

    Example:
        run = attnstats.load("out/run")
        run.tokens.query("is_response").nlargest(5, "waad")
        run[0].anchors(5)
        run.plot("rhythm").savefig("one.pdf")
    """

    folder: Path
    analyses: Analyses | ServedRequests
    settings: Settings
    summary: dict[str, Any]

    def __init__(self, folder: Path):
        self.folder = folder
        self.analyses, self.settings, self.summary, self._of_file = outputs.load(folder)

    def __len__(self) -> int:
        return len(self.analyses)

    @overload
    def __getitem__(self, place: int) -> Analysis: ...

    @overload
    def __getitem__(self, place: slice) -> list[Analysis]: ...

    def __getitem__(self, place: int | slice) -> Analysis | list[Analysis]:
        if not isinstance(place, (int, slice)):
            raise TypeError(f"run[{place!r}]: analyses are numbered by prompt, from 0; run.prompts has their texts")
        try:
            return self.analyses[place]
        except IndexError:
            raise IndexError(f"run[{place}]: {self.folder} has prompts 0 to {len(self) - 1}") from None

    @cached_property
    def tokens(self) -> DataFrame:
        """One row per token of prompts and responses: prompt, position, token, is_response, waad (tokens), fai (share
        of attention), fai_valid, delta, entropy (nats)."""
        return self._table(tables.TOKENS)

    @cached_property
    def heads(self) -> DataFrame:
        """One row per prompt and captured head: its mean distance over the response, and local, global or middle."""
        return self._table(tables.HEADS)

    @cached_property
    def prompts(self) -> DataFrame:
        """One row per prompt: texts, lengths, and the positions of highest WAAD and of highest FAI."""
        return self._table(tables.PROMPTS)

    @cached_property
    def profile(self) -> HeadProfile:
        """Every head's distance and kurtosis over all responses."""
        return HeadProfile.load(self.folder / outputs.PROFILE)

    def couplings(self) -> DataFrame:
        """One row per coupling of the paper's Table 2: observed and by chance, lift, p, interval, counts, and the
        reason where there is no p."""
        import pandas

        rows = [dataclasses.asdict(each) | {"lift": each.lift, "reason": each.reason} for each in self._couplings()]
        names = [field.name for field in dataclasses.fields(Coupling)]
        return pandas.DataFrame(rows, columns=[*names, "lift", "reason"]).set_index("name")

    def plot(self, kind: Kind = "rhythm", prompt: int = 0, tokens: tuple[int, int] | None = None) -> Figure:
        """A figure of one prompt: WAAD and FAI along the response (rhythm), mean maps (maps), or distances (heads).

        Args:
            prompt: its index, from 0.
            tokens: the first and the last token of the response to show, from 1; for rhythm. None: all.

        Raises:
            InputError: no such figure, or no such tokens. IndexError: no such prompt.
        """
        from attnstats.report import figures

        if kind not in figures.FIGURES:
            raise InputError(f"kind {kind!r}: no such figure; there are {', '.join(figures.FIGURES)}")
        analysis = self[prompt]
        if tokens is None:
            return figures.FIGURES[kind](analysis)
        if kind != "rhythm":
            raise InputError(f"tokens: is for 'rhythm', not for {kind!r}; leave it out")
        figures.check_tokens(analysis, tokens, f"tokens {tokens}")
        return figures.rhythm(analysis, tokens)

    def show(self, prompt: int = 0, color_by: str = "waad") -> notebook.Shaded:
        """The response shaded by a statistic, with its curve, for a cell of a notebook.

        Args:
            color_by: waad, fai, entropy, delta or gamma.

        Raises:
            InputError: no such statistic. IndexError: no such prompt.
        """
        return notebook.Shaded(self[prompt], find(color_by, "color_by"))

    def page(self) -> str:
        """The report as HTML, drawn again."""
        return report.render(self.analyses, self.settings, self.summary, self._couplings())

    def report(self, out: str | Path | None = None) -> Path:
        """Draw the report again; out: another file than the folder's report.html. Returns the file.

        Raises:
            InputError: a file that can't be written.
        """
        path = self.folder / outputs.REPORT if out is None else Path(out)
        page = self.page()
        try:
            path.write_text(page, encoding="utf-8")
        except OSError as error:
            raise InputError(f"out {path}: {error.strerror}; name a file that can be written") from error
        return path

    def __repr__(self) -> str:
        return "\n".join(self._lines())

    def _repr_html_(self) -> str:
        return cells.text(repr(self)) + self.show()._repr_html_()

    def _lines(self) -> list[str]:
        model, outlines = self.summary["model"], list(islice(self.analyses.outlines(), SHOWN))
        subject = str(self.summary.get("subject", "prompt"))
        lines = [
            f"Run {self.folder}: {visible(counted(len(self), subject))}, {visible(str(model.get('name', '')))}",
            f"  layers {', '.join(map(str, outlines[0].layers))}; {outlines[0].distance.shape[1]} heads each",
        ]
        for index, outline in enumerate(outlines):
            question = visible(shortened(outline.question, WIDTH), newline=" ", tab=" ")
            lines.append(f"  [{index}] {int(outline.response.sum())} tokens: {question}")
        return lines + ([f"  and {len(self) - SHOWN} more"] if len(self) > SHOWN else [])

    def _couplings(self) -> Sequence[Coupling]:
        return self._of_file

    def _table(self, name: str) -> DataFrame:
        import pandas

        path = self.folder / f"{name}.parquet"
        try:
            return pandas.read_parquet(path)
        except (OSError, ValueError) as error:  # pyarrow's, of a file that is damaged
            raise InputError(f"{path}: {error}; `attnstats analyze` writes it") from error


class ServedRun(FinishedRun):
    """The requests that a server recorded, as a run that has no maps; tables and couplings are made when asked for."""

    analyses: ServedRequests

    def __init__(self, folder: Path):
        # Writers lock a folder as only POSIX has it.
        from attnstats.integrations.vllm.analyses import ServedRequests

        self.folder = folder
        self.analyses = ServedRequests(folder)
        self.settings = self.analyses.settings
        self.summary = {
            "model": self.analyses.model,
            "subject": "request",
            "left_out": self.analyses.left_out,
            "settings": {name: getattr(self.settings, name) for name in ("window", "fai_lo", "fai_hi", "layers")},
            "versions": outputs.versions(),
            "timings_seconds": {},
            "peak_memory_bytes": {},
            "prompts": len(self.analyses),
        }

    @cached_property
    def profile(self) -> HeadProfile:
        """Every head's distance and kurtosis over all responses."""
        return findings.profile(self.analyses.head_summaries())

    def _couplings(self) -> Sequence[Coupling]:
        return findings.couplings(self.analyses.outlines(), self.profile)

    def _table(self, name: str) -> DataFrame:
        import pandas

        rows = {tables.TOKENS: tables.token_rows, tables.HEADS: tables.head_rows}.get(name)
        if rows is not None:
            return pandas.concat(
                [pandas.DataFrame(rows(i, each)) for i, each in enumerate(self.analyses.outlines())], ignore_index=True
            )
        return pandas.DataFrame([tables.prompt_record(i, each) for i, each in enumerate(self.analyses.outlines())])
