"""The actor's engine in verl, which reads curves of the attention in its pass for old log-probabilities.

It is verl's FSDP engine, under the names rhythm_fsdp and rhythm_fsdp2. A pass is read if its batch has `STEP`, which
the trainers give to that pass alone: never the reference's, with LoRA neither, and never an update.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_name
from verl.workers.engine import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from attnstats import attach, heads
from attnstats.integrations.reading import CurveReader
from attnstats.integrations.settings import RhythmCredit
from attnstats.integrations.verl import query_mask
from attnstats.integrations.verl.configuration import STEP
from attnstats.integrations.verl.ulysses import exchange_of
from attnstats.transformers.exchange import set_exchange

PREFIX = "rhythm_"
FILE = "rhythm.json"  # in the actor's folder of a checkpoint


@EngineRegistry.register(
    model_type="language_model", backend=[f"{PREFIX}fsdp", f"{PREFIX}fsdp2"], device=["cuda", "cpu"]
)
class RhythmEngine(FSDPEngineWithLMHead):
    """verl's FSDP engine that reads the curves of a credit.

    Attributes:
        credit: the settings; set before `initialize`.
        passes_read: the number of micro-batches whose curves were read.
    """

    def __init__(self, model_config: Any, engine_config: Any, optimizer_config: Any, checkpoint_config: Any):
        # What verl does by the strategy it does for this engine, too; its configs are frozen once made.
        object.__setattr__(engine_config, "strategy", engine_config.strategy.removeprefix(PREFIX))
        super().__init__(model_config, engine_config, optimizer_config, checkpoint_config)
        self.credit = RhythmCredit()
        self.passes_read = 0
        self._reader: CurveReader
        self._real: Tensor  # (B, T) bool, the tokens of the pass that is being read that are no padding

    @property
    def head_classes(self) -> heads.HeadClasses | None:
        """The local and global heads of the layers that are read; None before they are classified, or not needed."""
        return self._reader.head_classes

    def initialize(self) -> None:
        super().initialize()
        if self.use_ulysses_sp:
            config = self.model_config.hf_config
            if hasattr(config, "vision_config"):
                raise ValueError(
                    f"ulysses_sequence_parallel_size={self.ulysses_sequence_parallel_size}: models of images and text "
                    "are cut inside the model, where their attention can't be read; use a size of 1"
                )
            if not str(config._attn_implementation).startswith("flash_attention"):
                attach(self.module)  # verl exchanges in FlashAttention alone
        device, group = torch.device(get_device_name()), self.get_data_parallel_group()
        self._reader = CurveReader(self.module, self.credit, device, group)

    def report(self) -> dict[str, float]:
        """What the last pass that was read has to log, and its seconds; empty after it."""
        return self._reader.report()

    # Reading

    def forward_backward_batch(self, data: Any, loss_function: Any, forward_only: bool = False) -> Any:
        step = tu.get_non_tensor_data(data=data, key=STEP, default=None)
        passes = super().forward_backward_batch
        try:
            if step is None or not forward_only:
                return passes(data, loss_function, forward_only)
            with self._reader.reading(step, lambda: passes(data, None, forward_only=True)):
                return passes(data, loss_function, forward_only)
        finally:
            set_exchange(None)

    def prepare_model_inputs(self, micro_batch: Any) -> Any:
        inputs, arguments = super().prepare_model_inputs(micro_batch)
        length = inputs["input_ids"].shape[1]
        if self.use_ulysses_sp:
            exchange = exchange_of(inputs["position_ids"])
            length = exchange.length
            set_exchange(exchange)
        if self._reader.is_reading:
            lengths = micro_batch["input_ids"].offsets().diff()
            if tu.get_non_tensor_data(data=micro_batch, key="use_remove_padding", default=True):
                lengths = lengths.sum()[None]  # of the packed row, which may be padded at its end
            self._real = torch.arange(length, dtype=torch.int64, device=lengths.device) < lengths[:, None]
            counted = torch.zeros_like(self._real)
            counted[self._real] = query_mask(micro_batch)[0].to(counted.device)
            self._reader.expect(counted)
        return inputs, arguments

    def prepare_model_outputs(self, output: Any, output_args: Any, micro_batch: Any, logits_processor_func: Any) -> Any:
        outputs = super().prepare_model_outputs(output, output_args, micro_batch, logits_processor_func)
        curves = self._reader.take()
        for name, curve in curves.items():
            outputs[name] = torch.nested.nested_tensor_from_jagged(
                curve[self._real], micro_batch["input_ids"].offsets()
            )
        self.passes_read += bool(curves)
        return outputs

    # Checkpoints

    def save_checkpoint(self, local_path: str, *args: Any, **kwargs: Any) -> None:
        super().save_checkpoint(local_path, *args, **kwargs)
        if self._reader.classes is not None and self.rank == 0:
            state = {
                "head_share": self.credit.head_share,
                "profiled_at": self._reader.profiled_at,
                "classes": self._reader.classes,
            }
            Path(local_path, FILE).write_text(json.dumps(state), encoding="utf-8")

    def load_checkpoint(self, local_path: str, *args: Any, **kwargs: Any) -> None:
        state = [None]
        if self._reader.layers and self.credit.head_share is not None:
            if self.rank == 0:  # the file is on its machine, if not on all
                path = Path(local_path, FILE)
                state = [json.loads(path.read_text(encoding="utf-8")) if path.exists() else None]
            torch.distributed.broadcast_object_list(state, src=0)
            self._restore(state[0])
        super().load_checkpoint(local_path, *args, **kwargs)

    def _restore(self, state: dict[str, Any] | None) -> None:
        layers, share, fault = [str(layer) for layer in self._reader.layers], self.credit.head_share, None
        if state is None:
            fault = "holds no classes of heads: it was written by another trainer, or with a credit that needs none"
        elif state["head_share"] != share or sorted(state["classes"], key=int) != layers:
            fault = (
                f"has classes of heads for head_share={state['head_share']} in layers "
                f"{', '.join(sorted(state['classes'], key=int))}, and the credit is for head_share={share} in layers "
                f"{', '.join(layers)}"
            )
        else:
            self._reader.classes, self._reader.profiled_at = state["classes"], state["profiled_at"]
        if fault is not None and self.rank == 0:
            warnings.warn(
                f"the checkpoint {fault}. The heads are classified at the first batch and every "
                f"{self.credit.reprofile_every} steps from there, unlike in an uninterrupted run",
                stacklevel=2,
            )
