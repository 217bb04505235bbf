"""The page of two runs as a file: which prompts and tokens are the same, what differs, and hostile text stays text.

What the page does when it runs is in test_browser.py.
"""

import dataclasses
import json

import pytest
import torch

from attnstats.cli.main import main
from attnstats.errors import InputError
from attnstats.report import compare, data
from attnstats.report.columns import COLUMNS
from attnstats.study import findings
from attnstats.study.analysis import Settings
from tests.hostile import FORBIDDEN, TEXTS
from tests.report.test_report import HOSTILE, SUMMARY, Page
from tests.tiny import save_tiny_model, synthetic_analysis

WORDS = ["how", " many", *(f" w{i}" for i in range(30))]


def run_of(*analyses, folder="out/a", settings=None, **model):
    summary = SUMMARY | {"model": SUMMARY["model"] | model}
    profile = findings.profile(analysis.head_summary for analysis in analyses)
    questions = [analysis.question for analysis in analyses]
    return compare.ComparedRun(folder, questions, analyses, settings or Settings(), summary, profile)


@pytest.mark.parametrize(("one", "other", "expected"), [
    (["a", "b"], ["a", "b"], [0, 1]),
    (["ab", "c"], ["a", "bc"], [0, 1]),  # the same text in other tokens: the token of the first character
    (["a", "b", "c"], ["abc"], [0, 0, 0]),
    (["a", "", "b"], ["a", "b"], [0, 1, 1]),
    (["a", "x", "b"], ["a", "b"], [0, None, 1]),
    (["a"], ["b"], [None]),
    ([" the"] * 300 + ["x"], ["y"] + [" the"] * 300, [*range(1, 301), None]),  # common tokens start a run, too
])  # fmt: skip
def test_tokens_are_linked_where_the_text_is_the_same(one, other, expected):
    assert compare.links(one, other) == expected


def test_prompts_are_paired_by_question_in_the_order_of_the_first():
    first = run_of(*(synthetic_analysis(WORDS, question=q) for q in "abba"))
    second = run_of(*(synthetic_analysis(WORDS, question=q) for q in "xab"))
    assert compare.pairs(first, second) == [(0, 1), (1, 2)]


def test_no_prompt_in_common_is_an_error_that_names_both():
    first = run_of(synthetic_analysis(WORDS, question="one\n<?>"))
    second = run_of(synthetic_analysis(WORDS, question="other"), folder="out/b")
    with pytest.raises(InputError, match=r"out/a and out/b: have no prompt in common.*“one <.>” and “other”"):
        compare.render(first, second)


def test_values_scales_and_links_of_a_pair():
    one, other = synthetic_analysis(WORDS), synthetic_analysis([*WORDS[:12], " else", *WORDS[12:20]])
    found = compare.pair(one, other)
    assert found["same"] == 10
    assert found["links"][:10] == list(range(10))
    assert found["links"][10:18] == list(range(11, 19))
    assert found["links"][18:] == [None] * 12
    for analysis, side in zip((one, other), found["sides"], strict=True):
        for column in COLUMNS:
            expected = [None if x != x else pytest.approx(x, rel=1e-3) for x in column.read(analysis).tolist()]
            assert side["values"][column.key] == expected
        assert side["tokens"] == analysis.shown[2:]
    both = torch.cat([COLUMNS[0].read(analysis) for analysis in (one, other)])
    assert found["domains"]["waad"]["high"] == pytest.approx(COLUMNS[0].domain(both).high, rel=1e-3)


def test_heads_are_compared_in_the_layers_that_both_have():
    analysis = synthetic_analysis(WORDS)
    moved = dataclasses.replace(analysis, layers=(5, 7), distance=analysis.distance.flip(0))
    found = compare.heads(run_of(analysis).profile, run_of(moved).profile, Settings(), Settings())
    assert found["layers"] == [5]
    assert found["distance"][0] == found["distance"][1]  # layer 5 of both has the same distances
    assert sorted(found["changed"]) == [(0, 0), (0, 1), (0, 2)]
    apart = dataclasses.replace(analysis, layers=(1, 2))
    found = compare.heads(run_of(analysis).profile, run_of(apart).profile, Settings(), Settings())
    assert found == {"apart": "A has 3 heads in layers 3, 5; B has 3 heads in layers 1, 2"}


