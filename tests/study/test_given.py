"""Responses that exist already: where they start and end, and that they are read as generated ones are."""

import html
import json

import pytest
import torch

import attnstats
from attnstats.cli.main import main
from attnstats.errors import InputError
from attnstats.study import given, models
from attnstats.study.chat import render
from tests.tiny import save_tiny_model

TEXT = "how many are left <think> w1 w2 many left w3 </think> w9 w10"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("given") / "model")


@pytest.fixture(scope="module")
def tokenizer(model):
    return models.describe(str(model)).tokenizer


def words(tokenizer, ids):
    return tokenizer.convert_ids_to_tokens(ids)


@pytest.mark.parametrize(
    ("start", "response"),
    [
        (None, ["many", "are", "left", "<unk>", "w1", "w2", "many", "left", "w3", "<unk>", "w9", "w10"]),
        ("<think>", ["w1", "w2", "many", "left", "w3"]),  # its closing tag ends it
        ("</think>", ["w9", "w10"]),
        ("left", ["<unk>", "w1", "w2", "many", "left", "w3", "<unk>", "w9", "w10"]),
        (str(TEXT.index("w9")), ["w9", "w10"]),
        (str(TEXT.index("w9") + 1), ["w10"]),  # a token that began before is of the prompt
    ],
)
def test_where_a_response_starts_and_ends(tokenizer, start, response):
    found = given.of_text(tokenizer, TEXT, start, "text")
    assert words(tokenizer, found.response) == response
    whole = tokenizer(TEXT)["input_ids"]
    assert found.prompt + found.response == whole[: len(found.prompt) + len(found.response)]


def test_an_answer_follows_the_prompt_that_the_model_would_have_read(tokenizer, tmp_path):
    file = tmp_path / "chat.json"
    messages = [{"role": "user", "content": "how many"}, {"role": "assistant", "content": "w1 w2"}]
    file.write_text(json.dumps(messages))
    (chat,) = given.chats(given.read_chats(file), "chat")
    found = given.of_chat(tokenizer, chat, "left", "chat")
    assert found.prompt == render(tokenizer, "how many", "left")
    assert words(tokenizer, found.response) == ["w1", "w2"]
    assert found.question == "how many"
    lines = tmp_path / "chats.jsonl"
    lines.write_text("\n".join(json.dumps({"messages": [*messages[:1], answer]}) for answer in messages[1:] * 2))
    assert [chat.response for chat in given.chats(given.read_chats(lines), "chats")] == ["w1 w2"] * 2
    (chat,) = given.chats({"messages": messages}, "chats")
    assert chat.response == "w1 w2"


ROLES = [
    {"role": "system", "content": "left"},
    {"role": "user", "content": "how many"},
    {"role": "assistant", "content": "w1 w2"},
    {"role": "tool", "content": " w3 w4 w5 "},
    {"role": "assistant", "content": "w6"},
    {"role": "user", "content": "are left"},
]


@pytest.mark.parametrize(
    ("role", "prompt", "response"),
    [
        ("tool", "system left user how many <unk> w1 w2 <unk>", "w3 w4 w5"),
        ("system", "system", "left"),
        ("user", "system left user how many <unk> w1 w2 <unk> w3 w4 w5 <unk> w6 user", "are left"),
        ("assistant", "system left user how many <unk> w1 w2 <unk> w3 w4 w5 so", "w6"),
    ],
)
def test_the_last_message_of_a_chosen_role_is_the_response(tokenizer, role, prompt, response):
    (chat,) = given.chats(ROLES, "chat", role)
    found = given.of_chat(tokenizer, chat, "", "chat")
    assert words(tokenizer, found.prompt) == prompt.split()
    assert words(tokenizer, found.response) == response.split()


