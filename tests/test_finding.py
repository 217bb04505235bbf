"""Kinds of heads, in models whose heads are known and against eager maps, and what is said of bad input."""

import json
import math
from itertools import pairwise

import pytest
import scipy.stats
import torch

from attnstats import heads, segments
from attnstats.cli.main import main
from attnstats.errors import InputError
from attnstats.finding import HeadScores
from attnstats.study import models
from attnstats.study.measures import KINDS
from tests.known_heads import INDUCTION, KEY, LOCAL, PREVIOUS, RECEIVER, SINK, UNIFORM, UNIFORM_TOO, known_heads
from tests.tiny import WORDS, run_with, save_tiny_model

NEWLINE = WORDS.index("\n")
REPEATED = [3, *range(12, 30), *range(12, 30)]  # a sequence of words, twice
# Nine sentences of three words and a line break after a first token; KEY is in the third.
SENTENCES = [3, *(token for i in range(9) for token in (12 + i, KEY if i == 2 else 21 + i, 31 + i, NEWLINE))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("finding") / "model")


@pytest.fixture(scope="module")
def loaded(folder):
    return models.load(str(folder), dtype="float32", device="cpu", notify=lambda _: None)


@pytest.fixture(scope="module")
def known(loaded):
    return heads.find(known_heads(), [REPEATED, SENTENCES], tokenizer=loaded.tokenizer)


def score(scores, kind, head):
    return float(scores[kind][head])


@pytest.mark.parametrize(
    ("kind", "head"),
    [
        ("local", LOCAL),
        ("sink", SINK),
        ("receiver", RECEIVER),
        ("previous-token", PREVIOUS),
        ("retrieval", INDUCTION),
        ("induction", INDUCTION),
    ],
)
def test_a_known_head_is_the_first_of_its_kind(known, kind, head):
    best, second = known.top(kind, 2)
    assert (best.layer, best.head) == head
    assert abs(best.score - second.score) > 0.25


def test_scores_of_known_heads_are_what_they_must_be(known):
    queries = [t for text in (REPEATED, SENTENCES) for t in range(1, len(text))]
    assert score(known, "previous-token", PREVIOUS) == pytest.approx(1, abs=1e-4)
    assert score(known, "sink", SINK) == pytest.approx(1, abs=1e-4)
    assert score(known, "local", LOCAL) == pytest.approx(0.5, abs=1e-4)
    assert score(known, "global", SINK) == pytest.approx(sum(queries) / len(queries), rel=1e-4)
    for head in (UNIFORM, UNIFORM_TOO):
        assert score(known, "global", head) == pytest.approx(sum(queries) / len(queries) / 2, rel=1e-4)
        assert score(known, "high-entropy", head) == pytest.approx(
            sum(math.log(t + 1) for t in queries) / len(queries), rel=1e-4
        )
    assert {known.top("high-entropy", 2)[i][:2] for i in (0, 1)} == {UNIFORM, UNIFORM_TOO}
    assert score(known, "low-entropy", SINK) == pytest.approx(0, abs=1e-3)
    assert known.top("global", 1)[0][:2] == SINK


def test_an_induction_circuit_is_found_by_what_it_copies(known):
    """Its second head looks at the word after the earlier same word, which is the word that comes next."""
    alone = heads.find(known_heads(), [REPEATED], ["retrieval", "induction"])
    assert score(alone, "induction", INDUCTION) == score(known, "induction", INDUCTION) == 1
    # The first repeated word comes after a word that was not there before.
    assert 17 / 18 <= score(alone, "retrieval", INDUCTION) <= 1
    assert alone.counts["copy_rate"].unique().tolist() == [18]
    others = torch.ones(2, 4, dtype=torch.bool)
    others[INDUCTION] = False
    assert alone["retrieval"][others].max() < 0.1  # of heads that look at all words alike one can hit by chance
    assert alone["induction"][others].max() < 0.1


