"""Attention in a graph: the operators, torch.compile without a break, torch.export, and equality with a plain call."""

import dataclasses
from dataclasses import dataclass

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck

import attnstats
from attnstats import FAI, LSE, WAAD, Entropy, MaxLogit, MeanDistance, PooledMap, Received, SinkMass
from attnstats.core import wire
from attnstats.core.options import Options
from attnstats.statistics import RowStatistic, resolve
from tests.cases import Case

ASKED = (WAAD(5), FAI(2, 20), Entropy(), LSE())
CASES = {
    "causal": Case(key_heads=1),
    "full": Case(is_causal=False, key_heads=1, batch=1),
    "padding": Case(padding="left", counted="some", key_heads=1),
    "heads": Case(heads="some", group=4, key_heads=1, batch=1),
    "half": Case(dtype="float16", batch=1, query_length=196, key_length=196, key_heads=1),
    "bfloat": Case(dtype="bfloat16", batch=1, query_length=257, key_length=257, key_heads=1, value_dim=24),
    "strided": Case(layout="strided", value_dim=8, key_heads=1),
    "bthd": Case(layout="bthd"),
    "last": Case(query_length=3, window_size=(9, 0), softcap=5.0, sinks=True),
    "one": Case(query_length=1, key_length=1, batch=1, key_heads=1),
    "packed": Case(packed=((5, 9), (0, 3), (12, 12)), key_heads=1, counted="some"),
    "packed-heads": Case(packed=((5, 5), (20, 20)), key_heads=1, heads="split", is_causal=False),
    "double": Case(dtype="float64", batch=1, group=1),
}


def statistics_of(case):
    every = [*ASKED, MeanDistance(), Received(last=4), SinkMass(3), MaxLogit()]
    if not case.packed:
        every.append(PooledMap(1, min(2, case.key_length)))
    return [s for s in every if s in case.statistics() or not isinstance(s, FAI | MeanDistance) or case.is_causal]


def call_of(case, asked, **options):
    """attention or varlen_attention with the case's arguments, as a function of its tensors."""
    given = case.arguments() | options
    if isinstance(given["heads"], dict):
        given["heads"] = {s: [0] if s is asked[0] else [1] for s in asked}
    function = attnstats.varlen_attention if case.packed else attnstats.attention

    def call(query, key, value):
        return function(query, key, value, statistics=asked, **given)

    return call, given


def shorter(case, backend):
    """For the interpreter, which takes its time."""
    if backend != "triton" or case.packed:
        return case
    return dataclasses.replace(case, batch=1, query_length=min(20, case.query_length), key_length=20)


def tensors_of(case):
    tensors = case.tensors()
    return case.views(tensors)


def flat(result, asked):
    output, found = result
    return [output, found.lse, *(found[s] for s in asked), *(found.valid[s] for s in asked)]


def compiled(function, backend="aot_eager", **options):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend=backend, **options)


def assert_same(found, expected):
    assert len(found) == len(expected)
    for x, y in zip(found, expected, strict=True):
        assert x.dtype == y.dtype
        assert torch.equal(x, y)


def encoded(given, statistics, **changed):
    options = Options(**(given | changed | {"statistics": resolve(statistics)}))
    return wire.encode(options._replace(dropout_seed=torch.tensor([7]) if options.dropout_p else None))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_operators_keep_their_promises(case):
    asked = statistics_of(case)
    tensors = tensors_of(case)
    key = tensors[1]
    _, given = call_of(case, asked)
    operators = torch.ops.attnstats
    settings = encoded(given, asked)
    output, lse, pivot, factor, values = operators.attention(*tensors, *settings)
    kept = tuple(s for s in asked if isinstance(s, (WAAD, FAI, Entropy, LSE)))
    for x in tensors:
        x.requires_grad_()
    opcheck(operators.attention.default, (*tensors, *settings))
    if isinstance(given["heads"], dict):
        given["heads"] = {s: given["heads"][s] for s in kept}
    differentiable = encoded(given, kept, differentiable=True)
    opcheck(operators.attention.default, (*tensors, *differentiable))
    tensors = [x.detach() for x in tensors]
    grads = [torch.ones_like(x) for x, s in zip(values, asked, strict=True) if s in kept]
    grads[0] = None
    values = [x for x, s in zip(values, asked, strict=True) if s in kept]
    backward = (*tensors, output, lse, pivot, factor, values, torch.ones_like(output), grads, *differentiable)
    opcheck(operators.attention_backward.default, backward)
    without = [s for s in asked if not isinstance(s, MaxLogit)]
    if isinstance(given["heads"], dict):
        given["heads"] = None
    opcheck(operators.statistics_from_lse.default, (*tensors[:2], lse, *encoded(given, without)))
    keys = key.shape[0] if case.packed else key.shape[2]
    opcheck(operators.valid.default, (lse, keys, *encoded(given, without, heads=None)))


