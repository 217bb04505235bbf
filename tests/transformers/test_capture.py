"""Capture against what transformers itself computes: logits against SDPA and eager, statistics against
`output_attentions=True` read by definition in float64; what it restores, refuses and does not allocate."""

import copy
import dataclasses
import gc
import io
import subprocess
import sys
import threading
import warnings
from typing import Any

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

import attnstats
from attnstats import FAI, WAAD, MeanDistance, Received
from attnstats.transformers.capture import capture
from attnstats.transformers.hooks import SITE
from attnstats.transformers.selection import middle_third

LAYERS, HEADS, LENGTH = 6, 9, 23
SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 144,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 3,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "eos_token_id": None,
    "sliding_window": None,
    "bos_token_id": 1,
}
LOGITS_TOLERANCE = 2e-5  # three summation orders in float32, logits of order 1
# What two float32 models with other summation orders differ by in one weight of A after LAYERS layers, times the
# largest factor that the statistic gives to a unit of mass.
WEIGHT_TOLERANCE = 5e-6
LARGEST_FACTOR = {WAAD(4): 4, FAI(2, 7): 1, FAI(0, None): 1, MeanDistance(): LENGTH, Received(): LENGTH}
STATISTICS = tuple(LARGEST_FACTOR)


def tiny(family="llama", **changes):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **(SIZES | changes))
    config.initializer_range = 0.12  # attention far from uniform, logits of order 1
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(params=["llama", "qwen3", "mistral", "granite"])
def model(request):
    return tiny(request.param, **({"attention_multiplier": 0.1} if request.param == "granite" else {}))


@pytest.fixture
def llama():
    return tiny()


