"""Options that several commands share, and the values of horizons and layers given as text."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from attnstats.errors import InputError
from attnstats.study.prompts import SYSTEM

if TYPE_CHECKING:
    from attnstats.transformers.selection import Layers


ENGINES = "transformers", "vllm"
MOST_LAYERS = 10_000
SHOWN = 5  # responses shown in the terminal; the report has all
PROMPT_FILE = ".jsonl, .json, .csv, .parquet, a data set's folder, or text with one prompt a line"


def add_model(parser: argparse._ArgumentGroup) -> None:
    parser.add_argument(
        "--model",
        help="folder of a model or LoRA adapter, .gguf file or hub name (default: SmolLM2-135M-Instruct, of a wheel)",
    )


def add_responses(parser: argparse._ArgumentGroup, *, rows: str, max_tokens: int, temperature: float) -> None:
    parser.add_argument(
        "--field", type=text, help=f"the field of a row of {rows} with the prompt (default: question, or messages)"
    )
    parser.add_argument(
        "--system",
        type=text,
        default=SYSTEM,
        help="system text of prompts that have none; '' for no system text at all",
    )
    parser.add_argument("--max-tokens", type=int, default=max_tokens, help="greatest length of a response")
    parser.add_argument(
        "--temperature", type=float, default=temperature, help="0 is greedy; entropies are those at this temperature"
    )
    parser.add_argument(
        "--engine",
        choices=ENGINES,
        default=ENGINES[0],
        help="what generates; transformers reads the statistics",
    )
    parser.add_argument(
        "--engine-args", type=text, metavar="JSON", help="of --engine vllm: arguments of vllm.LLM, as a JSON object"
    )


def check_engine(options: argparse.Namespace) -> bool:
    """Whether it is vLLM that generates. Raises InputError."""
    if options.engine not in ENGINES:
        raise InputError(f"--engine {options.engine}: no such engine; there are {', '.join(ENGINES)}")
    if options.engine == ENGINES[0] and options.engine_args is not None:
        raise InputError("--engine-args: is for --engine vllm; give that, or leave it out")
    return bool(options.engine != ENGINES[0])


def add_machine(parser: argparse._ArgumentGroup) -> None:
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument("--quiet", action="store_true", help="print errors alone")


def add_folder(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=path, metavar="DIR", help="the --out of a finished `attnstats analyze`")


def add_color(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--color-by", default="waad", metavar="COLUMN",
        help="statistic that colours the tokens in the terminal: waad, fai, entropy, delta or gamma",
    )  # fmt: skip


def text(given: str) -> str:
    """An argument as the user typed it: UTF-8, also where the locale is not, and Python kept its bytes."""
    if any("\udc80" <= character <= "\udcff" for character in given):
        try:
            return os.fsencode(given).decode("utf-8")
        except UnicodeDecodeError as error:
            raise argparse.ArgumentTypeError("not UTF-8 text; type or convert it as UTF-8") from error
    return given


def path(given: str) -> Path:
    """A path whose name the libraries that open it can take."""
    try:
        given.encode("utf-8")
    except UnicodeEncodeError as error:
        message = "a name with other characters than the locale has; set one of UTF-8, such as LC_ALL=C.UTF-8"
        raise argparse.ArgumentTypeError(message) from error
    return Path(given)


def require(*packages: str) -> None:
    """Raises InputError if a package is absent, with its name and the command that installs it."""
    import importlib

    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise InputError(f"{error.name or package} is not installed; run: pip install 'attnstats[cli]'") from error


def write_file(file: Path, content: bytes) -> None:
    """Write --out whole: where that fails, nothing is left of it and an older file stays. Raises InputError."""
    part = file.with_name(f".{file.name}.{os.getpid()}")
    with writing(file):
        if file.exists() and not file.is_file():
            file.write_bytes(content)  # a pipe or a device is written into
            return
        try:
            part.write_bytes(content)
            part.replace(file)
        finally:
            part.unlink(missing_ok=True)


@contextmanager
def writing(out: Path, remedy: str = "name a file that can be written") -> Iterator[None]:
    """Inside the `with` an OSError becomes an InputError about --out."""
    try:
        yield
    except OSError as error:
        raise InputError(f"--out {out}: {error.strerror or error}; {remedy}") from error


def parse_horizon(lo: str, hi: str) -> tuple[int, int | None]:
    """FAI's horizon as numbers; `open` is None. Raises InputError."""
    try:
        return int(lo), None if hi == "open" else int(hi)
    except ValueError as error:
        raise InputError(f"--horizon {lo} {hi}: needs two whole numbers, or a number and `open`") from error


def parse_layers(text: str) -> Layers:
    """Layers as `attnstats.capture` takes them. Raises InputError."""
    if text in ("middle-third", "all"):
        return text  # type: ignore[return-value]
    layers: list[int] = []
    try:
        for part in text.split(","):
            first, _, last = part.strip().partition("-")
            span = range(int(first), int(last or first) + 1)
            if not 0 < len(span) <= MOST_LAYERS:
                raise ValueError
            layers += span
    except (ValueError, OverflowError) as error:
        raise InputError(f"--layers {text}: needs middle-third, all, or a list such as 9,11,14-16") from error
    return tuple(layers)
