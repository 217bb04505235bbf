"""The settings of a run of verl: its `algorithm.rhythm` as a `RhythmCredit`, and what can't be read, refused by name.

Called once, at the start, in verl's own process of the trainer; nothing is imported but to look at verl's hooks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from importlib.metadata import version
from typing import Any

from attnstats.integrations.hooks import Hook, faults_of
from attnstats.integrations.settings import RhythmCredit

KEY = "algorithm.rhythm"
STEP = "rhythm_step"  # in a batch: the number of the training step whose pass is to be read
STRATEGIES = ("fsdp", "fsdp2")


ENGINE = "verl.workers.engine.fsdp.transformer_impl", "FSDPEngineWithLMHead"
WORKER_HOOKS = (
    Hook(*ENGINE, "initialize"),
    Hook(*ENGINE, "forward_backward_batch", ("data", "loss_function", "forward_only")),
    Hook(*ENGINE, "forward_step", ("micro_batch", "loss_function", "forward_only")),
    Hook(*ENGINE, "prepare_model_inputs", ("micro_batch",)),
    Hook(*ENGINE, "prepare_model_outputs", ("output", "output_args", "micro_batch", "logits_processor_func")),
    Hook(*ENGINE, "save_checkpoint", ("local_path",)),
    Hook(*ENGINE, "load_checkpoint", ("local_path",)),
    Hook("verl.workers.engine_workers", "ActorRolloutRefWorker", "actor_worker_cls"),
)
TRAINER = "verl.trainer.ppo.v1.trainer_sync", "PPOTrainerSync"
TRAINER_HOOKS = (
    Hook(*TRAINER, "_init_resource_pool_mgr"),
    Hook(*TRAINER, "_compute_old_log_prob", ("batch", "metrics")),
    Hook(*TRAINER, "_compute_advantage", ("batch", "metrics")),
    Hook(*TRAINER, "_compute_metrics", ("batch", "metrics", "timing_raw")),
)
LEGACY = "verl.trainer.ppo.ray_trainer", "RayPPOTrainer"
LEGACY_HOOKS = (
    Hook(*LEGACY, "_compute_old_log_prob", ("batch",)),
    Hook(*LEGACY, "_update_actor", ("batch",)),
)


def check_hooks(hooks: tuple[Hook, ...]) -> None:
    """Raise RuntimeError if this version of verl has moved what the plug-in overrides."""
    if faults := faults_of(hooks):
        raise RuntimeError(
            f"attnstats can't read the attention of a policy in verl {version('verl')}: {'; '.join(faults)}. "
            "docs/verl.md has the versions that it ran with"
        )


def credit_of(config: Any) -> RhythmCredit:
    """The credit of `algorithm.rhythm`, once the rest of the configuration is one that it can be read with.

    Args:
        config: verl's configuration, a DictConfig, or nested dicts.

    Raises:
        ValueError, TypeError: a setting that doesn't exist, has a wrong value, or keeps attention from being read.

    Example:
        >>> credit_of({"algorithm": {"rhythm": {"kind": "local", "qq": 0.2}}})
        Traceback (most recent call last):
        ValueError: algorithm.rhythm has no setting qq; it has kind, q, amp, alpha, k, tau_waad, tau_delta, sign,
        keep_mean, window, lo, hi, layers, head_share, reprofile_every
    """
    given = _plain(_get(config, KEY, {}))
    if not isinstance(given, Mapping):
        raise TypeError(f"{KEY} must have settings by name, such as +{KEY}.kind=coupled; got {given!r}")
    names = [field.name for field in fields(RhythmCredit)]
    if wrong := [str(name) for name in given if name not in names]:
        raise ValueError(f"{KEY} has no setting {', '.join(wrong)}; it has {', '.join(names)}")
    try:
        credit = RhythmCredit(**given)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{KEY}: {error}") from error
    if credit.reads:
        _check_readable(config)
    return credit


def _check_readable(config: Any) -> None:
    """Raise ValueError for what keeps the actor's attention from being read in its pass for old log-probabilities."""
    actor = "actor_rollout_ref.actor"
    strategy = _get(config, f"{actor}.strategy", "fsdp")
    if strategy not in STRATEGIES:
        raise ValueError(
            f"{actor}.strategy={strategy!r}: only the attention of transformers' models in verl's FSDP engine can be "
            "read; use fsdp2, or fsdp"
        )
    if _get(config, "algorithm.rollout_correction.bypass_mode", False):
        raise ValueError(
            "algorithm.rollout_correction.bypass_mode=True: verl makes no pass for old log-probabilities then, and "
            "there is nothing to read; set it to False"
        )
    if _get(config, f"{actor}.use_prefix_grouper", False):
        raise ValueError(
            f"{actor}.use_prefix_grouper=True: prompts are shared by responses in one pass, which is not the attention "
            "of each; set it to False"
        )
    ulysses = _get(config, f"{actor}.fsdp_config.ulysses_sequence_parallel_size", 1) or 1
    ulysses = max(ulysses, _get(config, f"{actor}.ulysses_sequence_parallel_size", 1) or 1)
    attention = _get(config, "actor_rollout_ref.model.override_config.attn_implementation", "flash_attention_2")
    reference = _get(config, f"{actor}.use_kl_loss", False) or _get(config, "algorithm.use_kl_in_reward", False)
    if ulysses > 1 and not str(attention).startswith("flash_attention") and reference:
        raise ValueError(
            f"{actor}.ulysses_sequence_parallel_size={ulysses} with attn_implementation={attention!r} and a reference "
            "policy: verl exchanges in FlashAttention only, and its reference would attend within parts of rows; use "
            "flash_attention_2, or a size of 1"
        )


def _get(config: Any, path: str, default: Any) -> Any:
    for name in path.split("."):
        config = None if config is None else config.get(name)
    return default if config is None else config


def _plain(value: Any) -> Any:
    """Dicts and lists in place of OmegaConf's."""
    if isinstance(value, str) or not hasattr(value, "__iter__"):
        return value
    if hasattr(value, "items"):
        return {name: _plain(x) for name, x in value.items()}
    return [_plain(x) for x in value]
