"""The entry point: arguments in, an exit code out.

Exit codes: 0; 2 for bad input and for output that can't be written (one line on stderr, no traceback); 1 when --verify
finds a difference; 130 on Ctrl-C; 141 on a broken pipe. Any other exception keeps its traceback. Heavy imports wait
until the arguments are known to be good.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import attnstats
from attnstats.cli import analyze, couplings, heads, plot, report
from attnstats.errors import InputError
from attnstats.study.text import visible

BAD_INPUT, INTERRUPTED, BROKEN_PIPE = 2, 130, 141
COMMANDS = {"analyze": analyze, "couplings": couplings, "heads": heads, "plot": plot, "report": report}


class Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Help with defaults, but of options that have none."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose help has defaults, and whose errors are InputErrors of one line."""

    def __init__(self, **settings: Any):
        super().__init__(formatter_class=Formatter, allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see {self.prog} --help)")


class StandardOutput(io.TextIOWrapper):
    """stdout with `?` for what its encoding doesn't have; a failure to write to it is an InputError."""

    def write(self, text: str) -> int:
        with _writing():
            return super().write(text)

    def flush(self) -> None:
        with _writing():
            super().flush()


@contextlib.contextmanager
def _writing() -> Iterator[None]:
    """Inside the `with` an OSError is one of stdout, where then nothing more is written."""
    try:
        yield
    except OSError as error:
        # What is still in buffers must not fail once more when Python exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):  # the reader has closed it
            raise
        remedy = "name a file or a pipe that can be written"
        raise InputError(f"standard output: {error.strerror or error}; {remedy}") from error


@contextlib.contextmanager
def _output() -> Iterator[None]:
    """Inside the `with` stdout is a StandardOutput."""
    stdout = sys.stdout
    if not isinstance(stdout, io.TextIOWrapper):  # there is none, or a caller's own
        yield
        return
    stdout.flush()
    output = StandardOutput(
        stdout.buffer, stdout.encoding, "replace",
        line_buffering=stdout.line_buffering, write_through=stdout.write_through,
    )  # fmt: skip
    try:
        with contextlib.redirect_stdout(output):
            try:
                yield
            finally:
                output.flush()
    finally:
        with contextlib.suppress(OSError, InputError):
            output.detach()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    try:
        with _output():
            options = parser().parse_args(arguments)
            return COMMANDS[options.command].run(options)
    except InputError as error:
        _complain(f"error: {error}")
        return BAD_INPUT
    except BrokenPipeError:
        return BROKEN_PIPE
    except KeyboardInterrupt as stop:
        _complain(f"interrupted; {stop.args[0] if stop.args else 'nothing was written'}")
        return INTERRUPTED


def _complain(message: str) -> None:
    """Print a line on stderr. It can quote a file, whose control characters must not reach the terminal."""
    with contextlib.suppress(OSError):  # a stderr that can't be written changes no exit code
        print(f"attnstats: {visible(' '.join(message.split()))}", file=sys.stderr)


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    top = Parser(prog="attnstats", description="Statistics of attention without the T x T map.")
    top.add_argument("--version", action="version", version=f"attnstats {attnstats.__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    for command in COMMANDS.values():
        command.add_parser(commands)
    return top
