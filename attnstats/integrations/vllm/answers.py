"""What vLLM's server answers about a request: what its workers keep of it, as JSON or as the bytes of a record."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any, Literal, NamedTuple

from torch import Tensor

from attnstats.integrations.vllm import records
from attnstats.integrations.vllm.records import RequestStatistics
from attnstats.statistics import Top

LOOK_UP, KEPT = "attnstats_look_up", "attnstats_kept"  # of the worker
Format = Literal["json", "safetensors"]
MEDIA = {"json": "application/json", "safetensors": "application/octet-stream"}


class Kept(NamedTuple):
    """What the workers of an engine keep of a request.

    Attributes:
        request_id: under which it was found.
        is_finished: False also for one whose last token was just sent, whose values are all there.
        ranks: the record of each worker.
    """

    request_id: str
    is_finished: bool
    ranks: list[bytes]


async def look_up(engine: Any, request_id: str, completion: int) -> Kept:
    """What is kept of a request, by the id of an answer, or one of `kept_by`.

    vLLM puts a number behind the id of an answer for each prompt of /v1/completions and each turn of /v1/responses; the
    id alone is that of the first one.

    Raises:
        LookupError: nothing is kept of it.
    """
    reasons = []
    for name in (request_id, f"{request_id}-0", f"{request_id}_0"):
        of_ranks = await engine.collective_rpc(LOOK_UP, args=(name, completion))
        states = {state for state, _ in of_ranks}
        if "absent" not in states:
            return Kept(name, states == {"finished"}, [record for _, record in of_ranks])
        reasons.append(records.fault_of(of_ranks[0][1]))
    raise LookupError(reasons[0])


async def kept_by(engine: Any) -> dict[str, list[str]]:
    """The ids of the requests of which something is kept, the oldest first."""
    finished, running = (await engine.collective_rpc(KEPT))[0]
    return {"finished": finished, "running": running}


def body(kept: Kept, kind: Format) -> bytes:
    """The bytes of an answer. Raises RuntimeError: the request has no statistics, and why."""
    result = records.merged([records.decode(record) for record in kept.ranks])
    if kind == "safetensors":
        return records.encoded(result)
    content = {"id": kept.request_id, "finished": kept.is_finished} | as_json(result)
    return json.dumps(content, allow_nan=False).encode()


def as_json(result: RequestStatistics) -> dict[str, Any]:
    """A result in numbers, lists and texts; None where it is not valid or not finite.

    Values have no batch axis: a number per token, or lists of those by layer and head. Those of `TopKeys` have the
    numbers of the keys beside them.
    """
    outer = 2 - len(result.reduce)
    statistics = []
    for s in result.statistics:
        valid = result.valid[s][0].tolist()
        value = result[s]
        parts = {"values": value.values, "keys": value.indices} if isinstance(value, Top) else {"values": value}
        heads = {layer: None if chosen is None else list(chosen) for layer, chosen in result.heads[s].items()}
        described: dict[str, Any] = {"name": s.name, "settings": dataclasses.asdict(s), "axis": s.axis, "heads": heads}
        for name, part in parts.items():
            without_batch = part.squeeze(0 if "layers" in result.reduce else 1)
            described[name] = _listed(without_batch, valid, outer)
        statistics.append(described)
    entropy = result.token_entropy
    return {
        "model": result.model.name,
        "tokens": result.tokens[0].tolist(),
        "prompt": result.prompt,
        "cached": result.cached,
        "layers": list(result.layers),
        "reduce": list(result.reduce),
        "statistics": statistics,
        "token_entropy": None if entropy is None else _finite(entropy.tolist()),
    }


def _listed(values: Tensor, valid: list[bool], outer: int) -> list[Any]:
    """outer: the number of axes before that of the tokens."""
    if outer:
        return [_listed(part, valid, outer - 1) for part in values]
    return [_finite(each) if is_valid else None for each, is_valid in zip(values.tolist(), valid, strict=True)]


def _finite(value: Any) -> Any:
    """Numbers with the nine digits that say which float32 it is."""
    if isinstance(value, list):
        return [_finite(each) for each in value]
    if isinstance(value, int):
        return value
    return float(f"{value:.9g}") if math.isfinite(value) else None
