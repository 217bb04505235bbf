"""What a trainer's settings ask of the credit functions: every number arrives where it belongs."""

import pytest
import torch

from attnstats import credit, presets
from attnstats.integrations.settings import KINDS, RhythmCredit, Signals

MASK = torch.ones(2, 5, dtype=torch.bool)
SIGNALS = Signals(torch.rand(2, 5), torch.rand(2, 5), MASK, torch.rand(2, 5))
SHARED = {"q": 0.3, "amp": 2.0, "keep_mean": True}
FUNCTIONS = {
    "coupled": ("coupled_rhythm", SHARED | {"alpha": 0.7, "k": 2, "tau_waad": 1.5, "tau_delta": 2.5}),
    "local": ("local_chunk", SHARED),
    "global": ("global_anchor", SHARED),
    "random": ("random_tokens", SHARED),
    "entropy": ("high_entropy", SHARED),
    "entropy-selection": ("high_entropy_selection", {"q": 0.3}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_number_arrives(monkeypatch, kind):
    name, expected = FUNCTIONS[kind]
    settings = RhythmCredit(kind, q=0.3, amp=2.0, alpha=0.7, k=2, tau_waad=1.5, tau_delta=2.5, keep_mean=True)
    asked = {}

    def record(*curves, **numbers):
        asked.update(numbers, curves=curves)
        return torch.ones(2, 5)

    monkeypatch.setattr(credit, name, record)
    generator = torch.Generator()
    settings.gamma(SIGNALS, MASK, generator)
    curves = asked.pop("curves")
    assert curves[-1] is MASK
    if kind in ("coupled", "global"):
        assert asked.pop("valid") is SIGNALS.fai_valid
    if kind == "random":
        assert asked.pop("generator") is generator
    assert asked == expected


def test_presets():
    first = RhythmCredit.from_preset(presets.paper_v1)
    assert (first.hi, first.sign, first.q) == (50, "positive", 0.4)
    assert RhythmCredit.from_preset(presets.paper_v2) == RhythmCredit(q=0.4)
    selection = RhythmCredit.from_preset(presets.paper_v2, kind="entropy-selection")
    weights = selection.gamma(SIGNALS, MASK)
    assert weights.sum(1).tolist() == [1, 1], "a fifth, not the paper's two fifths"
