"""The terminal output: progress, the responses in colour with their curves, and the names of the files.

It has the scale, columns and marks of the report. Model output is untrusted: it is printed as `visible` text and never
as markup.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path

from rich import progress
from rich.color import Color
from rich.console import Console
from rich.style import Style
from rich.table import Table
from rich.text import Text

from attnstats.cells import highest_of_stretches
from attnstats.report.columns import Column, find
from attnstats.report.marks import marks
from attnstats.report.scale import DARK, SHADES, Domain, ink, ramp
from attnstats.study.analysis import Analysis
from attnstats.study.text import PART, shortened, token_name, visible
from attnstats.study.verify import Error

PEAKS = 8
QUESTION = 5_000  # characters of a question that are shown
SECONDS_BETWEEN_LINES = 5.0
SCALE = ramp(DARK)
BLOCKS = "▁▂▃▄▅▆▇█"


class PlainConsole(Console):
    """A Console that leaves a broken pipe to its caller, where rich would exit."""

    def on_broken_pipe(self) -> None:
        raise  # noqa: PLE0704 called where BrokenPipeError is handled


class Terminal:
    """Progress as a bar in a terminal, and as a line now and then if output goes to a file."""

    def __init__(self, console: Console | None = None, *, quiet: bool = False):
        self.console = console or PlainConsole(highlight=False, quiet=quiet)
        self._bar: progress.Progress | None = None
        self._total, self._done, self._began, self._said = 0, 0, 0.0, 0.0

    def say(self, line: str) -> None:
        self.console.print(Text(visible(line)), style="dim", soft_wrap=True)

    def start(self, what: str, total: int) -> None:
        self._total, self._done = total, 0
        self._began = self._said = time.monotonic()
        if not self.console.is_terminal:
            self.say(what)
            return
        self._bar = progress.Progress(
            progress.TextColumn("[dim]{task.description}"),
            progress.BarColumn(),
            progress.TaskProgressColumn(),
            progress.TimeElapsedColumn(),
            progress.TextColumn("[dim]left"),
            progress.TimeRemainingColumn(),
            console=self.console,
            transient=True,
        )
        self._bar.add_task(what, total=total)
        self._bar.start()

    def advance(self, amount: int = 1) -> None:
        self._done += amount
        if self._bar:
            self._bar.advance(self._bar.task_ids[0], amount)
        elif time.monotonic() - self._said > SECONDS_BETWEEN_LINES:
            self._said = time.monotonic()
            self.say(f"  {self._done / max(1, self._total):.0%}, {self._left()} left")

    def _left(self) -> str:
        passed = time.monotonic() - self._began
        seconds = round(passed * (self._total - self._done) / max(1, self._done))
        return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"

    def finish(self) -> None:
        if self._bar:
            self._bar.stop()
            self._bar = None

    def show(
        self, analyses: Sequence[Analysis], files: Sequence[Path], total: int | None = None, *, color_by: str = "waad"
    ) -> None:
        """Print the responses, coloured by a column of report/columns.py, and the names of the files.

        Args:
            total: the number of responses of the run, of which `analyses` are the first; None: these are all.

        Raises:
            InputError: no column has that name.
        """
        column = find(color_by)
        total = len(analyses) if total is None else total
        for number, analysis in enumerate(analyses, 1):
            self.console.print()
            self.console.rule(Text(f"Prompt {number} of {total}"), style="dim", align="left")
            self.console.print(Text(visible(shortened(analysis.question, QUESTION))), style="bold")
            self.console.print()
            self.console.print(response(analysis, column))
            self.console.print()
            self.console.print(legend(column, column.domain(column.read(analysis))))
            for key in ("waad", "fai"):
                self.console.print(curve(analysis, find(key), self.console.width), no_wrap=True)
            self.console.print()
            self.console.print(peaks(analysis))
        self.console.print()
        if len(analyses) < total:
            self.console.print(f"{len(analyses)} of {total} responses shown; the page and the tables have more")
        for file in files:
            self.console.print(Text(visible(str(file))), soft_wrap=True)

    def show_errors(self, errors: Mapping[str, Error]) -> None:
        """The errors of --verify against float64, and the verdict."""
        table = Table("statistic", "error against float64", "eager's", "limit", box=None, pad_edge=False)
        for name, error in errors.items():
            style = "" if error.passes else "bold red"
            table.add_row(name, Text(f"{error.ours:.2e}", style), f"{error.eager:.2e}", f"{error.limit:.2e}")
        self.console.print()
        self.console.print(table)
        failed = [name for name, error in errors.items() if not error.passes]
        verdict = f"DIFFERS from eager attention: {', '.join(failed)}" if failed else "agrees with eager attention"
        self.console.print(f"{verdict}; the limit is twice eager's own error")


def response(analysis: Analysis, column: Column) -> Text:
    """The response, shaded by the column's value, with a line over preplan tokens and one under anchors.

    Half of the tokens have the least shade, which is the terminal's own background.
    """
    values = column.read(analysis)
    domain = column.domain(values)
    marked = marks(analysis)
    preplan, anchors = set(marked.among(marked.preplan)), set(marked.among(marked.anchor))
    text = Text()
    for i, value in enumerate(values.tolist()):
        token = visible(shortened(analysis.shown[analysis.response_start + i]))
        style = shade_style(domain.shade(value)) if value == value else Style(dim=True)
        if i in preplan or i in anchors:
            style += Style(overline=i in preplan or None, underline=i in anchors or None, bold=True)
            # A marked token must be visible.
            token = token.replace("\n", "↵\n", 1) if "\n" in token else token or PART
        text.append(token, style=style)
    return text


def shade_style(shade: int) -> Style:
    """The colours of a shade; no colours for the least."""
    if shade == 0:
        return Style()
    background = SCALE[shade]
    return Style(color=Color.from_rgb(*ink(background)), bgcolor=Color.from_rgb(*background))


def legend(column: Column, domain: Domain) -> Text:
    """The scale with its ends in the column's unit, and the meaning of the lines."""
    text = Text(f"{column.title} {_brief(domain.low)} ")
    for shade in range(SHADES):
        text.append(" ", shade_style(shade))
    text.append(f" {_brief(domain.high)} {column.unit}   ")
    text.append("over", Style(overline=True, bold=True))
    text.append(" preplan: highest WAAD   ")
    text.append("under", Style(underline=True, bold=True))
    return text.append(" anchor: highest FAI")


