"""The largest entries of each row and their keys, from an lse."""

from __future__ import annotations

import torch
from torch import Tensor

from attnstats.core.geometry import Geometry
from attnstats.kernels.arguments import Strides
from attnstats.statistics import TopKeys
from attnstats.triton.configs import Config
from attnstats.triton.launch import arguments
from attnstats.triton.launch.arguments import RowLse
from attnstats.triton.launch.start import Prepared, fitting, prepare, remembered, start_prepared
from attnstats.triton.plan import Heads


def top(query: Tensor, key: Tensor, row_lse: RowLse, geometry: Geometry, statistic: TopKeys, heads: Heads) -> Tensor:
    """[B, heads, Tq, 2, k] values and positions."""
    return fitting(
        "top", geometry, geometry.head_dim, lambda config: _top(query, key, row_lse, geometry, statistic, heads, config)
    )


def _top(
    query: Tensor,
    key: Tensor,
    row_lse: RowLse,
    geometry: Geometry,
    statistic: TopKeys,
    heads: Heads,
    config: Config,
) -> Tensor:
    if (queries := arguments.longest(geometry)[0]) < config.BM:
        config = config._replace(BM=max(16, arguments.power_of_two(queries)))
    query, key = arguments.as_input(query), arguments.as_input(key)
    described = arguments.described(geometry, key)
    prepared = remembered(geometry, _prepare_top, config, statistic.k, heads, described)
    shape = (geometry.batch, arguments.head_count(geometry, heads), geometry.query_length, statistic.k)
    values, places = (
        arguments.filled(torch.empty(shape, dtype=torch.float32, device=geometry.device), geometry, -2, fill)
        for fill in (0.0, -1.0)
    )
    start_prepared(
        prepared,
        geometry,
        query=query,
        key=key,
        pivot=row_lse.pivot_or_lse,
        factor=row_lse.factor,
        values=values,
        places=places,
        heads=arguments.on_device(heads, geometry.device),
        strides=Strides(query.stride(), key.stride()),
    )
    return torch.stack([values, places.nan_to_num(-1.0)], -2)


def _prepare_top(geometry: Geometry, config: Config, count: int, heads: Heads, described: bool) -> Prepared:
    from attnstats.kernels.top import top as kernel

    constants = {
        "COUNT": count,
        "KEPT": arguments.power_of_two(count),
        "BM": config.BM,
        "BN": config.BN,
        **arguments.dims(geometry, with_value=False),
        "DESCRIBED": described,
    }
    of = arguments.head_count(geometry, heads)
    sizes = arguments.sizes(geometry, config.BM)._replace(n_heads=of)
    programs = sizes.n_blocks * of * geometry.batch
    return prepare(geometry, kernel, programs, constants, config, sizes, arguments.score(geometry))
