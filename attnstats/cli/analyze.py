"""`attnstats analyze`: statistics of a model's reasoning as tables, tensors and a report.

Under torchrun or `accelerate launch` each process takes its share of the prompts, and the first one writes the tables
and the report when all are done.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attnstats
from attnstats.cli import options as given
from attnstats.errors import InputError
from attnstats.presets import PRESETS, paper_v2
from attnstats.study.prompts import QUESTIONS, read_prompts

if TYPE_CHECKING:
    from attnstats.heads import HeadProfile
    from attnstats.report.terminal import Terminal
    from attnstats.study.analysis import Analysis, Settings
    from attnstats.study.models import LoadedModel
    from attnstats.study.store import Store

DIFFERENT = 1


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "analyze",
        help="statistics of a model's reasoning as tables, tensors and a report",
        description="Generate responses, read their attention statistics in one pass each, and write tokens and heads "
        "as .csv and .parquet, items/*.safetensors, summary.json and report.html.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    what = parser.add_argument_group("what is analysed")
    given.add_model(what)
    asked = what.add_mutually_exclusive_group()
    asked.add_argument("--prompt", action="append", help="a question; can be given more than once")
    asked.add_argument(
        "--prompts", type=Path, metavar="FILE", help=".jsonl, .csv, .parquet, a data set's folder, or text, one a line"
    )
    given.add_responses(what, rows="--prompts", max_tokens=256, temperature=0.0)
    what.add_argument("--seed", type=int, default=0, help="of the sampling, where the temperature is above 0")
    how = parser.add_argument_group("how; what is not given is the preset's")
    how.add_argument("--preset", choices=sorted(PRESETS, reverse=True), default=paper_v2.name, help="settings")
    how.add_argument("--window", type=int, help="W of WAAD, in tokens")
    how.add_argument("--horizon", nargs=2, metavar=("LO", "HI"), help="of FAI, in tokens; HI can be `open`")
    how.add_argument("--layers", help="middle-third, all, or a list such as 9,11,14-16")
    how.add_argument("--head-share", type=float, help="share of heads that are local, and that are global")
    how.add_argument(
        "--head-profile", type=Path, metavar="FILE",
        help="heads.json of a corpus: its heads are local and global, not each response's own",
    )  # fmt: skip
    given.add_machine(how)
    out = parser.add_argument_group("results")
    out.add_argument("--out", type=Path, default=Path("out/analysis"), help="folder; replaced when all is done")
    out.add_argument("--resume", action="store_true", help="go on with a run that was interrupted")
    given.add_color(out)
    out.add_argument("--verify", action="store_true", help="recompute with eager attention and compare")


def settings_from(options: argparse.Namespace) -> Settings:
    """The preset with the given options in their place. Raises InputError."""
    from attnstats.study.analysis import Settings

    preset = PRESETS[options.preset]
    lo, hi = (preset.fai_lo, preset.fai_hi) if options.horizon is None else given.parse_horizon(*options.horizon)
    return Settings(
        window=preset.window if options.window is None else options.window,
        fai_lo=lo,
        fai_hi=hi,
        layers=given.parse_layers(preset.layers if options.layers is None else options.layers),
        head_share=preset.head_share if options.head_share is None else options.head_share,
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        seed=options.seed,
        system=options.system,
    )


def run(options: argparse.Namespace) -> int:
    given.require("jinja2", "pandas", "pyarrow", "rich", "safetensors", "scipy")
    from attnstats.report.terminal import Terminal
    from attnstats.study import outputs, shards

    if options.field is not None and options.prompts is None:
        raise InputError(f"--field {options.field}: is for --prompts FILE; give that, or leave it out")
    questions = read_prompts(options.prompts, options.field) if options.prompts else options.prompt or list(QUESTIONS)
    settings = settings_from(options)
    if options.verify and options.dtype not in ("auto", "float32"):
        raise InputError(f"--dtype {options.dtype}: --verify compares in float32; leave --dtype out")
    given.check_color(options)
    shard = shards.from_environment()
    terminal = Terminal(quiet=not shard.is_first)
    outputs.workplace(options.out)  # before anything takes time
    terminal.say("Loading the model")
    from attnstats.study import analysis as analyze
    from attnstats.study import corpus

    timings: dict[str, float] = {}
    with corpus.stage(timings, "load"):
        loaded = given.load_model(options, "float32" if options.verify else options.dtype, shard, terminal.say)
    analyze.check(settings, loaded, questions)
    profile = _profile(options, settings, loaded)
    prompts = corpus.rendered(loaded, questions, settings.system, settings.max_tokens)
    same = decides(loaded, settings, prompts, profile)
    if options.resume and outputs.is_finished(options.out, same, len(prompts)):
        terminal.say(f"{options.out} is finished; attnstats report {options.out} shows it and draws its page again")
        return 0
    with given.kept(options, same, shard, len(prompts)) as store:
        analyze.fill(store, loaded, questions, prompts, settings, terminal, profile, shard=shard, timings=timings)
        shard.wait()
        if not shard.is_first:
            return 0
        analyses, different = _conclude(options, settings, loaded, store, len(prompts), timings, terminal)
    terminal.show(analyses, [options.out / name for name in outputs.FILES], color_by=options.color_by)
    if not different:
        return 0
    from attnstats.study.verify import TOLERANCE

    terminal.show_differences(different, TOLERANCE)
    return DIFFERENT if max(different.values()) > TOLERANCE else 0


def _profile(options: argparse.Namespace, settings: Settings, loaded: LoadedModel) -> HeadProfile | None:
    """The profile that was given, for the model and the layers that are captured. Raises InputError."""
    if options.head_profile is None:
        return None
    from attnstats.heads import HeadProfile
    from attnstats.transformers.selection import resolve_layers

    profile = HeadProfile.load(options.head_profile, loaded.model)
    layers = resolve_layers(settings.layers, tuple(range(profile.model.layers))) if profile.model else ()
    try:
        profile.classes(settings.head_share, layers)
    except ValueError as error:
        raise InputError(f"--head-profile {options.head_profile}: {error}; make one of these layers") from error
    return profile


def decides(
    loaded: LoadedModel, settings: Settings, prompts: list[list[int]], profile: HeadProfile | None
) -> dict[str, Any]:
    """All that decides the numbers: what a run that is resumed must have in common with the one before."""
    from attnstats.identity import identity

    return {
        "command": "analyze",
        "attnstats": attnstats.__version__,
        "model": {
            "name": loaded.name,
            "dtype": loaded.dtype,
            "device": loaded.device.type,
            **dataclasses.asdict(identity(loaded.model)),
        },
        "settings": dataclasses.asdict(settings),
        "head_profile": None if profile is None else profile.distance.tolist(),
        "prompts": {"count": len(prompts), "sha256": hashlib.sha256(json.dumps(prompts).encode()).hexdigest()},
    }


def _conclude(
    options: argparse.Namespace,
    settings: Settings,
    loaded: LoadedModel,
    store: Store,
    total: int,
    timings: dict[str, float],
    terminal: Terminal,
) -> tuple[list[Analysis], dict[str, float]]:
    """Tables, report and summary of a store that is full, in their place: the first analyses, and what differs."""
    from attnstats import report
    from attnstats.identity import identity
    from attnstats.study import findings, outputs
    from attnstats.study.analysis import Analyses

    analyses = Analyses(store, total)
    different = _verify(loaded, analyses, settings, timings, terminal) if options.verify else {}
    summary = _summary(options, settings, loaded, analyses, timings, different)
    profile = findings.profile(analyses, identity(loaded.model))
    page = report.render(analyses, settings, summary, findings.coupled(analyses, profile))
    try:
        outputs.write_tables(store.folder, analyses)
        outputs.write_summary(store.folder, summary)
        profile.save(store.folder / outputs.PROFILE)
        (store.folder / outputs.REPORT).write_text(page, encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"--out {options.out}: {error.strerror or error}; make room and go on with --resume"
        ) from error
    shown = analyses[: given.SHOWN]
    outputs.finish(store, options.out)
    return shown, different


def _verify(
    loaded: LoadedModel,
    analyses: Sequence[Analysis],
    settings: Settings,
    timings: dict[str, float],
    terminal: Terminal,
) -> dict[str, float]:
    from attnstats.study.corpus import stage
    from attnstats.study.verify import differences

    with stage(timings, "verify"):
        return differences(loaded, analyses, settings, terminal)


def _summary(
    options: argparse.Namespace,
    settings: Settings,
    loaded: LoadedModel,
    analyses: Sequence[Analysis],
    timings: dict[str, float],
    different: dict[str, float],
) -> dict[str, Any]:
    from attnstats.study.outputs import FILES, peak_memory, versions

    finite = {name: value if value < float("inf") else "infinite" for name, value in different.items()}
    return {
        "model": {"name": loaded.name, "dtype": loaded.dtype, "device": str(loaded.device)},
        "settings": {"preset": options.preset, **dataclasses.asdict(settings)},
        "versions": versions(),
        "timings_seconds": timings,
        "peak_memory_bytes": peak_memory(),
        "files": list(FILES),
        **({"largest_difference_from_eager": finite} if different else {}),
        "prompts": [
            {
                "question": analysis.question,
                "response": analysis.response_text,
                "prompt_tokens": analysis.response_start,
                "response_tokens": int(analysis.response.sum()),
                "layers": list(analysis.layers),
                "preplan_positions": analysis.preplan(10),
                "anchor_positions": analysis.anchors(10),
            }
            for analysis in analyses
        ],
    }
