"""The record of one request as bytes, which go from a worker to whoever asks for it, or into a file.

It is a safetensors file: a value and a validity for each statistic, the tokens, and the settings in its metadata.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from attnstats import cells
from attnstats.integrations.vllm.configuration import RequestSettings, described
from attnstats.results import ByStatistic, find
from attnstats.statistics import Statistic
from attnstats.transformers import frames
from attnstats.transformers.live import PlacedRecording
from attnstats.transformers.selection import ChosenHeads, Reduce

if TYPE_CHECKING:
    from pandas import DataFrame

FORMAT = "attnstats vllm request 2"
Heads = Mapping[int, tuple[int, ...] | None]


class Model(NamedTuple):
    """What an engine serves.

    Attributes:
        name, tokenizer: folders or names of the hub.
        engine: its name and version.
    """

    name: str = ""
    tokenizer: str = ""
    dtype: str = ""
    engine: str = ""

    def with_adapter(self, name: str) -> Model:
        """With the name of a LoRA adapter, if any, behind its own."""
        return self._replace(name=f"{self.name} + {name}") if name else self


@dataclass(frozen=True, eq=False, repr=False)
class RequestStatistics(Mapping[Statistic, Any]):
    """The statistics of one request, as `attnstats.capture` gives those of one pass over its tokens, with B = 1.

    `result["waad"]` or `result[WAAD(10)]` is (L, 1, H, T), one slice per layer and chosen head; without L where layers
    are reduced, without H where heads are.

    Attributes:
        tokens: (1, T) int64, those that went through the model: the prompt and the output but for its last token.
            Where a text ends the output, the engine may have gone on for some tokens, which are here, too.
        prompt: how many of the first tokens are the prompt's.
        cached: how many of the first tokens were found in the cache of prefixes. They made no queries: as rows they are
            not valid, and as keys they have what later queries gave them.
        valid: per statistic (1, T) bool, False where a value is a placeholder.
        layers: numbers of the recorded layers.
        heads: per statistic and layer the heads, None for all.
        reduce: the axes that values are means over.
        token_entropy: (T,) in nats, the entropy of the model's distribution that each token was drawn from, at the
            request's temperature (greedy: of the model's own) and before top-k, top-p and the like; NaN for the first
            token, and where the one before was cached. None: it was not asked for.
        model: what the engine serves.
    """

    tokens: Tensor
    prompt: int
    cached: int
    valid: ByStatistic
    layers: tuple[int, ...]
    heads: ChosenHeads
    reduce: tuple[Reduce, ...]
    token_entropy: Tensor | None
    model: Model
    _tensors: Mapping[Statistic, Tensor]

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        return tuple(self._tensors)

    def __getitem__(self, key: Statistic | str) -> Any:
        statistic = find(key, self._tensors, "recorded")
        return statistic.returned(self._tensors[statistic])

    def __contains__(self, key: object) -> bool:
        return key in self._tensors or any(statistic.name == key for statistic in self._tensors)

    def __iter__(self) -> Any:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def to_frame(self) -> DataFrame:
        """One row per layer, batch row, head and position, as `Capture.to_frame`."""
        results = {s: frames.Recorded(self[s], self.valid[s], self.heads[s]) for s in self.statistics}
        return frames.to_frame(results, self.reduce, are_apart=False)

    def __repr__(self) -> str:
        over = f", means over {' and '.join(self.reduce)}" if self.reduce else ""
        cached = f", the first {self.cached} of them cached" if self.cached else ""
        lines = [f"Request of {self.tokens.shape[1]} tokens{cached}: layers {', '.join(map(str, self.layers))}{over}"]
        lines += [f"  {frames.described(s, self[s], self.heads[s], self.reduce)}" for s in self.statistics]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return cells.text(repr(self)) + cells.curves(frames.curves(self._tensors, self.reduce))


def encode(
    settings: RequestSettings,
    layers: tuple[int, ...],
    heads: ChosenHeads,
    recording: PlacedRecording,
    tokens: list[int],
    *,
    prompt: int = 0,
    token_entropy: Tensor | None = None,
    model: Model = Model(),  # noqa: B008 frozen
) -> bytes:
    """The record of a request, with what `RequestStatistics` says of it."""
    tensors, masks = {}, {}
    for s in settings.statistics:
        values, valid = recording.read(s), recording.valid(s)
        if s.axis != "column":  # queries of cached tokens
            behind = [0] * 2 * s.per_query
            values = torch.nn.functional.pad(values, (*behind, recording.first, 0))
            valid = torch.nn.functional.pad(valid, (recording.first, 0))
        tensors[s], masks[s] = values, valid
    result = RequestStatistics(
        tokens=torch.tensor([tokens[: recording.length]], dtype=torch.int64, device="cpu"),
        prompt=prompt,
        cached=recording.first,
        valid=ByStatistic(masks),
        layers=layers,
        heads=heads,
        reduce=settings.reduce,
        token_entropy=token_entropy,
        model=model,
        _tensors=tensors,
    )
    return encoded(result)


def encoded(result: RequestStatistics) -> bytes:
    """The record that `decode` reads the same statistics from."""
    tensors = {"tokens": result.tokens}
    for i, s in enumerate(result.statistics):
        tensors |= {f"{i}": result._tensors[s].contiguous(), f"{i}.valid": result.valid[s].contiguous()}
    if result.token_entropy is not None:
        tensors["token_entropy"] = result.token_entropy
    content = {
        "statistics": [described(s) for s in result.statistics],
        "layers": result.layers,
        "heads": [list(result.heads[s].items()) for s in result.statistics],
        "reduce": result.reduce,
        "prompt": result.prompt,
        "cached": result.cached,
        "model": result.model._asdict(),
    }
    return save(tensors, {"format": FORMAT, "content": json.dumps(content)})


def failure(reason: str, tokens: Sequence[int] = ()) -> bytes:
    """What stands for the record of a request that has none."""
    all_tokens = torch.tensor([list(tokens)], dtype=torch.int64, device="cpu")
    return save({"tokens": all_tokens}, {"format": FORMAT, "failure": reason})


def fault_of(record: bytes) -> str | None:
    """The reason of a failure."""
    return _metadata(record).get("failure")


def is_of(record: bytes, prompt: list[int], output: list[int]) -> bool:
    """True if the request had these tokens.

    Args:
        prompt: all of it.
        output: some of it in a row, such as the last delta of a stream, without the very last token, which did not go
            through the model.
    """
    tokens = load(record)["tokens"][0].tolist()
    answer = tokens[len(prompt) :]
    places = range(len(answer) - len(output) + 1)
    # A request that was aborted may have a part of its prompt.
    return tokens[: len(prompt)] == prompt[: len(tokens)] and any(
        answer[place : place + len(output)] == output for place in places
    )


def decode(record: bytes) -> RequestStatistics:
    """The statistics of a record.

    Raises:
        RuntimeError: the request has none, and why.
        ValueError: it is no record, a damaged one or one of another version of this package.
    """
    if fault := fault_of(record):
        raise RuntimeError(fault)
    content = json.loads(_metadata(record)["content"])
    try:
        tensors = load(record)
    except SafetensorError as error:
        raise ValueError(f"a damaged record ({error})") from error
    statistics = RequestSettings.of({"statistics": content["statistics"], "reduce": content["reduce"]}).statistics
    heads: ChosenHeads = {
        s: {layer: None if chosen is None else tuple(chosen) for layer, chosen in of_statistic}
        for s, of_statistic in zip(statistics, content["heads"], strict=True)
    }
    return RequestStatistics(
        tokens=tensors["tokens"],
        prompt=content["prompt"],
        cached=content["cached"],
        valid=ByStatistic({s: tensors[f"{i}.valid"] for i, s in enumerate(statistics)}),
        layers=tuple(content["layers"]),
        heads=heads,
        reduce=tuple(content["reduce"]),
        token_entropy=tensors.get("token_entropy"),
        model=Model(**content["model"]),
        _tensors={s: tensors[f"{i}"] for i, s in enumerate(statistics)},
    )


def merged(ranks: Sequence[RequestStatistics]) -> RequestStatistics:
    """The statistics of a request from those of tensor-parallel ranks, each of which has equally many of the heads.

    Raises:
        ValueError: they are of other tokens, as where ranks ended at different steps.
    """
    first = ranks[0]
    if len(ranks) == 1:
        return first
    if not all(torch.equal(rank.tokens, first.tokens) for rank in ranks):
        raise ValueError(f"the ranks have {', '.join(str(rank.tokens.shape[1]) for rank in ranks)} tokens of it")
    tensors = {}
    for s in first.statistics:
        parts = [rank._tensors[s] for rank in ranks]
        tensors[s] = torch.stack(parts).mean(0) if "heads" in first.reduce else torch.cat(parts, -2 - s.per_query)
    return replace(first, _tensors=tensors)


def _metadata(record: bytes) -> dict[str, str]:
    """Raises ValueError: it is no record, or one of another version of this package."""
    length = int.from_bytes(record[:8], "little")
    try:
        metadata: dict[str, str] = json.loads(record[8 : 8 + length]).get("__metadata__") or {}
    except (AttributeError, ValueError) as error:
        raise ValueError(f"a damaged record ({error})") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(f"its format is {metadata.get('format')!r}, not {FORMAT!r}; record it with this version")
    return metadata
