"""Many prompts: generate in batches, measure each response, keep what is done.

`run` is the loop that `attnstats analyze` and `attnstats couplings` share; what is measured is the caller's function.
What the store has already is not done again, and the seed of a batch follows from its place: a run that was killed,
or that several processes share (shards.py), gives the results of one that went through.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor

from attnstats.study.generation import check_lengths, generate
from attnstats.study.models import LoadedModel
from attnstats.study.prompts import render
from attnstats.study.shards import Shard
from attnstats.study.store import Store

BATCH = 8
MEASURING = 10  # what a measurement counts for on the bar, in steps of generation

Measured = tuple[dict[str, Tensor], dict[str, Any]]  # tensors and texts, as Store.write takes them


class Progress(Protocol):
    """Is told what goes on; `total` units of work for what can be long."""

    def start(self, what: str, total: int) -> None: ...

    def advance(self, amount: int = 1) -> None: ...

    def finish(self) -> None: ...


@contextmanager
def stage(timings: dict[str, float], name: str) -> Iterator[None]:
    """Add the seconds that the block took to `timings[name]`."""
    start = time.perf_counter()
    try:
        yield
    finally:
        timings[name] = round(timings.get(name, 0.0) + time.perf_counter() - start, 3)


def rendered(loaded: LoadedModel, questions: Sequence[str], system: str, max_tokens: int) -> list[list[int]]:
    """The token ids that the model reads of each question. Raises InputError where a response doesn't fit behind."""
    prompts = [render(loaded.tokenizer, question, system) for question in questions]
    check_lengths(prompts, loaded, max_tokens)
    return prompts


def run(
    loaded: LoadedModel,
    prompts: Sequence[list[int]],
    measure: Callable[[int, list[int], list[int]], Measured],
    *,
    max_tokens: int,
    temperature: float,
    seed: int,
    store: Store,
    progress: Progress,
    shard: Shard = Shard(),  # noqa: B008 frozen
    timings: dict[str, float] | None = None,
) -> None:
    """Fill `store` with the results of this process's share of the prompts.

    Args:
        prompts: token ids, as `rendered` gives them.
        max_tokens, temperature, seed: that generation.check_sampling has seen.
        measure: (index, prompt, response) to what is to be kept of it.
        timings: gets the seconds of "generate" and "statistics".

    Raises:
        InputError: the store cannot be read or written.
    """
    timings = {} if timings is None else timings
    batches = shard.of([range(start, min(start + BATCH, len(prompts))) for start in range(0, len(prompts), BATCH)])
    open_ = [batch for batch in batches if not all(map(store.has, batch))]
    count = sum(map(len, open_))
    progress.start(
        f"{count} prompt{'' if count == 1 else 's'}, up to {max_tokens} tokens each",
        sum(max_tokens + MEASURING * len(batch) for batch in open_),
    )
    try:
        for batch in open_:
            with stage(timings, "generate"):
                steps = _generate(loaded, prompts, batch, max_tokens, temperature, seed, store, progress)
            progress.advance(max_tokens - steps)
            with stage(timings, "statistics"):
                for index in batch:
                    if not store.has(index):
                        store.write(index, *measure(index, *store.response(index)))
                    progress.advance(MEASURING)
    finally:
        progress.finish()


def _generate(
    loaded: LoadedModel,
    prompts: Sequence[list[int]],
    batch: range,
    max_tokens: int,
    temperature: float,
    seed: int,
    store: Store,
    progress: Progress,
) -> int:
    """Make sure that the store has the responses of a batch; how many steps that took."""
    if all(map(store.has_response, batch)):
        return 0
    steps = 0

    def advance() -> None:
        nonlocal steps
        steps += 1
        progress.advance()

    responses = generate(
        loaded,
        [prompts[index] for index in batch],
        max_tokens=max_tokens,
        temperature=temperature,
        seed=(seed + batch.start) % 2**64,
        advance=advance,
    )
    for index, response in zip(batch, responses, strict=True):
        if not store.has_response(index):  # what has been measured stays with what was measured
            store.write_response(index, prompts[index], response)
    return steps
