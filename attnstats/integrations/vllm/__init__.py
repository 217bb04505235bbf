"""Attention statistics of the requests that vLLM serves: a plug-in that vLLM loads by itself (docs/vllm.md).

`engine_arguments` has what an engine is started with, `statistics_of` the statistics of one of its outputs, and a
`RequestStore` those of all requests of a server.
"""

from attnstats.integrations.vllm.configuration import engine_arguments
from attnstats.integrations.vllm.fetching import async_statistics_of, statistics_of
from attnstats.integrations.vllm.records import RequestStatistics
from attnstats.integrations.vllm.store import RequestStore

__all__ = ["RequestStatistics", "RequestStore", "async_statistics_of", "engine_arguments", "statistics_of"]
