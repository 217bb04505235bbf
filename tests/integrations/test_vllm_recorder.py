"""The recorder of a worker without its engine; vLLM itself is not needed."""

import asyncio
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from attnstats import FAI, LSE, WAAD, Received, SegmentMass, TopKeys
from attnstats.integrations.vllm import RequestStore, async_statistics_of, records, statistics_of
from attnstats.integrations.vllm.configuration import RequestSettings, bytes_per_token
from attnstats.integrations.vllm.recorder import Recorder
from attnstats.integrations.vllm.sums import KeyCache
from attnstats.transformers.live import GrowingTensor, most_tokens

SETTINGS = RequestSettings((WAAD(3), FAI(1, 4)), layers=[0], reduce=())
SIZE, DIM = 4, 16
LOGITS = torch.tensor([0.0, 0.1, 0.4])  # times the position of a token


class State:
    """The worker's, of a request whose tokens are numbers in order."""

    def __init__(self, prompt=8, max_tokens=100, eos_token_id=None, stop_token_ids=None):
        self.prompt_token_ids = list(range(prompt))
        self.output_token_ids = []
        self.sampling_params = SimpleNamespace(
            extra_args=None,
            temperature=0.5,
            max_tokens=max_tokens,
            eos_token_id=eos_token_id,
            stop_token_ids=stop_token_ids,
        )

    @property
    def num_tokens(self):
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    def sample(self, end):
        """All tokens up to that which comes behind position `end` - 1."""
        self.output_token_ids = list(range(len(self.prompt_token_ids), end + 1))


class Engine:
    """A layer with its cache, a batch, and steps of them.

    Attributes:
        accepted: of requests with drafts in a step, the end of those that are accepted.
    """

    def __init__(self, settings=SETTINGS, heads=(0, 1), left=None):
        self.own = list(heads)
        self.impls = [
            SimpleNamespace(num_heads=len(heads), scale=0.25, left=left, logits_soft_cap=0, sinks=None, watch=None)
            for _ in settings.layers
        ]
        self.impl = self.impls[0]
        self.model = torch.nn.Identity()
        self.model.compute_logits = lambda hidden: hidden * LOGITS
        self.runner = SimpleNamespace(
            input_batch=SimpleNamespace(req_ids=[]), requests={}, max_model_len=100, get_model=lambda: self.model
        )
        every = {s: dict.fromkeys(settings.layers) for s in settings.statistics}
        layers = {n: SimpleNamespace(impl=impl) for n, impl in zip(settings.layers, self.impls, strict=True)}
        self.recorder = Recorder(settings, layers, every, self.runner)
        self.cache = torch.randn(9, SIZE, 1, DIM, generator=torch.Generator("cpu").manual_seed(0))
        self.known = {}
        self.embeddings = {}
        self.adapters = {}
        self.accepted = {}

    def step(self, spans, finished=(), drafts=None):
        """One step.

        Args:
            spans: by request, (begin, end); each of them in blocks of its own.
            drafts: by request, how many of its last tokens are drafts, and how many of these are accepted.
        """
        drafts = drafts or {}
        self.accepted = {name: spans[name][1] - count + accepted for name, (count, accepted) in drafts.items()}
        for name in spans:
            self.runner.requests.setdefault(name, State())
        self.recorder.begin(self.scheduled(spans, finished, drafts))
        if spans:
            self.attend(spans)
        for name, end in self.accepted.items():
            self.runner.requests[name].sample(end)
        self.recorder.end()

    def scheduled(self, spans, finished=(), drafts=None):
        """What the scheduler sends of a step."""
        drafts = drafts or {}
        new = [name for name in spans if name not in self.known]
        old = [name for name in spans if name in self.known]
        for name in new:
            self.known[name] = len(self.known)
        self.runner.input_batch.req_ids = list(reversed(spans))  # the worker has an order of its own
        return SimpleNamespace(
            finished_req_ids=set(finished),
            scheduled_new_reqs=[
                SimpleNamespace(
                    req_id=name,
                    num_computed_tokens=spans[name][0],
                    sampling_params=self.runner.requests[name].sampling_params,
                    prompt_embeds=self.embeddings.get(name),
                    lora_request=self.adapters.get(name),
                )
                for name in new
            ],
            scheduled_cached_reqs=SimpleNamespace(req_ids=old, num_computed_tokens=[spans[name][0] for name in old]),
            num_scheduled_tokens={name: end - begin for name, (begin, end) in spans.items()},
            scheduled_spec_decode_tokens={name: [-1] * count for name, (count, _) in drafts.items()},
        )

    def queries(self, spans):
        """Those of a step; those of rejected drafts are not numbers."""
        parts = []
        for name in reversed(spans):
            begin, end = spans[name]
            part = self.query(self.known[name])[begin:end].clone()
            part[max(0, self.accepted.get(name, end) - begin) :] = torch.nan
            parts.append(part)
        return parts

    def attend(self, spans):
        rows = [(self.known[name], *spans[name]) for name in reversed(spans)]
        query = torch.cat(self.queries(spans))
        counts = [end - begin for _, begin, end in rows]
        metadata = SimpleNamespace(
            query_start_loc=torch.tensor([0, *counts]).cumsum(0),
            block_table=torch.tensor([[2 * number % 8, 2 * number % 8 + 1] for number, *_ in rows]).int(),
        )
        for impl in self.impls:
            impl.watch(query, self.look, metadata)
        positions = torch.cat([torch.arange(begin, end) for _, begin, end in rows]).float()
        positions[query.isnan().any(-1).any(-1)] = torch.nan
        self.model(torch.cat([positions, positions.new_zeros(3)])[:, None])  # padded, as steps are

    def look(self):
        return KeyCache(SIZE, self.cache.__getitem__, self.cache)

    def query(self, number):
        return torch.randn(8, 2, DIM, generator=torch.Generator("cpu").manual_seed(1 + number))[:, self.own]

    def fetch(self, name):
        return records.decode(self.recorder.fetch(name, 0, [], []))


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


