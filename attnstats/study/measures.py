"""Kinds of heads, and the measure of each on one text: what `attnstats.heads.find` sums over a corpus.

A measure is a sum and a count per head, from statistics of one forward pass in O(T) memory. A kind says by which
measure its heads are ranked, and from which end.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnstats import heads, segments
from attnstats.errors import InputError
from attnstats.statistics import Entropy, MeanDistance, PooledMap, SinkMass, Statistic, TopKeys
from attnstats.study.given import Given
from attnstats.study.maps import AtDistance
from attnstats.study.models import LoadedModel
from attnstats.study.reading import pieces
from attnstats.transformers.capture import capture
from attnstats.transformers.selection import Layers

FIRST_KEYS = 4  # keys that are sinks (Xiao et al., Sec. 3.1)
IGNORED = 4  # nearest sentences whose attention is not counted (Bogdan et al.)
Sum = tuple[Tensor, Tensor]  # (L, H) float64, and of how many values it is


@dataclass(frozen=True, eq=False)
class ReadText:
    """What a forward pass over one text gave.

    Attributes:
        layers: numbers of the L layers.
        ids: (T,) int64.
        start: first token of the response, at least 1.
        boundaries: the first token of each sentence, then T; what comes before the response is the first one. Empty
            where no measure needs it.
        results: by statistic what a capture returns, without the batch axis.
    """

    layers: tuple[int, ...]
    ids: Tensor
    start: int
    boundaries: tuple[int, ...]
    results: dict[Statistic, Any]

    def rows(self, first: int) -> Tensor:
        """(T,) bool, the queries of the response from this position on."""
        return torch.arange(len(self.ids), dtype=torch.int64, device="cpu") >= max(first, self.start)

    def total(self, values: Tensor, rows: Tensor) -> Sum:
        """The sum of values (L, H, T) over some rows, and their number."""
        total = values[..., rows].double().sum(-1)
        return total, torch.full(total.shape, int(rows.sum()), dtype=torch.int64, device="cpu")

    @property
    def is_repeated(self) -> Tensor:
        """(T,) bool, the tokens that are in the text before."""
        _, words = self.ids.unique(return_inverse=True)
        places = torch.arange(len(self.ids), dtype=torch.int64, device="cpu")
        first = torch.full_like(places, len(places)).scatter_reduce(0, words, places, "amin")
        return first[words] < places


@dataclass(frozen=True)
class Measure:
    """A number per head.

    Attributes:
        unit: of the number.
        statistics: those that it is made of, given the boundaries of sentences.
        of: the sum and the count of a text.
        needs: what a text must have for it, to be read after "a text"; empty: it has it.
        by_sentence: it needs the boundaries.
    """

    unit: str
    statistics: Callable[[tuple[int, ...]], tuple[Statistic, ...]]
    of: Callable[[ReadText], Sum]
    needs: str = ""
    by_sentence: bool = False


class Kind(NamedTuple):
    """How heads of a kind are ranked: by a measure, the highest or the lowest first."""

    measure: str
    highest: bool
    title: str
    is_log: bool = False  # how it is drawn


def _distance(text: ReadText) -> Sum:
    return text.total(text.results[MeanDistance()], text.rows(0))


def _entropy(text: ReadText) -> Sum:
    return text.total(text.results[Entropy()], text.rows(0))


def _first_keys(text: ReadText) -> Sum:
    return text.total(text.results[SinkMass(FIRST_KEYS)], text.rows(FIRST_KEYS))  # earlier queries see nothing else


def _previous_token(text: ReadText) -> Sum:
    return text.total(text.results[AtDistance(1)], text.rows(1))


def _received_kurtosis(text: ReadText) -> Sum:
    pooled = text.results[PooledMap(text.boundaries, text.boundaries)]
    sizes = [end - begin for begin, end in pairwise(text.boundaries)]
    received = heads.segment_received(pooled, sizes, IGNORED)[..., 1:]  # without the prompt
    kurtosis = heads.kurtosis(received, received[0, 0].isfinite())
    return kurtosis.nan_to_num(0.0), kurtosis.isfinite()


def _copied(text: ReadText) -> Sum:
    """Among queries whose next token is in the text up to them: those that look at such a token most."""
    hits = text.ids[text.results[TopKeys(1)].indices[..., :-1, 0]] == text.ids[1:]
    return text.total(hits, (text.is_repeated & text.rows(0))[1:])


def _induced(text: ReadText) -> Sum:
    """Among queries whose token is in the text before: those that look most at a token that comes after it."""
    keys = text.results[TopKeys(1)].indices[..., 0]
    hits = (text.ids[keys - 1] == text.ids) & (keys > 0)
    return text.total(hits, text.is_repeated & text.rows(0))


MEASURES = {
    "mean_distance": Measure("tokens", lambda _: (MeanDistance(),), _distance),
    "sink_mass": Measure(
        "share of attention",
        lambda _: (SinkMass(FIRST_KEYS),),
        _first_keys,
        needs=f"of more than {FIRST_KEYS} tokens",
    ),
    "received_kurtosis": Measure(
        "excess kurtosis",
        lambda boundaries: (PooledMap(boundaries, boundaries),),
        _received_kurtosis,
        needs=f"whose response has {heads.SHAPED + IGNORED} sentences or more",
        by_sentence=True,
    ),
    "previous_token_mass": Measure("share of attention", lambda _: (AtDistance(1),), _previous_token),
    "copy_rate": Measure("share of queries", lambda _: (TopKeys(1),), _copied, needs="whose response repeats a token"),
    "induction_rate": Measure(
        "share of queries", lambda _: (TopKeys(1),), _induced, needs="whose response repeats a token"
    ),
    "entropy": Measure("nats", lambda _: (Entropy(),), _entropy),
}

KINDS = {
    "local": Kind("mean_distance", False, "Local: shortest distance", is_log=True),
    "global": Kind("mean_distance", True, "Global: longest distance"),
    "sink": Kind("sink_mass", True, "Sink"),
    "receiver": Kind("received_kurtosis", True, "Receiver"),
    "previous-token": Kind("previous_token_mass", True, "Previous token"),
    "retrieval": Kind("copy_rate", True, "Retrieval"),
    "induction": Kind("induction_rate", True, "Induction"),
    "high-entropy": Kind("entropy", True, "High entropy"),
    "low-entropy": Kind("entropy", False, "Low entropy"),
}


def one_pass(loaded: LoadedModel, text: Given, names: Sequence[str], layers: Layers, where: str) -> ReadText:
    """What the measures of these names read of a text, from one forward pass.

    Raises:
        InputError: the model can't be read, or attention overflows in its dtype.
    """
    ids, start = text.prompt + text.response, len(text.prompt)
    boundaries: tuple[int, ...] = ()
    if any(MEASURES[name].by_sentence for name in names):
        boundaries = segments.boundaries(pieces(loaded.tokenizer, ids), start=start)
    statistics = list(dict.fromkeys(s for name in names for s in MEASURES[name].statistics(boundaries)))
    on_device = torch.tensor([ids], dtype=torch.int64, device=loaded.device)
    capturing = capture(loaded.model, statistics=statistics, layers=layers, stop_after_last_layer=True)
    with torch.no_grad(), capturing as run:
        run.forward(input_ids=on_device, use_cache=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # NaN is an error here
        results = {statistic: run[statistic] for statistic in statistics}
    parts = [part for result in results.values() for part in ([result] if isinstance(result, Tensor) else result)]
    if not all(part.isfinite().all() for part in parts):
        raise InputError(f"{where}: attention of {loaded.name} overflows in {loaded.dtype}; load it in float32")
    without_batch = {statistic: _without_batch(result) for statistic, result in results.items()}
    return ReadText(run.layers, on_device[0].cpu(), start, boundaries, without_batch)


def _without_batch(result: Any) -> Any:
    """A result (L, 1, ...), or each part of one, as (L, ...) on the CPU."""
    return result[:, 0].cpu() if isinstance(result, Tensor) else type(result)(*map(_without_batch, result))
