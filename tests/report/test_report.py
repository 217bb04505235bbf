"""The report as a file: it loads nothing, hostile text stays text, every value is there, and it says what isn't.

What the page does when it runs is in test_browser.py.
"""

import base64
import dataclasses
import hashlib
import html.parser
import json
import math
import re
import types
from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch

from attnstats import report
from attnstats.chance import Coupling
from attnstats.errors import InputError
from attnstats.report import columns, data, scale
from attnstats.report.columns import COLUMNS
from attnstats.study.analysis import Settings
from attnstats.study.maps import part_boundaries
from attnstats.study.text import shortened, token_text, visible
from tests.hostile import FORBIDDEN, TEXTS
from tests.tiny import synthetic_analysis

HOSTILE = [
    "how", " many", "<script>alert(1)</script>", '"><img onerror=alert(1) src=x>', "' onload='x", "</style>",
    "{{ 7*7 }}", "&amp;", "\u202egnp", "\x1b[31m", "\0", "\ud800", "\n\n", "<!--", "]]>", "</script>", "</noscript>",
    ".", "<end>",
]  # fmt: skip
SUMMARY = {
    "model": {"name": "<b>tiny</b>", "dtype": "float32", "device": "cpu"},
    "settings": {"preset": "paper_v2", "layers": [1, 2], "fai_hi": None, "system": "<i>\x07"},
    "versions": {"torch": "2"},
    "timings_seconds": {"generate": 1.25},
    "peak_memory_bytes": {"resident": 2**30},
}
COUPLING = types.SimpleNamespace(
    name="<i>entropy</i>", observed=0.3608, random=0.2386, lift=0.5122, p_value=0.001, low=0.41, high=0.62, count=812,
    reason="",
)  # fmt: skip


class Page(html.parser.HTMLParser):
    """Every tag with its attributes, and the text by enclosing tag, as a browser without scripts reads them."""

    VOID = ("meta", "br", "link", "input")

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

    @property
    def data(self):
        """The JSON of each data element by its id."""
        ids = [attributes.get("id") for tag, attributes in self.tags if tag == "script"]
        scripts = [text for inside, text in self.texts if inside == "script" and text.strip()]
        return {name: json.loads(text) for name, text in zip(ids, scripts, strict=True) if name}


@pytest.fixture(scope="module")
def text():
    question = "<img src=x onerror=alert(1)> \u2066?"
    analyses = [synthetic_analysis(HOSTILE, question=question)] * 2
    return report.render(analyses, Settings(), SUMMARY, [COUPLING])


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


def test_markup_is_balanced(page):
    assert page.open == []


def test_nothing_is_loaded_and_one_script_runs(page, text):
    for tag, attributes in page.tags:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base", "form", "image", "use"), tag
        assert "style" not in attributes, tag
        assert not [name for name in attributes if name.startswith("on") or name in ("src", "srcset", "xlink:href")]
        assert attributes.get("href", "#").startswith("#")
    scripts = [attributes for tag, attributes in page.tags if tag == "script"]
    assert [a.get("type") for a in scripts].count(None) == 1
    assert {a.get("type") for a in scripts} == {None, "application/json"}
    style = page.within("style")
    assert "url(" not in style
    assert "@import" not in style
    assert not re.search(r"https?://|[\"'(]//[a-z]", text)


