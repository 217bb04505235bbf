"""The attention mask of a transformers model as a small description instead of a (B, 1, Tq, Tk) tensor.

`describe_mask` is the mask function registered with transformers. It takes apart the function of indices that
transformers composes (causal, sliding window, chunks, packed rows, padding), and checks its reading against that
function on a sample of rows. A mask that was made as a tensor is read by core/patterns.py, anew in every layer. A
description holds copies, so what is derived from one (`memo`) stays right, and is gone with it. Parts that neither
understands are named in the description and raise where attention is computed, not before: a model may never use it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from attnstats.core import patterns
from attnstats.core.visibility import within
from attnstats.errors import InputError
from attnstats.transformers.exchange import HeadExchange, current_exchange

MaskFunction = Callable[..., Any]

PROBED_ROWS = 8
COMPUTED_WITH = (
    "attnstats: the model computes with its attention mask instead of only handing it to its attention function, so "
    "its attention cannot be replaced; its eager attention is the way to its maps"
)


class Chunks(NamedTuple):
    """Attention within chunks of `size` tokens, counted from each batch row's first real token (Llama 4)."""

    size: int
    first: Tensor  # (B,)


class MaskIsNoTensor(InputError, AttributeError):
    """A model computes with its mask. As an AttributeError it lets `hasattr` answer False."""