def tokens(batch=2, length=LENGTH, seed=1):
    return torch.randint(3, SIZES["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(seed))


def padding(side):
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    if side == "left":
        mask[1, :6] = 0
    elif side == "right":
        mask[1, -6:] = 0
    return mask


def run_with(model, implementation, **inputs):
    before = model.config._attn_implementation
    model.set_attn_implementation(implementation)
    try:
        with torch.no_grad():
            return model(**inputs, output_attentions=implementation == "eager")
    finally:
        model.set_attn_implementation(before)


def by_definition(statistic, maps, real, counted):
    """A statistic off (B, H, T, T) maps, in float64, by the formulas of the paper and nothing of attnstats."""
    real, counted = real.bool(), counted.bool() & real.bool()
    weights = maps.double() * real[:, None, :, None] * real[:, None, None, :]
    distance = torch.arange(maps.shape[2])[:, None] - torch.arange(maps.shape[3])[None, :]
    if isinstance(statistic, WAAD):
        return (weights * distance.clamp(max=statistic.window)).sum(-1)
    if isinstance(statistic, MeanDistance):
        return (weights * distance).sum(-1)
    weights = weights * counted[:, None, :, None]
    if isinstance(statistic, Received):
        return weights.sum(2)
    hi = maps.shape[2] if statistic.hi is None else statistic.hi
    inside = (distance >= statistic.lo) & (distance <= hi)
    count = (inside[None] & counted[:, :, None]).sum(1)
    return (weights * inside).sum(2) / count.clamp(min=1)[:, None]


@pytest.mark.parametrize("side", [None, "left", "right"])
def test_logits_are_those_of_sdpa_and_eager(model, side):
    inputs = {"input_ids": tokens(), "attention_mask": padding(side)}
    with torch.no_grad(), capture(model, statistics=STATISTICS, layers=[1, 4]):
        ours = model(**inputs).logits
    real = padding(side).bool()
    for rival in ("sdpa", "eager"):
        theirs = run_with(model, rival, **inputs).logits
        torch.testing.assert_close(ours[real], theirs[real], rtol=0, atol=LOGITS_TOLERANCE)


@pytest.mark.parametrize("masked", [False, True], ids=["all", "query_mask"])
@pytest.mark.parametrize("side", [None, "left", "right"])
def test_statistics_are_those_of_the_eager_maps(model, side, masked):
    inputs = {"input_ids": tokens(), "attention_mask": padding(side)}
    counted = torch.ones(2, LENGTH, dtype=torch.bool)
    counted[:, :9] = not masked
    with torch.no_grad(), capture(model, statistics=STATISTICS, layers="all", query_mask=counted) as run:
        model(**inputs)
    maps = run_with(model, "eager", **inputs).attentions
    for statistic in STATISTICS:
        expected = torch.stack([by_definition(statistic, a, padding(side), counted) for a in maps])
        assert run[statistic].shape == (LAYERS, 2, HEADS, LENGTH)
        assert run[statistic].dtype == torch.float32
        tolerance = WEIGHT_TOLERANCE * LARGEST_FACTOR[statistic]
        torch.testing.assert_close(run[statistic].double(), expected, rtol=0, atol=tolerance)
    real = padding(side).bool()
    assert torch.equal(run.valid[WAAD(4)], real & counted)
    assert torch.equal(run.valid[Received()], real)
    assert not run.valid[FAI(2, 7)][:, -2:].any()


def test_statistics_of_the_real_model_are_those_of_its_eager_maps(capsys):
    from attnstats.study import models

    with capsys.disabled():
        loaded = models.load(dtype="float32", device="cpu")
    inputs = loaded.tokenizer("Tom has 3 apples and buys 2 more; how many has he now? 3 + 2 = 5.", return_tensors="pt")
    statistics = [WAAD(10), FAI(2, 10), MeanDistance()]
    with torch.no_grad(), capture(loaded.model, statistics=statistics) as run:
        ours = loaded.model(**inputs).logits
    theirs = run_with(loaded.model, "eager", **inputs)
    assert run.layers == (10, 12, 15, 18, 20)
    torch.testing.assert_close(ours, theirs.logits, rtol=0, atol=2e-3)  # logits reach 30
    real = torch.ones_like(inputs["input_ids"])
    for statistic in statistics:
        expected = torch.stack([by_definition(statistic, theirs.attentions[i], real, real) for i in run.layers])
        torch.testing.assert_close(run[statistic].double(), expected, rtol=0, atol=1e-4)


# Choosing layers and heads


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


def test_reduced_is_one_mean_over_all_chosen_heads(llama):
    local, distant = {1: [0, 1, 2, 3], 4: [8]}, {4: [2, 3], 5: [0]}
    statistics: list[Any] = ["waad", FAI(1, 5)]
    ids = tokens()
    with torch.no_grad():
        with capture(llama, statistics=statistics, layers="all") as full:
            llama(ids)
        heads: Any = {"waad": local, "fai": distant}
        with capture(llama, statistics=statistics, layers=[1, 3, 4, 5], heads=heads, reduce=("layers", "heads")) as run:
            llama(ids)
            llama(ids)  # the run holds one pass, not the sum of two
    for name, chosen in (("waad", local), ("fai", distant)):
        each = [full[name][layer, :, head] for layer, heads in chosen.items() for head in heads]
        torch.testing.assert_close(run[name], torch.stack(each).mean(0), rtol=0, atol=1e-6)
        assert run[name].shape == run.valid[name].shape == (2, LENGTH)
    mean_of_means = torch.stack([full["waad"][layer][:, h].mean(1) for layer, h in local.items()]).mean(0)
    assert (run["waad"] - mean_of_means).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"layers": "middle"}, ValueError, "layers must be 'middle-third'"),
        ({"layers": [6]}, ValueError, "layers: the model has 6 layers"),
        ({"layers": [-7]}, ValueError, "layers: the model has 6 layers"),
        ({"layers": []}, ValueError, "chooses none"),
        ({"layers": slice(9, None)}, ValueError, "chooses none"),
        ({"layers": [1, -5]}, ValueError, "given twice"),
        ({"layers": 3}, TypeError, "layers must be"),
        ({"layers": [1.5]}, TypeError, "layers must be"),
        ({"heads": [9]}, ValueError, r"query heads 0\.\.8"),
        ({"heads": [-1]}, ValueError, r"query heads 0\.\.8"),
        ({"heads": [1, 1]}, ValueError, "given twice"),
        ({"heads": 3}, TypeError, "heads must be"),
        ({"heads": []}, ValueError, "no head is chosen"),
        ({"heads": {0: [1]}}, ValueError, "layer 0 isn't captured"),
        ({"heads": {2: [1], 3: [1, 2], 4: [0]}}, ValueError, r"reduce=\('layers', 'heads'\)"),
        ({"heads": {2: [1]}}, ValueError, r"reduce=\('layers', 'heads'\)"),
        ({"heads": {"fai": [1]}}, ValueError, "'fai' isn't one of the statistics"),
        ({"heads": {"waad": [1], 2: [1]}}, ValueError, "key 2 isn't one of the statistics"),
        ({"statistics": [WAAD(3), WAAD(5)], "heads": {"waad": [1]}}, ValueError, "more than one"),
        ({"statistics": []}, ValueError, "statistics is empty"),
        ({"statistics": ["wad"]}, ValueError, "unknown name 'wad'"),
        ({"reduce": "sum"}, ValueError, "reduce must be"),
        ({"query_mask": torch.ones(2, 3)}, TypeError, "query_mask must be a bool"),
        ({"query_mask": [[True]]}, TypeError, "query_mask must be a bool"),
    ],
)
def test_bad_arguments_are_named(llama, arguments, error, message):
    with pytest.raises(error, match=message), capture(llama, **({"statistics": ["waad"]} | arguments)):
        pass
    assert llama.config._attn_implementation == "sdpa"


# Forward passes


def test_the_run_holds_the_most_recent_pass_and_its_query_mask(llama):
    first, second = tokens(), tokens(batch=1, length=11, seed=2)
    response = torch.arange(11)[None] >= 5
    with torch.no_grad(), capture(llama, statistics=[FAI(1, 5)]) as run:
        llama(first)
        assert run["fai"].shape == (3, 2, HEADS, LENGTH)
        everything = run.valid["fai"].sum()
        run.query_mask = response
        llama(second)
        masked = run["fai"]
        with pytest.raises(ValueError, match=r"query_mask must have shape \(2, 23\).*live=True"):
            llama(first)
        run.query_mask = None
        llama(second)
    assert everything == 2 * (LENGTH - 1)
    assert run["fai"].shape == masked.shape == (3, 1, HEADS, 11)
    assert not torch.equal(masked, run["fai"])


