"""Figures hold what they say, files are what their names say, and what can't be drawn is said in a line."""

import argparse
import dataclasses
import warnings
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from attnstats.cli import plot
from attnstats.errors import InputError
from attnstats.report import figures
from attnstats.report.marks import marks
from attnstats.study import outputs
from attnstats.study.analysis import Settings
from attnstats.study.store import begin
from tests.hostile import FORBIDDEN, TEXTS
from tests.tiny import synthetic_analysis

WORDS = [
    "how",
    " many",
    *(f" w{i}" for i in range(30)),
    " $x^2$",
    " \\frac",
    "\u202eback",
    "\n",
    ".",
    " so",
    " on",
    "<e>",
]
LENGTH = len(WORDS) - 2
STARTS = {"pdf": b"%PDF", "png": b"\x89PNG", "svg": b"<?xml"}


@pytest.fixture(scope="module")
def analysis():
    return synthetic_analysis(WORDS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, analysis):
    """A run of `attnstats analyze` with two prompts, as far as the command reads it."""
    folder = tmp_path_factory.mktemp("run") / "out"
    store = begin(folder, {"command": "analyze"}, resume=False)
    for index in range(2):
        store.write(index, *analysis.stored())
    settings = {"preset": "paper_v2", **dataclasses.asdict(Settings())}
    sections: dict[str, dict[str, str]] = {"model": {}, "versions": {}, "timings_seconds": {}, "peak_memory_bytes": {}}
    outputs.write_summary(folder, {"settings": settings, "prompts": 2, "couplings": [], **sections})
    return folder


def run(*arguments):
    parser = argparse.ArgumentParser()
    plot.add_parser(parser.add_subparsers())
    return plot.run(parser.parse_args(["plot", *map(str, arguments)]))


@pytest.mark.parametrize("figure", plot.FIGURES)
@pytest.mark.parametrize("kind", STARTS)
def test_every_figure_in_every_kind_of_file(tmp_path, folder, figure, kind):
    out = tmp_path / f"x.{kind}"
    assert run(folder, "--figure", figure, "--out", out) == 0
    assert out.read_bytes().startswith(STARTS[kind])
    assert len(out.read_bytes()) > 4000


@pytest.mark.parametrize("kind", STARTS)
def test_the_same_analysis_gives_the_same_bytes(tmp_path, folder, kind):
    for prompt in (1, 2):
        run(folder, "--figure", "heads", "--out", tmp_path / f"{prompt}.{kind}", "--prompt", prompt)
    assert (tmp_path / f"1.{kind}").read_bytes() == (tmp_path / f"2.{kind}").read_bytes()


