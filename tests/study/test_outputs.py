"""The output folder: tables and tensors read back, and a folder that changes whole or not at all."""

import dataclasses
import json
import math
import os
import sys

import pytest
import torch

from attnstats.chance import Coupling
from attnstats.errors import InputError
from attnstats.study import outputs, tables
from attnstats.study.analysis import Analyses
from attnstats.study.store import begin
from tests.hostile import TEXTS
from tests.tiny import synthetic_analysis

TOKENS = ["how", " many", " so", "\n\n", "=1+1", '"q", x', "\r", "\ud800", "\0", "漢字", " end"]


@pytest.fixture
def analyses():
    return [synthetic_analysis(TOKENS), synthetic_analysis(["a", "b", "c"], prompt=1)]


def test_an_analysis_comes_back_from_a_store_as_it_was(tmp_path, analyses):
    store = begin(tmp_path / "run", {}, resume=False)
    for index, analysis in enumerate(analyses):
        store.write(index, *analysis.stored())
    kept = Analyses(store, 2)
    assert len(kept) == len(kept[:]) == 2
    for before, after in zip(analyses, kept, strict=True):
        for field in dataclasses.fields(before):
            one, two = getattr(before, field.name), getattr(after, field.name)
            if field.name == "maps":
                assert all(torch.equal(a, b) for a, b in zip(vars(one).values(), vars(two).values(), strict=True))
            elif isinstance(one, torch.Tensor):
                torch.testing.assert_close(one, two, rtol=0, atol=0, equal_nan=True)
            elif field.name == "classes":
                assert torch.equal(one.local, two.local)
                assert torch.equal(one.global_, two.global_)
            else:
                assert one == two, field.name


def test_summary_is_plain_json(tmp_path):
    outputs.write_summary(tmp_path, {"text": "\ud800 é", "number": 1.5})
    text = (tmp_path / "summary.json").read_text(encoding="ascii")
    assert json.loads(text)["text"] == "\ud800 é"
    with pytest.raises(ValueError, match="JSON"):
        outputs.write_summary(tmp_path, {"number": float("nan")})


def test_hostile_text_comes_back_from_a_summary(tmp_path):
    summary = {"settings": {text: text for text in TEXTS}, "model": {"name": TEXTS}}
    outputs.write_summary(tmp_path, summary)
    assert json.loads((tmp_path / "summary.json").read_text(encoding="ascii")) == summary | {"format": outputs.FORMAT}


def test_every_file_follows_the_umask(tmp_path, analyses):
    before = os.umask(0o027)
    try:
        tables.write(tmp_path, analyses)
        outputs.write_summary(tmp_path, {})
        store = begin(tmp_path / "run", {}, resume=False)
        store.write_response(0, [1], [2])
        store.write(0, *analyses[0].stored())
        store.close()
    finally:
        os.umask(before)
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in tmp_path.rglob("*") if path.is_file()}
    items = {"run.json", "000000.json", "000000.safetensors"}
    assert modes == dict.fromkeys({*tables.FILES, outputs.SUMMARY, *items}, "0o640")


def test_versions_and_memory():
    assert {"attnstats", "torch", "triton", "transformers", "python"} <= set(outputs.versions())
    assert outputs.peak_memory()["resident"] > 2**24


def test_where_posix_is_absent_resident_memory_is_left_out(monkeypatch):
    monkeypatch.setitem(sys.modules, "resource", None)
    assert "resident" not in outputs.peak_memory()


def fill(out, text="new"):
    store = outputs.open_store(out, {"text": text}, resume=False)
    (store.folder / "tokens.csv").write_text(text)
    outputs.finish(store, out)


def contents(folder):
    return (folder / "tokens.csv").read_text()


@pytest.mark.parametrize("before", ["absent", "empty", "ours"])
def test_a_folder_takes_its_place(tmp_path, before):
    out = tmp_path / "deep" / "out"
    if before == "empty":
        out.mkdir(parents=True)
    elif before == "ours":
        fill(out, "old")
    fill(out)
    assert contents(out) == "new"
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    umask = os.umask(0)
    os.umask(umask)
    assert out.stat().st_mode & 0o777 == 0o777 & ~umask


