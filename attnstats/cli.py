"""The command line: `attnstats analyze`. Arguments, terminal output and exit codes; the work is in analyze.py.

Exit codes: 0, or 2 for bad input (one line on stderr, no traceback), 1 when --verify finds a difference, 130 on
Ctrl-C. What a fault of ours raises keeps its traceback. Heavy imports wait until the arguments are known to be good.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import attnstats
from attnstats.errors import InputError
from attnstats.presets import PRESETS, paper_v2
from attnstats.prompts import QUESTIONS, SYSTEM, read_prompts

if TYPE_CHECKING:
    from attnstats.analyze import Settings
    from attnstats.selection import Layers

BAD_INPUT, DIFFERENT, INTERRUPTED = 2, 1, 130


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see {self.prog} --help)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    try:
        options = parser().parse_args(arguments)
        return run_analyze(options)
    except InputError as error:
        print(f"attnstats: error: {' '.join(str(error).split())}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("attnstats: interrupted; nothing was written", file=sys.stderr)
        return INTERRUPTED


def parser() -> argparse.ArgumentParser:
    """The arguments of every command."""
    top = Parser(prog="attnstats", description="Statistics of attention without the T x T map.", allow_abbrev=False)
    top.add_argument("--version", action="version", version=f"attnstats {attnstats.__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    analyze = commands.add_parser(
        "analyze",
        help="statistics of a model's reasoning as tables, tensors and a report",
        description="Generate responses, read their attention statistics in one pass each, and write "
        "tokens.csv, heads.csv, stats.safetensors, summary.json and report.html.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    what = analyze.add_argument_group("what is analysed")
    what.add_argument("--model", help="local folder or hub name (default: SmolLM2-135M-Instruct, from its wheel)")
    asked = what.add_mutually_exclusive_group()
    asked.add_argument("--prompt", action="append", help="a question; can be given more than once")
    asked.add_argument("--prompts", type=Path, metavar="FILE", help=".jsonl with `question`, or text, one per line")
    what.add_argument("--system", default=SYSTEM, help="system text before each question; '' for none")
    what.add_argument("--max-tokens", type=int, default=256, help="length of a response at most")
    what.add_argument(
        "--temperature", type=float, default=0.0, help="0 is greedy; entropies are those at this temperature"
    )
    what.add_argument("--seed", type=int, default=0, help="of the sampling, where the temperature is above 0")
    how = analyze.add_argument_group("how; what is not given is the preset's")
    how.add_argument("--preset", choices=sorted(PRESETS, reverse=True), default=paper_v2.name, help="settings")
    how.add_argument("--window", type=int, help="W of WAAD, in tokens")
    how.add_argument("--horizon", nargs=2, metavar=("LO", "HI"), help="of FAI, in tokens; HI can be `open`")
    how.add_argument("--layers", help="middle-third, all, or a list such as 9,11,14-16")
    how.add_argument("--head-share", type=float, help="share of heads that are local, and that are global")
    how.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    how.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    out = analyze.add_argument_group("results")
    out.add_argument("--out", type=Path, default=Path("out/analysis"), help="folder; replaced when all is done")
    out.add_argument("--verify", action="store_true", help="recompute with eager attention and compare")
    return top


def settings_from(options: argparse.Namespace) -> Settings:
    """The preset with the given options in their place. Raises InputError."""
    from attnstats.analyze import Settings

    preset = PRESETS[options.preset]
    lo, hi = (preset.fai_lo, preset.fai_hi) if options.horizon is None else parse_horizon(*options.horizon)
    return Settings(
        window=preset.window if options.window is None else options.window,
        fai_lo=lo,
        fai_hi=hi,
        layers=parse_layers(preset.layers if options.layers is None else options.layers),
        head_share=preset.head_share if options.head_share is None else options.head_share,
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        seed=options.seed,
        system=options.system,
    )


def parse_horizon(lo: str, hi: str) -> tuple[int, int | None]:
    """FAI's horizon as numbers; `open` is None. Raises InputError."""
    try:
        return int(lo), None if hi == "open" else int(hi)
    except ValueError as error:
        raise InputError(f"--horizon {lo} {hi}: needs two whole numbers, or a number and `open`") from error


def parse_layers(text: str) -> Layers:
    """Layers as `attnstats.capture` takes them. Raises InputError."""
    if text in ("middle-third", "all"):
        return text  # type: ignore[return-value]
    layers: list[int] = []
    try:
        for part in text.split(","):
            first, dash, last = part.strip().partition("-")
            layers += range(int(first), int(last) + 1) if dash else [int(first)]
    except ValueError as error:
        raise InputError(f"--layers {text}: needs middle-third, all, or a list such as 9,11,14-16") from error
    return tuple(layers)


def run_analyze(options: argparse.Namespace) -> int:
    """The command `analyze`."""
    try:
        import jinja2  # noqa: F401
        import pandas  # noqa: F401
        import rich  # noqa: F401
        import safetensors  # noqa: F401
    except ImportError as error:
        raise InputError(f"{error.name} is not installed; run: pip install 'attnstats[cli]'") from error
    from attnstats.outputs import replacing
    from attnstats.terminal import Terminal

    questions = read_prompts(options.prompts) if options.prompts else options.prompt or list(QUESTIONS)
    settings = settings_from(options)
    dtype = options.dtype
    if options.verify:
        if dtype not in ("auto", "float32"):
            raise InputError(f"--dtype {dtype}: --verify compares in float32; leave --dtype out")
        dtype = "float32"
    terminal = Terminal()
    with replacing(options.out) as folder:
        analyses, loaded, timings = _analyze(options, settings, questions, dtype, terminal)
        different = _verify(loaded, analyses, settings, timings, terminal) if options.verify else {}
        _write(folder, analyses, settings, _summary(options, settings, loaded, analyses, timings, different))
    terminal.show(analyses, options.out)
    if not options.verify:
        return 0
    from attnstats.verify import TOLERANCE

    terminal.show_differences(different, TOLERANCE)
    return 0 if max(different.values()) <= TOLERANCE else DIFFERENT


def _analyze(
    options: argparse.Namespace, settings: Settings, questions: list[str], dtype: str, terminal: Any
) -> tuple[Any, Any, dict[str, float]]:
    terminal.say("Loading the model")
    from attnstats.analyze import analyze, stage
    from attnstats.models import load

    timings: dict[str, float] = {}
    with stage(timings, "load"):
        _quiet_transformers()
        loaded = load(options.model, dtype=dtype, device=options.device, notify=terminal.say)
    return analyze(loaded, questions, settings, terminal, timings), loaded, timings


def _quiet_transformers() -> None:
    """Bars and advice of transformers would stand between our lines; its errors still come."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _verify(
    loaded: Any, analyses: Any, settings: Settings, timings: dict[str, float], terminal: Any
) -> dict[str, float]:
    from attnstats.analyze import stage
    from attnstats.verify import differences

    with stage(timings, "verify"):
        return differences(loaded, analyses, settings, terminal)


def _summary(
    options: argparse.Namespace,
    settings: Settings,
    loaded: Any,
    analyses: Any,
    timings: dict[str, float],
    different: dict[str, float],
) -> dict[str, Any]:
    from attnstats.outputs import FILES, peak_memory, versions

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


def _write(folder: Path, analyses: Any, settings: Settings, summary: dict[str, Any]) -> None:
    from attnstats import outputs, report

    outputs.write_tables(folder, analyses)
    outputs.write_tensors(folder, analyses)
    outputs.write_summary(folder, summary)
    (folder / outputs.REPORT).write_text(report.render(analyses, settings, summary), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
