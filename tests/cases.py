"""One attention call as data, its comparison with the float64 reference, and the tolerance of that comparison.

`reliability.trials` draws cases by the thousand and prints the expressions that make them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

import attnstats
from attnstats import (
    FAI,
    LSE,
    WAAD,
    Entropy,
    LocalMass,
    MaxLogit,
    MeanDistance,
    PooledMap,
    Received,
    SegmentMass,
    SinkMass,
    Statistic,
    TopKeys,
    reference,
)
from attnstats.statistics import CATALOGUE, ColumnStatistic, DistanceWeighted, Top
from attnstats.triton.plan import WHOLE_ROWS

EVERY = (
    WAAD(1),
    WAAD(10),
    LocalMass(4),
    MeanDistance(),
    Entropy(),
    MaxLogit(),
    LSE(),
    SinkMass(3),
    FAI(0, 0),
    FAI(3, 20),
    FAI(0, None),
    FAI(5, None),
    Received(),
    Received(last=4),
)


@dataclass(frozen=True)
class Case:
    batch: int = 2
    key_heads: int = 2
    group: int = 2
    query_length: int = 37
    key_length: int = 37
    head_dim: int = 16
    value_dim: int = 16
    dtype: str = "float32"
    is_causal: bool = True
    padding: str = "none"  # none, left, right, holes, all
    counted: str = "all"  # all, some, none
    weighted: bool = False  # a query_weight, some of it 0
    query_offset: int | None = None
    softcap: float | None = None
    window_size: tuple[int, int] | None = None
    sinks: bool = False
    packed: tuple[tuple[int, int], ...] = ()  # lengths (queries, keys) of sequences; instead of the two lengths above
    heads: str = "all"  # all, some: every other one, split: rows of some and columns of others
    layout: str = "plain"  # plain, bthd: heads innermost as models have them, guarded, strided: views into NaN
    spread: float = 1.0  # of the scores
    bias: float = 0.0  # a part that all keys have in common: |lse| is about a hundredth of its square
    scale: float | None = None
    waad: int = 10  # the second window of WAAD
    spoiled: str = ""  # "nan query", "inf key", ...: one element of query or key is that
    seed: int = 0
    asked: tuple[int, ...] = ()  # which of the statistics below, by index; (): all

    def __post_init__(self) -> None:
        if self.packed:
            totals = {"batch": 1, "query_length": 0, "key_length": 0}
            for queries, keys in self.packed:
                totals["query_length"] += queries
                totals["key_length"] += keys
            for name, total in totals.items():
                object.__setattr__(self, name, total)

    def statistics(self) -> tuple[Statistic, ...]:
        """Those that the case asks for; of all, those of one number per token or pair of segments."""
        every = self.every()
        asked = tuple(every[i % len(every)] for i in sorted(set(self.asked)))
        return asked or tuple(s for s in every if not s.per_query)

    def every(self) -> tuple[Statistic, ...]:
        maps = () if self.packed else (PooledMap(min(3, self.query_length), min(4, self.key_length)),)
        distances = self.is_causal or self.query_length == self.key_length or self.query_offset is not None
        if self.packed and not self.is_causal:
            distances = all(queries == keys for queries, keys in self.packed)
        few = min(3, *(keys for _, keys in self.packed)) if self.packed else min(3, self.key_length)
        of_keys = (SegmentMass((0, few, None)), SegmentMass(), TopKeys(), TopKeys(5))
        every = (EVERY[0], WAAD(self.waad), *EVERY[2:], *maps, *of_keys)
        return tuple(
            s for s in dict.fromkeys(every) if distances or not (isinstance(s, DistanceWeighted) and s.uses_distance)
        )

    def tensors(self, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        shapes = (
            (self.key_heads * self.group, self.query_length, self.head_dim),
            (self.key_heads, self.key_length, self.head_dim),
            (self.key_heads, self.key_length, self.value_dim),
        )
        drawn = [torch.randn(self.batch, *shape, generator=generator, dtype=torch.float64) for shape in shapes]
        drawn[0] *= self.spread
        if self.bias:
            # Sixteenths, so that a product is exact in whatever order BLAS sums it: that order isn't ours to choose,
            # and with a large common part it decides the error of the scores.
            drawn = [x.mul(16).round().div(16) for x in drawn]
            drawn[0][..., -1] += self.bias / 10
            drawn[1][..., -1] += self.bias
        if self.spoiled:
            number, where = self.spoiled.split()
            spoiled = drawn[where == "key"].view(-1)
            spoiled[torch.randint(len(spoiled), (), generator=generator)] = float(number)
        dtype = getattr(torch, self.dtype)
        return tuple(self._lay_out(x.to(dtype).to(device)) for x in drawn)  # type: ignore[return-value]

    def call(self, module: Any, tensors: Sequence[Tensor], **changed: Any) -> Any:
        """The result of `attention`, or `varlen_attention` if packed, of a module: attnstats or its reference."""
        arguments = self.arguments(tensors[0].device) | changed
        if SegmentMass() in tuple(arguments.get("statistics", ())):
            arguments = {"segment_boundaries": self.boundaries().to(tensors[0].device)} | arguments
        function = module.varlen_attention if self.packed else module.attention
        return function(*self.views(tensors), **arguments)

    def views(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        """The tensors as a call takes them: packed ones without a batch, tokens first."""
        return [x[0].transpose(0, 1) if self.packed else x for x in tensors]

    def split(self, statistics: Iterable[Statistic]) -> dict[Statistic, list[int]]:
        """Rows of some heads, and columns of others."""
        heads = list(range(self.key_heads * self.group))
        return {s: heads[isinstance(s, ColumnStatistic) :: 2] or [0] for s in statistics}

    def boundaries(self) -> Tensor:
        """(rows or sequences, 5): some segments are empty, and the last of the first row is open."""
        generator = torch.Generator().manual_seed(self.seed + 2)
        lengths = [keys for _, keys in self.packed] or [self.key_length] * self.batch
        rows = [torch.randint(0, n + 1, (5,), generator=generator).sort().values for n in lengths]
        boundaries = torch.stack(rows)
        boundaries[0, -1] = -1
        return boundaries

    def _lay_out(self, x: Tensor) -> Tensor:
        if self.layout == "bthd":
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        if self.layout == "guarded":
            batch, heads, length, dim = x.shape
            room = torch.full((batch + 1, heads + 1, length + 8, dim + 3), torch.nan, dtype=x.dtype, device=x.device)
            view = room[:batch, :heads, 4 : 4 + length, 1 : 1 + dim]
            return view.copy_(x)
        if self.layout == "strided":  # the last dimension too, with NaN between its elements
            view = torch.full((*x.shape[:3], 2 * x.shape[3]), torch.nan, dtype=x.dtype, device=x.device)[..., ::2]
            return view.copy_(x)
        return x

    def arguments(self, device: torch.device | str = "cpu") -> dict[str, Any]:
        generator = torch.Generator().manual_seed(self.seed + 1)
        length = self.key_length
        padding = None
        if self.padding != "none":
            padding = torch.ones(self.batch, length, dtype=torch.bool)
            if self.padding == "left":
                padding[0, : length // 3 + 1] = False
            elif self.padding == "right":
                padding[-1, length - length // 3 - 1 :] = False
            elif self.padding == "holes":
                padding = torch.rand(self.batch, length, generator=generator) > 0.3
            else:
                padding[0] = False
            padding = padding.to(device)
        counted = None
        if self.counted != "all":
            chance = 0.5 if self.counted == "some" else 1.0
            counted = (torch.rand(self.batch, self.query_length, generator=generator) >= chance).to(device)
        every = range(self.key_heads * self.group)
        heads: Any = None
        if self.heads == "some":
            heads = list(every)[::2][::-1]
        elif self.heads == "split":
            heads = self.split(self.statistics())
        arguments = {
            "is_causal": self.is_causal,
            "enable_gqa": self.group > 1,
            "query_mask": counted,
            "softcap": self.softcap,
            "window_size": self.window_size,
            "scale": self.scale,
            "sinks": torch.randn(len(every), generator=generator).to(device) if self.sinks else None,
            "heads": heads,
        }
        if self.weighted:
            weight = torch.rand(self.batch, self.query_length, generator=generator, dtype=torch.float64)
            weight = weight.masked_fill(weight < 0.2, 0.0).float().to(device)
            arguments["query_weight"] = weight[0] if self.packed else weight
        if not self.packed:
            return arguments | {"key_padding_mask": padding, "query_offset": self.query_offset}
        if counted is not None:
            arguments["query_mask"] = counted[0]
        return arguments | {
            f"cu_seqlens_{side}": torch.tensor([0, *accumulate(pair[i] for pair in self.packed)], dtype=torch.int32).to(
                device
            )
            for i, side in enumerate("qk")
        }


def allowed(
    statistic: Statistic | None,
    case: Case,
    backend: str,
    truth: Tensor,
    eager: Tensor,
    lse: Tensor,
    from_lse: bool = False,
) -> float:
    """The largest error that passes: twice what eager PyTorch makes in the same dtype, and a floor.

    The floor is float32's: every path sums at most `bound` of A, in the complement form `window - sum` for WAAD, with
    a few roundings. From an lse that came with the call A has the error of its rounding, |lse| times as large. So it
    has in the interpreter where products aren't exact (`Case.bias` makes them so): the kernels compute scores near the
    diagonal anew, in tiles of another shape, which BLAS sums in another order. The tiled path in half
    precision takes the lse of torch's CPU kernel, whose exp is good to 2^-14. Huge scores err by their size in any
    order of summation, and of a few rows eager may get all right by chance. `statistic` None: the output, rounded to
    its dtype last.
    """
    eps = torch.finfo(torch.float32).eps
    size = 1.0 + float(lse.abs()[lse.isfinite()].max()) if lse.isfinite().any() else 1.0
    foreign = from_lse or backend == "flash"
    magnitude = size if foreign or statistic is None or (backend == "triton" and not case.bias) else 1.0
    if backend in ("tiled", "flash") and case.dtype in ("float16", "bfloat16"):
        magnitude += 2**-14 / eps
    if case.spread >= 10 or case.scale == 1.0:
        magnitude += size
    if statistic is None:
        rounding = torch.finfo(getattr(torch, case.dtype)).eps
        floor = (2 * rounding + 8 * eps * magnitude) * max(1.0, float(truth.abs().max()))
    else:
        farthest = max(case.query_length, case.key_length) + (case.query_offset or 0)
        bound = {
            WAAD: lambda s: float(min(s.window, farthest)),
            MeanDistance: lambda s: float(farthest),
            Entropy: lambda s: 1.0 + float(truth.abs().max()),
            Received: lambda s: float(case.query_length),
            PooledMap: lambda s: float(case.query_length),
            LSE: lambda s: size,
            MaxLogit: lambda s: size,
        }.get(type(statistic), lambda s: 1.0 if s.name in CATALOGUE else max(1.0, float(truth.abs().max())))(statistic)
        floor = 8 * eps * magnitude * bound
    return 2 * float((eager.double() - truth).abs().max()) + floor


def allowed_gradient(case: Case, truth: Tensor, eager: Tensor, lse: Tensor) -> float:
    """The largest error of a gradient that passes: three times what autograd makes of eager PyTorch in the same dtype,
    and a floor of float32: A and what it is multiplied with are recomputed from scores of size |lse|."""
    magnitude = 1.0 + float(lse.abs()[lse.isfinite()].max()) if lse.isfinite().any() else 1.0
    rounding = torch.finfo(getattr(torch, case.dtype)).eps
    floor = (rounding + 8 * torch.finfo(torch.float32).eps * magnitude) * max(1.0, float(truth.abs().max()))
    return 3 * float((eager.double() - truth).abs().max()) + floor


def check(
    case: Case,
    backend: Any,
    device: torch.device | str = "cpu",
    from_lse: bool = False,
    statistics: Iterable[Statistic] = (),
) -> None:
    """Compare output, lse, statistics and validity with the float64 reference; assert on the worst element.

    The statistics are the case's unless others are given. NaN and inf must be where the reference has them.
    """
    statistics = computed_by(backend, statistics or (case.statistics() if case.asked else case.every()), from_lse)
    tensors = case.tensors(device)
    arguments = case.arguments(device) | {"statistics": statistics}
    if SegmentMass() in statistics:
        arguments["segment_boundaries"] = case.boundaries().to(device)
    if isinstance(arguments["heads"], dict):
        arguments["heads"] = case.split(statistics)
    truth_output, truth = case.call(reference, [x.double() for x in tensors], **arguments)
    eager_output, eager = case.call(reference, tensors, **arguments)
    if from_lse:
        query, key, _ = case.views(tensors)
        found = attnstats.statistics_from_lse(query, key, truth.lse.float(), backend=backend, **arguments)
    else:
        output, found = case.call(attnstats, tensors, backend=backend, **arguments)
        assert output.dtype == tensors[0].dtype
        if case.spoiled and backend in (
            "tiled",
            "flash",
        ):  # torch's flash kernel gives 0 for a row of NaN over few keys
            spoiled = ~(output.isfinite() & truth_output.isfinite())
            output, truth_output = (x.masked_fill(spoiled, 0.0) for x in (output, truth_output))
        _same_infinities("output", output, truth_output, bool(case.spoiled))
        output, expected, by_eager = map(_finite, (output, truth_output, eager_output))
        error = float((output.double() - expected).abs().max())
        limit = allowed(None, case, backend, expected, by_eager, truth.lse)
        assert error <= limit, f"output: {error:.2e} > {limit:.2e}"
    _same_infinities("lse", found.lse, truth.lse, bool(case.spoiled))
    for statistic in statistics:
        if isinstance(statistic, TopKeys):
            _check_keys(statistic, case, found[statistic], truth, tensors)
        ours, true, eagers = (_values(x[statistic]) for x in (found, truth, eager))
        _same_infinities(statistic, ours, true, bool(case.spoiled))
        result, expected, by_eager = map(_finite, (ours, true, eagers))
        assert result.shape == expected.shape, f"{statistic}: {tuple(result.shape)} for {tuple(expected.shape)}"
        error = float((result.double() - expected).abs().max())
        limit = allowed(statistic, case, backend, expected, by_eager, truth.lse, from_lse)
        assert error <= limit, f"{statistic}: {error:.2e} > {limit:.2e}"  # also fails on NaN
        valid = truth.valid[statistic]
        assert torch.equal(found.valid[statistic], valid), f"{statistic}: valid"
        if statistic in truth.counts:
            counts, true_counts = found.counts[statistic], truth.counts[statistic]
            assert torch.allclose(counts.double(), true_counts.double(), rtol=1e-6, atol=0), f"{statistic}: counts"
        rows = not isinstance(statistic, (ColumnStatistic, PooledMap))
        partly = case.counted != "all" or case.weighted
        if not isinstance(statistic, LSE) and not (rows and partly):  # rows that don't count have values
            over_heads = valid.unsqueeze(0 if case.packed else 1)
            over_heads = over_heads.reshape(*over_heads.shape, *[1] * (ours.dim() - over_heads.dim()))
            assert not ours.masked_fill(over_heads, 0.0).any(), f"{statistic}: placeholders must be 0"


def gradients(
    function: Any,
    case: Case,
    tensors: Sequence[Tensor],
    arguments: dict[str, Any],
    dtype: torch.dtype,
    seed: int = 3,
    **options: Any,
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Of a random functional of the output, for query, key, value and sinks; and the lse."""
    # In their own dtype as they lie.
    inputs = [(x if dtype == x.dtype else x.to(dtype)).detach().requires_grad_() for x in tensors]
    if (sinks := arguments["sinks"]) is not None:
        inputs.append(sinks.to(torch.promote_types(dtype, torch.float32)).detach().requires_grad_())
    arguments = arguments | {"sinks": inputs[3] if sinks is not None else None}
    with torch.enable_grad():
        output, stats = function(*case.views(inputs[:3]), **arguments, **options)
        weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return torch.autograd.grad(output, inputs, weights.to(output)), stats.lse


