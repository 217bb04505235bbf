"""`attnstats analyze`: statistics of a model's reasoning as tables, tensors and a report.

Under torchrun or `accelerate launch` each process takes its share of the prompts, and the first one writes the tables
and the report when all are done.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
from collections.abc import Callable, Container, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attnstats
from attnstats.cli import arguments
from attnstats.errors import InputError
from attnstats.presets import PRESETS, paper_v2
from attnstats.run import FinishedRun, load
from attnstats.study.chat import brief
from attnstats.study.prompts import QUESTIONS, read_prompts
from attnstats.study.text import counted

if TYPE_CHECKING:
    from attnstats.chance import Coupling
    from attnstats.cli.job import Job
    from attnstats.heads import HeadProfile
    from attnstats.study.analysis import Analysis, Settings
    from attnstats.study.chat import Prompt
    from attnstats.study.given import Given
    from attnstats.study.models import Description
    from attnstats.study.reading import Departures
    from attnstats.study.store import Store
    from attnstats.study.verify import Error

DIFFERENT = 1  # exit code


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "analyze",
        help="statistics of a model's reasoning as tables, tensors and a report",
        description="Generate responses, read their attention statistics in one pass each, and write tokens and heads "
        "as .csv and .parquet, items/*.safetensors, summary.json and report.html.",
    )
    subject = parser.add_argument_group("what is analysed")
    arguments.add_model(subject)
    prompts = subject.add_mutually_exclusive_group()
    prompts.add_argument(
        "--prompt", action="append", type=arguments.text, help="a question; can be given more than once"
    )
    prompts.add_argument("--prompts", type=arguments.path, metavar="FILE", help=arguments.PROMPT_FILE)
    prompts.add_argument(
        "--text", type=arguments.path, metavar="FILE", help="a text that exists already; nothing is generated"
    )
    prompts.add_argument(
        "--messages", type=arguments.path, metavar="FILE",
        help="chats that exist already, .json or .jsonl; the last answer of each is analysed",
    )  # fmt: skip
    subject.add_argument(
        "--response-from", type=arguments.text, metavar="PLACE",
        help="of --text: where the response starts, a number of characters or a text before it, such as '<think>' "
        "(default: the whole text)",
    )  # fmt: skip
    subject.add_argument(
        "--response-role", type=arguments.text, metavar="ROLE",
        help="of --messages: the last message of this role is the response (default: the answer at the end)",
    )  # fmt: skip
    arguments.add_responses(subject, rows="--prompts", max_tokens=256, temperature=0.0)
    subject.add_argument("--seed", type=int, default=0, help="seed of the sampling, for a temperature above 0")
    method = parser.add_argument_group("how; defaults are those of the preset")
    method.add_argument("--preset", choices=sorted(PRESETS, reverse=True), default=paper_v2.name, help="settings")
    method.add_argument("--window", type=int, help="W of WAAD, in tokens")
    method.add_argument("--horizon", nargs=2, metavar=("LO", "HI"), help="of FAI, in tokens; HI can be `open`")
    method.add_argument("--layers", help="middle-third, all, or a list such as 9,11,14-16")
    method.add_argument("--head-share", type=float, help="share of heads that are local, and that are global")
    method.add_argument(
        "--head-profile", type=arguments.path, metavar="FILE",
        help="heads.json of a corpus: its heads are local and global, not those of each response",
    )  # fmt: skip
    arguments.add_machine(method)
    results = parser.add_argument_group("results")
    results.add_argument(
        "--out", type=arguments.path, default=Path("out/analysis"), help="folder; replaced when all is done"
    )
    results.add_argument("--resume", action="store_true", help="go on with a run that was interrupted")
    arguments.add_color(results)
    results.add_argument("--verify", action="store_true", help="recompute with eager attention, and compare the errors")


def settings_from(options: argparse.Namespace) -> Settings:
    """The preset with the given options in its place. Raises InputError."""
    from attnstats.study.analysis import Settings

    if options.preset not in PRESETS:
        raise InputError(f"--preset {options.preset}: no such preset; there are {', '.join(PRESETS)}")
    preset = PRESETS[options.preset]
    lo, hi = (preset.fai_lo, preset.fai_hi) if options.horizon is None else arguments.parse_horizon(*options.horizon)
    return Settings(
        window=preset.window if options.window is None else options.window,
        fai_lo=lo,
        fai_hi=hi,
        layers=arguments.parse_layers(preset.layers if options.layers is None else options.layers),
        head_share=preset.head_share if options.head_share is None else options.head_share,
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        seed=options.seed,
        system=options.system,
    )


def analyze(
    model: str | PathLike[str] | None = None,
    *,
    prompts: Sequence[str] | str | PathLike[str] | None = None,
    text: str | PathLike[str] | Sequence[int] | Any = None,
    messages: str | PathLike[str] | Sequence[Any] | None = None,
    out: str | PathLike[str] = "out/analysis",
    quiet: bool = True,
    **options: Any,
) -> FinishedRun:
    """`attnstats.analyze`."""
    parser = argparse.ArgumentParser(prog="attnstats.analyze", exit_on_error=False)
    add_parser(parser.add_subparsers())
    chosen = parser.parse_args(["analyze"])
    if sum(each is not None for each in (prompts, text, messages)) > 1:
        raise InputError("prompts, text and messages: give one of them")
    if unknown := sorted(options.keys() - vars(chosen).keys()):
        raise InputError(f"{unknown[0]}: no such option; there are {', '.join(sorted(vars(chosen)))}")
    given: dict[str, Any] = {"model": None if model is None else str(model), "out": Path(out), "quiet": quiet}
    if isinstance(prompts, (str, PathLike)):
        given["prompts"] = Path(prompts)
    elif prompts is not None:
        given["prompt"] = _questions(prompts)
    if options.get("horizon") is not None:
        options["horizon"] = _horizon(options["horizon"])
    if options.get("response_from") is not None:
        options["response_from"] = str(options["response_from"])
    if not isinstance(options.get("layers", ""), str):
        options["layers"] = ",".join(map(str, options["layers"]))
    if isinstance(text, str) and _names_a_file(text):
        raise InputError(f"text: {text!r} is a file; write text=Path({text!r}) to read it")
    given["text"] = Path(text) if isinstance(text, PathLike) else text
    given["messages"] = Path(messages) if isinstance(messages, (str, PathLike)) else messages
    vars(chosen).update(options | given)
    try:
        run(chosen)
    except InputError as error:
        raise InputError(_in_python(str(error), vars(chosen))) from error
    return load(chosen.out)


def _names_a_file(text: str) -> bool:
    """Whether a text is the name of a file that is there. No text with a blank is taken for one."""
    return not any(map(str.isspace, text)) and os.path.isfile(text)  # noqa: PTH113 False for a name that no file has


def _in_python(message: str, names: Container[str]) -> str:
    """A message about the command's options with the names that the function has for them."""

    def argument(option: re.Match[str]) -> str:
        name = option[1].replace("-", "_")
        return {"prompt": "prompts", "resume": "resume=True"}.get(name, name) if name in names else option[0]

    return re.sub(r"(?<![\w-])--([a-z][a-z-]*)", argument, message)