def curve(analysis: Analysis, column: Column, width: int) -> Text:
    """The column along the response in one line of blocks, as high as the highest value of their tokens."""
    name = f"{column.title:5}"
    read = column.read(analysis)
    domain = Domain.of(read, pale=0.0)
    values = [None if value != value else value for value in read.tolist()]
    highest = highest_of_stretches(values, max(1, min(len(values), width - len(name) - 1)))
    line = "".join(" " if value is None else BLOCKS[round(7 * domain.share(value))] for value in highest)
    return Text.assemble((name, "dim"), line)


def peaks(analysis: Analysis) -> Table:
    """The highest tokens of WAAD and FAI side by side, with position and value."""
    table = Table(
        "preplan", "position", "WAAD", "anchor", "position", "FAI, %", box=None, pad_edge=False, padding=(0, 3, 0, 0)
    )
    for index in (1, 2, 4, 5):
        table.columns[index].justify = "right"
    count = int(analysis.response.sum())
    if count > PEAKS:
        table.caption, table.caption_justify = f"{PEAKS} of {count} tokens shown", "left"
    left = [_cells(analysis, i, f"{analysis.waad[i]:.2f}") for i in analysis.preplan(PEAKS)]
    right = [_cells(analysis, i, f"{100 * analysis.fai[i]:.3f}") for i in analysis.anchors(PEAKS)]
    for cells in zip_longest(left, right, fillvalue=(Text(), Text(), Text())):
        table.add_row(*cells[0], *cells[1])
    return table


def _brief(value: float) -> str:
    return f"{value:.3g}"


def _cells(analysis: Analysis, position: int, value: str) -> tuple[Text, Text, Text]:
    return Text(token_name(analysis.shown[position])), Text(str(position)), Text(value)
