"""The settings of a vLLM engine, its `additional_config["attnstats"]`, and what can't be recorded, refused by name.

`RequestSettings.of` reads what a command line or JSON holds; `engine_arguments` is the same from Python, checked before
an engine starts. Nothing here imports vLLM but `check_vllm`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import torch

from attnstats.heads import RECEIVED, HeadProfile
from attnstats.integrations.hooks import Hook, faults_of
from attnstats.presets import PRESETS
from attnstats.statistics import CATALOGUE, FAI, WAAD, MeanDistance, SegmentMass, Statistic, resolve
from attnstats.transformers.live import most_tokens
from attnstats.transformers.selection import (
    ChosenHeads,
    HeadSelection,
    Reduce,
    check_heads,
    resolve_heads,
    resolve_layers,
    resolve_reduce,
)

KEY = "attnstats"  # in additional_config, and in the extra_args of a request's SamplingParams
WORKER = "attnstats.integrations.vllm.worker.StatisticsWorker"
OF_RANK = "rank-{}-of-{}"  # a folder below that of a RequestStore, of a tensor-parallel worker
HEADS_OF = {"waad": "local", "fai": "global_"}  # the classes of the paper (Sec. 4.1)

RUNNER = "vllm.v1.worker.gpu_model_runner", "GPUModelRunner"
HOOKS = (
    Hook("vllm.v1.worker.gpu_worker", "Worker", "load_model"),
    Hook("vllm.v1.worker.gpu_worker", "Worker", "execute_model", ("scheduler_output",)),
    Hook("vllm.v1.worker.gpu_worker", "Worker", "sample_tokens", ("grammar_output",)),
    Hook(*RUNNER, "execute_model", ("scheduler_output",)),
    Hook(*RUNNER, "_update_states", ("scheduler_output",)),
    Hook(*RUNNER, "get_model"),
    Hook(
        "vllm.v1.attention.backend",
        "AttentionImpl",
        "forward",
        ("layer", "query", "key", "value", "kv_cache", "attn_metadata", "output"),
    ),
)
FLASH = "vllm.v1.attention.backends.flash_attn"
HOOKS_OF = {
    "cuda": (
        Hook(
            FLASH,
            "FlashAttentionImpl",
            "forward",
            ("layer", "query", "key", "value", "kv_cache", "attn_metadata", "output"),
        ),
        Hook(FLASH, "FlashAttentionBackend", "get_impl_cls"),
        Hook(FLASH, "FlashAttentionBackend", "get_builder_cls"),
        Hook(FLASH, "FlashAttentionMetadataBuilder", "get_cudagraph_support", ("vllm_config", "kv_cache_spec")),
        Hook(
            FLASH,
            "FlashAttentionMetadata",
            "__init__",
            ("num_actual_tokens", "max_query_len", "query_start_loc", "max_seq_len", "seq_lens", "block_table"),
        ),
    )
}
# On GPUs: the backend that the plug-in registers, and the scheduler that knows the tokens of the steps before.
ON_CUDA = {"attention_backend": "CUSTOM", "async_scheduling": False}


@dataclass(frozen=True)
class RequestSettings:
    """What an engine records of every request.

    Attributes:
        statistics: those of `attnstats.capture(live=True)`.
        layers, heads, reduce: as for `attnstats.capture`, layers no slice. heads may also be {"profile": FILE, "share":
            0.3}: WAAD of the local heads of a head profile, FAI of the global ones, other statistics of all heads.
        token_entropy: the entropy of the distribution that each token was drawn from is recorded, too, by one more
            product with the output embedding for every token.
        keep_mb: the memory in each worker for the records of finished requests that nobody has fetched yet; the oldest
            go first. 0 keeps none, as where a folder alone is read.
        folder: where finished requests are written, too, as a `RequestStore` reads them; None: nowhere.
        quota_mb: how large the folder may become.
    """

    statistics: tuple[Statistic, ...]
    layers: Literal["middle-third", "all"] | Iterable[int] = "middle-third"
    heads: Any = None
    reduce: tuple[Reduce, ...] = ("layers", "heads")
    token_entropy: bool = False
    keep_mb: float = 256
    folder: str | None = None
    quota_mb: float = 1000

    @classmethod
    def of(cls, given: Any) -> RequestSettings:
        """The settings that a dict holds; a preset in it stands for those of `preset`, but for the ones beside it.

        Raises:
            TypeError, ValueError: naming the key, what came and what would work.

        Example:
            >>> RequestSettings.of({"statistics": ["waad", {"fai": {"lo": 10, "hi": 50}}], "layers": [2]}).statistics
            (WAAD(window=10), FAI(lo=10, hi=50))
            >>> RequestSettings.of({"statistic": ["waad"]})
            Traceback (most recent call last):
            ValueError: attnstats has no setting statistic; it has preset, statistics, layers, heads, reduce,
            token_entropy, keep_mb, folder, quota_mb
        """
        if not isinstance(given, Mapping):
            raise TypeError(f'{KEY}: must have settings by name, such as {{"statistics": ["waad"]}}; got {given!r}')
        names = ["preset", *(field.name for field in dataclasses.fields(cls))]
        if wrong := [str(name) for name in given if name not in names]:
            raise ValueError(f"{KEY} has no setting {', '.join(wrong)}; it has {', '.join(names)}")
        own = {name: value for name, value in given.items() if name != "preset"}
        if "statistics" not in given and given.get("preset") is None:
            raise ValueError(
                f'{KEY}.statistics is missing; name what to record, such as ["waad", "fai"], or a preset, such as '
                '"paper_v2"'
            )
        try:
            return cls(**(own if given.get("preset") is None else of_preset(given["preset"]) | own))
        except (TypeError, ValueError) as error:
            raise type(error)(f"{KEY}: {error}") from error

    def __post_init__(self) -> None:
        object.__setattr__(self, "statistics", _statistics(self.statistics))
        object.__setattr__(self, "reduce", resolve_reduce(self.reduce))
        if not self.statistics:
            raise ValueError("statistics is empty; name what to record, such as ['waad', 'fai']")
        for s in self.statistics:
            if not s.grows:
                raise ValueError(f"statistics: {s} depends on where the sequence ends, so it cannot be kept up to date")
            if s == SegmentMass():
                raise ValueError("statistics: SegmentMass needs boundaries here, the same ones for every request")
            if self.reduce and not s.averages:
                raise ValueError(f"reduce: {s} names keys, of which there is no mean; set reduce=[]")
        if isinstance(self.layers, slice):
            raise TypeError(f"layers must be 'middle-third', 'all' or a list of layer numbers, got {self.layers}")
        if not isinstance(self.token_entropy, bool):
            raise TypeError(f"token_entropy must be True or False, got {self.token_entropy!r}")
        for name, size in (("keep_mb", self.keep_mb), ("quota_mb", self.quota_mb)):
            if not isinstance(size, (int, float)) or isinstance(size, bool) or not size >= 0:
                raise ValueError(f"{name} must be a number of megabytes, 0 or more; got {size!r}")
        if self.folder is not None and not isinstance(self.folder, str):
            raise TypeError(f"folder must be a path as text, or None; got {self.folder!r}")

    def chosen(self, present: tuple[int, ...], count: int | None) -> tuple[tuple[int, ...], ChosenHeads]:
        """The layers, among those present, and the heads, of `count` in a layer, that are recorded.

        Raises TypeError, ValueError.
        """
        try:
            layers = resolve_layers(self.layers, present)
            heads = resolve_heads(self._head_selection(layers), self.statistics, layers, count)
            check_heads(heads, layers, self.reduce)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{KEY}: {error}") from error
        return layers, heads

    def of_rank(self, rank: int, ranks: int) -> RequestSettings:
        """Those of one of several workers: each writes into a folder of its own, with a share of the quota."""
        if self.folder is None or ranks == 1:
            return self
        folder = str(Path(self.folder) / OF_RANK.format(rank, ranks))
        return dataclasses.replace(self, folder=folder, quota_mb=self.quota_mb / ranks)

    def to_json(self) -> dict[str, Any]:
        """What `of` reads the same settings from."""
        return {
            "statistics": [described(s) for s in self.statistics],
            "layers": self.layers if isinstance(self.layers, str) else list(self.layers),
            "heads": self.heads,
            "reduce": list(self.reduce),
            "token_entropy": self.token_entropy,
            "keep_mb": self.keep_mb,
            "folder": self.folder,
            "quota_mb": self.quota_mb,
        }

    def _head_selection(self, layers: tuple[int, ...]) -> HeadSelection | Mapping[Any, HeadSelection] | None:
        heads = self.heads
        if not isinstance(heads, Mapping):
            return heads
        if "profile" not in heads:
            return {name: _by_layer(chosen) for name, chosen in _by_layer(heads).items()}
        if wrong := set(heads) - {"profile", "share"}:
            raise ValueError(f"heads: a profile takes a share, not {', '.join(map(str, wrong))}")
        classes = HeadProfile.load(Path(heads["profile"])).classes(heads.get("share", 0.30), layers).of(layers)
        chosen = {s.name: getattr(classes, HEADS_OF[s.name]) for s in self.statistics if s.name in HEADS_OF}
        if not chosen:
            raise ValueError("heads: a profile says which heads WAAD and FAI are of, and neither is recorded")
        return chosen


def of_preset(name: Any) -> dict[str, Any]:
    """The settings that record what `attnstats report` and `attnstats couplings` need of a request, of every head.

    Args:
        name: of a preset of `attnstats.presets`, whose window, horizon and layers they have.

    Example:
        >>> of_preset("paper_v2")["statistics"]
        [WAAD(window=10), FAI(lo=10, hi=100), FAI(lo=0, hi=None), FAI(lo=4, hi=None), MeanDistance()]
    """
    if not isinstance(name, str) or name not in PRESETS:
        raise ValueError(f"preset {name!r}: no such preset; there are {', '.join(PRESETS)}")
    preset = PRESETS[name]
    statistics = [WAAD(preset.window), FAI(preset.fai_lo, preset.fai_hi), FAI(0, None), RECEIVED, MeanDistance()]
    return {"statistics": statistics, "layers": preset.layers, "reduce": (), "token_entropy": True}


def engine_arguments(statistics: Iterable[Statistic | str] | None = None, **settings: Any) -> dict[str, Any]:
    """The keyword arguments of `vllm.LLM`, and of its `EngineArgs`, that record statistics of every request.

    Args:
        statistics: as for `attnstats.capture(live=True)`; None: those of a preset.
        settings: preset, layers, heads, reduce, token_entropy, keep_mb, folder and quota_mb, as docs/vllm.md has them.

    Raises:
        TypeError, ValueError: naming the argument, what came and what would work.

    Example:
        >>> engine_arguments(["waad"], layers=[2, 3])["additional_config"]["attnstats"]["statistics"]
        [{'waad': {'window': 10}}]
    """
    of_engine = named_settings(statistics, settings)
    arguments = {"worker_cls": WORKER, "additional_config": {KEY: of_engine.to_json()}}
    return arguments | ON_CUDA if torch.version.cuda else arguments


def named_settings(statistics: Iterable[Statistic | str] | None, settings: dict[str, Any]) -> RequestSettings:
    """The settings that a user names in Python, with the folder as an absolute path. Raises TypeError, ValueError."""
    given = settings if statistics is None else {"statistics": statistics, **settings}
    if isinstance(given.get("folder"), PathLike):
        given = given | {"folder": str(Path(given["folder"]))}
    of_engine = RequestSettings.of(given)
    if of_engine.folder is not None:
        of_engine = dataclasses.replace(of_engine, folder=str(Path(of_engine.folder).absolute()))
    return of_engine


def requested(vllm_config: Any) -> Any:
    """What an engine's configuration says of statistics; None: nothing."""
    given = vllm_config.additional_config
    return given.get(KEY) if isinstance(given, Mapping) else None


