"""verl's `main_ppo` with the plug-in: real runs of a tiny model on a CPU. `make engines` runs this.

The platform and the rollout are those of cpu.py; the trainer, Ray, TransferQueue, FSDP2, the workers and the
checkpoints are verl's own.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch

from attnstats import heads
from attnstats.integrations.settings import RhythmCredit, Signals
from tests.engines.verl import tiny
from tests.process import ROOT

pytestmark = pytest.mark.timeout(1800)
LIMIT = 600  # seconds that a run may take
RHYTHM = RhythmCredit(hi=25, reprofile_every=3)
OURS = (
    "trainer.v1.trainer_mode=recorded_rhythm",
    "+algorithm.rhythm.kind=coupled",
    "+algorithm.rhythm.hi=25",
    "+algorithm.rhythm.reprofile_every=3",
)
STOCK = ("trainer.v1.trainer_mode=recorded_sync",)
TWO_RANKS = ("trainer.n_gpus_per_node=2", "ray_kwargs.ray_init.num_gpus=2", "ray_kwargs.ray_init.num_cpus=10")
ACTOR, ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    tiny.save(folder)
    tiny.save_data(folder / "train.parquet")
    return folder


def start(model, records, *settings, module="verl.trainer.main_ppo"):
    """A run of main_ppo as a process of its own; its output goes to log.txt in the folder of the records."""
    records.mkdir(parents=True, exist_ok=True)
    command = [
        *(sys.executable, "-W", "ignore", "-m", module),
        *(f"data.{split}_files={model}/train.parquet" for split in ("train", "val")),
        *("data.train_batch_size=4", "data.max_prompt_length=32", "data.max_response_length=32"),
        *("data.dataloader_num_workers=0", "data.shuffle=False"),
        *(f"actor_rollout_ref.model.path={model}", "actor_rollout_ref.model.enable_gradient_checkpointing=False"),
        "+actor_rollout_ref.model.override_config.attn_implementation=sdpa",
        *(f"{ACTOR}.strategy=fsdp2", f"{ACTOR}.ppo_mini_batch_size=4", f"{ACTOR}.use_dynamic_bsz=True"),
        *(f"{ACTOR}.ppo_max_token_len_per_gpu=400", f"{ACTOR}.optim.lr=3e-3", f"{ACTOR}.use_kl_loss=False"),
        *(f"{ACTOR}.use_torch_compile=False", f"{ACTOR}.fsdp_config.use_torch_compile=False"),
        f"+{ACTOR}.fsdp_config.mixed_precision={{param_dtype:fp32,reduce_dtype:fp32,buffer_dtype:fp32}}",
        *(f"{ROLLOUT}.name=hf", f"{ROLLOUT}.mode=async", f"{ROLLOUT}.n=4", f"{ROLLOUT}.load_format=auto"),
        *(f"{ROLLOUT}.tensor_model_parallel_size=1", f"{ROLLOUT}.agent.num_workers=1"),
        *(f"{ROLLOUT}.log_prob_use_dynamic_bsz=True", f"{ROLLOUT}.log_prob_max_token_len_per_gpu=400"),
        *("algorithm.adv_estimator=grpo", "reward.num_workers=1"),
        f"reward.custom_reward_function.path={ROOT}/tests/engines/verl/tiny.py",
        *("reward.custom_reward_function.name=score", "transfer_queue.backend.SimpleStorage.num_data_storage_units=1"),
        *("trainer.device=cpu", "trainer.n_gpus_per_node=1", "trainer.nnodes=1", "trainer.val_before_train=False"),
        *("trainer.total_epochs=1", "trainer.total_training_steps=2", "trainer.test_freq=-1", "trainer.save_freq=-1"),
        *("trainer.logger=[console]", "trainer.resume_mode=disable", f"trainer.default_local_dir={records}/saved"),
        *("ray_kwargs.ray_init.num_cpus=8", "+ray_kwargs.ray_init.num_gpus=1"),
        *settings,
    ]
    environment = {
        "PYTHONPATH": str(ROOT),
        "VERL_USE_EXTERNAL_MODULES": "tests.engines.verl.cpu,tests.engines.verl.recorded",
        "VERL_PLATFORM": "cpu",
        "RECORDS": str(records),
        "OMP_NUM_THREADS": "1",
        "HYDRA_FULL_ERROR": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",  # a test has no other process to leave the cores to
    }
    with (records / "log.txt").open("w") as log:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def log_of(records):
    return (records / "log.txt").read_text(errors="replace")


def run(model, records, *settings, **how):
    """The records of a run that has to succeed, by step."""
    process = start(model, records, *settings, **how)
    try:
        status = process.wait(LIMIT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGTERM)
        raise
    assert status == 0, log_of(records)[-6000:]
    return {int(path.stem): torch.load(path) for path in records.glob("*.pt")}


def key_of(prompt, response):
    return (*prompt.tolist(), -1, *response.tolist())


def rows_of(record):
    """The rows of a batch by prompt and response: their order is that of Ray's answers."""
    rows = {}
    for i in range(len(record["rows"]["prompts"])):
        row = {name: values[i] for name, values in record["rows"].items()}
        rows.setdefault(key_of(row["prompts"], row["responses"]), row)
    return rows


