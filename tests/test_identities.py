"""Identities that hold whatever the numbers: no map of A is needed to check them.

Each relates statistics, or calls, to each other; together they pin down weights, counts, masks and offsets.
"""

import math

import pytest
import torch
from torch import Tensor

import attnstats
from attnstats import FAI, WAAD, Entropy, LocalMass, MaxLogit, MeanDistance, PooledMap, Received, SinkMass
from attnstats.tiled import native
from tests.cases import Case

BACKENDS = ("tiled", "plain", "triton")
CASES = {
    "causal": Case(),
    "full": Case(is_causal=False),
    "queries-last": Case(query_length=11, key_length=40),
    "left-some": Case(padding="left", counted="some"),
    "holes": Case(padding="holes"),
    "full-right": Case(is_causal=False, padding="right", counted="some"),
}


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    """ "plain" is tiled without the compiled sums."""
    if request.param == "plain":
        monkeypatch.setattr(native, "enabled", False)
        return "tiled"
    return request.param


def run(case: Case, statistics, backend, where, tensors=None, **changed):
    query, key, value = tensors or case.tensors(where)
    arguments = case.arguments(where) | changed
    return attnstats.attention(query, key, value, statistics=statistics, backend=backend, **arguments)


def close(a: Tensor, b: Tensor, atol: float = 3e-5) -> None:
    torch.testing.assert_close(a, b, rtol=2e-5, atol=atol)


def rows_and_counts(case: Case, stats, where) -> tuple[Tensor, Tensor]:
    """1 for rows that see a key and aren't padding, and the same for those that also count, (B, 1, Tq)."""
    arguments = case.arguments(where)
    live = stats.lse > -torch.inf
    if arguments["key_padding_mask"] is not None:
        padding = arguments["key_padding_mask"]
        live = live & padding[:, None, padding.shape[1] - case.query_length :]
    counted = live if arguments["query_mask"] is None else live & arguments["query_mask"][:, None]
    return live.float(), counted.float()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_sums_over_keys_and_queries_agree(case, backend, where):
    local = [LocalMass(w) for w in (3, 10, 11)]
    _, stats = run(
        case, ["received", FAI(0, None), FAI(3, 10), FAI(4, None), FAI(0, 3), WAAD(10), *local], backend, where
    )
    live, counted = rows_and_counts(case, stats, where)
    close(stats["received"].sum(-1), counted.sum(-1), 1e-4)
    ones = run(case, [FAI(3, 10)], backend, where).statistics.valid[FAI(3, 10)]
    assert ones.shape == (case.batch, case.key_length)
    assert float(stats[WAAD(10)].min()) >= -1e-4
    assert bool((stats[WAAD(10)] <= 10 * live + 1e-4).all())
    if case.is_causal:
        n = {s: numerators(case, s, where) for s in (FAI(0, None), FAI(3, 10), FAI(4, None), FAI(0, 3))}
        # sum_s |T(s)| FAI = what counted rows put at distances lo .. hi
        mass = (counted * (stats[LocalMass(11)] - stats[LocalMass(3)])).sum(-1)
        close((n[FAI(3, 10)] * stats[FAI(3, 10)]).sum(-1), mass, 1e-4)
        # an open horizon is everything less the near band
        near = n[FAI(0, 3)] * stats[FAI(0, 3)]
        close(n[FAI(4, None)] * stats[FAI(4, None)], stats["received"] - near, 1e-4)


def numerators(case: Case, statistic: FAI, where) -> Tensor:
    """|T(s)| by looking at every pair, (B, 1, Tk)."""
    arguments = case.arguments(where)
    counted = torch.ones(case.batch, case.query_length, dtype=torch.bool, device=where)
    if arguments["query_mask"] is not None:
        counted &= arguments["query_mask"]
    if arguments["key_padding_mask"] is not None:
        counted &= arguments["key_padding_mask"][:, case.key_length - case.query_length :]
    position = torch.arange(case.query_length, device=where) + case.key_length - case.query_length
    distance = position[:, None] - torch.arange(case.key_length, device=where)
    return (counted[:, :, None] & statistic.weight(distance)).sum(1)[:, None].float()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_waad_is_what_the_local_masses_leave(case, backend, where):
    local = [LocalMass(j) for j in range(1, 6)]
    _, stats = run(case, [WAAD(5), WAAD(1), WAAD(64), "mean_distance", *local], backend, where)
    live, _ = rows_and_counts(case, stats, where)
    close(stats[WAAD(5)], 5 * live - sum(stats[s] for s in local))
    close(stats[WAAD(1)], live - stats[LocalMass(1)])
    close(stats[WAAD(64)], stats["mean_distance"], 2e-4)


