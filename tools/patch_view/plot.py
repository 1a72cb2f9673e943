"""The picture of a cut text, as in the BLT paper: entropy over bytes, the threshold, a line at each patch.

Characters stand under their bytes, one label for all bytes of a character. A text too long for one row goes
on in the next. A character for which no font is installed is written as U+XXXX, and one that can't be seen as
an escape, so nothing becomes an empty box.
"""

from __future__ import annotations

import io
import unicodedata
from dataclasses import dataclass
from functools import lru_cache
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np

from ...runtime.errors import BltError, requirement
from .clusters import Cluster, break_rows, escape
from .view import Floats, PatchView, rule_words, summarize

_ROW_BYTES = 88
_BYTE_INCHES = 0.135
_LEFT, _RIGHT, _TOP, _BOTTOM = 0.62, 0.18, 0.85, 0.12
_LETTERS = 0.165
"""Inches from a panel down to the line that letters stand on."""
_LETTER_INCHES = 0.6 / 72
"""Width of a fixed-width letter for each point of its size."""
_SIZE, _SMALL = 9.0, 6.5
_MOST_PIXELS = 40e6
_MOST_PIXELS_HIGH = 60_000

_ENTROPY = {"color": "#1f4e8c", "linewidth": 1.2, "marker": "."}
_RISE = {"color": "#7a5195", "linewidth": 0.9, "linestyle": "--"}
_THRESHOLD = {"color": "#d62728", "linewidth": 1.1, "linestyle": (0, (5, 3))}
_START = {"color": "#8a8a8a", "linewidth": 0.9}
_GREY = "#777777"
_BANDS = ("#e9f2fc", "#fdf0dd")

_SIGNS = {" ": "\u2423", "\n": "\u23ce", "\t": "\u21e5"}
"""All of them are in DejaVu Sans Mono."""


@dataclass(frozen=True)
class _Layout:
    """Sizes in inches, and which clusters are in which row."""

    rows: list[range]
    row_bytes: int
    panel: float
    """Height of a row's panel."""
    labels: float
    """Height of the characters under it."""

    @property
    def width(self) -> float:
        return max(_LEFT + _BYTE_INCHES * self.row_bytes + _RIGHT, 7.0)

    @property
    def height(self) -> float:
        return _TOP + len(self.rows) * (self.panel + self.labels) + _BOTTOM


@dataclass(frozen=True)
class _Label:
    """What stands under a cluster's bytes."""

    text: str
    font: str
    size: float
    colour: str
    upright: bool
    """False: turned by 90 degrees, where it is wider than its bytes."""
    inches: float
    """Its height."""


def draw_patches(view: PatchView, path: Path, kind: str, name: str) -> None:
    """Draw into `path`; kind: "png", "svg" or "pdf"; name: of the model, for the title.

    Raises BltError when matplotlib is missing, OSError when the file can't be written.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        raise BltError(f"a picture needs matplotlib: pip install {requirement('plot')}") from None
    labels = [_label(cluster) for cluster in view.clusters]
    layout = _layout(view, labels)
    figure = Figure(figsize=(layout.width, layout.height))
    for number in range(len(layout.rows)):
        _draw_row(figure, view, labels, number, layout)
    _draw_head(figure, view, layout, name)
    area = layout.width * layout.height
    dpi = min(150.0, (_MOST_PIXELS / area) ** 0.5, _MOST_PIXELS_HIGH / layout.height)
    # The same text gives the same file.
    date = {"png": {}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}[kind]
    drawn = io.BytesIO()  # a pipe can't be written at any place, as a picture is
    with rc_context({"svg.hashsalt": "blt-edge"}):
        figure.savefig(drawn, dpi=dpi, format=kind, metadata=date)
    path.write_bytes(drawn.getvalue())


# 1. Where things are.


def _layout(view: PatchView, labels: list[_Label]) -> _Layout:
    count = len(view.data)
    row_bytes = count
    ranges = [range(len(view.clusters))]
    if count > _ROW_BYTES:
        # Rows of about the same length, with room to end where a patch starts.
        row_bytes = min(_ROW_BYTES, ceil(count / ceil(count / _ROW_BYTES)) + 8)
        widths = [cluster.end - cluster.start for cluster in view.clusters]
        starts = [view.starts_with(cluster) for cluster in view.clusters]
        ranges = break_rows(widths, starts, [False] * len(widths), row_bytes)
    panel = 2.1 if len(ranges) == 1 else 1.5 if len(ranges) < 4 else 1.05
    if view.entropies is None:
        panel = 0.4
    return _Layout(ranges, row_bytes, panel, 0.2 + max(label.inches for label in labels))


def _label(cluster: Cluster) -> _Label:
    text, font, colour = _letters(cluster)
    size = _SMALL if len(text) > 1 and colour == _GREY else _SIZE
    lines = text.split("\n")
    room = _BYTE_INCHES * (cluster.end - cluster.start)
    # A letter from another font may be as wide as two of a fixed-width one.
    cells = max(map(len, lines)) if colour == _GREY else 1 if len(cluster.text or "") == 1 else 2
    wide, high = cells * size * _LETTER_INCHES, len(lines) * size * 1.25 / 72
    upright = wide <= 1.3 * room
    return _Label(text, font, size, colour, upright, high if upright else wide)


def _letters(cluster: Cluster) -> tuple[str, str, str]:
    """A cluster's label, the font for it, and its colour: grey for what stands for something else."""
    mono = font_for("x")
    assert mono is not None
    if cluster.text is None:
        return cluster.shown, mono, _GREY
    if cluster.text in _SIGNS:
        return _SIGNS[cluster.text], mono, _GREY
    if cluster.escaped:
        return "".join(map(escape, cluster.text)), mono, _GREY
    # Composed, a letter and its marks need no font that knows how to set them.
    composed = unicodedata.normalize("NFC", cluster.shown)
    font = font_for(composed)
    if font is not None:
        return composed, font, "black"
    codes = [f"U+{ord(letter):04X}" for letter in cluster.text]
    return "\n".join(codes if len(codes) < 4 else [codes[0], f"+{len(codes) - 1}"]), mono, _GREY


