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

from attnstats.cli import options as given
from attnstats.errors import InputError
from attnstats.study.prompts import paper_prompt, read_prompts

if TYPE_CHECKING:
    from attnstats.rhythm import Chance
    from attnstats.study.couplings import Findings
    from attnstats.study.models import LoadedModel
    from attnstats.study.perturb import Overlaps, Perturbation
    from attnstats.study.shards import Shard
    from attnstats.study.store import Store

RESULTS, PROFILE = "couplings.json", "heads.json"
WIDTH = 132  # of tables that go to a file
CORPUS, PERTURBED = "corpus", "perturbed"  # folders of the stores


def add_parser(commands: Any) -> None:
    command = commands.add_parser(
        "couplings",
        help="the paper's couplings between WAAD, FAI and entropy on a corpus, beside its numbers",
        description="Generate a response to each prompt, profile the heads of all layers, and test the paper's "
        "couplings: Tables 1, 2, 10 and 20, and how they move with what the paper leaves open.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    what = command.add_argument_group("what is analysed")
    given.add_model(what)
    what.add_argument(
        "--data", type=Path, required=True, metavar="FILE",
        help=".jsonl, .csv, .parquet, a data set's folder, or text, one prompt a line",
    )  # fmt: skip
    what.add_argument("--limit", type=int, metavar="N", help="only the first N prompts")
    what.add_argument("--template", choices=("paper", "plain"), default="paper", help="Context/Question, or as it is")
    given.add_responses(what, rows="--data", max_tokens=400, temperature=0.7)
    what.add_argument("--seed", type=int, default=0, help="of the sampling, the permutations and the bootstrap")
    how = command.add_argument_group("how")
    how.add_argument("--permutations", type=int, default=2000, help="of each test, and resamples of each interval")
    how.add_argument("--perturb", action=argparse.BooleanOptionalAction, default=True, help="the test of Table 1")
    how.add_argument("--positions", type=int, default=3, help="of highest and of lowest FAI that are perturbed")
    how.add_argument("--candidates", type=int, default=3, help="tokens that are forced at each of them")
    how.add_argument("--tokens", type=int, default=64, help="length of the continuations that are compared")
    given.add_machine(how)
    out = command.add_argument_group("results")
    out.add_argument("--out", type=Path, default=Path("out/couplings"), help="folder")
    out.add_argument("--resume", action="store_true", help="go on with what is in --out, or make its tables anew")


@dataclass(frozen=True)
class Job:
    """What a run needs at every step."""

    loaded: LoadedModel
    prompts: list[list[int]]
    identity: dict[str, Any]
    terminal: Any
    shard: Shard
    timings: dict[str, float]


def run(options: argparse.Namespace) -> int:
    given.require("rich", "safetensors", "scipy")
    from rich.console import Console

    from attnstats.cli import tables
    from attnstats.report.terminal import Terminal
    from attnstats.study import shards
    from attnstats.study.corpus import stage
    from attnstats.study.couplings import examine
    from attnstats.study.perturb import summarise

    questions = _questions(options)
    chance, perturbation = _settings(options)
    shard = shards.from_environment()
    terminal = Terminal(quiet=not shard.is_first)
    terminal.say("Loading the model")
    job = _job(options, questions, terminal, shard)
    _check(options, job)
    store = _store(options, job, CORPUS, job.identity)
    try:
        _generate(options, job, store)
        shard.wait()
        with stage(job.timings, "tables"):
            findings = examine(store, job.loaded, chance)
        trials = _perturb(options, job, store, findings, perturbation) if options.perturb else []
        shard.wait()
    except KeyboardInterrupt as stop:
        done = f"{len(store.indices())} of {len(questions)} responses are done and kept in {options.out}"
        raise KeyboardInterrupt(f"{done}; go on with --resume") from stop
    if not shard.is_first:
        return 0
    names = {"the likeliest": True, "the likeliest but the one written": False}
    tested = {name: summarise(trials, chance, written) for name, written in names.items()} if options.perturb else {}
    findings.profiles.tokens.save(options.out / PROFILE)
    record = _record(options, job, findings, tested)
    (options.out / RESULTS).write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="ascii")
    console = terminal.console if terminal.console.is_terminal else Console(width=WIDTH, highlight=False)
    for part in tables.render(findings, tested):
        console.print()
        console.print(part)
    for name in (RESULTS, PROFILE):
        terminal.say(str(options.out / name))
    return 0


def _questions(options: argparse.Namespace) -> list[str]:
    if options.limit is not None and options.limit < 1:
        raise InputError(f"--limit must be at least 1, got {options.limit}")
    questions = read_prompts(options.data, options.field, "--data")[: options.limit]
    return [paper_prompt(question) for question in questions] if options.template == "paper" else questions


