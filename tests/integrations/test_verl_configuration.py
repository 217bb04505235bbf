"""The settings of a run of verl, checked at start; verl itself is not needed."""

import sys
from types import ModuleType

import pytest

from attnstats.integrations.hooks import Hook
from attnstats.integrations.settings import RhythmCredit
from attnstats.integrations.verl import configuration
from attnstats.integrations.verl.configuration import check_hooks, credit_of


def config(rhythm=None, actor=None, algorithm=None, **model):
    return {
        "algorithm": {"rhythm": rhythm} | (algorithm or {}),
        "actor_rollout_ref": {"actor": {"strategy": "fsdp2"} | (actor or {}), "model": model},
    }


def test_settings_are_those_of_the_credit():
    rhythm = {"kind": "local", "q": 0.2, "layers": [1, 3], "head_share": None}
    assert credit_of(config(rhythm)) == RhythmCredit("local", q=0.2, layers=[1, 3], head_share=None)
    assert credit_of(config()) == RhythmCredit()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (config({"knd": "local", "Q": 1}), "algorithm.rhythm has no setting knd, Q; it has kind, q, amp"),
        (config({"kind": "best"}), "algorithm.rhythm: kind must be one of 'coupled'"),
        (config({"amp": 0.5}), "algorithm.rhythm: amp must be at least 1"),
        (config(actor={"strategy": "megatron"}), "strategy='megatron': only the attention of transformers"),
        (config(algorithm={"rollout_correction": {"bypass_mode": True}}), "bypass_mode=True: verl makes no pass"),
        (config(actor={"use_prefix_grouper": True}), "use_prefix_grouper=True: prompts are shared"),
        (
            config(
                actor={"ulysses_sequence_parallel_size": 2, "use_kl_loss": True},
                override_config={"attn_implementation": "sdpa"},
            ),
            "size=2 with attn_implementation='sdpa' and a reference",
        ),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(given, message):
    with pytest.raises(ValueError, match=message):
        credit_of(given)


def test_a_credit_that_reads_nothing_takes_any_engine():
    assert credit_of(config({"kind": "random"}, actor={"strategy": "megatron"})).kind == "random"


def test_moved_hooks_are_named(monkeypatch):
    module = ModuleType("verl_of_tomorrow")
    module.Trainer = type("Trainer", (), {"step": lambda self, data, metrics: None})
    monkeypatch.setitem(sys.modules, "verl_of_tomorrow", module)
    monkeypatch.setattr(configuration, "version", lambda name: "9.9")
    check_hooks((Hook("verl_of_tomorrow", "Trainer", "step", ("data", "metrics")),))
    for hook, fault in (
        (
            Hook("verl_of_tomorrow", "Trainer", "step", ("batch", "metrics")),
            r"step takes \(data, metrics\), not \(batch",
        ),
        (Hook("verl_of_tomorrow", "Trainer", "fit"), "Trainer has no fit"),
        (Hook("verl_of_tomorrow", "Old", "step"), "Old can't be imported"),
        (Hook("verl_of_yesterday", "Old", "step"), "verl_of_yesterday.Old can't be imported"),
    ):
        with pytest.raises(RuntimeError, match=rf"in verl 9\.9: .*{fault}"):
            check_hooks((hook,))
