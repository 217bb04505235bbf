"""StatisticsCallback: what it logs is what eager maps give, and training goes on as without it."""

import math

import datasets
import pytest
import tokenizers
import torch
import transformers
import trl
from transformers import LlamaConfig, LlamaForCausalLM

from attnstats import FAI, LSE, WAAD, MaxLogit, TopKeys
from attnstats.integrations.trainer import StatisticsCallback, of_heads

SIZES = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}


def model(**changes):
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=50, num_hidden_layers=3, attention_dropout=0.1, **SIZES, **changes)
    return LlamaForCausalLM(config)


def rows(count, length=30, seed=1):
    ids = torch.randint(50, (count, length), generator=torch.Generator().manual_seed(seed))
    return datasets.Dataset.from_list([{"input_ids": row, "labels": row} for row in ids.tolist()])


def held_out():
    ids = torch.randint(50, (2, 40), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, 25:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def trainer_of(policy, folder, cls=transformers.Trainer, args=transformers.TrainingArguments, **changes):
    settings = {"max_steps": 5, "per_device_train_batch_size": 2, "learning_rate": 0.05, "logging_steps": 1}
    arguments = args(folder, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no", **settings | changes)
    more = {"processing_class": tokenizer()} if cls is trl.SFTTrainer else {}
    return cls(policy, arguments, train_dataset=rows(16), **more)


def tokenizer():
    words = tokenizers.models.WordLevel({str(i): i for i in range(50)}, unk_token="0")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(words), pad_token="0", eos_token="1", unk_token="0"
    )


def test_numbers_are_those_of_eager_maps():
    policy, inputs = model(), held_out()
    got = of_heads(policy, inputs, [WAAD(10), FAI(10, 20)], "all")
    assert policy.training
    policy.set_attn_implementation("eager")
    with torch.no_grad():
        maps = policy.eval()(**inputs, output_attentions=True).attentions
    distance = (torch.arange(40)[:, None] - torch.arange(40)).double()
    real = inputs["attention_mask"].bool()
    seen = (distance >= 10) & (distance <= 20) & real[:, :, None] & real[:, None]  # (B, Tq, Tk)
    for layer, attention in enumerate(maps):
        attention = attention.double()
        waad = (attention * distance.clamp(0, 10)).sum(-1)
        expected = torch.stack([waad[:, head][real].mean() for head in range(4)])
        torch.testing.assert_close(got[layer]["waad"], expected, rtol=1e-5, atol=1e-6)
        fai = (attention * seen[:, None]).sum(2) / seen.sum(1).clamp(min=1)[:, None]
        valid = seen.any(1)
        expected = torch.stack([fai[:, head][valid].mean() for head in range(4)])
        torch.testing.assert_close(got[layer]["fai"], expected, rtol=1e-5, atol=1e-6)


def test_the_largest_logit_is_not_a_mean():
    policy, inputs = model(), held_out()
    got = of_heads(policy, inputs, [MaxLogit(), LSE()], "all")
    for layer in got.values():
        assert (layer["max_logit"] > layer["lse"] - math.log(40)).all()
    with torch.no_grad():
        policy.model.layers[1].self_attn.q_proj.weight.mul_(100)
    more = of_heads(policy, inputs, [MaxLogit()], "all")
    torch.testing.assert_close(more[1]["max_logit"], 100 * got[1]["max_logit"], rtol=1e-4, atol=0)


def test_it_logs_every_few_steps_and_training_is_the_same(tmp_path):
    plain = model()
    alone = trainer_of(plain, tmp_path / "plain")
    alone.train()
    watched = model()
    trainer = trainer_of(watched, tmp_path / "watched")
    callback = StatisticsCallback(trainer, held_out(), [WAAD(10), MaxLogit()], every=2, layers=[0, 2])
    trainer.add_callback(callback)
    before = of_heads(watched, held_out(), [WAAD(10)], [0, 2])
    trainer.train()
    for a, b in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(a, b)
    assert sorted(callback.history) == [0, 2, 4]
    assert all(torch.equal(callback.history[0][layer]["waad"], before[layer]["waad"]) for layer in (0, 2))
    logged = {row["step"]: row for row in trainer.state.log_history if "attention/waad" in row}
    assert sorted(logged) == [0, 2, 4]
    for step, row in logged.items():
        of_layers = callback.history[step].values()
        mean = torch.stack([x["waad"] for x in of_layers]).mean().item()
        assert row["attention/waad"] == pytest.approx(mean)
        assert row["attention/max_logit"] == max(x["max_logit"].max().item() for x in of_layers)
    losses = [[row["loss"] for row in of.state.log_history if "loss" in row] for of in (alone, trainer)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 5
    assert logged[4]["attention/waad"] != logged[0]["attention/waad"]
    frame = callback.to_frame()
    assert list(frame.columns) == ["step", "layer", "head", "waad", "max_logit"]
    assert len(frame) == 3 * 2 * 4


def test_a_second_run_is_read_anew(tmp_path):
    trainer = trainer_of(model(), tmp_path)
    callback = StatisticsCallback(trainer, held_out(), ["entropy"], every=2)
    trainer.add_callback(callback)
    trainer.train()
    first = dict(callback.history)
    trainer.train()
    assert sorted(callback.history) == sorted(first) == [0, 2, 4]
    assert len([row for row in trainer.state.log_history if "attention/entropy" in row]) == 3
    assert not torch.equal(callback.history[0][1]["entropy"], first[0][1]["entropy"])


def test_layers_frozen_in_eval_mode_stay_so():
    policy = model()
    policy.train()
    policy.model.layers[1].eval()
    before = [module.training for module in policy.modules()]
    of_heads(policy, held_out(), ["waad"])
    assert [module.training for module in policy.modules()] == before


def test_in_trls_trainer_its_own_averages_stay_whole(tmp_path):
    """TRL's `log` ends the interval of its averages; the callback's lines don't."""
    histories = []
    for watch in (False, True):
        trainer = trainer_of(model(), tmp_path, trl.SFTTrainer, trl.SFTConfig, logging_steps=2, max_steps=4, bf16=False)
        if watch:
            trainer.add_callback(StatisticsCallback(trainer, held_out(), every=1))
        trainer.train()
        timed = ("runtime", "per_second", "tokens_per")
        histories.append(
            [
                {name: x for name, x in row.items() if not any(part in name for part in timed)}
                for row in trainer.state.log_history
                if "attention/waad" not in row
            ]
        )
    assert histories[0] == histories[1]


def test_bad_settings(tmp_path):
    trainer = trainer_of(model(), tmp_path)
    with pytest.raises(TypeError, match=r"trainer must be a transformers.Trainer, got LlamaForCausalLM"):
        StatisticsCallback(trainer.model, held_out())
    with pytest.raises(TypeError, match="inputs must be tensors by name"):
        StatisticsCallback(trainer, held_out()["input_ids"])
    with pytest.raises(ValueError, match="every must be a number of optimizer steps, 1 or more; got 0"):
        StatisticsCallback(trainer, held_out(), every=0)
    with pytest.raises(ValueError, match=r"TopKeys.* is not one number per token"):
        StatisticsCallback(trainer, held_out(), [TopKeys(2)])
    with pytest.raises(ValueError, match="waad, waad would be logged under one name"):
        StatisticsCallback(trainer, held_out(), [WAAD(10), WAAD(20)])
    trainer.add_callback(StatisticsCallback(trainer, held_out(), layers=[5]))
    with pytest.raises(ValueError, match="layers: the model has 3 layers"):
        trainer.train()
