"""The command line: arguments in, an exit code out; the work is in commands/.

Exit codes: 0, or 2 for bad input (one line on stderr, no traceback), 1 when --verify finds a difference, 130 on
Ctrl-C. What a fault of ours raises keeps its traceback. Heavy imports wait until the arguments are known to be good.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

import attnstats
from attnstats.commands import analyze, couplings, plot, report
from attnstats.errors import InputError

BAD_INPUT, INTERRUPTED = 2, 130
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
        print(f"attnstats: error: {' '.join(str(error).split())}", file=sys.stderr)
        return BAD_INPUT
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


if __name__ == "__main__":
    sys.exit(main())
