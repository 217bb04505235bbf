"""Responses that exist already, in the place of generated ones: a text, a reasoning trace, the answer of a chat."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from attnstats.errors import InputError
from attnstats.study.chat import ANSWERING, Conversation, brief, conversation, formatted, render
from attnstats.study.generation import positions_of
from attnstats.study.models import Description, LoadedModel
from attnstats.study.prompts import JSON_LINES, lines_of, parsed, text_of
from attnstats.study.text import counted, shortened

QUESTION = 200  # characters of what comes before a response that name it


class Chat(NamedTuple):
    """A conversation, and the text of the message that is its response.

    Attributes:
        messages: what comes before an answer; for a response of another role the conversation up to it.
    """

    messages: Conversation
    response: str
    role: str = ANSWERING


class Given(NamedTuple):
    """Token ids of what comes before a response and of the response, at least one each, and the text that names it.

    Attributes:
        left_out: what of the text after the response is not read; "": nothing.
        takes_system: it has no system text of its own, and so gets that of the settings.
    """

    question: str
    prompt: list[int]
    response: list[int]
    left_out: str = ""
    takes_system: bool = False


def read_text(file: Path, option: str = "--text") -> str:
    """Raises InputError: not readable, not UTF-8, or blank."""
    text = text_of(file, f"{option} {file}")
    if not text.strip():
        raise InputError(f"{option} {file}: is blank; name a file with a text")
    return text


def read_chats(file: Path, option: str = "--messages") -> Any:
    """The JSON of a file of chats, as `chats` takes it: a list, or an object in each line (.jsonl).

    Raises:
        InputError: not readable, or not JSON.
    """
    where, text = f"{option} {file}", read_text(file, option)
    is_lines = file.suffix.lower() in JSON_LINES
    return [parsed(*line) for line in lines_of(text, where)] if is_lines else parsed(text, where)


def chats(rows: Any, where: str, role: str | None = None) -> list[Chat]:
    """Conversations with the response of each.

    Args:
        rows: a list of messages, an object with `messages`, or a list of either.
        role: the last message of this role is the response; what follows it is left out. None: the answer that ends
            the conversation.

    Raises:
        InputError: anything else, or a conversation without such a message with a text.
    """
    if isinstance(rows, dict):
        rows = [rows]
    elif isinstance(rows, list) and rows and all(isinstance(row, dict) and "role" in row for row in rows):
        rows = [{"messages": rows}]
    if isinstance(rows, list):
        rows = [{"messages": row} if isinstance(row, list) else row for row in rows]
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) and "messages" in row for row in rows):
        raise InputError(f'{where}: needs a list of messages, a list of such lists, or objects with "messages"')
    return [chat_of(row, f"{where}, chat {number}", role) for number, row in enumerate(rows, 1)]


def chat_of(row: dict[str, Any], where: str, role: str | None = None) -> Chat:
    """The chat in `messages` of a row. Raises InputError as `chats`."""
    messages = row["messages"] if isinstance(row["messages"], list) else []
    roles = [message.get("role") if isinstance(message, dict) else None for message in messages]
    if role is not None and role not in roles:
        there = ", ".join(sorted({str(each) for each in roles})) or "none"
        raise InputError(f'{where}: has no message of the role "{role}"; its roles are {there}')
    end = len(roles) if role is None else len(roles) - roles[::-1].index(role)
    last = messages[end - 1] if end else None
    answer = last.get("content") if isinstance(last, dict) and last.get("role") == (role or ANSWERING) else None
    if isinstance(answer, list):
        texts = [part.get("text") for part in answer if isinstance(part, dict)]
        answer = "".join(text for text in texts if isinstance(text, str))
    if not isinstance(answer, str) or not answer.strip():
        must = "must end in a message" if role is None else "the last message"
        raise InputError(f'{where}: {must} of the role "{role or ANSWERING}" with a text, which is analysed')
    return Chat(conversation(messages[:end], row.get("tools"), where), answer, role or ANSWERING)


def of_any(tokenizer: Any, text: Any, where: str) -> Given:
    """The tokens of a text in any form; the response is all but the first token, or the answer of a chat.

    Args:
        tokenizer: None will do for token ids.
        text: a string, token ids (a list or an integer tensor or array), messages that end in an answer, an object with
            `messages`, or a Chat. A chat gets no system text that it does not have.

    Raises:
        InputError: anything else, no tokenizer where one is needed, or as `of_text` and `of_chat`.
    """
    if (ids := token_ids(text)) is not None:
        return of_ids(ids, 1, where)
    row = {"messages": text} if isinstance(text, list) and text and all(isinstance(m, dict) for m in text) else text
    if not isinstance(row, (str, Chat)) and not (isinstance(row, dict) and "messages" in row):
        forms = "a string, a list of token ids, or messages (objects with role and content)"
        raise InputError(f"{where}: must be {forms}, got {brief(text)}")
    if tokenizer is None:
        raise InputError(f"{where}: a model object has no tokenizer; pass tokenizer=, or token ids")
    if isinstance(row, str):
        return of_text(tokenizer, row, None, where)
    return of_chat(tokenizer, row if isinstance(row, Chat) else chat_of(row, where), "", where)


def token_ids(text: Any) -> list[int] | None:
    """The whole numbers of a list or array, also of one row (1, T), as models take them; None for anything else."""
    ids = text.tolist() if hasattr(text, "tolist") else text
    if isinstance(ids, Sequence) and len(ids) == 1 and isinstance(ids[0], (list, tuple)):
        ids = ids[0]
    if isinstance(ids, Sequence) and ids and all(hasattr(token, "__index__") for token in ids):
        return list(map(operator.index, ids))
    return None


def of_ids(ids: list[int], start: int, where: str) -> Given:
    """Token ids with `start` of them before the response. Raises InputError where either part is empty."""
    if not 0 < start < len(ids):
        raise InputError(
            f"{where}: needs a token before the response and one in it; {start} are before it of {len(ids)}"
        )
    return Given(f"{len(ids)} token ids", ids[:start], ids[start:])


def of_text(tokenizer: Any, text: str, start: str | None, where: str) -> Given:
    """The tokens of a text, and where its response starts.

    Args:
        start: where the response starts: a number of characters, or a text after which it does. A tag such as <think>
            ends it, too, where </think> follows. None: the response is all but the first token.

    Raises:
        InputError: no such place, no token before or after it, or a tokenizer that doesn't say where its tokens are.
    """
    place, end = response_span(text, start, where)
    ids, first = _tokens(tokenizer, text[:end], place, where)
    first = max(first, 1) if start is None else first
    if not 0 < first < len(ids):
        raise InputError(f"{where}: needs a token before the response and one in it; the text has {len(ids)} tokens")
    before = text[:place].strip() or text
    return Given(shortened(before, QUESTION), ids[:first], ids[first:], _left_out(text[end:], start))


def _left_out(rest: str, start: str | None) -> str:
    """What is not read of a text from the tag on that ends its response."""
    if start is None or not rest:
        return ""
    closing = _closing(start)
    after = rest.removeprefix(closing).strip()
    again = f", with another {start} in them" if start in after else ""
    return f"{counted(len(after), 'character')} after {closing}{again}" if after else ""


def _closing(tag: str) -> str:
    return f"</{tag[1:]}"


def _tokens(tokenizer: Any, text: str, place: int, where: str, **options: Any) -> tuple[list[int], int]:
    """The tokens of a text, and the first one that begins at a place in it or later."""
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(
            f"{where}: the model has a slow tokenizer, which doesn't say where its tokens are; use another"
        )
    encoded = tokenizer(text, return_offsets_mapping=True, **options)
    ids, spans = list(encoded["input_ids"]), list(encoded["offset_mapping"])
    while ids and spans[-1][0] == spans[-1][1]:  # an end token, which is not of the text
        ids.pop()
        spans.pop()
    return ids, next((i for i, (begin, stop) in enumerate(spans) if begin < stop and begin >= place), len(ids))


def response_span(text: str, start: str | None, where: str) -> tuple[int, int]:
    """Where the response of a text starts and ends, in characters. Raises InputError: no such place."""
    if start is None:
        return 0, len(text)
    if start.isdecimal():
        if not int(start) < len(text):
            raise InputError(f"{where}: --response-from {start} is past its {len(text)} characters")
        return int(start), len(text)
    if start not in text:
        raise InputError(f"{where}: has no {start!r}, which --response-from must be, or a number of characters")
    place = text.index(start) + len(start)
    end = text.find(_closing(start), place) if start.startswith("<") else -1
    return place, len(text) if end < 0 else end


def of_chat(tokenizer: Any, chat: Chat, system: str, where: str) -> Given:
    """The conversation in the model's chat format, and its response.

    An answer is what the model would have written after the prompt; a message of another role is the part of the
    formatted conversation that has its text.

    Raises:
        InputError: as `chat.render`, a response without a token, or one that the chat format changes.
    """
    if chat.role == ANSWERING:
        prompt = render(tokenizer, chat.messages, system)
        response = list(tokenizer(chat.response, add_special_tokens=False)["input_ids"])
    else:
        text, said = formatted(tokenizer, chat.messages, system), chat.response.strip()
        place = text.rfind(said)
        if place < 0:
            raise InputError(
                f'{where}: the model\'s chat format changes the text of the role "{chat.role}"; use --text'
            )
        ids, first = _tokens(tokenizer, text[: place + len(said)], place, where, add_special_tokens=False)
        prompt, response = ids[:first], ids[first:]
    if not prompt or not response:
        raise InputError(f'{where}: its message of the role "{chat.role}" has no token, or none is before it')
    return Given(chat.messages.question, prompt, response, takes_system=not chat.messages.has_system)


def check(given: Sequence[Given], model: LoadedModel | Description, where: str = "a text") -> None:
    """Raises InputError if a text needs more positions than the model has, or has tokens that the model doesn't."""
    limit, vocabulary = positions_of(model), getattr(model.config.get_text_config(), "vocab_size", None)
    longest = max(len(each.prompt) + len(each.response) for each in given)
    if limit is not None and longest > limit:
        raise InputError(f"{where} has {longest} tokens, and {model.name} {limit} positions; shorten it")
    if vocabulary is None:
        return
    for token in (token for each in given for token in (*each.prompt, *each.response)):
        if not 0 <= token < vocabulary:
            raise InputError(f"{where} has token {token}, and {model.name} has tokens 0 to {vocabulary - 1}")
