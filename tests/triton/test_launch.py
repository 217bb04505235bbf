"""The launcher: buffers, memory, offsets, the choice of kernels, and statistics that users define."""

import ast
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

import attnstats
from attnstats import FAI, WAAD, Entropy, LocalMass, MaxLogit, MeanDistance, Received
from attnstats.core.arguments import resolve
from attnstats.core.options import Options
from attnstats.kernels.arguments import Sizes
from attnstats.kernels.tiles import place_of
from attnstats.statistics import ColumnStatistic, RowStatistic, Statistic
from attnstats.triton import launch
from attnstats.triton.launch import launching_with
from tests.cases import Case, check, check_gradients
from tests.guards import Guarded

GUARDED = {
    "causal": Case(layout="guarded"),
    "odd": Case(layout="guarded", query_length=33, key_length=47, head_dim=19, value_dim=23, key_heads=1, group=3),
    "full-holes": Case(layout="guarded", is_causal=False, padding="holes", counted="some"),
    "one": Case(layout="guarded", query_length=1, key_length=1),
    "half": Case(layout="guarded", dtype="float16", query_length=17, key_length=17),
}


@pytest.mark.parametrize("from_lse", [False, True], ids=["attention", "from_lse"])
@pytest.mark.parametrize("case", GUARDED.values(), ids=GUARDED.keys())
def test_nothing_outside_a_buffer_is_read_or_written(case, from_lse, device):
    with Guarded() as guards:
        check(case, "triton", device, from_lse)
    guards.check()


@pytest.mark.parametrize("from_lse", [False, True], ids=["attention", "from_lse"])
def test_memory_is_linear_in_the_length(from_lse, device):
    largest = []
    for length in (64, 128, 256):
        case = Case(batch=1, key_heads=1, group=1, query_length=length, key_length=length)
        query, key, value = case.tensors(device)
        statistics = [s for s in case.statistics() if not isinstance(s, MaxLogit)]
        with Guarded() as guards:
            if from_lse:
                lse = torch.zeros(1, 1, length, device=device)
                attnstats.statistics_from_lse(query, key, lse, statistics=statistics, backend="triton", check=False)
            else:
                attnstats.attention(query, key, value, statistics=statistics, backend="triton")
        largest.append(guards.largest)
    assert largest[2] <= 2 * largest[1] <= 4 * largest[0]


# Of queries and keys, the lengths of sequences, what the call says of the longest, and which sequence is longer.
LONG = {
    "queries": (((3, 3), (20, 20), (2, 2)), (16, 20), 1),
    "keys": (((3, 9), (4, 20), (2, 5)), (4, 18), 1),
    "decoding": (((2, 70), (1, 30), (3, 80)), (2, 80), 2),
}


@pytest.mark.parametrize("from_lse", [False, True], ids=["attention", "from_lse"])
@pytest.mark.parametrize("name", LONG)
def test_all_of_a_sequence_longer_than_the_call_says_is_nan(name, from_lse, monkeypatch, device):
    """Where a look at the boundaries would wait for the device. What is in no sequence is 0, the rest as ever."""
    lengths, (max_seqlen_q, max_seqlen_k), longer = LONG[name]
    case = Case(1, 1, 2, packed=(*lengths, (2, 3)))  # without the last boundary: tokens of no sequence
    rows, key, value = (x.requires_grad_() for x in case.views(case.tensors(device)))
    asked = [WAAD(3), FAI(1, 3), Entropy(), MeanDistance(), FAI(5, None)] + ([] if from_lse else [MaxLogit()])
    given = {x: y[:-1] for x, y in case.arguments(device).items() if "cu_seqlens" in x} | {"statistics": asked}
    given |= {"enable_gqa": True}
    output, expected = attnstats.varlen_attention(rows, key, value, backend="tiled", **given)
    monkeypatch.setattr("attnstats.core.packing.believes", lambda device: True)
    given |= {"max_seqlen_q": max_seqlen_q, "max_seqlen_k": max_seqlen_k, "backend": "triton"}
    if from_lse:
        stats = attnstats.statistics_from_lse(rows, key, expected.lse, check=False, **given)
        pairs = []
    else:
        found, stats = attnstats.varlen_attention(rows, key, value, **given)
        grads = (torch.autograd.grad(x.sum(), (rows, key, value)) for x in (found, output))
        both = zip(("row", "row", "column", "column"), [(found, output), *zip(*grads, strict=True)], strict=True)
        pairs = [(axis, *(x.movedim(0, -1) for x in pair)) for axis, pair in both]
        pairs += [("row", stats.lse, expected.lse)]
    pairs += [(s.axis, stats[s], expected[s]) for s in asked]
    for axis, x, y in pairs:
        sizes = [length[axis == "column"] for length in lengths]
        spoiled = torch.zeros(x.shape[-1], dtype=torch.bool, device=device)
        spoiled[sum(sizes[:longer]) : sum(sizes[: longer + 1])] = True
        assert x[..., spoiled].isnan().all()
        torch.testing.assert_close(x[..., ~spoiled], y[..., ~spoiled], rtol=1e-4, atol=1e-4)


