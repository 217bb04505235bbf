"""The engine of the verl plug-in, without Ray: its curves are those of eager maps, in every layout that verl has."""

import os
import socket

import pytest
import torch

# Read when verl is imported, here and in the processes of other ranks.
os.environ |= {"VERL_PLATFORM": "cpu", "VERL_USE_EXTERNAL_MODULES": "tests.engines.verl.cpu"}
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from attnstats import heads
from attnstats.integrations.settings import RhythmCredit
from tests.engines.verl import tiny
from tests.process import two_ranks

PROMPT, RESPONSE = 30, 34
CREDIT = RhythmCredit(hi=25, layers=[1, 2, 4])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    tiny.save(path)
    return path


@pytest.fixture(scope="module")
def rank():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK="0", WORLD_SIZE="1")
    torch.distributed.init_process_group("cpu:gloo", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def engine_of(folder, credit=CREDIT, **changes):
    from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig
    from verl.workers.engine import EngineRegistry

    import attnstats.integrations.verl.engine  # noqa: F401

    settings = {"use_remove_padding": True, "ulysses_sequence_parallel_size": 1} | changes
    model = HFModelConfig(
        path=str(folder),
        use_remove_padding=settings["use_remove_padding"],
        override_config={"attn_implementation": "sdpa"},
        **settings.get("model", {}),
    )
    precision = dict.fromkeys(("param_dtype", "reduce_dtype", "buffer_dtype"), "fp32")
    config = FSDPEngineConfig(
        strategy="fsdp2",
        use_torch_compile=False,
        mixed_precision=precision,
        ulysses_sequence_parallel_size=settings["ulysses_sequence_parallel_size"],
        pad_to_length=settings.get("pad_to_length", False),
        pad_to_length_bucket=64,
    )
    backend = settings.get("backend", "rhythm_fsdp2")
    object.__setattr__(config, "strategy", backend)
    engine = EngineRegistry.new(
        model_type="language_model",
        backend=backend,
        model_config=model,
        engine_config=config,
        optimizer_config=FSDPOptimizerConfig(total_training_steps=4),
        checkpoint_config=None,
    )
    engine.credit = credit
    engine.initialize()
    return engine


def rows():
    """Padded rows: plain, truncated, with a tool's tokens in the middle, and one without a response token."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 90, (5, PROMPT + RESPONSE), generator=generator)
    attended = torch.ones_like(ids)
    attended[0, :7] = attended[1, -5:] = attended[2, :3] = attended[2, -9:] = attended[4, -RESPONSE:] = 0
    response_mask = attended[:, PROMPT:].clone()
    response_mask[3, 8:15] = 0
    return ids, attended, response_mask


def batch_of(ids, attended, response_mask, engine, nested_mask, step=1, tokens=128):
    from verl import DataProto
    from verl.utils import tensordict_utils as tu
    from verl.utils.model import compute_position_id_with_mask
    from verl.workers.utils.padding import left_right_2_no_padding

    data = DataProto.from_single_dict(
        {
            "input_ids": ids,
            "prompts": ids[:, :PROMPT],
            "responses": ids[:, PROMPT:],
            "attention_mask": attended,
            "position_ids": compute_position_id_with_mask(attended),
            "response_mask": response_mask,
        },
        meta_info={
            "temperature": 1.0,
            "use_remove_padding": engine.use_remove_padding,
            "use_dynamic_bsz": True,
            "max_token_len_per_gpu": tokens,
            "calculate_entropy": True,
            "pad_token_id": 0,
        },
    )
    batch = left_right_2_no_padding(data.to_tensordict())
    if nested_mask:  # as in the V1 trainer
        lengths = attended[:, PROMPT:].sum(1).tolist()
        rows = [mask[:n] for mask, n in zip(response_mask, lengths, strict=True)]
        batch["response_mask"] = torch.nested.as_nested_tensor(rows, layout=torch.jagged)
    if step is not None:
        tu.assign_non_tensor(batch, rhythm_step=step)
    return batch


def infer(engine, batch):
    """What the workers return of a pass for log-probabilities."""
    with engine.eval_mode():
        return engine.infer_batch(batch)["model_output"]


def eager(folder, credit, classes):
    """Of each row WAAD and FAI in its real tokens, and the mean distance of its response, out of eager maps."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    ids, attended, response_mask = rows()
    curves, total, count = [], 0.0, 0
    for row, real, mask in zip(ids, attended.bool(), response_mask, strict=True):
        row, n = row[real][None], int(real.sum())
        query = torch.cat([torch.zeros(int(real[:PROMPT].sum())), mask[real[PROMPT:]]]).bool()
        with torch.no_grad():
            maps = model(row, output_attentions=True).attentions
        attention = torch.stack([maps[layer][0] for layer in credit.layers]).double()  # (L, H, T, T)
        distance = (torch.arange(n)[:, None] - torch.arange(n)).double()
        total = total + ((attention * distance.clamp(min=0)).sum(-1) * query).sum(-1)
        count += int(query.sum())
        if classes is None:
            continue
        local, global_ = attention[classes.local].mean(0), attention[classes.global_].mean(0)
        waad = (local * distance.clamp(0, credit.window)).sum(-1)
        seen = (distance >= credit.lo) & (distance <= credit.hi) & query[:, None]
        fai = torch.where(seen.any(0), (global_ * seen).sum(0) / seen.sum(0).clamp(min=1), 0)
        curves.append((waad, fai, seen.any(0)))
    return curves, total / count


def assert_curves_are_eager(folder, engine, output, part=slice(None)):
    _, distance = eager(folder, CREDIT, None)
    expected = heads.classify(distance, 0.3, CREDIT.layers)
    assert torch.equal(engine.head_classes.local, expected.local)
    assert torch.equal(engine.head_classes.global_, expected.global_)
    curves, _ = eager(folder, CREDIT, expected)
    for row, (waad, fai, valid) in enumerate(curves[part]):
        assert torch.equal(output["fai_valid"].unbind()[row], valid)
        torch.testing.assert_close(output["waad"].unbind()[row].double(), waad, rtol=0, atol=1e-5)
        ours = output["fai"].unbind()[row].double()
        torch.testing.assert_close(ours[valid], fai[valid], rtol=0, atol=1e-5)


@pytest.mark.parametrize("nested_mask", [True, False], ids=["nested mask", "padded mask"])
@pytest.mark.parametrize("settings", [{}, {"use_remove_padding": False}, {"pad_to_length": True}], ids=str)
def test_curves_are_those_of_eager_maps(folder, rank, settings, nested_mask):
    engine = engine_of(folder, **settings)
    output = infer(engine, batch_of(*rows(), engine, nested_mask))
    assert_curves_are_eager(folder, engine, output)
    assert engine.passes_read == 3  # micro-batches of at most 128 tokens


def test_other_passes_are_not_read(folder, rank):
    engine = engine_of(folder)
    output = infer(engine, batch_of(*rows(), engine, True, step=None))
    assert set(output) == {"log_probs", "entropy"}
    assert engine.passes_read == 0
    assert engine.head_classes is None


def test_without_a_response_token_heads_stay_unclassified(folder, rank):
    engine = engine_of(folder)
    ids, attended, response_mask = rows()
    nothing = torch.zeros_like(response_mask)
    output = infer(engine, batch_of(ids, attended, nothing, engine, True))
    assert engine.head_classes is None
    assert not any(row.any() for row in output["fai_valid"].unbind())
    infer(engine, batch_of(ids, attended, response_mask, engine, True, step=2))
    assert engine.head_classes is not None


def test_heads_are_classified_anew_when_due_and_restored(folder, rank, tmp_path, monkeypatch):
    engine = engine_of(folder, RhythmCredit(hi=25, layers=[1, 2, 4], reprofile_every=2))
    saving = FSDPEngineWithLMHead
    monkeypatch.setattr(saving, "save_checkpoint", lambda self, local_path: None)
    monkeypatch.setattr(saving, "load_checkpoint", lambda self, local_path: None)
    reports = []
    for step in (1, 2, 3):
        infer(engine, batch_of(*rows(), engine, True, step=step))
        reports.append(engine.report())
    profiled = {"rhythm/seconds", "rhythm/local_distance", "rhythm/global_distance"}
    assert [set(report) for report in reports] == [profiled, {"rhythm/seconds"}, profiled | {"rhythm/heads_changed"}]
    assert reports[2]["rhythm/heads_changed"] == 0
    assert reports[0]["rhythm/local_distance"] < reports[0]["rhythm/global_distance"]

    engine.save_checkpoint(str(tmp_path))
    restored = engine_of(folder, engine.credit)
    restored.load_checkpoint(str(tmp_path))
    assert torch.equal(restored.head_classes.local, engine.head_classes.local)
    infer(restored, batch_of(*rows(), engine, True, step=4))
    assert set(restored.report()) == {"rhythm/seconds"}  # due at 5
    with pytest.warns(UserWarning, match=r"head_share=0.3 in layers 1, 2, 4, and the credit is for head_share=0.5"):
        engine_of(folder, RhythmCredit(head_share=0.5, layers=[1, 2, 4])).load_checkpoint(str(tmp_path))
    with pytest.warns(UserWarning, match="the checkpoint holds no classes of heads"):
        engine_of(folder).load_checkpoint(str(tmp_path / "elsewhere"))


def test_adapters_are_read_with_and_not_without(folder, rank):
    """LoRA: curves are those of the policy; the reference's pass, without adapters, is another's and isn't read."""
    engine = engine_of(folder, model={"lora_rank": 4, "lora_alpha": 8})
    output = infer(engine, batch_of(*rows(), engine, True))
    assert_curves_are_eager(folder, engine, output)  # adapters start at nothing
    with torch.no_grad():
        for name, parameter in engine.module.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.3)
    adapted = infer(engine, batch_of(*rows(), engine, True))
    assert (adapted["waad"].values() - output["waad"].values()).abs().max() > 0.01
    with engine.disable_adapter():
        reference = infer(engine, batch_of(*rows(), engine, True, step=None))
    assert set(reference) == {"log_probs", "entropy"}
    torch.testing.assert_close(reference["log_probs"].values(), output["log_probs"].values())


