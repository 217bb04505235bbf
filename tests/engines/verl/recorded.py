"""verl's synchronous trainer and ours, which also save each step's batch into the folder RECORDS, before its update."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import transfer_queue as tq
from verl.trainer.ppo.v1.trainer_base import register_trainer
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

from attnstats.integrations.verl.trainer import RhythmTrainerSync

FIELDS = ("prompts", "responses", "response_mask", "advantages", "returns", "old_log_probs")


class Recorded:
    global_steps: int
    use_critic: bool

    def _update_actor(self, batch: Any, metrics: dict[str, Any]) -> Any:
        fields = [*FIELDS, "entropy", *(["values"] if self.use_critic else [])]
        if isinstance(self, RhythmTrainerSync):
            fields += self._curves
        data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=fields)
        batch = super()._update_actor(batch, metrics)  # type: ignore[misc]
        rows = {name: [x.clone() for x in data[name].unbind()] for name in fields}
        plain = {name: float(x) for name, x in metrics.items() if isinstance(x, (int, float))}
        torch.save({"rows": rows, "metrics": plain}, Path(os.environ["RECORDS"], f"{self.global_steps}.pt"))
        return batch


@register_trainer("recorded_sync")
class RecordedSync(Recorded, PPOTrainerSync):
    def __init__(self, config: Any):
        config.trainer.v1.trainer_mode = "sync"
        super().__init__(config)


@register_trainer("recorded_rhythm")
class RecordedRhythm(Recorded, RhythmTrainerSync):
    pass
