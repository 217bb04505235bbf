"""GRPO with token credit from the policy's own attention, for TRL: `RhythmGRPOTrainer` and its `RhythmCredit`.

The trainer scores completions as TRL does and then makes its advantages (B, T): `A[t] * gamma[t]`, by credit.py. What
gamma needs is read off the policy while it computes the old log-probabilities, where TRL makes that pass, and
otherwise in a pass of its own that ends at the last layer needed. The frozen reference model is never asked.
For users of TRL; docs/trl.md shows how.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnstats import MeanDistance, capture, credit, heads
from attnstats.integrations.settings import RhythmCredit, Signals
from attnstats.statistics import Statistic
from attnstats.transformers.calls import AttentionCall
from attnstats.transformers.run import Capture

try:
    from accelerate.utils import is_peft_model
    from transformers import ProcessorMixin
    from trl import GRPOTrainer  # type: ignore[attr-defined]
except ImportError as error:
    raise ImportError("attnstats.integrations.trl needs TRL: pip install 'attnstats[trl]'") from error

__all__ = ["RhythmCredit", "RhythmGRPOTrainer"]


class Scored(NamedTuple):
    """A batch as its pass sees it: prompts padded on the left, completions on the right.

    Attributes:
        ids, attended: (B, P + T) int64, tokens and TRL's attention mask.
        length: T.
        chunk: how many rows go through the model at once.
    """

    ids: Tensor
    attended: Tensor
    length: int
    chunk: int

    @property
    def response(self) -> Tensor:
        """(B, P + T) bool: the completions' tokens, whose attention counts."""
        mask = self.attended.bool()
        mask[:, : -self.length] = False
        return mask

    def chunks(self) -> Iterator[Scored]:
        for start in range(0, len(self.ids), self.chunk):
            rows = slice(start, start + self.chunk)
            yield Scored(self.ids[rows], self.attended[rows], self.length, self.chunk)


class Stopwatch:
    """Adds up the time spent inside `with watch:`, the outermost one's."""

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
        """In seconds, once the device has done all that it was given."""
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)
        return time.perf_counter()


