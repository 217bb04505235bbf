"""The border's newer arguments: windows, softcap, sinks, heads and packed sequences, and an lse in every layout."""

import pytest
import torch

import attnstats
from attnstats import WAAD, PooledMap
from tests.cases import Case

Q, K, V = Case(batch=2, key_heads=2, group=2).tensors()  # (2, 4, 37, 16), (2, 2, 37, 16) twice
PACKED = [x[0].transpose(0, 1) for x in (Q, K, V)]  # (37, 4, 16), (37, 2, 16) twice


@pytest.mark.parametrize(
    ("changed", "error", "match"),
    [
        ({"window_size": (-5, 0)}, ValueError, r"window_size must be \(left, right\).*got \(-5, 0\)"),
        ({"window_size": 5}, ValueError, "window_size must be .*got 5"),
        ({"window_size": (5,)}, ValueError, "window_size must be"),
        ({"window_size": (1.5, 0)}, ValueError, "window_size must be"),
        ({"window_size": (True, 0)}, ValueError, "window_size must be"),
        ({"window_size": (2**31, 0)}, ValueError, "window_size must be"),
        (
            {"window_size": (3, 3), "is_causal": False, "query": Q[:, :, :5], "statistics": []},
            ValueError,
            "window_size.*query_offset",
        ),
        ({"softcap": 0.0}, ValueError, r"softcap must be a finite number > 0 or None \(no cap\), got 0.0"),
        ({"softcap": float("inf")}, ValueError, "softcap must be"),
        ({"softcap": True}, ValueError, "softcap must be"),
        ({"sinks": torch.zeros(3)}, ValueError, r"sinks must have the shape \(4,\).*got \(3,\)"),
        ({"sinks": torch.zeros(4).int()}, TypeError, "sinks must be a float tensor, got torch.int32"),
        ({"sinks": [0.0] * 4}, TypeError, "sinks must be a float tensor, got list"),
        ({"sinks": torch.zeros(4, device="meta")}, ValueError, "sinks must be on query's device cpu, got meta"),
        ({"heads": [4]}, ValueError, r"heads must name different heads of 0 .. 3.*got \(4,\)"),
        ({"heads": []}, ValueError, "heads must name .*at least one"),
        ({"heads": [1, 1]}, ValueError, "heads must name different heads"),
        ({"heads": ["a"]}, TypeError, "heads must be a list of integers"),
        ({"heads": 3}, TypeError, "heads must be a list of integers, got 3"),
        ({"heads": {"fai": [0]}}, ValueError, r"heads: 'fai' is not among the statistics asked for: WAAD"),
        ({"heads": {"waad": [9]}}, ValueError, r"heads\['waad'\] must name"),
    ],
)
def test_bad_arguments(changed, error, match):
    good = {"query": Q, "key": K, "value": V, "statistics": [WAAD()], "enable_gqa": True}
    with pytest.raises(error, match=match):
        attnstats.attention(**good | changed)


def cu(*boundaries, dtype=torch.int32):
    return torch.tensor(boundaries, dtype=dtype)


@pytest.mark.parametrize(
    ("changed", "error", "match"),
    [
        ({"cu_seqlens_q": cu(1, 37)}, ValueError, r"cu_seqlens_q must start at 0, got \[1, 37\]"),
        ({"cu_seqlens_q": cu(0, 9, 7, 37)}, ValueError, "cu_seqlens_q must not decrease"),
        ({"cu_seqlens_q": cu(0, 38)}, ValueError, "cu_seqlens_q must end at most at 37"),
        ({"cu_seqlens_q": cu(0)}, TypeError, r"cu_seqlens_q must be an int32 or int64 tensor of shape \(sequences"),
        ({"cu_seqlens_q": [0, 37]}, TypeError, "cu_seqlens_q must be an int32 .*got list"),
        ({"cu_seqlens_q": cu(0, 37).float()}, TypeError, "cu_seqlens_q must be .*got torch.float32"),
        ({"cu_seqlens_q": cu(0, 37).to("meta")}, ValueError, "cu_seqlens_q must be on query's device cpu, got meta"),
        ({"cu_seqlens_k": cu(0, 9, 37)}, ValueError, "cu_seqlens_k must have as many sequences as cu_seqlens_q, 1"),
        ({"max_seqlen_q": 20}, ValueError, "max_seqlen_q must be at least the longest sequence, 37; got 20"),
        ({"max_seqlen_q": 37.0}, ValueError, "max_seqlen_q must be an integer"),
        ({"query": Q}, ValueError, r"query must have 3 dimensions.*\(2, 4, 37, 16\)"),
        ({"query": None}, TypeError, "query must be a tensor, got NoneType"),
        ({"key": K[0, :, :5].transpose(0, 1), "value": V[0, :, :5].transpose(0, 1)}, ValueError, "cu_seqlens_k: query"),
        ({"statistics": [PooledMap(2, 2)]}, ValueError, "PooledMap is one map of one sequence"),
        ({"query_mask": torch.ones(36).bool()}, ValueError, r"query_mask must have shape \(1, 37\)"),
        ({"dropout_p": 1.0}, ValueError, r"dropout_p must be a number in \[0, 1\)"),
        (
            {"cu_seqlens_q": cu(0, 9, 37), "cu_seqlens_k": cu(0, 5, 37), "is_causal": False},
            ValueError,
            "WAAD.*cross-attention",
        ),
    ],
)
def test_bad_packed_arguments(changed, error, match):
    query, key, value = PACKED
    good = {"query": query, "key": key, "value": value, "cu_seqlens_q": cu(0, 37), "statistics": [WAAD()]}
    with pytest.raises(error, match=match):
        attnstats.varlen_attention(**good | {"enable_gqa": True} | changed)


