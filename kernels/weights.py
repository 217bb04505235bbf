"""The weight of each distance-weighted statistic, as device functions.

A weight maps the signed distance d = t - s (int32, any shape) and at most two integers, the statistic's
`parameters`, to float32. Its name is the statistic's `name` in attnstats/statistics.py, where the same weight
stands as plain PyTorch. Called from the band, forward and column kernels with `tiles.weigh`.
"""

import triton
import triton.language as tl


@triton.jit
def waad(distance, window: tl.constexpr, _: tl.constexpr):
    """min(|d|, window): Eq. 9."""
    return tl.minimum(tl.abs(distance), window).to(tl.float32)


@triton.jit
def local_mass(distance, window: tl.constexpr, _: tl.constexpr):
    """[|d| < window]"""
    return (tl.abs(distance) < window).to(tl.float32)


@triton.jit
def mean_distance(distance, _: tl.constexpr, __: tl.constexpr):
    """|d|: Eq. 7."""
    return tl.abs(distance).to(tl.float32)


@triton.jit
def fai(distance, lo: tl.constexpr, hi: tl.constexpr):
    """[lo <= d <= hi]: Eq. 10."""
    return ((distance >= lo) & (distance <= hi)).to(tl.float32)


@triton.jit
def received(distance, _: tl.constexpr, __: tl.constexpr):
    """1"""
    return tl.full(distance.shape, 1.0, tl.float32)
