"""Statistics kept up to date while a model generates, against one teacher-forced pass over the same tokens: caches,
chunks, beams, sampling, assisted decoding; stopping; key biases."""

import copy
import gc
import io
import types
import warnings
from typing import Any

import pytest
import torch
import transformers

import attnstats
from attnstats import FAI, WAAD, Entropy, LocalMass, MeanDistance, Received, SegmentMass, SinkMass, TopKeys
from attnstats.study.verify import float64
from attnstats.transformers.capture import capture
from attnstats.transformers.live import UNDOABLE_ROWS
from tests.teacher import TOLERANCE, check_live
from tests.tiny import HEADS, LAYERS, LENGTH, by_definition, padding, run_with, tiny, tiny_bart, tiny_whisper, tokens

STATISTICS = (WAAD(3), LocalMass(4), FAI(1, 4), FAI(0, None), Received(), Entropy(), MeanDistance())
NEW = 20
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "gemma2": {"sliding_window": 8},
    "llama4_text": {"attention_chunk_size": 8, "num_local_experts": 2, "num_hidden_layers": 4},
    "gpt_oss": {"sliding_window": 8, "num_local_experts": 2, "num_experts_per_tok": 1, "num_hidden_layers": 4},
}
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_d_ssm": 64}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
HYBRIDS: dict[str, dict[str, Any]] = {
    "gemma3_text": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "qwen3_next": {**LINEAR, **EXPERTS, "shared_expert_intermediate_size": 32},  # three linear layers, one of attention
    "falcon_h1": {**MAMBA, "num_hidden_layers": 2},  # both in each layer
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
}
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:Passing `generation_config`"),
]


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    return tiny(request.param, **FAMILIES[request.param])


@pytest.fixture(scope="module")
def llama():
    return tiny()


def prompt(side=None, rows=2):
    return {"input_ids": tokens()[-rows:], "attention_mask": padding(side)[-rows:]}


def check(model, inputs, statistics=STATISTICS, query_mask=None, **options):
    return check_live(model, inputs, NEW, statistics, query_mask, **options)


@pytest.mark.parametrize("side", [None, "left"])
@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}], ids=["dynamic", "static"])
def test_generation_equals_teacher_forcing(model, side, options):
    generated, seen = check(model, prompt(side), **options)
    assert torch.equal(generated[:, :-1], seen)


@pytest.mark.parametrize("side", [None, "left"])
def test_a_prompt_may_come_in_chunks(model, side):
    check(model, prompt(side), prefill_chunk_size=6)


@pytest.mark.parametrize("side", [None, "left"])
def test_rejected_tokens_are_taken_back(model, side):
    # A prompt that repeats itself, so that some of the tokens looked up in it are right and some are not.
    ids = tokens(length=LENGTH)[1:]
    ids[:, 12:] = ids[:, 1:12]
    check(model, prompt(side, rows=1) | {"input_ids": ids}, prompt_lookup_num_tokens=3)


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"prefill_chunk_size": 6}], ids=str)
@pytest.mark.parametrize("family", HYBRIDS)
def test_layers_with_other_caches_equal_teacher_forcing(family, options):
    check(tiny(family, **{"num_hidden_layers": 4} | HYBRIDS[family]), prompt("left"), **options)


class NoStream:
    """In the place of a stream of an accelerator."""

    def wait_stream(self, other):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("kind", ["offloaded", "offloaded_static", "quantized"])
def test_offloaded_and_quantized_caches_equal_teacher_forcing(llama, monkeypatch, kind, beams):
    monkeypatch.setattr(torch, "Stream", NoStream)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda _: NoStream())
    quantized = transformers.cache_utils.Fp8QuantizedLayer  # here without a loss
    monkeypatch.setattr(quantized, "_quantize", lambda self, x, scale=None: (x, 1.0))
    monkeypatch.setattr(quantized, "_dequantize", lambda self, x: x[0])
    config = {"cache_config": {"backend": "fp8"}} if kind == "quantized" else {}
    check(llama, prompt("left"), cache_implementation=kind, num_beams=beams, **config)