def _questions(prompts: Sequence[str]) -> list[str]:
    """Raises InputError for anything but texts, one at least."""
    questions = list(prompts)
    if not questions:
        raise InputError("prompts: is empty; give a question, or leave it out for three of ours")
    for number, question in enumerate(questions, 1):
        if not isinstance(question, str):
            raise InputError(f"prompts: number {number} must be a text, got {brief(question)}")
    return questions


def _horizon(horizon: Any) -> list[str]:
    """FAI's horizon as the command has it. Raises InputError."""
    if not isinstance(horizon, Sequence) or len(horizon) != 2:
        raise InputError(f"horizon: needs two whole numbers, or a number and None, got {brief(horizon)}")
    return ["open" if end is None else str(end) for end in horizon]


def run(options: argparse.Namespace) -> int:
    arguments.require("jinja2", "pyarrow", "rich", "safetensors", "scipy")
    from attnstats.report import columns
    from attnstats.study import outputs

    if options.field is not None and options.prompts is None:
        raise InputError(f"--field {options.field}: is for a file of --prompts; give one, or leave it out")
    if options.response_from is not None and options.text is None:
        raise InputError(f"--response-from {options.response_from}: is for --text; give that, or leave it out")
    if options.response_role is not None and options.messages is None:
        raise InputError(f"--response-role {options.response_role}: is for --messages; give that, or leave it out")
    existing = _existing(options)
    if arguments.check_engine(options) and existing is not None:
        raise InputError(f"--engine {options.engine}: generates, and the {_subject(options)} exists; leave it out")
    questions: list[Prompt] = options.prompt or list(QUESTIONS)
    if options.prompts:
        questions = list(read_prompts(options.prompts, options.field))
    settings = settings_from(options)
    if options.verify and options.dtype not in ("auto", "float32"):
        raise InputError(f"--dtype {options.dtype}: --verify compares in float32; leave --dtype out")
    # A bad --color-by or --out is refused before anything takes time.
    columns.find(options.color_by)
    folder = outputs.workplace(options.out)
    from attnstats.cli import job as jobs
    from attnstats.identity import digest
    from attnstats.study import corpus, given, pipeline

    pipeline.check_settings(settings, questions)

    def prepare(model: Description) -> list[list[int]]:
        if existing is None:
            return corpus.rendered(model, questions, options.system, options.max_tokens)
        responses.extend(existing(model.tokenizer))
        given.check(responses, model)
        questions[:] = [each.question for each in responses]
        return [each.prompt for each in responses]

    responses: list[given.Given] = []
    subject = _subject(options)
    job = jobs.load(options, "float32" if options.verify else options.dtype, settings.sampling, prepare)
    pipeline.check_model(settings, job.loaded)
    profile = _profile(options, settings, job)
    identity, total = _identity(job, settings, profile), len(questions)
    if responses:
        identity["responses"] = digest([each.response for each in responses])
    for left_out in _left_out(responses):
        job.terminal.say(f"left out: {left_out}")
    if options.resume and outputs.is_finished(options.out, identity, total):
        job.terminal.say(f"{options.out} is finished; attnstats report {options.out} shows it and draws its page again")
        return 0
    with job.store(lambda: outputs.open_store(options.out, identity, resume=options.resume), folder, total) as store:
        for index, each in enumerate(responses):
            if not store.has_response(index):
                store.write_response(index, each.prompt, each.response)
        job.run(pipeline.measurement(job.loaded, questions, settings, profile), settings.sampling, store, subject)
        if not job.shard.is_first:
            return 0
        analyses, errors, near_ties = _conclude(options, settings, job, store, total, responses)
    files = [options.out / name for name in outputs.FILES]
    job.terminal.show(analyses, files, total, color_by=options.color_by)
    job.show_near_ties(near_ties)
    if not errors:
        return 0
    job.terminal.show_errors(errors)
    return 0 if all(error.passes for error in errors.values()) else DIFFERENT