def is_recorded(vllm_config: Any) -> bool:
    """True for the model of an engine with settings, and not for one that drafts for it.

    Raises:
        ValueError: another worker runs the engine than the one that records.
    """
    drafts = vllm_config.speculative_config
    is_of_drafts = (
        getattr(drafts, "method", None) == "draft_model" and vllm_config.model_config is drafts.draft_model_config
    )
    if requested(vllm_config) is None or is_of_drafts:
        return False
    if (worker := vllm_config.parallel_config.worker_cls) != WORKER:
        raise ValueError(
            f"additional_config[{KEY!r}] needs worker_cls={WORKER!r}; "
            f"got {worker!r}. attnstats.integrations.vllm.engine_arguments has both settings"
        )
    return True


def bytes_per_token(settings: RequestSettings, head_counts: Mapping[Statistic, Mapping[int, int]]) -> int:
    """What a running request holds for each token: a float32 for each number, and whether its query and its key count.

    Args:
        head_counts: of each statistic and layer how many heads are recorded.

    Example:
        >>> settings = RequestSettings.of({"statistics": ["waad", "fai"], "reduce": ["heads"]})
        >>> bytes_per_token(settings, {s: {3: 9, 4: 9, 5: 9} for s in settings.statistics})
        26
    """
    numbers = int(settings.token_entropy)
    for s in settings.statistics:
        of_layers = [1 if "heads" in settings.reduce else count for count in head_counts[s].values()]
        numbers += (of_layers[0] if "layers" in settings.reduce else sum(of_layers)) * math.prod(s.shape(1, 1))
    return 4 * numbers + 2


