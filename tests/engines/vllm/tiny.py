"""Tiny models of several families, with random weights that attend unevenly, and what transformers says of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

VOCABULARY = 97
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_hidden_layers": 6,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}


def save(folder: Path, family: str = "llama", **sizes: Any) -> Path:
    """A model with random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES | sizes))
    with torch.no_grad():  # attention of a fresh model is nearly uniform
        for name, weight in model.named_parameters():
            if any(part in name for part in ("q_proj.weight", "k_proj.weight")):
                weight.mul_(6)
            elif "lm_head" in name:  # answers that differ
                weight.mul_(20)
    model.save_pretrained(folder)
    return folder


def save_tokenizer(folder: Path) -> None:
    """A token for each letter."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", *map(chr, range(32, 127))]
    letters = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    letters.pre_tokenizer, letters.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, pad_token="<pad>", eos_token="<eos>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    tokenizer.save_pretrained(folder)


def save_adapter(folder: Path, model: Path, merged: Path) -> Path:
    """A LoRA adapter of the query and key projections, and the model with it in its weights."""
    import json

    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    generator = torch.Generator("cpu").manual_seed(1)
    tensors: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        for i, layer in enumerate(whole.model.layers):
            for name in ("q_proj", "k_proj"):
                weight = getattr(layer.self_attn, name).weight
                a, b = (torch.randn(*shape, generator=generator) for shape in ((8, weight.shape[1]), (len(weight), 8)))
                tensors |= {
                    f"base_model.model.model.layers.{i}.self_attn.{name}.lora_{part}.weight": x / 4
                    for part, x in (("A", a), ("B", b))
                }
                weight += 2 * (b / 4) @ (a / 4)
    whole.save_pretrained(merged)
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "k_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": str(model)}))
    return folder


def save_shorter(folder: Path, model: Path, layers: int) -> Path:
    """The model with its first layers alone, whose answers are often the same."""
    from transformers import AutoModelForCausalLM

    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    whole.model.layers = whole.model.layers[:layers]
    whole.config.num_hidden_layers = layers
    whole.save_pretrained(folder)
    return folder


def save_eagle(folder: Path, model: Path) -> Path:
    """A head of EAGLE's kind, which drafts from the model's last hidden states by a layer of its own."""
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    layer = whole.model.layers[-1].state_dict(prefix="layers.0.")
    tensors = {name: x.clone() for name, x in layer.items() if "input_layernorm" not in name}
    size = whole.config.hidden_size
    tensors["fc.weight"] = torch.cat([torch.zeros(size, size), torch.eye(size)], dim=1)
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    config = AutoConfig.from_pretrained(model, num_hidden_layers=1)
    config.save_pretrained(folder)
    return folder


def prompt(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randint(2, VOCABULARY, (length,), generator=generator).tolist()
