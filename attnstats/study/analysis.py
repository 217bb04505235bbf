"""The main job: generate a response, read its statistics in one pass over prompt and response, find its rhythm.

`fill` puts one `Analysis` per prompt into a store, which report/ draws, outputs.py makes tables of and verify.py
checks; `analyze` is the same in memory. Nothing is printed: who wants to show progress passes a `Progress`. Called by
commands/, and by anyone who wants the numbers in Python.
"""

from __future__ import annotations

import dataclasses
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from attnstats import heads, rhythm
from attnstats.curves import delta
from attnstats.errors import InputError
from attnstats.presets import paper_v2
from attnstats.statistics import FAI, WAAD, MeanDistance
from attnstats.study import corpus
from attnstats.study.corpus import Measured, Progress
from attnstats.study.generation import check_sampling
from attnstats.study.maps import Maps, mean_maps
from attnstats.study.models import LoadedModel
from attnstats.study.prompts import SYSTEM
from attnstats.study.shards import Shard
from attnstats.study.store import Store, begin, corrupt
from attnstats.transformers.capture import capture
from attnstats.transformers.selection import Layers

ENTROPY_ROWS = 64  # 64 rows of a vocabulary of 150k in fp32 are 38 MB
UNFINISHED = "\ufffd"  # what a tokenizer decodes the first bytes of a character to
LONGEST_CHARACTER = 4  # bytes of UTF-8, so tokens at most


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
        head_received: (L, H, T) per head, heads.RECEIVED: what makes receiver heads. received_valid: (T,) bool.
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
    head_received: Tensor
    received_valid: Tensor
    distance: Tensor
    classes: heads.HeadClasses
    waad: Tensor
    fai: Tensor
    fai_valid: Tensor
    delta: Tensor
    entropy: Tensor
    maps: Maps

    def stored(self) -> Measured:
        """As a store keeps it: tensors by name, and the texts."""
        tensors = {name: getattr(self, name) for name in _TENSORS}
        tensors |= {"layers": torch.tensor(self.layers), "local": self.classes.local, "global": self.classes.global_}
        tensors |= vars(self.maps)
        return tensors, {"question": self.question, "tokens": self.tokens}

    @classmethod
    def restored(cls, tensors: dict[str, Tensor], texts: dict[str, Any]) -> Analysis:
        """The analysis that `stored` gave these. Raises KeyError, TypeError, ValueError for anything else."""
        _require_whole(tensors, texts)
        return cls(
            question=str(texts["question"]),
            tokens=list(map(str, texts["tokens"])),
            layers=tuple(tensors["layers"].tolist()),
            classes=heads.HeadClasses(tensors["local"], tensors["global"]),
            maps=Maps(**{field.name: tensors[field.name] for field in dataclasses.fields(Maps)}),
            **{name: tensors[name] for name in _TENSORS},
        )

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


# The fields of an Analysis that a store keeps under their own names, and their axes: layers, heads, tokens, response.
_TENSORS = {
    "token_ids": "T",
    "response": "T",
    "head_waad": "LHT",
    "head_fai": "LHT",
    "head_mean_distance": "LHT",
    "head_received": "LHT",
    "received_valid": "T",
    "distance": "LH",
    "waad": "T",
    "fai": "T",
    "fai_valid": "T",
    "delta": "R",
    "entropy": "T",
}
_FLAGS = ("response", "fai_valid", "received_valid", "local", "global")


def _require_whole(tensors: dict[str, Tensor], texts: dict[str, Any]) -> None:
    """Raises KeyError or ValueError for what no analysis holds: tables and pages are made of it without a look."""
    layers, heads_ = tensors["distance"].shape
    sizes = {"L": layers, "H": heads_, "T": len(texts["tokens"]), "R": int(tensors["response"].count_nonzero())}
    for name, axes in {**_TENSORS, "layers": "L", "local": "LH", "global": "LH"}.items():
        tensor, shape = tensors[name], tuple(sizes[axis] for axis in axes)
        if tensor.shape != shape:
            raise ValueError(f"{name} must be {shape}, got {tuple(tensor.shape)}")
        if tensor.is_floating_point() and name != "entropy" and not tensor.isfinite().all():
            raise ValueError(f"{name} has NaN or infinite entries")
        if (tensor.dtype == torch.bool) != (name in _FLAGS):
            raise ValueError(f"{name} has dtype {tensor.dtype}")
    for name in ("response", "local", "global"):
        if not tensors[name].any():
            raise ValueError(f"{name} must be True somewhere")


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
    check(settings, loaded, questions)
    with tempfile.TemporaryDirectory() as folder:
        store = begin(Path(folder) / "run", {}, resume=False)
        prompts = corpus.rendered(loaded, questions, settings.system, settings.max_tokens)
        fill(store, loaded, questions, prompts, settings, progress, timings=timings)
        store.close()
        return list(Analyses(store, len(questions)))


