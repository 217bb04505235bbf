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
    PreTrainedTokenizerFast(tokenizer_object=letters, pad_token="<pad>", eos_token="<eos>").save_pretrained(folder)


def prompt(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randint(2, VOCABULARY, (length,), generator=generator).tolist()
