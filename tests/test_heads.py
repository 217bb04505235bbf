"""Head classes: how many, which ones, ties, and one mean over all of a class."""

import math

import pytest
import torch

from attnstats.heads import class_mean, classify, head_distance


@pytest.mark.parametrize(("shape", "share", "count"), [
    ((5, 9), 0.30, 13),
    ((5, 32), 0.30, 48),
    ((10, 10), 0.29, 29),  # 0.29 * 100 is 28.999999999999996 in floating point
    ((10, 10), 0.07, 7),
    ((1, 3), 0.30, 1),
    ((1, 2), 0.01, 1),
    ((1, 4), 0.5, 2),
])  # fmt: skip
def test_share_of_heads(shape, share, count):
    distance = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    classes = classify(distance, share)
    assert (
        classes.local.sum() == classes.global_.sum() == count == max(1, math.floor(round(share * distance.numel(), 6)))
    )
    assert not (classes.local & classes.global_).any()
    assert distance[classes.local].max() <= distance[~classes.local].min()
    assert distance[classes.global_].min() >= distance[~classes.global_].max()


def test_ties_go_to_the_first_head_in_layer_order():
    classes = classify(torch.ones(3, 4), 0.25)
    assert classes.local.flatten().nonzero()[:, 0].tolist() == [0, 1, 2]
    assert classes.global_.flatten().nonzero()[:, 0].tolist() == [3, 4, 5]
    tied = classify(torch.tensor([[2.0, 1.0, 1.0], [3.0, 3.0, 1.0]]), 0.34)
    assert tied.local.tolist() == [[False, True, True], [False, False, False]]
    assert tied.global_.tolist() == [[False, False, False], [True, True, False]]


@pytest.mark.parametrize("shape", [(1, 2), (1, 3), (2, 3), (3, 4), (5, 9)])
@pytest.mark.parametrize("share", [0.01, 0.3, 0.49, 0.5])
def test_heads_that_tie_are_never_both(shape, share):
    """A model whose heads all attend alike, and one in which a single head differs."""
    one_apart = torch.ones(shape).flatten().index_fill(0, torch.tensor(1), 2.0).view(shape)
    for distance in (torch.ones(shape), one_apart, -one_apart):
        classes = classify(distance, share)
        assert not (classes.local & classes.global_).any()
        assert classes.local.sum() == classes.global_.sum() >= 1
        assert distance[classes.local].max() <= distance[~classes.local].min()
        assert distance[classes.global_].min() >= distance[~classes.global_].max()


def test_names():
    classes = classify(torch.tensor([[1.0, 2.0, 3.0]]))
    assert [classes.name(0, head) for head in range(3)] == ["local", "middle", "global"]


def test_class_mean_is_one_mean_and_not_a_mean_of_layer_means():
    statistic = torch.tensor([[[6.0], [0.0]], [[1.0], [2.0]]])
    chosen = torch.tensor([[True, False], [True, True]])
    assert class_mean(statistic, chosen).tolist() == [3.0]  # a mean of layer means would be 3.75


def test_head_distance_counts_only_the_rows_that_count():
    rows = torch.tensor([[[100.0, 1.0, 3.0], [100.0, 4.0, 6.0]]])
    assert head_distance(rows, torch.tensor([False, True, True])).tolist() == [[2.0, 5.0]]
    with pytest.raises(ValueError, match="no row counts"):
        head_distance(rows, torch.zeros(3, dtype=torch.bool))


@pytest.mark.parametrize(("distance", "share", "message"), [
    (torch.rand(4), 0.3, "layers, heads"),
    (torch.rand(1, 1), 0.3, "two heads or more"),
    (torch.rand(2, 2), 0.0, r"share must be in \(0, 0.5\], got 0.0"),
    (torch.rand(2, 2), 0.51, r"got 0.51"),
    (torch.rand(2, 2), math.nan, "got nan"),
    (torch.tensor([[1.0, math.nan]]), 0.3, "NaN"),
])  # fmt: skip
def test_bad_input(distance, share, message):
    with pytest.raises(ValueError, match=message):
        classify(distance, share)
