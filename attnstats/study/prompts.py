"""Prompts from a file or our own three questions, and their rendering in the model's chat format.

A prompt is a question; the paper's system text (App. A.1) goes before it.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attnstats.errors import InputError
from attnstats.segments import sentences

OTHER_TABLES = (".json", ".tsv", ".xls", ".xlsx", ".arrow", ".gz", ".zip", ".zst", ".pkl", ".pt", ".npy")
SYSTEM = "Please reason step by step, and put your final answer within \\boxed{}."

QUESTIONS = (
    "A baker makes 4 trays of rolls with 12 rolls on each tray. She sells 30 rolls before noon. "
    "How many rolls does she have left?",
    "A tank holds 200 liters of water. It loses 15 liters a day for 6 days. Then 40 liters are poured in. "
    "How much water is in the tank?",
    "A farmer has 3 barns with 20 cows in each barn. Each cow gives 10 liters of milk a day. "
    "How many liters of milk does the farmer get in a day?",
)


def read_prompts(file: Path, field: str | None = None, option: str = "--prompts") -> list[str]:
    """The prompts of a file or of a data set's folder.

    .jsonl, .csv, .parquet and a folder of `datasets.Dataset.save_to_disk` have a prompt in a field of each row; any
    other file has one in each line that isn't blank. Lines end in LF, CRLF or CR; other Unicode separators are text, as
    JSON allows them inside a string.

    Args:
        field: the field with the prompt, default "question".

    Raises:
        InputError: no such file, not readable as its name says, a row without a text in the field (its line or row is
            named), or no prompt in it.
    """
    where = f"{option} {file}"
    name = "question" if field is None else field
    kind = file.suffix.lower()
    if file.is_dir():
        prompts = _column(_dataset(file, where), name, where)
    elif kind == ".parquet":
        prompts = _column(_parquet(file, where), name, where)
    elif kind == ".csv":
        prompts = _csv(_text(file, where), name, where)
    elif kind in OTHER_TABLES:
        raise InputError(f"{where}: {kind} is not read; save it as .jsonl, .csv or .parquet, or as .txt, one per line")
    else:
        lines = [(n, line.strip()) for n, line in enumerate(_text(file, where).split("\n"), 1) if line.strip()]
        if kind == ".jsonl":
            prompts = [_record(line, name, f"{where}, line {number}") for number, line in lines]
        elif field is None:
            prompts = [line for _, line in lines]
        else:
            raise InputError(f"{where}: a text file has no field {field!r}; give .jsonl, .csv or .parquet")
    if not prompts:
        raise InputError(f"{where}: no prompt in it; write one per line")
    return prompts


def _text(file: Path, where: str) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except OSError as error:
        raise InputError(f"{where}: {error.strerror or error}; name a .jsonl, .csv, .parquet or text file") from error


def _record(line: str, field: str, where: str) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON ({error})") from error
    if not isinstance(record, dict):
        raise InputError(f'{where}: needs an object with a text under "{field}"')
    return _prompt(record, field, where)


def _csv(text: str, field: str, where: str) -> list[str]:
    csv.field_size_limit(2**31 - 1)
    rows = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        return [_prompt(row, field, f"{where}, line {rows.line_num}") for row in rows]
    except csv.Error as error:
        raise InputError(f"{where}, line {rows.line_num + 1}: not CSV ({error})") from error


def _prompt(record: Mapping[str | None, Any], field: str, where: str) -> str:
    prompt = record.get(field)
    if isinstance(prompt, str) and prompt.strip():
        try:
            prompt.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(f'{where}: "{field}" has half of a character ({error.reason})') from error
        return prompt
    if field in record:
        raise InputError(f'{where}: needs a text under "{field}", got {_cut(repr(prompt))}')
    fields = _cut(", ".join(repr(key) for key in record if key is not None)) or "nothing"
    raise InputError(f'{where}: needs an object with a text under "{field}"; it has {fields} (choose with --field)')


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


def _column(table: Any, field: str, where: str) -> list[str]:
    if field not in table.column_names:
        columns = _cut(", ".join(map(repr, table.column_names)))
        raise InputError(f"{where}: has no column {field!r}, only {columns}; choose with --field")
    rows = enumerate(table.column(field).to_pylist(), 1)
    return [_prompt({field: value}, field, f"{where}, row {number}") for number, value in rows]


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


def render(tokenizer: Any, question: str, system: str) -> list[int]:
    """Token ids of the question in the model's chat template, or as plain text if it has none."""
    if not tokenizer.chat_template:
        text = f"{system}\n\n{question}\n\n" if system else f"{question}\n\n"
        return list(tokenizer(text)["input_ids"])
    from jinja2.exceptions import TemplateError

    def apply(*messages: tuple[str, str]) -> list[int]:
        conversation = [{"role": role, "content": content} for role, content in messages]
        return list(
            tokenizer.apply_chat_template(conversation, add_generation_prompt=True, return_dict=True)["input_ids"]
        )

    try:
        try:
            ids = apply(*([("system", system)] if system else []), ("user", question))
        except TemplateError:  # some templates refuse a system message; its text then opens the user's
            ids = apply(("user", f"{system}\n\n{question}"))
    except TemplateError as error:
        raise InputError(f"--model: its chat template cannot be used ({error})") from error
    if not ids:
        raise InputError("--model: its chat template makes nothing of a question; use a model with another one")
    return ids
