"""GRPO against five token credits on Countdown, with the same seeds: trains, records every run and plots them.

A small Llama is made from scratch and trained on right and wrong worked answers (once, then kept in `--out`). From
there it is trained by reinforcement only, once per credit and seed. A finished run leaves a CSV and is not repeated, so
that a killed comparison can be continued, and two processes can share one `--out`.

    python examples/countdown_grpo.py --out out/countdown
    python examples/countdown_grpo.py --credits grpo coupled --seeds 0 1 2 --steps 400 --out out/countdown
    python examples/countdown_grpo.py --cost 40 --out out/countdown      # what the credit adds to a step
    python examples/countdown_grpo.py --plot --out out/countdown         # of the runs that are there
    python examples/countdown_grpo.py --model SmolLM2-135M-Instruct --credits grpo coupled --seeds 0 --out out/smollm2
"""

import argparse
import csv
import itertools
import math
import os
import statistics
import time
from pathlib import Path
from typing import TextIO

import countdown
import torch
from datasets import Dataset
from transformers import LlamaForCausalLM, PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from attnstats.integrations.trl import RhythmCredit, RhythmGRPOTrainer
from attnstats.study.models import DEFAULT_MODEL, load

CREDITS = ["grpo", "coupled", "local", "global", "random", "entropy"]
HELD_OUT, GROUP = 128, 8
ANSWER = 44  # tokens
COLUMNS = ["step", "seconds", "held_out", "reward", "entropy", "completions/mean_length"]
COLUMNS += ["rhythm/amplified", "rhythm/gamma", "rhythm/step_share"]


def main() -> None:
    options = parse()
    options.out.mkdir(parents=True, exist_ok=True)
    if not options.plot:
        pool = countdown.puzzles(options.puzzles, seed=0)
        if options.model:
            pool = [puzzle._replace(before=countdown.EXAMPLES) for puzzle in pool]
        held_out, training = pool[: options.held_out], pool[options.held_out :]
        if options.cost:
            measure_cost(options, training)
            return
        for seed in options.seeds:
            for kind in options.credits:
                run(options, kind, seed, training, held_out)
    plot(options.out)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--credits", nargs="+", choices=CREDITS, default=CREDITS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps of each run")
    parser.add_argument("--every", type=int, default=20, help="steps between two tests on the held-out puzzles")
    parser.add_argument("--out", type=Path, default=Path("out/countdown"))
    parser.add_argument("--model", help=f"a folder, a hub name or {DEFAULT_MODEL}; default: a small one from scratch")
    parser.add_argument("--warm-up", type=int, default=1000, help="supervised steps of the model from scratch")
    parser.add_argument("--batch", type=int, default=64, help="completions of an optimizer step")
    parser.add_argument("--reuse", type=int, default=2, help="optimizer steps on each batch of completions")
    parser.add_argument("--rate", type=float, default=1e-4, help="learning rate")
    parser.add_argument("--puzzles", type=int, default=599, help="held-out ones included; 599 at most")
    parser.add_argument("--held-out", type=int, default=HELD_OUT)
    parser.add_argument("--cost", type=int, default=0, metavar="ROUNDS", help="measure what coupled credit costs")
    parser.add_argument("--plot", action="store_true", help="plot the runs in --out, train nothing")
    options = parser.parse_args()
    if not 0 < options.held_out < options.puzzles:
        parser.error(f"--held-out must be between 0 and --puzzles, {options.puzzles}; got {options.held_out}")
    return options


# One run


def start(options: argparse.Namespace, training: list[countdown.Puzzle]) -> tuple[object, object]:
    """The initial model of every run, and its tokenizer."""
    if options.model:
        loaded = load(None if options.model == DEFAULT_MODEL else options.model, dtype="float32")
        return loaded.model, loaded.tokenizer
    folder, tokenizer = options.out / f"start-{options.warm_up}", countdown.character_tokenizer()
    if not (folder / "model.safetensors").is_file():
        warmed = countdown.warm_up(tokenizer, training, options.warm_up)
        partial = folder.with_name(f"{folder.name}.{os.getpid()}")
        warmed.save_pretrained(partial)
        if not folder.exists():
            partial.rename(folder)
    return LlamaForCausalLM.from_pretrained(folder), tokenizer


