"""The plug-in in a stand-in for SGLang (tests/sglang_parts.py), which can't be installed without CUDA."""

import json
import re
from types import SimpleNamespace

import pytest
import torch

from attnstats import FAI, WAAD, Entropy, MeanDistance, Received, SegmentMass, reference
from attnstats.integrations.hooks import Hook
from attnstats.integrations.sglang import RequestStore, configuration, environment, plugin, recorder, statistics_of
from attnstats.integrations.vllm.sums import KeyCache
from tests import sglang_parts as parts
from tests.process import ROOT
from tests.sglang_parts import Model, Req

BANDS = (WAAD(3), FAI(1, 4))
WHOLE = (WAAD(3), FAI(2, None), Received(), MeanDistance(), Entropy(), SegmentMass((0, 2, None)))


@pytest.fixture
def serve(monkeypatch):
    """A scheduler with the plug-in, as SGLang starts one."""

    def start(model, statistics=BANDS, *, graphs=False, parallel=None, scheduler=None, **settings):
        given = {"layers": "all", "reduce": None, **settings}
        monkeypatch.setenv(configuration.VARIABLE, environment(statistics, **given)[configuration.VARIABLE])
        kind = parts.install(monkeypatch, graphs=graphs, **(parallel or {}))
        plugin.register()
        return kind(model, **(scheduler or {}))

    return start


def response(server, req):
    return {"meta_info": json.loads(json.dumps(server.output_streamer.responses[req.rid]))}


def check(result, model, req, statistics, first=0, layers=range(parts.LAYERS), atol=1e-5):
    """Against one pass by definition, in float64."""
    tokens = req.tokens()[:-1]
    assert result.tokens.tolist() == [tokens]
    assert (result.prompt, result.cached) == (len(req.origin_input_ids), first)
    counted = torch.arange(len(tokens), device="cpu") >= first
    attention = model.layers[0]
    left = attention.sliding_window_size
    for place, number in enumerate(layers):
        query, key = (x.double().unflatten(-1, (-1, parts.DIM)) for x in model.projections(number, tokens))
        query, key = (x.transpose(0, 1)[None] for x in (query, key))
        _, expected = reference.attention(
            query, key, key, statistics=statistics, scale=parts.SCALE, softcap=attention.logit_cap or None,
            window_size=None if left < 0 else (left, 0), enable_gqa=True, sinks=model.sinks, query_mask=counted[None],
        )  # fmt: skip
        for s in statistics:
            valid = result.valid[s][0]
            assert valid.any()
            assert torch.equal(valid, counted) or s.axis == "column"
            found, truth = result[s][place], expected[s].movedim(2, -1)
            found = found.movedim(2, -1)
            torch.testing.assert_close(
                found[..., valid].double(),
                truth[..., valid],
                atol=atol,
                rtol=atol,
                msg=lambda m: f"{s}: {m}",  # noqa: B023
            )


def play(server):
    """Chunks, a prefix that is in the cache, decoding in any order, a mixed step, a request that is retracted."""
    a, b = Req("a", range(10), 4), Req("bb", range(20, 27), 5, stream=True)
    c = Req("ccc", [0, 1, 2, 3, 4, 30, 31, 32], 3)
    server.step((b, 0, 7), (a, 0, 6))
    server.step((a, 6, 10), decoding=[b])
    c.slots = a.slots[:5]
    server.step((c, 5, 8))
    server.step(decoding=[b, c, a])
    prefix, b.slots = b.slots[:3], []  # b is retracted, and a part of it is still in the cache
    server.step(decoding=[a])
    b.slots = list(prefix)
    server.step((b, 3, len(b.tokens())))
    server.step(decoding=[a, b])
    server.step(decoding=[c])
    assert all(req.finished() for req in (a, b, c))
    return a, b, c


