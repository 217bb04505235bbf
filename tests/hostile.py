"""Texts that try to break out of, or hide in, whatever shows or stores them: one table for the tests of all outputs.

A model can write any of them, and a prompt, a model's name or a file of results can hold them.
"""

from __future__ import annotations

import string

MARKUP = [
    "<script>alert(1)</script>", "</script><script>alert(1)</script>", "</ScRiPt >", "<!--<script>", "-->", "--!>",
    "<!--", "<![CDATA[", "]]>", "<img src=x onerror=alert(1)>", '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)", "<svg/onload=alert(1)>", "<svg><style>*{display:none}</style></svg>",
    "<iframe src=javascript:alert(1)>", "<a href='javascript:alert(1)'>x</a>", "<base href=//evil.example>",
    "<meta http-equiv=refresh content=0>", "<link rel=stylesheet href=//evil.example>",
    "<form action=//evil.example><input name=x>", "</style>", "</noscript>", "</title>", "</textarea>", "</pre>",
    "</main>", "</body></html>", "<plaintext>", "<template>", "<b>bold", "&lt;b&gt;", "&amp;", "&#60;script&#62;",
    "&NewLine;", "&", "<", ">", "<<", "< script >", "<\0script>", "<math><mtext></mtext>",
    "<x:script xmlns:x='http://www.w3.org/1999/xhtml'>alert(1)</x:script>", "<?xml version='1.0'?>", "<!DOCTYPE html>",
    "<!ENTITY x SYSTEM 'file:///etc/passwd'>", "javascript:alert(1)", "data:text/html,<script>alert(1)</script>",
]  # fmt: skip
TEMPLATES = [
    "{{ 7*7 }}", "{% for i in range(9) %}x{% endfor %}", "{# comment #}", "${7*7}", "#{7*7}", "<%= 7*7 %>", "{{", "}}",
    "{%", "%}", "{{ settings.__class__ }}", "%s%n%x", "{0}", "{question}", "$(id)", "`id`", "; rm -rf /", "$HOME",
    "$x^2$", "\\frac{1}{0}", "[bold red]x[/bold red]", "[link=http://evil.example]x[/link]", "[/]", ":boom:",
    "**x** _y_ `z`",
]  # fmt: skip
SCRIPT = [
    "\u2028", "\u2029", "a\u2028b", "\\u003c/script\\u003e", "\\", "\\\\", "\\n", "\\'", "\\x3cscript", "/*", "*/",
    "//",
]  # fmt: skip
JSON = [
    '"', "'", '""', "''", '","x":1,"', '"}]', "[1,", "{", "null", "true", "undefined", "__proto__", "constructor",
    '\\"',
]  # fmt: skip
TERMINAL = [
    "\x1b[31mred", "\x1b[2J\x1b[H", "\x1b]0;title\x07", "\x1b]8;;http://evil.example\x1b\\x\x1b]8;;\x1b\\", "\x1b[6n",
    "\x1bc", "\x1bP1$r\x1b\\", "\x9b31m", "\x9d0;t\x9c", "\x07", "\b\b\bx", "a\rb", "\r", "\n", "\n\n", "\r\n", "\t",
    "\v", "\f", "\x7f", "\x0e", "\x1b", "\x85", "\xa0", "\xad",
]  # fmt: skip
NUL = ["\0", "a\0b", "\0\0", "x\0", "=\0"]
BIDI = [
    "\u202egnp.exe", "\u202d", "\u202a\u202b\u202c", "\u2066x\u2069", "\u2067", "\u2068", "\u200e", "\u200f", "\u061c",
    "שלום", "مرحبا", "a\u202eb\u202cc",
]  # fmt: skip
INVISIBLE = [
    "\u200b", "\u200c", "\u200d", "\u2060", "\ufeff", "\ufeffx", "a\u200bb", "\u180e", "\u034f", "\u115f", "\u1160",
    "\u3164", "\uffa0", "\u2800", "\ufff9\ufffa\ufffb", "\U000e0041\U000e0042", "\U000e0100", "\U0001d173", "\u206a",
    "\u17b4", "👩\u200d🚀", "❤\ufe0f",
]  # fmt: skip
SURROGATES = ["\ud800", "\udfff", "a\ud83d", "\udc80", "\udcff\udcfe", "\ude00\ud83d"]
UNICODE = [
    "\u1100" * 500, "\u0915" + "\u093e" * 300,
    "\ufffd", "\ufffe", "\uffff", "\ufdd0", "\U0010ffff", "\U0001fffe", "\ue000", "é", "e\u0301", "ﷺ" * 9, "漢字", "😀",
    "\uff21\uff22", "\u017f", "İ", "ß", "\u212b", "x\u0301\u0302\u0303", "Z" + "\u0334\u0322\u0348" * 30,
    "a" + "\u0301" * 5_000, "\u0e33" * 50,
]  # fmt: skip
FORMULAS = [
    "=1+1", "=HYPERLINK(\"http://evil.example\",\"x\")", "=cmd|' /C calc'!A0", "+1", "-1", "-1+1", "@SUM(1)", "\t=1",
    "\r=1", "'=1", "''=1", "'", "''", "'s", "\uff1d1", "\uff0b1", "\uff0d1", "\uff201", " =1", ";=1", ",", '",=1',
    '"=1"', "a,b;c\td",
]  # fmt: skip
CELLS = [
    "NA", "N/A", "nan", "NaN", "null", "None", "NULL", "", " ", "  ", "1e5", "1E400", "007", "0x1F", "1_000", "1,000",
    "inf", "-inf", "True", "false", "2024-01-01", "12:30", "1/2", "#N/A", "#", "# x", "9" * 40,
    "\N{ARABIC-INDIC DIGIT ONE}", "1.0", "-0",
]  # fmt: skip
PATHS = [
    "../../etc/passwd", "/etc/passwd", "..\\..\\x", "C:\\x", "CON", "~", ".", "..", "file:///etc/passwd", "a/b",
    "x" * 300, "*", "?", "|", "%2e%2e%2f", "~/.ssh/id_rsa", "items/000000.json", "summary.json",
]  # fmt: skip
LONG = ["x" * 1_000_000, "w" * 3_000, "\u202e" * 2_000, "<" * 2_000, "漢" * 3_000]

TEXTS = list(dict.fromkeys([
    *MARKUP, *TEMPLATES, *SCRIPT, *JSON, *TERMINAL, *NUL, *BIDI, *INVISIBLE, *SURROGATES, *UNICODE, *FORMULAS, *CELLS,
    *PATHS, *LONG, string.printable,
]))  # fmt: skip
# Nothing of these may reach a terminal or a page as it is: line breaks and tabs are laid out by both.
FORBIDDEN = {
    *map(chr, range(0x20)), *map(chr, range(0x7F, 0xA0)), *"\xad\u034f\u061c\u115f\u1160\u180e\u3164\uffa0\u2800\ufeff",
    *map(chr, range(0x200B, 0x2010)), *map(chr, range(0x2028, 0x202F)), *map(chr, range(0x2060, 0x2070)),
    *map(chr, range(0xD800, 0xE000)), *map(chr, range(0xFFF9, 0xFFFC)), "\ufffe", "\uffff", "\ufdd0", "\U0010ffff",
    *map(chr, range(0xE0000, 0xE0200)),
} - {"\n", "\t"}  # fmt: skip
