"""verl's synchronous trainer with token credit, `trainer.v1.trainer_mode=rhythm_sync`.

The actor's pass for old log-probabilities gives the curves of the credit (engine.py), which go through TransferQueue
as verl's own fields do; advantages are scaled after whatever estimator made them. Everything else is verl's.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import ray
import torch
import transfer_queue as tq
from omegaconf import open_dict
from tensordict import TensorDict
from verl.trainer.ppo.utils import Role
from verl.trainer.ppo.v1.trainer_base import register_trainer
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.workers.utils.padding import response_to_nested

from attnstats.integrations import batches
from attnstats.integrations.settings import WITH_ENTROPY, RhythmCredit
from attnstats.integrations.verl.batch import response_part, shape_advantages
from attnstats.integrations.verl.configuration import STEP, TRAINER_HOOKS, WORKER_HOOKS, check_hooks, credit_of

MODE = "rhythm_sync"


def generator_of(config: Any, *drawn_from: int) -> torch.Generator:
    """For kind="random": independent of the sampling of responses. Rows draw in their order, which is Ray's."""
    seed = config.actor_rollout_ref.actor.data_loader_seed or 0
    return batches.generator_of("cpu", seed, *drawn_from)


def curves_of(credit: RhythmCredit) -> list[str]:
    """The fields that the actor's pass gives."""
    names = list(credit.statistics)
    return [*names, "fai_valid"] if "fai" in names else names


def prepare(config: Any) -> RhythmCredit:
    """The credit of a configuration, checked, and put where verl's workers get it, on whatever machine."""
    credit = credit_of(config)
    with open_dict(config):
        config.actor_rollout_ref.rhythm = asdict(credit)
    return credit


@register_trainer(MODE)
class RhythmTrainerSync(PPOTrainerSync):
    """verl's PPOTrainerSync with advantages that are scaled by a token credit."""

    def __init__(self, config: Any):
        check_hooks((*TRAINER_HOOKS, *WORKER_HOOKS))
        self.credit = prepare(config)
        # verl decides by this name, too, how to sample and what to save.
        config.trainer.v1.trainer_mode = "sync"
        super().__init__(config)
        self._curves = curves_of(self.credit)

    def _init_resource_pool_mgr(self) -> None:
        from attnstats.integrations.verl.workers import RhythmActorRolloutRefWorker

        super()._init_resource_pool_mgr()
        for role in (Role.Actor, Role.ActorRollout, Role.ActorRolloutRef):
            if role in self.role_worker_mapping:
                self.role_worker_mapping[role] = ray.remote(RhythmActorRolloutRefWorker)

    def _compute_old_log_prob(self, batch: Any, metrics: dict[str, Any]) -> Any:
        given = batch.extra_info
        given[STEP] = self.global_steps
        try:
            batch = super()._compute_old_log_prob(batch, metrics)
        finally:
            for info in (given, batch.extra_info):
                info.pop(STEP, None)
        if not self.credit.statistics:
            return batch
        metrics |= self.actor_rollout_wg.rhythm_report()[0]
        data = self._fields(batch, *self._curves, "response_mask")
        for name in self._curves:  # of prompt and response
            data[name] = response_part(data[name], data["response_mask"])
        return tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=data.select(*self._curves))

    def _compute_advantage(self, batch: Any, metrics: dict[str, Any]) -> Any:
        batch = super()._compute_advantage(batch, metrics)
        entropy = ["entropy"] if self.credit.kind in WITH_ENTROPY else []
        data = self._fields(batch, *self._curves, *entropy, "response_mask", "advantages")
        mask = data["response_mask"]
        padded = data.to_padded_tensor()
        generator = generator_of(self.config, self.global_steps, self.local_trigger_step)
        metrics |= shape_advantages(padded, self.credit, generator=generator)
        shaped = TensorDict({"advantages": response_to_nested(padded["advantages"], mask)}, batch_size=len(batch))
        return tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=shaped)

    def _compute_metrics(
        self, batch: Any, metrics: dict[str, Any], timing_raw: dict[str, float], **kwargs: Any
    ) -> None:
        super()._compute_metrics(batch, metrics, timing_raw, **kwargs)
        if "rhythm/seconds" in metrics:
            metrics["rhythm/step_share"] = metrics["rhythm/seconds"] / timing_raw["step"]

    @staticmethod
    def _fields(batch: Any, *names: str) -> Any:
        return tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=list(names))
