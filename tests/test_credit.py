"""Token credit against its token-by-token definition, on 10,000 random cases, and the cases that have a name."""

import random
from typing import NamedTuple

import pytest
import torch

from attnstats import credit
from tests import plain_credit as plain

CASES = 10_000
BATCH = 250
WIDTH = 24


# What each credit reads of a batch, and which of the drawn settings it has.
SIGNALS = {
    "local_chunk": ("waad",),
    "global_anchor": ("fai", "valid"),
    "coupled_rhythm": ("waad", "fai", "valid"),
    "high_entropy": ("entropy",),
    "high_entropy_selection": ("entropy",),
}
SETTINGS = {
    "local_chunk": ("q", "amp", "bottom"),
    "global_anchor": ("q", "amp", "bottom"),
    "coupled_rhythm": ("q", "amp", "alpha", "k", "tau_waad", "tau_delta"),
    "high_entropy": ("q", "amp", "bottom"),
    "high_entropy_selection": ("q",),
}


class Batch(NamedTuple):
    """The rows and settings of one call. Signals are NaN or infinite where they must not matter."""

    waad: torch.Tensor
    fai: torch.Tensor
    entropy: torch.Tensor
    mask: torch.Tensor
    valid: torch.Tensor
    settings: dict
    keep_mean: bool


def random_mask(draw: random.Random) -> list[bool]:
    """Left, right or no padding, a response of 0 to WIDTH tokens, holes in every third."""
    length = draw.choice([0, 1, 2, 3, draw.randint(4, WIDTH), WIDTH])
    left = draw.choice([0, WIDTH - length, draw.randint(0, WIDTH - length)])
    holes = draw.choice([0.0, 0.0, 0.4])
    return [left <= t < left + length and draw.random() >= holes for t in range(WIDTH)]


def random_signal(draw: random.Random) -> list[float]:
    """Few values with many ties, one value, or values of which no two are equal; exact in float32."""
    kind = draw.choice(["ties", "ties", "constant", "distinct"])
    if kind == "constant":
        return [draw.choice([0.0, 2.5])] * WIDTH
    step, largest = (4, 12) if kind == "ties" else (2**16, 2**22)
    return [draw.randint(0, largest) / step for _ in range(WIDTH)]


def random_batch(seed: int) -> Batch:
    draw = random.Random(seed)
    mask = torch.tensor([random_mask(draw) for _ in range(BATCH)])
    chances = torch.tensor([draw.choice([0.0, 0.0, 0.3, 1.0]) for _ in range(BATCH)])
    invalid = torch.tensor([[draw.random() for _ in range(WIDTH)] for _ in range(BATCH)]) < chances[:, None]
    waad, fai, entropy = (torch.tensor([random_signal(draw) for _ in range(BATCH)]) for _ in range(3))
    settings = {
        "q": draw.choice([0.0, 0.1, 0.2, 0.28, 0.4, 0.4, 0.4, 0.55, 0.7, 1.0]),
        "amp": draw.choice([1.0, 1.5, 3.0]),
        "alpha": draw.choice([0.0, 0.25, 0.5, 1.0]),
        "k": draw.choice([1, 2, 3, 40]),
        "tau_waad": draw.choice([None, None, 1.25]),
        "tau_delta": draw.choice([None, None, 0.75]),
        "bottom": draw.random() < 0.3,
    }
    return Batch(
        waad.masked_fill(~mask, torch.nan),
        fai.masked_fill(~mask | invalid, torch.nan),
        entropy.masked_fill(~mask, torch.inf),
        mask,
        ~invalid,
        settings,
        draw.random() < 0.3,
    )


def vectorised(name: str, batch: Batch) -> torch.Tensor:
    signals = {signal: getattr(batch, signal) for signal in SIGNALS[name]}
    settings = {setting: batch.settings[setting] for setting in SETTINGS[name]}
    if name != "high_entropy_selection":
        settings["keep_mean"] = batch.keep_mean
    return getattr(credit, name)(**signals, **settings, mask=batch.mask)


def written_out(name: str, batch: Batch) -> torch.Tensor:
    settings = {setting: batch.settings[setting] for setting in SETTINGS[name]}

    def of_one(*signals):
        gamma = getattr(plain, name)(*signals, **settings)
        return plain.mean_kept(gamma) if batch.keep_mean and name != "high_entropy_selection" else gamma

    columns = [getattr(batch, signal).tolist() for signal in ("mask", *SIGNALS[name])]
    return torch.tensor([plain.respond(mask, of_one, *row) for mask, *row in zip(*columns, strict=True)])


@pytest.mark.parametrize("name", SIGNALS)
def test_as_written_out(name):
    for seed in range(CASES // BATCH):
        batch = random_batch(seed)
        actual, expected = vectorised(name, batch), written_out(name, batch)
        wrong = (~torch.isclose(actual, expected.to(actual.dtype), rtol=1e-6, atol=0)).nonzero().tolist()
        assert not wrong, f"random_batch({seed}) with {batch.settings} differs at (row, token) {wrong[:5]}"
