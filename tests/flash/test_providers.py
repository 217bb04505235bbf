"""The attention kernels of others without a GPU: what torch's fake kernels make of each call, and who is chosen."""

import dataclasses
import inspect
import sys
import types

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import attnstats
from attnstats import FAI, WAAD, Entropy, MaxLogit, _dispatch
from attnstats.core import arguments
from attnstats.core.autograd import Residuals
from attnstats.core.options import Options
from attnstats.core.packing import Packing
from attnstats.flash import providers
from attnstats.flash.providers import CUDNN_ATTENTION, EFFICIENT, FLASH_2, FLASH_3, FLASH_4
from attnstats.triton import configs

HALF = torch.bfloat16


@pytest.fixture(autouse=True)
def _a_gpu_with_cudnn(monkeypatch):
    monkeypatch.setattr(providers, "_cudnn_version", lambda: 91900)
    arguments._CACHE.clear()
    yield
    arguments._CACHE.clear()


def fake(query_length=100, key_length=100, heads=4, key_heads=2, dim=64, value_dim=None, dtype=HALF, batch=2):
    """Query, key and value on a GPU that isn't there."""
    with FakeTensorMode():
        query = torch.empty(batch, query_length, heads, dim, dtype=dtype, device="cuda").transpose(1, 2)
        key = torch.empty(batch, key_length, key_heads, dim, dtype=dtype, device="cuda").transpose(1, 2)
        value = torch.empty(batch, key_length, key_heads, value_dim or dim, dtype=dtype, device="cuda").transpose(1, 2)
    return query, key, value


def geometry_of(query, key, value, **options):
    return arguments.resolve(query, key, value, Options(statistics=(), enable_gqa=True, **options))


def packed(geometry, longest=60):
    with FakeTensorMode():
        boundaries = torch.empty(4, dtype=torch.int32, device="cuda")
    return dataclasses.replace(geometry, packing=Packing(boundaries, boundaries, longest, longest), memo={})


