"""What is asked of the model: prompts from the command line, a file or our own three, as the model's chat format.

A prompt is a question; the paper's system text (App. A.1) goes before it. Called by cli.py (reading) and
analyze.py (rendering).
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from attnstats.errors import InputError

SYSTEM = "Please reason step by step, and put your final answer within \\boxed{}."

QUESTIONS = (
    "A baker makes 4 trays of rolls with 12 rolls on each tray. She sells 30 rolls before noon. "
    "How many rolls does she have left?",
    "A tank holds 200 liters of water. It loses 15 liters a day for 6 days. Then 40 liters are poured in. "
    "How much water is in the tank?",
    "A farmer has 3 barns with 20 cows in each barn. Each cow gives 10 liters of milk a day. "
    "How many liters of milk does the farmer get in a day?",
)


def read_prompts(file: Path) -> list[str]:
    """The prompts of a file: the `question` of each line of a .jsonl file, else each line of text.

    Lines end in LF, CRLF or CR. Other separators of Unicode are text: JSON allows them inside a string.

    Raises:
        InputError: no such file, not UTF-8, a line that isn't a JSON object with a question, nothing in it.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"--prompts {file}: not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except OSError as error:
        raise InputError(f"--prompts {file}: {error.strerror or error}; name a .jsonl or text file") from error
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if file.suffix == ".jsonl":
        questions = [_question(file, number, line) for number, line in lines]
    else:
        questions = [line for _, line in lines]
    if not questions:
        raise InputError(f"--prompts {file}: no prompt in it; write one per line")
    return questions


def _question(file: Path, number: int, line: str) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise InputError(f"--prompts {file}, line {number}: not JSON ({error})") from error
    question = record.get("question") if isinstance(record, dict) else None
    if not isinstance(question, str) or not question.strip():
        raise InputError(f'--prompts {file}, line {number}: needs an object with a text under "question"')
    return question


def paper_prompt(question: str) -> str:
    """The question as the paper puts it (App. A.1): its last sentence as `Question`, all before it as `Context`.

    Example:
        >>> print(paper_prompt("A tray holds 12 rolls. How many do 4 trays hold?"))
        Context: A tray holds 12 rolls.
        Question: How many do 4 trays hold?
    """
    *context, last = re.split(r"(?<=[.!?])[\"')\]]*\s+(?=\S)", question.strip())
    before = question.strip()[: -len(last)].strip() if context else ""
    return f"Context: {before}\nQuestion: {last}" if before else f"Question: {last}"


def render(tokenizer: Any, question: str, system: str) -> list[int]:
    """Token ids of the question as the model expects it: its chat template, or plain text where it has none."""
    if not tokenizer.chat_template:
        text = f"{system}\n\n{question}\n\n" if system else f"{question}\n\n"
        return list(tokenizer(text)["input_ids"])
    from jinja2.exceptions import TemplateError

    user = {"role": "user", "content": question}
    messages = [{"role": "system", "content": system}, user] if system else [user]
    try:
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    except TemplateError:
        # Some templates refuse a system message; its text then opens the user's.
        merged = [{"role": "user", "content": f"{system}\n\n{question}"}]
        ids = tokenizer.apply_chat_template(merged, add_generation_prompt=True, return_dict=True)["input_ids"]
    return list(ids)
