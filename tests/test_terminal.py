"""Terminal output: progress with and without a terminal, and text of a model that stays text."""

import io

import pytest
from rich.console import Console

from attnstats.terminal import Terminal
from tests.tiny import synthetic_analysis

HOSTILE = ["how", " many", " [bold]x[/bold]", "\x1b]0;title\x07", "\u202egnp", "\n", " so", " on", " ends"]


def shown(call, *, is_terminal=False):
    file = io.StringIO()
    call(Terminal(Console(file=file, force_terminal=is_terminal, width=100, highlight=False, color_system=None)))
    return file.getvalue()


def test_what_a_model_writes_is_neither_markup_nor_escapes(tmp_path):
    text = shown(lambda terminal: terminal.show([synthetic_analysis(HOSTILE, question="[red]\x1b[2J?")], tmp_path))
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "\u202e" not in text
    for part in ("[bold]x[/bold]", "␛]0;title␇", "⟨U+202E⟩gnp", "[red]␛[2J?"):
        assert part in text


def test_peaks_and_files_are_listed(tmp_path):
    analysis = synthetic_analysis(HOSTILE)
    text = shown(lambda terminal: terminal.show([analysis], tmp_path))
    for position in analysis.preplan(3):
        assert f"{analysis.waad[position]:.2f}" in text
    for position in analysis.anchors(3):
        assert f"{analysis.fai[position]:.4f}" in text
    assert f"{tmp_path}/report.html" in text.replace("\n", "")


def test_a_token_that_only_begins_a_character_is_seen_among_the_peaks(tmp_path):
    analysis = synthetic_analysis(["how", " many", "", "", "漢", " "])
    lines = shown(lambda terminal: terminal.show([analysis], tmp_path)).splitlines()
    assert sum("·" in line.split() for line in lines) >= 2
    assert sum("space" in line.split() for line in lines) >= 1


def test_without_a_terminal_progress_is_lines_now_and_then(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])

    def work(terminal):
        terminal.start("Working", 30)
        for _ in range(30):
            now[0] += 1
            terminal.advance()
        terminal.finish()

    lines = shown(work).splitlines()
    assert lines[0] == "Working"
    assert lines[1:] == [
        f"  {done}%, 0:00:{left:02d} left" for done, left in ((20, 24), (40, 18), (60, 12), (80, 6), (100, 0))
    ]


def test_in_a_terminal_progress_is_a_bar():
    def work(terminal):
        terminal.start("Working", 2)
        terminal.advance()
        terminal.finish()

    assert "Working" in shown(work, is_terminal=True)


@pytest.mark.parametrize(
    ("worst", "verdict"), [(1e-5, "agrees with"), (2e-4, "DIFFERS from"), (float("inf"), "DIFFERS")]
)
def test_differences(worst, verdict):
    text = shown(lambda terminal: terminal.show_differences({"waad": 1e-7, "fai": worst}, 1e-4))
    assert verdict in text
    assert f"{worst:.2e}" in text
