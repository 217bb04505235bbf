"""The colour scale of the report, the terminal and the figures, from the background to the strongest colour.

Lightness rises (dark pages) or falls (light pages) evenly while the hue turns from yellow over green to indigo, so that
the order is seen with every kind of colour blindness and in grey. The stops are our own, in OKLCH. `Domain` maps values
to shades.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

SHADES = 16
# Lightness, chroma, hue in degrees, from least to most.
LIGHT = (
    (1.0, 0.0, 100), (0.93, 0.075, 106), (0.80, 0.110, 150), (0.64, 0.105, 205), (0.46, 0.125, 262), (0.30, 0.115, 285)
)  # fmt: skip
DARK = (
    (0.222, 0.012, 262), (0.36, 0.085, 278), (0.50, 0.110, 255), (0.66, 0.105, 200), (0.81, 0.130, 150),
    (0.94, 0.120, 108),
)  # fmt: skip
USUAL = 0.985  # share of the values that the scale spans; the few above it have the last shade
PALE = 0.5  # share of a response's tokens that stays pale, so that the others stand out
DECADES = 2  # of a logarithmic scale at most
Rgb = tuple[int, int, int]


def ramp(stops: Sequence[tuple[float, float, float]], count: int = SHADES) -> list[Rgb]:
    """`count` colours along the stops, evenly spaced.

    Example:
        >>> ramp(LIGHT, 3)
        [(255, 255, 255), (74, 187, 164), (43, 31, 100)]
    """
    colours = []
    for i in range(count):
        place = i / (count - 1) * (len(stops) - 1)
        index = min(int(place), len(stops) - 2)
        share = place - index
        lightness, chroma, hue = (a + (b - a) * share for a, b in zip(stops[index], stops[index + 1], strict=True))
        colours.append(from_oklch(lightness, chroma, hue))
    return colours


def from_oklch(lightness: float, chroma: float, hue: float) -> Rgb:
    """A colour in OKLCH (Ottosson 2020) as sRGB, 0 .. 255, clipped to the sRGB gamut."""
    a, b = chroma * math.cos(math.radians(hue)), chroma * math.sin(math.radians(hue))
    long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    medium = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    linear = (
        4.0767416621 * long - 3.3077115913 * medium + 0.2309699292 * short,
        -1.2684380046 * long + 2.6097574011 * medium - 0.3413193965 * short,
        -0.0041960863 * long - 0.7034186147 * medium + 1.7076147010 * short,
    )
    red, green, blue = (round(255 * _encoded(min(1.0, max(0.0, x)))) for x in linear)
    return red, green, blue


def _encoded(linear: float) -> float:
    return 12.92 * linear if linear <= 0.0031308 else 1.055 * linear ** (1 / 2.4) - 0.055


def luminance(colour: Rgb) -> float:
    """Relative luminance of WCAG 2, from 0 to 1."""
    red, green, blue = (c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: Rgb, other: Rgb) -> float:
    """Contrast of WCAG 2: from 1 to 21; text needs 4.5."""
    bright, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


def ink(background: Rgb) -> Rgb:
    """Black or white, whichever has more contrast: at least 4.58 on any colour."""
    return max((0, 0, 0), (255, 255, 255), key=lambda colour: contrast(colour, background))


def as_hex(colour: Rgb) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)


def style() -> str:
    """The scale as CSS: variables `--s0 ..` and `--i0 ..` for light and dark pages, and a class per shade."""

    def variables(stops: Sequence[tuple[float, float, float]]) -> str:
        return " ".join(
            f"--s{i}: {as_hex(colour)}; --i{i}: {as_hex(ink(colour))};" for i, colour in enumerate(ramp(stops))
        )

    classes = "\n".join(f".s{i} {{ background: var(--s{i}); color: var(--i{i}); }}" for i in range(SHADES))
    return (
        f":root {{ {variables(LIGHT)} }}\n"
        f"@media screen and (prefers-color-scheme: dark) {{ :root {{ {variables(DARK)} }} }}\n{classes}\n"
    )


@dataclass(frozen=True)
class Domain:
    """The lowest and the highest value of a linear or logarithmic scale, in the statistic's unit."""

    low: float
    high: float
    is_log: bool = False

    @staticmethod
    def of(
        values: Tensor, *, is_log: bool = False, low: float | None = None, pale: float = PALE, usual: float = USUAL
    ) -> Domain:
        """The scale of the finite `values`, (N,), from `low` or else their quantile `pale` to that of `usual`."""
        finite = values[values.isfinite()].double()
        if not len(finite):
            return Domain(0.0, 1.0)
        high = float(finite.quantile(usual))
        if is_log and high > 0:
            start = max(float(finite[finite > 0].quantile(pale)), high / 10**DECADES)
            return Domain(min(start, high / 2), high, is_log=True)
        start = float(finite.quantile(pale)) if low is None else low
        return Domain(start, high if high > start else start + 1.0)

    def share(self, value: float) -> float:
        """The place of a value on the scale, from 0 to 1."""
        if self.is_log:
            place = math.log(max(value, 1e-300) / self.low) / math.log(self.high / self.low)
        else:
            place = (value - self.low) / (self.high - self.low)
        return min(1.0, max(0.0, place))

    def shade(self, value: float) -> int:
        """The number of a value's shade, 0 .. SHADES - 1.

        Example:
            >>> [Domain(0, 8).shade(value) for value in (0, 4, 8, 9)]
            [0, 8, 15, 15]
        """
        return min(SHADES - 1, int(self.share(value) * SHADES))