SKEWED = {
    "even": ((20, 20),) * 3,
    "skewed": ((0, 0), (70, 70), *((n % 4, n % 4) for n in range(12)), (17, 40), (0, 3), (1, 1)),
    "decoding": ((1, 2), (3, 110), *((n % 3, n) for n in range(7)), (0, 0)),
}
SEARCHING = {"even": (False, False), "skewed": (True, True), "decoding": (False, True)}  # queries', keys' blocks


@pytest.mark.parametrize("name", SKEWED)
def test_packed_sequences_of_any_lengths_are_right(name, monkeypatch, device):
    """From boundaries that are read, and the same from those that are not."""
    case = Case(1, 1, 2, packed=SKEWED[name], counted="some")
    asked = [WAAD(3), FAI(1, 3), FAI(5, None), Entropy()]
    check(case, "triton", device, statistics=asked)
    check(case, "triton", device, from_lse=True, statistics=asked)
    check_gradients(case, "triton", device)
    read = case.call(attnstats, case.tensors(device), statistics=asked, backend="triton")
    longest = dict(zip(("max_seqlen_q", "max_seqlen_k"), map(max, zip(*SKEWED[name], strict=True)), strict=True))
    monkeypatch.setattr("attnstats.core.packing.believes", lambda device: True)
    believed = case.call(attnstats, case.tensors(device), statistics=asked, backend="triton", **longest)
    assert torch.equal(believed.output, read.output)
    for s in asked:
        assert torch.equal(believed.statistics[s], read.statistics[s])