def test_queries_of_zero_attend_evenly(backend, where):
    length, window, lo, hi = 41, 6, 3, 9
    zeros = torch.zeros(1, 1, length, 16, device=where)
    keys = torch.randn(1, 1, length, 16, generator=torch.Generator().manual_seed(0)).to(where)
    asked = [WAAD(window), Entropy(), Received(), FAI(lo, hi), MeanDistance(), MaxLogit(), SinkMass(2)]
    _, stats = attnstats.attention(zeros, keys, keys, statistics=asked, backend=backend)
    harmonic = [0.0]
    for n in range(1, length + 1):
        harmonic.append(harmonic[-1] + 1 / n)
    for t in range(length):
        waad = t / 2 if t < window else window - window * (window + 1) / (2 * (t + 1))
        assert float(stats[WAAD(window)][0, 0, t]) == pytest.approx(waad, abs=2e-5)
        assert float(stats["entropy"][0, 0, t]) == pytest.approx(math.log(t + 1), abs=2e-5)
        assert float(stats["mean_distance"][0, 0, t]) == pytest.approx(t / 2, abs=2e-4)
        assert float(stats["sink_mass"][0, 0, t]) == pytest.approx(min(1.0, 2 / (t + 1)), abs=1e-5)
        assert float(stats["max_logit"][0, 0, t]) == 0.0
        assert float(stats["received"][0, 0, t]) == pytest.approx(harmonic[length] - harmonic[t], abs=2e-5)
        first, last = t + lo, min(length - 1, t + hi)
        expected = (harmonic[last + 1] - harmonic[first]) / (last - first + 1) if first <= last else 0.0
        assert float(stats[FAI(lo, hi)][0, 0, t]) == pytest.approx(expected, abs=1e-6)
        assert bool(stats.valid[FAI(lo, hi)][0, t]) == (first <= last)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_one_hot_rows_are_exact(dtype, backend, where):
    """Keys are the bits of their position as +-1, queries 64 times the bits of the key they want."""
    length, dim = 37, 16
    generator = torch.Generator().manual_seed(5)
    wanted = torch.tensor([int(torch.randint(t + 1, (), generator=generator)) for t in range(length)])
    bits = ((torch.arange(length)[:, None] >> torch.arange(dim)) & 1) * 2.0 - 1
    kind = getattr(torch, dtype)
    query, key = ((x[None, None]).to(where, kind) for x in (64 * bits[wanted], bits))
    asked = [WAAD(10), "received", "entropy", FAI(2, 12), "mean_distance"]
    _, stats = attnstats.attention(query, key, key, statistics=asked, scale=1.0, backend=backend)
    # Torch's half-precision kernel for the CPU approximates exp, and so its lse, to 2^-14.
    exact = backend == "triton" or dtype == "float32"
    distance = torch.arange(length) - wanted
    received = torch.bincount(wanted, minlength=length)
    for s, expected in (("waad", distance.clamp(max=10)), ("mean_distance", distance), ("received", received)):
        torch.testing.assert_close(
            stats[s][0, 0].cpu(), expected.float(), rtol=0 if exact else 2e-4, atol=0 if exact else 1e-3
        )
    assert stats["entropy"].abs().max() <= (0 if exact else 1e-4)
    hits = [sum(wanted[t] == s for t in range(s + 2, min(length, s + 13))) for s in range(length)]
    counts = [max(1, min(length - 1, s + 12) - s - 1) for s in range(length)]
    torch.testing.assert_close(
        stats[FAI(2, 12)][0, 0].cpu(), torch.tensor(hits) / torch.tensor(counts), rtol=2e-4, atol=0
    )


def test_a_shift_of_all_keys_moves_lse_and_max_logit_alone(backend, where):
    case = Case(batch=1, key_heads=1, group=2)
    query, key, value = case.tensors(where)
    shift = torch.randn(16, generator=torch.Generator().manual_seed(9)).to(where)
    statistics = case.statistics()
    before = run(case, statistics, backend, where)
    after = run(case, statistics, backend, where, (query, key + shift, value))
    moved = (query @ shift) / 4
    close(after.statistics.lse, before.statistics.lse + moved)
    close(after.statistics["max_logit"], before.statistics["max_logit"] + moved)
    for s in statistics:
        if s.name not in ("lse", "max_logit"):
            close(after.statistics[s], before.statistics[s], 3e-4)


