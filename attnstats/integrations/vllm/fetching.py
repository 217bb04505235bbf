"""The statistics of a finished request, fetched from the workers of its engine."""

from __future__ import annotations

from typing import Any

from attnstats.integrations.vllm import records
from attnstats.integrations.vllm.records import RequestStatistics


def statistics_of(llm: Any, output: Any, completion: int = 0) -> RequestStatistics:
    """The statistics of a finished request, once: the workers forget them.

    Args:
        llm: the `vllm.LLM`, or its engine, that was started with `engine_arguments`.
        output: a `RequestOutput` of its.
        completion: the number of the completion, where n > 1.

    Raises:
        TypeError, ValueError: naming the argument. RuntimeError: the request has no statistics, and why.
    """
    if not hasattr(llm, "collective_rpc"):
        raise TypeError(f"llm must be a vllm.LLM, got {type(llm).__name__}")
    if not 0 <= completion < len(output.outputs):
        raise ValueError(f"completion must be one of the {len(output.outputs)} of the output, got {completion!r}")
    (record,) = llm.collective_rpc("attnstats_fetch", args=(output.request_id, completion, len(output.outputs)))
    result = records.decode(record)
    tokens = [*(output.prompt_token_ids or ()), *output.outputs[completion].token_ids][:-1]
    if result.tokens[0, : len(tokens)].tolist() != tokens:
        raise RuntimeError(
            f"request {output.request_id!r}: the statistics are of other tokens; is llm the engine of this output?"
        )
    return result
