"""Statistics of attention that is spread over ranks: by sequence (context parallel) or by heads (tensor parallel).

Every rank computes the statistics of its own part, with `attention` or `statistics_from_lse`; these functions reduce
them to those of the whole. Only `torch.distributed` is used, and a group of one rank works.

Context parallel: a rank has some of the queries and all keys. With the queries of `shard`:

    pieces = attnstats.distributed.shard(length)
    parts = [attnstats.statistics_from_lse(query_of(piece), key, lse_of(piece), query_offset=piece.start, ...)
             for piece in pieces]
    stats = attnstats.distributed.reduce_columns(parts)  # rows of its own queries, columns of its own positions
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional
from torch.nn.functional import pad

from attnstats.core.merging import as_mean, as_sum, merge_columns
from attnstats.results import Statistics
from attnstats.statistics import Statistic

Layout = Literal["contiguous", "zigzag"]


def shard(length: int, *, layout: Layout = "contiguous", rank: int | None = None, group: Any = None) -> list[slice]:
    """The positions that a rank of the group holds, in order.

    Args:
        length: of the whole sequence.
        layout: "contiguous", one piece each, as torch.chunk and DTensor cut it; or "zigzag", which balances causal
            attention: of 2n equal pieces rank r has r and 2n - 1 - r; length must be a multiple of 2n.
        rank: within the group; default this one.
        group: the process group; None: the default one.
    """
    ranks, rank = dist.get_world_size(group), dist.get_rank(group) if rank is None else rank
    if layout == "contiguous":
        step = -(-length // ranks)
        return [slice(min(rank * step, length), min((rank + 1) * step, length))]
    if layout != "zigzag":
        raise ValueError(f"layout must be 'contiguous' or 'zigzag', got {layout!r}")
    if length % (2 * ranks):
        raise ValueError(f"layout='zigzag' needs a length that is a multiple of {2 * ranks}, got {length}; pad it")
    step = length // (2 * ranks)
    return [slice(i * step, (i + 1) * step) for i in (rank, 2 * ranks - 1 - rank)]


def reduce_columns(
    parts: Statistics | Sequence[Statistics], *, layout: Layout = "contiguous", scatter: bool = True, group: Any = None
) -> Statistics:
    """Column statistics of all ranks' queries, out of those of each rank's own. Every rank must call it.

    Args:
        parts: of this rank's queries against all keys: one `Statistics`, or one for each piece of `shard`, in order.
        layout: which columns belong to which rank, see `shard`.
        scatter: keep the columns of this rank's own positions (a reduce-scatter); else all of them (an all-reduce).
        group: the process group; None: the default one.

    Returns:
        `Statistics` with those columns, their `valid` and their `counts`. Rows and the lse are this rank's, pieces
        joined; a PooledMap is of this rank's queries.

    Raises:
        ValueError: `Received(last=...)`, which each part took for the last queries of its own; and a PooledMap of
            several pieces.
    """
    parts = [parts] if isinstance(parts, Statistics) else list(parts)
    if not parts:
        raise ValueError("parts is empty; pass this rank's Statistics")
    columns: list[Statistic] = [s for s in parts[0] if s.axis == "column"]
    for statistic in parts[0]:
        if statistic.last_queries is not None:
            raise ValueError(
                f"parts: {statistic} counted the last queries of every part; ask for it without a limit and with a "
                "query_mask that is True for the last queries of the sequence"
            )
        if statistic.axis == "map" and len(parts) > 1:
            raise ValueError(f"parts: the {statistic} of several pieces cannot be joined; reduce each piece alone")
    if not columns:
        return _joined(parts, {}, {}, {})

    merged = {s: merge_columns([(part[s], part.counts.get(s)) for part in parts]) for s in columns}
    first = merged[columns[0]][0]
    length = first.shape[-1]
    reduce = _reducer(length, layout, scatter, group)
    own = [i for piece in shard(length, layout=layout, group=group) for i in range(length)[piece]]
    index = torch.tensor(own if scatter else range(length), dtype=torch.long, device=first.device)
    sums = reduce(torch.cat([as_sum(*merged[s]) for s in columns], -2))
    means = [s for s in columns if merged[s][1] is not None]
    counted = reduce(torch.stack([c for _, c in merged.values() if c is not None], -2)) if means else None
    counts = {s: counted[..., i, :] for i, s in enumerate(means)} if counted is not None else {}
    split = sums.split([merged[s][0].shape[-2] for s in columns], -2)
    values = {s: as_mean(total, counts.get(s)) for s, total in zip(columns, split, strict=True)}
    # Without a horizon a column is valid where its key is real, which every rank knows alike.
    valid = {s: counts[s] > 0 if s in counts else parts[0].valid[s][..., index] for s in columns}
    return _joined(parts, values, valid, counts)


def mean_over_heads(values: Tensor, *, dim: int = 1, group: Any = None) -> Tensor:
    """The mean over the heads of all ranks, where each has some of them (tensor parallel). Every rank must call it.

    Args:
        values: this rank's heads along `dim`, as (B, h, T); a rank without any passes a dimension of 0.
        dim: of the heads.
        group: the process group; None: the default one.
    """
    return mean_over_ranks(values.sum(dim), values.shape[dim], group=group)


def mean_over_ranks(total: Tensor, count: int, *, group: Any = None) -> Tensor:
    """The mean over all ranks' terms, of which this rank added up `count`: sums and counts are all-reduced."""
    total = total.detach().clone()
    terms = torch.tensor(count, dtype=torch.int64, device=total.device)
    dist.all_reduce(total, group=group)
    dist.all_reduce(terms, group=group)
    return total / terms.clamp(min=1)


