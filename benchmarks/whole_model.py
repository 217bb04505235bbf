"""A whole model with WAAD(10) and FAI(10, 100) captured, against the ways to get them without us, on the CPU.

`python -m benchmarks.whole_model`, part of `make bench`, lets SmolLM2-135M read 2048 tokens and generate 64, in rounds
in which all contenders take turns, measures the memory of each in a process of its own (memory.py), prints a table and
keeps it in results/model.json and model.md. As in report.py a ratio is the median over rounds of two times of the same
round. Eager attention keeps 5 GB of maps.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pytest_benchmark.plugin import pytest_benchmark_generate_machine_info
from pytest_benchmark.utils import get_commit_info
from torch import Tensor

import attnstats
from attnstats.study import models
from attnstats.transformers.selection import middle_third
from benchmarks import memory, summary
from benchmarks.conftest import pytest_benchmark_update_machine_info
from benchmarks.contenders import STATISTICS, read_off
from benchmarks.report import conditions
from benchmarks.summary import Series, in_turn, verdict

LENGTH, PROMPT, NEW = 2048, 512, 64
THREADS = 2
ROUNDS, EAGER_ROUNDS = 7, 3
LAYERS = 30  # of SmolLM2-135M
TOLERANCES = (2e-4, 1e-6)  # WAAD, FAI: hidden states differ in their last bits, and A of later layers with them


class Read(NamedTuple):
    """A contender's results: means over its layers and heads, (B, T), and the logits of the last token."""

    logits: Tensor | None = None
    waad: Tensor | None = None
    fai: Tensor | None = None


Contender = Callable[[Any, Tensor], Read]


def _logits(model: Any, ids: Tensor, **options: Any) -> Any:
    """The forward pass of all: no cache, and the output embedding of the last token alone."""
    return model(ids, use_cache=False, logits_to_keep=1, **options)


def sdpa(model: Any, ids: Tensor) -> Read:
    return Read(_logits(model, ids).logits)


def attached(model: Any, ids: Tensor) -> Read:
    attnstats.attach(model)
    try:
        return Read(_logits(model, ids).logits)
    finally:
        attnstats.detach(model)


def captured(layers: Any, stop: bool = False) -> Contender:
    def read(model: Any, ids: Tensor) -> Read:
        options = {"layers": layers, "reduce": ("layers", "heads"), "stop_after_last_layer": stop}
        with attnstats.capture(model, statistics=STATISTICS, **options) as run:
            output = run.forward(input_ids=ids, use_cache=False, logits_to_keep=1)
        return Read(None if stop else output.logits, *(run[s] for s in STATISTICS))

    return read


def output_attentions(model: Any, ids: Tensor) -> Read:
    """All maps at once, as transformers returns them."""
    model.set_attn_implementation("eager")
    try:
        output = _logits(model, ids, output_attentions=True)
        return Read(output.logits, *_mean([read_off(weights) for weights in output.attentions]))
    finally:
        model.set_attn_implementation("sdpa")


def hooks(model: Any, ids: Tensor, layers: tuple[int, ...] = tuple(range(LAYERS))) -> Read:
    """One map at a time: a hook reads it and frees it."""
    found: list[tuple[Tensor, Tensor]] = []
    model.set_attn_implementation("eager")
    attentions = [model.model.layers[layer].self_attn for layer in layers]
    handles = [
        a.register_forward_hook(lambda _module, _inputs, out: found.append(read_off(out[1]))) for a in attentions
    ]
    try:
        logits = _logits(model, ids).logits
    finally:
        for handle in handles:
            handle.remove()
        model.set_attn_implementation("sdpa")
    return Read(logits, *_mean(found))


def _mean(found: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, ...]:
    return tuple(torch.stack([x.mean(1) for x in series]).mean(0) for series in zip(*found, strict=True))


BASE, OURS, EAGER = "SDPA, nothing captured", "capture, all layers", "eager, output_attentions=True"
STOPPED = "capture, middle third, stop after it"
FORWARD: dict[str, Contender] = {
    BASE: sdpa,
    "attach, nothing captured": attached,
    OURS: captured("all"),
    "capture, middle third": captured("middle-third"),
    STOPPED: captured("middle-third", stop=True),
    EAGER: output_attentions,
    "eager, one map at a time": hooks,
}


def verify(found: Read, truth: Read) -> None:
    if found.logits is not None:
        torch.testing.assert_close(found.logits, truth.logits, rtol=0, atol=2e-3)
    for mine, theirs, tolerance in zip(found[1:], truth[1:], TOLERANCES, strict=True):
        if mine is not None:
            torch.testing.assert_close(mine, theirs, rtol=0, atol=tolerance)


# Generation


