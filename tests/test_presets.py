"""The presets are found by name, and the credits default to the paper's numbers."""

import inspect

import pytest

from attnstats import credit
from attnstats.presets import PRESETS, paper_v2


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_the_credits_default_to_the_paper(preset):
    for function, settings in ((credit.local_chunk, preset.credit), (credit.coupled_rhythm, preset.coupled)):
        defaults = inspect.signature(function).parameters
        assert {name: defaults[name].default for name in settings} == settings


def test_the_command_line_finds_them_by_name():
    assert next(iter(PRESETS.values())) is paper_v2
    assert all(preset.name == name for name, preset in PRESETS.items())
