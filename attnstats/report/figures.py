"""Figures for papers, by matplotlib: the rhythm of a response, its mean maps, and its heads; one `Analysis` each.

They have the page's columns, marks and scale, at the width of a text block. Text of a model is drawn as `visible` text,
never as mathematics. matplotlib is imported when a figure is drawn.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from attnstats.errors import InputError
from attnstats.report.columns import COLUMNS, Column
from attnstats.report.marks import marks
from attnstats.report.scale import LIGHT, Domain, as_hex, ramp
from attnstats.study.analysis import Analysis
from attnstats.study.text import token_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 6.75  # inches: the text block of most two-column papers
NOTEBOOK_DPI = 96
WORDS = 90  # most tokens that are named under the axis
LABELS = 5
LONGEST = 14  # characters of a token's name
COLOURS = {"waad": "#1f6fb2", "fai": "#b4560a"}
ATTENTION = Domain(3e-4, 0.5, is_log=True)  # as in the page's maps
STYLE: Any = {
    "font.family": ["DejaVu Sans"],
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "pdf.fonttype": 42,  # text stays text, not outlines
    "svg.fonttype": "none",
    "svg.hashsalt": "attnstats",  # the same figure is the same file
    "text.parse_math": False,
}


def rhythm(analysis: Analysis, tokens: tuple[int, int] | None = None) -> Figure:
    """WAAD and FAI along a response, with preplan tokens, anchors, and arcs from anchors to their intro tokens.

    Args:
        tokens: the first and the last token to show, counted from 1; None: all.
    """
    first, last = (0, int(analysis.response.sum())) if tokens is None else (tokens[0] - 1, tokens[1])
    marked = marks(analysis)
    words = _words(analysis)
    with _styled() as figure:
        axes = figure.subplots(2, sharex=True)
        ranks = {"waad": marked.preplan, "fai": marked.anchor}
        for axis, column in zip(axes, COLUMNS[:2], strict=True):
            chosen = [i for i in marked.among(ranks[column.key]) if first <= i < last]
            _curve(axis, column, analysis, (first, last), chosen, words)
        for t, intro in enumerate(marked.intro):
            if intro is not None and first <= intro and t < last:
                _arc(axes[1], t + 1, intro + 1)
        if last - first <= WORDS:
            axes[1].set_xticks(range(first + 1, last + 1), words[first:last], rotation=90, fontsize=6.5)
        axes[1].set_xlabel("token of the response")
        figure.set_size_inches(WIDTH, 3.1 + 0.5 * (last - first <= WORDS))
    return figure


def check_tokens(analysis: Analysis, tokens: tuple[int, int], said: str) -> None:
    """Raises InputError, which begins with `said`, for tokens that the response of `rhythm` doesn't have."""
    length = int(analysis.response.sum())
    if len(tokens) != 2 or not 1 <= tokens[0] < tokens[1] <= length:
        raise InputError(f"{said}: the response has tokens 1 to {length}; give first and last")


def maps(analysis: Analysis) -> Figure:
    """The mean map of the local and of the global heads side by side: rows are tokens of the response."""
    mean = analysis.maps
    if mean is None:
        raise InputError("kind 'maps': there are none of what a server recorded; draw rhythm or heads")
    size = int(mean.rows[1] - mean.rows[0])
    rows, columns = mean.local_map.shape
    with _styled() as figure:
        axes = figure.subplots(1, 2, sharey=True)
        for axis, name, values in zip(axes, ("Local", "Global"), (mean.local_map, mean.global_map), strict=True):
            # Whole numbers of the axes are tokens of the response, counted from 1; the prompt is below that.
            picture = axis.imshow(
                values.clamp(min=ATTENTION.low).numpy(),
                cmap=_colormap(),
                norm=_norm(ATTENTION),
                extent=(size * rows - size * columns + 0.5, size * rows + 0.5, size * rows + 0.5, 0.5),
                interpolation="none",
            )
            axis.set_title(f"{name} heads", fontsize=8, loc="left", fontweight="bold")
            axis.set_xlabel("token that is looked at")
            if analysis.response_start:
                axis.axvline(0.5, color="0.4", linewidth=0.6)
        axes[0].set_ylabel("token of the response")
        cell = "a token" if size == 1 else f"{size} tokens"
        _bar(figure, picture, axes, f"% of attention on {cell}", 100)
        figure.set_size_inches(WIDTH, 0.9 + 2.6 * rows / columns)
    return figure


def heads(analysis: Analysis) -> Figure:
    """Mean attention distance of each head in tokens, with L on local and G on global heads."""
    distance = analysis.distance
    layers, count = distance.shape
    domain = Domain.of(distance.flatten(), is_log=True, pale=0.0)
    with _styled() as figure:
        axis = figure.subplots()
        picture = axis.imshow(distance.numpy(), cmap=_colormap(), norm=_norm(domain), aspect="auto")
        for row, layer in enumerate(analysis.layers):
            for head, letter in enumerate(analysis.classes.letters(layer).upper()):
                dark = domain.share(float(distance[row, head])) > 0.55
                if letter != "M":
                    axis.text(head, row, letter, ha="center", va="center", color="w" if dark else "k", fontsize=7)
        _name_heads(axis, analysis.layers, count)
        _bar(figure, picture, axis, "mean attention distance, tokens", 1)
        figure.set_size_inches(WIDTH, 1.0 + 0.24 * layers)
    return figure


class HeadPanel(NamedTuple):
    """One picture of `head_scores`.

    Attributes:
        values: (layers, heads); NaN is grey.
        highest: True to draw the highest values darkest, False the lowest.
    """

    title: str
    unit: str
    values: Tensor
    highest: bool
    is_log: bool