def test_of_a_lossy_cache_the_maps_are_those_of_what_it_gives_back(llama):
    ids, spans = tokens(), ((0, 12), (12, 13), (13, LENGTH))

    def steps(**options):
        cache = transformers.QuantizedCache("fp8", llama.config)
        with torch.no_grad():
            return [llama(ids[:, a:b], past_key_values=cache, **options) for a, b in spans]

    with capture(llama, statistics=STATISTICS, layers="all", live=True) as run:
        steps()
    llama.set_attn_implementation("eager")
    maps = [step.attentions for step in steps(output_attentions=True)]
    exact = run_with(llama, "eager", input_ids=ids).attentions
    llama.set_attn_implementation("sdpa")
    for layer in range(LAYERS):
        parts = [torch.nn.functional.pad(m[layer], (0, LENGTH - m[layer].shape[3])) for m in maps]
        whole, real = torch.cat(parts, 2), torch.ones(2, LENGTH)
        assert (whole - exact[layer]).abs().max() > 1e-3
        for s in (WAAD(3), FAI(1, 4), FAI(0, None), Received(), Entropy(), MeanDistance()):
            expected = by_definition(s, whole, real, real)
            torch.testing.assert_close(run[s][layer].double(), expected, rtol=0, atol=5e-4)


def test_an_assistant_may_draft(llama):
    check(llama, prompt(rows=1), assistant_model=tiny(num_hidden_layers=2))
    check(llama, prompt(rows=1), assistant_model=copy.deepcopy(llama))  # all of its drafts are right


