"""The entry point `vllm.general_plugins`, which vLLM loads in each of its processes."""

from __future__ import annotations


def register() -> None:
    """Register the backend that can be watched: on CPUs as vLLM's own, on GPUs as CUSTOM, which is chosen by name.

    Without settings it makes vLLM's own layers.
    """
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    if current_platform.is_cpu():
        register_backend(AttentionBackendEnum.CPU_ATTN, "attnstats.integrations.vllm.cpu.WatchedBackend")
    elif current_platform.is_cuda() and not AttentionBackendEnum.CUSTOM.is_overridden():  # nor another plug-in's
        register_backend(AttentionBackendEnum.CUSTOM, "attnstats.integrations.vllm.cuda.WatchedFlashBackend")