def local_heads(heads: Iterable[int], count: int, *, group: Any = None) -> list[int]:
    """The chosen heads that this rank has, in its own numbering; rank r has the `count` heads from r * count on."""
    first = dist.get_rank(group) * count
    return [head - first for head in heads if first <= head < first + count]


def tensor_parallel_group(model: Any) -> Any:
    """The process group over which a model's attention heads are spread, or None.

    It is that of the mesh on which transformers (`tp_plan`) or `torch.distributed.tensor.parallel` laid its weights.
    """
    mesh = getattr(model, "_device_mesh", None)
    if mesh is None:
        meshes = (getattr(parameter, "device_mesh", None) for parameter in model.parameters())
        mesh = next((mesh for mesh in meshes if mesh is not None), None)
    if mesh is None:
        return None
    if mesh.ndim == 1:
        return mesh.get_group()
    return mesh["tp"].get_group() if "tp" in (mesh.mesh_dim_names or ()) else None


# What spreads each sequence over ranks by replacing an attention function that ours then stands for: its name, its
# module, and the function there that returns the process group of a sequence.
SEQUENCE_PARALLEL = (
    ("verl's Ulysses sequence parallelism", "verl.utils.ulysses", "get_ulysses_sequence_parallel_group"),
    ("ROLL's Ulysses sequence parallelism", "roll.utils.context_parallel.globals", "get_ulysses_group"),
    (
        "DeepSpeed's Ulysses sequence parallelism",
        "deepspeed.runtime.sequence_parallel.parallel_state_sp",
        "get_sequence_parallel_group",
    ),
)


def sequence_parallelism() -> str | None:
    """The name of what gives this rank a part of each sequence at the moment, if anything known does."""
    if (getattr(functional.scaled_dot_product_attention, "__module__", None) or "").startswith("torch.distributed."):
        return "torch's context_parallel"
    for name, module, function in SEQUENCE_PARALLEL:
        if module in sys.modules:
            try:
                group = getattr(sys.modules[module], function)()
            except AssertionError:  # of some, where there is no group
                continue
            if group is not None and dist.get_world_size(group) > 1:
                return name
    return None


def gather_heads(values: Tensor, heads: Sequence[int] | None, count: int, *, dim: int = 1, group: Any = None) -> Tensor:
    """The heads of all ranks in the order of `heads`, where each rank has some. Every rank must call it.

    Args:
        values: this rank's heads along `dim`, in the order of `local_heads(heads, count)`.
        heads: of the whole model; None: all, in order.
        count: how many heads a rank has; rank r has those from r * count on.
        dim: of the heads.
        group: the process group; None: the default one.
    """
    ranks = dist.get_world_size(group)
    heads = range(ranks * count) if heads is None else heads
    per_rank = [[head for head in heads if head // count == rank] for rank in range(ranks)]
    most = max(map(len, per_rank))
    own = values.movedim(dim, 0)
    room = own.new_zeros((most, *own.shape[1:]))
    room[: len(own)] = own
    gathered = [torch.empty_like(room) for _ in range(ranks)]
    dist.all_gather(gathered, room, group=group)
    by_head = {head: x[i] for x, of_rank in zip(gathered, per_rank, strict=True) for i, head in enumerate(of_rank)}
    return torch.stack([by_head[head] for head in heads]).movedim(0, dim)


def _reducer(length: int, layout: Layout, scatter: bool, group: Any) -> Callable[[Tensor], Tensor]:
    """A function that sums a tensor (..., Tk) over ranks and returns this rank's columns, or all of them."""

    def all_columns(x: Tensor) -> Tensor:
        x = x.contiguous()
        dist.all_reduce(x, group=group)
        return x

    def own_columns(x: Tensor) -> Tensor:
        pieces = [
            torch.cat([x[..., piece] for piece in shard(length, layout=layout, rank=rank, group=group)], -1)
            for rank in range(dist.get_world_size(group))
        ]
        longest = max(piece.shape[-1] for piece in pieces)
        padded = [pad(piece, (0, longest - piece.shape[-1])).contiguous() for piece in pieces]
        own = torch.empty_like(padded[0])
        dist.reduce_scatter(own, padded, group=group)
        return own[..., : pieces[dist.get_rank(group)].shape[-1]]

    return own_columns if scatter else all_columns


def _joined(
    parts: Sequence[Statistics],
    values: dict[Statistic, Tensor],
    valid: dict[Statistic, Tensor],
    counts: dict[Statistic, Tensor],
) -> Statistics:
    """Statistics with these columns, and with rows that are those of the parts one after the other."""

    def join(tensors: list[Tensor], tokens: int = -1) -> Tensor:
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors, tokens)

    tensors = {
        s: values[s] if s in values else join([part.tensors[s] for part in parts], -1 - s.per_query) for s in parts[0]
    }
    return Statistics(
        tensors,
        lambda s: valid[s] if s in valid else join([part.valid[s] for part in parts]),
        lambda s: counts[s],
        join([part.lse for part in parts]),
    )
