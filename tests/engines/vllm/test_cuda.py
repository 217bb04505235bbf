"""The backend for GPUs against vLLM's source, without a GPU: what it overrides, reads and calls is there.

vLLM's kernel is a stand-in that computes what the kernel's signature says.
"""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import attnstats
from attnstats.integrations.hooks import faults_of
from attnstats.integrations.vllm import configuration, cuda, engine_arguments, plugin
from attnstats.integrations.vllm.configuration import KEY, WORKER

SIZE, HEADS, KEY_HEADS, DIM = 16, 4, 2, 32
LENGTHS = [(5, 37), (1, 20)]  # new tokens, keys


def test_hooks_are_where_they_were():
    assert faults_of(configuration.HOOKS + configuration.HOOKS_OF["cuda"]) == []


def test_arguments_of_an_engine_are_vllms():
    from vllm.engine.arg_utils import EngineArgs

    parameters = inspect.signature(EngineArgs).parameters
    assert set(configuration.ON_CUDA) <= set(parameters)
    assert set(engine_arguments(["waad"])) <= set(parameters)


def config(settings=None, worker=WORKER):
    return SimpleNamespace(
        additional_config={} if settings is None else {KEY: settings},
        parallel_config=SimpleNamespace(worker_cls=worker),
        speculative_config=None,
    )


def test_layers_and_graphs_are_vllms_own_without_settings(monkeypatch):
    from vllm.v1.attention.backend import AttentionCGSupport
    from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl, FlashAttentionMetadataBuilder

    builder = cuda.WatchedFlashBackend.get_builder_cls()
    monkeypatch.setattr(cuda, "get_current_vllm_config", config)
    assert cuda.WatchedFlashBackend.get_impl_cls() is FlashAttentionImpl
    stock = FlashAttentionMetadataBuilder.get_cudagraph_support(config(), None)
    assert builder.get_cudagraph_support(config(), None) == stock != AttentionCGSupport.NEVER

    monkeypatch.setattr(cuda, "get_current_vllm_config", lambda: config({"statistics": ["waad"]}))
    assert cuda.WatchedFlashBackend.get_impl_cls() is cuda.WatchedFlashImpl
    assert builder.get_cudagraph_support(config({"statistics": ["waad"]}), None) is AttentionCGSupport.NEVER

    monkeypatch.setattr(cuda, "get_current_vllm_config", lambda: config({"statistics": ["waad"]}, "auto"))
    with pytest.raises(ValueError, match="needs worker_cls="):
        cuda.WatchedFlashBackend.get_impl_cls()


def test_vllm_leaves_attention_out_of_its_graphs():
    from vllm.config import CompilationConfig, CompilationMode, CUDAGraphMode
    from vllm.v1.attention.backend import AttentionCGSupport

    compilation = CompilationConfig(mode=CompilationMode.VLLM_COMPILE, cudagraph_mode="FULL_AND_PIECEWISE")
    compilation.set_splitting_ops_for_v1(all2all_backend="naive")
    mode = compilation.resolve_cudagraph_mode_and_sizes(AttentionCGSupport.NEVER, "WatchedFlashBackend")
    assert mode is CUDAGraphMode.PIECEWISE
    compilation.cudagraph_mode = CUDAGraphMode.FULL
    with pytest.raises(ValueError, match="try cudagraph_mode=PIECEWISE"):
        compilation.resolve_cudagraph_mode_and_sizes(AttentionCGSupport.NEVER, "WatchedFlashBackend")


@pytest.mark.parametrize(("platform", "registered"), [("cpu", "CPU_ATTN"), ("cuda", "CUSTOM"), ("rocm", None)])
def test_the_plug_in_registers_the_platforms_backend(platform, registered, monkeypatch):
    from vllm import platforms
    from vllm.v1.attention.backends import registry
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    overrides = {}
    monkeypatch.setattr(registry, "_ATTN_OVERRIDES", overrides)
    here = SimpleNamespace(is_cpu=lambda: platform == "cpu", is_cuda=lambda: platform == "cuda")
    monkeypatch.setattr(platforms, "current_platform", here)
    plugin.register()
    assert [backend.name for backend in overrides] == ([registered] if registered else [])
    if platform == "cuda":
        assert AttentionBackendEnum.CUSTOM.get_class() is cuda.WatchedFlashBackend
        assert AttentionBackendEnum[cuda.WatchedFlashBackend.get_name()].name == "FLASH_ATTN"


