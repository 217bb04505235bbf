"""The settings of an engine, checked before it starts; vLLM itself is not needed."""

from types import SimpleNamespace

import pytest
import torch

from attnstats import FAI, WAAD, MaxLogit, MeanDistance, Received, SegmentMass, heads
from attnstats.identity import ModelIdentity
from attnstats.integrations.hooks import Hook
from attnstats.integrations.vllm import configuration
from attnstats.integrations.vllm.configuration import RequestSettings, check_engine, check_vllm, engine_arguments


def settings(**given):
    return RequestSettings.of({"statistics": ["waad", {"fai": {"lo": 4, "hi": None}}]} | given)


def test_settings_survive_json():
    import json

    kinds = [WAAD(5), FAI(3, None), MaxLogit(), SegmentMass((0, 4, None))]
    arguments = engine_arguments(kinds, layers=[1, 2], heads={"waad": [0, 1], "fai": {1: [0], 2: [3]}}, reduce="heads")
    read = RequestSettings.of(json.loads(json.dumps(arguments["additional_config"]["attnstats"])))
    assert read.statistics == tuple(kinds)
    assert read.reduce == ("heads",)
    layers, chosen = read.chosen((0, 1, 2, 3), 4)
    assert layers == (1, 2)
    assert chosen[WAAD(5)] == {1: (0, 1), 2: (0, 1)}
    assert chosen[FAI(3, None)] == {1: (0,), 2: (3,)}
    assert chosen[MaxLogit()] == {1: None, 2: None}


def test_heads_come_from_a_profile(tmp_path):
    file = tmp_path / "heads.json"
    distance = torch.arange(8.0).view(2, 4)
    profile = heads.HeadProfile.empty([2, 5], 4, ModelIdentity("llama", 6, 4, 32, "", ""))
    profile.add_means(distance, 10, torch.zeros(2, 4)).save(file)
    given = settings(layers=[2, 5], heads={"profile": str(file), "share": 0.25})
    chosen = given.chosen((0, 1, 2, 3, 4, 5), 4)[1]
    assert list(chosen.values()) == [{2: (0, 1)}, {5: (2, 3)}]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"statistic": ["waad"]}, "attnstats has no setting statistic; it has preset, statistics, layers"),
        ({"statistics": None}, "attnstats: statistics must be a list"),
        ({"preset": "paper_v3"}, "attnstats: preset 'paper_v3': no such preset; there are paper_v2, paper_v1"),
        ({"preset": ["paper_v2"]}, "attnstats: preset ['paper_v2']: no such preset"),
        ({"token_entropy": 1}, "attnstats: token_entropy must be True or False, got 1"),
        ({"statistics": "waad"}, "attnstats: statistics must be a list"),
        ({"statistics": ["wad"]}, "attnstats: statistics: unknown name 'wad'; the catalogue has waad"),
        ({"statistics": [{"waad": {"widow": 3}}]}, "attnstats: statistics: waad has no setting widow; it has window"),
        ({"statistics": [{"waad": {"window": 0}}]}, "attnstats: WAAD: window must be an integer >= 1"),
        ({"statistics": [{"waad": 3}]}, "attnstats: statistics: one of them with settings is"),
        ({"statistics": []}, "attnstats: statistics is empty"),
        ({"statistics": [{"received": {"last": 3}}]}, "attnstats: statistics: Received(last=3) depends on where"),
        ({"statistics": ["segment_mass"]}, "attnstats: statistics: SegmentMass needs boundaries here"),
        ({"statistics": ["top_keys"]}, "attnstats: reduce: TopKeys(k=1) names keys"),
        ({"reduce": "tokens"}, "attnstats: reduce must be None, 'heads', 'layers' or both"),
        ({"layers": slice(1, 3)}, "attnstats: layers must be 'middle-third', 'all' or a list of layer numbers"),
        ({"keep_mb": -1}, "attnstats: keep_mb must be a number of megabytes"),
        ({"quota_mb": float("nan")}, "attnstats: quota_mb must be a number of megabytes"),
    ],
)
def test_a_wrong_setting_is_named(given, message):
    with pytest.raises((TypeError, ValueError)) as error:
        settings(**given)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"layers": [9]}, "attnstats: layers: the model has 4 layers"),
        ({"heads": [7]}, "attnstats: heads: the model has query heads 0..3"),
        ({"heads": {"wad": [1]}}, "attnstats: heads: the key 'wad'"),
        ({"heads": {"profile": "no.json", "part": 1}}, "attnstats: heads: a profile takes a share, not part"),
        ({"heads": {"profile": "no.json"}}, "attnstats: no.json"),
    ],
)
def test_layers_and_heads_that_the_model_does_not_have_are_named(given, message):
    with pytest.raises((TypeError, ValueError)) as error:
        settings(**given).chosen((0, 1, 2, 3), 4)
    assert str(error.value).startswith(message)


def test_statistics_of_a_users_own_are_refused():
    class Nearest(MeanDistance):
        pass

    with pytest.raises(ValueError, match=r"Nearest\(\) is not of the catalogue"):
        engine_arguments([Nearest()])
    assert engine_arguments([Received()])["worker_cls"] == configuration.WORKER


