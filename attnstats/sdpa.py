"""Recording statistics of calls of `torch.nn.functional.scaled_dot_product_attention`.

For models outside transformers: inside the `with`, `patch_sdpa` replaces that function by one that calls
`attnstats.attention`. Calls are numbered; the caller knows which layer made which. `capture` is for transformers
models.
"""

from __future__ import annotations

import operator
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.nn import functional

from attnstats._operators import refuse_script, refuse_trace
from attnstats.core.arguments import refuse_distances
from attnstats.core.finite_masks import FINITE, recognise_finite
from attnstats.core.geometry import as_autocast
from attnstats.core.options import Heads, Options
from attnstats.core.patterns import CAUSAL, MaskPattern, allow_whole_map, is_causal_bias, read_causal_bias, recognise
from attnstats.functional import Backend, attend
from attnstats.results import Statistics
from attnstats.statistics import PooledMap, Statistic, refuse_boundaries_of_the_call, resolve
from attnstats.tensors import check_plain

Calls = Iterable[int] | Callable[[Tensor, Tensor], bool]

_ACTIVE = threading.Lock()  # the function is one for the whole process


@dataclass
class Run(Sequence[Statistics]):
    """The recorded calls in the order in which they were made; `patch_sdpa` makes it.

    Attributes:
        indices: of each recorded call, its number among all calls, from 0.
        calls: how many calls there were, recorded or not.
    """

    statistics: tuple[Statistic, ...]
    indices: list[int] = field(default_factory=list)
    calls: int = 0
    _recorded: list[Statistics] = field(default_factory=list, repr=False)

    @overload
    def __getitem__(self, index: int) -> Statistics: ...
    @overload
    def __getitem__(self, index: slice) -> list[Statistics]: ...
    def __getitem__(self, index: int | slice) -> Statistics | list[Statistics]:
        if isinstance(index, int) and not -len(self) <= index < len(self):
            raise IndexError(
                f"{index}: {len(self)} of {self.calls} calls of scaled_dot_product_attention were recorded"
            )
        return self._recorded[index]

    def __len__(self) -> int:
        return len(self._recorded)

    def clear(self) -> None:
        """Forget what was recorded and count calls from 0, for the next forward pass."""
        self.indices.clear()
        self._recorded.clear()
        self.calls = 0


