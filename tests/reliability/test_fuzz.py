"""reliability/fuzz.py: cases are known by seed and index, faults are found, shrunk and kept, a run is resumed."""

import dataclasses
import json

import pytest

from reliability import fuzz, trials
from reliability.trials import Masked, Model, Trial
from tests.cases import Case


@pytest.fixture(autouse=True)
def ledger(tmp_path, monkeypatch):
    monkeypatch.setattr(fuzz, "LEDGER", tmp_path / "out" / "fuzz.jsonl")
    return fuzz.LEDGER


@pytest.fixture
def odd_lengths_fail(monkeypatch):
    """In the place of a run: a fault at every odd number of queries."""

    def run(trial, device="cpu"):
        of = trial.of
        assert not isinstance(of, Case) or of.query_length % 2 == 0, f"{of.query_length} queries"

    monkeypatch.setattr(Trial, "run", run)


def test_a_case_depends_on_its_seed_and_index_alone():
    first = [fuzz.trial_of(0, i) for i in range(300)]
    assert first[200] == fuzz.trial_of(0, 200)
    assert len(set(first)) == 300
    assert {trial.path for trial in first} == set(trials.PATHS)
    assert {trial.also for trial in first} == set(trials.ALSO)
    assert fuzz.trial_of(1, 0) != first[0]


def test_a_trial_is_the_expression_that_it_prints():
    for i in range(100):
        trial = fuzz.trial_of(0, i)
        assert eval(str(trial), vars(trials)) == trial


def test_every_hundred_cases_have_the_shares():
    assert len(trials.SHARES) == sum(trials.PATHS.values()) == 100
    assert sum(share for path, share in trials.PATHS.items() if path.startswith("triton")) >= 10
    assert len({*trials.FAMILIES, *trials.ENCODERS}) >= 20


def test_a_run_goes_on_behind_the_last_line(odd_lengths_fail, ledger, capsys):
    assert fuzz.main(["--cases", "20"]) == 1
    first = [e["index"] for e in fuzz.entries()]
    with ledger.open("a") as file:  # killed while it wrote
        file.write('{"seed": 0, "index": 20, "pa')
    fuzz.main(["--cases", "5"])
    assert first == list(range(20))
    assert [e["index"] for e in fuzz.entries()] == list(range(25))
    faulty = [e for e in fuzz.entries() if "fault" in e]
    assert f"--case 0:{faulty[0]['index']}" in capsys.readouterr().out
    assert all(json.loads(json.dumps(e)) == e for e in faulty)


def test_what_was_mended_is_run_again(odd_lengths_fail, monkeypatch):
    fuzz.main(["--cases", "20"])
    monkeypatch.setattr(Trial, "run", lambda *_: None)
    assert fuzz.main(["--again"]) == 0
    assert len(fuzz.entries()) == 20
    assert not any("fault" in e for e in fuzz.entries())
    assert "| all | 20 |" in fuzz.score()


def test_a_fault_is_shrunk(odd_lengths_fail):
    trial = Trial("tiled", Case(batch=1, query_length=33, key_length=40, sinks=True, layout="strided", asked=(3, 4)))
    small = fuzz.shrunk(trial)
    assert small.of.query_length == 1
    assert not small.of.sinks
    assert small.of.layout == "plain"
    assert fuzz.fault(small)


def test_wrong_numbers_are_found(monkeypatch):
    """Results that are off by a little, on each kind of path."""
    from attnstats.results import Statistics

    value = Statistics.__getitem__
    monkeypatch.setattr(Statistics, "__getitem__", lambda self, key: value(self, key) * 1.001)
    trials_of_each = [
        Trial("patch_sdpa", Masked()),
        Trial("patch_sdpa", Masked("float padding", query_length=3)),
    ]
    for trial in trials_of_each:
        assert fuzz.fault(trial).startswith("AssertionError")


def test_models_of_other_families_are_other_models():
    one, other = (Model("llama", length=5, seed=s).build() for s in (0, 1))
    assert any((a != b).any() for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert dataclasses.replace(Model(), padding="left", seed=3).inputs()["attention_mask"].sum() == 9 + 9 - 3