def test_the_policy_allows_this_script_and_this_style_and_no_more(text, page):
    (policy,) = (a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")

    def digest(name):
        (found,) = re.findall(f"<{name}>(.*?)</{name}>", text, re.DOTALL)
        return base64.b64encode(hashlib.sha256(found.encode()).digest()).decode()

    assert policy == (
        f"default-src 'none'; script-src 'sha256-{digest('script')}'; style-src 'sha256-{digest('style')}'; "
        "img-src data:; base-uri 'none'; form-action 'none'; require-trusted-types-for 'script'"
    )


def test_no_script_makes_markup_of_text(text):
    script = re.findall("<script>(.*?)</script>", text, re.DOTALL)[0]
    for sink in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function(", "DOMParser"):
        assert sink not in script


def test_hostile_text_is_data_and_text_alone(page, text):
    shown = page.within("span")  # where scripts don't run
    tokens = page.data["data-1"]["tokens"]
    for token in (
        "<script>alert(1)</script>", '"><img onerror=alert(1) src=x>', "</style>", "{{ 7*7 }}", "&amp;", "⟨U+202E⟩gnp",
        "␛[31m", "␀", "⟨U+D800⟩", "</script>", "</noscript>",
    ):  # fmt: skip
        assert token in shown
        assert token in tokens
    assert page.data["data-1"]["question"] == "<img src=x onerror=alert(1)> ⟨U+2066⟩?"
    assert "<b>tiny</b>" in page.within("strong")
    assert "<i>entropy</i>" in page.within("th")
    assert not set(text) & {"\u202e", "\u2066", "\x1b", "\0", "\x07", "\ud800"}
    for element in re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', text, re.DOTALL):
        assert not set(element) & set("<>&")
        assert element.isascii()
    text.encode("utf-8")


def test_every_value_of_the_response_is_there(page):
    analysis = synthetic_analysis(HOSTILE)
    found = page.data["data-1"]
    response = analysis.response
    assert found["values"]["waad"] == pytest.approx(analysis.waad[response].tolist(), rel=1e-3)
    assert found["values"]["fai"][:-2] == pytest.approx((100 * analysis.fai[response][:-2]).tolist(), rel=1e-3)
    assert found["values"]["fai"][-2:] == [None, None]
    assert found["values"]["delta"] == pytest.approx(analysis.delta.tolist(), rel=1e-3)
    assert found["values"]["entropy"] == pytest.approx(analysis.entropy[response].tolist(), rel=1e-3)
    assert set(found["values"]["gamma"]) <= {1, 1.25, 1.5, 1.75}
    assert set(found["values"]) == {column.key for column in COLUMNS}
    top = analysis.preplan(3)
    assert [found["preplan"].index(rank) + analysis.response_start for rank in range(3)] == top
    assert [found["anchor"].index(rank) + analysis.response_start for rank in range(3)] == analysis.anchors(3)
    assert found["heads"]["classes"] == ["".join(analysis.classes.name(i, h)[0] for h in range(3)) for i in (3, 5)]


def test_an_arc_leads_from_an_anchor_to_a_token_up_to_three_before(page):
    found = page.data["data-1"]
    arcs = [(t, intro) for t, intro in enumerate(found["intro"]) if intro is not None]
    assert arcs
    assert all(1 <= t - intro <= 3 for t, intro in arcs)
    assert all(found["anchor"][t] < 0.4 * len(found["anchor"]) + 1 for t, _ in arcs)
    dominated, bonus = {t for t, _ in arcs}, {intro for _, intro in arcs}
    for t, gamma in enumerate(found["values"]["gamma"]):
        expected = 1 + 0.25 * (t in dominated) + 0.25 * (t in bonus)
        assert gamma in (expected, expected + 0.5)


def test_a_token_without_a_value_or_without_text_is_there_too():
    analysis = synthetic_analysis(["how", " many", "", "", "漢", "."])
    found = Page(report.render([analysis], Settings(), SUMMARY)).data["data-1"]
    assert found["tokens"] == ["how", " many", "·", "·", "漢", "."]
    gone = dataclasses.replace(analysis, entropy=torch.full_like(analysis.entropy, torch.nan))
    assert Page(report.render([gone], Settings(), SUMMARY)).data["data-1"]["values"]["entropy"] == [None] * 4


def decoded(text):
    codes = torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8).double()
    return torch.where(codes == 0, 0.0, data.FLOOR * 10 ** (5 * (codes - 1) / data.CODES))


def test_maps_come_back_to_a_few_percent(page):
    analysis = synthetic_analysis(HOSTILE)
    found = page.data["maps-1"]
    for name in ("local", "global"):
        for part in ("map", "band"):
            exact = getattr(analysis.maps, f"{name}_{part}").double().flatten()
            back = decoded(found[name][part])
            seen = exact >= data.FLOOR
            assert (back[seen] / exact[seen] - 1).abs().max() < 0.024
            assert (back[~seen] == 0).all()
    assert found["rows"] == analysis.maps.rows.tolist()
    assert found["distances"] == analysis.maps.local_band.shape[1]


def test_shares_of_parts_add_up_and_are_named():
    tokens = ["<s>", "user", "\n", " how", " many?", "\n", "so", *(f" w{i}" if i % 5 else "." for i in range(1, 21))]
    analysis = synthetic_analysis(tokens, prompt=7, question="how many?")
    bounds = part_boundaries(tokens, 7, "how many?")
    analysis = dataclasses.replace(analysis, maps=dataclasses.replace(analysis.maps, parts=torch.tensor(bounds)))
    rows = torch.rand(len(bounds) - 5, len(bounds) - 1, generator=torch.Generator().manual_seed(0))
    shares = (rows.tril(4) / rows.tril(4).sum(1, keepdim=True)).float()
    maps = dataclasses.replace(analysis.maps, local_shares=shares, global_shares=shares.flip(0))
    analysis = dataclasses.replace(analysis, maps=maps)
    found = data.parts(analysis, analysis.maps)
    assert len(found["names"]) == 8
    assert found["bounds"][:5] == [0, 1, 3, 5, 7]
    assert found["names"][:5] == ["first token", "around the question", "question", "around the question", ""]
    kinds = ["first token", "around the question", "question", "answer before it", "the sentence itself"]
    assert found["kinds"] == kinds
    for i, row in enumerate(shares.tolist()):
        expected = [row[0], row[1] + row[3], row[2], sum(row[4 : 4 + i]), row[4 + i]]
        assert found["local"]["shares"][i] == pytest.approx(expected, rel=1e-3, abs=1e-9)
        assert sum(found["local"]["shares"][i]) == pytest.approx(1, abs=2e-3)
    assert torch.allclose(decoded(found["local"]["pairs"]), shares.double().flatten(), rtol=0.024, atol=1e-5)
    elsewhere = dataclasses.replace(analysis, question="not there")
    assert data.parts(elsewhere, elsewhere.maps)["kinds"][:2] == ["first token", "rest of the prompt"]


def test_couplings_settings_and_versions_are_shown(page):
    cells = [text for inside, text in page.texts if inside in ("td", "strong")]
    for value in ("0.3608", "0.2386", "+51.2 %", "+41.0 % … +62.0 %", "0.001", "812"):
        assert value in cells
    facts = page.within("dd")
    for value in ("paper_v2", "1, 2", "open", "1024 MiB", "1.2 s", "<i>␇"):
        assert value in facts


def test_without_couplings_there_is_no_section_of_them():
    text = report.render([synthetic_analysis(HOSTILE)], Settings(), SUMMARY)
    assert 'id="couplings"' not in text


def test_without_receiver_heads_the_page_says_why_there_are_no_couplings():
    page = Page(report.render([synthetic_analysis(HOSTILE)], Settings(), SUMMARY, []))
    assert [attributes["id"] for tag, attributes in page.tags if tag == "section" and "id" in attributes][
        -1
    ] == "couplings"
    assert "with 4 such tokens or more; no answer has as many, so there are no couplings." in page.within("p")


def test_a_coupling_of_nothing_is_a_dash():
    nothing = types.SimpleNamespace(**COUPLING.__dict__ | {"observed": float("nan"), "lift": None, "count": 0})
    page = Page(report.render([synthetic_analysis(HOSTILE)], Settings(), SUMMARY, [nothing]))
    assert [text for inside, text in page.texts if inside in ("td", "strong")].count("-") == 2


def test_a_coupling_of_few_responses_has_a_dash_and_the_reason():
    few = Coupling("entropy", 0.5, 0.4, math.nan, math.nan, math.nan, 12, 1)
    page = Page(report.render([synthetic_analysis(HOSTILE)], Settings(), SUMMARY, [few]))
    assert [text for inside, text in page.texts if inside == "td"][-3:] == ["-", "-", "12"]
    assert "-: no interval and no p over fewer than 5 responses with a peak." in page.within("p")


def test_a_part_of_a_character_is_on_the_page_as_its_bytes():
    analysis = synthetic_analysis(["how", " many", " ", "", "🥐", "."])
    analysis = dataclasses.replace(analysis, shown=["how", " many", " <0xF0><0x9F>", "<0xA5>", "🥐", "."])
    assert data.prompt(analysis)["tokens"] == analysis.shown
    page = Page(report.render([analysis], Settings(), SUMMARY))
    assert " <0xF0><0x9F><0xA5>🥐." in page.within("span")
    assert analysis.response_text == " 🥐."


def test_settings_show_in_the_explanation():
    settings = dataclasses.replace(Settings(), window=7, fai_lo=3, fai_hi=None)
    page = Page(report.render([synthetic_analysis(HOSTILE)], settings, SUMMARY))
    about = {column["key"]: column["about"] for column in page.data["data-page"]["columns"]}
    assert "capped at 7 tokens" in about["waad"]
    assert "from 3 tokens or more further on" in about["fai"]
    assert "capped at 7 tokens" in page.within("p")


def test_several_prompts_have_a_card_each(page):
    cards = page.data["data-page"]["cards"]
    assert [card["number"] for card in cards] == [1, 2]
    assert all(0 <= point <= 99 for point in cards[0]["waad"])
    assert cards[0]["fai"][-1] is None


@pytest.mark.parametrize(("limits", "notice", "prompts", "maps"), [
    ({"MAX_TOKENS": 5}, "Prompt 1: its response from token 6 to 17.", 3, 3),
    ({"MAX_HEADS": 5}, "Prompt 2: its 6 heads.", 3, 3),
    ({"MAX_BYTES": (2, 0)}, "All from prompt 3 of 3 on.", 2, 0),
    ({"MAX_BYTES": (3, 1)}, "The maps of 2 of the prompts, the first of them prompt 2.", 3, 1),
])  # fmt: skip
def test_what_is_left_out_is_said(monkeypatch, limits, notice, prompts, maps):
    analysis = synthetic_analysis(HOSTILE)
    for name, value in limits.items():
        if name == "MAX_BYTES":  # room for so many prompts and so many of their maps
            sizes = len(data.embedded(data.prompt(analysis))), len(data.embedded(data.maps(analysis, analysis.maps)))
            value = value[0] * sizes[0] + value[1] * sizes[1] + 9
        monkeypatch.setattr(data, name, value)
    page = Page(report.render([analysis] * 3, Settings(), SUMMARY))
    assert notice in page.within("li")
    assert len([name for name in page.data if re.fullmatch(r"data-\d", name)]) == prompts
    assert len([name for name in page.data if re.fullmatch(r"maps-\d", name)]) == maps


def test_a_sample_of_many_prompts_is_shown_and_no_other_is_read(monkeypatch):
    analysis, read = synthetic_analysis(HOSTILE), []

    class Many(Sequence):
        def __len__(self):
            return 1234

        def __getitem__(self, index):
            read.append(index)
            return dataclasses.replace(analysis, question=f"Question {index}?")

    monkeypatch.setattr(data, "MAX_PROMPTS", 4)
    page = Page(report.render(Many(), Settings(), SUMMARY))
    assert read == [0, 308, 617, 925]
    assert "All but 4 of 1,234 prompts, which are spread evenly over them." in page.within("li")
    assert "answered 1,234 prompts, of which 4 are shown." in page.within("p")
    numbers = [1, 309, 618, 926]
    assert [card["number"] for card in page.data["data-page"]["cards"]] == numbers
    assert page.data.keys() == {"data-page", *(f"{kind}-{n}" for kind in ("data", "maps") for n in numbers)}
    assert page.data["data-618"]["question"] == "Question 617?"
    assert page.data["data-page"]["total"] == 1234


def test_no_analysis_is_an_error():
    with pytest.raises(ValueError, match="analyses: there is none"):
        report.render([], Settings(), SUMMARY)


def test_nothing_left_out_is_not_mentioned(page):
    assert page.within("li") == ""


def test_a_response_of_2000_tokens_is_less_than_2_megabytes():
    text = report.render([synthetic_analysis([" token<&>"] * 2_000)], Settings(), SUMMARY)
    assert "Left out" not in text
    assert 400_000 < len(text.encode()) < 2 * 2**20


def test_what_is_too_much_stays_below_20_megabytes():
    long = synthetic_analysis([" token<&>"] * 30_000)
    text = report.render([long] * 3, Settings(), SUMMARY)
    assert len(text.encode()) < 20 * 2**20
    assert "Prompt 3: its response from token 10001 to 29998." in text


@pytest.mark.parametrize("tokens", [["a", "b", "c"], ["a", "b", "c", "d"]])
def test_shortest_responses(tokens):
    """One response token without any FAI, and two."""
    page = Page(report.render([synthetic_analysis(tokens)], Settings(), SUMMARY))
    assert page.open == []
    assert page.data["data-1"]["values"]["fai"] == [None] * (len(tokens) - 2)
    assert page.data["data-1"]["values"]["gamma"] == [1] * (len(tokens) - 2)


@pytest.mark.parametrize("stops", [scale.LIGHT, scale.DARK], ids=["light", "dark"])
def test_the_scale_keeps_its_order_in_grey_and_its_text_is_read(stops):
    ramp = scale.ramp(stops)
    grey = [scale.luminance(colour) for colour in ramp]
    assert grey in (sorted(grey), sorted(grey, reverse=True))
    assert min(abs(a - b) for a, b in pairwise(grey)) > 0.003
    assert min(scale.contrast(scale.ink(colour), colour) for colour in ramp) >= 4.5
    assert scale.contrast(ramp[0], ramp[-1]) > 11


# Machado et al. 2009, the three colour blindnesses at full severity, on linear RGB.
BLINDNESS = {
    "protanopia": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    "deuteranopia": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881)),
    "tritanopia": ((1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602), (0.004733, 0.691367, 0.303900)),
}


