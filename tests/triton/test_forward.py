"""kernels/forward.py: the online softmax where it is delicate, and its epilogue against the band kernel."""

import pytest
import torch

import attnstats
from attnstats import FAI, WAAD, Entropy, LocalMass, MeanDistance, reference
from tests.cases import Case


@pytest.mark.parametrize("size", [1e5, -1e5, 1e4, -50.0])
def test_logits_of_any_size(size, device):
    """Score t, s is about `size` for all pairs, so exp of it alone would overflow or vanish."""
    case = Case(batch=1, key_heads=1, group=1, query_length=70, key_length=70)
    query, key, value = case.tensors(device)
    query[..., 0], key[..., 0] = abs(size) ** 0.5, 4 * abs(size) ** 0.5 * (1 if size > 0 else -1)
    statistics = ["waad", "entropy", "received", "max_logit"]
    results = attnstats.attention(query, key, value, statistics=statistics, backend="triton")
    expected = reference.attention(query.double(), key.double(), value.double(), statistics=statistics)
    eager = reference.attention(query, key, value, statistics=statistics)
    pairs = [(results.output, expected.output, eager.output)]
    pairs += [(results.statistics[s], expected.statistics[s], eager.statistics[s]) for s in statistics]
    for ours, truth, plain in pairs:
        floor = 32 * torch.finfo(torch.float32).eps * max(10.0, abs(size))
        assert float((ours - truth).abs().max()) <= 2 * float((plain - truth).abs().max()) + floor


def test_first_tiles_hold_nothing_but_padding(device):
    case = Case(batch=1, key_heads=1, group=1, query_length=80, key_length=80)
    query, key, value = case.tensors(device)
    query, key = query - 6, key + 6  # every score is far below 0, which a sentinel of 0 would win over
    padding = torch.ones(1, 80, dtype=torch.bool, device=device)
    padding[:, :50] = False
    statistics = [WAAD(), Entropy(), MeanDistance()]
    results = attnstats.attention(query, key, value, statistics=statistics, key_padding_mask=padding, backend="triton")
    alone = attnstats.attention(*(x[:, :, 50:] for x in (query, key, value)), statistics=statistics, backend="triton")
    torch.testing.assert_close(results.output[:, :, 50:], alone.output, rtol=1e-5, atol=1e-4)
    assert not results.output[:, :, :50].any()
    for s in statistics:
        torch.testing.assert_close(results.statistics[s][:, :, 50:], alone.statistics[s], rtol=1e-4, atol=1e-3)


def test_lse_far_below_zero_next_to_padding(device):
    """A hidden score of 0 less an lse of -120 overflows unless it is hidden before exp."""
    for length in (31, 33, 48):
        case = Case(batch=1, key_heads=1, group=1, query_length=length, key_length=length, padding="right")
        query, key, value = case.tensors(device)
        query[..., 0], key[..., 0] = 22.0, -22.0
        statistics = [WAAD(), FAI(1, 5), "received", "entropy"]
        _, stats = attnstats.attention(
            query, key, value, statistics=statistics, backend="triton", **case.arguments(device)
        )
        assert float(stats.lse[stats.lse.isfinite()].max()) < -88.8
        assert all(bool(stats[s].isfinite().all()) for s in statistics)


def test_epilogue_equals_the_band_kernel(device):
    case = Case(group=3, query_length=70, key_length=70, padding="left", counted="some", batch=2)
    query, key, value = case.tensors(device)
    statistics = [WAAD(10), LocalMass(3), FAI(10, 60), FAI(0, 5)]
    _, inside = attnstats.attention(
        query, key, value, statistics=statistics, backend="triton", **case.arguments(device)
    )
    beside = attnstats.statistics_from_lse(
        query, key, inside.lse, statistics=statistics, backend="triton", **case.arguments(device)
    )
    for s in statistics:
        torch.testing.assert_close(inside[s], beside[s], rtol=1e-5, atol=1e-5)
