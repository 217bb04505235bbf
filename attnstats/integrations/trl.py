"""GRPO with token credit from the policy's own attention, for TRL: `RhythmGRPOTrainer` and its `RhythmCredit`.

The trainer scores completions as TRL does and then makes the advantages (B, T), `A[t] * gamma[t]` by credit.py. The
curves of gamma are read in TRL's pass for old log-probabilities, where TRL makes one, and otherwise in a separate pass
that ends at the last layer needed; never from the frozen reference model. docs/trl.md shows how to use it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from attnstats import MeanDistance, capture, credit, heads
from attnstats.integrations.batches import generator_of
from attnstats.integrations.reading import Stopwatch, attention_timed, heads_changed, read_classes, written_classes
from attnstats.integrations.settings import RhythmCredit, Signals, logged
from attnstats.statistics import Statistic
from attnstats.transformers.run import Capture

try:
    from accelerate.utils import is_peft_model
    from transformers import ProcessorMixin
    from trl import GRPOTrainer  # type: ignore[attr-defined]
except ImportError as error:
    raise ImportError("attnstats.integrations.trl needs TRL: pip install 'attnstats[trl]'") from error

__all__ = ["RhythmCredit", "RhythmGRPOTrainer"]

STATE = "RhythmGRPOTrainer"  # the entry of the stateful callbacks in trainer_state.json that holds the heads


class ScoredBatch(NamedTuple):
    """The tokens of a batch: prompts padded on the left, completions on the right.

    Attributes:
        ids, attention_mask: (B, P + T) int64, tokens and TRL's attention mask.
        length: T.
        rows_at_once: the number of rows that go through the model together.
    """

    ids: Tensor
    attention_mask: Tensor
    length: int
    rows_at_once: int

    @property
    def response(self) -> Tensor:
        """(B, P + T) bool: the completions' tokens, whose attention counts."""
        mask = self.attention_mask.bool()
        mask[:, : -self.length] = False
        return mask

    def chunks(self) -> Iterator[ScoredBatch]:
        for start in range(0, len(self.ids), self.rows_at_once):
            rows = slice(start, start + self.rows_at_once)
            yield self._replace(ids=self.ids[rows], attention_mask=self.attention_mask[rows])


