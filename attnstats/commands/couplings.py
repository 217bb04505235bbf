"""`attnstats couplings`: the paper's Tables 1, 2, 10 and 20 of a model and a corpus, beside the paper's numbers.

Arguments and the order of work. What is computed is in couplings.py, rhythm.py and perturb.py, what is shown in
tables.py beside this file. Everything is kept under --out as it is done, so that a run that was stopped goes on with
--resume; couplings.json and heads.json are written at the end, and hold no text of prompts or responses.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnstats.errors import InputError
from attnstats.prompts import SYSTEM, paper_prompt, read_prompts, render

if TYPE_CHECKING:
    from attnstats.couplings import Findings
    from attnstats.models import LoadedModel
    from attnstats.perturb import Overlaps, Perturbation
    from attnstats.rhythm import Chance
    from attnstats.store import Store

RESULTS, PROFILE = "couplings.json", "heads.json"
CORPUS, PERTURBED = "corpus", "perturbed"  # folders of the stores


def add_parser(commands: Any) -> None:
    """Add the command to the subparsers of the command line."""
    command = commands.add_parser(
        "couplings",
        help="the paper's couplings between WAAD, FAI and entropy on a corpus, beside its numbers",
        description="Generate a response to each prompt, profile the heads of all layers, and test the paper's "
        "couplings: Tables 1, 2, 10 and 20, and how they move with what the paper leaves open.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    what = command.add_argument_group("what is analysed")
    what.add_argument("--model", help="local folder or hub name (default: SmolLM2-135M-Instruct, from its wheel)")
    what.add_argument("--data", type=Path, required=True, metavar="FILE", help=".jsonl with `question`, or text lines")
    what.add_argument("--limit", type=int, metavar="N", help="only the first N prompts")
    what.add_argument("--template", choices=("paper", "plain"), default="paper", help="Context/Question, or as it is")
    what.add_argument("--system", default=SYSTEM, help="system text before each question; '' for none")
    what.add_argument("--max-tokens", type=int, default=400, help="length of a response at most")
    what.add_argument("--temperature", type=float, default=0.7, help="the paper's; 0 is greedy")
    what.add_argument("--seed", type=int, default=0, help="of the sampling, the permutations and the bootstrap")
    how = command.add_argument_group("how")
    how.add_argument("--permutations", type=int, default=2000, help="of each test, and resamples of each interval")
    how.add_argument("--perturb", action=argparse.BooleanOptionalAction, default=True, help="the test of Table 1")
    how.add_argument("--positions", type=int, default=3, help="of highest and of lowest FAI that are perturbed")
    how.add_argument("--candidates", type=int, default=3, help="tokens that are forced at each of them")
    how.add_argument("--tokens", type=int, default=64, help="length of the continuations that are compared")
    how.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    how.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    out = command.add_argument_group("results")
    out.add_argument("--out", type=Path, default=Path("out/couplings"), help="folder")
    out.add_argument("--resume", action="store_true", help="go on with what is in --out, or make its tables anew")
    command.set_defaults(run=run)


@dataclass(frozen=True)
class Job:
    """What a run needs at every step."""

    loaded: LoadedModel
    prompts: list[list[int]]
    identity: dict[str, Any]
    progress: Any
    timings: dict[str, float]


def run(options: argparse.Namespace) -> int:
    """The command `couplings`."""
    try:
        import rich  # noqa: F401
        import safetensors  # noqa: F401
        import scipy  # noqa: F401
    except ImportError as error:
        raise InputError(f"{error.name} is not installed; run: pip install 'attnstats[cli]'") from error
    from attnstats.commands import tables
    from attnstats.corpus import stage
    from attnstats.couplings import examine
    from attnstats.perturb import summarise
    from attnstats.store import begin
    from attnstats.terminal import Terminal

    questions = _questions(options)
    chance, perturbation = _settings(options)
    terminal = Terminal()
    terminal.say("Loading the model")
    job = _job(options, questions, terminal)
    store = begin(options.out / CORPUS, job.identity, resume=options.resume)
    _generate(options, job, store)
    with stage(job.timings, "tables"):
        findings = examine(store, job.loaded, chance)
    tested: dict[str, Any] = {}
    if options.perturb:
        trials = _perturb(options, job, store, findings, perturbation)
        names = {"the likeliest": True, "the likeliest but the one written": False}
        tested = {name: summarise(trials, chance, written) for name, written in names.items()}
    findings.profile.save(options.out / PROFILE)
    record = _record(options, job, findings, tested)
    (options.out / RESULTS).write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="ascii")
    for part in tables.render(findings, tested):
        terminal.console.print()
        terminal.console.print(part)
    for name in (RESULTS, PROFILE):
        terminal.say(str(options.out / name))
    return 0


def _questions(options: argparse.Namespace) -> list[str]:
    if options.limit is not None and options.limit < 1:
        raise InputError(f"--limit must be at least 1, got {options.limit}")
    questions = read_prompts(options.data)[: options.limit]
    return [paper_prompt(question) for question in questions] if options.template == "paper" else questions


def _settings(options: argparse.Namespace) -> tuple[Chance, Perturbation]:
    from attnstats.perturb import Perturbation
    from attnstats.rhythm import Chance

    for name in ("permutations", "positions", "candidates", "tokens"):
        if getattr(options, name) < 1:
            raise InputError(f"--{name} must be at least 1, got {getattr(options, name)}")
    chance = Chance(options.permutations, resamples=options.permutations, seed=options.seed % 2**63)
    return chance, Perturbation(options.positions, options.candidates, options.tokens)


def _job(options: argparse.Namespace, questions: list[str], terminal: Any) -> Job:
    from transformers.utils import logging

    from attnstats import heads
    from attnstats.corpus import stage
    from attnstats.generation import check_sampling
    from attnstats.models import load
    from attnstats.outputs import versions

    # Bars and advice of transformers would stand between our lines; its errors still come.
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    check_sampling(options.max_tokens, options.temperature, options.seed)
    timings: dict[str, float] = {}
    with stage(timings, "load"):
        loaded = load(options.model, dtype=options.dtype, device=options.device, notify=terminal.say)
    prompts = [render(loaded.tokenizer, question, options.system) for question in questions]
    identity = {
        "model": {"name": loaded.name, "dtype": loaded.dtype, **asdict(heads.identity(loaded.model))},
        "prompts": hashlib.sha256(json.dumps(prompts).encode()).hexdigest(),
        "settings": {name: getattr(options, name) for name in ("max_tokens", "temperature", "seed")},
        "versions": versions(),
    }
    return Job(loaded, prompts, identity, terminal, timings)


def _generate(options: argparse.Namespace, job: Job, store: Store) -> None:
    from attnstats import corpus
    from attnstats.couplings import measure

    corpus.run(
        job.loaded,
        job.prompts,
        lambda index, prompt, response: measure(job.loaded, prompt, response, options.temperature),
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        seed=options.seed,
        store=store,
        progress=job.progress,
        timings=job.timings,
    )


def _perturb(
    options: argparse.Namespace, job: Job, store: Store, findings: Findings, settings: Perturbation
) -> list[Overlaps]:
    """The overlaps of every response that is long enough for it."""
    from attnstats.corpus import stage
    from attnstats.couplings import Variant, curves_of
    from attnstats.perturb import Overlaps, choose, perturb
    from attnstats.store import begin

    done = begin(options.out / PERTURBED, {**job.identity, "perturbation": asdict(settings)}, resume=options.resume)
    variant = Variant()
    curves = curves_of(store, findings.profile, [variant]).get(variant, [])
    trials = []
    job.progress.start(f"Perturbing {len(curves)} responses", len(curves))
    try:
        with stage(job.timings, "perturb"):
            for index, curve in zip(store.indices(), curves, strict=False):
                choice = choose(curve.fai, curve.valid("fai"), settings)
                if choice is not None:
                    if not done.has(index):
                        found = perturb(job.loaded, *store.response(index), choice, settings)
                        done.write(index, found._asdict(), {})
                    trials.append(Overlaps(**done.read(index)[0]))
                job.progress.advance()
    finally:
        job.progress.finish()
    return trials


def _record(options: argparse.Namespace, job: Job, findings: Findings, tested: dict[str, Any]) -> dict[str, Any]:
    """couplings.json."""
    import datetime
    import os

    import torch

    from attnstats.commands.tables import as_json

    names = ("template", "limit", "max_tokens", "temperature", "seed", "permutations", "perturb", "positions")
    settings = {name: getattr(options, name) for name in (*names, "candidates", "tokens")}
    return {
        "model": job.identity["model"],
        "data": options.data.name,
        "settings": settings,
        "versions": job.identity["versions"],
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "machine": {"cpus": os.cpu_count(), "threads": torch.get_num_threads(), "device": str(job.loaded.device)},
        "timings_seconds": job.timings,
        **as_json(findings, tested),
    }
