"""Statistics of attention inside or beside a flash-style pass, without ever holding the T x T map."""

from importlib import import_module
from os import PathLike
from typing import TYPE_CHECKING, Any

from attnstats import _threads, distributed, heads, presets, reference, statistics  # noqa: F401 _threads before torch
from attnstats.functional import attention, explain, statistics_from_lse, varlen_attention
from attnstats.paged import PagedStatistics, paged_statistics
from attnstats.results import AttentionResult, Explanation, Statistics
from attnstats.statistics import *  # noqa: F403
from attnstats.transformers.attach import attach, detach
from attnstats.transformers.capture import capture

if TYPE_CHECKING:
    from attnstats import nn
    from attnstats.sdpa import patch_sdpa

__version__ = "0.1.0"

__all__ = [
    "AttentionResult",
    "Explanation",
    "PagedStatistics",
    "Statistics",
    "analyze",
    "attach",
    "attention",
    "capture",
    "detach",
    "distributed",
    "explain",
    "heads",
    "load",
    "nn",
    "paged_statistics",
    "patch_sdpa",
    "presets",
    "reference",
    "statistics_from_lse",
    "varlen_attention",
]
__all__ += statistics.__all__


def analyze(model: str | PathLike[str] | None = None, **options: Any) -> Any:
    """The command `attnstats analyze` as a function, which needs the extra "cli".

    Args:
        model: folder, .gguf file or hub name; None: the default model.
        prompts: a list of questions, or a file of them. None: three questions of ours.
        text: a text that exists already, a Path to one, or token ids; nothing is generated.
        messages: chats that exist already, whose last answers are analysed: a list of messages, a list of objects with
            `messages` or of lists of messages, or a .json or .jsonl file of them.
        out: the folder of the run, by default out/analysis.
        quiet: False prints progress and responses as the command does.
        options: the command's other options with `_` for `-`, such as max_tokens=100, layers="all", horizon=(10, None),
            response_from="<think>" or a number of characters (of token ids: of tokens), response_role="tool",
            engine="vllm", engine_args={"max_num_seqs": 64}.

    Returns:
        The run, as of `load` (attnstats.run.FinishedRun).

    Raises:
        attnstats.errors.InputError: an option, a file or a model that can't be used.
    """
    return import_module("attnstats.cli.analyze").analyze(model, **options)


def load(folder: str | PathLike[str]) -> Any:
    """A finished run of `attnstats analyze` as one object (attnstats.run.FinishedRun), which needs the extra "cli".

    Args:
        folder: what `--out` named.

    Raises:
        attnstats.errors.InputError: no such folder, not one of `attnstats analyze`, not finished, or damaged.
    """
    return import_module("attnstats.run").load(folder)


def __getattr__(name: str) -> Any:
    """Modules that `import attnstats` does not load until they are asked for."""
    if name == "nn":
        import attnstats.nn

        return attnstats.nn
    if name == "patch_sdpa":
        from attnstats.sdpa import patch_sdpa

        return patch_sdpa
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
