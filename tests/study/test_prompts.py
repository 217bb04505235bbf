"""Prompt files and how a question becomes what a model reads."""

import json
import re

import datasets
import pandas
import pytest

from attnstats.errors import InputError
from attnstats.study.prompts import QUESTIONS, read_prompts, render
from tests.tiny import WORDS, save_tiny_model


def test_jsonl_and_text_files(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        '{"question": "one?", "answer": 1}\n\n{"question": "zwei\\nüber?"}\n', encoding="utf-8"
    )
    assert read_prompts(tmp_path / "a.jsonl") == ["one?", "zwei\nüber?"]
    (tmp_path / "b.txt").write_text("one?\n\n  two?\n")
    assert read_prompts(tmp_path / "b.txt") == ["one?", "two?"]


SEPARATORS = "\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"  # str.splitlines() splits at each of them


def test_only_line_feeds_end_a_line(tmp_path):
    lines = [f"how{c}many" for c in SEPARATORS]
    (tmp_path / "a.txt").write_bytes("\r\n".join(lines).encode())
    assert read_prompts(tmp_path / "a.txt") == lines
    allowed = [line for line in lines if line[3] >= " "]  # JSON escapes the others
    records = [json.dumps({"question": line}, ensure_ascii=False) for line in allowed]
    (tmp_path / "a.jsonl").write_bytes("\r\n".join([*records, ""]).encode())
    assert read_prompts(tmp_path / "a.jsonl") == allowed
    (tmp_path / "a.jsonl").write_bytes("\n".join([*records[:2], "{"]).encode())
    with pytest.raises(InputError, match="line 3: not JSON"):
        read_prompts(tmp_path / "a.jsonl")


@pytest.mark.parametrize(("name", "content", "message"), [
    ("a.jsonl", b'{"question": "x"}\n{"q": "y"}\n', 'line 2: needs an object with a text under "question"'),
    ("a.jsonl", b'["x"]\n', "line 1: needs an object"),
    ("a.jsonl", b'{"question": " "}\n', "line 1: needs a text under"),
    ("a.jsonl", b'{"question": "x"}\n{"question": 7}\n', 'line 2: needs a text under "question", got 7'),
    ("a.csv", b"question,answer\nx,1\n\"y\nz\",2\n,3\n", "line 5: needs a text under"),
    ("a.csv", b"q,answer\nx,1\n", "line 2: needs an object with a text under"),
    ("a.csv", b'question\nx\n"x" y\n', "line 3: not CSV"),
    ("a.parquet", b"PAR1", "not readable as Parquet"),
    ("a.jsonl", b'{"question": "\\ud800"}\n', 'line 1: "question" has half of a character'),
    ("a.jsonl", b"[" * 200_000, "line 1: not JSON"),
    ("a.JSONL", b"what?\n", "line 1: not JSON"),
    ("a.json", b'[{"question": "x"}]', ".json is not read; save it as .jsonl"),
    ("a.jsonl", b"what?\n", "line 1: not JSON"),
    ("a.txt", b" \n\n", "no prompt in it"),
    ("a.txt", b"\xff\xfe\x00", "not UTF-8"),
])  # fmt: skip
def test_bad_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=f"--prompts .*{re.escape(name)}.*{re.escape(message)}"):
        read_prompts(tmp_path / name)


@pytest.mark.parametrize("name", ["absent.jsonl", "absent"])
def test_files_that_cannot_be_read(tmp_path, name):
    with pytest.raises(InputError, match=r"--prompts .*; name a .jsonl, .csv, .parquet or text file"):
        read_prompts(tmp_path / name)


REFUSING = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}user {{ messages[0].content }} "


@pytest.mark.parametrize(("template", "system", "expected"), [
    ("default", "are", ["system", "are", "user", "how", "many", "so"]),
    ("default", "", ["user", "how", "many", "so"]),
    (None, "are", ["are", "how", "many"]),
    (None, "", ["how", "many"]),
    # A template that refuses a system message gets its text with the question.
    (REFUSING, "are", ["user", "are", "how", "many"]),
])  # fmt: skip
def test_render(tmp_path, template, system, expected):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(save_tiny_model(tmp_path, chat_template=template))
    assert [WORDS[token] for token in render(tokenizer, "how many", system)] == expected


def test_our_questions_are_several_and_different():
    assert len(set(QUESTIONS)) == len(QUESTIONS) >= 3
    assert all(question.endswith("?") for question in QUESTIONS)


ROWS = {"question": ["how many?", "two\nlines, \u2028 one"], "id": [1, 2], "other": ["a", "b"]}


def test_tables(tmp_path):
    pandas.DataFrame(ROWS).to_csv(tmp_path / "a.csv", index=False)
    pandas.DataFrame(ROWS).to_parquet(tmp_path / "a.parquet")
    datasets.Dataset.from_dict(ROWS).save_to_disk(tmp_path / "folder")
    for name in ("a.csv", "a.parquet", "folder"):
        assert read_prompts(tmp_path / name) == ROWS["question"]
        assert read_prompts(tmp_path / name, "other") == ROWS["other"]
        with pytest.raises(InputError, match=r"absent|--field"):
            read_prompts(tmp_path / name, "absent")


def test_folders_that_are_no_data_set(tmp_path):
    with pytest.raises(InputError, match=r"not a folder of Dataset.save_to_disk"):
        read_prompts(tmp_path)
    datasets.DatasetDict({"train": datasets.Dataset.from_dict(ROWS)}).save_to_disk(tmp_path / "splits")
    with pytest.raises(InputError, match=r"has several splits; name one of .*splits/train"):
        read_prompts(tmp_path / "splits")
    assert read_prompts(tmp_path / "splits" / "train") == ROWS["question"]
    (tmp_path / "a.txt").write_text("how many?")
    with pytest.raises(InputError, match="a text file has no field 'question'"):
        read_prompts(tmp_path / "a.txt", "question")


def test_rows_are_named_where_they_hold_no_prompt(tmp_path):
    pandas.DataFrame({"question": ["x", None]}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"a.parquet, row 2: needs a text under \"question\", got None"):
        read_prompts(tmp_path / "a.parquet")