@contextmanager
def patch_sdpa(
    *,
    statistics: Iterable[Statistic | str],
    calls: Calls | None = None,
    heads: Heads | None = None,
    reduce: Literal["heads"] | None = None,
    device: torch.device | str | None = None,
    backend: Backend = "auto",
    allow_dense: bool = False,
) -> Iterator[Run]:
    """Record statistics of every call of `torch.nn.functional.scaled_dot_product_attention` inside the `with`.

    Outputs and gradients are SDPA's: its alignment of causal masks (query i sees keys j <= i), masks, the causal biases
    of torch.nn.attention.bias, scale, dropout, grouped heads, autocast and any number of batch dimensions. What SDPA
    refuses raises the same type of error, and so does a mask beside is_causal=True, which some of its kernels take.
    Statistics have the call's own leading dimensions: rows (..., H, Tq), columns (..., H, Tk). Queries and keys share
    positions where the call is causal or Tq = Tk; then keys that a mask hides from every query are padding, and no
    queries either. Calls in a backward pass (gradient checkpointing) are not recorded again; that `backward` belongs
    inside the `with`.

    What goes another way isn't recorded, and if nothing was, leaving the `with` warns: eager attention,
    nn.MultiheadAttention with need_weights=True, compiled graphs, TorchScript, modules that did
    `from torch.nn.functional import scaled_dot_product_attention` before. The fast path of nn.TransformerEncoder is off
    meanwhile. The patch holds for the whole process: calls of other threads are recorded too, a second patch is
    an error.

    Args:
        statistics: as for `attnstats.attention`.
        calls: which calls to record, by number from 0, or as a function of (query, key), such as
            `lambda query, key: query.shape[-2] == key.shape[-2]`; the others go to torch as they are. Default: all.
        heads: as for `attnstats.attention`, the same in every call.
        reduce: "heads" keeps the mean over the heads, of the lse too, instead of each head's.
        device: keep results there, such as "cpu"; default: where they were computed.
        backend: as for `attnstats.attention`.
        allow_dense: let masks that are neither causal nor over keys through `backend="reference"`, in O(Tq * Tk)
            memory and with a warning; without it they are an error.

    Yields:
        A sequence of `Statistics`, one for each recorded call: `run[3]["waad"]`, `len(run)`, `run.clear()`.

    Raises:
        TypeError, ValueError: naming the argument, what came and what would work; from a call for what shows only
            there. RuntimeError: a patch is active already.

    Example:
        >>> import torch, attnstats
        >>> layer = torch.nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval()
        >>> with attnstats.patch_sdpa(statistics=["entropy"]) as run:
        ...     output = torch.nn.TransformerEncoder(layer, 2)(torch.randn(1, 12, 32))
        >>> len(run), run[1]["entropy"].shape
        (2, torch.Size([1, 4, 12]))
    """
    statistics = resolve(statistics)
    if not statistics:
        raise ValueError("statistics is empty; name what to record, such as ['waad', 'fai']")
    refuse_boundaries_of_the_call(statistics, "patch_sdpa")
    for s in (s for s in statistics if reduce is not None and not s.averages):
        raise ValueError(f"reduce={reduce!r}: {s} names keys, of which there is no mean; record it without reduce")
    if reduce not in (None, "heads"):
        raise ValueError(f"reduce must be 'heads' or None, got {reduce!r}")
    is_recorded = _selection(calls)
    original = functional.scaled_dot_product_attention
    run = Run(statistics)
    called = False

    def scaled_dot_product_attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """As torch has it, and recorded by `attnstats.patch_sdpa`."""
        nonlocal called
        called = True
        repeated = torch._C._current_graph_task_id() != -1  # in a backward pass, by gradient checkpointing
        index = None if repeated else run.calls
        run.calls += not repeated
        if not is_recorded(index, query, key):
            return original(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        refuse_trace()
        options = Options(
            statistics=() if repeated else run.statistics,
            heads=None if repeated else heads,
            dropout_p=dropout_p,
            scale=scale,
            enable_gqa=enable_gqa,
            backend=backend,
        )
        try:
            output, results = _attend(query, key, value, attn_mask, is_causal, options, allow_dense, original)
        except (TypeError, ValueError) as error:
            torchs = _error_of_torch(original, (query, key, value, attn_mask), dropout_p, is_causal, scale, enable_gqa)
            if torchs in (None, type(error)):
                raise
            raise torchs(str(error)) from error
        if index is not None:
            run.indices.append(index)
            run._recorded.append(_reduced(results, reduce is not None, device))
        return output

    if not _ACTIVE.acquire(blocking=False):
        raise RuntimeError("patch_sdpa: a patch is active already, in this thread or another; there can be only one")
    fast_path = torch.backends.mha.get_fastpath_enabled()
    try:
        functional.scaled_dot_product_attention = refuse_script(scaled_dot_product_attention)
        torch.backends.mha.set_fastpath_enabled(False)  # it computes attention without a call of SDPA
        yield run
    finally:
        functional.scaled_dot_product_attention = original
        torch.backends.mha.set_fastpath_enabled(fast_path)
        _ACTIVE.release()
    if not called:
        warnings.warn(
            "patch_sdpa: nothing called torch.nn.functional.scaled_dot_product_attention inside the `with`; the model "
            "attends in another way, was compiled, or imported the function by name before",
            stacklevel=3,
        )


def _selection(calls: Calls | None) -> Callable[[int | None, Tensor, Tensor], bool]:
    """A function of a call's number (None for a repeated call), query and key that is True for calls to record."""
    if calls is None:
        return lambda index, query, key: True
    if callable(calls):
        return lambda index, query, key: bool(calls(query, key))
    numbers: Any = calls
    listed = list(numbers) if isinstance(numbers, Iterable) and not isinstance(numbers, str) else None
    if listed is None or not all(hasattr(i, "__index__") and not isinstance(i, bool) and i >= 0 for i in listed):
        raise TypeError(f"calls must be None, numbers from 0 or a function of (query, key), got {calls!r}")
    indices = set(map(operator.index, listed))

    def is_listed(index: int | None, query: Tensor, key: Tensor) -> bool:
        if index is None:
            raise RuntimeError(
                "calls: a backward pass repeats calls (gradient checkpointing), and their numbers are not known then; "
                "pass a function of (query, key), or None"
            )
        return index in indices

    return is_listed


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    options: Options,
    allow_dense: bool,
    original: Callable[..., Tensor],
) -> tuple[Tensor, Statistics]:
    """SDPA's arguments as those of `attnstats.attention`, and its result in SDPA's shapes."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        check_plain(**{name: x})
        if x.dim() < 2:
            raise ValueError(f"{name} must have the dimensions (..., heads, length, head_dim), got {tuple(x.shape)}")
    if not isinstance(is_causal, bool):
        raise TypeError(f"is_causal must be True or False, got {is_causal!r}")
    if attn_mask is not None and is_causal:
        raise ValueError(
            "attn_mask and is_causal=True exclude each other, as torch documents; put the causal part into the mask"
        )
    bias = read_causal_bias(attn_mask, query.shape[-2], key.shape[-2])
    attn_mask = None if bias is not None else attn_mask
    query, key, value, attn_mask = as_autocast(query, key, value, attn_mask)
    if attn_mask is not None:
        _check_mask(attn_mask, query)
    query_length, key_length, statistics = query.shape[-2], key.shape[-2], resolve(options.statistics)
    if 0 in (*query.shape, *key.shape, *value.shape):
        arguments = {"scale": options.scale, "enable_gqa": options.enable_gqa}
        output = original(query, key, value, attn_mask, options.dropout_p, is_causal, **arguments)
        return output, _empty(statistics, output, key_length)
    flat, batch = _flatten(query, key, value, options.enable_gqa)

    pattern, dense_mask = bias or (CAUSAL if is_causal else MaskPattern()), None
    if attn_mask is not None:
        pattern, dense_mask = _read_mask(attn_mask, flat[0], flat[1], batch, options.scale, allow_dense)
    if pattern.query_offset is None and query_length != key_length:
        refuse_distances(
            statistics,
            f"in this call Tq={query_length}, Tk={key_length} without a causal mask, as in cross-attention, share no "
            "positions; leave such calls out with calls=lambda query, key: query.shape[-2] == key.shape[-2]",
        )
    options = options._replace(
        attn_mask=dense_mask,
        key_padding_mask=pattern.key_mask,
        is_causal=pattern.right == 0,
        window_size=(pattern.left, pattern.right),
        query_offset=pattern.query_offset,
        backend=options.backend if dense_mask is None else "reference",
    )
    output, results = attend(*flat, options)

    if max(query.dim(), key.dim(), value.dim()) == 2:  # neither batch dimensions nor heads
        return output[0, 0], results.changed(lambda s, x: x[0, 0], lambda s, x: x[0])
    return output.reshape(*batch, *output.shape[1:]), results.changed(lambda s, x: x.reshape(*batch, *x.shape[1:]))


def _flatten(
    query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[int, ...]]:
    """As (B, H, T, D), without copies where strides allow it, and the batch dimensions that became B."""
    tensors = [x[None] if x.dim() == 2 else x for x in (query, key, value)]
    batch = torch.broadcast_shapes(*(x.shape[:-3] for x in tensors))
    heads = [x.shape[-3] for x in tensors]
    if not enable_gqa:  # a single head goes with any number, as batch dimensions do
        heads = [max(heads) if count == 1 else count for count in heads]
    tensors = [x.expand(*batch, h, *x.shape[-2:]) for x, h in zip(tensors, heads, strict=True)]
    return tuple(x.reshape(-1, *x.shape[-3:]) for x in tensors), tuple(batch)  # type: ignore[return-value]


def _check_mask(mask: Any, query: Tensor) -> None:
    if not isinstance(mask, Tensor):
        raise TypeError(f"attn_mask must be a tensor, got {type(mask).__name__}")
    check_plain(attn_mask=mask)
    if mask.dtype not in (torch.bool, torch.float32, query.dtype):
        raise TypeError(f"attn_mask must be bool, float32 or query's dtype {query.dtype}, got {mask.dtype}")
    if mask.device != query.device:
        raise ValueError(f"attn_mask must be on query's device {query.device}, got {mask.device}")


def _error_of_torch(
    original: Callable[..., Tensor],
    tensors: tuple[Any, ...],
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> type[Exception] | None:
    """The type of error that torch raises for a call, found without its numbers; None: torch takes it."""
    query, key, value, attn_mask = tensors
    bias = is_causal_bias(attn_mask)
    try:
        check_plain(query=query, key=key, value=value, attn_mask=None if bias else attn_mask)
    except TypeError:  # torch takes some of these
        return None
    if len({x.device for x in tensors if isinstance(x, Tensor)}) > 1:
        return RuntimeError
    if attn_mask is not None and is_causal is True:  # refused by some of torch's kernels only
        return ValueError if bias else RuntimeError
    try:
        meta = [x if (bias and x is attn_mask) or not isinstance(x, Tensor) else x.detach().to("meta") for x in tensors]
        original(*meta, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    except Exception as error:
        return next(
            (kind for kind in (RuntimeError, TypeError, ValueError, IndexError) if isinstance(error, kind)), None
        )
    return None


def _read_mask(
    mask: Tensor, query: Tensor, key: Tensor, batch: tuple[int, ...], scale: float | None, allow_dense: bool
) -> tuple[MaskPattern, Tensor | None]:
    """The pattern of an SDPA mask, with a key mask (B, Tk).

    A mask with another pattern is returned besides, as (B, H | 1, Tq, Tk).
    """
    if mask.dim() < 2:
        raise ValueError(f"attn_mask must broadcast to (..., heads, Tq, Tk), got {tuple(mask.shape)}")
    while mask.dim() < len(batch) + 3:
        mask = mask[None]
    key_length = key.shape[2]
    shape = (*batch, *query.shape[1:3], key_length)
    if mask.dim() > len(shape) or any(a not in (1, b) for a, b in zip(mask.shape, shape, strict=True)):
        raise ValueError(f"attn_mask must broadcast to {shape}, got {tuple(mask.shape)}")
    mask = mask.expand(*mask.shape[:-1], key_length)
    recognised = recognise(mask, query.shape[2])
    if recognised is None:
        recognised = recognise_finite(mask, query, key, scale)
    if recognised is not None:
        key_mask = recognised.key_mask
        if key_mask is not None:
            key_mask = key_mask.expand(*batch, key_length).reshape(-1, key_length)
        return recognised._replace(key_mask=key_mask), None
    allow_whole_map("attn_mask", mask, allow_dense, where="" if mask.dtype == torch.bool else FINITE, stacklevel=4)
    mask = mask.expand(*batch, *mask.shape[-3:]).reshape(-1, *mask.shape[-3:])
    return MaskPattern(), mask if mask.dtype == torch.bool else mask.to(query.dtype)


def _empty(statistics: tuple[Statistic, ...], output: Tensor, key_length: int) -> Statistics:
    """The statistics of a call without queries, keys or batch rows."""
    lead, query_length = output.shape[:-2], output.shape[-2]
    accumulator = torch.float64 if output.dtype == torch.float64 else torch.float32
    for statistic in statistics:
        if isinstance(statistic, PooledMap):
            statistic.boundaries(query_length, key_length)

    def zeros(lead: tuple[int, ...], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.zeros(*lead, *shape, dtype=dtype, device=output.device)

    def placeholder(statistic: Statistic) -> tuple[int, ...]:
        shape = statistic.shape(query_length, key_length)
        return shape[: len(shape) - statistic.per_query]

    lse = zeros(lead, (query_length,), accumulator) - torch.inf
    tensors = {s: zeros(lead, s.shape(query_length, key_length), accumulator) for s in statistics}
    for s, x in tensors.items():
        if s.method == "lse":
            x.copy_(lse)
        elif s.method == "top":
            x[..., 1, :] = -1.0
    return Statistics(
        tensors,
        lambda s: zeros(lead[:-1], placeholder(s), torch.bool),
        lambda s: zeros(lead[:-1], placeholder(s), torch.int64),
        lse,
    )


def _reduced(results: Statistics, over_heads: bool, device: torch.device | str | None) -> Statistics:
    """The results as they are recorded: if over_heads their mean over heads, and on the device."""

    def reduced(statistic: Statistic, x: Tensor) -> Tensor:
        heads = -3 if statistic.axis == "map" else -2 - statistic.per_query
        return (x.mean(heads) if over_heads and x.dim() >= -heads else x).to(device)

    return results.changed(reduced, lambda s, x: x.to(device)) if over_heads or device is not None else results
