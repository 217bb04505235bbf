"""Draws docs/tiles.svg, which tiles of the causal map each kernel touches: `python docs/draw_tiles.py`."""

from __future__ import annotations

from pathlib import Path

TILES, CELL, GAP = 12, 16, 56  # tiles along a side, pixels of one, pixels between panels
BLOCK = 8  # the block of queries (forward, band) or of keys (column) that one program owns
COLOURS = {
    "whole": ("#9ecae1", "every pair visible: no mask"),
    "edge": ("#3182bd", "masked at the diagonal"),
    "band": ("#fdae6b", "the band, once more from L2"),
    "far": ("#a1d99b", "weight constant: one sum for all"),
    "near": ("#31a354", "weighted, statistic by statistic"),
    "other": ("#f2f2f2", "other programs"),
}


def forward(row: int, column: int) -> str:
    if row != BLOCK:
        return "other"
    return "edge" if column == row else "band" if column >= row - 2 else "whole"


def band(row: int, column: int) -> str:
    return "band" if row == BLOCK and column >= row - 2 else "other"


def columns(row: int, column: int) -> str:
    if column != TILES - 1 - BLOCK:
        return "other"
    return "near" if row <= column + 1 else "far"


def panel(name: str, left: int, kind: str) -> list[str]:
    pick = {"forward": forward, "band": band, "column": columns}[kind]
    shapes = [f'<text x="{left}" y="24" class="title">{name}</text>']
    for row in range(TILES):
        for column in range(row + 1):
            colour = COLOURS[pick(row, column)][0]
            x, y = left + column * CELL, 40 + row * CELL
            shapes.append(f'<rect x="{x}" y="{y}" width="{CELL - 1}" height="{CELL - 1}" fill="{colour}"/>')
    side = TILES * CELL
    shapes.append(f'<text x="{left}" y="{56 + side}" class="axis">keys s, to the right; queries t, down</text>')
    return shapes


def drawing() -> str:
    side = TILES * CELL
    names = {
        "forward": "forward: a block of queries",
        "band": "band: the same from an lse",
        "column": "column: a block of keys",
    }
    shapes = [line for i, (kind, name) in enumerate(names.items()) for line in panel(name, 16 + i * (side + GAP), kind)]
    for i, (colour, meaning) in enumerate(COLOURS.values()):
        x, y = 16 + i % 3 * (side + GAP), 80 + side + i // 3 * 24
        shapes.append(f'<rect x="{x}" y="{y}" width="14" height="14" fill="{colour}"/>')
        shapes.append(f'<text x="{x + 20}" y="{y + 12}">{meaning}</text>')
    width, height = 32 + 3 * side + 2 * GAP, 80 + side + 56
    style = "text{font:13px sans-serif;fill:#222}.title{font-weight:bold}.axis{fill:#666;font-size:12px}"
    body = "\n".join(shapes)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">\n'
        f'<style>{style}</style>\n<rect width="100%" height="100%" fill="#fff"/>\n{body}\n</svg>\n'
    )


if __name__ == "__main__":
    Path(__file__).with_name("tiles.svg").write_text(drawing())
