"""The device weight of every distance-weighted statistic equals its plain PyTorch weight, also far away."""

import pytest
import torch
import triton
import triton.language as tl

from attnstats import FAI, LocalMass
from attnstats.kernels.tiles import FIELDS, weigh
from attnstats.statistics import CATALOGUE, DistanceWeighted
from attnstats.triton.launch.arguments import weights
from tests.cases import EVERY

WEIGHTED = [s for s in (*EVERY, LocalMass(1), FAI(10, 100)) if s.method == "weight"]


@triton.jit
def evaluate(p_distance, p_out, WEIGHTS: tl.constexpr, N: tl.constexpr):
    o = tl.arange(0, N)
    tl.store(p_out + o, weigh(tl.load(p_distance + o), WEIGHTS, 0))


@pytest.mark.parametrize("statistic", WEIGHTED, ids=str)
def test_device_weight_is_the_weight(statistic, device):
    """Bit for bit where weights are integers, which float32 holds; else within the rounding of a few operations."""
    distance = torch.cat([torch.arange(-128, 124), torch.tensor([-(10**6), 10**6, 2**24 - 1, 2**30])])
    distance = distance.to(device, torch.float32)
    results = torch.empty(256, device=device)
    evaluate[(1,)](distance, results, weights([statistic], lambda s: s.tail), 256)
    expected = statistic.weight(distance.int()).float() - statistic.tail
    if torch.equal(expected, expected.round()):
        assert torch.equal(results, expected)
    else:
        torch.testing.assert_close(results, expected, rtol=1e-6, atol=1e-6)


def test_every_distance_weighted_statistic_is_here():
    weighted = {cls for cls in CATALOGUE.values() if issubclass(cls, DistanceWeighted)}
    assert weighted == {type(s) for s in WEIGHTED}
    assert len(weights(WEIGHTED)) == FIELDS.value * len(WEIGHTED)