def test_a_role_that_no_message_has_is_named_with_those_that_are_there(model, tmp_path):
    file = tmp_path / "chat.json"
    file.write_text(json.dumps(ROLES))
    told = r'has no message of the role "critic"; its roles are assistant, system, tool, user'
    with pytest.raises(InputError, match=rf"^messages .*chat\.json, chat 1: {told}"):
        attnstats.analyze(model, messages=file, response_role="critic", out=tmp_path / "out")
    with pytest.raises(InputError, match=rf"messages, chat 1: {told}"):
        attnstats.analyze(model, messages=ROLES, response_role="critic", out=tmp_path / "out")


def test_messages_and_token_ids_as_objects(model, tokenizer, tmp_path):
    options = {"layers": [1, 3], "system": ""}
    (chat,) = attnstats.analyze(model, messages=ROLES[:5], response_role="tool", out=tmp_path / "chat", **options)
    assert [chat.shown[i] for i in (chat.response_start, -1)] == ["w3", "w5"]
    ids = tokenizer(TEXT)["input_ids"]
    for form in (ids, torch.tensor([ids])):
        (one,) = attnstats.analyze(model, text=form, response_from=4, out=tmp_path / "ids", **options)
        assert one.token_ids.tolist() == ids
        assert one.response_start == 4
    (text,) = attnstats.analyze(model, text=TEXT, response_from=TEXT.index("<think>"), out=tmp_path / "text", **options)
    torch.testing.assert_close(one.head_waad, text.head_waad)
    (whole,) = attnstats.analyze(model, text=ids, out=tmp_path / "whole", **options)
    assert whole.response_start == 1


def test_a_text_is_read_as_a_generated_response_is(model, tmp_path):
    run = attnstats.analyze(model, text=TEXT, response_from="<think>", layers=[1, 3], out=tmp_path / "out")
    (analysis,) = run
    assert [analysis.shown[i] for i in (analysis.response_start, -1)] == ["w1", "w3"]
    loaded = models.load(str(model), dtype="float32", device="cpu", notify=lambda _: None)
    statistic = attnstats.WAAD(10)
    with torch.no_grad(), attnstats.capture(loaded.model, statistics=[statistic], layers=[1, 3]) as captured:
        loaded.model(analysis.token_ids[None])
    torch.testing.assert_close(analysis.head_waad, captured[statistic][:, 0])
    assert run.settings.layers == [1, 3]


UNUSED = {"max_tokens", "temperature", "seed", "system"}  # by what is read


@pytest.mark.parametrize(
    ("options", "said", "unused"),
    [
        ({"text": TEXT}, "read 1 text.", UNUSED),
        ({"text": TEXT, "temperature": 2.0}, "read 1 text.", UNUSED - {"temperature"}),  # entropies are those at it
        ({"messages": [{"messages": ROLES[1:3]}] * 2, "system": "so"}, "read 2 chats.", UNUSED - {"system"}),
        ({"messages": ROLES[:3], "system": "so"}, "read 1 chat.", UNUSED),
        ({"prompts": ["left"], "max_tokens": 5}, "answered 1 prompt.", set()),
    ],
    ids=["text", "temperature", "chats", "system", "prompt"],
)
def test_a_text_that_was_read_is_not_called_answered(model, tmp_path, capsys, options, said, unused):
    run = attnstats.analyze(model, layers=[1, 3], out=tmp_path / "out", quiet=False, **options)
    page = run.page()
    assert f"while it {said}".replace(".", "") in page
    assert UNUSED - run.summary["settings"].keys() == unused
    for name in UNUSED:
        assert (f"<dt>{name.replace('_', ' ')}</dt>" in page) == (name not in unused)
    printed = capsys.readouterr().out
    thing = said.split(maxsplit=1)[1][:-1]
    assert f"Tables of {thing}" in printed
    assert f"{thing}, up to 5 tokens each" in printed if not unused else "tokens each" not in printed
    assert repr(run).splitlines()[0].endswith(f"{thing}, model")
    assert attnstats.load(tmp_path / "out").settings == run.settings


