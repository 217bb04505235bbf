"""Attention statistics over a training run: a callback for transformers' Trainer and those built on it, such as TRL's.

Every few optimizer steps one fixed batch of held-out inputs goes through the model, up to the last layer that is read,
so that the values of two steps differ by the model alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attnstats import FAI, WAAD, Entropy, MaxLogit, capture
from attnstats.integrations.reading import Stopwatch
from attnstats.statistics import Statistic, resolve
from attnstats.transformers.selection import Layers

try:
    from transformers import Trainer, TrainerCallback
except ImportError as error:
    raise ImportError(
        "attnstats.integrations.trainer needs transformers: pip install 'attnstats[transformers]'"
    ) from error

if TYPE_CHECKING:
    from pandas import DataFrame

__all__ = ["StatisticsCallback", "of_heads"]

STATISTICS: tuple[Statistic, ...] = (WAAD(10), FAI(10, 100), Entropy(), MaxLogit())


def of_heads(
    model: Any, inputs: Mapping[str, Any], statistics: Iterable[Statistic | str] = STATISTICS, layers: Layers = "all"
) -> dict[int, dict[str, Tensor]]:
    """One number per head, layer by layer: the mean of each statistic over the tokens where it has a value.

    The pass is made in eval mode, without gradients, and ends at the last layer; the model is left as it was.

    Args:
        model: a transformers model, wrapped or not, as for `attnstats.capture`.
        inputs: what its forward takes: input_ids (B, T), attention_mask (B, T), ...
        statistics: as for `attnstats.attention`; of MaxLogit it is the largest value.
        layers: as for `attnstats.capture`.

    Returns:
        By layer and name of the statistic (H,), float64, on the CPU; NaN where no token has a value.

    Raises:
        TypeError, ValueError: as `attnstats.capture`; a statistic of more than one number per token.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(hidden_size=32, intermediate_size=32, num_attention_heads=4, num_hidden_layers=2)
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes))
        >>> by_layer = of_heads(model, {"input_ids": torch.arange(40)[None]}, ["waad", "entropy"])
        >>> {layer: {name: tuple(x.shape) for name, x in of_layer.items()} for layer, of_layer in by_layer.items()}
        {0: {'waad': (4,), 'entropy': (4,)}, 1: {'waad': (4,), 'entropy': (4,)}}
    """
    statistics = _of_one_number(statistics)
    modes = [(module, module.training) for module in model.modules()]  # some may be frozen in eval mode
    model.eval()
    try:
        with torch.no_grad(), capture(model, statistics=statistics, layers=layers, stop_after_last_layer=True) as run:
            run.forward(**inputs)
    finally:
        for module, mode in modes:
            module.training = mode
    numbers = {s.name: _per_head(s, run[s].double(), run.valid[s]) for s in statistics}
    return {layer: {name: x[i].cpu() for name, x in numbers.items()} for i, layer in enumerate(run.layers)}


def _of_one_number(statistics: Iterable[Statistic | str]) -> tuple[Statistic, ...]:
    """The statistics as objects; ValueError for those that are no number per token, or two of one name."""
    resolved = resolve(statistics)
    for s in resolved:
        if s.axis not in ("row", "column") or s.per_query or not s.averages:
            raise ValueError(f"statistics: {s} is not one number per token, of which a mean could be logged")
    names = [s.name for s in resolved]
    if len(set(names)) < len(names):
        raise ValueError(f"statistics: {', '.join(names)} would be logged under one name; take one of each")
    return resolved


def _per_head(statistic: Statistic, x: Tensor, valid: Tensor) -> Tensor:
    """(L, H) of (L, B, H, T): the mean over tokens that are valid, (B, T); of the largest logit the largest."""
    valid = valid.to(x.device)[:, None]
    if isinstance(statistic, MaxLogit):
        return x.masked_fill(~valid, -torch.inf).amax((1, 3))
    return torch.where(valid, x, 0).sum((1, 3)) / valid.sum()


class StatisticsCallback(TrainerCallback):
    """Logs attention statistics of one batch every few optimizer steps, and keeps them for each head.

    Values go where the trainer's own go: its log history, the terminal, and the trackers of `report_to`. On several
    ranks each makes the same pass, as sharded models need.

    Args:
        trainer: the trainer that the callback is added to.
        inputs: what the model's forward takes, a batch that it isn't trained on: input_ids (B, T), attention_mask.
            Held on the CPU; moved for each pass.
        statistics: as for `of_heads`; WAAD(10), FAI(10, 100), Entropy and MaxLogit by default.
        layers: as for `attnstats.capture`.
        every: number of optimizer steps between two passes; the first is made before training.
        prefix: of the names in the log: `attention/waad` is the mean over layers and heads; of MaxLogit the largest.

    Attributes:
        history: by step of the last run, what `of_heads` returned.
        seconds: the time of all passes so far; `attention/seconds` in the log is that of one.

    Raises:
        TypeError, ValueError: a wrong setting, at once; a model that can't be read, when training begins.

    Example:
        >>> import datasets, transformers, trl, warnings; warnings.simplefilter("ignore")
        >>> sizes = dict(hidden_size=32, intermediate_size=32, num_attention_heads=4, num_hidden_layers=2)
        >>> model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=50, **sizes))
        >>> rows = [{"input_ids": row, "labels": row} for row in torch.randint(50, (8, 30)).tolist()]
        >>> args = transformers.TrainingArguments("out", max_steps=4, report_to=[], save_strategy="no", use_cpu=True)
        >>> trainer = transformers.Trainer(model, args, train_dataset=datasets.Dataset.from_list(rows))
        >>> held_out = {"input_ids": torch.randint(50, (2, 30))}
        >>> callback = StatisticsCallback(trainer, held_out, every=2)
        >>> trainer.add_callback(callback)
        >>> _ = trainer.train()  # doctest: +ELLIPSIS
        {...}
        >>> sorted(callback.history), [row["step"] for row in trainer.state.log_history if "attention/waad" in row]
        ([0, 2, 4], [0, 2, 4])
    """

    def __init__(
        self,
        trainer: Trainer,
        inputs: Mapping[str, Any],
        statistics: Iterable[Statistic | str] = STATISTICS,
        *,
        layers: Layers = "middle-third",
        every: int = 50,
        prefix: str = "attention/",
    ):
        if not isinstance(trainer, Trainer):
            raise TypeError(f"trainer must be a transformers.Trainer, got {type(trainer).__name__}")
        if not isinstance(inputs, Mapping) or not any(isinstance(x, Tensor) for x in inputs.values()):
            raise TypeError(
                f"inputs must be tensors by name, such as {{'input_ids': ids}}; got {type(inputs).__name__}"
            )
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise ValueError(f"every must be a number of optimizer steps, 1 or more; got {every!r}")
        self._trainer = trainer
        self._inputs = {name: x.cpu().clone() if isinstance(x, Tensor) else x for name, x in inputs.items()}
        self._statistics = _of_one_number(statistics)
        self._layers, self._every, self._prefix = layers, every, prefix
        self.seconds = 0.0
        self.history: dict[int, dict[int, dict[str, Tensor]]] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            self.history.clear()  # another run
        if state.global_step not in self.history:
            self._read(state.global_step, kwargs["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self._every == 0:
            due = control.should_log
            self._read(state.global_step, kwargs["model"])
            control.should_log = due  # a log clears it, and the trainer's own line would be lost

    def _read(self, step: int, model: Any) -> None:
        device = self._trainer.args.device
        inputs = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in self._inputs.items()}
        watch = Stopwatch(device)
        with watch, self._trainer.compute_loss_context_manager():
            by_layer = of_heads(model, inputs, self._statistics, self._layers)
        self.history[step] = by_layer
        self.seconds += watch.seconds
        logs = {f"{self._prefix}seconds": watch.seconds}
        for s in self._statistics:
            of_all = torch.stack([of_layer[s.name] for of_layer in by_layer.values()])
            whole = of_all.amax() if isinstance(s, MaxLogit) else of_all.mean()
            logs[self._prefix + s.name] = whole.item()
        Trainer.log(self._trainer, logs)  # TRL's own would end the interval that its averages are over

    def to_frame(self) -> DataFrame:
        """One row per step, layer and head, one column per statistic. Needs pandas."""
        import pandas

        rows = [
            {"step": step, "layer": layer, "head": head} | {name: x[head].item() for name, x in numbers.items()}
            for step, by_layer in sorted(self.history.items())
            for layer, numbers in by_layer.items()
            for head in range(len(next(iter(numbers.values()))))
        ]
        return pandas.DataFrame(rows)
