"""The steps that `analyze` and `couplings` share: loading a model, and working in a store until done or interrupted.

Under torchrun or `accelerate launch` each process does its share, and the first one alone shows progress.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.utils import logging

from attnstats.cli import arguments
from attnstats.errors import InputError
from attnstats.identity import ModelIdentity, digest, head_dim, identity, tokenizer_digest
from attnstats.report.terminal import Terminal
from attnstats.study import corpus, models, outputs
from attnstats.study.corpus import Measure, stage
from attnstats.study.generation import Sampling, end_tokens
from attnstats.study.models import Description, LoadedModel
from attnstats.study.reading import Departures
from attnstats.study.shards import Shard, from_environment
from attnstats.study.store import Store
from attnstats.triton.backend import MAX_HEAD_DIM

if TYPE_CHECKING:
    from attnstats.study.vllm import VllmEngine


@dataclass(frozen=True)
class Job:
    """A loaded model with its identity, the token ids of the prompts, and this process's share of the work.

    Attributes:
        terminal: shows it.
        engine: generates the responses; None: the model does.
    """

    loaded: LoadedModel
    model: ModelIdentity
    prompts: list[list[int]]
    shard: Shard
    terminal: Terminal
    engine: VllmEngine | None = None
    timings: dict[str, float] = field(default_factory=dict)

    @property
    def versions(self) -> dict[str, str]:
        """Versions of everything that can change a number of this run."""
        return outputs.versions() | ({} if self.engine is None else {"vllm": self.engine.version})

    @contextmanager
    def store(self, open_store: Callable[[], Store], folder: Path, total: int) -> Iterator[Store]:
        """The store that `open_store` opens in the first process; what is in it stays when the run is cut short.

        Says what an earlier run left in it, which is used and not made again.

        Raises:
            InputError: as `open_store`.
            KeyboardInterrupt: with what is done and how to go on.
        """
        store = self.shard.first(open_store) or Store(folder)
        if kept := store.kept():
            self.terminal.say(f"Going on with {kept}, of {total} prompts, kept in {folder}")
        try:
            yield store
        except BaseException as stop:
            if self.shard.count == 1 and store.discard_empty():
                raise
            if not isinstance(stop, KeyboardInterrupt):
                raise
            raise KeyboardInterrupt(
                f"{store.kept() or 'no answer'}, of {total} prompts, kept in {folder}; go on with --resume"
            ) from stop
        finally:
            store.close()

    def run(self, measure: Measure, sampling: Sampling, store: Store, subject: str = "prompt") -> None:
        """Fill the store with this process's share of the results, and wait for the other processes."""
        corpus.run(
            self.loaded, self.prompts, measure, sampling,
            store=store, progress=self.terminal, shard=self.shard, timings=self.timings, subject=subject,
            engine=self.engine,
        )  # fmt: skip
        self.shard.wait()

    def near_ties(self, store: Store, sampling: Sampling) -> Departures | None:
        """Tokens of a full store that this process's model would not have written; None for a temperature above 0."""
        if sampling.temperature:
            return None
        texts = (store.read(index, ())[1] for index in store.indices())
        return Departures.together(each["departures"] for each in texts if "departures" in each)

    def show_near_ties(self, near_ties: Departures | None) -> None:
        """Print them if there are any, or if it was vLLM that wrote the tokens."""
        if near_ties is None or not (near_ties.tokens or self.engine):
            return
        ahead = f"; that is ahead by {near_ties.gap:.2g} nats at most" if near_ties.tokens else ""
        subject = "greedy token is" if near_ties.tokens == 1 else "greedy tokens are"
        self.terminal.say(f"{near_ties.tokens} {subject} not the likeliest in the pass that reads{ahead}")


def load(
    options: argparse.Namespace, dtype: str, sampling: Sampling, prepare: Callable[[Description], list[list[int]]]
) -> Job:
    """The job of this process, with the model loaded; of several processes on a machine each takes a GPU of its own.

    `prepare` makes the token ids of the prompts: one that the model can't take is refused before the weights are read.
    """
    shard = from_environment()
    engine = _engine(options, sampling, shard)
    terminal = Terminal(quiet=options.quiet or not shard.is_first)
    terminal.say("Loading the model")
    # Progress bars and advice of transformers would stand between our lines; its errors are still printed.
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    device = options.device
    if device in ("auto", "cuda") and shard.count > 1:
        gpus = torch.cuda.device_count()
        device = f"cuda:{shard.local % gpus}" if gpus else device
    on = models.resolve_device(device)
    models.resolve_dtype(dtype, on)
    timings: dict[str, float] = {}
    with stage(timings, "load"):
        described = models.describe(options.model, notify=terminal.say)
        prompts = prepare(described)
        size = head_dim(described.config.get_text_config())
        if on.type != "cpu" and size > MAX_HEAD_DIM:
            terminal.say(
                f"Head size {size}: over {MAX_HEAD_DIM} statistics are computed without kernels, which is slow"
            )
        loaded = models.load(described, dtype=dtype, device=device, notify=terminal.say)
        model = identity(loaded.model)
    return Job(loaded, model, prompts, shard, terminal, engine, timings)


def _engine(options: argparse.Namespace, sampling: Sampling, shard: Shard) -> VllmEngine | None:
    """vLLM's engine where it was asked for. Raises InputError."""
    if not arguments.check_engine(options):
        return None
    if shard.count > 1:
        raise InputError(
            "--engine vllm: is for one process; start it without torchrun or accelerate, and give vLLM several GPUs by "
            """--engine-args '{"tensor_parallel_size": 2}'"""
        )
    from attnstats.study import vllm

    return vllm.choose(options.engine_args, sampling)


def run_identity(job: Job, system: str) -> dict[str, Any]:
    """What decides the responses to the prompts beside the settings of a command, for the identity of its run."""
    loaded = job.loaded
    generation = json.loads(json.dumps(loaded.model.generation_config.to_diff_dict(), default=str))
    return {
        "model": {
            "name": loaded.name, "dtype": loaded.dtype, "device": loaded.device.type, **dataclasses.asdict(job.model),
        },
        "tokenizer": tokenizer_digest(loaded.tokenizer),
        "chat_template": digest(loaded.tokenizer.chat_template),
        "system": system,
        "end_tokens": sorted(end_tokens(loaded)),
        "generation": {key: value for key, value in generation.items() if key != "transformers_version"},
        "prompts": {"count": len(job.prompts), "sha256": digest(job.prompts)},
        **({"engine": "transformers"} if job.engine is None else job.engine.identity),
    }  # fmt: skip
