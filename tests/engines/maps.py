"""What a credit reads, out of eager maps of a model, row by row."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnstats import heads


class Row(NamedTuple):
    """A row without padding: its tokens (T,), and True for those of the response."""

    ids: Tensor
    counted: Tensor


class Expected(NamedTuple):
    """The classes of the heads; of each row WAAD, FAI and where that has a value, (T,) each, and log-probs (T - 1,)."""

    classes: heads.HeadClasses
    curves: list[tuple[Tensor, Tensor, Tensor]]
    logps: list[Tensor]


def expected(folder: Path | str, credit: Any, rows: list[Row]) -> Expected:
    """Out of the maps of the layers that a RhythmCredit with a list of layers and a finite horizon reads."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    maps, logps, total = [], [], torch.zeros(())
    for ids, counted in rows:
        with torch.no_grad():
            output = model(ids[None], output_attentions=True)
        logps.append(output.logits[0, :-1].log_softmax(-1).gather(-1, ids[1:, None])[:, 0])
        maps.append(torch.stack([output.attentions[layer][0] for layer in credit.layers]).double())  # (L, H, T, T)
        total = total + ((maps[-1] * _distance(ids).clamp(min=0)).sum(-1) * counted).sum(-1)
    classes = heads.classify(total / sum(int(counted.sum()) for _, counted in rows), credit.head_share, credit.layers)
    curves = []
    for (ids, counted), attention in zip(rows, maps, strict=True):
        distance = _distance(ids)
        local, global_ = attention[classes.local].mean(0), attention[classes.global_].mean(0)
        waad = (local * distance.clamp(0, credit.window)).sum(-1)
        seen = (distance >= credit.lo) & (distance <= credit.hi) & counted[:, None]
        fai = torch.where(seen.any(0), (global_ * seen).sum(0) / seen.sum(0).clamp(min=1), 0)
        curves.append((waad, fai, seen.any(0)))
    return Expected(classes, curves, logps)


def _distance(ids: Tensor) -> Tensor:
    place = torch.arange(len(ids))
    return (place[:, None] - place).double()


def assert_read(row: tuple[Tensor, Tensor, Tensor], waad: Tensor, fai: Tensor, valid: Tensor) -> None:
    """The curves of a row, without padding, are those of eager maps."""
    assert torch.equal(valid.bool(), row[2])
    torch.testing.assert_close(waad.double(), row[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(fai.double()[row[2]], row[1][row[2]], rtol=0, atol=1e-5)
