"""Responses by vLLM's engine, which batches whatever prompts are waiting: token ids in, token ids out.

vLLM draws the tokens and nothing else: what is read of a response is read by the model of transformers. So the engine
is given the same weights in the same dtype, and every setting that would change the distribution is off.
"""

from __future__ import annotations

import inspect
import json
import os
import random
import tempfile
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from attnstats.errors import InputError
from attnstats.study.chat import brief
from attnstats.study.generation import Sampling, end_tokens, seed_at, without_own_settings
from attnstats.study.models import LoadedModel
from attnstats.study.text import shortened

OPTION, ARGUMENTS = "--engine vllm", "--engine-args"
COLDEST = 0.01  # vLLM takes this for any lower temperature above 0
HOTTEST = 2.0  # vLLM refuses a higher temperature, once a model is loaded
# What an analysis decides. With a processor of logits the tokens would not be drawn from the model's distribution.
OURS = (
    "model",
    "tokenizer",
    "dtype",
    "generation_config",
    "skip_tokenizer_init",
    "trust_remote_code",
    "logits_processors",
    "max_model_len",
)
# What says how much memory vLLM takes, and no token: a run that had too little goes on with more.
MEMORY = ("gpu_memory_utilization", "kv_cache_memory_bytes", "max_num_seqs", "max_num_batched_tokens", "cpu_offload_gb")
# The engine runs in this process, so that it ends with it; its log would stand between our lines.
ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}


@dataclass(frozen=True)
class VllmEngine:
    """An engine of vLLM, which is started when there is something to generate.

    Attributes:
        version: vLLM's. arguments: for `vllm.LLM`, beside those that an analysis decides.
    """

    version: str
    arguments: Mapping[str, Any]

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the responses, for the identity of a run."""
        deciding = {name: value for name, value in self.arguments.items() if name not in MEMORY}
        return {"engine": f"vllm {self.version}", "engine_arguments": deciding}

    def responses(
        self,
        loaded: LoadedModel,
        prompts: Mapping[int, list[int]],
        sampling: Sampling,
        advance: Callable[[int], None] = lambda tokens: None,
    ) -> Generator[tuple[int, list[int]], None, None]:
        """The number of each prompt and its response, in the order in which they end, while others go on.

        The seed of a prompt follows from its number: it is drawn the same random numbers whatever runs beside it.

        Args:
            prompts: token ids by number, one at least.
            advance: called with the number of tokens that a step made.

        Raises:
            InputError: vLLM doesn't take the model or an argument, or it fails.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        longest = max(map(len, prompts.values())) + sampling.max_tokens
        responses: dict[int, list[int]] = {index: [] for index in prompts}
        with _one_line(), _weights(loaded) as folder, _started(folder, loaded, longest, self.arguments) as engine:
            for index, prompt in prompts.items():
                how = SamplingParams(
                    max_tokens=sampling.max_tokens,
                    temperature=sampling.temperature,
                    seed=seed_at(sampling.seed, index) % 2**63 if sampling.temperature else None,
                    stop_token_ids=sorted(end_tokens(loaded)),
                    ignore_eos=True,  # vLLM's own idea of it, beside those
                    detokenize=False,
                    output_kind=RequestOutputKind.DELTA,
                )
                engine.add_request(str(index), {"prompt_token_ids": prompt}, how)
            while engine.has_unfinished_requests():
                for output in engine.step():
                    index, tokens = int(output.request_id), output.outputs[0].token_ids
                    responses[index] += tokens
                    advance(len(tokens))
                    if output.finished:
                        yield index, responses.pop(index)


def choose(arguments: str | Mapping[str, Any] | None, sampling: Sampling) -> VllmEngine:
    """The engine with these arguments, in JSON or not, checked as far as that needs no model. Raises InputError."""
    with _environment():
        try:
            import vllm
            from vllm.engine.arg_utils import EngineArgs
        except ImportError as error:
            what = f"{error.name or 'vllm'} is not installed" if isinstance(error, ModuleNotFoundError) else str(error)
            raise InputError(
                f"{OPTION}: {what}; run: pip install 'attnstats[vllm]' (for CPUs), or pip install vllm (for GPUs)"
            ) from error
    chosen = _parsed(arguments)
    for name in chosen:
        if name in OURS:
            raise InputError(f"{ARGUMENTS}: {name} is decided by --model, --dtype and what is measured; leave it out")
        if name not in inspect.signature(EngineArgs).parameters:
            raise InputError(f"{ARGUMENTS}: vLLM {vllm.__version__} has no argument {brief(name)}")
    if 0 < sampling.temperature < COLDEST:
        raise InputError(
            f"--temperature {sampling.temperature}: vLLM would draw at {COLDEST}; use 0 (greedy), {COLDEST} or more"
        )
    if sampling.temperature > HOTTEST:
        raise InputError(f"--temperature {sampling.temperature}: vLLM takes {HOTTEST:g} at most; leave {OPTION} out")
    return VllmEngine(vllm.__version__, chosen)


