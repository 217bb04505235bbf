"""vLLM's own server with the plug-in: requests over HTTP, and the folder that it writes."""

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
from attnstats.integrations.vllm import RequestStore, engine_arguments
from tests.engines.vllm import tiny
from tests.engines.vllm.test_page import block
from tests.process import ROOT

pytestmark = pytest.mark.timeout(900)
PORT = 18431


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tiny.save(tmp_path_factory.mktemp("served"))
    tiny.save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def store(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("store") / "requests"
    folder.mkdir()
    arguments = engine_arguments([WAAD(10), FAI(10, 40)], folder=folder)
    options = {
        "model": model,
        "port": PORT,
        "dtype": "float32",
        "max-model-len": 256,
        "max-num-seqs": 4,
        "max-num-batched-tokens": 64,
        "worker-cls": arguments["worker_cls"],
        "additional-config": json.dumps(arguments["additional_config"]),
    }
    command = [
        sys.executable,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--enforce-eager",
        "--no-enable-prefix-caching",
    ]
    command += [text for name, value in options.items() for text in (f"--{name}", str(value))]
    log = folder.parent / f"{folder.name}.log"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with log.open("w") as output:
        server = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
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
        os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)


def complete(prompt, tokens=20, **fields):
    body = {"model": "", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True} | fields
    with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/v1/models", timeout=60) as answer:
        body["model"] = json.load(answer)["data"][0]["id"]
    request = urllib.request.Request(
        f"http://127.0.0.1:{PORT}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)


def test_every_request_of_a_server_is_in_its_folder(store, model):
    from transformers import AutoModelForCausalLM

    prompts = ["what is one and one? " * n for n in (1, 4, 2)]
    with ThreadPoolExecutor() as pool:
        answers = list(pool.map(complete, prompts))
    left_out = complete("nobody reads this", vllm_xargs={"attnstats": 0})
    last = complete("the end")
    for _ in range(100):
        if store.of(f"{last['id']}-0"):
            break
        time.sleep(0.2)
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
    for _ in range(100):
        if store.of(f"{answer['id']}-0"):
            break
        time.sleep(0.2)
    scope = {"answer": answer}
    exec(block("vllm_store"), scope)
    assert scope["result"].tokens.shape == (1, len("one more") + 19)


def test_a_second_server_can_not_write_the_same_folder(store):
    from attnstats.integrations.vllm.store import RequestWriter

    with pytest.raises(ValueError, match="another engine writes its requests there"):
        RequestWriter(store.folder, 1)
