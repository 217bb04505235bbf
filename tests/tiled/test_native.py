"""The compiled sums: every instruction set against the reference, the same bits from any threads, no need of them."""

from types import SimpleNamespace

import pytest
import torch

import attnstats
from attnstats import FAI, WAAD, Entropy, LocalMass, MaxLogit, MeanDistance, Received, reference
from attnstats.core import library
from attnstats.tiled import native
from tests.cases import Case, check
from tests.process import python

compiled = pytest.mark.skipif(native._library() is None, reason="attnstats.tiled._native was not built")
ASKED = (WAAD(10), FAI(10, 100), FAI(5, None), Received(), Received(40), MeanDistance(), Entropy(), MaxLogit())


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@compiled
@pytest.mark.parametrize("lanes", [4, 8, 16])
@pytest.mark.parametrize(
    "case",
    [
        Case(),
        Case(dtype="bfloat16", padding="left", layout="bthd"),
        Case(dtype="float16", padding="holes", layout="guarded"),
        Case(is_causal=False, counted="some", padding="right"),
        Case(is_causal=False, query_length=5, key_length=300),
        Case(query_length=1, key_length=131, group=3),
        Case(query_length=3, key_length=290, head_dim=33, value_dim=33, dtype="bfloat16", padding="holes"),
        Case(query_length=7, key_length=29, query_offset=11),
        Case(query_length=19, key_length=23, query_offset=300, counted="some"),
        Case(batch=1, query_length=300, key_length=300, head_dim=80, value_dim=80, counted="some"),
        Case(batch=1, query_length=29, key_length=29, head_dim=1, value_dim=1),
        Case(padding="all", counted="none"),
        Case(spread=40.0),
        Case(window_size=(5, 2), is_causal=False, sinks=True),
        Case(window_size=(3, 0), softcap=2.0, padding="left"),
        Case(softcap=0.5, dtype="bfloat16", heads="split"),
        Case(packed=((9, 9), (0, 4), (21, 7), (3, 30)), sinks=True, counted="some"),
        Case(packed=((9, 9), (31, 31)), is_causal=False, group=3, heads="some"),
        Case(batch=1, key_heads=1, packed=tuple((n, n) for n in range(17, 31))),  # rows left over from whole tiles
    ],
    ids=str,
)
def test_instruction_sets(case, lanes, monkeypatch):
    """A machine without vectors this wide runs the widest that it has."""
    monkeypatch.setattr(native, "lanes", lanes)
    check(case, "tiled")
    check(case, "tiled", from_lse=True)


@compiled
@pytest.mark.parametrize(
    "changed", [{}, {"is_causal": False, "counted": "some"}, {"window_size": (300, 0), "softcap": 3.0}], ids=str
)
def test_many_chunks_and_blocks(changed):
    asked = (1, 3, 4, 9, 11, 12)
    check(Case(1, 1, 2, query_length=1300, key_length=1300, asked=asked, **changed), "tiled")


@compiled
def test_float16_of_every_exponent():
    """Bit patterns, of subnormals, inf and NaN too, as the only key of a query of 1, whose score they are."""
    key = torch.arange(-(2**15), 2**15, 32, dtype=torch.int16).view(torch.float16).reshape(-1, 1, 1, 1)
    query = torch.ones_like(key)
    asked = {"statistics": [MaxLogit()], "scale": 1.0}
    found = attnstats.attention(query, key, query, **asked, backend="tiled").statistics["max_logit"]
    expected = reference.attention(query, key, query, **asked).statistics["max_logit"]
    finite = expected.isfinite()
    assert torch.equal(found.isfinite(), finite)
    assert torch.equal(found[finite], expected[finite])


@compiled
@pytest.mark.parametrize("is_causal", [True, False])
def test_bands_of_any_reach(is_causal):
    bands = [WAAD(1), WAAD(130), WAAD(2000), LocalMass(700), FAI(0, 0), FAI(127, 129), FAI(599, 700), FAI(900, 950)]
    case = Case(batch=1, key_heads=1, query_length=601, key_length=601, is_causal=is_causal)
    check(case, "tiled", statistics=bands)


@pytest.fixture
def scores(monkeypatch):
    """The number of scores of each call."""
    library, counts = native._library(), []

    def evaluate(call):
        counts.append(library.attnstats_evaluate(call))
        return counts[-1]

    counting = SimpleNamespace(attnstats_evaluate=evaluate, attnstats_scratch_bytes=library.attnstats_scratch_bytes)
    monkeypatch.setattr(native, "_library", lambda: counting)
    return counts


