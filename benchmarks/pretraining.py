"""When the rhythm appears: statistics of held-out text over the training of a small transformer, from its first step.

`python -m benchmarks.pretraining` trains a Llama of 2.7 million parameters on sums that are worked out step by step,
one character a token. `StatisticsCallback` logs WAAD, FAI, entropy and the largest logit of held-out sums; at some
steps the couplings of the paper (Table 2) are computed on the same text, with heads classified anew. Results are in
results/pretraining: history.csv has a row per step, layer and head; couplings.csv a row per step and coupling;
summary.json the settings, versions and losses. `--figure` draws docs/pretraining.svg from them, without training;
`--cost` measures the callback.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import sys
import tempfile
import time
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from attnstats.chance import Chance
from attnstats.identity import identity
from attnstats.integrations.trainer import StatisticsCallback
from attnstats.report.figures import STYLE
from attnstats.study.couplings import examine, measure
from attnstats.study.models import LoadedModel
from attnstats.study.outputs import versions
from attnstats.study.store import begin
from benchmarks.summary import coupling_row

RESULTS = Path(__file__).parent / "results" / "pretraining"
FIGURE = Path(__file__).parent.parent / "docs" / "pretraining.svg"
CHARACTERS = "0123456789+=?., \n"
LENGTH = 96  # tokens of a row
SIZES: dict[str, Any] = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 6}
IGNORED = -100  # label of a token without a loss


def problem(rng: random.Random) -> tuple[str, str]:
    """A question, and its answer with every partial sum, such as `17+58+346?`, `17+58=75, 75+346=421. 421`."""
    terms = [rng.randrange(1, 10 ** rng.randint(1, 3)) for _ in range(rng.randint(3, 5))]
    sums = list(accumulate(terms))
    steps = ", ".join(f"{a}+{b}={c}" for a, b, c in zip(sums, terms[1:], sums[1:], strict=False))
    return "+".join(map(str, terms)) + "?\n", f"{steps}. {sums[-1]}\n"


def character_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {character: i for i, character in enumerate(["<pad>", "<eos>", *CHARACTERS])}
    letters = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    letters.pre_tokenizer, letters.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=letters, pad_token="<pad>", eos_token="<eos>")


class Text:
    """Problems as tokens: the questions and answers, and padded rows of both."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, count: int, seed: int, without: frozenset[str] = frozenset()
    ):
        rng = random.Random(seed)
        self.problems: list[tuple[str, str]] = []
        while len(self.problems) < count:
            question, answer = problem(rng)
            if question not in without and len(question) + len(answer) < LENGTH:
                self.problems.append((question, answer))
        self.questions = frozenset(question for question, _ in self.problems)
        encode: Any = tokenizer.convert_tokens_to_ids
        self.pairs: list[tuple[list[int], list[int]]] = [
            (encode(list(question)), [*encode(list(answer)), 1]) for question, answer in self.problems
        ]

    def rows(self) -> dict[str, list[list[int]]]:
        """Padded on the right; the loss is of the answer."""
        columns: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
        for question, answer in self.pairs:
            rest = LENGTH - len(question) - len(answer)
            columns["input_ids"].append([*question, *answer, *[0] * rest])
            columns["attention_mask"].append([1] * (LENGTH - rest) + [0] * rest)
            columns["labels"].append([IGNORED] * len(question) + answer + [IGNORED] * rest)
        return columns


@torch.no_grad()
def result_share(model: Any, text: Text) -> float:
    """The share of problems whose result, the digits after the full stop, has every digit right given those before."""
    rows = {name: torch.tensor(x) for name, x in text.rows().items()}
    predicted = model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"]).logits.argmax(-1)
    right = 0
    for i, ((question, answer), (_, written)) in enumerate(zip(text.pairs, text.problems, strict=True)):
        first, end = len(question) + written.index(". ") + 2, len(question) + len(answer) - 2
        right += int(torch.equal(predicted[i, first - 1 : end - 1], rows["input_ids"][i, first:end]))
    return right / len(text.pairs)


