"""The report in a real browser: it runs without an error or a request, and its switches, links and keys work.

One Chromium for all tests, driven by Playwright; each test has a page of its own, and fails when that page wrote an
error to its console, raised, or asked for anything but its own file.
"""

import itertools
import math
import re
import shutil
import types

import pytest

from attnstats import report
from attnstats.report import columns, compare, data, scale
from attnstats.study.analysis import Settings
from attnstats.study.text import token_text, visible
from tests.hostile import FORBIDDEN, TEXTS
from tests.report.test_compare import run_of
from tests.report.test_report import HOSTILE, SUMMARY
from tests.tiny import synthetic_analysis

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium isn't installed")

ARGUMENTS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--no-first-run",
]  # fmt: skip
WORDS = [f" word{i}" if i % 9 else ".\n" for i in range(90)]
OTHER_WORDS = [*WORDS[:40], " something", " else", *WORDS[50:]]  # from token 29 of the response on
COLUMNS = ["waad", "fai", "entropy", "delta", "gamma"]
COUPLING = types.SimpleNamespace(
    name="entropy at WAAD peaks, a name as long as it takes to wrap on a phone", observed=0.3608, random=0.2386,
    lift=0.5122, p_value=0.001, low=0.41, high=0.62, count=812,
    reason="",
)  # fmt: skip


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """one.html: a prompt of plain words; hostile.html; many.html: 70 prompts; two.html: two runs."""
    folder = tmp_path_factory.mktemp("report")
    hostile = synthetic_analysis(HOSTILE, question="<script>throw 1</script>")
    one = synthetic_analysis(WORDS, prompt=12, question="How many words?")
    pages = {
        "one": report.render([one], Settings(), SUMMARY, [COUPLING]),
        "hostile": report.render([hostile] * 2, Settings(), SUMMARY),
        "many": report.render(
            [synthetic_analysis([f" w{i}" for i in range(400)], question=f"Question {i}?") for i in range(70)],
            Settings(), SUMMARY,
        ),
        "two": compare.render(
            run_of(*(synthetic_analysis(WORDS, 12, question) for question in ("How many?", "Same", "Alone"))),
            run_of(synthetic_analysis(OTHER_WORDS, 12, "How many?"), synthetic_analysis(WORDS, 12, "Same")),
        ),
    }  # fmt: skip
    for name, text in pages.items():
        (folder / f"{name}.html").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def visit(browser, folder):
    """visit(name, ...) opens a page; afterwards nothing may have gone wrong in any."""
    contexts, wrong = [], []

    def visit(name, *, width=1200, dark=False, anchor="", **options):
        scheme = "dark" if dark else "light"
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, **options)
        contexts.append(context)
        page = context.new_page()
        address = (folder / f"{name}.html").as_uri()
        page.on("console", lambda message: wrong.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
        page.on("dialog", lambda dialog: wrong.append(f"dialog: {dialog.message}"))
        page.on("request", lambda request: wrong.append(request.url) if request.url.split("#")[0] != address else None)
        page.goto(address + anchor)
        return page

    yield visit
    for context in contexts:
        context.close()
    assert wrong == []


def colours(page):
    return page.eval_on_selector_all("#tokens > span", "all => all.map(s => getComputedStyle(s).backgroundColor)")


def cursor(page):
    """The tokens that are lit, and where the curves' slider stands."""
    lit = page.eval_on_selector_all("#tokens > .on", "all => all.map(s => s.id)")
    return lit, page.get_attribute("#curves", "aria-valuenow")


def at(index):
    return [f"t{index}"], str(index + 1)


def test_the_answer_is_there_token_by_token(visit):
    page = visit("one")
    shown = page.eval_on_selector_all("#tokens > span", "all => all.map(s => s.textContent)")
    assert [text.strip() for text in shown] == [token.strip().replace(".", ".↵") for token in WORDS[12:]]
    assert page.inner_text("#question") == "How many words?"
    assert "word" in page.inner_text("#tokens")
    assert page.inner_text("#tokens").count("\n") >= 8
    assert page.is_hidden("#index")
    assert "+51.2 %" in page.inner_text("#couplings")


def test_what_the_model_read_is_on_the_page(visit):
    page = visit("one")
    assert page.is_hidden("#sent pre")
    page.click("#sent summary")
    assert page.inner_text("#sent pre") == "".join(WORDS[:12]).replace("\n", "↵\n")


def test_the_switch_changes_colours_legend_and_curves(visit):
    page = visit("one", reduced_motion="reduce")
    seen = {}
    for column in COLUMNS:
        page.check(f"#columns [value={column}]", force=True)
        seen[column] = tuple(colours(page))
        legend = page.inner_text("#scale")
        assert legend.count("\n") >= 5  # ticks and a sentence
        assert next(c.unit for c in columns.COLUMNS if c.key == column) in legend
        titles = page.eval_on_selector_all("#curves .title", "all => all.map(t => t.firstChild.textContent)")
        assert len(titles) == (2 if column in ("waad", "fai") else 3)
    assert len(set(seen.values())) == len(COLUMNS)
    for column in COLUMNS[:4]:
        assert len(set(seen[column])) >= 4


def test_the_shade_of_a_token_is_that_of_its_value(visit):
    page = visit("one", reduced_motion="reduce")
    found = data.prompt(synthetic_analysis(WORDS, prompt=12))
    domain = found["domains"]["waad"]
    ramp = scale.ramp(scale.LIGHT)
    expected = [
        "rgb({}, {}, {})".format(*ramp[scale.Domain(domain["low"], domain["high"], domain["log"]).shade(value)])
        for value in found["values"]["waad"]
    ]
    assert colours(page) == expected


@pytest.mark.parametrize("dark", [False, True])
def test_text_on_every_shade_can_be_read(visit, dark):
    page = visit("one", dark=dark, reduced_motion="reduce")
    page.check("#columns [value=fai]", force=True)
    pairs = page.eval_on_selector_all(
        "#tokens > span:not(.none)",
        "all => all.map(s => [getComputedStyle(s).backgroundColor, getComputedStyle(s).color])",
    )
    for pair in pairs:
        background, ink = (tuple(int(part) for part in colour[4:-1].split(",")) for colour in pair)
        assert scale.contrast(background, ink) >= 4.5


def test_waad_fai_and_receivers_are_explained_with_pictures(visit):
    page = visit("one")
    assert page.is_hidden("#explained figure >> nth=0")
    page.click("#explained summary")
    for place, name in enumerate(("WAAD", "FAI", "Receiver head")):
        figure = page.locator("#explained figure").nth(place)
        assert figure.locator("figcaption b").inner_text() == name
        box = figure.locator("svg").bounding_box()
        texts = [text.bounding_box() for text in figure.locator("text").all()]
        assert all(box["x"] <= text["x"] and text["x"] + text["width"] <= box["x"] + box["width"] for text in texts)
        for one, other in itertools.combinations(texts, 2):
            beside = one["x"] + one["width"] <= other["x"] or other["x"] + other["width"] <= one["x"]
            assert beside or abs(one["y"] - other["y"]) >= 12
    assert "counts as 10" in page.inner_text("#explained")
    assert "10 to 100 tokens after it" in page.inner_text("#explained")


def test_dark_and_light_differ_and_a_change_is_followed(visit):
    page = visit("one", reduced_motion="reduce")
    body = "getComputedStyle(document.body).backgroundColor"
    pixel = "document.querySelector('#mapping canvas').toDataURL()"
    light = colours(page), page.evaluate(body), page.evaluate(pixel)
    page.emulate_media(color_scheme="dark")
    page.wait_for_function(f"light => {pixel} !== light", arg=light[2])
    dark = colours(page), page.evaluate(body), page.evaluate(pixel)
    assert all(one != other for one, other in zip(light, dark, strict=True))
    page.emulate_media(color_scheme="light")
    page.wait_for_function(f"light => {pixel} === light", arg=light[2])
    assert (colours(page), page.evaluate(body), page.evaluate(pixel)) == light


def test_a_token_under_the_pointer_is_found_on_the_curves(visit):
    page = visit("one")
    page.hover("#t30")
    assert cursor(page) == at(30)
    assert "word42" in page.inner_text("#readout mark")
    line = page.get_attribute("#curves .cursor", "d")
    page.hover("#t31")
    assert cursor(page) == at(31)
    assert page.get_attribute("#curves .cursor", "d") != line
    assert page.locator("#curves .dot[r='4.5']").count() == 2
    page.mouse.move(5, 5)
    assert cursor(page) != at(31)


def test_a_place_on_the_curves_is_found_in_the_text(visit):
    page = visit("one")
    page.locator("#curves").scroll_into_view_if_needed()
    box = page.locator("#curves").bounding_box()
    step = (box["width"] - 46 - 12) / 78  # between the chart's edges
    for index in (0.1, 30.1, 30.9, 77.9):
        page.mouse.move(box["x"] + 46 + index * step, box["y"] + 60)
        assert cursor(page) == at(int(index))
    page.mouse.move(box["x"] + 20, box["y"] + 60)  # among the numbers of the axis there is no token
    assert cursor(page) != at(77)


def test_a_row_of_the_map_is_a_token(visit):
    page = visit("one")
    whole = page.locator("#mapping canvas").first
    whole.scroll_into_view_if_needed()
    box = whole.bounding_box()
    page.mouse.move(box["x"] + 40, box["y"] + box["height"] - 2)
    assert cursor(page) == at(77)
    assert "of its attention" in page.inner_text(".local .reading-line")
    lens = page.locator("#mapping canvas.lens").last
    box = lens.bounding_box()
    page.mouse.move(box["x"] + 40, box["y"] + 2)
    first = int(cursor(page)[1])
    page.mouse.move(box["x"] + 40, box["y"] + 2 + box["height"] * 10 / 32)
    assert int(cursor(page)[1]) == first + 10
    assert "back" in page.inner_text(".global .reading-line")


def test_the_lens_tells_the_attention_of_the_map(visit):
    page = visit("one")
    maps = synthetic_analysis(WORDS, prompt=12).maps
    for index in (3, 50):
        page.click(f"#t{index}")
        for name in ("local", "global"):
            said = page.inner_text(f".{name} .reading-line")
            share = float(re.findall(r"([\d.]+) % on itself", said)[0])
            assert share == pytest.approx(100 * float(getattr(maps, f"{name}_band")[index, 0]), rel=0.06)
            share = float(re.findall(r"([\d.]+) % on “word\d+”, 2 back", said)[0])
            assert share == pytest.approx(100 * float(getattr(maps, f"{name}_band")[index, 2]), rel=0.06)


def test_the_lens_shows_another_place_when_the_cursor_moves(visit):
    page = visit("one")
    picture = "document.querySelector('#mapping canvas.lens').toDataURL()"
    page.click("#t5")
    before = page.evaluate(picture)
    page.click("#t70")
    assert page.evaluate(picture) != before
    height = "document.querySelector('#mapping canvas.lens').clientHeight"
    page.check("#mapping [value='16']", force=True)
    assert page.evaluate(picture) != before
    assert page.evaluate(height) > 0


def test_the_lens_reaches_any_pair_and_says_what_it_shows(visit):
    """400 tokens: a cell of the map is two, the exact band 64 distances."""
    page = visit("many")
    maps = synthetic_analysis([f" w{i}" for i in range(400)]).maps
    whole, lens = page.locator("figure.global canvas").first, page.locator("figure.global canvas.lens")
    size = whole.bounding_box()["width"] / (len(maps.columns) - 1)
    for query, key in ((390, 2), (390, 200), (390, 330), (200, 140), (70, 40), (31, 30)):
        row, column = (query - 2) // 2, key // 2
        whole.click(position={"x": (column + 0.5) * size, "y": 17 + (row + 0.5) * size})
        whole.hover(position={"x": 100.5 * size, "y": 17 + 3.5 * size})  # looks elsewhere, but a click keeps the place
        page.mouse.move(5, 5)
        numbers = list(map(int, re.findall(r"\d+", page.inner_text("figure.global .hint"))))
        first, last, left, right = numbers
        assert first <= query - 1 <= last
        assert left <= key <= right
        step = lens.bounding_box()["width"] / 64
        lens.hover(position={"x": (key - left + 0.5) * step, "y": (query - 1 - first + 0.5) * step})
        said = page.inner_text("figure.global .reading-line")
        share = float(re.findall(r"([\d.]+) % of", said)[0]) / 100
        back = query - key
        if back < 64:
            assert f"“w{query}” → “w{key}”, {back} back" in said
            assert said.endswith("(exact)")
            assert share == pytest.approx(float(maps.global_band[query - 2, back]), rel=0.06)
        else:
            assert said.endswith("(a cell of the map: mean of 2 tokens, on 2 together)")
            assert f"w{2 * column} w{2 * column + 1}" in said
            assert share == pytest.approx(float(maps.global_map[row, column]), rel=0.06, abs=1e-5)
    page.focus("#tokens")
    page.keyboard.press("Home")  # another cursor, another place
    assert "tokens 1 to 32" in page.inner_text("figure.global .hint")


def test_sentences_have_bands_of_where_they_look(visit):
    page = visit("one")
    maps = synthetic_analysis(WORDS, prompt=12).maps
    bounds = maps.parts.tolist()
    assert page.locator("#sentences li").count() == len(bounds) - 1
    bands = page.locator("#sentences .band")
    assert bands.count() == 2 * len(maps.local_shares)
    for row in (0, 5):
        shares = maps.global_shares[row].tolist()
        label = bands.nth(2 * row + 1).get_attribute("aria-label")
        assert label.startswith("global heads: first token")
        told = [float(number) / 100 for number in re.findall(r"([\d.]+) %", label)]
        own = 2 + row
        assert told == pytest.approx([shares[0], shares[1], sum(shares[2:own]), shares[own]], abs=0.006)
        widths = page.eval_on_selector_all(
            f"#sentences li:nth-child({own + 1}) .band:last-child rect", "all => all.map(r => r.getBBox().width)"
        )
        assert [width / sum(widths) for width in widths] == pytest.approx(told, abs=0.01)
    page.click("#sentences li:nth-child(6)")  # a sentence is selected, and what it looks at is told
    assert cursor(page) == at(bounds[5] - 12)
    assert page.locator("#sentences li.on").count() == 1
    told = page.eval_on_selector_all("#sentences li", "all => all.map(r => r.querySelector('.looked').textContent)")
    for text, share in zip(told, maps.local_shares[3].tolist(), strict=True):
        assert (float(text.split()[0]) / 100 if text else 0) == pytest.approx(share, rel=0.06)


@pytest.mark.parametrize("width", [375, 1200])
@pytest.mark.parametrize("count", [1, 3, 12, 78])
def test_labels_of_a_map_do_not_overlap_and_are_not_on_its_cells(visit, folder, count, width):
    analysis = synthetic_analysis(WORDS[: 12 + count], prompt=12)
    (folder / "few.html").write_text(report.render([analysis], Settings(), SUMMARY), encoding="utf-8")
    page = visit("few", width=width)
    page.evaluate("""() => {
        const write = CanvasRenderingContext2D.prototype.fillText;
        window.labels = new Map();
        CanvasRenderingContext2D.prototype.fillText = function (text, x, y) {
            const { width } = this.measureText(text);
            const left = x - { left: 0, right: width, center: width / 2 }[this.textAlign];
            const all = window.labels.get(this.canvas) ?? [];
            const others = all.filter((label) => label[0] !== text);
            window.labels.set(this.canvas, [...others, [text, left, left + width, y]]);
            write.call(this, text, x, y);
        };
    }""")
    page.set_viewport_size({"width": width - 4, "height": 900})
    page.wait_for_function("() => window.labels.size")
    drawn = page.evaluate("[...window.labels].map(([canvas, all]) => [canvas.className, canvas.clientWidth, all])")
    assert {name for name, *_ in drawn} == {""}  # the lens has names beside it at most
    for _, wide, labels in drawn:
        assert "answer" in [text for text, *_ in labels]
        assert all(left >= 0 and right <= wide and y < 17 for _, left, right, y in labels)
        for one, other in itertools.combinations(labels, 2):
            assert one[2] < other[1] or other[2] < one[1]


def test_numbers_on_an_axis_differ(visit, folder):
    """Also where a response has two values of FAI that are close."""
    (folder / "close.html").write_text(
        report.render([synthetic_analysis(WORDS[:6])], Settings(), SUMMARY), encoding="utf-8"
    )
    page = visit("close")
    texts = page.eval_on_selector_all(
        "#curves text[text-anchor=end]", "all => all.map(t => [t.textContent, t.getAttribute('y') > 150])"
    )
    for lower in (False, True):
        numbers = [text for text, is_lower in texts if is_lower == lower]
        assert len(numbers) == len(set(numbers)) > 2
    assert "↑" not in page.inner_text("#curves")  # nor is one of two values above the axis


@pytest.mark.parametrize("place", ["#tokens", "#curves"])
def test_keys_move_the_cursor(visit, place):
    page = visit("one")
    page.focus(place)
    keys = ("Home", 0), ("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1), ("End", 77), ("ArrowRight", 77)
    for key, index in keys:
        page.keyboard.press(key)
        assert cursor(page) == at(index), key
    page.keyboard.press("Home")
    page.keyboard.press("PageDown")
    marked = page.eval_on_selector_all("#tokens > .preplan, #tokens > .anchor", "all => all.map(s => s.id)")
    assert cursor(page)[0][0] == next(token for token in marked if token != "t0")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowUp")
    assert page.get_attribute("#tokens", "aria-activedescendant") == cursor(page)[0][0]
    assert "word" in page.get_attribute("#curves", "aria-valuetext")


def test_up_and_down_lead_to_the_next_line(visit):
    page = visit("one")
    page.click("#t4")
    page.focus("#tokens")
    top = "document.querySelector('#tokens .on').getBoundingClientRect().top"
    before = page.evaluate(top)
    page.keyboard.press("ArrowDown")
    assert page.evaluate(top) > before
    page.keyboard.press("ArrowUp")
    assert page.evaluate(top) == before


def test_everything_is_reached_by_tab(visit):
    page = visit("one")
    reached = []
    for _ in range(11):
        page.keyboard.press("Tab")
        name = "(e => e.id || e.name || e.parentElement.id)(document.activeElement)"
        reached.append(page.evaluate(name))
    assert reached == [
        "explained", "sent", "column", "share", "query", "tokens", "link", "curves", "sentences-box", "lens", "grid"
    ]  # fmt: skip
    page.focus("#columns input:checked")
    page.keyboard.press("ArrowRight")
    assert page.eval_on_selector("#columns [value=fai]", "e => e.checked")


def test_marks_are_more_or_fewer_or_none_and_not_by_colour_alone(visit):
    page = visit("one")
    counts = {}
    for share, name in ((0.1, "0.1"), (0.4, "0.4"), (0, "0")):
        page.check(f"#shares [value='{name}']", force=True)
        counts[share] = page.locator("#tokens > .anchor").count()
    assert counts == {0.1: 8, 0.4: 32, 0: 0}
    page.check("#shares [value='0.1']", force=True)
    shadow = page.eval_on_selector("#tokens > .preplan", "e => getComputedStyle(e).boxShadow")
    assert shadow != "none"
    assert "preplan" in page.inner_text("#key")


@pytest.mark.parametrize(("width", "share"), [(1600, 0.1), (1600, 0.4), (420, 0.4)])
def test_arcs_join_marked_anchors_with_the_tokens_that_lead_into_them(visit, width, share):
    page = visit("one", width=width)
    page.check(f"#shares [value='{share}']", force=True)
    found = data.prompt(synthetic_analysis(WORDS, prompt=12))
    count = math.ceil(share * 78)
    pairs = [(t, i) for t, i in enumerate(found["intro"]) if i is not None and found["anchor"][t] < count]
    assert pairs
    paths = {kind: page.locator(f".arcs .{kind}") for kind in ("tip", "root", "wrapped")}
    assert paths["tip"].get_attribute("d").count("M") == len(pairs)
    assert paths["root"].get_attribute("d").count("M") == len(pairs)
    top = "id => document.getElementById(id).getClientRects()[0].top"
    wrapped = [pair for pair in pairs if len({page.evaluate(top, f"t{i}") for i in pair}) == 2]
    assert paths["wrapped"].count() == bool(wrapped)
    if wrapped:  # both ends are drawn, from a token to the side, and no end is shorter than a few pixels
        d = paths["wrapped"].get_attribute("d")
        ends = re.findall(r"M([\d.]+) [\d.]+Q[\d.]+ [\d.]+ ([\d.]+) [\d.]+", d)
        assert len(ends) == 2 * len(wrapped)
        assert all(abs(float(a) - float(b)) > 5 for a, b in ends)
    assert page.is_visible("#arcs-key")
    page.check("#shares [value='0']", force=True)
    assert page.locator(".arcs path").count() == 0


def hits(page):
    return page.eval_on_selector_all("#tokens > .hit", "all => all.map(s => s.id)")


def test_a_text_is_found_and_its_matches_stepped_through(visit):
    page = visit("one")
    page.keyboard.press("Home")
    page.focus("#tokens")
    page.keyboard.press("Home")
    page.fill("#query", "WORD2")
    assert hits(page) == [f"t{i}" for i in range(8, 18) if (i + 12) % 9]  # word20 to word29
    assert page.inner_text("#matches") == "1 of 9"
    page.focus("#query")
    for key, index, said in (
        ("Enter", 9, "2 of 9"), ("Shift+Enter", 8, "1 of 9"), ("Shift+Enter", 17, "9 of 9"), ("Enter", 8, "1 of 9")
    ):  # fmt: skip
        page.keyboard.press(key)
        assert cursor(page) == at(index)
        assert page.inner_text("#matches") == said
    page.click("#match-after")
    assert cursor(page) == at(9)
    page.click("#match-before")
    assert cursor(page) == at(8)
    assert page.get_attribute("#curves .hit", "d").count("M") == 9
    page.check("#columns [value=fai]", force=True)
    assert len(hits(page)) == 9  # another column leaves them
    page.fill("#query", "word20 word21")  # over two tokens
    assert hits(page) == ["t8", "t9"]
    page.fill("#query", "no such")
    assert (hits(page), page.inner_text("#matches")) == ([], "not found")
    assert page.is_disabled("#match-after")
    page.keyboard.press("Escape")
    assert page.input_value("#query") == ""
    assert page.inner_text("#matches") == ""


def test_a_search_goes_on_in_the_next_prompt(visit):
    page = visit("many")
    page.fill("#query", "w39")
    assert page.inner_text("#matches") == "1 of 11"
    page.click("#next")
    sync_api.expect(page.locator("#question")).to_have_text("Question 1?")
    assert len(hits(page)) == 11
    assert page.inner_text("#matches").endswith("11 found")


def test_a_token_has_a_link(visit):
    page = visit("many", anchor="#prompt-3-token-391")
    assert page.inner_text("#question") == "Question 2?"
    assert cursor(page) == at(390)
    assert is_in_view(page, 390)
    page.click("#link")
    assert page.evaluate("location.hash") == "#prompt-3-token-391"
    page.evaluate("location.hash = '#token-7'")  # of the prompt that is open
    page.wait_for_selector("#t6.on")
    assert page.inner_text("#question") == "Question 2?"
    page.click("#tokens")
    page.hover("#t9")
    assert page.get_attribute("#link", "href") == "#prompt-3-token-10"
    assert cursor(visit("one", anchor="#token-30")) == at(29)
    assert cursor(visit("one", anchor="#token-3000")) == at(77)


def test_the_link_of_a_token_is_copied(visit):
    page = visit("one", permissions=["clipboard-read", "clipboard-write"])
    page.click("#t20")
    page.click("#link")
    page.wait_for_selector("#link:text('copied')")
    assert page.evaluate("navigator.clipboard.readText()") == page.url.split("#")[0] + "#prompt-1-token-21"


def is_in_view(page, index):
    """Whether the text box shows the token, however the page is scrolled."""
    return page.evaluate(
        """id => {
            const [token, box] = [document.getElementById(id), document.getElementById("tokens")]
                .map(element => element.getBoundingClientRect());
            return token.top >= box.top && token.bottom <= box.bottom;
        }""",
        f"t{index}",
    )


def in_view(page):
    return [int(number) - 1 for number in re.findall(r"Tokens (\d+) to (\d+)", page.inner_text("#inview"))[0]]


def test_a_long_answer_scrolls_with_the_cursor_and_says_what_it_shows(visit):
    page = visit("many")
    start = int(cursor(page)[1]) - 1
    assert is_in_view(page, start)  # from the start
    page.focus("#tokens")
    for key, index in (("End", 397), ("Home", 0)):
        page.keyboard.press(key)
        assert is_in_view(page, index)
    first, last = in_view(page)
    assert first == 0
    assert is_in_view(page, last)
    assert not is_in_view(page, last + 40)
    assert page.get_attribute(".box", "class") == "box below"
    page.evaluate("document.getElementById('tokens').scrollTop = 1e6")
    page.wait_for_function("() => document.querySelector('.box').className === 'box above'")
    assert in_view(page)[1] == 397
    assert page.locator("#curves .inview[d^='M0']").count() == 0
    assert "show token 1," in page.inner_text("#inview")  # the cursor is where the text is not
    page.click("#inview button")
    page.wait_for_function("() => document.querySelector('.box').className === 'box below'")
    assert is_in_view(page, 0)
    assert page.is_hidden("#inview button")
    assert visit("one", width=1600).is_hidden("#inview")


def test_a_text_that_scrolls_under_the_pointer_moves_the_cursor(visit):
    page = visit("many")
    page.focus("#tokens")
    page.keyboard.press("Home")
    box = page.locator("#t20").bounding_box()
    place = box["x"] + 5, box["y"] + 5
    page.mouse.move(*place)
    assert cursor(page) == at(20)
    page.evaluate("height => { document.getElementById('tokens').scrollTop += height; }", 2 * (box["height"] + 9))
    page.wait_for_function("() => !document.querySelector('#t20.on')")
    under = page.evaluate("place => document.elementFromPoint(...place).id", place)
    assert cursor(page)[0][0] == (under if under.startswith("t") and under != "tokens" else "t0")


def test_the_chosen_column_is_bold_in_the_panel(visit):
    page = visit("one")
    for chosen in COLUMNS:
        page.check(f"#columns [value={chosen}]", force=True)
        weights = page.eval_on_selector_all("#readout dd b", "all => all.map(b => +getComputedStyle(b).fontWeight)")
        assert [weight > 600 for weight in weights] == [column == chosen for column in COLUMNS]


def test_the_line_of_the_cursor_leaves_out_labels(visit):
    page = visit("one")
    crossed = 0
    for index in range(78):
        page.focus("#tokens")
        page.keyboard.press("ArrowRight" if index else "Home")
        crossed += page.evaluate("""() => {
            const picture = document.querySelector("#curves svg");
            const d = picture.querySelector(".cursor").getAttribute("d");
            const parts = [...d.matchAll(/M([\\d.]+) ([\\d.]+)V([\\d.]+)/g)].map(part => part.slice(1).map(Number));
            for (const label of picture.querySelectorAll(".label, .title")) {
                const { x, y, width, height } = label.getBBox();
                for (const [at, from, to] of parts) {
                    if (x < at && at < x + width && from < y + height && y < to) throw label.textContent;
                }
            }
            return parts.length > 1;
        }""")
    assert crossed > 3


@pytest.mark.parametrize("name", ["one", "many"])
def test_on_a_phone_nothing_is_covered_and_keys_are_not_explained(visit, name):
    page = visit(name, width=375, has_touch=True, is_mobile=True)
    assert page.is_hidden("#keys")
    assert page.evaluate("getComputedStyle(document.getElementById('readout')).position") == "static"
    boxes = {what: page.locator(what).bounding_box() for what in ("#readout", "#tokens", "#scale", "#key", "#at")}
    order = sorted(boxes, key=lambda what: boxes[what]["y"])
    assert order == ["#readout", "#tokens", "#scale", "#key", "#at"]
    for above, below in itertools.pairwise(order):
        gap = boxes[below]["y"] - boxes[above]["y"] - boxes[above]["height"]
        assert 0 <= gap <= 50
    before = boxes["#tokens"]["y"]
    for index in (0, 7, 20):
        page.locator(f"#t{index}").tap()
        assert page.locator("#tokens").bounding_box()["y"] + page.evaluate("scrollY") == before  # the text stays
    assert "WAAD" in page.inner_text("#at")


def test_hostile_text_stays_text(visit):
    page = visit("hostile")
    shown = page.eval_on_selector_all("#tokens > span", "all => all.map(s => s.textContent)")
    for token in (
        "<script>alert(1)</script>",
        '"><img onerror=alert(1) src=x>',
        "⟨U+202E⟩gnp",
        "⟨U+D800⟩",
        "</script>",
    ):
        assert token in shown
    assert page.inner_text("#question") == "<script>throw 1</script>"
    assert page.locator("img").count() == 0
    assert page.evaluate("document.scripts.length") == 6  # the page's data, two prompts with maps, and the script
    page.focus("#tokens")
    page.keyboard.press("Home")
    for token in shown:
        assert token.strip() in page.inner_text("#readout mark")
        page.keyboard.press("ArrowRight")
    assert page.locator("img").count() == 0


def test_the_policy_stops_what_it_forbids(browser, folder):
    """Injections are blocked: an inline handler, an inline script, a style, an image from elsewhere."""
    page = browser.new_page()
    blocked = []
    page.on("console", lambda message: blocked.append(message.text))
    page.goto((folder / "one.html").as_uri())
    page.evaluate("""() => {
        const script = document.createElement("script");
        try { script.textContent = "window.ran = true"; } catch (error) { window.refused = true; }
        document.body.append(script);
        const image = document.createElement("img");
        image.setAttribute("src", "https://example.invalid/x.png");
        document.body.append(image);
        try { document.body.innerHTML += "<b onclick='1'>x</b>"; } catch (error) { window.typed = true; }
    }""")
    page.wait_for_function("window.typed === true")
    assert page.evaluate("window.ran") is None
    assert any("Content Security Policy" in text for text in blocked)
    assert any("img-src" in text for text in blocked)
    page.close()


@pytest.mark.parametrize("width", [360, 768])
def test_narrow_screens_need_no_scrolling_sideways(visit, width):
    page = visit("one", width=width, has_touch=True)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    page.tap("#t20")
    assert cursor(page) == at(20)
    for column in COLUMNS:
        page.check(f"#columns [value={column}]", force=True)
        assert page.evaluate("document.documentElement.scrollWidth") == width


def test_the_drawings_follow_the_width(visit):
    page = visit("one", width=1200)
    wide = page.evaluate("document.querySelector('#curves svg').clientWidth")
    page.set_viewport_size({"width": 700, "height": 900})
    page.wait_for_function(f"document.querySelector('#curves svg').clientWidth < {wide - 300}")
    assert page.evaluate("document.documentElement.scrollWidth") == 700


def test_the_index_leads_to_every_prompt(visit):
    page = visit("many")
    assert page.locator("#cards a").count() == 70
    assert page.locator("#cards svg").count() == 140
    assert page.inner_text("#number") == "Prompt 1 of 70"
    question = sync_api.expect(page.locator("#question"))
    page.click("#cards a >> nth=33")
    question.to_have_text("Question 33?")
    assert page.get_attribute("#cards a >> nth=33", "aria-current") == "true"
    page.click("#next")
    question.to_have_text("Question 34?")
    page.go_back()
    question.to_have_text("Question 33?")
    assert page.is_visible("#mapping canvas.lens")


def test_a_prompt_is_opened_by_its_address(visit):
    assert visit("many", anchor="#prompt-70").inner_text("#question") == "Question 69?"
    assert visit("many", anchor="#prompt-71").inner_text("#question") == "Question 0?"


@pytest.mark.parametrize("name", ["many", "two"])
def test_on_paper_the_text_is_whole_and_light_and_has_no_controls(visit, name):
    text = "#tokens" if name == "many" else "#tokens-A"
    shades = f"[...document.querySelectorAll('{text} > span')].map(s => getComputedStyle(s).backgroundColor)"
    light = visit(name, reduced_motion="reduce").evaluate(shades)
    page = visit(name, dark=True, reduced_motion="reduce")
    dark = page.evaluate(shades)
    page.emulate_media(media="print", color_scheme="dark")
    page.set_viewport_size({"width": 720, "height": 1000})
    assert page.evaluate(shades) == light != dark
    box = page.evaluate(f"(e => [e.clientHeight, e.scrollHeight])(document.querySelector('{text}'))")
    assert box[0] == box[1]
    for control in ("#columns", "#search", "#index", "#inview", "#keys", "#link", ".arcs"):
        assert page.locator(control).count() == 0 or page.is_hidden(control)
    assert page.evaluate("document.documentElement.scrollWidth") == 720
    for picture in page.locator("#curves svg, canvas").all():
        box = picture.bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 720
    assert page.pdf().count(b"/Type /Page\n") > 1


def test_a_sample_keeps_the_numbers_of_its_prompts(visit, folder, monkeypatch):
    monkeypatch.setattr(data, "MAX_PROMPTS", 3)
    prompts = [synthetic_analysis(WORDS, question=f"Question {i + 1}?") for i in range(10)]
    (folder / "sample.html").write_text(report.render(prompts, Settings(), SUMMARY), encoding="utf-8")
    page = visit("sample")
    for number in (1, 4, 7):
        page.wait_for_selector(f"#number:text('Prompt {number} of 10')")
        assert page.inner_text("#question") == f"Question {number}?"
        if number < 7:
            page.click("#next")
    assert page.is_hidden("#next")
    page.click("#previous")
    page.wait_for_selector("#number:text('Prompt 4 of 10')")
    assert page.locator("[aria-current=true]").get_attribute("href") == "#prompt-4"
    assert visit("sample", anchor="#prompt-7").inner_text("#question") == "Question 7?"
    assert visit("sample", anchor="#prompt-2").inner_text("#question") == "Question 1?"


def test_a_prompt_is_parsed_when_it_is_opened(visit):
    """70 prompts of 400 tokens are 8 MB: only the one that is looked at is in the document as elements."""
    page = visit("many")
    assert page.evaluate("document.querySelectorAll('*').length") < 4000
    assert page.locator("#tokens > span").count() == 398


def test_what_is_left_out_is_not_drawn(visit, folder, monkeypatch):
    one = synthetic_analysis(WORDS, prompt=12)
    monkeypatch.setattr(data, "MAX_HEADS", 5)
    monkeypatch.setattr(data, "MAX_BYTES", len(data.embedded(data.prompt(one))) + 9)
    (folder / "less.html").write_text(report.render([one], Settings(), SUMMARY), encoding="utf-8")
    page = visit("less")
    assert "The maps of 1 of the prompts" in page.inner_text(".notice")
    assert page.locator("canvas").count() == 0
    assert page.is_hidden("#heads")
    page.click("#t20")
    assert cursor(page) == at(20)
    monkeypatch.setattr(data, "MAX_BYTES", 9)
    (folder / "nothing.html").write_text(report.render([one], Settings(), SUMMARY), encoding="utf-8")
    assert "All from prompt 1 of 1 on." in visit("nothing").inner_text(".notice")


def test_without_scripts_the_answer_is_there_by_waad(visit):
    page = visit("hostile", java_script_enabled=False)
    assert page.locator("main .plain").count() == 2
    shown = page.inner_text("main .plain >> nth=0")
    assert "<script>alert(1)</script>" in shown
    backgrounds = {
        span.evaluate("e => getComputedStyle(e).backgroundColor") for span in page.locator(".plain span").all()[:17]
    }
    assert len(backgrounds) > 3


def test_what_has_no_value_is_said(visit, folder):
    short = synthetic_analysis(["how", " many", " so", " on"])
    (folder / "short.html").write_text(report.render([short], Settings(), SUMMARY), encoding="utf-8")
    page = visit("short")
    page.check("#columns [value=fai]", force=True)
    assert "no token is 10 further on" in page.inner_text("#readout")
    assert page.locator("#tokens > .none").count() == 2
    page.focus("#tokens")
    page.keyboard.press("ArrowRight")
    assert cursor(page) == at(1)


@pytest.mark.parametrize("width", [1200, 400])
def test_hostile_texts_are_shown_as_text_and_do_nothing(visit, folder, width):
    """As tokens, in the prompt and in the answer, and as the question; `visit` fails for a message or an error."""
    question = " ".join(text for text in TEXTS if len(text) < 1000)
    analysis = synthetic_analysis([*TEXTS, *TEXTS], prompt=len(TEXTS), question=question)
    summary = SUMMARY | {"settings": {question: question}, "versions": {text: text for text in TEXTS}}
    (folder / "texts.html").write_text(report.render([analysis], Settings(), summary), encoding="utf-8")
    page = visit("texts", width=width)
    shown = page.eval_on_selector_all("#tokens > span", "all => all.map(s => s.textContent)")
    expected = [text[1:] if text.startswith(" ") and text.strip() else text for text in map(token_text, TEXTS)]
    assert shown == expected
    assert page.text_content("#question") == visible(question)
    assert not FORBIDDEN & set(page.evaluate("document.body.innerText"))
    for tag in ("img", "iframe", "form", "a[href^=javascript]", "base", "object", "plaintext", "template"):
        assert page.locator(tag).count() == 0
    assert page.evaluate("document.scripts.length") == 4  # the page's data, the prompt with maps, and the script
    assert page.title() == "Preplan and anchor: <b>tiny</b>"
    page.focus("#tokens")
    page.keyboard.press("Home")
    for text in shown:
        assert page.text_content("#readout mark").strip() == text.strip()
        page.keyboard.press("ArrowRight")
    # Long words and piled-up marks make nothing wider than the page.
    assert page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") <= 0


def lit(page):
    return page.eval_on_selector_all(".tokens > .on", "all => all.map(s => s.id)")


def test_linked_tokens_of_two_runs_are_lit_together(visit):
    page = visit("two")
    assert page.locator("#tokens-A > span").count() == 78
    assert page.locator("#tokens-B > span").count() == 70
    assert "The first 28 tokens are the same" in page.inner_text("#parting")
    page.hover("#A10")
    assert lit(page) == ["A10", "B10"]
    page.hover("#B40")
    assert lit(page) == ["A48", "B40"]
    page.hover("#B28")
    assert lit(page) == ["B28"]
    assert "no counterpart in A" in page.inner_text("#values")
    page.click("#A60")
    page.mouse.move(5, 5)
    assert lit(page) == ["A60", "B52"]
    page.focus("#tokens-B")
    page.keyboard.press("ArrowRight")
    assert lit(page) == ["A61", "B53"]
    page.keyboard.press("Home")
    assert lit(page) == ["A0", "B0"]
    page.keyboard.press("End")
    assert lit(page) == ["A77", "B69"]


def test_texts_of_two_runs_scroll_to_linked_tokens(visit):
    page = visit("two", width=375)
    classes = "[...document.querySelectorAll('.box')].map(e => e.className)"
    page.focus("#tokens-B")
    page.keyboard.press("Home")
    page.wait_for_function(f"() => {classes}.join() === 'box below,box below'")
    page.focus("#tokens-A")
    page.keyboard.press("End")
    assert lit(page) == ["A77", "B69"]
    page.wait_for_function(f"() => {classes}.join() === 'box above,box above'")


def test_values_of_both_runs_and_their_difference_are_told(visit):
    page = visit("two")
    first, second = (synthetic_analysis(words, 12).waad[12:] for words in (WORDS, OTHER_WORDS))
    for a, b in ((10, 10), (60, 52)):
        page.hover(f"#A{a}")
        rows = page.eval_on_selector_all("#values tbody tr", "all => all.map(r => r.cells[1]?.textContent)")
        assert float(rows[1]) == pytest.approx(float(first[a]), abs=0.006)
        assert float(rows[2]) == pytest.approx(float(second[b]), abs=0.006)
        assert float(rows[3]) == pytest.approx(float(second[b] - first[a]), abs=0.012)
        assert float(rows[5]) == pytest.approx(float(first.mean()), abs=0.01)
    for column in COLUMNS:
        page.check(f"#columns [value={column}]", force=True)
        title = page.eval_on_selector_all("#curves .title", "all => all.map(t => t.firstChild.textContent)")
        assert title[1] == f"{title[0]}: B \N{MINUS SIGN} A"
        assert page.locator("#curves .line.one, #curves .line.two, #curves .line.change").count() == 3


def test_a_place_on_the_curves_of_two_runs_is_found_in_both_texts(visit):
    page = visit("two")
    page.locator("#curves").scroll_into_view_if_needed()
    box = page.locator("#curves").bounding_box()
    step = (box["width"] - 50 - 12) / 78
    page.mouse.move(box["x"] + 50 + 48.5 * step, box["y"] + 60)
    assert lit(page) == ["A48", "B40"]


def test_two_runs_have_an_index_and_their_heads_compared(visit):
    page = visit("two")
    assert "2 prompts are in both; 1 of A alone is not shown" in page.inner_text(".lead")
    assert page.locator("#cards a").count() == 2
    page.click("#next")
    sync_api.expect(page.locator("#question")).to_have_text("Same")
    assert "Both responses are the same" in page.inner_text("#parting")
    assert page.locator("#grids table").count() == 3
    assert "layer" in page.inner_text("#changed")
    assert visit("two", anchor="#prompt-2-token-5").inner_text("#values").count("token 5 of 78") == 2


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [360, 768])
def test_two_runs_fit_narrow_screens(visit, width, dark):
    page = visit("two", width=width, dark=dark)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    for column in COLUMNS:
        page.check(f"#columns [value={column}]", force=True)
        beyond = """all => all.filter(text => {
            const [inner, outer] = [text, text.ownerSVGElement].map(e => e.getBoundingClientRect());
            return inner.left < outer.left || inner.right > outer.right;
        }).map(text => text.textContent)"""
        assert page.eval_on_selector_all("#curves text", beyond) == []
