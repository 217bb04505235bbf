"""Attention kernels of others that return the lse of each row: which calls each takes, and how it is called.

What a provider refuses was read in the sources of torch 2.13 (transformers/cuda/sdp_utils.cpp, nn/attention/_fa3.py and
_fa4.py) and of flash-attention at commit 0251105 (hopper/flash_attn_interface.py, flash_attn/cute/interface.py): fake
kernels accept more than real ones do. No GPU has run these calls. Tests show that torch's schemas and fake kernels
take them, and run the whole path on torch's kernel for the CPU.

All get (B, H, T, D) and give output (B, Hq, Tq, Dv) and lse (B, Hq, Tq) in natural logarithm, whatever it is in rows
that see no key. Sinks are not theirs: `backend` adds them.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from attnstats.core.autograd import Residuals
from attnstats.core.geometry import Geometry
from attnstats.tiled import cpu_flash

ALIGNMENT = 16  # bytes of every row: kernels load so many at once
PADDED_ROWS = 32  # to a multiple of which the memory-efficient kernel pads its lse
CUDNN = 91501  # older ones err at lengths that are no multiple of 128 (pytorch#169849)
HALF = (torch.float16, torch.bfloat16)

Gradients = tuple[Tensor, Tensor, Tensor]
Refuses = Callable[[Geometry, str], Iterator[str | None]]


class Provider(NamedTuple):
    """One library's attention.

    Attributes:
        name: as `explain` shows it.
        refuses: yields the reasons why it can't take a call on an architecture ("sm_90"); None counts for none.
        forward: (query, key, value, geometry) to output and lse.
        backward: (residuals, grad_output, geometry) to the gradients of query, key and value.
    """

    name: str
    refuses: Refuses
    forward: Callable[[Tensor, Tensor, Tensor, Geometry], tuple[Tensor, Tensor]]
    backward: Callable[[Residuals, Tensor, Geometry], Gradients]

    def reason_against(self, geometry: Geometry, architecture: str) -> str | None:
        """Why it can't take the call, or None."""
        return next((reason for reason in self.refuses(geometry, architecture) if reason), None)


LEFT_OUT = "ATTNSTATS_WITHOUT"  # an environment variable: providers that are not used, by name, separated by commas


# torch's own switches of its kernels, by the call that turns each off.
_SWITCHES = {
    "enable_flash_sdp": torch.backends.cuda.flash_sdp_enabled,
    "enable_cudnn_sdp": torch.backends.cuda.cudnn_sdp_enabled,
    "enable_mem_efficient_sdp": torch.backends.cuda.mem_efficient_sdp_enabled,
}


def _turned_off(switch: str) -> str | None:
    return None if _SWITCHES[switch]() else f"torch.backends.cuda.{switch}(False)"


def settings() -> tuple[object, ...]:
    """The settings that a choice depends on beside the call: no choice is remembered when they change."""
    switches = [enabled() for enabled in _SWITCHES.values()]
    return os.environ.get(LEFT_OUT, ""), _active(), torch.are_deterministic_algorithms_enabled(), *switches


# Common to all of them.


def _no_mask(geometry: Geometry) -> Iterator[str | None]:
    yield f"dropout_p={geometry.dropout_p}" if geometry.dropout_p else None
    yield "a padding mask" if geometry.key_mask is not None else None
    yield f"scale={geometry.scale}" if geometry.scale <= 0 else None


def _half(geometry: Geometry) -> Iterator[str | None]:
    yield str(geometry.dtype) if geometry.dtype not in HALF else None
    uneven = geometry.head_dim % 8 or geometry.value_dim % 8
    yield f"head_dim {geometry.head_dim}, not a multiple of 8" if uneven else None


def _queries_last(geometry: Geometry) -> Iterator[str | None]:
    """Their causal masks and windows put the last query at the last key."""
    masked = geometry.left is not None or geometry.right is not None
    elsewhere = geometry.packing is None and geometry.offset != geometry.key_length - geometry.query_length
    yield f"query_offset={geometry.offset}, not Tk - Tq" if masked and elsewhere else None


