"""The arguments of one call as one record, for dense, packed and traced calls alike."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from attnstats.statistics import Statistic

Window = tuple[int | None, int | None]
Heads = Sequence[int] | Mapping[Any, Sequence[int]]  # by Statistic or name


class Options(NamedTuple):
    """The arguments of `attention`, `varlen_attention` and `statistics_from_lse` beside their tensors, unvalidated.

    A call with `cu_seqlens_q` is packed. The public functions document each argument; the last five are internal:

    Attributes:
        position: () int64, the query_offset of a traced call that is only known when its graph runs; None: it has none.
        dropout_seed: (1,) int64, the seed that a traced call has drawn; None: one is drawn where dropout needs it.
        prefers: the attention kernel of the backend "flash" that comes first, by name; "": the fastest.
        grows: packed sequences go on behind their last key, so boundaries of segments may lie there.
        refusal: the error of a traced call, which can only be raised when the graph runs; "": none.
    """

    statistics: Iterable[Statistic | str] = ()
    attn_mask: Tensor | None = None
    key_padding_mask: Tensor | None = None
    query_offset: int | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    max_seqlen_q: int | None = None
    max_seqlen_k: int | None = None
    is_causal: bool = True
    scale: float | None = None
    enable_gqa: bool = False
    softcap: float | None = None
    window_size: Window | None = None
    sinks: Tensor | None = None
    query_mask: Tensor | None = None
    query_weight: Tensor | None = None
    segment_boundaries: Tensor | None = None
    heads: Heads | None = None
    dropout_p: float = 0.0
    differentiable: bool = False
    backend: str = "auto"
    lse_base: str = "e"
    lse_layout: str | None = None
    check: bool = False
    position: Tensor | None = None
    dropout_seed: Tensor | None = None
    prefers: str = ""
    grows: bool = False
    refusal: str = ""


def is_packed(options: Options) -> bool:
    """Not a property: torch 2.10 can't trace one of a NamedTuple."""
    return options.cu_seqlens_q is not None


DENSE_ONLY = ("attn_mask", "key_padding_mask", "query_offset")
PACKED_ONLY = ("cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
SHARED = (
    "is_causal",
    "scale",
    "enable_gqa",
    "softcap",
    "window_size",
    "sinks",
    "query_mask",
    "query_weight",
    "segment_boundaries",
    "heads",
)


def check_names(caller: str, packed: bool, names: Iterable[str]) -> None:
    """Raise TypeError for keyword arguments that `attention` or, if packed, `varlen_attention` does not have."""
    allowed = (*SHARED, *(PACKED_ONLY if packed else DENSE_ONLY))
    for name in names:
        if name not in allowed:
            like = "varlen_attention" if packed else "attention"
            raise TypeError(f"{caller}: unknown argument {name!r}; it takes those of attnstats.{like}")
