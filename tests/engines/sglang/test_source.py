"""The plug-in and its stand-in against SGLang's source (`make sglang`).

SGLang can't be imported without CUDA: its source is parsed, and what is plain Python or PyTorch in it is run.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from attnstats import WAAD, Entropy
from attnstats.integrations.sglang import configuration, environment, plugin, recorder, statistics_of
from tests import sglang_parts as parts
from tests.process import ROOT

SPEC = importlib.util.find_spec("sglang")
assert SPEC is not None
assert SPEC.submodule_search_locations is not None
SOURCE = Path(SPEC.submodule_search_locations[0])


@functools.cache
def tree(module: str) -> ast.Module:
    return ast.parse((SOURCE / (module.removeprefix("sglang.").replace(".", "/") + ".py")).read_text(encoding="utf-8"))


def node(module: str, *names: str) -> Any:
    """A class, a function, or one inside of it."""
    found: Any = tree(module)
    for name in names:
        (found,) = (each for each in found.body if getattr(each, "name", None) == name)
    return found


def attributes(module: str, name: str) -> set[str]:
    """Those that a class declares, or that its methods set, and its methods."""
    found = set()
    for each in ast.walk(node(module, name)):
        match each:
            case (
                ast.AnnAssign(target=ast.Name(id=field))
                | ast.Assign(targets=[ast.Name(id=field)])
                | ast.FunctionDef(name=field)
            ):
                found.add(field)
            case ast.Attribute(value=ast.Name(id="self"), attr=field, ctx=ast.Store()):
                found.add(field)
    return found


def run(module: str, *names: str, **context: Any) -> Any:
    """What a function of SGLang's does, by itself."""
    function = node(module, *names)
    function.decorator_list, function.returns = [], None
    for argument in (*function.args.args, *function.args.kwonlyargs):
        argument.annotation = None
    exec(compile(ast.Module([function], []), str(SOURCE), "exec"), context)
    return context[function.name]


BATCH = "sglang.srt.managers.schedule_batch"
FORWARD = "sglang.srt.model_executor.forward_batch_info"


def test_the_source_is_of_the_version_that_the_page_names():
    page = (ROOT / "docs" / "sglang.md").read_text(encoding="utf-8")
    (metadata,) = SOURCE.parent.glob("sglang-*.dist-info")
    assert f"SGLang {metadata.name.removesuffix('.dist-info').removeprefix('sglang-')}" in page


@pytest.mark.parametrize("hook", configuration.HOOKS, ids=lambda hook: f"{hook.cls}.{hook.method}")
def test_methods_are_where_they_were(hook):
    arguments = node(hook.module, hook.cls, hook.method).args
    names = tuple(argument.arg for argument in arguments.args[1:])
    assert names[: len(hook.parameters)] == hook.parameters


def test_nothing_else_is_given_to_what_is_wrapped():
    assert [a.arg for a in node(*configuration.STREAMER, "stream_output").args.args][1:] == [
        "reqs", "return_logprob", "skip_req",
    ]  # fmt: skip
    assert [a.arg for a in node(*configuration.SCHEDULER, "init_model_worker").args.args] == ["self"]


def test_attention_takes_its_arguments_in_this_order():
    forward = node("sglang.srt.layers.radix_attention", "RadixAttention", "forward").args
    names = [argument.arg for argument in forward.args][1:]
    assert tuple(names[: len(recorder.ARGUMENTS)]) == recorder.ARGUMENTS
    assert set(names) <= set(recorder.READ)
    assert forward.kwarg is not None  # sinks and others