class CouplingsCallback(TrainerCallback):
    """The couplings of the held-out answers, the loss and the share of right results, at some steps."""

    def __init__(self, tokenizer: Any, text: Text, steps: list[int], scratch: Path, chance: Chance):
        self.rows: list[dict[str, Any]] = []
        self.results: dict[int, float] = {}
        self._tokenizer, self._text, self._steps = tokenizer, text, steps
        self._scratch, self._chance = scratch, chance

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._read(state.global_step, kwargs["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._read(state.global_step, kwargs["model"])

    def _read(self, step: int, model: Any) -> None:
        if step not in self._steps:
            return
        model.eval()
        self.results[step] = result_share(model, self._text)
        loaded = LoadedModel("small", model, self._tokenizer)
        store = begin(self._scratch / str(step), {}, resume=False)
        for index, (question, answer) in enumerate(self._text.pairs):
            store.write(index, *measure(loaded, question, answer, 1.0))
        tables = examine(store, identity(model), self._chance)
        model.train()
        for coupling in tables.rows[0].couplings or ():
            self.rows.append({"step": step, "coupling": coupling.name, **coupling_row(coupling)})
        print(step, self.results[step], [round(row["lift"], 3) for row in self.rows[-3:]], file=sys.stderr, flush=True)


def trainer_of(tokenizer: Any, problems: Text, steps: int, options: argparse.Namespace, scratch: Path) -> Trainer:
    torch.manual_seed(options.seed)
    config = LlamaConfig(
        vocab_size=len(CHARACTERS) + 2,
        max_position_embeddings=LENGTH,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        **SIZES,
    )
    model = LlamaForCausalLM(config)
    arguments = TrainingArguments(
        str(scratch / "trainer"),
        max_steps=steps,
        per_device_train_batch_size=options.batch,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        warmup_steps=steps // 20,
        weight_decay=0.01,
        logging_steps=25,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=options.seed,
    )
    return Trainer(model, arguments, train_dataset=Dataset.from_dict(problems.rows()))


def train(options: argparse.Namespace, scratch: Path) -> None:
    tokenizer = character_tokenizer()
    held_out = Text(tokenizer, options.held_out, options.seed + 1)
    problems = Text(tokenizer, options.steps * options.batch, options.seed, held_out.questions)
    trainer = trainer_of(tokenizer, problems, options.steps, options, scratch)
    model: Any = trainer.model
    rows = held_out.rows()
    inputs = {name: torch.tensor(rows[name]) for name in ("input_ids", "attention_mask")}
    statistics = StatisticsCallback(trainer, inputs, layers="all", every=options.every)
    steps = sorted({0, *(round(options.steps * 2**-i) for i in range(8))})
    couplings = CouplingsCallback(tokenizer, held_out, steps, scratch, Chance(2000, resamples=2000, seed=options.seed))
    trainer.add_callback(statistics)
    trainer.add_callback(couplings)
    trainer.train()
    RESULTS.mkdir(parents=True, exist_ok=True)
    statistics.to_frame().to_csv(RESULTS / "history.csv", index=False, float_format="%.6g")
    with (RESULTS / "couplings.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(couplings.rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(couplings.rows)
    losses = {row["step"]: row["loss"] for row in trainer.state.log_history if "loss" in row}
    summary = {
        "seed": options.seed,
        "steps": options.steps,
        "batch": options.batch,
        "held_out": options.held_out,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "versions": versions(),
        "right_results": couplings.results,
        "losses": losses,
    }
    (RESULTS / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="ascii")


def cost(options: argparse.Namespace, scratch: Path) -> None:
    """Print the share of training that a pass over as many rows as a step has takes every 50 steps, in CPU time."""
    tokenizer = character_tokenizer()
    trainer = trainer_of(tokenizer, Text(tokenizer, 100 * options.batch, options.seed), 100, options, scratch)
    rows = Text(tokenizer, options.batch, options.seed + 1).rows()
    inputs = {name: torch.tensor(rows[name]) for name in ("input_ids", "attention_mask")}
    statistics = StatisticsCallback(trainer, inputs, every=10)
    trainer.add_callback(statistics)
    began = time.process_time()
    trainer.train()
    step = (time.process_time() - began - statistics.seconds) / 100
    passes = [row["attention/seconds"] for row in trainer.state.log_history if "attention/seconds" in row][1:]
    print(f"a pass {sum(passes) / len(passes):.3f} s, a step {step:.3f} s: {sum(passes) / len(passes) / 50 / step:.2%}")


def draw() -> None:
    """The figure: loss and right results, the curves of the heads, and the couplings, over the steps."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update(STYLE)
    import pandas
    from matplotlib import pyplot

    history = pandas.read_csv(RESULTS / "history.csv")
    couplings = pandas.read_csv(RESULTS / "couplings.csv")
    summary = json.loads((RESULTS / "summary.json").read_text(encoding="ascii"))
    figure, axes = pyplot.subplots(2, 3, figsize=(9, 4.6), layout="constrained")
    loss, right = axes[0, 0], axes[0, 0].twinx()
    loss.plot([int(step) for step in summary["losses"]], list(summary["losses"].values()), color="tab:gray")
    loss.set(title="loss (gray), right results (blue)", yscale="log")
    loss.set_yticks([1, 0.1, 0.01], labels=["1", "0.1", "0.01"])
    right.plot(
        [int(step) for step in summary["right_results"]], list(summary["right_results"].values()), "o-", markersize=3
    )
    right.set_ylim(0, 1)
    of_heads = (
        ("waad", "WAAD(10) of each head"),
        ("fai", "FAI(10, 100)"),
        ("entropy", "entropy, nats"),
        ("max_logit", "largest logit"),
    )
    for (name, title), ax in zip(of_heads, [axes[0, 1], axes[0, 2], axes[1, 0], axes[1, 1]], strict=True):
        for (layer, _), rows in history.groupby(["layer", "head"]):
            ax.plot(rows["step"], rows[name], linewidth=0.8, color=pyplot.cm.viridis(layer / history["layer"].max()))
        ax.set(title=title)
    for name, rows in couplings.groupby("coupling", sort=False):
        axes[1, 2].plot(rows["step"], 100 * rows["lift"], "o-", markersize=3, label=name)
        axes[1, 2].fill_between(rows["step"], 100 * rows["low"], 100 * rows["high"], alpha=0.2)
    axes[1, 2].axhline(0, color="black", linewidth=0.5)
    axes[1, 2].set(title="couplings: lift over chance, %")
    axes[1, 2].legend(fontsize=6, frameon=False)
    for ax in axes.flat:
        ax.set_xscale("symlog", linthresh=10)
        ax.set_xlim(0, summary["steps"])
        ax.set_xticks([0, 10, 100, 1000], labels=["0", "10", "100", "1000"])
        ax.set_xticks([], minor=True)
    figure.supxlabel("optimizer step")
    figure.savefig(FIGURE, metadata={"Date": None})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=32, help="problems of a step")
    parser.add_argument("--held-out", type=int, default=64, help="problems that statistics are read on")
    parser.add_argument("--every", type=int, default=50, help="steps between two passes of the callback")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cost", action="store_true", help="measure what the callback costs, and nothing else")
    parser.add_argument("--figure", action="store_true", help="draw the figure from kept results, and nothing else")
    options = parser.parse_args()
    if options.cost:
        with tempfile.TemporaryDirectory() as scratch:
            cost(options, Path(scratch))
        return 0
    if not options.figure:
        with tempfile.TemporaryDirectory() as scratch:
            train(options, Path(scratch))
    draw()
    return 0


if __name__ == "__main__":
    sys.exit(main())
