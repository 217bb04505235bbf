"""Attaching a model and giving it back: what is restored, what is refused, copies, two models at once."""

import copy
import gc
import io
import pickle
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

import attnstats
from attnstats import _dispatch
from attnstats.distributed import SEQUENCE_PARALLEL
from attnstats.errors import InputError
from attnstats.transformers.attach import KERNELS, attend
from attnstats.transformers.capture import capture
from tests.tiny import (
    HEADS,
    LENGTH,
    LOGITS_TOLERANCE,
    SIZES,
    gradients,
    padding,
    run_with,
    tiny,
    tiny_bart,
    tokens,
)


def attributes(model):
    """The names of what each module holds."""
    return [sorted(module.__dict__) for module in model.modules()]


def test_the_old_attention_is_back_also_after_an_exception(llama):
    ids = tokens()
    untouched = attributes(llama)
    before = run_with(llama, "sdpa", input_ids=ids).logits

    def hooks():
        return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in (llama, llama.model)]

    assert hooks() == [0, 0]
    for implementation in ("sdpa", "eager"):
        llama.set_attn_implementation(implementation)
        with capture(llama, statistics=["waad"]):
            assert [layer.self_attn.config._attn_implementation for layer in llama.model.layers] == [
                *[implementation] * 2, *["attnstats"] * 3, implementation
            ]  # fmt: skip
        assert llama.config._attn_implementation == implementation
        with pytest.raises(ZeroDivisionError), capture(llama, statistics=["waad"]):
            raise ZeroDivisionError
        assert llama.config._attn_implementation == implementation
    assert torch.equal(run_with(llama, "sdpa", input_ids=ids).logits, before)
    assert hooks() == [0, 0]
    assert attributes(llama) == untouched


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
        copied = copy.deepcopy(model)
    assert run["waad"].shape == (3, 2, HEADS, LENGTH)
    for c in (model.config, copied.config):
        assert [x._attn_implementation for x in (c, c.text_config, c.vision_config)] == before


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


@pytest.mark.parametrize("call", [lambda m, ids: m.forward(ids), lambda m, ids: type(m).forward(m, ids)])
def test_a_pass_that_went_by_the_hooks_is_not_read_as_the_one_before(llama, call):
    with torch.no_grad(), capture(llama, statistics=["waad"]) as run:
        llama(tokens())
        before = run["waad"]
        call(llama.model, tokens(seed=7))
        for read in (lambda: run["waad"], lambda: run.valid["waad"]):
            with pytest.raises(RuntimeError, match=r"model\.forward\(\.\.\.\).*call model\(\.\.\.\)"):
                read()
        llama(tokens())
        assert torch.equal(run["waad"], before)
    with torch.no_grad(), capture(llama, statistics=["waad"]) as run:
        llama.forward(tokens())  # its body is called as a module
    assert torch.equal(run["waad"], before)


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("part", ["layers.2", "layers.2.self_attn", "layers.1", "layers.1.self_attn"])
def test_a_layer_called_on_its_own_is_not_read_as_a_pass(llama, part, live):
    """Whether the run captures that layer, the 2nd, or not."""
    body = llama.model
    hidden = torch.randn(2, LENGTH, llama.config.hidden_size, generator=torch.Generator().manual_seed(0))
    place = body.rotary_emb(hidden, torch.arange(LENGTH)[None])
    with torch.no_grad(), capture(llama, statistics=["waad"], layers=[2, 4], live=live) as run:
        for before in (None, lambda: llama(tokens())):
            if before is not None:
                before()
                assert run["waad"].shape == (2, 2, HEADS, LENGTH)
            body.get_submodule(part)(hidden, position_embeddings=place, attention_mask=None)
            for read in (lambda: run["waad"], lambda: run.valid["waad"]):
                with pytest.raises(RuntimeError, match="the last forward pass was not recorded"):
                    read()


@pytest.mark.parametrize("kind", ["encoder", "self", "cross"])
def test_the_stacks_of_an_encoder_decoder_past_their_hooks(kind):
    bart, ids, encoded = tiny_bart(), tokens(), torch.zeros(2, LENGTH, 32)
    with torch.no_grad(), capture(bart, statistics=["received"], attention=kind) as run:
        bart(input_ids=ids, decoder_input_ids=ids)
        run["received"]
        if kind == "encoder":
            bart.get_encoder().forward(ids)
        else:
            bart.get_decoder().forward(ids, encoder_hidden_states=encoded)
        with pytest.raises(RuntimeError, match="the last forward pass was not recorded"):
            run["received"]


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
def test_layers_that_backward_repeats_are_no_pass(llama, reentrant):
    llama.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
    llama.enable_input_require_grads()
    with capture(llama, statistics=["waad"]) as run:
        loss = llama(tokens(), use_cache=False).logits.sum()
        before = run["waad"]
        loss.backward()
        assert torch.equal(run["waad"], before)


