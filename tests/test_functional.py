"""Every statistic on every path, over dtypes, grouped heads, shapes, masks and layouts, against float64."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention

import attnstats
from attnstats import FAI, WAAD, Entropy, LocalMass, MaxLogit, MeanDistance, _operators, reference
from tests.cases import Case, check

BACKENDS = ("tiled", "triton")

# One axis at a time around the default, and the combinations that share code paths.
CASES = {
    "default": Case(),
    "bfloat16": Case(dtype="bfloat16", head_dim=32, value_dim=32),
    "float16": Case(dtype="float16", head_dim=32, value_dim=32),
    "mha": Case(key_heads=3, group=1),
    "mqa-5": Case(key_heads=1, group=5),
    "gqa-9/3": Case(key_heads=3, group=3, query_length=33, key_length=33),
    "group-over-tile": Case(batch=1, key_heads=1, group=11, query_length=17, key_length=17),
    "one-token": Case(query_length=1, key_length=1),
    "two-tokens": Case(query_length=2, key_length=2),
    "decode": Case(query_length=1, key_length=50),
    "queries-last": Case(query_length=7, key_length=45),
    "queries-first": Case(query_length=20, key_length=50, query_offset=0),
    "queries-between": Case(query_length=20, key_length=50, query_offset=9),
    "queries-past-the-keys": Case(query_length=20, key_length=25, query_offset=12),
    "tile-less-1": Case(query_length=31, key_length=31),
    "tile": Case(query_length=32, key_length=32),
    "tile-plus-1": Case(query_length=65, key_length=65, batch=1),
    "tk-1-mod-32": Case(query_length=20, key_length=33),
    "full": Case(is_causal=False),
    "full-long": Case(is_causal=False, query_length=67, key_length=67, batch=1),
    "full-offset": Case(is_causal=False, query_length=12, key_length=40, query_offset=15),
    "cross": Case(is_causal=False, query_length=12, key_length=40),
    "left": Case(padding="left"),
    "right": Case(padding="right"),
    "holes": Case(padding="holes"),
    "padding-only": Case(padding="all"),
    "full-left": Case(is_causal=False, padding="left"),
    "full-padding-only": Case(is_causal=False, padding="all"),
    "cross-right": Case(is_causal=False, query_length=12, key_length=40, padding="right"),
    "cached-left": Case(query_length=7, key_length=45, padding="left"),
    "decode-left": Case(query_length=1, key_length=45, padding="left"),
    "some-count": Case(counted="some"),
    "none-count": Case(counted="none"),
    "some-count-left": Case(counted="some", padding="left", dtype="bfloat16"),
    "head-17": Case(head_dim=17, value_dim=17),
    "head-59": Case(head_dim=59, value_dim=59),
    "head-80": Case(head_dim=80, value_dim=80, batch=1),
    "head-111": Case(head_dim=111, value_dim=111, batch=1),
    "head-256": Case(head_dim=256, value_dim=256, batch=1, key_heads=1),
    "value-wider": Case(value_dim=40),
    "value-narrower": Case(head_dim=48, value_dim=16),
    "heads-innermost": Case(layout="bthd"),
    "strided": Case(layout="strided", padding="right"),
    "guarded": Case(layout="guarded", padding="left", counted="some"),
    "guarded-full": Case(layout="guarded", is_causal=False, query_length=19, key_length=19, dtype="float16"),
    "flat": Case(spread=0.0),
    "sharp": Case(spread=40.0),
    "very-negative": Case(spread=300.0, padding="left"),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_matches_reference(case, backend, where):
    check(case, backend, where)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "name",
    ["default", "queries-last", "full", "cross", "left", "padding-only", "some-count", "head-59", "guarded", "strided"],
)
def test_from_lse_matches_reference(name, backend, where):
    check(CASES[name], backend, where, from_lse=True)


@pytest.mark.parametrize("backend", ["reference", "tiled"])
def test_float64_is_float64(backend):
    case = Case(dtype="float64")
    query, key, value = case.tensors()
    output, stats = attnstats.attention(
        query, key, value, statistics=case.statistics(), backend=backend, **case.arguments()
    )
    expected_output, expected = reference.attention(query, key, value, statistics=case.statistics(), **case.arguments())
    torch.testing.assert_close(output, expected_output, rtol=0, atol=1e-12)
    for statistic in stats:
        assert stats[statistic].dtype == torch.float64
        torch.testing.assert_close(stats[statistic], expected[statistic], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("name", ["default", "full", "queries-last", "left", "right", "value-wider", "padding-only"])
def test_output_and_gradients_are_those_of_sdpa(name, backend, where):
    case = CASES[name]
    ours = [x.requires_grad_() for x in case.tensors(where)]
    theirs = [x.requires_grad_() for x in case.tensors(where)]
    arguments = case.arguments(where)
    output, _ = attnstats.attention(*ours, statistics=[WAAD(), FAI(2, 9), Entropy()], backend=backend, **arguments)

    position = torch.arange(case.query_length, device=where) + case.key_length - case.query_length
    visible = torch.ones(case.batch, 1, case.query_length, case.key_length, dtype=torch.bool, device=where)
    if case.is_causal:
        visible &= torch.arange(case.key_length, device=where) <= position[:, None]
    if arguments["key_padding_mask"] is not None:
        visible &= arguments["key_padding_mask"][:, None, None]
    expected = scaled_dot_product_attention(*theirs, attn_mask=visible, enable_gqa=True)
    expected = expected.masked_fill(~visible.any(-1, keepdim=True), 0.0)
    torch.testing.assert_close(output, expected, rtol=2e-6, atol=2e-6)

    seed = torch.randn(expected.shape, generator=torch.Generator().manual_seed(3)).to(where)
    gradients = torch.autograd.grad(output, ours, seed)
    live = visible.any(-1, keepdim=True)
    for found, wanted in zip(gradients, torch.autograd.grad(expected, theirs, seed * live), strict=True):
        torch.testing.assert_close(found, wanted.nan_to_num(0.0), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_statistics_carry_no_gradient_and_do_not_change_the_output(backend, where):
    case = Case()
    query, key, value = (x.requires_grad_() for x in case.tensors(where))
    bare, _ = attnstats.attention(query, key, value, backend=backend, **case.arguments())
    output, stats = attnstats.attention(
        query, key, value, statistics=case.statistics(), backend=backend, **case.arguments()
    )
    assert torch.equal(bare, output)
    assert not any(stats[s].requires_grad for s in stats)
    assert not stats.lse.requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_inputs_give_the_same_bits(backend, device):
    case = Case(padding="left", counted="some")
    tensors, arguments = case.tensors(device), case.arguments(device)
    runs = [attnstats.attention(*tensors, statistics=case.statistics(), backend=backend, **arguments) for _ in range(2)]
    assert torch.equal(runs[0].output, runs[1].output)
    for statistic in case.statistics():
        assert torch.equal(runs[0].statistics[statistic], runs[1].statistics[statistic])


@pytest.mark.parametrize("value_dim", [16, 24])  # torch's flash attention for CPU takes the first alone
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_under_autocast_a_call_is_that_of_cast_inputs(backend, value_dim, where):
    case = Case(padding="left", counted="some", value_dim=value_dim)
    asked = [s for s in case.statistics() if not isinstance(s, MaxLogit)]
    arguments = case.arguments(where) | {"backend": backend}

    def run(dtype):
        query, key, value = (x.to(dtype) for x in case.tensors(where))
        output, stats = attnstats.attention(query, key, value, statistics=case.statistics(), **arguments)
        beside = attnstats.statistics_from_lse(query, key, stats.lse, statistics=asked, **arguments)
        return output, stats.lse, *stats.values(), *beside.values()

    expected = run(torch.bfloat16)
    with torch.autocast(where.type, torch.bfloat16):
        found = run(torch.float32)
    for inside, outside in zip(found, expected, strict=True):
        assert inside.dtype == outside.dtype
        assert torch.equal(inside, outside)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_taken_under_autocast_are_the_same(backend, where):
    tensors = Case(value_dim=24).tensors(where)
    query, key, value = (x.requires_grad_() for x in tensors)
    output, _ = attnstats.attention(query, key, value, enable_gqa=True, backend=backend)
    ones = torch.ones_like(output)
    expected = torch.autograd.grad(output, (query, key, value), ones, retain_graph=True)
    with torch.autocast(where.type, torch.bfloat16):
        found = torch.autograd.grad(output, (query, key, value), ones)
    assert all(torch.equal(inside, outside) for inside, outside in zip(found, expected, strict=True))


@pytest.mark.parametrize("value_dim", [16, 24])  # torch's flash attention for CPU takes the first alone
@pytest.mark.parametrize("backend", BACKENDS)
def test_second_derivatives_are_refused(backend, value_dim, where):
    tensors = Case(group=1, value_dim=value_dim).tensors(where)
    query, key, value = (x.requires_grad_() for x in tensors)
    output, _ = attnstats.attention(query, key, value, statistics=["waad"], backend=backend)
    (gradient,) = torch.autograd.grad(output.square().sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match=r"derivative .* not implemented"):
        gradient.sum().backward()


@pytest.mark.parametrize("dropout_p", [1, 1.5, -0.5, float("nan"), None])
def test_dropout_of_less_than_nothing_or_of_all_is_refused(dropout_p):
    query, key, value = Case(group=1).tensors()
    with pytest.raises(ValueError, match=rf"dropout_p must be a number in \[0, 1\).*got {dropout_p}"):
        attnstats.attention(query, key, value, dropout_p=dropout_p)


@pytest.mark.parametrize("backend", BACKENDS)
def test_lse_to_base_2(backend, device):
    case = Case(padding="left")
    query, key, value = case.tensors(device)
    expected = attnstats.attention(
        query, key, value, statistics=["waad", "received"], backend=backend, **case.arguments(device)
    )
    lse2 = (expected.statistics.lse * 1.4426950408889634).masked_fill(expected.statistics.lse == -torch.inf, 0.0)
    found = attnstats.statistics_from_lse(
        query, key, lse2, lse_base="2", statistics=["waad", "received"], backend=backend, **case.arguments(device)
    )
    for statistic in found:
        torch.testing.assert_close(found[statistic], expected.statistics[statistic], rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(found.lse, expected.statistics.lse)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_and_inf_stay_in_their_rows_and_heads(backend, device):
    case = Case(batch=1, key_heads=2, group=1)
    query, key, value = case.tensors(device)
    clean = attnstats.attention(query, key, value, statistics=["waad", "entropy"], backend=backend)
    query = query.clone()
    query[0, 0, 20] = torch.nan
    query[0, 1, 30, 0] = torch.inf
    spoiled = attnstats.attention(query, key, value, statistics=["waad", "entropy"], backend=backend)
    untouched = torch.ones(1, 2, 37, dtype=torch.bool, device=device)
    untouched[0, 0, 20] = untouched[0, 1, 30] = False
    for before, after in zip(
        (clean.output, *clean.statistics.values()), (spoiled.output, *spoiled.statistics.values()), strict=True
    ):
        assert torch.equal(before[untouched], after[untouched])


def test_key_only_attn_mask_is_key_padding_that_leaves_queries_alone():
    case = Case(padding="left", batch=2)
    query, key, value = case.tensors()
    padding = case.arguments()["key_padding_mask"]
    by_mask = attnstats.attention(
        query, key, value, statistics=["received"], attn_mask=padding[:, None, None], is_causal=False, enable_gqa=True
    )
    by_padding = attnstats.attention(
        query, key, value, statistics=["received"], key_padding_mask=padding, is_causal=False, enable_gqa=True
    )
    torch.testing.assert_close(by_mask.output, by_padding.output)
    torch.testing.assert_close(by_mask.statistics["received"].sum(-1), torch.full((2, 4), 37.0))
    real = padding.sum(-1, keepdim=True).expand(2, 4).float()
    torch.testing.assert_close(by_padding.statistics["received"].sum(-1), real)


def test_dense_mask_is_for_the_reference_alone():
    query, key, value = Case(group=1).tensors()
    bias = torch.randn(37, 37)
    output, _ = reference.attention(query, key, value, attn_mask=bias, is_causal=False)
    torch.testing.assert_close(output, scaled_dot_product_attention(query, key, value, attn_mask=bias))
    with pytest.raises(ValueError, match=r"attn_mask.*backend='reference'"):
        attnstats.attention(query, key, value, attn_mask=bias, is_causal=False)


def test_max_logit_is_not_a_function_of_the_lse():
    query, key, _ = Case(group=1).tensors()
    with pytest.raises(ValueError, match="MaxLogit"):
        attnstats.statistics_from_lse(query, key, torch.zeros(2, 2, 37), statistics=[MaxLogit()])


@pytest.mark.parametrize(
    ("lse", "error", "match"),
    [
        (torch.zeros(2, 2, 36), ValueError, r"lse.*\(2, 2, 37\)"),
        (torch.zeros(2, 2, 37, dtype=torch.bfloat16), TypeError, r"lse.*float32.*bfloat16"),
        (None, TypeError, "lse must be a tensor, got NoneType"),
    ],
)
def test_bad_lse(lse, error, match):
    query, key, _ = Case(group=1).tensors()
    with pytest.raises(error, match=match):
        attnstats.statistics_from_lse(query, key, lse, statistics=["waad"])


def test_bad_backend_and_base():
    query, key, value = Case(group=1).tensors()
    with pytest.raises(ValueError, match=r"backend.*'fast'"):
        attnstats.attention(query, key, value, backend="fast")
    with pytest.raises(ValueError, match=r"backend='triton'.*float64"):
        attnstats.attention(query.double(), key.double(), value.double(), backend="triton")
    with pytest.raises(ValueError, match=r"backend='triton'.*scale > 0"):
        attnstats.attention(query, key, value, scale=-1.0, backend="triton")
    with pytest.raises(ValueError, match=r"lse_base.*'10'"):
        attnstats.statistics_from_lse(query, key, torch.zeros(2, 2, 37), statistics=["waad"], lse_base="10")


@pytest.mark.parametrize("backend", ["auto", "reference", "tiled", "triton"])
def test_apples_gpu_is_refused_by_name(backend, monkeypatch):
    """What was never run is not claimed to work. The tensors have a device and no numbers."""
    monkeypatch.setattr(_operators, "is_tracing", lambda x: False)
    options = {"statistics": ["waad"], "backend": backend}
    with FakeTensorMode():
        query, lse = torch.empty(1, 2, 8, 16, device="mps"), torch.empty(1, 2, 8, device="mps")
        for call in (
            lambda: attnstats.attention(query, query, query, **options),
            lambda: attnstats.statistics_from_lse(query, query, lse, **options),
            lambda: attnstats.explain(query, query, query, **options),
        ):
            with pytest.raises(ValueError, match="query: device 'mps' is not supported"):
                call()


def test_negative_scale_on_the_tiled_path():
    query, key, value = Case(group=1).tensors()
    found = attnstats.attention(query, key, value, statistics=[MeanDistance()], scale=-0.3)
    expected = reference.attention(query, key, value, statistics=[MeanDistance()], scale=-0.3)
    torch.testing.assert_close(found.output, expected.output, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        found.statistics["mean_distance"], expected.statistics["mean_distance"], rtol=1e-5, atol=1e-4
    )


def test_counts_are_the_queries_behind_each_mean():
    query = torch.zeros(1, 1, 6, 16)
    mask, padding = torch.tensor([[1, 1, 1, 0, 1, 1]]).bool(), torch.tensor([[0, 1, 1, 1, 1, 1]]).bool()
    asked = [FAI(1, 2), FAI(0, None), "received", "waad"]
    _, stats = attnstats.attention(query, query, query, statistics=asked, query_mask=mask, key_padding_mask=padding)
    assert stats.counts[FAI(1, 2)].tolist() == [[0, 1, 1, 2, 1, 0]]
    assert stats.counts[FAI(0, None)].tolist() == [[0, 4, 3, 2, 2, 1]]
    assert set(stats.counts) == {FAI(1, 2), FAI(0, None)}  # sums and rows have none
    boundaries = torch.tensor([0, 2, 5], dtype=torch.int32)
    rows = query[0].transpose(0, 1)
    _, packed = attnstats.varlen_attention(rows, rows, rows, cu_seqlens_q=boundaries, statistics=asked)
    assert packed.counts[FAI(1, 2)].tolist() == [1, 0, 2, 1, 0, 0]


@pytest.mark.parametrize("from_lse", [False, True], ids=["attention", "from_lse"])
@pytest.mark.parametrize("how", ["tiled", "tiled plain", "triton"])
def test_a_window_wider_than_the_sequence_keeps_all_digits(how, from_lse, device, monkeypatch):
    """A window less a band of window - distance has the digits of the window: an error of 3e-4 where eager has 2e-6."""
    backend, _, plain = how.partition(" ")
    monkeypatch.setattr("attnstats.tiled.native.enabled", not plain)
    case = Case(batch=1, group=1, query_length=40, key_length=40)
    tensors = case.tensors(device if backend == "triton" else "cpu")
    asked = [WAAD(1000), LocalMass(1000)]
    truth = reference.attention(*(x.double() for x in tensors), statistics=asked).statistics
    eager = reference.attention(*tensors, statistics=asked).statistics
    if from_lse:
        given = {"statistics": asked, "backend": backend}
        found = attnstats.statistics_from_lse(*tensors[:2], truth.lse.float(), **given)
    else:
        found = attnstats.attention(*tensors, statistics=asked, backend=backend).statistics
    for s, largest in zip(asked, (40, 1), strict=True):
        error, of_eager = (float((x[s].double() - truth[s]).abs().max()) for x in (found, eager))
        assert error <= 2 * of_eager + 5e-7 * largest, f"{s}: {error:.1e}, eager {of_eager:.1e}"
