"""Every form of `layers` and `heads` chooses the layers and heads that it says."""

import pytest
import torch

from attnstats import FAI, WAAD
from attnstats.transformers.capture import capture
from attnstats.transformers.selection import middle_third
from tests.tiny import (
    HEADS,
    tokens,
)


@pytest.mark.parametrize(
    ("count", "expected"),
    [(28, (9, 11, 14, 16, 18)), (36, (12, 15, 18, 21, 24)), (30, (10, 12, 15, 18, 20)), (6, (2, 3, 4)), (1, (0,))],
)
def test_middle_third_is_five_evenly_spaced_layers(count, expected):
    assert middle_third(count) == expected


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("middle-third", (2, 3, 4)),
        ("all", (0, 1, 2, 3, 4, 5)),
        (slice(None, None, 2), (0, 2, 4)),
        (slice(-2, None), (4, 5)),
        ([5, 0], (0, 5)),
        ([-1], (5,)),
        (range(1, 3), (1, 2)),
    ],
)
def test_layers_are_chosen_ascending(llama, layers, expected):
    ids = tokens()
    with torch.no_grad():
        with capture(llama, statistics=["waad"], layers="all") as full:
            llama(ids)
        with capture(llama, statistics=["waad"], layers=layers) as run:
            llama(ids)
    assert run.layers == expected
    assert torch.equal(run["waad"], full["waad"][list(expected)])


PER_LAYER = {2: [8, 0], 4: [3, 1]}


@pytest.mark.parametrize(
    ("heads", "waad", "fai"),
    [
        ([0, 7], {2: [0, 7], 4: [0, 7]}, {2: [0, 7], 4: [0, 7]}),
        (PER_LAYER, PER_LAYER, PER_LAYER),
        ({"waad": PER_LAYER, "fai": [5]}, PER_LAYER, {2: [5], 4: [5]}),
        ({WAAD(): [1]}, {2: [1], 4: [1]}, {2: list(range(9)), 4: list(range(9))}),
    ],
)
def test_heads_are_chosen_per_layer_and_statistic(llama, heads, waad, fai):
    ids = tokens()
    with torch.no_grad():
        with capture(llama, statistics=["waad", FAI(1, 5)], layers="all") as full:
            llama(ids)
        with capture(llama, statistics=["waad", FAI(1, 5)], layers=[2, 4], heads=heads) as run:
            llama(ids)
    for name, chosen in (("waad", waad), ("fai", fai)):
        assert torch.equal(run[name], torch.stack([full[name][layer][:, h] for layer, h in chosen.items()]))


def test_heads_may_be_a_class_of_heads(llama):
    flags = torch.zeros(2, HEADS, dtype=torch.bool)
    flags[0, 3] = flags[1, 5] = True
    with torch.no_grad(), capture(llama, statistics=["waad"], layers=[1, 5], heads=flags) as run:
        llama(tokens())
    assert run.heads[WAAD()] == {1: (3,), 5: (5,)}
    with (
        pytest.raises(ValueError, match=r"heads: a bool tensor must be .*\(2, 9\)"),
        capture(llama, statistics=["waad"], layers=[1, 5], heads=flags[:1]),
    ):
        pass