@pytest.mark.parametrize("side", [None, "left"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_beams_carry_their_statistics_with_them(llama, side, cache):
    generated, seen = check(llama, prompt(side), num_beams=3, cache_implementation=cache)
    assert len(seen) == 6
    for row in generated:
        assert any(torch.equal(row[:-1], beam) for beam in seen)


def test_only_the_response_counts(llama):
    prompt_alone = torch.zeros(2, LENGTH, dtype=torch.bool)
    torch.manual_seed(0)
    check(llama, prompt("left"), query_mask=prompt_alone, do_sample=True, num_return_sequences=2)
    check(llama, prompt("left"), query_mask=prompt_alone, num_beams=2)


def test_a_conversation_goes_on_with_its_cache(llama):
    cache = transformers.DynamicCache(config=llama.config)
    ids = tokens(1, 40)
    with torch.no_grad(), capture(llama, statistics=STATISTICS, layers="all", live=True) as run:
        for start, end in ((0, 17), (17, 18), (18, 40)):
            llama(ids[:, start:end], past_key_values=cache)
            assert run.length == end
        whole = {s: run[s] for s in STATISTICS}
        llama(ids)  # position 0 begins anew
    for s in STATISTICS:
        torch.testing.assert_close(whole[s], run[s], rtol=0, atol=TOLERANCE.get(s, 3e-5))


@pytest.mark.parametrize("reduce", ["heads", "layers", ("layers", "heads")])
def test_reduced_while_generating(llama, reduce):
    heads = {"waad": {1: [0, 3], 4: [8, 2]}, "fai": [5, 1]}
    options = {"statistics": [WAAD(3), FAI(1, 4)], "layers": [1, 4], "live": True, "heads": heads}
    with torch.no_grad():
        with capture(llama, **options) as full:
            ids = llama.generate(**prompt("left"), max_new_tokens=9, do_sample=False)
        with capture(llama, **options, reduce=reduce) as run:
            assert torch.equal(llama.generate(**prompt("left"), max_new_tokens=9, do_sample=False), ids)
    dims = {"heads": 2, "layers": 0}
    over = [dims[name] for name in ((reduce,) if isinstance(reduce, str) else reduce)]
    for name in ("waad", "fai"):
        torch.testing.assert_close(run[name], full[name].mean(over), rtol=0, atol=1e-6)


def test_on_token_sees_every_step_and_can_stop(llama):
    lengths, last = [], []

    def watch(run):
        lengths.append(run.length)
        last.append(run["waad"][..., -1])
        return run.length == LENGTH + 4

    with capture(llama, statistics=["waad"], live=True, on_token=watch) as run:
        ids = llama.generate(**prompt(rows=1), max_new_tokens=30, stopping_criteria=[run.should_stop])
    assert lengths == [LENGTH + i for i in range(5)]
    assert ids.shape[1] == LENGTH + 5
    assert run.stopped
    torch.testing.assert_close(run["waad"][..., -5:], torch.stack(last, -1))
    with (
        capture(llama, statistics=["waad"], live=True, on_token=watch),
        pytest.raises(RuntimeError, match=r"stopping_criteria=\[run\.should_stop\]"),
    ):
        llama.generate(**prompt(rows=1), max_new_tokens=30)


def test_key_biases_leave_a_generation_as_exact_as_eager_attention():
    """They make |lse| 1,600, and float32 rounds that by 6e-5."""
    model = tiny("llama", attention_bias=True, num_hidden_layers=1)
    with torch.no_grad():
        attention = model.model.layers[0].self_attn
        attention.k_proj.bias[7::8] = 500.0
        attention.q_proj.bias[7::8] = 50.0
    statistics = (WAAD(3), FAI(1, 4), Received(), MeanDistance())
    inputs = prompt(rows=1)
    with torch.no_grad(), capture(model, statistics=statistics, layers="all", live=True) as run:
        model.generate(**inputs, do_sample=False, min_new_tokens=NEW, max_new_tokens=NEW)
        seen = run.tokens
    model.set_attn_implementation("eager")
    with torch.no_grad():
        eager = model(seen, output_attentions=True).attentions[0]
        with float64(model):
            exact = model(seen, output_attentions=True).attentions[0]
    distance = torch.arange(seen.shape[1])[:, None] - torch.arange(seen.shape[1])
    for s in statistics:
        errors = []
        for value in (run[s][:, 0], of_map(s, eager, distance)):
            errors.append(float((value.double() - of_map(s, exact, distance)).abs().max()))
        assert errors[0] <= 2 * errors[1] + 1e-6, s


def of_map(statistic, weights, distance):
    """The statistic of a causal map, by its formula."""
    weighted = weights * (statistic.weight(distance) * (distance >= 0))
    if statistic.axis == "row":
        return weighted.sum(-1)
    total = weighted.sum(-2)
    if statistic.horizon is None:
        return total
    lo, hi = statistic.horizon
    return total / ((distance >= lo) & (distance <= hi)).sum(0).clamp(min=1)


def test_the_cache_has_its_class_back(llama):
    caches = []
    for kind in (transformers.DynamicCache, transformers.StaticCache):
        options = {"max_cache_len": 60} if kind is transformers.StaticCache else {}
        cache = kind(config=llama.config, **options)
        with torch.no_grad(), capture(llama, statistics=["waad"], live=True):
            llama(tokens(), past_key_values=cache)
            assert isinstance(cache, kind)
            copied = copy.deepcopy(cache)
            assert type(copied) is kind
            copied.crop(-5)  # nobody follows a copy
            kept = io.BytesIO()
            torch.save(cache, kept)
            kept.seek(0)
            assert type(torch.load(kept, weights_only=False)) is kind
            caches.append(cache)
        assert type(cache) is kind
    assert caches[0].get_seq_length() == LENGTH


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"statistics": [Received(last=4)]}, r"Received\(last=4\) depends on where the sequence ends"),
        ({"statistics": [attnstats.PooledMap(2, 2)]}, "PooledMap.* depends on where the sequence ends"),
        ({"attention": "encoder"}, "live=True needs attention='self'"),
        ({"stop_after_last_layer": True}, "live=True needs"),
        ({"live": False, "on_token": print}, "on_token needs live=True"),
    ],
)
def test_what_cannot_be_kept_live_is_refused(llama, arguments, message):
    with (
        pytest.raises(ValueError, match=message),
        capture(llama, **({"statistics": ["waad"], "live": True} | arguments)),
    ):
        pass


