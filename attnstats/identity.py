"""Which model results are of: known again whatever its dtype, its device or the name of its folder.

Head profiles are saved with it and refused on another model (heads.py); runs are resumed with the same model only.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

import torch

SAMPLES = 16  # entries of each parameter that the fingerprint is made of
# Entries of a config that don't change what the model computes.
INCIDENTAL = frozenset(
    ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache", "pad_token_id",
     "bos_token_id", "eos_token_id", "quantization_config", "_attn_implementation", "attn_implementation")
)  # fmt: skip


@dataclass(frozen=True)
class ModelIdentity:
    """Which model a profile is of, known again whatever the dtype, the device or the folder's name.

    Attributes:
        config: digest of the settings in which its config differs from the defaults of its family.
        weights: digest of a few entries of every parameter, rounded to bfloat16; float16 rounds otherwise.
    """

    model_type: str
    layers: int
    heads: int
    head_dim: int
    config: str
    weights: str


def identity(model: Any) -> ModelIdentity:
    """The identity of a transformers model; takes milliseconds.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(hidden_size=32, intermediate_size=32, num_attention_heads=4, num_hidden_layers=2)
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes))
        >>> found = identity(model)
        >>> (found.model_type, found.layers, found.heads, found.head_dim), found == identity(model.bfloat16())
        (('llama', 2, 4, 8), True)
    """
    config = model.config.get_text_config()
    settings = {key: value for key, value in config.to_diff_dict().items() if key not in INCIDENTAL}
    described = json.dumps(settings, sort_keys=True, default=str)
    heads = int(config.num_attention_heads)
    samples = []
    for _, weight in sorted(model.named_parameters()):
        flat = weight.detach().flatten()
        samples.append(
            flat[:: max(1, len(flat) // SAMPLES)][:SAMPLES].to(torch.bfloat16).cpu()
        )  # parameters can be on several devices
    sampled = torch.cat(samples).view(torch.int16).numpy().tobytes()
    return ModelIdentity(
        model_type=str(config.model_type),
        layers=int(config.num_hidden_layers),
        heads=heads,
        head_dim=int(getattr(config, "head_dim", None) or config.hidden_size // heads),
        config=hashlib.sha256(described.encode()).hexdigest()[:16],
        weights=hashlib.sha256(sampled).hexdigest()[:16],
    )


def differences(ours: ModelIdentity | None, theirs: ModelIdentity) -> str:
    """What `theirs` has otherwise than `ours`, in words; empty where they are the same model."""
    recorded = {} if ours is None else asdict(ours)
    return ", ".join(
        f"{field} is {value} and not {recorded.get(field)}"
        for field, value in asdict(theirs).items()
        if recorded.get(field) != value
    )
