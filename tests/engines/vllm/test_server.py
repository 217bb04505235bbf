"""vLLM's own server with the plug-in: requests and statistics over HTTP, and the folder that it writes."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import attnstats
from attnstats import FAI, WAAD
from attnstats.integrations.vllm import RequestStore, engine_arguments, records
from attnstats.integrations.vllm.answers import as_json
from tests.engines.vllm import tiny
from tests.engines.vllm.test_page import block
from tests.process import ROOT

pytestmark = pytest.mark.timeout(900)
PORT = 18431
KEY = "secret"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tiny.save(tmp_path_factory.mktemp("served"))
    tiny.save_tokenizer(folder)
    return folder


@contextlib.contextmanager
def serving(command, folder, model, search_path=(), **more):
    """vLLM's server, which writes into the folder; search_path: folders that it finds before installed packages."""
    folder.mkdir()
    arguments = engine_arguments([WAAD(10), FAI(10, 40)], folder=folder)
    options = more | {
        "model": model,
        "port": PORT,
        "dtype": "float32",
        "max-model-len": 256,
        "max-num-seqs": 4,
        "max-num-batched-tokens": 64,
        "api-key": KEY,
        "worker-cls": arguments["worker_cls"],
        "additional-config": json.dumps(arguments["additional_config"]),
    }
    command = [sys.executable, "-m", *command, "--enforce-eager", "--no-enable-prefix-caching"]
    command += [text for name, value in options.items() for text in (f"--{name}", str(value))]
    log = folder.parent / f"{folder.name}.log"
    own = {
        "PYTHONPATH": os.pathsep.join(map(str, [*search_path, ROOT])),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_PLUGINS": "attnstats",
        "VLLM_LOGGING_LEVEL": "INFO",
    }
    with log.open("w") as output:
        server = subprocess.Popen(command, env=os.environ | own, stdout=output, stderr=output, start_new_session=True)
    try:
        for _ in range(600):
            assert server.poll() is None, log.read_text()[-4000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health", timeout=5)
                break
            except (urllib.error.URLError, OSError):
                time.sleep(1)
        yield RequestStore(folder)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def store(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("store") / "requests"
    with serving(["vllm.entrypoints.openai.api_server"], folder, model) as store:
        yield store


def test_the_log_says_what_running_requests_hold(store):
    log = (store.folder.parent / f"{store.folder.name}.log").read_text()
    assert "attnstats: WAAD(window=10), FAI(lo=10, hi=40): 10 bytes for each token of a running request and" in log
    assert "at most 0.0205 MB for 4 requests of 256 tokens" in log


def request(path, body=None, key=KEY):
    """The bytes of the server's answer to a GET, or with a body to a POST."""
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    data = None if body is None else json.dumps(body).encode()
    url = f"http://127.0.0.1:{PORT}/v1/{path}"
    with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=120) as answer:
        return answer.read()


def asked(path, *args):
    return json.loads(request(path, *args))


def served_name():
    return asked("models")["data"][0]["id"]


def complete(prompt, tokens=20, kind="completions", **fields):
    body = {"model": served_name(), "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    return asked(kind, body | fields)


def in_folder(store, request_id):
    """The statistics of a request, which is written with the engine's next step."""
    for _ in range(100):
        if results := store.of(request_id):
            return results
        time.sleep(0.2)
    raise AssertionError(f"{request_id} is not in {store.folder}")


def test_every_request_of_a_server_is_in_its_folder(store, model):
    from transformers import AutoModelForCausalLM

    prompts = ["what is one and one? " * n for n in (1, 4, 2)]
    with ThreadPoolExecutor() as pool:
        answers = list(pool.map(complete, prompts))
    left_out = complete("nobody reads this", vllm_xargs={"attnstats": 0})
    in_folder(store, f"{complete('the end')['id']}-0")
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    for prompt, answer in zip(prompts, answers, strict=True):
        (result,) = store.of(f"{answer['id']}-0")
        assert result.tokens.shape == (1, len(prompt) + 19)
        with (
            torch.no_grad(),
            attnstats.capture(reference, statistics=result.statistics, reduce=("layers", "heads")) as run,
        ):
            reference(result.tokens)
        for s in result.statistics:
            torch.testing.assert_close(result[s], run[s], atol=1e-5, rtol=1e-5)
    assert len(store) == 4
    assert store.of(f"{left_out['id']}-0") == []


def test_the_page_reads_an_answer(store, monkeypatch):
    """docs/vllm.md."""
    monkeypatch.chdir(store.folder.parent)
    answer = complete("one more")
    in_folder(store, f"{answer['id']}-0")
    scope = {"answer": answer}
    exec(block("vllm_store"), scope)
    assert scope["result"].tokens.shape == (1, len("one more") + 19)


def test_an_answer_has_its_statistics_over_http(store):
    one = complete("what is one and one?")
    (result,) = in_folder(store, f"{one['id']}-0")
    content = asked(f"attnstats/requests/{one['id']}")
    assert content == {"id": f"{one['id']}-0", "finished": True} | json.loads(json.dumps(as_json(result)))
    assert asked(f"attnstats/requests/{one['id']}") == content
    assert any(name.startswith(one["id"]) for name in asked("attnstats/requests")["finished"])
    sent = request(f"attnstats/requests/{one['id']}?format=safetensors")
    assert as_json(records.decode(sent)) == as_json(result)


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("chat/completions", {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 20}),
        ("messages", {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 20}),
        ("responses", {"input": "hello", "max_output_tokens": 20}),
    ],
)
def test_the_id_of_every_kind_of_answer_is_that_of_its_statistics(store, path, fields):
    answer = asked(path, {"model": served_name()} | fields)
    content = asked(f"attnstats/requests/{answer['id']}")
    assert len(content["tokens"]) > 5
    assert [s["name"] for s in content["statistics"]] == ["waad", "fai"]


