"""One forward pass over a prompt and its response: statistics, how its tokens were drawn, and the text of each."""

from __future__ import annotations

import itertools
import re
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnstats.errors import InputError
from attnstats.statistics import MeanDistance, Statistic
from attnstats.study.models import LoadedModel
from attnstats.transformers.capture import capture
from attnstats.transformers.run import Capture

ENTROPY_ROWS = 64  # 64 rows of a vocabulary of 150k in fp32 are 38 MB
# What transformers calls the scale and the softcap of logits after the output embedding: Cohere and Falcon-H1, Granite,
# Gemma and RecurrentGemma.
FACTORS, DIVISORS = ("logit_scale", "lm_head_multiplier"), ("logits_scaling",)
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap")
UNFINISHED = "\ufffd"  # what a tokenizer decodes the first bytes of a character to
LONGEST_CHARACTER = 4  # bytes of UTF-8, so tokens at most
_BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")  # a byte in vocabularies of SentencePiece
# Byte-level vocabularies write each byte as a character: itself where it is printable, else one from U+0100 on.
_PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_BYTE_OF = {chr(byte): byte for byte in _PRINTABLE}
_BYTE_OF |= {chr(0x100 + i): byte for i, byte in enumerate(sorted({*range(0x100)} - {*_PRINTABLE}))}


class Drawn(NamedTuple):
    """How T tokens were drawn from the model's distribution, each from that of the row before it.

    Attributes:
        entropy: (T,) in nats, of the distribution at the temperature; NaN for the first.
        gap: (T,) in nats, how much likelier the model's likeliest token is; 0 if this is it, NaN for the first.
    """

    entropy: Tensor
    gap: Tensor


class Departures(NamedTuple):
    """Tokens of greedy responses that the pass which reads them would not have written.

    Rounding decides between tokens that are equally likely, so that an engine, a batch or a cache can write others.

    Attributes:
        tokens: how many. gap: by how many nats the likeliest token is ahead of them, at most.
    """

    tokens: int = 0
    gap: float = 0.0

    @classmethod
    def of(cls, gap: Tensor) -> Departures:
        """Those of a response, from the gap of each of its tokens (Drawn)."""
        return cls(int((gap > 0).sum()), float(gap.max()))

    @classmethod
    def together(cls, parts: Iterable[Sequence[Any]]) -> Departures:
        """Those of all responses.

        Example:
            >>> Departures.together([(1, 0.5), (0, 0.0), (2, 0.25)])
            Departures(tokens=3, gap=0.5)
        """
        tokens, gaps = zip((0, 0.0), *parts, strict=True)
        return cls(sum(tokens), max(gaps))

    def record(self) -> dict[str, float]:
        """For summary.json and couplings.json, and a section of the page."""
        return {"tokens_not_the_likeliest": self.tokens, "largest_gap_nats": self.gap}


def read(
    loaded: LoadedModel,
    ids: Tensor,
    statistics: Sequence[Statistic],
    temperature: float,
    *,
    start: int,
    entropy_from: int = 0,
    **options: Any,
) -> tuple[Capture, Drawn]:
    """The statistics of one sequence and how its tokens were drawn, from one forward pass.

    Args:
        ids: (1, T) int64, prompt and response.
        statistics: MeanDistance among them.
        start: first token of the response.
        entropy_from: the first token whose row of logits is made.
        options: for `attnstats.capture`.

    Returns:
        The finished capture, and of the tokens from `entropy_from` on how they were drawn.

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
    return run, drawn(loaded, ids[0, entropy_from:], hidden[0][entropy_from:], logits[0, -1], temperature)


def drawn(loaded: LoadedModel, ids: Tensor, hidden: Tensor, last_logits: Tensor, temperature: float) -> Drawn:
    """How tokens were drawn. Logits are made `ENTROPY_ROWS` positions at a time.

    At temperature 0 entropies are those of the model's own distribution.

    Args:
        ids: (T,).
        hidden: (T, width), the last hidden states.
        last_logits: (vocabulary,), the model's logits of the last row.

    Raises:
        InputError: the logits are not the output embedding of the hidden states, with the config's scale and softcap.
    """
    with torch.no_grad():
        if not torch.allclose(_logits(loaded, hidden[-1:])[0], last_logits.float(), rtol=1e-2, atol=1e-2):
            raise InputError(
                f"--model {loaded.name}: its logits are not its output embedding of the last hidden state with a scale "
                "or softcap of its config, so that the entropy of a token cannot be computed; use another model"
            )
        first = torch.tensor([[torch.nan], [torch.nan]], dtype=torch.float32, device="cpu")
        rows = [
            _drawn(_logits(loaded, chunk), written, temperature).cpu()
            for chunk, written in zip(hidden[:-1].split(ENTROPY_ROWS), ids[1:].split(ENTROPY_ROWS), strict=True)
        ]
    return Drawn(*torch.cat([first, *rows], dim=1))


def _drawn(logits: Tensor, written: Tensor, temperature: float) -> Tensor:
    """(2, rows), entropy and gap of the tokens that were written after rows of logits."""
    entropy = torch.distributions.Categorical(logits=logits / (temperature or 1.0), validate_args=False).entropy()
    gap = logits.amax(-1) - logits.gather(-1, written[:, None].to(logits.device))[:, 0]
    return torch.stack([entropy, gap.clamp(max=torch.finfo(gap.dtype).max)])  # some models rule tokens out by -inf


def _logits(loaded: LoadedModel, hidden: Tensor) -> Tensor:
    """(rows, vocabulary) float32, the model's logits of last hidden states (rows, width)."""
    config = loaded.config.get_text_config()

    def setting(*names: str) -> float | None:
        return next((value for name in names if (value := getattr(config, name, None))), None)

    logits: Tensor = loaded.model.get_output_embeddings()(hidden).float()
    logits = logits * (setting(*FACTORS) or 1.0) / (setting(*DIVISORS) or 1.0)
    cap = setting(*SOFTCAPS)
    return cap * torch.tanh(logits / cap) if cap else logits


