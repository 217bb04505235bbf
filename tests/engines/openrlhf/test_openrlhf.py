"""OpenRLHF's batches of experience on a CPU: its policy's pass is read, and its advantages are scaled.

Two Ray actors compute log-probabilities. The dispatch, the micro-batches, the model's wrapper and the estimators are
OpenRLHF's own; DeepSpeed and vLLM are not there (cpu.py).
"""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import ray
import torch
from torch.nn.functional import pad

from tests.engines.openrlhf import cpu  # isort: skip
from openrlhf.trainer.ppo_utils.experience import Experience
from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker
from openrlhf.trainer.ray.launcher import RayActorGroup
from openrlhf.utils.deepspeed import DeepspeedStrategy

from attnstats import credit
from attnstats.integrations.openrlhf import RhythmExperienceMaker, RhythmPPOTrainer, with_credit
from attnstats.integrations.reading import read_classes
from attnstats.integrations.settings import RhythmCredit
from tests.engines import maps
from tests.engines.verl import tiny
from tests.process import ROOT

CREDIT = cpu.Policy.credit
LENGTHS, PROMPTS = (50, 33, 44, 20, 38, 27), (10, 4, 21, 8, 15, 5)
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    tiny.save(path)
    return str(path)


@pytest.fixture(scope="module", autouse=True)
def cluster():
    os.environ["PYTHONPATH"] = str(ROOT)
    ray.init(num_cpus=4, num_gpus=2, include_dashboard=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def policies(folder):
    group = RayActorGroup(1, 2, ray.remote(num_gpus=1)(cpu.Policy), num_gpus_per_actor=0.5)
    ray.get(group.async_init_model_from_pretrained(strategy(), folder))
    return group


def strategy():
    advantage = SimpleNamespace(estimator="reinforce_baseline", gamma=1.0, lambd=1.0, no_std_norm=False)
    args = SimpleNamespace(
        ds=SimpleNamespace(ring_attn_size=1, tensor_parallel_size=1, param_dtype="bf16"),
        train=SimpleNamespace(colocate_all=False, colocate_actor_ref=False, dynamic_batch_enable=False),
        rollout=SimpleNamespace(n_samples_per_prompt=2, micro_batch_size=2),
        reward=SimpleNamespace(clip_range=None),
        algo=SimpleNamespace(advantage=advantage, kl=SimpleNamespace(use_loss=False, init_coef=0.0, estimator="k1")),
    )
    return DeepspeedStrategy(args=args)


def made_by(maker, policies, **settings):
    """A maker, and the experiences that it makes of samples as OpenRLHF's generator gives them."""
    maker = maker(
        policies, None, None, None, SimpleNamespace(value=0.0), strategy(), SimpleNamespace(pad_token_id=0), **settings
    )
    return maker, maker.make_experience_batch(samples())


def samples():
    generator = torch.Generator().manual_seed(1)
    rows = []
    for i, (length, prompt) in enumerate(zip(LENGTHS, PROMPTS, strict=True)):
        action_mask = torch.zeros(1, length, dtype=torch.long)
        action_mask[:, prompt:] = 1
        if i == 2:
            action_mask[:, 30:35] = 0
        rows.append(
            Experience(
                sequences=torch.randint(3, 90, (1, length), generator=generator),
                attention_mask=torch.ones(1, length, dtype=torch.long),
                action_mask=action_mask[:, 1:],
                rewards=torch.tensor([0.5 + i]),
                total_length=torch.tensor([float(length)]),
            )
        )
    return rows


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_advantages_are_scaled_by_curves_of_eager_maps(folder, policies, packed):
    ray.get(policies.async_run_method("pack", packed))
    maker, ours = made_by(RhythmExperienceMaker, policies, credit=CREDIT)
    _, theirs = made_by(RemoteExperienceMaker, policies)
    rows = [maps.Row(sample.sequences[0], pad(sample.action_mask[0].bool(), (1, 0))) for sample in samples()]
    expected = maps.expected(folder, CREDIT, rows)
    for written in ray.get(policies.async_run_method("written_classes")):
        assert torch.equal(read_classes(written).local, expected.classes.local)
        assert torch.equal(read_classes(written).global_, expected.classes.global_)
    for i, (row, curve, logps) in enumerate(zip(rows, expected.curves, expected.logps, strict=True)):
        batch, place, n = i // 2, i % 2, len(row.ids)
        waad, fai, valid = (maker._curves[batch][name][place] for name in ("waad", "fai", "fai_valid"))
        maps.assert_read(curve, waad[:n], fai[:n], valid[:n])
        scaled, plain = ours[batch], theirs[batch]
        torch.testing.assert_close(scaled.action_log_probs[place, : n - 1], logps * row.counted[1:], rtol=0, atol=1e-5)
        counted = pad(row.counted, (0, len(waad) - n))
        gamma = credit.coupled_rhythm(waad[None], fai[None], counted[None], valid=valid[None], q=0.4, amp=1.5)[0]
        assert (gamma > 1).any()
        assert torch.equal(scaled.advantages[place], plain.advantages[place] * gamma[1:])
        assert torch.equal(scaled.returns[place], plain.returns[place])
    assert set(ours[0].info) - set(theirs[0].info) == {f"rhythm/{x}" for x in ("amplified", "gamma", "waad", "fai")}


def test_what_takes_the_places_of_openrlhfs_own():
    policy, trainer = with_credit(RhythmCredit(kind="global"))
    assert policy.__ray_actor_class__.credit.kind == trainer.__ray_actor_class__.credit.kind == "global"
    assert issubclass(trainer.__ray_actor_class__, RhythmPPOTrainer)
    with pytest.raises(ValueError, match="kind='entropy' needs an entropy"):
        with_credit(RhythmCredit(kind="entropy"))