def in_steps_with_drafts(engine):
    """Requests a and b, and c whose drafts end with it."""
    engine.runner.requests |= {"a": State(2), "b": State(4), "c": State(1, max_tokens=4)}
    engine.step({"a": (0, 2)})
    engine.step({"a": (2, 6), "b": (0, 4)}, drafts={"a": (3, 0)})
    engine.step({"b": (4, 7), "a": (3, 6), "c": (0, 1)}, drafts={"b": (2, 1), "a": (2, 2)})
    engine.step({"a": (0, 4)})  # a was preempted
    engine.step({"a": (4, 8), "b": (6, 8), "c": (1, 4)}, drafts={"a": (2, 0), "b": (1, 1), "c": (2, 2)})
    engine.step({"a": (6, 8)}, drafts={"a": (1, 1)})
    return engine


@pytest.mark.parametrize("left", [None, 3])
@pytest.mark.parametrize("kinds", [SETTINGS.statistics, (WAAD(3), FAI(1, 4), LSE(), Received())], ids=["sums", "keys"])
def test_rejected_drafts_leave_no_trace(kinds, left):
    settings = RequestSettings(kinds, layers=[0], reduce=(), token_entropy=True)
    whole, parts = Engine(settings, left=left), in_steps_with_drafts(Engine(settings, left=left))
    whole.step({"a": (0, 8)})
    whole.step({"b": (0, 8)})
    whole.step({"c": (0, 4)})
    for name in ("a", "b", "c"):
        expected, result = whole.fetch(name), parts.fetch(name)
        assert torch.equal(result.tokens, expected.tokens)
        torch.testing.assert_close(result.token_entropy, expected.token_entropy, equal_nan=True)
        for s in kinds:
            torch.testing.assert_close(result[s], expected[s])
            assert torch.equal(result.valid[s], expected.valid[s])


