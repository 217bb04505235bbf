"""ROLL's actor worker on a CPU: its FSDP2 strategy's pass is read, and the advantages of a training step are scaled.

Worker, strategy, model provider and DataProto are ROLL's own. The worker is made without Ray, and nothing is loaded or
offloaded around a pass: on a CPU ROLL asks for memory statistics that torch doesn't have.
"""

from __future__ import annotations

import os
import socket
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from roll.configs import ModelArguments
from roll.configs.worker_config import StrategyArguments, WorkerConfig
from roll.distributed.executor.worker import RankInfo
from roll.distributed.scheduler.protocol import DataProto
from roll.distributed.strategy import fsdp2_strategy
from roll.distributed.strategy.factory import create_strategy
from roll.models import model_providers
from roll.models.model_providers import default_actor_model_provider
from roll.pipeline import base_worker
from roll.pipeline.rlvr.actor_worker import ActorWorker

from attnstats import credit
from attnstats.integrations.roll_worker import RhythmActorWorker
from attnstats.integrations.settings import RhythmCredit
from tests.engines import maps
from tests.engines.verl import tiny

CREDIT = RhythmCredit(hi=25, layers=[1, 2, 4])
LENGTH, LENGTHS, PROMPTS = 50, (50, 33, 44, 20, 12), (10, 4, 21, 8, 12)  # the last one has no token of a response


class Worker(RhythmActorWorker):
    credit = CREDIT


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    tiny.save(path)
    return path


@pytest.fixture(scope="module")
def worker(folder, tmp_path_factory):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    worker = Worker.__new__(Worker)
    worker.worker_config = WorkerConfig(
        name="actor_train",
        model_args=ModelArguments(
            model_name_or_path=str(folder),
            attn_implementation="sdpa",
            dtype="fp32",
            disable_gradient_checkpointing=True,
        ),
        strategy_args=StrategyArguments("fsdp2_infer", {"param_dtype": "fp32", "fsdp_size": 1}),
        infer_batch_size=2,
    )
    worker.pipeline_config = SimpleNamespace(seed=1)
    worker.cluster_name = worker.worker_name = "actor_train"
    worker.rank_info = RankInfo()
    worker.strategy = create_strategy(worker=worker)
    with pytest.MonkeyPatch.context() as patch:
        for module in (fsdp2_strategy, model_providers):  # finds a model through Ray
            patch.setattr(module, "download_model", str)
        worker.strategy.initialize(model_provider=default_actor_model_provider)
    worker.prepare_reading()
    yield worker
    torch.distributed.destroy_process_group()


@pytest.fixture(autouse=True)
def nothing_offloaded(monkeypatch):
    monkeypatch.setattr(base_worker, "state_offload_manger", lambda **_: nullcontext())


def batch_of():
    """Prompt, response and padding in one row; one has a tool's tokens in its response."""
    generator = torch.Generator().manual_seed(1)
    place, lengths, prompts = torch.arange(LENGTH), torch.tensor(LENGTHS)[:, None], torch.tensor(PROMPTS)[:, None]
    attended = (place < lengths).long()
    response_mask = attended * (place >= prompts)
    response_mask[2, 30:35] = 0
    fields = {
        "input_ids": torch.randint(3, 90, (5, LENGTH), generator=generator) * attended,
        "attention_mask": attended,
        "position_ids": (attended.cumsum(1) - 1).clamp(min=0),
        "response_mask": response_mask,
    }
    return DataProto.from_dict(tensors=fields, meta_info={"loss_mask_keys": []})


def test_curves_are_those_of_eager_maps(worker, folder):
    batch = batch_of()
    output = worker.compute_log_probs(batch)
    rows = [
        maps.Row(ids[:n], mask[:n].bool())
        for ids, mask, n in zip(batch.batch["input_ids"], batch.batch["response_mask"], LENGTHS, strict=True)
    ]
    expected = maps.expected(folder, CREDIT, rows)
    assert torch.equal(worker.head_classes.local, expected.classes.local)
    assert torch.equal(worker.head_classes.global_, expected.classes.global_)
    for i, (n, row, curve, logps) in enumerate(zip(LENGTHS, rows, expected.curves, expected.logps, strict=True)):
        maps.assert_read(curve, *(output.batch[name][i, :n] for name in ("waad", "fai", "fai_valid")))
        torch.testing.assert_close(output.batch["log_probs"][i, : n - 1], logps * row.counted[1:], rtol=0, atol=1e-5)


def test_the_pass_of_a_reference_without_adapter_is_not_read(worker, monkeypatch):
    monkeypatch.setattr(worker.strategy, "unwrap_model", lambda: SimpleNamespace(disable_adapter=nullcontext))
    batch = batch_of()
    batch.meta_info["disable_adapter"] = True
    assert set(worker.compute_log_probs(batch).batch.keys()) == {"log_probs", "entropy"}


def test_a_training_step_gets_scaled_advantages(worker, monkeypatch):
    batch, got = batch_of(), []

    def train_step(self, data):
        got.append(data.batch["advantages"].clone())
        return DataProto(meta_info={"metrics": {}})

    monkeypatch.setattr(ActorWorker.train_step, "__wrapped__", train_step)
    for name, curve in worker.compute_log_probs(batch).batch.items():
        batch.batch[name] = curve
    given = torch.arange(1.0, 6.0)[:, None] * batch.batch["response_mask"][:, 1:]
    batch.batch["advantages"] = given.clone()
    metrics = worker.train_step(batch).meta_info["metrics"]
    waad, fai, valid = (batch.batch[name] for name in ("waad", "fai", "fai_valid"))
    gamma = credit.coupled_rhythm(waad, fai, batch.batch["response_mask"].bool(), valid=valid, q=0.4, amp=1.5)
    assert torch.equal(got[0], given * gamma[:, 1:])
    assert {"rhythm/amplified", "rhythm/gamma", "rhythm/waad", "rhythm/fai", "rhythm/seconds"} <= set(metrics)