@pytest.mark.parametrize("reduce", [None, ("layers", "heads")])
def test_results_of_an_unfinished_pass_are_not_given_away(llama, reduce):
    class Stop(Exception):
        pass

    def stop(*_):
        raise Stop

    ids = tokens()
    with torch.no_grad(), capture(llama, statistics=["waad"], layers=[1, 2, 4], reduce=reduce) as run:
        with pytest.raises(RuntimeError, match="nothing was recorded"):
            run["waad"]
        llama(ids)
        complete = run["waad"]
        handle = llama.model.layers[3].register_forward_hook(stop)
        with pytest.raises(Stop):
            llama(ids)
        for read in (lambda: run["waad"], lambda: run.valid):
            with pytest.raises(RuntimeError, match=r"incomplete, it recorded layers \[1, 2\] of \[1, 2, 4\]"):
                read()
        handle.remove()
        llama(ids)
        assert torch.equal(run["waad"], complete)
        with pytest.raises(KeyError, match="not among the statistics"):
            run["fai"]


def test_generate_gives_the_tokens_of_sdpa(model):
    ids = tokens(length=8)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    expected = model.generate(ids, **options)
    with capture(model, statistics=["waad", "received"]) as run:
        ours = model.generate(ids, **options)
        static = model.generate(ids, cache_implementation="static", **options)
    assert torch.equal(ours, expected)
    assert torch.equal(static, expected)
    assert run["waad"].shape == (3, 2, HEADS, 1)
    assert run["received"].shape == (3, 2, HEADS, 8 + 12 - 1)  # unused slots of the static cache left out


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("side", [None, "left"])
def test_a_prefill_in_chunks_gives_the_rows_of_one_pass(model, static, side):
    ids, mask = tokens(), padding(side)
    if static:
        cache: Any = transformers.StaticCache(config=model.config, max_cache_len=LENGTH + 9)
    else:
        cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad(), capture(model, statistics=[WAAD(4), Received()], layers="all") as run:
        whole = model(ids, attention_mask=mask).logits
        waad, received = run["waad"], run["received"]
        for start, end in ((0, 10), (10, 18), (18, 19), (19, LENGTH)):
            part = model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache).logits
            real = mask[:, start:end].bool()
            torch.testing.assert_close(part[real], whole[:, start:end][real], rtol=0, atol=LOGITS_TOLERANCE)
            torch.testing.assert_close(run["waad"], waad[..., start:end], rtol=0, atol=4 * WEIGHT_TOLERANCE)
            received = received - torch.nn.functional.pad(run["received"], (0, LENGTH - end))
    torch.testing.assert_close(received, torch.zeros_like(received), rtol=0, atol=LENGTH * WEIGHT_TOLERANCE)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
def test_gradients_are_those_of_sdpa_with_and_without_checkpointing(llama):
    ids = tokens()

    def gradients():
        llama.zero_grad()
        llama(ids, labels=ids).loss.backward()
        return [p.grad.clone() for p in llama.parameters()]

    llama.train()
    expected = gradients()
    for checkpointing in (False, True):
        if checkpointing:
            llama.gradient_checkpointing_enable()
        with capture(llama, statistics=["waad", "fai"], reduce=("layers", "heads")) as run:
            actual = gradients()
        assert not run["waad"].requires_grad
        if not checkpointing:
            waad = run["waad"]
        assert torch.equal(run["waad"], waad)  # the repeated calls of checkpointing aren't added
        for ours, theirs in zip(actual, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_full_attention_follows_the_config(llama):
    llama.config.is_causal = False
    inputs = {"input_ids": tokens(), "attention_mask": padding("left")}
    with torch.no_grad(), capture(llama, statistics=[WAAD(4)]) as run:
        ours = llama(**inputs).logits
    real = padding("left").bool()
    torch.testing.assert_close(
        ours[real], run_with(llama, "sdpa", **inputs).logits[real], rtol=0, atol=LOGITS_TOLERANCE
    )
    maps = run_with(llama, "eager", **inputs).attentions
    distance = (torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)).abs().clamp(max=4)
    expected = torch.stack([(maps[i] * distance).sum(-1) for i in run.layers]) * real[:, None]
    torch.testing.assert_close(run["waad"], expected, rtol=0, atol=4 * WEIGHT_TOLERANCE)


class LargestTensor(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(result):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return result


def test_nothing_of_size_t_by_t_is_allocated():
    length = 4096
    model = tiny(
        num_attention_heads=1, num_key_value_heads=1, max_position_embeddings=length, num_hidden_layers=2
    ).model
    ids, mask = tokens(1, length), torch.ones(1, length, dtype=torch.long)
    mask[:, :5] = 0
    with torch.no_grad(), LargestTensor() as sdpa:
        model(ids, attention_mask=mask)
    assert sdpa.elements >= length**2  # what SDPA's mask takes: the measure sees it
    with torch.no_grad(), capture(model, statistics=["waad", "fai"], layers="all"), LargestTensor() as ours:
        model(ids, attention_mask=mask)
    assert ours.elements <= length**2 // 8


# Attaching and letting go


def test_the_old_attention_is_back_also_after_an_exception(llama):
    ids = tokens()
    before = run_with(llama, "sdpa", input_ids=ids).logits

    def hooks():
        return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in (llama, llama.model)]

    assert hooks() == [0, 0]
    for implementation in ("sdpa", "eager"):
        llama.set_attn_implementation(implementation)
        with capture(llama, statistics=["waad"]):
            assert llama.config._attn_implementation == "attnstats"
        assert llama.config._attn_implementation == implementation
        with pytest.raises(ZeroDivisionError), capture(llama, statistics=["waad"]):
            raise ZeroDivisionError
        assert llama.config._attn_implementation == implementation
    assert torch.equal(run_with(llama, "sdpa", input_ids=ids).logits, before)
    assert hooks() == [0, 0]
    assert not any(SITE in module.__dict__ for module in llama.modules())