@dataclass(frozen=True, eq=False)
class MaskDescription:
    """Query t sees key s, both absolute positions, where `-right <= t - s <= left` and nothing below hides it.

    Attributes:
        query_offset, key_offset: positions of the first query and of the first key; that of the query as a tensor ()
            where a static cache counts its tokens in one, so that a graph serves every step.
        query_length, key_length: the lengths that the mask was made for.
        left, right: how far behind and ahead of itself a query sees; None: no limit. Causal is right = 0.
        key_mask: (B, key_length) bool, True for real tokens; None: all are.
        attention_mask: (B, T) bool, the same from position 0 on, those included that a sliding cache has dropped.
        segments: (B, T) integers, the packed sequence that each token belongs to, queries and keys being the same
            tokens; None: a row is one sequence.
        chunks: attention stays within chunks; None: it does not.
        unknown: names of the parts that are not understood; () if the description is complete.
        dense: makes the mask itself, (B, 1, Tq, Tk) bool, where allow_dense=True.
        own: (the mask that the model's own attention function takes,), for layers that aren't captured; (): not made.
        memo: values derived from the mask that the next layer needs again.
    """

    # `generate` makes the masks of static caches in advance, calls `.contiguous()` on them, and the model then tells
    # a finished mask from a (B, T) one by its rank.
    ndim: ClassVar[int] = 4

    query_offset: int | Tensor
    key_offset: int
    query_length: int
    key_length: int
    left: int | None = None
    right: int | None = None
    key_mask: Tensor | None = None
    attention_mask: Tensor | None = None
    segments: Tensor | None = None
    chunks: Chunks | None = None
    unknown: tuple[str, ...] = ()
    dense: Callable[[], Tensor] | None = None
    own: tuple[Any, ...] = ()
    memo: dict[Any, Any] = field(default_factory=dict, repr=False)

    @property
    def used_keys(self) -> int | Tensor:
        """The number of keys up to the last one that a query sees; behind it are the unused slots of a static cache."""
        if self.right is None:
            return self.key_length
        used = self.query_offset + self.query_length + self.right - self.key_offset
        return used.clamp(max=self.key_length) if isinstance(used, Tensor) else min(self.key_length, used)

    @property
    def readable_keys(self) -> int:
        """`used_keys` where it is a number; all keys where it isn't, as queries don't see those behind."""
        used = self.used_keys
        return self.key_length if isinstance(used, Tensor) else used

    @property
    def real_queries(self) -> Tensor | None:
        """(B, Tq) bool, False where a query of self-attention is padding; None: none is."""
        if self.key_mask is None:
            return None
        start = self.query_offset - self.key_offset
        if isinstance(start, Tensor):
            index = torch.arange(self.query_length, dtype=torch.int64, device=self.key_mask.device)
            return self.key_mask[:, start + index]
        return self.key_mask[:, start : start + self.query_length]

    def placed(self) -> MaskDescription:
        """The same with a query_offset that is a number, and without what hides nothing; not in a graph."""
        if not isinstance(self.query_offset, Tensor) or is_unreadable(self.query_offset):
            return self
        if "placed" not in self.memo:
            self.memo["placed"] = _simplified(replace(self, query_offset=int(self.query_offset), memo={}))
        placed: MaskDescription = self.memo["placed"]
        return placed

    def contiguous(self) -> MaskDescription:
        return self._changed(lambda own: own.contiguous())

    def to(self, *args: Any, **kwargs: Any) -> MaskDescription:
        return self._changed(lambda own: own.to(*args, **kwargs))

    def _changed(self, change: Callable[[Tensor], Tensor]) -> MaskDescription:
        """The same with a change of the model's own mask."""
        if not any(isinstance(own, Tensor) for own in self.own):
            return self
        return replace(self, own=tuple([change(own) for own in self.own]))

    def visible(self, rows: Tensor) -> Tensor:
        """(B, len(rows), key_length) bool: the keys that the queries of these indices see."""
        query = (rows + self.query_offset)[:, None]
        key = torch.arange(self.key_length, device=rows.device, dtype=torch.int64) + self.key_offset
        distance = query - key
        window = within(distance, self.left, self.right)
        visible = (torch.ones_like(distance, dtype=torch.bool) if window is None else window)[None]
        if self.key_mask is not None:
            visible = visible & self.key_mask[:, None]
        if self.segments is not None:
            visible = visible & (self.segments[:, rows, None] == self.segments[:, None])
        if self.chunks is not None:
            first = self.chunks.first[:, None, None]
            visible = visible & ((query - first) // self.chunks.size == (key - first) // self.chunks.size)
        return visible

    def __getitem__(self, index: Any) -> MaskDescription:
        """The mask of the last queries, `mask[:, :, start:, :]`; a model may attend with these alone."""
        whole = slice(None)
        if isinstance(index, tuple) and len(index) == 4 and all(index[i] == whole for i in (0, 1, 3)):
            rows = range(self.query_length)[index[2]] if isinstance(index[2], slice) else range(0)
            if len(rows) == self.query_length:
                return self
            if rows and rows.step == 1 and self.segments is None and rows.stop == self.query_length:
                dense, start = self.dense, rows.start
                return replace(
                    self._changed(lambda own: own[index]),
                    query_offset=self.query_offset + start,
                    query_length=len(rows),
                    dense=None if dense is None else lambda: dense()[:, :, start:],
                    memo={},
                )
        return self._computed_with()

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        """Raises: a function of torch got the mask."""
        if getattr(function, "__name__", "") == "scaled_dot_product_attention":
            raise InputError(
                "attnstats: torch's scaled_dot_product_attention got the mask of a captured or attached model from "
                "outside; with gradient checkpointing call backward inside the `with`, or before detaching, and give "
                "another model that shares its config a copy of it"
            )
        raise MaskIsNoTensor(COMPUTED_WITH)

    def _computed_with(self, *_: Any, **__: Any) -> NoReturn:
        raise MaskIsNoTensor(COMPUTED_WITH)

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("_") or not hasattr(Tensor, name):
            raise AttributeError(f"MaskDescription has no attribute {name!r}")
        self._computed_with()

    __add__ = __radd__ = __mul__ = __rmul__ = __and__ = __or__ = __invert__ = __sub__ = _computed_with
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _computed_with
    __hash__ = object.__hash__


def is_unreadable(x: Tensor) -> bool:
    """True for a tensor whose numbers can't be read: in a graph, on the meta device, or of a FakeTensorMode."""
    return torch.compiler.is_compiling() or x.is_meta or isinstance(x, FakeTensor)


def is_recorded_as_torch() -> bool:
    """True while torch.jit.trace or torch.onnx.export records torch's own operators, which are all that they know."""
    return not torch.compiler.is_dynamo_compiling() and (torch._C._is_tracing() or torch.onnx.is_in_onnx_export())


def describe_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int | Tensor = 0,
    mask_function: MaskFunction | None = None,
    attention_mask: Tensor | MaskDescription | None = None,
    device: Any = "cpu",
    **settings: Any,
) -> Any:
    """The mask function registered with transformers, which calls it once per forward pass and kind of layer.

    Returns a MaskDescription, and SDPA's mask where `is_recorded_as_torch`.
    """
    from transformers.masking_utils import causal_mask_function, sdpa_mask

    if isinstance(attention_mask, MaskDescription):
        return attention_mask
    if is_recorded_as_torch():
        settings |= {"mask_function": mask_function or causal_mask_function, "q_offset": q_offset, "device": device}
        settings |= {"kv_offset": kv_offset, "attention_mask": attention_mask}
        return sdpa_mask(batch_size, q_length, kv_length, **settings)
    function = causal_mask_function if mask_function is None else mask_function
    exchange = current_exchange()
    if exchange is not None:
        return _of_whole_row(function, attention_mask, exchange)
    # A cache counts its tokens in place, and may have gone on when the mask is read.
    query_offset = q_offset.clone() if isinstance(q_offset, Tensor) else q_offset
    key_offset = int(kv_offset) if isinstance(kv_offset, Tensor) else kv_offset
    key_mask = None
    if attention_mask is None and isinstance(q_offset, Tensor):  # padded batches and others then have the same graph
        key_mask = torch.ones(batch_size, kv_length, dtype=torch.bool, device=device)
    if attention_mask is not None:
        attention_mask = attention_mask.to(torch.bool, copy=True)
        key_mask = attention_mask[:, key_offset : key_offset + kv_length]
        if key_mask.shape[1] < kv_length:
            key_mask = torch.nn.functional.pad(key_mask, (0, kv_length - key_mask.shape[1]), value=False)
        if isinstance(q_offset, Tensor):  # of one length in all steps
            attention_mask = key_mask

    def dense() -> Tensor:
        rows, keys = (
            torch.arange(q_length, device=device, dtype=torch.int64),
            torch.arange(kv_length, device=device, dtype=torch.int64),
        )
        visible = _evaluate(function, batch_size, rows + query_offset, keys + key_offset, device)
        return (visible if key_mask is None else visible & key_mask[:, None])[:, None]

    unreadable = is_unreadable(torch.empty(0, device=device, dtype=torch.bool))
    facts = _announced(settings, attention_mask, batch_size, device) if unreadable else _facts(function)
    description = MaskDescription(
        query_offset,
        key_offset,
        q_length,
        kv_length,
        key_mask=key_mask,
        attention_mask=attention_mask,
        dense=dense,
        **facts,
    )
    if unreadable:
        _check_in_graph(description, function, batch_size, device)
        return _without_one_chunk(description)
    if not description.unknown:
        _check(description, function, batch_size, device)
    # `generate` makes the mask of a static cache before it calls a compiled model. What it hides changes with every
    # step, and the graph would with it.
    return description if isinstance(query_offset, Tensor) else _simplified(description)