def by_definition(maps, ids, start, boundaries):
    """Every measure as sums over loops, from (L, H, T, T) maps: by name the numbers whose mean is a head's score."""
    layers, count, length, _ = maps.shape
    values = {kind.measure: {} for kind in KINDS.values()}
    for layer in range(layers):
        for head in range(count):
            of = maps[layer, head].tolist()
            rows = range(start, length)
            here = layer, head
            values["mean_distance"][here] = [sum(of[t][s] * (t - s) for s in range(t + 1)) for t in rows]
            values["sink_mass"][here] = [sum(of[t][:4]) for t in rows if t >= 4]
            values["previous_token_mass"][here] = [of[t][t - 1] for t in rows]
            values["entropy"][here] = [-sum(a * math.log(a) for a in of[t] if a > 0) for t in rows]
            most = [max(range(t + 1), key=lambda s: of[t][s]) for t in range(length)]
            values["copy_rate"][here] = [
                ids[most[t]] == ids[t + 1] for t in range(start - 1, length - 1) if ids[t + 1] in ids[: t + 1]
            ]
            values["induction_rate"][here] = [
                most[t] > 0 and ids[most[t] - 1] == ids[t] for t in rows if ids[t] in ids[:t]
            ]
            received = []
            spans = list(pairwise(boundaries))
            for j in range(1, len(spans) - 4):
                per_pair = []
                for i in range(j + 4, len(spans)):
                    pairs = [of[t][s] for t in range(*spans[i]) for s in range(*spans[j])]
                    per_pair.append(sum(pairs) / len(pairs))
                received.append(sum(per_pair) / len(per_pair))
            kurtosis = [scipy.stats.kurtosis(received)] if len(received) >= 4 else []
            values["received_kurtosis"][here] = kurtosis
    return values


def test_scores_are_those_of_eager_maps(loaded):
    draw = torch.Generator().manual_seed(0)
    texts = [torch.randint(3, 40, (length,), generator=draw) for length in (30, 47, 60)]
    for text in texts:
        text[5::5] = NEWLINE
    # A needle, asked for: only what repeats in the answer counts.
    needle = "w1 w5 w2 w7 w3 w1 w9"
    asked = f"how many {needle} are left"
    chat = [{"role": "user", "content": asked}, {"role": "assistant", "content": needle}]
    as_read = torch.tensor(loaded.tokenizer(f"user {asked} so {needle}")["input_ids"])
    scores = heads.find(loaded, iter([*texts, chat]))
    assert scores.kinds == tuple(KINDS)
    starts = [*((ids, 1) for ids in texts), (as_read, len(as_read) - 7)]
    expected = {}
    for ids, start in starts:
        output = run_with(loaded.model, "eager", input_ids=ids[None])
        maps = torch.cat(output.attentions).double()
        pieces = [loaded.tokenizer.decode([token]) for token in ids.tolist()]
        found = by_definition(maps, ids.tolist(), start, segments.boundaries(pieces, start=start))
        for name, of_heads in found.items():
            for head, values in of_heads.items():
                expected.setdefault(name, {}).setdefault(head, []).extend(values)
    frame = scores.to_frame()
    assert set(frame.columns) == set(expected)
    for name, of_heads in expected.items():
        for head, values in of_heads.items():
            assert frame.loc[head, name] == pytest.approx(sum(values) / len(values), rel=2e-4, abs=1e-5), (name, head)
    assert scores.texts == 4
    assert scores.tokens == 137 + 20


def test_sums_of_texts_add_up(loaded):
    texts = [SENTENCES, REPEATED]
    kinds = ["local", "receiver"]
    both, *each = (heads.find(loaded, some, kinds) for some in (texts, texts[:1], texts[1:] + texts[:1]))
    for name in ("mean_distance", "received_kurtosis"):
        torch.testing.assert_close(each[1].sums[name], both.sums[name])
        assert torch.equal(each[1].counts[name], both.counts[name])
    assert both.counts["received_kurtosis"].max() == 1  # the other has no sentences