class RhythmGRPOTrainer(GRPOTrainer):
    """TRL's GRPOTrainer with advantages per token; everything else is TRL's.

    Args:
        *args, **kwargs: as for `trl.GRPOTrainer`.
        credit: the tokens that are amplified, and by how much; None: coupled rhythm with the paper's settings.

    Raises:
        TypeError, ValueError: a wrong setting; a model whose attention can't be read; a processor of images.

    Attributes:
        credit: the settings.

    Example: docs/trl.md.
    """

    def __init__(self, *args: Any, credit: RhythmCredit | None = None, **kwargs: Any):
        self.credit = RhythmCredit() if credit is None else credit
        if not isinstance(self.credit, RhythmCredit):
            raise TypeError(f"credit must be a RhythmCredit, got {type(credit).__name__}")
        super().__init__(*args, **kwargs)
        self._watch = Stopwatch(self.accelerator.device)
        self._began: float | None = None
        self._signals: Signals | None = None
        self._layers: tuple[int, ...] = ()
        self._batch_of_step = -1, 0  # the optimizer step, and the number of batches credited in it before this one
        if self.credit.reads and isinstance(self.processing_class, ProcessorMixin):
            raise ValueError("processing_class: models of images and text are not supported; pass a text model")
        spread = getattr(self.accelerator, "parallelism_config", None)
        if self.credit.reads and spread is not None and (spread.cp_enabled or spread.sp_enabled):
            raise ValueError(
                f"args: parallelism_config has cp_size={spread.cp_size} and sp_size={spread.sp_size}, which gives each "
                "rank a part of a sequence; the credit needs whole ones: set both to 1"
            )
        if self.credit.statistics:
            with self._capture([MeanDistance()]) as run:  # refuses a model that can't be attached before training
                self._layers = run.layers

    @property
    def head_classes(self) -> heads.HeadClasses | None:
        """The local and global heads of the layers that are read; None before they are classified, or not needed."""
        rows = self._saved_states.get(STATE, {}).get("classes")
        return rows and read_classes(rows)

    @property
    def _saved_states(self) -> dict[str, Any]:
        """What transformers saves and loads with every checkpoint, by name."""
        return cast(dict[str, Any], self.state.stateful_callbacks)

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        if not self._trained.training:  # evaluation is TRL's own
            return super()._generate_and_score_completions(inputs)
        self._begin_batch()
        with self._read_while_scoring():
            out = super()._generate_and_score_completions(inputs)
        with self._watch:
            signals = self._read_in_own_pass(out) if self._signals is None else self._signals
            mask = out["completion_mask"].bool()
            if "tool_mask" in out:
                mask = mask & out["tool_mask"].bool()
            gamma = self._gamma(signals, mask)
            out["advantages"] = credit.shape_advantages(out["advantages"], gamma, sign=self.credit.sign)
        self._log_credit(signals, gamma, mask)
        return out

    def _gamma(self, signals: Signals, mask: Tensor) -> Tensor:
        if self.credit.statistics and signals.waad is None and signals.fai is None:
            return torch.ones_like(mask, dtype=torch.float32)  # every response so far is masked, on all ranks
        generator = None
        if self.credit.kind == "random":  # independent of the sampling of responses, and the same in a resumed run
            drawn_from = self.args.seed, *self._batch_of_step, self.accelerator.process_index
            generator = generator_of(mask.device, *drawn_from)
        return self.credit.gamma(signals, mask, generator)

    # Reading the policy

    @property
    def _trained(self) -> Any:
        """The module that TRL trains, of whatever class."""
        return self.model

    def _capture(self, statistics: Iterable[Statistic], **settings: Any) -> AbstractContextManager[Capture]:
        return capture(self._trained, statistics=statistics, layers=self.credit.layers, **settings)

    @contextmanager
    def _read_while_scoring(self) -> Iterator[None]:
        """Inside the `with`, TRL's pass for old log-probabilities, if it makes one, reads the curves of the credit."""
        self._signals = None
        score = self._get_per_token_logps_and_entropies

        def scoring(model: Any, ids: Tensor, mask: Tensor, length: int, batch_size: Any = None, **kw: Any) -> Any:
            # The reference is another model or, with adapters, the same one with the adapter switched off.
            if not self.credit.reads or model is not self.model or is_peft_model(model):
                return score(model, ids, mask, length, batch_size=batch_size, **kw)
            if not self.credit.statistics:
                scores = score(model, ids, mask, length, batch_size=batch_size, **kw | {"compute_entropy": True})
                self._signals = Signals(entropy=scores[1])
                return scores
            logps: list[Tensor] = []
            self._signals = self._read(
                ScoredBatch(ids, mask, length, batch_size or len(ids)),
                lambda chunk, _: logps.append(score(model, chunk.ids, chunk.attention_mask, length, **kw)[0]),
            )
            if self._signals is None:
                return score(model, ids, mask, length, batch_size=batch_size, **kw)
            return torch.cat(logps), None, None

        self._get_per_token_logps_and_entropies = scoring  # type: ignore[method-assign]
        try:
            yield
        finally:
            del self._get_per_token_logps_and_entropies

    def _read_in_own_pass(self, out: dict[str, Any]) -> Signals:
        """The curves of the credit where TRL made no pass of the policy."""
        if not self.credit.reads:
            return Signals()
        ids = torch.cat([out["prompt_ids"], out["completion_ids"]], dim=1)
        attention_mask = torch.cat([out["prompt_mask"], out["completion_mask"]], dim=1)
        length, rows_at_once = out["completion_ids"].shape[1], self.args.per_device_train_batch_size
        if self.credit.statistics:
            batch = ScoredBatch(ids, attention_mask, length, rows_at_once)
            return self._read(batch, self._forward, stop_after_last_layer=True) or Signals()
        with torch.no_grad(), self._eval_mode():
            _, entropy, *_ = self._get_per_token_logps_and_entropies(
                self.model, ids, attention_mask, length, batch_size=rows_at_once, compute_entropy=True
            )
        return Signals(entropy=entropy)

    def _read(
        self, batch: ScoredBatch, forward: Callable[[ScoredBatch, Capture], None], **settings: Any
    ) -> Signals | None:
        """The curves of a batch, from passes of the policy that `forward` makes chunk by chunk.

        None, without a pass, while the heads have no classes because every response so far is masked.
        """
        classes = self._classify(batch)
        statistics = self.credit.statistics
        if classes is None and self.credit.head_share is not None:
            return None
        heads_of = None if classes is None else {"waad": classes.local, "fai": classes.global_}
        settings |= {"reduce": ("layers", "heads"), "heads": heads_of and {name: heads_of[name] for name in statistics}}
        curves: dict[str, list[Tensor]] = {name: [] for name in ("waad", "fai", "fai_valid")}
        with ExitStack() as stack:
            with self._watch:
                run = stack.enter_context(self._capture(statistics.values(), **settings))
                stack.enter_context(attention_timed(run, self._watch))
            for (
                chunk
            ) in batch.chunks():  # no query_mask: the queries that see a completion's token are the completion's
                forward(chunk, run)
                with self._watch:
                    for name in statistics:
                        curves[name].append(run[name][:, -batch.length :])
                    if "fai" in statistics:
                        curves["fai_valid"].append(run.valid["fai"][:, -batch.length :])
        return Signals(**{name: torch.cat(parts) for name, parts in curves.items() if parts})

    def _classify(self, batch: ScoredBatch) -> heads.HeadClasses | None:
        """The classes of the heads, by their mean distance over the responses of all ranks where they are due."""
        share, step = self.credit.head_share, self.state.global_step
        if share is None:
            return None
        state = self._saved_states.setdefault(STATE, {"head_share": share, "classes": None})
        before = self.head_classes
        if before is not None and step - state["profiled_at"] < self.credit.reprofile_every:
            return before
        sums: list[Tensor] = []
        with self._watch, self._capture([MeanDistance()], stop_after_last_layer=True) as run:
            for chunk in batch.chunks():
                self._forward(chunk, run)
                rows = run["mean_distance"].double() * chunk.response[:, None]  # (L, B, H, P + T)
                sums.append(rows.sum((1, 3)))
            total = torch.stack(sums).sum(0)
            count = batch.response.sum().double()
            of_all_ranks = self.accelerator.reduce(torch.cat([total.flatten(), count[None]]), reduction="sum")
            if of_all_ranks[-1] == 0:
                return before
            distance = (of_all_ranks[:-1] / of_all_ranks[-1]).view_as(total)
            classes = heads.classify(distance, share, self._layers)
        written, earlier = written_classes(classes), state["classes"]
        state |= {"profiled_at": step, "classes": written}
        metrics = self._metrics["train"]
        metrics["rhythm/local_distance"].append(distance[classes.local].mean().item())
        metrics["rhythm/global_distance"].append(distance[classes.global_].mean().item())
        if earlier is not None:
            metrics["rhythm/heads_changed"].append(heads_changed(written, earlier))
        return classes

    def _load_callback_state(self) -> None:
        """Called once the state of a checkpoint is loaded: the classes of heads in it, checked."""
        state = self._saved_states.pop(STATE, None)  # no callback has this name
        super()._load_callback_state()
        share, layers = self.credit.head_share, [str(layer) for layer in self._layers]
        if share is None or not layers:
            return
        fault = None
        if state is None:
            fault = "holds no classes of heads: it was written by another trainer, or with a credit that needs none"
        elif state["classes"] is not None and (state["head_share"] != share or set(state["classes"]) != set(layers)):
            fault = (
                f"has classes of heads for head_share={state['head_share']} in layers "
                f"{', '.join(sorted(state['classes'], key=int))}, and the credit is for head_share={share} in layers "
                f"{', '.join(layers)}"
            )
        if fault is None:
            self._saved_states[STATE] = state
        elif self.accelerator.is_main_process:
            warnings.warn(
                f"the checkpoint of step {self.state.global_step} {fault}. The heads are classified at its first batch "
                f"and every {self.credit.reprofile_every} steps from there, unlike in an uninterrupted run",
                stacklevel=2,
            )

    def _forward(self, chunk: ScoredBatch, run: Capture) -> None:
        with self.accelerator.autocast(), self._eval_mode():
            run.forward(input_ids=chunk.ids, attention_mask=chunk.attention_mask, use_cache=False)

    @contextmanager
    def _eval_mode(self) -> Iterator[None]:
        """The policy in eval mode: without dropout, and without gradient checkpointing."""
        modes = [(module, module.training) for module in self._trained.modules()]
        self._trained.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training

    # Logging

    def _begin_batch(self) -> None:
        """Count the batch; log the time of the last one's statistics, and its share of the time since then."""
        step, before = self._batch_of_step
        self._batch_of_step = self.state.global_step, before + 1 if step == self.state.global_step else 0
        now = self._watch.now()
        if self._began is not None:
            self._metrics["train"]["rhythm/seconds"].append(self._watch.seconds)
            self._metrics["train"]["rhythm/step_share"].append(self._watch.seconds / (now - self._began))
        self._began, self._watch.seconds = now, 0.0

    def _log_credit(self, signals: Signals, gamma: Tensor, mask: Tensor) -> None:
        """Log means over the response tokens of all ranks; of FAI over those where it is valid."""
        values = logged(signals, gamma, mask)
        if signals.entropy is not None:
            values["credit_entropy"] = signals.entropy, mask
        sums = [torch.stack([(x * where).sum(), where.sum()]).double() for x, where in values.values()]
        totals = self.accelerator.reduce(torch.stack(sums), "sum").tolist()
        for name, (total, count) in zip(values, totals, strict=True):
            self._metrics["train"][f"rhythm/{name}"].append(total / count if count else float("nan"))
