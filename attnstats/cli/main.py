"""The entry point: arguments in, an exit code out.

Exit codes: 0; 2 for bad input (one line on stderr, no traceback); 1 when --verify finds a difference; 130 on Ctrl-C;
141 on a broken pipe. Any other exception keeps its traceback. Heavy imports wait until the arguments are known to be
good.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import attnstats
from attnstats.cli import analyze, couplings, plot, report
from attnstats.errors import InputError
from attnstats.study.text import visible

BAD_INPUT, INTERRUPTED, BROKEN_PIPE = 2, 130, 141
COMMANDS = {"analyze": analyze, "couplings": couplings, "plot": plot, "report": report}


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose help has defaults, and whose errors are InputErrors of one line."""

    def __init__(self, **settings: Any):
        super().__init__(formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see {self.prog} --help)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    try:
        options = parser().parse_args(arguments)
        return COMMANDS[options.command].run(options)
    except InputError as error:
        # A message can quote a file: its control characters must not reach the terminal.
        print(f"attnstats: error: {visible(' '.join(str(error).split()))}", file=sys.stderr)
        return BAD_INPUT
    except BrokenPipeError:  # the reader of stdout has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except KeyboardInterrupt as stop:
        print(f"attnstats: interrupted; {stop.args[0] if stop.args else 'nothing was written'}", file=sys.stderr)
        return INTERRUPTED


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    top = Parser(prog="attnstats", description="Statistics of attention without the T x T map.")
    top.add_argument("--version", action="version", version=f"attnstats {attnstats.__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    for command in COMMANDS.values():
        command.add_parser(commands)
    return top
