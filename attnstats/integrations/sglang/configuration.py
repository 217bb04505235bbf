"""The settings of an SGLang server, in an environment variable, and what can't be recorded, refused by name.

SGLang has no argument for a plug-in's settings; all its processes have the environment, in which it chooses plug-ins
itself (SGLANG_PLUGINS). Nothing here imports SGLang but `check_sglang`, `check_server` and `attention_layers`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from attnstats.integrations.hooks import Hook, faults_of
from attnstats.integrations.vllm.configuration import KEY, RequestSettings, named_settings
from attnstats.statistics import Statistic

VARIABLE = "ATTNSTATS_SGLANG"

SCHEDULER = "sglang.srt.managers.scheduler", "Scheduler"
STREAMER = "sglang.srt.managers.scheduler_components.output_streamer", "SchedulerOutputStreamer"
# What the plug-in puts code around.
WRAPPED = (
    Hook(*SCHEDULER, "init_model_worker"),
    Hook(*SCHEDULER, "run_batch", ("batch",)),
    Hook(*STREAMER, "stream_output", ("reqs", "return_logprob", "skip_req")),
)
# What it reads besides.
HOOKS = (
    *WRAPPED,
    Hook("sglang.srt.plugins.hook_registry", "HookRegistry", "register", ("target", "hook", "hook_type")),
    Hook(
        "sglang.srt.layers.radix_attention",
        "RadixAttention",
        "forward",
        ("q", "k", "v", "forward_batch", "save_kv_cache"),
    ),
    Hook("sglang.srt.mem_cache.memory_pool", "MHATokenToKVPool", "get_key_buffer", ("layer_id",)),
)
# Those whose scores are those of plain attention, masked causally and by the layer's window.
BACKENDS = ("fa3", "fa4", "flashinfer", "torch_native", "triton")


def environment(statistics: Iterable[Statistic | str] | None = None, **settings: Any) -> dict[str, str]:
    """The environment variable with which SGLang records statistics of every request.

    Args:
        statistics: as for `attnstats.capture(live=True)`; None: those of a preset.
        settings: preset, layers, heads, reduce, folder and quota_mb, as docs/sglang.md has them.

    Raises:
        TypeError, ValueError: naming the argument, what came and what would work.

    Example:
        >>> environment(["waad"], layers=[2, 3])
        {'ATTNSTATS_SGLANG': '{"statistics": [{"waad": {"window": 10}}], "layers": [2, 3], "heads": null,
        "reduce": ["layers", "heads"], "folder": null, "quota_mb": 1000}'}
    """
    _refuse_foreign(settings)
    given = named_settings(statistics, {"token_entropy": False, **settings}).to_json()
    return {VARIABLE: json.dumps({name: value for name, value in given.items() if name not in FOREIGN})}


def read(variable: str) -> RequestSettings:
    """The settings that the environment variable holds. Raises TypeError, ValueError: naming what is wrong."""
    try:
        given = json.loads(variable)
    except ValueError as error:
        raise ValueError(f'{VARIABLE} must hold JSON, such as {{"statistics": ["waad"]}}; {error}') from error
    if isinstance(given, Mapping):
        _refuse_foreign(given)
        given = {"token_entropy": False, **given}
    return RequestSettings.of(given)


# Settings that SGLang has no place for.
FOREIGN = {
    "keep_mb": "a record leaves with its response, or goes into a folder, and is not kept",
    "token_entropy": "the scheduler sees no hidden states",
}


def _refuse_foreign(given: Mapping[str, Any]) -> None:
    for name, reason in FOREIGN.items():
        if given.get(name, False) is not False:
            raise ValueError(f"{KEY}.{name} is no setting for SGLang: {reason}; leave it out")


def check_sglang() -> None:
    """Raise RuntimeError if this version of SGLang has moved what the plug-in wraps or reads."""
    if faults := faults_of(HOOKS):
        from sglang.version import __version__

        raise RuntimeError(
            f"attnstats can't record the attention of requests in SGLang {__version__}: {'; '.join(faults)}. "
            "docs/sglang.md has the version that it was written against"
        )


def check_server(scheduler: Any, settings: RequestSettings) -> None:
    """Raise ValueError for a setting of the server with which nothing can be recorded, before it loads a model."""
    from sglang.srt.environ import envs
    from sglang.srt.model_executor.cuda_graph_config import cuda_graph_fully_disabled
    from sglang.srt.runtime_context import get_disagg, get_parallel

    parallel, disaggregation = get_parallel(), get_disagg().disaggregation_mode
    _refuse(
        {
            "CUDA graphs": (
                not cuda_graph_fully_disabled(),
                "they replay attention without Python; set disable_cuda_graph=True "
                "(--cuda-graph-backend-decode=disabled --cuda-graph-backend-prefill=disabled)",
            ),
            "the overlap schedule": (
                scheduler.enable_overlap,
                "it runs one step too many of each request; set disable_overlap_schedule=True "
                "(--disable-overlap-schedule)",
            ),
            "speculative_algorithm": (
                not scheduler.spec_algorithm.is_none(),
                "drafts that are rejected can't be taken back; leave it out",
            ),
            "tp_size > 1": (parallel.tp_size > 1, "each rank has a part of the heads; use 1"),
            "pp_size > 1": (parallel.pp_size > 1, "each rank has a part of the layers; use 1"),
            "dp_size > 1 and a folder": (
                parallel.dp_size > 1 and settings.folder is not None,
                "a folder has one writer; leave it out, and read responses",
            ),
            f"disaggregation_mode={disaggregation!r}": (
                disaggregation != "null",
                "prompts and answers are computed by different servers; leave it out",
            ),
            "enable_pdmux": (scheduler.enable_pdmux, "a step's layers run in parts; leave it out"),
            "a model that does not generate": (not scheduler.is_generation, "serve it without statistics"),
            "SGLANG_RUST_SERVER without a folder": (
                bool(envs.SGLANG_RUST_SERVER.get()) and settings.folder is None,
                "its responses carry nothing of a plug-in; set folder",
            ),
        }
    )


def check_model(runner: Any) -> None:
    """Raise ValueError for a model, a cache or a backend of attention that can't be read."""
    pool = runner.token_to_kv_pool
    backends = {runner.prefill_attention_backend_str, runner.decode_attention_backend_str}
    _refuse(
        {
            f"attention_backend {', '.join(sorted(backends))}": (
                not backends <= set(BACKENDS),
                f"only plain attention can be recorded, by {', '.join(BACKENDS)}",
            ),
            f"a cache of {type(pool).__name__}": (
                type(pool).__name__ != "MHATokenToKVPool",
                "only that of plain attention in 16 or 32 bits can be read (MHATokenToKVPool), not that of latent "
                "attention (MLA), hybrid models or a unified pool; for sliding windows set "
                "disable_hybrid_swa_memory=True",
            ),
            "an encoder-decoder model": (runner.model_config.is_encoder_decoder, "serve it without statistics"),
        }
    )
    _refuse(
        {
            f"kv_cache_dtype {pool.dtype}": (
                pool.dtype != pool.store_dtype or pool.is_quantized_kv_cache,
                "quantized keys can't be read; leave it at 'auto'",
            ),
            f"a cache in the layout {pool.kv_cache_layout!r}": (
                pool.kv_cache_layout != "nhd",
                "keys must lie token by token; leave SGLANG_USE_HND_KVCACHE and its like out",
            ),
        }
    )