@pytest.mark.parametrize("name", SKEWED)
def test_a_long_sequence_starts_no_programs_for_others(name, device):
    lengths = SKEWED[name]
    case = Case(1, 1, 1, packed=lengths)
    query, key, _ = (x.transpose(0, 1)[None] for x in case.views(case.tensors(device)))
    bounds = {name: x for name, x in case.arguments(device).items() if "cu_seqlens" in name}
    geometry = resolve(query, key, None, Options((WAAD(3),), **bounds))
    for by_keys in (False, True):
        for block in (1, 2, 16):
            sizes = launch.arguments.sizes(geometry, block, by_keys)
            fewest = sum(-(-pair[by_keys] // block) for pair in lengths)
            assert fewest <= sizes.n_blocks <= 1.5 * (fewest + len(lengths))
            if block == 16:
                assert (sizes.n_even == 0) == SEARCHING[name][by_keys]


@triton.jit
def places(found, cu_seqlens, n_tokens, n_sequences, n_even, BLOCK: tl.constexpr):
    sizes = Sizes(1, n_sequences, 1, None, 1, 0, n_tokens, n_tokens, None, n_even)
    i_sequence, i_block = place_of(0, tl.program_id(0), cu_seqlens, n_tokens, sizes, BLOCK)
    tl.store(found + 2 * tl.program_id(0), i_sequence)
    tl.store(found + 2 * tl.program_id(0) + 1, i_block)


@pytest.mark.parametrize("block", [2, 16])
@pytest.mark.parametrize("seed", range(2))
def test_each_block_of_packed_sequences_has_one_program(seed, block, device):
    random = np.random.default_rng(seed)
    lengths = random.choice([0, 1, 2, 15, 16, 17], size=random.integers(1, 9))
    bounds = np.concatenate([[0], lengths.cumsum()])
    expected = [(s, i) for s, length in enumerate(lengths) for i in range(-(-length // block))]
    total = int(bounds[-1]) + 5  # some tokens are of no sequence
    for boundaries, is_right in ((bounds, True), (random.integers(-9, 2 * total, size=len(bounds)), False)):
        for n_even in (0, -(-lengths.max() // block)):
            count = (total + len(lengths) * (block - 1)) // block if n_even == 0 else n_even * len(lengths)
            found = torch.full((max(count, 1), 2), -1, dtype=torch.int32, device=device)
            cu_seqlens = torch.tensor(boundaries, dtype=torch.int32, device=device)
            if count:
                places[count,](found, cu_seqlens, total, len(lengths), int(n_even), block)
            rows = [tuple(row) for row in found[:count].tolist()]
            assert all(0 <= sequence < len(lengths) and i >= 0 for sequence, i in rows)
            if is_right:
                assert [row for row in rows if row[1] * block < lengths[row[0]]] == expected


OFFSETS = """
import torch, attnstats
stride = 2**30  # elements: head 3 begins past 2^31 of them, 6 GiB of float16 that nothing touches
room = torch.empty(3 * stride + 2**20, dtype=torch.float16)
view = room.as_strided((1, 4, 33, 16), (4 * stride, stride, 16, 1))
view[0, [0, 3]] = torch.randn(2, 33, 16, generator=torch.Generator().manual_seed(0)).half()
view[0, [1, 2]] = 0
statistics = ["waad", "received", "entropy"]
far = attnstats.attention(view, view, view, statistics=statistics, backend="triton")
near = view[:, 3:].clone()
expected = attnstats.attention(near, near, near, statistics=statistics, backend="triton")
assert torch.equal(far.output[:, 3:], expected.output)
for s in statistics:
    assert torch.equal(far.statistics[s][:, 3:], expected.statistics[s]), s
"""


def test_offsets_past_two_to_the_31():
    # In a process of its own: 32-bit offsets would end it.
    run = subprocess.run(
        [sys.executable, "-c", OFFSETS],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]


def compiling(script: str) -> subprocess.CompletedProcess[str]:
    """Run in a process whose kernels are compiled."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", script]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


SMALLER = """
import torch
from triton.runtime.errors import OutOfResources
from attnstats.core.arguments import resolve
from attnstats.core.options import Options
from attnstats.triton import backend
from attnstats.triton.launch import launching_with

fits = 1  # stage
def start(launch, arguments):
    print(launch.config.num_stages)
    if launch.config.num_stages > fits:
        raise OutOfResources(300_000, 232_448, "shared memory")

query = torch.zeros(1, 2, 512, 128, dtype=torch.float16)
geometry = resolve(query, query, query, Options())
with launching_with(start):
    backend.attend(query, query, query, geometry)
    backend.attend(query, query, query, geometry)
    fits = 0
    try:
        backend.attend(query, query, query, geometry)
    except ValueError as error:
        print(error)
"""


def test_a_configuration_that_does_not_fit_gives_way():
    """Smaller ones are tried in turn; one that didn't fit isn't tried again."""
    run = compiling(SMALLER)
    lines = run.stdout.splitlines()
    assert lines[:2] == ["2", "1"], run.stderr[-2000:]
    assert set(lines[2:-1]) == {"1"}
    assert "head_dim 128 in torch.float16 needs more shared memory" in lines[-1]
    assert "backend='tiled'" in lines[-1]


SM_90 = """
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

class Sm90:
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device=None: 0)
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))

driver.set_active(Sm90())
from attnstats import FAI, WAAD, Entropy, PooledMap, Received
from attnstats.core.arguments import resolve
from attnstats.core.autograd import Residuals
from attnstats.core.options import Options
from attnstats.triton import backend
from attnstats.triton.launch import launching_with

def kernel_of(launch, arguments):
    # what Triton looks for a compiled kernel by
    bind = launch.kernel.device_caches[0][-1]
    _, specialisation, options = bind(**arguments, **launch.constants, num_warps=launch.config.num_warps)
    return f"{launch.kernel.__name__} {specialisation} {options}"
"""
LENGTHS = """
def start(launch, arguments):
    keys.setdefault(launch.kernel.__name__, set()).add(kernel_of(launch, arguments))

def call(batch, queries, keys, query_offset=None):
    statistics = (WAAD(10), FAI(10, 100), FAI(10, None), Received(), Entropy())
    if queries > 1:
        statistics += (PooledMap(queries // 64, 1),)
    query, key = torch.zeros(batch, 4, queries, 64).half(), torch.zeros(batch, 2, keys, 64).half()
    geometry = resolve(query, key, key, Options(statistics, enable_gqa=True, query_offset=query_offset))
    lse = torch.zeros(batch, 4, queries)
    backend.attend(query, key, key, geometry)
    backend.from_lse(query, key, lse, geometry)
    for of_statistics in ({}, {WAAD(10): (lse, lse), Entropy(): (lse, lse)}):
        backend.gradients(Residuals(query, key, key, query, lse), query, geometry, of_statistics)

PREFILL = (1, 64, 64), (2, 200, 200), (1, 255, 256), (16, 256, 259), (3, 1024, 1024), (1, 256, 1024, 7), (1, 64, 99, 0)
DECODE = (1, 1, 2048), (2, 1, 2049), (1, 1, 4096), (3, 1, 5001), (16, 1, 5001, 16)
with launching_with(start):
    for first, *others in (PREFILL, DECODE):
        keys = {}
        call(*first)
        known = {kernel: len(each) for kernel, each in keys.items()}
        for other in others:
            call(*other)
        for kernel, each in keys.items():
            print(kernel, known[kernel], len(each))
"""


def test_lengths_offsets_and_batch_compile_nothing_anew():
    """The keys by which Triton looks for a compiled kernel: those of a first call, and those of others like it too."""
    run = compiling(SM_90 + LENGTHS)
    rows = [line.split() for line in run.stdout.splitlines()]
    kernels = ["forward", "column", "band", "backward_queries", "backward_keys"]
    assert sorted(kernel for kernel, _, _ in rows) == sorted([*kernels, *kernels, "combine"]), run.stderr[-2000:]
    assert all(first == all_calls for _, first, all_calls in rows), run.stdout


FOUND_AGAIN = """
from itertools import product
from attnstats.triton.launch.start import _specialiser

def start(launch, arguments):
    ours = id(launch.compiled), _specialiser(launch.device)(launch.order[0](arguments))
    found.setdefault(ours, set()).add(kernel_of(launch, arguments))

def laid_out(shape, dtype, offset, layout):
    batch, heads, length, dim = shape
    room = torch.zeros(batch * heads * (length + 1) * (dim + 1) + offset, dtype=dtype)[offset:]
    if layout == "BTHD":
        return room[: batch * heads * length * dim].view(batch, length, heads, dim).transpose(1, 2)
    if layout == "wide rows":
        return room[: batch * heads * length * (dim + 1)].view(batch, heads, length, dim + 1)[..., :dim]
    return room[: batch * heads * length * dim].view(shape)

found = {}
statistics = (WAAD(10), FAI(10, 100), Received())
with launching_with(start):
    layouts = product((0, 1, 8), ("BHTD", "BTHD", "wide rows"))
    for (offset, layout), dtype, (batch, length) in product(
        layouts, (torch.float16, torch.bfloat16), ((1, 64), (2, 99), (2, 96))
    ):
        query, key = (laid_out((batch, heads, length, 64), dtype, offset, layout) for heads in (4, 2))
        for options in ({}, {"sinks": torch.zeros(4)}, {"key_padding_mask": torch.ones(batch, length, dtype=bool)}):
            geometry = resolve(query, key, key, Options(statistics, enable_gqa=True, **options))
            backend.attend(query, key, key, geometry)
            lse = torch.zeros(batch * 4 * length + offset)[offset:].view(batch, 4, length)
            backend.from_lse(query, key, lse, geometry)
            backend.gradients(Residuals(query, key, key, query, lse), query, geometry, {})
print(len(found), len(set.union(*found.values())), max(map(len, found.values())))
"""


def test_a_compiled_kernel_is_only_found_again_for_what_it_was_compiled_for():
    """Whatever has the same key among ours has the same key in Triton."""
    run = compiling(SM_90 + FOUND_AGAIN)
    assert run.returncode == 0, run.stderr[-2000:]
    ours, tritons, of_one = map(int, run.stdout.split())
    assert of_one == 1
    assert ours >= tritons > 100


STARTED = """
from unittest import mock
import torch, triton
from triton import knobs
from attnstats import attention, varlen_attention
from attnstats.triton import backend
from benchmarks.overhead import idle_driver

query = torch.zeros(1, 2, 64, 16, dtype=torch.float16)
run = triton.JITFunction.run
with idle_driver() as launches, mock.patch.object(backend, "unavailable", return_value=None):
    def started(length, by_triton):
        before, hooked[:] = launches(), []
        with mock.patch.object(triton.JITFunction, "run", autospec=True, side_effect=run) as tritons:
            attention(*[query[:, :, :length]] * 3, statistics=["waad"], backend="triton")
        assert launches() == before + 1
        assert tritons.call_count == by_triton, (length, tritons.call_count)
    hooked = []
    for length, by_triton in ((64, 1), (64, 0), (48, 0), (33, 0)):
        started(length, by_triton)
    with mock.patch.object(knobs.runtime, "debug", True):
        started(64, 1)
        started(64, 0)
    started(64, 0)
    knobs.runtime.launch_enter_hook.add(lambda metadata: hooked.append(metadata.get()["name"]))
    started(64, 0)
    assert hooked == ["forward"], hooked
    hooked.clear()
    tokens, bounds = query[0].transpose(0, 1), torch.tensor([0, 40, 41, 64], dtype=torch.int32)
    statistics = ["waad", "received"]
    varlen_attention(tokens, tokens, tokens, cu_seqlens_q=bounds, statistics=statistics, backend="triton")
    assert hooked == ["forward", "column"], hooked
    from attnstats.kernels.forward import forward
    forward.add_pre_run_hook(lambda *_, **__: hooked.append("before"))
    started(64, 1)
    assert hooked == ["before", "forward"], hooked
"""


def test_triton_itself_starts_a_kernel_once():
    """Then it is started again without its launcher, for other lengths too, and hooks and settings are heeded."""
    run = compiling(STARTED)
    assert run.returncode == 0, run.stderr[-2000:]


@pytest.mark.parametrize("name", ["waad", "fai", "received", "mean_distance", "sink_mass"])
def test_an_lse_of_other_strides_is_read_rightly(name, device):
    query, key, value = Case(query_length=20, key_length=20).tensors(device)
    lse = attnstats.attention(query, key, value, enable_gqa=True, backend="reference").statistics.lse

    def statistic(lse: torch.Tensor) -> torch.Tensor:
        results = attnstats.statistics_from_lse(query, key, lse, statistics=[name], enable_gqa=True, backend="triton")
        return results[name]

    assert torch.equal(statistic(lse.mT.contiguous().mT), statistic(lse))


def test_each_statistic_goes_where_it_is_cheapest():
    band: tuple[Statistic, ...] = (WAAD(10), FAI(10, 100))
    whole: tuple[Statistic, ...] = (FAI(0, None), FAI(0, 5000), MeanDistance(), Received(), Received(4))
    query = torch.zeros(1, 2, 8, 16)
    plan = attnstats.explain(query, query, query, statistics=[*band, *whole, Entropy(), MaxLogit()], backend="triton")
    assert [(each.run, each.computes) for each in plan.passes] == [
        ("forward", ("output", "lse", "waad", "fai", "mean_distance", "entropy", "max_logit")),
        ("column", ("fai", "fai", "received")),
        ("column", ("received",)),
    ]


def test_heads_that_ask_for_less_get_less():
    query = torch.zeros(1, 4, 8, 16)
    heads = {"waad": [2, 0], "fai": [2], "received": [1]}
    plan = attnstats.explain(
        query,
        query,
        statistics=[WAAD(10), FAI(10, 100), Received()],
        heads=heads,
        window_size=(50, 0),
        backend="triton",
    )
    assert [(each.run, each.computes, each.heads) for each in plan.passes] == [
        ("band", ("waad",), (2, 0)),
        ("band", ("fai",), (2,)),
        ("column", ("received",), (1,)),
    ]


@triton.jit
def squared_distance(distance, cap: tl.constexpr, _: tl.constexpr):
    near = tl.minimum(tl.abs(distance), cap)
    return (near * near).to(tl.float32)


@triton.jit
def every_other(distance, _: tl.constexpr, __: tl.constexpr):
    return ((distance >= 0) & (distance < 8) & (distance % 2 == 0)).to(tl.float32)


@dataclass(frozen=True)
class SquaredDistance(RowStatistic):
    cap: int = 5
    kernel_weight = squared_distance

    @property
    def band(self) -> tuple[int, int]:
        return -self.cap, self.cap

    @property
    def tail(self) -> float:
        return float(self.cap**2)

    def weight(self, distance: torch.Tensor) -> torch.Tensor:
        return distance.abs().clamp(max=self.cap) ** 2


@dataclass(frozen=True)
class EveryOther(ColumnStatistic):
    kernel_weight = every_other

    @property
    def band(self) -> tuple[int, int]:
        return 0, 7

    def weight(self, distance: torch.Tensor) -> torch.Tensor:
        return (distance >= 0) & (distance < 8) & (distance % 2 == 0)


@dataclass(frozen=True)
class WithoutKernel(LocalMass):
    pass


@pytest.mark.parametrize("backend", ["tiled", "triton"])
@pytest.mark.parametrize("is_causal", [True, False])
def test_statistics_that_users_define(backend, is_causal, where):
    case, statistics = Case(group=1, is_causal=is_causal), [SquaredDistance(), EveryOther(), WAAD(3)]
    check(case, backend, where, statistics=statistics)
    results = case.call(attnstats, case.tensors(where), statistics=statistics, backend=backend).statistics
    assert results["squared_distance"] is results[SquaredDistance()]


def test_a_statistic_without_a_device_weight_says_so(device):
    query, key, value = Case(group=1).tensors(device)
    with pytest.raises(ValueError, match=r"WithoutKernel has no device weight.*backend='tiled'"):
        attnstats.attention(query, key, value, statistics=[WithoutKernel()], backend="triton")
    attnstats.attention(query, key, value, statistics=[WithoutKernel()], backend="tiled")


def test_a_namesake_of_ours_does_not_get_our_device_weight(device):
    @dataclass(frozen=True)
    class WAAD(RowStatistic):  # another one than ours
        window: int = 10

        def weight(self, distance: torch.Tensor) -> torch.Tensor:
            return distance.abs() * 2

    assert WAAD.name == "waad"
    query, key, value = Case(group=1).tensors(device)
    with pytest.raises(ValueError, match=r"WAAD has no device weight.*backend='tiled'"):
        attnstats.attention(query, key, value, statistics=[WAAD()], backend="triton")
    query, key, value = (x.cpu() for x in (query, key, value))
    results = attnstats.attention(query, key, value, statistics=[WAAD(), "mean_distance"], backend="tiled").statistics
    torch.testing.assert_close(results["waad"], 2 * results["mean_distance"])


def test_explain_names_kernels_tiles_and_costs(device):
    query, key, value = Case(group=1).tensors(device)
    asked = [WAAD(), FAI(), Received(), "sink_mass"]
    plan = attnstats.explain(query, key, value, statistics=asked, backend="triton")
    assert plan.backend == "triton"
    assert [each.run for each in plan.passes] == ["forward", "column", "first_keys"]
    assert "band of 100 keys as epilogue" in plan.passes[0].description
    assert plan.flops == sum(each.flops for each in plan.passes) > 0
    assert str(plan).startswith("backend: triton (as asked)\n  kernel forward: queries x ")
    plan = attnstats.explain(query, key, statistics=[WAAD(), Entropy()], backend="triton")
    assert {each.run for each in plan.passes} == {"band", "rows"}


def test_row_statistics_of_some_heads_cost_their_share():
    """From an lse their pass runs for these heads alone."""
    programs = {}
    query, key = torch.randn(1, 8, 40, 16), torch.randn(1, 4, 40, 16)
    for heads in (None, [1, 6]):
        with launching_with(lambda launch, _, heads=heads: programs.setdefault(str(heads), []).append(launch.programs)):
            attnstats.statistics_from_lse(
                query,
                key,
                torch.zeros(1, 8, 40),
                statistics=[Entropy(), MeanDistance()],
                heads=heads,
                enable_gqa=True,
                check=False,
                backend="triton",
            )
    (every,), (some,) = programs["None"], programs["[1, 6]"]
    assert some * 4 <= every * 2  # heads that share a key head share a tile


def test_no_kernel_compares_a_group_of_arguments_with_none():
    """Triton 3.6 can't, if a field of it is None: a kernel asks a field."""
    groups = {"sequences", "sizes", "visible", "score", "strides", "grads"}
    for path in sorted((Path(__file__).parents[2] / "kernels").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare) and isinstance(node.left, ast.Name):
                assert node.left.id not in groups, f"{path.name}:{node.lineno}"
