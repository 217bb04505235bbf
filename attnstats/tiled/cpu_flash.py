"""Torch's flash kernel for the CPU, which SDPA calls and which alone returns the lse. A private operator of torch."""

from __future__ import annotations

import torch
from torch import Tensor

from attnstats.core.autograd import Gradients, GradientsByStatistic, Residuals
from attnstats.core.geometry import Geometry
from attnstats.core.scores import beside_sinks, with_sinks
from attnstats.tiled import band, sweep

NARROW = 4  # a band wider than one in so many keys costs more than a sweep over all of them


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


def takes_gradients(lse: Tensor, geometry: Geometry, of_statistics: GradientsByStatistic) -> bool:
    """True for the gradients of attention without sinks, and of statistics of a narrow band whose lse is exact enough.

    lse (B, Hq, Tq). In a row whose lse is large A errs more than the row's sum does in eager attention.
    """
    if geometry.packing is not None or geometry.sinks is not None or not takes(geometry):
        return False
    if not of_statistics:
        return True
    own = [s for s in of_statistics if s.method != "lse"]
    return (
        geometry.dtype == geometry.accumulator  # else a row's number would be rounded to the inputs' dtype
        and all(s.method == "weight" and s.is_banded for s in own)
        and (not own or NARROW * band.width_of(geometry, tuple(own)) <= geometry.key_length)
        and bool((lse.masked_fill(lse == -torch.inf, 0.0).abs() <= sweep.LARGE).all())
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
    return beside_sinks(output, lse, counted), counted


def gradients(
    residuals: Residuals, grad_output: Tensor, geometry: Geometry, of_statistics: GradientsByStatistic
) -> Gradients:
    """The gradients that the kernel has for its own output, and those of statistics that `takes_gradients` names.

    The kernel computes `dS = A * (dO V^T - rowsum(dO * O))`. Statistics take one more number off each row, the row sum
    of `A dA`, of which an lse's gradient is the negative: a channel more of O holds it, of dO 1, of all else 0. What
    else they add lies in the band beside the diagonal.
    """
    query, key, value, output, lse, *_ = residuals
    seen, causal, bias = _mask(geometry)
    key = _keys(key, geometry)
    grads = {s: geometry.gradient_of_sums(s, grad) for s, (_, grad) in of_statistics.items()}
    less = [-grads.pop(s) for s in list(grads) if s.method == "lse"]
    of_band = band.gradients(query, key, lse, geometry, grads) if grads else None
    if of_band is not None:
        less.append(of_band[2])
    inputs = [grad_output, query, key[:, :, :seen], value[:, :, :seen], output]
    if less:
        grad_output, *others = (torch.nn.functional.pad(x, (0, 1)) for x in inputs)
        grad_output[..., -1] = 1.0
        others[-1][..., -1] = sum(less)
        inputs = [grad_output, *others]
    of_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *(x if x.stride(-1) == 1 else x.contiguous() for x in inputs),
        lse.masked_fill(lse == -torch.inf, 0.0),  # as the kernel gave it
        0.0,
        causal,
        attn_mask=bias,
        scale=geometry.scale,
    )
    grad_query, grad_key, grad_value = (x[..., : geometry.head_dim] for x in of_kernel)
    beyond = (0, 0, 0, geometry.key_length - seen)
    grad_key, grad_value = (torch.nn.functional.pad(x, beyond) for x in (grad_key, grad_value))
    if of_band is not None:
        grad_query, grad_key = grad_query + of_band[0], grad_key + of_band[1]
    return Gradients(grad_query, grad_key, grad_value)


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
