"""kernels/band.py: bands over many blocks, on both sides, and heads packed into one tile."""

import pytest
import torch

import attnstats
from attnstats import FAI, WAAD, LocalMass, reference
from tests.cases import Case, check


@pytest.mark.parametrize("group", [1, 2, 3, 5, 8, 11])
@pytest.mark.parametrize("is_causal", [True, False])
def test_bands_of_many_blocks(group, is_causal, device):
    case = Case(batch=1, key_heads=2, group=group, query_length=75, key_length=75, is_causal=is_causal)
    statistics = [WAAD(70), WAAD(2), LocalMass(33), FAI(0, 0), FAI(31, 33), FAI(1, 74), FAI(70, 500)]
    check(case, "triton", device, from_lse=True, statistics=statistics[:4] if group > 3 else statistics)


def test_a_band_wider_than_the_sequence_and_one_row(device):
    query, key, _ = Case(query_length=1, key_length=20, group=1).tensors(device)
    statistics = [WAAD(900), FAI(0, 900)]
    _, expected = reference.attention(query, key, key, statistics=statistics)
    results = attnstats.statistics_from_lse(query, key, expected.lse, statistics=statistics, backend="triton")
    for s in statistics:
        torch.testing.assert_close(results[s], expected[s], rtol=1e-5, atol=2e-3 if s.name == "waad" else 1e-5)