SHAPES = {
    "self": {},
    "more keys": {"query_length": 30},
    "one query": {"query_length": 1},
    "full": {"is_causal": False, "query_length": 33},
    "window": {"window_size": (7, 0)},
    "packed": {"batch": 1},
    "half": {"dtype": torch.float16},
    "float32": {"dtype": torch.float32, "key_heads": 4},
    "wide values": {"dtype": torch.float32, "key_heads": 4, "value_dim": 32},
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("provider", [FLASH_2, CUDNN_ATTENTION, EFFICIENT], ids=lambda x: x.name)
def test_torchs_fake_kernels_take_the_calls(provider, name):
    """With the shapes, dtypes and strides that come back."""
    changed = dict(SHAPES[name])
    options = {x: changed.pop(x) for x in ("is_causal", "window_size") if x in changed}
    query, key, value = fake(**changed)
    geometry = geometry_of(query, key, value, **options)
    if name == "packed":
        geometry = packed(geometry)
    if provider.reason_against(geometry, "sm_90") is not None:
        assert provider is not FLASH_2 or name in ("float32", "wide values")
        assert provider is not CUDNN_ATTENTION or name not in ("self", "full", "half")
        assert provider is not EFFICIENT or name not in ("float32", "wide values")
        return
    with FakeTensorMode(allow_non_fake_inputs=True):
        output, lse = provider.forward(query, key, value, geometry)
        assert output.shape == (*query.shape[:3], value.shape[3])
        assert output.dtype == query.dtype
        assert lse.shape == query.shape[:3]
        assert lse.dtype == torch.float32
        residuals = Residuals(query, key, value, output, lse.clone(memory_format=torch.contiguous_format))
        grads = provider.backward(residuals, torch.empty_like(output), geometry)
    for grad, x in zip(grads, (query, key, value), strict=True):
        assert (grad.shape, grad.dtype, grad.device) == (x.shape, x.dtype, x.device)


NO_OTHER = {"sm_80": FLASH_2, "sm_86": FLASH_2, "sm_89": FLASH_2, "sm_90": CUDNN_ATTENTION, "sm_120": FLASH_2}


@pytest.mark.parametrize("architecture", [*NO_OTHER, "sm_100", "sm_75", "gfx942"])
def test_an_expert_would_choose_the_same(architecture):
    """Of what comes with torch, at the paper's workload and beside it."""
    options = {"statistics": [WAAD(10), FAI(10, 100)], "enable_gqa": True}
    tensors = fake(8192, 8192, 32, 8, 128, batch=1)
    with configs.targeting(architecture):
        plan = attnstats.explain(*tensors, **options)
        if architecture in ("sm_75", "gfx942"):
            assert plan.backend == "triton"
            assert f"FlashAttention 2: {architecture}" in plan.reason
            return
        first = NO_OTHER.get(architecture, CUDNN_ATTENTION)
        assert plan.backend == "flash"
        assert plan.reason.startswith(first.name)
        assert [each.run for each in plan.passes] == ["provider", "band"]
        assert plan.passes[0].description == first.name
        beside = {
            "a window": (FLASH_2.name, tensors, {"window_size": (4095, 0)}),
            "few queries": ("few queries", fake(1, 8192, 32, 8, 128), {}),
            "a chunk": (FLASH_2.name, fake(512, 8192, 32, 8, 128), {}),
            "sinks": (first.name, tensors, {"sinks": torch.zeros(32)}),
            "softcap": ("softcap=30.0", tensors, {"softcap": 30.0}),
            "a wide head": (FLASH_2.name, fake(8192, 8192, 32, 8, 256), {}),
            "an odd head": ("head_dim 76, not a", fake(8192, 8192, 32, 8, 76), {}),
            "other values": ("value_dim 64 beside head_dim", fake(8192, 8192, 32, 8, 128, 64), {}),
            "float32": ("memory-efficient", fake(512, 512, 8, 8, dtype=torch.float32), {}),
            "float32 with groups": ("fewer key than query heads", fake(512, 512, dtype=torch.float32), {}),
            "whole rows": ("Entropy() comes out of the same pass", tensors, {"statistics": [Entropy()]}),
            "max logit": ("MaxLogit() comes out of the same pass", tensors, {"statistics": [MaxLogit()]}),
        }
        for name, (expected, inputs, changed) in beside.items():
            if name == "sinks":
                with FakeTensorMode():
                    changed = {"sinks": torch.zeros(32, device="cuda")}
            reason = attnstats.explain(*inputs, **options | changed).reason
            assert expected in reason, (name, reason)


def test_others_are_taken_where_they_are_installed(monkeypatch):
    tensors = fake(8192, 8192, 32, 8, 128, batch=1)
    options = {"statistics": [WAAD(10)], "enable_gqa": True}
    for module in ("flash_attn_interface", "flash_attn.cute.interface"):
        monkeypatch.setitem(sys.modules, module, types.ModuleType(module))
    providers._package.cache_clear()
    try:
        for architecture, expected in (("sm_90", FLASH_3), ("sm_100", FLASH_4), ("sm_80", FLASH_2)):
            with configs.targeting(architecture):
                assert attnstats.explain(*tensors, **options).reason == expected.name
        with configs.targeting("sm_90"):
            monkeypatch.setenv(providers.LEFT_OUT, "flashattention 3, cuDNN")
            assert attnstats.explain(*tensors, **options).reason == FLASH_4.name
    finally:
        providers._package.cache_clear()


def test_what_the_user_activated_in_torch_counts(monkeypatch):
    tensors = fake(8192, 8192, 32, 8, 128, batch=1)
    options = {"statistics": [WAAD(10)], "enable_gqa": True}
    with configs.targeting("sm_90"):
        assert attnstats.explain(*tensors, **options).reason.startswith("cuDNN; not FlashAttention 3: not installed")
        monkeypatch.setattr(providers, "_active", lambda: "FA3")
        assert attnstats.explain(*tensors, **options).reason == "FlashAttention 3"
        monkeypatch.setattr(providers, "_active", lambda: "FA4")
        monkeypatch.setattr(providers, "_cudnn_version", lambda: 91000)
        reason = attnstats.explain(*tensors, **options).reason
        assert reason == (
            "FlashAttention 4; not FlashAttention 3: not installed; not cuDNN: version 91000, before 91501"
        )


def test_a_kernel_that_a_model_had_outranks_the_fastest():
    tensors = fake(8192, 8192, 32, 8, 128, batch=1)
    for asked in ([WAAD(10)], [Entropy()]):
        options = Options(statistics=asked, enable_gqa=True, prefers=FLASH_2.name)
        with configs.targeting("sm_90"):
            plan = _dispatch.explain(*tensors, options)
        assert (plan.backend, plan.reason) == ("flash", FLASH_2.name)


@pytest.mark.parametrize(("dim", "taken"), [(192, True), (256, False)])
def test_flash_3_has_no_deterministic_backward_of_wide_heads(dim, taken, monkeypatch):
    monkeypatch.setattr(providers, "_active", lambda: "FA3")
    facts = geometry_of(*fake(dim=dim))
    assert FLASH_3.reason_against(facts, "sm_90") is None
    torch.use_deterministic_algorithms(True)
    try:
        reason = FLASH_3.reason_against(facts, "sm_90")
    finally:
        torch.use_deterministic_algorithms(False)
    assert reason == (None if taken else "torch.use_deterministic_algorithms")


def test_torchs_switches_are_heeded():
    tensors = fake(8192, 8192, 32, 8, 128, batch=1)
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        with configs.targeting("sm_90"):
            reason = attnstats.explain(*tensors, statistics=["waad"], enable_gqa=True).reason
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)
    assert reason.startswith("FlashAttention 2; ")
    assert "not cuDNN: torch.backends.cuda.enable_cudnn_sdp(False)" in reason


