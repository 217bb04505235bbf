"""A platform of verl's that is a CPU, and a rollout by transformers' generate: VERL_USE_EXTERNAL_MODULES=this module.

Everything else in a run is verl's own. verl has no CPU platform, and its rollouts are servers of vLLM or SGLang.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from typing import Any

import ray
import torch
from transformers import AutoModelForTokenClassification
from verl.plugin.platform import PlatformBase, PlatformRegistry
from verl.workers.rollout import base
from verl.workers.rollout.base import BaseRollout
from verl.workers.rollout.replica import RolloutReplica, RolloutReplicaRegistry, TokenOutput


class Device:
    """torch.cpu with the calls that verl makes of a device's module."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cpu, name)

    def __none(self, *_: Any, **__: Any) -> None: ...

    empty_cache = ipc_collect = reset_peak_memory_stats = set_device = synchronize = __none

    def __zero(self, *_: Any) -> int:
        return 0

    max_memory_allocated = max_memory_reserved = memory_allocated = memory_reserved = __zero

    def mem_get_info(self, *_: Any) -> tuple[int, int]:
        return 1 << 34, 1 << 34

    def get_rng_state(self, *_: Any) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, *_: Any) -> None:
        torch.set_rng_state(state)

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    def current_device(self) -> str:
        return "cpu"

    def device_count(self) -> int:
        return 1

    def is_available(self) -> bool:
        return True

    def get_device_name(self, *_: Any) -> str:
        return "cpu"


@PlatformRegistry.register(platform="cpu")
class PlatformCPU(PlatformBase):
    device_name = vendor_name = "cpu"
    device_module = Device()

    def is_available(self) -> bool:
        return True

    def current_device(self) -> str:
        return "cpu"

    def device_count(self) -> int:
        return 1

    def __nothing(self, *_: Any) -> None: ...

    set_device = synchronize = set_allocator_settings = empty_cache = __nothing
    profiler_start = profiler_stop = cudart = __nothing

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    def get_device_capability(self, device_id: int = 0) -> tuple[None, None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"

    def nvtx_range(self, message: str) -> Any:
        return nullcontext()

    def ray_resource_name(self) -> str:
        return "GPU"

    def ray_noset_envvars(self) -> list[str]:
        return []

    def ray_resource_options(self, count: float) -> dict[str, float]:
        return {"num_gpus": count}

    def is_ipc_supported(self) -> bool:
        return False


# verl's own engines, as they are: for stock runs, references and critics. Imported once there is a platform.
from verl.workers.engine import EngineRegistry  # noqa: E402
from verl.workers.engine.fsdp import transformer_impl  # noqa: E402
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead, FSDPEngineWithValueHead  # noqa: E402

for _model, _engine in (("language_model", FSDPEngineWithLMHead), ("value_model", FSDPEngineWithValueHead)):
    EngineRegistry.register(model_type=_model, backend=["fsdp", "fsdp2"], device="cpu")(_engine)

# A reference's parameters are offloaded to pinned memory, which a machine without a GPU doesn't have.
transformer_impl.CPUOffloadPolicy = lambda pin_memory: torch.distributed.fsdp.CPUOffloadPolicy(pin_memory=False)

# A value function's model is loaded with FlashAttention 2, whatever its settings say.
_load = AutoModelForTokenClassification.from_pretrained
setattr(  # noqa: B010
    AutoModelForTokenClassification,
    "from_pretrained",
    lambda *args, **kwargs: _load(*args, **kwargs | {"attn_implementation": "sdpa"}),
)

_initialise = torch.distributed.init_process_group


def _init_process_group(backend: Any = None, *args: Any, **kwargs: Any) -> None:
    # verl asks for a backend of the CPU and one of the device, which is the CPU here.
    return _initialise("cpu:gloo" if backend == "cpu:gloo,cpu:gloo" else backend, *args, **kwargs)


torch.distributed.init_process_group = _init_process_group


@ray.remote(num_cpus=0.1)
class Server:
    """Answers by `generate`, seeded with the prompt, the step and how often it was asked, so that runs are the same."""

    def __init__(self, path: str):
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(1)
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self.step = 0
        self.asked: dict[tuple[int, ...], int] = {}

    async def generate(self, request_id: str, prompt_ids: list[int], sampling_params: dict[str, Any], **_: Any) -> Any:
        length = sampling_params.get("max_tokens") or sampling_params.get("max_new_tokens") or 32
        ids = torch.tensor([prompt_ids])
        key = self.step or 0, *prompt_ids
        self.asked[key] = self.asked.get(key, 0) + 1
        torch.manual_seed(hash((*key, self.asked[key])))
        with torch.no_grad():
            out = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                top_k=0,
                max_new_tokens=length,
                output_logits=True,
                return_dict_in_generate=True,
            )
        new = out.sequences[0, ids.shape[1] :]
        logprobs = [logits[0].log_softmax(-1)[token].item() for logits, token in zip(out.logits, new, strict=True)]
        fields = {"global_steps": self.step}
        return TokenOutput(token_ids=new.tolist(), log_probs=logprobs, stop_reason="completed", extra_fields=fields)

    async def load(self, state: dict[str, torch.Tensor], step: int) -> None:
        self.model.load_state_dict(state, strict=False)
        self.step = step

    async def set_global_steps(self, step: int) -> None:
        self.step = step

    async def wake_up(self, *_: Any, **__: Any) -> None: ...

    async def sleep(self, *_: Any, **__: Any) -> None: ...

    async def abort_all_requests(self, **_: Any) -> None: ...

    async def resume_generation(self) -> None: ...

    async def clear_kv_cache(self) -> None: ...

    async def release_kv_cache(self) -> None: ...

    async def resume_kv_cache(self) -> None: ...


class Adapter(BaseRollout):
    """Brings the actor's weights to the server."""

    async def resume(self, tags: Any) -> None: ...

    async def release(self) -> None: ...

    async def update_weights(self, weights: Any, global_steps: int | None = None, **_: Any) -> None:
        state = {name: tensor.detach().cpu().clone() for name, tensor in weights}
        rank = int(os.environ.get("RANK", "0"))
        await ray.get_actor(f"server_{rank}").load.remote(state, global_steps)


class Replica(RolloutReplica):
    async def launch_servers(self) -> None:
        config = self.model_config
        path = config.local_path if hasattr(config, "local_path") else config["path"]
        server: Any = Server
        server = server.options(name=f"server_{self.replica_rank}", max_concurrency=1).remote(path)
        await server.resume_generation.remote()
        self.servers, self._server_handle, self._server_address = [server], server, f"server-{self.replica_rank}"


base._ROLLOUT_REGISTRY["hf", "async"] = f"{__name__}.Adapter"
RolloutReplicaRegistry.register("hf", lambda: Replica)