def fill(
    store: Store,
    loaded: LoadedModel,
    questions: Sequence[str],
    prompts: Sequence[list[int]],
    settings: Settings,
    progress: Progress,
    profile: heads.HeadProfile | None = None,
    *,
    shard: Shard = Shard(),  # noqa: B008 frozen
    timings: dict[str, float] | None = None,
) -> None:
    """What `analyze` does, into a store and for this process's share; all was checked: `check`, `corpus.rendered`."""

    def measured(index: int, prompt: list[int], response: list[int]) -> Measured:
        return measure(loaded, questions[index], prompt, response, settings, profile).stored()

    corpus.run(
        loaded,
        prompts,
        measured,
        max_tokens=settings.max_tokens,
        temperature=settings.temperature,
        seed=settings.seed,
        store=store,
        progress=progress,
        shard=shard,
        timings=timings,
    )


class Analyses(Sequence[Analysis]):
    """The analyses of a store, each read when it is asked for: a corpus need not fit into memory."""

    def __init__(self, store: Store, count: int):
        self._store = store
        self._count = count

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, place: int) -> Analysis: ...

    @overload
    def __getitem__(self, place: slice) -> list[Analysis]: ...

    def __getitem__(self, place: int | slice) -> Analysis | list[Analysis]:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        index = range(self._count)[place]
        tensors, texts = self._store.read(index)
        try:
            return Analysis.restored(tensors, texts)
        except (KeyError, TypeError, ValueError) as error:
            raise corrupt(self._store.path(index), f"not an analysis: {error}") from error


def check(settings: Settings, loaded: LoadedModel, questions: Sequence[str]) -> None:
    """Everything that can be known to be wrong before the model has run. Raises InputError."""
    if not questions:
        raise InputError("no prompt: give --prompt or --prompts")
    for number, question in enumerate(questions, 1):
        if not question.strip():
            raise InputError(f"--prompt: prompt {number} is empty; write a question")
    check_sampling(settings.max_tokens, settings.temperature, settings.seed)
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


def measure(
    loaded: LoadedModel,
    question: str,
    prompt: list[int],
    response: list[int],
    settings: Settings,
    profile: heads.HeadProfile | None = None,
) -> Analysis:
    """One forward pass over prompt + response, and what follows from it.

    Args:
        profile: whose local and global heads are taken; None: this response decides which they are.
    """
    statistics = list(dict.fromkeys([*settings.statistics, heads.RECEIVED]))
    ids = torch.tensor([prompt + response], device=loaded.device)
    in_response = torch.arange(ids.shape[1]) >= len(prompt)
    with (
        torch.no_grad(),
        capture(
            loaded.model,
            statistics=statistics,
            layers=settings.layers,
            query_mask=in_response[None].to(loaded.device),
        ) as run,
    ):
        hidden, last_logits = hidden_states(loaded, ids)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # NaN is an error of its own below
        waad, fai, distance, received = (
            run[statistic][:, 0].float().cpu() for statistic in (*settings.statistics, heads.RECEIVED)
        )
    per_head = heads.head_distance(distance, in_response)
    if not per_head.isfinite().all():
        raise InputError(f"--dtype {loaded.dtype}: attention of {loaded.name} overflows in it; use --dtype float32")
    if profile is None:
        classes = heads.classify(per_head, settings.head_share)
    else:
        classes = profile.classes(settings.head_share, run.layers).of([profile.layers.index(i) for i in run.layers])
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
        head_received=received,
        received_valid=run.valid[heads.RECEIVED][0].cpu(),
        distance=per_head,
        classes=classes,
        waad=mean_waad,
        fai=heads.class_mean(fai, classes.global_),
        fai_valid=fai_valid,
        delta=delta(mean_waad[in_response]),
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
