"""The entry point `sglang.srt.plugins`, which SGLang loads in each of its processes."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from attnstats.integrations.hooks import Hook
from attnstats.integrations.sglang.configuration import (
    VARIABLE,
    WRAPPED,
    attention_layers,
    check_model,
    check_server,
    check_sglang,
    read,
)
from attnstats.integrations.sglang.recorder import SchedulerRecorder
from attnstats.integrations.vllm.configuration import RequestSettings
from attnstats.integrations.vllm.records import Model


def register() -> None:
    """Put the plug-in's code around SGLang's scheduler; without settings in the environment nothing.

    Raises:
        SystemExit: settings are wrong, or SGLang has moved something. Of any other error SGLang would write a line and
            go on without statistics.
    """
    variable = os.environ.get(VARIABLE)
    if not variable:
        return
    try:
        settings = read(variable)
        check_sglang()
    except (RuntimeError, TypeError, ValueError) as error:
        raise SystemExit(f"attnstats: {error}") from error
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    wrappers = Wrappers(settings)
    for hook in WRAPPED:
        HookRegistry.register(_name(hook), getattr(wrappers, hook.method), HookType.AROUND)


def _name(hook: Hook) -> str:
    return f"{hook.module}.{hook.cls}.{hook.method}"


class Wrappers:
    """Code around methods of SGLang's scheduler, each by its name."""

    def __init__(self, settings: RequestSettings):
        self._settings = settings
        self._recorder: SchedulerRecorder | None = None

    def init_model_worker(self, original: Callable[..., Any], scheduler: Any) -> Any:
        """Choose layers once the model is there."""
        check_server(scheduler, self._settings)
        result = original(scheduler)
        runner = scheduler.tp_worker.model_runner
        check_model(runner)
        present = attention_layers(runner.model)
        counts = {layer.tp_q_head_num for layer in present.values()}
        layers, heads = self._settings.chosen(tuple(sorted(present)), counts.pop() if len(counts) == 1 else None)
        watched = {number: present[number] for number in layers}
        self._recorder = SchedulerRecorder(self._settings, watched, heads, runner, _model(runner))
        return result

    def run_batch(self, original: Callable[..., Any], scheduler: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        """Tell the recorder of each step."""
        assert self._recorder is not None
        self._recorder.begin(batch)
        try:
            return original(scheduler, batch, *args, **kwargs)
        finally:
            self._recorder.end()

    def stream_output(
        self,
        original: Callable[..., Any],
        streamer: Any,
        reqs: Any,
        return_logprob: Any,
        skip_req: Any = None,
    ) -> Any:
        """Have responses carry the records of requests that are finished."""
        if self._recorder is not None:
            self._recorder.send(reqs, skip_req)
        return original(streamer, reqs, return_logprob, skip_req)


def _model(runner: Any) -> Model:
    from sglang.srt.runtime_context import get_model, get_serving
    from sglang.version import __version__

    tokenizer = get_serving().tokenizer_path or ""
    tokenizer = str(Path(tokenizer).absolute()) if tokenizer and Path(tokenizer).is_dir() else tokenizer
    return Model(get_model().model_path, tokenizer, str(runner.dtype).removeprefix("torch."), f"SGLang {__version__}")
