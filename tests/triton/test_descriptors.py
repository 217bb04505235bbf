"""Tiles loaded by tensor descriptors (kernels/tiles.py, `streamed`) against tiles loaded by pointers, bit by bit."""

import contextvars
import importlib

import pytest
import torch

import attnstats
from attnstats import FAI, WAAD, Entropy, MaxLogit, MeanDistance, Received
from attnstats.triton import configs
from attnstats.triton.launch import launching_with
from tests.cases import Case, gradients

start = importlib.import_module("attnstats.triton.launch.start")
STATISTICS = [WAAD(10), FAI(2, 9), FAI(3, None), Entropy(), MeanDistance(), MaxLogit(), Received(), Received(last=5)]
STREAMING = {"forward": True, "column": True, "backward_queries": True, "backward_keys": True}


def small(**changed):
    return Case(**{"batch": 1, "key_heads": 1, "query_length": 33, "key_length": 33} | changed)


CASES = {
    "causal": small(batch=2, query_length=37, key_length=37),
    "queries-last": small(key_heads=2, query_length=20, key_length=70),
    "full": small(query_length=20, is_causal=False, query_offset=0),
    "window": small(query_length=70, key_length=70, window_size=(9, 0), softcap=3.0, sinks=True),
    "padding": small(batch=2, padding="left", counted="some"),
    "odd-dims": small(head_dim=24, value_dim=40),
    "bthd": small(layout="bthd"),
    "float16": small(dtype="float16"),
}


def computed(case, by_descriptors, device, monkeypatch):
    """Output, lse, statistics and gradients, and of each kernel whether it took descriptors."""
    described = {}
    launch_it = start._start

    def record(launch, arguments):
        described[launch.kernel.__name__] = launch.constants.get("DESCRIBED")
        launch_it(launch, arguments)

    tensors, arguments = case.tensors(device), case.arguments(device)
    with configs.describing(by_descriptors), monkeypatch.context() as patch:
        patch.setattr(start, "_start", record)
        output, found = case.call(attnstats, tensors, statistics=STATISTICS, backend="triton")
        grads, lse = gradients(attnstats.attention, case, tensors, arguments, tensors[0].dtype, backend="triton")
    return [output, lse, *(found[s] for s in STATISTICS), *grads], described


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_the_same_bits_as_by_pointers(case, device, monkeypatch):
    by_pointers, kinds = computed(case, False, device, monkeypatch)
    assert kinds == dict.fromkeys(STREAMING, False)
    by_descriptors, kinds = computed(case, True, device, monkeypatch)
    assert kinds == STREAMING
    for found, expected in zip(by_descriptors, by_pointers, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "case",
    [
        small(head_dim=19, value_dim=19),  # rows start at no multiple of 16 bytes
        small(layout="guarded"),
        small(layout="strided"),  # the elements of a row don't lie side by side
        small(packed=((5, 5), (33, 33))),  # a program each, and descriptors, for sequences that may be empty
        small(query_length=2, key_length=70),  # splits
    ],
    ids=["unaligned", "offset", "strided", "packed", "decoding"],
)
def test_pointers_where_descriptors_cannot_be_had(case, device):
    kinds = []
    with configs.describing(True), launching_with(lambda launch, _: kinds.append(launch.constants.get("DESCRIBED"))):
        case.call(attnstats, case.tensors(device), backend="triton")
    assert kinds[0] is False


def test_where_descriptors_are_used(monkeypatch):
    monkeypatch.setattr(configs, "interpreted", lambda: False)
    on = torch.device("cpu")
    with configs.targeting("sm_80"):
        assert not configs.describes(on, torch.bfloat16)
    with configs.targeting("sm_90"):
        assert not configs.describes(on, torch.float32)
        assert configs.describes(on, torch.bfloat16)
        monkeypatch.setenv("ATTNSTATS_DESCRIPTORS", "0")
        assert not configs.describes(on, torch.bfloat16)


def test_an_allocator_of_others_is_kept():
    """Triton asks one for the memory of descriptors; it holds one per context."""
    from triton.runtime import _allocation

    def after(allocator):
        if allocator is not None:
            _allocation.set_allocator(allocator)
        start._set_allocator()
        return _allocation._allocator.get()

    assert contextvars.Context().run(after, None) is start._scratch
    assert contextvars.Context().run(after, len) is len
