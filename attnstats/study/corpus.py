"""Many prompts: generate in batches, measure each response, keep what is done.

The measurement is the caller's function. What the store already has is not done again, and the seed of a batch follows
from its place: a run that was killed, or that several processes share (shards.py), gives the results of a single one.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from attnstats.study.chat import Prompt, render
from attnstats.study.generation import Sampling, check_lengths, generate
from attnstats.study.models import Description, LoadedModel
from attnstats.study.shards import Shard
from attnstats.study.store import Item, Store
from attnstats.study.text import counted

Measure = Callable[[int, list[int], list[int]], Item]  # (index, prompt, response) to the item to store

BATCH = 8
MEASURING = 10  # weight of a measurement on the progress bar, in steps of generation


class Progress(Protocol):
    """Shows how far a task is, in units of its total work."""

    def start(self, what: str, total: int) -> None: ...

    def advance(self, amount: int = 1) -> None: ...

    def finish(self) -> None: ...


@contextmanager
def task(progress: Progress, what: str, total: int) -> Iterator[None]:
    """A `with` block as a task that is shown."""
    progress.start(what, total)
    try:
        yield
    finally:
        progress.finish()


@contextmanager
def stage(timings: dict[str, float], name: str) -> Iterator[None]:
    """Add the seconds that the block took to `timings[name]`."""
    start = time.perf_counter()
    try:
        yield
    finally:
        timings[name] = round(timings.get(name, 0.0) + time.perf_counter() - start, 3)


def rendered(
    model: LoadedModel | Description, prompts: Sequence[Prompt], system: str, max_tokens: int
) -> list[list[int]]:
    """The token ids that the model reads of each prompt. Raises InputError if a response doesn't fit after one."""
    ids = [render(model.tokenizer, prompt, system) for prompt in prompts]
    check_lengths(ids, model, max_tokens)
    return ids


def run(
    loaded: LoadedModel,
    prompts: Sequence[list[int]],
    measure: Measure,
    sampling: Sampling,
    *,
    store: Store,
    progress: Progress,
    shard: Shard = Shard(),  # noqa: B008 frozen
    timings: dict[str, float] | None = None,
    subject: str = "prompt",
) -> None:
    """Fill `store` with the results of this process's share of the prompts. Responses that it has are not generated.

    Args:
        prompts: token ids, as `rendered` returns them.
        sampling: checked.
        timings: gets the seconds of "generate" and "statistics".
        subject: what progress calls a prompt.

    Raises:
        InputError: the store cannot be read or written.
    """
    timings = {} if timings is None else timings
    batches = shard.of([range(start, min(start + BATCH, len(prompts))) for start in range(0, len(prompts), BATCH)])
    unfinished = [batch for batch in batches if not all(map(store.has, batch))]
    unanswered = {batch for batch in unfinished if not all(map(store.has_response, batch))}
    count, most = sum(map(len, unfinished)), sampling.max_tokens
    what = counted(count, subject) + (f", up to {most} tokens each" if unanswered else "")
    with task(progress, what, most * len(unanswered) + MEASURING * count):
        for batch in unfinished:
            if batch in unanswered:
                with stage(timings, "generate"):
                    steps = _generate(loaded, prompts, batch, sampling, store, progress)
                progress.advance(most - steps)
            with stage(timings, "statistics"):
                for index in batch:
                    if not store.has(index):
                        store.write(index, *measure(index, *store.response(index)))
                    progress.advance(MEASURING)


def _generate(
    loaded: LoadedModel,
    prompts: Sequence[list[int]],
    batch: range,
    sampling: Sampling,
    store: Store,
    progress: Progress,
) -> int:
    """Generate the responses of a batch; the number of steps that took."""

    def keep(row: int, response: list[int]) -> None:
        index = batch[row]
        if not store.has_response(index):  # a response that was measured stays with its measurement
            store.write_response(index, prompts[index], response)

    sampling = sampling._replace(seed=_seed(sampling.seed, batch.start))
    batch_prompts = [prompts[index] for index in batch]
    responses = generate(loaded, batch_prompts, sampling, advance=progress.advance, finished=keep)
    return max(map(len, responses))


def _seed(seed: int, start: int) -> int:
    """The seed of the batch that starts at a prompt: a hash, so that no two runs of different seeds share one."""
    return int.from_bytes(hashlib.sha256(f"{seed},{start}".encode()).digest()[:8], "little")
