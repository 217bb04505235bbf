"""RhythmGRPOTrainer on a tiny random model: what reaches TRL's loss, on Countdown with its rule-based reward."""

from __future__ import annotations

import importlib.util
import inspect
import os
import pickle
import re
import shutil
import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer  # type: ignore[attr-defined]

from attnstats.integrations.settings import KINDS, Signals
from attnstats.integrations.trl import RhythmCredit, RhythmGRPOTrainer
from attnstats.transformers.selection import middle_third
from tests import plain_credit
from tests.process import two_ranks

EXAMPLE = importlib.util.spec_from_file_location("countdown", Path(__file__).parents[2] / "examples" / "countdown.py")
assert EXAMPLE is not None
assert EXAMPLE.loader is not None
countdown: Any = importlib.util.module_from_spec(EXAMPLE)
EXAMPLE.loader.exec_module(countdown)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

LOSS_TYPES = ("grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo")
LAYERS, HEADS = 6, 4
NEAR: dict[str, Any] = {"window": 4, "lo": 2, "hi": 6}  # for completions of some twenty tokens
# A pass of its own, or on top of TRL's for old log-probabilities.
ALIGNED: dict[str, Any] = {"gradient_accumulation_steps": 2}
MISALIGNED: dict[str, Any] = {"steps_per_generation": 2}


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    """A random model that ends some of its answers early."""
    torch.manual_seed(0)
    tokenizer = countdown.character_tokenizer()
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
    }
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=96,
        initializer_range=0.25,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        **sizes,
    )
    folder = tmp_path_factory.mktemp("model")
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def some_reward(completions, numbers, target, **_):
    """Countdown's, and a little for every sign, so that a random model has advantages."""
    solved = [
        countdown.solves(countdown.Puzzle(tuple(some), goal), text)
        for some, goal, text in zip(numbers, target, completions, strict=True)
    ]
    return [float(right) + 0.1 * len(set(text) & set("+-*=")) for right, text in zip(solved, completions, strict=True)]


def puzzles(count: int = 24) -> Dataset:
    found = sorted(countdown.puzzles(count, seed=0, largest=12), key=lambda p: len(p.prompt))
    found[::2], found[1::2] = found[: count // 2], found[count // 2 :]  # neighbours of different lengths
    rows = {"prompt": [p.prompt for p in found], "numbers": [list(p.numbers) for p in found]}
    return Dataset.from_dict({**rows, "target": [p.target for p in found]})


def trainer(start: Path, credit: RhythmCredit | None = None, model: Any = None, **settings: Any) -> Any:
    """Of stock TRL without a credit."""
    chosen: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_completion_length": 20,
        "max_steps": 2,
    }
    chosen |= {"learning_rate": 1e-2, "logging_steps": 1, "report_to": [], "save_strategy": "no", "use_cpu": True}
    chosen |= {"disable_tqdm": True, "dataloader_pin_memory": False, "bf16": False, "gradient_accumulation_steps": 1}
    arguments = GRPOConfig(**{"output_dir": str(start / "out")} | chosen | settings)
    torch.manual_seed(0)
    given: dict[str, Any] = {
        "model": transformers.AutoModelForCausalLM.from_pretrained(start) if model is None else model,
        "reward_funcs": some_reward,
        "args": arguments,
        "train_dataset": puzzles(),
        "eval_dataset": puzzles(4),
        "processing_class": transformers.AutoTokenizer.from_pretrained(start),
    }
    return GRPOTrainer(**given) if credit is None else RhythmGRPOTrainer(**given, credit=credit)


