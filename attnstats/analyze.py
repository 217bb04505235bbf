"""The main job: generate a response, read its statistics in one pass over prompt and response, find its rhythm.

`analyze` takes a loaded model and prompts and returns one `Analysis` per prompt: plain data that outputs.py
writes, report/ draws and verify.py checks. It prints nothing: who wants to show progress passes a `Progress`.
Called by cli.py, and by anyone who wants the numbers in Python.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from attnstats import heads, rhythm
from attnstats.capture import capture
from attnstats.errors import InputError
from attnstats.maps import Maps, mean_maps
from attnstats.models import LoadedModel
from attnstats.presets import paper_v2
from attnstats.prompts import SYSTEM, render
from attnstats.selection import Layers
from attnstats.statistics import FAI, WAAD, MeanDistance

GENERATION_BATCH = 8
ENTROPY_ROWS = 64  # 64 rows of a vocabulary of 150k in fp32 are 38 MB
TEMPERATURES = 1e-6, 1e6  # beyond them logits / temperature over- or underflow in fp32
UNFINISHED = "\ufffd"  # what a tokenizer decodes the first bytes of a character to
LONGEST_CHARACTER = 4  # bytes of UTF-8, so tokens at most
SEEDS = -(2**63), 2**64 - 1  # what torch.manual_seed takes


@dataclass(frozen=True)
class Settings:
    """What `analyze` does with a prompt; the defaults are the paper's (presets.paper_v2).

    Attributes:
        fai_hi: None leaves the horizon of FAI open.
        layers: as `attnstats.capture` takes it.
        temperature: 0 is greedy; the seed matters above it. Entropies are of logits / temperature, at 0 of the logits.
        system: goes before every question; "" leaves it out.
    """

    window: int = paper_v2.window
    fai_lo: int = paper_v2.fai_lo
    fai_hi: int | None = paper_v2.fai_hi
    layers: Layers = "middle-third"
    head_share: float = paper_v2.head_share
    max_tokens: int = 256
    temperature: float = 0.0
    seed: int = 0
    system: str = SYSTEM

    @property
    def statistics(self) -> tuple[WAAD, FAI, MeanDistance]:
        return WAAD(self.window), FAI(self.fai_lo, self.fai_hi), MeanDistance()


@dataclass(frozen=True, eq=False)
class Analysis:
    """One prompt, its response and their statistics. T positions of prompt + response, L layers, H heads.

    Attributes:
        token_ids, tokens: what was read, (T,), and the text that each adds, as `pieces` has it.
        response: (T,) bool, the positions that were generated.
        layers: indices of the captured layers.
        head_waad, head_fai, head_mean_distance: (L, H, T) per head, as captured.
        distance: (L, H), mean attention distance of each head over the response.
        classes: which heads are local and which global.
        waad: (T,), mean over the local heads. fai: (T,), mean over the global heads, 0 where not fai_valid.
        delta: (response length,), change of WAAD to the next token.
        entropy: (T,) in nats, of the distribution each token was drawn from (drawn_entropy); NaN for the first.
        maps: mean maps of the local and of the global heads, pooled and near the diagonal.
    """

    question: str
    token_ids: Tensor
    tokens: list[str]
    response: Tensor
    layers: tuple[int, ...]
    head_waad: Tensor
    head_fai: Tensor
    head_mean_distance: Tensor
    distance: Tensor
    classes: heads.HeadClasses
    waad: Tensor
    fai: Tensor
    fai_valid: Tensor
    delta: Tensor
    entropy: Tensor
    maps: Maps

    @property
    def response_start(self) -> int:
        return int(self.response.nonzero()[0])

    @property
    def response_text(self) -> str:
        return "".join(self.tokens[self.response_start :])

    def preplan(self, count: int) -> list[int]:
        """Positions of the response with the highest WAAD: tokens that look back beyond their chunk."""
        return self._top(self.waad, None, count)

    def anchors(self, count: int) -> list[int]:
        """Positions of the response with the highest FAI: tokens that later ones keep looking at."""
        return self._top(self.fai, self.fai_valid[self.response], count)

    def _top(self, values: Tensor, valid: Tensor | None, count: int) -> list[int]:
        return [self.response_start + i for i in rhythm.top(values[self.response], count, valid)]


class Progress(Protocol):
    """Is told what goes on; `total` units of work for what can be long."""

    def start(self, what: str, total: int) -> None: ...

    def advance(self) -> None: ...

    def finish(self) -> None: ...


@contextmanager
def stage(timings: dict[str, float], name: str) -> Iterator[None]:
    """Add the seconds that the block took to `timings[name]`."""
    start = time.perf_counter()
    try:
        yield
    finally:
        timings[name] = round(timings.get(name, 0.0) + time.perf_counter() - start, 3)


def analyze(
    loaded: LoadedModel,
    questions: Sequence[str],
    settings: Settings,
    progress: Progress,
    timings: dict[str, float] | None = None,
) -> list[Analysis]:
    """Generate a response to each question and compute its statistics.

    Args:
        loaded: model and tokenizer; its attention is what it was before when this returns.
        timings: gets the seconds of each stage.

    Raises:
        InputError: settings, a question or a model that cannot be used.
    """
    timings = {} if timings is None else timings
    check(settings, loaded, questions)
    prompts = [render(loaded.tokenizer, question, settings.system) for question in questions]
    check_lengths(prompts, loaded, settings.max_tokens)
    with stage(timings, "generate"):
        responses = generate(loaded, prompts, settings, progress)
    analyses = []
    with stage(timings, "statistics"):
        progress.start("Computing statistics", len(prompts))
        for question, prompt, response in zip(questions, prompts, responses, strict=True):
            analyses.append(measure(loaded, question, prompt, response, settings))
            progress.advance()
        progress.finish()
    return analyses


def check(settings: Settings, loaded: LoadedModel, questions: Sequence[str]) -> None:
    """Everything that can be known to be wrong before the model has run. Raises InputError."""
    if not questions:
        raise InputError("no prompt: give --prompt or --prompts")
    for number, question in enumerate(questions, 1):
        if not question.strip():
            raise InputError(f"--prompt: prompt {number} is empty; write a question")
    if settings.max_tokens < 1:
        raise InputError(f"--max-tokens must be >= 1, got {settings.max_tokens}")
    coldest, hottest = TEMPERATURES
    if settings.temperature != 0 and not coldest <= settings.temperature <= hottest:
        raise InputError(
            f"--temperature must be 0 (greedy) or from {coldest:g} to {hottest:g}, got {settings.temperature}"
        )
    if not SEEDS[0] <= settings.seed <= SEEDS[1]:
        raise InputError(f"--seed must be a 64-bit integer, from -2**63 to 2**64 - 1, got {settings.seed}")
    if not 0 < settings.head_share <= 0.5:
        raise InputError(f"--head-share must be in (0, 0.5], got {settings.head_share}")
    try:
        statistics = settings.statistics
    except ValueError as error:
        option = "--window" if "WAAD" in str(error) else "--horizon"
        raise InputError(f"{option}: {error}") from error
    try:
        # One token's pass finds layers that aren't there and attention that cannot be captured, before generating.
        with torch.no_grad(), capture(loaded.model, statistics=statistics, layers=settings.layers) as run:
            loaded.model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=loaded.device), use_cache=False)
            count = len(run.layers)
    except (TypeError, ValueError) as error:
        option = "--layers" if str(error).startswith("layers") else f"--model {loaded.name}"
        raise InputError(f"{option}: {str(error).removeprefix('layers: ').removeprefix('model: ')}") from error
    if count * loaded.model.config.get_text_config().num_attention_heads < 2:
        raise InputError("--layers: one layer with one head has no local and global heads; capture more layers")


def check_lengths(prompts: list[list[int]], loaded: LoadedModel, max_tokens: int) -> None:
    """Raises InputError where a prompt and its response don't fit the positions that the model knows."""
    limit = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(map(len, prompts))
    if limit is not None and longest + max_tokens > limit:
        raise InputError(
            f"--max-tokens {max_tokens}: with a prompt of {longest} tokens that is more than the {limit} positions "
            f"of {loaded.name}; at most {max(0, limit - longest)} fit, or shorten the prompt"
        )


