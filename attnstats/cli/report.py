"""`attnstats report`: a finished run shown in the terminal, and its page drawn again; no model is needed."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from attnstats.cli import options as given
from attnstats.errors import InputError


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "report",
        help="show a finished run, and draw its report.html again",
        description="Read a folder that `attnstats analyze` has written, show it and draw its report.html.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="what --out of analyze was")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to write the page, if not DIR/report.html")
    given.add_color(parser)


def run(options: argparse.Namespace) -> int:
    given.require("jinja2", "pyarrow", "rich", "safetensors", "scipy")
    given.check_color(options)
    from attnstats import report
    from attnstats.report.terminal import Terminal
    from attnstats.study import findings, outputs

    analyses, settings, summary = outputs.load(options.folder)
    page = report.render(analyses, settings, summary, findings.coupled(analyses, findings.profile(analyses)))
    out = options.out or options.folder / outputs.REPORT
    try:
        out.write_text(page, encoding="utf-8")
    except OSError as error:
        raise InputError(f"--out {out}: {error.strerror or error}; name a file that can be written") from error
    Terminal().show(analyses[: given.SHOWN], [out], color_by=options.color_by)
    return 0
