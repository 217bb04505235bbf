"""The numbers of `attnstats analyze` once more for --verify, from the definitions on the full maps of eager attention.

It shares only the model and the token ids with the code that it checks: the T x T maps come from
`output_attentions=True`, and every formula is written out on them. It takes O(T^2) memory for each head of the model,
which the package exists to avoid.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from attnstats.heads import RECEIVED
from attnstats.study.analysis import Analysis, Settings
from attnstats.study.corpus import Progress, task
from attnstats.study.models import LoadedModel

TOLERANCE = 1e-4


@contextmanager
def eager_attention(model: Any) -> Iterator[None]:
    """Inside the `with` the model computes its full attention maps."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def differences(
    loaded: LoadedModel, analyses: Sequence[Analysis], settings: Settings, progress: Progress
) -> dict[str, float]:
    """The largest absolute difference of each statistic between the analyses and eager attention.

    Statistics are per head and of the means over the analysis's classes. Differences of the entropy are multiplied by a
    temperature below 1. A NaN on either side counts as infinite.
    """
    largest: dict[str, float] = {}
    with task(progress, "Recomputing with eager attention", len(analyses)):
        for analysis in analyses:
            for name, (ours, eager) in _pairs(loaded, analysis, settings).items():
                difference = float((ours.double() - eager.double()).abs().nan_to_num(torch.inf).max())
                largest[name] = max(largest.get(name, 0.0), difference)
            progress.advance()
    return largest


def _pairs(loaded: LoadedModel, analysis: Analysis, settings: Settings) -> dict[str, tuple[Tensor, Tensor]]:
    """Each statistic by name, from the analysis and from eager attention."""
    with torch.no_grad(), eager_attention(loaded.model):
        output = loaded.model(
            input_ids=analysis.token_ids[None].to(loaded.device), output_attentions=True, use_cache=False
        )
    maps = torch.stack([output.attentions[layer][0].float().cpu() for layer in analysis.layers])  # (L, H, T, T)
    temperature = settings.temperature or 1.0
    log_p = (output.logits[0, :-1].float().cpu() / temperature).log_softmax(-1)
    unit = min(1.0, temperature)  # a temperature below 1 magnifies the rounding of the logits
    length = maps.shape[-1]
    position = torch.arange(length, dtype=torch.int64, device="cpu")
    ahead = position[:, None] - position[None]  # [t, s] = t - s
    horizon = (ahead >= settings.fai_lo) & analysis.response[:, None]
    if settings.fai_hi is not None:
        horizon &= ahead <= settings.fai_hi
    counts = horizon.sum(0)
    far = (ahead >= RECEIVED.lo) & analysis.response[:, None]
    waad = (maps * ahead.clamp(max=settings.window)).sum(-1)
    fai = (maps * horizon).sum(-2) / counts.clamp(min=1)
    distance = (maps * ahead).sum(-1)
    local, global_ = analysis.classes.local, analysis.classes.global_
    mean_waad = waad[local].mean(0)
    response = mean_waad[analysis.response]
    return {
        "waad": (analysis.waad, mean_waad),
        "waad per head": (analysis.head_waad, waad),
        "fai": (analysis.fai, fai[global_].mean(0)),
        "fai per head": (analysis.head_fai, fai),
        "received per head": (analysis.head_received, (maps * far).sum(-2) / far.sum(0).clamp(min=1)),
        "fai_valid": (analysis.fai_valid, counts > 0),
        "delta": (
            analysis.delta,
            torch.cat([(response[1:] - response[:-1]).abs(), torch.zeros(1, dtype=torch.float32, device="cpu")]),
        ),
        "mean_distance": (analysis.distance, distance[..., analysis.response].mean(-1)),
        "entropy": (analysis.entropy[1:] * unit, -(log_p.exp() * log_p).sum(-1) * unit),
    }
