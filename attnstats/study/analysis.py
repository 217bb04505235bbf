"""An analysis: the tokens of one prompt and its response with their statistics, in memory and in a store."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, overload

import numpy as np
import torch
from torch import Tensor

from attnstats import cells, rhythm
from attnstats.heads import HeadClasses
from attnstats.presets import paper_v2
from attnstats.statistics import FAI, WAAD, MeanDistance
from attnstats.study.generation import Sampling
from attnstats.study.maps import Maps
from attnstats.study.prompts import SYSTEM
from attnstats.study.reading import Departures
from attnstats.study.store import Item, Store, corrupt
from attnstats.study.text import shortened, token_name, utf8, visible
from attnstats.transformers.selection import Layers

if TYPE_CHECKING:
    from pandas import DataFrame
    from typing_extensions import Self

Part = TypeVar("Part", bound="Outline")
NAMED = 5  # tokens of highest WAAD and FAI that a repr names


@dataclass(frozen=True)
class Settings:
    """Settings of an analysis; the defaults are the paper's (presets.paper_v2).

    Attributes:
        fai_hi: None leaves the horizon of FAI open.
        layers: the layers to read, as for `attnstats.capture`.
        temperature: 0 is greedy; the seed matters above it. Entropies are of logits / temperature, at 0 of the logits.
        system: the system text before every question; "" for none.
    """

    window: int = paper_v2.window
    fai_lo: int = paper_v2.fai_lo
    fai_hi: int | None = paper_v2.fai_hi
    layers: Layers = "middle-third"
    head_share: float = paper_v2.head_share
    max_tokens: int = 256
    temperature: float = 0.0
    seed: int = 0
    system: str = SYSTEM

    @property
    def statistics(self) -> tuple[WAAD, FAI, MeanDistance]:
        return WAAD(self.window), FAI(self.fai_lo, self.fai_hi), MeanDistance()

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.max_tokens, self.temperature, self.seed)


# The tensors that a store keeps under the names of fields, with their axes: layers, heads, tokens, response.
_AXES = {name: axes for axes, names in {
    "T": ("token_ids", "response", "received_valid", "waad", "fai", "fai_valid", "entropy"),
    "LHT": ("head_received",),
    "LH": ("distance", "received_kurtosis"),
    "R": ("delta",),
}.items() for name in names}  # fmt: skip
_PER_HEAD = dict.fromkeys(("head_waad", "head_fai", "head_mean_distance"), "LHT")
_MAPS = tuple(field.name for field in dataclasses.fields(Maps))
_BOOLS = ("response", "fai_valid", "received_valid", "local", "global")
_WITH_NAN = ("entropy", "received_kurtosis")


class HeadSummary(NamedTuple):
    """What a head profile needs of one response.

    Attributes:
        layers: indices of the captured layers.
        distance: (L, H) float64, mean attention distance of each head over the response.
        received_kurtosis: (L, H) float64, kurtosis of what each head receives (heads.RECEIVED); NaN where undefined.
        rows: number of tokens of the response.
    """

    layers: tuple[int, ...]
    distance: Tensor
    received_kurtosis: Tensor
    rows: int


@dataclass(frozen=True, eq=False, repr=False)
class Outline:
    """A prompt, its response and their curves: T positions of prompt and response, L layers, H heads.

    It is what tables and couplings need of an analysis, a small part of its file.

    Attributes:
        token_ids, tokens: (T,) the tokens, and the text that each adds (reading.pieces).
        shown: (T,) the texts with a part of a character as its bytes (reading.shown).
        response: (T,) bool, the positions that were generated.
        layers: indices of the captured layers.
        head_received: (L, H, T) per head, heads.RECEIVED. received_valid: (T,) bool, where it has a value.
        received_kurtosis: (L, H) float64, kurtosis of what each head receives over the response; NaN where undefined.
        distance: (L, H), mean attention distance of each head over the response.
        classes: the local and the global heads.
        waad: (T,), mean over the local heads. fai: (T,), mean over the global heads, 0 where not fai_valid.
        delta: (response length,), change of WAAD to the next token.
        entropy: (T,) in nats, of the distribution each token was drawn from; NaN for the first.
    """

    question: str
    token_ids: Tensor
    tokens: list[str]
    shown: list[str]
    response: Tensor
    layers: tuple[int, ...]
    head_received: Tensor
    received_valid: Tensor
    received_kurtosis: Tensor
    distance: Tensor
    classes: HeadClasses
    waad: Tensor
    fai: Tensor
    fai_valid: Tensor
    delta: Tensor
    entropy: Tensor

    @classmethod
    def tensors(cls) -> tuple[str, ...]:
        """The names of the tensors of an item that `restored` needs."""
        return (*_AXES, "layers", "local", "global")

    @classmethod
    def restored(cls, tensors: dict[str, Tensor], texts: dict[str, Any]) -> Self:
        """The outline in an item that `Analysis.stored` made.

        Raises:
            LookupError, TypeError, ValueError: any other item.
        """
        _check_item({**_AXES, "layers": "L", "local": "LH", "global": "LH"}, tensors, texts)
        return cls(**_fields(tensors, texts))

    @property
    def response_start(self) -> int:
        return int(self.response.nonzero()[0])

    @property
    def response_text(self) -> str:
        return "".join(self.tokens[self.response_start :])

    def preplan(self, count: int) -> list[int]:
        """Positions of the response with the highest WAAD: tokens that look back beyond their chunk."""
        return self._top(self.waad, None, count)

    def anchors(self, count: int) -> list[int]:
        """Positions of the response with the highest FAI: tokens that later ones keep looking at."""
        return self._top(self.fai, self.fai_valid[self.response], count)

    def columns(self) -> dict[str, Any]:
        """By name a value for each token; delta is NaN before the response, entropy for the first token.

        Arrays are copies: others share the memory of an array, and that of a tensor is the file that it was read from.
        """
        delta = torch.full_like(self.waad, torch.nan)
        delta[self.response] = self.delta
        numbers = {
            "is_response": self.response, "waad": self.waad, "fai": self.fai, "fai_valid": self.fai_valid,
            "delta": delta, "entropy": self.entropy,
        }  # fmt: skip
        tokens = self.tokens if "".join(self.tokens).isascii() else list(map(utf8, self.tokens))
        return {"token": tokens, **{name: np.array(x.numpy()) for name, x in numbers.items()}}

    def to_frame(self) -> DataFrame:
        """One row per token of prompt and response, by position, as in the tokens table of a run."""
        import pandas

        return pandas.DataFrame(self.columns()).rename_axis("position")

    def _top(self, values: Tensor, valid: Tensor | None, count: int) -> list[int]:
        return [self.response_start + i for i in rhythm.top(values[self.response], count, valid)]

    def __repr__(self) -> str:
        heads = f"{len(self.layers)} x {self.distance.shape[1]} heads"
        classes = f"{int(self.classes.local.sum())} local, {int(self.classes.global_.sum())} global"
        top = (
            f"  {name}: " + ", ".join(f"{token_name(self.shown[i])} at {i}" for i in among)
            for name, among in (("highest WAAD", self.preplan(NAMED)), ("highest FAI", self.anchors(NAMED)))
        )
        question = visible(shortened(self.question, 60), newline=" ", tab=" ")
        length = f"{self.response_start} + {int(self.response.sum())} tokens"
        return "\n".join([f"{type(self).__name__} of {length}, {heads} ({classes}): {question}", *top])

    def _repr_html_(self) -> str:
        # By name: colours are of the report, which reads analyses.
        shaded = import_module("attnstats.report.notebook").Shaded
        column = import_module("attnstats.report.columns").COLUMNS[0]
        return cells.text(repr(self)) + str(shaded(self, column)._repr_html_())

    @property
    def head_summary(self) -> HeadSummary:
        return HeadSummary(self.layers, self.distance, self.received_kurtosis, int(self.response.sum()))


@dataclass(frozen=True, eq=False, repr=False)
class Analysis(Outline):
    """An outline with everything per head and token, and the maps.

    Attributes:
        head_waad, head_fai, head_mean_distance: (L, H, T) per head, as captured.
        maps: mean maps of the local and of the global heads, pooled and near the diagonal; None: they were not made.
        departures: tokens of the response that are not the model's likeliest; None: unknown.
    """

    head_waad: Tensor
    head_fai: Tensor
    head_mean_distance: Tensor
    maps: Maps | None
    departures: Departures | None = None

    def stored(self) -> Item:
        """The analysis as an item of a store: tensors by name, and the texts."""
        tensors = {name: getattr(self, name) for name in (*_AXES, *_PER_HEAD)}
        tensors |= {
            "layers": torch.tensor(self.layers, dtype=torch.int64, device="cpu"),
            "local": self.classes.local,
            "global": self.classes.global_,
        }
        tensors |= vars(self.maps) if self.maps else {}
        pairs = enumerate(zip(self.tokens, self.shown, strict=True))
        shown = {str(position): shown for position, (token, shown) in pairs if shown != token}
        texts = {"question": self.question, "tokens": self.tokens, "shown": shown}
        return tensors, texts | ({"departures": self.departures} if self.departures else {})

    @classmethod
    def tensors(cls) -> tuple[str, ...]:
        """The names of the tensors of an item that `restored` needs."""
        return (*super().tensors(), *_PER_HEAD, *_MAPS)

    @classmethod
    def restored(cls, tensors: dict[str, Tensor], texts: dict[str, Any]) -> Self:
        """The analysis of an item that `stored` made.

        Raises:
            LookupError, TypeError, ValueError: any other item.
        """
        _check_item({**_AXES, **_PER_HEAD, "layers": "L", "local": "LH", "global": "LH"}, tensors, texts)
        fields = _fields(tensors, texts) | {name: tensors[name] for name in _PER_HEAD}
        departures = Departures(*texts["departures"]) if "departures" in texts else None
        return cls(**fields, maps=Maps(**{name: tensors[name] for name in _MAPS}), departures=departures)


def _fields(tensors: dict[str, Tensor], texts: dict[str, Any]) -> dict[str, Any]:
    """The fields of the outline in an item."""
    tokens = list(map(str, texts["tokens"]))
    shown = list(tokens)
    for position, text in texts.get("shown", {}).items():
        shown[int(position)] = str(text)
    layers = tuple(tensors["layers"].tolist())
    return {
        "question": str(texts["question"]),
        "tokens": tokens,
        "shown": shown,
        "layers": layers,
        "classes": HeadClasses(tensors["local"], tensors["global"], layers),
        **{name: tensors[name] for name in _AXES},
    }


def _check_item(axes_of: dict[str, str], tensors: dict[str, Tensor], texts: dict[str, Any]) -> None:
    """Raises KeyError or ValueError for an item that is not an analysis; tables and pages don't check it again."""
    layers, heads = tensors["distance"].shape
    sizes = {"L": layers, "H": heads, "T": len(texts["tokens"]), "R": int(tensors["response"].count_nonzero())}
    for name, axes in axes_of.items():
        tensor, shape = tensors[name], tuple(sizes[axis] for axis in axes)
        if tensor.shape != shape:
            raise ValueError(f"{name} must be {shape}, got {tuple(tensor.shape)}")
        if tensor.is_floating_point() and name not in _WITH_NAN and not tensor.isfinite().all():
            raise ValueError(f"{name} has NaN or infinite entries")
        if (tensor.dtype == torch.bool) != (name in _BOOLS):
            raise ValueError(f"{name} has dtype {tensor.dtype}")
    for name in ("response", "local", "global"):
        if not tensors[name].any():
            raise ValueError(f"{name} must be True somewhere")


