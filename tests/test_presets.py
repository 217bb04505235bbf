"""The presets hold the numbers of the paper's two versions."""

from attnstats.presets import PRESETS, paper_v1, paper_v2


def test_version_2():
    assert (paper_v2.window, paper_v2.fai_lo, paper_v2.fai_hi) == (10, 10, 100)
    assert (paper_v2.layers, paper_v2.head_share, paper_v2.sign) == ("middle-third", 0.30, "both")


def test_version_1_differs_in_two_settings():
    fields = ("window", "fai_lo", "fai_hi", "layers", "head_share", "sign")
    differing = {field for field in fields if getattr(paper_v1, field) != getattr(paper_v2, field)}
    assert differing == {"fai_hi", "sign"}
    assert (paper_v1.fai_hi, paper_v1.sign) == (50, "positive")


def test_the_command_line_finds_them_by_name():
    assert list(PRESETS) == ["paper_v2", "paper_v1"]
    assert all(preset.name == name for name, preset in PRESETS.items())