def reward(completions: list[str], numbers: list[list[int]], target: list[int], **_: object) -> list[float]:
    """1 for an answer that reaches the target, else 0."""
    puzzles = (countdown.Puzzle(tuple(some), goal) for some, goal in zip(numbers, target, strict=True))
    return [float(countdown.solves(puzzle, text)) for puzzle, text in zip(puzzles, completions, strict=True)]


def trainer_for(
    options: argparse.Namespace, kind: str, seed: int, training: list[countdown.Puzzle], **more: object
) -> GRPOTrainer:
    model, tokenizer = start(options, training)
    rows = {"prompt": [puzzle.prompt for puzzle in training], "numbers": [list(puzzle.numbers) for puzzle in training]}
    arguments = GRPOConfig(
        str(options.out / "trainer"),
        seed=seed,
        max_steps=options.steps,
        learning_rate=options.rate,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=10,
        per_device_train_batch_size=options.batch,
        gradient_accumulation_steps=1,
        steps_per_generation=options.reuse,
        num_generations=GROUP,
        max_completion_length=ANSWER,
        gradient_checkpointing=False,
        logging_steps=options.reuse,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        bf16=False,
    )
    dataset = Dataset.from_dict({**rows, "target": [puzzle.target for puzzle in training]})
    kind_of_trainer = more.pop("kind_of_trainer", GRPOTrainer if kind == "grpo" else RhythmGRPOTrainer)
    if kind != "grpo":
        more["credit"] = RhythmCredit(kind)
    trainer = kind_of_trainer(model, reward, args=arguments, train_dataset=dataset, processing_class=tokenizer, **more)
    trainer.remove_callback(PrinterCallback)
    return trainer


class Recorder(TrainerCallback):
    """Records the rewards of training and the share of held-out puzzles solved."""

    def __init__(self, file: TextIO, held_out: list[countdown.Puzzle], every: int):
        self.file, self.held_out, self.every = file, held_out, every
        self.writer = csv.DictWriter(file, COLUMNS)
        self.writer.writeheader()
        self.solved: list[float] = []
        self.began = time.perf_counter()

    def write(self, step: int, **values: float) -> None:
        self.writer.writerow({"step": step, "seconds": f"{time.perf_counter() - self.began:.1f}", **values})
        self.file.flush()

    def evaluate(self, step: int, model: object, tokenizer: object) -> None:
        self.solved.append(share_solved(model, tokenizer, self.held_out))
        self.write(step, held_out=self.solved[-1])

    def on_train_begin(self, args, state, control, model=None, processing_class=None, **_):
        self.evaluate(0, model, processing_class)

    def on_step_end(self, args, state, control, model=None, processing_class=None, **_):
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self.evaluate(state.global_step, model, processing_class)

    def on_log(self, args, state, control, logs=None, **_):
        if logs and "reward" in logs:
            self.write(state.global_step, **{name: f"{logs[name]:.4g}" for name in COLUMNS[3:] if name in logs})


