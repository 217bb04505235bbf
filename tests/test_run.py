"""`attnstats.load`: a finished run in Python and in a notebook."""

import html.parser
import json
import shutil

import pytest
import torch

import attnstats
from attnstats.cli.main import main
from attnstats.errors import InputError
from attnstats.report.columns import COLUMNS
from attnstats.report.notebook import Shaded
from attnstats.study import outputs
from attnstats.study.text import shortened, visible
from tests.hostile import TEXTS
from tests.tiny import save_tiny_model, synthetic_analysis

QUESTIONS = ["Why is the sky blue?", "How many?\nTell me.", "left", "right"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("run")
    asked = [part for question in QUESTIONS for part in ("--prompt", question)]
    options = ["--max-tokens", "30", "--temperature", "0.9", "--layers", "1,3", "--out", str(place / "out")]
    assert main(["analyze", "--model", str(save_tiny_model(place / "model")), *asked, *options]) == 0
    return place / "out"


@pytest.fixture
def run(folder):
    return attnstats.load(folder)


def test_it_has_the_analyses_and_their_tables(run, folder):
    assert len(run) == len(list(run)) == 4
    assert run.settings.layers == [1, 3]
    assert [analysis.question for analysis in run] == QUESTIONS
    for number, analysis in enumerate(run):
        rows = run.tokens[run.tokens.prompt == number]
        assert rows.token.tolist() == analysis.tokens
        torch.testing.assert_close(torch.tensor(rows.waad.to_numpy()), analysis.waad, rtol=0, atol=0)
        assert rows.is_response.sum() == len(analysis.delta) == run.prompts.response_tokens[number]
    assert run[-1].question == "right"
    assert [analysis.question for analysis in run[1:3]] == QUESTIONS[1:3]
    assert len(run.heads) == 4 * 2 * run[0].distance.shape[1]
    assert run.couplings().index.tolist() == [each["name"] for each in run.summary["couplings"]]
    assert run.page() == (folder / outputs.REPORT).read_text(encoding="utf-8")


def test_the_profile_as_a_frame(run):
    frame = run.profile.to_frame()
    assert frame.index.names == ["layer", "head"]
    assert frame.loc[3, 1].mean_distance == float(run.profile.distance[1, 1])
    assert frame.received_kurtosis.isna().sum() == run.profile.kurtosis.isnan().sum()


def test_a_figure_of_each_kind_and_a_report_elsewhere(run, tmp_path):
    for kind in ("rhythm", "maps", "heads"):
        run.plot(kind, prompt=1).savefig(tmp_path / f"{kind}.png")
    assert run.plot("rhythm", tokens=(1, 5)).axes
    with pytest.raises(InputError, match=r"tokens \(1,\): the response has tokens 1 to"):
        run.plot("rhythm", tokens=(1,))
    assert run.report(tmp_path / "page.html").read_text(encoding="utf-8") == run.page()


def test_texts_are_of_a_few_lines_and_name_what_there_is(run):
    lines = repr(run).splitlines()
    assert len(lines) == 6
    assert lines[0] == f"Run {run.folder}: 4 prompts, model"
    assert "layers 1, 3; 4 heads each" in lines[1]
    assert "How many? Tell me." in lines[3]
    assert lines[-1] == "  and 1 more"
    of_one = repr(run[0]).splitlines()
    assert len(of_one) == 3
    assert "Why is the sky blue?" in of_one[0]
    assert f"at {run[0].preplan(1)[0]}" in of_one[1]
    assert f"at {run[0].anchors(1)[0]}" in of_one[2]
    assert len(repr(run.profile).splitlines()) == 3
    assert repr(run.profile.empty((0, 1), heads=2)) == "HeadProfile of 2 x 2 heads, over 0 rows of 0 sequences"


class Cell(html.parser.HTMLParser):
    """Tags of a cell, and the text within its `span`s that have a title: the tokens."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.tokens, self.inside = set(), [], False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.inside = tag == "span" and any(name == "title" for name, _ in attributes)
        if self.inside:
            self.tokens.append("")

    def handle_endtag(self, tag):
        self.inside = False

    def handle_data(self, data):
        if self.inside:
            self.tokens[-1] += data


@pytest.mark.parametrize("column", COLUMNS, ids=lambda column: column.key)
def test_text_of_a_model_is_text_in_a_notebook(column):
    analysis = synthetic_analysis(TEXTS)
    cell = Cell(Shaded(analysis, column)._repr_html_())
    assert cell.tags <= {"div", "span", "b", "svg", "path"}
    shown = [visible(shortened(text)) for text in analysis.shown[analysis.response_start :]]
    assert [text for text in cell.tokens if text not in ("", "·")] == [text for text in shown if text not in ("", "·")]


def test_an_analysis_is_a_frame_of_its_tokens_and_shows_them_in_colour(run):
    expected = run.tokens[run.tokens.prompt == 1].drop(columns="prompt").set_index("position")
    found = run[1].to_frame()
    assert found.columns.tolist() == expected.columns.tolist()
    assert found.index.tolist() == expected.index.tolist()
    for name in found:
        assert found[name].equals(expected[name].astype(found[name].dtype)), name
    cell = Cell(run[1]._repr_html_())
    assert len(cell.tokens) == int(run[1].response.sum())


def test_a_run_shows_its_first_response_in_a_notebook(run):
    cell = Cell(run._repr_html_())
    assert "script" not in cell.tags
    assert len(cell.tokens) == int(run[0].response.sum())
    assert "FAI of" in repr(run.show(1, "fai"))


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda run: run[4], "has prompts 0 to 3"),
        (lambda run: run.plot("waterfall"), "rhythm, maps, heads"),
        (lambda run: run.plot("maps", tokens=(1, 2)), "is for 'rhythm'"),
        (lambda run: run.plot("rhythm", tokens=(3, 9999)), "the response has tokens 1 to"),
        (lambda run: run.plot(prompt=9), "has prompts 0 to 3"),
        (lambda run: run.show(0, "colour"), "color_by colour: no such column"),
        (lambda run: run["a"], "analyses are numbered by prompt"),
        (lambda run: run.report(run.folder), "Is a directory; name a file"),
        (lambda run: run.report(run.folder / "no" / "x.html"), "No such file or directory; name a file"),
        (lambda _: attnstats.load(None), "folder: must be the path of a run, got NoneType"),  # type: ignore[arg-type]
    ],
    ids=[
        "prompt",
        "figure",
        "tokens-of-maps",
        "tokens",
        "prompt-of-figure",
        "column",
        "name",
        "folder",
        "nowhere",
        "none",
    ],
)
def test_bad_input_is_named(run, call, told):
    with pytest.raises((InputError, IndexError, TypeError), match=told):
        call(run)


def test_a_damaged_table_is_named(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "out")
    file = tmp_path / "out" / "tokens.parquet"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(InputError, match=r"tokens\.parquet: .*`attnstats analyze` writes it"):
        attnstats.load(tmp_path / "out").tokens  # noqa: B018


def test_the_function_prints_nothing_unless_asked_to(tmp_path, capsys):
    model, options = save_tiny_model(tmp_path / "model"), {"prompts": ["left"], "max_tokens": 5, "layers": [1]}
    assert repr(attnstats.analyze(model, out=tmp_path / "one", **options)).startswith(
        f"Run {tmp_path / 'one'}: 1 prompt,"
    )
    assert capsys.readouterr().out == ""
    attnstats.analyze(model, out=tmp_path / "two", quiet=False, **options)
    assert "left" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            {"format": outputs.FORMAT + 1, "versions": {"attnstats": "9.9.9"}},
            rf"a run of a newer version: attnstats 9\.9\.9 wrote it in format {outputs.FORMAT + 1}, and this attnstats "
            rf"{attnstats.__version__} reads format {outputs.FORMAT}; update attnstats",
        ),
        (
            {"format": None},
            rf"a run of an older version: .* in format 1, .*reads format {outputs.FORMAT}; run .* again",
        ),
        ({"format": "two"}, "format must be a number"),
    ],
    ids=["newer", "older", "none"],
)
def test_a_run_of_another_format_names_both_versions(folder, tmp_path, change, told):
    shutil.copytree(folder, tmp_path / "out")
    file = tmp_path / "out" / outputs.SUMMARY
    summary = json.loads(file.read_text(encoding="ascii"))
    assert summary["format"] == outputs.FORMAT
    changed = {key: value for key, value in (summary | change).items() if value is not None}
    file.write_text(json.dumps(changed), encoding="ascii")
    with pytest.raises(InputError, match=told):
        attnstats.load(tmp_path / "out")


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        attnstats.load(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"has no summary\.json"):
        attnstats.load(str(tmp_path))
