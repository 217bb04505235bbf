"""`python -m attnstats.integrations.verl.legacy` whose trainer also saves each step's batch into the folder RECORDS."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from attnstats.integrations.verl import legacy

FIELDS = ("prompts", "responses", "attention_mask", "response_mask", "returns", "waad", "fai", "fai_valid")


class Recorded(legacy.RhythmRayPPOTrainer):
    def _update_actor(self, batch: Any) -> Any:
        padded = {name: batch.batch[name].clone() for name in FIELDS}
        output = super()._update_actor(batch)
        padded["advantages"] = batch.batch["advantages"]
        width, real = padded["prompts"].shape[1], padded.pop("attention_mask").bool()
        prompts = padded.pop("prompts")
        rows = {name: [x[real[i, width:]] for i, x in enumerate(values)] for name, values in padded.items()}
        rows["prompts"] = [x[real[i, :width]] for i, x in enumerate(prompts)]
        torch.save({"rows": rows}, Path(os.environ["RECORDS"], f"{self.global_steps}.pt"))
        return output


class RecordedTaskRunner(legacy.RhythmTaskRunner):
    def run(self, config: Any) -> None:
        legacy.RhythmRayPPOTrainer = Recorded  # type: ignore[misc]
        super().run(config)


if __name__ == "__main__":
    from tests.engines.verl.older import RecordedTaskRunner as ByName

    legacy.RhythmTaskRunner = ByName  # type: ignore[misc]
    legacy.main()