def check_gradients(case: Case, backend: Any, device: torch.device | str = "cpu") -> None:
    """Compare gradients with autograd through the float64 reference; assert on the worst element."""
    tensors, arguments = case.tensors(device), case.arguments(device)
    ours, truth = (m.varlen_attention if case.packed else m.attention for m in (attnstats, reference))
    results, _ = gradients(ours, case, tensors, arguments, tensors[0].dtype, backend=backend)
    eager, _ = gradients(truth, case, tensors, arguments, tensors[0].dtype)
    expected, lse = gradients(truth, case, tensors, arguments, torch.float64)
    for name, x, by_eager, y in zip(("query", "key", "value", "sinks"), results, eager, expected, strict=False):
        assert x.shape == y.shape
        assert x.dtype == by_eager.dtype
        limit = allowed_gradient(case, y, by_eager, lse)
        error = float((x.double() - y).abs().max())
        assert error <= limit, f"{name}: {error:.2e} > {limit:.2e}"  # also fails on NaN


def computed_by(backend: str, statistics: Iterable[Statistic], from_lse: bool = False) -> tuple[Statistic, ...]:
    """Those of the statistics that a backend computes."""
    computed = [s for s in statistics if s.from_lse or not from_lse]
    if backend in ("triton", "flash"):
        computed = [s for s in computed if s.method != "row" or type(s) in WHOLE_ROWS]
    if backend == "flash":
        computed = [s for s in computed if s.from_lse]
    return tuple(dict.fromkeys(computed))


