"""What a model reads of a prompt: a question or a conversation, in the model's chat format, as token ids.

A conversation is a list of messages as OpenAI and Hugging Face write them, with the tools that it may call; its last
answer is what the model is to write.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from attnstats.errors import InputError

Message = dict[str, Any]
MARK = "\ue000system\ue000"  # stands for a system text where a chat template is examined
ANSWERING = "assistant"
SYSTEM_ROLES = ("system", "developer")
ROLES = (*SYSTEM_ROLES, "user", ANSWERING, "tool")  # templates can have others


@dataclass(frozen=True, eq=False)
class Conversation:
    """The messages that the model answers, and descriptions of the tools that it may call."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None

    @property
    def question(self) -> str:
        """The text of the last message of the user, or of the last one if no user has a text."""
        of_user = [message for message in self.messages if message["role"] == "user" and _text(message)]
        return _text((of_user or self.messages)[-1])

    @property
    def has_system(self) -> bool:
        """Whether it opens with a system text of its own."""
        return self.messages[0]["role"] in SYSTEM_ROLES


Prompt = str | Conversation


def question_of(prompt: Prompt) -> str:
    """The text that stands for a prompt on a page and in a table."""
    return prompt if isinstance(prompt, str) else prompt.question


def conversation(messages: Any, tools: Any, where: str) -> Conversation:
    """A conversation of a data set's row, without its last answer, which is to be generated.

    Entries that are None, which tables have for absent keys, are left out. Arguments of a call that are JSON in a
    string, as OpenAI has them, become an object, as chat templates expect them.

    Args:
        messages: objects with `role` and `content`, or `tool_calls` in the place of a content.
        tools: descriptions of functions as objects or as JSON; empty or None: none.
        where: the row, for errors.

    Raises:
        InputError: a message or a tool that is none, or nothing before the last answer.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise InputError(f"{where}: needs a list of messages, got {brief(messages)}")
    end = len(messages)
    while end and isinstance(messages[end - 1], dict) and messages[end - 1].get("role") == ANSWERING:
        end -= 1
    kept = [_message(_without_none(message), f"{where}, message {n}") for n, message in enumerate(messages[:end], 1)]
    if not any(_text(message).strip() for message in kept):
        raise InputError(f"{where}: has no text before the answer that is to be generated")
    if isinstance(tools, str):
        tools = _from_json(tools, f"{where}: tools")
    tools = _without_none(tools) or None
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise InputError(f"{where}: tools must be a list of objects, got {brief(tools)}")
    try:
        json.dumps([kept, tools], ensure_ascii=False).encode("utf-8")
    except (TypeError, ValueError) as error:
        raise InputError(f"{where}: messages must be text that UTF-8 and JSON can hold ({error})") from error
    return Conversation(kept, tools)


def _message(message: Any, where: str) -> Message:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise InputError(f'{where}: needs an object with a "role", got {brief(message)}')
    content, calls = message.get("content", ""), message.get("tool_calls", [])
    if isinstance(content, list):
        other = [part for part in content if not (isinstance(part, dict) and isinstance(part.get("text"), str))]
        if other:
            raise InputError(f"{where}: a part of its content is no text: {brief(other[0])}")
    elif not isinstance(content, str):
        raise InputError(f"{where}: content must be a text, got {brief(content)}")
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise InputError(f"{where}: tool_calls must be a list of objects, got {brief(calls)}")
    if not calls:
        return {**message, "content": content}
    return {**message, "content": content, "tool_calls": [_call(call, where) for call in calls]}


def _call(call: dict[str, Any], where: str) -> dict[str, Any]:
    function = call.get("function", call)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise InputError(f"{where}: a tool call needs the name of its function, got {brief(call)}")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        arguments = _from_json(arguments, f"{where}: arguments of {function['name']}")
    complete = {**function, "arguments": arguments}
    return {**call, "function": complete} if "function" in call else complete


def _from_json(text: str, where: str) -> Any:
    try:
        return json.loads(text or "null")
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON ({error})") from error


def _without_none(value: Any) -> Any:
    """A value of JSON without the entries of its objects that are None."""
    if isinstance(value, Mapping):
        return {key: _without_none(entry) for key, entry in value.items() if entry is not None}
    return [_without_none(entry) for entry in value] if isinstance(value, list) else value


def _text(message: Message) -> str:
    content = message["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def brief(value: Any) -> str:
    """A value for an error message, at most 80 characters of it."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:79]}…"


def render(tokenizer: Any, prompt: Prompt, system: str) -> list[int]:
    """Token ids of a prompt in the model's chat template; a question as plain text if the model has none.

    Args:
        system: opens a prompt that has no system message of its own. "": the model gets no system text, also not the
            one that its template has for that case.

    Raises:
        InputError: the template takes no such prompt, or leaves a part of it out.
    """
    if not tokenizer.chat_template and isinstance(prompt, str):
        return _plain(tokenizer, f"{system}\n\n{prompt}\n\n" if system else f"{prompt}\n\n")
    if isinstance(prompt, str):
        prompt = Conversation([{"role": "user", "content": prompt}])
    ids = tokenizer(formatted(tokenizer, prompt, system), add_special_tokens=False)["input_ids"]
    if not ids:
        raise InputError("--model: its chat template makes nothing of a question; use a model with another one")
    return list(ids)


def _plain(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text that the model goes on with: without what a tokenizer puts after it, such as an end token."""
    ids, bare = (list(tokenizer(text, add_special_tokens=special)["input_ids"]) for special in (True, False))
    for start in range(len(ids) - len(bare) + 1):
        if ids[start : start + len(bare)] == bare:
            return ids[: start + len(bare)]
    return ids


def formatted(tokenizer: Any, prompt: Conversation, system: str) -> str:
    """The text of a conversation up to the answer. Raises InputError as `render`."""
    if not tokenizer.chat_template:
        raise InputError("--model: has no chat template, which a list of messages needs; use a chat model")
    from jinja2.exceptions import TemplateError

    def apply(messages: list[Message], tools: list[dict[str, Any]] | None) -> str:
        return str(tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=True, tokenize=False))

    def opened(text: str) -> str:
        """The conversation with a system text before it."""
        try:
            return apply([{"role": "system", "content": text}, *messages], prompt.tools)
        except TemplateError:  # some templates refuse a system message; its text then opens the first one
            first, *rest = messages
            return apply([{**first, "content": f"{text}\n\n{_text(first)}"}, *rest], prompt.tools)

    messages = prompt.messages
    has_system = prompt.has_system
    try:
        plain, without_tools = (apply(messages, tools) for tools in (prompt.tools, None))
        text = opened(system) if system and not has_system else plain
        if not system and not has_system:
            # A template can have a text of its own for a conversation without a system message: then this one is longer
            # than with an empty system message, which is what is meant.
            text = min(plain, opened(MARK).replace(MARK, ""), key=len)
    except (TemplateError, TypeError, ValueError, KeyError) as error:
        raise InputError(f"--model: its chat template cannot be used ({error})") from error
    called = [call.get("function", call)["name"] for message in messages for call in message.get("tool_calls", [])]
    left_out = [f"the call of {name}" for name in called if name not in text]
    texts = ((message["role"], _text(message).strip()) for message in messages)
    if ignored := [role for role, content in texts if role not in ROLES and content not in text]:
        raise InputError(f"--model: its chat template has no role {ignored[0]!r}; most have {', '.join(ROLES)}")
    if prompt.tools and plain == without_tools:
        left_out.append("the tools")
    if left_out:
        raise InputError(f"--model: its chat template leaves out {left_out[0]}; use a model that takes tools")
    return text
