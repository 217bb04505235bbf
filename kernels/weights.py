"""The weight of each distance-weighted statistic, as device functions.

A weight maps the signed distance d = t - s (float32, exact up to 2^24, any shape) and at most two numbers, the
statistic's `parameters`, to float32. Its name is the statistic's `name` in attnstats/statistics.py, where the same
weight is plain PyTorch. Kernels evaluate it with `tiles.weigh`.
"""

import triton
import triton.language as tl


@triton.jit
def waad(distance, window: tl.constexpr, _: tl.constexpr):
    """min(|d|, window): Eq. 9."""
    return tl.minimum(tl.abs(distance), 1.0 * window)


@triton.jit
def local_mass(distance, window: tl.constexpr, _: tl.constexpr):
    """[|d| < window]"""
    return tl.where(tl.abs(distance) < window, 1.0, 0.0)


@triton.jit
def mean_distance(distance, _: tl.constexpr, __: tl.constexpr):
    """|d|: Eq. 7."""
    return tl.abs(distance)


@triton.jit
def fai(distance, lo: tl.constexpr, hi: tl.constexpr):
    """[lo <= d <= hi]: Eq. 10. One comparison instead of two where the middle is exact."""
    if hi < 2**22:
        return tl.where(tl.abs(distance - 0.5 * (lo + hi)) <= 0.5 * (hi - lo), 1.0, 0.0)
    else:
        return tl.where((distance >= lo) & (distance <= hi), 1.0, 0.0)


@triton.jit
def received(distance, _: tl.constexpr, __: tl.constexpr):
    """1"""
    return tl.full(distance.shape, 1.0, tl.float32)
