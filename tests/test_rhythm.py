"""Changes of a curve, its peaks, and couplings: against scipy, counting by hand, and data with and without a rhythm."""

import dataclasses
import math
import weakref

import numpy as np
import pytest
import scipy.signal
import scipy.stats
import torch

from attnstats.chance import FEWEST, Chance
from attnstats.curves import delta
from attnstats.rhythm import CURVES, Curves, PeakRule, corpus_rhythm, couplings, peaks, sets, top

FAST = Chance(permutations=400, resamples=400)


def test_delta_is_the_change_to_the_next_token():
    assert delta(torch.tensor([1.0, 4.0, 2.0, 2.0])).tolist() == [3.0, 2.0, 0.0, 0.0]


def test_the_last_token_has_no_successor():
    assert delta(torch.tensor([7.0])).tolist() == [0.0]
    assert delta(torch.tensor([0.0, 7.0]))[-1] == 0


def test_delta_of_a_mean_is_not_the_mean_of_deltas():
    heads = torch.tensor([[0.0, 2.0], [2.0, 0.0]])
    assert delta(heads.mean(0)).tolist() == [0.0, 0.0]
    assert delta(heads).mean(0).tolist() == [2.0, 0.0]


def test_top_is_largest_first_and_ties_go_to_the_lower_index():
    assert top(torch.tensor([1.0, 3.0, 2.0, 3.0]), 3) == [1, 3, 2]


def test_top_never_takes_a_placeholder():
    values, valid = torch.tensor([5.0, 1.0, 9.0]), torch.tensor([True, True, False])
    assert top(values, 3, valid) == [0, 1]
    assert top(values, 3, torch.zeros(3, dtype=torch.bool)) == []


def drawn(length, seed, levels=None):
    draw = torch.Generator().manual_seed(seed)
    if levels:  # many ties
        return torch.randint(levels, (length,), generator=draw).float()
    return torch.rand(length, generator=draw)


def at(marks):
    return marks.nonzero().flatten().tolist()


@pytest.mark.parametrize("length", [0, 1, 2, 3, 10, 200])
@pytest.mark.parametrize("levels", [None, 2, 4])
def test_peaks_are_scipys(length, levels):
    for seed in range(10):
        curve = drawn(length, seed, levels)
        assert at(peaks(curve)) == scipy.signal.find_peaks(curve.numpy())[0].tolist()


@pytest.mark.parametrize(("curve", "expected"), [
    ([1, 2, 1], [1]),
    ([2, 1, 2], []),  # ends are no maxima
    ([1, 2, 2, 1], [1]),  # of a plateau the middle, of two middles the left
    ([1, 2, 2, 2, 1], [2]),
    ([1, 2, 2], []),
    ([2, 2, 2], []),
    ([1, 2, 2, 3, 1], [3]),
])  # fmt: skip
def test_plateaus_and_ends(curve, expected):
    assert at(peaks(torch.tensor(curve).float())) == expected


def test_nothing_beside_what_is_not_valid_is_a_peak():
    curve = torch.tensor([0.0, 5.0, 1.0, 9.0, 1.0, 5.0, 0.0, 7.0, 7.0, 0.0])
    valid = torch.tensor([True, True, True, False, True, True, True, True, False, False])
    assert at(peaks(curve, valid)) == [1, 5]
    assert at(peaks(torch.where(valid, curve, torch.nan))) == [1, 5]
    assert at(peaks(curve, torch.zeros(10, dtype=torch.bool))) == []
    beside = torch.tensor([True, True, False] + [True] * 7)
    assert at(peaks(curve, beside)) == [5, 7]  # 1 stands beside 2, 3 too


@pytest.mark.parametrize("quantile", [0.25, 0.5, 0.9])
def test_a_quantile_keeps_the_high_ones(quantile):
    curve, valid = drawn(200, 3), torch.arange(200) < 180
    limit = np.quantile(curve[:180].double().numpy(), quantile)
    high = (curve.double() >= limit) & valid
    assert torch.equal(peaks(curve, valid, PeakRule(quantile=quantile)), peaks(curve, valid) & high)
    assert torch.equal(peaks(curve, valid, PeakRule(maxima=False, quantile=quantile)), high)


def test_prominence_is_in_standard_deviations():
    curve = drawn(300, 4).double()
    for prominence in (0.5, 1.0, 2.0):
        expected = scipy.signal.find_peaks(curve.numpy(), prominence=prominence * curve.numpy().std())[0]
        rule = PeakRule(prominence=prominence)
        assert at(peaks(curve, rule=rule)) == expected.tolist() == at(peaks(1000 * curve + 5, rule=rule))


