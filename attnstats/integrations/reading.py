"""What trainers share that read a policy's attention: curves out of their own passes, of heads that are classified when
due; the time that it takes; and classes of heads in a checkpoint.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from attnstats import MeanDistance, capture, heads
from attnstats.integrations.settings import RhythmCredit
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


class CurveReader:
    """Reads the curves of a credit in the passes that a trainer makes of its policy for old log-probabilities.

    Around a batch's passes the trainer enters `reading`, before each it calls `expect`, and after it `take`. Passes
    outside are not read.

    Args:
        model: the policy, a model of transformers'.
        credit: the settings.
        device: of the passes.
        group: the ranks whose responses decide together about the heads; None: all.

    Attributes:
        layers: the layers that are read; none if the credit needs no attention.
        classes: of their heads, as `written_classes`; None before they are classified, or not needed.
        profiled_at: the step in which they were.

    Raises:
        TypeError, ValueError: the model's attention can't be read.
    """

    def __init__(self, model: Any, credit: RhythmCredit, device: torch.device, group: Any = None):
        self._model, self._credit, self._group = model, credit, group
        self.layers: tuple[int, ...] = ()
        self.classes: dict[str, str] | None = None
        self.profiled_at = 0
        self._metrics: dict[str, float] = {}
        self._watch = Stopwatch(device)
        self._run: Capture | None = None  # of the pass that is being read
        self._counted: Tensor | None = None  # its query mask
        self._distance: list[tuple[Tensor, Tensor]] | None = None  # of each pass, while heads are classified
        if credit.statistics:
            with self._capture([MeanDistance()]) as run:
                self.layers = run.layers

    @property
    def head_classes(self) -> heads.HeadClasses | None:
        """The local and global heads of the layers that are read; None before they are classified, or not needed."""
        return None if self.classes is None else read_classes(self.classes)

    def report(self) -> dict[str, float]:
        """What the passes since the last report have to log: their seconds, and of heads that were classified."""
        report = {**self._metrics, "rhythm/seconds": self._watch.seconds}
        self._metrics, self._watch.seconds = {}, 0.0
        return report

    @property
    def is_reading(self) -> bool:
        return self._run is not None

    @contextmanager
    def reading(self, step: int, repeat: Callable[[], object]) -> Iterator[None]:
        """Inside, passes are read. Before any response has a token the curves are of all heads.

        Args:
            step: of the trainer; decides whether heads are due.
            repeat: makes the passes of the batch one more time, by which heads are classified.
        """
        if not self._credit.statistics:
            yield
            return
        with self._watch:
            self._classify_if_due(step, repeat)
        classes, statistics = self.head_classes, self._credit.statistics
        of_heads = None if classes is None else {"waad": classes.local, "fai": classes.global_}
        chosen = of_heads and {name: of_heads[name] for name in statistics}
        with (
            self._capture(statistics.values(), reduce=("layers", "heads"), heads=chosen) as run,
            attention_timed(run, self._watch),
        ):
            self._run = run
            try:
                yield
            finally:
                self._run = None

    def expect(self, counted: Tensor) -> None:
        """Say which tokens of the next pass are the response's, bool in the shape of its input_ids."""
        if self._run is not None:
            self._run.query_mask = self._counted = counted

    def take(self) -> dict[str, Tensor]:
        """The curves of the pass that just ended, "waad", "fai" and "fai_valid", in the shape of its input_ids.

        Empty where passes are not read, or are those by which heads are classified.
        """
        if self._run is None:
            return {}
        counted, self._counted = self._counted, None
        if counted is None:
            raise RuntimeError("a pass of the policy is read, and nothing said which of its tokens are the response's")
        with self._watch:
            if self._distance is not None:
                rows = self._run["mean_distance"].double() * counted[:, None]  # (L, B, H, T)
                self._distance.append((rows.sum((1, 3)), counted.sum()))
                return {}
            curves = {name: self._run[name] for name in self._credit.statistics}
            if "fai" in curves:
                curves["fai_valid"] = self._run.valid["fai"]
            return curves

    def _capture(self, statistics: Any, **settings: Any) -> AbstractContextManager[Capture]:
        return capture(self._model, statistics=statistics, layers=self._credit.layers, **settings)

    def _classify_if_due(self, step: int, repeat: Callable[[], object]) -> None:
        """Classify the heads by their mean distance over the responses of all ranks, where that is due."""
        share, before = self._credit.head_share, self.classes
        if share is None or (before is not None and step - self.profiled_at < self._credit.reprofile_every):
            return
        self._distance = []
        try:
            with self._capture([MeanDistance()]) as self._run:
                repeat()
            total, count = (torch.stack(parts).sum(0) for parts in zip(*self._distance, strict=True))
        finally:
            self._run = self._distance = None
        of_ranks = torch.cat([total.flatten(), count[None].double()])
        torch.distributed.all_reduce(of_ranks, group=self._group)
        if of_ranks[-1] == 0:
            return
        distance = (of_ranks[:-1] / of_ranks[-1]).view_as(total)
        classes = heads.classify(distance, share, self.layers)
        self.classes, self.profiled_at = written_classes(classes), step
        self._metrics = {
            "rhythm/local_distance": distance[classes.local].mean().item(),
            "rhythm/global_distance": distance[classes.global_].mean().item(),
        }
        if before is not None:
            self._metrics["rhythm/heads_changed"] = heads_changed(self.classes, before)


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
