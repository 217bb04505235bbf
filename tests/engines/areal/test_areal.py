"""AReaL's FSDP actor on a CPU: its pass over packed rows is read, and its advantages are scaled.

The engine, its micro-batches, FSDP2 and the estimator are AReaL's own, without an inference server.
"""

from __future__ import annotations

import os
import socket

import pytest
import torch
from areal.api import FinetuneSpec
from areal.api.cli_args import MicroBatchSpec, PPOActorConfig
from areal.engine.fsdp_engine import FSDPPPOActor

from attnstats import credit
from attnstats.integrations.areal import RhythmPPOActor
from attnstats.integrations.settings import RhythmCredit
from tests.engines import maps
from tests.engines.verl import tiny

CREDIT = RhythmCredit(hi=25, layers=[1, 2, 4])
LENGTHS, PROMPTS = (50, 33, 44, 20, 12), (10, 4, 21, 8, 12)  # the last one has no token of a response


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    tiny.save(path, "Qwen3", head_dim=8)  # AReaL's masks by name are not Llama's
    return path


@pytest.fixture(scope="module", autouse=True)
def rank():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    torch.distributed.init_process_group("gloo", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def config_of(folder, **changes):
    settings = {
        "experiment_name": "tiny",
        "trial_name": "tiny",
        "path": str(folder),
        "backend": "fsdp:d1",
        "attn_impl": "sdpa",
        "dtype": "float32",
        "gradient_checkpointing": False,
        "mb_spec": MicroBatchSpec(max_tokens_per_mb=100),
        "optimizer": None,
        "recompute_logprob": True,
        "adv_norm": None,
        "reward_norm": None,
    }
    return PPOActorConfig(**settings | changes)


def engine_of(folder, settings=CREDIT):
    actor = FSDPPPOActor if settings is None else type("Actor", (RhythmPPOActor,), {"credit": settings})
    engine = actor(config_of(folder))
    engine.create_process_group()
    engine.initialize(None, FinetuneSpec(1, 8, 4))
    return engine


def trajectories():
    """Rows of one trajectory each, padded by some columns, of which one has a tool's tokens in its response."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for i, (length, prompt) in enumerate(zip(LENGTHS, PROMPTS, strict=True)):
        attended = torch.ones(1, length + i, dtype=torch.bool)
        attended[:, length:] = False
        loss_mask = attended.int()
        loss_mask[:, :prompt] = 0
        if i == 2:
            loss_mask[:, 30:35] = 0
        rows.append(
            {
                "input_ids": torch.randint(3, 90, attended.shape, generator=generator) * attended,
                "attention_mask": attended,
                "loss_mask": loss_mask,
                "logprobs": torch.zeros(attended.shape),
                "versions": torch.zeros(attended.shape, dtype=torch.int),
                "rewards": torch.tensor([0.5 + i]),
            }
        )
    return rows


def advantages_of(engine, stock=None):
    """Those of the engine, and those that the stock engine makes of the same trajectories."""
    rows = trajectories()
    for row, logp in zip(rows, engine.compute_logp(rows), strict=True):
        row["prox_logp"] = logp
    return engine.compute_advantages(rows), stock and stock.compute_advantages(rows)


def test_curves_are_those_of_eager_maps(folder):
    engine, rows = engine_of(folder), trajectories()
    logps = engine.compute_logp(rows)
    plain = [
        maps.Row(row["input_ids"][0, :n], row["loss_mask"][0, :n].bool()) for row, n in zip(rows, LENGTHS, strict=True)
    ]
    classes, curves, expected = maps.expected(folder, CREDIT, plain)
    for ours, theirs in zip(logps, expected, strict=True):
        torch.testing.assert_close(ours[0, : len(theirs)], theirs, rtol=0, atol=1e-5)
    assert torch.equal(engine.head_classes.local, classes.local)
    assert torch.equal(engine.head_classes.global_, classes.global_)
    _, read = engine._read
    for i, (n, curve) in enumerate(zip(LENGTHS, curves, strict=True)):
        maps.assert_read(curve, *(read[name][i, :n] for name in ("waad", "fai", "fai_valid")))


def test_advantages_are_scaled_by_the_token_that_they_are_of(folder):
    engine, stock = engine_of(folder), engine_of(folder, None)
    scaled, plain = advantages_of(engine, stock)
    _, read = engine._read
    for i, (ours, theirs, row) in enumerate(zip(scaled, plain, trajectories(), strict=True)):
        columns = row["input_ids"].shape[1]
        waad, fai, valid = (read[name][i : i + 1, :columns] for name in ("waad", "fai", "fai_valid"))
        gamma = credit.coupled_rhythm(waad, fai, row["loss_mask"].bool(), valid=valid, q=0.4, amp=1.5)
        assert torch.equal(ours["advantages"][:, :-1], theirs["advantages"][:, :-1] * gamma[:, 1:])
        assert (gamma > 1).any() == (i < 4)
        assert torch.equal(ours["returns"], theirs["returns"])
        assert torch.equal(ours["loss_mask"], theirs["loss_mask"])


@pytest.mark.parametrize("kind", ["coupled", "random"])
def test_with_amp_1_advantages_are_stock_areals(folder, kind):
    scaled, plain = advantages_of(engine_of(folder, RhythmCredit(kind, amp=1.0)), engine_of(folder, None))
    for ours, theirs in zip(scaled, plain, strict=True):
        assert torch.equal(ours["advantages"], theirs["advantages"])


def test_heads_are_classified_when_due(folder):
    engine = engine_of(folder, RhythmCredit(hi=25, layers=[1, 2, 4], reprofile_every=2))
    profiled = []
    for _ in range(3):
        advantages_of(engine)
        profiled.append(engine._reader.profiled_at)
    assert profiled == [0, 0, 2]


def test_other_trajectories_than_those_that_were_read(folder):
    engine, rows = engine_of(folder), trajectories()
    advantages_of(engine)
    for row in rows:
        row["prox_logp"] = torch.zeros(row["input_ids"].shape)
    rows[0]["input_ids"][0, 0] += 1
    with pytest.raises(RuntimeError, match="other trajectories than the last compute_logp"):
        engine.compute_advantages(rows)


def test_settings_without_a_pass_to_read(folder):
    with pytest.raises(ValueError, match="recompute_logprob=False AReaL makes no pass to read"):
        RhythmPPOActor(config_of(folder, recompute_logprob=False))
    actor = type("Actor", (RhythmPPOActor,), {"credit": RhythmCredit(kind="entropy")})
    with pytest.raises(ValueError, match="kind='entropy' needs an entropy"):
        actor(config_of(folder))
