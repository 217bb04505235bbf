"""Token credit in OpenRLHF: an actor whose attention is read in its pass for log-probabilities, and a trainer for it.

`with_credit` makes both as Ray actors, which take the places of OpenRLHF's own (docs/trainers.md). Layouts are those of
OpenRLHF 0.11.2: rows of T tokens hold prompt and response, padded on the right, and entry j of log-probabilities,
`action_mask` and advantages (B, T - 1) belongs to token j + 1.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from attnstats import heads
from attnstats.integrations.batches import generator_of, scale_shifted_advantages
from attnstats.integrations.reading import CurveReader
from attnstats.integrations.settings import WITH_ENTROPY, RhythmCredit

try:
    import ray
    from openrlhf.trainer.ppo_trainer import PPOTrainer
    from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker
    from openrlhf.trainer.ray.ppo_actor import PolicyModelActor
except ImportError as error:
    raise ImportError("attnstats.integrations.openrlhf needs OpenRLHF: pip install 'openrlhf[vllm]'") from error


def with_credit(credit: RhythmCredit) -> tuple[Any, Any]:
    """Ray actors for the places of OpenRLHF's PolicyModelActor and PPOTrainer.

    Raises:
        ValueError: OpenRLHF's pass doesn't return what the credit needs.
    """
    if credit.kind in WITH_ENTROPY:
        raise ValueError(f"credit: kind={credit.kind!r} needs an entropy, and OpenRLHF's pass returns none")
    actor, trainer = (
        type(f"{base.__name__}WithCredit", (base,), {"credit": credit}) for base in (RhythmPolicy, RhythmPPOTrainer)
    )
    return ray.remote(num_gpus=1)(actor), ray.remote(trainer)


class RhythmPolicy(PolicyModelActor.__ray_actor_class__):
    """OpenRLHF's PolicyModelActor that keeps the curves of each batch that it computes log-probabilities of.

    Attributes:
        credit: the settings.
    """

    credit: RhythmCredit

    def init_model_from_pretrained(self, *args: Any, **kwargs: Any) -> None:
        super().init_model_from_pretrained(*args, **kwargs)
        self.prepare_reading()

    def prepare_reading(self) -> None:
        settings = self.strategy.args.ds
        if self.credit.statistics and (settings.ring_attn_size > 1 or settings.tensor_parallel_size > 1):
            raise ValueError(
                f"ds.ring_attn_size={settings.ring_attn_size} and ds.tensor_parallel_size="
                f"{settings.tensor_parallel_size} split rows or heads; the credit needs whole ones: set both to 1"
            )
        device = torch.device(torch.cuda.current_device())
        self._reader = CurveReader(self.strategy._unwrap_model(self.actor), self.credit, device)
        self._step = 0
        self._curves: list[dict[str, Tensor]] = []

    @property
    def head_classes(self) -> heads.HeadClasses | None:
        """The local and global heads of the layers that are read; None before they are classified, or not needed."""
        return self._reader.head_classes

    def execute_batch(self, method_name: str, *args: Any, **kwargs: Any) -> Any:
        passes = partial(super().execute_batch, method_name, *args, **kwargs)
        if method_name != "forward":
            return passes()
        with self._reader.reading(self._step, passes):
            self._curves = []
            log_probs = passes()
        self._step += 1
        return log_probs

    def forward(self, sequences: Tensor, action_mask: Tensor, attention_mask: Tensor, **kwargs: Any) -> Tensor:
        real, counted = attention_mask.bool(), pad(action_mask.bool(), (1, 0))
        packed = self.actor.packing_samples
        self._reader.expect((counted[real][None] if packed else counted).to(torch.cuda.current_device()))
        log_probs = super().forward(sequences, action_mask, attention_mask, **kwargs)
        curves = {name: curve.to("cpu") for name, curve in self._reader.take().items()}
        if packed:
            curves = {
                name: curve.new_zeros(real.shape).masked_scatter(real, curve[0]) for name, curve in curves.items()
            }
        self._curves.append(curves)
        return log_probs

    def take_curves(self) -> list[dict[str, Tensor]]:
        """Of each micro-batch of the last batch its curves, (B, T) each."""
        curves, self._curves = self._curves, []
        return curves


class RhythmExperienceMaker(RemoteExperienceMaker):
    """OpenRLHF's RemoteExperienceMaker that gets the curves from the actors, and scales advantages."""

    def __init__(self, *args: Any, credit: RhythmCredit, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.credit = credit
        self._step = 0

    def make_experience(self, samples_list: Any) -> Any:
        samples_list = super().make_experience(samples_list)
        # Each actor has had one chunk of the list, in the actors' order.
        self._curves = self._flatten_results(self.actor_model_group.async_run_method("take_curves"), 1)
        return samples_list

    def compute_advantages_and_returns(self, experiences: Any) -> Any:
        experiences = super().compute_advantages_and_returns(experiences)
        generator = generator_of("cpu", self._step)
        for experience, curves in zip(experiences, self._curves, strict=True):
            batch = {
                "response_mask": pad(experience.action_mask, (1, 0)),
                "advantages": experience.advantages,
                **curves,
            }
            metrics = scale_shifted_advantages(batch, self.credit, generator)
            experience.advantages = batch["advantages"]
            rows = len(experience.advantages)
            experience.info |= {
                name: torch.full((rows,), value, dtype=torch.float32, device="cpu") for name, value in metrics.items()
            }
        self._step += 1
        return experiences


class RhythmPPOTrainer(PPOTrainer.__ray_actor_class__):
    """OpenRLHF's PPOTrainer with a `RhythmExperienceMaker`.

    Attributes:
        credit: the settings.
    """

    credit: RhythmCredit
    experience_maker: Any

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        stock = self.experience_maker
        self.experience_maker = RhythmExperienceMaker(
            stock.actor_model_group,
            stock.critic_model_group,
            stock.reward_model_group,
            stock.initial_model_group,
            stock.kl_ctl,
            stock.strategy,
            stock.tokenizer,
            credit=self.credit,
        )
