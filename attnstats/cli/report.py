"""`attnstats report`: show a finished run in the terminal and draw its page again; no model is needed."""

from __future__ import annotations

import argparse
from typing import Any

from attnstats.cli import arguments


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "report",
        help="show a finished run, and draw its report.html again",
        description="Read a folder that `attnstats analyze` has written, show it and draw its report.html.",
    )
    arguments.add_folder(parser)
    parser.add_argument("--out", type=arguments.path, metavar="FILE", help="file of the page, if not DIR/report.html")
    arguments.add_color(parser)


def run(options: argparse.Namespace) -> int:
    arguments.require("jinja2", "rich", "safetensors")
    from attnstats.report import columns
    from attnstats.report.terminal import Terminal
    from attnstats.run import load
    from attnstats.study import outputs

    columns.find(options.color_by)
    run = load(options.folder)
    out = options.out or options.folder / outputs.REPORT
    arguments.write_file(out, run.page().encode("utf-8"))
    Terminal().show(run[: arguments.SHOWN], [out], len(run), color_by=options.color_by)
    return 0