ATTENTION, POOLS = "sglang.srt.layers", "sglang.srt.mem_cache.memory_pool"
LAYER = set(vars(parts.RadixAttention(0))) - set(vars(torch.nn.Module())) - {"pool"}
RUNNER = set(vars(parts.Scheduler(parts.Model()).runner))
NAMES = [
    (BATCH, "Req", set(vars(parts.Req("a", [1], 1))) - {"slots"} | {"finished", "output_ids_through_stop"}),
    (BATCH, "ScheduleBatch", {"reqs", "forward_mode", "seq_lens_cpu", "prefix_lens", "extend_lens"}),
    (FORWARD, "ForwardBatch", {"forward_mode", "req_pool_indices", "seq_lens", "out_cache_loc", *recorder.MASKS[2:]}),
    (FORWARD, "ForwardMode", {"is_extend", "is_decode", *(mode.name for mode in parts.ForwardMode)}),
    (f"{ATTENTION}.radix_attention", "RadixAttention", LAYER),
    (f"{ATTENTION}.radix_attention", "AttentionType", {kind.name for kind in parts.AttentionType}),
    (f"{ATTENTION}.attention.hybrid_attn_backend", "HybridAttnBackend", {"prefill_backend", "decode_backend"}),
    (f"{ATTENTION}.attention.triton_backend", "ForwardMetadata", {"custom_mask"}),
    (f"{ATTENTION}.attention.flashattention_backend", "FlashAttentionMetadata", {"image_token_ranges"}),
    (*configuration.SCHEDULER, {"enable_overlap", "enable_pdmux", "is_generation", "spec_algorithm", "tp_worker"}),
    ("sglang.srt.model_executor.model_runner", "ModelRunner", RUNNER),
    ("sglang.srt.configs.model_config", "ModelConfig", {"is_encoder_decoder"}),
    ("sglang.srt.sampling.sampling_params", "SamplingParams", {"custom_params", "max_new_tokens"}),
    (POOLS, "KVCache", {"dtype", "store_dtype"}),
    (POOLS, "MHATokenToKVPool", {"kv_cache_layout", "k_buffer", "is_quantized_kv_cache"}),
    (POOLS, "ReqToTokenPool", {"req_to_token"}),
]


@pytest.mark.parametrize(("module", "name", "names"), NAMES, ids=[name for _, name, _ in NAMES])
def test_the_stand_in_has_sglangs_names(module, name, names):
    assert names <= attributes(module, name)


def test_settings_are_where_they_were():
    fields = "sglang.srt.arg_groups.fields"
    for module, names in {
        "parallel": {"tp_size", "pp_size", "dp_size"},
        "disagg": {"disaggregation_mode"},
        "model": {"model_path"},
        "serving": {"tokenizer_path"},
        "schedule": {"disable_overlap_schedule", "disable_hybrid_swa_memory"},
    }.items():
        declared = {each.target.id for each in ast.walk(tree(f"{fields}.{module}")) if isinstance(each, ast.AnnAssign)}
        assert names <= declared
    getters = {each.name for each in tree("sglang.srt.runtime_context").body if isinstance(each, ast.FunctionDef)}
    assert {"get_parallel", "get_disagg", "get_model", "get_serving"} <= getters
    assert node("sglang.srt.model_executor.cuda_graph_config", "cuda_graph_fully_disabled")
    assert "SGLANG_RUST_SERVER = EnvBool(False)" in ast.unparse(tree("sglang.srt.environ"))
    assert f"HEALTH_CHECK_RID_PREFIX = {recorder.HEALTH_CHECK!r}" in ast.unparse(tree("sglang.srt.constants"))
    (choices,) = (
        ast.literal_eval(each.value)
        for each in tree("sglang.srt.arg_groups.choices").body
        if isinstance(each, ast.Assign) and ast.unparse(each.targets[0]) == "ATTENTION_BACKEND_CHOICES"
    )
    assert set(configuration.BACKENDS) <= set(choices)


def test_plug_ins_are_loaded_before_the_scheduler_is_made():
    loads = ast.unparse(tree("sglang.srt.plugins.__init__"))
    assert "GENERAL_PLUGINS_GROUP = 'sglang.srt.plugins'" in loads
    assert 'entry-points."sglang.srt.plugins"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    module, name = configuration.SCHEDULER
    process = ast.unparse(node(module, "run_scheduler_process"))
    assert process.index("load_plugins()") < process.index(" = Scheduler(")
    worker = ast.unparse(node(module, name, "init_model_worker"))
    assert worker.index("init_memory_pools") < worker.index("init_all_attention_backends")


@pytest.fixture
def serve(monkeypatch):
    """The plug-in by SGLang's own registry of hooks."""

    def start(model, statistics):
        path = SOURCE / "srt" / "plugins" / "hook_registry.py"
        spec = importlib.util.spec_from_file_location("sglang_hook_registry", path)
        assert spec is not None
        assert spec.loader is not None
        registry: Any = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(registry)
        kind = parts.install(monkeypatch)
        monkeypatch.setitem(sys.modules, "sglang.srt.plugins.hook_registry", registry)
        monkeypatch.setenv(*environment(statistics, layers="all", reduce=None).popitem())
        plugin.register()
        registry.HookRegistry.apply_hooks()
        return kind(model)

    return start


def test_sglangs_registry_wraps_the_scheduler(serve):
    server = serve(parts.Model(), ["waad"])
    req = parts.Req("a", range(6), 2)
    server.prefill(req)
    server.step(decoding=[req])
    assert statistics_of({"meta_info": server.output_streamer.responses["a"]}).tokens.shape == (1, 7)


