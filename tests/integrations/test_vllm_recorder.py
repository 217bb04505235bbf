"""The recorder of a worker without its engine; vLLM itself is not needed."""

from types import SimpleNamespace

import pytest
import torch

from attnstats import FAI, WAAD
from attnstats.integrations.vllm import records
from attnstats.integrations.vllm.configuration import RequestSettings
from attnstats.integrations.vllm.recorder import Recorder
from attnstats.integrations.vllm.sums import KeyCache

SETTINGS = RequestSettings((WAAD(3), FAI(1, 4)), layers=[0], reduce=())
SIZE, DIM = 4, 16


class Engine:
    """A layer with its cache, a batch, and steps of them."""

    def __init__(self, settings=SETTINGS):
        self.impl = SimpleNamespace(num_heads=2, scale=0.25, left=None, logits_soft_cap=0, sinks=None, watch=None)
        self.runner = SimpleNamespace(input_batch=SimpleNamespace(req_ids=[]), requests={})
        heads = {s: {0: None} for s in settings.statistics}
        self.recorder = Recorder(settings, {0: SimpleNamespace(impl=self.impl)}, heads, self.runner)
        self.cache = torch.randn(9, SIZE, 1, DIM, generator=torch.Generator("cpu").manual_seed(0))
        self.known = {}

    def step(self, spans, finished=()):
        """spans: by request, (begin, end); each of them in blocks of its own."""
        sampling = SimpleNamespace(extra_args=None)
        new = [name for name in spans if name not in self.known]
        old = [name for name in spans if name in self.known]
        for name in new:
            self.known[name] = len(self.known)
            self.runner.requests[name] = SimpleNamespace(prompt_token_ids=list(range(8)), output_token_ids=[])
        scheduled = SimpleNamespace(
            finished_req_ids=set(finished),
            scheduled_new_reqs=[
                SimpleNamespace(req_id=name, num_computed_tokens=spans[name][0], sampling_params=sampling)
                for name in new
            ],
            scheduled_cached_reqs=SimpleNamespace(req_ids=old, num_computed_tokens=[spans[name][0] for name in old]),
            num_scheduled_tokens={name: end - begin for name, (begin, end) in spans.items()},
        )
        self.runner.input_batch.req_ids = list(reversed(spans))  # the worker has an order of its own
        self.recorder.begin(scheduled)
        if spans:
            self.attend(spans)
        self.recorder.end()

    def attend(self, spans):
        rows = [(self.known[name], *spans[name]) for name in reversed(spans)]
        query = torch.cat([self.query(number)[begin:end] for number, begin, end in rows])
        counts = [end - begin for _, begin, end in rows]
        metadata = SimpleNamespace(
            query_start_loc=torch.tensor([0, *counts]).cumsum(0),
            block_table=torch.tensor([[2 * number, 2 * number + 1] for number, *_ in rows], dtype=torch.int32),
        )
        self.impl.watch(query, KeyCache(SIZE, self.cache.__getitem__, self.cache), metadata)

    def query(self, number):
        return torch.randn(8, 2, DIM, generator=torch.Generator("cpu").manual_seed(1 + number))

    def fetch(self, name):
        return records.decode(self.recorder.fetch(name, 0, 1))


def test_steps_in_any_order_and_repeated_queries_are_one_pass():
    whole, parts = Engine(), Engine()
    whole.step({"a": (0, 8), "b": (0, 6)})
    parts.step({"a": (0, 3)})
    parts.step({"b": (0, 6), "a": (3, 5)})
    parts.step({"b": (2, 3)}, ())  # b was preempted, and starts again behind two tokens in the cache
    parts.step({"a": (5, 8), "b": (3, 6)})
    # Of requests by number: a is the first in both.
    for name in ("a", "b"):
        expected, result = whole.fetch(name), parts.fetch(name)
        for s in SETTINGS.statistics:
            torch.testing.assert_close(result[s], expected[s])
            assert torch.equal(result.valid[s], expected.valid[s])


def test_a_step_that_no_layer_sees_costs_its_requests_alone():
    engine = Engine()
    engine.step({"a": (0, 4)})
    engine.attend = lambda spans: None
    engine.step({"b": (0, 4)})
    del engine.attend
    engine.step({"a": (4, 8), "b": (4, 8)})
    assert engine.fetch("a")["waad"].shape == (1, 1, 2, 8)
    with pytest.raises(RuntimeError, match=r"captured layers 0 was not seen in a step: CUDA graphs"):
        engine.fetch("b")


def test_a_scheduler_that_says_something_else_costs_statistics_alone(caplog):
    engine = Engine()
    engine.step({"a": (0, 4)})
    engine.recorder.begin(SimpleNamespace(finished_req_ids=(), scheduled_new_reqs=[]))
    engine.recorder.end()
    with pytest.raises(RuntimeError, match="before a step: AttributeError"):
        engine.fetch("a")
    assert "requests have no statistics, because before a step" in caplog.text


def test_a_request_without_a_token_has_nothing_to_read():
    engine = Engine()
    engine.step({"a": (0, 4)})
    engine.step({}, finished=["a"])
    assert engine.fetch("a").tokens.tolist() == [[0, 1, 2, 3]]
    with pytest.raises(RuntimeError, match="request 'a': nothing is kept of it"):
        engine.fetch("a")