def test_implementations_of_sub_configs_are_back():
    torch.manual_seed(0)
    text = transformers.AutoConfig.for_model("llama", **SIZES)
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_attention_heads=2, num_hidden_layers=2, image_size=16, patch_size=8
    )
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=96)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    model.set_attn_implementation({"text_config": "sdpa", "vision_config": "eager"})
    before = [c._attn_implementation for c in (model.config, model.config.text_config, model.config.vision_config)]
    assert len(set(before)) == 2
    ids = tokens() % 90 + 3
    expected = model(ids).logits
    with capture(model, statistics=["waad"]) as run:
        torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=LOGITS_TOLERANCE)
    assert run["waad"].shape == (3, 2, HEADS, LENGTH)
    assert [
        c._attn_implementation for c in (model.config, model.config.text_config, model.config.vision_config)
    ] == before


def test_two_models_at_once_keep_their_runs_apart():
    first, second = tiny("llama"), tiny("qwen3")
    ids, other = tokens(), tokens(seed=5, length=9)
    with torch.no_grad():
        with capture(first, statistics=["waad"]) as alone:
            first(ids)
        with capture(first, statistics=["waad"]) as outer:
            first(ids)
            with capture(second, statistics=["waad"]) as inner:
                second(other)
            first(ids)
            second(other)
    assert torch.equal(outer["waad"], alone["waad"])
    assert inner["waad"].shape == (3, 2, HEADS, 9)
    assert second.config._attn_implementation == first.config._attn_implementation == "sdpa"


def test_one_model_twice_at_once_is_an_error(llama):
    with capture(llama, statistics=["waad"]) as run:
        for same in (llama, llama.model):
            with pytest.raises(ValueError, match="captured already"), capture(same, statistics=["waad"]):
                pass
        llama(tokens())
    assert run["waad"].shape == (3, 2, HEADS, LENGTH)
    assert llama.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: m.model], ids=["head", "body"])
def test_the_body_is_seen_however_it_is_called(llama, wrap):
    with torch.no_grad(), capture(wrap(llama), statistics=["waad"]) as run:
        llama(tokens())
        whole = run["waad"]
        llama.model(tokens())
    assert torch.equal(run["waad"], whole)


@pytest.mark.parametrize("thing", [None, "llama", torch.nn.Linear(2, 2)], ids=["None", "name", "module"])
def test_what_is_no_model_is_a_type_error(thing):
    with (
        pytest.raises(TypeError, match=f"PreTrainedModel.*{type(thing).__name__}"),
        capture(thing, statistics=["waad"]),
    ):
        pass


@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("falcon", {"vocab_size": 50, "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 3}),
        (
            "gpt_neo",
            {
                "vocab_size": 50,
                "hidden_size": 32,
                "num_heads": 2,
                "num_layers": 2,
                "attention_types": [[["global"], 2]],
            },
        ),
        ("bloom", {"vocab_size": 50, "hidden_size": 32, "n_head": 2, "n_layer": 3}),
    ],
)
def test_families_without_the_interface_are_refused(family, sizes):
    model = AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(family, **sizes))
    before = model.config._attn_implementation
    with (
        pytest.raises(ValueError, match=r"model: .* AttentionInterface"),
        capture(model, statistics=["waad"]),
    ):
        pass
    assert model.config._attn_implementation == before


def test_layers_that_do_not_report_are_an_error(llama):
    with torch.no_grad(), capture(llama, statistics=["waad"], layers=[2, 4]) as run:
        attention = llama.model.layers[4].self_attn
        site = attention.__dict__.pop(SITE)
        with pytest.raises(RuntimeError, match=r"layers \[4\] did not call"):
            llama(tokens(), use_cache=False)
        attention.__dict__[SITE] = dataclasses.replace(site, layer=2)
        with pytest.raises(ValueError, match="layer 2 attends twice"):
            llama(tokens(), use_cache=False)
        attention.__dict__[SITE] = site
        llama(tokens(), use_cache=False)
    assert run["waad"].shape[0] == 2


def test_tensors_that_change_attention_in_an_unknown_way_are_refused(llama):
    with capture(llama, statistics=["waad"]):
        with pytest.raises(ValueError, match="layer 0 passes indices"):
            llama(tokens(), indices=torch.zeros(2, LENGTH, 4))
        llama(tokens(), labels=tokens(), num_items_in_batch=torch.tensor(3))


def test_maps_are_not_to_be_had_beside_statistics(llama):
    with capture(llama, statistics=["waad"]), pytest.raises(ValueError, match=r"output_attentions=True.*PooledMap"):
        llama(tokens(), output_attentions=True)

    llama.set_attn_implementation("eager")
    llama.config.output_attentions = True
    with capture(llama, statistics=["waad"]), pytest.raises(ValueError, match=r"output_attentions=True.*PooledMap"):
        llama(tokens())


