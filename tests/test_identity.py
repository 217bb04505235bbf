"""A model is known again wherever it comes from, and another one isn't taken for it."""

import pytest
import torch
import transformers

import attnstats
from attnstats.identity import differences, identity
from tests.tiny import small_llama


def test_a_model_is_known_again(tmp_path):
    model = small_llama()
    model.save_pretrained(tmp_path / "elsewhere")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "elsewhere")
    halved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "elsewhere", dtype=torch.bfloat16)
    eager = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "elsewhere", attn_implementation="eager")
    assert identity(model) == identity(again) == identity(halved) == identity(eager)
    with attnstats.capture(model, statistics=["waad"]):
        assert identity(model) == identity(again)


def test_one_weight_that_was_trained_makes_another_model():
    model = small_llama()
    before = identity(model)
    model.model.layers[2].self_attn.q_proj.weight.data.mul_(1.1)
    assert identity(model) != before


@pytest.mark.parametrize(("other", "fields"), [
    ({}, []),
    ({"seed": 1}, ["weights"]),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}, ["config"]),
    ({"num_hidden_layers": 4}, ["layers", "config", "weights"]),
    ({"num_attention_heads": 2, "num_key_value_heads": 2}, ["heads", "head_dim", "config"]),
])  # fmt: skip
def test_what_differs_is_named(other, fields):
    said = differences(identity(small_llama()), identity(small_llama(**other)))
    assert [part.split(" is ")[0] for part in said.split(", ") if part] == fields


def test_nothing_is_known_of_no_model():
    assert "model_type is llama and not None" in differences(None, identity(small_llama()))