def pieces(tokenizer: Any, ids: list[int]) -> list[str]:
    """The text that each token adds to the tokens before it; joined, the text of all tokens.

    A token is decoded together with the one before it, because many tokenizers drop a space at the start of a text. A
    token that leaves a character unfinished adds the text before it, and the token that ends the character adds all of
    it.
    """

    def decode(part: list[int]) -> str:
        return str(tokenizer.decode(part, clean_up_tokenization_spaces=False))

    whole = decode(ids)
    added: list[str] = []
    position = origin = 0  # in `whole`: of the next token, and of the text that follows `before`
    start = settled = 0  # the tokens start .. settled have been added, and are the context of the next
    before = ""
    for end in range(1, len(ids) + 1):
        now = decode(ids[start:end])
        finished = now.rstrip(UNFINISHED) if end - settled < LONGEST_CHARACTER else now
        stop = len(whole) if end == len(ids) else max(position, origin + len(finished) - len(before))
        added.append(whole[position:stop])
        position = stop
        if len(now) > len(before) and finished == now:
            before = decode(ids[settled:end])
            start, settled, origin = settled, end, position
    return added


def shown(tokenizer: Any, ids: list[int], texts: list[str]) -> list[str]:
    """The texts of `pieces` as a reader sees them: a part of a character is shown as its bytes, such as `<0xF0>`.

    The token that ends the character shows the character.
    """
    result = list(texts)
    parts = _partial(tokenizer, ids)
    for is_partial, run in itertools.groupby(range(len(ids)), lambda i: parts[i] is not None):
        first, *_ = places = list(run)
        if is_partial:
            result[first : places[-1] + 1] = _with_bytes([parts[i] or b"" for i in places])
        elif first:
            # Where a character was never finished its replacement is in the text of the token after it.
            result[first] = texts[first].lstrip(UNFINISHED) or texts[first]
    return result


def _partial(tokenizer: Any, ids: list[int]) -> list[bytes | None]:
    """The bytes of each token that has a part of a character; None for other tokens."""
    parts: list[bytes | None] = []
    for token, name in zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True):
        text = tokenizer.decode([token], clean_up_tokenization_spaces=False)
        content = _content(str(name)) if UNFINISHED in text else None
        # U+FFFD itself is a whole character, and bytes that don't make the token's text are a name that was misread.
        if content is not None and (_is_utf8(content) or content.decode("utf-8", "replace").strip() != text.strip()):
            content = None
        parts.append(content)
    return parts


def _content(name: str) -> bytes | None:
    """The bytes that a token's name in the vocabulary stands for; None if it is no name of bytes."""
    if byte := _BYTE_TOKEN.fullmatch(name):
        return bytes([int(byte[1], 16)])
    return bytes(_BYTE_OF[character] for character in name) if set(name) <= _BYTE_OF.keys() else None


def _is_utf8(content: bytes) -> bool:
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _with_bytes(parts: list[bytes]) -> list[str]:
    """The text of consecutive tokens: each character at the token of its last byte, other bytes by their numbers."""
    owner = [i for i, part in enumerate(parts) for _ in part]
    data = b"".join(parts)
    texts = [""] * len(parts)
    position = 0
    for character in data.decode("utf-8", "surrogateescape"):
        size = len(character.encode("utf-8", "surrogateescape"))
        last = position + size - 1
        is_broken = "\udc80" <= character <= "\udcff"
        for i in range(position, last + 1):
            if is_broken or owner[i] != owner[last]:
                texts[owner[i]] += f"<0x{data[i]:02X}>"
        if not is_broken:
            texts[owner[last]] += character
        position += size
    return texts
