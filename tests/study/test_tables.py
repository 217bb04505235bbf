"""The tables of a corpus: what each file holds, and that no prompt stays in memory."""

import csv
import json

import pandas
import pytest

from attnstats.chance import Chance
from attnstats.study import findings, tables
from attnstats.study.analysis import Analyses
from attnstats.study.store import Store, begin
from attnstats.study.text import from_spreadsheet_cell
from tests.hostile import TEXTS
from tests.tiny import synthetic_analysis

TOKENS = ["how", " many", " so", "\n\n", "=1+1", '"q", x', "\r", "\ud800", "\0", "漢字", " end"]


@pytest.fixture
def analyses():
    return [synthetic_analysis(TOKENS), synthetic_analysis(["a", "b", "c"], prompt=1)]


def test_tokens_table(tmp_path, analyses):
    tables.write(tmp_path, analyses)
    table = pandas.read_csv(tmp_path / "tokens.csv", keep_default_na=False, na_values={"delta": "", "entropy": ""})
    columns = ["prompt", "position", "token", "is_response", "waad", "fai", "fai_valid", "delta", "entropy"]
    assert list(table.columns) == columns
    for number, analysis in enumerate(analyses):
        rows = table[table.prompt == number]
        assert rows.position.tolist() == list(range(len(analysis.tokens)))
        assert rows.is_response.tolist() == analysis.response.tolist()
        assert rows.fai_valid.tolist() == analysis.fai_valid.tolist()
        assert rows.waad.tolist() == pytest.approx(analysis.waad.tolist())
        assert rows.fai.tolist() == pytest.approx(analysis.fai.tolist())
        assert rows.delta[rows.is_response].tolist() == pytest.approx(analysis.delta.tolist())
        assert rows.delta[~rows.is_response].isna().all()
        assert rows.entropy.isna().tolist() == [True] + [False] * (len(rows) - 1)


def test_token_cells_are_whole_and_no_formulas(tmp_path, analyses):
    tables.write(tmp_path, analyses)
    with (tmp_path / "tokens.csv").open(newline="", encoding="utf-8") as file:
        cells = [row["token"] for row in csv.DictReader(file) if row["prompt"] == "0"]
    assert cells == ["how", " many", " so", "\n\n", "'=1+1", '"q", x', "'\r", "\\ud800", "'\0", "漢字", " end"]


def test_heads_table(tmp_path, analyses):
    tables.write(tmp_path, analyses)
    table = pandas.read_csv(tmp_path / "heads.csv")
    assert list(table.columns) == ["prompt", "layer", "head", "mean_distance", "class"]
    rows = table[table.prompt == 0]
    assert list(zip(rows.layer, rows["head"], strict=True)) == [(layer, h) for layer in (3, 5) for h in range(3)]
    assert rows.mean_distance.tolist() == pytest.approx(analyses[0].distance.flatten().tolist())
    assert rows["class"].value_counts().to_dict() == {"local": 1, "global": 1, "middle": 4}
    assert rows.loc[rows.mean_distance.idxmin(), "class"] == "local"
    assert rows.loc[rows.mean_distance.idxmax(), "class"] == "global"


def test_parquet_holds_what_csv_holds_and_the_tokens_as_they_are(tmp_path, analyses):
    tables.write(tmp_path, analyses)
    for name in ("tokens", "heads"):
        table = pandas.read_csv(tmp_path / f"{name}.csv", keep_default_na=False, na_values={"delta": "", "entropy": ""})
        kept = pandas.read_parquet(tmp_path / f"{name}.parquet")
        assert list(kept.columns) == list(table.columns)
        numbers = kept.select_dtypes("number").columns
        pandas.testing.assert_frame_equal(kept[numbers], table[numbers], check_dtype=False)
    tokens = pandas.read_parquet(tmp_path / "tokens.parquet")
    assert tokens[tokens.prompt == 0].token.tolist() == [*TOKENS[:7], "\\ud800", *TOKENS[8:]]


def test_prompts_table(tmp_path, analyses):
    tables.write(tmp_path, analyses)
    with (tmp_path / "prompts.jsonl").open() as file:
        records = list(map(json.loads, file))
    for number, (record, analysis) in enumerate(zip(records, analyses, strict=True)):
        assert record == {
            "prompt": number,
            "question": analysis.question,
            "response": analysis.response_text.replace("\ud800", "\\ud800"),
            "prompt_tokens": analysis.response_start,
            "response_tokens": len(analysis.delta),
            "preplan_positions": analysis.preplan(10),
            "anchor_positions": analysis.anchors(10),
        }
    kept = pandas.read_parquet(tmp_path / "prompts.parquet")
    for name in ("preplan_positions", "anchor_positions"):
        kept[name] = kept[name].map(list)
    assert kept.to_dict("records") == records


