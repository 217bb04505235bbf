"""`attnstats couplings`: the paper's Tables 1, 2, 10 and 20 of a model and a corpus, beside the paper's numbers.

The results are kept under --out as they are made, so that --resume goes on with a run that was stopped; couplings.json
and heads.json are written at the end, and hold no text of prompts or responses.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnstats.cli import arguments
from attnstats.errors import InputError
from attnstats.study.chat import Conversation, Prompt, question_of
from attnstats.study.prompts import paper_prompt, read_prompts

if TYPE_CHECKING:
    from attnstats.cli.job import Job
    from attnstats.report.terminal import Terminal
    from attnstats.study.couplings import CorpusTables
    from attnstats.study.models import LoadedModel
    from attnstats.study.perturb import Overlaps, OverlapTest, Perturbation
    from attnstats.study.reading import Departures
    from attnstats.study.store import Store

RESULTS, PROFILE = "couplings.json", "heads.json"
WIDTH = 132  # of tables that go to a file
CORPUS, PERTURBED = "corpus", "perturbed"  # folders of the stores


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "couplings",
        help="the paper's couplings between WAAD, FAI and entropy on a corpus, beside its numbers",
        description="Generate a response to each prompt, profile the heads of all layers, and test the paper's "
        "couplings: Tables 1, 2, 10 and 20, and how they change with the settings that the paper leaves open.",
    )
    subject = parser.add_argument_group("what is analysed")
    arguments.add_model(subject)
    corpus = subject.add_mutually_exclusive_group(required=True)
    corpus.add_argument("--data", type=arguments.path, metavar="FILE", help=arguments.PROMPT_FILE)
    corpus.add_argument(
        "--requests", type=arguments.path, metavar="DIR",
        help="what a vLLM server recorded with a preset; no model is loaded, and nothing is generated or perturbed",
    )  # fmt: skip
    subject.add_argument("--limit", type=int, metavar="N", help="only the first N prompts")
    subject.add_argument(
        "--template", choices=("paper", "plain"), default="paper", help="Context/Question, or the prompt as it is"
    )
    arguments.add_responses(subject, rows="--data", max_tokens=400, temperature=0.7)
    subject.add_argument("--seed", type=int, default=0, help="seed of sampling, permutations and bootstrap")
    method = parser.add_argument_group("how")
    method.add_argument("--permutations", type=int, default=2000, help="of each test, and resamples of each interval")
    method.add_argument("--perturb", action=argparse.BooleanOptionalAction, default=True, help="the test of Table 1")
    method.add_argument(
        "--positions", type=int, default=3, help="positions of highest and of lowest FAI that are perturbed"
    )
    method.add_argument("--candidates", type=int, default=3, help="tokens that are forced at each of them")
    method.add_argument("--tokens", type=int, default=64, help="length of the continuations that are compared")
    arguments.add_machine(method)
    results = parser.add_argument_group("results")
    results.add_argument("--out", type=arguments.path, default=Path("out/couplings"), help="folder")
    results.add_argument("--resume", action="store_true", help="go on with the results in --out")


def run(options: argparse.Namespace) -> int:
    arguments.require("rich", "safetensors", "scipy")
    from attnstats.chance import Chance
    from attnstats.cli import job as jobs
    from attnstats.study import corpus
    from attnstats.study.couplings import examine, measure
    from attnstats.study.generation import Sampling
    from attnstats.study.perturb import Perturbation, summarise

    if options.requests is not None:
        if arguments.check_engine(options):
            raise InputError(f"--engine {options.engine}: generates, and --requests has responses; leave it out")
        for name in ("model", "limit", "field", "resume"):
            if getattr(options, name):
                raise InputError(f"--{name}: is for --data, and --requests has responses; leave it out")
        return _run_requests(options)
    questions = _questions(options)
    _check_counts(options)
    sampling = Sampling(options.max_tokens, options.temperature, options.seed)
    sampling.check()
    chance = Chance(options.permutations, resamples=options.permutations, seed=options.seed % 2**63)
    perturbation = Perturbation(options.positions, options.candidates, options.tokens)
    job = jobs.load(
        options,
        options.dtype,
        sampling,
        lambda model: corpus.rendered(model, questions, options.system, options.max_tokens),
    )
    identity = _identity(options, job)
    _check(options, job.loaded, job.prompts[0])
    with _store(options, job, CORPUS, identity, len(job.prompts)) as store:
        job.run(
            lambda index, prompt, response: measure(job.loaded, prompt, response, options.temperature),
            sampling,
            store,
        )
        with corpus.stage(job.timings, "tables"):
            tables = examine(store, job.model, chance)
        near_ties = job.near_ties(store, sampling)
        trials = _perturb(options, job, identity, store, tables, perturbation) if options.perturb else []
        job.shard.wait()
    if not job.shard.is_first:
        return 0
    candidates = {"the likeliest": True, "the likeliest but the one written": False}
    tests = (
        {name: summarise(trials, chance, written) for name, written in candidates.items()} if options.perturb else {}
    )
    with arguments.writing(options.out, "make room and go on with --resume"):
        tables.profiles.tokens.save(options.out / PROFILE)
        record = json.dumps(_record(options, job, identity, tables, tests, near_ties), indent=1, allow_nan=False)
        (options.out / RESULTS).write_text(record + "\n", encoding="ascii")
    _show(options, job.terminal, tables, tests, [RESULTS, PROFILE])
    job.show_near_ties(near_ties)
    return 0


def _run_requests(options: argparse.Namespace) -> int:
    """The tables of the requests that a server recorded, as far as it recorded what they need."""
    from attnstats.chance import Chance
    from attnstats.cli.tables import as_json
    from attnstats.integrations.vllm.analyses import ServedRequests
    from attnstats.report.terminal import Terminal
    from attnstats.study.couplings import Variant, examine
    from attnstats.study.outputs import versions

    _check_counts(options)
    requests = ServedRequests(options.requests)
    if not Variant().needs(requests.names):
        missing = ", ".join(sorted({*Variant().tensors} - requests.names))
        raise InputError(f"--requests {options.requests}: no {missing} in them; record with the setting preset")
    chance = Chance(options.permutations, resamples=options.permutations, seed=options.seed % 2**63)
    tables = examine(requests, None, chance, requests.names)
    record = {
        "model": requests.model,
        "requests": options.requests.name,
        "left_out": requests.left_out,
        "settings": {"permutations": options.permutations, "seed": options.seed},
        "versions": versions(),
        **as_json(tables, {}),
    }
    with arguments.writing(options.out):
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / RESULTS).write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="ascii")
    _show(options, Terminal(quiet=options.quiet), tables, {}, [RESULTS])
    return 0


def _check_counts(options: argparse.Namespace) -> None:
    for name in ("permutations", "positions", "candidates", "tokens"):
        if getattr(options, name) < 1:
            raise InputError(f"--{name} must be at least 1, got {getattr(options, name)}")


def _questions(options: argparse.Namespace) -> list[Prompt]:
    if options.limit is not None and options.limit < 1:
        raise InputError(f"--limit must be at least 1, got {options.limit}")
    questions = read_prompts(options.data, options.field, "--data")[: options.limit]
    if options.template == "plain":
        return questions
    if any(isinstance(question, Conversation) for question in questions):
        raise InputError("--template paper: is for questions, and --data has lists of messages; use --template plain")
    return [paper_prompt(question_of(question)) for question in questions]


def _identity(options: argparse.Namespace, job: Job) -> dict[str, Any]:
    """Everything that decides the numbers, which a run must share with the one that it resumes."""
    from attnstats.cli.job import run_identity

    return {
        "command": "couplings",
        "settings": {name: getattr(options, name) for name in ("max_tokens", "temperature", "seed")},
        "versions": job.versions,
        **run_identity(job, options.system),
    }


def _check(options: argparse.Namespace, loaded: LoadedModel, prompt: list[int]) -> None:
    """Raises InputError for a model that can't be measured or has too few heads, before anything is generated."""
    from attnstats.study.couplings import measure

    try:
        tensors, _ = measure(loaded, prompt, prompt[-1:], options.temperature)
    except (TypeError, ValueError) as error:
        message = str(error)
        if not message.startswith("--"):
            message = f"--model {loaded.name}: {message.removeprefix('model: ')}"
        raise InputError(message) from error
    if tensors["mean_distance"].shape[:2].numel() < 2:
        raise InputError(f"--model {loaded.name}: one head is neither local nor global; name a model of more heads")


