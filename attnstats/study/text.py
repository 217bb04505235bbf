"""Untrusted text made safe to show: text of a model can hold terminal escapes, bidi overrides and formulas.

`visible` is for the terminal and the report (whose template also escapes HTML), `spreadsheet_cell` for CSV. Neither
loses information that a reader could need.
"""

from __future__ import annotations

import unicodedata

# Controls, surrogates, formats (all bidi marks, overrides and isolates are among them), line and paragraph separators.
_INVISIBLE = ("Cc", "Cs", "Cf", "Zl", "Zp")
PART = "·"  # shown for a token that adds no text
_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\0")


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
    """`text` with a leading `'` if a spreadsheet would run it as a formula."""
    return f"'{text}" if text.startswith(_FORMULA_STARTS) else text
