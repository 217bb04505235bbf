"""The numbers of `attnstats analyze` once more for --verify, from the definitions on the full maps of eager attention.

It shares only the model and the token ids with the code that it checks: the T x T maps come from
`output_attentions=True`, once in float64, which is what is right, and once in the model's float32: a number may err
twice as much as eager attention does. Every formula is written out on the maps. It takes O(T^2) memory for each head of
the model, which the package exists to avoid.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from attnstats.heads import RECEIVED
from attnstats.study.analysis import Analysis, Settings
from attnstats.study.corpus import Progress, task
from attnstats.study.models import LoadedModel

FLOOR = 1e-5  # of the error that passes, where eager attention happens to make none


class Error(NamedTuple):
    """The largest absolute errors of a statistic against float64."""

    ours: float
    eager: float

    @property
    def limit(self) -> float:
        """The largest error of ours that passes."""
        return 2 * self.eager + FLOOR

    @property
    def passes(self) -> bool:
        return self.ours <= self.limit


@contextmanager
def eager_attention(model: Any) -> Iterator[None]:
    """Inside the `with` the model computes its full attention maps."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


class _Float64(TorchFunctionMode):
    """Inside, whoever asks for float32 gets float64: models do in their norms, their softmax and their rotations."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is Tensor.float:
            function = Tensor.double

        def wider(x: Any) -> Any:
            return torch.float64 if x is torch.float32 else x

        return function(*map(wider, args), **{name: wider(x) for name, x in (kwargs or {}).items()})


@contextmanager
def float64(model: Any) -> Iterator[None]:
    """Inside the `with` the model computes in float64; afterwards it has its own weights again."""
    before = [(x, x.data) for x in (*model.parameters(), *model.buffers()) if x.is_floating_point()]
    try:
        for x, data in before:
            x.data = data.double()
        with _Float64():
            yield
    finally:
        for x, data in before:
            x.data = data


def errors(
    loaded: LoadedModel, analyses: Sequence[Analysis], settings: Settings, progress: Progress
) -> dict[str, Error]:
    """The largest errors of each statistic over the analyses, ours and those of eager attention.

    Statistics are per head and of the means over the analysis's classes. Errors of the entropy are multiplied by a
    temperature below 1. A NaN on either side counts as infinite.
    """
    largest: dict[str, Error] = {}
    with task(progress, "Recomputing with eager attention", len(analyses)):
        for analysis in analyses:
            ours = _of_analysis(analysis)
            with float64(loaded.model):
                exact = _of_maps(loaded, analysis, settings)
            eager = _of_maps(loaded, analysis, settings)
            unit = min(1.0, settings.temperature or 1.0)  # one below 1 magnifies the rounding of the logits
            for name, expected in exact.items():
                scale = unit if name == "entropy" else 1.0
                both = [scale * _difference(x, expected) for x in (ours[name], eager[name])]
                before = largest.get(name, Error(0.0, 0.0))
                largest[name] = Error(*map(max, before, both))
            progress.advance()
    return largest


def _difference(x: Tensor, y: Tensor) -> float:
    return float((x.double() - y.double()).abs().nan_to_num(torch.inf).max())


def _of_analysis(analysis: Analysis) -> dict[str, Tensor]:
    return {
        "waad": analysis.waad,
        "waad per head": analysis.head_waad,
        "fai": analysis.fai,
        "fai per head": analysis.head_fai,
        "received per head": analysis.head_received,
        "fai_valid": analysis.fai_valid,
        "delta": analysis.delta,
        "mean_distance": analysis.distance,
        "entropy": analysis.entropy[1:],
    }


def _of_maps(loaded: LoadedModel, analysis: Analysis, settings: Settings) -> dict[str, Tensor]:
    """The same from the maps of eager attention, in the model's dtype."""
    with torch.no_grad(), eager_attention(loaded.model):
        output = loaded.model(
            input_ids=analysis.token_ids[None].to(loaded.device), output_attentions=True, use_cache=False
        )
    maps = torch.stack([output.attentions[layer][0].cpu() for layer in analysis.layers])  # (L, H, T, T)
    temperature = settings.temperature or 1.0
    log_p = (output.logits[0, :-1].cpu() / temperature).log_softmax(-1)
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
        "waad": mean_waad,
        "waad per head": waad,
        "fai": fai[global_].mean(0),
        "fai per head": fai,
        "received per head": (maps * far).sum(-2) / far.sum(0).clamp(min=1),
        "fai_valid": counts > 0,
        "delta": torch.cat([(response[1:] - response[:-1]).abs(), response.new_zeros(1)]),
        "mean_distance": distance[..., analysis.response].mean(-1),
        "entropy": -(log_p.exp() * log_p).sum(-1),
    }
