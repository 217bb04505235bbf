"""Gradients for query, key and value, of the output and of statistics."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnstats.core.autograd import Residuals
from attnstats.core.geometry import Geometry
from attnstats.kernels.arguments import Near, StatisticGradients, Strides
from attnstats.triton.configs import Config, Kernel, keys_apart
from attnstats.triton.launch import arguments
from attnstats.triton.launch.arguments import RowLse
from attnstats.triton.launch.start import Prepared, fitting, prepare, remembered, start_prepared
from attnstats.triton.plan import GradientPlan


class MapGradients(NamedTuple):
    """The gradients that statistics have for A, on top of the output's."""

    plan: GradientPlan
    rows: Tensor | None  # [plan.rows and entropy, B, Hq, Tq] gradients
    columns: Tensor | None  # [plan.columns, B, Hq, Tk] gradients of sums
    shift: Tensor | None  # [B, Hq, Tq] the row-constant part: added to delta


def backward_kernels(geometry: Geometry, plan: GradientPlan) -> tuple[Kernel, Kernel]:
    """The entries of the table for dQ and for dK and dV."""
    if plan.weighs or geometry.softcap is not None or geometry.dropout_p > 0:
        return "weighted_queries", "weighted_keys"
    return "backward_queries", "backward_keys"


def backward(
    residuals: Residuals,
    row_lse: RowLse,
    grad_output: Tensor,
    geometry: Geometry,
    of_map: MapGradients,
    of_values: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients for query, key and, if of_values, value, and delta [B, Hq, Tq]: row sums of A times its own, and the
    shift."""
    dim = max(geometry.head_dim, geometry.value_dim)
    inputs = (residuals.query, residuals.key, residuals.value, residuals.output, grad_output)
    by_queries, by_keys = backward_kernels(geometry, of_map.plan)
    grad_query, delta = fitting(
        by_queries, geometry, dim, lambda config: _queries(inputs, row_lse, geometry, of_map, config)
    )
    grad_key, grad_value = fitting(
        by_keys, geometry, dim, lambda config: _keys(inputs, row_lse, delta, geometry, of_map, of_values, config)
    )
    return grad_query, grad_key, grad_value, delta


def _queries(
    inputs: tuple[Tensor, ...], row_lse: RowLse, geometry: Geometry, of_map: MapGradients, config: Config
) -> tuple[Tensor, Tensor]:
    dtype = inputs[0].dtype
    query, key, value, output, grad_output = (arguments.as_input(x) for x in inputs)
    grad_query, delta = _like(query, geometry), arguments.buffer(geometry, row_lse.lse.shape)
    described = arguments.described(geometry, key, value)
    prepared = remembered(geometry, _prepare_backward, of_map.plan, config, False, described)
    start_prepared(
        prepared,
        geometry,
        query=query,
        key=key,
        value=value,
        output=output,
        d_output=grad_output,
        d_query=grad_query,
        delta=delta,
        near=prepared.reach,
        strides=Strides(*(x.stride() for x in (query, key, value, output, grad_output, grad_query))),
        **_shared_arguments(row_lse, geometry, of_map),
    )
    return grad_query.to(dtype), delta


def _keys(
    inputs: tuple[Tensor, ...],
    row_lse: RowLse,
    delta: Tensor,
    geometry: Geometry,
    of_map: MapGradients,
    of_values: bool,
    config: Config,
) -> tuple[Tensor, Tensor]:
    dtype = inputs[0].dtype
    query, key, value, _, grad_output = (arguments.as_input(x) for x in inputs)
    grad_key, grad_value = (_like(x, geometry, of_keys=True) for x in (key, value))
    described = arguments.described(geometry, query, grad_output)
    prepared = remembered(geometry, _prepare_backward, of_map.plan, config, True, described)
    dim = max(geometry.head_dim, geometry.value_dim)
    launches: list[tuple[Tensor | None, Tensor | None]] = [(grad_key, grad_value)]
    if not of_values:
        launches = [(grad_key, None)]
    elif keys_apart(geometry.dtype, arguments.block_dim(dim)):
        launches = [(grad_key, None), (None, grad_value)]
    shared = _shared_arguments(row_lse, geometry, of_map)
    for d_key, d_value in launches:
        start_prepared(
            prepared,
            geometry,
            query=query,
            key=key,
            value=value,
            d_output=grad_output,
            d_key=d_key,
            d_value=d_value,
            delta=delta,
            strides=Strides(
                query.stride(),
                key.stride(),
                value.stride(),
                d_output=grad_output.stride(),
                d_key=grad_key.stride(),
                d_value=grad_value.stride(),
            ),
            **shared,
        )
    return grad_key.to(dtype), grad_value.to(dtype)


def _shared_arguments(row_lse: RowLse, geometry: Geometry, of_map: MapGradients) -> dict[str, Any]:
    """The other arguments of both kernels."""
    return {
        "pivot": row_lse.pivot_or_lse.contiguous(),
        "factor": None if row_lse.factor is None else row_lse.factor.contiguous(),
        "grads": StatisticGradients(of_map.rows, of_map.columns, of_map.shift),
        "query_counts": arguments.counts(geometry) if of_map.plan.columns else None,
        "dropout": arguments.dropout(geometry),
    }


def _prepare_backward(
    geometry: Geometry, plan: GradientPlan, config: Config, by_keys: bool, described: bool
) -> Prepared:
    from attnstats.kernels.backward import backward_keys, backward_queries

    sizes = arguments.sizes(geometry, config.BN if by_keys else config.BM, by_keys)
    heads = geometry.key_heads if by_keys else geometry.query_heads
    constants = {
        "ROWS": arguments.weights(plan.far_rows),
        "NEAR_ROWS": arguments.weights(plan.near_rows, geometry.tail_of),
        "ENTROPY": int(plan.entropy),
        "COLUMNS": arguments.weights(plan.far_columns),
        "NEAR_COLUMNS": arguments.weights(plan.near_columns),
        "BM": config.BM,
        "BN": config.BN,
        **arguments.dims(geometry),
        "DESCRIBED": described,
    }
    kernel = backward_keys if by_keys else backward_queries
    programs = sizes.n_blocks * heads * geometry.batch
    near = Near(*map(arguments.bounded, plan.reach(geometry))) if plan.near_rows or plan.near_columns else None
    score = arguments.score(geometry, geometry.scale)
    return prepare(geometry, kernel, programs, constants, config, sizes, score, reach=near)


def _like(x: Tensor, geometry: Geometry, of_keys: bool = False) -> Tensor:
    """A buffer of x's shape and, where they are dense, strides, for gradients."""
    return arguments.filled(torch.empty_like(x), geometry, -2, of_keys=of_keys)