@pytest.mark.parametrize("stops", [scale.LIGHT, scale.DARK], ids=["light", "dark"])
@pytest.mark.parametrize("kind", BLINDNESS)
def test_the_scale_keeps_its_order_for_every_colour_blindness(stops, kind):
    seen = []
    for colour in scale.ramp(stops):
        linear = torch.tensor([c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour])
        seen.append(float(torch.tensor([0.2126, 0.7152, 0.0722]) @ (torch.tensor(BLINDNESS[kind]) @ linear)))
    assert seen in (sorted(seen), sorted(seen, reverse=True))


@pytest.mark.parametrize(("values", "options", "low", "high"), [
    ([1.0, 2.0, 3.0, 4.0, 5.0], {}, 3.0, 5.0),  # half of the tokens stay pale
    ([1.0, 2.0, 3.0], {"low": 0.0}, 0.0, 3.0),
    ([2.0, 2.0], {}, 2.0, 3.0),
    ([float("nan"), 4.0], {"low": 1.0}, 1.0, 4.0),
    ([], {}, 0.0, 1.0),
    ([1.0, 10.0, 100.0], {"is_log": True}, 10.0, 100.0),
    ([1e-9, 1e-9, 1.0], {"is_log": True}, 0.01, 1.0),  # no more than two decades
    ([0.0, 0.0], {"is_log": True}, 0.0, 1.0),
])  # fmt: skip
def test_domain(values, options, low, high):
    domain = scale.Domain.of(torch.tensor(values), **options)
    assert (domain.low, domain.high) == pytest.approx((low, high), rel=0.05)
    assert domain.shade(domain.high) == scale.SHADES - 1
    assert domain.shade(domain.low) == 0
    assert domain.shade(-1e9) == 0
    assert domain.shade(1e9) == scale.SHADES - 1