def _in_rows(*tensors: Tensor) -> list[Tensor]:
    """(B, T, H, D) views, or copies where rows aren't aligned."""
    return [_aligned(x).transpose(1, 2) for x in tensors]


def _aligned(x: Tensor) -> Tensor:
    bytes_apart = [x.storage_offset(), *x.stride()[:-1]]
    even = all(n * x.element_size() % ALIGNMENT == 0 for n in bytes_apart)
    return x if even and x.stride(-1) == 1 else x.clone(memory_format=torch.contiguous_format)


def _sequences(geometry: Geometry) -> tuple[Tensor | None, Tensor | None, int, int]:
    """cu_seqlens and the longest sequence of queries and of keys. Unread ones are made to lie in the tensors."""
    packing = geometry.packing
    if packing is None:
        return None, None, geometry.query_length, geometry.key_length
    queries, keys = packing.queries, packing.keys
    if packing.believed:
        queries = queries.clamp(0, geometry.query_length).cummax(0).values
        keys = keys.clamp(0, geometry.key_length).cummax(0).values
    return queries, keys, packing.max_queries, packing.max_keys


# FlashAttention 2, 3 and 4: one operator of torch, whose implementation users activate, or the packages. Packed tensors
# have no batch dimension there, nor has their lse.


def _flash(geometry: Geometry) -> Iterator[str | None]:
    yield from _no_mask(geometry)
    yield from _half(geometry)
    yield from _queries_last(geometry)


def _active() -> str | None:
    """The implementation of torch's operator that the user activated: "FA3", "FA4"."""
    name: str | None = getattr(torch.nn.attention, "current_flash_attention_impl", lambda: None)()
    return name


@functools.cache
def _package(name: str) -> Any:
    """None where it isn't installed, or not so that it could be imported: nobody has asked for it."""
    try:
        return importlib.import_module(name)
    except Exception:
        return None


def _flash_2(geometry: Geometry, architecture: str) -> Iterator[str | None]:
    yield None if hasattr(torch.ops.aten, "_flash_attention_forward") else "not in this torch"
    yield _turned_off("enable_flash_sdp")
    yield f"torch runs {_active()}" if _active() not in (None, "FA2") else None
    yield architecture if _major(architecture) < 8 else None
    yield from _flash(geometry)
    yield f"softcap={geometry.softcap}" if geometry.softcap is not None else None
    yield from _one_dim(geometry, 256)


def _one_dim(geometry: Geometry, largest: int) -> Iterator[str | None]:
    yield f"value_dim {geometry.value_dim} beside head_dim" if geometry.value_dim != geometry.head_dim else None
    yield f"head_dim {geometry.head_dim} over {largest}" if geometry.head_dim > largest else None


def _flash_3(geometry: Geometry, architecture: str) -> Iterator[str | None]:
    yield None if _active() == "FA3" or _package("flash_attn_interface") else "not installed"
    yield architecture if architecture != "sm_90" else None
    yield from _flash(geometry)
    yield f"softcap={geometry.softcap}" if geometry.softcap is not None and _active() == "FA3" else None
    yield from _one_dim(geometry, 256)
    yield "torch.use_deterministic_algorithms" if _deterministic() and geometry.head_dim > 192 else None


def _flash_4(geometry: Geometry, architecture: str) -> Iterator[str | None]:
    yield None if _active() == "FA4" or _package("flash_attn.cute.interface") else "not installed"
    yield architecture if _major(architecture) not in (9, 10) else None
    yield from _flash(geometry)
    yield f"softcap={geometry.softcap}" if geometry.softcap is not None else None  # it has no gradient everywhere
    yield from _one_dim(geometry, 256 if architecture == "sm_90" else 128)


def _window(geometry: Geometry) -> tuple[bool, int, int]:
    """causal, and the keys seen to the left and to the right, -1 for all."""
    left, right = (-1 if n is None else n for n in (geometry.left, geometry.right))
    return geometry.is_causal, left, right


