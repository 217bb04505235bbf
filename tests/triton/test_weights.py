"""The device weight of every distance-weighted statistic equals its plain PyTorch weight, also far away."""

import pytest
import torch
import triton
import triton.language as tl

from attnstats import FAI, WAAD, LocalMass, MeanDistance, Received
from attnstats.kernels.tiles import FIELDS, weigh
from attnstats.statistics import CATALOGUE, DistanceWeighted
from attnstats.triton.launch.arguments import weights

SETTINGS = [
    WAAD(1), WAAD(10), LocalMass(1), LocalMass(7), MeanDistance(), FAI(0, 0), FAI(10, 100), FAI(3, None), Received(),
]  # fmt: skip


@triton.jit
def evaluate(p_distance, p_out, WEIGHTS: tl.constexpr, N: tl.constexpr):
    o = tl.arange(0, N)
    tl.store(p_out + o, weigh(tl.load(p_distance + o), WEIGHTS, 0))


@pytest.mark.parametrize("statistic", SETTINGS, ids=str)
def test_device_weight_is_the_weight(statistic, device):
    distance = torch.cat([torch.arange(-128, 124), torch.tensor([-(10**6), 10**6, 2**24 - 1, 2**30])])
    distance = distance.to(device, torch.float32)
    results = torch.empty(256, device=device)
    evaluate[(1,)](distance, results, weights([statistic]), 256)
    assert torch.equal(results, statistic.weight(distance.int()).float() - statistic.tail)


def test_every_distance_weighted_statistic_is_here():
    weighted = {cls for cls in CATALOGUE.values() if issubclass(cls, DistanceWeighted)}
    assert weighted == {type(s) for s in SETTINGS}
    assert len(weights(SETTINGS)) == FIELDS.value * len(SETTINGS)
