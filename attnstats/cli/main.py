"""The command line: arguments in, an exit code out; the work is in commands/.

Exit codes: 0; 2 for bad input (one line on stderr, no traceback); 1 when --verify finds a difference; 130 on Ctrl-C;
141 where nobody reads on. What a fault of ours raises keeps its traceback. Heavy imports wait until arguments are known
to be good.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import attnstats
from attnstats.cli import analyze, couplings, plot, report
from attnstats.errors import InputError
from attnstats.study.text import visible

BAD_INPUT, INTERRUPTED, BROKEN_PIPE = 2, 130, 141
COMMANDS = {"analyze": analyze, "couplings": couplings, "plot": plot, "report": report}


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see {self.prog} --help)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    try:
        options = parser().parse_args(arguments)
        return COMMANDS[options.command].run(options)
    except InputError as error:
        # What a file holds can end up in a message: nothing of it may move the cursor.
        print(f"attnstats: error: {visible(' '.join(str(error).split()))}", file=sys.stderr)
        return BAD_INPUT
    except BrokenPipeError:  # whoever read has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except KeyboardInterrupt as stop:
        print(f"attnstats: interrupted; {stop.args[0] if stop.args else 'nothing was written'}", file=sys.stderr)
        return INTERRUPTED


def parser() -> argparse.ArgumentParser:
    """The arguments of every command."""
    top = Parser(prog="attnstats", description="Statistics of attention without the T x T map.", allow_abbrev=False)
    top.add_argument("--version", action="version", version=f"attnstats {attnstats.__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    for command in COMMANDS.values():
        command.add_parser(commands)
    return top