@pytest.mark.parametrize(
    ("changes", "counted"),
    [
        ({}, LENGTH),
        ({"query_mask": torch.arange(LENGTH)[None].expand(2, -1) >= 9}, 14),
    ],
)
def test_dropout_leaves_the_statistics_as_they_are(changes, counted):
    model = tiny(attention_dropout=0.3)
    ids = tokens()
    with torch.no_grad(), capture(model, statistics=[WAAD(4), Received()], layers=[0], **changes) as run:
        model(ids)
        still = run[WAAD(4)], run[Received()]
        model.train()
        torch.manual_seed(3)
        dropped = model(ids).logits
        for s, x in zip((WAAD(4), Received()), still, strict=True):  # the first layer sees the same input
            torch.testing.assert_close(run[s], x, rtol=0, atol=2e-5)
        torch.manual_seed(3)
        assert torch.equal(model(ids).logits, dropped)
        assert not torch.equal(model(ids).logits, dropped)
    torch.testing.assert_close(still[1].sum(-1), torch.full((1, 2, HEADS), float(counted)))


# Masks


def test_a_batch_may_have_rows_of_nothing_but_padding(llama):
    mask = padding(None)
    mask[1] = 0
    with torch.no_grad(), capture(llama, statistics=STATISTICS, layers="all") as run:
        llama(tokens(), attention_mask=mask)
        both = {s: run[s] for s in STATISTICS}
        llama(tokens()[:1])
        for s in STATISTICS:
            assert not both[s][:, 1].any()
            torch.testing.assert_close(both[s][:, :1], run[s], rtol=0, atol=WEIGHT_TOLERANCE * LARGEST_FACTOR[s])


def test_a_mask_of_another_length_is_refused(llama):
    with pytest.raises(ValueError, match="23 queries and 23 keys"), capture(llama, statistics=["waad"]):
        llama(tokens(), attention_mask=torch.ones(2, LENGTH + 4), use_cache=False)


def visible(side, window=None):
    """(2, 1, T, T) bool, who sees whom."""
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    if window:
        mask = mask.triu(1 - window)
    return mask & padding(side).bool()[:, None, None]


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize(("side", "window"), [(None, None), ("left", None), ("right", None), ("left", 5)])
def test_masks_made_as_tensors_are_understood(llama, side, window, additive):
    mask = visible(side, window)
    given = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min) if additive else mask
    inputs = {"input_ids": tokens(), "attention_mask": given, "use_cache": False}
    with torch.no_grad(), capture(llama, statistics=STATISTICS, layers="all") as run:
        ours = llama(**inputs).logits
    theirs = run_with(llama, "eager", **(inputs | {"attention_mask": torch.where(mask, 0.0, -1e30)}))
    real = padding(side).bool()
    torch.testing.assert_close(ours[real], theirs.logits[real], rtol=0, atol=LOGITS_TOLERANCE)
    for s in STATISTICS:
        expected = torch.stack([by_definition(s, a, padding(side), torch.ones(2, LENGTH)) for a in theirs.attentions])
        torch.testing.assert_close(run[s].double(), expected, rtol=0, atol=WEIGHT_TOLERANCE * LARGEST_FACTOR[s])


def test_other_masks_are_refused_or_dense_with_a_warning(llama):
    holes = visible(None) & (torch.rand(2, 1, LENGTH, LENGTH, generator=torch.Generator().manual_seed(4)) > 0.3)
    holes |= torch.eye(LENGTH, dtype=torch.bool)
    inputs = {"input_ids": tokens(), "attention_mask": holes, "use_cache": False}
    message = r"\(2, 1, 23, 23\) that was passed as a tensor.*allow_dense=True"
    with capture(llama, statistics=STATISTICS), pytest.raises(ValueError, match=message):
        llama(**inputs)
    with (
        torch.no_grad(),
        pytest.warns(RuntimeWarning, match="on the whole map"),
        capture(llama, statistics=STATISTICS, layers="all", allow_dense=True) as run,
    ):
        ours = llama(**inputs).logits
    theirs = run_with(llama, "eager", **(inputs | {"attention_mask": torch.where(holes, 0.0, -1e30)}))
    torch.testing.assert_close(ours, theirs.logits, rtol=0, atol=LOGITS_TOLERANCE)
    for s in STATISTICS:
        expected = torch.stack(
            [by_definition(s, a, torch.ones(2, LENGTH), torch.ones(2, LENGTH)) for a in theirs.attentions]
        )
        torch.testing.assert_close(run[s].double(), expected, rtol=0, atol=WEIGHT_TOLERANCE * LARGEST_FACTOR[s])


