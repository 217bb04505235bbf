"""The layers and heads of a model that are captured: every form of `layers` and `heads` as plain integers.

Pure functions. A layer's number is the model's own; layers without attention are left out.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from attnstats.statistics import Statistic

Layers = Literal["middle-third", "all"] | slice | Iterable[int]
Reduce = Literal["heads", "layers"]
HeadSelection = Iterable[int] | Mapping[int, Iterable[int]] | Tensor
# The chosen heads of each captured layer; None: all that the layer has.
ChosenHeads = dict[Statistic, dict[int, tuple[int, ...] | None]]


def middle_third(count: int) -> tuple[int, ...]:
    """Five layers evenly spaced over the middle third of `count`, fewer where they fall together (Sec. 4.1)."""
    spaced = torch.linspace(count // 3, 2 * count // 3, 5, dtype=torch.float64, device="cpu").round()
    return tuple(sorted({min(int(layer), count - 1) for layer in spaced}))


def resolve_layers(layers: Layers, present: tuple[int, ...]) -> tuple[int, ...]:
    """The layers that `layers` chooses of those present, ascending. Raises TypeError or ValueError."""
    forms = "'middle-third', 'all', a slice or a list of layer indices"
    count = present[-1] + 1
    if isinstance(layers, str):
        if layers not in ("middle-third", "all"):
            raise ValueError(f"layers must be {forms}, got {layers!r}")
        return tuple(present[i] for i in middle_third(len(present))) if layers == "middle-third" else present
    if isinstance(layers, slice):
        indices = [i for i in range(count)[layers] if i in present]
    else:
        indices = [i + count if i < 0 else i for i in integers(layers, "layers", forms)]
    outside = [i for i in indices if not 0 <= i < count]
    if outside:
        raise ValueError(f"layers: the model has {count} layers, {-count}..{count - 1}, got {layers!r}")
    if without := [i for i in indices if i not in present]:
        raise ValueError(f"layers: the model has no attention in layers {without}, only in {list(present)}")
    if not indices:
        raise ValueError(f"layers={layers!r} chooses none of the model's {count} layers")
    if len(set(indices)) < len(indices):
        raise ValueError(f"layers: a layer is given twice in {layers!r}")
    return tuple(sorted(indices))


def resolve_heads(
    heads: Any, statistics: tuple[Statistic, ...], layers: tuple[int, ...], count: int | None
) -> ChosenHeads:
    """The heads that `heads` chooses, by statistic and layer. Raises TypeError or ValueError.

    `count` is the number of heads of a layer; None: not the same in every layer.
    """
    if not isinstance(heads, Mapping) or not any(isinstance(key, (str, Statistic)) for key in heads):
        return {s: _per_layer(heads, layers, count) for s in statistics}
    choice = {s: _per_layer(None, layers, count) for s in statistics}
    for key, value in heads.items():
        matches = [s for s in statistics if key in (s, s.name)]
        if len(matches) != 1:
            fault = "names more than one" if matches else "isn't one"
            raise ValueError(f"heads: the key {key!r} {fault} of the statistics {', '.join(map(str, statistics))}")
        choice[matches[0]] = _per_layer(value, layers, count)
    return choice


def _per_layer(heads: Any, layers: tuple[int, ...], count: int | None) -> dict[int, tuple[int, ...] | None]:
    if heads is None:
        return dict.fromkeys(layers)
    if isinstance(heads, Tensor) and heads.dtype == torch.bool:
        if heads.dim() != 2 or len(heads) != len(layers) or (count is not None and heads.shape[1] != count):
            raise ValueError(
                f"heads: a bool tensor must be (captured layers, heads), {(len(layers), count)}; got "
                f"{tuple(heads.shape)}"
            )
        rows = (row.nonzero().flatten().tolist() for row in heads)
        heads = {layer: row for layer, row in zip(layers, rows, strict=True) if row}
    if not isinstance(heads, Mapping):
        forms = "None, a list of heads, {layer: list of heads} or a bool tensor (layers, heads)"
        heads = dict.fromkeys(layers, integers(heads, "heads", forms))
    chosen: dict[int, tuple[int, ...] | None] = {}
    for layer, indices in heads.items():
        if layer not in layers:
            raise ValueError(f"heads: layer {layer!r} isn't captured; layers is {layers}")
        listed = tuple(integers(indices, "heads", "a list of heads for each layer"))
        if not all(head >= 0 and (count is None or head < count) for head in listed):
            available = "" if count is None else f"query heads 0..{count - 1}, "
            raise ValueError(f"heads: the model has {available}got {listed} for layer {layer}")
        if len(set(listed)) < len(listed):
            raise ValueError(f"heads: a head is given twice in {listed} for layer {layer}")
        if listed:
            chosen[operator.index(layer)] = listed
    return chosen


def check_heads(choice: ChosenHeads, layers: tuple[int, ...], reduce: tuple[str, ...]) -> None:
    """Raise ValueError where a statistic has no heads, or layers whose results fill no tensor."""
    for statistic, chosen in choice.items():
        counts = {layer: len(heads) if heads is not None else "all" for layer, heads in chosen.items()}
        counts |= {layer: 0 for layer in layers if layer not in chosen}
        if not chosen:
            raise ValueError(f"heads: no head is chosen for {statistic}")
        missing = reduce == ("heads",) and len(chosen) < len(layers)
        if missing or ("heads" not in reduce and len(set(counts.values())) > 1):
            raise ValueError(
                f"heads: layers choose different numbers of heads for {statistic}, {dict(sorted(counts.items()))}, "
                "which fill no tensor; choose equally many in each of them, or pass reduce=('layers', 'heads')"
            )


def resolve_reduce(reduce: Reduce | Iterable[Reduce] | None) -> tuple[Reduce, ...]:
    """The axes that `reduce` takes means over. Raises ValueError."""
    chosen: Any = (reduce,) if isinstance(reduce, str) else () if reduce is None else reduce
    if not isinstance(chosen, Iterable) or not set(chosen := tuple(chosen)) <= {"heads", "layers"}:
        raise ValueError(f"reduce must be None, 'heads', 'layers' or both, ('layers', 'heads'); got {reduce!r}")
    return tuple(name for name in ("layers", "heads") if name in chosen)


def integers(values: Any, name: str, forms: str) -> list[int]:
    """The values as a list of int. Raises TypeError."""
    if isinstance(values, Iterable) and not isinstance(values, str):
        listed = list(values)
        if all(hasattr(value, "__index__") and not isinstance(value, bool) for value in listed):
            return [operator.index(value) for value in listed]
    raise TypeError(f"{name} must be {forms}, got {values!r}")