class Clock:
    """A stopping criterion that stops nothing: it notes when each token was made."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool)


def _decoding(model: Any, ids: Tensor, new: int) -> float:
    """Seconds from the first token, which the pass over the prompt makes, to the last."""
    clock = Clock()
    model.generate(ids, min_new_tokens=new, max_new_tokens=new, do_sample=False, stopping_criteria=[clock])
    return clock.times[-1] - clock.times[0]


def decode(model: Any, ids: Tensor, new: int) -> float:
    return _decoding(model, ids, new)


def decode_live(model: Any, ids: Tensor, new: int) -> float:
    with attnstats.capture(model, statistics=STATISTICS, reduce=("layers", "heads"), live=True):
        return _decoding(model, ids, new)


PLAIN, LIVE = "generate", "generate, live capture of the middle third"
DECODING = {PLAIN: decode, LIVE: decode_live}


# Measuring


def load() -> Any:
    return models.load(dtype="float32", device="cpu", notify=lambda line: None).model


def tokens(model: Any, length: int) -> Tensor:
    return torch.randint(100, model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))


def measure(rounds: int, length: int = LENGTH, prompt: int = PROMPT, new: int = NEW) -> list[Series]:
    """The times of all contenders, each round beginning with another one."""
    model = load()
    ids, begun = tokens(model, length), tokens(model, prompt)
    seconds: dict[str, list[float]] = {name: [] for name in (*FORWARD, *DECODING)}
    with torch.no_grad():
        all_layers, some = hooks(model, ids), hooks(model, ids, middle_third(LAYERS))
        for name, contender in FORWARD.items():
            verify(contender(model, ids), some if "middle third" in name else all_layers)
        for turn in range(rounds):
            names = [name for name in seconds if turn < EAGER_ROUNDS or not name.startswith("eager")]
            for name in in_turn(names, turn):
                if name in DECODING:
                    seconds[name].append(DECODING[name](model, begun, new) / (new - 1))
                    continue
                start = time.perf_counter()
                FORWARD[name](model, ids)
                seconds[name].append(time.perf_counter() - start)
            print(f"round {turn + 1} of {rounds}", file=sys.stderr)
    return [Series(name, None, times) for name, times in seconds.items()]


def weigh(name: str, length: int) -> float | None:
    """MiB that a contender adds to the loaded model; in a process of its own."""
    torch.set_num_threads(THREADS)
    model = load()
    ids = tokens(model, length)
    with torch.no_grad():
        return memory.added(lambda: FORWARD[name](model, ids))


# Reporting


def targets(found: dict[str, Series]) -> list[str]:
    base, ours, eager = found[BASE], found[OURS], found[EAGER]
    cost, gain = ours.over(base), eager.over(ours)
    return [
        f"all layers captured: {cost:.2f}x of the same forward without; target <= 1.10x {verdict(cost <= 1.10)}",
        f"{gain:.1f}x faster than eager with output_attentions=True; target >= 5x {verdict(gain >= 5)}",
    ]


def markdown(found: dict[str, Series], notes: list[str], where: dict[str, Any]) -> str:
    forward, decoding = [], []
    for name in FORWARD:
        series = found[name]
        shown = f"**{name}**" if name.startswith("capture") else name
        forward.append((shown, f"{series.median * 1e3:.0f}", f"{series.over(found[BASE]):.2f}", series.peak))
    for name in DECODING:
        series = found[name]
        decoding.append((name, f"{series.median * 1e3:.1f}", f"{series.over(found[PLAIN]):.2f}"))
    measured = summary.measured(
        "SmolLM2-135M (30 layers, 9 query and 3 key heads, D64), batch 1, fp32, logits of the last token; WAAD(10) + "
        "FAI(10, 100) reduced over layers and heads.",
        where,
        "Ratios: medians over rounds, each round's own. Peak: resident memory added to the loaded model.",
    )
    lines = summary.table(("forward, 2048 tokens", "ms", "x SDPA", "peak MiB"), forward)
    lines += ["", *summary.table((f"decoding {NEW} tokens after {PROMPT}", "ms per token", "x plain"), decoding)]
    return summary.markdown(lines, measured, notes)


def write(found: dict[str, Series], notes: list[str], where: dict[str, Any], folder: Path) -> None:
    summary.write(folder / "model.json", where, notes, [({}, series) for series in found.values()])
    (folder / "model.md").write_text(markdown(found, notes, where))


def here() -> dict[str, Any]:
    import transformers

    machine = pytest_benchmark_generate_machine_info()
    pytest_benchmark_update_machine_info(None, machine)
    today = datetime.datetime.now(datetime.timezone.utc).isoformat()
    found = conditions({"machine_info": machine, "commit_info": get_commit_info(), "datetime": today})
    return found | {"transformers": transformers.__version__}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results", help="folder to write")
    parser.add_argument("--weigh", choices=FORWARD, help="print the peak of this contender alone")
    options = parser.parse_args()
    if options.weigh:
        print(json.dumps(weigh(options.weigh, LENGTH)))
        return
    torch.set_num_threads(THREADS)
    peaks = {name: memory.alone("benchmarks.whole_model", "--weigh", name) for name in FORWARD}
    found = {s.contender: s._replace(peak_mib=peaks.get(s.contender)) for s in measure(options.rounds)}
    notes, where = targets(found), here()
    print(markdown(found, notes, where))
    write(found, notes, where, options.results)


if __name__ == "__main__":
    main()