def _parsed(arguments: str | Mapping[str, Any] | None) -> dict[str, Any]:
    try:
        chosen = json.loads(arguments) if isinstance(arguments, str) else dict(arguments or {})
        if isinstance(chosen, dict):
            return json.loads(json.dumps(chosen))
    except (TypeError, ValueError):
        pass
    raise InputError(
        f"{ARGUMENTS} {brief(arguments)}: needs a JSON object with arguments of vllm.LLM, such as "
        """'{"gpu_memory_utilization": 0.5}'"""
    )


@contextmanager
def _one_line() -> Iterator[None]:
    """Inside the `with` every exception is an InputError; the part of vLLM that fails decides its class."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        message = shortened(" ".join(str(error).split()), 600) or type(error).__name__
        raise InputError(f"{OPTION}: {message} ({ARGUMENTS} sets arguments of vllm.LLM)") from error


@contextmanager
def _weights(loaded: LoadedModel) -> Iterator[str]:
    """A folder with the model's weights: its own, or one that is written, where they are in none as they are here."""
    if loaded.source is not None:
        from transformers.utils.hub import cached_file

        # The snapshot that was loaded. vLLM would ask the hub for a newer one.
        yield str(Path(str(cached_file(loaded.source, "config.json", local_files_only=True))).parent)
        return
    with tempfile.TemporaryDirectory(prefix="attnstats-") as folder:
        try:
            with without_own_settings(loaded.model):  # saving refuses some settings of sampling
                loaded.model.save_pretrained(folder)
        except OSError as error:
            raise InputError(f"{OPTION}: {error}; TMPDIR must have room for the model's weights") from error
        yield folder


@contextmanager
def _started(folder: str, loaded: LoadedModel, longest: int, arguments: Mapping[str, Any]) -> Iterator[Any]:
    """The engine of a model; afterwards its memory is free again, and this process as it was."""
    set_num_threads = torch.set_num_threads
    with _environment():
        from vllm import LLM
        from vllm.platforms import current_platform

        # On CPUs compiling takes a minute, and vLLM's default is nearly all memory. A prompt with a seed of its own
        # can't be read in chunks: vLLM 0.32 takes back an offset of its generator, and that of a CPU has none.
        own = (
            {"enforce_eager": True, "kv_cache_memory_bytes": 4 * 2**30, "enable_chunked_prefill": False}
            | {"max_num_batched_tokens": max(longest, 4096)}
            if current_platform.is_cpu()
            else {"gpu_memory_utilization": 0.5}
        )
        try:
            with _random_numbers_kept(loaded.device), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of what vLLM's own code uses
                engine = LLM(
                    model=folder,
                    dtype=loaded.dtype,
                    generation_config="vllm",
                    skip_tokenizer_init=True,
                    max_model_len=longest,
                    **{"use_tqdm_on_load": False, **own, **arguments},
                ).llm_engine
        finally:
            torch.set_num_threads = set_num_threads  # vLLM's worker on a CPU takes it away
    try:
        yield engine
    finally:
        engine.engine_core.shutdown()


@contextmanager
def _environment() -> Iterator[None]:
    """Inside the `with` vLLM's variables are set that the user has not set."""
    ours = ENVIRONMENT.keys() - os.environ.keys()
    os.environ.update({name: ENVIRONMENT[name] for name in ours})
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name, None)


@contextmanager
def _random_numbers_kept(device: torch.device) -> Iterator[None]:
    """vLLM seeds every generator when it starts; afterwards they are as before."""
    before, of_numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 the one that vLLM seeds
    with torch.random.fork_rng([] if device.type == "cpu" else [device.index or 0]):
        try:
            yield
        finally:
            random.setstate(before)
            np.random.set_state(of_numpy)  # noqa: NPY002