def eager_maps(model, row, layers):
    from transformers import AutoModelForCausalLM

    policy = AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager", dtype=torch.float32).eval()
    ids = torch.cat([row["prompts"], row["responses"]])[None]
    with torch.no_grad():
        maps = policy(ids, output_attentions=True).attentions
    return torch.stack([maps[layer][0] for layer in layers]).double()  # (L, H, T, T)


def assert_curves_are_eager(model, record, layers=(2, 3, 4)):
    """Of the first step, whose policy is the model as it was saved."""
    rows = rows_of(record)
    maps = {key: eager_maps(model, row, layers) for key, row in rows.items()}
    total, count = 0.0, 0
    for i, prompt in enumerate(record["rows"]["prompts"]):
        response = record["rows"]["responses"][i]
        attention = maps[key_of(prompt, response)]
        places = torch.arange(attention.shape[-1])
        distance = (places[:, None] - places).clamp(min=0)
        total = total + (attention * distance).sum(-1)[..., len(prompt) :].sum(-1)
        count += len(response)
    classes = heads.classify(total / count, RHYTHM.head_share, layers)
    for key, row in rows.items():
        attention, start = maps[key], len(row["prompts"])
        places = torch.arange(attention.shape[-1])
        distance = places[:, None] - places
        waad = (attention[classes.local].mean(0) * distance.clamp(0, 10)).sum(-1)[start:]
        seen = (distance >= 10) & (distance <= 25) & (places >= start)[:, None]
        mean = (attention[classes.global_].mean(0) * seen).sum(0) / seen.sum(0).clamp(min=1)
        fai, valid = mean[start:], seen.any(0)[start:]
        assert torch.equal(row["fai_valid"], valid)
        torch.testing.assert_close(row["waad"].double(), waad, rtol=0, atol=1e-5)
        torch.testing.assert_close(row["fai"].double()[valid], fai[valid], rtol=0, atol=1e-5)


def assert_advantages_are_scaled(record, rhythm=RHYTHM, unscaled=lambda record: record["rows"]["returns"]):
    rows = record["rows"]
    for i, advantages in enumerate(unscaled(record)):
        curves = {name: rows[name][i][None] for name in Signals._fields if name in rows}
        gamma = rhythm.gamma(Signals(**curves), rows["response_mask"][i].bool()[None])
        torch.testing.assert_close(rows["advantages"][i], advantages * gamma[0], rtol=0, atol=1e-5)


def whitened(values):
    """By the mean and deviation over all response tokens, as verl does: in these runs no token is masked."""
    tokens = torch.cat(values)
    return [(row - tokens.mean()) * torch.rsqrt(tokens.var() + 1e-8) for row in values]


@pytest.fixture(scope="session")
def trained(model, tmp_path_factory):
    """Eight steps with the plug-in, saved after the fourth: their records and folder."""
    folder = tmp_path_factory.mktemp("runs") / "trained"
    records = run(model, folder, *OURS, "trainer.total_training_steps=8", "trainer.save_freq=4")
    return records, folder


def test_curves_and_advantages(model, trained):
    records, _ = trained
    assert sorted(records) == list(range(1, 9))  # statistics were read in every step
    assert_curves_are_eager(model, records[1])
    for step, record in records.items():
        assert_advantages_are_scaled(record)
        logged = record["metrics"]
        expected = {"amplified", "gamma", "waad", "fai", "seconds"}
        if step in (1, 4, 7):
            expected |= {"local_distance", "global_distance"}
        if step in (4, 7):
            expected |= {"heads_changed"}
        assert {name.removeprefix("rhythm/") for name in logged if name.startswith("rhythm/")} == expected, step
        assert 0.3 < logged["rhythm/amplified"] < 0.6
    assert log_of(trained[1]).count("rhythm/step_share") == 8


def test_reward_goes_up(trained):
    records, _ = trained

    def reward(step):
        responses = ["".join(chr(29 + i) for i in row if i > 2) for row in records[step]["rows"]["responses"]]
        return sum(tiny.score("", text, "") for text in responses) / len(responses)

    assert (reward(7) + reward(8)) / 2 > (reward(1) + reward(2)) / 2 + 0.05


def test_a_resumed_run_is_the_uninterrupted_one(model, trained, tmp_path):
    records, folder = trained
    saved = folder / "saved" / "global_step_4"
    state = json.loads((saved / "actor" / "rhythm.json").read_text())
    assert state["profiled_at"] == 4
    assert list(state["classes"]) == ["2", "3", "4"]
    resume = "trainer.resume_mode=resume_path", f"trainer.resume_from_path={saved}"
    resumed = run(model, tmp_path / "resumed", *OURS, "trainer.total_training_steps=6", *resume)
    assert sorted(resumed) == [5, 6]
    for step, record in resumed.items():
        expected = rows_of(records[step])
        assert rows_of(record).keys() == expected.keys()
        for key, row in rows_of(record).items():
            for name in ("waad", "fai", "advantages", "old_log_probs"):
                torch.testing.assert_close(row[name], expected[key][name], rtol=0, atol=1e-5)
        assert record["metrics"].keys() == records[step]["metrics"].keys()


