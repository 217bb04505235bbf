"""The identity of a model: the same whatever its dtype, its device or the name of its folder.

Head profiles are saved with it and refused on another model (heads.py); a run is resumed only with the same model,
tokenizer and generation settings (study/store.py).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from attnstats.wrappers import unwrap

CHUNK = 1 << 18  # 64-bit words that are summed at a time, so that a parameter needs no copy of its size
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
        weights: digest of every entry of every parameter and saved buffer, rounded to bfloat16 (a float16 model has
            another).
    """

    model_type: str
    layers: int
    heads: int
    head_dim: int
    config: str
    weights: str


def identity(model: Any) -> ModelIdentity:
    """The identity of a transformers model, wrapped or not; reads all weights once, about a second per billion of them.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(hidden_size=32, intermediate_size=32, num_attention_heads=4, num_hidden_layers=2)
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes))
        >>> one = identity(model)
        >>> (one.model_type, one.layers, one.heads, one.head_dim), one == identity(model.bfloat16())
        (('llama', 2, 4, 8), True)

    Raises:
        ValueError: weights that are on the meta device, as offloaded ones are, can't be read.
    """
    model = unwrap(model)
    config = model.config.get_text_config()
    settings = {key: value for key, value in config.to_diff_dict().items() if key not in INCIDENTAL}
    return ModelIdentity(
        model_type=str(config.model_type),
        layers=int(config.num_hidden_layers),
        heads=int(config.num_attention_heads),
        head_dim=head_dim(config),
        config=digest(settings),
        weights=weights_digest(model.state_dict()),
    )


def head_dim(config: Any) -> int:
    """The head size that a text config of transformers has, or that follows from its width."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def digest(value: Any) -> str:
    """A short SHA-256 of a value that JSON can hold; of other values in it, their `str`."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def weights_digest(weights: dict[str, Tensor]) -> str:
    """A digest in which every entry counts with its name and place: the same in bfloat16 and on any device.

    Each tensor is summed in 64-bit integers, which have no rounding and no order, on its own device. An odd weight for
    each place makes a change of one entry always change the sum.
    """
    total = hashlib.sha256()
    longest = max((max(2 * tensor.numel(), tensor.nbytes) for tensor in weights.values()), default=0)
    places: dict[torch.device, Tensor] = {}
    for name, tensor in sorted(weights.items()):
        if hasattr(tensor, "full_tensor"):  # of which a rank has a part
            tensor = tensor.full_tensor()
        if tensor.is_meta:
            raise ValueError(f"model: {name} is on the meta device, without its numbers; load the model whole")
        total.update(f"{name} {tuple(tensor.shape)}\n".encode())
        if tensor.device not in places:
            places[tensor.device] = _place_weights(min(CHUNK, longest // 8 + 1), tensor.device)
        sums = [(words * places[tensor.device][: len(words)]).sum() for words in _words(tensor.detach())]
        if sums:
            total.update(torch.stack(sums).cpu().numpy().astype("<i8").tobytes())
    return total.hexdigest()[:16]


def _words(tensor: Tensor) -> Iterator[Tensor]:
    """The bits of a tensor as int64 words, CHUNK at a time: of floating numbers those in bfloat16."""
    flat = tensor.reshape(-1)
    dtype = torch.bfloat16 if tensor.is_floating_point() else torch.uint8
    if not tensor.is_floating_point():
        flat = flat.contiguous().view(torch.uint8)
    per_word = 8 // dtype.itemsize
    for part in flat.split(CHUNK * per_word):
        padded = torch.zeros(-(-len(part) // per_word) * per_word, dtype=dtype, device=tensor.device)
        padded[: len(part)] = part
        yield padded.view(torch.int64)


def _place_weights(count: int, device: torch.device) -> Tensor:
    """(count,) odd int64 numbers without a pattern: the mixing of splitmix64, with arithmetic shifts."""
    mixed = torch.arange(1, count + 1, dtype=torch.int64, device=device) * -0x61C8864680B583EB
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        mixed = (mixed ^ (mixed >> shift)) * factor
    return mixed | 1


def tokenizer_digest(tokenizer: Any) -> str:
    """A digest of everything that turns text into tokens and back, but for the chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        rules: dict[str, Any] = {"vocabulary": tokenizer.get_vocab()}
    else:
        rules = json.loads(backend.to_str())
        for of_last_call in ("padding", "truncation"):
            rules.pop(of_last_call, None)
    return digest([type(tokenizer).__name__, rules, tokenizer.special_tokens_map])


def differences(ours: ModelIdentity | None, theirs: ModelIdentity) -> str:
    """The fields in which `theirs` differs from `ours`, in words; empty for the same model."""
    recorded = {} if ours is None else asdict(ours)
    return ", ".join(
        f"{field} is {value} and not {recorded.get(field)}"
        for field, value in asdict(theirs).items()
        if recorded.get(field) != value
    )