def test_powers_of_two_between_query_key_and_scale_keep_the_bits(backend, where):
    case = Case(batch=1)
    query, key, value = case.tensors(where)
    statistics = case.statistics()
    expected = run(case, statistics, backend, where)
    for tensors, scale in (((query * 4, key / 4, value), None), ((query * 2, key, value), 0.125)):
        found = run(case, statistics, backend, where, tensors, scale=scale)
        assert torch.equal(found.output, expected.output)
        for s in statistics:
            assert torch.equal(found.statistics[s], expected.statistics[s]), s


def test_grouped_heads_equal_repeated_keys(backend, where):
    case = Case(key_heads=2, group=3)
    query, key, value = case.tensors(where)
    statistics = case.statistics()
    expected = run(case, statistics, backend, where, (query, *(x.repeat_interleave(3, 1) for x in (key, value))))
    found = run(case, statistics, backend, where)
    for s in statistics:
        close(found.statistics[s], expected.statistics[s], 1e-4)


def test_a_batch_equals_its_rows_and_heads_their_permutation(backend, where):
    case = Case(batch=3, key_heads=3, group=1)
    query, key, value = case.tensors(where)
    statistics = case.statistics()
    together = run(case, statistics, backend, where)
    order = [2, 0, 1]
    permuted = run(case, statistics, backend, where, tuple(x[:, order] for x in (query, key, value)))
    for b in range(3):
        alone = run(case, statistics, backend, where, tuple(x[b : b + 1] for x in (query, key, value)))
        for s in statistics:
            assert torch.equal(alone.statistics[s][0], together.statistics[s][b]), s
            assert torch.equal(permuted.statistics[s][b], together.statistics[s][b][order]), s


def test_rows_of_a_prefix_are_the_prefix_of_the_rows(backend, where):
    case = Case(query_length=50, key_length=50, batch=1)
    query, key, value = case.tensors(where)
    asked = [WAAD(10), MeanDistance(), Entropy(), LocalMass(3)]
    whole = run(case, asked, backend, where).statistics
    part = run(case, asked, backend, where, tuple(x[:, :, :29] for x in (query, key, value))).statistics
    for s in asked:
        close(part[s], whole[s][:, :, :29])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing_for_real_tokens(side, backend, where):
    case = Case(batch=1, query_length=31, key_length=31)
    tensors = case.tensors(where)
    statistics = [s for s in case.statistics() if not isinstance(s, PooledMap)]
    expected = run(case, statistics, backend, where).statistics
    extra = 9
    noise = [
        torch.randn(1, x.shape[1], extra, 16, generator=torch.Generator().manual_seed(2)).to(where) for x in tensors
    ]
    order = (lambda x, n: (n, x)) if side == "left" else (lambda x, n: (x, n))
    padded = tuple(torch.cat(order(x, n), 2) for x, n in zip(tensors, noise, strict=True))
    real = torch.zeros(1, 31 + extra, dtype=torch.bool, device=where)
    window = slice(extra, None) if side == "left" else slice(0, 31)
    real[:, window] = True
    found = run(case, statistics, backend, where, padded, key_padding_mask=real).statistics
    for s in statistics:
        close(found[s][..., window], expected[s], 1e-4)
        assert torch.equal(found.valid[s][:, window], expected.valid[s])
        if s.name != "lse":
            assert not found[s].masked_fill(real[:, None], 0).any(), s
            assert not found.valid[s].masked_fill(real, False).any(), s


def test_chunked_prefill_concatenates_rows_and_adds_columns(backend, where):
    case = Case(query_length=48, key_length=48)
    query, key, value = case.tensors(where)
    asked = [WAAD(10), MeanDistance(), Entropy(), Received(), PooledMap((0, 20, 48), 3)]
    whole = run(case, asked, backend, where).statistics
    cuts = ((0, 20), (20, 48))
    parts = [
        attnstats.attention(
            query[:, :, a:b], key[:, :, :b], value[:, :, :b], statistics=asked[:4], enable_gqa=True, backend=backend
        ).statistics
        for a, b in cuts
    ]
    for s in asked[:3]:
        close(torch.cat([p[s] for p in parts], -1), whole[s], 1e-4)
    first = torch.nn.functional.pad(parts[0]["received"], (0, 28))
    close(first + parts[1]["received"], whole["received"])
    close(whole[asked[4]].sum(-1), torch.stack([p["received"].sum(-1) for p in parts], -1), 1e-4)