def _values(x: Any) -> Tensor:
    """A statistic's numbers, without the keys that they belong to."""
    return x.values if isinstance(x, Top) else x


def _check_keys(statistic: TopKeys, case: Case, found: Top, truth: Any, tensors: Sequence[Tensor]) -> None:
    """The keys differ from those of the reference only where these have as large an A, but for rounding."""
    expected = truth[statistic]
    absent = expected.indices < 0
    assert torch.equal(found.indices < 0, absent), f"{statistic}: others have a key"
    assert (found.indices.sort(-1).values.diff(dim=-1) != 0).logical_or(absent[..., 1:].flip(-1)).all(), "a key twice"
    other = (found.indices != expected.indices) & ~absent
    if not other.any():
        return
    assert not case.packed or case.dtype != "float64", f"{statistic}: other keys"
    eps = torch.finfo(getattr(torch, case.dtype)).eps
    every = case.call(reference, [x.double() for x in tensors], **_alone(case, tensors, TopKeys(16)))[1][TopKeys(16)]
    # A of the keys that were found, where the reference has them among its first 16.
    same = found.indices[..., None] == every.indices[..., None, :]
    value = (every.values[..., None, :] * same).sum(-1)
    size = 1.0 + float(truth.lse.abs()[truth.lse.isfinite()].max())
    close = (value - expected.values).abs() <= 64 * max(eps, 1e-6) * size * expected.values + 1e-6
    assert (close | ~other | ~same.any(-1)).all(), f"{statistic}: a key has another A than the reference's"


def _alone(case: Case, tensors: Sequence[Tensor], statistic: Statistic) -> dict[str, Any]:
    """The arguments of a call for one statistic, of the heads of the others."""
    arguments = case.arguments(tensors[0].device) | {"statistics": [statistic]}
    if isinstance(arguments["heads"], dict):
        arguments["heads"] = case.split([statistic])
    return arguments


def _finite(x: Tensor) -> Tensor:
    return x.masked_fill(~x.isfinite(), 0.0)


def _same_infinities(name: Any, found: Tensor, truth: Tensor, spoiled: bool) -> None:
    """The same elements are -inf and NaN; +inf is as good as NaN, and of a spoiled row's scores -inf is, too."""
    if spoiled and name in ("lse", LSE(), MaxLogit()):
        assert torch.equal(found.isfinite(), truth.isfinite()), f"{name}: others are finite than in the reference"
        return
    for what, x, y in (
        ("NaN or inf", found.isnan() | (found == torch.inf), truth.isnan() | (truth == torch.inf)),
        ("-inf", found == -torch.inf, truth == -torch.inf),
    ):
        assert torch.equal(x, y), f"{name}: {int(x.sum())} elements are {what}, of the reference {int(y.sum())}"
