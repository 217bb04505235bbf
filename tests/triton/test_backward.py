"""kernels/backward.py: gradients of the fused forward against autograd through the reference in float64."""

import os
import subprocess
import sys

import pytest
import torch

import attnstats
from attnstats import FAI, WAAD, Entropy, MeanDistance, reference
from attnstats.triton.configs import Config, configured
from attnstats.triton.launch import launching_with
from tests.cases import Case, check_gradients, gradients
from tests.guards import Guarded


def small(**changed):
    return Case(**{"batch": 1, "key_heads": 1} | changed)


CASES = {
    "causal": Case(batch=2, query_length=20, key_length=20),
    "full": small(is_causal=False, group=1),
    "queries-last": small(query_length=19, key_length=50),
    "offset": small(query_length=20, key_length=33, query_offset=5),
    "cross": small(query_length=20, key_length=33, is_causal=False),
    "group-of-3": small(key_heads=2, group=3, query_length=33, key_length=33),
    "window": small(window_size=(9, 0), query_length=70, key_length=70, group=1),
    "window-both": small(window_size=(6, 3), is_causal=False),
    "window-right": small(window_size=(-1, 4), is_causal=False),
    "softcap": small(softcap=2.0, spread=4.0),
    "sinks": small(sinks=True, padding="left"),
    "holes": small(padding="holes", is_causal=False),
    "padding-only": small(batch=2, padding="all", sinks=True, query_length=20, key_length=20),
    "packed": small(packed=((5, 5), (0, 0), (33, 33), (1, 1)), sinks=True),
    "packed-queries-last": small(packed=((5, 9), (0, 3), (4, 0), (20, 40), (20, 17)), group=1),
    "packed-cross": small(packed=((5, 9), (33, 20)), is_causal=False, group=1),
    "decoding": small(query_length=3, key_length=70, sinks=True, padding="left"),
    "one": small(query_length=1, key_length=1),
    "large-scores": small(spread=30.0),
    "odd-dims": small(head_dim=19, value_dim=40, layout="guarded"),
    "strided": small(layout="strided"),
    "wide": small(group=1, head_dim=256, value_dim=200, query_length=20, key_length=20),
    "float16": small(layout="bthd", dtype="float16"),
    "bfloat16": small(dtype="bfloat16", window_size=(12, 0), sinks=True),
    "all-together": small(window_size=(9, 0), softcap=3.0, sinks=True, padding="left", dtype="float16", value_dim=24),
}


def test_gradients_come_from_the_kernels(device):
    started = []
    query, key, value = (x.requires_grad_() for x in small().tensors(device))
    with launching_with(lambda launch, arguments: started.append(launch.kernel.__name__)):
        attnstats.attention(query, key, value, enable_gqa=True, backend="triton").output.sum().backward()
    assert started == ["forward", "backward_queries", "backward_keys"]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_gradients_match_the_reference(case, device):
    check_gradients(case, "triton", device)


def test_gradients_are_the_same_bits_twice_and_with_statistics(device):
    case = small(query_length=40, key_length=40, window_size=(25, 0), sinks=True)
    tensors, arguments = case.tensors(device), case.arguments(device)
    statistics = [WAAD(10), FAI(5, None), Entropy()]
    runs = [
        gradients(attnstats.attention, case, tensors, arguments, torch.float32, backend="triton", statistics=s)[0]
        for s in ([], statistics)
    ]
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))


