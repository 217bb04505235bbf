"""The compiled comparison of a mask with what is expected of it."""

import pytest
import torch

from attnstats.core import library


@pytest.mark.skipif(library.load() is None, reason="attnstats.tiled._native was not built")
@pytest.mark.parametrize(("left", "right"), [(None, None), (None, 0), (2, None), (2, 1), (0, 0)])
def test_the_compiled_comparison_finds_the_row(left, right):
    """All rows where the mask is as expected, so that none is compared twice; else the first that is not."""
    position, key = torch.arange(9)[:, None], torch.arange(12)
    seen = torch.ones(9, 12, dtype=torch.bool)
    if left is not None:
        seen &= key >= position - left
    if right is not None:
        seen &= key <= position + right
    mask = seen.expand(2, 3, 9, 12).clone()
    lines, concealed = torch.ones(2, 12, dtype=torch.bool), torch.zeros(12, dtype=torch.bool)
    first, end = None if left is None else -left, None if right is None else right + 1
    assert library.first_difference(mask, lines, concealed, first, end) == 9
    for place in (0, 5, 11):
        other = mask.clone()
        other[1, 2, 4, place] ^= True
        assert library.first_difference(other, lines, concealed, first, end) == 4
