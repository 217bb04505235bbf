"""The perturbation test: which positions, which tokens, continuations against reading everything anew, and Table 1."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from attnstats.chance import Chance
from attnstats.study.perturb import (
    Overlaps,
    Perturbation,
    Positions,
    choose_positions,
    content_words,
    overlap,
    perturb,
    summarise,
)
from tests.tiny import save_tiny_model

SETTINGS = Perturbation(positions=2, candidates=3, tokens=6)
PROMPT, RESPONSE = [3, 5, 6, 7], [12, 20, 21, 9, 33, 14, 8, 8, 25, 30, 31, 7, 13, 39, 22]
CHOSEN = Positions(high=[7, 2], low=[0, 8])
SLIDING = {"kind": "Mistral", "sliding_window": 4}


@pytest.fixture(
    scope="module", params=[{}, SLIDING, {"kind": "Gemma2", "head_dim": 8}], ids=["Llama", "Mistral", "Gemma2"]
)
def folder(request, tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny"), **request.param)


@pytest.mark.parametrize(("settings", "expected"), [
    (Perturbation(positions=2, tokens=1), Positions([2, 4], [0, 1])),
    (Perturbation(positions=1, tokens=3), Positions([2], [0])),
    (Perturbation(positions=2, tokens=3), None),  # two positions have three tokens after them
])  # fmt: skip
def test_positions_have_room_after_them(settings, expected):
    fai = torch.tensor([0.0, 0.1, 0.5, 0.2, 0.3, 0.9])
    assert choose_positions(fai, torch.ones(6, dtype=torch.bool), settings) == expected


def test_positions_are_valid_and_ties_go_to_the_lower_index():
    fai, valid = torch.tensor([0.0, 1.0, 1.0, 5.0, 1.0, 0.0, 0.0]), torch.tensor([True] * 3 + [False] + [True] * 3)
    assert choose_positions(fai, valid, Perturbation(positions=2, tokens=1)) == Positions([1, 2], [0, 5])


@pytest.mark.parametrize(("text", "words"), [
    ("The baker sold 48 rolls.", {"baker", "sold", "48", "rolls"}),
    ("DON'T don\u2019t", {"don't", "don\u2019t"}),
    ("$1,200.50, 3/4 and x_1!", {"1,200.50", "3", "4", "x_1"}),
    ("it is what it was", set()),
    ("Größe 漢字", {"größe", "漢字"}),
    ("\\boxed{18}", {"boxed", "18"}),
])  # fmt: skip
def test_content_words(text, words):
    assert content_words(text) == words


@pytest.mark.parametrize(("one", "other", "expected"), [
    ("a cat", "the cat", 1.0), ("a cat", "a dog", 0.0), ("", "", 1.0), ("cat", "", 0.0), ("cat cat dog", "dog", 0.5),
])  # fmt: skip
def test_overlap(one, other, expected):
    assert overlap(one, other) == overlap(other, one) == expected


def greedy(tiny, ids, tokens):
    """The greedy continuation of ids, with every step from the beginning."""
    written = []
    for _ in range(tokens):
        with torch.no_grad():
            token = int(tiny.model(input_ids=torch.tensor([ids + written]), use_cache=False).logits[0, -1].argmax())
        if token in (1, 0):
            break
        written.append(token)
    return written


def test_overlaps_are_those_of_continuations_one_by_one(tiny):
    found = perturb(tiny, PROMPT, RESPONSE, CHOSEN, SETTINGS)
    ids = PROMPT + RESPONSE
    with torch.no_grad():
        logits = tiny.model(input_ids=torch.tensor([ids])).logits[0]
    for overlaps, written, positions in (
        (found.high, found.high_written, CHOSEN.high), (found.low, found.low_written, CHOSEN.low),
    ):  # fmt: skip
        assert overlaps.shape == written.shape == (2, 4)
        for i, position in enumerate(positions):
            at = len(PROMPT) + position
            order = logits[at - 1].argsort(descending=True).tolist()
            candidates = order[: 3 + (ids[at] in order[:3])]
            original = tiny.tokenizer.decode(ids[at + 1 : at + 7], skip_special_tokens=True)
            for j, token in enumerate(candidates):
                text = tiny.tokenizer.decode(greedy(tiny, [*ids[:at], token], 6), skip_special_tokens=True)
                assert overlaps[i, j] == overlap(text, original), (position, token, text)
                assert written[i, j] == (token == ids[at])
            assert overlaps[i, len(candidates) :].isnan().all()


def test_the_token_that_was_written_is_among_the_candidates_of_a_greedy_response(tiny):
    starts = [[*PROMPT, first] for first in range(3, 40)]
    prompt, response = next((p, r) for p in starts if len(r := greedy(tiny, p, 12)) == 12)
    found = perturb(tiny, prompt, response, Positions([4], [5]), dataclasses.replace(SETTINGS, positions=1))
    assert found.high_written.tolist() == found.low_written.tolist() == [[True, False, False, False]]
    assert found.high[0, 0] == found.low[0, 0] == 1.0  # what follows is what was written
    assert found.high.isfinite().all()


def test_a_continuation_ends_with_its_end_token(tiny, monkeypatch):
    monkeypatch.setattr(tiny.model.generation_config, "eos_token_id", [RESPONSE[-1], *range(2, 40)])
    found = perturb(tiny, PROMPT, RESPONSE, CHOSEN, SETTINGS)
    # Every token ends the text, so that nothing follows, and the original has words.
    assert found.high.nan_to_num().max() == 0


@pytest.fixture
def generations(tiny, monkeypatch):
    """The (inputs, sequences) of each call of the model's generate."""
    calls: list[tuple[dict, list]] = []
    generate = tiny.model.generate

    def recorded(**inputs):
        sequences = generate(**inputs)
        calls.append((inputs, sequences.tolist()))
        return sequences

    monkeypatch.setattr(tiny.model, "generate", recorded)
    return calls