def _check_columns(length, statistics, **arguments):
    query, key, value = Case(1, 1, 2, length, length).tensors()
    arguments |= {"statistics": statistics, "enable_gqa": True}
    _, expected = reference.attention(query.double(), key.double(), value.double(), **arguments)
    found = attnstats.statistics_from_lse(query, key, expected.lse.float(), backend="tiled", **arguments)
    for s in statistics:
        torch.testing.assert_close(found[s].double(), expected[s], rtol=1e-5, atol=1e-5)


GROUP = 12  # rows of a tile at most: they share scores


@compiled
@pytest.mark.parametrize("last", [1, 20])
def test_the_last_queries_cost_their_own_rows(last, scores):
    _check_columns(1300, [Received(last)])
    assert 0 < sum(scores) <= 2 * (last + GROUP) * 1408
    scores.clear()
    band = [WAAD(10), FAI(10, 100)]
    _check_columns(1300, band)
    _check_columns(1300, [*band, Received(last)])
    alone, together = scores
    assert together <= alone + 2 * (last + GROUP) * 1408


@compiled
def test_only_rows_that_count_are_visited(scores):
    query_mask = torch.zeros(1, 1300, dtype=torch.bool)
    query_mask[:, [40, 41, 700, 1201, 1202]] = True
    for statistics, groups in (([Received()], 3), ([Received(3)], 2), ([Received(2), FAI(5, None)], 3)):
        scores.clear()
        _check_columns(1300, statistics, query_mask=query_mask)
        assert 0 < sum(scores) <= 2 * 2 * groups * GROUP * 1408  # rows that count may lie in two tiles
    scores.clear()
    _check_columns(1300, [Received(), Received(3)], query_mask=torch.zeros_like(query_mask))
    assert scores == [0]


@compiled
def test_the_last_queries_of_each_packed_sequence(scores):
    lengths = ((700, 700), (0, 9), (5, 600), (300, 300))
    case = Case(key_heads=1, packed=lengths)
    check(case, "tiled", from_lse=True, statistics=[Received(4)])
    assert 0 < sum(scores) <= 2 * (4 + GROUP) * sum(keys + 128 for _, keys in lengths)


@compiled
def test_scratch_of_the_last_queries():
    """Column sums of chunks that count take a slot, no others."""
    query = key = torch.zeros(1, 1, 8192, 16)
    of = {}
    for statistic in (Received(), Received(20)):
        (only,) = attnstats.explain(query, key, statistics=[statistic]).passes
        of[statistic] = only
    assert of[Received(20)].flops == 2 * 16 * sum(range(8192 - 19, 8193))
    assert of[Received()].scratch_bytes - of[Received(20)].scratch_bytes >= 4 * 7 * 8192


