"""Profiles of analyses against plain means, and couplings on curves made by hand."""

import dataclasses

import pytest
import scipy.stats
import torch

from attnstats import heads
from attnstats.chance import Chance
from attnstats.study import findings
from tests.tiny import synthetic_analysis

CHANCE = Chance(permutations=200, resamples=200)


@pytest.fixture(scope="module")
def analyses():
    return [synthetic_analysis([f"w{i}" for i in range(length)], prompt=3) for length in (40, 55, 41, 42, 43)]


def profile_of(analyses):
    return findings.profile(analysis.head_summary for analysis in analyses)


def coupled(analyses, folder):
    return findings.tabulate(folder, analyses, profile_of(analyses), CHANCE)


def test_a_profile_is_of_all_response_rows_and_valid_keys(analyses):
    profile = profile_of(analyses)
    rows = torch.cat([a.head_mean_distance[..., a.response] for a in analyses], dim=-1)
    torch.testing.assert_close(profile.distance, rows.double().mean(-1))
    each = [
        scipy.stats.kurtosis(a.head_received[..., a.response & a.received_valid].double(), axis=-1) for a in analyses
    ]
    torch.testing.assert_close(profile.kurtosis, torch.tensor(sum(each) / len(each)))
    with pytest.raises(ValueError, match="summaries is empty"):
        findings.profile([])


def test_couplings_are_of_the_response_alone(analyses, tmp_path):
    found = coupled(analyses, tmp_path)
    spoiled = []
    for analysis in analyses:
        changes = {}
        for name in ("waad", "fai", "entropy", "head_received"):
            values = getattr(analysis, name).clone()
            values[..., ~analysis.response] = 99.0
            changes[name] = values
        spoiled.append(dataclasses.replace(analysis, **changes))
    assert coupled(spoiled, tmp_path) == found
    assert [c.count > 0 for c in found] == [True] * 3


def test_entropy_that_follows_waad_is_found(analyses, tmp_path):
    following = [dataclasses.replace(a, entropy=a.waad / 10) for a in analyses]
    first, *_ = coupled(following, tmp_path)
    assert first.lift > 0.2
    assert first.p_value < 0.01


def test_without_a_receiver_there_is_no_coupling(tmp_path):
    short = [synthetic_analysis(["a", "b", "c"])]
    assert coupled(short, tmp_path) == ()


def test_tokens_without_a_value_are_no_peaks_of_receivers(analyses):
    receivers = profile_of(analyses).receivers(findings.RECEIVERS)
    for analysis in analyses:
        curves = findings.curves(analysis, receivers)
        assert torch.equal(curves.valid("receiver_fai"), analysis.received_valid[analysis.response])
        assert torch.equal(curves.valid("fai"), analysis.fai_valid[analysis.response])


def test_what_a_head_receives_leaves_out_the_nearest_four():
    """Bogdan et al.: distances 0 to 3 don't count."""
    assert (heads.RECEIVED.lo, heads.RECEIVED.hi) == (4, None)