def test_keys_in_parts_combine_by_their_lse(backend, where):
    """A = sum_i w_i A_i with w_i = exp(lse_i - lse): statistics of shards of the keys add up."""
    case = Case(is_causal=False, query_length=24, key_length=60, group=1)
    query, key, _ = case.tensors(where)
    asked = [Received(), Entropy()]
    whole = attnstats.attention(query, key, key, statistics=asked, is_causal=False, backend=backend).statistics
    parts = [
        attnstats.attention(query, k, k, statistics=asked, is_causal=False, backend=backend).statistics
        for k in (key[:, :, :23], key[:, :, 23:])
    ]
    shares = [(p.lse - whole.lse).exp() for p in parts]
    entropy = sum(w * (p["entropy"] - w.log()) for w, p in zip(shares, parts, strict=True))
    close(entropy, whole["entropy"])
    from_whole = [
        attnstats.statistics_from_lse(
            query, k, whole.lse, statistics=asked, is_causal=False, check=False, backend=backend
        )
        for k in (key[:, :, :23], key[:, :, 23:])
    ]
    close(torch.cat([p["received"] for p in from_whole], -1), whole["received"])
    close(sum(p["entropy"] for p in from_whole), whole["entropy"])


def test_a_larger_lse_scales_linear_statistics(backend, where):
    case = Case(group=1)
    query, key, _ = case.tensors(where)
    asked = [LocalMass(4), MeanDistance(), FAI(2, 9), Received(), SinkMass(2)]
    base = attnstats.attention(query, key, key, statistics=asked, backend=backend).statistics
    shifted = attnstats.statistics_from_lse(query, key, base.lse + 0.5, statistics=asked, check=False, backend=backend)
    for s in asked:
        close(shifted[s], base[s] * math.exp(-0.5), 1e-4)


@pytest.mark.parametrize("window", [1, 10, 64])
def test_waad_takes_a_row_to_sum_to_one(window, backend, where):
    """It is `window` less a band, so mass that an lse takes away counts as if it were `window` tokens back. A window
    that holds the whole sequence (64 of 37 tokens) needs no such complement."""
    case = Case(group=1, padding="left")
    query, key, _ = case.tensors(where)
    arguments = case.arguments(where)
    base = attnstats.attention(query, key, key, statistics=[WAAD(window)], backend=backend, **arguments).statistics
    shifted = attnstats.statistics_from_lse(
        query, key, base.lse + 0.5, statistics=[WAAD(window)], check=False, backend=backend, **arguments
    )
    mass = math.exp(-0.5)
    live = (base.lse > -torch.inf).float()
    beyond = window * (1 - mass) * live if window < case.key_length else 0.0
    expected = base[WAAD(window)] * mass + beyond
    close(shifted[WAAD(window)], expected, 3e-5 * window)


@pytest.mark.parametrize("name", ["reference", "tiled"])
def test_a_sink_takes_its_share_of_every_linear_statistic(name):
    """With its sinks told, WAAD knows that a row sums to less than 1 too."""
    case = Case(padding="left")
    query, key, value = case.tensors()
    arguments = case.arguments() | {"backend": name}
    asked = [WAAD(10), LocalMass(4), MeanDistance(), FAI(2, 9), Received(), SinkMass(2)]
    rows = [s for s in asked if not isinstance(s, (FAI, Received))]
    base = attnstats.attention(query, key, value, statistics=asked, **arguments).statistics
    sinks = torch.linspace(-3, 3, query.shape[1])
    told = arguments | {"sinks": sinks}
    lse = torch.logaddexp(base.lse, sinks[:, None])
    with_sinks = attnstats.attention(query, key, value, statistics=asked, **told).statistics
    beside = attnstats.statistics_from_lse(query, key, lse, statistics=asked, **told)
    live = base.lse > -torch.inf
    close(with_sinks.lse[live], lse[live])
    share = (base.lse - lse).exp().masked_fill(~live, 0.0)
    assert float(share[live].max()) < 1
    for s in rows:
        close(with_sinks[s], base[s] * share, 1e-4)
    for s in asked:
        close(beside[s], with_sinks[s], 1e-4)


def test_pooled_map_sums_back(backend, where):
    case = Case(padding="left", counted="some")
    finest = PooledMap(37, 37)
    coarse = PooledMap((0, 5, 6, 37), (0, 1, 30, 37))
    _, stats = run(case, [finest, coarse, "received"], backend, where)
    close(stats[finest].sum(2), stats["received"])
    rows = [stats[finest][:, :, a:b].sum(2) for a, b in ((0, 5), (5, 6), (6, 37))]
    close(
        stats[coarse],
        torch.stack([torch.stack([r[..., a:b].sum(-1) for a, b in ((0, 1), (1, 30), (30, 37))], -1) for r in rows], 2),
    )