class RhythmGRPOTrainer(GRPOTrainer):
    """TRL's GRPOTrainer with advantages per token; everything else is TRL's.

    Args:
        *args, **kwargs: as for `trl.GRPOTrainer`.
        credit: which tokens are amplified, and by what; None: coupled rhythm with the paper's settings.

    Raises:
        TypeError, ValueError: a setting that can't be; a model whose attention can't be read; a processor of images.

    Attributes:
        credit: the settings.
        head_classes: which heads of the layers read are local and global; None before the first batch, and where the
            credit doesn't ask.

    Example: docs/trl.md.
    """

    def __init__(self, *args: Any, credit: RhythmCredit | None = None, **kwargs: Any):
        self.credit = RhythmCredit() if credit is None else credit
        if not isinstance(self.credit, RhythmCredit):
            raise TypeError(f"credit must be a RhythmCredit, got {type(credit).__name__}")
        super().__init__(*args, **kwargs)
        self.head_classes: heads.HeadClasses | None = None
        self._profiled_at = 0
        self._watch = Stopwatch(self.accelerator.device)
        self._began: float | None = None
        self._signals: Signals | None = None
        if self.credit.reads and isinstance(self.processing_class, ProcessorMixin):
            raise ValueError("processing_class: models of images and text are not supported; pass a text model")
        if self.credit.statistics:
            with self._capture([MeanDistance()]):  # a model that can't be attached says so now
                pass

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        if not self._trained.training:  # evaluation is TRL's own
            return super()._generate_and_score_completions(inputs)
        self._begin_step()
        with self._riding():
            out = super()._generate_and_score_completions(inputs)
        with self._watch:
            signals = self._own_pass(out) if self._signals is None else self._signals
            mask = out["completion_mask"].bool()
            if "tool_mask" in out:
                mask = mask & out["tool_mask"].bool()
            gamma = self._gamma(signals, mask)
            out["advantages"] = credit.shape_advantages(out["advantages"], gamma, sign=self.credit.sign)
        self._log_credit(signals, gamma, mask)
        return out

    def _gamma(self, signals: Signals, mask: Tensor) -> Tensor:
        if self.credit.statistics and signals.waad is None and signals.fai is None:
            return torch.ones_like(mask, dtype=torch.float32)  # no rank has had a response yet that isn't masked
        generator = None
        if self.credit.kind == "random":  # drawn apart from sampling, and the same after a restart
            ranks, rank = self.accelerator.num_processes, self.accelerator.process_index
            step = (self.args.seed * 1_000_003 + self.state.global_step) * ranks + rank
            generator = torch.Generator(mask.device).manual_seed(step)
        return self.credit.gamma(signals, mask, generator)

    # Reading the policy

    @property
    def _trained(self) -> Any:
        """What TRL trains, of whatever class."""
        return self.model

    @property
    def _policy(self) -> Any:
        """The transformers model within what is trained."""
        model = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if is_peft_model(model) else model

    def _capture(self, statistics: Iterable[Statistic], **settings: Any) -> AbstractContextManager[Capture]:
        return capture(self._policy, statistics=statistics, layers=self.credit.layers, **settings)

    @contextmanager
    def _riding(self) -> Iterator[None]:
        """While it lasts, TRL's pass for old log-probabilities, if it makes one, reads what the credit needs."""
        self._signals = None
        score = self._get_per_token_logps_and_entropies

        def scoring(model: Any, ids: Tensor, attended: Tensor, length: int, batch_size: Any = None, **kw: Any) -> Any:
            # The reference is another model or, of an adapter, the same one with the adapter switched off.
            if not self.credit.reads or model is not self.model or is_peft_model(model):
                return score(model, ids, attended, length, batch_size=batch_size, **kw)
            if not self.credit.statistics:
                found = score(model, ids, attended, length, batch_size=batch_size, **kw | {"compute_entropy": True})
                self._signals = Signals(entropy=found[1])
                return found
            logps: list[Tensor] = []
            batch = Scored(ids, attended, length, batch_size or len(ids))
            self._signals = self._read(
                batch, lambda chunk, _: logps.append(score(model, chunk.ids, chunk.attended, length, **kw)[0])
            )
            if self._signals is None:
                return score(model, ids, attended, length, batch_size=batch_size, **kw)
            return torch.cat(logps), None, None

        self._get_per_token_logps_and_entropies = scoring  # type: ignore[method-assign]
        try:
            yield
        finally:
            del self._get_per_token_logps_and_entropies

    def _own_pass(self, out: dict[str, Any]) -> Signals:
        """Read what the credit needs where TRL made no pass of the policy."""
        if not self.credit.reads:
            return Signals()
        ids = torch.cat([out["prompt_ids"], out["completion_ids"]], dim=1)
        attended = torch.cat([out["prompt_mask"], out["completion_mask"]], dim=1)
        batch = Scored(ids, attended, out["completion_ids"].shape[1], self.args.per_device_train_batch_size)
        if self.credit.statistics:
            return self._read(batch, self._forward, stop_after_last_layer=True) or Signals()
        with torch.no_grad(), self._undropped():
            found = self._get_per_token_logps_and_entropies(
                self.model, ids, attended, batch.length, batch_size=batch.chunk, compute_entropy=True
            )
        return Signals(entropy=found[1])

    def _read(self, batch: Scored, forward: Callable[[Scored, Capture], None], **settings: Any) -> Signals | None:
        """The curves of a batch, out of passes of the policy that `forward` makes chunk by chunk.

        None while no response was seen that isn't masked, so that the heads have no classes; no pass is made then.
        """
        self._classify(batch)
        wanted, classes = self.credit.statistics, self.head_classes
        if classes is None and self.credit.head_share is not None:
            return None
        chosen = None if classes is None else {"waad": classes.local, "fai": classes.global_}
        settings |= {"reduce": ("layers", "heads"), "heads": chosen and {name: chosen[name] for name in wanted}}
        found: dict[str, list[Tensor]] = {name: [] for name in ("waad", "fai", "fai_valid")}
        with ExitStack() as stack:
            with self._watch:
                run = stack.enter_context(self._capture(wanted.values(), **settings))
                _timed(run, self._watch)
            for chunk in batch.chunks():  # whoever sees a completion's token is of the completion: no query_mask
                forward(chunk, run)
                with self._watch:
                    for name in wanted:
                        found[name].append(run[name][:, -batch.length :])
                    if "fai" in wanted:
                        found["fai_valid"].append(run.valid["fai"][:, -batch.length :])
        return Signals(**{name: torch.cat(parts) for name, parts in found.items() if parts})

    def _classify(self, batch: Scored) -> None:
        """Find the local and the global heads by their mean distance over all ranks' responses, where that is due."""
        share, step = self.credit.head_share, self.state.global_step
        if share is None:
            return
        if self.head_classes is not None and step - self._profiled_at < self.credit.reprofile_every:
            return
        sums: list[Tensor] = []
        with self._watch, self._capture([MeanDistance()], stop_after_last_layer=True) as run:
            for chunk in batch.chunks():
                self._forward(chunk, run)
                rows = run["mean_distance"].double() * chunk.response[:, None]  # (L, B, H, P + T)
                sums.append(rows.sum((1, 3)))
            total = torch.stack(sums).sum(0)
            count = batch.response.sum().double()
            whole = self.accelerator.reduce(torch.cat([total.flatten(), count[None]]), reduction="sum")
            if whole[-1] == 0:
                return
            distance = (whole[:-1] / whole[-1]).view_as(total)
            self.head_classes = heads.classify(distance, share)
            self._profiled_at = step
        metrics = self._metrics["train"]
        metrics["rhythm/local_distance"].append(distance[self.head_classes.local].mean().item())
        metrics["rhythm/global_distance"].append(distance[self.head_classes.global_].mean().item())

    def _forward(self, chunk: Scored, run: Capture) -> None:
        with self.accelerator.autocast(), self._undropped():
            run.forward(input_ids=chunk.ids, attention_mask=chunk.attended, use_cache=False)

    @contextmanager
    def _undropped(self) -> Iterator[None]:
        """The policy in eval mode: without dropout, and without gradient checkpointing."""
        modes = [(module, module.training) for module in self._trained.modules()]
        self._trained.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training

    # What is logged

    def _begin_step(self) -> None:
        """Log what the statistics took of the time since completions were last asked for."""
        now = self._watch.now()
        if self._began is not None:
            self._metrics["train"]["rhythm/seconds"].append(self._watch.seconds)
            self._metrics["train"]["rhythm/step_share"].append(self._watch.seconds / (now - self._began))
        self._began, self._watch.seconds = now, 0.0

    def _log_credit(self, signals: Signals, gamma: Tensor, mask: Tensor) -> None:
        """Means over the response tokens of all ranks; of FAI over those where it is valid."""
        means = {"amplified": ((gamma > 1).float(), mask), "gamma": (gamma, mask)}
        if signals.waad is not None:
            means["waad"] = signals.waad, mask
        if signals.fai is not None and signals.fai_valid is not None:
            means["fai"] = signals.fai, mask & signals.fai_valid
        if signals.entropy is not None:
            means["credit_entropy"] = signals.entropy, mask
        sums = [torch.stack([(x * where).sum(), where.sum()]).double() for x, where in means.values()]
        for name, (total, count) in zip(means, self.accelerator.reduce(torch.stack(sums), "sum").tolist(), strict=True):
            self._metrics["train"][f"rhythm/{name}"].append(total / count if count else float("nan"))


def _timed(run: Capture, watch: Stopwatch) -> None:
    """Let the attention of the layers that are read count as time of the statistics: an upper bound of it."""
    attend = run.attend

    def timed(layer: int, call: AttentionCall) -> Tensor:
        if layer not in run.layers:
            return attend(layer, call)
        with watch:
            return attend(layer, call)

    run.attend = timed  # type: ignore[method-assign]
