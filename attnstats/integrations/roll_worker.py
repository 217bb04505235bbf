"""Token credit in ROLL: a worker for `actor_train.worker_cls` that reads its attention where it computes log-probs.

`compute_log_probs` returns the curves of the credit beside `log_probs` and `entropy`, and `train_step` scales the
advantages of a batch that has them. In between they have to be fields of ROLL's batch (docs/trainers.md). Read in
ROLL 0.3.0 (commit 8eb27cc).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from attnstats import heads
from attnstats.integrations import roll
from attnstats.integrations.batches import generator_of
from attnstats.integrations.reading import CurveReader
from attnstats.integrations.settings import RhythmCredit

try:
    from roll.distributed.scheduler.decorator import Dispatch, register
    from roll.pipeline.rlvr.actor_worker import ActorWorker
    from roll.platforms import current_platform
except ImportError as error:
    raise ImportError("attnstats.integrations.roll_worker needs ROLL, from a checkout on the path") from error


class RhythmActorWorker(ActorWorker):
    """ROLL's ActorWorker of RLVR pipelines with advantages that are scaled by a token credit.

    ROLL imports a worker by its name, so the settings are of the class: set `credit` in a subclass.

    Attributes:
        credit: the settings; the paper's by default.
    """

    credit = RhythmCredit()

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def initialize(self, pipeline_config: Any) -> None:
        super().initialize.__wrapped__(self, pipeline_config)
        self.prepare_reading()

    def prepare_reading(self) -> None:
        strategy, ranks = self.strategy.strategy_name, self.rank_info
        if self.credit.statistics and (not strategy.startswith("fsdp2") or ranks.cp_size > 1):
            raise ValueError(
                f"actor_train.strategy_args: strategy_name={strategy!r} with ulysses_size={ranks.cp_size} can't be "
                "read; use strategy_name='fsdp2_train' and model_args.ulysses_size=1"
            )
        self._reader = CurveReader(
            self.strategy.unwrap_model(), self.credit, torch.device(current_platform.device_type)
        )
        self._step = 0
        self._masks: list[Tensor] = []  # of the micro-batches that are still to come
        self._curves: list[dict[str, Tensor]] = []

    @property
    def head_classes(self) -> heads.HeadClasses | None:
        """The local and global heads of the layers that are read; None before they are classified, or not needed."""
        return self._reader.head_classes

    @register(dispatch_mode=Dispatch.DP_MP_DISPATCH_FIRST, trace=True, prefetch=False, to_remote=True)
    def compute_log_probs(self, data: Any) -> Any:
        passes = partial(self._passes, super().compute_log_probs.__wrapped__, data)
        if data.meta_info.get("disable_adapter", False):  # the reference is the model without its adapter
            return passes()
        with self._reader.reading(self._step, passes):
            output = passes()
        for name in self._curves[0]:
            output.batch[name] = torch.cat([curves[name] for curves in self._curves]).to("cpu")
        self._step += 1
        return output

    def _passes(self, stock: Any, data: Any) -> Any:
        """ROLL's pass over the micro-batches, the masks of which it gives only after each pass."""
        data = self.strategy.get_data_input(data)
        data.prefetch()
        micro_batches = max(len(data) // self.worker_config.infer_batch_size, 1)
        self._masks = [part.batch["response_mask"].bool() for part in data.chunk(micro_batches)]
        self._curves = []
        self._expect_next()
        return stock(self, data)

    def _expect_next(self) -> None:
        if self._masks:
            self._reader.expect(self._masks.pop(0).to(current_platform.device_type))

    def forward_func_log_probs(self, data: Any, output_tensor: Tensor) -> Any:
        result = super().forward_func_log_probs(data, output_tensor)
        self._curves.append(self._reader.take())
        self._expect_next()
        return result

    @register(dispatch_mode=Dispatch.DP_MP_DISPATCH_FIRST, trace=True, prefetch=False, to_remote=False)
    def train_step(self, data: Any) -> Any:
        data = self.strategy.get_data_input(data)
        data.prefetch()
        generator = generator_of(data.batch["advantages"].device, self._step, self.rank_info.dp_rank)
        metrics = roll.shape_advantages(data.batch, self.credit, generator=generator) | self._reader.report()
        output = super().train_step.__wrapped__(self, data)
        output.meta_info["metrics"] |= metrics
        return output