def test_the_page_asks_for_statistics(store, model):
    """docs/vllm.md."""
    page = {"localhost:8000": f"127.0.0.1:{PORT}", "MODEL": str(model), "KEY": KEY}
    script = block("vllm_http", "bash")
    for shown, own in page.items():
        assert shown in script
        script = script.replace(shown, own)
    shown = subprocess.run(["bash", "-ec", script], capture_output=True, text=True, check=True).stdout
    answer, statistics = [json.loads(line) for line in shown.splitlines()]
    assert statistics["id"] == answer["id"] == "chatcmpl-sum-1"
    assert len(statistics["tokens"]) == answer["usage"]["total_tokens"] - 1


def test_each_of_several_completions_has_its_statistics_over_http(store):
    messages = [{"role": "user", "content": "say something"}]
    answer = complete(None, kind="chat/completions", messages=messages, n=2, temperature=1.0, logprobs=True)
    for choice in answer["choices"]:
        content = asked(f"attnstats/requests/{answer['id']}?completion={choice['index']}")
        letters = [chr(32 + token - 2) for token in content["tokens"][-19:]]
        assert letters == [each["token"] for each in choice["logprobs"]["content"]][:-1]


def test_a_request_without_statistics_is_not_found_over_http(store):
    left_out = complete("nobody reads this", vllm_xargs={"attnstats": 0})
    for request_id in (left_out["id"], "somebody-elses"):
        with pytest.raises(urllib.error.HTTPError) as caught:
            asked(f"attnstats/requests/{request_id}")
        assert caught.value.code == 404
        reason = json.load(caught.value)["error"]["message"]
        assert reason.startswith(f"request '{request_id}': nothing is kept of it")


def test_the_key_of_the_server_guards_statistics(store):
    for path in ("attnstats/requests", "attnstats/requests/any"):
        with pytest.raises(urllib.error.HTTPError) as caught:
            request(path, key="guess")
        assert caught.value.code == 401


def test_a_second_server_can_not_write_the_same_folder(store):
    from attnstats.integrations.vllm.store import RequestWriter

    with pytest.raises(ValueError, match="another engine writes its requests there"):
        RequestWriter(store.folder, 1)
