"""Capture against what transformers itself computes: logits against SDPA and eager, statistics against
`output_attentions=True` read by definition in float64; what it restores, refuses and does not allocate."""

import subprocess
import sys
from typing import Any

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

import attnstats
from attnstats import FAI, WAAD, MeanDistance, Received
from attnstats.capture import capture
from attnstats.hooks import SITE
from attnstats.selection import middle_third

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
    from attnstats import models

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
        with pytest.raises(ValueError, match=r"query_mask must have shape \(2, 23\)"):
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
    hooks = len(llama.model._forward_hooks), len(llama.model._forward_pre_hooks)
    for implementation in ("sdpa", "eager"):
        llama.set_attn_implementation(implementation)
        with capture(llama, statistics=["waad"]):
            assert llama.config._attn_implementation == "attnstats"
        assert llama.config._attn_implementation == implementation
        with pytest.raises(ZeroDivisionError), capture(llama, statistics=["waad"]):
            raise ZeroDivisionError
        assert llama.config._attn_implementation == implementation
    assert torch.equal(run_with(llama, "sdpa", input_ids=ids).logits, before)
    assert (len(llama.model._forward_hooks), len(llama.model._forward_pre_hooks)) == hooks
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
        ("gptj", {"vocab_size": 50, "n_embd": 32, "n_head": 2, "n_layer": 3, "rotary_dim": 4}),
        ("bloom", {"vocab_size": 50, "hidden_size": 32, "n_head": 2, "n_layer": 3}),
    ],
)
def test_families_without_the_interface_are_refused(family, sizes):
    model = AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(family, **sizes))
    before = model.config._attn_implementation
    with pytest.raises(ValueError, match=r"model: .* AttentionInterface"), capture(model, statistics=["waad"]):
        pass
    assert model.config._attn_implementation == before


def test_layers_that_do_not_report_are_an_error(llama):
    with torch.no_grad(), capture(llama, statistics=["waad"], layers=[2, 4]) as run:
        del llama.model.layers[4].self_attn.layer_idx
        with pytest.raises(RuntimeError, match=r"layers \[4\] did not call"):
            llama(tokens(), use_cache=False)
        llama.model.layers[4].self_attn.layer_idx = 2
        with pytest.raises(ValueError, match="layer 2 attends twice"):
            llama(tokens(), use_cache=False)
        llama.model.layers[4].self_attn.layer_idx = 4
        llama(tokens(), use_cache=False)
    assert run["waad"].shape[0] == 2


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("mistral", {"sliding_window": 8}, "sliding_window_overlay with causal_mask_function"),
        ("gemma2", {"sliding_window": 8}, "sliding_window_overlay"),
        ("llama", {"attention_dropout": 0.1}, "dropout 0.1"),
    ],
)
def test_models_that_ask_for_more_are_refused(family, changes, message):
    model = tiny(family, **changes).train()
    with pytest.raises(ValueError, match=message), capture(model, statistics=["waad"]):
        model(tokens())


@pytest.mark.parametrize("name", ["softcap", "s_aux", "sliding_window", "position_bias"])
def test_arguments_of_attention_that_are_not_covered_are_named(llama, name):
    with pytest.raises(ValueError, match=f"layer 0 passes {name}"), capture(llama, statistics=["waad"]):
        llama(tokens(), **{name: 4})


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"attention_mask": torch.ones(2, 1, LENGTH, LENGTH, dtype=torch.bool)}, r"attention_mask \(2, 1, 23, 23\)"),
        ({"attention_mask": torch.ones(2, LENGTH + 4)}, "23 queries and 23 keys"),
        ({"position_ids": torch.arange(LENGTH)[None] % 10}, "packed_sequence_mask_function"),
        ({"is_causal": False, "position_ids": torch.arange(LENGTH)[None] % 10}, None),
    ],
)
def test_masks_that_are_not_covered_are_refused(llama, inputs, message):
    with torch.no_grad(), capture(llama, statistics=["waad"]):
        if message is None:  # full attention doesn't look at positions, in SDPA either
            llama(tokens(), use_cache=False, **inputs)
            return
        with pytest.raises(ValueError, match=message):
            llama(tokens(), use_cache=False, **inputs)


def test_a_flag_against_its_mask_is_refused(llama):
    for layer in llama.model.layers:
        layer.self_attn.is_causal = False
    with (
        pytest.raises(ValueError, match="is_causal=False, but its mask is causal"),
        capture(llama, statistics=["waad"]),
    ):
        llama(tokens())


def test_the_import_does_not_bring_transformers():
    code = "import sys, attnstats.capture; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_public_name():
    assert attnstats.capture is capture
