"""Finding heads by what they do, in any causal language model: `attnstats.heads.find`, and the scores that it returns.

What is measured of a text is in study/measures.py; here texts are read one by one, and sums per head are kept, ranked,
drawn and saved.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from attnstats import cells
from attnstats.errors import InputError
from attnstats.heads import check_model, frame_index, read_record
from attnstats.identity import ModelIdentity, identity
from attnstats.study import given, models
from attnstats.study.measures import KINDS, MEASURES, one_pass
from attnstats.study.models import LoadedModel
from attnstats.transformers.selection import Layers
from attnstats.transformers.sites import transformers_model

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

FORMAT, VERSION = "attnstats table of head scores", 1
NAMED = 5  # heads of each kind that a repr names


class HeadScore(NamedTuple):
    """A head with its score, in the unit of the kind's measure."""

    layer: int
    head: int
    score: float


@dataclass(frozen=True, eq=False, repr=False)
class HeadScores:
    """The scores of L x H heads over a corpus; `attnstats.heads.find` makes it.

    `scores["sink"]` is (L, H) float64, NaN for a head without a value. Which end is the kind's says `top`.

    Attributes:
        kinds: those that have scores.
        layers: numbers of the L layers, ascending.
        sums, counts: by measure, (L, H) each; a score is their quotient.
        texts, tokens: how many were read.
        model: the model of the heads; None: its weights could not be read, and the scores can't be saved.
    """

    kinds: tuple[str, ...]
    layers: tuple[int, ...]
    sums: dict[str, Tensor]
    counts: dict[str, Tensor]
    texts: int
    tokens: int
    model: ModelIdentity | None

    def __getitem__(self, kind: str) -> Tensor:
        return self._of(KINDS[self._known(kind)].measure)

    def top(self, kind: str, count: int = 10) -> list[HeadScore]:
        """The heads that are most of a kind, the first one most: of highest score, of lowest for local and low-entropy.

        Ties are in (layer, head) order. Heads without a score are left out.
        """
        values = self[kind].flatten()
        if count < 1:
            raise InputError(f"count must be at least 1, got {count}")
        order = values.argsort(stable=True, descending=KINDS[kind].highest)
        heads = self.sums[KINDS[kind].measure].shape[1]
        places = [place for place in order.tolist() if values[place] == values[place]]
        return [HeadScore(self.layers[i // heads], i % heads, float(values[i])) for i in places[:count]]

    def chosen(self, kind: str, count: int = 10) -> dict[int, list[int]]:
        """`top` as `capture` takes it, `layers=list(chosen), heads=chosen`: the heads of each layer that has some."""
        found: dict[int, list[int]] = {}
        for layer, head, _ in sorted(self.top(kind, count)):
            found.setdefault(layer, []).append(head)
        return found

    def to_frame(self) -> DataFrame:
        """One row per head, by layer and head; a column per measure, such as mean_distance of local and global."""
        import pandas

        measures = dict.fromkeys(KINDS[kind].measure for kind in self.kinds)
        index = frame_index(self.layers, next(iter(self.sums.values())).shape[1])
        return pandas.DataFrame({name: self._of(name).flatten().numpy() for name in measures}, index)

    def plot(self, kind: str | None = None) -> Figure:
        """A picture of layers by heads of each kind (None: of all), the heads that are most of it darkest."""
        from attnstats.report import figures

        kinds = self.kinds if kind is None else (self._known(kind),)
        panels = [
            figures.HeadPanel(
                each.title, MEASURES[each.measure].unit, self._of(each.measure), each.highest, each.is_log
            )
            for each in map(KINDS.__getitem__, kinds)
        ]
        return figures.head_scores(panels, self.layers)

    def to_json(self) -> str:
        """The scores as `save` writes them. Raises InputError where `model` is None."""
        if self.model is None:
            raise InputError("the scores name no model, whose weights could not be read; load the model whole")
        content = {
            "format": FORMAT,
            "version": VERSION,
            "model": asdict(self.model),
            "kinds": list(self.kinds),
            "layers": list(self.layers),
            "texts": self.texts,
            "tokens": self.tokens,
            "sums": {name: values.tolist() for name, values in self.sums.items()},
            "counts": {name: values.tolist() for name, values in self.counts.items()},
        }
        return json.dumps(content, allow_nan=False) + "\n"

    def save(self, file: str | PathLike[str]) -> None:
        """Write the scores as JSON; `load` gives back the same numbers. Raises InputError where `model` is None."""
        Path(file).write_text(self.to_json(), encoding="ascii")

    @classmethod
    def load(cls, file: str | PathLike[str], model: Any = None) -> HeadScores:
        """Read saved scores.

        Args:
            model: the transformers model that they must be of, or its identity; None: any.

        Raises:
            InputError: no such file, no scores, of another version, or of another model.
        """
        path = Path(file)
        content = read_record(path, FORMAT, VERSION)
        try:
            scores = _parsed(content)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path}: head scores with a broken entry ({error}); make them anew") from error
        check_model(path, "table", scores.model, model)
        return scores

    def lines(self, count: int) -> list[str]:
        """What was read, and for each kind the `count` heads that are most of it."""
        layers, heads = next(iter(self.sums.values())).shape
        texts = "1 text" if self.texts == 1 else f"{self.texts} texts"
        lines = [f"HeadScores of {layers} x {heads} heads, over {self.tokens} tokens of {texts}"]
        for kind in self.kinds:
            top = ", ".join(f"{each.layer}.{each.head} ({each.score:.3g})" for each in self.top(kind, count))
            lines.append(f"  {kind}, by layer.head ({KINDS[kind].measure}): {top}")
        return lines

    def __repr__(self) -> str:
        return "\n".join(self.lines(NAMED))

    def _repr_html_(self) -> str:
        return cells.text(repr(self)) + cells.table(self.to_frame)

    def _of(self, measure: str) -> Tensor:
        return self.sums[measure] / self.counts[measure]  # 0 / 0 is NaN

    def _known(self, kind: str) -> str:
        if kind not in self.kinds:
            raise InputError(f"kind {kind!r}: no scores of it; there are {', '.join(self.kinds)}")
        return kind


def find(
    model: Any,
    texts: Iterable[Any],
    kinds: Iterable[str] | None = None,
    *,
    tokenizer: Any = None,
    layers: Layers = "all",
) -> HeadScores:
    """`attnstats.heads.find`."""
    if isinstance(texts, (str, dict)):
        raise InputError("texts: must be a list of texts, got one; write [text]")
    named = _checked(kinds)
    loaded = _loaded(model, tokenizer)
    chosen = _measurable(named, loaded.tokenizer)
    names = tuple(dict.fromkeys(KINDS[kind].measure for kind in chosen))
    sums: dict[str, Tensor] = {}
    counts: dict[str, Tensor] = {}
    count = tokens = 0
    of_layers: tuple[int, ...] = ()
    for count, text in enumerate(texts, 1):
        where = f"texts[{count - 1}]"
        each = given.of_any(loaded.tokenizer, text, where)
        given.check([each], loaded, where)
        read = one_pass(loaded, each, names, layers, where)
        of_layers, tokens = read.layers, tokens + len(read.ids)
        for name in names:
            total, number = MEASURES[name].of(read)
            sums[name], counts[name] = sums.get(name, 0) + total, counts.get(name, 0) + number
    if not count:
        raise InputError("texts: is empty; give strings, lists of token ids, or chats")
    for kind in chosen:
        if kinds is not None and not counts[KINDS[kind].measure].any():
            needs = MEASURES[KINDS[kind].measure].needs
            raise InputError(f"kinds: {kind!r} needs a text {needs}, and none of the {count} is one; leave it out")
    chosen = tuple(kind for kind in chosen if counts[KINDS[kind].measure].any())
    of_chosen = {KINDS[kind].measure for kind in chosen}
    sums, counts = ({name: of[name] for name in names if name in of_chosen} for of in (sums, counts))
    return HeadScores(chosen, of_layers, sums, counts, count, tokens, _identity(loaded.model))


def _checked(kinds: Iterable[str] | None) -> tuple[str, ...] | None:
    """The kinds that are asked for, each once. Raises InputError for what is none."""
    if kinds is None:
        return None
    if isinstance(kinds, str):
        raise InputError(f"kinds: must be a list, got {kinds!r}; write [{kinds!r}]")
    named = tuple(dict.fromkeys(kinds))
    if unknown := [kind for kind in named if kind not in KINDS]:
        raise InputError(f"kinds: unknown {unknown[0]!r}; there are {', '.join(KINDS)}")
    if not named:
        raise InputError(f"kinds: is empty; there are {', '.join(KINDS)}")
    return named


def _measurable(kinds: tuple[str, ...] | None, tokenizer: Any) -> tuple[str, ...]:
    """The kinds asked for; None: those that can be measured with this tokenizer, or without one."""
    without = [kind for kind in KINDS if tokenizer is None and MEASURES[KINDS[kind].measure].by_sentence]
    if kinds is None:
        return tuple(kind for kind in KINDS if kind not in without)
    if needing := [kind for kind in kinds if kind in without]:
        raise InputError(f"kinds: {needing[0]!r} needs the text of tokens, to see where sentences are; pass tokenizer=")
    return kinds


def _loaded(model: Any, tokenizer: Any) -> LoadedModel:
    if isinstance(model, (str, PathLike)) or model is None:
        loaded = models.load(None if model is None else str(model))
    elif isinstance(model, LoadedModel):
        loaded = model
    else:
        model = transformers_model(model)
        loaded = LoadedModel(model.config.name_or_path or type(model).__name__, model, tokenizer)
    return loaded if tokenizer is None else replace(loaded, tokenizer=tokenizer)


def _identity(model: Any) -> ModelIdentity | None:
    try:
        return identity(model)
    except ValueError:  # offloaded weights can't be read
        return None


def _parsed(content: dict[str, Any]) -> HeadScores:
    """The scores in the content of a file. Raises KeyError, TypeError or ValueError."""
    kinds, layers = tuple(content["kinds"]), tuple(int(layer) for layer in content["layers"])
    model = ModelIdentity(**content["model"])
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise ValueError(f"unknown kind {unknown[0]!r}")
    sums: dict[str, Tensor] = {}
    counts: dict[str, Tensor] = {}
    for name in dict.fromkeys(KINDS[kind].measure for kind in kinds):
        for of, key in ((sums, "sums"), (counts, "counts")):
            of[name] = torch.tensor(content[key][name], dtype=torch.float64, device="cpu")
            if of[name].shape != (len(layers), model.heads) or not of[name].isfinite().all():
                raise ValueError(f"{key} of {name} must be {(len(layers), model.heads)} finite numbers")
        counts[name] = counts[name].long()
    return HeadScores(kinds, layers, sums, counts, int(content["texts"]), int(content["tokens"]), model)
