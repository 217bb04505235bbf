"""Two routes of vLLM's server, by its entry point `vllm.endpoint_plugins`, which `VLLM_PLUGINS=attnstats` turns on.

They are below /v1 because `--api-key` guards what is there.
"""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import FastAPI, HTTPException, Response

from attnstats.integrations.vllm.answers import MEDIA, Format, body, kept_by, look_up
from attnstats.integrations.vllm.configuration import KEY, requested

PATH = "/v1/attnstats/requests"


class StatisticsEndpoint:
    """The statistics that the workers of a server's engine keep: a request can be read until it has to go."""

    name = KEY
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self._client: Any = None

    def attach_router(self, app: FastAPI) -> None:
        """Called first, by vLLM."""
        app.add_api_route(PATH, self.requests, methods=["GET"], response_model=None)
        app.add_api_route(f"{PATH}/{{request_id:path}}", self.request, methods=["GET"], response_model=None)

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Called then, by vLLM."""
        if requested(engine_client.vllm_config) is not None:
            self._client = engine_client

    @property
    def _engine(self) -> Any:
        if self._client is None:
            raise HTTPException(404, f"this server records no statistics; start it with additional_config[{KEY!r}]")
        return self._client

    async def requests(self) -> dict[str, list[str]]:
        """Ids of the requests that can be read."""
        return await kept_by(self._engine)

    async def request(self, request_id: str, completion: int = 0, format: Format = "json") -> Response:
        """The attention statistics of a request, by the id of its answer; with n > 1 those of one completion."""
        try:
            kept = await look_up(self._engine, request_id, completion)
        except LookupError as error:
            raise HTTPException(404, str(error)) from error
        try:
            content = await asyncio.to_thread(body, kept, format)
        except RuntimeError as error:
            raise HTTPException(409, f"request {request_id!r} has no statistics: {error}") from error
        return Response(content, media_type=MEDIA[format])
