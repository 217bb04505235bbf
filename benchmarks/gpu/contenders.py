"""Contenders on a GPU: attention alone, attention with WAAD(10) and FAI(10, 100), and statistics from an lse.

Every contender is a plain function of `Inputs`, causal, grouped heads un-repeated; where one has to repeat them
that is part of its time. What depends on the shape alone (block masks, distance weights) is prepared once and not
timed. Rivals are written as their users would: compiled where that is faster, half precision where the maths
allows. Settings, eager attention and its chunked form are those of benchmarks/contenders.py. The attention
kernels of others are those of attnstats.flash; `PROVIDERS` has their names in SDPA.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import unittest.mock
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import attention
from torch.nn.attention import SDPBackend, flex_attention, sdpa_kernel
from torch.nn.functional import pad, scaled_dot_product_attention

import attnstats
from attnstats import Received
from attnstats.flash import providers
from attnstats.triton.configs import describing
from benchmarks import contenders
from benchmarks.contenders import CHUNK, HI, LO, STATISTICS, WINDOW, Answer, repeated

BLOCK = 128  # rows of a block of the plain band
FLEX = 2**15  # tokens up to which create_block_mask, which goes through a T x T mask, is no burden


class Inputs(NamedTuple):
    query: Tensor  # [B, Hq, Tq, D]
    key: Tensor  # [B, Hkv, Tk, D]
    value: Tensor
    lse: Tensor | None = None  # [B, Hq, Tq], what the groups "band" and "column" start from


class Contender(NamedTuple):
    group: str  # attention, statistics, band, column
    run: Callable[[Any], Answer]  # given Inputs or Packed
    ours: bool = False
    device: str = ""  # the only type of device that it runs on
    around: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
    compiled: bool = False  # by torch.compile, for each shape anew
    longest: int = 2**17  # tokens
    square: bool = True  # needs as many queries as keys
    many: bool = False  # takes part in every case, not only in those of all rivals

    def runs_on(self, device: torch.device) -> bool:
        return self.device in ("", device.type)


def _group(inputs: Inputs) -> int:
    return inputs.query.shape[1] // inputs.key.shape[1]


def counts(inputs: Inputs) -> Tensor:
    """[Tk] queries at distance LO..HI of each key, at least 1."""
    return contenders.counts(inputs.query.shape[2], inputs.key.shape[2], inputs.query.device)


# torch's kernels


def sdpa(inputs: Inputs) -> Answer:
    query, key, value, _ = inputs
    causal = query.shape[2] > 1  # its mask is aligned top left: a single query would see one key
    return Answer(scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=_group(inputs) > 1))


def sdpa_repeated(inputs: Inputs) -> Answer:
    """For a backend that takes no grouped heads."""
    query, key, value = inputs.query, repeated(inputs.key, inputs.query), repeated(inputs.value, inputs.query)
    return Answer(scaled_dot_product_attention(query, key, value, is_causal=query.shape[2] > 1))


class Provider(NamedTuple):
    """How SDPA runs one of the attention kernels of attnstats.flash."""

    backend: str
    attend: Callable[[Any], Answer] = sdpa
    implementation: str | None = None  # of SDPA's flash backend, to be activated
    device: str = "cuda"


PROVIDERS = {
    providers.FLASH_2.name: Provider("FLASH_ATTENTION"),
    providers.FLASH_3.name: Provider("FLASH_ATTENTION", implementation="FA3"),
    providers.FLASH_4.name: Provider("FLASH_ATTENTION", implementation="FA4"),
    providers.CUDNN_ATTENTION.name: Provider("CUDNN_ATTENTION"),
    providers.EFFICIENT.name: Provider("EFFICIENT_ATTENTION", sdpa_repeated),
    providers.CPU.name: Provider("FLASH_ATTENTION", device="cpu"),
}


@contextlib.contextmanager
def alone(name: str) -> Iterator[None]:
    """SDPA and the backend flash with this provider and no other; an ImportError where it is not installed."""
    provider = PROVIDERS[name]
    others = ",".join(other for other in PROVIDERS if other != name)
    activated = _activated(provider.implementation) if provider.implementation else contextlib.nullcontext()
    without_others = unittest.mock.patch.dict(os.environ, {providers.LEFT_OUT: others})
    with without_others, activated, sdpa_kernel(getattr(SDPBackend, provider.backend)):
        yield


@contextlib.contextmanager
def _activated(implementation: str) -> Iterator[None]:
    if not hasattr(attention, "restore_flash_attention_impl"):
        raise ImportError(f"this torch has no way to {implementation}")
    attention.activate_flash_attention_impl(implementation)
    try:
        yield
    finally:
        attention.restore_flash_attention_impl()


# Ours


def ours(inputs: Inputs, *, statistics: tuple[Any, ...] = STATISTICS, backend: Any = "auto") -> Answer:
    query, key, value, _ = inputs
    output, stats = attnstats.attention(
        query, key, value, statistics=statistics, enable_gqa=_group(inputs) > 1, backend=backend
    )
    return Answer(output, *((stats["waad"], stats["fai"]) if statistics else ()))


def _from_lse(inputs: Inputs, statistics: tuple[Any, ...], backend: Any) -> Any:
    assert inputs.lse is not None
    return attnstats.statistics_from_lse(
        inputs.query, inputs.key, inputs.lse, statistics=statistics, enable_gqa=_group(inputs) > 1, backend=backend
    )


def band(inputs: Inputs) -> Answer:
    stats = _from_lse(inputs, STATISTICS, "triton")
    return Answer(None, stats["waad"], stats["fai"])


def column(inputs: Inputs) -> Answer:
    return Answer(received=_from_lse(inputs, (Received(),), "triton")["received"])


# Plain PyTorch


def eager(inputs: Inputs) -> Answer:
    return contenders.eager(*inputs[:3])


def chunked(inputs: Inputs) -> Answer:
    return contenders.chunked(*inputs[:3])


def chunked_column(inputs: Inputs) -> Answer:
    """exp(score - lse) for CHUNK query rows at a time, summed."""
    query, lse, length = inputs.query, inputs.lse, inputs.query.shape[2]
    assert lse is not None
    key = repeated(inputs.key, query)
    received = query.new_zeros(query.shape[:3], dtype=torch.float32)
    for start in range(0, length, CHUNK):
        end = min(start + CHUNK, length)
        scores = query[:, :, start:end] @ key[:, :, :end].mT * query.shape[3] ** -0.5
        weights = (scores.float() - lse[:, :, start:end, None]).exp_()
        weights[..., start:].tril_()
        received[:, :, :end] += weights.sum(-2)
    return Answer(received=received)


def _plain_band(query: Tensor, key: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """WAAD and the sums of FAI: blocks of rows times the windows of keys that they can reach, O(T)."""
    batch, heads, length, dim = query.shape
    key_heads = key.shape[1]
    group, blocks = heads // key_heads, -(-length // BLOCK)
    spare = blocks * BLOCK - length
    rows = pad(query, (0, 0, 0, spare)).view(batch, key_heads, group, blocks, BLOCK, dim).transpose(2, 3)
    windows = pad(key, (0, 0, HI, spare)).unfold(2, BLOCK + HI, BLOCK)  # [B, Hkv, blocks, D, BLOCK + HI]
    scores = rows.reshape(batch, key_heads, blocks, group * BLOCK, dim) @ windows * dim**-0.5
    scores = scores.view(batch, key_heads, blocks, group, BLOCK, BLOCK + HI)
    pivot = pad(lse, (0, spare), value=torch.inf).view(batch, key_heads, group, blocks, BLOCK).transpose(2, 3)
    row, place = torch.arange(BLOCK, device=query.device)[:, None], torch.arange(BLOCK + HI, device=query.device)
    distance = row + HI - place
    starts = torch.arange(blocks, device=query.device)[:, None] * BLOCK
    real = (starts + place >= HI)[:, None, None]  # [blocks, 1, 1, BLOCK + HI]: not before the first key
    weights = torch.where(real & (distance >= 0), (scores.float() - pivot[..., None]).exp(), 0.0)
    waad = WINDOW - (weights * (WINDOW - distance).clamp(0, WINDOW)).sum(-1)
    sums = (weights * ((distance >= LO) & (distance <= HI))).sum(-2)  # [B, Hkv, blocks, group, BLOCK + HI]
    # The first HI places of a window are the last ones of the block before it.
    own, spill = sums[..., HI:], pad(sums[:, :, 1:, :, :HI], (BLOCK - HI, 0, 0, 0, 0, 1))
    by_head = (x.transpose(2, 3).reshape(batch, heads, -1)[..., :length] for x in (waad, own + spill))
    first, second = by_head
    return first, second


# FlexAttention: statistics as log-sum-exps of passes with other scores.


@functools.lru_cache(maxsize=3)
def _block_mask(kind: str, length: int, device: torch.device) -> Any:
    visible: Any = {
        "causal": lambda b, h, t, s: s <= t,
        "near": lambda b, h, t, s: (s <= t) & (s > t - WINDOW),
        "horizon": lambda b, h, s, t: (t >= s + LO) & (t <= s + HI),
        "later": lambda b, h, s, t: t >= s,
    }[kind]
    return flex_attention.create_block_mask(visible, None, None, length, length, device=str(device))


def _with_lse(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Output and lse. Older torch has no AuxRequest."""
    if hasattr(flex_attention, "AuxRequest"):
        request = flex_attention.AuxRequest(lse=True)
        output, aux = flex_attention.flex_attention(*args, **kwargs, return_aux=request)
        return output, aux.lse
    return flex_attention.flex_attention(*args, **kwargs, return_lse=True)  # type: ignore[call-overload]