def scored(of: Any, rows: int = 8) -> tuple[dict[str, Any], torch.Tensor]:
    """The batch that TRL's training loop gets for `rows` completions, and the advantages (B,) before any credit."""
    of.model.train()
    of._logs["advantages"] = deque()
    dataset = of.train_dataset
    out = of._generate_and_score_completions([dataset[i // of.num_generations] for i in range(rows)])
    return out, torch.tensor(of._logs["advantages"])


# What the loss gets, against eager maps and formulas written out


class Maps:
    """Whole maps A of the layers that are read, in float64, each row's without its padding and put in place again."""

    def __init__(self, model: Any, out: dict[str, Any]):
        ids = torch.cat([out["prompt_ids"], out["completion_ids"]], 1)
        attended = torch.cat([out["prompt_mask"], out["completion_mask"]], 1).bool()
        reader = transformers.AutoModelForCausalLM.from_config(model.config, attn_implementation="eager")
        reader.load_state_dict(model.state_dict())
        reader.double().eval()
        self.prompt, (rows, length) = out["prompt_ids"].shape[1], ids.shape
        self.maps = torch.zeros(len(middle_third(LAYERS)), rows, HEADS, length, length, dtype=torch.float64)
        self.logits = torch.zeros(rows, length, model.config.vocab_size, dtype=torch.float64)
        for row in range(rows):
            real = attended[row].nonzero().flatten()
            with torch.no_grad():
                found = reader(input_ids=ids[row, real][None], output_attentions=True, use_cache=False)
            self.logits[row, real] = found.logits[0]
            for i, layer in enumerate(middle_third(LAYERS)):
                self.maps[i, row, :, real[:, None], real] = found.attentions[layer][0]
        self.distance = (torch.arange(length)[:, None] - torch.arange(length)).clamp(min=0).double()
        self.response = attended.clone()
        self.response[:, : self.prompt] = False

    def of_heads(self) -> torch.Tensor:
        """(L, H), the sum of the distances of all response tokens."""
        return ((self.maps * self.distance).sum(-1) * self.response[:, None]).sum((1, 3))


def classes(distances: torch.Tensor) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """The (layer, head) that look least and most far, 30 % each."""
    order = sorted(((i, j) for i in range(len(distances)) for j in range(HEADS)), key=lambda at: distances[at].item())
    count = max(1, int(0.3 * len(order)))
    return order[:count], order[-count:]


def eager_signals(model: Any, out: dict[str, Any], credit: RhythmCredit, temperature: float) -> dict[str, Any]:
    """WAAD, FAI, its validity and entropy as lists of the completion's tokens."""
    whole = Maps(model, out)
    near, far = classes(whole.of_heads())
    if credit.head_share is None:
        near = far = [(i, j) for i in range(len(whole.maps)) for j in range(HEADS)]
    local = torch.stack([whole.maps[i, :, j] for i, j in near]).mean(0)  # (B, T, T)
    global_ = torch.stack([whole.maps[i, :, j] for i, j in far]).mean(0)
    waad = (local * whole.distance.clamp(max=credit.window)).sum(-1)
    fai, valid = torch.zeros(waad.shape), torch.zeros(waad.shape, dtype=torch.bool)
    rows, length = waad.shape
    for row in range(rows):
        for s in range(length):
            end = length if credit.hi is None else min(length, s + credit.hi + 1)
            later = [t for t in range(s + credit.lo, end) if whole.response[row, t]]
            if later:
                valid[row, s] = True
                fai[row, s] = sum(global_[row, t, s] for t in later) / len(later)
    logs = (whole.logits / temperature).log_softmax(-1)
    entropy = torch.nn.functional.pad(-(logs.exp() * logs).sum(-1)[:, :-1], (1, 0))
    found = {"waad": waad, "fai": fai, "valid": valid, "entropy": entropy}
    return {name: values[:, whole.prompt :].tolist() for name, values in found.items()}


PLAIN: dict[str, tuple[Any, tuple[str, ...]]] = {
    "coupled": (plain_credit.coupled_rhythm, ("waad", "fai", "valid")),
    "local": (plain_credit.local_chunk, ("waad",)),
    "global": (plain_credit.global_anchor, ("fai", "valid")),
    "entropy": (plain_credit.high_entropy, ("entropy",)),
    "entropy-selection": (plain_credit.high_entropy_selection, ("entropy",)),
}


def expected_gamma(model: Any, out: dict[str, Any], credit: RhythmCredit, temperature: float = 1.0) -> torch.Tensor:
    signals = eager_signals(model, out, credit, temperature)
    function, names = PLAIN[credit.kind]
    mask = out["completion_mask"].bool().tolist()
    rows = [
        plain_credit.respond(mask[row], function, *(signals[name][row] for name in names)) for row in range(len(mask))
    ]
    return torch.tensor(rows)


@pytest.mark.parametrize("settings", [ALIGNED, MISALIGNED], ids=["own pass", "TRL's pass"])
@pytest.mark.parametrize("kind", PLAIN)
def test_the_loss_gets_advantages_times_gamma(start, kind, settings):
    credit = RhythmCredit(kind, **NEAR)
    of = trainer(start, credit, temperature=0.7, **settings)
    out, advantages = scored(of, rows=16)
    assert ("old_per_token_logps" in out) == (settings is MISALIGNED)
    assert not out["prompt_mask"].all()  # padded on the left
    assert len(set(out["completion_mask"].sum(1).tolist())) > 2  # and on the right
    expected = advantages[:, None] * expected_gamma(of.model, out, credit, temperature=0.7)
    torch.testing.assert_close(out["advantages"], expected.float(), rtol=1e-5, atol=1e-6)
    assert out["advantages"].dtype == torch.float32


@pytest.mark.parametrize("settings", [ALIGNED, MISALIGNED], ids=["own pass", "TRL's pass"])
def test_the_policy_is_read_and_not_the_reference(start, settings):
    credit = RhythmCredit("coupled", **NEAR, head_share=None)
    of = trainer(start, credit, beta=0.1, **settings)
    with torch.no_grad():  # the reference stays what it was
        for weight in of.model.parameters():
            weight.mul_(1.3)
    out, advantages = scored(of)
    expected = advantages[:, None] * expected_gamma(of.model, out, credit)
    torch.testing.assert_close(out["advantages"], expected.float(), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(expected_gamma(of.ref_model, out, credit), expected_gamma(of.model, out, credit))


def test_every_loss_type_of_trl_is_tested():
    source = inspect.getsource(GRPOTrainer._compute_loss)
    lists = re.findall(r"self\.loss_type (?:==|in) (.*?):", source)
    assert {name for some in lists for name in re.findall(r'"(\w+)"', some)} == set(LOSS_TYPES)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("kind", ["coupled", "entropy-selection"])
def test_trains_with_every_loss(start, loss_type, kind):
    settings = MISALIGNED if kind == "coupled" else {"importance_sampling_level": "sequence"}
    of = trainer(start, RhythmCredit(kind, **NEAR), loss_type=loss_type, **settings)
    before = {name: weight.clone() for name, weight in of.model.named_parameters()}
    of.train()
    after = dict(of.model.named_parameters())
    assert all(weight.isfinite().all() for weight in after.values())
    assert any((after[name] != before[name]).any() for name in before)


# What stays TRL's


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_one_are_stock_grpo_bit_for_bit(start, kind):
    """Also with dropout and gradient checkpointing, TRL's default: nothing is drawn that TRL would have drawn."""
    some = {"max_steps": 3, **ALIGNED}
    credit = RhythmCredit(kind, amp=1.0, reprofile_every=1, **NEAR, **({"q": 1.0} if "selection" in kind else {}))
    dropping = [transformers.AutoModelForCausalLM.from_pretrained(start, attention_dropout=0.1) for _ in range(2)]
    stock = trainer(start, None, dropping[0], **some)
    stock.train()
    ours = trainer(start, credit, dropping[1], **some)
    ours.train()
    assert ours.model.is_gradient_checkpointing
    for (name, expected), weight in zip(stock.model.named_parameters(), ours.model.parameters(), strict=True):
        assert torch.equal(weight, expected), name
    assert ours._buffered_inputs[0]["advantages"].dim() == 2
    assert ours.model.config._attn_implementation == stock.model.config._attn_implementation
    assert all(module.training for module in ours.model.modules())


def test_evaluation_is_stock(start):
    of = trainer(start, RhythmCredit("coupled", **NEAR), per_device_eval_batch_size=4)
    assert not any("rhythm" in name for name in of.evaluate())
    assert of.head_classes is None


def test_a_method_of_the_trainer_is_not_left_replaced(start, monkeypatch):
    of = trainer(start, RhythmCredit("coupled", **NEAR), **MISALIGNED)

    def fails(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(of.model.model.layers[4], "forward", fails)
    with pytest.raises(KeyboardInterrupt):
        scored(of)
    assert "_get_per_token_logps_and_entropies" not in vars(of)
    assert of.model.config._attn_implementation != "attnstats"
    assert of.model.training


# Heads, signs, logs, masks


@pytest.mark.parametrize("settings", [ALIGNED, MISALIGNED], ids=["own pass", "TRL's pass"])
def test_a_run_of_the_trainer_keeps_no_model(start, settings):
    of = trainer(start, RhythmCredit(**NEAR), **settings)
    runs: list[Any] = []
    make = of._capture

    @contextmanager
    def collecting(*args: Any, **kwargs: Any) -> Iterator[Any]:
        with make(*args, **kwargs) as run:
            runs.append(run)
            yield run

    of._capture = collecting
    scored(of)
    parameters = sum(x.numel() * x.element_size() for x in of.model.parameters())
    assert len(runs) == 2  # the profile of the heads, and the curves
    for run in runs:
        assert len(pickle.dumps(run)) < parameters
        assert not any(isinstance(x, torch.nn.Module) or callable(x) for x in vars(run).values())


def test_heads_are_profiled_at_the_start_and_every_so_many_steps(start):
    of = trainer(start, RhythmCredit("global", reprofile_every=4, **NEAR), max_steps=10, **MISALIGNED)
    of.train()
    logged = [i for i, logs in enumerate(of.state.log_history, 1) if "rhythm/global_distance" in logs]
    assert logged == [1, 5, 9]
    first = of.state.log_history[0]
    assert first["rhythm/local_distance"] < first["rhythm/global_distance"]


def test_random_credit_is_drawn_anew_and_the_same_in_a_second_run(start):
    runs = []
    for _ in range(2):
        of = trainer(start, RhythmCredit("random"))
        first, advantages = scored(of)
        of.state.global_step = 1
        second, _ = scored(of)
        runs.append([first["advantages"], second["advantages"]])
        chosen = (first["advantages"].abs() > 1.2 * advantages[:, None].abs()).sum(1)
        counts = (0.4 * first["completion_mask"].sum(1)).ceil().int()
        assert torch.equal(chosen, torch.where(advantages == 0, 0, counts))
    assert torch.equal(runs[0][0], runs[1][0])
    assert torch.equal(runs[0][1], runs[1][1])


def test_random_credit_differs_between_the_batches_of_a_step(start):
    of = trainer(start, RhythmCredit("random"), gradient_accumulation_steps=2, steps_per_generation=1)
    mask = torch.ones(4, 40, dtype=torch.bool)
    drawn = []
    for _ in range(2):
        of._begin_batch()
        drawn.append(of._gamma(Signals(), mask))
    assert not torch.equal(*drawn)


@pytest.mark.parametrize("sign", ["positive", "negative"])
def test_sign(start, sign):
    out, advantages = scored(trainer(start, RhythmCredit("local", sign=sign, **NEAR)))
    changed = (out["advantages"] != advantages[:, None]).any(1)
    assert torch.equal(changed, advantages > 0 if sign == "positive" else advantages < 0)


def test_logs(start):
    of = trainer(start, RhythmCredit("coupled", **NEAR), max_steps=3)
    of.train()
    logs = of.state.log_history[1]
    assert 0.4 <= logs["rhythm/amplified"] <= 0.8
    assert 1 < logs["rhythm/gamma"] < 1.5
    assert 0 < logs["rhythm/waad"] < 4
    assert 0 < logs["rhythm/fai"] < 1
    assert logs["rhythm/seconds"] > 0
    assert 0 < logs["rhythm/step_share"] < 1
    assert "rhythm/credit_entropy" not in logs
    of = trainer(start, RhythmCredit("entropy"))
    of.train()
    assert 0 < of.state.log_history[0]["rhythm/credit_entropy"] < 4


def test_logged_means_are_over_response_tokens(start):
    of = trainer(start, RhythmCredit("coupled", **NEAR))
    out, _ = scored(of)
    mask = out["completion_mask"].bool()
    signals = eager_signals(of.model, out, of.credit, 1.0)
    gamma = expected_gamma(of.model, out, of.credit)[mask]
    valid = torch.tensor(signals["valid"]) & mask
    means = {"gamma": gamma.mean(), "amplified": (gamma > 1).double().mean()}
    means |= {"waad": torch.tensor(signals["waad"])[mask].mean(), "fai": torch.tensor(signals["fai"])[valid].mean()}
    for name, value in means.items():
        assert of._metrics["train"][f"rhythm/{name}"] == [pytest.approx(value.item(), rel=1e-4)]


@pytest.mark.parametrize("settings", [ALIGNED, MISALIGNED], ids=["own pass", "TRL's pass"])
def test_responses_that_are_masked_as_a_whole(start, settings):
    of = trainer(start, RhythmCredit("coupled", **NEAR), mask_truncated_completions=True, **settings)
    out, advantages = scored(of, rows=16)
    masked = out["completion_mask"].sum(1) == 0
    assert masked.any()
    assert not masked.all()
    assert torch.equal(out["advantages"][masked], advantages[masked, None].expand_as(out["advantages"][masked]))
    expected = advantages[:, None] * expected_gamma(of.model, out, of.credit)
    torch.testing.assert_close(out["advantages"], expected.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("settings", [ALIGNED, MISALIGNED], ids=["own pass", "TRL's pass"])
def test_a_batch_without_any_response_gets_weights_of_one(start, settings):
    model = transformers.AutoModelForCausalLM.from_pretrained(start)
    given = {"max_completion_length": 4, "generation_kwargs": {"suppress_tokens": [0, 1]}, **settings}
    of = trainer(start, RhythmCredit("coupled", **NEAR), model, mask_truncated_completions=True, **given)
    of.train()
    assert of.head_classes is None
    assert of.state.log_history[0]["rhythm/gamma"] is None


def test_tokens_of_a_tool_are_no_response(start, monkeypatch):
    of = trainer(start, RhythmCredit("random", q=1.0))
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]])
    tool = torch.tensor([[1, 0, 0, 1, 1], [1, 1, 1, 1, 1]])
    made = {"completion_mask": mask, "tool_mask": tool, "advantages": torch.tensor([1.0, -2.0])}
    monkeypatch.setattr(GRPOTrainer, "_generate_and_score_completions", lambda *_: dict(made))
    of.model.train()
    out = of._generate_and_score_completions([])
    assert out["advantages"].tolist() == [[1.5, 1.0, 1.0, 1.5, 1.0], [-3.0, -3.0, -3.0, -2.0, -2.0]]


def test_head_classes_speak_of_layers_of_the_model(start):
    of = trainer(start, RhythmCredit("local", layers=(1, 4), **NEAR), max_steps=1)
    of.train()
    classes = of.head_classes
    assert classes.layers == (1, 4)
    assert {layer for name in ("local", "global") for layer, _ in classes.heads(name)} <= {1, 4}
    assert classes.heads("local") == [((1, 4)[row], head) for row, head in classes.local.nonzero().tolist()]


# Resuming from a checkpoint

SAVING: dict[str, Any] = {"save_strategy": "steps", "save_steps": 4, "max_steps": 8, "learning_rate": 0.05}
EVALUATING: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 4}
TWO_BATCHES: dict[str, Any] = {"gradient_accumulation_steps": 2, "steps_per_generation": 1}
TIMES = {"rhythm/seconds", "rhythm/step_share", "step_time"}


def history(of: Any) -> list[dict[str, float]]:
    """What was logged at each step, without times."""
    return [{k: v for k, v in logs.items() if k not in TIMES} for logs in of.state.log_history if "loss" in logs]


def assert_equal_runs(found: Any, expected: Any) -> None:
    assert history(found) == history(expected)
    for (name, weight), other in zip(expected.model.named_parameters(), found.model.parameters(), strict=True):
        assert torch.equal(other, weight), name
    if expected.head_classes is not None:
        assert torch.equal(found.head_classes.local, expected.head_classes.local)
        assert torch.equal(found.head_classes.global_, expected.head_classes.global_)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [("coupled", ALIGNED), ("coupled", MISALIGNED), ("global", EVALUATING | TWO_BATCHES), ("random", TWO_BATCHES)],
    ids=["own pass", "TRL's pass", "evaluation", "random"],
)
def test_a_resumed_run_equals_the_uninterrupted_one(start, tmp_path, kind, settings):
    credit = RhythmCredit(kind, amp=3.0, reprofile_every=6, **NEAR)
    settings = SAVING | {"output_dir": str(tmp_path)} | settings
    whole = trainer(start, credit, **settings)
    whole.train()
    resumed = trainer(start, credit, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert_equal_runs(resumed, whole)
    if kind != "random":  # a profile at another step would have shown
        assert [step for step, logs in enumerate(history(whole)) if "rhythm/heads_changed" in logs] == [6]
        assert history(whole)[6]["rhythm/heads_changed"] > 0


@pytest.mark.parametrize("restored", [False, True], ids=["", "with callbacks"])
def test_the_last_checkpoint_is_resumed(start, tmp_path, caplog, restored):
    credit = RhythmCredit("global", reprofile_every=6, **NEAR)
    settings = SAVING | {"output_dir": str(tmp_path), "restore_callback_states_from_checkpoint": restored}
    whole = trainer(start, credit, **settings)
    whole.train()
    shutil.rmtree(tmp_path / "checkpoint-8")
    resumed = trainer(start, credit, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        resumed.train(resume_from_checkpoint=True)
    assert_equal_runs(resumed, whole)
    assert "callbacks not included" not in caplog.text


def test_a_second_run_of_a_trainer_begins_anew(start):
    of = trainer(start, RhythmCredit("global", **NEAR))
    for _ in range(2):
        of.train()
        assert "rhythm/local_distance" in history(of)[0]
        assert "rhythm/heads_changed" not in history(of)[0]


@pytest.mark.parametrize(
    ("written_by", "message"),
    [
        (None, "checkpoint of step 1 holds no classes of heads: it was written by another trainer"),
        (RhythmCredit("random"), "checkpoint of step 1 holds no classes of heads"),
        (
            RhythmCredit("local", head_share=0.2, layers=(1, 4), **NEAR),
            r"head_share=0\.2 in layers 1, 4, and the credit is for head_share=0\.3 in layers 2, 3, 4\. The heads are "
            "classified at its first batch and every 50 steps from there, unlike in an uninterrupted run",
        ),
    ],
    ids=["stock TRL", "a credit without heads", "other heads"],
)
def test_a_checkpoint_without_the_heads(start, tmp_path, written_by, message):
    settings = {"output_dir": str(tmp_path), "save_strategy": "steps", "save_steps": 1}
    trainer(start, written_by, **settings | {"max_steps": 1}).train()
    of = trainer(start, RhythmCredit("local", **NEAR), **settings)
    with pytest.warns(UserWarning, match=message):
        of.train(resume_from_checkpoint=True)
    assert "rhythm/local_distance" in history(of)[1]
    no_heads = trainer(start, RhythmCredit("local", head_share=None, **NEAR), **settings | {"max_steps": 3})
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        no_heads.train(resume_from_checkpoint=True)


# What is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "anchor"}, "kind must be one of 'coupled'.*'anchor'"),
        ({"q": 1.5}, r"q must be .*1\.5"),
        ({"amp": 0.5}, r"amp must be .*0\.5"),
        ({"alpha": -0.1}, r"alpha must be .*-0\.1"),
        ({"k": 0}, "k must be .*0"),
        ({"sign": "up"}, "sign must be .*'up'"),
        ({"window": 0}, "window"),
        ({"lo": 5, "hi": 4}, "hi"),
        ({"head_share": 0.7}, r"head_share must be .*0\.7"),
        ({"reprofile_every": 0}, "reprofile_every must be .*0"),
        ({"reprofile_every": 2.5}, r"reprofile_every must be .*2\.5"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        RhythmCredit(**settings)


def test_a_credit_of_another_type(start):
    with pytest.raises(TypeError, match="credit must be a RhythmCredit, got str"):
        trainer(start, "coupled")


@pytest.mark.parametrize("name", ["cp", "sp"])
def test_sequences_that_are_spread_over_ranks(start, monkeypatch, name):
    spread = {"cp_size": 1, "sp_size": 1, "cp_enabled": False, "sp_enabled": False}
    spread |= {f"{name}_size": 2, f"{name}_enabled": True}
    made = GRPOTrainer.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        monkeypatch.setattr(type(self.accelerator), "parallelism_config", SimpleNamespace(**spread))

    monkeypatch.setattr(GRPOTrainer, "__init__", init)
    with pytest.raises(ValueError, match=f"parallelism_config has .*{name}_size=2.* each rank a part of a sequence"):
        trainer(start, RhythmCredit("coupled"))


def test_layers_that_the_model_lacks(start):
    with pytest.raises(ValueError, match="layers: the model has 6 layers"):
        trainer(start, RhythmCredit("local", layers=(9,)))


def test_a_model_whose_attention_cannot_be_read_says_so_before_training(start):
    config = transformers.GPTNeoConfig(
        vocab_size=24, hidden_size=16, num_layers=2, num_heads=2, attention_types=[[["global"], 2]]
    )
    model = transformers.GPTNeoForCausalLM(config)
    with pytest.raises(ValueError, match=r"GPTNeoForCausalLM.*AttentionInterface|cannot be replaced"):
        trainer(start, RhythmCredit("coupled"), model)
    trainer(start, RhythmCredit("entropy"), model)  # which asks for no attention


# Two ranks


def on_rank(rank: int, start: Path) -> None:
    os.environ["ACCELERATE_USE_CPU"] = "true"
    of = trainer(start, RhythmCredit("coupled", **NEAR), **MISALIGNED)
    out, _ = scored(of)
    found = {"out": out, "classes": of.head_classes, "metrics": dict(of._metrics["train"])}
    of.train()
    weights = {name: weight.detach() for name, weight in of.model.named_parameters()}
    torch.save(found | {"weights": weights}, start / f"{rank}.pt")

    runs = []
    for checkpoint in (None, str(start / "saved" / "checkpoint-4")):
        some = SAVING | {"output_dir": str(start / "saved"), **MISALIGNED}
        of = trainer(start, RhythmCredit("global", amp=3.0, reprofile_every=6, **NEAR), **some)
        of.train(resume_from_checkpoint=checkpoint)
        runs.append(of)
    assert_equal_runs(*runs)
    assert "rhythm/heads_changed" in history(runs[0])[6]


def test_two_ranks_agree_on_the_heads_train_and_resume(start):
    two_ranks(on_rank, start)
    ranks = [torch.load(start / f"{rank}.pt", weights_only=False) for rank in range(2)]
    assert ranks[0]["out"]["completion_ids"].tolist() != ranks[1]["out"]["completion_ids"].tolist()
    model = transformers.AutoModelForCausalLM.from_pretrained(start)  # both profiled before the first update
    near, far = classes(sum(Maps(model, rank["out"]).of_heads() for rank in ranks))
    for rank in ranks:
        assert sorted(near) == [tuple(at) for at in rank["classes"].local.nonzero().tolist()]
        assert sorted(far) == [tuple(at) for at in rank["classes"].global_.nonzero().tolist()]
        assert rank["out"]["advantages"].shape == rank["out"]["completion_ids"].shape
        assert rank["metrics"]["rhythm/gamma"] == ranks[0]["metrics"]["rhythm/gamma"]
    before = dict(model.named_parameters())
    for name, weight in ranks[0]["weights"].items():  # each rank's own batch, one update
        assert torch.equal(weight, ranks[1]["weights"][name]), name
    assert any(not torch.equal(weight, before[name]) for name, weight in ranks[0]["weights"].items())
