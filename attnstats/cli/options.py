"""What several commands take: a model, prompts, and the words in which layers and horizons are given.

`add_*` adds options to a command's parser, the other functions make values of what was given, or raise InputError.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from attnstats.errors import InputError
from attnstats.study.prompts import SYSTEM
from attnstats.study.shards import Shard

if TYPE_CHECKING:
    from attnstats.study.models import LoadedModel
    from attnstats.study.store import Store
    from attnstats.transformers.selection import Layers


MOST_LAYERS = 10_000
SHOWN = 5  # responses in the terminal; all are in the report


def add_model(parser: argparse._ArgumentGroup) -> None:
    parser.add_argument("--model", help="local folder or hub name (default: SmolLM2-135M-Instruct, from its wheel)")


def add_responses(parser: argparse._ArgumentGroup, *, rows: str, max_tokens: int, temperature: float) -> None:
    parser.add_argument("--field", help=f"of a row of {rows} that is the prompt (default: question)")
    parser.add_argument("--system", default=SYSTEM, help="system text before each question; '' for none")
    parser.add_argument("--max-tokens", type=int, default=max_tokens, help="length of a response at most")
    parser.add_argument(
        "--temperature", type=float, default=temperature, help="0 is greedy; entropies are those at this temperature"
    )


def add_machine(parser: argparse._ArgumentGroup) -> None:
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")


def add_color(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--color-by", default="waad", metavar="COLUMN",
        help="what colours the tokens in the terminal: waad, fai, entropy, delta or gamma",
    )  # fmt: skip


def check_color(options: argparse.Namespace) -> None:
    """Raises InputError, before anything is computed, for a column that no token has."""
    from attnstats.report.columns import find

    find(options.color_by)


def require(*packages: str) -> None:
    """Raises InputError, naming the one that is absent and what installs it."""
    import importlib

    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise InputError(f"{error.name or package} is not installed; run: pip install 'attnstats[cli]'") from error


def load_model(options: argparse.Namespace, dtype: str, shard: Shard, notify: Any) -> LoadedModel:
    """The model that was asked for; of several processes on a machine each takes a GPU of its own."""
    from transformers.utils import logging

    from attnstats.study.models import load

    # Bars and advice of transformers would stand between our lines; its errors still come.
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    device = options.device
    if device in ("auto", "cuda") and shard.count > 1:
        import torch

        gpus = torch.cuda.device_count()
        device = f"cuda:{shard.local % gpus}" if gpus else device
    return load(options.model, dtype=dtype, device=device, notify=notify)


@contextmanager
def kept(options: argparse.Namespace, identity: dict[str, Any], shard: Shard, total: int) -> Iterator[Store]:
    """The store of a run with --out and --resume; what is in it stays when the run is cut short.

    Raises:
        InputError: see outputs.open_store.
        KeyboardInterrupt: with what is done and how to go on.
    """
    from attnstats.study import outputs
    from attnstats.study.store import Store

    begun = shard.first(lambda: outputs.open_store(options.out, identity, resume=options.resume))
    store = Store(outputs.workplace(options.out)) if begun is None else begun
    try:
        yield store
    except BaseException as stop:
        if shard.count == 1 and store.discard_empty():
            raise
        if not isinstance(stop, KeyboardInterrupt):
            raise
        raise KeyboardInterrupt(
            f"{len(store.indices())} of {total} prompts are done and kept in {store.folder}; go on with --resume"
        ) from stop
    finally:
        store.close()


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