def test_an_update_is_stock_verls(folder, rank):
    """Gradients of a training pass, after one that was read, are those of verl's own engine."""
    grads = []
    for backend in ("rhythm_fsdp2", "fsdp2"):
        engine = engine_of(folder, backend=backend)
        if backend == "rhythm_fsdp2":
            infer(engine, batch_of(*rows(), engine, True))
        grads.append(gradients(engine))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_an_update_is_not_read(folder, rank):
    engine = engine_of(folder)
    gradients(engine, step=1)
    assert engine.passes_read == 0
    assert engine.head_classes is None


def gradients(engine, tokens=128, step=None):
    batch = batch_of(*rows(), engine, True, step=step, tokens=tokens)
    with engine.train_mode():
        engine.optimizer_zero_grad()
        engine.forward_backward_batch(batch, _loss)
        return [parameter.grad.full_tensor().clone() for parameter in engine.module.parameters()]


def _loss(model_output, data, dp_group=None):
    return model_output["log_probs"].values().sum(), {}


def ulysses(rank, folder, data_parallel):
    torch.distributed.init_process_group("cpu:gloo")
    size = torch.distributed.get_world_size() // data_parallel
    engine = engine_of(folder, ulysses_sequence_parallel_size=size)
    part = slice(None)
    if data_parallel == 2:
        part = (slice(3), slice(3, None))[engine.get_data_parallel_rank()]
    output = infer(engine, batch_of(*(x[part] for x in rows()), engine, True, tokens=64))
    assert_curves_are_eager(folder, engine, output, part)
    if data_parallel == 1:
        ours = gradients(engine, tokens=64)
        if rank == 0:
            torch.save(ours, folder / "gradients.pt")


@pytest.mark.parametrize("key_heads", [2, 1])
def test_with_rows_spread_over_two_ranks(tmp_path, rank, key_heads):
    tiny.save(tmp_path, num_key_value_heads=key_heads)
    two_ranks(ulysses, tmp_path, 1)
    alone = gradients(engine_of(tmp_path))
    for ours, expected in zip(torch.load(tmp_path / "gradients.pt"), alone, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_with_rows_spread_over_two_times_two_ranks(folder):
    two_ranks(ulysses, folder, 2, count=4)
