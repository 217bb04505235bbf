"""The catalogue and the containers: names, settings, look-up."""

import pytest
import torch

import attnstats
from attnstats import FAI, LSE, WAAD, LocalMass, PooledMap, Received, SinkMass, attention
from attnstats.results import ByStatistic
from attnstats.statistics import CATALOGUE, DistanceWeighted, resolve


def test_names_are_those_of_the_design():
    rows = {"waad", "local_mass", "mean_distance", "entropy", "max_logit", "lse", "sink_mass"}
    assert rows | {"fai", "received", "pooled_map"} <= set(CATALOGUE)


def test_every_statistic_is_exported():
    names = {cls.__name__ for cls in CATALOGUE.values()}
    assert names <= set(attnstats.__all__)
    assert all(getattr(attnstats, cls.__name__) is cls for cls in CATALOGUE.values())


@pytest.mark.parametrize("cls", [c for c in CATALOGUE.values() if issubclass(c, DistanceWeighted)])
def test_weights_are_constant_beyond_their_band(cls):
    statistic = cls()
    if statistic.band is not None:
        lo, hi = statistic.band
        outside = torch.tensor([lo - 40, lo - 1, hi + 1, hi + 500])
        assert torch.equal(statistic.weight(outside).float(), torch.full((4,), statistic.tail))
        assert statistic.weight(torch.tensor([hi])).item() != statistic.tail


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: WAAD(0), "WAAD: window must be an integer >= 1, got 0"),
        (lambda: LocalMass("4"), "LocalMass: window"),  # type: ignore[arg-type]
        (lambda: WAAD(True), "WAAD: window"),
        (lambda: WAAD(2**31 - 1), r"WAAD: window must be below 2\*\*31 - 1, got 2147483647"),
        (lambda: LocalMass(2**40), "LocalMass: window must be below"),
        (lambda: FAI(0, 2**31 - 1), "FAI: hi must be below"),  # the kernels would take it for an open horizon
        (lambda: FAI(2**31 - 1, None), "FAI: lo must be below"),
        (lambda: FAI(-1, 4), "FAI: lo must be an integer >= 0"),
        (lambda: FAI(5, 4), "FAI: lo must be <= hi, got lo=5, hi=4"),
        (lambda: Received(0), "Received: last"),
        (lambda: SinkMass(0), "SinkMass: count"),
        (lambda: PooledMap(0, 3), "PooledMap: query_segments"),
        (lambda: PooledMap(2, (0, 4, 4)), "PooledMap: key_segments must increase"),
        (lambda: PooledMap((1, 4), 2), "PooledMap: query_segments must increase from 0"),
        (lambda: PooledMap([1, 4], 2), "PooledMap: query_segments must increase from 0"),  # type: ignore[arg-type]
        (lambda: PooledMap((0, 2.5, 4), 2), r"PooledMap: query_segments must hold integers, got \(0, 2.5, 4\)"),  # type: ignore[arg-type]
        (lambda: PooledMap(2, ("0", "4")), "PooledMap: key_segments must hold integers"),  # type: ignore[arg-type]
        (lambda: PooledMap(2, (False, True)), "PooledMap: key_segments must hold integers"),
        (lambda: PooledMap(torch.tensor([0, 4]), 2), "PooledMap: query_segments must be an integer"),  # type: ignore[arg-type]
        (lambda: PooledMap((0, 4), 2).boundaries(5, 5), "query_segments must end at the length 5, got 4"),
    ],
)
def test_bad_settings_are_named(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_uniform_bins_cover_the_length():
    assert PooledMap(3, 2).boundaries(10, 4) == ((0, 3, 6, 10), (0, 2, 4))


def test_boundaries_can_be_a_list():
    assert PooledMap([0, 2, 5], 2) == PooledMap((0, 2, 5), 2)
    assert hash(PooledMap(2, [0, 5])) == hash(PooledMap(2, (0, 5)))


@pytest.mark.parametrize("wrong", [None, 3, WAAD])
def test_statistics_that_are_no_list_are_named(wrong):
    query = torch.zeros(1, 1, 2, 16)
    with pytest.raises(TypeError, match="statistics must be a list, got"):
        resolve(wrong)
    with pytest.raises(TypeError, match="statistics must be a list, got"):
        attention(query, query, query, statistics=wrong)


def test_resolve():
    assert resolve(["waad", WAAD(10), WAAD(5)]) == (WAAD(10), WAAD(5))
    with pytest.raises(TypeError, match=r"must be a list, got 'waad'; write \['waad'\]"):
        resolve("waad")
    with pytest.raises(TypeError, match=r"got <class .*WAAD'>; write WAAD\(\)"):
        resolve([WAAD])


def test_look_up_by_statistic_and_by_name():
    one, two = torch.zeros(1), torch.ones(1)
    stats = ByStatistic({WAAD(10): one, WAAD(20): two, LSE(): one})
    assert stats[WAAD(20)] is two
    assert stats["lse"] is one
    assert "waad" in stats
    assert WAAD(30) not in stats
    with pytest.raises(KeyError, match=r"'waad' is ambiguous: WAAD\(window=10\), WAAD\(window=20\)"):
        stats["waad"]
    with pytest.raises(KeyError, match="not among the statistics computed"):
        stats["fai"]