@torch.no_grad()
def share_solved(model: object, tokenizer: object, puzzles: list[countdown.Puzzle]) -> float:
    """The share of puzzles that greedy answers solve."""
    training = model.training
    model.eval()
    batch = tokenizer([puzzle.prompt for puzzle in puzzles], padding=True, padding_side="left", return_tensors="pt")
    inputs = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
    answers = model.generate(**inputs, max_new_tokens=ANSWER, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    model.train(training)
    return statistics.mean(countdown.solves(puzzle, text) for puzzle, text in zip(puzzles, texts, strict=True))


def run(
    options: argparse.Namespace,
    kind: str,
    seed: int,
    training: list[countdown.Puzzle],
    held_out: list[countdown.Puzzle],
) -> None:
    """Train once, unless the run is finished or another process has written to its file in the last ten minutes."""
    path = options.out / f"{kind}-{seed}.csv"
    claim = path.with_suffix(".running")
    if path.is_file() or (claim.is_file() and time.time() - claim.stat().st_mtime < 600):
        return
    claim.unlink(missing_ok=True)  # of a process that died
    try:
        with claim.open("x", newline="") as file:
            recorder = Recorder(file, held_out, options.every)
            trainer_for(options, kind, seed, training, callbacks=[recorder]).train()
        claim.rename(path)
    finally:
        claim.unlink(missing_ok=True)
    first, *_, last = recorder.solved
    print(f"{kind}, seed {seed}: {first:.1%} -> {last:.1%} of the held-out puzzles solved", flush=True)


# What the credit costs


class Alternating(RhythmGRPOTrainer):
    """Trains every second batch of completions without credit and times each batch with its optimizer steps."""

    def _generate_and_score_completions(self, inputs):
        self.marks = [*getattr(self, "marks", []), (time.perf_counter(), time.process_time())]
        if len(self.marks) % 2:
            return GRPOTrainer._generate_and_score_completions(self, inputs)
        return super()._generate_and_score_completions(inputs)


def measure_cost(options: argparse.Namespace, training: list[countdown.Puzzle]) -> None:
    """Print the seconds of a batch of completions and its steps, with GRPO and coupled credit in turn."""
    options.steps = options.reuse * (2 * options.cost + 3)
    trainer = trainer_for(options, "coupled", 0, training, kind_of_trainer=Alternating)
    trainer.train()
    marks = trainer.marks[2:]  # the first pair warms up
    for name, which in (("wall", 0), ("CPU", 1)):
        spent = [after[which] - before[which] for before, after in itertools.pairwise(marks)]
        plain, ours = spent[0::2], spent[1::2]
        pairs = [b / a - 1 for a, b in zip(plain, ours, strict=False)]
        middle, error = statistics.median(pairs), 1.25 * statistics.stdev(pairs) / math.sqrt(len(pairs))
        print(
            f"{name} time of a batch and its {options.reuse} steps, {len(pairs)} pairs: "
            f"GRPO {statistics.median(plain):.3f} s, coupled {statistics.median(ours):.3f} s; "
            f"paired median {middle:+.1%} (standard error {error:.1%})"
        )


# The plot


def plot(out: Path) -> None:
    """Plot mean and range over the seeds of the held-out puzzles solved, and of the rewards of training."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for kind, color in zip(CREDITS, ("#555555", *plt.get_cmap("tab10").colors), strict=False):
        runs = [read(path) for path in sorted(out.glob(f"{kind}-*.csv"))]
        if not runs:
            continue
        steps, solved = together(runs, "held_out")
        draw(axes[0], steps, solved, color, f"{kind} ({len(runs)} seeds)")
        steps, rewards = together(runs, "reward")
        draw(axes[1], steps, [running_best(curve) for curve in rewards], color, kind)
        last = [statistics.mean(curve[-(len(curve) + 2) // 3 :]) for curve in rewards]
        print(f"{kind:8} solved at the end: {spread([curve[-1] for curve in solved])}")
        print(f"{kind:8} reward of the last third of training: {spread(last)}")
    axes[0].set(xlabel="optimizer step", ylabel="share of the held-out puzzles solved", title="Held out, greedy")
    axes[1].set(xlabel="optimizer step", ylabel="reward", title="Training, exponential mean of the running best")
    axes[0].legend(frameon=False)
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(out / "countdown.svg", metadata={"Date": None})
    print(f"plot: {out / 'countdown.svg'}")


def draw(axis, steps: list[int], curves: list[list[float]], color: str, label: str) -> None:
    at_step = list(zip(*curves, strict=True))
    axis.plot(steps, [statistics.mean(values) for values in at_step], color=color, label=label)
    axis.fill_between(steps, list(map(min, at_step)), list(map(max, at_step)), color=color, alpha=0.12, linewidth=0)


def spread(values: list[float]) -> str:
    deviation = f" +- {statistics.stdev(values):.1%} between seeds" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1%}{deviation}: " + " ".join(f"{value:.1%}" for value in values)


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def together(runs: list[list[dict[str, str]]], name: str) -> tuple[list[int], list[list[float]]]:
    """The steps that all runs have, and each run's values there."""
    curves = [{int(row["step"]): float(row[name]) for row in run if row.get(name)} for run in runs]
    steps = sorted(set.intersection(*map(set, curves)))
    return steps, [[curve[step] for step in steps] for curve in curves]


def running_best(values: list[float], rate: float = 0.05) -> list[float]:
    """`ema += rate * (max(x, ema) - ema)`, the curve of arXiv 2510.13554v2, App. A.2."""
    ema, curve = values[0], []
    for value in values:
        ema += rate * (max(value, ema) - ema)
        curve.append(ema)
    return curve


if __name__ == "__main__":
    main()
