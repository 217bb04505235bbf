"""The presets hold the numbers of the paper's two versions."""

import dataclasses
import inspect

import pytest

from attnstats import credit
from attnstats.presets import PRESETS, paper_v1, paper_v2


def test_version_2():
    assert (paper_v2.window, paper_v2.fai_lo, paper_v2.fai_hi) == (10, 10, 100)
    assert (paper_v2.layers, paper_v2.head_share, paper_v2.sign) == ("middle-third", 0.30, "both")


def test_version_2_credit():
    assert paper_v2.credit == {"q": 0.4, "amp": 1.5}
    assert paper_v2.coupled == {"q": 0.4, "amp": 1.5, "alpha": 0.5, "k": 3}


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_the_credits_default_to_the_paper(preset):
    for function, settings in ((credit.local_chunk, preset.credit), (credit.coupled_rhythm, preset.coupled)):
        defaults = inspect.signature(function).parameters
        assert {name: defaults[name].default for name in settings} == settings


def test_version_1_differs_in_two_settings():
    names = [field.name for field in dataclasses.fields(paper_v2) if field.name != "name"]
    differing = {name for name in names if getattr(paper_v1, name) != getattr(paper_v2, name)}
    assert differing == {"fai_hi", "sign"}
    assert (paper_v1.fai_hi, paper_v1.sign) == (50, "positive")


def test_the_command_line_finds_them_by_name():
    assert list(PRESETS) == ["paper_v2", "paper_v1"]
    assert all(preset.name == name for name, preset in PRESETS.items())
