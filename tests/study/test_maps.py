"""The maps that the report shows, against those of eager attention; cells of one size."""

import dataclasses
from itertools import pairwise

import pytest
import torch

from attnstats import heads, reference
from attnstats.study.maps import CELLS, AtDistance, cell_boundaries, mean_maps, part_boundaries
from tests.tiny import run_with, small_llama

LAYERS = (1, 3)
CLASSES = heads.HeadClasses(
    local=torch.tensor([[True, False, False, True], [False, False, True, False]]),
    global_=torch.tensor([[False, False, False, False], [True, True, False, False]]),
)


@pytest.fixture(scope="module")
def model():
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return small_llama(vocab_size=50, hidden_size=32, initializer_range=0.3, **heads)


def eager_mean_maps(model, ids):
    """(T, T) float64 each: the plain mean of A over the chosen heads of all layers."""
    maps = run_with(model, "eager", input_ids=ids).attentions
    per_head = torch.stack([maps[layer][0] for layer in LAYERS]).double()
    return [per_head[chosen].mean(0) for chosen in (CLASSES.local, CLASSES.global_)]


@pytest.mark.parametrize(("length", "start"), [
    (40, 12),  # a cell is a token
    (300, 37),  # a cell is two tokens, the first key segment one
    (300, 0),  # no prompt
    (300, 299),  # one token of response
    (70, 66),
    (5, 2),  # shorter than the band
])  # fmt: skip
def test_maps_are_those_of_eager_attention(model, length, start):
    ids = torch.randint(50, (1, length), generator=torch.Generator().manual_seed(length))
    parts = tuple(sorted({0, 1, start, start + 1, (start + length) // 2, length} - {length + 1}))
    maps = mean_maps(model, ids, torch.arange(length) >= start, CLASSES, LAYERS, parts, distances=16)
    found = [
        (maps.local_map, maps.local_band, maps.local_shares),
        (maps.global_map, maps.global_band, maps.global_shares),
    ]
    assert maps.parts.tolist() == list(parts)
    for eager, (pooled, band, shares) in zip(eager_mean_maps(model, ids), found, strict=True):
        expected = torch.stack([
            torch.stack([eager[a:b, c:d].sum(1).mean() for c, d in pairwise(maps.columns.tolist())])
            for a, b in pairwise(maps.rows.tolist())
        ])  # fmt: skip
        torch.testing.assert_close(pooled.double(), expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(pooled.sum(1), torch.ones(len(pooled)), atol=1e-5, rtol=0)
        expected = torch.stack([
            torch.stack([eager[a:b, c:d].sum(1).mean() for c, d in pairwise(parts)])
            for a, b in pairwise(parts) if a >= start
        ])  # fmt: skip
        torch.testing.assert_close(shares.double(), expected, atol=1e-5, rtol=0)
        assert band.shape == (length - start, min(16, length))
        for t in range(start, length):
            for d in range(band.shape[1]):
                exact = eager[t, t - d].item() if d <= t else 0.0
                assert abs(band[t - start, d].item() - exact) < 1e-5


def test_the_model_is_as_it_was_afterwards(model):
    ids = torch.arange(20)[None]
    with torch.no_grad():
        before = model(ids).logits
        mean_maps(model, ids, torch.arange(20) >= 8, CLASSES, LAYERS, (0, 8, 20))
        assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("start", [0, 1, 2, 7, 100, 499, 1000])
@pytest.mark.parametrize("response", [1, 2, 50, 256, 257, 999, 4000])
def test_segments_are_of_one_size_and_fit(start, response):
    length = start + response
    queries, keys = cell_boundaries(start, length)
    assert (queries[0], queries[-1]) == (start, length)
    assert (keys[0], keys[-1]) == (0, length)
    assert start in keys
    assert max(len(queries), len(keys)) - 1 <= CELLS
    sizes = [b - a for a, b in pairwise(keys)]
    assert min(sizes) >= 1
    size = max(sizes)
    assert set(sizes[1:-1]) <= {size} or len(sizes) <= 2
    assert keys[-len(queries) :] == queries
    if size > 1:  # with smaller cells it would not fit
        assert -(-start // (size - 1)) + -(-response // (size - 1)) > CELLS


def test_parts_are_the_first_token_the_question_what_is_around_it_and_sentences():
    tokens = ["<s>", "user\n", "How", " many?", "\n", "<a>", "One", ".", " Two", ".", "\n", "Three"]
    assert part_boundaries(tokens, 6, "How many?") == (0, 1, 2, 4, 6, 8, 11, 12)
    assert part_boundaries(tokens, 6, "not there") == (0, 1, 6, 8, 11, 12)
    assert part_boundaries(tokens, 6, "") == (0, 1, 6, 8, 11, 12)
    assert part_boundaries(tokens, 1, "How") == (0, 1, 2, 5, 8, 11, 12)  # no question within the first token
    assert part_boundaries(["a", "b"], 1, "a") == (0, 1, 2)
    many = ["<s>", *["Yes", ". "] * (2 * CELLS + 1)]
    bounds = part_boundaries(many, 1, "")
    assert len(bounds) == 2 + -(-(2 * CELLS + 1) // 3)
    assert {b - a for a, b in pairwise(bounds[1:-1])} == {6}  # three sentences together


def test_the_band_is_a_statistic_like_any_other():
    draw = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 2, 9, 8, generator=draw, dtype=torch.float64) for _ in range(2))
    _, found = reference.attention(query, key, key, statistics=[AtDistance(3)])
    scores = (query @ key.mT / 8**0.5).masked_fill(~torch.ones(9, 9).tril().bool(), -torch.inf)
    expected = torch.nn.functional.pad(scores.softmax(-1).diagonal(-3, -2, -1), (3, 0))
    torch.testing.assert_close(found[AtDistance(3)], expected)
    assert dataclasses.replace(AtDistance(3), distance=4).band == (4, 4)