def parameters_of_the_kernel():
    """Its module can't be imported without its extension."""
    import vllm

    source = Path(vllm.__path__[0], "vllm_flash_attn", "flash_attn_interface.py").read_text()
    tree = ast.parse(source)
    (function,) = [node for node in tree.body if getattr(node, "name", "") == "flash_attn_varlen_func"]
    return [argument.arg for argument in function.args.args]


def kernel(
    q, k, v, max_seqlen_q, cu_seqlens_q, max_seqlen_k, seqused_k, softmax_scale, causal, window_size, softcap,
    block_table, return_softmax_lse, fa_version,
):  # fmt: skip
    assert (causal, return_softmax_lse, fa_version) == (True, True, 3)
    assert v.shape == k.shape
    assert (max_seqlen_q, max_seqlen_k) == (5, 37)
    parts = []
    for i, (begin, end) in enumerate(zip(cu_seqlens_q[:-1].tolist(), cu_seqlens_q[1:].tolist(), strict=True)):
        keys = k[block_table[i]].flatten(0, 1)[: seqused_k[i]].transpose(0, 1)[None]
        window = None if window_size[0] < 0 else tuple(window_size)
        _, result = attnstats.attention(
            q[begin:end].transpose(0, 1)[None], keys, keys, statistics=["lse"], scale=softmax_scale,
            softcap=softcap or None, window_size=window, enable_gqa=True,
        )  # fmt: skip
        parts.append(result.lse[0])
    return None, torch.cat(parts, dim=1)


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("sinks", [None, torch.linspace(-1, 1, HEADS)], ids=["plain", "sinks"])
@pytest.mark.parametrize("window", [None, 8])
def test_a_layer_shows_queries_pages_and_log_sum_exps(layout, sinks, window, monkeypatch):
    from vllm.v1.attention.backends import fa_utils
    from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl, FlashAttentionMetadata

    assert set(inspect.signature(kernel).parameters) <= set(parameters_of_the_kernel())
    monkeypatch.setattr(fa_utils, "flash_attn_varlen_func", kernel, raising=False)
    monkeypatch.setattr(FlashAttentionImpl, "forward", lambda self, *args: args[6].fill_(1))
    draw = torch.Generator().manual_seed(0)
    impl = cuda.WatchedFlashImpl(HEADS, DIM, 0.2, KEY_HEADS, None, window, "auto", 5.0)
    impl.sinks, impl.vllm_flash_attn_version = sinks, 3
    assert impl.left == (None if window is None else window - 1)
    whole = torch.randn(8, SIZE, KEY_HEADS, 2 * DIM, generator=draw)
    logical = whole.transpose(1, 2)  # (blocks, heads, size, keys and values)
    kv_cache = logical if layout == "NHD" else logical.contiguous()
    table = torch.tensor([[3, 1, 6], [5, 2, 0]], dtype=torch.int32)
    metadata = FlashAttentionMetadata(
        num_actual_tokens=6,
        max_query_len=5,
        query_start_loc=torch.tensor([0, 5, 6], dtype=torch.int32),
        max_seq_len=37,
        seq_lens=torch.tensor([37, 20], dtype=torch.int32),
        block_table=table,
        slot_mapping=torch.zeros(6),
    )
    query = torch.randn(8, HEADS, DIM, generator=draw)  # two of padding
    seen = []
    impl.watch = lambda *args: seen.append(args)
    output = impl.forward(None, query, query, query, kv_cache, metadata, torch.zeros(8, HEADS, DIM))
    assert output.eq(1).all()
    (shown, look, told) = seen.pop()
    cache = look()
    assert shown is query
    assert told is metadata
    assert cache.block_size == SIZE
    assert torch.equal(cache.pages, whole[..., :DIM])
    assert cache.pages.data_ptr() == kv_cache.data_ptr()
    begin = 0
    lse = cache.lse()
    for i, (new, keys) in enumerate(LENGTHS):
        key = cache.read(table[i]).flatten(0, 1)[:keys].transpose(0, 1)[None]
        _, expected = attnstats.reference.attention(
            query[begin : begin + new].transpose(0, 1)[None], key, key, statistics=["lse"], scale=0.2, softcap=5.0,
            window_size=None if impl.left is None else (impl.left, 0), enable_gqa=True, sinks=sinks,
        )  # fmt: skip
        torch.testing.assert_close(lse[:, begin : begin + new], expected.lse[0], atol=1e-5, rtol=1e-5)
        begin += new
    impl.fa4_hd256 = True
    impl.forward(None, query, query, query, kv_cache, metadata, output)
    assert seen.pop()[1]().lse() is None
    impl.forward(None, query, query, query, kv_cache, None, output)  # a profiling run
    assert not seen
