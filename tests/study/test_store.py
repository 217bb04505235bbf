"""Results that a killed run leaves: files that are whole, a run that is continued only as what it was."""

import json

import pytest
import torch

from attnstats.errors import InputError
from attnstats.study import store as stores
from attnstats.study.store import Store, begin

IDENTITY = {"model": {"name": "m", "dtype": "float32"}, "settings": {"window": 10, "layers": (1, 2)}, "count": 2}
TENSORS = {"a": torch.arange(6.0).view(2, 3).t(), "flags": torch.tensor([True, False])}
TEXTS = {"tokens": ["\ud800", "漢", "\0"], "nested": {"x": 1.5}}


def test_what_is_written_is_read(tmp_path):
    store = begin(tmp_path / "deep" / "run", IDENTITY, resume=False)
    assert not store.has(7)
    assert not store.has_response(7)
    store.write_response(7, [1, 2], [3])
    store.write(7, TENSORS, TEXTS)
    store.close()
    again = begin(tmp_path / "deep" / "run", IDENTITY, resume=True)
    assert again.has(7)
    assert again.response(7) == ([1, 2], [3])
    tensors, texts = again.read(7)
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)
    assert texts == TEXTS
    assert again.indices() == [7]


@pytest.mark.parametrize(("change", "message"), [
    ({"count": 3}, "count 2, this run has 3"),
    ({"model": {"name": "m", "dtype": "bfloat16"}}, 'dtype "float32", this run has "bfloat16"'),
    ({"settings": {"window": 10}}, r"layers \[1, 2\], this run has null"),
])  # fmt: skip
def test_a_run_is_continued_only_as_what_it_was(tmp_path, change, message):
    begin(tmp_path / "run", IDENTITY, resume=False).close()
    with pytest.raises(InputError, match=rf"--resume: .*run was begun with {message}"):
        begin(tmp_path / "run", IDENTITY | change, resume=True)


def test_a_folder_of_others_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for folder in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(InputError, match=r"isn't an unfinished run of ours|File exists; name a folder"):
            begin(folder, IDENTITY, resume=True)


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    store = begin(tmp_path / "run", IDENTITY, resume=False)
    with pytest.raises(ValueError, match="JSON"):
        store.write(0, TENSORS, {"nan": float("nan")})

    def killed(tensors, path, metadata):
        with open(path, "wb") as file:  # noqa: PTH123 what the kill of a writer leaves
            file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("safetensors.torch.save_file", killed)
    with pytest.raises(KeyboardInterrupt):
        store.write(0, TENSORS, TEXTS)
    assert list((tmp_path / "run" / "items").iterdir()) == []
    assert store.discard_empty()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", [b"", b"\x10\0\0\0\0\0\0\0{", b"{}", b"\xff" * 100])
def test_damaged_files_are_named_with_a_remedy(tmp_path, content):
    store = begin(tmp_path / "run", IDENTITY, resume=False)
    remedy = r"cannot be read \(.*\); delete this file and run again with --resume"
    for index, name in enumerate(("000000.safetensors", "000001.json")):
        (tmp_path / "run" / "items" / name).write_bytes(content)
        with pytest.raises(InputError, match=rf"{name}: {remedy}"):
            (store.response if index else store.read)(index)
    store.close()
    (tmp_path / "run" / stores.RUN).write_bytes(b"[" + content)
    with pytest.raises(InputError, match=r"run.json: cannot be read; delete the folder .*run and run again"):
        begin(tmp_path / "run", IDENTITY, resume=True)


def test_files_of_others_among_the_items_are_not_counted(tmp_path):
    store = begin(tmp_path / "run", IDENTITY, resume=False)
    store.write(3, TENSORS, TEXTS)
    for name in (".000004.safetensors.123", "000005.jsonx", "9.safetensors"):
        (tmp_path / "run" / "items" / name).write_text(json.dumps({}))
    assert Store(tmp_path / "run").indices() == [3]
    assert store.foreign() == "items/.000004.safetensors.123"
    store.close()
    again = begin(tmp_path / "run", IDENTITY, resume=True)
    assert again.foreign() == "items/000005.jsonx", "what was half written is gone, what is another's is not"
    assert not again.discard_empty()


def test_results_without_their_responses_are_results(tmp_path):
    store = begin(tmp_path / "run", IDENTITY, resume=False)
    store.write(0, TENSORS, TEXTS)
    assert not store.discard_empty()
    assert store.has(0)


def test_a_folder_has_one_process_at_a_time(tmp_path):
    store = begin(tmp_path / "run", IDENTITY, resume=False)
    for resume in (False, True):
        with pytest.raises(InputError, match="another process is at work there; wait for it, or stop it"):
            begin(tmp_path / "run", IDENTITY, resume=resume)
    store.close()
    begin(tmp_path / "run", IDENTITY, resume=True)


@pytest.mark.parametrize("left", [(), (".lock",), (".lock", ".run.json.77"), (".lock", "items/")])
def test_a_run_that_was_killed_as_it_began_is_begun_again(tmp_path, left):
    (tmp_path / "run").mkdir()
    for name in left:
        path = tmp_path / "run" / name
        path.mkdir() if name.endswith("/") else path.write_text("")
    assert begin(tmp_path / "run", IDENTITY, resume=False).indices() == []


@pytest.mark.parametrize("ids", [{"prompt": [], "response": [1]}, {"prompt": [1], "response": []},
                                 {"prompt": [1], "response": [-3]}, {"prompt": [1], "response": [1e400]}])  # fmt: skip
def test_token_ids_that_are_none_are_refused(tmp_path, ids):
    store = begin(tmp_path / "run", IDENTITY, resume=False)
    (tmp_path / "run" / "items" / "000000.json").write_text(json.dumps(ids))
    with pytest.raises(InputError, match=r"000000.json: cannot be read \(no token ids"):
        store.response(0)


def test_a_full_disk_is_said(tmp_path, monkeypatch):
    store = begin(tmp_path / "run", IDENTITY, resume=False)

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(InputError, match=r"000000.safetensors: cannot be written .*No space left.*--resume"):
        store.write(0, TENSORS, TEXTS)
