"""The model inside what it is wrapped in: compiled, replicated or sharded over ranks, or with an adapter.

Wrappers are known by their class; a module of your own that holds a model is none.
"""

from __future__ import annotations

from typing import Any

from attnstats.errors import InputError

# By the name of the class, as importing them takes long: the attribute that holds the model. FSDP2 (`fully_shard`)
# wraps nothing.
WRAPPERS = {
    "OptimizedModule": "_orig_mod",
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "FullyShardedDataParallel": "module",
    "DeepSpeedEngine": "module",
}


def unwrap(model: Any) -> Any:
    """The model inside its wrappers; one that has none, or is no model, as it is.

    Raises:
        InputError: an adapter of PEFT that puts virtual tokens before the prompt.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 2)
        >>> unwrap(torch.nn.DataParallel(torch.compile(model))) is model
        True
    """
    while (inside := _inside(model)) is not None:
        model = inside
    return model


def is_sharded(model: Any) -> bool:
    """True where a forward pass gathers parameters and lets go of them at its end, as FSDP and ZeRO-3 do."""
    names = {name for module in model.modules() for name in _classes(module)}
    return bool(names & {"FSDPModule", "FullyShardedDataParallel"}) or any(
        hasattr(p, "ds_id") for p in model.parameters()
    )


def refuse_replicas(model: Any) -> None:
    """Raise InputError for DataParallel over several devices, whose copies of the model lose what they record."""
    inside = model
    while inside is not None:
        devices = getattr(inside, "device_ids", None)
        if "DataParallel" in _classes(inside) and devices and len(devices) > 1:
            raise InputError(
                f"model: DataParallel runs a copy of it on each of the devices {devices}, in threads, and what the "
                "copies record is lost; pass and call the module inside it, or use DistributedDataParallel"
            )
        inside = _inside(inside)


def refuse_replica(module: Any) -> None:
    """Raise InputError for a copy that DataParallel made for one forward pass."""
    if getattr(module, "_is_replica", False):
        raise InputError(
            f"model: this {type(module).__name__} is a copy that DataParallel made for one of its devices, and what it "
            "records is lost; call the module inside DataParallel, or use DistributedDataParallel"
        )


def _inside(model: Any) -> Any:
    """What a wrapper holds; None for anything else."""
    for name in _classes(model):
        if name in WRAPPERS:
            return getattr(model, WRAPPERS[name])
    if not callable(getattr(type(model), "get_base_model", None)):  # PeftModel
        return None
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise InputError(
            f"model: the adapter of this {type(model).__name__} puts virtual tokens before the prompt, which have no "
            "place in input_ids; merge it or use one that changes weights only, such as LoRA"
        )
    return model.get_base_model()


def _classes(model: Any) -> list[str]:
    return [kind.__name__ for kind in type(model).__mro__]