def generate(loaded: LoadedModel, prompts: list[list[int]], settings: Settings, progress: Progress) -> list[list[int]]:
    """The response to each prompt: token ids up to and including the end token, `max_tokens` at most."""
    torch.manual_seed(settings.seed)
    responses: list[list[int]] = []
    batches = [prompts[i : i + GENERATION_BATCH] for i in range(0, len(prompts), GENERATION_BATCH)]
    plural = "s" if len(prompts) > 1 else ""
    progress.start(
        f"Generating up to {settings.max_tokens} tokens for {len(prompts)} prompt{plural}",
        len(batches) * settings.max_tokens,
    )
    for batch in batches:
        responses += _generate_batch(loaded, batch, settings, progress)
    progress.finish()
    return responses


def _generate_batch(
    loaded: LoadedModel, prompts: list[list[int]], settings: Settings, progress: Progress
) -> list[list[int]]:
    from transformers import GenerationConfig, StoppingCriteria

    class Advance(StoppingCriteria):
        """Stops nothing: it is called once per token."""

        def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            progress.advance()
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    own = loaded.model.generation_config
    ends = end_tokens(loaded)
    config = GenerationConfig(
        max_new_tokens=settings.max_tokens,
        do_sample=settings.temperature > 0,
        # The model's own generation settings would change the distribution whose entropy is reported.
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        num_beams=1,
        **({"temperature": settings.temperature, "top_k": 0, "top_p": 1.0} if settings.temperature > 0 else {}),
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
    with torch.no_grad():
        sequences = loaded.model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            generation_config=config,
            stopping_criteria=[Advance()],
        )
    return [_until_end(row, ends) for row in sequences[:, longest:].tolist()]


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


