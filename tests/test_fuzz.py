"""Hundreds of drawn calls and models: shapes, masks, dtypes and settings that nobody thought of, against float64.

`DRAWN=1000 make test` draws so many in each of the ten shards, `make fuzz` thousands without hypothesis. A failure
prints hypothesis' seed and the command that repeats the one case.
"""

import os

import pytest
from hypothesis import HealthCheck, given, note, seed, settings
from hypothesis import strategies as st

from reliability import trials

SHARDS = 10  # so that parallel workers share the work
DRAWN = int(os.environ.get("DRAWN", "30"))  # cases of each


class ByHypothesis:
    def __init__(self, draw):
        self._draw = draw

    def integer(self, low, high):
        return self._draw(st.integers(low, high))

    def pick(self, options):
        return self._draw(st.sampled_from(options))


@st.composite
def drawn_trials(draw):
    return trials.drawn(ByHypothesis(draw))


@pytest.mark.slow
@pytest.mark.parametrize("shard", range(SHARDS))
def test_drawn_cases(shard, device):
    @seed(shard)
    @settings(max_examples=DRAWN, database=None, suppress_health_check=list(HealthCheck))
    @given(drawn_trials())
    def run(trial: trials.Trial) -> None:
        note(f'seed {shard}; reproduce: python -m reliability.fuzz --trial "{trial}"')
        trial.run(device)

    run()