MEMORY = """
import resource, torch, attnstats
query = torch.randn(1, 1, 65536, 64)
lse = torch.full((1, 1, 65536), 11.0)
asked = [attnstats.WAAD(), attnstats.FAI(), attnstats.Received(), attnstats.MeanDistance()]
small = [x[:, :, :600].contiguous() for x in (query, query, lse)]
attnstats.statistics_from_lse(*small, statistics=asked, check=False)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
attnstats.statistics_from_lse(query, query, lse, statistics=asked, check=False)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@compiled
@pytest.mark.slow
def test_memory_is_linear():
    """One T x T map of float32 would be 16 GiB."""
    assert int(python("-c", MEMORY)) < 48  # MiB


@compiled
def test_it_is_what_runs(monkeypatch):
    query, key, value = Case().tensors()
    plan = attnstats.explain(query, key, value, statistics=ASKED, enable_gqa=True)
    assert [(each.run, each.computes) for each in plan.passes[1:]] == [("compiled", tuple(s.name for s in ASKED))]
    monkeypatch.setattr(native, "enabled", False)
    plain = attnstats.explain(query, key, value, statistics=ASKED, enable_gqa=True)
    wide = attnstats.explain(*(x.double() for x in (query, key, value)), statistics=ASKED, enable_gqa=True)
    assert "compiled" not in {each.run for each in (*plain.passes, *wide.passes)}


@compiled
def test_the_same_bits_from_any_number_of_threads(threads):
    query, key, _ = Case(batch=1, key_heads=3, group=1, query_length=1300, key_length=1300).tensors()
    lse = attnstats.attention(query, key, key, is_causal=True).statistics.lse
    runs = []
    for count in (1, 2, 3, 2, 1):
        threads(count)
        runs.append(attnstats.statistics_from_lse(query, key, lse, statistics=ASKED[:-1]))
    alone = attnstats.statistics_from_lse(query[:, 1:2], key[:, 1:2], lse[:, 1:2], statistics=ASKED[:-1])
    for s in ASKED[:-1]:
        assert all(torch.equal(run[s], runs[0][s]) for run in runs), s
        assert torch.equal(alone[s][:, 0], runs[0][s][:, 1]), s


def _of_one_key(scores, statistic, **arguments):
    """The statistic of rows that see one key with these scores and an lse of 0, in double."""
    query, key = scores.view(1, 1, -1, 1), torch.ones(1, 1, 1, 1)
    arguments |= {"is_causal": False, "scale": 1.0, "query_offset": 0, "statistics": [statistic]}
    if isinstance(statistic, MaxLogit):
        return attnstats.attention(query, key, key, **arguments).statistics[statistic].view(-1).double()
    return (
        attnstats.statistics_from_lse(query, key, torch.zeros(1, 1, len(scores)), check=False, **arguments)[statistic]
        .view(-1)
        .double()
    )


def _ulps(found, truth):
    return float(((found - truth).abs() / 2.0 ** (truth.abs().log2().floor() - 23)).max())


@compiled
@pytest.mark.parametrize("lanes", [4, 8, 16])
def test_exponential(lanes, monkeypatch):
    monkeypatch.setattr(native, "lanes", lanes)
    mass = LocalMass(10**6)
    scores = torch.cat([torch.linspace(-87.3, 88.3, 200_001), torch.linspace(-1e-3, 1e-3, 10_001)])
    assert _ulps(_of_one_key(scores, mass), scores.double().exp()) <= 2
    extremes = torch.tensor([-torch.inf, -1e30, -1e5, -100.0, 0.0, 100.0, 1e30, torch.inf, torch.nan])
    found = _of_one_key(extremes, mass)
    assert found[:8].tolist() == [0, 0, 0, 0, 1, torch.inf, torch.inf, torch.inf]
    assert found[8].isnan()


@compiled
@pytest.mark.parametrize("lanes", [4, 8, 16])
def test_hyperbolic_tangent(lanes, monkeypatch):
    monkeypatch.setattr(native, "lanes", lanes)
    scores = torch.cat([torch.linspace(-12, 12, 200_000), torch.logspace(-30, 0, 10_000), torch.tensor([-1e30, 1e30])])
    assert _ulps(_of_one_key(scores, MaxLogit(), softcap=1.0), scores.double().tanh()) <= 4
    extremes = torch.tensor([-torch.inf, 0.0, torch.inf])
    assert _of_one_key(extremes, MaxLogit(), softcap=1.0).tolist() == [-1, 0, 1]


@compiled
@pytest.mark.parametrize("lanes", [4, 8, 16])
def test_nan_and_inf_stay_in_their_rows_and_heads(lanes, monkeypatch):
    monkeypatch.setattr(native, "lanes", lanes)
    case = Case(batch=1, key_heads=2, group=1, query_length=150, key_length=150)
    query, key, value = case.tensors()
    asked = [WAAD(10), LocalMass(3), FAI(2, 5), Entropy(), MaxLogit(), Received()]
    clean = attnstats.attention(query, key, value, statistics=asked).statistics
    for poison in (torch.nan, torch.inf):
        bad = query.clone()
        bad[0, 0, 40, 3] = poison
        found = attnstats.attention(bad, key, value, statistics=asked).statistics
        for s in asked:
            touched = torch.zeros_like(clean[s], dtype=torch.bool)
            if isinstance(s, FAI):
                touched[0, 0, 35:39] = True
            elif isinstance(s, Received):
                touched[0, 0, :41] = True
            else:
                touched[0, 0, 40] = True
            assert torch.equal(found[s][~touched], clean[s][~touched]), s
            if poison != poison:
                assert found[s][touched].isnan().all(), s


@pytest.mark.parametrize("break_it", ["off", "missing", "another version", "not a library"])
def test_without_the_library(break_it, monkeypatch, tmp_path):
    monkeypatch.setattr(native, "_library", native._library.__wrapped__)  # uncached
    monkeypatch.setattr(library, "load", library.load.__wrapped__)
    if break_it == "off":
        monkeypatch.setattr(native, "enabled", False)
    elif break_it == "another version":
        monkeypatch.setattr(library, "VERSION", -1)
    else:
        (tmp_path / "_native.so").write_text("nothing")
        monkeypatch.setattr(library, "path", lambda: tmp_path / "_native.so" if break_it == "not a library" else None)
    monkeypatch.setattr(native, "evaluate", None)  # a call would fail
    check(Case(), "tiled")


@compiled
def test_a_compiled_caller_gets_the_same():
    query, key, value = Case(group=1).tensors()

    def waad(query, key, value):
        return attnstats.attention(query, key, value, statistics=[WAAD(10), FAI(3, 20)]).statistics["waad"] + 1

    with torch.no_grad():
        found = torch.compile(waad, backend="eager")(query, key, value)
        torch.testing.assert_close(found, waad(query, key, value), rtol=0, atol=2e-5)