# 2. What is drawn.


def _draw_row(figure: Any, view: PatchView, labels: list[_Label], number: int, layout: _Layout) -> None:
    """The axes of a row, where x is the position of a byte's left edge, and all that is on them."""
    wide, high = layout.width, layout.height
    bottom = high - _TOP - number * (layout.panel + layout.labels) - layout.panel
    size = (_BYTE_INCHES * layout.row_bytes / wide, layout.panel / high)
    panel = figure.add_axes((_LEFT / wide, bottom / high, *size))
    row = layout.rows[number]
    first, end = view.clusters[row[0]].start, view.clusters[row[-1]].end
    _draw_patches(panel, view, row, layout.panel)
    lowest = 0.0  # of the scale; entropy's rises, where drawn, go below
    if view.entropies is not None:
        _draw_line(panel, view.entropies[:-1], first, end, **_ENTROPY)
        if view.rises is not None:
            _draw_line(panel, view.rises, first, end, **_RISE)
            lowest = float(view.rises[np.isfinite(view.rises)].min(initial=0.0))
        level = view.rule.threshold if view.rule.monotonic and view.rises is not None else view.level
        if level is not None:
            panel.plot((first, end), (level, level), **_THRESHOLD)
    panel.set_xlim(first, first + layout.row_bytes)
    panel.set_ylim(1.08 * lowest - 0.03 * view.top, 1.08 * view.top)
    panel.set_xticks([])
    panel.tick_params(labelsize=7, length=2)
    panel.spines[["top", "right", "bottom"]].set_visible(False)
    if view.entropies is None:
        panel.set_yticks([])
        panel.spines["left"].set_visible(False)
    else:
        panel.set_ylabel("nats", fontsize=8)
    _draw_labels(panel, view, labels, row, layout.panel)
    if len(layout.rows) > 1:
        below = (-4, -72 * _LETTERS)
        style = {"fontsize": 7, "color": _GREY, "ha": "right"}
        panel.annotate(f"{first:,}", (0, 0), below, "axes fraction", "offset points", **style)


def _draw_line(panel: Any, values: Floats, first: int, end: int, **style: Any) -> None:
    """A line through the middles of bytes, and to the edge where another row goes on."""
    across = list(np.arange(first, end) + 0.5)
    heights = list(values[first:end])
    marked = list(range(len(across)))
    if end < len(values):
        across.append(end)
        heights.append((values[end - 1] + values[end]) / 2)
    if first > 0:
        across.insert(0, first)
        heights.insert(0, (values[first - 1] + values[first]) / 2)
        marked = [index + 1 for index in marked]
    panel.plot(across, heights, markevery=marked, markersize=4.5, **style)


