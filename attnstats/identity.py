"""The identity of a model: the same whatever its dtype, its device or the name of its folder.

Head profiles are saved with it and refused on another model (heads.py); a run is resumed only with the same model.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

import torch

SAMPLES = 16  # entries of each parameter in the fingerprint
# Entries of a config that don't change what the model computes.
INCIDENTAL = frozenset(
    ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache", "pad_token_id",
     "bos_token_id", "eos_token_id", "quantization_config", "_attn_implementation", "attn_implementation")
)  # fmt: skip


@dataclass(frozen=True)
class ModelIdentity:
    """The architecture of a model and digests of its config and weights.

    Attributes:
        config: digest of the settings that differ from the defaults of the family.
        weights: digest of a few entries of every parameter, rounded to bfloat16 (a float16 model has another).
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
        >>> one = identity(model)
        >>> (one.model_type, one.layers, one.heads, one.head_dim), one == identity(model.bfloat16())
        (('llama', 2, 4, 8), True)
    """
    config = model.config.get_text_config()
    settings = {key: value for key, value in config.to_diff_dict().items() if key not in INCIDENTAL}
    described = json.dumps(settings, sort_keys=True, default=str)
    heads = int(config.num_attention_heads)
    samples = []
    for _, weight in sorted(model.named_parameters()):
        flat = weight.detach().flatten()
        picked = flat[:: max(1, len(flat) // SAMPLES)][:SAMPLES]
        samples.append(picked.to(torch.bfloat16).cpu())  # parameters can be on several devices
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
    """The fields in which `theirs` differs from `ours`, in words; empty for the same model."""
    recorded = {} if ours is None else asdict(ours)
    return ", ".join(
        f"{field} is {value} and not {recorded.get(field)}"
        for field, value in asdict(theirs).items()
        if recorded.get(field) != value
    )
