"""The recorder on a cache of FlashAttention's layouts, as on a GPU, with tensors of the CPU; vLLM is not needed."""

from __future__ import annotations

import functools
import itertools
from types import SimpleNamespace

import pytest
import torch

from attnstats import FAI, WAAD, Entropy, LocalMass, MaxLogit, Received, TopKeys, paged_statistics, reference
from attnstats.integrations.vllm import sums
from attnstats.integrations.vllm.configuration import RequestSettings
from attnstats.integrations.vllm.recorder import Recorder
from attnstats.integrations.vllm.sums import KeyCache
from tests.integrations.test_vllm_recorder import DIM, SIZE, Engine, in_steps_with_drafts

BANDS = RequestSettings((WAAD(3), LocalMass(2), FAI(1, 4)), layers=[0], reduce=())
WHOLE = RequestSettings((WAAD(3), MaxLogit(), Entropy(), Received(), FAI(2, None), TopKeys(2)), layers=[0], reduce=())
OPTIONS = {"scale": 0.25, "enable_gqa": True}


class PagedEngine(Engine):
    """Its cache is FlashAttention's, (blocks, heads, size, keys and values); metadata and queries are padded."""

    def __init__(self, settings, layout="NHD", dtype=torch.float64, kernel=True):
        super().__init__(settings)
        self.kernel, self.dtype = kernel, dtype
        self.cache = self.cache.to(dtype)
        shape = {"NHD": (9, SIZE, 1, 2 * DIM), "HND": (9, 1, SIZE, 2 * DIM)}[layout]
        whole = torch.full(shape, torch.nan, dtype=dtype)
        self.kv_cache = whole.transpose(1, 2) if layout == "NHD" else whole
        self.kv_cache.transpose(1, 2)[..., :DIM] = self.cache
        self.metadata = {}
        self.watches = [self.impl.watch]

    def attend(self, spans):
        rows = [(self.known[name], *spans[name]) for name in reversed(spans)]
        queries = self.queries(spans)
        starts = [0, *itertools.accumulate(len(q) for q in queries)]
        metadata = SimpleNamespace(
            query_start_loc=torch.tensor([*starts, starts[-1]], dtype=torch.int32),
            seq_lens=torch.tensor([*(end for *_, end in rows), 0], dtype=torch.int32),
            block_table=torch.tensor([[2 * number, 2 * number + 1] for number, *_ in rows] + [[0, 0]]).int(),
            **self.metadata,
        )
        padding = torch.full((3, 2, DIM), torch.nan, dtype=self.dtype)
        pages = self.kv_cache.transpose(1, 2)[..., :DIM]

        def log_sum_exps():
            lse = [self.truth(number, WAAD(1))[1].lse[0, :, begin:end] for number, begin, end in rows]
            return torch.cat(lse, dim=1).to(self.dtype) if self.kernel else None

        cache = KeyCache(SIZE, pages.__getitem__, pages, log_sum_exps)
        for i, watch in enumerate(self.watches):
            watch(torch.cat([*queries, padding]) * (-1) ** i, lambda: cache, metadata)

    def query(self, number):
        return super().query(number).to(self.dtype)

    def truth(self, number, *statistics, sign=1):
        """One pass over a request's eight tokens by definition, in float64."""
        key = self.cache[2 * number : 2 * number + 2].flatten(0, 1).transpose(0, 1)[None].double()
        query = self.query(number).transpose(0, 1)[None].double() * sign
        return reference.attention(query, key, key, statistics=statistics, **OPTIONS)

    def check(self, name, settings, atol=1e-12):
        result = self.fetch(name)
        expected = self.truth(self.known[name], *settings.statistics)[1]
        for s in settings.statistics:
            near = {"rtol": atol, "atol": atol, "check_dtype": False}
            found = s.returned(expected.tensors[s]) if s.axis == "row" else expected[s]
            torch.testing.assert_close(result[s], _in_layers(found), **near, msg=lambda m: f"{s}: {m}")  # noqa: B023


def _in_layers(x):
    return type(x)(*(each[None] for each in x)) if isinstance(x, tuple) else x[None]


def in_steps(engine):
    engine.step({"a": (0, 3)})
    engine.step({"b": (0, 6), "a": (3, 5)})
    engine.step({"b": (2, 3)})  # b was preempted, and starts again behind two tokens in the cache
    engine.step({"a": (5, 8), "b": (3, 7)})
    engine.step({"b": (7, 8)})
    return engine


@pytest.mark.parametrize("kernel", [True, False], ids=["lse", "no lse"])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("settings", [BANDS, WHOLE], ids=["bands", "whole"])
def test_steps_are_one_pass_over_each_request(settings, layout, kernel):
    engine = in_steps(PagedEngine(settings, layout, kernel=kernel))
    engine.check("a", settings)
    engine.check("b", settings)


