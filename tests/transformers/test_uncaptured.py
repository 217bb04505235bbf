"""Layers that aren't captured: they call their model's attention function with the arguments that it had before."""

import copy
import pickle
import sys
from typing import Any

import pytest
import torch
import transformers
from torch._dynamo.utils import counters
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, StaticCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import attnstats
from attnstats import FAI, WAAD, Received
from attnstats.errors import InputError
from attnstats.transformers import uncaptured
from attnstats.transformers.capture import capture
from attnstats.transformers.sites import attention_modules, configs
from tests import families, verdicts
from tests.tiny import LAYERS, LENGTH, LOGITS_TOLERANCE, gradients, padding, tiny, tiny_bart, tokens

STATISTICS = [WAAD(4), FAI(1, 4)]
FUNCTIONS: dict[str, Any] = AttentionInterface._global_mapping
MASKS: dict[str, Any] = AttentionMaskInterface._global_mapping


def eager(module, query, key, value, attention_mask, **settings):
    """The eager attention of the module's family."""
    of_family = sys.modules[type(module).__module__]
    name = next(n for n in ("eager_attention_forward", "simple_eager_attention_forward") if hasattr(of_family, n))
    return getattr(of_family, name)(module, query, key, value, attention_mask, **settings)


def flash(
    module, query, key, value, attention_mask, scaling=None, sliding_window=None, softcap=None, s_aux=None, **settings
):
    """What flash attention computes, of a mask (B, Tk) or None, a window by its argument, and packed position_ids."""
    queries, keys = query.shape[2], key.shape[2]
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    position = torch.arange(keys)
    distance = position[keys - queries :, None] - position
    seen = (distance >= 0 if module.is_causal else torch.ones_like(distance).bool())[None, None]
    if sliding_window:
        seen = seen & (distance.abs() < sliding_window)
    if attention_mask is not None:
        assert attention_mask.dim() == 2
        seen = seen & attention_mask[:, None, None].bool()
    elif (ids := settings.get("position_ids")) is not None and queries == keys:
        sequence = (ids.diff(prepend=ids[:, :1] - 1) != 1).cumsum(-1)
        seen = seen & (sequence[:, None, :, None] == sequence[:, None, None])
    scores = query @ key.mT * scaling
    if softcap:
        scores = (scores / softcap).tanh() * softcap
    scores = scores.masked_fill(~seen, -1e30)
    if s_aux is not None:
        scores = torch.cat([scores, s_aux.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
    return (scores.softmax(-1)[..., :keys] @ value).transpose(1, 2), None


OWN = {"eager": eager, "flash_attention_2": flash, **dict.fromkeys(["sdpa", "of_the_user"], sdpa_attention_forward)}


@pytest.fixture
def calls(monkeypatch):
    """Every call of a model's own attention: function, module, tensors, mask and settings."""
    recorded: list[Any] = []

    def recording(name, function):
        def attend(module, query, key, value, attention_mask, **settings):
            recorded.append((name, module, [query, key, value], attention_mask, settings))
            return function(module, query, key, value, attention_mask, **settings)

        return attend

    for name, function in OWN.items():
        monkeypatch.setitem(FUNCTIONS, name, recording(name, function))
    return recorded


def use(model, implementation):
    for config in configs(model):
        config._attn_implementation_internal = implementation
    return model


def same(a: Any, b: Any) -> bool:
    """True for equal arguments, of tensors every bit."""
    if isinstance(a, (tuple, list)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.shape == b.shape and torch.equal(a, b)
    return a is b or a == b or type(a) is type(b)


def recorded_in(calls, call):
    calls.clear()
    with torch.no_grad():
        output = call()
    return output, list(calls)


def check_calls(stock, actual, captured):
    """All calls but those of captured modules; the first of them, before anything is captured, have the same bits."""
    is_captured = [any(call[1] is module for module in captured) for call in stock]
    assert any(is_captured)
    first = is_captured.index(True)
    assert all(map(same, stock[:first], actual[:first]))
    others = [call for call, of_us in zip(stock, is_captured, strict=True) if not of_us]
    assert len(actual) == len(others)
    for one, other in zip(others, actual, strict=True):
        assert one[:2] == other[:2]
        assert type(one[3]) is type(other[3])
        assert same(one[3], other[3])
        assert one[4].keys() == other[4].keys()


# Which function, with which arguments


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("implementation", OWN)
def test_every_layer_but_the_captured_calls_the_models_own_function(calls, implementation, side):
    model = use(tiny(), implementation)
    states: list[Any] = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda module, args, output: states.append(output))
    batch = {"input_ids": tokens(), "attention_mask": padding(side)}
    expected, stock = recorded_in(calls, lambda: model(**batch).logits)
    before, states[:] = list(states), []
    with capture(model, statistics=STATISTICS, layers=[2, 4]) as run:
        logits, actual = recorded_in(calls, lambda: model(**batch).logits)
        assert [call[1].layer_idx for call in actual] == [0, 1, 3, 5]
        assert {call[0] for call in actual} == {implementation}
        assert model.config._attn_implementation == implementation
    check_calls(stock, actual, [model.model.layers[i].self_attn for i in (2, 4)])
    assert all(map(torch.equal, states[:2], before[:2]))
    if implementation == "of_the_user" and side is not None:  # transformers makes no masks for it
        return
    real = padding(side).bool()
    torch.testing.assert_close(logits[real], expected[real], rtol=0, atol=LOGITS_TOLERANCE)
    with torch.no_grad(), capture(use(model, "sdpa"), statistics=STATISTICS, layers=[2]) as of_sdpa:
        model(**batch)
    torch.testing.assert_close(run[WAAD(4)][:1], of_sdpa[WAAD(4)], rtol=0, atol=1e-4)


FAMILIES = [
    family
    for family, verdict in verdicts.read_table()[1].items()
    if verdict.category not in (verdicts.REFUSED, verdicts.NOT_BUILT) and family in families.causal_families()
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("family", [*FAMILIES, *families.OTHERS])
def test_every_family_keeps_its_attention(calls, family, padded):
    if family not in {**families.causal_families(), **families.OTHERS}:
        pytest.skip(f"transformers {transformers.__version__} has no family {family}")
    model = families.build(family)
    batch = families.inputs(family, model, padded)
    expected, stock = recorded_in(calls, lambda: model(**batch).logits)
    real = verdicts._real(batch)["self"][0]
    attended = {id(module) for _, module, *_ in stock}
    for kind, modules in attention_modules(model).items():
        last = max(modules)
        if kind == "cross" and not any(id(module) in attended for module in modules[last]):
            continue  # a decoder alone
        with capture(model, statistics=["received"], layers=[last], attention=kind, allow_dense=True):
            logits, actual = recorded_in(calls, lambda: model(**batch).logits)
        check_calls(stock, actual, modules[last])
        verdicts._compare_logits(family, logits, expected, real)


def test_layers_that_cannot_be_captured_run_beside_others_that_can(calls):
    """Every second layer attends to blocks that an indexer chose."""
    model = families.build("minimax_m3_vl_text")
    batch = families.inputs("minimax_m3_vl_text", model, padded=True)
    expected, stock = recorded_in(calls, lambda: model(**batch).logits)
    with capture(model, statistics=STATISTICS, layers=[2]):
        logits, actual = recorded_in(calls, lambda: model(**batch).logits)
    check_calls(stock, actual, attention_modules(model)["self"][2])
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(logits[real], expected[real], rtol=0, atol=LOGITS_TOLERANCE)
    with (
        pytest.raises(InputError, match="layer 1 passes block_indices"),
        capture(model, statistics=STATISTICS, layers=[1]),
    ):
        model(**batch)


@pytest.mark.parametrize(("layers", "count"), [("all", 0), ([2, 4], 1)])
@pytest.mark.parametrize("family", ["llama", "jamba", "gemma3"])
def test_masks_are_made_once_and_none_where_every_layer_is_captured(monkeypatch, family, layers, count):
    made, sdpa_mask = [], MASKS["sdpa"]

    def counting(*args, **settings):
        made.append(settings)
        return sdpa_mask(*args, **settings)

    monkeypatch.setitem(MASKS, "sdpa", counting)
    model = tiny() if family == "llama" else families.build(family)
    if family != "llama" and count:
        layers = [max(attention_modules(model)["self"])]
    batch = {"input_ids": tokens() % 90 + 3, "attention_mask": padding("left")}
    with torch.no_grad():
        model(**batch)
        stock = [settings["mask_function"].__qualname__ for settings in made]
        made.clear()
        with capture(model, statistics=STATISTICS, layers=layers):
            model(**batch)
    assert [settings["mask_function"].__qualname__ for settings in made] == stock * count


# Masks of flash attention, which say less than those of SDPA


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("gemma2", {"sliding_window": 8}),
        ("mistral", {"sliding_window": 8}),
        ("gpt_oss", {"sliding_window": 8, "num_local_experts": 2, "num_experts_per_tok": 1}),
    ],
)
def test_a_model_on_flash_attention(calls, family, changes, side):
    """Its masks are (B, T) or None, and windows are an argument of its function."""
    model = tiny(family, **changes)
    batch = {"input_ids": tokens(), "attention_mask": padding(side)}
    with torch.no_grad(), capture(model, statistics=STATISTICS, layers=[2, 3]) as of_own:
        model(**batch)
    use(model, "flash_attention_2")
    expected, stock = recorded_in(calls, lambda: model(**batch).logits)
    with capture(model, statistics=STATISTICS, layers=[2, 3]) as run:
        logits, actual = recorded_in(calls, lambda: model(**batch).logits)
    check_calls(stock, actual, [model.model.layers[i].self_attn for i in (2, 3)])
    assert all(mask is None or mask.dim() == 2 for *_, mask, _ in actual)
    real = padding(side).bool()
    torch.testing.assert_close(logits[real], expected[real], rtol=0, atol=LOGITS_TOLERANCE)
    for s in STATISTICS:
        torch.testing.assert_close(run[s], of_own[s], rtol=0, atol=1e-4)


def test_packed_rows_on_flash_attention(calls):
    model = tiny()
    position = torch.cat([torch.arange(9), torch.arange(LENGTH - 9)])[None]
    batch = {"input_ids": tokens(batch=1), "position_ids": position, "use_cache": False}
    with torch.no_grad(), capture(model, statistics=STATISTICS) as of_own:
        model(**batch)
    use(model, "flash_attention_2")
    expected, stock = recorded_in(calls, lambda: model(**batch).logits)
    with capture(model, statistics=STATISTICS) as run:
        logits, actual = recorded_in(calls, lambda: model(**batch).logits)
    check_calls(stock, actual, [model.model.layers[i].self_attn for i in run.layers])
    torch.testing.assert_close(logits, expected, rtol=0, atol=LOGITS_TOLERANCE)
    for s in STATISTICS:
        torch.testing.assert_close(run[s], of_own[s], rtol=0, atol=1e-4)


def test_a_model_on_flex_attention(monkeypatch):
    """Its masks are BlockMasks."""
    from torch.nn.attention.flex_attention import BlockMask, create_block_mask
    from transformers import masking_utils

    def interpreted(**settings):  # create_block_mask(_compile=True) runs Inductor
        return create_block_mask(**settings | {"_compile": False})

    masks: list[Any] = []

    def dense(module, query, key, value, attention_mask, **settings):
        masks.append(attention_mask)
        batch, _, queries, _ = query.shape
        index = [torch.arange(n) for n in (batch, 1, queries, key.shape[2])]
        seen = torch.stack(
            [torch.stack([attention_mask.mask_mod(b, index[1][0], q, index[3]) for q in index[2]]) for b in index[0]]
        )
        return sdpa_attention_forward(module, query, key, value, seen[:, None], **settings)

    monkeypatch.setattr(masking_utils, "create_block_mask", interpreted)
    monkeypatch.setitem(FUNCTIONS, "flex_attention", dense)
    model = use(tiny("gemma3_text", sliding_window=8), "flex_attention")
    batch = {"input_ids": tokens(), "attention_mask": padding("right")}
    with torch.no_grad():
        expected = model(**batch).logits
        with capture(model, statistics=STATISTICS, layers=[1, 5]) as run:
            logits = model(**batch).logits
    assert all(isinstance(mask, BlockMask) for mask in masks)
    assert len(masks) == 2 * LAYERS - 2
    real = padding("right").bool()
    torch.testing.assert_close(logits[real], expected[real], rtol=0, atol=LOGITS_TOLERANCE)
    with torch.no_grad(), capture(use(model, "sdpa"), statistics=STATISTICS, layers=[1, 5]) as of_sdpa:
        model(**batch)
    for s in STATISTICS:
        torch.testing.assert_close(run[s], of_sdpa[s], rtol=0, atol=1e-4)


# Caches, generation, compiled models, training


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_chunks_and_steps_with_a_cache(calls, family, static, live):
    model = use(tiny(family, **({"sliding_window": 8} if family == "gemma2" else {})), "sdpa")
    if family == "gemma2":
        model.config.attn_logit_softcapping = None  # which SDPA does not have
        for layer in model.model.layers:
            layer.self_attn.attn_logit_softcapping = None
    ids, mask = tokens(), padding("left")

    def steps():
        cache: Any = DynamicCache(config=model.config)
        if static:
            cache = StaticCache(config=model.config, max_cache_len=LENGTH + 9)
        parts = []
        for begin, end in ((0, 9), (9, 17), (17, 18), (18, 19), (19, LENGTH)):
            parts.append(model(ids[:, begin:end], attention_mask=mask[:, :end], past_key_values=cache).logits)
        return torch.cat(parts, 1)

    expected, stock = recorded_in(calls, steps)
    with capture(model, statistics=STATISTICS, layers=[2, 3], live=live) as run:
        logits, actual = recorded_in(calls, steps)
    captured = [call for call in stock if call[1].layer_idx in (2, 3)]
    assert len(actual) == len(stock) - len(captured)
    others = [call for call in stock if call[1].layer_idx not in (2, 3)]
    assert all(a[1] is b[1] and same(a[3], b[3]) for a, b in zip(others, actual, strict=True))
    real = mask.bool()
    torch.testing.assert_close(logits[real], expected[real], rtol=0, atol=LOGITS_TOLERANCE)
    if live:
        with torch.no_grad(), capture(model, statistics=STATISTICS, layers=[2, 3]) as forced:
            model(ids, attention_mask=mask, use_cache=False)
        for s in STATISTICS:
            torch.testing.assert_close(run[s], forced[s], rtol=0, atol=1e-4)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "settings", [{}, {"num_beams": 3}, {"cache_implementation": "static", "disable_compile": True}], ids=str
)
def test_generation(calls, implementation, settings):
    model, prompt = use(tiny(), implementation), tokens(length=9)
    settings = {"max_new_tokens": 6, "do_sample": False, "attention_mask": padding("left")[:, :9]} | settings
    expected, stock = recorded_in(calls, lambda: model.generate(prompt, **settings))
    with capture(model, statistics=STATISTICS, live=True) as run:
        output, actual = recorded_in(calls, lambda: model.generate(prompt, **settings))
    assert torch.equal(output, expected)
    assert run.length == output.shape[1] - 1
    others = [call for call in stock if call[1].layer_idx not in run.layers]
    assert len(actual) == len(others)
    assert all(a[1] is b[1] and same(a[3], b[3]) for a, b in zip(others, actual, strict=True))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.usefixtures("forgotten_graphs")
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_compiled_model_is_one_graph(family):
    window = {"sliding_window": 8} if family == "mistral" else {}
    model = tiny(family, num_hidden_layers=3, hidden_size=72, head_dim=8, **window)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch.no_grad(), capture(model, statistics=STATISTICS, layers=[1]) as run:
        for mask in (padding("left"), padding("right"), torch.ones(2, 17, dtype=torch.long)):
            batch = {"input_ids": tokens(length=mask.shape[1]), "attention_mask": mask, "use_cache": False}
            expected, of_eager = model(**batch).logits, [run[s] for s in STATISTICS]
            real = mask.bool()
            torch.testing.assert_close(compiled(**batch).logits[real], expected[real], rtol=0, atol=1e-5)
            torch.testing.assert_close([run[s] for s in STATISTICS], of_eager, rtol=0, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.usefixtures("forgotten_graphs")
def test_compiled_steps_with_a_static_cache():
    config = transformers.CompileConfig(fullgraph=True, mode="default", backend="aot_eager")
    config._compile_all_devices = True
    model = tiny(num_hidden_layers=3, hidden_size=72, head_dim=8)
    settings: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "attention_mask": padding("left")}
    expected = model.generate(tokens(), **settings)
    with capture(model, statistics=STATISTICS, layers=[1]):
        for _ in range(2):
            output = model.generate(tokens(), **settings, cache_implementation="static", compile_config=config)
            assert torch.equal(output, expected)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "checkpointed", "reentrant"])