def test_two_texts_that_were_read_are_compared_without_settings_of_sampling(model, tmp_path):
    for name in ("one", "two"):
        attnstats.analyze(model, text=TEXT, layers=[1, 3], out=tmp_path / name)
    assert main(["report", str(tmp_path / "one"), str(tmp_path / "two")]) == 0
    page = (tmp_path / "one" / "comparison.html").read_text(encoding="utf-8")
    assert '<th scope="row">window</th>' in page
    assert not [name for name in ("max tokens", "temperature", "seed", "system") if f">{name}</th>" in page]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (TEXT, "6 characters after </think>"),
        (f"{TEXT} <think> w3 </think>", "26 characters after </think>, with another <think> in them"),
        (TEXT[: TEXT.index(" w9")], ""),
        (TEXT[: TEXT.index(" </think>")], ""),
    ],
    ids=["answer", "second", "nothing", "open"],
)
def test_what_is_behind_the_closing_tag_is_said_to_be_left_out(model, tmp_path, capsys, text, told):
    run = attnstats.analyze(model, text=text, response_from="<think>", layers=[1, 3], out=tmp_path / "out", quiet=False)
    assert ("left out: " in (printed := capsys.readouterr().out)) == bool(told)
    assert told in printed
    assert run.summary.get("left_out", []) == ([told] if told else [])
    assert ("Not read: " in run.page()) == bool(told)
    assert html.escape(told) in run.page()


def test_prompts_files_and_lists_as_of_the_command(model, tmp_path):
    file = tmp_path / "asked.txt"
    file.write_text("how many\nleft\n")
    options = {"max_tokens": 12, "layers": "all", "horizon": (3, None)}
    from_file = attnstats.analyze(model, prompts=file, out=tmp_path / "one", **options)
    from_list = attnstats.analyze(model, prompts=["how many", "left"], out=tmp_path / "two", **options)
    assert [each.question for each in from_file] == [each.question for each in from_list] == ["how many", "left"]
    assert from_file[0].tokens == from_list[0].tokens
    assert from_file.settings.fai_hi is None