@pytest.mark.parametrize("statistics", [BANDS, WHOLE], ids=["bands", "whole"])
@pytest.mark.parametrize("on_gpu", [False, True], ids=["cpu", "as on a gpu"])
@pytest.mark.parametrize(
    "model",
    [
        {},
        {"window": 4, "cap": 5.0},
        {"sinks": torch.linspace(-1, 1, parts.HEADS)},
    ],
    ids=["plain", "window and softcap", "sinks"],
)
def test_steps_are_one_pass_over_each_request(serve, statistics, on_gpu, model, monkeypatch):
    if on_gpu:
        monkeypatch.setattr(recorder.SchedulerRecorder, "_key_cache", _without_lse)
    if "window" in model:
        statistics = tuple(s for s in statistics if s.name != "segment_mass")
    model = Model(**model)
    server = serve(model, statistics, scheduler={"padding": 3})
    a, b, c = play(server)
    for req, first in ((a, 0), (b, 0), (c, 5)):
        check(statistics_of(response(server, req)), model, req, statistics, first)


def _without_lse(self, layer, query):
    cache = _key_cache(self, layer, query)
    return KeyCache(cache.block_size, cache.read, cache.pages, lambda: None)


_key_cache = recorder.SchedulerRecorder._key_cache


def test_settings_choose_layers_heads_and_means(serve):
    model = Model()
    server = serve(model, BANDS, layers=[1, 2], heads={"waad": [0, 3]}, reduce=["layers"])
    result = statistics_of(response(server, play(server)[0]))
    assert result.layers == (1, 2)
    assert {s: result[s].shape for s in BANDS} == {WAAD(3): (1, 2, 13), FAI(1, 4): (1, 4, 13)}
    assert result.model == ("a/model", "", "float32", "SGLang 0.5.23")
    whole = statistics_of(response(server := serve(Model(), BANDS), play(server)[0]))
    torch.testing.assert_close(result["waad"], whole["waad"][1:][:, :, [0, 3]].mean(0))
    torch.testing.assert_close(result["fai"], whole["fai"][1:].mean(0))


def test_responses_of_a_stream_have_the_record_at_its_end(serve):
    server = serve(Model())
    req = Req("a", range(6), 3, stream=True)
    server.prefill(req)
    with pytest.raises(ValueError, match="request 'a' is not finished; pass its last part"):
        statistics_of(response(server, req))
    server.step(decoding=[req])
    server.step(decoding=[req])
    entries = response(server, req)["meta_info"]["attnstats"]
    assert entries[:2] == [None, None]
    assert len(entries) == len(req.output_ids)  # of which SGLang cuts out what each part of a stream brings
    assert statistics_of(SimpleNamespace(meta_info=response(server, req)["meta_info"])).tokens.shape == (1, 8)
    with pytest.raises(TypeError, match="output must be the response to one prompt, with its meta_info; got list"):
        statistics_of([response(server, req)])


def test_what_others_put_into_a_response_stays(serve):
    server = serve(Model())
    req = Req("a", range(6), 1)
    req.customized_info = {"theirs": [3]}
    server.prefill(req)
    assert response(server, req)["meta_info"]["theirs"] == [3]
    statistics_of(response(server, req))


def test_a_folder_has_finished_requests_by_id(serve, tmp_path):
    model = Model()
    server = serve(model, folder=tmp_path / "requests")
    requests = play(server)
    store = RequestStore(tmp_path / "requests")
    assert sorted(store) == ["a", "bb", "ccc"]
    for req in requests:
        check(store[req.rid], model, req, BANDS, 5 if req.rid == "ccc" else 0)
        with pytest.raises(RuntimeError, match="with a folder"):
            statistics_of(response(server, req))


def test_requests_are_left_out_that_say_so_or_are_sglangs_own(serve):
    server = serve(Model())
    requests = Req("a", range(6), 1, custom_params={"attnstats": False}), Req("HEALTH_CHECK_1", range(6), 1)
    wanted = Req("b", range(6), 1, custom_params={"theirs": 1})
    server.step(*((req, 0, 6) for req in (*requests, wanted)))
    for req in requests:
        assert "attnstats" not in response(server, req)["meta_info"]
    with pytest.raises(RuntimeError, match="request 'a' brought no statistics"):
        statistics_of(response(server, requests[0]))
    check(statistics_of(response(server, wanted)), server._model, wanted, BANDS)


