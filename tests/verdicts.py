"""Whether `capture` works on a family's tiny model, judged against the family's own eager attention.

`judge` gives one of three verdicts, or raises AssertionError where attnstats gave numbers that are wrong and no
error: that is no category. `python -m tests.verdicts` judges every family and prints what changed against
families.json; with --write it writes that file, docs/families.md and the table in README.md.
"""

from __future__ import annotations

import dataclasses
import traceback
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import attnstats
from attnstats import FAI, WAAD, Entropy, MeanDistance, Received, Statistic
from tests import families

WORKS, UNPADDED, REFUSED = "works", "works without padding", "not attachable"

LOGITS_TOLERANCE = 2e-5  # of logits of order 1
# What two float32 models with other summation orders differ by in one weight of A after a few layers, times the
# largest factor that the statistic gives to a unit of mass.
WEIGHT_TOLERANCE = 5e-6
LENGTH = families.LENGTH
LARGEST_FACTOR = {WAAD(4): 4, FAI(2, 7): 1, MeanDistance(): LENGTH, Received(): LENGTH, Entropy(): LENGTH}


class Verdict(NamedTuple):
    category: str
    why: str = ""


class Map(NamedTuple):
    """One call of attention in an eager pass: (B, H, Tq, Tk) weights, and the module that returned them."""

    name: str
    layer: int
    weights: Tensor


def judge(family: str) -> Verdict:
    """Raises AssertionError where a number is wrong, or an exception isn't one that attnstats raises on purpose."""
    model = families.build(family)
    sides = ("right", None) if family in families.RIGHT_PADDED else ("left", None)
    complaints = {side: _complaint(family, model, families.inputs(family, model, side)) for side in sides}
    if complaints[None]:
        return Verdict(REFUSED, complaints[None])
    return Verdict(UNPADDED, complaints[sides[0]]) if complaints[sides[0]] else Verdict(WORKS)


def _complaint(family: str, model: Any, inputs: dict[str, Any]) -> str:
    """Why attnstats refuses this pass; empty where it doesn't and everything is right."""
    expected, maps = eager_pass(model, inputs)
    statistics = list(LARGEST_FACTOR)
    try:
        with torch.no_grad(), attnstats.capture(model, statistics=statistics, layers="all") as run:
            output = model(**inputs)
        recorded = {layer: {s: run[s][i] for s in statistics} for i, layer in enumerate(run.layers)}
    except Exception as error:
        raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
        assert Path(attnstats.__file__).parent in Path(raised_in).parents, f"{family}: {error!r} from {raised_in}"
        return str(error)
    real = inputs.get("attention_mask", torch.ones(2, LENGTH)).bool()
    ours = output.logits
    scale = max(1.0, float(expected.std()))
    rows = real.repeat_interleave(len(ours) // len(real), 0) if ours.shape[1] == LENGTH else ...
    off = (ours - expected)[rows].abs().max()
    assert off <= LOGITS_TOLERANCE * scale, f"{family}: logits are off by {off:.1e}"
    missing = sorted({m.layer for m in maps} - set(recorded))
    assert not missing, f"{family}: eager has maps of layers {missing}, which did not report"
    for m in maps:
        for statistic, value in recorded[m.layer].items():
            right = by_definition(statistic, m.weights, real, real)
            assert value.shape == right.shape, f"{family}, {m.name}, {statistic}: {value.shape}, not {right.shape}"
            off = (value.double() - right).abs().max()
            tolerance = WEIGHT_TOLERANCE * LARGEST_FACTOR[statistic]
            assert off <= tolerance, f"{family}, {m.name}, {statistic}: off by {off:.1e}, allowed {tolerance:.1e}"
    return ""


def eager_pass(model: Any, inputs: dict[str, Any]) -> tuple[Tensor, list[Map]]:
    """Logits and attention maps of the model's own eager attention; every map that it returns, and whose."""
    maps: dict[int, Map] = {}

    def look(name: str, module: Any, output: Any) -> None:
        for tensor in output if isinstance(output, tuple) else ():
            if isinstance(tensor, Tensor) and id(tensor) not in maps and _is_map(tensor):
                maps[id(tensor)] = Map(name, _layer(name, module), tensor)

    handles = [
        module.register_forward_hook(lambda module, _, output, name=name: look(name, module, output))
        for name, module in model.named_modules()
    ]
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values()
    before = [(config, config._attn_implementation) for config in configs]
    model.set_attn_implementation("eager")
    with torch.no_grad():
        output = model(**inputs, output_attentions=True)
    for handle in handles:
        handle.remove()
    for config, implementation in before:
        config._attn_implementation_internal = implementation
    return output.logits, list(maps.values())


def _is_map(tensor: Tensor) -> bool:
    """Whether this can be softmaxed attention: not negative, rows that sum to 1, or less where a sink takes the rest."""
    if tensor.dim() != 4 or tensor.shape[0] != 2 or not tensor.is_floating_point():
        return False
    return bool((tensor >= 0).all()) and bool((tensor.sum(-1) <= 1 + 1e-4).all())


def _layer(name: str, module: Any) -> int:
    layer = getattr(module, "layer_idx", None)
    if isinstance(layer, int) and layer >= 0:
        return layer
    return next(int(part) for part in name.split(".") if part.isdigit())


def by_definition(statistic: Statistic, weights: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
    """A statistic off (B, H, Tq, Tk) maps, in float64, by its formula and nothing of attnstats; padding left out."""
    weights = weights.double() * queries[:, None, :, None] * keys[:, None, None, :]
    distance = torch.arange(weights.shape[2])[:, None] - torch.arange(weights.shape[3])
    if isinstance(statistic, WAAD):
        return (weights * distance.abs().clamp(max=statistic.window)).sum(-1)
    if isinstance(statistic, MeanDistance):
        return (weights * distance.abs()).sum(-1)
    if isinstance(statistic, Entropy):
        return -torch.special.xlogy(weights, weights).sum(-1)
    if isinstance(statistic, Received):
        return weights.sum(2)
    assert isinstance(statistic, FAI)
    inside = (distance >= statistic.lo) & (distance <= statistic.hi)
    count = (inside[None] & queries[:, :, None]).sum(1)
    return (weights * inside).sum(2) / count.clamp(min=1)[:, None]
