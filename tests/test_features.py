"""Every feature of attention with every statistic, on every backend, from the pass itself and from its lse."""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import attnstats
from attnstats import FAI, WAAD, Entropy, MeanDistance, PooledMap, Received, reference
from attnstats.triton.configs import targeting
from tests.cases import Case, check

BACKENDS = ["tiled", "triton"]

FEATURES = {
    "window": Case(batch=1, window_size=(9, 0)),
    "window-right": Case(batch=1, window_size=(-1, 4), is_causal=False),
    "window-both": Case(batch=1, window_size=(6, 3), is_causal=False, counted="some"),
    "window-left-alone": Case(batch=1, window_size=(20, -1), is_causal=False, group=1),
    "window-padded": Case(batch=1, window_size=(5, 0), padding="holes"),
    "softcap": Case(batch=1, softcap=2.0, spread=4.0),
    "sinks": Case(batch=1, sinks=True, padding="left"),
    "packed": Case(packed=((5, 5), (0, 0), (33, 33), (1, 1), (17, 17)), counted="some"),
    "packed-queries-last": Case(packed=((5, 9), (0, 3), (4, 0), (20, 40), (20, 17))),
    "packed-full": Case(packed=((5, 5), (33, 33)), is_causal=False, window_size=(9, 3)),
    "packed-cross": Case(packed=((5, 9), (33, 20)), is_causal=False),
    "packed-decoding": Case(packed=((1, 70), (4, 90)), sinks=True),
    "heads-some": Case(batch=1, heads="some", group=3, padding="right"),
    "heads-split": Case(batch=1, heads="split", group=3, counted="some"),
    "decoding": Case(batch=1, query_length=1, key_length=130, padding="left", group=3),
    "decoding-few": Case(batch=1, query_length=7, key_length=100, group=1, softcap=3.0, window_size=(70, 0)),
    "decoding-sinks": Case(batch=1, query_length=3, key_length=100, sinks=True, heads="split", dtype="float16"),
    "all-together": Case(
        batch=1, window_size=(9, 0), softcap=3.0, sinks=True, heads="split", counted="some", padding="left"
    ),
    "half": Case(batch=1, window_size=(12, 0), softcap=5.0, sinks=True, dtype="bfloat16", value_dim=24),
}


