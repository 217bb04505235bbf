"""Prompts from a file, or our own three questions.

A prompt is a question or a conversation (chat.py); the paper's system text (App. A.1) goes before it.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from attnstats.errors import InputError
from attnstats.segments import sentences
from attnstats.study.chat import Prompt, conversation

JSON_LINES = (".jsonl", ".ndjson", ".jsonlines")
OTHER_TABLES = (".tsv", ".xls", ".xlsx", ".arrow", ".gz", ".zip", ".zst", ".pkl", ".pt", ".npy")
SYSTEM = "Please reason step by step, and put your final answer within \\boxed{}."

QUESTIONS = (
    "A baker makes 4 trays of rolls with 12 rolls on each tray. She sells 30 rolls before noon. "
    "How many rolls does she have left?",
    "A tank holds 200 liters of water. It loses 15 liters a day for 6 days. Then 40 liters are poured in. "
    "How much water is in the tank?",
    "A farmer has 3 barns with 20 cows in each barn. Each cow gives 10 liters of milk a day. "
    "How many liters of milk does the farmer get in a day?",
)


Row = tuple[Any, str]  # a record of a data set, and where it is


def read_prompts(file: Path, field: str | None = None, option: str = "--prompts") -> list[Prompt]:
    """The prompts of a file or of a data set's folder.

    JSON Lines, .json (an array), .csv, .parquet and a folder of `datasets.Dataset.save_to_disk` have a prompt in a
    field of each row; any other file has one in each line that isn't blank, without the blanks around it. Lines end in
    LF, CRLF or CR; other Unicode separators are text, as JSON allows them inside a string. A prompt is a text, or in
    JSON and tables a list of messages, to which the row's `tools` belong.

    Args:
        field: the field with the prompt, default "question", else "messages".

    Raises:
        InputError: no such file, not readable as its name says, a row without a prompt in the field (its line or row is
            named), or no prompt in it.
    """
    where = f"{option} {file}"
    kind = file.suffix.lower()
    rows: Iterable[Row]
    if file.is_dir():
        rows = _of_table(_dataset(file, where), field, where)
    elif kind == ".parquet":
        rows = _of_table(_parquet(file, where), field, where)
    elif kind == ".csv":
        rows = _of_csv(text_of(file, where), where)
    elif kind == ".json":
        rows = _of_array(text_of(file, where), where)
    elif kind in JSON_LINES:
        rows = ((parsed(line, place), place) for line, place in lines_of(text_of(file, where), where))
    elif kind in OTHER_TABLES:
        raise InputError(f"{where}: {kind} is not read; save it as .jsonl, .csv or .parquet, or as .txt, one per line")
    elif field is None:
        rows = (({"question": line}, place) for line, place in lines_of(text_of(file, where), where))
    else:
        raise InputError(f"{where}: a text file has no field {field!r}; give .jsonl, .csv or .parquet")
    prompts = [_prompt(record, field, place) for record, place in rows]
    if not prompts:
        raise InputError(f"{where}: no prompt in it; write one per line")
    return prompts


def lines_of(text: str, where: str) -> Iterator[tuple[str, str]]:
    """The lines that aren't blank, without the blanks around them, and their places."""
    lines = ((line.strip(), f"{where}, line {number}") for number, line in enumerate(text.split("\n"), 1))
    return (line for line in lines if line[0])


def text_of(file: Path, where: str) -> str:
    """The text of a file. Raises InputError: not readable, or not UTF-8."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except OSError as error:
        raise InputError(f"{where}: {error.strerror or error}; name a .jsonl, .csv, .parquet or text file") from error


def parsed(text: str, where: str) -> Any:
    """The JSON in a text. Raises InputError for any other text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON ({error})") from error


def _of_array(text: str, where: str) -> list[Row]:
    records = parsed(text, where)
    if not isinstance(records, list):
        raise InputError(f"{where}: needs an array of objects; save other JSON as .jsonl, an object in each line")
    return [(record, f"{where}, item {number}") for number, record in enumerate(records, 1)]


def _of_csv(text: str, where: str) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)
    rows = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in rows:
            yield row, f"{where}, line {rows.line_num}"
    except csv.Error as error:
        raise InputError(f"{where}, line {rows.line_num + 1}: not CSV ({error})") from error


def _prompt(record: Any, field: str | None, where: str) -> Prompt:
    """The prompt of a record, in `field` or in the first of the usual fields that it has."""
    fields = [key for key in record if key is not None] if isinstance(record, dict) else []
    name = field or ("messages" if "messages" in fields and "question" not in fields else "question")
    if name not in fields:
        has = f"; it has {_cut(', '.join(map(repr, fields)))} (choose with --field)" if fields else ""
        raise InputError(f'{where}: needs an object with a text under "{name}"{has}')
    prompt = record[name]
    if name == "messages" and isinstance(prompt, str):
        prompt = parsed(prompt, f'{where}, "messages"')
    if isinstance(prompt, list):
        return conversation(prompt, record.get("tools"), f'{where}, "{name}"')
    if not isinstance(prompt, str) or not prompt.strip():
        raise InputError(f'{where}: needs a text under "{name}", got {_cut(repr(prompt))}')
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f'{where}: "{name}" has half of a character ({error.reason})') from error
    return prompt


def _cut(text: str, length: int = 80) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}\u2026"


def _dataset(folder: Path, where: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise InputError(f"{where}: to read a data set's folder, run: pip install datasets") from error
    try:
        dataset = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{where}: not a folder of Dataset.save_to_disk ({error})") from error
    if isinstance(dataset, datasets.DatasetDict):
        splits = ", ".join(str(folder / split) for split in dataset)
        raise InputError(f"{where}: has several splits; name one of {splits}")
    return dataset.data.table


def _parquet(file: Path, where: str) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(file)
    except (OSError, pyarrow.ArrowException) as error:
        raise InputError(f"{where}: not readable as Parquet ({' '.join(str(error).split())})") from error


def _of_table(table: Any, field: str | None, where: str) -> list[Row]:
    names = [name for name in (field, "question", "messages") if name in table.column_names]
    if not names or (field and names[0] != field):
        columns = _cut(", ".join(map(repr, table.column_names)))
        raise InputError(f"{where}: has no column {field or 'question'!r}, only {columns}; choose with --field")
    records = table.select([name for name in (names[0], "tools") if name in table.column_names]).to_pylist()
    return [(record, f"{where}, row {number}") for number, record in enumerate(records, 1)]


def paper_prompt(question: str) -> str:
    """The question in the paper's template (App. A.1): its last sentence as `Question`, the rest as `Context`.

    Example:
        >>> print(paper_prompt("A tray holds 12 rolls. How many do 4 trays hold?"))
        Context: A tray holds 12 rolls.
        Question: How many do 4 trays hold?
    """
    *context, last = sentences(question.strip())
    before = "".join(context).strip()
    return f"Context: {before}\nQuestion: {last}" if before else f"Question: {last}"
