"""Masks that hide keys by a large finite number, under patch_sdpa and in nn, against a float64 softmax with the mask
added; where nothing proves that they hide, they are refused."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import attnstats
from attnstats import FAI, WAAD, Entropy, Received
from attnstats.core import finite_masks

LENGTH = 24
STATISTICS = (WAAD(3), FAI(1, 5), Entropy(), Received())
HIDDEN = {
    "diffusers": lambda dtype: -10000.0,
    "NaFlexViT": lambda dtype: torch.finfo(dtype).min,
    "-1e9": lambda dtype: -1e9 if dtype != torch.float16 else -6e4,
}


def shown(kind):
    """(2, 1, Tq | 1, Tk) bool."""
    keys = torch.arange(LENGTH) < torch.tensor([LENGTH, LENGTH - 7])[:, None]
    causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    return {
        "keys": keys[:, None, None],
        "keys of every query": keys[:, None, None].expand(-1, 3, LENGTH, -1),
        "causal": causal.expand(2, 1, -1, -1),
        "causal, keys": causal & keys[:, None, None],
        "window": (causal & ~causal.tril(-6))[None, None],
    }[kind]


def tensors(dtype, size=1.0):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 3, LENGTH, 16, generator=generator) for _ in range(3))
    return [x.to(dtype) for x in (size * query, key, value)]


def by_definition(query, key, value, mask):
    """Output, entropy and received attention in float64."""
    scores = query.double() @ key.double().mT * query.shape[-1] ** -0.5 + mask.double()
    weights = scores.softmax(-1)
    return weights @ value.double(), torch.special.entr(weights).sum(-1), weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["keys", "keys of every query", "causal", "causal, keys", "window"])
@pytest.mark.parametrize("number", HIDDEN)
def test_they_hide_where_a_key_leads(number, kind, dtype):
    inputs = tensors(dtype)
    visible = shown(kind)
    mask = torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, HIDDEN[number](dtype))
    with attnstats.patch_sdpa(statistics=STATISTICS) as run:
        output = torch.nn.functional.scaled_dot_product_attention(*inputs, attn_mask=mask)
    expected, entropy, weights = by_definition(*inputs, mask)
    assert not weights.masked_fill(visible, 0.0).any()
    by_torch = scaled_dot_product_attention(*inputs, attn_mask=mask)
    limit = 2 * (by_torch.double() - expected).abs().max() + torch.finfo(dtype).eps
    assert (output.double() - expected).abs().max() <= limit
    counted = torch.ones(2, 1, LENGTH, 1)
    if "keys" in kind:  # tokens that no query sees are padding, and no queries either
        counted = visible.any(2)[:, :1, :, None]
    rows = counted[..., 0].bool().expand(2, 3, -1)
    torch.testing.assert_close(run[0]["entropy"].double()[rows], entropy[rows], atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(run[0]["received"].double(), (weights * counted).sum(2), atol=2e-4, rtol=1e-4)
    infinite = mask.masked_fill(~visible, -torch.inf)
    with attnstats.patch_sdpa(statistics=STATISTICS) as other:
        torch.nn.functional.scaled_dot_product_attention(*inputs, attn_mask=infinite)
    for s in STATISTICS:
        assert torch.equal(run[0][s], other[0][s])
        assert torch.equal(run[0].valid[s], other[0].valid[s])


def lowered(visible, number=-10000.0):
    return torch.zeros(visible.shape).masked_fill(~visible, number)


FIRST = torch.tensor([True, False])[:, None, None, None]
NOT_SURE = {
    "a batch row without a key": lambda: (tensors(torch.float32), lowered(shown("keys") & FIRST)),
    "queries without a key": lambda: (tensors(torch.float32), lowered(shown("causal") & (torch.arange(LENGTH) > 4))),
    "huge queries": lambda: (tensors(torch.float32, 3000.0), lowered(shown("causal, keys"))),
    "a NaN": lambda: (tensors(torch.float32, torch.nan), lowered(shown("causal, keys"))),
    "a small number": lambda: (tensors(torch.float32), lowered(shown("causal, keys"), -90.0)),
    "a bias": lambda: (tensors(torch.float32), -torch.arange(LENGTH * 1.0).expand(LENGTH, LENGTH)),
    "a learned bias": lambda: (tensors(torch.float32), lowered(shown("causal, keys")).requires_grad_()),
}


@pytest.mark.parametrize("name", NOT_SURE)
def test_what_nothing_proves_is_refused(name):
    inputs, mask = NOT_SURE[name]()
    with (
        attnstats.patch_sdpa(statistics=["entropy"]),
        pytest.raises(ValueError, match=r"neither causal.*A finite number counts as -inf where no score"),
    ):
        torch.nn.functional.scaled_dot_product_attention(*inputs, attn_mask=mask)


def test_the_lead_is_enough_where_scores_are_as_large_as_the_bound():
    """A hidden key in the direction of the query, and a visible one against it."""
    query = torch.zeros(1, 1, 1, 4)
    query[..., 0] = 10.0
    key = torch.zeros(1, 1, 2, 4)
    key[..., 0] = torch.tensor([-10.0, 10.0])
    lead = finite_masks._lead(query, key, 1.0)
    for number, hides in ((-lead, True), (-lead + 0.1, False)):
        mask = torch.tensor([0.0, number])[None, None, None]
        pattern = finite_masks.recognise_finite(mask, query, key, 1.0)
        assert (pattern is not None) == hides
    scores = torch.tensor([-100.0, 100.0 - lead])
    assert scores.softmax(0)[1] == 0


@pytest.mark.parametrize("backward", [False, True])
def test_torchs_module_takes_them(backward):
    module = attnstats.nn.MultiheadAttention(16, 2, batch_first=True, statistics=["entropy"])
    x = torch.randn(2, LENGTH, 16, generator=torch.Generator().manual_seed(0))
    mask = lowered(shown("causal")[0, 0])
    results = []
    for number in (-10000.0, -torch.inf):
        output, _ = module(x, x, x, attn_mask=mask.masked_fill(mask < 0, number), need_weights=False)
        results.append([output, module.statistics["entropy"]])
        if backward:
            results[-1] += torch.autograd.grad(output.square().sum(), module.in_proj_weight)
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected)


def test_a_symmetric_mask_leaves_padding_without_a_key():
    """As timm's NaFlexViT makes it: there padding attends to all keys alike, which no pattern says."""
    inputs, keys = tensors(torch.float32), shown("keys")
    mask = lowered(keys & keys.mT, torch.finfo(torch.float32).min)
    with attnstats.patch_sdpa(statistics=["entropy"]), pytest.raises(ValueError, match="every row keeps another key"):
        torch.nn.functional.scaled_dot_product_attention(*inputs, attn_mask=mask)