def described_memory(settings: RequestSettings, per_token: int, tokens: int, requests: int) -> str:
    """The memory for that many requests of that many tokens, as a worker logs it before the first one.

    Example:
        >>> described_memory(RequestSettings.of({"statistics": ["waad", "fai"]}), 10, 4096, 16)
        'attnstats: WAAD(window=10), FAI(lo=10, hi=100): 10 bytes for each token of a running request and up to 20 while
        it grows, at most 1.31 MB for 16 requests of 4096 tokens; records of finished ones that nobody has fetched take
        256 MB at most'
    """
    most = requests * per_token * most_tokens(tokens) / 1e6
    return (
        f"attnstats: {', '.join(map(str, settings.statistics))}: {per_token} bytes for each token of a running request "
        f"and up to {2 * per_token} while it grows, at most {most:.3g} MB for {requests} requests of {tokens} tokens; "
        f"records of finished ones that nobody has fetched take {settings.keep_mb:g} MB at most"
    )


def described(statistic: Statistic) -> dict[str, dict[str, Any]]:
    """A statistic of the catalogue by name, with its settings, as JSON takes it."""
    if CATALOGUE.get(statistic.name) is not type(statistic):
        raise ValueError(f"statistics: {statistic} is not of the catalogue, and workers know only that")
    return {statistic.name: dataclasses.asdict(statistic)}