def test_a_vllm_whose_hooks_moved_is_refused_by_its_version(monkeypatch):
    vllm = SimpleNamespace(__version__="9.9.9")
    monkeypatch.setitem(__import__("sys").modules, "vllm", vllm)
    monkeypatch.setattr(configuration, "HOOKS", (Hook("vllm_of_tomorrow", "Worker", "execute_model"),))
    with pytest.raises(RuntimeError, match=r"in vLLM 9\.9\.9: vllm_of_tomorrow\.Worker can't be imported"):
        check_vllm()


def config(**changes):
    """What check_engine reads of an engine that it takes."""
    flat = {
        "device_type": "cpu",
        "runner_type": "generate",
        "use_mla": False,
        "is_encoder_decoder": False,
        "cache_dtype": "auto",
        "pipeline_parallel_size": 1,
        "tensor_parallel_size": 1,
        "data_parallel_size": 1,
        "decode_context_parallel_size": 1,
        "prefill_context_parallel_size": 1,
        "use_ubatching": False,
        "kv_sharing_fast_prefill": False,
        "speculative_config": None,
        "lora_config": None,
        "use_v2_model_runner": False,
        "backend": None,
        "async_scheduling": True,
    }
    part = SimpleNamespace(**flat | changes)
    return SimpleNamespace(
        device_config=part,
        model_config=part,
        cache_config=part,
        parallel_config=part,
        attention_config=part,
        scheduler_config=part,
        speculative_config=part.speculative_config,
        lora_config=part.lora_config,
        use_v2_model_runner=part.use_v2_model_runner,
    )


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"device_type": "xpu"}, "device 'xpu'"),
        ({"device_type": "cuda", "async_scheduling": False}, "attention_backend=None: on a GPU set 'CUSTOM'"),
        ({"device_type": "cuda", "backend": "CUSTOM"}, "async_scheduling: the worker does not know"),
        ({"runner_type": "pooling"}, "runner='pooling'"),
        ({"use_mla": True}, "multi-head latent attention"),
        ({"is_encoder_decoder": True}, "encoder-decoder"),
        ({"cache_dtype": "fp8"}, "kv_cache_dtype='fp8'"),
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size > 1"),
        ({"data_parallel_size": 2}, "data_parallel_size > 1"),
        ({"decode_context_parallel_size": 2}, "decode_context_parallel_size > 1"),
        ({"prefill_context_parallel_size": 2}, "prefill_context_parallel_size > 1"),
        ({"use_ubatching": True}, "enable_dbo, ubatch_size"),
        ({"kv_sharing_fast_prefill": True}, "kv_sharing_fast_prefill"),
        ({"speculative_config": SimpleNamespace(method="ngram_gpu")}, "speculative_config of method 'ngram_gpu'"),
        ({"use_v2_model_runner": True}, "VLLM_USE_V2_MODEL_RUNNER=0"),
    ],
)
def test_what_an_engine_can_not_be_recorded_with_is_refused_by_name(change, name):
    check_engine(config(), settings())
    with pytest.raises(ValueError, match="can't be used with") as error:
        check_engine(config(**change), settings())
    assert name in str(error.value)


def test_ranks_have_all_of_their_heads_and_no_entropies():
    parallel = config(tensor_parallel_size=2)
    check_engine(parallel, settings(folder="requests"))
    for given, name in (({"heads": [0]}, "chosen heads"), ({"token_entropy": True}, "token_entropy")):
        with pytest.raises(ValueError, match=f"tensor_parallel_size > 1 and {name}"):
            check_engine(parallel, settings(**given))


def test_an_engine_with_adapters_has_no_entropies():
    with_adapters = config(lora_config=SimpleNamespace())
    check_engine(with_adapters, settings(preset="paper_v2", token_entropy=False))
    with pytest.raises(ValueError, match=r"enable_lora and token_entropy: .* set token_entropy=False"):
        check_engine(with_adapters, settings(token_entropy=True))


def test_an_engine_on_a_gpu_gets_the_backend_that_can_be_watched(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert set(engine_arguments(["waad"])) == {"worker_cls", "additional_config"}
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    arguments = engine_arguments(["waad"])
    assert (arguments["attention_backend"], arguments["async_scheduling"]) == ("CUSTOM", False)
    check_engine(config(device_type="cuda", backend=SimpleNamespace(name="CUSTOM"), async_scheduling=False), settings())


def test_the_hooks_of_a_gpu_are_looked_up_there_alone(monkeypatch):
    vllm = SimpleNamespace(__version__="9.9.9")
    monkeypatch.setitem(__import__("sys").modules, "vllm", vllm)
    monkeypatch.setattr(configuration, "HOOKS", ())
    check_vllm("cpu")
    with pytest.raises(RuntimeError, match=r"flash_attn\.FlashAttentionImpl can't be imported"):
        check_vllm("cuda")


def test_a_preset_stands_for_settings_that_can_be_replaced():
    of_preset = RequestSettings.of({"preset": "paper_v1", "layers": [3], "folder": "here"})
    assert of_preset.statistics == (WAAD(10), FAI(10, 50), FAI(0, None), FAI(4, None), MeanDistance())
    assert (of_preset.layers, of_preset.reduce, of_preset.token_entropy) == ([3], (), True)
    assert RequestSettings.of(of_preset.to_json()) == of_preset


def test_without_statistics_a_preset_is_named():
    with pytest.raises(ValueError, match=r"attnstats.statistics is missing; .* or a preset, such as \"paper_v2\""):
        engine_arguments(folder="here")
