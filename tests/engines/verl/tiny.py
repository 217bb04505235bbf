"""A tiny model and data for runs of verl: `python -m tests.engines.verl.tiny FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

PROMPTS = ("aab", "bba", "ab ab", "b")


def save(folder: Path, family: str = "Llama", **sizes: Any) -> None:
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = ["<pad>", "<eos>", "<unk>", *map(chr, range(32, 127)), "\n"]
    letters = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    letters.pre_tokenizer, letters.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=letters, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    default: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "num_hidden_layers": 6,
        "max_position_embeddings": 2048,
    }
    special: dict[str, Any] = {"vocab_size": len(words), "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    config = getattr(transformers, f"{family}Config")(**special, **default | sizes)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():  # attention of a fresh model is nearly uniform
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(4)
            layer.self_attn.k_proj.weight.mul_(4)
    model.save_pretrained(folder)


def save_data(path: Path, prompts: int = 64) -> None:
    from datasets import Dataset

    rows = [
        {
            "data_source": "letters",
            "prompt": [{"role": "user", "content": PROMPTS[i % len(PROMPTS)] + str(i)}],
            "ability": "letters",
            "reward_model": {"style": "rule", "ground_truth": "a"},
            "extra_info": {"index": i},
        }
        for i in range(prompts)
    ]
    Dataset.from_list(rows).to_parquet(path)


def score(data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None, **_: Any) -> float:
    """The reward: the share of letters of the first half of the alphabet."""
    return sum(letter < "P" for letter in solution_str) / max(len(solution_str), 1)


if __name__ == "__main__":
    save(Path(sys.argv[1]))
    save_data(Path(sys.argv[1]) / "train.parquet")
