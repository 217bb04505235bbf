"""`attnstats report`: show a finished run and draw its page again, or compare two; no model is needed."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnstats.cli import arguments
from attnstats.errors import InputError

if TYPE_CHECKING:
    from attnstats.report.compare import ComparedRun


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "report",
        help="show a finished run, and draw its report.html again; of two runs, compare them on one page",
        description="Read a folder that `attnstats analyze` has written, show it and draw its report.html. With a "
        "second folder, draw one page with the responses of both to the same prompts side by side.",
    )
    arguments.add_folder(parser)
    parser.add_argument(
        "other", type=arguments.path, metavar="OTHER", nargs="?",
        help="another run of the same prompts to compare with, as of another model or checkpoint",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=arguments.path, metavar="FILE",
        help="file of the page, if not DIR/report.html; of two runs, if not DIR/comparison.html",
    )  # fmt: skip
    arguments.add_color(parser)


def run(options: argparse.Namespace) -> int:
    arguments.require("jinja2", "rich", "safetensors")
    from attnstats.report import columns
    from attnstats.report.terminal import Terminal
    from attnstats.run import load
    from attnstats.study import outputs

    columns.find(options.color_by)
    if options.other:
        from attnstats.report import compare

        if options.other.resolve() == options.folder.resolve():
            raise InputError(f"{options.folder} and {options.other}: are the same folder; name two runs, or one alone")
        first, second = read(options.folder), read(options.other)
        out = options.out or options.folder / outputs.COMPARISON
        arguments.write_file(out, compare.render(first, second).encode("utf-8"))
        both = len(compare.pairs(first, second))
        Terminal().say(f"{both} of {len(first.questions)} prompts are in both, side by side in {out}")
        return 0
    run = load(options.folder)
    out = options.out or options.folder / outputs.REPORT
    arguments.write_file(out, run.page().encode("utf-8"))
    Terminal().show(run[: arguments.SHOWN], [out], len(run), color_by=options.color_by)
    return 0


def read(folder: Path) -> ComparedRun:
    """A run to compare. Raises InputError."""
    from attnstats.report.compare import ComparedRun
    from attnstats.run import load

    run = load(folder)
    questions = [outline.question for outline in run.analyses.outlines()]
    return ComparedRun(str(folder), questions, run.analyses, run.settings, run.summary, run.profile)
