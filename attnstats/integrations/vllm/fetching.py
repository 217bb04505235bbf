"""The statistics of a finished request, fetched from the workers of its engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from attnstats.integrations.vllm import records
from attnstats.integrations.vllm.records import RequestStatistics

METHOD = "attnstats_fetch"  # of the worker


def statistics_of(llm: Any, output: Any, completion: int = 0) -> RequestStatistics:
    """The statistics of a finished request, once: the workers forget them.

    Args:
        llm: the `vllm.LLM`, or its engine, that was started with `engine_arguments`.
        output: a `RequestOutput` of its.
        completion: the number of the completion, where n > 1.

    Raises:
        TypeError, ValueError: naming the argument. RuntimeError: the request has no statistics, and why.
    """
    arguments = _arguments(llm, output, completion)
    return _read(llm.collective_rpc(METHOD, args=arguments), output, completion)


async def async_statistics_of(engine: Any, output: Any, completion: int = 0) -> RequestStatistics:
    """`statistics_of` for a `vllm.AsyncLLM`, with the last output of the request."""
    arguments = _arguments(engine, output, completion)
    return _read(await engine.collective_rpc(METHOD, args=arguments), output, completion)


def _arguments(engine: Any, output: Any, completion: int) -> tuple[str, int, int]:
    if not hasattr(engine, "collective_rpc"):
        raise TypeError(f"llm must be a vllm.LLM, got {type(engine).__name__}")
    if not output.finished:
        raise ValueError(f"output: request {output.request_id!r} is not finished; pass its last output")
    if not 0 <= completion < len(output.outputs):
        raise ValueError(f"completion must be one of the {len(output.outputs)} of the output, got {completion!r}")
    return output.request_id, completion, len(output.outputs)


def _read(of_ranks: Sequence[bytes], output: Any, completion: int) -> RequestStatistics:
    result = records.merged([records.decode(record) for record in of_ranks])
    tokens = [*(output.prompt_token_ids or ()), *output.outputs[completion].token_ids][:-1]
    if result.tokens[0, : len(tokens)].tolist() != tokens:
        raise RuntimeError(
            f"request {output.request_id!r}: the statistics are of other tokens; is llm the engine of this output?"
        )
    return result
