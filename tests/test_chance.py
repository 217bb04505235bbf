"""Permutations and bootstraps: against exact distributions, and of many responses against those of each alone."""

import math

import numpy as np
import pytest
import scipy.stats
import torch

from attnstats import chance as module
from attnstats.chance import FEWEST, Chance, Coupling, CouplingSum, Groups, Marked

# Responses with a mark at a value of 0: enough of them for a p, which they don't change.
ENOUGH = [Marked(np.ones(1, dtype=bool), np.zeros(1))] * (FEWEST - 1)


def coupling(responses, chance=Chance(), shuffled=False):
    total = CouplingSum("x", chance, shuffled)
    for response in responses:
        total.add(response)
    return total.result()


def test_marks_at_all_tokens_but_one_can_be_placed_in_as_many_ways():
    values = np.array([1.0, 2.0, 4.0, 8.0, 16.0])
    for marks, expected in ((np.ones(5, dtype=bool), {31.0}), (values < 16, set(31 - values))):
        found = module._placed_anew(Marked(marks, values), Chance(permutations=200), np.random.default_rng(0))
        assert set(found.tolist()) == expected


def drawn(length, seed):
    return torch.rand(length, generator=torch.Generator().manual_seed(seed))


def test_permutations_are_exact():
    """Binary values are drawn as hypergeometric numbers, others one by one: the same distribution."""
    values = (drawn(60, 1) > 0.7).double()
    marks = drawn(60, 2) > 0.6
    binary = [Marked.of(marks, values, torch.ones(60, dtype=torch.bool)), *ENOUGH]
    tripled = [Marked.of(marks, 3 * values, torch.ones(60, dtype=torch.bool)), *ENOUGH]
    many = Chance(permutations=20000)
    hits, ones, count = int(values[marks].sum()), int(values.sum()), int(marks.sum())
    exact = scipy.stats.hypergeom(60, ones, count).sf(hits - 1)
    assert coupling(binary, many).p_value == pytest.approx(exact, abs=0.015)
    assert coupling(tripled, many).p_value == pytest.approx(exact, abs=0.015)


def test_a_shift_keeps_the_distances_between_marks():
    """Marks and values that both alternate always fit or never do: as shifts go, half of them are as good."""
    marks = torch.arange(40) % 2 == 0
    response = [Marked.of(marks, marks.double(), torch.ones(40, dtype=torch.bool)), *ENOUGH]
    assert coupling(response, Chance(null="shuffle")).p_value < 0.001
    assert coupling(response, Chance(null="shift")).p_value == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("settings", [{"permutations": 0}, {"resamples": 0}, {"null": "bootstrap"}])
def test_bad_chances(settings):
    with pytest.raises(ValueError, match="must be"):
        Chance(**settings)


def test_a_coupling_over_nothing_has_no_lift():
    assert math.isnan(Coupling("x", 0.5, 0.0, 1.0, 0.0, 0.0, 1, 1).lift)
    assert Coupling("x", 0.3608, 0.2386, 1.0, 0.0, 0.0, 1, 1).lift == pytest.approx(0.5122, abs=1e-4)  # Table 2


def corpus(count, effect):
    """Responses of 10 to 40 tokens, a fifth of them marked, with values that are higher there by `effect`."""
    rng = np.random.default_rng(3)
    responses = []
    for _ in range(count):
        length = int(rng.integers(10, 40))
        marks = rng.random(length) < 0.2
        responses.append(Marked(marks, rng.exponential(size=length) + effect * marks))
    return responses


@pytest.mark.parametrize("null", ["shuffle", "shift"])
@pytest.mark.parametrize("effect", [0.0, 0.04, -0.02])
def test_many_responses_give_what_each_alone_gives(monkeypatch, null, effect):
    """400 responses singly, and as 50 of which each stands for eight: p and interval differ by what the draws do."""
    chance = Chance(4000, resamples=4000, null=null)
    responses = corpus(400, effect)
    singly = coupling(responses, chance)
    monkeypatch.setattr(module, "ONE_BY_ONE", 50)
    together = coupling(responses, chance)
    exact = ("observed", "random", "count", "responses")
    for name in exact:
        assert getattr(together, name) == pytest.approx(getattr(singly, name), rel=1e-12)
    assert together.p_value == pytest.approx(singly.p_value, abs=0.03)
    width = singly.high - singly.low
    assert together.low == pytest.approx(singly.low, abs=0.2 * width)
    assert together.high == pytest.approx(singly.high, abs=0.2 * width)


def test_moments_are_those_of_the_permutations():
    (response,) = corpus(1, 0.5)
    for null in ("shuffle", "shift"):
        placed = module._placed_anew(response, Chance(50_000, null=null), np.random.default_rng(0))
        mean, variance = module._moments_anew(response, Chance(null=null))
        assert mean == pytest.approx(placed.mean(), rel=0.01)
        assert variance == pytest.approx(placed.var(), rel=0.03)
    assert module._moments_anew(Marked(np.ones(1, dtype=bool), np.ones(1)), Chance()) == (1.0, 0.0)


def test_groups_are_as_many_for_every_number_of_responses(monkeypatch):
    monkeypatch.setattr(module, "ONE_BY_ONE", 4)
    groups = Groups(2)
    for i in range(10):
        groups.add(i, 1)
    assert groups.rows.tolist() == [[12.0, 3.0], [15.0, 3.0], [8.0, 2.0], [10.0, 2.0]]
    assert groups.resampled(7, np.random.default_rng(0)).shape == (2, 7)