def test_what_was_cached_before_the_with_has_columns_alone(llama):
    ids = tokens()
    caches = [transformers.DynamicCache(config=llama.config) for _ in range(2)]
    with torch.no_grad():
        for cache in caches:
            llama(ids[:, :9], past_key_values=cache)
        with capture(llama, statistics=STATISTICS, layers="all", live=True) as run:
            for begin, end in ((9, 10), (10, LENGTH)):
                llama(ids[:, begin:end], past_key_values=caches[0])
            assert run.length == LENGTH - 9
            assert torch.equal(run.tokens, ids[:, 9:])
        with capture(llama, statistics=STATISTICS, layers="all") as forced:
            llama(ids[:, 9:], past_key_values=caches[1])
    for s in STATISTICS:
        torch.testing.assert_close(run[s], forced[s], rtol=0, atol=TOLERANCE.get(s, 3e-5))
        assert torch.equal(run.valid[s], forced.valid[s])


def test_a_cache_that_was_cut_by_hand_is_named(llama):
    for statistics in (["waad"], ["received"]):
        cache = transformers.DynamicCache(config=llama.config)
        with torch.no_grad(), capture(llama, statistics=statistics, live=True) as run:
            llama(tokens(), past_key_values=cache)
            for layer in cache.layers:
                layer.keys, layer.values = layer.keys[:, :, -9:], layer.values[:, :, -9:]
            with pytest.raises(ValueError, match=f"holds 9 tokens where {LENGTH} were seen.*cache.crop"):
                llama(tokens(length=1), past_key_values=cache)
            assert run.length == LENGTH


def test_a_live_capture_is_of_one_sequence(llama):
    ours, other = (transformers.DynamicCache(config=llama.config) for _ in range(2))
    ids = tokens(1, 30)
    with torch.no_grad(), capture(llama, statistics=STATISTICS, layers="all", live=True) as run:
        llama(tokens(1, 20, seed=9), past_key_values=other)
        llama(ids[:, :20], past_key_values=ours)
        other.crop(-15)  # nobody's business
        assert run.length == 20
        with pytest.raises(ValueError, match="position 5 with another cache"):
            llama(ids[:, 5:9], past_key_values=other)
        llama(ids[:, :20], past_key_values=transformers.DynamicCache(config=llama.config))  # a new one begins anew
        assert run.length == 20


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_modes_may_change_between_steps(llama, mode):
    cache = transformers.DynamicCache(config=llama.config)
    ids = tokens(1, 30)
    with capture(llama, statistics=["waad", "fai"], live=True) as run:
        with mode():
            llama(ids[:, :20], past_key_values=cache)
        with torch.no_grad():
            llama(ids[:, 20:], past_key_values=cache)
            assert run.length == 30
            llama(ids, use_cache=False)
    assert not run["waad"].requires_grad


def test_what_was_cut_is_taken_back_once(llama):
    ids = tokens(1, 30)

    def after(*changes):
        cache = transformers.DynamicCache(config=llama.config)
        with torch.no_grad(), capture(llama, statistics=STATISTICS, layers="all", live=True) as run:
            llama(ids[:, :20], past_key_values=cache)
            for name, argument in changes:
                getattr(cache, name)(argument)
            rows = 2 if len(changes) > 1 else 1
            llama(ids[:, run.length :].expand(rows, -1), past_key_values=cache)
        return run

    with torch.no_grad(), capture(llama, statistics=STATISTICS, layers="all") as forced:
        llama(ids)
    for change in (("crop", -5), ("crop", -20)):
        run = after(change)
        for s in STATISTICS:
            torch.testing.assert_close(run[s], forced[s], rtol=0, atol=TOLERANCE.get(s, 3e-5))
    for changes in ((("crop", -2), ("crop", -3)), (("batch_repeat_interleave", 2), ("crop", -1))):
        with pytest.raises(RuntimeError, match="at most and once"):
            after(*changes)