def test_a_run_goes_on_with_the_responses_that_it_has(model, tmp_path, capsys):
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    command = ["analyze", "--model", str(model), "--text", str(file), "--layers", "all", "--out", str(tmp_path / "out")]
    assert main(command) == 0
    assert main([*command, "--resume"]) == 0
    assert "is finished" in capsys.readouterr().out
    file.write_text(TEXT + " w11")
    assert main([*command, "--resume"]) != 0
    assert "responses" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("nonsense", "not JSON"),
        ("[]", "needs a list of messages"),
        ('[{"role": "user", "content": "how many"}]', 'must end in a message of the role "assistant"'),
        ('[{"role": "assistant", "content": "w1"}]', "no text before the answer"),
        (
            '[{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": ""}]}]',
            "chat 1: must end",
        ),
        ('[{"text": "how many"}]', 'objects with "messages"'),
    ],
    ids=["not-json", "empty", "no-answer", "answer-alone", "blank-answer", "no-messages"],
)
def test_files_that_are_no_chats(content, told, tmp_path):
    file = tmp_path / "chat.json"
    file.write_text(content)
    with pytest.raises(InputError, match=told):
        given.chats(given.read_chats(file), "chats")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"text": TEXT, "response_from": "<plan>"}, "has no '<plan>'"),
        ({"text": TEXT, "response_from": "1000"}, "^text: response_from 1000 is past its"),
        ({"text": TEXT, "window": 0}, "^window: "),
        ({"text": TEXT, "head_share": 0.9}, r"^head_share must be in \(0, 0\.5\]"),
        ({"text": TEXT, "preset": "v3"}, "^preset v3: no such preset; there are paper_v"),
        ({"text": TEXT, "dtype": "int4", "verify": True}, "^dtype int4: verify compares in float32; leave dtype out"),
        ({"text": __file__}, r"text: '.*test_given\.py' is a file; write text=Path\('.*test_given\.py'\)"),
        ({"messages": [[]]}, "messages, chat 1: must end in a message"),
        ({"messages": [[{"role": "user", "content": "how"}], 5]}, "a list of such lists"),
        ({"text": TEXT, "response_from": "w10"}, "one in it"),
        ({"text": "how"}, "one in it"),
        ({"prompts": ["how"], "response_from": "3"}, "^response_from 3: is for text; give"),
        ({"prompts": ["how"], "text": TEXT}, "give one of them"),
        ({"prompts": ["how"], "colour": "red"}, "colour: no such option"),
        ({"prompts": []}, "prompts: is empty; give a question"),
        ({"prompts": ["how", 3]}, "prompts: number 2 must be a text, got 3"),
        ({"text": TEXT, "horizon": 10}, "horizon: needs two whole numbers, or a number and None, got 10"),
        ({"text": TEXT, "horizon": (10,)}, r"horizon: needs two .* got \(10,\)"),
        ({"text": "w1 " * 5000}, "positions; shorten it"),
        ({"text": [3, 4, 5], "response_from": "<think>"}, "of these response_from is a number of tokens"),
        ({"text": [3, 4, 5], "response_from": 3}, "3 are before it of 3"),
        ({"text": [3, 400]}, "token 400, and model has tokens 0 to 39"),
        ({"text": {"a": 1}}, "must be a text, a Path or token ids"),
        ({"text": TEXT, "response_role": "user"}, "^response_role user: is for messages; give"),
        ({"messages": 5}, "needs a list of messages"),
        ({"messages": [{"messages": 5}]}, "must end in a message"),
    ],
    ids=[
        "mark",
        "characters",
        "window",
        "two-words",
        "preset",
        "two-options",
        "file",
        "empty-chat",
        "chat-and-number",
        "end",
        "one-token",
        "prompts",
        "two",
        "option",
        "no-prompts",
        "no-text",
        "no-pair",
        "half-a-pair",
        "long",
        "start-of-ids",
        "all-before",
        "no-such-token",
        "object",
        "role-of-text",
        "number",
        "no-list",
    ],
)
def test_bad_input_is_named(model, options, told, tmp_path):
    with pytest.raises(InputError, match=told):
        attnstats.analyze(model, out=tmp_path / "out", **options)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"text": TEXT, "response_from": "<plan>"}, "^text: has no '<plan>', which response_from must be"),
        ({"text": [3, 4, 5], "response_from": 3}, "3 are before it of 3"),
        ({"text": TEXT}, "^model .*nowhere: no such folder"),
    ],
    ids=["mark", "ids", "model"],
)
def test_where_a_response_starts_is_checked_before_the_model_is_read(tmp_path, options, told):
    with pytest.raises(InputError, match=told):
        attnstats.analyze(tmp_path / "nowhere", out=tmp_path / "out", **options)


def test_a_list_of_chats_is_a_list_of_lists_of_messages(model, tmp_path):
    chats = [ROLES[1:3], [*ROLES[1:3], ROLES[5], ROLES[2]]]
    run = attnstats.analyze(model, messages=chats, layers=[1, 3], out=tmp_path / "out")
    assert [each.question for each in run] == ["how many", "are left"]
    file = tmp_path / "chats.jsonl"
    file.write_text("\n".join(map(json.dumps, chats)))
    assert [chat.messages.question for chat in given.chats(given.read_chats(file), "chats")] == ["how many", "are left"]


def test_a_text_that_cannot_be_read(tmp_path):
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\xff")
    for name, told in (("blank.txt", "is blank"), ("bytes.txt", "not UTF-8"), ("absent.txt", "No such file")):
        with pytest.raises(InputError, match=told):
            given.read_text(tmp_path / name)
