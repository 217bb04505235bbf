"""Torch's default device and dtype are the caller's: results are those of the tensors alone, bit for bit."""

import ast
import contextlib
from pathlib import Path

import pytest
import torch

import attnstats
from attnstats import FAI, WAAD, ColumnStatistic, Entropy, MeanDistance, Received, RowStatistic, SinkMass
from attnstats.core import arguments
from attnstats.tiled import native
from attnstats.triton.launch import arguments as launched
from tests.cases import Case
from tests.tiny import padding, small_llama, tiny, tokens

SOURCE = Path(attnstats.__file__).parent
# Factories whose result depends on torch's default device or, where it does not follow from a tensor, dtype.
FACTORIES = (
    "arange as_tensor asarray empty empty_strided eye full linspace logspace ones rand randint randn randperm "
    "scalar_tensor tensor tril_indices triu_indices zeros"
)


def test_every_factory_names_its_device_and_dtype():
    unnamed = []
    for path in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            of_torch = isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"
            named = {keyword.arg for keyword in node.keywords}
            if of_torch and node.func.attr in FACTORIES.split() and not {"device", "dtype"} <= named:
                unnamed.append(f"{path.relative_to(SOURCE)}:{node.lineno} torch.{node.func.attr}")
    assert not unnamed


@contextlib.contextmanager
def defaults(device, dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


@pytest.fixture(params=[("meta", torch.bfloat16), ("meta", torch.float64), ("cpu", torch.float64)], ids=str)
def others(request):
    """Other defaults, and nothing that an earlier call with the usual ones has left."""
    arguments._CACHE.clear()
    launched._constant.cache_clear()
    return lambda: defaults(*request.param)


def _same(found, expected):
    assert found.dtype == expected.dtype
    assert found.device == expected.device
    assert torch.equal(found.nan_to_num(nan=7.0), expected.nan_to_num(nan=7.0))


class LogDistance(RowStatistic):
    """Fractional, and computed in torch's default dtype where the distances are integers."""

    def weight(self, distance):
        return (distance.abs() / 3).log1p()


class EveryThird(ColumnStatistic):
    band = (0, 9)

    def weight(self, distance):
        return torch.where((distance >= 0) & (distance <= 9), 0.1 * distance, 0.0)


CASES = [
    Case(padding="left", counted="some", sinks=True, window_size=(9, 0)),
    Case(packed=((9, 9), (0, 4), (21, 30)), counted="some", heads="some"),
    Case(is_causal=False, query_length=5, key_length=60, padding="holes", dtype="bfloat16"),
    Case(query_length=1, padding="right", softcap=2.0),
    Case(),
]


@pytest.mark.parametrize(
    ("backend", "index"),
    [(backend, i) for backend in ("reference", "tiled", "tiled plain") for i in range(5)]
    + [("triton", 0), ("triton", 1)],
)
def test_calls(backend, index, others, monkeypatch):
    case = CASES[index]
    if backend == "triton":  # small: the interpreter is slow
        case = (Case(1, 1, 2, 17, 17, padding="left", counted="some"), Case(packed=((5, 5), (9, 9))))[index]
    backend, _, plain = backend.partition(" ")
    if plain:
        monkeypatch.setattr(native, "enabled", False)
    tensors, given = case.tensors(), case.arguments() | {"backend": backend}
    asked = (
        list(case.statistics()) if backend != "triton" else [WAAD(4), FAI(2, 9), FAI(0, None), Received(3), SinkMass(2)]
    )
    if backend != "triton" and case.is_causal:
        asked += [LogDistance(), EveryThird()]
    query, key, _ = case.views(tensors)
    rest = [s for s in asked if s.from_lse]

    def run():
        function = attnstats.varlen_attention if case.packed else attnstats.attention
        output, stats = function(*case.views(tensors), statistics=asked, **given)
        beside = attnstats.statistics_from_lse(query, key, stats.lse, statistics=rest, check=True, **given)
        of_stats = [x[s] for x in (stats, stats.valid) for s in asked] + [stats.counts[s] for s in stats.counts]
        return [output, stats.lse, *of_stats, *(beside[s] for s in rest)]

    with others():
        found = run()
    for x, y in zip(found, run(), strict=True):
        _same(x, y)


@pytest.mark.parametrize(
    ("backend", "dropout_p"), [("reference", 0.3), ("tiled", 0.0), ("tiled", 0.3), ("triton", 0.3)]
)
def test_gradients(backend, dropout_p, others):
    case = Case(padding="left", sinks=True) if backend != "triton" else Case(1, 1, 2, 17, 17, padding="left")
    asked = [WAAD(4), FAI(2, 9), Entropy(), MeanDistance()]
    given = case.arguments() | {"statistics": asked, "differentiable": True, "dropout_p": dropout_p}

    def run(leaves):
        torch.manual_seed(0)
        output, stats = attnstats.attention(*leaves, backend=backend, **given)
        torch.stack([output.square().sum(), *(stats[s].square().sum() for s in asked)]).sum().backward()
        return [output.detach(), *(x.grad for x in leaves)]

    first, second = ([x.requires_grad_() for x in case.tensors()] for _ in range(2))
    with others():
        found = run(first)
    for x, y in zip(found, run(second), strict=True):
        _same(x, y)


def test_a_compiled_call(others):
    case = Case(padding="left", counted="some")
    tensors, given = case.tensors(), case.arguments()
    given |= {"statistics": [WAAD(4), FAI(2, 9), Received(3)], "backend": "tiled"}

    def run(*tensors):
        output, stats = attnstats.attention(*tensors, **given)
        return [output, stats.lse, *stats.values(), *(stats.valid[s] for s in stats)]

    with others(), torch.no_grad():
        found = torch.compile(run, backend="eager", fullgraph=True)(*tensors)
    for x, y in zip(found, run(*tensors), strict=True):
        _same(x, y)


def test_modules_that_pass_masks(others):
    query, key, value = Case(group=1).tensors()
    masks = {
        "causal": torch.ones(37, 37).tril().bool(),
        "padding": (torch.arange(37) > 4)[None, None, None].expand(2, 1, 37, 37),
    }
    module = attnstats.nn.MultiheadAttention(32, 2, batch_first=True, statistics=["waad", "fai"]).eval()
    x, ignored = torch.randn(2, 9, 32), torch.zeros(2, 9, dtype=torch.bool)
    ignored[1, 7:] = True

    def run():
        found = []
        for mask in masks.values():
            with attnstats.patch_sdpa(statistics=["waad", "received"]) as calls:
                found.append(torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask))
            found += [calls[0]["waad"], calls[0]["received"]]
        found.append(module(x, x, x, key_padding_mask=ignored, need_weights=False)[0].detach())
        return found

    with others():
        found = run()
    for a, b in zip(found, run(), strict=True):
        _same(a, b)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_captured_model(side, others):
    model, ids, mask = tiny(), tokens(), padding(side)
    asked = [WAAD(4), FAI(2, 7), Received(3), Entropy()]

    def run():
        with attnstats.capture(model, statistics=asked) as captured, torch.no_grad():
            logits = model(ids, attention_mask=mask).logits
        return [logits, *(captured[s] for s in asked), *(captured.valid[s] for s in asked)]

    with others():
        found = run()
    for a, b in zip(found, run(), strict=True):
        _same(a, b)