def test_boundaries_are_read_again_when_they_change():
    query, key, value = PACKED
    boundaries = cu(0, 10, 37)
    for _ in range(2):
        attnstats.varlen_attention(query, key, value, cu_seqlens_q=boundaries, enable_gqa=True)
    boundaries[1] = 40
    with pytest.raises(ValueError, match="cu_seqlens_q must not decrease"):
        attnstats.varlen_attention(query, key, value, cu_seqlens_q=boundaries, enable_gqa=True)


def test_lse_in_every_layout():
    """(B, H, T) of FlashAttention, (B, H, T, 1) of cuDNN, (H, total) and base 2 (total, H) of packed kernels."""
    asked = ["waad", "received"]
    _, stats = attnstats.attention(Q, K, V, statistics=asked, enable_gqa=True)
    for lse, base in ((stats.lse, "e"), (stats.lse[..., None], "e"), (stats.lse / torch.log(torch.tensor(2.0)), "2")):
        beside = attnstats.statistics_from_lse(Q, K, lse, statistics=asked, lse_base=base, enable_gqa=True)
        torch.testing.assert_close(beside["waad"], stats["waad"], rtol=0, atol=1e-4)
    query, key, value = PACKED
    packed = {"cu_seqlens_q": cu(0, 9, 37), "enable_gqa": True}
    _, stats = attnstats.varlen_attention(query, key, value, statistics=asked, **packed)
    for lse in (stats.lse, stats.lse.T, stats.lse.T[..., None]):
        beside = attnstats.statistics_from_lse(query, key, lse, statistics=asked, **packed)
        for s in asked:
            torch.testing.assert_close(beside[s], stats[s], rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match=r"lse must have the shape \(4, 37\) or \(37, 4\), got \(4, 36\)"):
        attnstats.statistics_from_lse(query, key, stats.lse[:, :36], statistics=asked, **packed)
    with pytest.raises(TypeError, match="statistics_from_lse: unknown argument 'is_casual'"):
        attnstats.statistics_from_lse(query, key, stats.lse, statistics=asked, is_casual=True, **packed)


def test_a_square_packed_lse_needs_its_layout():
    query, key, value = (x[:4] for x in PACKED)  # 4 tokens, 4 heads
    packed = {"cu_seqlens_q": cu(0, 4), "enable_gqa": True}
    _, stats = attnstats.varlen_attention(query, key, value, statistics=["waad"], **packed)
    with pytest.raises(ValueError, match=r"lse of shape \(4, 4\) is ambiguous.*lse_layout='HT' or 'TH'"):
        attnstats.statistics_from_lse(query, key, stats.lse, statistics=["waad"], **packed)
    for lse, layout in ((stats.lse, "HT"), (stats.lse.T, "TH")):
        beside = attnstats.statistics_from_lse(query, key, lse, statistics=["waad"], lse_layout=layout, **packed)
        torch.testing.assert_close(beside["waad"], stats["waad"], rtol=0, atol=1e-5)


def test_heads_by_name_and_by_statistic():
    asked = [WAAD(3), WAAD(10), "fai"]
    every = attnstats.attention(Q, K, V, statistics=asked, enable_gqa=True).statistics
    heads = {"waad": [3, 0], "fai": (1,)}
    some = attnstats.attention(Q, K, V, statistics=asked, enable_gqa=True, heads=heads).statistics
    assert some[WAAD(3)].shape == (2, 2, 37)
    for s in (WAAD(3), WAAD(10)):
        torch.testing.assert_close(some[s], every[s][:, [3, 0]], rtol=0, atol=1e-5)
    torch.testing.assert_close(some["fai"], every["fai"][:, [1]], rtol=0, atol=1e-6)
    one = attnstats.attention(Q, K, V, statistics=asked, enable_gqa=True, heads={WAAD(3): [1]}).statistics
    assert one[WAAD(3)].shape[1] == 1
    assert one[WAAD(10)].shape[1] == 4
