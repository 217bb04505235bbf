"""The tables of a corpus, written prompt by prompt: tokens, heads and prompts, as Parquet and as CSV or JSON lines.

Rows wait until they fill a row group, so that memory does not grow with the corpus. Parquet and JSON lines have texts
as they are; CSV has those that a spreadsheet would run as a formula with a `'` before them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from attnstats.study.text import FORMULA, utf8

if TYPE_CHECKING:
    from attnstats.study.analysis import Outline

TOKENS, HEADS, PROMPTS = "tokens", "heads", "prompts"
FILES = ("tokens.parquet", "tokens.csv", "heads.parquet", "heads.csv", "prompts.parquet", "prompts.jsonl")
ROW_GROUP, GROUP_BYTES = 65_536, 2**22  # rows of a Parquet row group, and bytes of theirs, at most
TOP = 10  # positions of highest WAAD and FAI of each prompt
COLUMNS = {
    TOKENS: {
        "prompt": "int64", "position": "int64", "token": "string", "is_response": "bool", "waad": "float32",
        "fai": "float32", "fai_valid": "bool", "delta": "float32", "entropy": "float32",
    },
    HEADS: {"prompt": "int64", "layer": "int64", "head": "int64", "mean_distance": "float64", "class": "string"},
    PROMPTS: {
        "prompt": "int64", "question": "string", "response": "string", "prompt_tokens": "int64",
        "response_tokens": "int64", "preplan_positions": "positions", "anchor_positions": "positions",
    },
}  # fmt: skip
Rows = dict[str, Any]  # columns by name, all of one length


@contextmanager
def written(folder: Path) -> Iterator[Callable[[int, Outline], None]]:
    """A function that adds a prompt of this number to the tables in `folder`; they are whole when the block ends."""
    with ExitStack() as stack:
        lines = stack.enter_context((folder / "prompts.jsonl").open("w", encoding="ascii"))
        add_tokens, add_heads, add_prompts = (
            stack.enter_context(_table(folder / name, columns, with_csv=name != PROMPTS))
            for name, columns in COLUMNS.items()
        )

        def add(prompt: int, outline: Outline) -> None:
            add_tokens(token_rows(prompt, outline))
            add_heads(head_rows(prompt, outline))
            record = prompt_record(prompt, outline)
            lines.write(json.dumps(record, ensure_ascii=True, allow_nan=False) + "\n")
            add_prompts({name: [value] for name, value in record.items()})

        yield add


def write(folder: Path, outlines: Iterable[Outline]) -> None:
    """Write the tables of these prompts; each is taken once."""
    with written(folder) as add:
        for prompt, outline in enumerate(outlines):
            add(prompt, outline)


@contextmanager
def _table(path: Path, columns: dict[str, str], *, with_csv: bool) -> Iterator[Callable[[Rows], None]]:
    """A function that appends rows to path.parquet, and to path.csv; NaN becomes a missing value."""
    import pyarrow
    import pyarrow.csv
    import pyarrow.parquet

    types = {"positions": pyarrow.list_(pyarrow.int64())}
    schema = pyarrow.schema([(name, types.get(kind, kind)) for name, kind in columns.items()])
    waiting: list[Any] = []
    rows_waiting = bytes_waiting = 0

    def add(rows: Rows) -> None:
        nonlocal rows_waiting, bytes_waiting
        arrays = [pyarrow.array(rows[field.name], field.type, from_pandas=True) for field in schema]
        batch = pyarrow.record_batch(arrays, schema=schema)
        waiting.append(batch)
        rows_waiting += len(batch)
        bytes_waiting += batch.nbytes
        if rows_waiting >= ROW_GROUP or bytes_waiting >= GROUP_BYTES:
            flush()

    def flush() -> None:
        nonlocal rows_waiting, bytes_waiting
        group = pyarrow.Table.from_batches(waiting, schema)
        waiting.clear()
        rows_waiting = bytes_waiting = 0
        parquet.write_table(group)
        if csv is not None:
            csv.write_table(_without_formulas(group))

    with ExitStack() as stack:
        parquet = stack.enter_context(pyarrow.parquet.ParquetWriter(path.with_suffix(".parquet"), schema))
        # Text is always quoted: a bare carriage return would end the row.
        options = pyarrow.csv.WriteOptions(quoting_style="needed")
        file = path.with_suffix(".csv")
        csv = stack.enter_context(pyarrow.csv.CSVWriter(file, schema, write_options=options)) if with_csv else None
        yield add
        flush()


def _without_formulas(table: Any) -> Any:
    """The table with text as of `spreadsheet_cell`."""
    import pyarrow
    import pyarrow.compute

    for i, field in enumerate(table.schema):
        if field.type == pyarrow.string():
            cells = pyarrow.compute.replace_substring_regex(table.column(i), FORMULA, r"'\0")
            table = table.set_column(i, field, cells)
    return table


def token_rows(prompt: int, outline: Outline) -> Rows:
    """The columns of the tokens table."""
    rows = outline.columns()
    return {"prompt": np.full(len(outline.tokens), prompt), "position": np.arange(len(outline.tokens)), **rows}


def head_rows(prompt: int, outline: Outline) -> Rows:
    """The columns of the heads table: mean distance over the response in tokens, and class."""
    layers, heads = outline.distance.shape
    return {
        "prompt": [prompt] * (layers * heads),
        "layer": [layer for layer in outline.layers for _ in range(heads)],
        "head": list(range(heads)) * layers,
        "mean_distance": np.array(outline.distance.flatten().double().numpy()),
        "class": np.select([outline.classes.local, outline.classes.global_], ["local", "global"], "middle").ravel(),
    }


def prompt_record(prompt: int, outline: Outline) -> dict[str, Any]:
    """The row of a prompt: its texts, lengths, and the positions of highest WAAD (preplan) and FAI (anchor)."""
    return {
        "prompt": prompt,
        "question": utf8(outline.question),
        "response": utf8(outline.response_text),
        "prompt_tokens": outline.response_start,
        "response_tokens": int(outline.response.sum()),
        "preplan_positions": outline.preplan(TOP),
        "anchor_positions": outline.anchors(TOP),
    }
