"""Masks read back into patterns: every element is compared, in blocks of bounded size."""

import pytest
import torch

from attnstats.core.patterns import BLOCK, recognise
from tests.guards import Largest


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
