"""A call owns what it keeps: gradients, `valid`, `counts` and lse read no tensor of the caller's after it returned.

And it remembers nothing of one: masks and boundaries are read anew in every call, whoever wrote into them.
"""

import pytest
import torch
from torch.nn import functional

import attnstats
from attnstats import FAI, WAAD, Received
from tests.cases import Case
from tests.writes import UNNOTICED, write

MASKS = ("query_mask", "key_padding_mask", "attn_mask", "cu_seqlens_q", "cu_seqlens_k", "sinks")
CASES = {
    "padding": Case(1, 1, 2, 19, 19, padding="left"),
    "counted": Case(1, 1, 2, 19, 19, counted="some"),
    "padding and counted": Case(1, 1, 2, 19, 19, padding="holes", counted="some"),
    "sinks": Case(1, 1, 2, 19, 19, sinks=True),
    "packed": Case(1, 1, 2, packed=((9, 9), (10, 10)), counted="some"),
    "packed, other keys": Case(1, 1, 2, packed=((4, 9), (7, 10))),
    "attn_mask": Case(1, 1, 2, 19, 19, is_causal=False),
    "additive": Case(1, 1, 2, 19, 19, is_causal=False),
}


def _arguments(name):
    given = CASES[name].arguments()
    if name == "attn_mask":
        given["attn_mask"] = (torch.arange(19) > 3)[None, None, None]
    if name == "additive":
        given["attn_mask"] = torch.zeros(19, 19).masked_fill(torch.ones(19, 19).triu(3).bool(), -torch.inf)
    return given


def _write(given, in_place):
    """Other numbers into every tensor that was passed: noticed by autograd, or as kernels and numpy write."""
    for name in MASKS:
        x = given.get(name)
        if x is not None:
            other = ~x if x.dtype == torch.bool else x * 0 + x.flatten()[-1] if "cu" in name else x + 1
            (x if in_place else x.data).copy_(other)


def _run(name, backend, graph, write):
    """Everything that a call returns, read after `write` of its arguments."""
    case, given = CASES[name], _arguments(name)
    leaves = [x.requires_grad_() for x in case.tensors()]
    asked = [WAAD(4), FAI(1, 5), Received()]

    def call(*leaves):
        function = attnstats.varlen_attention if case.packed else attnstats.attention
        return function(*case.views(leaves), statistics=asked, differentiable=True, backend=backend, **given)

    if graph:
        torch.compiler.reset()  # else the limit of recompilations leaves later cases uncompiled
        call = torch.compile(call, backend="eager", fullgraph=True)
    output, stats = call(*leaves)
    write(given)
    of_stats = [x[s] for x in (stats, stats.valid) for s in asked] + [stats.counts[FAI(1, 5)], stats.lse]
    loss = output.square().sum() + sum(stats[s].square().sum() for s in asked)
    return [output, *of_stats, *torch.autograd.grad(loss, leaves)]


CALLS = [(name, backend, False) for name in CASES for backend in ("reference", "tiled", "triton")]
CALLS += [(name, "reference" if name == "additive" else "tiled", True) for name in CASES]
SLOW = {"counted", "packed, other keys", "attn_mask", "padding"}  # in the interpreter: others have it too


@pytest.mark.parametrize("in_place", [False, True], ids=["unnoticed", "in place"])
@pytest.mark.parametrize(
    ("name", "backend", "graph"),
    [
        call
        for call in CALLS
        if not (call[0] == "additive" and call[1] != "reference") and not (call[1] == "triton" and call[0] in SLOW)
    ],
)
def test_arguments_written_after_the_call(name, backend, in_place, graph):
    expected = _run(name, backend, graph, lambda given: None)
    found = _run(name, backend, graph, lambda given: _write(given, in_place))
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("backend", ["tiled", "triton"])
def test_sinks_that_carry_gradients_must_not_change(backend):
    """As torch has it of every tensor that backward needs."""
    query, key, value = Case(1, 1, 2, 9, 9).tensors()
    sinks = torch.zeros(2, requires_grad=True)
    output, _ = attnstats.attention(query, key, value, sinks=sinks, enable_gqa=True, backend=backend)
    with torch.no_grad():
        sinks += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@pytest.mark.parametrize("packed", [False, True])
def test_an_lse_that_is_given(packed):
    case = Case(packed=((9, 9), (4, 4))) if packed else Case()
    query, key, _ = case.views(case.tensors())
    given = case.arguments()
    lse = case.call(attnstats, case.tensors()).statistics.lse
    stats = attnstats.statistics_from_lse(query, key, lse, statistics=["waad", "lse"], **given)
    before = stats.lse.clone(), stats["lse"].clone()
    lse.data.zero_()
    assert torch.equal(stats.lse, before[0])
    assert torch.equal(stats["lse"], before[1])


def _masks(additive):
    """One that is causal, with the first keys hidden, and one that hides the last keys alone."""
    causal, full = torch.ones(2, 23, 23, dtype=torch.bool)
    causal = causal.tril().index_fill(1, torch.arange(3), False)
    full[:, 20:] = False
    return [torch.zeros(23, 23).masked_fill(~x, -torch.inf) if additive else x for x in (causal, full)]


@pytest.mark.parametrize("way", UNNOTICED)
@pytest.mark.parametrize("additive", [False, True])
def test_a_mask_written_between_calls_under_a_patch(additive, way):
    mask, other = _masks(additive)
    tensors = Case(1, 1, 1, 23, 23).tensors()
    with attnstats.patch_sdpa(statistics=["received"]) as run:
        for _ in range(2):
            functional.scaled_dot_product_attention(*tensors, attn_mask=mask)
        write(mask, other, way)
        output = functional.scaled_dot_product_attention(*tensors, attn_mask=mask)
        functional.scaled_dot_product_attention(*tensors, attn_mask=other)
    torch.testing.assert_close(output, functional.scaled_dot_product_attention(*tensors, attn_mask=other))
    assert torch.equal(run[2]["received"], run[3]["received"])
    assert not torch.equal(run[0]["received"], run[2]["received"])


@pytest.mark.parametrize("way", UNNOTICED)
def test_a_mask_written_between_calls_of_a_module(way):
    mask, other = (~x for x in _masks(additive=False))
    x = torch.randn(1, 23, 16)
    module = attnstats.nn.MultiheadAttention(16, 2, batch_first=True, statistics=["received"]).eval()
    theirs = torch.nn.MultiheadAttention(16, 2, batch_first=True).eval()
    theirs.load_state_dict(module.state_dict())
    module(x, x, x, attn_mask=mask, need_weights=False)
    write(mask, other, way)
    output, _ = module(x, x, x, attn_mask=mask, need_weights=False)
    torch.testing.assert_close(output, theirs(x, x, x, attn_mask=other, need_weights=False)[0])


@pytest.mark.parametrize("way", UNNOTICED)
@pytest.mark.parametrize("backend", ["reference", "tiled", "triton"])
def test_boundaries_written_between_calls(backend, way):
    case = Case(1, 1, 1, packed=((80, 80), (80, 80)))
    boundaries, rows = torch.tensor([0, 80, 160], dtype=torch.int32), case.views(case.tensors())

    def waad(cu_seqlens):
        return attnstats.varlen_attention(
            *rows, cu_seqlens_q=cu_seqlens, statistics=[WAAD(4)], backend=backend
        ).statistics["waad"]

    waad(boundaries)
    write(boundaries, torch.tensor([0, 2, 160], dtype=torch.int32), way)
    assert torch.equal(waad(boundaries), waad(boundaries.clone()))