def test_row_groups_are_cut_by_rows_and_by_bytes(tmp_path, analyses, monkeypatch):
    import pyarrow.parquet

    tables.write(tmp_path, analyses * 3)
    whole = {name: pandas.read_parquet(tmp_path / name) for name in tables.FILES if name.endswith(".parquet")}
    texts = {name: (tmp_path / name).read_bytes() for name in tables.FILES if not name.endswith(".parquet")}
    for setting, value in (("ROW_GROUP", 5), ("GROUP_BYTES", 300)):
        with monkeypatch.context() as patch:
            patch.setattr(tables, setting, value)
            tables.write(tmp_path, analyses * 3)
        assert pyarrow.parquet.ParquetFile(tmp_path / "tokens.parquet").num_row_groups > 3
        for name, table in whole.items():
            pandas.testing.assert_frame_equal(pandas.read_parquet(tmp_path / name), table)
        assert texts == {name: (tmp_path / name).read_bytes() for name in texts}


def store_of(folder, count):
    store = begin(folder, {}, resume=False)
    for index in range(count):
        store.write(index, *synthetic_analysis([f"w{i}" for i in range(25 + index % 7)], prompt=3).stored())
    return Analyses(store, count)


@pytest.mark.parametrize("count", [6, 40])
def test_as_many_items_are_in_memory_for_any_number_of_prompts(tmp_path, alive, count):
    analyses = store_of(tmp_path / "run", count)
    profile = findings.profile(analyses.head_summaries())
    assert 4 <= alive[0] <= 2 * 4  # the item that is read, and the one before it
    alive[0] = 0
    findings.tabulate(tmp_path, analyses.outlines(), profile, Chance(20, resamples=20))
    assert alive[0] <= 2 * len(analyses[0].tensors())
    assert len(pandas.read_parquet(tmp_path / "prompts.parquet")) == count


def test_a_corpus_is_read_once(tmp_path, monkeypatch):
    """And the maps and the statistics per head not at all."""
    analyses = store_of(tmp_path / "run", 5)
    profile = findings.profile(analyses.head_summaries())
    reads, read = [], Store.read

    def recorded(self, index, names):
        reads.append((index, names))
        return read(self, index, names)

    monkeypatch.setattr(Store, "read", recorded)
    findings.tabulate(tmp_path, analyses.outlines(), profile, Chance(20, resamples=20))
    assert [index for index, _ in reads] == [0, 1, 2, 3, 4]
    assert not {"head_waad", "head_fai", "head_mean_distance", "local_map"} & {
        name for _, names in reads for name in names
    }


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """The tables of a prompt whose tokens are the hostile texts, and of prompts with each as the question."""
    folder = tmp_path_factory.mktemp("hostile")
    tokens = synthetic_analysis(TEXTS)
    tables.write(folder, [tokens, *(synthetic_analysis(["a", "b", "c"], question=text) for text in TEXTS)])
    return folder


UTF8 = [text.encode("utf-8", "backslashreplace").decode() for text in TEXTS]


def test_hostile_text_comes_back_from_parquet(hostile):
    tokens = pandas.read_parquet(hostile / "tokens.parquet")
    assert tokens.token[tokens.prompt == 0].tolist() == UTF8
    prompts = pandas.read_parquet(hostile / "prompts.parquet")
    assert prompts.question.tolist()[1:] == UTF8
    assert prompts.response[0] == "".join(UTF8[2:])
    assert tokens.token.notna().all()


def test_hostile_text_comes_back_from_csv(hostile):
    tokens = pandas.read_csv(
        hostile / "tokens.csv", dtype={"token": str}, keep_default_na=False, na_values={"delta": [""], "entropy": [""]}
    )
    kept = pandas.read_parquet(hostile / "tokens.parquet")
    assert tokens.token.map(from_spreadsheet_cell).tolist() == kept.token.tolist()
    for name in kept.columns.drop("token"):
        pandas.testing.assert_series_equal(tokens[name], kept[name], check_dtype=False)
    csv.field_size_limit(2**31 - 1)
    with (hostile / "tokens.csv").open(newline="", encoding="utf-8") as file:
        cells = [row["token"] for row in csv.DictReader(file)]
    assert list(map(from_spreadsheet_cell, cells)) == kept.token.tolist()


def test_hostile_text_comes_back_from_json_lines(hostile):
    text = (hostile / "prompts.jsonl").read_text(encoding="ascii")
    assert [json.loads(line)["question"] for line in text.splitlines()][1:] == UTF8
    frame = pandas.read_json(hostile / "prompts.jsonl", lines=True, dtype=False)
    assert frame.question.tolist()[1:] == UTF8


def test_hostile_text_comes_back_from_a_store(tmp_path):
    store = begin(tmp_path / "run", {"texts": TEXTS}, resume=False)
    store.write(0, *synthetic_analysis(TEXTS, question=TEXTS[0]).stored())
    store.close()
    begin(tmp_path / "run", {"texts": TEXTS}, resume=True).close()
    (analysis,) = Analyses(store, 1)
    assert (analysis.tokens, analysis.shown, analysis.question) == (TEXTS, TEXTS, TEXTS[0])