def test_an_early_exit_is_refused_before_it_drafts(llama):
    prompt = tokens()[:1, :5]
    with capture(llama, statistics=["waad"]), pytest.raises(InputError, match="assistant_early_exit"):
        llama.generate(prompt, max_new_tokens=4, assistant_early_exit=2, do_sample=False)
    assert llama.config.num_hidden_layers == SIZES["num_hidden_layers"]
    attnstats.attach(llama)
    llama.generate(prompt, max_new_tokens=4, assistant_early_exit=2, do_sample=False)


def test_threads_that_attach_one_model_at_once_share_one_attachment(llama):
    many = 16
    start = threading.Barrier(many)

    def attach(_):
        start.wait()
        attnstats.attach(llama)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(many) as threads:
            list(threads.map(attach, range(many)))
    finally:
        sys.setswitchinterval(interval)
    attnstats.detach(llama)
    assert llama.config._attn_implementation == "sdpa"


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


def test_an_attention_that_another_library_replaced_is_refused():
    """As TransformerLens' bridge does, with a config of its own."""

    class Bridge(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.layer_idx, self.config, self.inner = inner.layer_idx, SimpleNamespace(n_heads=HEADS), inner.o_proj

    model = tiny()
    model.model.layers[2].self_attn = Bridge(model.model.layers[2].self_attn)
    before = model.config._attn_implementation
    for enter in (lambda: attnstats.attach(model), lambda: capture(model, statistics=["waad"]).__enter__()):
        with pytest.raises(InputError, match="Bridge of another library took the place of an attention of LlamaFor"):
            enter()
        assert model.config._attn_implementation == before


def test_tensors_that_change_attention_in_an_unknown_way_are_refused(llama):
    with capture(llama, statistics=["waad"]):
        with pytest.raises(ValueError, match="layer 2 passes indices"):
            llama(tokens(), indices=torch.zeros(2, LENGTH, 4))
        llama(tokens(), labels=tokens(), num_items_in_batch=torch.tensor(3))


def test_a_paged_cache_is_refused_by_name(llama):
    """generate_batch passes tensors besides, which attnstats does not know either."""
    cache = type("PagedAttentionCache", (), {})()
    query = torch.ones(1, 9, 4, 16)
    with capture(llama, statistics=["waad"]), pytest.raises(InputError, match=r"paged cache .*continuous batching"):
        attend(llama.model.layers[2].self_attn, query, query, query, None, cache=cache, logits_indices=torch.arange(4))


def test_maps_are_not_to_be_had_beside_statistics(llama):
    with capture(llama, statistics=["waad"]), pytest.raises(ValueError, match=r"output_attentions=True.*PooledMap"):
        llama(tokens(), output_attentions=True)

    llama.set_attn_implementation("eager")
    llama.config.output_attentions = True
    with capture(llama, statistics=["waad"]), pytest.raises(ValueError, match=r"output_attentions=True.*PooledMap"):
        llama(tokens())


def test_an_exception_while_attaching_leaves_nothing_behind(llama, monkeypatch):
    def broken():
        raise ZeroDivisionError

    monkeypatch.setattr(llama, "get_decoder", broken)
    untouched = attributes(llama)
    with pytest.raises(ZeroDivisionError), capture(llama, statistics=["waad"]):
        pass
    assert llama.config._attn_implementation == "sdpa"
    assert attributes(llama) == untouched


def test_a_copy_of_a_captured_model_is_not_captured(llama):
    with torch.no_grad(), capture(llama, statistics=["waad"]) as run:
        llama(tokens())
        before = run["waad"]
        copied = copy.deepcopy(llama)
        copied(tokens(seed=7))
        assert torch.equal(run["waad"], before)
        kept = io.BytesIO()
        torch.save(llama, kept)
    with torch.no_grad(), capture(copied, statistics=["waad"]) as run:
        copied(tokens())
    assert torch.equal(run["waad"], before)
    kept.seek(0)
    loaded = torch.load(kept, weights_only=False)
    assert loaded.config._attn_implementation == "sdpa"
    assert torch.equal(loaded(tokens()).logits, llama(tokens()).logits)


def pickled(thing):
    return pickle.loads(pickle.dumps(thing))


@pytest.mark.parametrize("how", [copy.deepcopy, pickled])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_copy_of_an_attached_model_is_not_attached(llama, implementation, how):
    llama.set_attn_implementation(implementation)
    expected = llama(tokens()).logits
    attnstats.attach(llama)
    copied, config = how(llama), how(llama.config)
    assert copied.config._attn_implementation == config._attn_implementation == implementation
    assert type(config._attn_implementation) is str
    assert torch.equal(copied(tokens()).logits, expected)
    attnstats.attach(copied)
    attnstats.detach(copied)
    assert copied.config._attn_implementation == implementation
    assert torch.equal(copied(tokens()).logits, expected)
    assert llama.config._attn_implementation == "attnstats"


def test_a_pickled_attached_model_runs_where_attnstats_never_was(llama, tmp_path):
    torch.save(attnstats.attach(llama), tmp_path / "model.pt")
    code = f"""import sys, torch
model = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
model(torch.arange(9)[None])
assert "attnstats" not in sys.modules"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_capture_left_open_lets_go_when_it_is_dropped(llama):
    opened = capture(llama, statistics=["waad"])
    opened.__enter__()
    config = llama.model.layers[2].self_attn.config
    assert config._attn_implementation == "attnstats"
    del opened
    gc.collect()
    assert llama.model.layers[2].self_attn.config is llama.config
    assert llama.config._attn_implementation == "sdpa"


def test_an_attached_model_attends_through_attnstats_until_it_is_detached(llama):
    ids = tokens()
    untouched = attributes(llama)
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
    assert attributes(llama) == untouched


def test_an_attached_model_trains_as_before(llama):
    ids = tokens()
    expected = gradients(llama, ids, attention_mask=padding("left"))
    attnstats.attach(llama)
    found = gradients(llama, ids, attention_mask=padding("left"))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


# Sequences that are spread over ranks


def ulysses(monkeypatch, module, function, ranks):
    """A framework whose sequence-parallel group has that many ranks; 0: it has none."""
    group = object() if ranks else None
    monkeypatch.setitem(sys.modules, module, SimpleNamespace(**{function: lambda: group}))
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda of=None: ranks if of is group else 1)


@pytest.mark.parametrize(("name", "module", "function"), SEQUENCE_PARALLEL, ids=["verl", "roll", "deepspeed"])
def test_a_part_of_each_sequence_is_refused(llama, monkeypatch, name, module, function):
    """Ulysses exchanges heads and tokens inside the attention function, whose place ours would take."""
    ids = tokens()
    expected = run_with(llama, "sdpa", input_ids=ids).logits
    for ranks in (0, 1):
        ulysses(monkeypatch, module, function, ranks)
        with capture(llama, statistics=["waad"]):
            torch.testing.assert_close(llama(ids).logits, expected, rtol=0, atol=LOGITS_TOLERANCE)
    ulysses(monkeypatch, module, function, 2)
    with (
        capture(llama, statistics=["waad"]) as run,
        pytest.raises(InputError, match=f"gets a part of each sequence, by {name}"),
    ):
        llama(ids)
    with pytest.raises(RuntimeError, match="nothing was recorded"):
        run["waad"]
    attnstats.attach(llama)
    with pytest.raises(InputError, match=name):
        llama(ids)
    attnstats.detach(llama)
    torch.testing.assert_close(llama(ids).logits, expected, rtol=0, atol=LOGITS_TOLERANCE)


def test_a_group_that_asserts_that_it_is_there(llama, monkeypatch):
    def group():
        raise AssertionError

    monkeypatch.setitem(sys.modules, "verl.utils.ulysses", SimpleNamespace(get_ulysses_sequence_parallel_group=group))
    with capture(llama, statistics=["waad"]) as run:
        llama(tokens())
    assert run["waad"].isfinite().all()


@pytest.mark.parametrize("whole", [True, False])
def test_a_captured_layer_keeps_the_kernel_that_the_model_had(llama, whole, monkeypatch):
    """Where the backend "flash" has it; that it runs there is tested in tests/flash."""
    monkeypatch.setitem(KERNELS, "sdpa", "the model's own")
    preferred, choose = [], _dispatch.choose
    monkeypatch.setattr(_dispatch, "choose", lambda name, facts: preferred.append(facts.prefers) or choose(name, facts))
    if whole:
        attnstats.attach(llama)
        llama(tokens())
        attnstats.detach(llama)
    else:
        with capture(llama, statistics=["waad"], layers=[1]):
            llama(tokens())
    assert preferred == ["the model's own"] * (SIZES["num_hidden_layers"] if whole else 1)


def test_context_parallel_is_refused(llama, one_rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental import context_parallel

    ids = tokens()
    with (
        capture(llama, statistics=["waad"]),
        context_parallel(init_device_mesh("cpu", (1,)), buffers=[ids], buffer_seq_dims=[1]),
        pytest.raises(InputError, match="part of each sequence, by torch's context_parallel"),
    ):
        llama(ids)
