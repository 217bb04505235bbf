"""Changes of a curve and its highest tokens."""

import torch

from attnstats.rhythm import delta, top


def test_delta_is_the_change_to_the_next_token():
    assert delta(torch.tensor([1.0, 4.0, 2.0, 2.0])).tolist() == [3.0, 2.0, 0.0, 0.0]


def test_the_last_token_has_no_successor():
    assert delta(torch.tensor([7.0])).tolist() == [0.0]
    assert delta(torch.tensor([0.0, 7.0]))[-1] == 0


def test_delta_of_a_mean_is_not_the_mean_of_deltas():
    heads = torch.tensor([[0.0, 2.0], [2.0, 0.0]])
    assert delta(heads.mean(0)).tolist() == [0.0, 0.0]
    assert delta(heads).mean(0).tolist() == [2.0, 0.0]


def test_top_is_largest_first_and_ties_go_to_the_lower_index():
    assert top(torch.tensor([1.0, 3.0, 2.0, 3.0]), 3) == [1, 3, 2]


def test_top_never_takes_a_placeholder():
    values, valid = torch.tensor([5.0, 1.0, 9.0]), torch.tensor([True, True, False])
    assert top(values, 3, valid) == [0, 1]
    assert top(values, 3, torch.zeros(3, dtype=torch.bool)) == []
