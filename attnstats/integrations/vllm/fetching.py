"""The statistics of a finished request, fetched from the workers of its engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from attnstats.integrations.vllm import records
from attnstats.integrations.vllm.records import RequestStatistics

METHOD = "attnstats_fetch"  # of the worker
BEAMS = (
    "output must be a vllm.RequestOutput, got {}. Beam search is a request of its own for each beam and token; send a "
    'beam\'s tokens for its statistics: llm.generate({{"prompt_token_ids": beam.tokens}}, SamplingParams(max_tokens=1, '
    "skip_reading_prefix_cache=True))"
)


def statistics_of(llm: Any, output: Any, completion: int = 0) -> RequestStatistics:
    """The statistics of a finished request, once: the workers forget them.

    Args:
        llm: the `vllm.LLM`, or its engine, that was started with `engine_arguments`.
        output: a `RequestOutput` of its, of a stream the one with which the completion ended. Of any other request's
            nothing is forgotten.
        completion: the number of the completion, where n > 1.

    Raises:
        TypeError, ValueError: naming the argument. RuntimeError: the request has no statistics, and why.
    """
    arguments = _arguments(llm, output, completion)
    return _read(llm.collective_rpc(METHOD, args=arguments))


async def async_statistics_of(engine: Any, output: Any, completion: int = 0) -> RequestStatistics:
    """`statistics_of` for a `vllm.AsyncLLM`."""
    arguments = _arguments(engine, output, completion)
    return _read(await engine.collective_rpc(METHOD, args=arguments))


def _arguments(engine: Any, output: Any, completion: int) -> tuple[str, int, list[int], list[int]]:
    if not hasattr(engine, "collective_rpc"):
        raise TypeError(f"llm must be a vllm.LLM, got {type(engine).__name__}")
    if hasattr(output, "sequences") or hasattr(output, "orig_prompt"):
        raise TypeError(BEAMS.format(type(output).__name__))
    if not hasattr(output, "outputs"):
        raise TypeError(f"output must be a vllm.RequestOutput, got {type(output).__name__}")
    by_index = {each.index: each for each in output.outputs}  # of a stream those that have something new
    if completion not in by_index:
        present = ", ".join(map(str, sorted(by_index))) or "none"
        raise ValueError(
            f"completion must be one that the output has, {present}; got {completion!r}. Of a stream pass the output "
            "with which the completion ended"
        )
    chosen = by_index[completion]
    if not output.finished and chosen.finish_reason is None:
        raise ValueError(f"output: request {output.request_id!r} is not finished; pass its last output")
    # The last token of the output never went through the model.
    return output.request_id, completion, list(output.prompt_token_ids or ()), list(chosen.token_ids)[:-1]


def _read(of_ranks: Sequence[bytes]) -> RequestStatistics:
    return records.merged([records.decode(record) for record in of_ranks])
