"""`attnstats plot`: a figure of a finished run, for a paper; nothing is computed again."""

from __future__ import annotations

import argparse
from typing import Any

from attnstats.cli import arguments
from attnstats.errors import InputError

FIGURES = ("rhythm", "maps", "heads")
KINDS = (".pdf", ".png", ".svg")


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "plot",
        help="a figure of a finished run, for a paper",
        description="Read a folder that `attnstats analyze` has written and draw one prompt of it: WAAD and FAI along "
        "the response (rhythm), the mean maps of its local and global heads (maps), or the heads' distances (heads).",
    )
    arguments.add_folder(parser)
    parser.add_argument("--figure", choices=FIGURES, default=FIGURES[0], help="the figure to draw")
    parser.add_argument("--prompt", type=int, default=1, metavar="N", help="number of the prompt, from 1")
    parser.add_argument(
        "--tokens",
        type=int,
        nargs=2,
        metavar=("FIRST", "LAST"),
        help="tokens of the response, counted from 1; only for rhythm",
    )
    parser.add_argument("--out", type=arguments.path, required=True, metavar="FILE", help="ends in .pdf, .png or .svg")


def run(options: argparse.Namespace) -> int:
    arguments.require("matplotlib", "rich", "safetensors")
    if options.out.suffix.lower() not in KINDS:
        raise InputError(f"--out {options.out}: needs a name that ends in {', '.join(KINDS)}")
    if options.tokens and options.figure != "rhythm":
        raise InputError(f"--tokens: is for --figure rhythm, not for {options.figure}; leave it out")
    from attnstats.report import figures
    from attnstats.report.terminal import Terminal
    from attnstats.run import load

    run = load(options.folder)
    if not 1 <= options.prompt <= len(run):
        raise InputError(f"--prompt {options.prompt}: {options.folder} has prompts 1 to {len(run)}")
    if options.tokens:
        first, last = options.tokens
        figures.check_tokens(run[options.prompt - 1], (first, last), f"--tokens {first} {last}")
    figure = run.plot(options.figure, options.prompt - 1, options.tokens and tuple(options.tokens))
    arguments.write_file(options.out, figures.drawn(figure, options.out.suffix.lower()))
    Terminal().say(str(options.out))
    return 0