def test_parts_of_a_stream_are_cut_as_the_stand_in_does():
    accept = node(configuration.STREAMER[0], "_GenerationStreamAccumulator", "accept")
    assert "req_values[send_token_offset:len(output_ids_)]" in ast.unparse(accept)
    manager = "sglang.srt.managers.tokenizer_manager"
    accumulate = run(manager, "TokenizerManager", "_accumulate_request_meta_info")
    cut = run(manager, "_slice_streaming_output_meta_info", _INCREMENTAL_STREAMING_META_INFO_KEYS=())
    state = SimpleNamespace(customized_info_accumulated={}, customized_info_reported_keys=set())
    accumulate({}, state, "attnstats", [None, None])
    meta_info: dict[str, Any] = {}
    accumulate(meta_info, state, "attnstats", [None, "record"])
    cut(meta_info, 2, state.customized_info_accumulated.keys())  # incremental: two tokens were sent before
    assert meta_info == {"attnstats": [None, "record"]}


NATIVE = "sglang.srt.layers.attention.torch_native_backend"
LONGEST = 64


@pytest.mark.parametrize("window", [-1, 4])
def test_statistics_are_those_of_sglangs_own_attention(serve, window, monkeypatch):
    """Values are one-hot vectors of positions, with which its output is the map."""
    context = {"torch": torch, "scaled_dot_product_attention": torch.nn.functional.scaled_dot_product_attention}
    names = "_run_sdpa_forward_extend", "_run_sdpa_forward_decode"
    extend, decode = (run(NATIVE, "TorchNativeAttnBackend", name, **context) for name in names)
    mask = run(NATIVE, "TorchNativeAttnBackend", "_make_sliding_window_mask", torch=torch)
    backend = SimpleNamespace(_make_sliding_window_mask=mask)
    maps = torch.zeros(parts.LAYERS, 3, parts.HEADS, LONGEST, LONGEST)
    server = serve(parts.Model(window=window), [WAAD(3), Entropy()])
    store = parts.RadixAttention.forward

    def forward(self, q, k, v, forward_batch, **kwargs):
        store(self, q, k, v, forward_batch, **kwargs)
        table, rows = server.runner.req_to_token_pool.req_to_token, forward_batch.req_pool_indices
        ends = forward_batch.seq_lens
        values = torch.zeros(200, parts.KEY_HEADS, LONGEST)
        for row, end in zip(rows.tolist(), ends.tolist(), strict=True):
            values[table[row, :end], :] = torch.eye(LONGEST)[:end, None]
        query = q.view(-1, parts.HEADS, parts.DIM)
        output = query.new_empty(len(query), parts.HEADS, LONGEST)
        common = {"scaling": parts.SCALE, "enable_gqa": True, "sliding_window_size": self.sliding_window_size}
        given = query, output, self.pool.k_buffer[self.layer_id], values, table, rows, ends
        if forward_batch.forward_mode.is_decode():
            decode(backend, *given, **common)
            lengths = torch.ones_like(ends)
        else:
            lengths = forward_batch.extend_seq_lens
            extend(backend, *given, ends - lengths, lengths, causal=True, **common)
        for row, end, part in zip(rows.tolist(), ends.tolist(), output.split(lengths.tolist()), strict=True):
            maps[self.layer_id, row - 1, :, end - len(part) : end] = part.transpose(0, 1)
        return torch.zeros_like(q)

    monkeypatch.setattr(parts.RadixAttention, "forward", forward)
    requests = parts.Req("a", range(9), 3), parts.Req("b", range(20, 25), 4), parts.Req("c", range(6), 2)
    a, b, c = requests
    server.step((b, 0, 5), (a, 0, 4))
    server.step((a, 4, 9), decoding=[b])
    server.prefill(c)
    server.step(decoding=[c, a, b])
    server.step(decoding=[b, a])
    distance = (torch.arange(LONGEST)[:, None] - torch.arange(LONGEST)).clamp(0, 3)
    for req in requests:
        result = statistics_of({"meta_info": server.output_streamer.responses[req.rid]})
        length = result.tokens.shape[1]
        weights = maps[:, server._rows[req.rid] - 1, :, :length]
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
        torch.testing.assert_close(result["waad"][:, 0], (weights * distance[:length]).sum(-1), atol=1e-5, rtol=1e-5)
        entropy = torch.special.entr(weights).sum(-1)
        torch.testing.assert_close(result["entropy"][:, 0], entropy, atol=1e-5, rtol=1e-5)