@pytest.mark.parametrize("backend", ["auto", "tiled", "reference", "triton"])
@pytest.mark.parametrize("name", ["padding", "packed", "last", "bfloat"])
def test_a_graph_gives_what_a_call_gives(name, backend):
    case = shorter(CASES[name], backend)
    asked = [WAAD(5), FAI(2, 20), Received()]
    call, _ = call_of(case, asked, backend=backend)
    tensors = tensors_of(case)
    found = compiled(call)(*tensors)
    assert_same(flat(found, asked), flat(call(*tensors), asked))
    assert found.statistics["waad"] is found.statistics[WAAD(5)]


@pytest.mark.parametrize("backend", ["tiled", "reference", "triton"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("name", ["causal", "packed", "last"])
def test_a_training_step_is_the_same(name, dropout_p, backend):
    case = shorter(CASES[name], backend)
    asked = [WAAD(5), FAI(2, 20), LSE(), Entropy()]
    _, given = call_of(case, asked, backend=backend, dropout_p=dropout_p, differentiable=True)
    sinks = given.pop("sinks")
    attention = attnstats.varlen_attention if case.packed else attnstats.attention

    def step(query, key, value, sinks=None):
        output, found = attention(query, key, value, statistics=asked, sinks=sinks, **given)
        # No use of Entropy: a gradient that is None reaches the operator.
        return output.square().sum() + found["waad"].square().sum() + 30 * found["fai"].sum() + found["lse"].sum()

    def gradients(step):
        torch.manual_seed(3)
        inputs = [x.clone().requires_grad_() for x in (*tensors_of(case), sinks) if x is not None]
        step(*inputs).backward()
        return [x.grad for x in inputs]

    assert_same(gradients(compiled(step)), gradients(step))


def test_statistics_carry_no_gradient_unless_asked():
    query, key, value = (x.requires_grad_() for x in CASES["causal"].tensors())
    call, _ = call_of(CASES["causal"], [WAAD(5)])
    output, found = compiled(call)(query, key, value)
    assert output.requires_grad
    assert not found["waad"].requires_grad
    assert not found.lse.requires_grad


def test_an_additive_mask_has_its_gradient_in_a_graph():
    query, key, value = Case(group=1, batch=1).tensors()
    bias = torch.randn(1, 1, 37, 37)

    def gradient(call):
        leaf = bias.clone().requires_grad_()
        call(leaf).sum().backward()
        return leaf.grad

    def call(bias):
        return attnstats.attention(query, key, value, attn_mask=bias, backend="reference").output.square()

    assert_same([gradient(compiled(call))], [gradient(call)])


LENGTHS = (1, 2, 3, 16, 17, 31, 32, 33, 196, 257, 300, 1, 5)


def drawn(length, heads=(4, 2, 2), queries=None):
    return [torch.randn(2, h, length if i or queries is None else queries, 16) for i, h in enumerate(heads)]


@pytest.mark.parametrize("packed", [False, True])
def test_lengths_are_symbols(packed):
    asked = [WAAD(5), "fai", "entropy"]
    counter = CompileCounterWithBackend("aot_eager")

    def call(query, key, value, mask):
        if packed:
            result = attnstats.varlen_attention(
                query, key, value, cu_seqlens_q=mask, statistics=asked, enable_gqa=True, query_mask=query[:, 0, 0] > 0
            )
        else:
            result = attnstats.attention(query, key, value, key_padding_mask=mask, statistics=asked, enable_gqa=True)
        return flat(result, [WAAD(5), FAI(), Entropy()])

    graph = compiled(call, counter)
    for length in LENGTHS:
        query, key, value = drawn(length)
        mask = torch.rand(2, length) > 0.2
        if packed:
            query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
            mask = torch.tensor([0, length // 2, length])
        assert_same(graph(query, key, value, mask), call(query, key, value, mask))
    assert counter.frame_count <= 3


@pytest.mark.parametrize("cache", ["static", "growing"])
def test_decoding_compiles_once(cache):
    counter = CompileCounterWithBackend("aot_eager")
    query, keys, values = drawn(64, queries=1)

    def call(query, key, value, offset):
        result = attnstats.attention(
            query, key, value, statistics=["waad", "received"], enable_gqa=True, query_offset=offset
        )
        return flat(result, [WAAD(), Received()])

    graph = compiled(call, counter)
    for position in range(0, 64, 3):
        seen = 64 if cache == "static" else position + 1
        given = (query, keys[:, :, :seen], values[:, :, :seen], position)
        assert_same(graph(*given), call(*given))
    assert counter.frame_count <= 3


def test_window_and_scale_may_change():
    counter = CompileCounterWithBackend("aot_eager")

    def call(query, key, value, window, scale):
        return attnstats.attention(query, key, value, window_size=(window - 1, 0), scale=scale).output

    graph = compiled(call, counter)
    for window in range(2, 12):
        given = (*drawn(20, (2, 2, 2)), window, 0.1)
        assert_same([graph(*given)], [call(*given)])
    assert counter.frame_count <= 3
    assert_same([graph(*given[:4], 0.5)], [call(*given[:4], 0.5)])


class Model(torch.nn.Module):
    def forward(self, query, key, value):
        asked = [WAAD(5), "fai"]
        offset = key.shape[2] - query.shape[2]
        result = attnstats.attention(
            query, key, value, statistics=asked, enable_gqa=True, query_offset=offset, heads={"fai": [1, 0]}
        )
        return flat(result, [WAAD(5), FAI()])


@pytest.mark.parametrize("strict", [False, True])
def test_export_with_a_dynamic_length(strict, tmp_path):
    length = torch.export.Dim("length", min=2, max=4096)
    program = torch.export.export(Model(), tuple(drawn(37)), dynamic_shapes=({2: length},) * 3, strict=strict)
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    for n in (2, 37, 196, 257):
        tensors = drawn(n)
        assert_same(loaded(*tensors), Model()(*tensors))


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_other_tracers_see_one_operator_too(mode):
    tensors = drawn(37)
    graph = make_fx(Model(), tracing_mode=mode)(*tensors)
    names = [str(node.target) for node in graph.graph.nodes]
    assert names.count("attnstats.attention.default") == 1
    assert_same(graph(*tensors), Model()(*tensors))


WRONG = {
    "statistics": ({"statistics": ["wad"]}, ValueError),
    "statistics-kind": ({"statistics": [WAAD]}, TypeError),
    "PooledMap": ({"statistics": [PooledMap(9, 99)]}, ValueError),
    "scale": ({"scale": "big"}, ValueError),
    "softcap": ({"softcap": -1.0}, ValueError),
    "window_size": ({"window_size": (1, 2, 3)}, ValueError),
    "query_offset": ({"query_offset": 1.5}, ValueError),
    "query_offset ": ({"query_offset": -1}, ValueError),
    "heads": ({"heads": [0, 4]}, ValueError),
    "heads ": ({"heads": "all"}, TypeError),
    "heads: 'fai'": ({"heads": {"fai": [0]}}, ValueError),
    "backend": ({"backend": "cuda"}, ValueError),
    "backend ": ({"backend": 3}, ValueError),
    "dropout_p": ({"dropout_p": 1.5}, ValueError),
    "differentiable": ({"differentiable": 1}, TypeError),
    "enable_gqa": ({"enable_gqa": False}, ValueError),
    "key_padding_mask": ({"key_padding_mask": torch.ones(2, 37)}, TypeError),
    "key_padding_mask-list": ({"key_padding_mask": [True]}, TypeError),
    "sinks": ({"sinks": torch.zeros(3)}, ValueError),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_are_the_same_in_a_graph(name):
    wrong, kind = WRONG[name]
    given = {"statistics": ["waad"], "enable_gqa": True} | wrong

    def call(query, key, value):
        return attnstats.attention(query, key, value, **given).output * 2

    tensors = drawn(37)
    with pytest.raises(kind) as plain:
        call(*tensors)
    with pytest.raises(kind) as raised:
        compiled(call)(*tensors)
    assert type(raised.value) is type(plain.value)
    if not name.endswith("-list"):  # what isn't a tensor at all is refused in fewer words
        assert str(raised.value) == str(plain.value)
    assert name.split("-")[0].strip() in str(raised.value)


def test_errors_of_shapes_are_the_same_in_a_graph():
    query, key, value = drawn(37)
    cu_seqlens = torch.tensor([0, 5], dtype=torch.int32)
    wrong = [
        (attnstats.attention, (query, key[0], value), {}),
        (attnstats.attention, (query, key.half(), value), {}),
        (attnstats.attention, (query[0], key[0], value[0]), {}),
        (attnstats.attention, (query, key[:, :, :5], value), {}),
        (attnstats.varlen_attention, (query, key, value), {"cu_seqlens_q": cu_seqlens}),
        (attnstats.varlen_attention, (query[0], query[0], query[0]), {"cu_seqlens_q": None}),
        (attnstats.varlen_attention, (query[0], query[0], query[0]), {"cu_seqlens_q": [0, 5]}),
        (attnstats.varlen_attention, (query[0], query[0], query[0]), {"cu_seqlens_q": cu_seqlens.float()}),
        (attnstats.varlen_attention, (query[0, :9], key[0], value[0]), {"cu_seqlens_q": cu_seqlens}),
        (attnstats.statistics_from_lse, (query, key, query), {"statistics": ["waad"]}),
        (attnstats.statistics_from_lse, (query, key, query[..., 0]), {"statistics": ["max_logit"]}),
        (attnstats.statistics_from_lse, (query, key, query[..., 0]), {"statistics": [], "lse_base": 2}),
        (attnstats.statistics_from_lse, (query, key, query[..., 0]), {"statistics": [], "lse_layout": "BHT"}),
    ]
    for function, tensors, given in wrong:

        def call(*tensors, function=function, given=given):
            result = function(*tensors, enable_gqa=True, **given)
            return result.lse if isinstance(result, attnstats.Statistics) else result.output

        with pytest.raises((TypeError, ValueError)) as plain:
            call(*tensors)
        with pytest.raises((TypeError, ValueError)) as raised:
            compiled(call)(*tensors)
        assert type(raised.value) is type(plain.value)
        assert str(raised.value).split(", got")[0] == str(plain.value).split(", got")[0]


@pytest.mark.parametrize("around", [torch.inference_mode, torch.no_grad, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_modes_that_surround_a_graph(around):
    call, _ = call_of(CASES["causal"], list(ASKED))
    tensors = CASES["causal"].tensors()
    with around():
        found = compiled(call)(*tensors)
        assert found.output.dtype == (torch.bfloat16 if torch.is_autocast_enabled("cpu") else torch.float32)
        assert_same(flat(found, ASKED), flat(call(*tensors), ASKED))


@pytest.mark.parametrize("in_a_graph", [False, True])
def test_vmap_calls_one_by_one(in_a_graph):
    def call(query, key):
        result = attnstats.attention(query, key, key, statistics=["waad"], enable_gqa=True)
        return result.output, result.statistics["waad"], result.statistics.valid["waad"]

    query, key = torch.randn(2, 3, 2, 9, 8), torch.randn(3, 1, 9, 8)
    mapped = torch.vmap(call, in_dims=(0, None))
    found = (compiled(mapped) if in_a_graph else mapped)(query, key)
    expected = [torch.stack(x) for x in zip(*[call(x, key) for x in query], strict=True)]
    assert_same(found, expected)


@pytest.mark.parametrize("packed", [False, True])
def test_statistics_beside_another_kernel(packed):
    case = CASES["packed" if packed else "padding"]
    asked = [WAAD(5), FAI(2, 20), SinkMass()]
    given = {k: v for k, v in call_of(case, asked)[1].items() if k != "is_causal"}
    query, key, value = tensors_of(case)
    lse = (attnstats.varlen_attention if packed else attnstats.attention)(query, key, value, **given).statistics.lse

    def call(query, key, lse):
        found = attnstats.statistics_from_lse(query, key, lse, statistics=asked, lse_base="2", **given)
        return found.lse, *(found[s] for s in asked), *(found.valid[s] for s in asked)

    lse = lse / torch.tensor(2.0).log()
    assert_same(compiled(call)(query, key, lse), call(query, key, lse))
    found = compiled(call)(query.requires_grad_(), key.requires_grad_(), lse)
    assert not any(x.requires_grad for x in found)


@dataclass(frozen=True)
class Squared(RowStatistic):
    cap: int = 5
    reach: tuple[int, ...] = (1, 2)
    label: str = "near"

    @property
    def band(self):
        return -self.cap, self.cap

    @property
    def tail(self):
        return float(self.cap**2)

    @property
    def parameters(self):
        return (self.cap,)

    def weight(self, distance):
        return distance.abs().clamp(max=self.cap) ** 2


def test_statistics_that_users_define():
    @dataclass(frozen=True, slots=True)
    class Squared(RowStatistic):  # a namesake, of another weight
        cap: int = 5

        def weight(self, distance):
            return distance.abs() * 3

    module = globals()["Squared"]
    call, _ = call_of(CASES["causal"], [module(4, (7, 8)), Squared(4)])
    tensors = CASES["causal"].tensors()
    found = compiled(call)(*tensors)
    assert_same(flat(found, [module(4, (7, 8)), Squared(4)]), flat(call(*tensors), [module(4, (7, 8)), Squared(4)]))


class Block(torch.nn.Module):
    def __init__(self, layer, run):
        super().__init__()
        self.layer, self.run = layer, run
        self.project, self.out = torch.nn.Linear(16, 32), torch.nn.Linear(16, 16)

    def forward(self, x, mask):
        query, key, value = self.project(x).split([16, 8, 8], -1)
        query, key, value = (y.unflatten(-1, (-1, 4)).transpose(1, 2) for y in (query, key, value))
        output, found = attnstats.attention(
            query, key, value, statistics=self.run["asked"], key_padding_mask=mask, enable_gqa=True
        )
        self.run[self.layer] = found
        return x + self.out(output.transpose(1, 2).flatten(2))


def test_a_model_that_keeps_its_statistics():
    torch.manual_seed(0)
    run = {"asked": [WAAD(3), "fai"]}
    model = torch.nn.ModuleList([Block(0, run), Block(1, run)])

    def forward(x, mask):
        for block in model:
            x = block(x, mask)
        return x

    counter = CompileCounterWithBackend("aot_eager")
    graph = compiled(forward, counter)
    for length in (9, 20, 33):
        x, mask = torch.randn(2, length, 16), torch.rand(2, length) > 0.2
        output = graph(x, mask)
        kept = {layer: run.pop(layer) for layer in (0, 1)}
        assert_same([output], [forward(x, mask)])
        for layer, found in kept.items():
            asked = [WAAD(3), FAI()]
            assert list(found) == asked
            assert_same(flat((output, found), asked), flat((output, run[layer]), asked))
    assert counter.frame_count <= 2


def test_a_transformers_model():
    transformers = pytest.importorskip("transformers")
    run = {}

    def attend(module, query, key, value, attention_mask, scaling=None, **_):
        output, found = attnstats.attention(query, key, value, statistics=["waad"], scale=scaling, enable_gqa=True)
        run[module.layer_idx] = found
        return output.transpose(1, 2).contiguous(), None

    transformers.AttentionInterface.register("a_test_of_graphs", attend)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(**sizes, num_hidden_layers=2, vocab_size=40, use_cache=False)
    model = transformers.LlamaForCausalLM(config)
    expected = {}
    ids = {length: torch.randint(40, (2, length)) for length in (12, 13, 30)}
    for length, tokens in ids.items():
        expected[length] = model(tokens).logits.detach()
    model.set_attn_implementation("a_test_of_graphs")
    counter = CompileCounterWithBackend("aot_eager")
    graph = compiled(lambda tokens: model(tokens).logits, counter, dynamic=True)
    for length, tokens in ids.items():
        torch.testing.assert_close(graph(tokens), expected[length], atol=2e-5, rtol=0)
        kept = {layer: run.pop(layer) for layer in (0, 1)}  # dynamo guards on which keys there are
        model(tokens)
        for layer, found in kept.items():
            torch.testing.assert_close(found["waad"], run.pop(layer)["waad"], atol=1e-4, rtol=0)
    graph(ids[12]).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert counter.frame_count <= 2  # torch starts over once it knows that the scale is a constant


@pytest.mark.slow
def test_inductor():
    """One function for what needs it: fusion around the operator, gradients, and dropout's mask in both passes."""

    def step(x, values):
        query, key = x.unflatten(-1, (2, 2, 8)).permute(2, 0, 3, 1, 4)
        result = attnstats.attention(query * 2, key, values, statistics=[WAAD(5), "fai"], dropout_p=0.4)
        return result.output, result.statistics["waad"] * 2, result.statistics["fai"].sin()

    def plain(x, values):
        query, key = x.unflatten(-1, (2, 2, 8)).permute(2, 0, 3, 1, 4)
        found = attnstats.attention(query * 2, key, values, statistics=[WAAD(5), "fai"]).statistics
        return found["waad"] * 2, found["fai"].sin()

    graph = compiled(step, "inductor", dynamic=True)
    for length in (50, 196):
        x = torch.randn(2, length, 32, requires_grad=True)
        values = torch.eye(length).expand(2, 2, length, length).clone().requires_grad_()
        dropped, *found = graph(x, values)  # values of one-hot rows: the output is the map itself
        for ours, expected in zip(found, plain(x, values), strict=True):
            torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-6)
        share = (dropped == 0).float().mean(dim=(0, 1)).tril().sum() / (length * (length + 1) / 2)
        assert 0.3 < share < 0.5
        weight = torch.randn_like(dropped)
        (dropped * weight).sum().backward()
        torch.testing.assert_close(values.grad, dropped.detach().mT @ weight, atol=1e-5, rtol=1e-5)
        assert not torch.equal(graph(x, values)[0], dropped)  # the next call drops others