def check_vllm(device: str = "cpu") -> None:
    """Raise RuntimeError if this version of vLLM has moved what the plug-in overrides or reads on the device."""
    if faults := faults_of(HOOKS + HOOKS_OF.get(device, ())):
        import vllm

        raise RuntimeError(
            f"attnstats can't record the attention of requests in vLLM {vllm.__version__}: {'; '.join(faults)}. "
            "docs/vllm.md has the versions that it ran with"
        )


def check_engine(vllm_config: Any, settings: RequestSettings) -> None:
    """Raise ValueError for a setting of the engine with which its attention can't be recorded."""
    model, cache, parallel = vllm_config.model_config, vllm_config.cache_config, vllm_config.parallel_config
    device, backend = vllm_config.device_config.device_type, vllm_config.attention_config.backend
    backend, drafts = getattr(backend, "name", backend), getattr(vllm_config.speculative_config, "method", None)
    attention = "that of the attention backend alone can be recorded"
    refused = {
        f"device {device!r}": (device not in ("cpu", "cuda"), "attention on CPUs and NVIDIA GPUs can be watched"),
        f"attention_backend={backend!r}": (
            device == "cuda" and backend != ON_CUDA["attention_backend"],
            "on a GPU set 'CUSTOM', which is FlashAttention that can be watched (--attention-backend CUSTOM)",
        ),
        "async_scheduling": (
            device == "cuda" and vllm_config.scheduler_config.async_scheduling,
            "the worker does not know a request's tokens then; set False (--no-async-scheduling)",
        ),
        f"runner={model.runner_type!r}": (model.runner_type != "generate", "only models that generate are recorded"),
        "a model of multi-head latent attention (MLA)": (model.use_mla, attention),
        "an encoder-decoder model": (model.is_encoder_decoder, attention),
        f"kv_cache_dtype={cache.cache_dtype!r}": (
            cache.cache_dtype not in ("auto", "float16", "bfloat16", "float32"),
            "quantized keys can't be read; leave it at 'auto'",
        ),
        "pipeline_parallel_size > 1": (parallel.pipeline_parallel_size > 1, "use tensor_parallel_size"),
        "tensor_parallel_size > 1 and chosen heads": (
            parallel.tensor_parallel_size > 1 and settings.heads is not None,
            "ranks are put together where each has all of its heads; leave heads out",
        ),
        "tensor_parallel_size > 1 and token_entropy": (
            parallel.tensor_parallel_size > 1 and settings.token_entropy,
            "ranks would wait for each other where one of them has a fault; set token_entropy=False",
        ),
        "enable_lora and token_entropy": (
            vllm_config.lora_config is not None and settings.token_entropy,
            "with adapters vLLM computes logits of sampled rows alone; set token_entropy=False",
        ),
        "data_parallel_size > 1": (parallel.data_parallel_size > 1, "start an engine for each"),
        "decode_context_parallel_size > 1": (parallel.decode_context_parallel_size > 1, "use 1"),
        "prefill_context_parallel_size > 1": (getattr(parallel, "prefill_context_parallel_size", 1) > 1, "use 1"),
        "speculative_config of method 'ngram_gpu'": (
            drafts == "ngram_gpu",
            "the worker leaves out drafts that the scheduler counts; use 'ngram'",
        ),
        "enable_dbo, ubatch_size": (parallel.use_ubatching, "a step's requests are split; leave them out"),
        "kv_sharing_fast_prefill": (cache.kv_sharing_fast_prefill, "leave it out"),
        "model runner V2": (vllm_config.use_v2_model_runner, "set VLLM_USE_V2_MODEL_RUNNER=0 in the environment"),
    }
    faults = [f"{what}: {remedy}" for what, (is_so, remedy) in refused.items() if is_so]
    if faults:
        raise ValueError(f"additional_config['{KEY}'] can't be used with {'; '.join(faults)}")


