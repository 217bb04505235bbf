"""The findings of a corpus: the profile of its heads, its tables, and the couplings between its curves.

Responses come one at a time and are not kept. The receiver heads of the couplings are known only when all heads are
profiled, so that a corpus is gone through twice: its head summaries, which are small, then its outlines. couplings.py
is the paper's study of the couplings, over all layers and settings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from attnstats.chance import Chance, Coupling
from attnstats.heads import HeadProfile, class_mean
from attnstats.identity import ModelIdentity
from attnstats.rhythm import CorpusRhythm, Curves
from attnstats.study import tables
from attnstats.study.analysis import HeadSummary, Outline

RECEIVERS = 20


def profile(summaries: Iterable[HeadSummary], model: ModelIdentity | None = None) -> HeadProfile:
    """The profile of the captured layers' heads over all responses, of which each is taken once.

    Raises:
        ValueError: there is none.
    """
    total: HeadProfile | None = None
    for summary in summaries:
        if total is None:
            total = HeadProfile.empty(summary.layers, summary.distance.shape[1], model)
        total = total.add_means(summary.distance, summary.rows, summary.received_kurtosis)
    if total is None:
        raise ValueError("summaries is empty: a profile is of one response or more")
    return total


@contextmanager
def _one_thread() -> Iterator[None]:
    """Inside the `with` torch computes in one thread: for tensors of one response, waking others takes longer."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def curves(outline: Outline, receivers: Tensor) -> Curves:
    """The curves of a response; `receivers`, (L, H) bool, are the receiver heads of the corpus."""
    response = outline.response
    received = class_mean(outline.head_received, receivers)
    return Curves(
        waad=outline.waad[response],
        fai=outline.fai[response],
        receiver_fai=received[response],
        entropy=outline.entropy[response],
        fai_valid=outline.fai_valid[response],
        receiver_valid=outline.received_valid[response],
    )


def couplings(
    outlines: Iterable[Outline],
    heads: HeadProfile,
    chance: Chance = Chance(),
    seen: Callable[[int, Outline], None] = lambda number, outline: None,
) -> tuple[Coupling, ...]:
    """The paper's three couplings over the responses of a corpus (Table 2); none if no head is a receiver.

    Each outline is taken once, and none is kept.

    Args:
        seen: called with the number of each, and with it.
    """
    receivers = heads.receivers(RECEIVERS)
    total = CorpusRhythm(chance=chance)
    with _one_thread():
        for number, outline in enumerate(outlines):
            seen(number, outline)
            if receivers.any():
                total.add(curves(outline, receivers))
    return total.couplings() if total.responses else ()


def tabulate(
    folder: Path,
    outlines: Iterable[Outline],
    heads: HeadProfile,
    chance: Chance = Chance(),
    advance: Callable[[], None] = lambda: None,
) -> tuple[Coupling, ...]:
    """Write the tables of a corpus, and return its `couplings`. advance: called after each outline."""
    with tables.written(folder) as add:

        def seen(number: int, outline: Outline) -> None:
            add(number, outline)
            advance()

        return couplings(outlines, heads, chance, seen)