@pytest.mark.filterwarnings("ignore:.*on the whole map")
@pytest.mark.parametrize("kind", ["padding", "whole map"])
def test_what_was_cut_is_taken_back_by_the_masks_of_its_pass(llama, kind):
    """The caller's masks may be others by then."""
    mask = padding("left").bool()
    if kind == "whole map":
        mask = torch.ones(2, 1, LENGTH, LENGTH).tril().bool()
        mask[1, 0, 9:, 2:7:2] = False
    counted = torch.arange(LENGTH).expand(2, -1) > 8

    def after(rewritten):
        cache, given, counting = transformers.DynamicCache(config=llama.config), mask.clone(), counted.clone()
        options = {"statistics": [Received(), FAI(1, 4)], "layers": "all", "live": True, "allow_dense": True}
        with torch.no_grad(), capture(llama, **options, query_mask=counting) as run:
            llama(tokens(), attention_mask=given, past_key_values=cache)
            if rewritten:
                given.data.fill_(True)
                counting.data.fill_(True)
            cache.crop(-4)
        return run

    found, expected = after(rewritten=True), after(rewritten=False)
    assert torch.equal(found["received"], expected["received"])
    assert torch.equal(found["fai"], expected["fai"])


def test_rows_that_end_go_on_with_their_padding(llama):
    """As generate has it: the run is of the tokens that went through the model, `run.tokens`."""
    plain = llama.generate(**prompt("left"), max_new_tokens=NEW, do_sample=False)
    ends = int(plain[0, LENGTH + 5])
    with torch.no_grad(), capture(llama, statistics=STATISTICS, layers="all", live=True) as run:
        llama.generate(**prompt("left"), max_new_tokens=NEW, do_sample=False, eos_token_id=ends)
        seen = run.tokens
    mask = torch.cat([padding("left"), torch.ones(2, seen.shape[1] - LENGTH, dtype=torch.long)], 1)
    with torch.no_grad(), capture(llama, statistics=STATISTICS, layers="all") as forced:
        llama(seen, attention_mask=mask)
    for s in STATISTICS:
        torch.testing.assert_close(run[s], forced[s], rtol=0, atol=TOLERANCE.get(s, 1e-4))


def test_a_conversation_may_be_stopped_twice(llama):
    cache = transformers.DynamicCache(config=llama.config)
    with capture(llama, statistics=["waad"], live=True, on_token=lambda run: run.length == LENGTH + 3) as run:
        ids = llama.generate(**prompt(rows=1), past_key_values=cache, stopping_criteria=[run.should_stop])
        assert run.stopped
        assert ids.shape[1] == LENGTH + 4
        mask = torch.ones(1, ids.shape[1], dtype=torch.long)
        options = {"max_new_tokens": 6, "min_new_tokens": 6, "stopping_criteria": [run.should_stop]}
        more = llama.generate(ids, attention_mask=mask, past_key_values=cache, **options)
    assert more.shape[1] == ids.shape[1] + 6


def test_embeddings_have_no_tokens(llama):
    embedded = llama.get_input_embeddings()(prompt()["input_ids"])
    with capture(llama, statistics=["waad"], live=True) as run:
        llama.generate(inputs_embeds=embedded, max_new_tokens=3, do_sample=False)
    assert run["waad"].shape[-1] == LENGTH + 2
    with pytest.raises(RuntimeError, match="without input_ids"):
        _ = run.tokens


def test_what_a_capture_holds_when_it_is_over(llama):
    for live in (False, True):
        cache = transformers.DynamicCache(config=llama.config)
        asked = {"statistics": ["waad", "fai"], "layers": "all", "reduce": "heads"}
        with torch.no_grad(), capture(llama, **asked, live=live) as run:
            llama(tokens(2, 100), past_key_values=cache)
        said = run.kept(2, 100).total
        # What is held beside results is by token, not by token and head: who counts, who is valid, ids.
        assert held(run) <= 4 * said + 100 * 2 * 64


def held(run):
    """Bytes of all tensors that the run can reach, but for its model."""
    seen, pending, storages = {id(run._model)}, [run], {}
    while pending:
        thing = pending.pop()
        if id(thing) in seen or isinstance(thing, (type, types.ModuleType)):
            continue
        seen.add(id(thing))
        if isinstance(thing, torch.Tensor):
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
        elif isinstance(thing, types.FunctionType):
            pending += [cell.cell_contents for cell in thing.__closure__ or ()]
        else:
            pending += gc.get_referents(thing)
    return sum(storages.values())


