"""A page as one file: a template with its script and style in it, under a policy that allows no others."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attnstats.report import data, scale
from attnstats.study.text import shortened, visible


def fill(name: str, scripts: Sequence[str], **values: Any) -> str:
    """The template of this name as HTML; it has style, script, policy and these values."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    here = Path(__file__).parent
    style = (here / "report.css").read_text(encoding="utf-8") + scale.style()
    script = "\n".join((here / file).read_text(encoding="utf-8") for file in scripts)
    script = f'"use strict";\n{{\n{script}}}\n'
    environment = Environment(
        loader=PackageLoader("attnstats.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name).render(style=style, script=script, policy=policy(script, style), **values)


def policy(script: str, style: str) -> str:
    """A content security policy that allows this script and this style, and no network, frames or other code."""

    def digest(text: str) -> str:
        return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()

    return (
        f"default-src 'none'; script-src 'sha256-{digest(script)}'; style-src 'sha256-{digest(style)}'; "
        "img-src data:; base-uri 'none'; form-action 'none'; require-trusted-types-for 'script'"
    )


def fact(value: Any) -> str:
    """A setting, a version or another value of the summary as text."""
    if isinstance(value, list | tuple):
        value = ", ".join(map(str, value))
    return visible(shortened("open" if value is None else str(value), data.MAX_CHARACTERS))
