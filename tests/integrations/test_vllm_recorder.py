"""The recorder of a worker without its engine; vLLM itself is not needed."""

import asyncio
from types import SimpleNamespace

import pytest
import torch

from attnstats import FAI, WAAD, SegmentMass
from attnstats.integrations.vllm import async_statistics_of, records, statistics_of
from attnstats.integrations.vllm.configuration import RequestSettings
from attnstats.integrations.vllm.recorder import Recorder
from attnstats.integrations.vllm.sums import KeyCache

SETTINGS = RequestSettings((WAAD(3), FAI(1, 4)), layers=[0], reduce=())
SIZE, DIM = 4, 16


class Engine:
    """A layer with its cache, a batch, and steps of them."""

    def __init__(self, settings=SETTINGS, heads=(0, 1), left=None):
        self.own = list(heads)
        self.impl = SimpleNamespace(
            num_heads=len(heads), scale=0.25, left=left, logits_soft_cap=0, sinks=None, watch=None
        )
        self.runner = SimpleNamespace(input_batch=SimpleNamespace(req_ids=[]), requests={})
        every = {s: {0: None} for s in settings.statistics}
        self.recorder = Recorder(settings, {0: SimpleNamespace(impl=self.impl)}, every, self.runner)
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
        return torch.randn(8, 2, DIM, generator=torch.Generator("cpu").manual_seed(1 + number))[:, self.own]

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


@pytest.mark.parametrize("reduce", [(), ("heads",), ("layers",), ("layers", "heads")])
def test_ranks_are_put_together(reduce):
    kinds = (WAAD(3), FAI(1, 4), SegmentMass((0, 2, None)))
    settings = RequestSettings(kinds, layers=[0], reduce=reduce)
    whole, *ranks = (Engine(settings, heads) for heads in ((0, 1), (0,), (1,)))
    for engine in (whole, *ranks):
        engine.step({"a": (0, 5)})
        engine.step({"a": (5, 8)})
    expected, result = whole.fetch("a"), records.merged([rank.fetch("a") for rank in ranks])
    for s in kinds:
        torch.testing.assert_close(result[s], expected[s])
        assert torch.equal(result.valid[s], expected.valid[s])


def output_of(tokens, finished=True, request_id="a"):
    completion = SimpleNamespace(token_ids=tokens[4:])
    return SimpleNamespace(request_id=request_id, finished=finished, prompt_token_ids=tokens[:4], outputs=[completion])


def test_an_output_finds_its_statistics_and_no_others():
    engine = Engine()
    engine.step({"a": (0, 8), "b": (0, 8)})

    class LLM:
        def collective_rpc(self, method, args):
            assert method == "attnstats_fetch"
            return [engine.recorder.fetch(*args)]

    class AsyncLLM:
        async def collective_rpc(self, method, args):
            return LLM().collective_rpc(method, args)

    tokens = [*range(8), 8]
    with pytest.raises(TypeError, match=r"llm must be a vllm\.LLM, got Engine"):
        statistics_of(engine, output_of(tokens))
    with pytest.raises(ValueError, match="request 'a' is not finished"):
        statistics_of(LLM(), output_of(tokens, finished=False))
    assert statistics_of(LLM(), output_of(tokens)).tokens.tolist() == [tokens[:8]]
    result = asyncio.run(async_statistics_of(AsyncLLM(), output_of(tokens, request_id="b")))
    assert result["waad"].shape == (1, 1, 2, 8)
    engine.step({"c": (0, 8)})
    with pytest.raises(RuntimeError, match="request 'c': the statistics are of other tokens"):
        statistics_of(LLM(), output_of([7, *tokens], request_id="c"))


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


def test_a_window_hides_the_first_keys_from_statistics_that_number_them():
    kinds = (WAAD(3), SegmentMass((0, 2, None)))
    with pytest.raises(ValueError, match=r"layer 0 has a sliding window, which hides the first keys, and SegmentMass"):
        Engine(RequestSettings(kinds, layers=[0]), left=3)
    engine = Engine(left=3)
    engine.step({"a": (0, 8)})
    assert engine.fetch("a")["waad"].shape == (1, 1, 2, 8)


def test_a_request_without_a_token_has_nothing_to_read():
    engine = Engine()
    engine.step({"a": (0, 4)})
    engine.step({}, finished=["a"])
    assert engine.fetch("a").tokens.tolist() == [[0, 1, 2, 3]]
    with pytest.raises(RuntimeError, match="request 'a': nothing is kept of it"):
        engine.fetch("a")