@pytest.mark.parametrize("tiles", [Config(16, 16), Config(16, 64), Config(64, 16)], ids=str)
def test_any_tiles(tiles, device):
    case = small(query_length=45, key_length=70, window_size=(30, 0), group=1)
    tensors, arguments = case.tensors(device), case.arguments(device)
    with configured("backward_queries", tiles), configured("backward_keys", tiles):
        results, _ = gradients(attnstats.attention, case, tensors, arguments, torch.float32, backend="triton")
    expected, _ = gradients(reference.attention, case, tensors, arguments, torch.float64)
    for x, y in zip(results, expected, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", [lambda x: x.sum(), lambda x: x.transpose(1, 2).reshape(-1)[::3].sum()])
def test_gradient_of_the_output_with_any_strides(make, device):
    tensors = small(group=1).tensors(device)
    both = []
    for function, dtype in ((attnstats.attention, torch.float32), (reference.attention, torch.float64)):
        inputs = [x.to(dtype).requires_grad_() for x in tensors]
        options = {"backend": "triton"} if function is attnstats.attention else {}
        both.append(torch.autograd.grad(make(function(*inputs, **options).output), inputs))
    for x, y in zip(*both, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["odd-dims", "sinks", "padding-only"])
def test_nothing_outside_a_buffer_is_read_or_written(name, device):
    with Guarded() as guards:
        test_gradients_match_the_reference(CASES[name], device)
    guards.check()


def test_memory_is_linear_in_the_length(device):
    largest = []
    statistics = (WAAD(4), FAI(3, None), Entropy(), MeanDistance())
    for length in (32, 64, 128):
        case = Case(batch=1, key_heads=1, group=1, query_length=length, key_length=length)
        inputs = [x.requires_grad_() for x in case.tensors(device)]
        options = {"statistics": statistics, "differentiable": True, "backend": "triton"}
        with Guarded() as guards:
            output, stats = attnstats.attention(*inputs, **options)
            (output.sum() + sum(stats[s].sum() for s in statistics)).backward()
        largest.append(guards.largest)
    assert largest[2] <= 2 * largest[1] <= 4 * largest[0]


OFFSETS = """
import torch, attnstats
stride = 2**30  # elements: head 3 begins past 2^31 of them, 6 GiB of float16 that nothing touches
room = torch.empty(3 * stride + 2**20, dtype=torch.float16)
view = room.as_strided((1, 4, 17, 16), (4 * stride, stride, 16, 1))
view[0, [0, 3]] = torch.randn(2, 17, 16, generator=torch.Generator().manual_seed(0)).half()
view[0, [1, 2]] = 0
results = []
for x in (view, view[:, 3:].clone()):
    inputs = [x.detach().requires_grad_() for _ in range(3)]
    output, stats = attnstats.attention(*inputs, statistics=["fai"], differentiable=True, backend="triton")
    results.append(torch.autograd.grad(output[:, -1].sum() + stats["fai"][:, -1].sum(), inputs))
for far, near in zip(*results):
    assert torch.equal(far[:, 3:], near) and not far[:, :3].any()
"""


def test_offsets_past_two_to_the_31():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", OFFSETS]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-1500:]


@pytest.mark.parametrize("window", [8, 39, 40, 1000, 1023, 10**6, 2**31 - 2])
def test_gradients_of_windows_of_any_width(window, device):
    """A weight less its tail loses the digits of the tail where the window is wide: 0.7 of a gradient at 10^6."""
    case = small(batch=1, query_length=40, key_length=40, group=1)
    asked = [WAAD(window), FAI(3, window)]
    found = []
    for function, dtype in (
        (attnstats.attention, torch.float32),
        (reference.attention, torch.float32),
        (reference.attention, torch.float64),
    ):
        query, key, value = (x.to(dtype).requires_grad_() for x in case.tensors(device))
        backend = {"backend": "triton"} if function is attnstats.attention else {}
        _, stats = function(query, key, value, statistics=asked, differentiable=True, **backend)
        loss = stats[asked[0]].square().sum() + stats[asked[1]].square().sum()
        found.append(torch.autograd.grad(loss, (query, key)))
    ours, eager, truth = found
    for x, by_eager, y in zip(ours, eager, truth, strict=True):
        error, of_eager = (float((each.double() - y).abs().max()) for each in (x, by_eager))
        assert error <= 2 * of_eager + 1e-6 * float(y.abs().max()), f"{error:.1e}, eager {of_eager:.1e}"
