"""verl's older trainer, `RayPPOTrainer`, with token credit.

`python -m attnstats.integrations.verl.legacy` is `python -m verl.trainer.main_ppo trainer.use_v1=False` with it. Its
batches are padded.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hydra
import ray
import torch
import verl.trainer
from torch import Tensor
from verl.trainer import main_ppo_v0
from verl.trainer.main_ppo import run_ppo
from verl.trainer.ppo.ray_trainer import RayPPOTrainer
from verl.trainer.ppo.utils import Role
from verl.utils.device import auto_set_device

from attnstats.integrations.settings import WITH_ENTROPY
from attnstats.integrations.verl.batch import shape_advantages
from attnstats.integrations.verl.configuration import LEGACY_HOOKS, STEP, WORKER_HOOKS, check_hooks
from attnstats.integrations.verl.trainer import curves_of, generator_of, prepare
from attnstats.integrations.verl.workers import RhythmActorRolloutRefWorker


class RhythmRayPPOTrainer(RayPPOTrainer):
    """verl's RayPPOTrainer with advantages that are scaled by a token credit, just before the update."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any):
        check_hooks((*LEGACY_HOOKS, *WORKER_HOOKS))
        self.credit = prepare(config)
        super().__init__(config, *args, **kwargs)
        self._logged: dict[str, float] = {}

    def _compute_old_log_prob(self, batch: Any) -> Any:
        batch.meta_info[STEP] = self.global_steps
        try:
            with self._outputs_kept() as outputs:
                old_log_prob, mfu = super()._compute_old_log_prob(batch)
        finally:
            batch.meta_info.pop(STEP)
        if self.credit.statistics:
            self._logged = self.actor_rollout_wg.rhythm_report()[0]
            lengths = batch.batch["attention_mask"][:, batch.batch["prompts"].shape[1] :].sum(1).tolist()
            for name in curves_of(self.credit):
                old_log_prob.batch[name] = _responses(outputs[-1][name], lengths, batch.batch["responses"].shape[1])
        if self.credit.kind in WITH_ENTROPY:
            old_log_prob.batch["entropy"] = old_log_prob.batch["entropys"]
        return old_log_prob, mfu

    def _update_actor(self, batch: Any) -> Any:
        generator = generator_of(self.config, self.global_steps)
        logged = self._logged | shape_advantages(batch.batch, self.credit, generator=generator)
        for name in {"gamma", "entropy", *curves_of(self.credit)} & set(batch.batch.keys()):
            batch.batch.pop(name)
        output = super()._update_actor(batch)
        output.meta_info["metrics"] |= logged
        return output

    @contextmanager
    def _outputs_kept(self) -> Iterator[list[Any]]:
        """Inside, what the workers return from their pass, of which verl keeps two fields."""
        compute, outputs = self.actor_rollout_wg.compute_log_prob, []

        def keeping(batch: Any) -> Any:
            outputs.append(compute(batch))
            return outputs[-1]

        self.actor_rollout_wg.compute_log_prob = keeping
        try:
            yield outputs
        finally:
            self.actor_rollout_wg.compute_log_prob = compute


def _responses(curve: Tensor, lengths: list[int], width: int) -> Tensor:
    """(B, width) the ends of the rows of a nested curve, which are `lengths` long."""
    rows = [row[len(row) - n :] for row, n in zip(curve.unbind(), lengths, strict=True)]
    return torch.stack([torch.nn.functional.pad(row, (0, width - len(row))) for row in rows])


class RhythmTaskRunner(main_ppo_v0.BaseTaskRunner):
    """verl's TaskRunner with our trainer and worker."""

    def add_actor_rollout_worker(self, config: Any) -> Any:
        _, worker_group = super().add_actor_rollout_worker(config)
        for role in {Role.ActorRollout, Role.ActorRolloutRef} & set(self.role_worker_mapping):
            self.role_worker_mapping[role] = ray.remote(RhythmActorRolloutRefWorker)
        return RhythmActorRolloutRefWorker, worker_group

    def run(self, config: Any) -> None:
        main_ppo_v0.RayPPOTrainer = RhythmRayPPOTrainer  # which `run` makes; there is no hook
        main_ppo_v0.TaskRunner.__ray_actor_class__.run(self, config)


@hydra.main(
    config_path=str(Path(verl.trainer.__file__).parent / "config"), config_name="ppo_trainer", version_base=None
)
def main(config: Any) -> None:
    from attnstats.integrations.verl.legacy import RhythmTaskRunner  # by its name, which `python -m` hides

    auto_set_device(config)
    config.trainer.use_v1 = False
    run_ppo(config, task_runner_class=ray.remote(RhythmTaskRunner))


if __name__ == "__main__":
    main()