@pytest.mark.parametrize("settings", [
    {"quantile": 1.0}, {"quantile": -0.1}, {"quantile": math.nan}, {"prominence": -1.0}, {"prominence": math.inf},
    {"maxima": False}, {"maxima": False, "quantile": 0.5, "prominence": 1.0},
])  # fmt: skip
def test_bad_rules(settings):
    with pytest.raises(ValueError, match=r"quantile|prominence"):
        PeakRule(**settings)


@pytest.mark.parametrize(("rule", "text"), [
    (PeakRule(), "local maxima"),
    (PeakRule(quantile=0.5, prominence=0.5), "local maxima, at or above quantile 0.5, prominence 0.5 sd"),
    (PeakRule(maxima=False, quantile=0.8), "tokens, at or above quantile 0.8"),
])  # fmt: skip
def test_a_rule_says_what_it_is(rule, text):
    assert str(rule) == text


def without_rhythm(seed, length=150):
    """Four curves that have nothing to do with each other; FAI not valid at the end."""
    waad, fai, received, entropy = (drawn(length, 10 * seed + i) for i in range(4))
    valid = torch.arange(length) < length - 10
    return Curves(waad, fai, received, entropy, valid, valid)


def with_rhythm(seed, length=150):
    """FAI is high right after WAAD, entropy is high where WAAD is, receivers do as global heads do."""
    c = without_rhythm(seed, length)
    fai = torch.roll(c.waad, 1) + 0.2 * c.fai
    return dataclasses.replace(c, fai=fai, receiver_fai=fai + 0.2 * c.receiver_fai, entropy=0.2 * c.entropy + c.waad)


def offsets(curves):
    return corpus_rhythm(curves, chance=FAST, reach=1).offsets()


def test_couplings_by_hand():
    curves = [  # receivers have no value at five tokens more than all heads
        dataclasses.replace(without_rhythm(seed, length), receiver_valid=torch.arange(length) < length - 15)
        for seed, length in ((1, 40), (2, 90), (3, 25))
    ]
    entropy, tokens, same, follow, chance = [], [], [], [], []
    is_peak = []
    for c in curves:
        length = len(c.waad)
        waad, fai, received = (at(peaks(getattr(c, n), c.valid(n))) for n in ("waad", "fai", "receiver_fai"))
        entropy += [c.entropy[t].item() for t in waad]
        tokens += c.entropy.tolist()
        same += [t in fai for t in received]
        is_peak += [t in fai for t in range(length - 15)]
        follow += [t in waad or t - 1 in waad for t in fai]
        chance += [np.mean([t in waad or t - 1 in waad for t in range(length - 10)])] * len(fai)
    first, second, third = couplings(curves, chance=FAST)
    assert first.observed == pytest.approx(np.mean(entropy))
    assert first.random == pytest.approx(np.mean(tokens))
    assert (second.observed, second.random) == (pytest.approx(np.mean(same)), pytest.approx(np.mean(is_peak)))
    assert (third.observed, third.random) == (pytest.approx(np.mean(follow)), pytest.approx(np.mean(chance)))
    assert [c.count for c in (first, second, third)] == [len(entropy), len(same), len(follow)]
    assert first.lift == pytest.approx((first.observed - first.random) / first.random)


@pytest.mark.parametrize("null", ["shuffle", "shift"])
def test_a_rhythm_shows(null):
    chance = dataclasses.replace(FAST, null=null)
    for found in couplings([with_rhythm(seed) for seed in range(8)], chance=chance):
        assert found.lift > 0.3
        assert 0 < found.low < found.lift < found.high
        assert found.p_value == 1 / 401


@pytest.mark.parametrize("null", ["shuffle", "shift"])
def test_no_rhythm_no_coupling(null):
    """p-values of 20 corpora without a rhythm are spread over 0..1; the intervals hold 0 nearly always."""
    chance = dataclasses.replace(FAST, null=null)
    corpora = [couplings([without_rhythm(100 * i + j, 80) for j in range(6)], chance=chance) for i in range(20)]
    for kind in range(3):
        p_values = [found[kind].p_value for found in corpora]
        assert scipy.stats.kstest(p_values, "uniform").pvalue > 0.01
        assert sum(found[kind].low <= 0 <= found[kind].high for found in corpora) >= 15


def test_peaks_that_avoid_each_other_have_a_high_p_value():
    curves = [dataclasses.replace(c, entropy=-c.waad) for c in map(without_rhythm, range(6))]
    found = couplings(curves, chance=FAST)[0]
    assert found.p_value == 1.0
    assert found.observed < found.random


def test_the_seed_decides():
    curves = [without_rhythm(seed) for seed in range(FEWEST)]
    first = couplings(curves, chance=FAST)
    assert couplings(curves, chance=FAST) == first
    assert couplings(curves, chance=dataclasses.replace(FAST, seed=1)) != first


