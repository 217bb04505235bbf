"""Which families compile, attached and captured: `python -m tests.compile_families [--write] [family ...]`.

An hour or more on one core, so no part of the test suite, which has some families of each kind
(transformers/test_compile.py). With --write each verdict goes into compiled.json and docs/compiled.md as it is made;
without names, families that have one for the installed versions of torch and transformers are left out.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._dynamo.utils import counters

import attnstats
from attnstats import FAI, WAAD
from attnstats.transformers.capture import capture
from tests import families, verdicts

STATISTICS = (WAAD(4), FAI(2, 7))
LOGITS_TOLERANCE = 1e-4  # of float32 models with other summation orders, in units of the logits' standard deviation
STATISTICS_TOLERANCE = 1e-4
NEW_TOKENS = 4

YES = "yes"
ROOT = Path(__file__).resolve().parents[1]
TABLE = Path(__file__).with_name("compiled.json")
DOCUMENT = ROOT / "docs" / "compiled.md"


class Compiled(NamedTuple):
    """`forward`: one pass, captured, with Inductor. `generation`: with a static cache, attached. "yes", or why not."""

    forward: str
    generation: str


def judge(family: str) -> Compiled:
    model = families.build(family)
    dense = verdicts.read_table()[1][family].category == verdicts.DENSE
    forward = _verdict(lambda ours: compare_forward(family, model, dense, ours))
    return Compiled(forward, _verdict(lambda ours: compare_generation(model, dense, ours)))


def _verdict(compare: Callable[[bool], str]) -> str:
    """What `compare(True)`, our model, gives; where it raises and `compare(False)`, transformers' own, does too, so."""
    try:
        return _afresh(compare, True)
    except Exception as error:
        ours = _reason(error)
    try:
        _afresh(compare, False)
    except Exception as error:
        return f"not in transformers either: {_reason(error)}"
    return f"NO: {ours}"


def _afresh(compare: Callable[[bool], str], ours: bool) -> str:
    torch._dynamo.reset()
    counters.clear()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return compare(ours)


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:160]


def compare_forward(family: str, model: Any, dense: bool, ours: bool) -> str:
    """One graph for the batch without padding and the padded one: logits and statistics of the uncompiled model."""
    compiled = torch.compile(model, fullgraph=True)
    batches = [families.inputs(family, model, padded) for padded in (True, False)]
    if not ours:
        compiled(**batches[0])
        return YES
    with capture(model, statistics=STATISTICS, layers=_first_layers(model, batches[0]), allow_dense=dense) as run:
        for inputs in batches:
            expected = model(**inputs).logits
            of_eager = [run[s] for s in STATISTICS]
            actual = compiled(**inputs).logits
            _close("logits", actual, expected, LOGITS_TOLERANCE * max(1.0, float(expected.std())))
            for statistic, value in zip(STATISTICS, of_eager, strict=True):
                _close(str(statistic), run[statistic], value, STATISTICS_TOLERANCE)
    assert counters["stats"]["unique_graphs"] == 1, f"{counters['stats']['unique_graphs']} graphs"
    return YES


def _first_layers(model: Any, inputs: dict[str, Any]) -> Any:
    """All layers, or those with as many heads as the first, where not all have."""
    heads = {m.layer: m.weights.shape[1] for m in verdicts.eager_pass(model, inputs)[1] if m.kind == "self"}
    alike = [layer for layer in sorted(heads) if heads[layer] == heads[min(heads)]]
    return alike if len(alike) < len(heads) else "all"


def compare_generation(model: Any, dense: bool, ours: bool) -> str:
    """Greedy tokens and logits with a static cache, all steps in one graph, which only sliding windows compile anew."""
    from transformers import CompileConfig

    if not model.can_generate() or model.config.is_encoder_decoder:
        return "-"
    config = CompileConfig(fullgraph=True, dynamic=None, backend="aot_eager", mode="default")
    config._compile_all_devices = True  # type: ignore[assignment]
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "return_dict_in_generate": True}
    settings |= {"output_logits": True, "eos_token_id": None, "pad_token_id": 0}
    inputs = {"input_ids": families.tokens(), "attention_mask": families.padding("left")}
    expected = model.generate(**inputs, **settings)
    if ours:
        attnstats.attach(model, allow_dense=dense)
    try:
        actual = model.generate(**inputs, **settings, cache_implementation="static", compile_config=config)
    finally:
        attnstats.detach(model)
    graphs = counters["stats"]["unique_graphs"]
    if not graphs:
        return "transformers does not compile it"
    cache = actual.past_key_values if hasattr(actual, "past_key_values") else actual.cache
    assert any(cache.is_sliding) or graphs == 1, f"{graphs} graphs for {NEW_TOKENS - 1} steps"
    assert torch.equal(actual.sequences, expected.sequences), "other tokens"
    for x, y in zip(actual.logits, expected.logits, strict=True):
        _close("logits", x, y, LOGITS_TOLERANCE * max(1.0, float(y.std())))
    return YES