def test_training(calls, checkpointing):
    model, ids = tiny().train(), tokens()
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    batch = {"attention_mask": padding("left"), "use_cache": False}
    expected, stock = gradients(model, ids, **batch), list(calls)
    calls.clear()
    with capture(model, statistics=STATISTICS, layers=[2]) as run:
        actual = gradients(model, ids, **batch)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert [call[1].layer_idx for call in calls] == [call[1].layer_idx for call in stock if call[1].layer_idx != 2]
    assert run[WAAD(4)].isfinite().all()


# What is given back, and what others see


def test_masks_of_transformers_are_its_own_again(calls):
    before = dict(MASKS)
    with capture(use(tiny(), "of_the_user"), statistics=STATISTICS), capture(tiny("qwen3"), statistics=STATISTICS):
        assert MASKS["sdpa"] is not before["sdpa"]
        assert "of_the_user" in MASKS
        other = tiny()
        with torch.no_grad():
            expected = other(tokens(), attention_mask=padding("left")).logits
    MASKS.pop("attnstats", None)
    before.pop("attnstats", None)
    assert before == MASKS
    with torch.no_grad():
        assert torch.equal(other(tokens(), attention_mask=padding("left")).logits, expected)


def test_an_interrupt_on_the_way_in_leaves_nothing_behind(monkeypatch):
    model, before = tiny(), dict(MASKS)

    def interrupted(pairing):
        pair(pairing)
        raise KeyboardInterrupt

    pair = uncaptured._pair
    monkeypatch.setattr(uncaptured, "_pair", interrupted)
    with pytest.raises(KeyboardInterrupt), capture(model, statistics=STATISTICS):
        pass
    assert not uncaptured._PAIRINGS
    assert MASKS["sdpa"] is before["sdpa"]
    assert all(layer.self_attn.config is model.config for layer in model.model.layers)
    assert not any(module._forward_pre_hooks for module in model.modules())
    monkeypatch.undo()
    with torch.no_grad(), capture(model, statistics=STATISTICS) as run:
        model(tokens())
    assert run[WAAD(4)].isfinite().all()