def test_no_layer_is_missed_in_a_step_of_which_nothing_is_recorded(serve, caplog):
    server = serve(Model())
    req = Req("a", range(6), 2)
    req.input_embeds = [[0.0]]
    server.prefill(req)
    assert "was not seen" not in caplog.text


def test_requests_that_go_without_an_end_take_their_sums_along(serve):
    server = serve(Model())
    req = Req("a", range(6), 2)
    server.prefill(req)
    running = _recorder(server)._running
    assert len(running) == 1
    assert _recorder(server)._batch is None  # a step's tensors go with it
    del req  # aborted, retracted for good, ...
    assert not running


def test_nothing_goes_with_what_sglang_does_not_send(serve):
    server = serve(Model())
    req = Req("a", range(6), 1)
    server.step((req, 0, 3))
    req.finished_len = 0  # aborted between two chunks, of which SGLang waits for the last
    server.output_streamer.stream_output([req], False, req)
    assert req in _recorder(server)._running
    server.output_streamer.stream_output([req], False)
    assert req not in _recorder(server)._running


def _recorder(server):
    (hook,) = server._model.layers[0]._forward_hooks.values()
    return hook.func.__self__


def _have_beams(server, req):
    req.beam_group, server.rows = 1, 1


FAULTS = {
    "a layer is not seen": (
        "layers 1 was not seen in a step: CUDA graphs",
        lambda s, r: s._model.layers[1]._forward_hooks.clear(),
    ),
    "beams": ("beam search is not recorded", _have_beams),
    "embeddings": ("its prompt has embeddings", lambda s, r: setattr(r, "input_embeds", [[0.0]])),
    "a mask": (
        "the step has custom_mask, and only causal attention is recorded",
        lambda s, r: setattr(s.runner.attn_backend.forward_metadata, "custom_mask", torch.ones(1)),
    ),
    "other arguments": ("its attention has k_rope", lambda s, r: setattr(s._model, "more", {"k_rope": torch.ones(1)})),
    "parts": ("the step ran in parts", lambda s, r: setattr(s._model, "parts", True)),
    "more rows than requests": ("before a step: ValueError", lambda s, r: setattr(s, "rows", 1)),
}


@pytest.mark.parametrize("case", FAULTS)
def test_what_cannot_be_recorded_costs_statistics_alone(serve, case):
    message, spoil = FAULTS[case]
    server = serve(Model())
    other = Req("b", range(6), 3)
    server.prefill(other)
    req = Req("a", range(6), 2)
    spoil(server, req)
    server.prefill(req)
    server.step(decoding=[req])
    assert req.finished()
    with pytest.raises(RuntimeError, match=message):
        statistics_of(response(server, req))
    goes_on = _recorder(server)._running[other].fault is None
    assert goes_on or case == "more rows than requests"  # then the step's requests are not known


REFUSED = {
    "CUDA graphs: .* set disable_cuda_graph=True": {"graphs": True},
    "the overlap schedule: .* set disable_overlap_schedule=True": {"scheduler": {"enable_overlap": True}},
    "tp_size > 1: each rank has a part of the heads; use 1; pp_size": {"parallel": {"tp_size": 2, "pp_size": 2}},
}


@pytest.mark.parametrize("message", REFUSED)
def test_servers_are_refused_by_name(serve, message):
    with pytest.raises(ValueError, match=f"ATTNSTATS_SGLANG can't be used with .*{message}"):
        serve(Model(), **REFUSED[message])


