"""Masks read back into patterns: every element is compared, by compiled code or in blocks of bounded size."""

import pytest
import torch

from attnstats.core import library
from attnstats.core.patterns import BLOCK, recognise
from tests.guards import Largest


@pytest.fixture(autouse=True, params=["compiled", "plain"])
def way(request, monkeypatch):
    if request.param == "compiled" and library.load() is None:
        pytest.skip("attnstats.tiled._native was not built")
    monkeypatch.setattr(library, "enabled", request.param == "compiled")


def forms(mask):
    """A mask with True for visible as SDPA and nn.MultiheadAttention take it."""
    return ((mask, False), (~mask, True), (torch.zeros(mask.shape).masked_fill(~mask, -torch.inf), True))


@pytest.mark.parametrize("offset", [None, 0, 4])
def test_one_wrong_element_anywhere_is_seen(offset):
    mask = torch.ones(2, 1, 12, 16).bool()
    if offset is not None:
        mask &= torch.ones(12, 16).tril(offset).bool()
    mask[1, ..., 11:] = False
    for form, hides in forms(mask):
        pattern = recognise(form, 12, true_hides=hides)
        assert pattern.query_offset == offset
        assert pattern.right == (None if offset is None else 0)
        reached = torch.arange(16) < (12 + offset if offset is not None else 16)
        key_mask = torch.ones(16).bool() if pattern.key_mask is None else pattern.key_mask
        assert torch.equal(key_mask & reached, mask.any(-2)[:, 0])
        for i, j in ((0, 0), (7, 15), (11, 2), (5, 3)):
            wrong = form.clone()
            wrong[0, 0, i, j] = ~wrong[0, 0, i, j] if wrong.dtype == torch.bool else -1e30
            assert recognise(wrong, 12, true_hides=hides) is None, (offset, i, j)
        form[0, 0, 3, 3] = not form[0, 0, 3, 3]  # in place: the pattern before is not used
        assert recognise(form, 12, true_hides=hides) is None


def test_padding_beside_which_a_window_would_end():
    """Keys that are hidden from every query are padding: no position of the queries follows from them."""
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0]]).bool()[:, None, None].expand(2, 1, 3, 4)
    for form, hides in forms(mask):
        pattern = recognise(form, 3, true_hides=hides)
        assert pattern.query_offset is pattern.left is pattern.right is None
        assert torch.equal(pattern.key_mask, mask[:, 0, 0])


def test_large_masks_are_read_in_blocks():
    """Of more elements than a block has: the same patterns, and no temporary tensor larger than a block."""
    rows, columns = 1500, 2000
    mask = torch.ones(rows, columns).tril(columns - rows).triu(-3).bool()[None, None]
    assert mask.numel() > 2 * BLOCK
    for form, hides in forms(mask):
        with Largest() as memory:
            pattern = recognise(form, rows, true_hides=hides)
        assert (pattern.key_mask, *pattern[1:]) == (None, columns - rows, columns - rows + 3, 0)
        assert memory.largest <= BLOCK
        wrong = form.clone()
        wrong[0, 0, -1, 0] = ~wrong[0, 0, -1, 0] if wrong.dtype == torch.bool else 0
        assert recognise(wrong, rows, true_hides=hides) is None


@pytest.mark.parametrize("offset", [0, 4, 7])
@pytest.mark.parametrize("left", [None, 3])
def test_where_the_first_query_stands(offset, left):
    """At the first key, before the unused slots of a cache, or so that the last query stands at the last key."""
    distance = torch.arange(6)[:, None] + offset - torch.arange(13)
    mask = ((distance >= 0) & (distance <= (99 if left is None else left))).expand(2, 1, -1, -1).clone()
    mask[0, ..., offset : offset + 2] = False
    pattern = recognise(mask, 6)
    assert pattern[1:] == (offset, left, 0)
    assert pattern.key_mask[0].tolist() == [not offset <= key < offset + 2 for key in range(13)]
    assert pattern.key_mask[1].all()


MADE = {
    "odd lengths": lambda x: x[..., :27, :27],
    "a part of a larger one": lambda x: torch.nn.functional.pad(x, (3, 5, 2, 2))[..., 2:34, 3:35],
    "transposed": lambda x: x.mT.contiguous().mT,
    "every other row": lambda x: x.repeat_interleave(2, -2)[..., ::2, :],
    "expanded": lambda x: x[:1, :1].expand(2, 3, -1, -1),
    "heads last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
}


@pytest.mark.parametrize("made", MADE)
def test_masks_of_any_strides(made):
    mask = torch.ones(32, 32).tril().triu(-9).bool().expand(2, 3, -1, -1).clone()
    mask[1 if made != "expanded" else 0, :, :, :7] = False
    for form, hides in forms(mask):
        x = MADE[made](form)
        pattern = recognise(x, x.shape[-2], true_hides=hides)
        assert pattern[1:] == (0, 9, 0)
        assert pattern.key_mask.shape == (2, x.shape[-1])
        for place in ((1, 2, 20, 15), (0, 0, 3, 20), (0, 1, 26, 2)):
            wrong = x.clone()
            wrong[place] = ~wrong[place] if wrong.dtype == torch.bool else 1
            assert recognise(wrong, x.shape[-2], true_hides=hides) is None, place


@pytest.mark.parametrize("offset", [0, 3, 8])
@pytest.mark.parametrize("length", [5, 8])
def test_masks_that_are_no_multiple_of_eight_bytes(length, offset):
    """Which are compared eight at a time elsewhere."""
    mask = torch.ones(length, length).tril().bool()
    storage = torch.cat((torch.zeros(offset, dtype=torch.bool), mask.flatten()))
    x = storage[offset:].view(1, 1, length, length)
    assert recognise(x, length, true_hides=False)[1:] == (0, None, 0)
    x[0, 0, length - 1, 1] = False
    assert recognise(x, length, true_hides=False) is None


def test_other_numbers_that_mean_the_same():
    visible = torch.ones(1, 1, 9, 9).tril().bool()
    mask = torch.zeros(visible.shape).masked_fill(~visible, -1e30)
    mask[..., 4, 7:] = -torch.inf
    mask[..., 5, :3] = -0.0
    assert recognise(mask, 9) is None
    assert recognise(mask, 9, hidden=-1e4)[1:] == (0, None, 0)
    for number in (torch.nan, 1.0, -5.0, torch.inf):
        wrong = mask.clone()
        wrong[..., 6, 2] = number
        assert recognise(wrong, 9, hidden=-1e4) is None
        wrong = mask.clone()
        wrong[..., 6, 8] = number
        assert recognise(wrong, 9, hidden=-1e4) is None
    bytes_of_two = (visible.to(torch.uint8) * 2).view(torch.bool)
    assert recognise(bytes_of_two, 9)[1:] == (0, None, 0)
