"""Untrusted text made safe to look at: what a model writes can hold terminal escapes, bidi overrides and formulas.

`visible` is for eyes (terminal and report; HTML is escaped by the template on top of it), `spreadsheet_cell` for
CSV. Neither loses information that a reader could need.
"""

from __future__ import annotations

import unicodedata

# Controls, surrogates, formats (all bidi marks, overrides and isolates are among them), line and paragraph separators.
_UNSEEN = ("Cc", "Cs", "Cf", "Zl", "Zp")
PART = "·"  # stands for a token without text of its own: it begins a character that the next one ends
_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\0")


def visible(text: str, *, newline: str = "\n", tab: str = "\t") -> str:
    """`text` with everything that is not seen, or that moves what is seen, replaced by something to see.

    Example:
        >>> visible("a\\x1b[31m\\u202eb")
        'a␛[31m⟨U+202E⟩b'
    """
    return "".join(newline if c == "\n" else tab if c == "\t" else _visible(c) for c in text)


def token_text(token: str) -> str:
    """What a token adds, on one line; PART where that is nothing.

    Example:
        >>> token_text("\\n"), token_text("")
        ('↵', '·')
    """
    return visible(token, newline="↵", tab="⇥") or PART


def token_name(token: str) -> str:
    """A token as a table or an axis names it: without the blanks around it, and never nothing."""
    return token_text(token).strip() or "space"


def _visible(character: str) -> str:
    code = ord(character)
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F:
        return "␡"
    if unicodedata.category(character) in _UNSEEN:
        return f"⟨U+{code:04X}⟩"
    return character


def spreadsheet_cell(text: str) -> str:
    """`text` with a leading `'` where a spreadsheet would take it for a formula."""
    return f"'{text}" if text.startswith(_FORMULA_STARTS) else text