@pytest.mark.parametrize(
    ("message", "spoil"),
    [
        ("attention_backend aiter, triton: only plain", lambda r: setattr(r, "decode_attention_backend_str", "aiter")),
        ("a cache of SimpleNamespace: only that of plain", lambda r: setattr(r, "token_to_kv_pool", SimpleNamespace())),
        (
            "kv_cache_dtype torch.float8_e5m2: quantized",
            lambda r: setattr(r.token_to_kv_pool, "dtype", torch.float8_e5m2),
        ),
        ("a cache in the layout 'hnd'", lambda r: setattr(r.token_to_kv_pool, "kv_cache_layout", "hnd")),
        ("an encoder-decoder model", lambda r: setattr(r.model_config, "is_encoder_decoder", True)),
    ],
)
def test_models_and_caches_are_refused_by_name(message, spoil):
    runner = parts.Scheduler(Model()).runner
    configuration.check_model(runner)
    spoil(runner)
    with pytest.raises(ValueError, match=f"ATTNSTATS_SGLANG can't be used with {message}"):
        configuration.check_model(runner)


def test_layers_that_are_no_plain_attention_do_not_count(serve):
    model = Model()
    model.layers[0].use_irope = True
    model.layers[1].attn_type = parts.AttentionType.DECODER_BIDIRECTIONAL
    serve(model)
    assert [len(layer._forward_hooks) for layer in model.layers] == [0, 0, 1]
    model.layers[2].logit_capping_method = "other"
    with pytest.raises(ValueError, match="attnstats: Model has no attention that can be recorded"):
        serve(model)
    model = Model()
    model.layers[2].layer_id = 0
    with pytest.raises(ValueError, match="several layers attend to the keys of layer 0"):
        serve(model)


def test_nothing_is_wrapped_without_settings(monkeypatch):
    kind = parts.install(monkeypatch)
    monkeypatch.delenv(configuration.VARIABLE, raising=False)
    plugin.register()
    assert kind.run_batch is parts.Scheduler.run_batch


@pytest.mark.parametrize(
    ("variable", "message"),
    [
        ("waad", "ATTNSTATS_SGLANG must hold JSON"),
        ("[]", "attnstats: must have settings by name"),
        (json.dumps({"statistics": ["wad"]}), "unknown name 'wad'"),
        (json.dumps({"statistics": ["waad"], "keep_mb": 3}), "attnstats.keep_mb is no setting for SGLang"),
        (json.dumps({"statistics": ["waad"], "token_entropy": True}), "attnstats.token_entropy is no setting"),
    ],
)
def test_wrong_settings_end_the_process(variable, message, monkeypatch):
    """SGLang goes on after any other error of a plug-in."""
    parts.install(monkeypatch)
    monkeypatch.setenv(configuration.VARIABLE, variable)
    with pytest.raises(SystemExit, match=message):
        plugin.register()


def test_another_version_ends_the_process(monkeypatch):
    parts.install(monkeypatch)
    monkeypatch.setenv(*environment(["waad"]).popitem())
    moved = Hook(*configuration.SCHEDULER, "run_batches")
    monkeypatch.setattr(configuration, "HOOKS", (*configuration.HOOKS, moved))
    with pytest.raises(SystemExit, match=r"in SGLang 0\.5\.23: sglang\.srt\..*\.Scheduler has no run_batches"):
        plugin.register()


def test_the_page_is_followed(monkeypatch, capsys):
    """docs/sglang.md."""
    parts.install(monkeypatch)
    monkeypatch.setenv(configuration.VARIABLE, "")  # and so is put back
    page = (ROOT / "docs" / "sglang.md").read_text()
    (code,) = re.findall(r"<!-- code: sglang_engine -->\n```python\n(.*?)```", page, re.DOTALL)
    exec(code, {"__name__": "__main__", "MODEL": Model()})
    assert capsys.readouterr().out.startswith("Request of 58 tokens: layers 1, 2, means over layers and heads")


def test_a_preset_has_no_token_entropies(serve):
    result = configuration.read(environment(preset="paper_v2")[configuration.VARIABLE])
    assert WAAD(10) in result.statistics
    assert not result.token_entropy