def test_dropout_falls_on_dense_and_packed_calls_too():
    model = tiny(attention_dropout=0.5).train()
    holes = visible(None) & (torch.rand(2, 1, LENGTH, LENGTH, generator=torch.Generator().manual_seed(4)) > 0.3)
    position = torch.cat([torch.arange(9), torch.arange(LENGTH - 9)])[None].expand(2, -1)
    for inputs in ({"attention_mask": holes | torch.eye(LENGTH, dtype=torch.bool)}, {"position_ids": position}):
        with (
            torch.no_grad(),
            warnings.catch_warnings(),
            capture(model, statistics=["waad"], layers=[0], allow_dense=True) as run,
        ):
            warnings.simplefilter("ignore", RuntimeWarning)
            first, again = (model(tokens(), use_cache=False, **inputs).logits for _ in range(2))
            waad = run["waad"]
            model.eval()
            model(tokens(), use_cache=False, **inputs)
            torch.testing.assert_close(run["waad"], waad, rtol=0, atol=2e-5)
            model.train()
        assert not torch.equal(first, again)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_packed_rows_are_sequences_of_their_own(family):
    model = tiny(family, **({"sliding_window": 5} if family == "mistral" else {}))
    lengths = (9, 1, 13)
    position = torch.cat([torch.arange(n) for n in lengths])[None].expand(2, -1)
    ids = tokens()
    with torch.no_grad(), capture(model, statistics=STATISTICS, layers="all") as run:
        packed = model(ids, position_ids=position, use_cache=False).logits
        together = {s: run[s] for s in STATISTICS}
        valid = {s: run.valid[s] for s in STATISTICS}
        start = 0
        for n in lengths:
            part = slice(start, start + n)
            alone = model(ids[:, part], use_cache=False).logits
            torch.testing.assert_close(packed[:, part], alone, rtol=0, atol=LOGITS_TOLERANCE)
            for s in STATISTICS:
                tolerance = WEIGHT_TOLERANCE * LARGEST_FACTOR[s]
                torch.testing.assert_close(together[s][..., part], run[s], rtol=0, atol=tolerance)
                assert torch.equal(valid[s][:, part], run.valid[s])
            start += n


def test_chunks_have_no_first_and_last_tokens_of_the_sequence():
    model = tiny("llama4_text", attention_chunk_size=8, num_local_experts=2, num_hidden_layers=4)
    for statistic in (attnstats.SinkMass(2), Received(last=4)):
        with (
            torch.no_grad(),
            capture(model, statistics=[statistic], layers=[0]),
            pytest.raises(ValueError, match="would be each chunk's own"),
        ):
            model(tokens())


def test_masks_made_for_a_cache_place_their_queries(llama):
    ids, slots = tokens(1, 14), torch.arange(30)
    cache = transformers.StaticCache(config=llama.config, max_cache_len=30)
    with torch.no_grad(), capture(llama, statistics=[WAAD(4), Received()], layers="all") as run:
        llama(ids)
        whole = run[WAAD(4)]
        for start, end in ((0, 9), (9, 13), (13, 14)):
            mask = (slots <= torch.arange(start, end)[:, None])[None, None]
            position = torch.arange(start, end)[None]
            llama(ids[:, start:end], past_key_values=cache, attention_mask=mask, position_ids=position)
            torch.testing.assert_close(run[WAAD(4)], whole[..., start:end], rtol=0, atol=4 * WEIGHT_TOLERANCE)


def test_packed_rows_that_leak_into_each_other_are_refused(llama):
    cu_seqlens = torch.tensor([0, 9, LENGTH], dtype=torch.int32)
    with pytest.raises(ValueError, match="cu_seq_lens_q of packed sequences"), capture(llama, statistics=["waad"]):
        llama(tokens()[:1], cu_seq_lens_q=cu_seqlens, cu_seq_lens_k=cu_seqlens, use_cache=True)


# Which layers and heads, reduced how, kept where


def test_one_dimension_may_be_reduced(llama):
    ids, chosen = tokens(), {2: [8, 0], 4: [3, 1]}
    with torch.no_grad():
        with capture(llama, statistics=["waad"], layers=[2, 4], heads=chosen) as full:
            llama(ids)
        for reduce, dim in (("heads", 2), ("layers", 0)):
            with capture(llama, statistics=["waad"], layers=[2, 4], heads=chosen, reduce=reduce) as run:
                llama(ids)
            torch.testing.assert_close(run["waad"], full["waad"].mean(dim), rtol=0, atol=1e-6)


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


def test_results_may_be_kept_on_a_device(llama):
    for live in (False, True):
        runs = []
        for device in (None, "cpu", torch.device("cpu")):
            with torch.no_grad(), capture(llama, statistics=["waad"], device=device, live=live) as run:
                llama(tokens())
            runs.append(run["waad"])
        assert torch.equal(runs[0], runs[1])
        assert torch.equal(runs[0], runs[2])


def test_what_is_kept_is_said_before_it_is(llama):
    ids = tokens()
    for reduce in (None, "heads", "layers", ("layers", "heads")):
        with torch.no_grad(), capture(llama, statistics=["waad", "fai"], layers="all", reduce=reduce) as run:
            said = run.kept(batch=2, length=LENGTH)
            llama(ids)
        assert said.total == 4 * sum(run[name].numel() for name in ("waad", "fai"))
    large = transformers.LlamaConfig(num_hidden_layers=36, num_attention_heads=32, hidden_size=32, vocab_size=9)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(large)
    with capture(model, statistics=["waad", "fai"], layers="all", reduce=("layers", "heads")) as run:
        assert run.kept(batch=1, length=32768).total < 1e6
    with capture(model, statistics=["waad", "fai"], layers="all", reduce="heads") as run:
        assert run.kept(batch=1, length=32768).total < 10e6


def test_the_pass_may_end_with_the_last_captured_layer(llama):
    ids, reached = tokens(), []
    handles = [
        layer.register_forward_pre_hook(lambda *_, i=i: reached.append(i)) for i, layer in enumerate(llama.model.layers)
    ]
    with torch.no_grad(), capture(llama, statistics=["waad"], layers=[1, 3]) as whole:
        assert whole.forward(input_ids=ids).logits.shape[-1] == SIZES["vocab_size"]
    reached.clear()
    with capture(llama, statistics=["waad"], layers=[1, 3], stop_after_last_layer=True) as run:
        assert run.forward(input_ids=ids) is None
        first = run["waad"]
        assert reached == [0, 1, 2, 3]
        run.forward(input_ids=ids)
        with pytest.raises(RuntimeError, match=r"call run\.forward"):
            llama(ids)
    assert torch.equal(first, whole["waad"])
    assert not first.requires_grad
    for handle in handles:
        handle.remove()


