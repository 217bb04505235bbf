"""Inputs at the ends of their range: no queries, huge sinks, NaN under padding, autocast, gradients of huge logits."""

import functools

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import attnstats
from attnstats import FAI, LSE, WAAD, Entropy, LocalMass, MaxLogit, MeanDistance, Received, SinkMass, reference
from attnstats.tiled import native

STATISTICS = (WAAD(5), FAI(1, 6), Entropy(), Received(), MaxLogit(), LSE(), SinkMass(3))


@pytest.fixture(params=["reference", "tiled", "plain", "triton"])
def attention(request, monkeypatch):
    if request.param == "reference":
        return reference.attention
    monkeypatch.setattr(native, "enabled", request.param != "plain")
    return functools.partial(attnstats.attention, backend="triton" if request.param == "triton" else "tiled")


def tensors(batch=1, queries=20, keys=20, dim=16):
    generator = torch.Generator().manual_seed(0)
    shapes = ((batch, 4, queries, dim), (batch, 2, keys, dim), (batch, 2, keys, dim))
    return [torch.randn(shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize(("batch", "queries", "keys"), [(0, 20, 20), (1, 0, 20), (2, 0, 0)])
def test_no_queries(attention, batch, queries, keys):
    inputs = [x.requires_grad_() for x in tensors(batch, queries, keys)]
    output, stats = attention(*inputs, statistics=STATISTICS, enable_gqa=True)
    assert output.shape == (batch, 4, queries, 16)
    for s in STATISTICS:
        assert stats[s].shape == (batch, 4, keys if s.axis == "column" else queries)
        assert not stats[s].any()
        assert stats.valid[s].shape == (batch, stats[s].shape[-1])
    assert not stats.valid[FAI(1, 6)].any()
    output.sum().backward()
    assert all(not x.grad.any() for x in inputs)


def test_no_tokens_packed():
    query = torch.empty(0, 4, 16)
    output, stats = attnstats.varlen_attention(
        query, query, query, cu_seqlens_q=torch.zeros(2, dtype=torch.int32), statistics=[WAAD(5), Received()]
    )
    assert output.shape == (0, 4, 16)
    assert stats["waad"].shape == stats["received"].shape == (4, 0)


@pytest.mark.parametrize("argument", ["key", "query"])
def test_no_keys_or_no_heads_are_refused(argument):
    query, key, value = tensors()
    if argument == "key":
        key, value = key[:, :, :0], value[:, :, :0]
    else:
        query = query[..., :0]
    with pytest.raises(ValueError, match=f"{argument} is empty"):
        attnstats.attention(query, key, value, enable_gqa=True)


@pytest.mark.parametrize("number", [torch.inf, torch.nan])
def test_a_sink_without_a_softmax_is_refused(attention, number):
    with pytest.raises(ValueError, match="sinks must be finite, or -inf for none"):
        attention(*tensors(), sinks=torch.tensor([0.0, number, 0.0, 0.0]), enable_gqa=True)


@pytest.mark.parametrize("keys", [20, 300])  # with few queries and many keys the kernels split the keys
@pytest.mark.parametrize("sink", [1e4, 2.3e38, 2.5e38, 3.4e38])
def test_a_huge_sink_takes_all(attention, sink, keys):
    query, key, value = tensors(queries=20 if keys == 20 else 3, keys=keys)
    sinks = torch.tensor([0.0, sink, -torch.inf, 1.0])
    arguments = {"statistics": STATISTICS, "enable_gqa": True}
    output, stats = attention(query, key, value, sinks=sinks, **arguments)
    assert not output[:, 1].any()
    torch.testing.assert_close(stats["lse"][:, 1], torch.full_like(stats["lse"][:, 1], sink))
    for name in ("waad", "fai", "entropy", "received", "sink_mass"):
        assert not stats[name][:, 1].any(), name
    other = attention(query, key, value, sinks=sinks.clamp(max=1.0), **arguments)[1]
    for s in STATISTICS:
        torch.testing.assert_close(stats[s][:, [0, 2, 3]], other[s][:, [0, 2, 3]])
    some = attention(query, key, value, sinks=sinks, heads=[1], **arguments)[1]
    assert not some["waad"].any()


@pytest.mark.parametrize("sink", [88.0, 92.0, 103.0])
def test_a_sink_whose_lead_is_at_the_end_of_exps_range(attention, sink):
    query, key, value = tensors(queries=3, keys=70)  # the kernels split the keys
    arguments = {"statistics": STATISTICS, "enable_gqa": True, "sinks": torch.tensor([0.0, sink, 0.0, 1.0])}
    _, stats = attention(query, key, value, **arguments)
    _, expected = reference.attention(query.double(), key.double(), value.double(), **arguments)
    for s in STATISTICS:
        torch.testing.assert_close(stats[s].double(), expected[s].double(), atol=1e-5, rtol=1e-5)


def test_nan_under_padding_reaches_nothing(attention):
    query, key, value = tensors()
    padding = torch.arange(20)[None] >= 3
    spoiled = key.clone()
    spoiled[:, :, :3] = torch.nan
    arguments = {"statistics": STATISTICS, "enable_gqa": True, "key_padding_mask": padding}
    results = []
    for keys in (key, spoiled):
        inputs = [query.clone().requires_grad_(), keys.clone().requires_grad_(), value]
        output, stats = attention(*inputs, **arguments)
        results.append([output.detach(), *map(stats.__getitem__, STATISTICS)])
        if isinstance(attention, functools.partial) and attention.keywords["backend"] == "tiled":
            results[-1] += torch.autograd.grad(output.square().sum(), inputs[:2])  # elsewhere 0 * NaN, as in SDPA
    for clean, other in zip(*results, strict=True):
        torch.testing.assert_close(other, clean)


def test_keys_beyond_the_window_may_score_high(attention):
    """Their score above the row's maximum is one that exp2 can't take, and they have weight 0."""
    key = torch.zeros(1, 1, 40, 16)
    key[..., 1, 0] = 1000.0
    query = torch.ones(1, 1, 40, 16)
    statistics = (WAAD(1), FAI(1, 6), MeanDistance())
    _, stats = attention(query, key, key, statistics=statistics, is_causal=True, window_size=(9, 0), scale=1.0)
    for s in statistics:
        assert stats[s].isfinite().all()
    assert stats[WAAD(1)][0, 0, 11:].tolist() == pytest.approx([0.9] * 29)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_autocast_gives_the_dtype_of_sdpa(dtype):
    inputs = [x.to(dtype) for x in tensors()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, stats = attnstats.attention(*inputs, statistics=STATISTICS, enable_gqa=True)
        expected = scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=True)
    assert output.dtype == expected.dtype
    assert torch.equal(output, expected)
    assert stats["waad"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


HUGE = {
    "causal": {},
    "full": {"is_causal": False},
    "window": {"window_size": (6, 0)},
    "padding": {"key_padding_mask": torch.arange(20)[None] >= 3},
    "sinks": {"sinks": torch.tensor([19803.0, -torch.inf, 0.0, 3e38])},
    "few queries": {"queries": 3, "keys": 70},  # the kernels split the keys
    "packed": {"cu_seqlens_q": torch.tensor([0, 5, 20], dtype=torch.int32)},
}
CARRY_GRADIENTS = (Entropy(), WAAD(5), LocalMass(3), MeanDistance(), FAI(1, 6), FAI(2, None), Received(), LSE())


def compare_gradients_of_huge_logits(backend, settings, statistics, of_output, through=lambda function: function):
    """At scores of 2e4 an lse in float32 is rounded by 1e-3; the gradients err at most twice as much as eager's.

    In sixteenths, and of this size, products are exact, so that the order of summation is not what is compared.
    """
    settings = dict(settings)
    sizes = {size: settings.pop(size) for size in ("queries", "keys") if size in settings}
    query, key, value = (x.mul(16).round().div(16) for x in tensors(dim=24, **sizes))
    query[..., -1], key[..., -1] = (start + x[..., -1].round() / 16 for start, x in ((180, query), (200, key)))
    sinks = settings.pop("sinks", None)
    packed = "cu_seqlens_q" in settings

    def gradients(module, dtype, **arguments):
        inputs = [x.to(dtype, copy=True).requires_grad_() for x in (query, key, value, sinks) if x is not None]
        views = [x[0].transpose(0, 1) for x in inputs[:3]] if packed else inputs[:3]
        function = module.varlen_attention if packed else module.attention
        if module is attnstats:
            function = through(function)
        arguments |= settings | {"scale": 0.55, "enable_gqa": True, "sinks": inputs[3] if sinks is not None else None}
        output, stats = function(*views, statistics=statistics, differentiable=True, **arguments)
        results = [output] * of_output + [stats[s] for s in statistics]
        generator = torch.Generator().manual_seed(1)
        weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(dtype) for x in results]
        grads = torch.autograd.grad(results, inputs, weights, materialize_grads=True)
        return [x[..., :-1].double() if i < 2 else x.double() for i, x in enumerate(grads)]  # there all of it cancels

    truth = gradients(reference, torch.float64)
    eager = gradients(reference, torch.float32)
    ours = gradients(attnstats, torch.float32, backend=backend)
    names = ("query", "key", "value", "sinks")[: len(truth)]
    for argument, expected, by_eager, by_us in zip(names, truth, eager, ours, strict=True):
        error, limit = (by_us - expected).abs().max(), 2 * (by_eager - expected).abs().max()
        if argument == "sinks":  # a sink meets the scores in the exp2 domain, where both are rounded once more
            limit += 2e4 * torch.finfo(torch.float32).eps * expected.abs().max()
        assert error <= limit + 1e-5, f"{argument}: {error:.1e} > {limit:.1e}"


@pytest.mark.parametrize("statistic", CARRY_GRADIENTS, ids=str)
@pytest.mark.parametrize("backend", ["tiled", "triton"])
def test_gradients_of_huge_logits(backend, statistic):
    compare_gradients_of_huge_logits(backend, {}, [statistic], False)


@pytest.mark.parametrize("name", HUGE)
def test_gradients_of_huge_logits_and_the_output(name):
    compare_gradients_of_huge_logits("triton", HUGE[name], CARRY_GRADIENTS, True)


@pytest.mark.parametrize(("backend", "name"), [("tiled", "packed"), ("triton", "sinks")])
def test_gradients_of_the_output_alone_with_huge_logits(backend, name):
    compare_gradients_of_huge_logits(backend, HUGE[name], (), True)


@pytest.mark.parametrize("name", ["sinks", "packed"])
def test_gradients_of_huge_logits_in_a_graph(name):
    through = functools.partial(torch.compile, backend="aot_eager", fullgraph=True)
    compare_gradients_of_huge_logits("triton", HUGE[name], CARRY_GRADIENTS, True, through)