def test_a_mask_function_that_is_registered_meanwhile_stays(monkeypatch):
    monkeypatch.setitem(MASKS, "sdpa", MASKS["sdpa"])

    def users(*args, **settings):
        return transformers.masking_utils.sdpa_mask(*args, **settings)

    with capture(tiny(), statistics=STATISTICS):
        AttentionMaskInterface.register("sdpa", users)
    assert MASKS["sdpa"] is users


def pickled(thing):
    return pickle.loads(pickle.dumps(thing))


@pytest.mark.parametrize("how", [copy.deepcopy, pickled])
def test_a_copy_has_one_config(how):
    model = tiny()
    expected = model(tokens()).logits
    with capture(model, statistics=STATISTICS):
        copied = how(model)
    assert all(layer.self_attn.config is copied.config for layer in copied.model.layers)
    assert all(layer.self_attn.config is model.config for layer in model.model.layers)
    copied.set_attn_implementation("eager")
    torch.testing.assert_close(copied(tokens()).logits, expected, rtol=0, atol=LOGITS_TOLERANCE)


def test_another_attention_may_be_chosen_while_captured(calls):
    model = tiny()
    with torch.no_grad(), capture(model, statistics=STATISTICS) as run:
        before = model(tokens(), attention_mask=padding("left")).logits, run[WAAD(4)]
        model.set_attn_implementation("eager")
        calls.clear()
        logits = model(tokens(), attention_mask=padding("left")).logits
        assert [call[0] for call in calls] == ["eager"] * 3
        real = padding("left").bool()
        torch.testing.assert_close(logits[real], before[0][real], rtol=0, atol=LOGITS_TOLERANCE)
        torch.testing.assert_close(run[WAAD(4)], before[1], rtol=0, atol=1e-4)