def _of_whole_row(function: MaskFunction, attention_mask: Tensor | None, exchange: HeadExchange) -> MaskDescription:
    """The mask of the row of which this rank has a part, for which transformers calls."""
    facts = _facts(function)
    if attention_mask is not None or "chunks" in facts or "unknown" in facts:
        raise InputError(
            "attention_mask: under Ulysses sequence parallelism only packed rows with causal or sliding-window "
            f"attention can be read, this one is of {', '.join(_names(function))}; use a sequence-parallel size of 1"
        )
    length = exchange.length
    return _simplified(MaskDescription(0, 0, length, length, **facts | {"segments": exchange.segments}))


def describe_no_mask(query_length: int, key_length: int, is_causal: bool) -> MaskDescription:
    """The meaning of no mask, by SDPA's convention: causal aligned top left, or nothing hidden from a single query."""
    if is_causal and query_length > 1:
        return MaskDescription(0, 0, query_length, key_length, right=0)
    return MaskDescription(max(0, key_length - query_length), 0, query_length, key_length)


def describe_tensor(mask: Tensor, query_length: int, key_length: int, is_causal: bool = False) -> MaskDescription:
    """The description of a mask that was made as a tensor, (B | 1, H | 1, Tq, Tk), bool or additive.

    Where attention is causal, a single query stands at the last key that it sees.
    """
    last = max(0, key_length - query_length)
    pattern = None
    if mask.dim() == 4 and mask.shape[-2] in (1, query_length) and mask.shape[-1] >= key_length:
        hidden = 0.0 if mask.dtype == torch.bool else min(-1e4, torch.finfo(mask.dtype).min / 2)
        pattern = patterns.recognise(mask[..., :key_length], query_length, hidden=hidden)
    unknown = () if pattern is not None else (f"{tuple(mask.shape)} that was passed as a tensor",)
    key_mask, query_offset, left, right = patterns.MaskPattern() if pattern is None else pattern
    if query_length == 1 and is_causal and key_mask is not None and bool(key_mask.any()):
        query_offset, left, right = int(key_mask.any(0).nonzero()[-1]), None, 0
    if query_offset is None:
        query_offset = last
    return MaskDescription(
        query_offset,
        0,
        query_length,
        key_length,
        left,
        right,
        key_mask,
        key_mask,
        unknown=unknown,
        dense=lambda: mask[..., :key_length],
    )


