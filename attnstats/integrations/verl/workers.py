"""verl's workers with an actor whose attention is read. The reference and the critic are verl's own."""

from __future__ import annotations

from functools import partial
from typing import Any

from omegaconf import OmegaConf
from verl.single_controller.base.decorator import Dispatch, register
from verl.workers.engine_workers import ActorRolloutRefWorker, TrainingWorker

from attnstats.integrations.settings import RhythmCredit
from attnstats.integrations.verl.configuration import WORKER_HOOKS, check_hooks
from attnstats.integrations.verl.engine import PREFIX, RhythmEngine


class RhythmTrainingWorker(TrainingWorker):
    """verl's worker of one model, with a `RhythmEngine`."""

    engine: RhythmEngine

    def __init__(self, config: Any, credit: RhythmCredit):
        engine_config = config.engine_config
        object.__setattr__(engine_config, "strategy", PREFIX + engine_config.strategy)  # the name in verl's registry
        super().__init__(config)
        self.engine.credit = credit


class RhythmActorRolloutRefWorker(ActorRolloutRefWorker):
    """verl's worker of actor, rollout and reference; the settings of the credit are `config.rhythm`."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any):
        check_hooks(WORKER_HOOKS)
        super().__init__(config, *args, **kwargs)
        credit = RhythmCredit(**OmegaConf.to_container(config.rhythm))
        self.actor_worker_cls = partial(RhythmTrainingWorker, credit=credit)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def rhythm_report(self) -> dict[str, float]:
        """What the last pass that was read has to log."""
        return self.actor.engine.report()