def test_texts_in_every_form(folder, loaded):
    text = "how many w1 w2 left w1 w2"
    ids = loaded.tokenizer(text)["input_ids"]
    kinds = ["local", "sink"]
    expected = heads.find(str(folder), [text], kinds)
    for same in (ids, torch.tensor(ids), torch.tensor([ids]), torch.tensor(ids).numpy()):
        torch.testing.assert_close(heads.find(loaded.model, [same], kinds)["local"], expected["local"])
    assert expected.counts["mean_distance"].unique().tolist() == [len(ids) - 1]
    chat = [{"role": "user", "content": "how many"}, {"role": "assistant", "content": "w1 w2 w3"}]
    in_chats = [
        heads.find(loaded.model, [form], kinds, tokenizer=loaded.tokenizer) for form in (chat, {"messages": chat})
    ]
    assert in_chats[0].counts["mean_distance"].unique().tolist() == [3]  # the answer
    assert torch.equal(in_chats[0]["local"], in_chats[1]["local"])


def test_chosen_layers_have_their_numbers(loaded):
    scores = heads.find(loaded, [REPEATED], ["sink"], layers=[1, 4])
    whole = heads.find(loaded, [REPEATED], ["sink"])
    assert scores.layers == (1, 4)
    assert {each.layer for each in scores.top("sink", 8)} == {1, 4}
    assert torch.equal(scores["sink"], whole["sink"][[1, 4]])
    assert scores.to_frame().index.get_level_values("layer").unique().tolist() == [1, 4]


def test_without_kinds_all_that_can_be_measured(loaded):
    short = heads.find(loaded, [REPEATED[:19]])
    assert set(KINDS) - set(short.kinds) == {"receiver", "retrieval", "induction"}  # no sentences, no word twice
    assert "receiver" not in heads.find(loaded.model, [SENTENCES]).kinds  # nor does a model without a tokenizer


def test_saved_scores_are_the_same_and_of_their_model(known, loaded, tmp_path):
    file = tmp_path / "scores.json"
    known.save(file)
    model = known_heads()
    again = HeadScores.load(file, model)
    assert again.kinds == known.kinds
    assert repr(again) == repr(known)
    for kind in known.kinds:
        assert torch.equal(again[kind].nan_to_num(-9), known[kind].nan_to_num(-9))
    with pytest.raises(InputError, match="the table is of another model"):
        HeadScores.load(file, loaded.model)
    content = json.loads(file.read_text())
    for change, told in [
        ({"version": 7}, "of version 7, and this program reads 1"),
        ({"format": "else"}, "not a table of head scores"),
        ({"kinds": ["blue"]}, "unknown kind 'blue'"),
        ({"layers": [0]}, "must be"),
    ]:
        file.write_text(json.dumps(content | change))
        with pytest.raises(InputError, match=told):
            HeadScores.load(file)


def test_texts_and_pictures_are_of_a_few_lines_and_a_panel_per_kind(known):
    lines = repr(known).splitlines()
    assert lines[0] == f"HeadScores of 2 x 4 heads, over {len(REPEATED) + len(SENTENCES)} tokens of 2 texts"
    assert len(lines) == 1 + len(known.kinds)
    assert "0.1 (1)" in next(line for line in lines if line.startswith("  sink"))
    assert known._repr_html_().startswith("<pre")
    pictures = [axis for axis in known.plot().axes if axis.images and axis.get_title(loc="left")]
    assert [axis.get_title(loc="left") for axis in pictures] == [KINDS[kind].title for kind in known.kinds]
    (picture,) = (axis for axis in known.plot("sink").axes if axis.images)
    assert picture.images[0].get_array().shape == (2, 4)
    assert known.plot("sink")._repr_png_().startswith(b"\x89PNG")
    assert picture.images[0].norm.vmax == known["sink"].max()  # the highest head has a shade of its own


def test_heads_of_a_kind_go_into_a_capture(known):
    chosen = known.chosen("sink", 3)
    assert {(layer, head) for layer, of in chosen.items() for head in of} == {x[:2] for x in known.top("sink", 3)}
    assert list(chosen) == sorted(chosen)