def attention_layers(model: Any) -> dict[int, Any]:
    """The layers of a model whose attention can be recorded, by number. Raises ValueError where there is none."""
    from sglang.srt.layers.radix_attention import RadixAttention

    layers: dict[int, Any] = {}
    for layer in model.modules():
        if type(layer) is RadixAttention and _is_plain(layer):
            if layer.layer_id in layers:
                raise ValueError(f"{KEY}: several layers attend to the keys of layer {layer.layer_id}; not recorded")
            layers[layer.layer_id] = layer
    if not layers:
        raise ValueError(f"{KEY}: {type(model).__name__} has no attention that can be recorded")
    return layers


def _is_plain(layer: Any) -> bool:
    """True if a query sees the keys up to its own, or those within a window, and scores have no biases of their own."""
    return (
        layer.attn_type.name == "DECODER"
        and not layer.is_cross_attention
        and not layer.use_irope  # chunks
        and layer.pos_encoding_mode == "NONE"
        and layer.logit_capping_method == "tanh"
        and (layer.xai_temperature_len or -1) <= 0
    )


def _refuse(refused: Mapping[str, tuple[bool, str]]) -> None:
    faults = [f"{what}: {remedy}" for what, (is_so, remedy) in refused.items() if is_so]
    if faults:
        raise ValueError(f"{VARIABLE} can't be used with {'; '.join(faults)}")