def test_a_package_that_cannot_be_imported_is_not_installed(monkeypatch, tmp_path):
    (tmp_path / "flash_attn_interface.py").write_text("raise AttributeError('another torch')")
    monkeypatch.syspath_prepend(tmp_path)
    providers._package.cache_clear()
    try:
        with configs.targeting("sm_90"):
            reason = attnstats.explain(*fake(128, 128), statistics=["waad"], enable_gqa=True).reason
    finally:
        providers._package.cache_clear()
    assert "not FlashAttention 3: not installed" in reason


def test_boundaries_that_nobody_read_stay_inside_the_tensors():
    query, key, value = (torch.zeros(1, n, 20, 16, dtype=HALF) for n in (4, 2, 2))
    boundaries = torch.tensor([0, 9, 7, 99], dtype=torch.int32)
    for believed, expected in ((True, [0, 9, 9, 20]), (False, [0, 9, 7, 99])):
        facts = dataclasses.replace(
            geometry_of(query, key, value), packing=Packing(boundaries, boundaries, 12, 12, believed), memo={}
        )
        for x in providers._sequences(facts)[:2]:
            assert x.tolist() == expected
            assert x.dtype == torch.int32


def test_cudnn_is_left_where_bits_must_repeat():
    tensors = fake(8192, 8192, 32, 8, 128, batch=1)
    torch.use_deterministic_algorithms(True)
    try:
        with configs.targeting("sm_90"):
            reason = attnstats.explain(*tensors, statistics=["waad"], enable_gqa=True).reason
    finally:
        torch.use_deterministic_algorithms(False)
    assert reason.startswith("FlashAttention 2; ")
    assert "not cuDNN: torch.use_deterministic_algorithms" in reason


# The parameters of functions of flash-attention at commit 0251105, without their types and defaults.
SIGNATURES = {
    ("flash_attn_interface", "_flash_attn_forward"): (
        "q k v k_new v_new qv out_ cu_seqlens_q cu_seqlens_k cu_seqlens_k_new seqused_q seqused_k max_seqlen_q "
        "max_seqlen_k page_table kv_batch_idx leftpad_k rotary_cos rotary_sin seqlens_rotary q_descale k_descale "
        "v_descale softmax_scale causal window_size_left window_size_right attention_chunk softcap "
        "rotary_interleaved scheduler_metadata num_splits pack_gqa sm_margin"
    ),
    ("flash_attn_interface", "_flash_attn_backward"): (
        "dout q k v out softmax_lse cu_seqlens_q cu_seqlens_k sequed_q sequed_k max_seqlen_q max_seqlen_k dq dk dv "
        "softmax_scale is_causal window_size_left window_size_right softcap deterministic sm_margin"
    ),
    ("flash_attn.cute.interface", "_flash_attn_fwd"): (
        "q k v qv cu_seqlens_q cu_seqlens_k seqused_q seqused_k max_seqlen_q max_seqlen_k min_seqlen_k page_table "
        "softmax_scale causal softcap window_size_left window_size_right learnable_sink tile_mn mma_pv_is_rs "
        "intra_wg_overlap num_threads num_splits pack_gqa return_lse out lse"
    ),
    ("flash_attn.cute.interface", "_flash_attn_bwd"): (
        "q k v out dout lse softmax_scale causal softcap window_size_left window_size_right cu_seqlens_q "
        "cu_seqlens_k seqused_q seqused_k max_seqlen_q max_seqlen_k deterministic dq dk dv"
    ),
}