def _simplified(description: MaskDescription) -> MaskDescription:
    """Without padding, packed rows and chunks that hide nothing, and without a left side beyond every key."""
    changes: dict[str, Any] = {}
    key_mask, segments, chunks = description.key_mask, description.segments, description.chunks
    if key_mask is not None and bool(key_mask[:, : description.readable_keys].all()):
        changes["key_mask"] = None
    if segments is not None and bool((segments == segments[:, :1]).all()):
        changes["segments"] = None
    last = description.query_offset + description.query_length - 1
    if chunks is not None and last - int(chunks.first.min()) < chunks.size:
        changes["chunks"] = None
    if description.left is not None and last - description.key_offset <= description.left:
        changes["left"] = None
    return replace(description, **changes) if changes else description


def _without_one_chunk(description: MaskDescription) -> MaskDescription:
    """In a graph: without chunks that are longer than all keys, which hide nothing."""
    chunks = description.chunks
    short = chunks is not None and description.key_offset + description.key_length <= chunks.size
    return replace(description, chunks=None) if short else description


# In a graph no function can be taken apart: what transformers announces beside it is checked where the graph runs.


def _announced(settings: dict[str, Any], attention_mask: Tensor | None, batch: int, device: Any) -> dict[str, Any]:
    """left, right and chunks by the settings that transformers gives a mask function besides."""
    size, config = settings.get("local_size"), settings.get("config")
    full = "allow_is_bidirectional_skip" in settings
    if size is None:
        return {} if full else {"right": 0}
    if full or getattr(config, "attention_chunk_size", None) != size:
        return {"left": size, "right": size} if full else {"left": size - 1, "right": 0}
    first = torch.zeros(batch, dtype=torch.long, device=device)
    if attention_mask is not None:  # chunks are counted from the first real token
        first = (attention_mask.cumsum(-1) == 0).sum(-1)
    return {"right": 0, "chunks": Chunks(size, first)}


def _check_in_graph(description: MaskDescription, function: MaskFunction, batch: int, device: Any) -> None:
    # The last row among them: packed rows, full chunks and the like hide most from it.
    last = description.query_length - 1
    rows = torch.arange(4, device=device, dtype=torch.int64) * last // 3
    torch._assert_async(
        _agree(description, function, batch, rows),
        "attnstats: in a compiled model only causal, full, chunked and sliding-window attention can be described; "
        "packed position_ids and masks of the model's own can not: do not compile it",
    )


# Taking mask functions apart