@pytest.mark.parametrize(("arguments", "message"), [
    (["--out", "x.gif"], "--out x.gif: needs a name that ends in .pdf, .png, .svg"),
    (["--out", "x"], "--out x: needs a name"),
    (["--out", "x.pdf", "--prompt", "3"], "--prompt 3: .* has prompts 1 to 2"),
    (["--out", "x.pdf", "--prompt", "0"], "--prompt 0: .* has prompts 1 to 2"),
    (["--out", "x.pdf", "--tokens", "5", "5"], f"--tokens 5 5: the response has tokens 1 to {LENGTH}"),
    (["--out", "x.pdf", "--tokens", "1", "99"], "--tokens 1 99: the response has"),
    (["--out", "x.pdf", "--tokens", "1", "9", "--figure", "maps"], "--tokens: is for --figure rhythm, not for maps"),
    (["--out", "no/such/folder/x.pdf"], "--out no/such/folder/x.pdf: No such file"),
])  # fmt: skip
def test_what_cannot_be_drawn_is_said(tmp_path, monkeypatch, folder, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        run(folder, *arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_none_of_ours(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        run(tmp_path / "no", "--out", tmp_path / "x.pdf")


@pytest.mark.parametrize("figure", figures.FIGURES)
def test_a_notebook_shows_it_without_pyplot(analysis, figure):
    """What IPython asks an object for; a process that never imported pyplot has no other way to show a figure."""
    assert figures.FIGURES[figure](analysis)._repr_png_().startswith(b"\x89PNG")


def test_a_file_that_is_saved_has_the_fonts_that_journals_take(analysis, tmp_path):
    """TrueType, which is Type 42, whatever matplotlib's default is."""
    figures.rhythm(analysis).savefig(tmp_path / "one.pdf")
    written = (tmp_path / "one.pdf").read_bytes()
    assert b"/Type0" in written
    assert b"/Type3" not in written


def test_rhythm_draws_the_values_and_marks_the_highest(analysis):
    figure = figures.rhythm(analysis)
    for axis, values, ranks in zip(
        figure.axes,
        (analysis.waad, 100 * analysis.fai.masked_fill(~analysis.fai_valid, torch.nan)),
        (marks(analysis).preplan, marks(analysis).anchor),
        strict=True,
    ):
        line, points = axis.lines
        assert line.get_xdata().tolist() == list(range(1, LENGTH + 1))
        drawn = torch.as_tensor(line.get_ydata()).float()
        torch.testing.assert_close(drawn, values[2:].float(), equal_nan=True, rtol=1e-5, atol=1e-6)
        highest = sorted(i + 1 for i, rank in enumerate(ranks) if rank is not None and rank < 4)
        assert sorted(points.get_xdata()) == highest
    assert [axis.get_ylabel() for axis in figure.axes] == ["WAAD\n(tokens)", "FAI\n(% of attention)"]


def test_rhythm_of_some_tokens_names_them(analysis):
    figure = figures.rhythm(analysis, (28, 38))
    names = [label.get_text() for label in figure.axes[1].get_xticklabels()]
    assert names == ["w27", "w28", "w29", "$x^2$", "\\frac", "⟨U+202E⟩back", "↵", ".", "so", "on", "<e>"]
    low, high = figure.axes[0].get_xlim()
    assert low < 28 < 38 < high
    assert high - low < 12


def test_arcs_are_those_of_the_page(analysis):
    figure = figures.rhythm(analysis)
    arcs = [(text.xyann[0] - 1, text.xy[0] - 1) for text in figure.axes[1].texts if text.arrow_patch]
    assert arcs == [(t, intro) for t, intro in enumerate(marks(analysis).intro) if intro is not None]
    assert arcs


def test_maps_are_drawn_as_they_are(analysis):
    figure = figures.maps(analysis)
    for axis, name in zip(figure.axes, ("local", "global"), strict=False):
        (image,) = axis.images
        values = getattr(analysis.maps, f"{name}_map").clamp(min=3e-4)
        torch.testing.assert_close(torch.as_tensor(image.get_array().data), values)
        left, right, bottom, top = image.get_extent()
        assert (left, right, bottom, top) == (-1.5, LENGTH + 0.5, LENGTH + 0.5, 0.5)


def test_maps_of_a_long_response_keep_tokens_on_the_axes():
    long = synthetic_analysis([f" w{i}" for i in range(700)], prompt=50)
    figure = figures.maps(long)
    left, right, bottom, _ = figure.axes[0].images[0].get_extent()
    assert left <= -49
    assert 650 <= right == bottom < 654
    assert "3 tokens" in figure.axes[-1].get_ylabel()


def test_heads_are_lettered_by_class(analysis):
    axis = figures.heads(analysis).axes[0]
    letters = {(int(text.get_position()[1]), int(text.get_position()[0])): text.get_text() for text in axis.texts}
    for row, layer in enumerate((3, 5)):
        for head in range(3):
            name = analysis.classes.name(layer, head)
            assert letters.get((row, head), "M") == name[0].upper()
    assert [label.get_text() for label in axis.get_yticklabels()] == ["3", "5"]


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt(), UnicodeError("no")])
@pytest.mark.parametrize("before", [b"", b"older"])
@pytest.mark.parametrize("where", ["savefig", "write_bytes"])
def test_a_figure_that_cannot_be_written_leaves_nothing(folder, tmp_path, monkeypatch, failure, before, where):
    """Neither an empty file nor half of one; an older figure stays."""
    out = tmp_path / "a.svg"
    if before:
        out.write_bytes(before)

    def fail(self, file, *arguments, **options):
        if where == "savefig":
            if isinstance(file, Path):
                file.touch()
        else:
            self.touch()
        raise failure

    monkeypatch.setattr("matplotlib.figure.Figure.savefig" if where == "savefig" else "pathlib.Path.write_bytes", fail)
    expected = InputError if isinstance(failure, OSError) and where == "write_bytes" else type(failure)
    with pytest.raises(expected):
        run(folder, "--out", out)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == ([before] if before else [])


@pytest.mark.parametrize("tokens", [["a", "b", "c"], ["a", "b", "c", "d"]])
@pytest.mark.parametrize("figure", plot.FIGURES)
def test_shortest_responses(tokens, figure):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert figures.drawn(figures.FIGURES[figure](synthetic_analysis(tokens)), ".png").startswith(b"\x89PNG")


@pytest.mark.parametrize("kind", STARTS)
@pytest.mark.parametrize("first", range(2, len(TEXTS), 80))
def test_hostile_text_is_text_in_a_figure(kind, first):
    analysis = synthetic_analysis(TEXTS)
    figure = figures.rhythm(analysis, (first - 1, min(first + 78, len(TEXTS) - 2)))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font|.*Matplotlib currently does not support")
        drawn = figures.drawn(figure, f".{kind}")
    assert drawn.startswith(STARTS[kind])
    if kind == "svg":
        root = ElementTree.fromstring(drawn)
        tags = {element.tag.rpartition("}")[2] for element in root.iter()}
        assert not tags & {"script", "a", "image", "foreignObject", "b", "img", "iframe", "form", "math", "template"}
        assert not (FORBIDDEN - {"\n"}) & set(" ".join(root.itertext()))
