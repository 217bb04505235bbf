"""A model is known again wherever it comes from, and another one isn't taken for it."""

import pytest
import torch
import transformers

import attnstats
from attnstats.identity import CHUNK, differences, identity, tokenizer_digest, weights_digest
from tests.tiny import save_tiny_model, small_llama


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


def changed(change):
    model = small_llama()
    before = identity(model)
    with torch.no_grad():
        change(model)
    return identity(model) != before


def test_every_entry_counts():
    """Each of the 13,000 weights would be too slow: the first and last of each parameter, and two in between."""
    model = small_llama(num_hidden_layers=2)
    before = identity(model)
    for name, parameter in model.named_parameters():
        flat = parameter.data.view(-1)
        for place in {0, len(flat) - 1, len(flat) // 3, len(flat) // 2 + 1}:
            original = flat[place].item()
            flat[place] += 0.5
            assert identity(model) != before, (name, place)
            flat[place] = original
    assert identity(model) == before


@pytest.mark.parametrize("change", [
    lambda model: model.model.layers[1].self_attn.o_proj.weight[:, 8:16].zero_(),
    lambda model: model.model.layers[1].self_attn.o_proj.weight[3].zero_(),
    lambda model: model.lm_head.weight.copy_(model.lm_head.weight.flip(0)),
    lambda model: model.lm_head.weight.copy_(model.lm_head.weight.roll(4, 1)),
    lambda model: setattr(model, "model", swapped(model.model)),
], ids=["head", "row", "rows in another order", "columns in another order", "layers"])  # fmt: skip
def test_what_a_sum_of_entries_would_not_see(change):
    assert changed(change)


def swapped(model):
    model.layers[1], model.layers[2] = model.layers[2], model.layers[1]
    return model


def test_saved_buffers_count():
    """Some models keep what they compute with in a buffer, such as the bias of a router."""

    def with_bias(value):
        model = small_llama()
        model.register_buffer("bias", torch.tensor([1.0, value]))
        return identity(model)

    assert with_bias(2.0) == with_bias(2.0) != with_bias(3.0)


@pytest.mark.parametrize("size", [1, 7, 4 * CHUNK - 1, 4 * CHUNK + 3])
def test_entries_count_on_both_sides_of_what_is_summed_at_a_time(size):
    weights = torch.linspace(-2, 2, size)
    digest = weights_digest({"w": weights})
    assert digest == weights_digest({"w": weights.bfloat16()}) == weights_digest({"w": weights.expand(2, -1)[1]})
    for place in {0, size // 2, size - 1, min(size - 1, 4 * CHUNK)}:
        other = weights.clone()
        other[place] += 1
        assert weights_digest({"w": other}) != digest
    assert digest != weights_digest({"w": weights[None]})
    assert digest != weights_digest({"v": weights})


def test_whole_numbers_count_to_the_last_bit():
    """Quantised weights are packed in whole numbers, which bfloat16 would round."""
    packed = torch.arange(1000, dtype=torch.int32) + 2**30
    other = packed.clone()
    other[500] ^= 1
    assert weights_digest({"w": packed}) != weights_digest({"w": other})


def test_weights_without_numbers_are_refused():
    model = small_llama()
    model.lm_head.to("meta")
    with pytest.raises(ValueError, match=r"lm_head\.weight is on the meta device"):
        identity(model)


def test_eight_bit_weights_count():
    weights = torch.linspace(-2, 2, 1000).to(torch.float8_e4m3fn)
    digest = weights_digest({"w": weights})
    assert digest == weights_digest({"w": weights.bfloat16()})
    assert digest != weights_digest({"w": torch.cat([weights[:-1], weights[:1]])})


def test_a_tokenizer_is_known_again(tmp_path):
    load = transformers.AutoTokenizer.from_pretrained
    save_tiny_model(tmp_path)
    tokenizer = load(tmp_path)
    digest = tokenizer_digest(tokenizer)
    tokenizer(["so", "how many"], padding=True, truncation=True, max_length=4)
    assert tokenizer_digest(tokenizer) == digest == tokenizer_digest(load(tmp_path))
    tokenizer.add_tokens(["w99"])
    assert tokenizer_digest(tokenizer) != digest


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
