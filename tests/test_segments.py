"""Sentences as segments: texts and tokens, and their attention against eager maps and the definition by loops."""

from itertools import pairwise

import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnstats import segments
from attnstats.heads import HeadProfile
from attnstats.study import models
from tests.tiny import run_with, save_tiny_model


@pytest.mark.parametrize(("text", "expected"), [
    ("One. Two! Three? Four", ["One. ", "Two! ", "Three? ", "Four"]),
    ("It costs 3.50 or 1,000.25 in all.", ["It costs 3.50 or 1,000.25 in all."]),
    ("Dr. Wu met J. Roe, e.g. at noon. Yes.", ["Dr. Wu met J. Roe, e.g. at noon. ", "Yes."]),
    ("Steps:\n1. Add.\n2. Stop.\n\n", ["Steps:\n", "1. Add.\n", "2. Stop.\n\n"]),
    ('He said "no." Then (so what?) he left...', ['He said "no." ', "Then (so what?) ", "he left..."]),
    ("多少\uff1f四个\u3002好", ["多少\uff1f", "四个\u3002", "好"]),
    ("So it is 12. Then I. But", ["So it is 12. ", "Then I. ", "But"]),
    ("\n\n  ", ["\n\n  "]), (" ", [" "]), ("", []), ("no end", ["no end"]),
])  # fmt: skip
def test_sentences(text, expected):
    assert segments.sentences(text) == expected


@given(st.text(alphabet='ab .!?\n"1)e。', max_size=40))
def test_sentences_are_the_text(text):
    found = segments.sentences(text)
    assert "".join(found) == text
    assert all(found)
    assert all(part.strip() for part in found) or not text.strip()


@given(st.lists(st.text(alphabet="ab .!?\n", max_size=4), min_size=1, max_size=20), st.data())
def test_every_token_is_in_the_segment_of_its_first_letter(tokens, data):
    start = data.draw(st.integers(0, len(tokens) - 1))
    found = segments.boundaries(tokens, start=start)
    assert found[0] == 0
    assert found[-1] == len(tokens)
    assert all(a < b for a, b in pairwise(found))
    text = "".join(tokens[start:])
    owner = [i for i, part in enumerate(segments.sentences(text)) for _ in part]
    expected, before, position = {0, start}, None, 0
    for index, token in enumerate(tokens[start:], start):
        letters = [position + i for i, c in enumerate(token) if not c.isspace()] or list(
            range(position, position + len(token))
        )
        if letters:
            if before is not None and owner[letters[0]] > before:
                expected.add(index)
            before = owner[letters[0]] if before is None else max(before, owner[letters[0]])
        position += len(token)
    assert set(found) - {len(tokens)} == expected


def test_a_splitter_of_ones_own():
    tokens = ["a", "b;", "c", "d;", "e"]
    assert segments.boundaries(tokens, lambda text: [f"{p};" for p in text.split(";")[:-1]] + ["e"]) == (0, 2, 4, 5)
    with pytest.raises(ValueError, match="split: its parts, joined, are not the text"):
        segments.boundaries([*tokens, " f"], str.split)
    for start in (-1, 5):
        with pytest.raises(ValueError, match=f"start must be a token's number, 0 to 4, got {start}"):
            segments.boundaries(tokens, start=start)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return models.load(str(save_tiny_model(tmp_path_factory.mktemp("tiny"))), dtype="float32", device="cpu").model


BOUNDARIES = (0, 4, 9, 10, 17, 21, 30, 33, 40)


@pytest.fixture(scope="module")
def eager(model):
    ids = torch.randint(5, 40, (1, 40), generator=torch.Generator().manual_seed(1))
    return ids, torch.cat(run_with(model, "eager", input_ids=ids).attentions).double()  # (L, H, T, T)


def test_attention_is_that_of_eager_maps(model, eager):
    ids, maps = eager
    found = segments.attention(model, ids, BOUNDARIES)
    assert found.layers == tuple(range(6))
    parts = [slice(a, b) for a, b in pairwise(BOUNDARIES)]
    pairs = torch.stack([torch.stack([maps[..., i, j].mean((-1, -2)) for j in parts], -1) for i in parts], -2)
    torch.testing.assert_close(found.per_pair().double(), pairs, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found.per_query().sum(-1), torch.ones(6, 4, 8))


@pytest.mark.parametrize("ignore", [1, 4])
def test_receiver_heads_are_those_of_the_definition(model, eager, ignore):
    """Of a sentence: the mean, over sentences `ignore` or more behind it, of the mean over pairs; then kurtosis."""
    ids, maps = eager
    profile = segments.attention(model, ids, BOUNDARIES).add_to(HeadProfile.empty(range(6), 4), ignore)
    expected = torch.zeros(6, 4, dtype=torch.float64)
    parts = [slice(a, b) for a, b in pairwise(BOUNDARIES)]
    for layer in range(6):
        for head in range(4):
            received = []
            for j, key in enumerate(parts):
                later = [maps[layer, head, query, key].mean().item() for query in parts[j + ignore :]]
                if later:
                    received.append(sum(later) / len(later))
            expected[layer, head] = scipy.stats.kurtosis(received)
    torch.testing.assert_close(profile.kurtosis, expected, atol=1e-4, rtol=1e-4)
    best = expected.flatten().topk(3).indices.sort().values
    assert profile.receivers(3).flatten().nonzero()[:, 0].tolist() == best.tolist()


def test_the_prompt_can_be_left_out(model, eager):
    ids, _ = eager
    found = segments.attention(model, ids, BOUNDARIES, layers=[2])
    profile = found.add_to(HeadProfile.empty([2], 4), ignore=1, first=2)
    torch.testing.assert_close(profile.distance, found.mean_distance[..., 9:].double().mean(-1))
    expected = scipy.stats.kurtosis(found.received(1)[..., 2:-1].numpy(), axis=-1)
    torch.testing.assert_close(profile.kurtosis, torch.tensor(expected))


def test_bad_arguments(model, eager):
    ids, _ = eager
    with pytest.raises(ValueError, match=r"ids must be \(1, T\), one sequence, got \(2, 40\)"):
        segments.attention(model, ids.expand(2, -1), BOUNDARIES)
    with pytest.raises(ValueError, match="must end at the length 40, got 39"):
        segments.attention(model, ids, (0, 39))


def test_long_runs_of_marks_take_no_time():
    """Each would take minutes if the work grew with the square of the length."""
    for text in ("." * 200_000 + "x", "e.g. " * 40_000, "1. " * 60_000, "a" * 200_000 + "."):
        assert "".join(segments.sentences(text)) == text
