"""The report is one inert file: it loads nothing, runs nothing, and shows hostile tokens as what they are."""

import base64
import dataclasses
import hashlib
import html.parser
import re
import xml.etree.ElementTree as xml

import pytest
import torch

from attnstats import report
from attnstats.analyze import Settings
from attnstats.report import charts
from attnstats.report.charts import Curve, axis_range, draw, tick_step
from tests.tiny import synthetic_analysis

HOSTILE = [
    "how", " many", "<script>alert(1)</script>", '" onmouseover="x', "' onload='x", "</style>", "{{ 7*7 }}", "&amp;",
    "\u202egnp", "\x1b[31m", "\0", "\ud800", "\n\n", "<!--", "]]>", " rolls", " end", ".", "<end>",
]  # fmt: skip
SUMMARY = {
    "model": {"name": "<b>tiny</b>", "dtype": "float32", "device": "cpu"},
    "settings": {"preset": "paper_v2", "layers": [1, 2], "fai_hi": None, "system": "<i>\x07"},
    "versions": {"torch": "2"},
    "timings_seconds": {"generate": 1.25},
    "peak_memory_bytes": {"resident": 2**30},
}


class Page(html.parser.HTMLParser):
    """Every tag with its attributes, and the text by enclosing tag."""

    VOID = ("meta", "br", "link")

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.texts = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))

    def within(self, tag):
        return "".join(text for inside, text in self.texts if inside == tag)


@pytest.fixture(scope="module")
def text():
    question = "<img src=x onerror=alert(1)> \u2066?"
    return report.render([synthetic_analysis(HOSTILE, question=question)] * 2, Settings(), SUMMARY)


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


def test_markup_is_balanced(page):
    assert page.open == []


def test_a_token_that_only_begins_a_character_can_be_seen_and_hovered_over():
    page = Page(report.render([synthetic_analysis(["how", " many", "", "", "漢", "."])], Settings(), SUMMARY))
    notes = [attributes["title"] for tag, attributes in page.tags if tag == "span" and "title" in attributes]
    assert sum(note.startswith(("token 1: ·\n", "token 2: ·\n")) for note in notes) == 4
    assert [text for inside, text in page.texts if inside == "span"].count("·") >= 4


def test_nothing_runs_and_nothing_is_loaded(page, text):
    allowed = {
        "html", "head", "meta", "title", "style", "body", "header", "main", "footer", "article", "section", "figure",
        "figcaption", "nav", "h1", "h2", "h3", "p", "span", "b", "strong", "mark", "abbr", "a", "div", "dl", "dt", "dd",
        "ol", "li", "table", "thead", "tbody", "tr", "th", "td", "svg", "path", "text", "tspan", "rect", "circle",
    }  # fmt: skip
    assert {tag for tag, _ in page.tags} <= allowed
    for tag, attributes in page.tags:
        assert "style" not in attributes, tag
        assert not [name for name in attributes if name.startswith("on") or name in ("src", "srcset", "xlink:href")]
        assert attributes.get("href", "#").startswith("#")
    style = page.within("style")
    assert "url(" not in style
    assert "@import" not in style
    assert not re.search(r"https?://|//[a-z]", text)


