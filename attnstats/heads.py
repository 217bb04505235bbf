"""Classes of heads: local and global by mean attention distance, receivers by kurtosis (Sec. 4.1 and 4.2).

Pure functions on the per-head statistics of one sequence, and `HeadProfile`, which adds them up over a corpus and is
saved as JSON with the identity of its model. Statistics are linear in A, so the mean of a statistic over a class of
heads (`class_mean`) is the statistic of the mean map of the class (Eq. 8).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attnstats import cells
from attnstats.errors import InputError
from attnstats.identity import ModelIdentity, differences, identity
from attnstats.statistics import FAI

if TYPE_CHECKING:
    from pandas import DataFrame, MultiIndex

SHAPED = 4  # values that a kurtosis needs
# Receiver heads are those of high kurtosis of this: the attention that a key receives from queries 4 or more later.
RECEIVED = FAI(4, None)
FORMAT, VERSION = "attnstats head profile", 2
MATRICES = ("distance_sum", "kurtosis_sum", "kurtosis_count")
NAMED = 5  # nearest and farthest heads that a repr names
LISTED = 10  # heads of a class that a repr names


@dataclass(frozen=True, eq=False, repr=False)
class HeadClasses:
    """The local and the global heads of some layers: two bool tensors (layers, heads) without a head in common.

    Attributes:
        layers: numbers of the layers in the model, one for each row of the tensors; by default 0, 1, ...

    Example:
        >>> import torch
        >>> classify(torch.tensor([[1.0, 5.0], [9.0, 5.0]]), share=0.25, layers=[11, 14])
        HeadClasses of 2 x 2 heads
          1 local, by layer.head: 11.0
          1 global, by layer.head: 14.0
    """

    local: Tensor
    global_: Tensor
    layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        numbers = tuple(self.layers) or tuple(range(len(self.local)))
        if not len(numbers) == len(self.local) == len(self.global_):
            raise ValueError(f"layers: one for each of the {len(self.local)} rows, got {self.layers}")
        object.__setattr__(self, "layers", numbers)

    def of(self, layers: Iterable[int]) -> HeadClasses:
        """The classes of these layers only."""
        layers = tuple(layers)
        rows = list(map(self._row, layers))
        return HeadClasses(self.local[rows], self.global_[rows], layers)

    def name(self, layer: int, head: int) -> str:
        """The class of a head: "local", "global" or "middle"."""
        row = self._row(layer)
        if self.local[row, head]:
            return "local"
        return "global" if self.global_[row, head] else "middle"

    def letters(self, layer: int) -> str:
        """The first letters of the classes of a layer's heads, such as "lmmg"."""
        return "".join(self.name(layer, head)[0] for head in range(self.local.shape[1]))

    def heads(self, name: str) -> list[tuple[int, int]]:
        """The (layer, head) of each head of a class, "local" or "global"."""
        if name not in ("local", "global"):
            raise ValueError(f'name must be "local" or "global", got {name!r}')
        chosen = self.local if name == "local" else self.global_
        return [(self.layers[row], head) for row, head in chosen.nonzero().tolist()]

    def to_frame(self) -> DataFrame:
        """One row per head, by layer and head: its class."""
        index = frame_index(self.layers, self.local.shape[1])
        return index.to_frame()[[]].assign(**{"class": [self.name(layer, head) for layer, head in index]})

    def _row(self, layer: int) -> int:
        if layer not in self.layers:
            raise ValueError(f"layer {layer}: not among {', '.join(map(str, self.layers))}")
        return self.layers.index(layer)

    def __repr__(self) -> str:
        lines = [f"HeadClasses of {self.local.shape[0]} x {self.local.shape[1]} heads"]
        for name in ("local", "global"):
            heads = self.heads(name)
            named = ", ".join(f"{layer}.{head}" for layer, head in heads[:LISTED])
            more = f" and {len(heads) - LISTED} more" if len(heads) > LISTED else ""
            lines.append(f"  {len(heads)} {name}, by layer.head: {named}{more}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return cells.text(repr(self)) + cells.table(self.to_frame)


def frame_index(layers: Iterable[int], heads: int) -> MultiIndex:
    """The index of a frame with a row per head."""
    import pandas

    return pandas.MultiIndex.from_product([layers, range(heads)], names=["layer", "head"])


def head_distance(mean_distance: Tensor, counted: Tensor) -> Tensor:
    """Mean attention distance of each head in tokens, over the counted rows (Eq. 7).

    Args:
        mean_distance: (..., T), the statistic MeanDistance per row.
        counted: (T,) bool, the rows of the response, at least one.
    """
    if not counted.any():
        raise ValueError("counted: no row counts, so that heads have no mean distance")
    return mean_distance[..., counted].double().mean(-1)


def classify(distance: Tensor, share: float = 0.30, layers: Iterable[int] = ()) -> HeadClasses:
    """The `max(1, floor(share * heads))` heads of least and of most mean distance, among all heads of all layers.

    The local heads are chosen first and the global ones among the rest, so that no head is both. Ties go to the first
    head in (layer, head) order.

    Args:
        distance: (layers, heads), mean attention distance, finite; two heads or more.
        share: in (0, 0.5].
        layers: numbers of the layers in the model, by which the classes name heads; by default 0, 1, ...

    Example:
        >>> import torch
        >>> classes = classify(torch.tensor([[1.0, 5.0], [9.0, 5.0]]), share=0.25)
        >>> classes.local.tolist(), classes.global_.tolist()
        ([[True, False], [False, False]], [[False, False], [True, False]])
    """
    if distance.dim() != 2 or distance.numel() < 2:
        raise ValueError(f"distance must be (layers, heads) with two heads or more, got {tuple(distance.shape)}")
    if not 0 < share <= 0.5:
        raise ValueError(f"share must be in (0, 0.5], got {share}; beyond it heads would be local and global at once")
    if not distance.isfinite().all():
        raise ValueError("distance has NaN or infinite entries; the model's attention overflowed")
    flat = distance.flatten()
    # 0.29 * 100 is 28.999999999999996: the share is read as the decimal that was written.
    count = max(1, math.floor(round(share * flat.numel(), 9)))
    none = torch.zeros_like(flat, dtype=torch.bool)
    local = none.index_fill(0, flat.argsort(stable=True)[:count], True)
    farthest = flat.masked_fill(local, -torch.inf).argsort(stable=True, descending=True)
    global_ = none.index_fill(0, farthest[:count], True)
    return HeadClasses(local.view_as(distance), global_.view_as(distance), tuple(layers))


def class_mean(statistic: Tensor, chosen: Tensor) -> Tensor:
    """(T,) mean of a statistic (layers, heads, T) over the heads chosen by a bool (layers, heads)."""
    return statistic[chosen].double().mean(0).to(statistic.dtype)


def kurtosis(values: Tensor, valid: Tensor | None = None) -> Tensor:
    """Excess kurtosis of the valid entries along the last axis (Fisher's, biased: 0 for a normal distribution).

    Args:
        values: (..., T), of any floating dtype; computed in float64.
        valid: (T,) bool; None: all.

    Returns:
        (...) float64; NaN where all valid entries are equal, as in `scipy.stats.kurtosis`, and where they are fewer
        than SHAPED: the kurtosis of any two values is -2, of any three -1.5.

    Example:
        >>> import torch
        >>> kurtosis(torch.tensor([1.0, 1.0, 1.0, 1.0, 9.0])).item()
        0.25
    """
    kept = (values if valid is None else values[..., valid]).double()
    if kept.shape[-1] < SHAPED:
        return kept.new_full(kept.shape[:-1], torch.nan)
    mean = kept.mean(-1, keepdim=True)
    centred = kept - mean
    variance = centred.square().mean(-1)
    # Values that differ by rounding only have no kurtosis.
    floor = (torch.finfo(torch.float64).eps * mean[..., 0]).square()
    return torch.where(variance > floor, centred.pow(4).mean(-1) / variance.square() - 3, torch.nan)


def segment_received(pooled: Tensor, sizes: Sequence[int] | Tensor, ignore: int = 4) -> Tensor:
    """Attention that each segment receives per pair of tokens, from the segments at least `ignore` after it.

    The score of segment (for example, sentence) j is the mean over segments `i >= j + ignore` of the mean of A over all
    pairs of a token in i with a token in j (Bogdan et al., arXiv 2506.19143, receiver heads).

    Args:
        pooled: (..., S, S), the statistic PooledMap with the same boundaries for queries and keys.
        sizes: the S numbers of tokens, each at least 1.
        ignore: number of nearest segments, itself among them, that don't count; at least 1.

    Returns:
        (..., S) float64; NaN for the last `ignore` segments, which have no segment far enough after them.

    Example:
        >>> import torch
        >>> pooled = torch.tensor([[9.0, 0.0, 0.0], [4.0, 9.0, 0.0], [2.0, 6.0, 9.0]])
        >>> segment_received(pooled, [2, 1, 1], ignore=1)
        tensor([1.5000, 6.0000,    nan], dtype=torch.float64)
    """
    sizes = torch.as_tensor(sizes, device=pooled.device, dtype=torch.int64)
    count = len(sizes)
    if pooled.dim() < 2 or tuple(pooled.shape[-2:]) != (count, count):
        raise ValueError(f"pooled must be (..., S, S) with S = {count}, the number of sizes; got {tuple(pooled.shape)}")
    if bool((sizes < 1).any()):
        raise ValueError(f"sizes must be at least 1, got {sizes.tolist()}")
    if ignore < 1:
        raise ValueError(f"ignore must be at least 1, got {ignore}; a segment's attention to itself is no pair's mean")
    per_pair = pooled.double() / (sizes[:, None] * sizes)
    later = torch.ones(count, count, dtype=torch.bool, device=pooled.device).tril(-ignore)
    # 0 / 0 is NaN where no segment is far enough after.
    return (per_pair * later).sum(-2) / later.sum(-2)


def find(
    model: Any,
    texts: Iterable[Any],
    kinds: Iterable[str] | None = None,
    *,
    tokenizer: Any = None,
    layers: Any = "all",
) -> Any:
    """Scores of a model's heads over texts: how much each is local, global, a sink, a receiver and so on.

    Texts are read one at a time, in one forward pass each, without the T x T map. What is kept is a sum per head: a
    corpus can be a generator of any length.

    - local, global: `mean_distance`, attention distance in tokens, lowest and highest (Li et al., arXiv 2510.13554,
      Eq. 7).
    - sink: `sink_mass`, attention to the first four tokens, of queries after them (StreamingLLM: Xiao et al., arXiv
      2309.17453).
    - receiver: `received_kurtosis`, excess kurtosis of the attention per pair of tokens that sentences receive from
      those at least four later, a mean over texts (thought anchors: Bogdan et al., arXiv 2506.19143).
    - previous-token: `previous_token_mass`, attention to the token before (Olsson et al., arXiv 2209.11895).
    - retrieval: `copy_rate`, how often the key of most attention is the token that comes next, among queries whose next
      token is in the text up to them (Wu et al., arXiv 2404.15574, who count the tokens of a needle alone).
    - induction: `induction_rate`, how often the key of most attention comes right after an earlier occurrence of the
      query's token, among queries whose token occurred before (Olsson et al.).
    - high-entropy, low-entropy: `entropy` of a row in nats (Zhai et al., arXiv 2303.06296).

    Unless it says otherwise a score is a mean over the queries of all responses: in a text all tokens but the first, in
    a chat its last answer. A head's score depends on the texts: entropy and distance grow with their length. A score
    says where a head looks, not what the model does with it.

    Args:
        model: a causal language model of transformers, wrapped or not, in eval mode; a folder or a hub name, which is
            loaded as by `attnstats analyze`; an `attnstats.study.models.LoadedModel`.
        texts: strings, token ids (a list or a tensor for each text), or chats that end in an answer: lists of messages,
            or objects with `messages`. They can be mixed.
        kinds: from the list above; None: all that these texts have and that the tokenizer allows.
        tokenizer: of a model object, for strings and chats, and for `receiver`, which needs sentences.
        layers: as for `attnstats.capture`.

    Returns:
        attnstats.finding.HeadScores: `scores["sink"]` (layers, heads), `top(kind, count)`, `to_frame()`, `plot()`,
        `save(file)`.

    Raises:
        attnstats.errors.InputError: an unknown kind, no texts, a text that can't be read, or a kind for which no text
            is long enough.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(hidden_size=32, intermediate_size=32, num_attention_heads=4, num_hidden_layers=2)
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes)).eval()
        >>> scores = find(model, torch.arange(40).view(2, 20), ["local", "sink"])
        >>> scores["sink"].shape, len(scores.top("local", 3))
        (torch.Size([2, 4]), 3)
    """
    # By name: that module runs models, and what this one has for profiles and classes needs none.
    return import_module("attnstats.finding").find(model, texts, kinds, tokenizer=tokenizer, layers=layers)


@dataclass(frozen=True, eq=False, repr=False)
class HeadProfile:
    """Mean distance of heads, and kurtosis of what they receive, over many sequences.

    Sums and counts in float64, so that the profiles of parts of a corpus add up to that of the whole.

    Attributes:
        layers: numbers of the L layers, ascending.
        distance_sum: (L, H), sum of the mean distances of all counted rows.
        rows: number of counted rows.
        kurtosis_sum, kurtosis_count: (L, H), over the sequences in which the kurtosis of a head is defined.
        sequences: number of sequences.
        model: the model of the heads; None: unknown, and the profile can't be saved.

    Example:
        >>> import torch
        >>> profile = HeadProfile.empty((0,), heads=4)
        >>> rows = torch.tensor([[[5.0, 1.0, 3.0], [5.0, 8.0, 8.0], [5.0, 4.0, 6.0], [5.0, 20.0, 22.0]]])
        >>> profile = profile.add(rows, torch.tensor([False, True, True]))
        >>> profile.distance
        tensor([[ 2.,  8.,  5., 21.]], dtype=torch.float64)
        >>> profile.classes(share=0.25).name(0, 3)
        'global'
    """

    layers: tuple[int, ...]
    distance_sum: Tensor
    rows: int
    kurtosis_sum: Tensor
    kurtosis_count: Tensor
    sequences: int
    model: ModelIdentity | None = None

    @classmethod
    def empty(cls, layers: Iterable[int], heads: int, model: ModelIdentity | None = None) -> HeadProfile:
        """A profile of no sequences."""
        layers = tuple(layers)
        zeros = torch.zeros(len(layers), heads, dtype=torch.float64, device="cpu")
        return cls(layers, zeros, 0, zeros, zeros.long(), 0, model)

    def add(
        self,
        mean_distance: Tensor,
        counted: Tensor | None = None,
        received: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> HeadProfile:
        """The profile with one more sequence.

        Args:
            mean_distance: (L, H, T), the statistic MeanDistance per row.
            counted: (T,) bool, the rows of the response, at least one; None: all.
            received: (L, H, K), the attention that each key receives from later queries: FAI(ignore, None) per token,
                or `segment_received` per sentence. None: the sequence adds no kurtosis.
            valid: (K,) bool, the keys of the response with a query far enough after them; None: all.
        """
        self._check(mean_distance, "mean_distance")
        rows = mean_distance if counted is None else mean_distance[..., counted]
        if rows.shape[-1] == 0:
            raise ValueError("counted: no row counts, so that heads have no mean distance")
        if not rows.isfinite().all():
            raise ValueError("mean_distance has NaN or infinite entries; the model's attention overflowed")
        of_received = torch.full_like(self.kurtosis_sum, torch.nan)
        if received is not None:
            self._check(received, "received")
            of_received = kurtosis(received, valid).cpu()
        return self._plus(rows.double().sum(-1).cpu(), rows.shape[-1], of_received)

    def add_means(self, distance: Tensor, rows: int, received_kurtosis: Tensor) -> HeadProfile:
        """The profile with one more sequence, of which only means are kept.

        Args:
            distance: (L, H), mean distance of each head over the counted rows.
            rows: their number.
            received_kurtosis: (L, H), kurtosis of what each head receives; NaN where undefined.
        """
        return self._plus(distance.double() * rows, rows, received_kurtosis)

    def _plus(self, distance_sum: Tensor, rows: int, received_kurtosis: Tensor) -> HeadProfile:
        return replace(
            self,
            distance_sum=self.distance_sum + distance_sum,
            rows=self.rows + rows,
            kurtosis_sum=self.kurtosis_sum + received_kurtosis.nan_to_num(0.0),
            kurtosis_count=self.kurtosis_count + received_kurtosis.isfinite(),
            sequences=self.sequences + 1,
        )

    def __add__(self, other: HeadProfile) -> HeadProfile:
        """The profile of both corpora. Raises ValueError for profiles of other heads or models."""
        if self.layers != other.layers or self.distance_sum.shape != other.distance_sum.shape:
            raise ValueError(f"profiles of other heads don't add up: layers {self.layers} and {other.layers}")
        if self.model != other.model:
            raise ValueError(f"profiles of different models don't add up: {self.model} and {other.model}")
        totals = {name: getattr(self, name) + getattr(other, name) for name in (*MATRICES, "rows", "sequences")}
        return replace(self, **totals)

    @property
    def distance(self) -> Tensor:
        """(L, H) float64, mean attention distance of each head over all counted rows, in tokens (Eq. 7)."""
        if not self.rows:
            raise ValueError("the profile is empty: add a sequence first")
        return self.distance_sum / self.rows

    @property
    def kurtosis(self) -> Tensor:
        """(L, H) float64, mean kurtosis over sequences; NaN for a head that has one in no sequence."""
        return self.kurtosis_sum / self.kurtosis_count

    def to_frame(self) -> DataFrame:
        """One row per head: mean_distance in tokens, and received_kurtosis."""
        import pandas

        columns = {"mean_distance": self.distance.flatten(), "received_kurtosis": self.kurtosis.flatten()}
        index = frame_index(self.layers, self.distance.shape[1])
        return pandas.DataFrame({name: values.numpy() for name, values in columns.items()}, index)

    def __repr__(self) -> str:
        layers, heads = self.distance_sum.shape
        lines = [f"HeadProfile of {layers} x {heads} heads, over {self.rows} rows of {self.sequences} sequences"]
        if self.rows:
            order = self.distance.flatten().argsort(stable=True).tolist()
            ends = (("nearest", order[:NAMED]), ("farthest", order[: -NAMED - 1 : -1]))
            for name, places in ends:
                named = (f"{self.layers[i // heads]}.{i % heads} ({self.distance.flatten()[i]:.1f})" for i in places)
                lines.append(f"  {name}, by layer.head (tokens): {', '.join(named)}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return cells.text(repr(self)) + (cells.table(self.to_frame) if self.rows else "")

    def classes(self, share: float = 0.30, layers: Iterable[int] | None = None) -> HeadClasses:
        """Local and global heads among those of some layers (None: all), as masks over all heads of the profile."""
        chosen = self._rows(layers)
        classes = classify(self.distance[chosen], share)
        none = torch.zeros_like(self.distance, dtype=torch.bool)
        local, global_ = (none.index_copy(0, chosen, of_chosen) for of_chosen in (classes.local, classes.global_))
        return HeadClasses(local, global_, self.layers)

    def receivers(self, count: int = 20, layers: Iterable[int] | None = None) -> Tensor:
        """(L, H) bool: the `count` heads of highest kurtosis among those of some layers, ties in (layer, head) order.

        Fewer where fewer heads have a kurtosis: a head for which no sequence has SHAPED keys to count is not ranked.
        """
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        among = torch.full_like(self.distance_sum, -torch.inf)
        chosen = self._rows(layers)
        among[chosen] = self.kurtosis[chosen].nan_to_num(nan=-torch.inf)
        flat = among.flatten()
        best = flat.argsort(stable=True, descending=True)[:count]
        return torch.zeros_like(flat, dtype=torch.bool).index_fill(0, best, True).view_as(among) & among.isfinite()

    def save(self, file: Path) -> None:
        """Write the profile as JSON; `load` gives back the same numbers. Raises ValueError without a model."""
        if self.model is None:
            raise ValueError("the profile names no model; make it with HeadProfile.empty(..., model=identity(model))")
        content = {
            "format": FORMAT,
            "version": VERSION,
            "model": asdict(self.model),
            "layers": list(self.layers),
            "sequences": self.sequences,
            "rows": self.rows,
            **{name: getattr(self, name).tolist() for name in MATRICES},
        }
        file.write_text(json.dumps(content, allow_nan=False) + "\n", encoding="ascii")

    @classmethod
    def load(cls, file: Path, model: Any = None) -> HeadProfile:
        """Read a saved profile.

        Args:
            model: the transformers model that the profile must be of, or its identity; None: any.

        Raises:
            InputError: no such file, not a profile, of another version, or of another model.
        """
        content = read_record(file, FORMAT, VERSION)
        try:
            profile = _parsed(content)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{file}: a head profile with a broken entry ({error}); make it anew") from error
        check_model(file, "profile", profile.model, model)
        return profile

    def _rows(self, layers: Iterable[int] | None) -> Tensor:
        """Indices of some layers (None: all) along the first axis."""
        if layers is None:
            return torch.arange(len(self.layers), dtype=torch.int64, device="cpu")
        layers = sorted(set(layers))
        if missing := [layer for layer in layers if layer not in self.layers]:
            raise ValueError(f"layers: the profile has no layers {missing}, only {list(self.layers)}")
        return torch.tensor([self.layers.index(layer) for layer in layers], dtype=torch.long, device="cpu")

    def _check(self, values: Tensor, name: str) -> None:
        if values.dim() != 3 or values.shape[:2] != self.distance_sum.shape:
            expected = tuple(self.distance_sum.shape)
            raise ValueError(f"{name} must be (layers, heads, positions), {expected} first; got {tuple(values.shape)}")


def read_record(file: Path, kind: str, version: int) -> dict[str, Any]:
    """The JSON object of a file whose `format` is `kind`. Raises InputError: not readable, or another one."""
    name = kind.removeprefix("attnstats ")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{file}: {error.strerror or error}; name a file of a {name}") from error
    except ValueError as error:
        raise InputError(f"{file}: not JSON ({error}); name a file of a {name}") from error
    if not isinstance(content, dict) or content.get("format") != kind:
        raise InputError(f'{file}: not a {name} ("format" is not "{kind}")')
    if (found := content.get("version")) != version:
        raise InputError(f"{file}: a {name} of version {found}, and this program reads {version}; make it anew")
    return content


def check_model(file: Path, name: str, recorded: ModelIdentity | None, model: Any) -> None:
    """Raises InputError if what a file holds is not of a model, given as it is or by its identity; None: any."""
    if model is None:
        return
    ours = model if isinstance(model, ModelIdentity) else identity(model)
    if different := differences(recorded, ours):
        raise InputError(f"{file}: the {name} is of another model: {different}; make one of this model")


def _parsed(content: dict[str, Any]) -> HeadProfile:
    """The profile in the content of a file. Raises KeyError, TypeError or ValueError."""
    layers = tuple(int(layer) for layer in content["layers"])
    model = ModelIdentity(**content["model"])
    matrices = {name: torch.tensor(content[name], dtype=torch.float64, device="cpu") for name in MATRICES}
    for name, matrix in matrices.items():
        if matrix.shape != (len(layers), model.heads) or not matrix.isfinite().all():
            raise ValueError(f"{name} must be {(len(layers), model.heads)} finite numbers")
    matrices["kurtosis_count"] = matrices["kurtosis_count"].long()
    rows, sequences = int(content["rows"]), int(content["sequences"])
    if rows < 0 or sequences < 0:
        raise ValueError("rows and sequences must not be negative")
    return HeadProfile(layers=layers, rows=rows, sequences=sequences, model=model, **matrices)