def test_more_than_the_last_tokens_cannot_be_taken_back(llama):
    cache = transformers.DynamicCache(config=llama.config)
    with torch.no_grad(), capture(llama, statistics=["fai"], live=True):
        llama(tokens(1, 100), past_key_values=cache)
        with pytest.raises(RuntimeError, match=f"{UNDOABLE_ROWS} at most"):
            cache.crop(-90)


@pytest.mark.parametrize("statistic", [SinkMass(2), SegmentMass((0, 2, None)), TopKeys()], ids=str)
def test_what_counts_from_the_first_key_is_refused_where_a_sliding_cache_dropped_it(statistic):
    model = tiny("mistral", sliding_window=8)
    with (
        capture(model, statistics=[statistic], layers=[1], live=True),
        pytest.raises(ValueError, match=f"dropped the first keys, from which {type(statistic).__name__} counts"),
    ):
        model.generate(**prompt(), max_new_tokens=5)


OF_KEYS = (TopKeys(), TopKeys(3), SegmentMass((0, 4, None)))


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}], ids=str)
@pytest.mark.parametrize("side", [None, "left"])
def test_segments_and_largest_keys_equal_teacher_forcing(llama, side, options):
    check_live(llama, prompt(side), 6, OF_KEYS, **options)


def test_segments_by_row_and_weights_while_generating(llama):
    """Those of the prompt; later tokens have the weight 1."""
    ids, new = prompt()["input_ids"], 5
    length = ids.shape[1]
    weight, bounds = torch.rand(len(ids), length), torch.tensor([[0, 2, -1], [3, 5, 9]])[: len(ids)]
    asked = {"statistics": [SegmentMass(), FAI(1, 4), FAI(0, None), Received()], "layers": "all"}
    with (
        torch.no_grad(),
        capture(llama, **asked, live=True, query_weight=weight, segment_boundaries=bounds) as run,
    ):
        llama.generate(ids, max_new_tokens=new, min_new_tokens=new, do_sample=False)
        seen = run.tokens
    later = torch.ones(len(ids), new - 1)
    with torch.no_grad(), capture(llama, **asked, segment_boundaries=bounds) as forced:
        forced.query_weight = torch.cat([weight, later], 1)
        llama(seen)
    for s in run.statistics:
        torch.testing.assert_close(run[s], forced[s], rtol=0, atol=1e-4 if s == Received() else 3e-5)
        assert torch.equal(run.valid[s], forced.valid[s])


@pytest.mark.parametrize("first", [False, True], ids=["set later", "cleared later"])
def test_weights_may_change_between_passes(llama, first):
    ids, weight = tokens(1, 14), torch.rand(1, 14)
    asked = {"statistics": [FAI(1, 4), Received()], "layers": "all"}
    cache = transformers.DynamicCache(config=llama.config)
    with torch.no_grad(), capture(llama, **asked, live=True, query_weight=weight if first else None) as run:
        llama(ids[:, :5], past_key_values=cache)
        run.query_weight = None if first else weight
        llama(ids[:, 5:], past_key_values=cache)
    expected = torch.ones(1, 14)
    part = slice(0, 5) if first else slice(5, 14)
    expected[:, part] = weight[:, part]
    with torch.no_grad(), capture(llama, **asked, query_weight=expected) as forced:
        llama(ids)
    for s in run.statistics:
        torch.testing.assert_close(run[s], forced[s], rtol=0, atol=3e-5)
        assert torch.equal(run.valid[s], forced.valid[s])


def test_the_number_of_segments_stays_while_generating(llama):
    cache = transformers.DynamicCache(config=llama.config)
    bounds = torch.tensor([[0, 3, -1]])
    with (
        torch.no_grad(),
        capture(llama, statistics=[SegmentMass()], live=True, segment_boundaries=bounds) as run,
    ):
        llama(tokens(1, 5), past_key_values=cache)
        run.segment_boundaries = bounds[:, :2]
        with pytest.raises(ValueError, match="keeps its number of segments"):
            llama(tokens(1, 2), past_key_values=cache)


