"""Invisible characters become visible, and formulas become text."""

import sys
import unicodedata

import pytest

from attnstats.study.text import LONGEST, from_spreadsheet_cell, spreadsheet_cell, token_text, visible
from tests.hostile import FORBIDDEN, TEXTS


def test_nothing_unseen_is_left_but_line_breaks():
    every = "".join(map(chr, range(sys.maxunicode + 1)))
    left = {unicodedata.category(c) for c in visible(every)}
    assert not left & {"Cf", "Cs", "Zl", "Zp"}
    assert {c for c in visible(every) if unicodedata.category(c) == "Cc"} == {"\n", "\t"}


@pytest.mark.parametrize(("text", "shown"), [
    ("plain ünïcode 漢字 🙂", "plain ünïcode 漢字 🙂"),
    ("\x1b[31mred\x07", "␛[31mred␇"),
    ("a\x7f\x9b", "a␡⟨U+009B⟩"),
    ("\u202egnp.exe", "⟨U+202E⟩gnp.exe"),
    ("\ud800", "⟨U+D800⟩"),
    ("a\nb\tc\r", "a\nb\tc␍"),
])  # fmt: skip
def test_visible(text, shown):
    assert visible(text) == shown


def test_line_breaks_can_be_shown():
    assert visible("\n\t", newline="↵", tab="⇥") == "↵⇥"


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r", "\0"])
def test_formulas_become_text(start):
    assert spreadsheet_cell(f"{start}1") == f"'{start}1"


@pytest.mark.parametrize("text", ["", " =1", "a=1", "'", "1-1"])
def test_other_cells_stay(text):
    assert spreadsheet_cell(text) == text


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_hostile_text_is_visible_and_cells_come_back(text):
    assert not FORBIDDEN & set(visible(text))
    assert not (FORBIDDEN | {"\n", "\t"}) & set(token_text(text))
    assert len(token_text(text)) <= 10 * LONGEST + 1
    cell = spreadsheet_cell(text)
    assert cell[:1] not in ("=", "+", "-", "@", "\t", "\r", "\0", "\uff1d", "\uff0b", "\uff0d", "\uff20")
    assert from_spreadsheet_cell(cell) == text


def test_marks_on_a_character_are_few():
    assert visible("e\u0301") == "e\u0301"
    assert visible("a" + "\u0301" * 12 + "b\u0301") == "a" + "\u0301" * 8 + "⟨U+0301⟩" * 4 + "b\u0301"
