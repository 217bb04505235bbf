"""Invisible characters become visible, and formulas become text."""

import sys
import unicodedata

import pytest

from attnstats.study.text import spreadsheet_cell, visible


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
