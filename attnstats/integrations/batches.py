"""Token credit on a trainer's batch of named tensors, shared by verl.py and roll.py.

A batch is anything with names, a `dict` or a `TensorDict`; no framework is imported. The two modules say which tensors
stand for the same tokens; the trainer's own worker writes the curves into the batch.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

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
