"""The results of a capture as text, curves and a pandas frame: the layer, batch row, head and token of each number."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from attnstats.errors import InputError
from attnstats.results import highest, shapes
from attnstats.statistics import Statistic, Top

if TYPE_CHECKING:
    from pandas import DataFrame, MultiIndex


TOKENS = {"row": "query", "column": "key", "map": "query segment"}
Heads = Mapping[int, tuple[int, ...] | None]  # by layer the chosen heads; None: all


class Recorded(NamedTuple):
    """A statistic of a capture.

    Attributes:
        values: (L, B, H, T), without L or H where they are reduced; (.., S) of segments, and of `TopKeys` its `Top`.
        valid: (B, T) bool.
    """

    values: Any
    valid: Tensor
    heads: Heads

    def numbers(self, dimensions: int) -> dict[str, Tensor]:
        """The tensors of one number per token, by what their columns' names have behind the statistic's: of segments
        and of largest keys one for each. A map has none."""
        if isinstance(self.values, Top):
            both = {"_value": self.values.values, "_index": self.values.indices}
            return {f"{kind}_{i}": x[..., i] for i in range(both["_value"].shape[-1]) for kind, x in both.items()}
        if self.values.dim() == dimensions:
            return {"": self.values}
        return {f"_{i}": self.values[..., i] for i in range(self.values.shape[-1])}


def to_frame(results: Mapping[Statistic, Recorded], reduced: Collection[str], are_apart: bool) -> DataFrame:
    """One row per layer, batch row, head and position, a column per number; NaN where it is not valid.

    Args:
        reduced: "layers" and "heads" where the values have no such axis.
        are_apart: queries and keys are not of one sequence.

    Raises:
        InputError: no statistic has one number per token, or queries and keys are of two sequences.
    """
    import pandas

    dimensions = 4 - len(reduced)
    tables = {s: of for s, of in results.items() if s.axis != "map"}
    if not tables:
        raise InputError(
            f"to_frame: no number per token in {', '.join(map(str, results))}; read them as run[statistic]"
        )
    if are_apart and len({s.axis for s in tables}) > 1:
        raise InputError("to_frame: queries and keys are of two sequences here; capture row or column statistics alone")
    length = max(of.valid.shape[-1] for of in tables.values())
    names = [s.name for s in tables]
    columns = []
    for s, of in tables.items():
        name, absent = s.name if names.count(s.name) == 1 else str(s), ~of.valid
        for part, values in of.numbers(dimensions).items():
            numbers = values.double().masked_fill(absent if "heads" in reduced else absent[:, None], torch.nan)
            # Queries are the last ones, where keys were cached before them.
            index = _index(values, of.heads, reduced, range(length - values.shape[-1], length))
            columns.append(pandas.Series(numbers.flatten().cpu().numpy(), index, name=name + part))
    return pandas.concat(columns, axis=1).sort_index()


def _index(values: Tensor, heads: Heads, reduced: Collection[str], positions: range) -> MultiIndex:
    import pandas

    batch = values.shape[0 if "layers" in reduced else 1]
    parts = []
    for layer in sorted(heads):
        levels: dict[str, object] = {} if "layers" in reduced else {"layer": [layer]}
        levels["row"] = range(batch)
        if "heads" not in reduced:
            chosen = heads[layer]
            levels["head"] = range(values.shape[-2]) if chosen is None else chosen
        levels["position"] = positions
        parts.append(pandas.MultiIndex.from_product(list(levels.values()), names=list(levels)))
        if "layers" in reduced:
            break  # all layers have the heads of the first
    return parts[0].append(parts[1:])


def described(statistic: Statistic, values: Any, heads: Heads, reduced: Collection[str]) -> str:
    """A statistic, the shape of its values, and the layer, row, head and position of their highest; None: no values."""
    if values is None:
        return f"{statistic}: nothing to read"
    text = f"{statistic}: {shapes(values)}"
    if (found := highest(values)) is None:
        return text
    value, place = found
    layers = sorted(heads)
    rest = list(place)
    named = []
    layer = layers[0]
    if "layers" not in reduced:
        layer = layers[rest.pop(0)]
        named.append(f"layer {layer}")
    named.append(f"row {rest.pop(0)}")
    if "heads" not in reduced:
        chosen, head = heads[layer], rest.pop(0)
        named.append(f"head {head if chosen is None else chosen[head]}")
    named.append(f"{TOKENS[statistic.axis]} {rest.pop(0)}")
    named += [f"segment {place}" for place in rest]
    return f"{text}, highest {value:.4g}: {', '.join(named)}"


def curves(results: Mapping[Statistic, Any], reduced: Collection[str]) -> dict[str, list[float]]:
    """The mean over layers and heads of the first batch row, of each statistic that has a number per token."""
    named = {}
    for statistic, values in results.items():
        if isinstance(values, Tensor) and values.dim() == 4 - len(reduced) and statistic.axis != "map":
            first = values.select(0 if "layers" in reduced else 1, 0)
            named[str(statistic)] = (
                first.double().flatten(0, -2).mean(0).tolist() if first.dim() > 1 else first.tolist()
            )
    return named
