"""Many prompts: generate in batches or by an engine, measure each response, keep what is done.

The measurement is the caller's function. What the store already has is not done again, and the seed of a batch follows
from its place: a run that was killed, or that several processes share (shards.py), gives the results of a single one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from typing import Protocol

from attnstats.study.chat import Prompt, render
from attnstats.study.generation import Sampling, check_lengths, generate, seed_at
from attnstats.study.models import Description, LoadedModel
from attnstats.study.shards import Shard
from attnstats.study.store import Item, Store
from attnstats.study.text import counted

Measure = Callable[[int, list[int], list[int]], Item]  # (index, prompt, response) to the item to store

BATCH = 8
MEASURING = 10  # weight of a measurement on the progress bar, in steps of generation


class Engine(Protocol):
    """Generates responses by itself, in the place of the model's `generate`."""

    def responses(
        self,
        loaded: LoadedModel,
        prompts: Mapping[int, list[int]],
        sampling: Sampling,
        advance: Callable[[int], None],
    ) -> Generator[tuple[int, list[int]], None, None]:
        """The number of each prompt with its response, as they end; `advance` gets the number of new tokens."""


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
    engine: Engine | None = None,
) -> None:
    """Fill `store` with the results of this process's share of the prompts. Responses that it has are not generated.

    Args:
        prompts: token ids, as `rendered` returns them.
        sampling: checked.
        timings: gets the seconds of "generate" and "statistics".
        subject: what progress calls a prompt.
        engine: makes the responses; None: the model's `generate` does, in batches.

    Raises:
        InputError: the store cannot be read or written, or the engine doesn't start.
    """
    timings = {} if timings is None else timings
    batches = shard.of([range(start, min(start + BATCH, len(prompts))) for start in range(0, len(prompts), BATCH)])
    unfinished = [batch for batch in batches if not all(map(store.has, batch))]
    unmeasured = [index for batch in unfinished for index in batch if not store.has(index)]
    unanswered = {i: prompts[i] for batch in unfinished for i in batch if not store.has_response(i)}
    most = sampling.max_tokens
    if engine is None:  # a unit of progress is a step of a batch
        weight, units = MEASURING, sum(not unanswered.keys().isdisjoint(batch) for batch in unfinished)
    else:  # a token
        weight, units = MEASURING * BATCH, len(unanswered)

    def finish(indices: Iterable[int]) -> None:
        with stage(timings, "statistics"):
            for index in indices:
                if not store.has(index):
                    store.write(index, *measure(index, *store.response(index)))
                    progress.advance(weight)

    what = counted(len(unmeasured), subject) + (f", up to {most} tokens each" if unanswered else "")
    with task(progress, what, most * units + weight * len(unmeasured)):
        if engine is not None and unanswered:
            for index in _by_engine(engine, loaded, unanswered, sampling, store, progress, timings):
                finish([index])
        for batch in unfinished:
            if engine is None and not unanswered.keys().isdisjoint(batch):
                with stage(timings, "generate"):
                    steps = _generate(loaded, prompts, batch, sampling, store, progress)
                progress.advance(most - steps)
            finish(batch)


def _by_engine(
    engine: Engine,
    loaded: LoadedModel,
    prompts: Mapping[int, list[int]],
    sampling: Sampling,
    store: Store,
    progress: Progress,
    timings: dict[str, float],
) -> Iterator[int]:
    """Let an engine generate the responses; the number of each prompt whose response is in the store."""
    with closing(engine.responses(loaded, prompts, sampling, progress.advance)) as responses:
        while True:
            with stage(timings, "generate"):
                answer = next(responses, None)
            if answer is None:
                return
            index, response = answer
            store.write_response(index, prompts[index], response)
            progress.advance(sampling.max_tokens - len(response))
            yield index


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

    sampling = sampling._replace(seed=seed_at(sampling.seed, batch.start))
    batch_prompts = [prompts[index] for index in batch]
    responses = generate(loaded, batch_prompts, sampling, advance=progress.advance, finished=keep)
    return max(map(len, responses))
