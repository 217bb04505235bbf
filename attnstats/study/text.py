"""Untrusted text made safe to show: text of a model can hold terminal escapes, bidi overrides and formulas.

`visible` is for the terminal and the report (whose template also escapes HTML), `spreadsheet_cell` for CSV. Neither
loses information that a reader could need.
"""

from __future__ import annotations

import re
import unicodedata

# Controls, surrogates, formats (all bidi marks, overrides and isolates are among them), line and paragraph separators.
_INVISIBLE = ("Cc", "Cs", "Cf", "Zl", "Zp")
PART = "·"  # shown for a token that adds no text
# A text that a spreadsheet would run, or one that `spreadsheet_cell` could have made; as Python and RE2 read it.
FORMULA = r"\A'*[=+\-@\t\r\x00" + "\uff1d\uff0b\uff0d\uff20]"  # in some locales full-width signs are run too


def visible(text: str, *, newline: str = "\n", tab: str = "\t") -> str:
    """`text` with every invisible or direction-changing character replaced by a visible one.

    Example:
        >>> visible("a\\x1b[31m\\u202eb")
        'a␛[31m⟨U+202E⟩b'
    """
    return "".join(newline if c == "\n" else tab if c == "\t" else _visible(c) for c in text)


def token_text(token: str) -> str:
    """The text of a token on one line; PART if it is empty.

    Example:
        >>> token_text("\\n"), token_text("")
        ('↵', '·')
    """
    return visible(token, newline="↵", tab="⇥") or PART


def token_name(token: str) -> str:
    """The text of a token for a table or an axis: without the blanks around it, "space" if it has only blanks."""
    return token_text(token).strip() or "space"


def _visible(character: str) -> str:
    code = ord(character)
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F:
        return "␡"
    if unicodedata.category(character) in _INVISIBLE:
        return f"⟨U+{code:04X}⟩"
    return character


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
