"""Responses of a model to a batch of prompts, drawn from the model's own distribution and nothing else.

Token ids in, token ids out, whichever cache and attention the model has. Called by corpus.py and perturb.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from attnstats.errors import InputError
from attnstats.study.models import LoadedModel

TEMPERATURES = 1e-6, 1e6  # beyond them logits / temperature over- or underflow in fp32
SEEDS = -(2**63), 2**64 - 1  # what torch.manual_seed takes


def check_sampling(max_tokens: int, temperature: float, seed: int) -> None:
    """Raises InputError for numbers that nothing can be generated with."""
    if max_tokens < 1:
        raise InputError(f"--max-tokens must be >= 1, got {max_tokens}")
    coldest, hottest = TEMPERATURES
    if temperature != 0 and not coldest <= temperature <= hottest:
        raise InputError(f"--temperature must be 0 (greedy) or from {coldest:g} to {hottest:g}, got {temperature}")
    if not SEEDS[0] <= seed <= SEEDS[1]:
        raise InputError(f"--seed must be a 64-bit integer, from -2**63 to 2**64 - 1, got {seed}")


def check_lengths(prompts: Sequence[Sequence[int]], loaded: LoadedModel, max_tokens: int) -> None:
    """Raises InputError where a prompt and its response don't fit the positions that the model knows."""
    limit = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
    lengths = [len(prompt) for prompt in prompts]
    longest = max(lengths)
    if limit is not None and longest + max_tokens > limit:
        raise InputError(
            f"--max-tokens {max_tokens}: with a prompt of {longest} tokens (prompt {lengths.index(longest) + 1}) that "
            f"is more than the {limit} positions of {loaded.name}; at most {max(0, limit - longest)} fit, or shorten "
            "the prompt"
        )


def generate(
    loaded: LoadedModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    advance: Callable[[], None] = lambda: None,
    **inputs: Any,
) -> list[list[int]]:
    """The response to each prompt of one batch: token ids up to and including the end token.

    Args:
        temperature: 0 is greedy; the seed matters above it. The global generator is left as it was.
        advance: is called once per step of the batch.
        inputs: for `model.generate`: the cache of what the prompts begin with, padded on the left as they are.
    """
    from transformers import GenerationConfig, StoppingCriteria

    class Advance(StoppingCriteria):
        """Stops nothing: it is called once per token."""

        def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            advance()
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    own = loaded.model.generation_config
    ends = end_tokens(loaded)
    config = GenerationConfig(
        max_new_tokens=max_tokens,
        do_sample=temperature > 0,
        **({"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature > 0 else {}),
        bos_token_id=own.bos_token_id,
        eos_token_id=sorted(ends) or None,
        pad_token_id=_pad_token(loaded),
    )
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), config.pad_token_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    device = loaded.device
    with torch.no_grad(), _without_settings(loaded.model), torch.random.fork_rng(_gpus(device)):
        torch.manual_seed(seed)
        sequences = loaded.model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            generation_config=config,
            stopping_criteria=[Advance()],
            **inputs,
        )
    return [_until_end(row, ends) for row in sequences[:, longest:].tolist()]


@contextmanager
def _without_settings(model: Any) -> Iterator[None]:
    """The model without generation settings of its own, which fill whatever a call leaves open.

    Penalties, min_p, suppressed tokens: they would change the distribution whose entropy is reported.
    """
    from transformers import GenerationConfig

    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def _gpus(device: torch.device) -> list[int]:
    return [] if device.type == "cpu" else [device.index or 0]


def end_tokens(loaded: LoadedModel) -> set[int]:
    """The tokens that end a response: those of the model's generation settings and of its tokenizer."""
    own = loaded.model.generation_config.eos_token_id
    ends = set(own) if isinstance(own, list) else {own}
    return (ends | {loaded.tokenizer.eos_token_id}) - {None}


def _pad_token(loaded: LoadedModel) -> int:
    pad = loaded.tokenizer.pad_token_id
    if pad is not None:
        return int(pad)
    return min(end_tokens(loaded), default=0)


def _until_end(ids: list[int], ends: set[int]) -> list[int]:
    for index, token in enumerate(ids):
        if token in ends:
            return ids[: index + 1]
    return ids
