"""Ulysses sequence parallelism: a rank holds a part of every row, and inside attention some heads of whole rows.

Frameworks exchange the parts for the heads inside the attention function whose place ours takes. One that wants its
attention read says by `set_exchange` how to exchange; `attach` and `capture` then do it around their attention, and
statistics are reduced over the ranks, as in tensor parallelism. Without it a part of a row is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class HeadExchange:
    """How the ranks of a group exchange parts of a packed row for heads, n being their number.

    Attributes:
        group: the process group; rank r gets heads r * H / n and up.
        position_ids: (1, T) of the whole row; they restart with every sequence that is packed into it.
        to_heads: (1, H, T / n, D) of each rank to (1, H / n, T, D); repeats key heads where there are fewer than ranks.
        to_rows: (1, T, H / n, D) to (1, T / n, H, D).
    """

    group: Any
    position_ids: Tensor
    to_heads: Callable[[Tensor], Tensor]
    to_rows: Callable[[Tensor], Tensor]

    @property
    def length(self) -> int:
        return self.position_ids.shape[-1]

    @property
    def segments(self) -> Tensor:
        """(1, T) int64: the number of the packed sequence that each token belongs to."""
        begins = torch.nn.functional.pad(self.position_ids.diff() != 1, (1, 0), value=False)
        return begins.cumsum(-1)


_EXCHANGE: HeadExchange | None = None


def set_exchange(exchange: HeadExchange | None) -> None:
    """Of the passes from now on, their backward included; None: each rank has whole rows."""
    global _EXCHANGE  # noqa: PLW0603
    _EXCHANGE = exchange


def current_exchange() -> HeadExchange | None:
    return _EXCHANGE
