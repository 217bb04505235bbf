"""The record of a request in the response of SGLang, in `meta_info["attnstats"]`.

SGLang's `customized_info` is a list with an entry for each token of the output, of which a part goes with each part of
a stream. Entries are None but for the last, which is the record in base64.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

from attnstats.integrations.vllm import records
from attnstats.integrations.vllm.configuration import KEY
from attnstats.integrations.vllm.records import RequestStatistics


def attach(request: Any, record: bytes | None) -> None:
    """Have a request's entries as long as its output.

    Args:
        record: of a request that is finished; None: it goes on.
    """
    if request.customized_info is None:
        request.customized_info = {}
    entries = request.customized_info.setdefault(KEY, [])
    length = len(request.output_ids if record is None else request.output_ids_through_stop)
    entries.extend([None] * (length - len(entries)))
    if record is not None and length:
        entries[length - 1] = base64.b64encode(record).decode()


def statistics_of(output: Any) -> RequestStatistics:
    """The statistics of a request.

    Args:
        output: what `sglang.Engine.generate` returned of one prompt, or a server's response to it in JSON; of a stream
            the last part. Of the OpenAI endpoints one of the `choices`, asked for with `return_meta_info`.

    Raises:
        TypeError, ValueError: naming the argument. RuntimeError: the request has no statistics, and why.
    """
    meta_info = output.get("meta_info") if isinstance(output, Mapping) else getattr(output, "meta_info", None)
    if not isinstance(meta_info, Mapping):
        raise TypeError(
            f"output must be the response to one prompt, with its meta_info; got {type(output).__name__}. The OpenAI "
            "endpoints have it in their choices, with return_meta_info=True"
        )
    entries = meta_info.get(KEY) or [None]
    if entries[-1] is None:
        if meta_info.get("finish_reason") is None:
            raise ValueError(f"output: request {meta_info.get('id')!r} is not finished; pass its last part")
        raise RuntimeError(
            f"request {meta_info.get('id')!r} brought no statistics: the server was started without "
            "attnstats.integrations.sglang.environment, or with a folder; or the request was sent with "
            f'custom_params={{"{KEY}": False}}, or for no new tokens'
        )
    return records.decode(base64.b64decode(entries[-1]))