def test_a_link_is_followed(tmp_path):
    fill(tmp_path / "real", "old")
    (tmp_path / "link").symlink_to("real")
    fill(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert contents(tmp_path / "real") == "new"


def test_a_run_works_beside_the_old_output(tmp_path):
    out = tmp_path / "out"
    fill(out, "old")
    outputs.open_store(out, {"text": "new"}, resume=False).close()
    assert contents(out) == "old"
    with pytest.raises(InputError, match=r"out.part: holds an unfinished run with no answer; go on .* --resume"):
        fill(out)
    outputs.open_store(out, {"text": "new"}, resume=True)


def test_a_finished_run_is_known_and_one_that_lost_items_goes_back_to_work(tmp_path, analyses):
    out = tmp_path / "out"
    store = outputs.open_store(out, {"text": "old"}, resume=False)
    for index, analysis in enumerate(analyses):
        store.write(index, *analysis.stored())
    outputs.write_summary(store.folder, {})
    outputs.finish(store, out)
    assert outputs.is_finished(out, {"text": "old"}, 2)
    assert not outputs.is_finished(out, {"text": "old"}, 3)
    for call in (outputs.is_finished, lambda out, identity, _: outputs.open_store(out, identity, resume=True)):
        with pytest.raises(InputError, match='begun with text "old", this run has "new"'):
            call(out, {"text": "new"}, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    store.__class__(out).path(1).unlink()
    assert not outputs.is_finished(out, {"text": "old"}, 2)
    assert outputs.open_store(out, {"text": "old"}, resume=True).indices() == [0]
    assert not out.exists()


def test_a_kill_between_the_two_renames_is_mended(tmp_path):
    out = tmp_path / "out"
    fill(out, "old")
    out.rename(tmp_path / ".out.old-1")
    outputs.workplace(out)
    assert contents(out) == "old"
    fill(tmp_path / "other", "older")
    (tmp_path / "other").rename(tmp_path / ".out.old-2")
    outputs.workplace(out)
    assert contents(out) == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_rename_that_fails_puts_the_old_output_back(tmp_path, monkeypatch):
    out = tmp_path / "out"
    fill(out, "old")
    rename = type(out).rename

    def refuse_the_new_one(self, target):
        if self.name.endswith(".part"):
            raise OSError("no")
        return rename(self, target)

    monkeypatch.setattr(type(out), "rename", refuse_the_new_one)
    with pytest.raises(OSError, match="no"):
        fill(out)
    assert contents(out) == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.part"]


@pytest.mark.parametrize("name", ["notes.txt", "items/notes.txt", "items/1.json"])
def test_what_is_not_ours_is_never_replaced(tmp_path, name):
    out = tmp_path / "out"
    fill(out, "old")
    (out / name).write_text("mine")
    with pytest.raises(InputError, match=rf"--out .*: holds {name}, which is not ours to replace"):
        fill(out)
    assert (out / name).read_text() == "mine"
    assert (out / "tokens.csv").read_text() == "old"


def test_names_like_ours_are_not_ours(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "report.html").write_text("mine")
    with pytest.raises(InputError, match=r"--out .*: holds report.html, which is not ours to replace"):
        fill(tmp_path / "out")


def test_what_came_while_a_run_worked_stays(tmp_path):
    out = tmp_path / "out"
    fill(out, "old")
    store = outputs.open_store(out, {"text": "new"}, resume=False)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"holds notes\.txt"):
        outputs.finish(store, out)
    assert (out / "notes.txt").read_text() == "mine"
    assert store.folder.is_dir()


@pytest.mark.parametrize("out", ["file", "file/below", "/proc/attnstats"])
def test_places_that_cannot_be_written(tmp_path, out):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"--out .*; name a folder"):
        fill(tmp_path / out)
    assert (tmp_path / "file").read_text() == ""


@pytest.mark.parametrize(("responses", "reason"), [
    (1, "no interval and no p over fewer than 5 responses with a peak"), (5, None),
])  # fmt: skip
def test_a_coupling_without_interval_and_p_has_its_reason_in_the_summary(responses, reason):
    numbers = (math.nan,) * 3 if reason else (0.01, 0.1, 0.3)
    record = json.loads(json.dumps(outputs.coupling_record(Coupling("entropy", 0.5, 0.4, *numbers, 12, responses))))
    assert record["reason"] == reason
    assert [record[name] is None for name in ("p_value", "low", "high")] == [reason is not None] * 3
    assert outputs.coupling_record(outputs._coupling(record)) == record
