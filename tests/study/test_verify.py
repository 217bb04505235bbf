"""--verify finds what is wrong: a check that cannot fail would prove nothing."""

import dataclasses

import pytest
import torch

from attnstats.study import models
from attnstats.study.analysis import Settings
from attnstats.study.pipeline import analyze
from attnstats.study.verify import eager_attention, errors, float64
from tests.tiny import Silent, save_tiny_model

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
    largest = errors(tiny, [analysis, changed], SETTINGS, Silent())
    found = largest.pop(name)
    assert found.ours >= 0.9e-2
    assert not found.passes
    assert all(other.passes and other.ours < 1e-4 for other in largest.values())


@pytest.mark.parametrize(("temperature", "unit"), [(0.0, 1.0), (1e-3, 1e-3), (5.0, 1.0)])
def test_a_low_temperature_does_not_magnify_how_logits_are_rounded(tiny, temperature, unit):
    settings = dataclasses.replace(SETTINGS, temperature=temperature)
    (analysis,) = analyze(tiny, ["how many rolls"], settings, Silent())
    changed = dataclasses.replace(analysis, entropy=analysis.entropy + 0.5)
    assert errors(tiny, [changed], settings, Silent())["entropy"].ours == pytest.approx(0.5 * unit, rel=1e-3)


def test_a_wrong_validity_is_found(tiny, analysis):
    changed = dataclasses.replace(analysis, fai_valid=~analysis.fai_valid)
    assert errors(tiny, [changed], SETTINGS, Silent())["fai_valid"].ours == 1


def test_wrong_settings_are_found(tiny, analysis):
    other = dataclasses.replace(SETTINGS, window=3, fai_hi=None)
    largest = errors(tiny, [analysis], other, Silent())
    assert largest["waad"].ours > 1e-2
    assert largest["fai"].ours > 1e-4


def test_the_attention_is_put_back(tiny):
    def break_off():
        with eager_attention(tiny.model):
            assert tiny.model.config._attn_implementation == "eager"
            raise KeyError

    with pytest.raises(KeyError):
        break_off()
    assert tiny.model.config._attn_implementation == "sdpa"


def test_key_biases_are_no_difference(tmp_path):
    """Qwen2.5's make |lse| 1,100, where eager's own error is a hundred times what it is without."""
    folder = save_tiny_model(tmp_path / "model", attention_bias=True)
    loaded = models.load(str(folder), device="cpu", dtype="float32")
    with torch.no_grad():
        for layer in loaded.model.model.layers:
            layer.self_attn.k_proj.bias[7::8] = 300.0
            layer.self_attn.q_proj.bias[7::8] = 30.0
    (analysis,) = analyze(loaded, ["how many rolls"], SETTINGS, Silent())
    largest = errors(loaded, [analysis], SETTINGS, Silent())
    assert largest["waad per head"].eager > 1e-5
    assert all(error.passes for error in largest.values()), largest


def test_float64_is_float64_throughout_and_leaves_the_weights(tiny):
    before = {name: x.clone() for name, x in tiny.model.state_dict().items()}
    ids = torch.arange(5)[None]
    with torch.no_grad(), eager_attention(tiny.model), float64(tiny.model):
        once = tiny.model(ids, output_attentions=True)
        sums = once.attentions[0].sum(-1)
    assert once.logits.dtype == torch.float64
    assert (sums - 1).abs().max() < 1e-14  # a softmax in float32 would leave 1e-8
    assert all(
        torch.equal(x, before[name]) and x.dtype == before[name].dtype for name, x in tiny.model.state_dict().items()
    )