def measure(loaded: LoadedModel, question: str, prompt: list[int], response: list[int], settings: Settings) -> Analysis:
    """One forward pass over prompt + response, and what follows from it."""
    ids = torch.tensor([prompt + response], device=loaded.device)
    in_response = torch.arange(ids.shape[1]) >= len(prompt)
    with (
        torch.no_grad(),
        capture(
            loaded.model,
            statistics=settings.statistics,
            layers=settings.layers,
            query_mask=in_response[None].to(loaded.device),
        ) as run,
    ):
        hidden, last_logits = hidden_states(loaded, ids)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # NaN is an error of its own below
        waad, fai, distance = (run[statistic][:, 0].float().cpu() for statistic in settings.statistics)
    per_head = heads.head_distance(distance, in_response)
    if not per_head.isfinite().all():
        raise InputError(f"--dtype {loaded.dtype}: attention of {loaded.name} overflows in it; use --dtype float32")
    classes = heads.classify(per_head, settings.head_share)
    fai_valid = run.valid[settings.statistics[1]][0].cpu()
    mean_waad = heads.class_mean(waad, classes.local)
    return Analysis(
        question=question,
        token_ids=ids[0].cpu(),
        tokens=pieces(loaded.tokenizer, prompt + response),
        response=in_response,
        layers=run.layers,
        head_waad=waad,
        head_fai=fai,
        head_mean_distance=distance,
        distance=per_head,
        classes=classes,
        waad=mean_waad,
        fai=heads.class_mean(fai, classes.global_),
        fai_valid=fai_valid,
        delta=rhythm.delta(mean_waad[in_response]),
        entropy=drawn_entropy(loaded, hidden, last_logits, settings.temperature),
        maps=mean_maps(loaded.model, ids, in_response, classes, run.layers),
    )


def pieces(tokenizer: Any, ids: list[int]) -> list[str]:
    """The text that each token adds to that of the tokens before it; joined, they are the text of all.

    A token is decoded behind the one before it, because many tokenizers drop a space at the start of a text. One that
    leaves a character unfinished adds "", and the token that ends the character adds all of it.
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


def hidden_states(loaded: LoadedModel, ids: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """One forward pass that makes the logits of the last position only: (T, width) states, and those logits."""
    kept: list[Tensor] = []
    body = loaded.model.base_model
    handle = body.register_forward_hook(lambda module, args, output: kept.append(output[0][0]))
    try:
        logits = loaded.model(input_ids=ids, use_cache=False, logits_to_keep=1, **options).logits
    finally:
        handle.remove()
    return kept[0], logits[0, -1]


def drawn_entropy(loaded: LoadedModel, hidden: Tensor, last_logits: Tensor, temperature: float) -> Tensor:
    """Entropy in nats of the distribution that each token was drawn from: that of the row before it.

    Greedy decoding (temperature 0) draws from nothing: there it is that of the model's own distribution. Logits are
    made `ENTROPY_ROWS` positions at a time and reduced at once.

    Raises:
        InputError: the model makes its logits otherwise than by its output embedding alone.
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