def _flex_forward(query: Tensor, key: Tensor, value: Tensor, blocks: Any) -> tuple[Tensor, Tensor]:
    return _with_lse(query, key, value, block_mask=blocks, enable_gqa=query.shape[1] != key.shape[1])


def _flex_waad(query: Tensor, key: Tensor, thin: Tensor, lse: Tensor, blocks: Any) -> Tensor:
    """WAAD = W - exp(lse' - lse), lse' over the window with scores + log(W - d)."""

    def log_weighted(score: Tensor, b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return score + (WINDOW - t + s).clamp(min=1).float().log()

    gqa = query.shape[1] != key.shape[1]
    _, windowed = _with_lse(query, key, thin, score_mod=log_weighted, block_mask=blocks, enable_gqa=gqa)
    return WINDOW - (windowed - lse).exp()


def _flex_columns(query: Tensor, key: Tensor, thin: Tensor, lse: Tensor, blocks: Any) -> Tensor:
    """Sums of A over the queries that `blocks` shows each key: query and key swapped, scores less the query's lse."""

    def normalised(score: Tensor, b: Tensor, h: Tensor, s: Tensor, t: Tensor) -> Tensor:
        return score - lse[b, h, t]

    _, reverse = _with_lse(key, query, thin, score_mod=normalised, block_mask=blocks)
    return reverse.exp()


@functools.cache
def _by_inductor(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False)


def _compiled(function: Callable[..., Any], like: Tensor) -> Callable[..., Any]:
    """For the shape at hand on a GPU; elsewhere as it is."""
    return _by_inductor(function) if like.is_cuda else function


def _thin(like: Tensor) -> Tensor:
    """Values as narrow as FlexAttention's kernels take them: nothing is read off them."""
    return like.new_ones(*like.shape[:3], 16)


def flex(inputs: Inputs) -> Answer:
    query, key, value, _ = inputs
    blocks = _block_mask("causal", query.shape[2], query.device)
    output, lse = _compiled(_flex_forward, query)(query, key, value, blocks)
    return flex_band(inputs._replace(lse=lse))._replace(output=output)


def flex_band(inputs: Inputs) -> Answer:
    query, key, _, lse = inputs
    near, horizon = (_block_mask(kind, query.shape[2], query.device) for kind in ("near", "horizon"))
    waad = _compiled(_flex_waad, query)(query, key, _thin(key), lse, near)
    fai = _compiled(_flex_columns, query)(query, repeated(key, query), _thin(query), lse, horizon)
    return Answer(None, waad, fai / counts(inputs))


def flex_column(inputs: Inputs) -> Answer:
    query, key, _, lse = inputs
    later = _block_mask("later", query.shape[2], query.device)
    return Answer(received=_compiled(_flex_columns, query)(query, repeated(key, query), _thin(query), lse, later))


def plain_band(inputs: Inputs) -> Answer:
    waad, sums = _compiled(_plain_band, inputs.query)(inputs.query, inputs.key, inputs.lse)
    return Answer(None, waad, sums / counts(inputs))


def plain_beside(inputs: Inputs) -> Answer:
    query, key, value, _ = inputs
    output, stats = attnstats.attention(query, key, value, enable_gqa=_group(inputs) > 1, backend="flash")
    return plain_band(inputs._replace(lse=stats.lse))._replace(output=output)


def missing(contender: Contender) -> str | None:
    """Why a contender can't run where its library is not installed, or None."""
    try:
        with contender.around():
            return None
    except ImportError as error:
        return f"not installed: {error}"


def forget() -> None:
    """Drop what was prepared or compiled for a shape."""
    contenders.dense.cache_clear()
    _block_mask.cache_clear()
    torch.compiler.reset()


DEFAULT, FLASH, CUDNN = "SDPA default", providers.FLASH_2.name, providers.CUDNN_ATTENTION.name
BESIDE = " + attnstats band"  # after a provider's name: the backend flash with it
BARE, FUSED, AUTO = "attnstats without statistics", "attnstats fused", "attnstats auto"
POINTERS = "attnstats fused, without descriptors"
VARLEN = "torch varlen_attn"
BAND, COLUMN = "attnstats band", "attnstats column"


def _provided(group: str, name: str) -> Contender:
    provider, ours_ = PROVIDERS[name], group == "statistics"
    run = functools.partial(ours, backend="flash") if ours_ else provider.attend
    around = functools.partial(alone, name)
    return Contender(group, run, ours_, provider.device, around, square=False, many=True)


CONTENDERS = {
    DEFAULT: Contender("attention", sdpa, square=False, many=True),
    **{name: _provided("attention", name) for name in PROVIDERS},
    BARE: Contender(
        "attention", functools.partial(ours, statistics=(), backend="triton"), ours=True, square=False, many=True
    ),
    FUSED: Contender("statistics", functools.partial(ours, backend="triton"), ours=True, square=False, many=True),
    POINTERS: Contender(
        "statistics",
        functools.partial(ours, backend="triton"),
        ours=True,
        around=functools.partial(describing, False),
        square=False,
        many=True,
    ),
    AUTO: Contender("statistics", ours, ours=True, square=False, many=True),
    **{name + BESIDE: _provided("statistics", name) for name in PROVIDERS},
    "fastest attention + plain band, compiled": Contender("statistics", plain_beside, device="cuda", compiled=True),
    "FlexAttention": Contender("statistics", flex, compiled=True, longest=FLEX),
    "eager, query chunks": Contender("statistics", chunked),
    "eager": Contender("statistics", eager),
    BAND: Contender("band", band, ours=True, square=False, many=True),
    "plain band, compiled": Contender("band", plain_band, compiled=True),
    "FlexAttention, WAAD and FAI": Contender("band", flex_band, compiled=True, longest=FLEX),
    COLUMN: Contender("column", column, ours=True, square=False, many=True),
    "FlexAttention, keys as queries": Contender("column", flex_column, compiled=True, longest=FLEX),
    "query chunks, column sums": Contender("column", chunked_column),
}


# Packed sequences have shapes of their own: query [total, Hq, D], key and value [total, Hkv, D].


class Packed(NamedTuple):
    query: Tensor
    key: Tensor
    value: Tensor
    bounds: Tensor  # [sequences + 1] int32, cumulative lengths
    longest: int


def packed_torch(inputs: Packed, **options: Any) -> Any:
    from torch.nn.attention.varlen import varlen_attn

    # Older torch has no enable_gqa and takes grouped heads as they are.
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:
        options["enable_gqa"] = True
    query, key, value, bounds, longest = inputs
    return varlen_attn(query, key, value, bounds, bounds, longest, longest, window_size=(-1, 0), **options)


def packed_ours(inputs: Packed, *, statistics: tuple[Any, ...] = STATISTICS, backend: Any = "triton") -> Answer:
    query, key, value, bounds, longest = inputs
    output, stats = attnstats.varlen_attention(
        query, key, value, cu_seqlens_q=bounds, max_seqlen_q=longest, statistics=statistics, backend=backend,
        enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip
    return Answer(output, *((stats["waad"], stats["fai"]) if statistics else ()))


PACKED: dict[str, Contender] = {
    VARLEN: Contender("attention", lambda inputs: Answer(packed_torch(inputs)), device="cuda"),
    BARE: Contender("attention", functools.partial(packed_ours, statistics=()), ours=True),
    FUSED: Contender("statistics", packed_ours, ours=True),
    AUTO: Contender("statistics", functools.partial(packed_ours, backend="auto"), ours=True),
    FLASH + BESIDE: Contender(
        "statistics",
        functools.partial(packed_ours, backend="flash"),
        ours=True,
        device="cuda",
        around=functools.partial(alone, FLASH),
    ),
}
