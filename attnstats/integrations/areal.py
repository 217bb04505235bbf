"""Token credit in AReaL: an actor that reads curves of its attention in the pass for proximal log-probabilities.

`RhythmPPOActor` is AReaL's FSDP actor. It keeps the curves of a batch from `compute_logp` to `compute_advantages`,
which AReaL's trainer calls with the same trajectories, split over the same workers, in every step. Layouts are those
of AReaL 1.0.4: passes are over packed rows, and entry t of the advantages (B, T) belongs to token t + 1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from attnstats import heads
from attnstats.integrations.batches import generator_of, scale_shifted_advantages
from attnstats.integrations.reading import CurveReader
from attnstats.integrations.settings import WITH_ENTROPY, RhythmCredit

try:
    from areal.engine.core import reorder_and_pad_outputs
    from areal.engine.fsdp_engine import FSDPPPOActor
    from areal.utils import stats_tracker
    from areal.utils.data import concat_batch, split_batch
except ImportError as error:
    raise ImportError("attnstats.integrations.areal needs AReaL: pip install areal") from error

# AReaL hands all fields of a batch to the model, and empty masks instead of none, with which transformers does not look
# for the boundaries of packed rows: only FlashAttention gets them. In a pass that is read the model gets these fields.
OF_THE_MODEL = {
    *("input_ids", "position_ids", "use_cache"),
    *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"),
}


class RhythmPPOActor(FSDPPPOActor):
    """AReaL's FSDPPPOActor with advantages that are scaled by a token credit.

    AReaL's workers import an engine by its name, so the settings are of the class: set `credit` in a subclass.

    Attributes:
        credit: the settings; the paper's by default.

    Raises:
        ValueError: a setting of AReaL's with which the pass can't be read.
    """

    credit = RhythmCredit()

    def __init__(self, config: Any):
        if self.credit.kind in WITH_ENTROPY:
            raise ValueError(f"credit: kind={self.credit.kind!r} needs an entropy, and AReaL's pass returns none")
        if self.credit.statistics and not config.should_compute_prox_logp():
            raise ValueError(
                f"config: with use_decoupled_loss={config.use_decoupled_loss}, prox_logp_method="
                f"{config.prox_logp_method!r} and recompute_logprob={config.recompute_logprob} AReaL makes no pass to "
                "read; use prox_logp_method='recompute', or recompute_logprob=True without the decoupled loss"
            )
        super().__init__(config)
        self._reader: CurveReader
        self._step = 0
        self._read: tuple[Tensor, dict[str, Tensor]] | None = None  # (B, T) tokens of the batch, and its curves

    @property
    def head_classes(self) -> heads.HeadClasses | None:
        """The local and global heads of the layers that are read; None before they are classified, or not needed."""
        return self._reader.head_classes

    def initialize(self, *args: Any, **kwargs: Any) -> None:
        super().initialize(*args, **kwargs)
        spread = self.parallel_helper
        if self.credit.statistics and (spread.sp_size > 1 or spread.tp_size > 1 or self.enable_tree_training):
            raise ValueError(
                f"config: sequence parallelism ({spread.sp_size}), tensor parallelism ({spread.tp_size}) and "
                f"enable_tree_training={self.enable_tree_training} split rows or heads; the credit needs whole ones: "
                "spread the model by data parallelism alone"
            )
        self._reader = CurveReader(self.model, self.credit, self.device, self.dp_group)

    def compute_logp(self, data: list[dict[str, Any]]) -> list[Tensor] | None:
        passes = super().compute_logp
        with self._reader.reading(self._step, lambda: passes(data)):
            return passes(data)

    def compute_advantages(self, data: list[dict[str, Any]]) -> list[dict[str, Any]]:
        given, meta = _joined(data, "input_ids", "loss_mask")
        rows = super().compute_advantages(data)
        advantages = _joined(rows, "advantages")[0]["advantages"]
        batch = {"response_mask": given["loss_mask"], "advantages": advantages[:, :-1]}
        if self.credit.statistics:
            ids, curves = self._read or (None, {})
            if ids is None or not torch.equal(ids, given["input_ids"].to(ids.device)):
                raise RuntimeError("compute_advantages got other trajectories than the last compute_logp")
            batch |= {name: curve.to(advantages.device) for name, curve in curves.items()}
        generator = generator_of(advantages.device, self._step, self.data_parallel_rank)
        metrics = scale_shifted_advantages(batch, self.credit, generator)
        advantages[:, :-1] = batch["advantages"]
        for row, scaled in zip(rows, split_batch(advantages, meta), strict=True):
            row["advantages"] = scaled
        stats_tracker.scalar(**metrics, **self._reader.report())
        self._step += 1
        return rows

    def _prepare_mb_inputs(self, mb_item: Any) -> Any:
        inputs, context = super()._prepare_mb_inputs(mb_item)
        if self._reader.is_reading:
            self._reader.expect(inputs["loss_mask"].bool())  # (1, N), padded at its end like the tokens
            inputs = {name: x for name, x in inputs.items() if name in OF_THE_MODEL}
        return inputs, context

    def forward_backward_batch(self, mb_list: Any, process_output_fn: Any, forward_only: bool = False) -> None:
        if not self._reader.is_reading:
            return super().forward_backward_batch(mb_list, process_output_fn, forward_only)
        parts: list[dict[str, Tensor]] = []

        def process(logits: Tensor, context: dict[str, Any]) -> Any:
            real = logits.shape[0] - context["pad_length"]
            parts.append({name: curve[0, :real] for name, curve in self._reader.take().items()})
            return process_output_fn(logits, context)

        super().forward_backward_batch(mb_list, process, forward_only)
        ids, attended = mb_list.data["input_ids"], mb_list.data["attention_mask"]
        lengths = attended.sum(1).tolist()
        curves = {}
        for name in parts[0]:
            rows = reorder_and_pad_outputs([part[name] for part in parts], lengths, mb_list)
            curves[name] = pad(rows, (0, ids.shape[1] - rows.shape[1]))
        self._read = ids, curves
        return None


def _joined(rows: list[dict[str, Any]], *names: str) -> tuple[dict[str, Tensor], Any]:
    """Fields of trajectories in one batch, as AReaL joins them, and what splits it again."""
    return concat_batch([{name: row[name] for name in ("attention_mask", *names)} for row in rows])