def _draw_patches(panel: Any, view: PatchView, row: range, panel_height: float) -> None:
    first, end = view.clusters[row[0]].start, view.clusters[row[-1]].end
    edges = [*view.starts, len(view.data)]
    whole = panel.get_xaxis_transform()
    inside = range(view.patches[first] - 1, view.patches[end - 1])
    for odd, colour in enumerate(_BANDS):
        spans = [
            (max(edges[index], first), min(edges[index + 1], end)) for index in inside if index % 2 == odd
        ]
        bands = [(start, stop - start) for start, stop in spans]
        panel.broken_barh(bands, (0, 1), color=colour, linewidth=0, transform=whole)
    starts = [edges[index] for index in inside if edges[index] >= first]
    # Between letters a line goes down to them; it goes through none.
    letters = {view.clusters[index].start for index in row}
    lows = [-(_LETTERS if start in letters else 0.03) / panel_height for start in starts]
    panel.vlines(starts, lows, 1, **_START, transform=whole, clip_on=False)


def _draw_labels(panel: Any, view: PatchView, labels: list[_Label], row: range, panel_height: float) -> None:
    from matplotlib.font_manager import FontProperties

    whole = panel.get_xaxis_transform()
    for index in row:
        cluster, label = view.clusters[index], labels[index]
        on_line = label.upright and "\n" not in label.text
        panel.text(
            (cluster.start + cluster.end) / 2,
            -(_LETTERS if on_line else 0.05) / panel_height,
            label.text,
            transform=whole,
            ha="center",
            va="baseline" if on_line else "top",
            rotation=0 if label.upright else 90,
            color=label.colour,
            fontproperties=FontProperties(fname=label.font, size=label.size),
            parse_math=False,
            linespacing=1.0,
        )


def _draw_head(figure: Any, view: PatchView, layout: _Layout, name: str) -> None:
    from matplotlib.lines import Line2D

    summary = summarize(view)
    left, high = _LEFT / layout.width, layout.height
    title = f"{name}: {summary}, {summary.mean_length:.2f} bytes each"
    rule = f"a patch starts {rule_words(view.rule)}"
    figure.text(left, 1 - 0.25 / high, title, fontsize=10, parse_math=False)
    figure.text(left, 1 - 0.44 / high, rule, fontsize=8, color="#444444")
    lines: list[tuple[str, dict[str, Any]]] = []
    if view.entropies is not None:
        lines.append(("entropy before the byte", _ENTROPY))
        if view.rises is not None:
            lines.append(("its rise", _RISE))
        if view.rule.needs_entropy:
            lines.append(("threshold of the rise" if view.rule.monotonic else "threshold", _THRESHOLD))
    lines.append(("a patch starts", _START))
    figure.legend(
        handles=[Line2D([], [], label=label, **style) for label, style in lines],
        fontsize=7,
        ncols=len(lines),
        loc="upper left",
        bbox_to_anchor=(left, 1 - 0.53 / high),
        borderpad=0,
        borderaxespad=0,
        frameon=False,
    )


# 3. Fonts.

_FIRST = ("DejaVu Sans Mono", "DejaVu Sans")
"""Both come with matplotlib."""

_NO_GLYPHS = ("lastresort", "color", "colour", "blank")
"""Parts of the names of fonts whose glyphs are boxes, pictures that matplotlib can't draw, or nothing."""


@lru_cache(maxsize=4096)
def font_for(text: str) -> str | None:
    """The file of a font with a glyph for each character of `text`; None when no installed font has them.

    DejaVu first, as it comes with matplotlib; then what the system has, regular sans serif before others. The
    fixed-width one is for single characters: its marks do not stand on the letter before them.
    """
    wanted = [ord(letter) for letter in text]
    fonts = _fonts() if len(text) == 1 else _fonts()[1:]
    return next((path for path, font in fonts if all(map(font.get_char_index, wanted))), None)


@lru_cache(maxsize=1)
def _fonts() -> list[tuple[str, Any]]:
    from matplotlib.font_manager import findfont, findSystemFonts
    from matplotlib.ft2font import FT2Font

    own = [findfont(name) for name in _FIRST]
    others = [path for path in findSystemFonts() if not any(word in path.lower() for word in _NO_GLYPHS)]
    opened = []
    for path in [*own, *sorted(others, key=_rank)]:
        try:
            opened.append((path, FT2Font(path)))
        except (OSError, RuntimeError):  # not every file in a folder of fonts is one
            continue
    return opened


def _rank(path: str) -> tuple[bool, bool, str]:
    name = Path(path).name
    return ("Regular" not in name, "Sans" not in name, name)