def _existing(options: argparse.Namespace) -> Callable[[Any], list[Given]] | None:
    """A function that makes the responses of --text or --messages with a tokenizer; None: they are generated.

    What can be known to be wrong without the tokenizer is refused here. Raises InputError.
    """
    from attnstats.study import given

    start = options.response_from
    if isinstance(options.text, (str, Path)):
        where = f"--text {options.text}" if isinstance(options.text, Path) else "text"
        text = given.read_text(options.text) if isinstance(options.text, Path) else options.text
        given.response_span(text, start, where)
        return lambda tokenizer: [given.of_text(tokenizer, text, start, where)]
    if options.text is not None:
        ids = given.token_ids(options.text)
        if ids is None or not (start is None or start.isdecimal()):
            raise InputError("text: must be a text, a Path or token ids; of these response_from is a number of tokens")
        of_ids = given.of_ids(ids, 1 if start is None else int(start), "text")
        return lambda _: [of_ids]
    if options.messages is None:
        return None
    is_file = isinstance(options.messages, Path)
    where = f"--messages {options.messages}" if is_file else "messages"
    rows = given.read_chats(options.messages) if is_file else options.messages
    chats = given.chats(rows, where, options.response_role)
    return lambda tokenizer: [
        given.of_chat(tokenizer, chat, options.system, f"{where}, chat {number}")
        for number, chat in enumerate(chats, 1)
    ]


def _subject(options: argparse.Namespace) -> str:
    """What a run calls one of what it analyses; only a prompt is answered."""
    return "text" if options.text is not None else "chat" if options.messages is not None else "prompt"


def _left_out(responses: Sequence[Given]) -> list[str]:
    """What is not read of responses that exist already, in words."""
    return [each.left_out for each in responses if each.left_out]


