"""A trainer's settings: each credit is computed with every number that was set, and presets fill the others."""

import math

import pytest
import torch

from attnstats import credit, presets
from attnstats.integrations.settings import KINDS, RhythmCredit, Signals

torch.manual_seed(0)
MASK = torch.rand(8, 40) < 0.9
WAAD, FAI, VALID, ENTROPY = torch.rand(8, 40), torch.rand(8, 40), torch.rand(8, 40) < 0.8, torch.rand(8, 40)
SIGNALS = Signals(WAAD, FAI, VALID, ENTROPY)
SHARED = {"q": 0.3, "amp": 2.0, "keep_mean": True}
COUPLED = {"alpha": 0.7, "k": 2, "tau_waad": 0.6, "tau_delta": 0.2}
EXPECTED = {
    "coupled": lambda settings: credit.coupled_rhythm(WAAD, FAI, MASK, valid=VALID, **SHARED | COUPLED | settings),
    "local": lambda settings: credit.local_chunk(WAAD, MASK, **SHARED | settings),
    "global": lambda settings: credit.global_anchor(FAI, MASK, valid=VALID, **SHARED | settings),
    "random": lambda settings: credit.random_tokens(
        MASK, generator=torch.Generator().manual_seed(1), **SHARED | settings
    ),
    "entropy": lambda settings: credit.high_entropy(ENTROPY, MASK, **SHARED | settings),
    "entropy-selection": lambda settings: credit.high_entropy_selection(ENTROPY, MASK, **{"q": 0.3} | settings),
}
OTHERS = {"q": 0.5, "amp": 3.0, "keep_mean": False, "alpha": 0.1, "k": 3, "tau_waad": 0.4, "tau_delta": 0.6}


@pytest.mark.parametrize("kind", KINDS)
def test_every_number_matters(kind):
    names = {"entropy-selection": {"q"}, "coupled": SHARED | COUPLED}.get(kind, SHARED)
    for changes in ({}, *({name: OTHERS[name]} for name in names)):
        settings = RhythmCredit(kind, **SHARED | COUPLED | changes)
        gamma = settings.gamma(SIGNALS, MASK, torch.Generator().manual_seed(1))
        assert torch.equal(gamma, EXPECTED[kind](changes)), changes
        assert torch.equal(gamma, EXPECTED[kind]({})) == (not changes), changes


def test_presets():
    first = RhythmCredit.from_preset(presets.paper_v1, kind="local")
    assert (first.kind, first.hi, first.sign, first.q) == ("local", 50, "positive", 0.4)
    assert RhythmCredit.from_preset(presets.paper_v2) == RhythmCredit(q=0.4)
    selection = RhythmCredit.from_preset(presets.paper_v2, kind="entropy-selection")
    weights = selection.gamma(SIGNALS, MASK)
    expected = [math.ceil(0.2 * count) for count in MASK.sum(1).tolist()]
    assert weights.masked_fill(~MASK, 0).sum(1).tolist() == expected, "a fifth, not the paper's two fifths"