def _statistics(given: Any) -> tuple[Statistic, ...]:
    if isinstance(given, (str, Mapping)) or not isinstance(given, Iterable):
        raise TypeError(f'statistics must be a list, such as ["waad", {{"fai": {{"hi": 50}}}}], got {given!r}')
    return resolve([_statistic(item) if isinstance(item, Mapping) else item for item in given])


def _statistic(given: Mapping[str, Any]) -> Statistic:
    if len(given) != 1 or not isinstance(arguments := next(iter(given.values())), Mapping):
        raise ValueError(f'statistics: one of them with settings is {{"fai": {{"lo": 10, "hi": 50}}}}, got {given!r}')
    (name,) = given
    if name not in CATALOGUE:
        raise ValueError(f"statistics: unknown name {name!r}; the catalogue has {', '.join(CATALOGUE)}")
    kind = CATALOGUE[name]
    names = [field.name for field in dataclasses.fields(kind)]
    if wrong := [str(each) for each in arguments if each not in names]:
        raise ValueError(f"statistics: {name} has no setting {', '.join(wrong)}; it has {', '.join(names) or 'none'}")
    return kind(**{each: tuple(x) if isinstance(x, list) else x for each, x in arguments.items()})


def _by_layer(chosen: Any) -> Any:
    """The same mapping with numbers for layers that JSON has as text."""
    if not isinstance(chosen, Mapping):
        return chosen
    return {int(key) if isinstance(key, str) and key.isdigit() else key: value for key, value in chosen.items()}
