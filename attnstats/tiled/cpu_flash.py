"""Torch's flash kernel for the CPU, which SDPA calls and which alone returns the lse. A private operator of torch."""

from __future__ import annotations

import torch
from torch import Tensor

from attnstats.core.autograd import Gradients, Residuals
from attnstats.core.geometry import Geometry, divisor_of
from attnstats.core.scores import with_sinks
from attnstats.tiled import sweep


def takes(geometry: Geometry) -> bool:
    """True if this torch has the kernel and it computes such a call; its causal mask is aligned top left."""
    return (
        geometry.device.type == "cpu"
        and hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu")
        and geometry.head_dim == geometry.value_dim
        and geometry.scale > 0  # the kernel's running maximum is of unscaled scores
        and geometry.softcap is None
        and geometry.left is None
        and geometry.dropout_p == 0
        and (geometry.right is None or (geometry.is_causal and (geometry.offset == 0 or geometry.query_length == 1)))
    )


def attention(query: Tensor, key: Tensor, value: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """Output and lse."""
    seen, causal, bias = _mask(geometry)
    # It reads the last dimension as contiguous without a look at its stride.
    tensors = (query, _keys(key, geometry)[:, :, :seen], value[:, :, :seen])
    inputs = [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]
    output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *inputs, 0.0, causal, attn_mask=bias, scale=geometry.scale
    )
    # The kernel says lse 0 of rows that see no key, whose scores are all -inf or, of a few keys, NaN.
    unclear = None
    if (is_zero := lse == 0).any():
        live = geometry.live()[:, None]
        unclear = is_zero & live & ~(output.abs() > 0).any(-1)  # else it is the log of 1
        lse = lse.masked_fill(~live | unclear, -torch.inf)
    counted = lse
    if geometry.sinks is not None:
        counted = with_sinks(lse, geometry.sinks).masked_fill(lse == -torch.inf, -torch.inf)
    if unclear is not None and unclear.any():
        counted = torch.where(unclear, sweep.attention(query, key, value, geometry)[1], counted)
    if geometry.sinks is None:
        return output, counted
    # A sink only scales a row.
    share = (lse - divisor_of(counted)).exp()[..., None]
    return (output * share).to(output.dtype), counted


def gradients(residuals: Residuals, grad_output: Tensor, geometry: Geometry) -> Gradients:
    """The gradients that the kernel has for its own output, without sinks."""
    query, key, value, output, lse, *_ = residuals
    seen, causal, bias = _mask(geometry)
    inputs = (grad_output, query, _keys(key, geometry)[:, :, :seen], value[:, :, :seen], output)
    grad_query, grad_key, grad_value = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *(x if x.stride(-1) == 1 else x.contiguous() for x in inputs),
        lse.masked_fill(lse == -torch.inf, 0.0),  # as the kernel gave it
        0.0,
        causal,
        attn_mask=bias,
        scale=geometry.scale,
    )
    beyond = (0, 0, 0, geometry.key_length - seen)
    return Gradients(grad_query, torch.nn.functional.pad(grad_key, beyond), torch.nn.functional.pad(grad_value, beyond))


def _keys(key: Tensor, geometry: Geometry) -> Tensor:
    """The keys, 0 for padding: the kernel adds -inf to scores, which leaves a NaN."""
    return key if geometry.key_mask is None else key.masked_fill(~geometry.key_mask[:, None, :, None], 0.0)


def _mask(geometry: Geometry) -> tuple[int, bool, Tensor | None]:
    """The number of keys to pass to the kernel, its causal flag and its bias."""
    seen, causal = geometry.key_length, geometry.is_causal
    if causal and geometry.query_length == 1:  # the one query sees the keys up to its own position
        seen, causal = min(geometry.offset + 1, geometry.key_length), False
    if geometry.key_mask is None:
        return seen, causal, None
    bias = torch.zeros(geometry.batch, 1, 1, seen, dtype=geometry.dtype, device="cpu")
    return seen, causal, bias.masked_fill(~geometry.key_mask[:, None, None, :seen], -torch.inf)
