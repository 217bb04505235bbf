"""A verdict on `capture` for a family's tiny model, judged against the family's own eager attention.

`judge` gives one of four verdicts, or raises AssertionError where attnstats gave numbers that are wrong and no
error: that is no category. `python -m tests.verdicts` judges every family and prints what changed against
families.json; with --write it writes that file and docs/families.md.
"""

from __future__ import annotations

import json
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import attnstats
from attnstats import FAI, WAAD, Entropy, MeanDistance, Received
from attnstats.transformers.sites import AttentionKind
from tests import families
from tests.tiny import LOGITS_TOLERANCE, WEIGHT_TOLERANCE, by_definition

WORKS, UNPADDED = "works", "works without padding"
DENSE, REFUSED = "works with allow_dense=True", "not attachable"

CROSS = re.compile("encoder_attn|EncDecAttention|cross", re.IGNORECASE)
LENGTH = families.LENGTH
LARGEST_FACTOR = {WAAD(4): 4, FAI(2, 7): 1, MeanDistance(): LENGTH, Received(): LENGTH, Entropy(): LENGTH}


class Verdict(NamedTuple):
    category: str
    why: str = ""


# The reason that a table gives for an error of attnstats, by words of its message.
REASONS = {
    "does not call its attention through": "attention of its own that transformers' AttentionInterface doesn't reach",
    "no such attention that can be replaced": "no softmax attention",
    "computes with its attention mask": "computes with its attention mask",
    "attends twice in one forward pass": "layers attend several times in one pass, to different things",
    "position bias": "position biases, added to the scores",
    "that was passed as a tensor": "masks of its own, made as tensors",
    "passes indices": "sparse attention to the keys that an indexer chose",
    "passes block_indices": "sparse attention to the blocks that an indexer chose",
    "passes sinks": "a sink for every query",
    "but its mask was made for": "keys that its mask doesn't know: compressed ones",
    "depend on what stands at the padding": "real tokens of its own eager pass depend on what stands at the padding",
}


class Map(NamedTuple):
    """One call of attention in an eager pass: (B, H, Tq, Tk) weights, and where they are from."""

    name: str
    kind: AttentionKind
    layer: int
    weights: Tensor


class Wrong(AssertionError):
    """attnstats gave other numbers than eager attention, and no error."""


class Changed(UserWarning):
    """A verdict differs from the table's, with another version of transformers."""


def judge(family: str) -> Verdict:
    """Raises Wrong, or whatever it was where an exception isn't one that attnstats raises on purpose."""
    model = families.build(family)
    unpadded, padded = (families.inputs(family, model, padded) for padded in (False, True))
    first = ""
    for allow_dense, category in ((False, WORKS), (True, DENSE)):
        complaint = complaint_of(family, model, unpadded, allow_dense)
        if not complaint:
            try:
                complaint = complaint_of(family, model, padded, allow_dense)
            except Wrong:
                if not padding_matters(model, padded):
                    raise
                complaint = "its own eager logits of real tokens depend on what stands at the padding"
            if complaint:
                return Verdict(UNPADDED, _reason(complaint))
            return Verdict(category, _reason(first) if allow_dense else "")
        first = first or complaint
    return Verdict(REFUSED, _reason(first))


def _reason(message: str) -> str:
    return next((reason for words, reason in REASONS.items() if words in message), message)


def complaint_of(family: str, model: Any, inputs: dict[str, Any], allow_dense: bool) -> str:
    """The error with which attnstats refuses this pass; empty where it doesn't and all numbers are right."""
    expected, maps = eager_pass(model, inputs)
    real = _real(inputs)
    groups: dict[tuple[AttentionKind, int], set[int]] = {}
    for m in maps:
        groups.setdefault((m.kind, m.weights.shape[1]), set()).add(m.layer)
    try:
        kinds: list[AttentionKind] = sorted({kind for kind, _ in groups}) or ["self"]
        for kind in kinds:
            with torch.no_grad(), _capture(model, kind, "all", allow_dense) as run:
                _compare_logits(family, model(**inputs).logits, expected, real["self"][0])
            missing = {m.layer for m in maps if m.kind == kind} - set(run.layers)
            if missing:
                raise Wrong(f"{family}: eager has {kind} maps of layers {sorted(missing)}, which did not report")
            if maps and set(run.layers) - {m.layer for m in maps if m.kind == kind}:
                raise Wrong(f"{family}: {kind} layers {run.layers} reported, eager has {[m.layer for m in maps]}")
            # One tensor holds layers of equally many heads.
            alike = [layers for (of, _), layers in groups.items() if of == kind]
            for layers in alike:
                if len(alike) > 1:
                    with torch.no_grad(), _capture(model, kind, sorted(layers), allow_dense) as run:
                        model(**inputs)
                here = [m for m in maps if m.kind == kind and m.layer in layers]
                _compare_statistics(family, run, here, *real[kind])
    except Wrong:
        raise
    except Exception as error:
        raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        if Path(attnstats.__file__).parent not in raised_in.parents:
            raise
        return str(error)
    assert maps, f"{family}: its eager attention gave no maps to compare with"
    return ""


