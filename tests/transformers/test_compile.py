"""Captured transformers models under torch.compile(fullgraph=True): outputs, records, and how many graphs."""

from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import attnstats
from attnstats import FAI, WAAD
from attnstats.transformers.capture import capture
from tests.tiny import LENGTH, gradients, padding, tiny, tokens

STATISTICS = [WAAD(4), FAI(1, 4)]
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "gemma2": {"sliding_window": 8},
    "gpt_oss": {"sliding_window": 8, "num_local_experts": 2, "num_experts_per_tok": 1},
}
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def _forget_graphs():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def two_layers(family="llama", **changes):
    return tiny(family, **({"num_hidden_layers": 2} | FAMILIES[family] | changes))


@pytest.mark.parametrize("side", [None, "left"])
@pytest.mark.parametrize("family", FAMILIES)
def test_one_graph_computes_and_records_the_same(family, side):
    model = two_layers(family)
    inputs: dict[str, Any] = {"input_ids": tokens(), "use_cache": False}
    if side:
        inputs["attention_mask"] = padding(side)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad(), capture(model, statistics=STATISTICS, layers="all") as run:
        expected = model(**inputs).logits
        eager = {s: (run[s], run.valid[s]) for s in STATISTICS}
        actual = compiled(**inputs).logits
        assert counter.frame_count == 1
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)
        for s in STATISTICS:
            torch.testing.assert_close(run[s], eager[s][0], rtol=0, atol=1e-5)
            assert torch.equal(run.valid[s], eager[s][1])


def test_lengths_do_not_compile_anew():
    model = two_layers()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad(), capture(model, statistics=STATISTICS, layers="all", reduce=("layers", "heads")) as run:
        for length in (2, 3, 16, 17, 31, 32, 33, 100, 119, 120):
            ids = tokens(length=length)
            logits = compiled(ids, use_cache=False).logits
            actual = run[WAAD(4)]
            torch.testing.assert_close(logits, model(ids, use_cache=False).logits, rtol=0, atol=1e-5)
            torch.testing.assert_close(actual, run[WAAD(4)], rtol=0, atol=1e-5)
    assert counter.frame_count <= 3


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_training_step_has_the_gradients_of_sdpa(backend):
    model = two_layers(num_hidden_layers=1 if backend == "inductor" else 2).train()  # inductor compiles for long
    ids = tokens()
    expected = gradients(model, ids, use_cache=False)
    attnstats.attach(model)
    actual = gradients(model, ids, torch.compile(model, backend=backend, fullgraph=True), use_cache=False)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_what_a_graph_cannot_describe_is_an_error_when_it_runs():
    model = two_layers()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    position = torch.cat([torch.arange(9), torch.arange(LENGTH - 9)])[None].expand(2, -1)
    with torch.no_grad(), capture(model, statistics=STATISTICS, layers="all"):
        compiled(tokens(), position_ids=torch.arange(LENGTH)[None].expand(2, -1), use_cache=False)
        with pytest.raises(RuntimeError, match="packed position_ids"):
            compiled(tokens(), position_ids=position, use_cache=False)