@pytest.mark.parametrize("kernel", [True, False], ids=["lse", "no lse"])
@pytest.mark.parametrize("settings", [BANDS, WHOLE], ids=["bands", "whole"])
def test_rejected_drafts_leave_no_trace(settings, kernel):
    engine = in_steps_with_drafts(PagedEngine(settings, kernel=kernel))
    engine.check("a", settings)
    engine.check("b", settings)


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_the_kernels_read_the_pages(layout, monkeypatch):
    monkeypatch.setattr(sums, "paged_statistics", functools.partial(paged_statistics, backend="triton"))
    engine = in_steps(PagedEngine(BANDS, layout, torch.float32))
    engine.check("a", BANDS, 1e-5)
    engine.check("b", BANDS, 1e-5)


def test_requests_that_are_not_recorded_are_left_out():
    engine = PagedEngine(BANDS)
    attend = engine.attend
    engine.attend = lambda spans: None
    engine.step({"b": (0, 4)})
    engine.attend = attend
    engine.step({"c": (0, 2), "b": (4, 6), "a": (0, 5)})
    engine.step({"a": (5, 8), "b": (6, 8), "c": (2, 8)})
    engine.check("a", BANDS)
    engine.check("c", BANDS)
    with pytest.raises(RuntimeError, match="was not seen in a step"):
        engine.fetch("b")


def test_nothing_is_read_back_before_the_layers_ran(monkeypatch):
    """A look at a tensor on a GPU waits for it: boundaries and lengths are known without."""
    engine = PagedEngine(BANDS)
    engine.step({"a": (0, 3)})
    monkeypatch.setattr(sums, "paged_statistics", functools.partial(_blind, paged_statistics))
    (watch,) = engine.watches
    steps = []

    def blind(*args):
        with monkeypatch.context() as patch:
            for name in ("tolist", "item", "cpu", "__int__", "__bool__"):
                patch.setattr(torch.Tensor, name, _looked)
            watch(*args)
        steps.append(args)

    engine.watches = [blind]
    engine.step({"a": (3, 8)})
    assert len(steps) == 1
    engine.check("a", BANDS)


def _blind(compute, *args, **arguments):
    """What it does by itself is its own tests' affair."""
    with pytest.MonkeyPatch.context() as patch:
        for name, method in LOOKS.items():
            patch.setattr(torch.Tensor, name, method)
        assert arguments["max_seqlen_q"] == 5
        return compute(*args, **arguments)


LOOKS = {name: getattr(torch.Tensor, name) for name in ("tolist", "item", "cpu", "__int__", "__bool__")}


def _looked(*_):
    raise AssertionError("a tensor was read back")


@pytest.mark.parametrize(
    ("name", "value"), [("causal", False), ("causal", torch.ones(1)), ("rswa_prefix_lens", torch.ones(1))]
)
def test_attention_that_is_not_causal_is_refused_by_name(name, value):
    engine = PagedEngine(BANDS)
    engine.metadata = {name: value}
    engine.step({"a": (0, 3)})
    with pytest.raises(RuntimeError, match=f"layer 0: ValueError: the step has {name}, and only causal attention"):
        engine.fetch("a")


@pytest.mark.parametrize("heads", [{}, {FAI(1, 4): (1,)}], ids=["all", "chosen"])
@pytest.mark.parametrize("reduce", [(), "heads", "layers", ("layers", "heads")])
def test_layers_are_added_up(reduce, heads):
    """Of two layers, whose queries have opposite signs."""
    settings = RequestSettings((WAAD(3), FAI(1, 4)), layers=[0, 1], reduce=reduce)
    engine = PagedEngine(settings, kernel=False)
    impls = [SimpleNamespace(**vars(engine.impl)) for _ in range(2)]
    layers = {i: SimpleNamespace(impl=impl) for i, impl in enumerate(impls)}
    chosen = {s: dict.fromkeys(layers, heads.get(s)) for s in settings.statistics}
    engine.recorder = Recorder(settings, layers, chosen, engine.runner)
    engine.watches = [impl.watch for impl in impls]
    result = in_steps(engine).fetch("a")
    passes = [engine.truth(0, *settings.statistics, sign=sign)[1] for sign in (1, -1)]
    for s in settings.statistics:
        expected = torch.stack([each[s] for each in passes])[:, :, list(heads.get(s, (0, 1)))]
        expected = expected.mean(2) if "heads" in settings.reduce else expected
        expected = expected.mean(0) if "layers" in settings.reduce else expected
        torch.testing.assert_close(result[s], expected, atol=1e-12, rtol=1e-12, check_dtype=False)