def _store(
    options: argparse.Namespace, job: Job, name: str, identity: dict[str, Any], total: int
) -> AbstractContextManager[Store]:
    """The store of a folder in --out, new or resumed."""
    from attnstats.study.store import begin

    folder = options.out / name
    resume = options.resume and folder.exists()
    return job.store(lambda: begin(folder, identity, resume=resume), folder, total)


def _perturb(
    options: argparse.Namespace,
    job: Job,
    identity: dict[str, Any],
    store: Store,
    tables: CorpusTables,
    settings: Perturbation,
) -> list[Overlaps]:
    """The overlaps of every response that is long enough; this process computes its share of them."""
    from attnstats.study.corpus import stage, task
    from attnstats.study.couplings import Variant, curves_of
    from attnstats.study.perturb import Overlaps, choose_positions, perturb

    curves = curves_of(store, tables.profiles, Variant())
    chosen = {
        index: choose_positions(curve.fai, curve.valid("fai"), settings)
        for index, curve in zip(store.indices(), curves, strict=False)
    }
    ours = job.shard.of([(index, positions) for index, positions in chosen.items() if positions is not None])
    with _store(options, job, PERTURBED, {**identity, "perturbation": asdict(settings)}, len(chosen)) as done:
        with task(job.terminal, f"Perturbing {len(ours)} responses", len(ours)), stage(job.timings, "perturb"):
            for index, positions in ours:
                if not done.has(index):
                    overlaps = perturb(job.loaded, *store.response(index), positions, settings)
                    done.write(index, overlaps._asdict(), {})
                job.terminal.advance()
        job.shard.wait()
        return [Overlaps(**tensors) for tensors, _ in done]


