"""Untrusted text made safe to show: text of a model can hold terminal escapes, bidi overrides and formulas.

`visible` is for the terminal and the report (whose template also escapes HTML), `spreadsheet_cell` for CSV. Neither
loses information that a reader could need.
"""

from __future__ import annotations

import re
import unicodedata

# Controls, surrogates, formats (all bidi marks, overrides and isolates are among them), line and paragraph separators.
_INVISIBLE = ("Cc", "Cs", "Cf", "Zl", "Zp")
# Characters of other categories that show nothing: joiners, fillers, blanks, tags, and what XML and fonts don't have.
_BLANK = frozenset((*map(chr, (0x34F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x2800, 0x3164, 0xFFA0)), *map(chr, (
    *range(0x180B, 0x1810), *range(0xFDD0, 0xFDF0), *range(0xE0000, 0xE1000),
    *(plane + end for plane in range(0, 0x110000, 0x10000) for end in (0xFFFE, 0xFFFF)),
))))  # fmt: skip
_MARKS = ("Mn", "Mc", "Me")
MARKS = 8  # combining marks on a character that are drawn; more would cover the lines around it
LONGEST = 500  # characters of a token that are shown
PART = "·"  # shown for a token that adds no text
# A text that a spreadsheet would run, or one that `spreadsheet_cell` could have made; as Python and RE2 read it.
FORMULA = r"\A'*[=+\-@\t\r\x00" + "\uff1d\uff0b\uff0d\uff20]"  # in some locales full-width signs are run too


def visible(text: str, *, newline: str = "\n", tab: str = "\t") -> str:
    """`text` with every invisible or direction-changing character replaced by a visible one.

    Of the combining marks on a character those after the first MARKS are written as their code points.

    Example:
        >>> visible("a\\x1b[31m\\u202eb")
        'a␛[31m⟨U+202E⟩b'
    """
    if text.isascii() and text.isprintable():
        return text
    parts = []
    marks = 0
    for c in text:
        category = unicodedata.category(c)
        marks = marks + 1 if category in _MARKS or c in "\u0e33\u0eb3" else 0  # the two combine, and are no marks
        if c == "\n":
            parts.append(newline)
        elif c == "\t":
            parts.append(tab)
        elif marks > MARKS or category in _INVISIBLE or c in _BLANK:
            parts.append(_named(c))
        else:
            parts.append(c)
    return "".join(parts)


def shortened(text: str, most: int = LONGEST) -> str:
    """The first `most` characters, with an ellipsis where there are more.

    Example:
        >>> shortened("abcdef", 3)
        'abc…'
    """
    return text if len(text) <= most else f"{text[:most]}…"


def counted(count: int, noun: str) -> str:
    """A number of things.

    Example:
        >>> counted(1, "prompt"), counted(2000, "text")
        ('1 prompt', '2,000 texts')
    """
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def token_text(token: str) -> str:
    """The text of a token on one line, at most LONGEST characters of it; PART if it is empty.

    Example:
        >>> token_text("\\n"), token_text("")
        ('↵', '·')
    """
    return visible(shortened(token), newline="↵", tab="⇥") or PART


def token_name(token: str) -> str:
    """The text of a token for a table or an axis: without the blanks around it, "space" if it has only blanks."""
    return token_text(token).strip() or "space"


def _named(character: str) -> str:
    """The picture of a control character, or the code point."""
    code = ord(character)
    if code < 0x20:
        return chr(0x2400 + code)
    return "␡" if code == 0x7F else f"⟨U+{code:04X}⟩"


def spreadsheet_cell(text: str) -> str:
    """`text` with a leading `'` if a spreadsheet would run it as a formula; `from_spreadsheet_cell` undoes it.

    Example:
        >>> [spreadsheet_cell(text) for text in ("=1+1", "'=1+1", "'s", "1-1")]
        ["'=1+1", "''=1+1", "'s", '1-1']
    """
    return f"'{text}" if re.match(FORMULA, text) else text


def from_spreadsheet_cell(cell: str) -> str:
    """The text of a cell that `spreadsheet_cell` made.

    Example:
        >>> [from_spreadsheet_cell(cell) for cell in ("'=1+1", "''=1+1", "'s", "1-1")]
        ['=1+1', "'=1+1", "'s", '1-1']
    """
    return cell[1:] if cell.startswith("'") and re.match(FORMULA, cell) else cell


def utf8(text: str) -> str:
    """`text` with a lone surrogate, which UTF-8 can't encode, as its escape.

    Example:
        >>> print(utf8("a" + chr(0xD800)))
        a\\ud800
    """
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()