def test_no_peaks_no_number():
    flat = torch.ones(30)
    found = couplings([Curves(flat, flat, flat, flat)] * 3, chance=FAST)
    for one in found:
        assert one.count == 0
        assert math.isnan(one.observed)
        assert math.isnan(one.lift)


@pytest.mark.parametrize("length", [1, 2, 3])
def test_responses_of_a_few_tokens_do_no_harm(length):
    long = [with_rhythm(seed) for seed in range(3)]
    short = Curves(*(drawn(length, seed) for seed in range(4)))
    found = couplings([short, *long], chance=FAST)
    assert all(math.isfinite(c.lift) for c in found)
    assert all(math.isfinite(c.lift) for c in offsets([short, *long]).values())
    tokens = torch.cat([short.entropy, *(c.entropy for c in long)])
    assert found[0].random == pytest.approx(tokens.double().mean().item())


@pytest.mark.parametrize("count", [1, FEWEST - 1, FEWEST])
def test_a_few_responses_have_no_interval_and_no_p(count):
    """One response alone is what every resample draws: an interval from +27.4 % to +27.4 % says nothing."""
    for found in couplings([with_rhythm(seed) for seed in range(count)], chance=FAST):
        assert math.isfinite(found.lift)
        assert found.responses == count
        for number in (found.p_value, found.low, found.high):
            assert math.isfinite(number) == (count >= FEWEST)
        assert bool(found.reason) == (count < FEWEST)
        assert found.reason in ("", "no interval and no p over fewer than 5 responses with a peak")


def test_responses_without_a_peak_give_no_interval():
    """Ten responses of which one has peaks are one response."""
    flat = torch.ones(30)
    for found in couplings([with_rhythm(0), *[Curves(flat, flat, flat, flat)] * 9], chance=FAST):
        assert found.responses == 1
        assert math.isnan(found.low)


def test_curves_come_one_at_a_time_and_are_not_kept():
    alive, most = weakref.WeakSet(), []

    def curves():
        for seed in range(12):
            alive.add(c := with_rhythm(seed, 60))
            most.append(len(alive))
            yield c
            del c

    corpus = corpus_rhythm(curves(), chance=FAST, reach=1)
    assert max(most) <= 2  # the one that is counted, and the next
    assert corpus.couplings() == couplings([with_rhythm(seed, 60) for seed in range(12)], chance=FAST)
    assert corpus.couplings() == corpus.couplings()


def test_nothing_is_over_no_responses():
    with pytest.raises(ValueError, match="curves is empty"):
        couplings([])


def test_offsets_by_hand():
    curves = [without_rhythm(1), without_rhythm(2)]
    table = offsets(curves)
    assert len(table) == 4 * 3 * 3
    for (of, near, offset), found in table.items():
        hits, total = 0, 0
        for c in curves:
            marks = {name: at(peaks(getattr(c, name), c.valid(name))) for name in CURVES}
            hits += sum(t + offset in marks[near] for t in marks[of])
            total += len(marks[of])
        assert found.observed == pytest.approx(hits / total), (of, near, offset)
        assert found.count == total


def test_offsets_find_what_follows():
    table = offsets([with_rhythm(seed) for seed in range(5)])
    lifts = [table["waad", "fai", offset].lift for offset in (-1, 0, 1)]
    assert lifts[1] < 0 < lifts[2]
    assert lifts[2] > max(1, 3 * lifts[0])  # maxima are never neighbours, so that peaks two apart are frequent
    assert table["fai", "waad", -1].lift > 1


def test_densities_are_shares_of_valid_tokens():
    curves = [without_rhythm(1), without_rhythm(2, 60)]
    expected = sum(int(peaks(c.fai, c.fai_valid).sum()) for c in curves) / (140 + 50)
    assert corpus_rhythm(curves).densities()["fai"] == pytest.approx(expected)


@pytest.mark.parametrize("q", [0.2, 0.4])
@pytest.mark.parametrize("k", [1, 3])
def test_sets_by_hand(q, k):
    c = without_rhythm(4, 60)
    found = sets(c, q, k)
    change = delta(c.waad).tolist()
    waad, count = c.waad.tolist(), math.ceil(q * 60)
    assert sorted(at(found.chunk)) == sorted(top(delta(c.waad), count))
    anchors = top(c.fai, count, c.fai_valid)
    assert sorted(at(found.anchor)) == sorted(anchors)
    assert not found.anchor[50:].any()
    low, large = sorted(waad)[29], sorted(change[:-1])[29]  # lower medians of 60 and of 59
    dominated = {t for t in anchors if waad[t] <= low and max(change[max(0, t - k) : t], default=-1.0) >= large}
    assert set(at(found.dominated)) == dominated
    intro = {max(range(max(0, t - k), t), key=lambda s: (change[s], s)) for t in dominated}
    assert set(at(found.intro)) == intro