def _record(
    options: argparse.Namespace,
    job: Job,
    identity: dict[str, Any],
    tables: CorpusTables,
    tests: dict[str, OverlapTest],
    near_ties: Departures | None,
) -> dict[str, Any]:
    """couplings.json."""
    import datetime
    import os

    import torch

    from attnstats.cli.tables import as_json

    names = ("template", "limit", "max_tokens", "temperature", "seed", "permutations", "perturb", "positions")
    return {
        "model": identity["model"],
        "data": options.data.name,
        "settings": {name: getattr(options, name) for name in (*names, "candidates", "tokens")},
        "versions": identity["versions"],
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "machine": {"cpus": os.cpu_count(), "threads": torch.get_num_threads(), "device": str(job.loaded.device)},
        "timings_seconds": job.timings,
        **({"near_ties": near_ties.record()} if near_ties else {}),
        **as_json(tables, tests),
    }


def _show(
    options: argparse.Namespace,
    terminal: Terminal,
    tables: CorpusTables,
    tests: dict[str, OverlapTest],
    files: Sequence[str],
) -> None:
    """Print the tables and the names of the files."""
    from attnstats.cli.tables import render
    from attnstats.report.terminal import PlainConsole

    console = (
        terminal.console
        if terminal.console.is_terminal
        else PlainConsole(width=WIDTH, highlight=False, quiet=options.quiet)
    )
    for part in render(tables, tests):
        console.print()
        console.print(part)
    for name in files:
        terminal.say(str(options.out / name))