def _facts(function: MaskFunction) -> dict[str, Any]:
    """left, right, segments, chunks of a composed mask function, and the names of unknown parts."""
    # By name: the functions are closures, made anew in every forward pass.
    name = getattr(function, "__qualname__", repr(function)).removesuffix(".<locals>.inner_mask")
    code = getattr(function, "__code__", None)
    cells = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    held = dict(zip(code.co_freevars, cells, strict=True)) if code is not None else {}
    if name == "causal_mask_function":
        return {"right": 0}
    if name == "bidirectional_mask_function":
        return {}
    if name == "sliding_window_overlay":
        return {"left": held["sliding_window"] - 1}
    if name == "sliding_window_bidirectional_overlay":
        return {"left": held["sliding_window"], "right": held["sliding_window"]}
    if name == "chunked_overlay":
        return {"chunks": Chunks(held["chunk_size"], held["left_padding"])}
    if name == "packed_sequence_mask_function":
        return {"segments": held["packed_sequence_mask"]}
    if name == "remap_positions_for_packed_sequence":  # within a sequence positions differ as indices do
        return _facts(held["mask_function"])
    if name.startswith("and_masks.<locals>"):
        return functools.reduce(_both, (_facts(part) for part in held["mask_functions"]))
    if name.startswith("or_masks.<locals>"):
        parts = [part for part in held["mask_functions"] if not _is_empty_overlay(part)]
        if len(parts) == 1:
            return _facts(parts[0])
    return {"unknown": tuple(_names(function))}


def _is_empty_overlay(function: MaskFunction) -> bool:
    """True for an overlay of blocks that see each other where this input has no such block."""
    if not getattr(function, "__qualname__", "").startswith("blockwise_overlay"):
        return False
    held: Any = function
    return bool((held.__closure__[0].cell_contents < 0).all())


def _both(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    merged = a | b
    for side in ("left", "right"):
        if side in a and side in b:
            merged[side] = min(a[side], b[side])
    if any(part in a and part in b for part in ("segments", "chunks")):
        merged["unknown"] = ("two kinds of blocks",)
    if "unknown" in a and "unknown" in b:
        merged["unknown"] = a["unknown"] + b["unknown"]
    return merged


def _names(function: MaskFunction) -> list[str]:
    """The names of the functions that a composed mask is made of."""
    cells = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    parts = [part for cell in cells for part in (cell if isinstance(cell, tuple) else (cell,)) if callable(part)]
    if not parts:
        return [getattr(function, "__qualname__", repr(function)).removesuffix(".<locals>.inner_mask")]
    return [name for part in parts for name in _names(part)]


def _evaluate(function: MaskFunction, batch: int, queries: Tensor, keys: Tensor, device: Any) -> Tensor:
    """(B, len(queries), len(keys)) bool, the mask function at these positions."""
    rows = torch.arange(batch, device=device, dtype=torch.int64)[:, None, None]
    head = torch.zeros((), dtype=torch.long, device=device)
    visible = function(rows, head, queries[None, :, None], keys[None, None, :])
    return visible.expand(batch, queries.shape[0], keys.shape[0]).bool()  # len() would be a constant in an export


def _agree(description: MaskDescription, function: MaskFunction, batch: int, rows: Tensor) -> Tensor:
    """() bool: on these rows the description, without its key mask, shows the keys that the mask function shows."""
    keys = torch.arange(description.key_length, device=rows.device, dtype=torch.int64) + description.key_offset
    expected = _evaluate(function, batch, rows + description.query_offset, keys, rows.device)
    # Not ==: Inductor cannot bound a comparison of bools one of which is the same everywhere.
    return ~(replace(description, key_mask=None).visible(rows) ^ expected).any()


_CHECKED: set[tuple[Any, ...]] = set()


def _check(description: MaskDescription, function: MaskFunction, batch: int, device: Any) -> None:
    """Compare with the mask function itself on a few rows; steps of decoding only the first time."""
    chunk_size = description.chunks and description.chunks.size
    reading = tuple(_names(function)), description.left, description.right, chunk_size
    if description.query_length == 1 and reading in _CHECKED:
        return
    rows = (
        torch.linspace(0, description.query_length - 1, PROBED_ROWS, dtype=torch.float64, device="cpu").round().long()
    )
    if not bool(_agree(description, function, batch, rows.unique().to(device))):
        raise RuntimeError(
            f"attnstats misread the attention mask {' with '.join(_names(function))} of this version of transformers; "
            "please report it, and use the model's eager attention meanwhile"
        )
    _CHECKED.add(reading)
