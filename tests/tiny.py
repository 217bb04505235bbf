"""Tiny random models with inputs and eager maps to compare with, an analysis made by hand, Ctrl-C at a chosen pass."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from attnstats import FAI, WAAD, Entropy, MeanDistance, Received, Statistic, heads
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


LAYERS, HEADS, LENGTH = 6, 9, 23
SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 144,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 3,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "eos_token_id": None,
    "sliding_window": None,
    "bos_token_id": 1,
}
LOGITS_TOLERANCE = 2e-5  # three summation orders in float32, logits of order 1
# The difference of one weight of A between two float32 models with other summation orders, after some layers; to be
# multiplied by the largest factor that a statistic gives to a unit of mass.
WEIGHT_TOLERANCE = 5e-6
LARGEST_FACTOR = {WAAD(4): 4, FAI(2, 7): 1, FAI(0, None): 1, MeanDistance(): LENGTH, Received(): LENGTH}
STATISTICS = tuple(LARGEST_FACTOR)


def tiny(family: str = "llama", **changes: Any) -> Any:
    """A random causal model of six layers of nine heads, with attention far from uniform and logits of order 1."""
    import transformers

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **(SIZES | changes))
    config.initializer_range = 0.12
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def small_llama(seed: int = 0, **settings: Any) -> Any:
    """A random Llama of five layers of three heads."""
    import transformers

    torch.manual_seed(seed)
    sizes = {"hidden_size": 24, "intermediate_size": 24, "num_attention_heads": 3, "num_key_value_heads": 3}
    config = transformers.LlamaConfig(**sizes | {"vocab_size": 30, "num_hidden_layers": 5} | settings)
    return transformers.LlamaForCausalLM(config).eval()


def tiny_bart() -> Any:
    import transformers

    torch.manual_seed(0)
    sizes: dict[str, Any] = dict.fromkeys(["d_model", "encoder_ffn_dim", "decoder_ffn_dim"], 32)
    sizes |= {"encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    config = transformers.BartConfig(vocab_size=97, **sizes, init_std=0.3)
    return transformers.BartForConditionalGeneration(config).eval()


def tiny_whisper() -> Any:
    """For sound of 24 frames of 8 bins, which is a segment of 12 positions."""
    import transformers

    torch.manual_seed(0)
    sizes: dict[str, Any] = dict.fromkeys(["d_model", "encoder_ffn_dim", "decoder_ffn_dim"], 32)
    sizes |= dict.fromkeys(["encoder_attention_heads", "decoder_attention_heads"], 4)
    sizes |= {"encoder_layers": 2, "decoder_layers": 2, "num_mel_bins": 8, "max_source_positions": 12, "init_std": 0.3}
    ids: dict[str, Any] = {"pad_token_id": 3, "bos_token_id": 3, "eos_token_id": 3, "decoder_start_token_id": 4}
    unset: dict[str, Any] = {"suppress_tokens": None, "begin_suppress_tokens": None}
    config = transformers.WhisperConfig(vocab_size=60, max_target_positions=40, **sizes, **ids, **unset)
    model = transformers.WhisperForConditionalGeneration(config).eval()
    of_generation = {"no_timestamps_token_id": 8, "is_multilingual": False, "prev_sot_token_id": 7} | unset
    vars(model.generation_config).update(of_generation)
    return model


def tokens(batch: int = 2, length: int = LENGTH, seed: int = 1) -> Tensor:
    return torch.randint(3, SIZES["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(seed))


def padding(side: str | None) -> Tensor:
    """(2, LENGTH) int64, an attention mask whose second row is padded on this side."""
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    if side == "left":
        mask[1, :6] = 0
    elif side == "right":
        mask[1, -6:] = 0
    return mask


def run_with(model: Any, implementation: str, **inputs: Any) -> Any:
    """The output with another attention of transformers, with maps where it is the eager one."""
    before = model.config._attn_implementation
    model.set_attn_implementation(implementation)
    try:
        with torch.no_grad():
            return model(**inputs, output_attentions=implementation == "eager")
    finally:
        model.set_attn_implementation(before)


def gradients(model: Any, ids: Tensor, call: Any = None, **inputs: Any) -> list[Tensor]:
    """Gradients of the loss by parameter; `call` runs in the place of the model, such as its compiled form."""
    model.zero_grad()
    (model if call is None else call)(ids, labels=ids, **inputs).loss.backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


def by_definition(
    statistic: Statistic, maps: Tensor, queries: Tensor, keys: Tensor, counted: Tensor | None = None
) -> Tensor:
    """A statistic off (B, H, Tq, Tk) maps, in float64, by the formulas of the paper and nothing of attnstats.

    Args:
        queries, keys: (B, Tq) and (B, Tk), the tokens that aren't padding.
        counted: (B, Tq), the queries that count in column statistics; default: all that aren't padding.
    """
    queries, keys = queries.bool(), keys.bool()
    weights = maps.double() * queries[:, None, :, None] * keys[:, None, None, :]
    distance = torch.arange(weights.shape[2])[:, None] - torch.arange(weights.shape[3])
    if isinstance(statistic, WAAD):
        return (weights * distance.abs().clamp(max=statistic.window)).sum(-1)
    if isinstance(statistic, MeanDistance):
        return (weights * distance.abs()).sum(-1)
    if isinstance(statistic, Entropy):
        return -torch.special.xlogy(weights, weights).sum(-1)
    counts = queries if counted is None else queries & counted.bool()
    weights = weights * counts[:, None, :, None]
    if isinstance(statistic, Received):
        return weights.sum(2)
    assert isinstance(statistic, FAI)
    inside = distance >= statistic.lo
    if statistic.hi is not None:
        inside &= distance <= statistic.hi
    count = (inside & counts[:, :, None]).sum(1)
    return (weights * inside).sum(2) / count.clamp(min=1)[:, None]


def synthetic_analysis(tokens: list[str], prompt: int = 2, question: str = "how many?") -> Analysis:
    """Made-up numbers for given token texts: two layers of three heads, FAI not valid for the last two tokens."""
    length = len(tokens)
    draw = torch.Generator().manual_seed(0)
    per_head = torch.rand(3, 2, 3, length, generator=draw)
    response = torch.arange(length) >= prompt
    distance = heads.head_distance(per_head[2], response)
    classes = heads.classify(distance, layers=(3, 5))
    waad = heads.class_mean(per_head[0], classes.local) * 10
    fai_valid = torch.arange(length) < length - 2
    received = torch.rand(2, 3, length, generator=draw) / 10
    received_valid = torch.arange(length) < length - 4
    return Analysis(
        question=question,
        token_ids=torch.arange(length),
        tokens=tokens,
        shown=tokens,
        response=response,
        layers=(3, 5),
        head_waad=per_head[0],
        head_fai=per_head[1],
        head_mean_distance=per_head[2],
        head_received=received,
        received_valid=received_valid,
        received_kurtosis=heads.kurtosis(received, response & received_valid),
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
    parts = torch.tensor(sorted({0, 1, *range(prompt, length, 7), length}))
    count = int((parts >= prompt).sum()) - 1
    visible = torch.ones(count, len(parts) - 1).tril(len(parts) - 1 - count)
    shares = [visible / (1 + scale * torch.arange(len(parts) - 1)) for scale in (0.5, 2)]
    of_parts = [each / each.sum(1, keepdim=True) for each in shares]
    return Maps(rows, columns, *pooled, *bands, *[parts, *of_parts])


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