def test_the_command_prints_and_writes_what_the_function_returns(folder, tmp_path, capsys):
    text = "how many w1 w2 left w1 w2"
    file = tmp_path / "texts.txt"
    file.write_text(f"{text}\n\n{text} w3\n")
    out = [tmp_path / f"heads.{kind}" for kind in ("json", "csv", "png")]
    files = [part for each in out for part in ("--out", str(each))]
    assert main(["heads", "--model", str(folder), "--texts", str(file), "--top", "2", *files]) == 0
    expected = heads.find(str(folder), [text, f"{text} w3"])
    said = capsys.readouterr().out
    assert "\n".join(expected.lines(2)) in said
    assert str(out[2]) in said
    assert repr(HeadScores.load(out[0])) == repr(expected)
    assert len(out[1].read_text().splitlines()) == 1 + 6 * 4
    assert out[2].read_bytes().startswith(b"\x89PNG")
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"text": text}))
    chats = tmp_path / "chats.json"
    chats.write_text(json.dumps([{"role": "user", "content": "how"}, {"role": "assistant", "content": "w1 w2"}]))
    for option, name, counted in (("--texts", rows, "7 tokens of 1 text\n"), ("--messages", chats, "of 1 text\n")):
        assert main(["heads", "--model", str(folder), option, str(name), "--kinds", "local"]) == 0
        assert counted in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--kinds", "blue"], "invalid choice: 'blue'"),
        (["--out", "heads.doc"], "needs a name that ends in .json, .csv, .pdf, .png, .svg"),
        (["--top", "0"], "--top must be at least 1"),
        (["--kinds", "receiver"], "'receiver' needs a text whose response has 8 sentences"),
        (["--messages", "chats.json"], "not allowed with argument --texts"),
    ],
)
def test_bad_options_are_named(folder, tmp_path, capsys, options, told):
    file = tmp_path / "texts.txt"
    file.write_text("how many w1 w2")
    assert main(["heads", "--model", str(folder), "--texts", str(file), *options]) == 2
    assert told in capsys.readouterr().err


LONG = "w1 " * 300


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda of: heads.find(of, [REPEATED], ["blue"]), "unknown 'blue'; there are local, global"),
        (lambda of: heads.find(of, [REPEATED], "sink"), r"write \['sink'\]"),
        (lambda of: heads.find(of, [REPEATED], []), "kinds: is empty"),
        (lambda of: heads.find(of, []), "texts: is empty"),
        (lambda of: heads.find(of, "how many"), r"write \[text\]"),
        (lambda of: heads.find(of, [[3, 4, 5]], ["sink"]), "'sink' needs a text of more than 4 tokens"),
        (lambda of: heads.find(of, [REPEATED], ["receiver"]), "'receiver' needs a text whose response has 8 sentences"),
        (lambda of: heads.find(of, [REPEATED[:19]], ["retrieval"]), "'retrieval' needs a text whose response repeats"),
        (lambda of: heads.find(of.model, [SENTENCES], ["receiver"]), "pass tokenizer="),
        (lambda of: heads.find(of.model, ["how many"]), r"texts\[0\]: .* pass tokenizer="),
        (lambda of: heads.find(of, [REPEATED, [3]]), r"texts\[1\]: needs a token before"),
        (lambda of: heads.find(of, [REPEATED, 7]), r"texts\[1\]: must be a string, a list of token ids, or messages"),
        (lambda of: heads.find(of, [[3, 400]]), r"texts\[0\] has token 400, and model has tokens 0 to 39"),
        (lambda of: heads.find(of, [LONG]), r"texts\[0\] has 300 tokens, and model 256 positions"),
        (lambda of: heads.find(of, [REPEATED]).top("receiver"), "kind 'receiver': no scores of it"),
        (lambda of: heads.find(of, [REPEATED]).top("sink", 0), "count must be at least 1"),
        (lambda of: heads.find(of, [[{"role": "user", "content": "how"}]]), 'end in a message of the role "assistant"'),
    ],
)  # fmt: skip
def test_bad_input_is_named(loaded, call, told):
    with pytest.raises(InputError, match=told):
        call(loaded)


def test_attention_that_overflows_is_named(loaded):
    model = known_heads().half()
    with torch.no_grad():
        model.transformer.h[1].attn.c_attn.weight.mul_(30_000)
    with pytest.raises(InputError, match=r"texts\[0\]: attention of .* overflows in float16; load it in float32"):
        heads.find(model, [REPEATED], ["local"])