def _close(what: str, actual: Tensor, expected: Tensor, tolerance: float) -> None:
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, not {tuple(expected.shape)}"
    off = float((actual - expected).abs().max())
    assert off <= tolerance, f"{what}: off by {off:.1e}, allowed {tolerance:.1e}"


# The table


def versions() -> dict[str, str]:
    import transformers

    return {"torch": torch.__version__.partition("+")[0], "transformers": transformers.__version__}


def read_table() -> tuple[dict[str, str], dict[str, Compiled]]:
    """The versions that the table is of, and the verdicts."""
    stored = json.loads(TABLE.read_text())
    return stored["versions"], {family: Compiled(*entry) for family, entry in stored["families"].items()}


def document(of: dict[str, str], table: dict[str, Compiled]) -> str:
    """docs/compiled.md."""
    head = f"""# Compiled model families

Which of the [families](families.md) that `attnstats.capture` works on are one graph in
`torch.compile(fullgraph=True)`, with torch {of["torch"]} and transformers {of["transformers"]} on a CPU. Each is a
tiny random model with a layer of every kind in the family.

- forward: a captured model, compiled by Inductor, runs a padded batch and one without padding in the same graph.
  Logits are within {LOGITS_TOLERANCE:g} standard deviations, and WAAD and FAI of every head within
  {STATISTICS_TOLERANCE:g}, of those of the same model without a graph.
- generation: an attached model generates with a static cache, the steps in one graph (backend `aot_eager`), which
  only sliding windows may compile anew, and gives the tokens and logits of the model by itself.

"not in transformers either": the model by itself, with its SDPA, does not compile. Written by
`python -m tests.compile_families --write`; the test suite compiles a few families of different kinds.

## By verdict

"""
    lines = []
    for name in Compiled._fields:
        by_verdict: dict[str, list[str]] = {}
        for family, verdict in sorted(table.items()):
            by_verdict.setdefault(getattr(verdict, name).partition(":")[0], []).append(family)
        ordered = sorted(by_verdict.items(), key=lambda item: -len(item[1]))
        lines += [f"- {name}, {verdict}: **{len(names)}**: {', '.join(names)}" for verdict, names in ordered]
    rows = "\n".join(f"| {f} | {table[f].forward} | {table[f].generation} |" for f in sorted(table))
    head_of_rows = "\n\n## By family\n\n| family | forward | generation |\n| -- | -- | -- |\n"
    return head + "\n".join(lines) + head_of_rows + rows + "\n"


def write(of: dict[str, str], table: dict[str, Compiled]) -> None:
    entries = {family: list(table[family]) for family in sorted(table)}
    TABLE.write_text(json.dumps({"versions": of, "families": entries}, indent=1) + "\n")
    DOCUMENT.write_text(document(of, table))


def main() -> int:
    import transformers

    transformers.logging.set_verbosity_error()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*")
    parser.add_argument("--write", action="store_true", help="into compiled.json and docs/compiled.md")
    args = parser.parse_args()
    of, table = read_table() if TABLE.exists() else ({}, {})
    if of != versions():
        table = {}
    works = [f for f, v in verdicts.read_table()[1].items() if v.category.startswith("works")]
    for family in args.families or [f for f in works if f not in table]:
        table[family] = judge(family)
        print(f"{family}: {', '.join(table[family])}", flush=True)
        if args.write:
            write(versions(), table)
    return int(any(verdict.startswith("NO") for compiled in table.values() for verdict in compiled))


if __name__ == "__main__":
    sys.exit(main())