def test_a_model_that_generates(others):
    model, ids = small_llama(), torch.arange(3, 20)[None]

    def run():
        with attnstats.capture(model, statistics=[WAAD(4), FAI(2, 7)], live=True) as captured, torch.no_grad():
            answer = model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
        return [answer, captured[WAAD(4)], captured[FAI(2, 7)]]

    with others():
        found = run()
    for a, b in zip(found, run(), strict=True):
        _same(a, b)


def test_credit_and_rhythm(others):
    generator = torch.Generator().manual_seed(0)
    waad, fai, entropy = torch.rand(3, 2, 60, generator=generator)
    mask, advantages = torch.ones(2, 60, dtype=torch.bool), torch.ones(2, 1)
    mask[1, 50:] = False

    def run():
        drawn = torch.Generator().manual_seed(1)
        return [
            attnstats.curves.delta(waad),
            attnstats.credit.local_chunk(waad, mask),
            attnstats.credit.global_anchor(fai, mask),
            attnstats.credit.coupled_rhythm(waad, fai, mask),
            attnstats.credit.random_tokens(mask, generator=drawn),
            attnstats.credit.high_entropy(entropy, mask),
            attnstats.credit.shape_advantages(advantages, attnstats.credit.local_chunk(waad, mask)),
            attnstats.heads.segment_received(waad[:, :2].expand(2, 2), [2, 1]),
        ]

    with others():
        found = run()
    for a, b in zip(found, run(), strict=True):
        _same(a, b)