@pytest.mark.parametrize(
    ("sampling", "length"),
    [
        ({}, 6),
        ({"max_tokens": 2}, 4),
        ({"eos_token_id": 4}, 4),
        ({"eos_token_id": 2}, 6),  # of the prompt
        ({"stop_token_ids": [90, 5]}, 5),
        ({"max_model_len": 6}, 5),
    ],
)
def test_of_accepted_drafts_those_behind_the_end_are_left_out(sampling, length):
    engine = Engine()
    engine.runner.max_model_len = sampling.pop("max_model_len", 100)
    engine.runner.requests["a"] = State(3, **sampling)
    engine.step({"a": (0, 3)})
    engine.step({"a": (3, 6)}, drafts={"a": (2, 2)})
    result = engine.fetch("a")
    assert result.tokens.tolist() == [list(range(length))]
    assert result["waad"].shape == (1, 1, 2, length)


def test_a_step_that_samples_nothing_has_no_accepted_drafts():
    engine = Engine()
    engine.step({"a": (0, 3)})
    engine.runner.requests["a"].sample = lambda end: None
    engine.runner.requests["a"].prompt_token_ids = list(range(4))
    engine.step({"a": (3, 6)}, drafts={"a": (2, 0)})
    assert engine.fetch("a")["waad"].isfinite().all()


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


def output_of(tokens, finished=True, request_id="a", index=0, begin=4):
    """Of four tokens of a prompt; begin: the first token of the output that it has."""
    completion = SimpleNamespace(index=index, token_ids=tokens[begin:], finish_reason="length" if finished else None)
    return SimpleNamespace(request_id=request_id, finished=finished, prompt_token_ids=tokens[:4], outputs=[completion])


class LLM:
    def __init__(self, engine):
        self.engine = engine

    def collective_rpc(self, method, args):
        assert method == "attnstats_fetch"
        return [self.engine.recorder.fetch(*args)]


class AsyncLLM(LLM):
    async def collective_rpc(self, method, args):
        return super().collective_rpc(method, args)


def test_an_output_finds_its_statistics_and_no_others():
    engine = Engine()
    engine.step({"a": (0, 8), "b": (0, 8)})
    tokens = [*range(8), 8]
    with pytest.raises(TypeError, match=r"llm must be a vllm\.LLM, got Engine"):
        statistics_of(engine, output_of(tokens))
    with pytest.raises(TypeError, match=r"output must be a vllm\.RequestOutput, got list"):
        statistics_of(LLM(engine), [output_of(tokens)])
    with pytest.raises(ValueError, match="request 'a' is not finished"):
        statistics_of(LLM(engine), output_of(tokens, finished=False))
    assert statistics_of(LLM(engine), output_of(tokens)).tokens.tolist() == [tokens[:8]]
    result = asyncio.run(async_statistics_of(AsyncLLM(engine), output_of(tokens, request_id="b")))
    assert result["waad"].shape == (1, 1, 2, 8)
    engine.step({"c": (0, 8)})
    with pytest.raises(RuntimeError, match="request 'c': the statistics are of other tokens"):
        statistics_of(LLM(engine), output_of([7, *tokens], request_id="c"))
    assert statistics_of(LLM(engine), output_of(tokens, request_id="c")).tokens.tolist() == [tokens[:8]]


@pytest.mark.parametrize("is_finished", [False, True])
def test_the_last_delta_of_a_stream_finds_the_whole_request(is_finished):
    engine = Engine()
    engine.step({"a": (0, 8)})
    engine.step({}, ["a"] if is_finished else [])
    tokens = [*range(8), 8]
    with pytest.raises(RuntimeError, match="request 'a': the statistics are of other tokens"):
        statistics_of(LLM(engine), output_of([*tokens[:4], 9, 9, 9]))
    assert statistics_of(LLM(engine), output_of(tokens, begin=6)).tokens.tolist() == [tokens[:8]]
    with pytest.raises(RuntimeError, match="request 'a': nothing is kept of it"):
        statistics_of(LLM(engine), output_of(tokens))


