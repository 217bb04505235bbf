"""Kernels in the interpreter read and write what they were given, once written, and no other program's."""

import ast
from itertools import combinations

import pytest
import torch
import triton
import triton.language as tl

import attnstats
from attnstats import FAI, WAAD, Entropy, MaxLogit, MeanDistance, PooledMap, Received, SinkMass, TopKeys
from tests.cases import Case
from tests.process import ROOT
from tests.sanitizer import Sanitizer

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU this is compute-sanitizer's work")


@triton.jit
def copy(source, target, n_elements, shift, stride, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = o < n_elements if MASKED else o >= 0
    tl.store(target + o, tl.load(source + shift + o * stride, mask=mask, other=0.0), mask=mask)


@triton.jit
def everywhere(target, BLOCK: tl.constexpr):
    tl.store(target + tl.arange(0, BLOCK), tl.full((BLOCK,), 1.0, tl.float32))


@triton.jit
def running(target, distance, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    o_from = o - distance
    tl.store(target + o, tl.load(target + o_from, mask=(o_from >= 0) & (o_from < 2 * BLOCK), other=0.0))


def run(source, target, programs=2, n_elements=30, shift=0, stride=1, masked=True):
    copy[(programs,)](source, target, n_elements, shift, stride, masked, 16)


FAULTS = {
    "outside of every tensor|beside": lambda x, y: run(x, y, shift=1),
    "reads outside|reads beside": lambda x, y: run(x, y, shift=-1),
    "writes outside|writes beside": lambda x, y: run(torch.zeros(64), y, masked=False),
    "beside a tensor's elements": lambda x, y: run(torch.zeros(60)[::2], y),
    "reads what was never written": lambda x, y: run(torch.empty(30), y),
    "also got under another name": lambda x, y: run(x, x.view(3, 10)),
    "reads what another program wrote": lambda x, y: running[(2,)](torch.zeros(32), 16, 16),
    "writes what another program read": lambda x, y: running[(2,)](torch.zeros(32), -16, 16),
    "writes what another program wrote": lambda x, y: everywhere[(2,)](y, 16),
}


@pytest.mark.parametrize("message", FAULTS)
def test_a_fault_is_found(message):
    with Sanitizer() as sanitizer:
        x, y = torch.zeros(30), torch.empty(30)
        run(x, y)
        assert sanitizer.launched == ["copy"]
        with pytest.raises(Exception, match=message):
            FAULTS[message](x, y)


def small(**changed):
    return Case(**{"batch": 1, "key_heads": 1, "query_length": 19, "key_length": 19, "layout": "guarded"} | changed)


CASES = {
    "causal": small(query_length=33, key_length=33, key_heads=2),
    "full-holes": small(batch=2, is_causal=False, padding="holes", counted="some", layout="strided"),
    "odd-dims": small(key_length=35, head_dim=19, value_dim=23, group=3),
    "offset": small(key_length=33, query_offset=5, layout="strided"),
    "cross": small(key_length=40, is_causal=False),
    "padding-only": small(batch=2, padding="all", counted="none", sinks=True),
    "one": small(query_length=1, key_length=1),
    "window": small(window_size=(5, 0), padding="left", layout="strided"),
    "window-both": small(window_size=(6, 3), is_causal=False, counted="some"),
    "window-right": small(window_size=(-1, 4), is_causal=False),
    "softcap-float16": small(softcap=2.0, dtype="float16", window_size=(9, 0)),
    "sinks-bfloat16": small(sinks=True, padding="left", dtype="bfloat16"),
    "packed": small(packed=((5, 5), (0, 0), (17, 17), (1, 1)), counted="some"),
    "packed-queries-last": small(packed=((5, 9), (0, 3), (4, 0), (9, 20), (7, 3)), sinks=True),
    "packed-cross": small(packed=((5, 9), (18, 17)), is_causal=False),
    "packed-decoding": small(packed=((1, 70), (2, 66)), sinks=True),
    "heads-some": small(heads="some", group=3),
    "heads-split": small(heads="split", group=3, counted="some"),
    "decoding": small(query_length=1, key_length=130, padding="left", group=3),
    "decoding-sinks": small(query_length=3, key_length=100, sinks=True, heads="split", dtype="float16", softcap=3.0),
}
STATISTICS = (
    *(WAAD(10), MeanDistance(), Entropy(), MaxLogit(), SinkMass(3)),
    *(FAI(3, 20), FAI(5, None), Received(), Received(last=4)),
)


def everything(case):
    """Results of attention, then all from its lse and with gradients, those of statistics included; and the inputs."""
    statistics = [s for s in case.every() if s in STATISTICS or isinstance(s, PooledMap | TopKeys)]
    inputs = case.views([x.requires_grad_() for x in case.tensors()])
    query, key, _ = inputs
    torch.manual_seed(0)

    def arguments(chosen, **options):
        arguments = case.arguments() | {"backend": "triton", "statistics": chosen}
        if isinstance(arguments["heads"], dict):
            arguments["heads"] = case.split(chosen)
        return arguments | options

    function = attnstats.varlen_attention if case.packed else attnstats.attention
    with torch.no_grad():
        output, plain = function(*inputs, **arguments(statistics))
        beside = attnstats.statistics_from_lse(
            query, key, plain.lse, **arguments([s for s in statistics if s.from_lse])
        )
    results = [output, plain.lse, *plain.tensors.values()]
    others = list(beside.tensors.values())
    for options in ({"dropout_p": 0.3}, {"differentiable": True}):
        carried = [s for s in statistics if s.differentiable] if "differentiable" in options else []
        output, stats = function(*inputs, **arguments(carried, **options))
        loss = output.float().square().sum()
        for s in carried:
            loss = loss + stats[s].masked_fill(stats[s] == -torch.inf, 0.0).square().sum()
        others += torch.autograd.grad(loss, inputs)
    return results, others, inputs


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_every_access_of_every_kernel(case):
    with Sanitizer() as sanitizer:
        results, others, inputs = everything(case)
    sanitizer.check()
    assert not any(x.isnan().any() for x in (*results, *others))  # what a kernel should have written and did not
    places = [places_of(x) for x in (*results, *inputs)]
    for i, j in combinations(range(len(places)), 2):
        assert i >= len(results) or places[i].isdisjoint(places[j]), "a result lies where another tensor does"


def places_of(x):
    """The addresses of a tensor's elements."""
    places = {x.data_ptr()} if x.numel() else set()
    for size, stride in zip(x.shape, x.stride(), strict=True):
        places = {place + i * stride * x.element_size() for place in places for i in range(size)}
    return places


def test_every_kernel_is_started():
    kernels = set()
    for path in (ROOT / "kernels").glob("*.py"):
        for function in ast.parse(path.read_text()).body:
            if isinstance(function, ast.FunctionDef) and "tl.program_id(0)" in ast.unparse(function):
                kernels.add(function.name)
    with Sanitizer() as sanitizer:
        everything(CASES["decoding"])
        everything(CASES["one"])
    assert kernels == set(sanitizer.launched)
    assert sanitizer.loads > 0 < sanitizer.stores