def installed(monkeypatch, called):
    """The packages, with functions that note the arguments by name and return tensors of the shapes of theirs."""

    def function(name, parameters):
        empty = inspect.Parameter.empty
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        signature = inspect.Signature(
            [inspect.Parameter(x, kind, default=None if i > 2 else empty) for i, x in enumerate(parameters.split())]
        )

        def run(*args, **options):
            given = dict(signature.bind(*args, **options).arguments)
            called[name] = given
            if "bwd" in name:
                return tuple(torch.ones_like(given[x]) for x in "qkv")
            if "backward" in name:
                for x in ("dq", "dk", "dv"):
                    given[x].fill_(1.0)
                return None
            rows = given["q"].shape[:-1]
            lse = torch.zeros(rows).transpose(-1, -2)
            return torch.ones_like(given["q"]), lse, None, None

        return run

    for module, name in SIGNATURES:
        stub = sys.modules[module] if module in called else types.ModuleType(module)
        called.setdefault(module, stub)
        monkeypatch.setitem(sys.modules, module, stub)
        setattr(stub, name, function(name, SIGNATURES[module, name]))
    providers._package.cache_clear()


@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("provider", [FLASH_3, FLASH_4], ids=lambda x: x.name)
def test_packages_are_called_as_their_sources_say(provider, is_packed, monkeypatch):
    called: dict = {}
    installed(monkeypatch, called)
    try:
        query, key, value = (torch.randn(1, n, 20, 16, dtype=HALF) for n in (4, 2, 2))
        geometry = geometry_of(query, key, value, window_size=(7, 0), scale=0.5)
        if is_packed:
            boundaries = torch.tensor([0, 8, 20], dtype=torch.int32)
            geometry = dataclasses.replace(geometry, packing=Packing(boundaries, boundaries, 12, 12), memo={})
        assert provider.reason_against(geometry, "sm_90") is None
        output, lse = provider.forward(query, key, value, geometry)
        grads = provider.backward(Residuals(query, key, value, output, lse), torch.ones_like(output), geometry)
    finally:
        providers._package.cache_clear()
    assert (output.shape, lse.shape) == (query.shape, query.shape[:3])
    assert [x.shape for x in grads] == [query.shape, key.shape, value.shape]
    forward, backward = (called[name] for name in called if name.startswith("_flash"))
    for given in (forward, backward):
        assert given["q"].shape == ((20, 4, 16) if is_packed else (1, 20, 4, 16))
        assert given["softmax_scale"] == 0.5
        assert (given["window_size_left"], given["window_size_right"]) == (7, 0)
        assert given.get("causal", given.get("is_causal")) is True
        assert (given.get("max_seqlen_q"), given.get("max_seqlen_k")) == ((12, 12) if is_packed else (None, None))
    assert backward[{"FlashAttention 3": "softmax_lse", "FlashAttention 4": "lse"}[provider.name]].is_contiguous()


@pytest.mark.parametrize("start", [0, 1, 8])
def test_rows_that_kernels_could_not_load_at_once_are_copied(start):
    storage = torch.randn(2, 4, 20, 40, dtype=HALF)
    x = storage[..., start : start + 16]
    found = providers._aligned(x)
    assert torch.equal(found, x)
    assert (found.data_ptr() == x.data_ptr()) == (start != 1)
    odd = torch.randn(2, 4, 20, 17, dtype=HALF)[..., :16]
    assert providers._aligned(odd).is_contiguous()
    assert providers._aligned(x.expand(2, 4, 20, 16)).data_ptr() == x.data_ptr() or start == 1