@pytest.mark.parametrize("from_lse", [False, True], ids=["attention", "from_lse"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", FEATURES.values(), ids=FEATURES.keys())
def test_matches_reference(case, backend, from_lse, where):
    check(case, backend, where, from_lse)


GRADIENTS = {
    "window": {"window_size": (6, 0)},
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": True},
    "all": {"window_size": (6, 3), "is_causal": False, "softcap": 2.0, "sinks": True},
    "packed": {"packed": ((5, 5), (0, 3), (14, 18)), "sinks": True},
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_are_those_of_autograd(name, backend, where):
    """Through the reference in float64, which autograd differentiates."""
    case = Case(query_length=21, key_length=21, **GRADIENTS[name])
    gradients = []
    for module, dtype, options in ((attnstats, torch.float32, {"backend": backend}), (reference, torch.float64, {})):
        sinks = case.arguments(where)["sinks"]
        inputs = [x.to(dtype).requires_grad_() for x in (*case.tensors(where), sinks) if x is not None]
        options = options | {"sinks": None if sinks is None else inputs[3]}
        output, _ = case.call(module, inputs[:3], statistics=["waad"], **options)
        weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(3)).to(output)
        gradients.append(torch.autograd.grad((output * weights).sum(), inputs))
    for x, y in zip(*gradients, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_packing_equals_concatenation(backend, where):
    lengths = (7, 33, 1, 16)
    case = Case(packed=tuple((n, n) for n in lengths))
    query, key, value = (x[0].transpose(0, 1) for x in case.tensors(where))
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=where)
    asked = [WAAD(4), FAI(2, 9), FAI(0, None), Received(3), MeanDistance()]
    output, packed = attnstats.varlen_attention(
        query, key, value, cu_seqlens_q=cu_seqlens, statistics=asked, enable_gqa=True, backend=backend
    )
    for begin, end in itertools.pairwise(cu_seqlens.tolist()):
        alone = [x[begin:end].transpose(0, 1)[None] for x in (query, key, value)]
        expected, stats = attnstats.attention(*alone, statistics=asked, enable_gqa=True, backend=backend)
        torch.testing.assert_close(output[begin:end].transpose(0, 1), expected[0])
        for s in asked:
            torch.testing.assert_close(packed[s][:, begin:end], stats[s][0], rtol=1e-5, atol=1e-5)
            assert torch.equal(packed.valid[s][begin:end], stats.valid[s][0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_after_the_last_sequence_are_nobodys(backend, where):
    query, key, value = (x[0].transpose(0, 1) for x in Case(packed=((20, 20),), group=1).tensors(where))
    query[12:], key[12:], value[12:] = torch.nan, torch.nan, torch.nan
    cu_seqlens = torch.tensor([0, 5, 12], dtype=torch.int32, device=where)
    asked = ["waad", "fai", "received", "entropy", "sink_mass"]
    output, stats = attnstats.varlen_attention(
        query, key, value, cu_seqlens_q=cu_seqlens, max_seqlen_q=7, statistics=asked, backend=backend
    )
    assert not output[12:].any()
    assert bool((stats.lse[:, 12:] == -torch.inf).all())
    for s in asked:
        assert not stats[s][:, 12:].any()
        assert not stats.valid[s][12:].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_epilogue_changes_the_output(backend, where):
    """I3: the same bits with band statistics, columns and statistics of the loop as without, and for a subset."""
    case = Case(query_length=70, key_length=70, window_size=(40, 0))
    tensors, arguments = case.tensors(where), case.arguments(where)
    alone = attnstats.attention(*tensors, backend=backend, **arguments).output
    for heads in (None, {"waad": [1], "fai": [0, 3]}):
        asked = [WAAD(10), FAI(10, 60), Received(), Entropy(), MeanDistance()]
        found = attnstats.attention(*tensors, statistics=asked, backend=backend, **arguments | {"heads": heads})
        assert torch.equal(found.output, alone)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("segments", [(45, 45), (1, 33), (23, 7)])
def test_pooled_maps_of_any_segments(backend, segments, where):
    """As many segments as tokens, one, and boundaries that fit no tile."""
    case = Case(batch=1, query_length=45, key_length=45, key_heads=1)
    query, key, value = case.tensors(where)
    bounds = (0, 1, 2, 15, 16, 17, 33, 44, 45)
    for asked in (PooledMap(*segments), PooledMap(bounds, segments[1]), PooledMap(segments[0], bounds)):
        found = attnstats.attention(query, key, value, statistics=[asked], enable_gqa=True, backend=backend)
        wide = (x.double() for x in (query, key, value))
        expected = reference.attention(*wide, statistics=[asked], enable_gqa=True)
        torch.testing.assert_close(found.statistics[asked].double(), expected.statistics[asked], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [None, (2**31 - 2, 0)])
def test_settings_near_two_to_the_31(window, device):
    """Positions are 32 bits on the device; a window, a lower or an upper bound near their end must not wrap."""
    query, key, value = Case(batch=1, group=1, query_length=40, key_length=40).tensors(device)
    asked = [FAI(0, 2**31 - 3), FAI(2**31 - 3, None), FAI(2000, 2**31 - 3), Received(), WAAD(2**31 - 3)]
    found = attnstats.attention(query, key, value, statistics=asked, window_size=window, backend="triton").statistics
    expected = reference.attention(query, key, value, statistics=asked, window_size=window).statistics
    for s in asked[:-1]:
        torch.testing.assert_close(found[s], expected[s], rtol=1e-4, atol=1e-6)
    # WAAD of such a window is the mean distance.
    torch.testing.assert_close(found[asked[-1]], expected[asked[-1]], rtol=1e-4, atol=1e-4)


def test_distances_at_a_million_positions(device):
    """To 1e-6 relative: positions of a cache of 2^20 tokens, of which the last are there."""
    length, offset = 40, 2**20
    query, key, value = Case(batch=1, group=1, query_length=length, key_length=length).tensors(device)
    asked = [MeanDistance()]
    found = attnstats.attention(query, key, value, statistics=asked, query_offset=offset, backend="triton")
    wide = (x.double() for x in (query, key, value))
    expected = reference.attention(*wide, statistics=asked, query_offset=offset)
    a, b = found.statistics[asked[0]].double(), expected.statistics[asked[0]]
    assert float(((a - b) / b).abs().max()) <= 1e-6


def test_row_sums_that_are_not_chunked(device):
    """As on sm_100 and AMD, where chunks of columns would move between threads."""
    case = Case(asked=(3, 4, 6), key_length=50)
    with targeting("sm_100"):
        check(case, "triton", device)
        check(case, "triton", device, from_lse=True)


class Watch(TorchDispatchMode):
    """Collects operations that would wait for a GPU, or copy to it from the host."""

    WAITS = ("aten._local_scalar_dense", "aten.nonzero", "aten.lift_fresh", "aten.is_nonzero", "aten.masked_select")

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function).removesuffix(".default")
        if name.startswith(self.WAITS):
            self.seen.add(name)
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("name", ["window-padded", "packed", "heads-split", "decoding-few", "softcap"])
def test_a_call_neither_waits_for_the_device_nor_copies_from_the_host(name, device):
    """So it can be captured into a CUDA graph, once it was called for warming up."""
    case = FEATURES[name]
    tensors, arguments = case.views(case.tensors(device)), case.arguments(device)
    arguments["statistics"] = [WAAD(10), FAI(3, 20), FAI(0, None), Received(4), Entropy(), MeanDistance()]
    arguments["statistics"] += [] if case.packed else [PooledMap(3, 5)]
    if isinstance(arguments["heads"], dict):
        arguments["heads"] = {WAAD(10): [0, 2], FAI(3, 20): [1]}
    function = attnstats.varlen_attention if case.packed else attnstats.attention
    function(*tensors, backend="triton", **arguments)
    with Watch() as watch:
        function(*tensors, backend="triton", **arguments)
    assert not watch.seen


def test_keys_that_all_heads_share_by_a_stride_of_zero(device):
    query, key, value = Case(batch=1, key_heads=4, group=1, key_length=33, query_length=33).tensors(device)
    shared = [x[:, :1].expand(1, 4, 33, 16) for x in (key, value)]
    asked = [WAAD(4), Received(), Entropy()]
    found = attnstats.attention(query, *shared, statistics=asked, backend="triton")
    expected = attnstats.attention(query, *(x.contiguous() for x in shared), statistics=asked, backend="triton")
    assert torch.equal(found.output, expected.output)
    for s in asked:
        assert torch.equal(found.statistics[s], expected.statistics[s])
