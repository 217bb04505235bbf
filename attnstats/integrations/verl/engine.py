"""The actor's engine in verl, which reads curves of the attention in its pass for old log-probabilities.

It is verl's FSDP engine, under the names rhythm_fsdp and rhythm_fsdp2. A pass is read if its batch has `STEP`, which
the trainers give to that pass alone: never the reference's, with LoRA neither, and never an update.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_name
from verl.workers.engine import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from attnstats import MeanDistance, attach, capture, heads
from attnstats.integrations.reading import Stopwatch, attention_timed, heads_changed, read_classes, written_classes
from attnstats.integrations.settings import RhythmCredit
from attnstats.integrations.verl import query_mask
from attnstats.integrations.verl.configuration import STEP
from attnstats.integrations.verl.ulysses import exchange_of
from attnstats.transformers.exchange import set_exchange
from attnstats.transformers.run import Capture

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
        self._layers: tuple[int, ...] = ()
        self._classes: dict[str, str] | None = None
        self._profiled_at = 0
        self._run: Capture | None = None  # of the pass that is being read
        self._real = self._counted = torch.empty(
            0, dtype=torch.bool, device="cpu"
        )  # (B, T) of that pass: no padding; response tokens
        self._distance: list[tuple[Tensor, Tensor]] | None = None  # of each micro-batch, while heads are profiled
        self._watch = Stopwatch(torch.device(get_device_name()))
        self._metrics: dict[str, float] = {}

    @property
    def head_classes(self) -> heads.HeadClasses | None:
        """The local and global heads of the layers that are read; None before they are classified, or not needed."""
        return None if self._classes is None else read_classes(self._classes)

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
        if self.credit.statistics:
            with self._capture([MeanDistance()]) as run:  # refuses a model that can't be read
                self._layers = run.layers

    def report(self) -> dict[str, float]:
        """What the last pass that was read has to log, and its seconds; empty after it."""
        report = {**self._metrics, "rhythm/seconds": self._watch.seconds}
        self._metrics, self._watch.seconds = {}, 0.0
        return report

    # Reading

    def forward_backward_batch(self, data: Any, loss_function: Any, forward_only: bool = False) -> Any:
        step = tu.get_non_tensor_data(data=data, key=STEP, default=None)
        try:
            if step is None or not forward_only or not self.credit.statistics:
                return super().forward_backward_batch(data, loss_function, forward_only)
            with self._watch:
                self._classify_if_due(data, step)
            with self._curves_captured() as self._run:
                return super().forward_backward_batch(data, loss_function, forward_only)
        finally:
            self._run = None
            set_exchange(None)

    def prepare_model_inputs(self, micro_batch: Any) -> Any:
        inputs, arguments = super().prepare_model_inputs(micro_batch)
        length = inputs["input_ids"].shape[1]
        if self.use_ulysses_sp:
            exchange = exchange_of(inputs["position_ids"])
            length = exchange.length
            set_exchange(exchange)
        if self._run is not None:
            lengths = micro_batch["input_ids"].offsets().diff()
            if tu.get_non_tensor_data(data=micro_batch, key="use_remove_padding", default=True):
                lengths = lengths.sum()[None]  # of the packed row, which may be padded at its end
            self._real = torch.arange(length, dtype=torch.int64, device=lengths.device) < lengths[:, None]
            counted = torch.zeros_like(self._real)
            counted[self._real] = query_mask(micro_batch)[0].to(counted.device)
            self._run.query_mask = self._counted = counted
        return inputs, arguments

    def prepare_model_outputs(self, output: Any, output_args: Any, micro_batch: Any, logits_processor_func: Any) -> Any:
        outputs = super().prepare_model_outputs(output, output_args, micro_batch, logits_processor_func)
        if self._run is None:
            return outputs
        with self._watch:
            if self._distance is not None:
                counted = self._counted
                rows = self._run["mean_distance"].double() * counted[:, None]  # (L, B, H, T)
                self._distance.append((rows.sum((1, 3)), counted.sum()))
                return outputs
            curves = {name: self._run[name] for name in self.credit.statistics}
            if "fai" in curves:
                curves["fai_valid"] = self._run.valid["fai"]
            offsets = micro_batch["input_ids"].offsets()
            for name, curve in curves.items():
                outputs[name] = torch.nested.nested_tensor_from_jagged(curve[self._real], offsets)
        self.passes_read += 1
        return outputs

    def _capture(self, statistics: Any, **settings: Any) -> AbstractContextManager[Capture]:
        return capture(self.module, statistics=statistics, layers=self.credit.layers, **settings)

    @contextmanager
    def _curves_captured(self) -> Iterator[Capture]:
        """Inside, passes have the curves of the credit. Before any response has a token they are of all heads."""
        classes, statistics = self.head_classes, self.credit.statistics
        of_heads = None if classes is None else {"waad": classes.local, "fai": classes.global_}
        chosen = of_heads and {name: of_heads[name] for name in statistics}
        with (
            self._capture(statistics.values(), reduce=("layers", "heads"), heads=chosen) as run,
            attention_timed(run, self._watch),
        ):
            yield run

    def _classify_if_due(self, data: Any, step: int) -> None:
        """Classify the heads by their mean distance over the responses of all ranks, where that is due."""
        share, before = self.credit.head_share, self._classes
        if share is None or (before is not None and step - self._profiled_at < self.credit.reprofile_every):
            return
        self._distance = []
        try:
            with self._capture([MeanDistance()]) as self._run:
                super().forward_backward_batch(data, None, forward_only=True)
            total, count = (torch.stack(parts).sum(0) for parts in zip(*self._distance, strict=True))
        finally:
            self._run = self._distance = None
        of_ranks = torch.cat([total.flatten(), count[None].double()])
        torch.distributed.all_reduce(of_ranks, group=self.get_data_parallel_group())
        if of_ranks[-1] == 0:
            return
        distance = (of_ranks[:-1] / of_ranks[-1]).view_as(total)
        classes = heads.classify(distance, share, self._layers)
        self._classes, self._profiled_at = written_classes(classes), step
        self._metrics = {
            "rhythm/local_distance": distance[classes.local].mean().item(),
            "rhythm/global_distance": distance[classes.global_].mean().item(),
        }
        if before is not None:
            self._metrics["rhythm/heads_changed"] = heads_changed(self._classes, before)

    # Checkpoints

    def save_checkpoint(self, local_path: str, *args: Any, **kwargs: Any) -> None:
        super().save_checkpoint(local_path, *args, **kwargs)
        if self._classes is not None and self.rank == 0:
            state = {
                "head_share": self.credit.head_share,
                "profiled_at": self._profiled_at,
                "classes": self._classes,
            }
            Path(local_path, FILE).write_text(json.dumps(state), encoding="utf-8")

    def load_checkpoint(self, local_path: str, *args: Any, **kwargs: Any) -> None:
        state = [None]
        if self._layers and self.credit.head_share is not None:
            if self.rank == 0:  # the file is on its machine, if not on all
                path = Path(local_path, FILE)
                state = [json.loads(path.read_text(encoding="utf-8")) if path.exists() else None]
            torch.distributed.broadcast_object_list(state, src=0)
            self._restore(state[0])
        super().load_checkpoint(local_path, *args, **kwargs)

    def _restore(self, state: dict[str, Any] | None) -> None:
        layers, share, fault = [str(layer) for layer in self._layers], self.credit.head_share, None
        if state is None:
            fault = "holds no classes of heads: it was written by another trainer, or with a credit that needs none"
        elif state["head_share"] != share or sorted(state["classes"], key=int) != layers:
            fault = (
                f"has classes of heads for head_share={state['head_share']} in layers "
                f"{', '.join(sorted(state['classes'], key=int))}, and the credit is for head_share={share} in layers "
                f"{', '.join(layers)}"
            )
        else:
            self._classes, self._profiled_at = state["classes"], state["profiled_at"]
        if fault is not None and self.rank == 0:
            warnings.warn(
                f"the checkpoint {fault}. The heads are classified at the first batch and every "
                f"{self.credit.reprofile_every} steps from there, unlike in an uninterrupted run",
                stacklevel=2,
            )
