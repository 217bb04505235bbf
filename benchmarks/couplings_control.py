"""Couplings of an untrained model on the text of the trained one: a control for couplings that don't mean reasoning.

`python -m benchmarks.couplings_control out/couplings` takes the responses of a finished `attnstats couplings`, draws
the weights of the same architecture anew, and measures and tests the same text with it. Couplings that remain come
from the architecture, the text and the tests themselves. Prints Table 2 and keeps it in
results/couplings/untrained.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from rich.console import Console

from attnstats.chance import Chance
from attnstats.cli import tables
from attnstats.cli.couplings import CORPUS
from attnstats.identity import identity
from attnstats.study import models
from attnstats.study.couplings import examine, measure
from attnstats.study.outputs import versions
from attnstats.study.store import Store, begin

RESULT = Path(__file__).parent / "results" / "couplings" / "untrained.json"


def untrained(loaded: models.LoadedModel, seed: int) -> models.LoadedModel:
    """The same architecture with weights as before the first step."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(loaded.model.config)
    return models.LoadedModel(f"{loaded.name}, untrained", model.eval(), loaded.tokenizer)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="--out of a finished run")
    parser.add_argument("--model", help="its --model")
    parser.add_argument("--temperature", type=float, default=0.7, help="its --temperature")
    parser.add_argument("--permutations", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of the tests")
    options = parser.parse_args()
    model = untrained(models.load(options.model), options.seed)
    texts = Store(options.folder / CORPUS)
    with tempfile.TemporaryDirectory() as folder:
        store = begin(Path(folder), {}, resume=False)
        for index in texts.indices():
            store.write(index, *measure(model, *texts.response(index), options.temperature))
            print(f"{index + 1} of {len(texts.indices())}", file=sys.stderr)
        numbers = examine(
            store,
            identity(model.model),
            Chance(options.permutations, resamples=options.permutations, seed=options.seed),
        )
    record = {"model": model.name, "seed": options.seed, "versions": versions(), **tables.as_json(numbers, {})}
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="ascii")
    console = Console(width=132, highlight=False)
    for part in tables.render(numbers, {}):
        console.print(part)
    return 0


if __name__ == "__main__":
    sys.exit(main())
