"""A Griffe extension: the sections of our docstrings, as the site's renderer takes them."""

from __future__ import annotations

import re
from typing import Any

import griffe

EXAMPLE = re.compile(r"^Example:$", re.MULTILINE)
TRAITS = re.compile(r"^Traits\b.*:$", re.MULTILINE)
SOURCE = re.compile(r"^Source: ", re.MULTILINE)
TWO_ERRORS = re.compile(r"^( +\w+Error), (\w+Error): ", re.MULTILINE)
RETURNS = re.compile(r"^(Returns:\n +)", re.MULTILINE)


class Sections(griffe.Extension):
    """Render examples as code with output, traits as attributes, sources in bold, and all of `Returns:` as text."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is None:
            return
        text = EXAMPLE.sub("Examples:", obj.docstring.value)
        text = TRAITS.sub("Attributes:", text)
        text = SOURCE.sub("**Source:** ", text)
        text = TWO_ERRORS.sub(r"\1 | \2: ", text)
        if isinstance(obj, griffe.Function) and obj.returns is not None:
            text = RETURNS.sub(lambda match: f"{match[1]}{obj.returns}: ", text)  # else up to a colon it is a type
        obj.docstring.value = text
