"""One forward pass over a prompt and its response: statistics, token entropies, and the text of each token."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attnstats.errors import InputError
from attnstats.statistics import MeanDistance, Statistic
from attnstats.study.models import LoadedModel
from attnstats.transformers.capture import capture
from attnstats.transformers.run import Capture

ENTROPY_ROWS = 64  # 64 rows of a vocabulary of 150k in fp32 are 38 MB
UNFINISHED = "\ufffd"  # what a tokenizer decodes the first bytes of a character to
LONGEST_CHARACTER = 4  # bytes of UTF-8, so tokens at most


def read(
    loaded: LoadedModel,
    ids: Tensor,
    statistics: Sequence[Statistic],
    temperature: float,
    *,
    start: int,
    entropy_from: int = 0,
    **options: Any,
) -> tuple[Capture, Tensor]:
    """Statistics and token entropies of one sequence, from one forward pass.

    Args:
        ids: (1, T) int64, prompt and response.
        statistics: MeanDistance among them.
        start: first token of the response.
        entropy_from: the first token whose row of logits is made.
        options: for `attnstats.capture`.

    Returns:
        The finished capture, and (T - entropy_from,) entropies as of `drawn_entropy`.

    Raises:
        InputError: attention overflows in the model's dtype, or token entropies can't be computed.
    """
    hidden: list[Tensor] = []
    handle = loaded.model.base_model.register_forward_hook(lambda module, args, output: hidden.append(output[0][0]))
    try:
        with torch.no_grad(), capture(loaded.model, statistics=statistics, **options) as run:
            logits = loaded.model(input_ids=ids, use_cache=False, logits_to_keep=1).logits
    finally:
        handle.remove()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # NaN is an error here
        if not run[MeanDistance()][..., start:].isfinite().all():
            raise InputError(f"--dtype {loaded.dtype}: attention of {loaded.name} overflows in it; use --dtype float32")
    return run, drawn_entropy(loaded, hidden[0][entropy_from:], logits[0, -1], temperature)


def drawn_entropy(loaded: LoadedModel, hidden: Tensor, last_logits: Tensor, temperature: float) -> Tensor:
    """(T,) entropy in nats of the distribution that each token was drawn from, the one of the row before; NaN first.

    At temperature 0 it is that of the model's own distribution. Logits are made `ENTROPY_ROWS` positions at a time.

    Args:
        hidden: (T, width), the last hidden states.
        last_logits: (vocabulary,), the model's logits of the last row.

    Raises:
        InputError: the logits are not the output embedding of the hidden states.
    """
    head = loaded.model.get_output_embeddings()
    with torch.no_grad():
        if not torch.allclose(head(hidden[-1:])[0], last_logits, rtol=1e-2, atol=1e-2):
            raise InputError(
                f"--model {loaded.name}: its logits are not its output embedding of the last hidden state (a softcap "
                "or a scale comes after), so that the entropy of a token cannot be computed; use another model"
            )
        rows = [
            torch.distributions.Categorical(logits=head(chunk).float() / (temperature or 1.0), validate_args=False)
            .entropy()
            .cpu()
            for chunk in hidden[:-1].split(ENTROPY_ROWS)
        ]
    return torch.cat([torch.tensor([torch.nan]), *rows])


def pieces(tokenizer: Any, ids: list[int]) -> list[str]:
    """The text that each token adds to the tokens before it; joined, the text of all tokens.

    A token is decoded together with the one before it, because many tokenizers drop a space at the start of a text. A
    token that leaves a character unfinished adds "", and the token that ends the character adds all of it.
    """

    def decode(part: list[int]) -> str:
        return str(tokenizer.decode(part, clean_up_tokenization_spaces=False))

    whole = decode(ids)
    added: list[str] = []
    position = 0  # in `whole`
    start = settled = 0  # the tokens start .. settled have been added, and are the context of the next
    before = ""
    for end in range(1, len(ids) + 1):
        now = decode(ids[start:end])
        stop = position
        if end == len(ids):
            stop = len(whole)
        elif len(now) > len(before) and not (now.endswith(UNFINISHED) and end - settled < LONGEST_CHARACTER):
            stop += len(now) - len(before)
            before = decode(ids[settled:end])
            start, settled = settled, end
        added.append(whole[position:stop])
        position = stop
    return added
