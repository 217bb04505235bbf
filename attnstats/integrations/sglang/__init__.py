"""Attention statistics of the requests that SGLang serves: a plug-in that SGLang loads by itself (docs/sglang.md).

`environment` has what a server is started with, `statistics_of` the statistics of one of its responses, and a
`RequestStore` those of all requests of a server.
"""

from attnstats.integrations.sglang.configuration import environment
from attnstats.integrations.sglang.responses import statistics_of
from attnstats.integrations.vllm.records import RequestStatistics
from attnstats.integrations.vllm.store import RequestStore

__all__ = ["RequestStatistics", "RequestStore", "environment", "statistics_of"]
