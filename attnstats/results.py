"""The containers that calls return: statistics by name, output and statistics, and the explanation of a call."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnstats.statistics import LSE, Statistic

__all__ = ["AttentionResult", "ByStatistic", "Explanation", "PassCost", "Statistics"]


class ByStatistic(Mapping[Statistic, Tensor]):
    """Tensors keyed by statistic, and by name where the name is unambiguous: `stats["waad"]`, `stats[WAAD(20)]`."""

    def __init__(self, tensors: Mapping[Statistic, Tensor]):
        self._tensors = dict(tensors)
        self._statistics = tuple(self._tensors)  # torch.compile can only return keys that something else holds too

    def __getitem__(self, key: Statistic | str) -> Tensor:
        if isinstance(key, Statistic) and key in self._tensors:
            return self._tensors[key]
        return self._tensors[find(key, self._tensors, "computed")]

    def __contains__(self, key: object) -> bool:
        return key in self._tensors or any(statistic.name == key for statistic in self._tensors)

    def __iter__(self) -> Iterator[Statistic]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{s}: {tuple(x.shape)}' for s, x in self._tensors.items())})"


def shapes(values: Any) -> str:
    """The shape of a result, or of each part of one that has several."""
    if isinstance(values, Tensor):
        return str(tuple(values.shape))
    return ", ".join(f"{name} {tuple(part.shape)}" for name, part in zip(values._fields, values, strict=True))


def highest(values: Any) -> tuple[float, tuple[int, ...]] | None:
    """The highest entry and its indices; None where there is none, or numbers can't be read, as in tracing."""
    if type(values) is not Tensor or values.is_meta or not values.numel():
        return None
    known = values.detach().double().nan_to_num(nan=-torch.inf)
    try:
        place = tuple(int(i) for i in torch.unravel_index(known.argmax(), known.shape))
        return float(values[place]), place
    except RuntimeError:  # inside torch.vmap a tensor has no numbers of its own
        return None


def find(key: Statistic | str, statistics: Collection[Statistic], participle: str) -> Statistic:
    """The statistic that `key` is or names. Raises KeyError, with the participle, where it is none or several."""
    if isinstance(key, Statistic):
        matches = [key] if key in statistics else []
    else:
        matches = [statistic for statistic in statistics if statistic.name == key]
    if len(matches) != 1:
        fault = "ambiguous" if matches else f"not among the statistics {participle}"
        raise KeyError(f"{key!r} is {fault}: {', '.join(map(str, matches or statistics)) or 'none'}")
    return matches[0]


class Statistics(ByStatistic):
    """The statistics of one attention call: tensors, and of `TopKeys` a `Top` of two.

    Attributes:
        lse: (B, Hq, Tq), natural log, float32 (float64 for float64 inputs); -inf for a row that sees no key.
        valid: per statistic a bool tensor without the head axis, (B, Tq), (B, Tk) or (B, I, J): False where a
            value is a placeholder (0): rows that see no key or aren't counted, padding, an empty T(s).
        counts: per column statistic that is a mean, (B, Tk) int64 without the head axis: the counted queries |T(s)|
            behind it, 0 for padding; with a query_weight the sum of these, float. Value times count is the sum, which
            adds up over shards of the queries. Sums (`Received`) have no entry: they add up as they are.
    """

    def __init__(
        self,
        tensors: Mapping[Statistic, Tensor],
        validity: Callable[[Statistic], Tensor],
        counting: Callable[[Statistic], Tensor],
        lse: Tensor,
    ):
        super().__init__(tensors)
        self.lse = lse
        self._validity = validity
        self._counting = counting
        self._valid: ByStatistic | None = None
        self._counts: ByStatistic | None = None

    def __getitem__(self, key: Statistic | str) -> Any:
        if not isinstance(key, Statistic) or key not in self._tensors:
            key = find(key, self._tensors, "computed")
        return key.returned(self._tensors[key])

    @property
    def tensors(self) -> Mapping[Statistic, Tensor]:
        """One tensor for each statistic, as backends return them."""
        return self._tensors

    def __repr__(self) -> str:
        lines = [f"{type(self).__name__} of one call, lse {tuple(self.lse.shape)}"]
        for statistic, values in self.items():
            found = highest(values)
            at = "" if found is None else f", highest {found[0]:.4g} at {found[1]}"
            lines.append(f"  {statistic}: {shapes(values)}{at}")
        return "\n".join(lines)

    @property
    def valid(self) -> ByStatistic:  # a dozen small operations, which most calls never need
        if self._valid is None:  # not a cached_property, whose lock can't be traced
            self._valid = ByStatistic({statistic: self._validity(statistic) for statistic in self})
        return self._valid

    @property
    def counts(self) -> ByStatistic:
        if self._counts is None:
            self._counts = ByStatistic({s: self._counting(s) for s in self if s.is_mean})
        return self._counts

    def changed(
        self,
        change: Callable[[Statistic, Tensor], Tensor],
        without_heads: Callable[[Statistic, Tensor], Tensor] | None = None,
    ) -> Statistics:
        """The same with `change` applied to every tensor, and to the lse as that of `LSE()`.

        `without_heads` is applied to valid and counts; default: `change`. Holds none of the unchanged tensors.
        """
        validity, counting, of_counts = self._validity, self._counting, without_heads or change
        return Statistics(
            {statistic: change(statistic, tensor) for statistic, tensor in self._tensors.items()},
            lambda s: of_counts(s, validity(s)),
            lambda s: of_counts(s, counting(s)),
            change(LSE(), self.lse),
        )


class AttentionResult(NamedTuple):
    """The output of attention and its statistics; unpacks as `output, statistics`."""

    output: Tensor
    statistics: Statistics


@dataclass(frozen=True)
class PassCost:
    """One pass of a call over its inputs.

    Attributes:
        run: the loop or kernel, such as "cpu_flash", "band" or "forward".
        description: the loop or kernel in words, with its tiles.
        attends: it gives output and lse too.
        statistics: those that it computes.
        heads: the query heads that it computes them of; None: all.
        flops: floating-point operations over all heads, of the forward pass.
        scratch_bytes: memory beside inputs and results.
    """

    run: str
    description: str
    attends: bool
    statistics: tuple[Statistic, ...]
    heads: tuple[int, ...] | None
    flops: int
    scratch_bytes: int

    @property
    def computes(self) -> tuple[str, ...]:
        """The names of its results."""
        return (*(("output", "lse") if self.attends else ()), *(s.name for s in self.statistics))

    def __str__(self) -> str:
        of_heads = "" if self.heads is None else f" of heads {', '.join(map(str, self.heads))}"
        cost = f"{self.flops / 1e9:.2f} GFLOP, {self.scratch_bytes / 1e6:.1f} MB of scratch"
        return f"  {self.description}\n    {', '.join(self.computes)}{of_heads}: {cost}"


@dataclass(frozen=True, repr=False)
class Explanation:
    """The backend of a call and its passes, in the order in which they run; prints as text.

    Attributes:
        backend: "reference", "tiled", "flash" or "triton".
        reason: why this backend was chosen.
        passes: those that the call makes.
    """

    backend: str
    reason: str
    passes: tuple[PassCost, ...]

    @property
    def flops(self) -> int:
        """Floating-point operations of all passes."""
        return sum(each.flops for each in self.passes)

    def __str__(self) -> str:
        return "\n".join([f"backend: {self.backend} ({self.reason})", *map(str, self.passes)])

    __repr__ = __str__