def _flash_attention(
    version: int, refuses: Refuses, by_package: Callable[..., tuple[Tensor, Tensor]], back: Callable[..., Gradients]
) -> Provider:
    """A version, by torch's operator where that runs it, else by its package; tensors (B, T, H, D) or (total, H, D)."""

    def forward(query: Tensor, key: Tensor, value: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
        run = _torch_forward if _active() == f"FA{version}" else by_package
        query, key, value = _in_rows(query, key, value)
        if geometry.packing is not None:
            query, key, value = query.squeeze(0), key.squeeze(0), value.squeeze(0)
        output, lse = run(query, key, value, geometry)
        if geometry.packing is not None:
            output, lse = output.unsqueeze(0), lse.unsqueeze(0)
        return output.transpose(1, 2), lse

    def backward(residuals: Residuals, grad_output: Tensor, geometry: Geometry) -> Gradients:
        run: Callable[..., Gradients] = _torch_backward if _active() == f"FA{version}" else back
        *inputs, lse = residuals[:5]
        tensors = _in_rows(grad_output, *inputs)
        if geometry.packing is not None:
            tensors, lse = [x.squeeze(0) for x in tensors], lse.squeeze(0)
        grads = run(*tensors, _finite(lse), geometry)
        if geometry.packing is not None:
            grads = tuple(x.unsqueeze(0) for x in grads)  # type: ignore[assignment]
        grad_query, grad_key, grad_value = (x.transpose(1, 2) for x in grads)
        return grad_query, grad_key, grad_value

    return Provider(f"FlashAttention {version}", refuses, forward, backward)


def _finite(lse: Tensor) -> Tensor:
    """+inf in rows that see no key, as kernels write it: A is 0 there, not NaN."""
    return lse.masked_fill(lse == -torch.inf, torch.inf).contiguous()


def _torch_forward(query: Tensor, key: Tensor, value: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
    causal, left, right = _window(geometry)
    options = {"scale": geometry.scale, "window_size_left": left, "window_size_right": right}
    if _has_splits():
        options["num_splits"] = 1  # else their number, and the last bits, depend on the batch
    output, lse, *_ = torch.ops.aten._flash_attention_forward(
        query, key, value, *_sequences(geometry), 0.0, causal, False, **options
    )
    return output, lse


@functools.cache
def _has_splits() -> bool:
    schema = torch.ops.aten._flash_attention_forward.default._schema
    return any(argument.name == "num_splits" for argument in schema.arguments)


def _torch_backward(
    grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor, geometry: Geometry
) -> Gradients:
    causal, left, right = _window(geometry)
    state = torch.zeros(2, dtype=torch.uint64, device=query.device)  # of the dropout that there is none of
    unused = torch.zeros((), dtype=torch.uint64, device=query.device)
    grads = torch.ops.aten._flash_attention_backward(
        grad_output,
        query,
        key,
        value,
        output,
        lse,
        *_sequences(geometry),
        0.0,
        causal,
        state,
        unused,
        scale=geometry.scale,
        window_size_left=left,
        window_size_right=right,
    )
    return grads[0], grads[1], grads[2]


def _flash_3_forward(query: Tensor, key: Tensor, value: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
    package = _package("flash_attn_interface")
    output, lse, *_ = package._flash_attn_forward(query, key, value, **_flash_3_options(geometry, "causal"))
    return output, lse


def _flash_3_backward(
    grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor, geometry: Geometry
) -> Gradients:
    package = _package("flash_attn_interface")
    grads = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    to = dict(zip(("dq", "dk", "dv"), grads, strict=True))
    options = _flash_3_options(geometry, "is_causal")
    package._flash_attn_backward(
        grad_output, query, key, value, output, lse, deterministic=_deterministic(), **to, **options
    )
    return grads


def _flash_3_options(geometry: Geometry, causal: str) -> dict[str, object]:
    cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k = _sequences(geometry)
    is_causal, left, right = _window(geometry)
    options: dict[str, object] = {
        "softmax_scale": geometry.scale,
        causal: is_causal,
        "window_size_left": left,
        "window_size_right": right,
        "softcap": geometry.softcap or 0.0,
    }
    if cu_seqlens_q is not None:
        lengths = {"max_seqlen_q": max_seqlen_q, "max_seqlen_k": max_seqlen_k}
        options |= {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k, **lengths}
    return options


def _flash_4_forward(query: Tensor, key: Tensor, value: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
    package = _package("flash_attn.cute.interface")
    options = _flash_4_options(geometry)
    output, lse, *_ = package._flash_attn_fwd(query, key, value, return_lse=True, **options)
    return output, lse


def _flash_4_backward(
    grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor, geometry: Geometry
) -> Gradients:
    package = _package("flash_attn.cute.interface")
    options = _flash_4_options(geometry) | {"deterministic": _deterministic()}
    grads = package._flash_attn_bwd(query, key, value, output, grad_output, lse, **options)
    return grads[0], grads[1], grads[2]


def _flash_4_options(geometry: Geometry) -> dict[str, object]:
    options = _flash_3_options(geometry, "causal")
    del options["softcap"]
    for side in ("window_size_left", "window_size_right"):
        options[side] = None if options[side] == -1 else options[side]
    return options


def _deterministic() -> bool:
    return torch.are_deterministic_algorithms_enabled()


# cuDNN, whose lse has one more dimension.


def _cudnn(geometry: Geometry, architecture: str) -> Iterator[str | None]:
    version = _cudnn_version()
    yield _turned_off("enable_cudnn_sdp")
    yield f"version {version}, before {CUDNN}" if version < CUDNN else None
    yield architecture if _major(architecture) not in (9, 10) else None  # where torch prefers it, too
    yield from _no_mask(geometry)
    yield from _half(geometry)
    yield from _causal_or_full(geometry)
    yield from _one_dim(geometry, 128)
    yield "one key" if geometry.key_length == 1 else None
    yield "torch.use_deterministic_algorithms" if _deterministic() else None


def _causal_or_full(geometry: Geometry) -> Iterator[str | None]:
    """Reasons against all but SDPA's own arguments: causal, with the first query at the first key, or full."""
    yield "packed sequences" if geometry.packing is not None else None
    yield f"softcap={geometry.softcap}" if geometry.softcap is not None else None
    window = geometry.left is not None or geometry.right not in (None, 0)
    yield f"window_size={geometry.left, geometry.right}" if window else None
    apart = geometry.is_causal and (geometry.offset, geometry.query_length) != (0, geometry.key_length)
    yield "a causal mask with Tq != Tk" if apart else None


def _cudnn_version() -> int:
    return torch.backends.cudnn.version() or 0


def _cudnn_forward(query: Tensor, key: Tensor, value: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
    output, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        *map(_aligned, (query, key, value)), None, True, 0.0, geometry.is_causal, False, scale=geometry.scale
    )
    return output, lse.squeeze(-1) if lse.dim() == 4 else lse


def _cudnn_backward(residuals: Residuals, grad_output: Tensor, geometry: Geometry) -> Gradients:
    query, key, value, output = map(_aligned, residuals[:4])
    seed, offset = (torch.zeros((), dtype=torch.int64, device=query.device) for _ in range(2))
    grads = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        _aligned(grad_output),
        query,
        key,
        value,
        output,
        _finite(residuals.lse).unsqueeze(-1),
        seed,
        offset,
        None,
        None,
        None,
        geometry.query_length,
        geometry.key_length,
        0.0,
        geometry.is_causal,
        scale=geometry.scale,
    )
    return grads[0], grads[1], grads[2]


# Memory-efficient attention, the only one for float32. It has as many key heads as query heads.


def _efficient(geometry: Geometry, architecture: str) -> Iterator[str | None]:
    yield _turned_off("enable_mem_efficient_sdp")
    yield architecture if _major(architecture) < 8 else None
    yield from _no_mask(geometry)
    yield f"{geometry.dtype}, for which others are faster" if geometry.dtype != torch.float32 else None
    yield "fewer key than query heads" if geometry.group > 1 else None
    yield from _causal_or_full(geometry)
    uneven = geometry.head_dim % 4 or geometry.value_dim % 4
    yield f"head_dim {geometry.head_dim}, not a multiple of 4" if uneven else None


def _efficient_forward(query: Tensor, key: Tensor, value: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
    output, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
        *map(_aligned, (query, key, value)), None, True, 0.0, geometry.is_causal, scale=geometry.scale
    )
    return output, lse.narrow(-1, 0, geometry.query_length)


def _efficient_backward(residuals: Residuals, grad_output: Tensor, geometry: Geometry) -> Gradients:
    query, key, value, output = map(_aligned, residuals[:4])
    seed, offset = (torch.zeros((), dtype=torch.int64, device=query.device) for _ in range(2))
    padded = pad(_finite(residuals.lse), (0, -geometry.query_length % PADDED_ROWS), value=torch.inf)
    inputs = _aligned(grad_output), query, key, value, None, output, padded, seed, offset
    grads = torch.ops.aten._scaled_dot_product_efficient_attention_backward(
        *inputs, 0.0, [True, True, True, False], geometry.is_causal, scale=geometry.scale
    )
    return grads[0], grads[1], grads[2]


# Torch's kernel for the CPU, beside kernels in Triton's interpreter.


def _cpu(geometry: Geometry, _: str) -> Iterator[str | None]:
    yield None if cpu_flash.takes(geometry) else "a call that torch's flash attention for CPU doesn't take"
    yield "packed sequences" if geometry.packing is not None else None


def _cpu_backward(residuals: Residuals, grad_output: Tensor, geometry: Geometry) -> Gradients:
    grads = cpu_flash.gradients(residuals, grad_output, geometry, {})
    return grads.query, grads.key, grads.value


def _major(architecture: str) -> int:
    """8 of "sm_86"; 0 of AMD's: the lse of torch's kernels for ROCm was never looked at."""
    return int(architecture[3:-1]) if architecture.startswith("sm_") else 0


FLASH_2 = _flash_attention(2, _flash_2, _torch_forward, _torch_backward)
FLASH_3 = _flash_attention(3, _flash_3, _flash_3_forward, _flash_3_backward)
FLASH_4 = _flash_attention(4, _flash_4, _flash_4_forward, _flash_4_backward)
CUDNN_ATTENTION = Provider("cuDNN", _cudnn, _cudnn_forward, _cudnn_backward)
EFFICIENT = Provider("memory-efficient", _efficient, _efficient_forward, _efficient_backward)
CPU = Provider("torch's flash attention for CPU", _cpu, cpu_flash.attention, _cpu_backward)

# The fastest first. H100, forward, head_dim 128, causal, 16 bits, 8k tokens: FlashAttention 3 602 TFLOPS, cuDNN 529,
# FlashAttention 2 333 (Shah et al., "FlashAttention-3", arXiv 2407.08608). B200: FlashAttention 4 up to 1,613 TFLOPS,
# 1.3 of cuDNN 9.13 ("FlashAttention-4: Algorithm and Kernel Pipelining Co-Design for Asymmetric Hardware Scaling").
BY_ARCHITECTURE: dict[str, tuple[Provider, ...]] = {
    "sm_90": (FLASH_3, CUDNN_ATTENTION, FLASH_4, FLASH_2, EFFICIENT),
    "sm_100": (FLASH_4, CUDNN_ATTENTION, FLASH_2, EFFICIENT),
    "sm_103": (FLASH_4, CUDNN_ATTENTION, FLASH_2, EFFICIENT),
}
ELSEWHERE = (FLASH_2, EFFICIENT)
