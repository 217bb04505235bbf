"""`attnstats report`: the page of a finished run drawn again, with nothing computed."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from attnstats.commands import options as given
from attnstats.errors import InputError


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "report",
        help="draw report.html of a finished run again",
        description="Read a folder that `attnstats analyze` has written and draw its report.html.",
        allow_abbrev=False,
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="what --out of analyze was")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to write the page (default: DIR/report.html)")


def run(options: argparse.Namespace) -> int:
    given.require("jinja2", "rich", "safetensors")
    from attnstats import outputs, report
    from attnstats.terminal import Terminal

    analyses, settings, summary = outputs.load(options.folder)
    page = report.render(analyses, settings, summary)
    out = options.out or options.folder / outputs.REPORT
    try:
        out.write_text(page, encoding="utf-8")
    except OSError as error:
        raise InputError(f"--out {out}: {error.strerror or error}; name a file that can be written") from error
    Terminal().say(str(out))
    return 0
