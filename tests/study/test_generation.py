"""Responses of a batch: from the model's own distribution, whatever its generation settings say."""

import pytest
import torch

from attnstats.errors import InputError
from attnstats.study import models
from attnstats.study.generation import Sampling, check_lengths, end_tokens, generate
from tests.tiny import save_tiny_model

PROMPTS = [[5, 6, 7], [8]]


@pytest.fixture
def tiny(tmp_path):
    return models.load(str(save_tiny_model(tmp_path / "tiny")), dtype="float32", device="cpu")


@pytest.mark.parametrize("own", [
    {"min_p": 1.0}, {"top_k": 1}, {"typical_p": 0.01}, {"suppress_tokens": list(range(1, 40))}, {"num_beams": 4},
    {"num_return_sequences": 3}, {"repetition_penalty": 50.0}, {"min_length": 30}, {"stop_strings": ["so"]},
    {"bad_words_ids": [[i] for i in range(2, 40)]}, {"max_length": 4}, {"do_sample": False}, {"use_cache": False},
])  # fmt: skip
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_settings_of_the_model_change_nothing(tiny, own, temperature):
    sampling = Sampling(8, temperature, seed=3)
    expected = generate(tiny, PROMPTS, sampling)
    for name, value in own.items():
        setattr(tiny.model.generation_config, name, value)
    before = tiny.model.generation_config
    assert generate(tiny, PROMPTS, sampling) == expected
    assert tiny.model.generation_config is before
    assert len(expected) == 2
    if temperature:
        assert generate(tiny, PROMPTS, sampling._replace(seed=4)) != expected


def test_the_random_numbers_of_others_are_left_alone(tiny):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    generate(tiny, PROMPTS, Sampling(4, temperature=1.0, seed=5))
    assert torch.equal(torch.rand(3), expected)


def test_a_response_ends_with_its_end_token(tiny):
    ends = end_tokens(tiny)
    assert ends == {1}
    tiny.model.generation_config.eos_token_id = [1, 9]
    assert end_tokens(tiny) == {1, 9}
    with torch.no_grad():
        tiny.model.lm_head.weight.zero_()
        tiny.model.lm_head.weight[9] = 1e-3 * tiny.model.model.norm.weight
    for response in generate(tiny, PROMPTS, Sampling(6)):
        assert 9 not in response[:-1]


def test_what_cannot_be(tiny):
    for numbers, option in (
        ((0, 0.0, 0), "--max-tokens"),
        ((1, -1.0, 0), "--temperature"),
        ((1, 0.0, 2**64), "--seed"),
    ):
        with pytest.raises(InputError, match=option):
            Sampling(*numbers).check()
    with pytest.raises(InputError, match=r"prompt of 200 tokens \(prompt 2\) .* the 256 positions .*; at most 56 fit"):
        check_lengths([[5], [5] * 200], tiny, 100)
