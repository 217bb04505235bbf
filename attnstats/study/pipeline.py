"""The main job: generate responses, read the statistics of each in one pass, and make an `Analysis` of it.

`analyze` does it in memory. The command line runs a corpus (corpus.run) with the same checks and `measurement`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnstats import heads
from attnstats.curves import delta
from attnstats.errors import InputError
from attnstats.study import corpus
from attnstats.study.analysis import Analyses, Analysis, Settings
from attnstats.study.chat import Prompt, question_of
from attnstats.study.corpus import Measure, Progress
from attnstats.study.maps import mean_maps, part_boundaries
from attnstats.study.models import LoadedModel
from attnstats.study.reading import Departures, pieces, read, shown
from attnstats.study.store import Item, begin


def analyze(
    loaded: LoadedModel,
    questions: Sequence[Prompt],
    settings: Settings,
    progress: Progress,
    timings: dict[str, float] | None = None,
) -> list[Analysis]:
    """Generate a response to each question and compute its statistics.

    Args:
        timings: gets the seconds of each stage.

    Raises:
        InputError: settings, a question or a model that cannot be used.
    """
    check_settings(settings, questions)
    check_model(settings, loaded)
    with tempfile.TemporaryDirectory() as folder:
        store = begin(Path(folder) / "run", {}, resume=False)
        prompts = corpus.rendered(loaded, questions, settings.system, settings.max_tokens)
        measure_one = measurement(loaded, questions, settings)
        corpus.run(loaded, prompts, measure_one, settings.sampling, store=store, progress=progress, timings=timings)
        store.close()
        return list(Analyses(store, len(questions)))


def measurement(
    loaded: LoadedModel, questions: Sequence[Prompt], settings: Settings, profile: heads.HeadProfile | None = None
) -> Measure:
    """`measure` in the form that corpus.run takes."""

    def measured(index: int, prompt: list[int], response: list[int]) -> Item:
        return measure(loaded, question_of(questions[index]), prompt, response, settings, profile).stored()

    return measured


def check_settings(settings: Settings, questions: Sequence[Prompt]) -> None:
    """Raises InputError for everything that can be known to be wrong without the model."""
    if not questions:
        raise InputError("no prompt: give --prompt or --prompts")
    for number, question in enumerate(questions, 1):
        if not question_of(question).strip():
            raise InputError(f"--prompt: prompt {number} is empty; write a question")
    settings.sampling.check()
    if not 0 < settings.head_share <= 0.5:
        raise InputError(f"--head-share must be in (0, 0.5], got {settings.head_share}")
    try:
        _ = settings.statistics
    except ValueError as error:
        option = "--window" if "WAAD" in str(error) else "--horizon"
        raise InputError(f"{option}: {error}") from error


def check_model(settings: Settings, loaded: LoadedModel) -> None:
    """Raises InputError for a model that can't be measured: a pass over one token finds it before generating."""
    ids = torch.zeros(1, 1, dtype=torch.long, device=loaded.device)
    try:
        run, _ = read(loaded, ids, settings.statistics, settings.temperature, start=0, layers=settings.layers)
        count = len(run.layers)
    except (TypeError, ValueError) as error:
        if str(error).startswith("--"):
            raise
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
    """The analysis of a prompt and its response: one forward pass for the statistics, another for the maps.

    Args:
        profile: its local and global heads are taken; None: those of this response.
    """
    ids = torch.tensor([prompt + response], device=loaded.device, dtype=torch.int64)
    in_response = torch.arange(ids.shape[1], dtype=torch.int64, device="cpu") >= len(prompt)
    run, drawn = read(
        loaded,
        ids,
        list(dict.fromkeys([*settings.statistics, heads.RECEIVED])),
        settings.temperature,
        start=len(prompt),
        layers=settings.layers,
        query_mask=in_response[None].to(loaded.device),
    )
    waad, fai, mean_distance, received = (
        run[statistic][:, 0].float().cpu() for statistic in (*settings.statistics, heads.RECEIVED)
    )
    measured = Measured(
        waad,
        fai,
        mean_distance,
        received,
        fai_valid=run.valid[settings.statistics[1]][0].cpu(),
        received_valid=run.valid[heads.RECEIVED][0].cpu(),
        entropy=drawn.entropy,
        layers=run.layers,
    )
    analysis = assemble(loaded.tokenizer, question, prompt, response, measured, settings.head_share, profile)
    parts = part_boundaries(analysis.tokens, len(prompt), question)
    return replace(
        analysis,
        maps=mean_maps(loaded.model, ids, in_response, analysis.classes, analysis.layers, parts),
        departures=Departures.of(drawn.gap[in_response]),
    )


class Measured(NamedTuple):
    """The statistics of T tokens, of L layers with H heads each.

    Attributes:
        waad, fai, mean_distance, received: (L, H, T) float32; received is heads.RECEIVED.
        fai_valid, received_valid: (T,) bool, where they have a value.
        entropy: (T,) in nats, of the distribution that each token was drawn from; NaN where unknown.
        layers: their numbers.
    """

    waad: Tensor
    fai: Tensor
    mean_distance: Tensor
    received: Tensor
    fai_valid: Tensor
    received_valid: Tensor
    entropy: Tensor
    layers: tuple[int, ...]


def assemble(
    tokenizer: Any,
    question: str,
    prompt: list[int],
    response: list[int],
    measured: Measured,
    head_share: float,
    profile: heads.HeadProfile | None = None,
) -> Analysis:
    """The analysis of a prompt and its response, without maps, from statistics of every head.

    Args:
        profile: its local and global heads are taken; None: those of this response.
    """
    ids = prompt + response
    in_response = torch.arange(len(ids), dtype=torch.int64, device="cpu") >= len(prompt)
    distance = heads.head_distance(measured.mean_distance, in_response)
    if profile is None:
        classes = heads.classify(distance, head_share, measured.layers)
    else:
        classes = profile.classes(head_share, measured.layers).of(measured.layers)
    waad = heads.class_mean(measured.waad, classes.local)
    tokens = pieces(tokenizer, ids)
    return Analysis(
        question=question,
        token_ids=torch.tensor(ids, dtype=torch.int64, device="cpu"),
        tokens=tokens,
        shown=shown(tokenizer, ids, tokens),
        response=in_response,
        layers=measured.layers,
        head_waad=measured.waad,
        head_fai=measured.fai,
        head_mean_distance=measured.mean_distance,
        head_received=measured.received,
        received_valid=measured.received_valid,
        received_kurtosis=heads.kurtosis(measured.received, in_response & measured.received_valid),
        distance=distance,
        classes=classes,
        waad=waad,
        fai=heads.class_mean(measured.fai, classes.global_),
        fai_valid=measured.fai_valid,
        delta=delta(waad[in_response]),
        entropy=measured.entropy,
        maps=None,
    )