def test_nan_is_named_by_layer_and_head_and_not_averaged(llama):
    with torch.no_grad():
        llama.model.layers[3].self_attn.q_proj.weight[16 * 4 : 16 * 5] = torch.nan
    ids = tokens()
    statistics = [WAAD(4), Received()]
    with torch.no_grad(), capture(llama, statistics=statistics, layers=[2, 3]) as run:
        llama(ids)
    for s in statistics:
        with pytest.warns(RuntimeWarning, match=r"NaN in layer 3 heads \[4\]:"):
            broken = run[s]
        assert broken.isnan().flatten(2).any(-1).sum() == 2  # one head of each batch row
        assert broken[1, :, 4].isnan().any()
    with torch.no_grad(), capture(llama, statistics=statistics, layers=[2, 3], reduce="heads") as run:
        llama(ids)
    with pytest.raises(ValueError, match=r"NaN in layer 3 heads \[4\].*leave them out"):
        run[WAAD(4)]


def test_nan_of_chosen_heads_has_their_number(llama):
    with torch.no_grad():
        llama.model.layers[3].self_attn.q_proj.weight[16 * 4 : 16 * 5] = torch.nan
    with torch.no_grad(), capture(llama, statistics=["waad"], layers=[3], heads=[8, 4]) as run:
        llama(tokens())
    with pytest.warns(RuntimeWarning, match=r"NaN in layer 3 heads \[4\]:"):
        _ = run["waad"]


def test_an_interrupt_leaves_nothing_behind(llama):
    def interrupt(*_):
        raise KeyboardInterrupt

    with torch.no_grad(), capture(llama, statistics=["waad"], layers=[1, 4]) as run:
        handle = llama.model.layers[2].register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            llama(tokens())
        handle.remove()
        with pytest.raises(RuntimeError, match="incomplete"):
            _ = run["waad"]
        llama(tokens())
        assert run["waad"].shape[0] == 2
    assert llama.config._attn_implementation == "sdpa"


def test_an_exception_while_attaching_leaves_nothing_behind(llama, monkeypatch):
    def broken():
        raise ZeroDivisionError

    monkeypatch.setattr(llama, "get_decoder", broken)
    with pytest.raises(ZeroDivisionError), capture(llama, statistics=["waad"]):
        pass
    assert llama.config._attn_implementation == "sdpa"
    assert not any(SITE in module.__dict__ for module in llama.modules())


def test_checkpointing_outside_says_where_backward_belongs(llama):
    llama.train()
    llama.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with capture(llama, statistics=["waad"]):
        loss = llama(tokens(), labels=tokens()).loss
    with pytest.raises(ValueError, match="call backward inside the `with`"):
        loss.backward()


def test_layers_that_keep_other_keys_are_named():
    model = tiny("gemma2", sliding_window=8)
    for reduce in (None, "layers"):
        with (
            capture(model, statistics=["fai"], layers="all", reduce=reduce) as run,
            pytest.raises(ValueError, match=r"different numbers of keys.*live=True"),
        ):
            print(model.generate(tokens(), max_new_tokens=3).shape, run["fai"].shape)


def test_one_thread_at_a_time(llama):
    inside, go_on = threading.Event(), threading.Event()

    def wait(*_):
        inside.set()
        assert go_on.wait(30)

    def other():
        with torch.no_grad():
            llama(tokens())

    with torch.no_grad(), capture(llama, statistics=["waad"], layers=[4]) as run:
        handle = llama.model.layers[2].register_forward_hook(wait)
        thread = threading.Thread(target=other)
        thread.start()
        assert inside.wait(30)
        with pytest.raises(RuntimeError, match="two threads"):
            llama(tokens())
        go_on.set()
        thread.join()
        assert run["waad"].shape == (1, 2, HEADS, LENGTH)
        handle.remove()
        llama(tokens()[:1])
        assert run["waad"].shape == (1, 1, HEADS, LENGTH)


def test_a_capture_is_entered_once(llama):
    once = capture(llama, statistics=["waad"])
    with once:
        pass
    with pytest.raises(RuntimeError, match=r"used already; call attnstats\.capture"), once:
        pass


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_half_precision_models(llama, dtype):
    ids = tokens()
    expected = {}
    with torch.no_grad(), capture(llama, statistics=STATISTICS, layers=[0]) as run:
        llama(ids)
        expected = {s: run[s] for s in STATISTICS}
        with torch.autocast("cpu", dtype=dtype):
            ours = llama(ids).logits
            cast = {s: run[s] for s in STATISTICS}
    half = copy.deepcopy(llama).to(dtype)
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype):
        theirs = llama(ids).logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=64 * torch.finfo(dtype).eps)
    with torch.no_grad(), capture(half, statistics=STATISTICS, layers=[0]) as run:
        half(ids)
    for s in STATISTICS:
        # Weights of A are off by some roundings of the scores, which reach 4 here.
        tolerance = 8 * torch.finfo(dtype).eps * max(1.0, float(expected[s].abs().max()))
        for found in (cast[s], run[s]):
            assert found.dtype == torch.float32
            torch.testing.assert_close(found, expected[s], rtol=0, atol=tolerance)


