"""vLLM's worker, whose engine records attention statistics: `worker_cls` of an engine with settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import vllm
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform
from vllm.utils.import_utils import resolve_obj_by_qualname

from attnstats.integrations.vllm.configuration import KEY, RequestSettings, check_engine, check_vllm, requested
from attnstats.integrations.vllm.recorder import Recorder, State
from attnstats.integrations.vllm.records import Model

log = init_logger("vllm.attnstats")  # below vLLM's own, which alone has a handler

# As each platform chooses for worker_cls="auto".
WORKERS = {"cpu": "vllm.v1.worker.cpu_worker.CPUWorker"}
Worker: Any = resolve_obj_by_qualname(WORKERS.get(current_platform.device_type, "vllm.v1.worker.gpu_worker.Worker"))


class StatisticsWorker(Worker):
    """The platform's worker, which tells its recorder of each step."""

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any):
        check_vllm(vllm_config.device_config.device_type)
        given = requested(vllm_config)
        if given is None:
            raise ValueError(
                f"worker_cls: this worker needs additional_config[{KEY!r}]; leave both out, or see "
                "attnstats.integrations.vllm.engine_arguments"
            )
        self._settings = RequestSettings.of(given)
        check_engine(vllm_config, self._settings)
        super().__init__(vllm_config, *args, **kwargs)
        # Pipeline and data parallelism are refused.
        self._settings = self._settings.of_rank(self.rank, vllm_config.parallel_config.tensor_parallel_size)
        self._recorder: Recorder | None = None

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        present = attention_layers(self.vllm_config, self.model_runner.get_model())
        counts = {layer.impl.num_heads for layer in present.values()}
        count = counts.pop() if len(counts) == 1 else None
        layers, heads = self._settings.chosen(tuple(sorted(present)), count)
        watched = {number: present[number] for number in layers}
        config = self.vllm_config.model_config
        name = Path(config.model).name if Path(config.model).is_dir() else config.model
        tokenizer = str(Path(config.tokenizer).absolute()) if Path(config.tokenizer).is_dir() else config.tokenizer
        model = Model(name, tokenizer, str(config.dtype).removeprefix("torch."), f"vLLM {vllm.__version__}")
        self._recorder = Recorder(self._settings, watched, heads, self.model_runner, model)
        log.info(self._recorder.memory(config.max_model_len, self.vllm_config.scheduler_config.max_num_seqs))

    def execute_model(self, scheduler_output: Any) -> Any:
        assert self._recorder is not None
        self._recorder.begin(scheduler_output)
        return super().execute_model(scheduler_output)

    def sample_tokens(self, grammar_output: Any) -> Any:
        assert self._recorder is not None
        try:
            return super().sample_tokens(grammar_output)
        finally:
            self._recorder.end()

    def shutdown(self) -> None:
        # The worker hears that a request ended with the next step, which the last ones don't have.
        recorder, self._recorder = getattr(self, "_recorder", None), None
        if recorder is not None:
            recorder.close()
        super().shutdown()

    def attnstats_fetch(self, request_id: str, index: int, prompt: list[int], output: list[int]) -> bytes:
        """For `collective_rpc`: the record of a request."""
        assert self._recorder is not None
        return self._recorder.fetch(request_id, index, prompt, output)

    def attnstats_look_up(self, request_id: str, index: int) -> tuple[State, bytes]:
        """For `collective_rpc`: the record of a request, which is kept."""
        assert self._recorder is not None
        return self._recorder.look_up(request_id, index)

    def attnstats_kept(self) -> tuple[list[str], list[str]]:
        """For `collective_rpc`: the ids of requests, finished and running."""
        assert self._recorder is not None
        return self._recorder.kept()


def attention_layers(vllm_config: Any, model: Any) -> dict[int, Any]:
    """The layers of the model whose attention can be recorded, by number. Raises ValueError where there is none."""
    layers, of_model = {}, set(model.modules())  # beside them the engine has those of a model that drafts
    for name, layer in vllm_config.compilation_config.static_forward_context.items():
        if type(layer) is Attention and hasattr(layer.impl, "watch") and layer in of_model:
            if layer.impl.alibi_slopes is not None:
                raise ValueError(f"{KEY}: {name} has position biases (ALiBi), of which statistics can't be computed")
            layers[extract_layer_index(name)] = layer
    if not layers:
        raise ValueError(f"{KEY}: {vllm_config.model_config.architecture} has no attention that can be recorded")
    return layers
