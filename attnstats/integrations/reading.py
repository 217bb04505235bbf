"""What trainers share that read a policy's attention: the time that it takes, and classes of heads in a checkpoint."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from attnstats import heads
from attnstats.transformers.run import Capture


class Stopwatch:
    """The sum of the time spent inside `with watch:`; nested blocks count once."""

    def __init__(self, device: torch.device):
        self.seconds = 0.0
        self._device = device
        self._depth = 0
        self._started = 0.0

    def __enter__(self) -> None:
        if self._depth == 0:
            self._started = self.now()
        self._depth += 1

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if self._depth == 0:
            self.seconds += self.now() - self._started

    def now(self) -> float:
        """The time in seconds, after the device has finished all its work."""
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)
        return time.perf_counter()


@contextmanager
def attention_timed(run: Capture, watch: Stopwatch) -> Iterator[None]:
    """Inside, the attention of the layers that are read adds to the time of the statistics: an upper bound of it."""
    attend = run.attend

    def timed(layer: int, call: Any) -> Tensor:
        if layer not in run.layers:
            return attend(layer, call)
        with watch:
            return attend(layer, call)

    run.attend = timed  # type: ignore[method-assign]
    try:
        yield
    finally:
        del run.attend


def written_classes(classes: heads.HeadClasses) -> dict[str, str]:
    """The class of each head by layer, as a letter: "l" local, "g" global, "m" middle."""
    return {str(layer): classes.letters(layer) for layer in classes.layers}


def read_classes(written: dict[str, str]) -> heads.HeadClasses:
    layers = sorted(map(int, written))
    local, global_ = (
        torch.tensor([[of == letter for of in written[str(layer)]] for layer in layers], dtype=torch.bool, device="cpu")
        for letter in "lg"
    )
    return heads.HeadClasses(local, global_, tuple(layers))


def heads_changed(written: dict[str, str], earlier: dict[str, str]) -> int:
    """The number of heads whose class is another one than before."""
    return sum(a != b for layer in written for a, b in zip(written[layer], earlier[layer], strict=True))