def test_a_copy_of_a_captured_model_is_not_captured(llama):
    with torch.no_grad(), capture(llama, statistics=["waad"]) as run:
        llama(tokens())
        before = run["waad"]
        copied = copy.deepcopy(llama)
        copied(tokens(seed=7))
        assert torch.equal(run["waad"], before)
    with torch.no_grad(), capture(copied, statistics=["waad"]) as run:
        copied(tokens())
    assert torch.equal(run["waad"], before)
    assert attnstats.detach(copied).config._attn_implementation == "sdpa"
    fresh = tiny()
    with torch.no_grad(), capture(fresh, statistics=["waad"]):
        kept = io.BytesIO()
        torch.save(fresh, kept)
    kept.seek(0)
    loaded = attnstats.detach(torch.load(kept, weights_only=False))
    torch.testing.assert_close(loaded(tokens()).logits, fresh(tokens()).logits)


def test_a_capture_left_open_lets_go_when_it_is_dropped(llama):
    opened = capture(llama, statistics=["waad"])
    opened.__enter__()
    assert llama.config._attn_implementation == "attnstats"
    del opened
    gc.collect()
    assert llama.config._attn_implementation == "sdpa"


# attach and detach


def test_an_attached_model_attends_through_attnstats_until_it_is_detached(llama):
    ids = tokens()
    with torch.no_grad():
        expected = llama(ids).logits
        assert attnstats.attach(llama) is llama
        attnstats.attach(llama, backend="reference")
        assert llama.config._attn_implementation == "attnstats"
        torch.testing.assert_close(llama(ids).logits, expected, rtol=0, atol=LOGITS_TOLERANCE)
        with capture(llama, statistics=["waad"]) as run:
            llama(ids)
            with pytest.raises(ValueError, match="being captured"):
                attnstats.detach(llama)
        assert run["waad"].shape[0] == 3
        assert llama.config._attn_implementation == "attnstats"
        attnstats.detach(attnstats.detach(llama))
        assert torch.equal(llama(ids).logits, expected)
    assert llama.config._attn_implementation == "sdpa"
    assert not any(SITE in module.__dict__ for module in llama.modules())


def test_an_attached_model_trains_as_before(llama):
    ids = tokens()

    def gradients():
        llama.zero_grad()
        llama(ids, labels=ids, attention_mask=padding("left")).loss.backward()
        return [p.grad.clone() for p in llama.parameters()]

    expected = gradients()
    attnstats.attach(llama)
    for ours, theirs in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


# Encoders, and encoder-decoders


def tiny_bart():
    torch.manual_seed(0)
    sizes = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 3, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    config = transformers.BartConfig(vocab_size=97, **sizes, **heads, init_std=0.3)
    return transformers.BartForConditionalGeneration(config).eval()


@pytest.mark.parametrize("length", [11, LENGTH])  # as long as the source: still another sequence, without its padding
def test_each_kind_of_attention_of_an_encoder_decoder(length):
    model = tiny_bart()
    mask = padding("right")
    inputs = {"input_ids": tokens(), "attention_mask": mask, "decoder_input_ids": tokens(length=length, seed=4)}
    maps = run_with(model, "eager", **inputs)
    real, all_real = mask, torch.ones(2, length)
    for kind, expected, layers in (
        ("encoder", maps.encoder_attentions, (0, 1)),
        ("self", maps.decoder_attentions, (0, 1, 2)),
        ("cross", maps.cross_attentions, (0, 1, 2)),
    ):
        statistics = [Received(), attnstats.Entropy()] + ([] if kind == "cross" else [WAAD(4)])
        with torch.no_grad(), capture(model, statistics=statistics, layers="all", attention=kind) as run:
            logits = model(**inputs).logits
        torch.testing.assert_close(logits, maps.logits, rtol=0, atol=LOGITS_TOLERANCE)
        assert run.layers == layers
        of_queries, of_keys = (real if kind == "encoder" else all_real), (all_real if kind == "self" else real)
        a = torch.stack(expected).double() * of_queries[:, None, :, None] * of_keys[:, None, None]
        torch.testing.assert_close(run["received"].double(), a.sum(-2), rtol=0, atol=LENGTH * WEIGHT_TOLERANCE)
        entropy = -torch.special.xlogy(a, a).sum(-1)
        torch.testing.assert_close(run["entropy"].double(), entropy, rtol=0, atol=1e-4)
        if kind != "cross":
            t = torch.arange(a.shape[-1])
            waad = (a * (t[:, None] - t).abs().clamp(max=4)).sum(-1)
            torch.testing.assert_close(run["waad"].double(), waad, rtol=0, atol=4 * WEIGHT_TOLERANCE)
    with (
        pytest.raises(ValueError, match="needs distances, and cross-attention has none"),
        capture(model, statistics=["waad"], attention="cross"),
    ):
        pass
    with (
        pytest.raises(ValueError, match="attention='encoder': LlamaForCausalLM has no such attention"),
        capture(tiny(), statistics=["waad"], attention="encoder"),
    ):
        pass


def test_the_import_does_not_bring_transformers():
    code = "import sys, attnstats.capture; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_public_name():
    assert attnstats.capture is capture