def _settings(options: argparse.Namespace) -> tuple[Chance, Perturbation]:
    from attnstats.rhythm import Chance
    from attnstats.study.generation import check_sampling
    from attnstats.study.perturb import Perturbation

    for name in ("permutations", "positions", "candidates", "tokens"):
        if getattr(options, name) < 1:
            raise InputError(f"--{name} must be at least 1, got {getattr(options, name)}")
    check_sampling(options.max_tokens, options.temperature, options.seed)
    chance = Chance(options.permutations, resamples=options.permutations, seed=options.seed % 2**63)
    return chance, Perturbation(options.positions, options.candidates, options.tokens)


def _job(options: argparse.Namespace, questions: list[str], terminal: Any, shard: Shard) -> Job:
    from attnstats.identity import identity as identity_of
    from attnstats.study.corpus import rendered, stage
    from attnstats.study.outputs import versions

    timings: dict[str, float] = {}
    with stage(timings, "load"):
        loaded = given.load_model(options, options.dtype, shard, terminal.say)
    prompts = rendered(loaded, questions, options.system, options.max_tokens)
    identity = {
        "command": "couplings",
        "model": {"name": loaded.name, "dtype": loaded.dtype, **asdict(identity_of(loaded.model))},
        "prompts": hashlib.sha256(json.dumps(prompts).encode()).hexdigest(),
        "settings": {name: getattr(options, name) for name in ("max_tokens", "temperature", "seed")},
        "versions": versions(),
    }
    return Job(loaded, prompts, identity, terminal, shard, timings)


def _check(options: argparse.Namespace, job: Job) -> None:
    """Raises InputError for a model that can't be measured or has too few heads, before anything is generated."""
    from attnstats.study.couplings import measure

    try:
        tensors, _ = measure(job.loaded, job.prompts[0], job.prompts[0][-1:], options.temperature)
    except (TypeError, ValueError) as error:
        said = str(error)
        raise InputError(
            said if said.startswith("--") else f"--model {job.loaded.name}: {said.removeprefix('model: ')}"
        ) from error
    if tensors["mean_distance"].shape[:2].numel() < 2:
        raise InputError(f"--model {job.loaded.name}: one head is neither local nor global; name a model of more heads")


def _store(options: argparse.Namespace, job: Job, name: str, identity: dict[str, Any]) -> Store:
    from attnstats.study.store import Store, begin

    folder = options.out / name
    resume = options.resume and (options.out / name).exists()
    return job.shard.first(lambda: begin(folder, identity, resume=resume)) or Store(folder)


def _generate(options: argparse.Namespace, job: Job, store: Store) -> None:
    from attnstats.study import corpus
    from attnstats.study.couplings import measure

    corpus.run(
        job.loaded,
        job.prompts,
        lambda index, prompt, response: measure(job.loaded, prompt, response, options.temperature),
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        seed=options.seed,
        store=store,
        progress=job.terminal,
        shard=job.shard,
        timings=job.timings,
    )


def _perturb(
    options: argparse.Namespace, job: Job, store: Store, findings: Findings, settings: Perturbation
) -> list[Overlaps]:
    """The overlaps of every response that is long enough for it; this process does its share of them."""
    from attnstats.study.corpus import stage
    from attnstats.study.couplings import Variant, curves_of
    from attnstats.study.perturb import Overlaps, choose, perturb

    done = _store(options, job, PERTURBED, {**job.identity, "perturbation": asdict(settings)})
    variant = Variant()
    curves = dict(zip(store.indices(), curves_of(store, findings.profiles, [variant]).get(variant, []), strict=False))
    choices = {index: choose(curve.fai, curve.valid("fai"), settings) for index, curve in curves.items()}
    ours = job.shard.of([(index, choice) for index, choice in choices.items() if choice is not None])
    job.terminal.start(f"Perturbing {len(ours)} responses", len(ours))
    try:
        with stage(job.timings, "perturb"):
            for index, choice in ours:
                if not done.has(index):
                    found = perturb(job.loaded, *store.response(index), choice, settings)
                    done.write(index, found._asdict(), {})
                job.terminal.advance()
    finally:
        job.terminal.finish()
    job.shard.wait()
    return [Overlaps(**tensors) for tensors, _ in done]


def _record(options: argparse.Namespace, job: Job, findings: Findings, tested: dict[str, Any]) -> dict[str, Any]:
    """couplings.json."""
    import datetime
    import os

    import torch

    from attnstats.cli.tables import as_json

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