def head_scores(panels: Sequence[HeadPanel], layers: Sequence[int]) -> Figure:
    """Scores of all heads, a picture of layers by heads each, three beside each other."""
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    with _styled() as figure:
        axes = figure.subplots(rows, columns, squeeze=False).flatten()
        for axis, panel in zip(axes, panels, strict=False):
            domain = Domain.of(panel.values.flatten(), is_log=panel.is_log, pale=0.0, usual=1.0)
            colours = _colormap() if panel.highest else _colormap().reversed()
            colours = colours.with_extremes(bad="0.85")
            picture = axis.imshow(panel.values.numpy(), cmap=colours, norm=_norm(domain), aspect="auto")
            axis.set_title(panel.title, fontsize=8, loc="left", fontweight="bold")
            _name_heads(axis, layers, panel.values.shape[1], most=16 // columns)
            _bar(figure, picture, axis, panel.unit, 1, domain.is_log)
        for axis in axes[len(panels) :]:
            axis.set_visible(False)
        figure.set_size_inches(WIDTH, rows * (0.8 + min(2.4, 0.2 * len(layers))))
    return figure


FIGURES: dict[str, Callable[[Analysis], Figure]] = {"rhythm": rhythm, "maps": maps, "heads": heads}


def drawn(figure: Figure, kind: str, dpi: int = 300) -> bytes:
    """The file of a figure, of the kind .pdf, .png or .svg: the same bytes for the same figure."""
    import matplotlib

    dates = {".pdf": {"CreationDate": None}, ".svg": {"Date": None}}
    file = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(file, format=kind.removeprefix("."), dpi=dpi, metadata=dates.get(kind))
    return file.getvalue()


@contextmanager
def _styled() -> Iterator[Figure]:
    """A figure in our style, made without pyplot, which would keep it in memory; files that it saves have the style's
    fonts.

    A notebook shows what has this method; figures as such it shows only after pyplot was imported.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure: Any = Figure(layout="constrained")
        figure._repr_png_ = partial(drawn, figure, ".png", NOTEBOOK_DPI)
        figure.savefig = matplotlib.rc_context(STYLE)(figure.savefig)  # which reads the kind of font when it writes
        yield figure


def _words(analysis: Analysis) -> list[str]:
    words = map(token_name, analysis.shown[analysis.response_start :])
    return [word if len(word) <= LONGEST else f"{word[: LONGEST - 1]}…" for word in words]


def _curve(
    axis: Axes, column: Column, analysis: Analysis, shown: tuple[int, int], chosen: list[int], words: list[str]
) -> None:
    first, last = shown
    values = column.read(analysis)
    colour = COLOURS[column.key]
    axis.plot(range(first + 1, last + 1), values[first:last].numpy(), color=colour, linewidth=0.9)
    marker = "v" if column.key == "waad" else "o"
    face = colour if column.key == "waad" else "white"
    least, most = _range(values[first:last])
    points = [min(float(values[i]), most) for i in chosen]
    axis.plot([i + 1 for i in chosen], points, marker, color=colour, markerfacecolor=face, markersize=3.5)
    named: list[int] = []
    for i in sorted(chosen, key=lambda i: -values[i])[:LABELS]:
        if any(abs(i - other) < 0.07 * (last - first) for other in named):
            continue  # their names would overlap
        named.append(i)
        value = float(values[i])
        text = words[i] + (f" {value:.2g}↑" if value > most else "")
        axis.annotate(text, (i + 1, min(value, most)), (0, 4), textcoords="offset points", ha="center", fontsize=6.5)
    axis.set_ylabel(f"{column.title}\n({column.unit})")
    axis.set_xlim(first + 1 - 0.02 * (last - first), last + 0.02 * (last - first))
    axis.set_ylim(least - 0.08 * (most - least), most + 0.14 * (most - least))


def _range(values: Tensor) -> tuple[float, float]:
    """The range of the axis; a few values far above the rest are left out and written at its top."""
    finite = values[values.isfinite()]
    if not len(finite):
        return 0.0, 1.0
    low, usual = float(finite.min()), float(finite.quantile(0.98))
    high = min(float(finite.max()), usual + 0.75 * (usual - low))
    return low, high if high > low else low + 1.0


def _arc(axis: Axes, anchor: int, intro: int) -> None:
    """Draw an arc from an anchor to the token that leads into it, along the lower edge."""
    axis.annotate(
        "",
        (intro, 0.0),
        (anchor, 0.0),
        xycoords=("data", "axes fraction"),
        arrowprops={
            "arrowstyle": "-|>,head_width=0.12,head_length=0.2",
            "connectionstyle": "arc3,rad=0.6",
            "color": "#6b4ba1",
            "linewidth": 0.6,
            "shrinkA": 0,
            "shrinkB": 0,
        },
    )


def _name_heads(axis: Axes, layers: Sequence[int], count: int, most: int = 16) -> None:
    axis.set_xticks(range(0, count, -(-count // most)))
    step = -(-len(layers) // 16)
    axis.set_yticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
    axis.set_xlabel("head")
    axis.set_ylabel("layer")


def _bar(figure: Figure, picture: Any, axes: Any, label: str, factor: int, is_log: bool = True) -> None:
    """Draw the colour scale with plain numbers, on a logarithmic one 1, 2 and 5 times powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    bar = figure.colorbar(picture, ax=axes, pad=0.02)
    bar.ax.yaxis.set_minor_locator(NullLocator())
    if is_log:
        bar.ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{factor * value:g}"))
    bar.set_label(label)


def _colormap() -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("attnstats", [as_hex(colour) for colour in ramp(LIGHT, 64)])


def _norm(domain: Domain) -> Any:
    from matplotlib.colors import LogNorm, Normalize

    kind = LogNorm if domain.is_log else Normalize
    return kind(domain.low, domain.high, clip=True)
