"""The entry point `vllm.general_plugins`, which vLLM loads in each of its processes."""

from __future__ import annotations


def register() -> None:
    """Put the backend that can be watched in the place of vLLM's own; without settings it makes vLLM's own layers."""
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    if current_platform.is_cpu():
        register_backend(AttentionBackendEnum.CPU_ATTN, "attnstats.integrations.vllm.cpu.WatchedBackend")
