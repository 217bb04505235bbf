"""Responses of a model to a batch of prompts, drawn from the model's own distribution.

Token ids in, token ids out, whatever cache and attention the model has.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnstats.errors import InputError
from attnstats.study.models import Description, LoadedModel

TEMPERATURES = 1e-6, 1e6  # beyond them logits / temperature over- or underflow in fp32
SEEDS = -(2**63), 2**64 - 1  # what torch.manual_seed takes


class Sampling(NamedTuple):
    """Settings of generation; temperature 0 is greedy, and the seed matters above it."""

    max_tokens: int
    temperature: float = 0.0
    seed: int = 0

    def check(self) -> None:
        """Raises InputError for a setting out of range."""
        if self.max_tokens < 1:
            raise InputError(f"--max-tokens must be >= 1, got {self.max_tokens}")
        coldest, hottest = TEMPERATURES
        if self.temperature != 0 and not coldest <= self.temperature <= hottest:
            raise InputError(
                f"--temperature must be 0 (greedy) or from {coldest:g} to {hottest:g}, got {self.temperature}"
            )
        if not SEEDS[0] <= self.seed <= SEEDS[1]:
            raise InputError(f"--seed must be a 64-bit integer, from -2**63 to 2**64 - 1, got {self.seed}")


def seed_at(seed: int, place: int) -> int:
    """The seed of the batch or prompt at a place: a hash, so that no two runs of different seeds share one."""
    return int.from_bytes(hashlib.sha256(f"{seed},{place}".encode()).digest()[:8], "little")


def positions_of(model: LoadedModel | Description) -> int | None:
    """The number of positions that the model has; None: its config sets no limit."""
    limit: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return limit


def check_lengths(prompts: Sequence[Sequence[int]], model: LoadedModel | Description, max_tokens: int) -> None:
    """Raises InputError if a prompt and its response need more positions than the model has."""
    limit = positions_of(model)
    lengths = [len(prompt) for prompt in prompts]
    longest = max(lengths)
    if limit is not None and longest + max_tokens > limit:
        raise InputError(
            f"--max-tokens {max_tokens}: with a prompt of {longest} tokens (prompt {lengths.index(longest) + 1}) that "
            f"is more than the {limit} positions of {model.name}; at most {max(0, limit - longest)} fit, or shorten "
            "the prompt"
        )


def generate(
    loaded: LoadedModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    advance: Callable[[], None] = lambda: None,
    finished: Callable[[int, list[int]], None] = lambda row, response: None,
    **inputs: Any,
) -> list[list[int]]:
    """The response to each prompt of one batch: token ids up to and including the end token.

    Args:
        sampling: checked. torch's global generator keeps its state.
        advance: called once per step of the batch.
        finished: called with the row and the response of each prompt as soon as the response has ended.
        inputs: for `model.generate`: a cache of the beginning of the prompts, padded on the left like them.
    """
    from transformers import GenerationConfig, StoppingCriteria

    responses: dict[int, list[int]] = {}

    def finish(row: int, tokens: list[int]) -> None:
        if row not in responses:
            responses[row] = until_end(tokens, ends, keep_end=True)
            finished(row, responses[row])

    class Advance(StoppingCriteria):
        """Calls `advance` once per token, `finished` once per response, and never stops."""

        def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            advance()
            for row, token in enumerate(input_ids[:, -1].tolist()):
                if token in ends:
                    finish(row, input_ids[row, longest:].tolist())
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    own = loaded.model.generation_config
    ends, pad = end_tokens(loaded), loaded.tokenizer.pad_token_id
    samples = sampling.temperature > 0
    config = GenerationConfig(
        max_new_tokens=sampling.max_tokens,
        do_sample=samples,
        **({"temperature": sampling.temperature, "top_k": 0, "top_p": 1.0} if samples else {}),
        bos_token_id=own.bos_token_id,
        eos_token_id=sorted(ends) or None,
        pad_token_id=min(ends, default=0) if pad is None else int(pad),
    )
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), config.pad_token_id, dtype=torch.long, device="cpu")
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt, dtype=torch.int64, device="cpu")
        mask[row, longest - len(prompt) :] = 1
    device = loaded.device
    gpus = [] if device.type == "cpu" else [device.index or 0]
    with torch.no_grad(), without_own_settings(loaded.model), torch.random.fork_rng(gpus):
        torch.manual_seed(sampling.seed)
        sequences = loaded.model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            generation_config=config,
            stopping_criteria=[Advance()],
            **inputs,
        )
    for row, tokens in enumerate(sequences[:, longest:].tolist()):
        finish(row, tokens)
    return [responses[row] for row in range(len(prompts))]


@contextmanager
def without_own_settings(model: Any) -> Iterator[None]:
    """Inside the `with` the model has no generation settings of its own, which would fill those left open in a call.

    Penalties, min_p and suppressed tokens would change the distribution whose entropy is reported.
    """
    from transformers import GenerationConfig

    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def end_tokens(loaded: LoadedModel) -> set[int]:
    """The tokens that end a response, from the model's generation settings and its tokenizer."""
    own = loaded.model.generation_config.eos_token_id
    ends = set(own) if isinstance(own, list) else {own}
    return (ends | {loaded.tokenizer.eos_token_id}) - {None}


def until_end(ids: list[int], ends: set[int], *, keep_end: bool = False) -> list[int]:
    """The tokens up to the first end token; with `keep_end`, including it."""
    end = next((index for index, token in enumerate(ids) if token in ends), len(ids))
    return ids[: end + keep_end]