def test_a_streamed_output_has_the_completion_that_ended():
    engine = Engine()
    engine.step({f"{i}_a-1a2b3c4d": (0, 8) for i in (0, 1)})
    tokens = [*range(8), 8]
    ended = output_of(tokens, index=1)
    ended.finished = False  # the other one goes on
    with pytest.raises(ValueError, match="completion must be one that the output has, 1; got 0"):
        statistics_of(LLM(engine), ended)
    assert statistics_of(LLM(engine), ended, 1).tokens.tolist() == [tokens[:8]]
    assert statistics_of(LLM(engine), output_of(tokens), 0).tokens.tolist() == [tokens[:8]]


def test_of_requests_with_the_same_id_the_tokens_tell():
    engine = Engine()
    engine.step({"a-11111111": (0, 8)})
    engine.step({"a-22222222": (0, 8)}, ["a-11111111"])
    engine.runner.requests["a-22222222"].prompt_token_ids = list(range(10, 18))
    for tokens in (range(9), range(10, 19)):
        assert statistics_of(LLM(engine), output_of(list(tokens))).tokens.tolist() == [list(tokens)[:8]]
    engine.step({"b-11111111": (0, 8)})
    engine.step({"b-22222222": (0, 4)}, ["b-11111111"])  # the same prompt again
    assert statistics_of(LLM(engine), output_of(list(range(9)), request_id="b"))["waad"].shape == (1, 1, 2, 8)


@pytest.mark.parametrize("token_entropy", [False, True])
@pytest.mark.parametrize("reduce", [(), ("heads",), ("layers",), ("layers", "heads")])
def test_the_memory_of_a_request_is_known_before_it_starts(reduce, token_entropy):
    kinds = (WAAD(3), FAI(1, 4), SegmentMass((0, 2, 5, None)), *(() if reduce else (TopKeys(3),)))
    engine = Engine(RequestSettings(kinds, layers=[0, 1, 2], reduce=reduce, token_entropy=token_entropy))
    per_token = bytes_per_token(engine.recorder.settings, engine.recorder._head_counts)
    assert f"{per_token} bytes for each token" in engine.recorder.memory(8, 1)
    engine.step({"a": (0, 5)})
    engine.step({"a": (5, 8)})
    held = [vars(x) for x in tensors_of(engine.recorder._running["a"])]
    assert sum(x["_buffer"][..., :8].nbytes for x in held) == 8 * per_token
    assert sum(x["_buffer"].nbytes for x in held) <= most_tokens(8) * per_token


def tensors_of(recording):
    """The growing tensors of a recording."""
    by_layer = [x for of_layers in recording._sums.values() for x in of_layers.values()]
    return by_layer + [x for x in vars(recording).values() if isinstance(x, GrowingTensor)]


def kept(engine, names):
    """Those that are there to be fetched, and then no longer are."""
    return [name for name in names if b"nothing is kept" not in engine.recorder.fetch(name, 0, [], [])]


@pytest.mark.parametrize("attends", [True, False])
def test_memory_for_finished_requests_is_limited(attends):
    """Records, with their tokens and the reasons of failures, and what holds them; 16 of these are 10 KB at least."""
    engine = Engine(replace(SETTINGS, keep_mb=0.005))
    if not attends:
        engine.attend = lambda spans: None
    for turn in range(1, 4):  # what was fetched leaves room for others
        names = [f"{turn}-{i}" for i in range(16)]
        for name in names:
            engine.step({name: (0, 8)})
            engine.step({}, [name])
        found = kept(engine, names)
        assert 1 <= len(found) <= 8
        assert found == names[-len(found) :]
        assert engine.recorder.dropped == turn * (16 - len(found))


def test_a_folder_alone_can_keep_requests(tmp_path):
    engine = Engine(replace(SETTINGS, folder=str(tmp_path), keep_mb=0))
    engine.step({"a-1a2b3c4d": (0, 8)})
    engine.step({}, ["a-1a2b3c4d"])
    assert kept(engine, ["a"]) == []
    assert list(RequestStore(tmp_path)) == ["a-1a2b3c4d"]


