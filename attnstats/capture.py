"""Recording the attention statistics of a running transformers model, chosen layers and heads only.

`capture` is for users and for `attnstats analyze`. What is kept per layer is O(T); with `reduce_heads` it is
O(T) for all layers together. How the model is made to call us is in hooks.py, what is computed in attention.py;
which heads are local or global is for the caller to say.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from attnstats.attention import Backend, attention
from attnstats.hooks import attached, base_model
from attnstats.statistics import ByStatistic, Statistic, Statistics, resolve

Layers = Literal["middle-third", "all"] | slice | Iterable[int]
Heads = Iterable[int] | Mapping[int, Iterable[int]]
Choice = dict[Statistic, dict[int, tuple[int, ...]]]


class Capture:
    """The statistics of the model's most recent forward pass; `capture` makes it.

    `run["waad"]` or `run[WAAD(10)]` is (L, B, H, ...), one slice per captured layer and chosen head, in the order
    of `run.layers` and of `run.heads`; with `reduce_heads="mean"` it is (B, ...). It stays readable after the
    `with`. Reading it before a forward pass, or after one that raised, is a RuntimeError.

    Attributes:
        statistics: those recorded.
        layers: indices of the captured layers, ascending.
        heads: per statistic and layer, the heads chosen.
    """

    def __init__(
        self, statistics: tuple[Statistic, ...], layers: tuple[int, ...], heads: Choice, reduced: bool, backend: Backend
    ):
        self.statistics = statistics
        self.layers = layers
        self.heads = heads
        self._reduced = reduced
        self._backend = backend
        self._query_mask: Tensor | None = None
        self._results: ByStatistic | None = None
        self._valid: ByStatistic | None = None
        self._running = False
        self._recorded: dict[int, dict[Statistic, Tensor]] = {}
        self._calls: set[int] = set()
        self._totals: dict[Statistic, Tensor] = {}

    def __getitem__(self, key: Statistic | str) -> Tensor:
        return self._finished(self._results)[key]

    def __contains__(self, key: object) -> bool:
        return key in self.statistics or any(statistic.name == key for statistic in self.statistics)

    @property
    def valid(self) -> ByStatistic:
        """Per statistic a bool tensor, (B, Tq), (B, Tk) or (B, I, J): False where a value is a placeholder."""
        return self._finished(self._valid)

    @property
    def query_mask(self) -> Tensor | None:
        """(B, Tq) bool, which queries of the coming forward passes count in column statistics; None: all."""
        return self._query_mask

    @query_mask.setter
    def query_mask(self, mask: Tensor | None) -> None:
        if mask is not None and (not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.dim() != 2):
            got = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"query_mask must be a bool tensor (B, T) in the shape of input_ids, or None; got {got}")
        self._query_mask = mask

    def begin(self) -> None:
        """The model calls this as a forward pass starts: what the last one left is dropped."""
        self._results = self._valid = None
        self._recorded, self._totals, self._calls = {}, {}, set()
        self._running = True

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, **geometry: Any) -> Tensor:
        """The model calls this for every layer, captured or not."""
        wanted = tuple(s for s in self.statistics if self.heads[s].get(layer))
        # Gradient checkpointing repeats layers in the backward pass, when another pass may be the most recent.
        if not wanted or not self._running:
            return attention(query, key, value, backend=self._backend, **geometry).output
        if layer in self._calls:
            raise ValueError(f"model: layer {layer} attends twice in one forward pass, which cannot be captured yet")
        self._calls.add(layer)
        mask = self._query_mask
        every = tuple(range(query.shape[1]))
        heads = {s: self.heads[s][layer] for s in wanted if self.heads[s][layer] != every}
        output, statistics = attention(
            query,
            key,
            value,
            statistics=wanted,
            query_mask=None if mask is None else mask.to(query.device),
            heads=heads or None,
            backend=self._backend,
            **geometry,
        )
        self._record(layer, statistics)
        return output

    def end(self) -> None:
        """The model calls this when a forward pass is complete: results become readable."""
        self._running = False
        expected = {layer for chosen in self.heads.values() for layer, heads in chosen.items() if heads}
        if missing := sorted(expected - self._calls):
            raise RuntimeError(
                f"attnstats.capture: layers {missing} did not call attnstats in this forward pass; the model skipped "
                "them, or their attention was replaced inside the `with`"
            )
        if self._reduced:
            count = {s: sum(map(len, self.heads[s].values())) for s in self.statistics}
            self._results = ByStatistic({s: self._totals[s] / count[s] for s in self.statistics})
        else:
            self._results = ByStatistic({s: self._stacked(s) for s in self.statistics})
        self._recorded, self._totals = {}, {}

    def _record(self, layer: int, statistics: Statistics) -> None:
        self._recorded[layer] = {}
        for statistic in statistics:
            chosen = statistics[statistic]
            if not self._reduced:
                self._recorded[layer][statistic] = chosen
            elif statistic in self._totals:
                self._totals[statistic] += chosen.sum(1).to(self._totals[statistic].device)
            else:
                self._totals[statistic] = chosen.sum(1)
        # Layers see the same masks, so what is valid in one is valid in all.
        self._valid = ByStatistic(dict(self._valid or {}) | dict(statistics.valid))

    def _stacked(self, statistic: Statistic) -> Tensor:
        slices = [self._recorded[layer][statistic] for layer in self.layers]
        return torch.stack([x.to(slices[0].device) for x in slices])

    def _finished(self, tensors: ByStatistic | None) -> ByStatistic:
        if self._results is None or tensors is None:
            if self._calls or self._running:
                done = [layer for layer in self.layers if layer in self._calls]
                raise RuntimeError(
                    f"the last forward pass is incomplete, it recorded layers {done} of {list(self.layers)}: "
                    "it raised, or it is still running; run the model again inside the `with`"
                )
            raise RuntimeError("nothing was recorded: call model(**inputs) inside `with attnstats.capture(model, ...)`")
        return tensors


@contextmanager
def capture(
    model: Any,
    *,
    statistics: Iterable[Statistic | str],
    layers: Layers = "middle-third",
    heads: Heads | Mapping[Statistic | str, Heads] | None = None,
    reduce_heads: Literal["mean"] | None = None,
    query_mask: Tensor | None = None,
    backend: Backend = "auto",
) -> Iterator[Capture]:
    """Record statistics of a transformers model while it runs, without changing what it computes.

    Inside the `with` the model attends through `attnstats.attention`: its logits are those of its SDPA path, and
    `model.generate` works. The run holds the most recent forward pass (of `generate`: the last token's step).
    Causal and full attention with left or right padding, dynamic and static caches are covered; a model or an
    input that asks for more (sliding windows, softcap, sinks, packed rows, a 4-D mask) is an error, never
    a wrong result. Afterwards, also after an exception, the model's own attention is back; with gradient
    checkpointing `backward` belongs inside the `with`.

    Args:
        model: a loaded model of the Llama family (a `PreTrainedModel`).
        statistics: as for `attnstats.attention`.
        layers: "middle-third" (five evenly spaced, as in the paper), "all", a slice or indices; negative ones
            count from the end.
        heads: which query heads: None, all; a list, these in every captured layer; `{layer: list}`, these in each
            captured layer. Per statistic: `{"waad": <one of those>, "fai": <one of those>}`, where a
            statistic that isn't named has all. Without `reduce_heads` every layer must choose equally many.
        reduce_heads: "mean" keeps one mean over all chosen (layer, head) instead, summed while the model runs.
        query_mask: (B, Tq) bool in the shape of the forward's input_ids: which queries count in column statistics
            (the response). Can be set later and changed between forward passes: `run.query_mask = mask`.
        backend: as for `attnstats.attention`.

    Yields:
        A `Capture`: `run["waad"]` (L, B, H, Tq), or (B, Tq) with `reduce_heads`; `run.valid["waad"]` (B, Tq).
        Column statistics have Tk for Tq: keys of the cache included, its unused slots not.

    Raises:
        TypeError, ValueError: naming the argument, what came and what would work; from the forward pass for what
            shows only there.

    Example:
        >>> import attnstats, torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(hidden_size=32, intermediate_size=32, num_attention_heads=4, num_hidden_layers=6)
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes)).eval()
        >>> with attnstats.capture(model, statistics=["waad", "fai"]) as run:
        ...     logits = model(torch.arange(12)[None]).logits
        >>> run.layers, run["waad"].shape
        ((2, 3, 4), torch.Size([3, 1, 4, 12]))

    Source: Li et al., arXiv 2510.13554v2, Sec. 4.1: heads by class, means over them (Eq. 8).
    """
    base_model(model)
    if reduce_heads not in (None, "mean"):
        raise ValueError(f"reduce_heads must be 'mean' or None, got {reduce_heads!r}")
    wanted = resolve(statistics)
    if not wanted:
        raise ValueError("statistics is empty; name what to record, such as ['waad', 'fai']")
    config = model.config.get_text_config()
    chosen_layers = _resolve_layers(layers, config.num_hidden_layers)
    chosen_heads = _resolve_heads(heads, wanted, chosen_layers, config.num_attention_heads)
    _check_heads(chosen_heads, chosen_layers, reduce_heads is not None)
    run = Capture(wanted, chosen_layers, chosen_heads, reduce_heads is not None, backend)
    run.query_mask = query_mask
    with attached(model, run):
        yield run


def middle_third(count: int) -> tuple[int, ...]:
    """Five layers evenly spaced over the middle third of `count`, fewer where they fall together (Sec. 4.1)."""
    spaced = torch.linspace(count // 3, 2 * count // 3, 5, dtype=torch.float64).round()
    return tuple(sorted({min(int(layer), count - 1) for layer in spaced}))


def _resolve_layers(layers: Layers, count: int) -> tuple[int, ...]:
    """The layers asked for, ascending. Raises TypeError or ValueError."""
    forms = "'middle-third', 'all', a slice or a list of layer indices"
    if isinstance(layers, str):
        if layers not in ("middle-third", "all"):
            raise ValueError(f"layers must be {forms}, got {layers!r}")
        return middle_third(count) if layers == "middle-third" else tuple(range(count))
    if isinstance(layers, slice):
        indices = list(range(count))[layers]
    else:
        indices = [i + count if i < 0 else i for i in _integers(layers, "layers", forms)]
    outside = [i for i in indices if not 0 <= i < count]
    if outside:
        raise ValueError(f"layers: the model has {count} layers, {-count}..{count - 1}, got {layers!r}")
    if not indices:
        raise ValueError(f"layers={layers!r} chooses none of the model's {count} layers")
    if len(set(indices)) < len(indices):
        raise ValueError(f"layers: a layer is given twice in {layers!r}")
    return tuple(sorted(indices))


def _resolve_heads(heads: Any, statistics: tuple[Statistic, ...], layers: tuple[int, ...], count: int) -> Choice:
    """Every spelling of `heads` as {statistic: {layer: heads}}. Raises TypeError or ValueError."""
    if not isinstance(heads, Mapping) or not any(isinstance(key, (str, Statistic)) for key in heads):
        return {s: _resolve_per_layer(heads, layers, count) for s in statistics}
    choice = {s: _resolve_per_layer(None, layers, count) for s in statistics}
    for key, value in heads.items():
        matches = [s for s in statistics if key in (s, s.name)]
        if len(matches) != 1:
            found = "names more than one" if matches else "isn't one"
            raise ValueError(f"heads: the key {key!r} {found} of the statistics {', '.join(map(str, statistics))}")
        choice[matches[0]] = _resolve_per_layer(value, layers, count)
    return choice


def _resolve_per_layer(heads: Any, layers: tuple[int, ...], count: int) -> dict[int, tuple[int, ...]]:
    if heads is None:
        return dict.fromkeys(layers, tuple(range(count)))
    if not isinstance(heads, Mapping):
        heads = dict.fromkeys(layers, _integers(heads, "heads", "None, a list of heads or {layer: list of heads}"))
    chosen = {}
    for layer, indices in heads.items():
        if layer not in layers:
            raise ValueError(f"heads: layer {layer!r} isn't captured; layers is {layers}")
        chosen[operator.index(layer)] = tuple(_integers(indices, "heads", "a list of heads for each layer"))
        if not all(0 <= head < count for head in chosen[layer]):
            raise ValueError(f"heads: the model has query heads 0..{count - 1}, got {chosen[layer]} for layer {layer}")
        if len(set(chosen[layer])) < len(chosen[layer]):
            raise ValueError(f"heads: a head is given twice in {chosen[layer]} for layer {layer}")
    return chosen


def _check_heads(choice: Choice, layers: tuple[int, ...], reduced: bool) -> None:
    for statistic, chosen in choice.items():
        counts = {layer: len(chosen.get(layer, ())) for layer in layers}
        if not any(counts.values()):
            raise ValueError(f"heads: no head is chosen for {statistic}")
        if not reduced and len(set(counts.values())) > 1:
            raise ValueError(
                f"heads: layers choose different numbers of heads for {statistic}, {counts}, which fill no tensor; "
                "choose equally many in each of them, or pass reduce_heads='mean'"
            )


def _integers(values: Any, name: str, forms: str) -> list[int]:
    if isinstance(values, Iterable) and not isinstance(values, str):
        listed = list(values)
        if all(hasattr(value, "__index__") and not isinstance(value, bool) for value in listed):
            return [operator.index(value) for value in listed]
    raise TypeError(f"{name} must be {forms}, got {values!r}")