def test_an_amplification_of_1_is_stock_verl(model, tmp_path):
    """Each row has a pass of its own: how rows are packed, in the order of Ray's answers, changes the last bits."""
    alone = (
        *(f"{ACTOR}.use_dynamic_bsz=False", f"{ACTOR}.ppo_micro_batch_size_per_gpu=1"),
        *(f"{ROLLOUT}.log_prob_use_dynamic_bsz=False", f"{ROLLOUT}.log_prob_micro_batch_size_per_gpu=1"),
    )
    runs = {
        "stock": run(model, tmp_path / "stock", *STOCK, *alone),
        "again": run(model, tmp_path / "again", *STOCK, *alone),
        "ours": run(model, tmp_path / "ours", *OURS, "+algorithm.rhythm.amp=1", *alone),
    }
    for name in ("again", "ours"):
        for step in (1, 2):
            stock, other = rows_of(runs["stock"][step]), rows_of(runs[name][step])
            assert stock.keys() == other.keys(), (name, step)
            for key, row in stock.items():
                for field in ("advantages", "returns"):
                    assert torch.equal(row[field], other[key][field]), (name, step, field)
                # Gradients of the first update are added up in the order of the rows.
                tolerance = 0 if step == 1 else 1e-5
                torch.testing.assert_close(other[key]["old_log_probs"], row["old_log_probs"], rtol=0, atol=tolerance)


@pytest.mark.parametrize("sequence_parallel", [1, 2])
def test_on_two_ranks(model, tmp_path, sequence_parallel):
    records = run(
        model, tmp_path / "run", *OURS, *TWO_RANKS, f"{ACTOR}.ulysses_sequence_parallel_size={sequence_parallel}"
    )
    assert_curves_are_eager(model, records[1])
    for record in records.values():
        assert_advantages_are_scaled(record)


def test_a_value_function_a_reference_and_a_credit_by_entropy(model, tmp_path):
    """GAE: the value function learns from returns that are not scaled; no pass is read."""
    settings = (
        *("algorithm.adv_estimator=gae", f"{ACTOR}.use_kl_loss=True", "critic.strategy=fsdp2"),
        *(f"critic.model.path={model}", f"critic.model.tokenizer_path={model}", "critic.ppo_max_token_len_per_gpu=400"),
        "+critic.model.override_config.attn_implementation=sdpa",
        "+critic.fsdp.mixed_precision={param_dtype:fp32,reduce_dtype:fp32,buffer_dtype:fp32}",
        *("trainer.v1.trainer_mode=recorded_rhythm", "+algorithm.rhythm.kind=entropy"),
    )
    records = run(model, tmp_path / "run", *settings)

    def unscaled(record):
        rows = record["rows"]
        return whitened([r - v for r, v in zip(rows["returns"], rows["values"], strict=True)])

    for record in records.values():
        assert_advantages_are_scaled(record, RhythmCredit("entropy"), unscaled)
        assert "actor/kl_loss" in record["metrics"]
        assert "rhythm/seconds" not in record["metrics"]


def test_adapters_with_their_base_as_the_reference(model, tmp_path):
    """LoRA: the reference's pass goes through the actor's engine without adapters, and isn't read."""
    settings = (
        *("algorithm.adv_estimator=reinforce_plus_plus", f"{ACTOR}.use_kl_loss=True"),
        *("actor_rollout_ref.model.lora_rank=4", "actor_rollout_ref.model.lora_alpha=8"),
    )
    records = run(model, tmp_path / "run", *OURS, *settings)
    assert_curves_are_eager(model, records[1])  # adapters start at nothing
    for record in records.values():
        assert_advantages_are_scaled(record, unscaled=lambda record: whitened(record["rows"]["returns"]))


def test_the_older_trainer(model, tmp_path):
    how = {"module": "tests.engines.verl.older"}
    records = run(model, tmp_path / "run", *OURS[1:], "algorithm.adv_estimator=rloo", **how)
    assert sorted(records) == [1, 2]
    assert_curves_are_eager(model, records[1])
    for record in records.values():
        assert_advantages_are_scaled(record)
    assert log_of(tmp_path / "run").count("rhythm/gamma") == 2


def test_a_worker_that_dies_ends_the_run(model, tmp_path):
    """The error is verl's own, and nothing waits for the dead."""
    records = tmp_path / "run"
    process = start(model, records, *OURS, "trainer.total_training_steps=16")
    deadline = time.monotonic() + LIMIT
    while not (records / "1.pt").exists():
        assert process.poll() is None, log_of(records)[-4000:]
        assert time.monotonic() < deadline
        time.sleep(0.5)
    of_run = [
        p for p in psutil.process_iter(["environ", "cmdline"]) if "WorkerDict" in " ".join(p.info["cmdline"] or [])
    ]
    (worker,) = [p for p in of_run if (p.info["environ"] or {}).get("RECORDS") == str(records)]
    worker.kill()
    assert process.wait(120) != 0
    assert "ActorDiedError" in log_of(records)
