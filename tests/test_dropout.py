"""Dropout: of the map that meets the values alone, the same mask in the backward pass, governed by torch's seed."""

import pytest
import torch

import attnstats
from attnstats import FAI, WAAD, Entropy, Received, reference
from attnstats.triton.configs import Config, configured
from tests.cases import Case

BACKENDS = ["reference", "tiled", "triton"]
P = 0.3
CASES = {
    "causal": Case(batch=1, query_length=20, key_length=20),
    "window-softcap-sinks": Case(
        batch=1,
        key_heads=1,
        query_length=20,
        key_length=20,
        window_size=(7, 2),
        is_causal=False,
        softcap=2.0,
        sinks=True,
    ),
    "padding": Case(batch=2, query_length=20, key_length=20, key_heads=1, padding="left", value_dim=24),
    "packed": Case(packed=((5, 5), (0, 0), (12, 20)), key_heads=1),
    "decoding": Case(batch=1, query_length=2, key_length=70, key_heads=1, group=2),
    "float16": Case(batch=1, query_length=20, key_length=20, key_heads=1, dtype="float16"),
}


def run(case, inputs, backend, p=P, seed=0, **options):
    torch.manual_seed(seed)
    return case.call(attnstats, inputs, dropout_p=p, backend=backend, **options)


def mask_of(case, tensors, backend):
    """1 / (1 - p) where a weight is kept and 0 where it is dropped, [B, Hq, Tq, Tk]: the values are the identity."""
    query, key, _ = (x.float() for x in tensors)
    length = key.shape[2]
    identity = torch.eye(length, device=query.device).expand(*key.shape[:2], -1, -1)
    dropped, whole = (run(case, (query, key, identity), backend, p).output for p in (P, 0.0))
    mask = torch.where(whole > 0, dropped / whole, 0.0)
    return mask.transpose(0, 1)[None] if case.packed else mask


def by_hand(case, inputs, mask):
    """Output in float64, densely: the map is what attention does to the identity."""
    query, key, value = inputs
    identity = torch.eye(key.shape[2], dtype=query.dtype, device=query.device).expand(*key.shape[:2], -1, -1)
    weights = case.call(reference, (query, key, identity)).output
    weights = weights.transpose(0, 1)[None] if case.packed else weights
    output = (weights * mask) @ value.repeat_interleave(case.group, dim=1)
    return output[0].transpose(0, 1) if case.packed else output


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_output_and_gradients_are_those_of_the_dropped_map(case, backend, where):
    tensors = case.tensors(where)
    mask = mask_of(case, tensors, backend)
    kept = mask[mask > 0]
    torch.testing.assert_close(kept, torch.full_like(kept, 1 / (1 - P)), rtol=1e-4, atol=0)
    both = []
    for dtype in (tensors[0].dtype, torch.float64):
        inputs = [x.to(dtype).requires_grad_() for x in tensors]
        if dtype == torch.float64:
            output = by_hand(case, inputs, mask.double())
        else:
            output = run(case, inputs, backend).output
        weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(output)
        both.append((output, *torch.autograd.grad((output * weights).sum(), inputs)))
    tolerance = 1e-2 if case.dtype == "float16" else 2e-5
    for x, y in zip(*both, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
def test_statistics_are_of_the_whole_map_and_the_seed_is_torchs(backend, where):
    case = Case(batch=1, key_heads=1, value_dim=24)  # one attention kernel on tiled with and without dropout
    tensors = case.tensors(where)
    asked = [WAAD(4), FAI(2, 9), Received(), Entropy()]
    output, stats = run(case, tensors, backend, statistics=asked)
    again, _ = run(case, tensors, backend, statistics=asked)
    other = run(case, tensors, backend, seed=1).output
    whole, expected = run(case, tensors, backend, p=0.0, statistics=asked)
    assert torch.equal(output, again)
    assert not torch.equal(output, other)
    assert not torch.equal(output, whole)
    assert torch.equal(stats.lse, expected.lse)
    assert all(torch.equal(stats[s], expected[s]) for s in asked)
    following = case.call(attnstats, tensors, dropout_p=P, backend=backend).output
    assert not torch.equal(following, other)  # no seed in between: another mask


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_mean_over_seeds_is_attention(backend, where):
    """And the share that is dropped is p: 100 draws, 5 standard deviations."""
    draws, rows = 5, 20
    case = Case(batch=rows, key_heads=1, group=1, query_length=16, key_length=16, value_dim=16)
    query, key, _ = (x[:1].expand(rows, -1, -1, -1) for x in case.tensors(where))
    identity = torch.eye(16, device=where).expand(rows, 1, 16, 16)
    whole = run(case, (query, key, identity), backend, p=0.0).output[0]
    found = torch.cat([run(case, (query, key, identity), backend, seed=i).output for i in range(draws)])
    deviation = whole * (P / (1 - P) / (draws * rows)) ** 0.5
    assert bool(((found.mean(0) - whole).abs() <= 5 * deviation + 1e-6).all())
    share = float((found[:, whole > 0] == 0).float().mean())
    count = draws * rows * int((whole > 0).sum())
    assert abs(share - P) <= 5 * (P * (1 - P) / count) ** 0.5


@pytest.mark.parametrize("kernel", ["forward", "weighted_queries", "weighted_keys"])
def test_the_mask_does_not_depend_on_the_tiles(kernel, device):
    case = Case(batch=1, key_heads=1, query_length=20, key_length=20)
    both = []
    for tiles in (Config(16, 16), Config(32, 32)):
        inputs = [x.requires_grad_() for x in case.tensors(device)]
        with configured(kernel, tiles):
            output = run(case, inputs, "triton").output
            both.append((output, *torch.autograd.grad(output.sum(), inputs)))
    for x, y in zip(*both, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_sequences_have_masks_of_their_own(backend, where):
    case = Case(packed=((16, 16), (16, 16)), key_heads=1, group=1)
    mask = mask_of(case, case.tensors(where), backend)[0, 0] > 0
    assert not torch.equal(mask[:16, :16], mask[16:, 16:])


def test_a_plan_shows_it_and_draws_nothing():
    query = torch.zeros(1, 1, 64, 16)
    torch.manual_seed(0)
    plan = attnstats.explain(query, query, query, dropout_p=0.5, backend="tiled")
    assert plan.passes[0].run == "row_blocks"
    drawn = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.rand(1))