def test_hostile_text_is_data_and_text_alone():
    first = run_of(*(synthetic_analysis(HOSTILE, question=text) for text in TEXTS[:40]), name=TEXTS[0], folder=TEXTS[1])
    second = run_of(*(synthetic_analysis(TEXTS, question=text) for text in TEXTS[:40]), name=TEXTS[2], folder=TEXTS[3])
    text = compare.render(first, second)
    text.encode("utf-8")
    assert not FORBIDDEN & set(text)
    page = Page(text)
    assert page.open == []
    assert not {tag for tag, _ in page.tags} & {"img", "iframe", "form", "base", "object", "link", "template"}
    for _, attributes in page.tags:
        assert "style" not in attributes
        assert not [name for name in attributes if name.startswith("on") or name in ("src", "srcset")]
    assert TEXTS[0] in page.within("strong")
    assert len(page.data) == 1 + len(page.data["data-page"]["cards"])


def test_settings_that_differ_are_said():
    analysis = synthetic_analysis(WORDS)
    page = Page(compare.render(run_of(analysis), run_of(analysis, settings=Settings(window=7, fai_lo=3))))
    assert "different settings (window, fai_lo)" in page.within("p")
    page = Page(compare.render(run_of(analysis), run_of(analysis, dtype="bfloat16")))
    assert "different settings" not in page.within("p")
    assert [attributes for tag, attributes in page.tags if attributes.get("class") == "differ"] == [{"class": "differ"}]


def test_what_is_left_out_is_said(monkeypatch):
    run = run_of(*[synthetic_analysis(WORDS)] * 3)
    size = len(data.embedded(compare.pair(run.analyses[0], run.analyses[0])))
    monkeypatch.setattr(data, "MAX_BYTES", 2 * size + 9)
    page = Page(compare.render(run, run))
    assert "All from prompt 3 of 3 on." in page.within("li")
    monkeypatch.undo()
    monkeypatch.setattr(data, "MAX_TOKENS", 20)
    page = Page(compare.render(run, run))
    assert "Prompt 1: its response in A from token 21 to 30." in page.within("li")
    assert len(page.data["data-1"]["links"]) == 20


def test_two_runs_on_the_command_line(tmp_path, capsys):
    for seed, name in enumerate(("a", "b")):
        model = save_tiny_model(tmp_path / f"model{seed}", initializer_range=0.25 + seed / 10)
        arguments = ["analyze", "--model", str(model), "--max-tokens", "12", "--out", str(tmp_path / name)]
        assert main([*arguments, "--prompt", "how many rolls", "--prompt", "so"]) == 0
    assert main([*arguments[:-1], str(tmp_path / "c"), "--prompt", "left"]) == 0
    runs = [str(tmp_path / name) for name in "abc"]
    capsys.readouterr()
    assert main(["report", *runs[:2]]) == 0
    assert "2 of 2 prompts are in both" in capsys.readouterr().out
    page = Page((tmp_path / "a" / "comparison.html").read_text(encoding="utf-8"))
    assert json.dumps(page.data["data-1"]["question"]) == '"how many rolls"'
    assert main(["report", runs[0], runs[2]]) == 2
    error = capsys.readouterr().err
    assert runs[0] in error
    assert "have no prompt in common" in error
    assert main(["report", runs[0], f"{runs[1]}/../a"]) == 2
    assert "are the same folder; name two runs, or one alone" in capsys.readouterr().err
    # A folder with a comparison in it is still one that a run may replace.
    assert main([*arguments[:-1], runs[0], "--prompt", "how many rolls"]) == 0