def test_a_column_whose_values_have_the_same_four_digits_has_a_scale():
    """WAAD of a model that looks far back is close to W everywhere."""
    analysis = synthetic_analysis(["how", "many", *"answer"])
    close = 10 - torch.arange(len(analysis.tokens)) * 1e-5
    page = data.prompt(dataclasses.replace(analysis, waad=close))
    assert page["domains"]["waad"]["low"] < page["domains"]["waad"]["high"]
    assert len(data.plain(1, page)["tokens"]) == len("answer")


def test_an_unknown_column_is_an_error_that_names_those_there_are():
    assert columns.find("WAAD").key == "waad"
    with pytest.raises(InputError, match=r"--color-by red: no such column; there are waad, fai, entropy, delta, gamma"):
        columns.find("red")


@pytest.fixture(scope="module")
def hostile():
    """The hostile texts as tokens of one prompt, as questions of others, and in everything else that a page shows."""
    analyses = [synthetic_analysis(TEXTS), *(synthetic_analysis(["a", "b", "c"], question=text) for text in TEXTS)]
    short = [text for text in TEXTS if len(text) < 1000]
    summary = {"model": {"name": "".join(short)}, "settings": {text: text for text in short}}
    summary |= {
        "versions": {},
        "timings_seconds": dict.fromkeys(short, 1.0),
        "peak_memory_bytes": dict.fromkeys(short, 1),
    }
    couplings = [Coupling(text, 0.5, 0.4, 0.01, 0.1, 0.2, 99, 9) for text in short]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "MAX_PROMPTS", len(analyses))
        return report.render(analyses, Settings(), summary, couplings)


def test_hostile_text_is_text_everywhere_on_the_page(hostile):
    hostile.encode("utf-8")
    assert not FORBIDDEN & set(hostile)
    page = Page(hostile)
    plain = Page(report.render([synthetic_analysis(["a", "b", "c"])], Settings(), SUMMARY, [COUPLING]))
    assert page.open == []
    assert {tag for tag, _ in page.tags} - {tag for tag, _ in plain.tags} <= {"div", "ul", "li"}  # of what is left out
    names = {name for _, attributes in page.tags for name in attributes}
    assert names <= {name for _, attributes in plain.tags for name in attributes}
    assert page.data["data-1"]["tokens"] == list(map(token_text, TEXTS))
    for number, question in enumerate(TEXTS, 2):
        assert page.data[f"data-{number}"]["question"] == visible(shortened(question, data.MAX_CHARACTERS))


def test_tokens_of_a_megabyte_leave_the_page_small():
    tokens = ["how", " many", *["x" * 1_000_000] * 30]
    text = report.render([synthetic_analysis(tokens)], Settings(), SUMMARY)
    assert len(text) < 200_000
    assert "Prompt 1: the text of 30 tokens after 500 characters." in text