def _capture(model: Any, kind: AttentionKind, layers: Any, allow_dense: bool) -> Any:
    statistics = [s for s in LARGEST_FACTOR if kind != "cross" or s in (Received(), Entropy())]
    return attnstats.capture(model, statistics=statistics, layers=layers, attention=kind, allow_dense=allow_dense)


def _real(inputs: dict[str, Any]) -> dict[AttentionKind, tuple[Tensor, Tensor]]:
    """(B, T) of the queries and of the keys that aren't padding, by kind of attention; one True: all are."""
    everything = torch.ones(1, 1, dtype=torch.bool)
    source = inputs.get("attention_mask", everything).bool()
    target = inputs.get("decoder_attention_mask", source).bool()
    return {"self": (target, target), "encoder": (source, source), "cross": (target, source)}


def _compare_logits(family: str, ours: Tensor, expected: Tensor, real: Tensor) -> None:
    scale = max(1.0, float(expected.std()))
    at = real.repeat_interleave(len(ours) // len(real), 0) if real.shape[1:] == ours.shape[1:2] else ...
    off = float((ours - expected)[at].abs().max())
    if not off <= LOGITS_TOLERANCE * scale:
        raise Wrong(f"{family}: logits are off by {off:.1e}, allowed {LOGITS_TOLERANCE * scale:.1e}")


def _compare_statistics(family: str, run: Any, maps: list[Map], queries: Tensor, keys: Tensor) -> None:
    for m in maps:
        for statistic in run.statistics:
            right = by_definition(statistic, m.weights, queries, keys)
            value = run[statistic][run.layers.index(m.layer)]
            if value.shape != right.shape:
                raise Wrong(f"{family}, {m.name}, {statistic}: shape {tuple(value.shape)}, not {tuple(right.shape)}")
            if m.kind == "cross":  # whose padded rows hold placeholders
                value = value * run.valid[statistic][:, None]
            off, allowed = float((value.double() - right).abs().max()), WEIGHT_TOLERANCE * LARGEST_FACTOR[statistic]
            if not off <= allowed:
                raise Wrong(f"{family}, {m.name}, {statistic}: off by {off:.1e}, allowed {allowed:.1e}")


def padding_matters(model: Any, inputs: dict[str, Any]) -> bool:
    """True if eager logits of real tokens change with the token that stands at padded positions."""
    of_decoder = "decoder_" if "decoder_input_ids" in inputs else ""
    ids, real = inputs[of_decoder + "input_ids"], inputs[of_decoder + "attention_mask"].bool()
    changed = inputs | {of_decoder + "input_ids": torch.where(real, ids, ids - 1)}
    one, other = (eager_pass(model, given)[0] for given in (inputs, changed))
    return bool((one - other)[real].abs().max() > LOGITS_TOLERANCE)


def eager_pass(model: Any, inputs: dict[str, Any]) -> tuple[Tensor, list[Map]]:
    """Logits and attention maps of the model's own eager attention: every map that it returns, and of which module."""
    maps: dict[int, Map] = {}

    def look(name: str, module: Any, output: Any) -> None:
        for tensor in output if isinstance(output, (tuple, list)) else ():
            if id(tensor) not in maps and _is_map(tensor):
                maps[id(tensor)] = Map(name, _kind(model, name), _layer(name, module), tensor)

    handles = [
        module.register_forward_hook(lambda module, _, output, name=name: look(name, module, output))
        for name, module in model.named_modules()
    ]
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values()
    before = [(config, config._attn_implementation) for config in configs]
    model.set_attn_implementation("eager")
    with torch.no_grad(), _sinks_in_maps(sys.modules[type(model).__module__]):
        output = model(**inputs, output_attentions=True)
    for handle in handles:
        handle.remove()
    for config, implementation in before:
        config._attn_implementation_internal = implementation
    lists = ("attentions", "encoder_attentions", "decoder_attentions", "cross_attentions")
    listed = [tensor for name in lists for tensor in output.get(name) or () if _is_map(tensor)]
    unseen = Map("a module that hands it on changed", "self", -1, torch.empty(0, 0, 0, 0))
    return output.logits, [maps.get(id(tensor), unseen) for tensor in listed]


@contextmanager
def _sinks_in_maps(module: Any) -> Iterator[None]:
    """Granite's eager attention takes the sink's share off the output, and returns maps that don't know of it."""
    eager = getattr(module, "eager_attention_forward", None)
    if "granite" not in module.__name__ or eager is None or "sinks" not in eager.__code__.co_names:
        yield
        return

    def with_share(layer, query, key, value, mask, scaling, **others):
        output, weights = eager(layer, query, key, value, mask, scaling, **others)
        groups = query.shape[1] // key.shape[1]
        scores = query @ key.repeat_interleave(groups, 1).transpose(2, 3) * scaling + mask
        share = torch.sigmoid(scores.logsumexp(-1) - layer.sinks[:, None])
        return output, weights * share[..., None]

    module.eager_attention_forward = with_share
    try:
        yield
    finally:
        module.eager_attention_forward = eager


def _is_map(tensor: Any) -> bool:
    """True for a tensor that can be softmaxed attention: not negative, rows that sum to 1, or to less beside a sink."""
    if not isinstance(tensor, Tensor) or tensor.dim() != 4 or tensor.shape[0] != 2 or not tensor.is_floating_point():
        return False
    return bool((tensor >= 0).all()) and bool((tensor.sum(-1) <= 1 + 1e-4).all())


def _kind(model: Any, name: str) -> AttentionKind:
    if CROSS.search(name):
        return "cross"
    return "encoder" if model.config.is_encoder_decoder and ".encoder." in f".{name}" else "self"


def _layer(name: str, module: Any) -> int:
    layer = getattr(module, "layer_idx", None)
    if isinstance(layer, int) and layer >= 0:
        return layer
    return next(int(part) for part in name.split(".") if part.isdigit())


# The table


ROOT = Path(__file__).resolve().parents[1]
TABLE = Path(__file__).with_name("families.json")
DOCUMENT = ROOT / "docs" / "families.md"
NOT_BUILT = "not judged"
ORDER = (WORKS, DENSE, UNPADDED, REFUSED, NOT_BUILT)


def judged(family: str) -> Verdict:
    if family in families.NOT_BUILT:
        return Verdict(NOT_BUILT, families.NOT_BUILT[family])
    return judge(family)


def read_table() -> tuple[str, dict[str, Verdict]]:
    """The version of transformers that the table is of, and the verdicts."""
    stored = json.loads(TABLE.read_text())
    return stored["transformers"], {family: Verdict(*entry) for family, entry in stored["families"].items()}


def summary(version: str, table: dict[str, Verdict]) -> str:
    """The families by verdict and reason, as a table."""
    lines = ["| | families of transformers " + version + " |", "| -- | -- |"]
    for category in ORDER:
        reasons: dict[str, list[str]] = {}
        for family, verdict in sorted(table.items()):
            if verdict.category == category:
                reasons.setdefault(verdict.why, []).append(family)
        for why, names in sorted(reasons.items(), key=lambda item: (-len(item[1]), item)):
            lines.append(f"| {category}{why and ': ' + why} | **{len(names)}**: {', '.join(names)} |")
    return "\n".join(lines)


def document(version: str, table: dict[str, Verdict]) -> str:
    """docs/families.md."""
    head = f"""# Model families

The models of transformers {version} on which `attnstats.capture` works: every family that AutoModelForCausalLM knows,
and encoders and encoder-decoders besides. Each was tested with a tiny random model that has one layer of every kind in
the family, on a batch of two rows of which one is padded (encoders on the right, the others on the left), and on one
without padding.

"works" means two things in float32. Logits are within {LOGITS_TOLERANCE:g} of the model's own eager attention. And
WAAD, FAI, MeanDistance, Received and Entropy of every head of every layer are within {WEIGHT_TOLERANCE:g} per unit of
mass of their definition on the maps of `output_attentions=True`; of encoder-decoders for the encoder, the decoder and
cross-attention. Everything else is an error that says why.

Written by `python -m tests.verdicts --write`; tests/transformers/test_families.py fails when a verdict changes.

## By verdict

{summary(version, table)}

## By family

| family | class | verdict | why |
| -- | -- | -- | -- |
"""
    rows = [f"| {f} | {families.class_name(f)} | {table[f].category} | {table[f].why} |" for f in sorted(table)]
    return head + "\n".join(rows) + "\n"


def write(version: str, table: dict[str, Verdict]) -> None:
    entries = {family: list(table[family]) for family in sorted(table)}
    TABLE.write_text(json.dumps({"transformers": version, "families": entries}, indent=1) + "\n")
    DOCUMENT.write_text(document(version, table))


def main() -> int:
    import transformers

    transformers.logging.set_verbosity_error()
    stored = read_table()[1] if TABLE.exists() else {}
    table, wrong = {}, 0
    for family in [*families.causal_families(), *families.OTHERS]:
        try:
            table[family] = judged(family)
        except Exception as error:
            print(f"WRONG {family}: {error!r}")
            wrong += 1
            continue
        if family not in stored:
            print(f"unlisted {family}: {': '.join(table[family])}")
        elif stored[family] != table[family]:
            print(f"changed {family}: {': '.join(table[family])}; was {': '.join(stored[family])}")
    for family in stored.keys() - table.keys():
        print(f"missing {family}")
    if "--write" in sys.argv and not wrong:
        write(transformers.__version__, table)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