def test_content_security_policy_allows_this_style_and_no_more(page):
    (policy,) = (a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    digest = base64.b64encode(hashlib.sha256(page.within("style").encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"


def test_hostile_tokens_are_shown_as_text(page, text):
    shown = page.within("span")
    for token in (
        "<script>alert(1)</script>",
        '" onmouseover="x',
        "</style>",
        "{{ 7*7 }}",
        "&amp;",
        "⟨U+202E⟩gnp",
        "␛[31m",
        "␀",
    ):
        assert token in shown
    assert "⟨U+D800⟩" in shown
    assert "<img src=x onerror=alert(1)> ⟨U+2066⟩?" in page.within("h2")
    assert "<b>tiny</b>" in page.within("strong")
    assert not set(text) & {"\u202e", "\u2066", "\x1b", "\0", "\x07", "\ud800"}
    text.encode("utf-8")


def test_every_token_of_the_response_is_there_twice_and_its_values_with_it(page):
    tokens = [a for tag, a in page.tags if tag == "span" and "title" in a]
    length = len(HOSTILE) - 2
    assert len(tokens) == 2 * 2 * length  # two blocks in each of two prompts
    assert sum(a["class"] == "none" for a in tokens) == 2 * 2  # FAI of the last two
    analysis = synthetic_analysis(HOSTILE)
    assert f"WAAD {analysis.waad[2]:.2f} tokens\nFAI {analysis.fai[2] * 100:.3f} %" in tokens[0]["title"]
    assert "FAI undefined" in tokens[length - 1]["title"]


def test_head_table_and_settings(page):
    cells = [a.get("class") for tag, a in page.tags if tag == "td"]
    assert [cells.count(name) for name in ("local", "global", "middle")] == [2, 2, 8]
    facts = page.within("dd")
    for value in ("paper_v2", "1, 2", "open", "1024 MiB", "1.2 s", "<i>␇"):
        assert value in facts


@pytest.mark.parametrize(("limit", "notice"), [
    ({"MAX_TOKENS": 20}, "The response to prompt 2 is shown up to its token 3 of 17."),
    ({"MAX_TOKENS": 17}, "Prompts 2 to 2 are left out."),
    ({"MAX_HEADS": 6}, "Prompts 2 to 2 are left out."),
])  # fmt: skip
def test_what_is_left_out_is_said(monkeypatch, limit, notice):
    for name, value in limit.items():
        monkeypatch.setattr(report, name, value)
    page = Page(report.render([synthetic_analysis(HOSTILE)] * 2, Settings(), SUMMARY))
    assert notice in page.within("p")


def test_long_responses_stay_below_20_megabytes():
    long = synthetic_analysis([" token<&>"] * 40_000)
    assert len(report.render([long, long], Settings(), SUMMARY).encode()) < 20 * 2**20


@pytest.mark.parametrize("tokens", [["a", "b", "c"], ["a", "b", "c", "d"]])
def test_shortest_responses(tokens):
    """One response token without any FAI, and two."""
    page = Page(report.render([synthetic_analysis(tokens)], Settings(), SUMMARY))
    assert page.open == []
    assert "none: the answer is too short" in page.within("li")


def test_shades_follow_quantiles():
    values = torch.arange(1000.0)
    limits = report.shade_limits(values)
    shades = torch.bucketize(values, torch.tensor(limits))
    shares = shades.bincount().double() / 1000
    assert shares.tolist() == pytest.approx([0.5, 0.15, 0.13, 0.1, 0.07, 0.035, 0.015], abs=0.002)
    assert shades.tolist() == sorted(shades.tolist())


def curve(values, valid=None):
    values = torch.tensor(values)
    return Curve(
        "waad", "W<AAD", "tok&ens", values, torch.ones(len(values), dtype=torch.bool) if valid is None else valid
    )


def test_chart_is_well_formed_and_draws_every_valid_point():
    valid = torch.tensor([True] * 9 + [False])
    texts = ["<a>", "&", '"', "long" * 9, *"bcdefg"]
    root = xml.fromstring(draw([curve([float(i) for i in range(10)], valid)], texts, texts, "why"))
    lines = [path.get("d", "") for path in root.iter("path") if path.get("class") == "line waad"]
    assert [len(re.findall("[ML]", line)) for line in lines] == [9]
    assert len([rect for rect in root.iter("rect") if rect.get("class") == "unknown"]) == 1
    assert [rect.findtext("title") for rect in root.iter("rect") if rect.get("class") == "hit"] == texts
    assert "why" in "".join(root.itertext())


def test_chart_of_a_higher_value_is_higher():
    root = xml.fromstring(draw([curve([1.0, 3.0, 2.0])], list("abc"), list("abc")))
    (line,) = (path.get("d", "") for path in root.iter("path") if path.get("class") == "line waad")
    low, high, middle = (float(point.split()[1]) for point in line[1:].split("L"))
    assert high < middle < low


def test_a_lone_outlier_does_not_flatten_the_rest_and_says_its_value():
    values = [1.0 + 0.1 * (i % 10) for i in range(199)] + [100.0]
    least, most, _ = axis_range(curve(values))
    assert least <= 1.0
    assert 1.9 <= most < 4
    assert "100.00↑" in draw([curve(values)], ["x"] * 200, ["x"] * 200)


@pytest.mark.parametrize("values", [[0.0], [5.0, 5.0], [1e-9, 2e-9], [0.0, 1e6]])
def test_axis_covers_odd_curves(values):
    least, most, tick = axis_range(curve(values))
    assert least <= min(values) + 1e-12
    assert most > least
    assert tick > 0
    assert (most - least) / tick < 7


@pytest.mark.parametrize(("span", "most", "step"), [(10, 4, 5), (8, 4, 2), (0.03, 4, 0.01), (170, 8, 50), (1, 1, 1)])
def test_tick_step(span, most, step):
    assert tick_step(span, most) == pytest.approx(step)


def test_settings_show_in_the_explanation():
    analysis = synthetic_analysis(HOSTILE)
    settings = dataclasses.replace(Settings(), window=7, fai_lo=3, fai_hi=None)
    text = report.render([analysis], settings, SUMMARY)
    assert "capped at 7 tokens" in text
    assert "from 3 tokens or more further on" in text
    assert charts.WIDTH > 0
