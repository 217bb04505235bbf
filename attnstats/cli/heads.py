"""`attnstats heads`: which heads of a model are sinks, retrieval heads, local and so on, over given texts."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from attnstats.cli import arguments
from attnstats.errors import InputError
from attnstats.study.measures import KINDS
from attnstats.study.text import counted

if TYPE_CHECKING:
    from attnstats.finding import HeadScores

FIGURES = (".pdf", ".png", ".svg")
FILES = (".json", ".csv", *FIGURES)


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "heads",
        help="which heads of a model are sinks, retrieval heads, local, global, ...",
        description="Read texts that exist already in one pass each, and rank the model's heads by what they look at.",
    )
    subject = parser.add_argument_group("what is read")
    arguments.add_model(subject)
    texts = subject.add_mutually_exclusive_group(required=True)
    texts.add_argument(
        "--texts", type=arguments.path, metavar="FILE", help=arguments.PROMPT_FILE.replace("prompt", "text")
    )
    texts.add_argument(
        "--messages", type=arguments.path, metavar="FILE", help="chats, .json or .jsonl; the last answer of each counts"
    )
    subject.add_argument("--field", type=arguments.text, help="the field of a row of --texts (default: text)")
    subject.add_argument("--layers", default="all", help="middle-third, all, or a list such as 9,11,14-16")
    arguments.add_machine(subject)
    results = parser.add_argument_group("results")
    results.add_argument(
        "--kinds", nargs="+", choices=KINDS, metavar="KIND", help=f"of {', '.join(KINDS)} (default: all)"
    )
    results.add_argument("--top", type=int, default=5, metavar="N", help="heads of each kind that are printed")
    results.add_argument(
        "--out", type=arguments.path, action="append", default=[], metavar="FILE",
        help="scores as .json, which HeadScores.load reads, or .csv; pictures as .pdf, .png or .svg; can be repeated",
    )  # fmt: skip


def run(options: argparse.Namespace) -> int:
    arguments.require("rich", "pandas", "matplotlib")
    for file in options.out:
        if file.suffix.lower() not in FILES:
            raise InputError(f"--out {file}: needs a name that ends in {', '.join(FILES)}")
    if options.top < 1:
        raise InputError(f"--top must be at least 1, got {options.top}")
    if options.field is not None and options.texts is None:
        raise InputError(f"--field {options.field}: is for --texts FILE; give that, or leave it out")
    layers = arguments.parse_layers(options.layers)
    texts = _texts(options)
    from transformers.utils import logging

    from attnstats import heads
    from attnstats.report.terminal import Terminal
    from attnstats.study import models
    from attnstats.study.corpus import task

    terminal = Terminal(quiet=options.quiet)
    terminal.say("Loading the model")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    loaded = models.load(options.model, dtype=options.dtype, device=options.device, notify=terminal.say)

    def shown() -> Iterator[Any]:
        for text in texts:
            yield text
            terminal.advance()

    with task(terminal, counted(len(texts), "text"), len(texts)):
        scores: HeadScores = heads.find(loaded, shown(), options.kinds, layers=layers)
    for line in () if options.quiet else scores.lines(options.top):
        print(line)
    for file in options.out:
        arguments.write_file(file, _content(scores, file.suffix.lower()))
        terminal.say(str(file))
    return 0


def _texts(options: argparse.Namespace) -> Sequence[Any]:
    from attnstats.study import given
    from attnstats.study.prompts import JSON_LINES, read_prompts

    if options.messages is not None:
        return given.chats(given.read_chats(options.messages), f"--messages {options.messages}")
    is_table = options.texts.is_dir() or options.texts.suffix.lower() in (*JSON_LINES, ".json", ".csv", ".parquet")
    return read_prompts(options.texts, options.field or ("text" if is_table else None), "--texts")


def _content(scores: HeadScores, kind: str) -> bytes:
    if kind == ".json":
        return scores.to_json().encode("ascii")
    if kind == ".csv":
        return scores.to_frame().to_csv().encode("ascii")
    from attnstats.report import figures

    return figures.drawn(scores.plot(), kind)
