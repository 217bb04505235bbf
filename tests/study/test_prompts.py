"""Prompt files: which there are, what a row of them must have, and which row is named."""

import json
import re
from typing import Any

import datasets
import pandas
import pytest

from attnstats.errors import InputError
from attnstats.study.prompts import QUESTIONS, read_prompts


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
    ("a.json", b'{"question": "x"}', "needs an array of objects; save other JSON as .jsonl"),
    ("a.json", b'[{"question": "x"}, {"q": "y"}]', "item 2: needs an object with a text under"),
    ("a.json", b"[", "not JSON"),
    ("a.tsv", b"question\n", ".tsv is not read; save it as .jsonl"),
    ("a.ndjson", b"what?\n", "line 1: not JSON"),
    ("a.jsonl", b'{"messages": []}\n', 'line 1, "messages": needs a list of messages, got []'),
    ("a.jsonl", b'{"messages": [{"role": "user"}]}\n', 'line 1, "messages": has no text before the answer'),
    ("a.jsonl", b'{"messages": "what?"}\n', 'line 1, "messages": not JSON'),
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


MESSAGES: list[dict[str, Any]] = [
    {"role": "user", "content": "how many?"},
    {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]},
    {"role": "tool", "content": "12"},
    {"role": "assistant", "content": "twelve"},
]
EXPECTED = [MESSAGES[0], {**MESSAGES[1], "content": ""}, MESSAGES[2]]
TOOLS = [{"type": "function", "function": {"name": "f"}}]


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.jsonlines", "a.JSON", "a.parquet", "folder"])
def test_lists_of_messages(tmp_path, name):
    """Tables have every key in every message, None where it was absent."""
    file, rows = tmp_path / name, [{"messages": MESSAGES, "tools": TOOLS}, {"messages": MESSAGES[:1], "tools": None}]
    if name == "folder":
        datasets.Dataset.from_list(rows).save_to_disk(file)
    elif name == "a.parquet":
        datasets.Dataset.from_list(rows).to_parquet(file)
    elif name == "a.JSON":
        file.write_text(json.dumps(rows, indent=1))
    else:
        file.write_text("\n".join(map(json.dumps, rows)))
    for field in (None, "messages"):
        first, second = read_prompts(file, field)
        assert (first.messages, first.tools, first.question) == (EXPECTED, TOOLS, "how many?")
        assert (second.messages, second.tools) == (MESSAGES[:1], None)


def test_a_question_goes_before_messages_and_a_field_before_both(tmp_path):
    row = {"question": "how?", "messages": json.dumps(MESSAGES), "prompt": MESSAGES[:1]}
    (tmp_path / "a.json").write_text(json.dumps([row]))
    assert read_prompts(tmp_path / "a.json") == ["how?"]
    assert read_prompts(tmp_path / "a.json", "messages")[0].messages == EXPECTED
    assert read_prompts(tmp_path / "a.json", "prompt")[0].messages == MESSAGES[:1]


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