class Analyses(Sequence[Analysis]):
    """The analyses of a store, each read when it is asked for: a corpus need not fit into memory."""

    def __init__(self, store: Store, count: int):
        self._store = store
        self._count = count

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, place: int) -> Analysis: ...

    @overload
    def __getitem__(self, place: slice) -> list[Analysis]: ...

    def __getitem__(self, place: int | slice) -> Analysis | list[Analysis]:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        index = range(self._count)[place]
        return self._read(index, Analysis)

    def outlines(self) -> Iterator[Outline]:
        """The outlines in order, one at a time; little more than them is read."""
        return (self._read(index, Outline) for index in range(self._count))

    def head_summaries(self) -> Iterator[HeadSummary]:
        """The head summaries in order, one at a time; little more than them is read."""
        for index in range(self._count):
            tensors, _ = self._store.read(index, ("layers", "distance", "received_kurtosis", "delta"))
            layers, distance, kurtosis, delta = tensors.values()
            if not (delta.dim() == 1 and len(delta) and distance.isfinite().all()):
                raise corrupt(self._store.path(index), "not an analysis: no mean distances over a response")
            yield HeadSummary(tuple(layers.tolist()), distance, kurtosis, len(delta))

    def _read(self, index: int, kind: type[Part]) -> Part:
        item = self._store.read(index, kind.tensors())
        try:
            return kind.restored(*item)
        except (LookupError, TypeError, ValueError) as error:
            raise corrupt(self._store.path(index), f"not an analysis: {error}") from error