def _used(settings: Settings, responses: Sequence[Given]) -> dict[str, Any]:
    """The settings that decide the numbers of a run: those of sampling don't where responses exist already.

    A temperature other than 0 does, as entropies are those at it.
    """
    unused = {"max_tokens", "seed"} if responses else set()
    unused |= {"temperature"} if responses and not settings.temperature else set()
    unused |= {"system"} if responses and not any(each.takes_system for each in responses) else set()
    return {name: value for name, value in dataclasses.asdict(settings).items() if name not in unused}


def _profile(options: argparse.Namespace, settings: Settings, job: Job) -> HeadProfile | None:
    """The profile of --head-profile, checked for the model and the captured layers. Raises InputError."""
    if options.head_profile is None:
        return None
    from attnstats.heads import HeadProfile
    from attnstats.transformers.selection import resolve_layers

    profile = HeadProfile.load(options.head_profile, job.model)
    layers = resolve_layers(settings.layers, tuple(range(profile.model.layers))) if profile.model else ()
    try:
        profile.classes(settings.head_share, layers)
    except ValueError as error:
        raise InputError(f"--head-profile {options.head_profile}: {error}; make one of these layers") from error
    return profile


def _identity(job: Job, settings: Settings, profile: HeadProfile | None) -> dict[str, Any]:
    """Everything that decides the numbers, which a run must share with the one that it resumes."""
    from attnstats.cli.job import run_identity

    return {
        "command": "analyze",
        "attnstats": attnstats.__version__,
        "settings": dataclasses.asdict(settings),
        "head_profile": None if profile is None else profile.distance.tolist(),
        **run_identity(job, settings.system),
    }


def _conclude(
    options: argparse.Namespace, settings: Settings, job: Job, store: Store, total: int, responses: Sequence[Given]
) -> tuple[list[Analysis], dict[str, Error], Departures | None]:
    """Write tables, report and summary of a full store and rename it to --out.

    Returns:
        The first analyses, with --verify the largest errors, and the near-ties of greedy decoding.
    """
    from attnstats import report
    from attnstats.study import findings, outputs
    from attnstats.study.analysis import Analyses
    from attnstats.study.corpus import stage, task
    from attnstats.study.verify import errors

    analyses = Analyses(store, total)
    largest: dict[str, Error] = {}
    if options.verify:
        with stage(job.timings, "verify"):
            largest = errors(job.loaded, analyses, settings, job.terminal)
    with arguments.writing(options.out, "make room and go on with --resume"):
        with (
            stage(job.timings, "tables"),
            task(job.terminal, f"Tables of {counted(total, _subject(options))}", total),
        ):
            profile = findings.profile(analyses.head_summaries(), job.model)
            couplings = findings.tabulate(store.folder, analyses.outlines(), profile, advance=job.terminal.advance)
        near_ties = None if responses else job.near_ties(store, settings.sampling)
        summary = _summary(options, settings, job, profile, couplings, largest, responses, near_ties)
        page = report.render(analyses, settings, summary, couplings)
        outputs.write_summary(store.folder, summary)
        profile.save(store.folder / outputs.PROFILE)
        (store.folder / outputs.REPORT).write_text(page, encoding="utf-8")
    shown = analyses[: arguments.SHOWN]
    outputs.finish(store, options.out)
    return shown, largest, near_ties


def _summary(
    options: argparse.Namespace,
    settings: Settings,
    job: Job,
    profile: HeadProfile,
    couplings: Sequence[Coupling],
    errors: Mapping[str, Error],
    responses: Sequence[Given],
    near_ties: Departures | None,
) -> dict[str, Any]:
    """summary.json."""
    from attnstats.study.outputs import FILES, coupling_record, peak_memory

    loaded = job.loaded
    largest_errors = {
        name: {of: x if x < float("inf") else "infinite" for of, x in error._asdict().items()}
        for name, error in errors.items()
    }
    return {
        "model": {"name": loaded.name, "dtype": loaded.dtype, "device": str(loaded.device)},
        "subject": _subject(options),
        **({"left_out": left_out} if (left_out := _left_out(responses)) else {}),
        "settings": {"preset": options.preset, **_used(settings, responses)},
        "versions": job.versions,
        "timings_seconds": job.timings,
        "peak_memory_bytes": peak_memory(),
        "files": list(FILES),
        **({"largest_errors_against_float64": largest_errors} if errors else {}),
        **({"near_ties": near_ties.record()} if near_ties else {}),
        "layers": list(profile.layers),
        "prompts": profile.sequences,
        "response_tokens": profile.rows,
        "couplings": list(map(coupling_record, couplings)),
    }