def test_rejected_tokens_are_taken_back_by_their_weight(llama):
    ids, weight = tokens(1, 14), torch.rand(1, 14)
    asked = {"statistics": [FAI(1, 4), Received(), TopKeys(2), SegmentMass((0, 4, None))], "layers": "all"}
    cache = transformers.DynamicCache(config=llama.config)
    with torch.no_grad(), capture(llama, **asked, live=True, query_weight=weight) as run:
        llama(ids, past_key_values=cache)
        cache.crop(-3)
        found = {s: run[s] for s in run.statistics}
    with torch.no_grad(), capture(llama, **asked, query_weight=weight[:, :11]) as short:
        llama(ids[:, :11])
    for s, x in found.items():
        torch.testing.assert_close(x, short[s], rtol=0, atol=3e-5)


def test_a_sliding_window_of_one_needs_a_static_cache():
    """A dynamic cache would have the model attend to every token: transformers slices the keys by [-1 + 1 :]."""
    model, inputs = tiny("gemma2", sliding_window=1, num_hidden_layers=2), prompt()
    options = {"max_new_tokens": 2, "min_new_tokens": 2}
    with (
        capture(model, statistics=STATISTICS, layers="all", live=True),
        pytest.raises(ValueError, match=r"sliding window of 1 token.*cache_implementation='static'"),
    ):
        model.generate(**inputs, **options)
    check(model, inputs, cache_implementation="static")


def test_shapes_of_a_live_run(llama):
    with capture(llama, statistics=["waad", "fai"], layers=[1, 2], live=True) as run:
        with pytest.raises(RuntimeError, match="nothing was recorded"):
            run["waad"]
        with pytest.raises(RuntimeError, match="tokens"):
            _ = run.tokens
        llama.generate(**prompt(), max_new_tokens=3)
    assert run["waad"].shape == run["fai"].shape == (2, 2, HEADS, LENGTH + 2)
    assert run.valid["fai"].shape == (2, LENGTH + 2)


@pytest.mark.parametrize("beams", [1, 2])
def test_the_decoder_of_an_encoder_decoder(beams):
    model, inputs = tiny_bart(), prompt("right")
    statistics = [WAAD(3), FAI(1, 4), Received()]
    with torch.no_grad(), capture(model, statistics=statistics, layers="all", live=True) as run:
        model.generate(**inputs, num_beams=beams, do_sample=False, min_new_tokens=12, max_new_tokens=12)
    repeated = {name: x.repeat_interleave(beams, 0) for name, x in inputs.items()}
    with torch.no_grad(), capture(model, statistics=statistics, layers="all") as forced:
        model(**repeated, decoder_input_ids=run.tokens)
    for s in statistics:
        torch.testing.assert_close(run[s], forced[s], rtol=0, atol=1e-4)


@pytest.mark.parametrize("settings", [{"live": True}, {"attention": "encoder"}], ids=["live", "encoder"])
def test_segments_of_long_audio_are_not_dropped_in_silence(settings):
    """Whisper's generate decodes long audio in segments; a run holds one."""
    model, segment = tiny_whisper(), 24
    sound = torch.randn(1, 8, 2 * segment, generator=torch.Generator().manual_seed(0))

    def generate(frames):
        options = {"return_timestamps": True, "attention_mask": torch.ones(1, frames.shape[-1], dtype=torch.int64)}
        model.generate(frames, max_new_tokens=6, **options)

    with capture(model, statistics=["received"], layers="all", **settings) as run:
        with pytest.warns(RuntimeWarning, match="segment by segment, and the run holds the last one alone"):
            generate(sound)
        last = run["received"]
        by_segment = []
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            for frames in sound.split(segment, dim=-1):
                generate(frames)
                by_segment.append(run["received"])
    torch.testing.assert_close(by_segment[1], last)
    assert by_segment[0].shape != last.shape or not torch.equal(by_segment[0], last)