def test_another_model_on_the_config_of_a_captured_one_is_an_error():
    model = tiny()
    other = type(model)(model.config).eval()
    with torch.no_grad(), capture(model, statistics=STATISTICS):
        model(tokens())
        with pytest.raises(InputError, match="shares its config"):
            other(tokens())
    other(tokens())


def test_padding_of_a_decoder_whose_cross_attention_is_captured_does_not_count():
    bart, ids, mask = tiny_bart(), tokens(), padding("right")
    batch = {"input_ids": ids, "decoder_input_ids": ids, "decoder_attention_mask": mask}
    dense = mask.bool()[:, None, None] & torch.ones(LENGTH, LENGTH).bool().tril()
    with torch.no_grad(), capture(bart, statistics=[Received()], attention="cross", layers="all") as run:
        bart(**batch)
        received = run["received"]
        bart(**batch | {"decoder_attention_mask": dense})
        torch.testing.assert_close(run["received"], received, rtol=0, atol=1e-5)
        bart(input_ids=ids, decoder_input_ids=ids)
        assert not torch.allclose(run["received"], received)
    total = mask.sum(1)[None, :, None].expand(received.shape[:3]).float()
    torch.testing.assert_close(received.sum(-1), total, rtol=0, atol=1e-4)


def test_an_attached_model_attends_through_attnstats_in_every_layer(calls):
    model = attnstats.attach(tiny())
    with torch.no_grad(), capture(model, statistics=STATISTICS):
        model(tokens())
    assert not calls
