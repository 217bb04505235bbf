"""What `attnstats analyze` shows in the terminal: progress, the responses with their peaks, and where the files are.

Model output is untrusted: it only gets here as `visible` text, and never as markup. Called by cli.py.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from attnstats.analyze import Analysis
from attnstats.outputs import FILES
from attnstats.text import PART, visible

PEAKS = 8
SECONDS_BETWEEN_LINES = 5.0
PREPLAN, ANCHOR, BOTH = "bold black on bright_cyan", "bold black on yellow", "bold black on bright_green"


class Terminal:
    """Progress as a bar where there is a terminal, as a line now and then where output goes to a file."""

    def __init__(self, console: Console | None = None, *, quiet: bool = False):
        self.console = console or Console(highlight=False, quiet=quiet)
        self._bar: Progress | None = None
        self._total, self._done, self._began, self._said = 0, 0, 0.0, 0.0

    def say(self, line: str) -> None:
        self.console.print(Text(visible(line)), style="dim", soft_wrap=True)

    def start(self, what: str, total: int) -> None:
        self._total, self._done = total, 0
        self._began = self._said = time.monotonic()
        if not self.console.is_terminal:
            self.say(what)
            return
        self._bar = Progress(
            TextColumn("[dim]{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("[dim]left"),
            TimeRemainingColumn(),
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

    def show(self, analyses: Sequence[Analysis], out: Path) -> None:
        for number, analysis in enumerate(analyses, 1):
            self.console.print()
            self.console.rule(Text(f"Prompt {number} of {len(analyses)}"), style="dim", align="left")
            self.console.print(Text(visible(analysis.question)), style="bold")
            self.console.print()
            self.console.print(response(analysis))
            self.console.print()
            self.console.print(peaks(analysis))
        legend = Text.assemble(
            (" preplan ", PREPLAN), " high WAAD  ", (" anchor ", ANCHOR), " high FAI  ", (" both ", BOTH)
        )
        self.console.print(legend)
        self.console.print()
        for name in FILES:
            self.console.print(Text(str(out / name)), soft_wrap=True)

    def show_differences(self, largest: dict[str, float], tolerance: float) -> None:
        table = Table("statistic", "largest |difference| from eager attention", box=None, pad_edge=False)
        for name, value in largest.items():
            table.add_row(name, Text(f"{value:.2e}", style="" if value <= tolerance else "bold red"))
        self.console.print()
        self.console.print(table)
        worst = max(largest.values())
        verdict = "agrees with" if worst <= tolerance else "DIFFERS from"
        self.console.print(f"{verdict} eager attention: {worst:.2e}, the limit is {tolerance:.0e}")


def response(analysis: Analysis) -> Text:
    """The response with its highest tokens marked."""
    preplan, anchors = set(analysis.preplan(PEAKS)), set(analysis.anchors(PEAKS))
    text = Text()
    for position in range(analysis.response_start, len(analysis.tokens)):
        token = visible(analysis.tokens[position])
        style = ""
        if position in preplan or position in anchors:
            style = BOTH if position in preplan and position in anchors else PREPLAN if position in preplan else ANCHOR
            # What is marked has to be seen.
            token = token.replace("\n", "↵\n", 1) if "\n" in token else token or PART
        text.append(token, style=style)
    return text


def peaks(analysis: Analysis) -> Table:
    """The highest tokens of both curves side by side, with position and value."""
    table = Table(
        "preplan", "position", "WAAD", "anchor", "position", "FAI", box=None, pad_edge=False, padding=(0, 3, 0, 0)
    )
    for column in (1, 2, 4, 5):
        table.columns[column].justify = "right"
    left = [_cells(analysis, i, f"{analysis.waad[i]:.2f}") for i in analysis.preplan(PEAKS)]
    right = [_cells(analysis, i, f"{analysis.fai[i]:.4f}") for i in analysis.anchors(PEAKS)]
    empty = (Text(), Text(), Text())
    for row in range(max(len(left), len(right))):
        table.add_row(
            *(left[row] if row < len(left) else empty),
            *(right[row] if row < len(right) else empty),
        )
    return table


def _cells(analysis: Analysis, position: int, value: str) -> tuple[Text, Text, Text]:
    token = visible(analysis.tokens[position], newline="↵", tab="⇥") or PART
    return Text(token.strip() or "space"), Text(str(position)), Text(value)
