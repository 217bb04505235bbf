"""A tiny random model with a tokenizer, an analysis made by hand, and Ctrl-C at a chosen pass."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from attnstats import heads
from attnstats.curves import delta
from attnstats.study.analysis import Analysis
from attnstats.study.maps import Maps, cell_boundaries

WORDS = [
    "<pad>",
    "<end>",
    "<unk>",
    "user",
    "system",
    "how",
    "many",
    "rolls",
    "are",
    "left",
    "\n",
    "=HYPERLINK(1)",
    "so",
]
VOCABULARY = 40


def save_tiny_model(folder: Path, *, chat_template: str | None = "default", kind: str = "Llama", **config) -> Path:
    """A random causal language model and a word tokenizer in `folder`, as save_pretrained leaves them."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 6}
    settings: dict[str, Any] = {"num_key_value_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 256}
    settings |= {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None, "initializer_range": 0.25}
    model_config = getattr(transformers, f"{kind}Config")(**sizes | settings | config)
    getattr(transformers, f"{kind}ForCausalLM")(model_config).save_pretrained(folder)
    words = WORDS + [f"w{i}" for i in range(VOCABULARY - len(WORDS))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Fuse()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="<end>"
    )
    if chat_template == "default":
        chat_template = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}so "
    fast.chat_template = chat_template
    fast.save_pretrained(folder)
    return folder


def synthetic_analysis(tokens: list[str], prompt: int = 2, question: str = "how many?") -> Analysis:
    """Made-up numbers for given token texts: two layers of three heads, FAI not valid for the last two tokens."""
    length = len(tokens)
    draw = torch.Generator().manual_seed(0)
    per_head = torch.rand(3, 2, 3, length, generator=draw)
    response = torch.arange(length) >= prompt
    distance = heads.head_distance(per_head[2], response)
    classes = heads.classify(distance)
    waad = heads.class_mean(per_head[0], classes.local) * 10
    fai_valid = torch.arange(length) < length - 2
    return Analysis(
        question=question,
        token_ids=torch.arange(length),
        tokens=tokens,
        response=response,
        layers=(3, 5),
        head_waad=per_head[0],
        head_fai=per_head[1],
        head_mean_distance=per_head[2],
        head_received=torch.rand(2, 3, length, generator=draw) / 10,
        received_valid=torch.arange(length) < length - 4,
        distance=distance,
        classes=classes,
        waad=waad,
        fai=heads.class_mean(per_head[1], classes.global_) * fai_valid / 10,
        fai_valid=fai_valid,
        delta=delta(waad[response]),
        entropy=torch.cat([torch.tensor([torch.nan]), torch.rand(length - 1, generator=draw)]),
        maps=synthetic_maps(prompt, length),
    )


def synthetic_maps(prompt: int, length: int) -> Maps:
    """Maps that fall off with the distance: the local one steeply, with 0 where a query would see what comes later."""
    rows, columns = map(torch.tensor, cell_boundaries(prompt, length))
    apart = (rows[:-1, None] - columns[None, :-1]).double()
    maps = [torch.exp(-apart / scale).masked_fill(apart < 0, 0.0) for scale in (5, 50)]
    near = torch.arange(min(64, length))
    reach = torch.arange(prompt, length)[:, None] >= near
    bands = [torch.exp(-near / scale) / scale * reach for scale in (5, 50)]
    pooled = [(values / values.sum(1, keepdim=True)).float() for values in maps]
    return Maps(rows, columns, *pooled, *bands)


class Silent:
    """A Progress that only counts."""

    def __init__(self) -> None:
        self.steps = 0

    def start(self, what: str, total: int) -> None:
        self.total = total

    def advance(self, amount: int = 1) -> None:
        self.steps += amount

    def finish(self) -> None:
        pass


@contextmanager
def interrupted_in_pass(number: int) -> Iterator[None]:
    """Ctrl-C in the forward pass of this number, from 1, over a whole sequence; generation and checks don't count."""
    from transformers import LlamaForCausalLM

    forward, passes = LlamaForCausalLM.forward, []

    @functools.wraps(forward)
    def interrupted(self: Any, *args: Any, **inputs: Any) -> Any:
        if inputs.get("use_cache") is False and inputs["input_ids"].shape[1] > 1:
            passes.append(1)
            if len(passes) == number:
                raise KeyboardInterrupt
        return forward(self, *args, **inputs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LlamaForCausalLM, "forward", interrupted)
        yield
