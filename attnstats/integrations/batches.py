"""Token credit on a trainer's batch of named tensors, in the two layouts that trainers have.

A batch is anything with names, a `dict` or a `TensorDict`; no framework is imported. The trainer's own worker writes
the curves into the batch.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from attnstats import credit
from attnstats.integrations.settings import WITH_ENTROPY, RhythmCredit, Signals, logged
from attnstats.tensors import check_plain


class Batch(Protocol):
    """Tensors by name. A TensorDict has no `in`, so names are looked up in `keys`."""

    def keys(self) -> Iterable[str]: ...
    def __getitem__(self, name: str, /) -> Tensor: ...
    def __setitem__(self, name: str, value: Tensor, /) -> None: ...


def generator_of(device: torch.device | str, *drawn_from: int) -> torch.Generator:
    """For kind="random": independent of the sampling of responses, and the same for the same numbers."""
    seed = np.random.SeedSequence(drawn_from).generate_state(1, np.uint64).item()
    return torch.Generator(device).manual_seed(seed)


def signals_of(batch: Batch, settings: RhythmCredit) -> Signals:
    """The curves that a credit needs, from the batch under the names of `Signals`.

    Raises:
        ValueError: the batch has no advantages, no response mask or no such curve. TypeError: one of them is nested.
    """
    names = list(settings.statistics)
    if "fai" in names:
        names.append("fai_valid")
    if settings.kind in WITH_ENTROPY:
        names.append("entropy")
    if missing := {"advantages", "response_mask"} - set(batch.keys()):
        raise ValueError(f"batch has no {', '.join(sorted(missing))}; call this after the advantages are computed")
    if missing := set(names) - set(batch.keys()):
        raise ValueError(
            f"batch has no {', '.join(sorted(missing))}, which kind={settings.kind!r} looks at; "
            "the worker that computes old log-probabilities has to write it (docs/trainers.md)"
        )
    check_plain(**{name: batch[name] for name in ("advantages", "response_mask", *names)})
    return Signals(**{name: batch[name] for name in names})


def scale_advantages(
    batch: Batch, settings: RhythmCredit, signals: Signals, mask: Tensor, generator: torch.Generator | None
) -> dict[str, float]:
    """Scale `batch["advantages"]`, write the weights to `batch["gamma"]`, return means over the tokens of the mask.

    Args:
        signals: the curves of the credit, in the shape of the advantages.
        mask: bool, the response tokens, in the shape of the advantages.
        generator: for kind="random".
    """
    advantages = batch["advantages"]
    if advantages.shape != mask.shape:
        raise ValueError(
            f"advantages must have the shape {tuple(mask.shape)} of the response mask, got {tuple(advantages.shape)}"
        )
    gamma = settings.gamma(signals, mask, generator).to(advantages.dtype)
    batch["advantages"] = credit.shape_advantages(advantages, gamma, settings.sign)
    batch["gamma"] = gamma
    values = logged(signals, gamma, mask)
    return {
        f"rhythm/{name}": of_tokens[counted].double().mean().item() for name, (of_tokens, counted) in values.items()
    }


def scale_shifted_advantages(
    batch: Batch, settings: RhythmCredit, generator: torch.Generator | None
) -> dict[str, float]:
    """`scale_advantages` for whole rows of T tokens, where entry j of what comes from logits belongs to token j + 1.

    Args:
        batch: "advantages" (B, T - 1); "response_mask" (B, T), 0 and 1; and those of "waad", "fai", "fai_valid" (B, T)
            and "entropy" (B, T - 1) that the credit needs. "gamma" gets the shape of the advantages.
        generator: for kind="random".

    Raises:
        ValueError, TypeError: a field is missing or has a wrong shape or dtype.
    """
    signals, mask = signals_of(batch, settings), batch["response_mask"]
    cut = {}
    for name, curve in zip(signals._fields, signals, strict=True):
        if curve is None:
            continue
        length = mask.shape[1] - (name == "entropy")
        if curve.shape != (len(mask), length):
            raise ValueError(
                f"{name} must be (B, {length}) beside response_mask {tuple(mask.shape)}, got {tuple(curve.shape)}"
            )
        cut[name] = curve if name == "entropy" else curve[:, 1:]
    return scale_advantages(batch, settings, signals._replace(**cut), mask[:, 1:].bool(), generator)
