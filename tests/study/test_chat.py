"""What a model reads of a prompt: system texts, conversations, tools, and what tokenizers put around a text."""

import pytest
from tokenizers import processors
from transformers import AutoTokenizer

from attnstats.errors import InputError
from attnstats.study.chat import Conversation, conversation, question_of, render
from tests.tiny import WORDS, save_tiny_model

CHAT = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}so "
REFUSING = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + CHAT
# As Qwen2.5 and SmolLM2 have it: a text of its own where there is no system message.
WITH_DEFAULT = "{% if messages[0].role != 'system' %}system are left {% endif %}" + CHAT
# As above, and an empty system message counts as none.
STUBBORN = (
    "{% if messages[0].role == 'system' and messages[0].content %}system {{ messages[0].content }} "
    "{% set messages = messages[1:] %}{% else %}system are left {% endif %}" + CHAT
)
TOOLS = (
    "{% for t in tools or [] %}{{ t.function.name }} {% endfor %}{% for m in messages %}{{ m.role }} {{ m.content }} "
    "{% for c in m.tool_calls or [] %}{{ c.function.name }} {{ c.function.arguments.n }} {% endfor %}{% endfor %}so "
)
CALL = {"type": "function", "function": {"name": "rolls", "arguments": {"n": "left"}}}
TOOL = {"type": "function", "function": {"name": "rolls", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture
def read(tmp_path):
    """A function that gives the words that the tiny model reads of a prompt in a template."""

    def read(template, prompt, system=""):
        tokenizer = AutoTokenizer.from_pretrained(save_tiny_model(tmp_path / "tiny", chat_template=template))
        return " ".join(WORDS[token] for token in render(tokenizer, prompt, system))

    return read


@pytest.mark.parametrize(("template", "system", "expected"), [
    ("default", "are", "system are user how many so"),
    ("default", "", "user how many so"),
    (None, "are", "are how many"),
    (None, "", "how many"),
    # A template that refuses a system message gets its text with the question.
    (REFUSING, "are", "user are how many so"),
    (REFUSING, "", "user how many so"),
    (WITH_DEFAULT, "left", "system left user how many so"),
    # None is none: an empty system message, and not the template's own text.
    (WITH_DEFAULT, "", "system user how many so"),
    (STUBBORN, "", "system user how many so"),
])  # fmt: skip
def test_questions(read, template, system, expected):
    assert read(template, "how many", system) == expected


MESSAGES = [
    {"role": "user", "content": "how many"},
    {"role": "assistant", "content": "so"},
    {"role": "user", "content": "rolls"},
    {"role": "assistant", "content": "left"},
]


def test_the_last_answer_of_a_conversation_is_what_is_generated(read):
    prompt = conversation(MESSAGES, None, "row 1")
    assert read("default", prompt) == "user how many <unk> so user rolls so"  # "assistant" is not in its vocabulary
    assert read("default", prompt, "are") == "system are user how many <unk> so user rolls so"
    with_own = conversation([{"role": "system", "content": "left"}, *MESSAGES], None, "row 1")
    assert read(WITH_DEFAULT, with_own, "are") == "system left user how many <unk> so user rolls so"
    assert question_of(prompt) == "rolls"
    parts = conversation([{"role": "user", "content": [{"type": "text", "text": "how"}]}], None, "row 1")
    assert question_of(parts) == "how"


def test_a_role_that_the_template_leaves_out_is_named(read):
    prompt = conversation([MESSAGES[0], {"role": "robot", "content": "rolls left"}], None, "row 1")
    assert read("default", prompt) == "user how many <unk> rolls left so"  # this template writes any role
    only_users = "{% for m in messages if m.role == 'user' %}{{ m.content }} {% endfor %}so "
    with pytest.raises(InputError, match="its chat template has no role 'robot'; most have system, developer, user"):
        read(only_users, prompt)
    thinking = conversation([*MESSAGES[:3]], None, "row 1")  # templates may shorten earlier answers
    assert read(only_users, thinking) == "how many rolls so"


@pytest.mark.parametrize("arguments", [{"n": "left", "absent": None}, '{"n": "left"}'])
@pytest.mark.parametrize("tools", [[TOOL], '[{"type": "function", "function": {"name": "rolls"}}]'])
def test_tool_calls(read, arguments, tools):
    """As tables and OpenAI have them: None for absent keys, arguments and tools as JSON in a string."""
    call = {"function": {"name": "rolls", "arguments": arguments}, "id": None}
    messages = [
        {"role": "user", "content": "how many", "tool_calls": None},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "system", "content": "many", "tool_call_id": "1"},
        {"role": "assistant", "content": "so", "tool_calls": None},
    ]
    prompt = conversation(messages, tools, "row 1")
    assert read(TOOLS, prompt) == "rolls user how many <unk> rolls left system many so"


@pytest.mark.parametrize(("messages", "tools", "message"), [
    ([], None, "row 1: needs a list of messages, got []"),
    ("how", None, "row 1: needs a list of messages, got 'how'"),
    (["how"], None, "row 1, message 1: needs an object with a \"role\", got 'how'"),
    ([{"content": "how"}], None, "message 1: needs an object with a \"role\""),
    ([MESSAGES[0], {"role": "user", "content": 7}], None, "message 2: content must be a text, got 7"),
    ([{"role": "user", "content": [{"type": "image"}]}], None, "message 1: a part of its content is no text: {'type'"),
    ([{"role": "user", "tool_calls": [1]}], None, "tool_calls must be a list of objects, got [1]"),
    ([{"role": "user", "tool_calls": [{"function": {}}]}], None, "a tool call needs the name of its function"),
    ([{"role": "user", "tool_calls": [{"name": "f", "arguments": "{"}]}], None, "arguments of f: not JSON"),
    ([{"role": "user", "content": "\ud800"}], None, "messages must be text that UTF-8 and JSON can hold"),
    ([MESSAGES[1]], None, "has no text before the answer that is to be generated"),
    (MESSAGES, "{", "tools: not JSON"),
    (MESSAGES, [1], "tools must be a list of objects, got [1]"),
])  # fmt: skip
def test_conversations_that_are_none(messages, tools, message):
    with pytest.raises(InputError) as error:
        conversation(messages, tools, "row 1")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("template", "prompt", "message"), [
    (None, Conversation(MESSAGES[:1]), "has no chat template, which a list of messages needs"),
    ("default", Conversation(MESSAGES[:1], [TOOL]), "its chat template leaves out the tools"),
    ("default", Conversation([{**MESSAGES[1], "tool_calls": [CALL]}]), "leaves out the call of rolls"),
    ("{{ messages[0].content + 1 }}", "how", "its chat template cannot be used"),
    ("{{ '' }}", "how", "its chat template makes nothing of a question"),
])  # fmt: skip
def test_what_a_template_cannot_take_is_named(read, template, prompt, message):
    with pytest.raises(InputError, match=message):
        read(template, prompt)


@pytest.mark.parametrize("added", ["$A <end>", "<unk> $A <end>", "<unk> $A", "$A"])
def test_nothing_stands_between_a_text_and_its_continuation(tmp_path, added):
    """A tokenizer that ends every text with its end token would end the prompt before the answer."""
    tokenizer = AutoTokenizer.from_pretrained(save_tiny_model(tmp_path, chat_template=None))
    special = [(word, WORDS.index(word)) for word in ("<end>", "<unk>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=added, special_tokens=special)
    assert [WORDS[token] for token in render(tokenizer, "how many <end>", "")] == [
        *["<unk>"] * added.startswith("<unk>"), "how", "many", "<end>",
    ]  # fmt: skip