def test_what_the_end_of_an_engine_finds_is_written(tmp_path):
    """The worker hears that a request ended with the step behind, which the last ones don't have."""
    engine = Engine(replace(SETTINGS, folder=str(tmp_path)))
    engine.step({"done-1a2b3c4d": (0, 8)})
    engine.step({"running-1a2b3c4d": (0, 4)})
    engine.recorder.begin(engine.scheduled({"running-1a2b3c4d": (4, 8)}))
    engine.recorder.close()
    store = RequestStore(tmp_path)
    assert {name: result.tokens.shape[1] for name, result in store.items()} == {
        "done-1a2b3c4d": 8,
        "running-1a2b3c4d": 4,
    }
    Engine(replace(SETTINGS, folder=str(tmp_path))).recorder.close()  # the next one may write there


def test_a_prompt_of_embeddings_has_no_tokens():
    engine = Engine()
    engine.embeddings = {"a": torch.ones(8, 16)}
    engine.step({"a": (0, 8), "b": (0, 8)})
    engine.runner.requests["a"].prompt_token_ids = None
    with pytest.raises(RuntimeError, match="request 'a' has no statistics: its prompt has embeddings"):
        engine.fetch("a")
    assert engine.fetch("b")["waad"].shape == (1, 1, 2, 8)


def test_a_cache_that_can_not_be_read_costs_statistics_alone(monkeypatch):
    engine = Engine()

    def fails():
        raise ValueError("numbers are converted")

    monkeypatch.setattr(engine, "look", fails)
    engine.step({"a": (0, 4)})
    with pytest.raises(RuntimeError, match="layer 0: ValueError: numbers are converted"):
        engine.fetch("a")


def test_a_record_that_can_not_be_made_costs_one_request(monkeypatch):
    engine = Engine()
    engine.step({"a": (0, 4), "b": (0, 4)})
    del engine.runner.requests["a"]
    engine.step({"b": (4, 8)}, ["a"])
    with pytest.raises(RuntimeError, match="request 'a' has no statistics: KeyError"):
        engine.fetch("a")
    assert engine.fetch("b")["waad"].shape == (1, 1, 2, 8)


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


def entropies(length, temperature):
    logits = torch.arange(length)[:-1, None] * LOGITS / temperature
    return torch.distributions.Categorical(logits=logits).entropy()


@pytest.mark.parametrize("steps", [[(0, 8)], [(0, 3), (3, 5), (5, 8)], [(0, 6), (0, 8)], [(0, 4), (2, 8)]])
def test_token_entropies_are_of_the_distributions_behind_the_tokens(steps):
    """Also of a request that is preempted, whose queries are repeated."""
    engine = Engine(replace(SETTINGS, token_entropy=True))
    for span in steps:
        engine.step({"a": span, "b": span})
    entropy = engine.fetch("a").token_entropy
    assert entropy[0].isnan()
    torch.testing.assert_close(entropy[1:], entropies(8, 0.5))


def test_token_entropies_behind_cached_tokens_are_unknown():
    engine = Engine(replace(SETTINGS, token_entropy=True))
    engine.step({"a": (4, 8)})
    entropy = engine.fetch("a").token_entropy
    assert entropy[:5].isnan().all()
    torch.testing.assert_close(entropy[5:], entropies(8, 0.5)[4:])


def test_hidden_states_that_are_not_seen_cost_statistics_alone():
    engine = Engine(replace(SETTINGS, token_entropy=True))
    engine.model._forward_hooks.clear()
    engine.step({"a": (0, 8)})
    with pytest.raises(RuntimeError, match=r"hidden states were not seen in a step, .* set token_entropy=False"):
        engine.fetch("a")


def test_a_result_knows_its_adapter():
    engine = Engine()
    engine.recorder.model = records.Model("base")
    engine.adapters = {"a": SimpleNamespace(lora_name="one")}
    engine.step({"a": (0, 8), "b": (0, 8)})
    assert [engine.fetch(name).model.name for name in ("a", "b")] == ["base + one", "base"]


def test_a_result_knows_its_prompt():
    engine = Engine()
    engine.step({"a": (0, 8)})
    assert engine.fetch("a").prompt == 8
