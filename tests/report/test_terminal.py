"""Terminal output: progress with and without a terminal, and text of a model that stays text."""

import io
import math
import re

import pytest
import torch
from rich.console import Console

from attnstats.cli.main import main
from attnstats.errors import InputError
from attnstats.report.columns import COLUMNS, find
from attnstats.report.marks import marks
from attnstats.report.scale import DARK, ink, ramp
from attnstats.report.terminal import Terminal, curve, legend, response
from attnstats.study.verify import Error
from tests.hostile import FORBIDDEN, TEXTS
from tests.tiny import synthetic_analysis

HOSTILE = ["how", " many", " [bold]x[/bold]", "\x1b]0;title\x07", "\u202egnp", "\n", " so", " on", " ends"]


def shown(call, *, is_terminal=False):
    file = io.StringIO()
    call(Terminal(Console(file=file, force_terminal=is_terminal, width=100, highlight=False, color_system=None)))
    return file.getvalue()


def test_what_a_model_writes_is_neither_markup_nor_escapes(tmp_path):
    text = shown(lambda terminal: terminal.show([synthetic_analysis(HOSTILE, question="[red]\x1b[2J?")], [tmp_path]))
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "\u202e" not in text
    for part in ("[bold]x[/bold]", "␛]0;title␇", "⟨U+202E⟩gnp", "[red]␛[2J?"):
        assert part in text


def test_peaks_and_files_are_listed(tmp_path):
    analysis = synthetic_analysis(HOSTILE)
    text = shown(lambda terminal: terminal.show([analysis], [tmp_path / "report.html"]))
    for position in analysis.preplan(3):
        assert f"{analysis.waad[position]:.2f}" in text
    for position in analysis.anchors(3):
        assert f"{100 * analysis.fai[position]:.3f}" in text
    assert f"{tmp_path}/report.html" in text.replace("\n", "")


def test_a_token_that_only_begins_a_character_is_seen_among_the_peaks(tmp_path):
    analysis = synthetic_analysis(["how", " many", "", "", "漢", " "])
    lines = shown(lambda terminal: terminal.show([analysis], [tmp_path / "report.html"])).splitlines()
    assert sum("·" in line.split() for line in lines) >= 2
    assert sum("space" in line.split() for line in lines) >= 1


WORDS = [f" w{i}" for i in range(60)]


@pytest.mark.parametrize("column", COLUMNS, ids=lambda column: column.key)
def test_every_token_has_the_shade_of_its_value(column):
    analysis = synthetic_analysis(WORDS)
    values = column.read(analysis)
    domain = column.domain(values)
    text = response(analysis, column)
    assert text.plain.split() == [word.strip() for word in WORDS[2:]]
    spans = {text.plain[span.start : span.end].strip(): span.style for span in text.spans}
    for i, value in enumerate(values.tolist()):
        style = spans.get(f"w{i + 2}")
        if value != value:
            assert style.dim
            assert style.bgcolor is None
        elif domain.shade(value) == 0:
            assert style is None or style.bgcolor is None
        else:
            background = ramp(DARK)[domain.shade(value)]
            assert tuple(style.bgcolor.triplet) == background
            assert tuple(style.color.triplet) == ink(background)


def test_marks_are_lines_over_and_under():
    analysis = synthetic_analysis(WORDS)
    found = marks(analysis)
    text = response(analysis, find("entropy"))
    spans = [(text.plain[span.start : span.end].strip(), span.style) for span in text.spans]
    over = [word for word, style in spans if style.overline]
    under = [word for word, style in spans if style.underline]
    assert over == [f"w{i + 2}" for i in found.among(found.preplan)]
    assert under == [f"w{i + 2}" for i in found.among(found.anchor)]
    assert len(over) == len(under) == 6


def test_an_unknown_column_names_those_there_are(tmp_path):
    with pytest.raises(InputError, match="colour: no such column; there are waad, fai, entropy, delta, gamma"):
        shown(
            lambda terminal: terminal.show([synthetic_analysis(WORDS)], [tmp_path / "report.html"], color_by="colour")
        )


def test_the_column_and_its_unit_are_named(tmp_path):
    text = shown(
        lambda terminal: terminal.show([synthetic_analysis(WORDS)], [tmp_path / "report.html"], color_by="Entropy")
    )
    assert "Entropy 0 " in text
    assert " nats " in text
    column = find("waad")
    assert legend(column, column.domain(torch.tensor([1.0, 2.0, 3.0]))).plain.startswith("WAAD 2 ")


@pytest.mark.parametrize("width", [4, 20, 65, 200])
def test_a_curve_fits_the_width_and_its_highest_block_is_the_peak(width):
    analysis = synthetic_analysis(WORDS)
    line = curve(analysis, find("waad"), width).plain[5:]
    assert len(line) == max(1, min(58, width - 6))
    peak = analysis.preplan(1)[0] - 2
    place = next(i for i in range(len(line)) if (i + 1) * 58 // len(line) > peak)
    assert line[place] == "█"


def test_a_curve_has_a_gap_where_there_is_no_value():
    line = curve(synthetic_analysis(WORDS), find("fai"), 100).plain
    assert line.endswith("  ")
    assert not line[:-2].endswith(" ")


@pytest.mark.parametrize("tokens", [["a", "b", "c"], ["a", "b", "c", "d"]])
def test_shortest_responses(tmp_path, tokens):
    assert "c" in shown(lambda terminal: terminal.show([synthetic_analysis(tokens)], [tmp_path / "report.html"]))


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
    ("worst", "verdict"),
    [(2.1e-4, "agrees with"), (2.2e-4, "DIFFERS from eager attention: fai;"), (math.inf, "DIFFERS")],
)
def test_errors(worst, verdict):
    errors = {"waad": Error(1e-7, 0.0), "fai": Error(worst, 1e-4)}
    text = shown(lambda terminal: terminal.show_errors(errors))
    assert verdict in text
    assert f"{worst:.2e}" in text
    assert "1.00e-04" in text


@pytest.mark.parametrize("is_terminal", [False, True])
def test_hostile_text_is_text_in_the_terminal(tmp_path, is_terminal):
    analyses = [synthetic_analysis(TEXTS), *(synthetic_analysis(["a", "b", "c"], question=text) for text in TEXTS[::7])]
    files = [tmp_path / text for text in TEXTS if "\0" not in text and len(text) < 200]
    text = shown(lambda terminal: terminal.show(analyses, files), is_terminal=is_terminal)
    bare = re.sub(r"\x1b\[[0-9;]*m", "", text)  # colours, overlines and underlines are ours
    assert bare == text or is_terminal
    assert not FORBIDDEN & set(bare)
    assert len(text) < 1_000_000
    assert "Prompt" in bare


def test_hostile_text_in_a_message_is_text(capsys):
    for text in TEXTS:
        assert main(["report", text if text.strip() else "x", "--no-such-option"]) == 2
    assert not (FORBIDDEN - {"\n"}) & set(capsys.readouterr().err)
