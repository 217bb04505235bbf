"""The routes that the plug-in adds to vLLM's server, in vLLM's own app, with a recorder in the place of an engine."""

import asyncio
from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch
from fastapi import FastAPI
from fastapi.testclient import TestClient
from vllm.entrypoints.serve.exception_handling.register import init_exception_handler
from vllm.entrypoints.serve.middleware.register import init_entrypoints_middleware
from vllm.plugins.endpoint_plugins.interface import (
    EndpointPlugin,
    attach_endpoint_plugins,
    init_endpoint_plugins_state,
)

from attnstats.integrations.vllm import RequestStore
from attnstats.integrations.vllm.endpoint import StatisticsEndpoint
from tests.integrations.test_vllm_answers import Client
from tests.integrations.test_vllm_recorder import Engine

PATH = "/v1/attnstats/requests"
ARGUMENTS = Namespace(
    allowed_origins=["*"],
    allow_credentials=False,
    allowed_methods=["*"],
    allowed_headers=["*"],
    api_key=["secret"],
    enable_request_id_headers=False,
    middleware=[],
    log_error_stack=False,
)


@pytest.fixture
def engine():
    return Engine()


@pytest.fixture
def served(engine, monkeypatch):
    return client_of(engine, {"attnstats": {"statistics": ["waad"]}}, monkeypatch)


def client_of(engine, additional_config, monkeypatch):
    """As vLLM's `build_app` and `init_app_state` do."""
    monkeypatch.setenv("VLLM_PLUGINS", "attnstats")
    app = FastAPI()
    app.state.args = ARGUMENTS
    attach_endpoint_plugins(app, ("generate",))
    init_exception_handler(app)
    init_entrypoints_middleware(ARGUMENTS, app, ())
    client = Client(engine)
    client.vllm_config = SimpleNamespace(additional_config=additional_config)
    asyncio.run(init_endpoint_plugins_state(client, app.state, ARGUMENTS))
    return TestClient(app, headers={"Authorization": "Bearer secret"}, raise_server_exceptions=False)


def refused(answer):
    """The status and the reason."""
    return answer.status_code, answer.json()["error"]["message"]


def test_it_is_what_vllm_takes():
    assert isinstance(StatisticsEndpoint(), EndpointPlugin)


def test_a_request_is_read_by_id(engine, served, tmp_path):
    engine.step({"chatcmpl-a-12345678": (0, 6), "cmpl-b/c-0-12345678": (0, 8)})
    engine.step({}, finished=["chatcmpl-a-12345678"])
    listed = served.get(PATH).json()
    assert listed == {"finished": ["chatcmpl-a-12345678"], "running": ["cmpl-b/c-0-12345678"]}
    for request_id, length in (("chatcmpl-a", 6), (listed["finished"][0], 6), ("cmpl-b/c", 8), ("cmpl-b%2Fc-0", 8)):
        answer = served.get(f"{PATH}/{request_id}")
        assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json")
        assert len(answer.json()["tokens"]) == length
    (tmp_path / "b.safetensors").write_bytes(served.get(f"{PATH}/cmpl-b/c?format=safetensors").content)
    assert RequestStore(tmp_path)["b"]["waad"].shape == (1, 1, 2, 8)


def test_the_key_of_the_server_guards_the_routes(engine, served):
    engine.step({"a": (0, 6)})
    for path in (PATH, f"{PATH}/a"):
        assert served.get(path).status_code == 200
        assert served.get(path, headers={"Authorization": "Bearer guess"}).status_code == 401


def test_what_can_not_be_answered_says_why(engine, served):
    engine.embeddings["a"] = torch.zeros(2)
    engine.step({"a": (0, 8)})
    assert refused(served.get(f"{PATH}/a")) == (
        409,
        "request 'a' has no statistics: its prompt has embeddings, which are no tokens",
    )
    status, reason = refused(served.get(f"{PATH}/b"))
    assert status == 404
    assert reason.startswith("request 'b': nothing is kept of it")
    assert "raise keep_mb" in reason
    assert refused(served.get(f"{PATH}/a?format=xml"))[0] == 400
    assert refused(served.get(f"{PATH}/a?completion=first"))[0] == 400


def test_a_server_without_settings_says_so(engine, monkeypatch):
    served = client_of(engine, {}, monkeypatch)
    for path in (PATH, f"{PATH}/a"):
        status, reason = refused(served.get(path))
        assert status == 404
        assert "this server records no statistics" in reason