def test_one_batch_behind_one_pass(tiny, generations):
    found = perturb(tiny, PROMPT, RESPONSE, CHOSEN, SETTINGS)
    rows = sum(int(x.isfinite().sum()) for x in (found.high, found.low))
    ((inputs, _),) = generations
    assert inputs["input_ids"].shape == (rows, len(PROMPT) + max(*CHOSEN.high, *CHOSEN.low) + 1)


def test_caches_that_only_grow_are_read_once(tiny, generations):
    """A sliding cache has forgotten what a cut would need, and is not cut."""
    perturb(tiny, PROMPT, RESPONSE, CHOSEN, SETTINGS)
    ((inputs, _),) = generations
    is_sliding = tiny.model.config.model_type in ("mistral", "gemma2")
    assert bool(inputs.keys() & {"cache", "past_key_values"}) == (not is_sliding)


def test_settings_of_the_model_change_nothing(tiny, generations, monkeypatch):
    perturb(tiny, PROMPT, RESPONSE, CHOSEN, SETTINGS)
    monkeypatch.setattr(tiny.model.generation_config, "suppress_tokens", list(range(2, 39)))
    perturb(tiny, PROMPT, RESPONSE, CHOSEN, SETTINGS)
    (_, before), (_, after) = generations
    assert before == after


def overlaps(high, low, high_written=None, low_written=None):
    rows = [torch.tensor(x, dtype=torch.float64) for x in (high, low)]
    flags = [
        torch.zeros_like(r, dtype=torch.bool) if f is None else torch.tensor(f)
        for r, f in zip(rows, (high_written, low_written), strict=True)
    ]
    return Overlaps(*rows, *flags)


def test_a_trial_is_a_response():
    nan = math.nan
    trials = [
        overlaps([[0.1, 0.3, nan], [0.5, 0.7, nan]], [[0.6, 0.8, nan], [0.2, 0.4, nan]]),  # 0.4, 0.5
        overlaps([[0.9, 0.9, nan], [0.9, 0.9, nan]], [[0.8, 0.8, nan], [0.8, 0.8, nan]]),  # 0.9, 0.8
        overlaps([[0.0, 0.0, nan], [0.0, 0.0, nan]], [[0.5, 0.5, nan], [0.5, 0.5, nan]]),  # 0.0, 0.5
        *[overlaps([[0.2, 0.2, nan]], [[0.2, 0.2, nan]])] * 2,
    ]
    found = summarise(trials, Chance(permutations=4000, resamples=4000))
    assert found.high == pytest.approx((0.4 + 0.9 + 0.0 + 0.2 + 0.2) / 5)
    assert found.low == pytest.approx((0.5 + 0.8 + 0.5 + 0.2 + 0.2) / 5)
    assert (found.lower, found.count) == (pytest.approx(2 / 5), 5)
    # Differences 0.1, -0.1, 0.5, 0, 0: three of the eight sign flips reach 0.5, those with +0.5 but not -0.1 -0.1.
    assert found.p_value == pytest.approx(3 / 8, abs=0.03)
    assert -0.1 <= found.difference_low < found.low - found.high < found.difference_high <= 0.5


def test_the_token_that_was_written_can_be_left_out():
    with_it = overlaps(
        [[1.0, 0.2, 0.4], [0.6, 0.8, math.nan]], [[0.4, 1.0, 0.0], [0.4, 0.4, math.nan]],
        [[True, False, False], [False, False, False]], [[False, True, False], [False, False, False]],
    )  # fmt: skip
    chance = Chance(permutations=10, resamples=10)
    assert summarise([with_it], chance).high == pytest.approx((0.6 + 0.7) / 2)
    assert summarise([with_it], chance).low == pytest.approx((0.7 + 0.4) / 2)
    assert summarise([with_it], chance, written=False).high == pytest.approx((0.3 + 0.7) / 2)
    assert summarise([with_it], chance, written=False).low == pytest.approx((0.2 + 0.4) / 2)


def test_differences_show_and_their_absence_does_too():
    draw = np.random.default_rng(0)
    chance = Chance(permutations=999, resamples=999)

    def corpus(shift):
        return [
            overlaps([[v, v, math.nan]], [[v + shift + e, v + shift - e, math.nan]])
            for v, e in draw.random((60, 2)) / 4
        ]

    def noisy():
        return [overlaps([[a, a, math.nan]], [[b, b, math.nan]]) for a, b in draw.random((60, 2))]

    assert summarise(corpus(0.1), chance).p_value == 1 / 1000
    assert summarise(corpus(-0.1), chance).p_value == 1.0
    p_values = [summarise(noisy(), chance).p_value for _ in range(30)]
    assert 0.3 < np.mean(p_values) < 0.7


def test_a_few_trials_have_no_interval_and_no_p():
    found = summarise([overlaps([[0.1, 0.1, math.nan]], [[0.4, 0.4, math.nan]])] * 4, Chance())
    assert (found.high, found.low, found.lower) == (pytest.approx(0.1), pytest.approx(0.4), 1.0)
    assert all(map(math.isnan, (found.p_value, found.difference_low, found.difference_high)))
    assert found.reason == "no interval and no p over fewer than 5 trials"


def test_no_trials_no_numbers():
    found = summarise([], Chance())
    assert found.count == 0
    assert math.isnan(found.high)


@pytest.mark.parametrize("settings", [{"positions": 0}, {"candidates": -1}, {"tokens": 0}, {"tokens": 1.5}])
def test_bad_settings(settings):
    with pytest.raises(ValueError, match=r"must be an integer >= 1, got"):
        Perturbation(**settings)
