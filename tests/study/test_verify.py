"""--verify finds what is wrong: a check that cannot fail would prove nothing."""

import dataclasses

import pytest
import torch

from attnstats.study.analysis import Settings
from attnstats.study.pipeline import analyze
from attnstats.study.verify import differences, eager_attention
from tests.tiny import Silent

SETTINGS = Settings(max_tokens=16, fai_lo=2, fai_hi=9, layers="all")


@pytest.fixture(scope="module")
def analysis(tiny):
    return analyze(tiny, ["how many rolls"], SETTINGS, Silent())[0]


@pytest.mark.parametrize(("field", "name"), [
    ("waad", "waad"),
    ("head_waad", "waad per head"),
    ("fai", "fai"),
    ("head_fai", "fai per head"),
    ("delta", "delta"),
    ("distance", "mean_distance"),
    ("entropy", "entropy"),
])  # fmt: skip
@pytest.mark.parametrize("error", [1e-2, torch.nan])
def test_every_wrong_number_is_found(tiny, analysis, field, name, error):
    wrong = getattr(analysis, field).clone()
    wrong.flatten()[3] += error
    changed = dataclasses.replace(analysis, **{field: wrong})
    largest = differences(tiny, [analysis, changed], SETTINGS, Silent())
    assert largest.pop(name) >= 0.9e-2
    assert max(largest.values()) < 1e-5


@pytest.mark.parametrize(("temperature", "unit"), [(0.0, 1.0), (1e-3, 1e-3), (5.0, 1.0)])
def test_a_low_temperature_does_not_magnify_how_logits_are_rounded(tiny, temperature, unit):
    settings = dataclasses.replace(SETTINGS, temperature=temperature)
    (analysis,) = analyze(tiny, ["how many rolls"], settings, Silent())
    changed = dataclasses.replace(analysis, entropy=analysis.entropy + 0.5)
    assert differences(tiny, [changed], settings, Silent())["entropy"] == pytest.approx(0.5 * unit, rel=1e-3)


def test_a_wrong_validity_is_found(tiny, analysis):
    changed = dataclasses.replace(analysis, fai_valid=~analysis.fai_valid)
    assert differences(tiny, [changed], SETTINGS, Silent())["fai_valid"] == 1


def test_wrong_settings_are_found(tiny, analysis):
    other = dataclasses.replace(SETTINGS, window=3, fai_hi=None)
    largest = differences(tiny, [analysis], other, Silent())
    assert largest["waad"] > 1e-2
    assert largest["fai"] > 1e-4


def test_the_attention_is_put_back(tiny):
    def break_off():
        with eager_attention(tiny.model):
            assert tiny.model.config._attn_implementation == "eager"
            raise KeyError

    with pytest.raises(KeyError):
        break_off()
    assert tiny.model.config._attn_implementation == "sdpa"
