"""A picture of a comparison: for each text, size against quality, coloured by decoding speed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...runtime.errors import BltError
from .bundles import Comparison

__all__ = ["draw_comparison"]

# Bits per byte.
_LEAST_RANGE = 0.02
# Points: how far above its point a name stands, what a line of text takes, and a panel's height, about.
_NAME_HEIGHT = 5.0
_LINE = 12.0
_PANEL_HEIGHT = 250.0


def draw_comparison(comparison: Comparison, path: Path) -> None:
    """Draw one panel per text into `path`, whose suffix says the format.

    Across is the size of graphs and tables together, up the bits per byte; the colour is decoding speed.
    Raises BltError when matplotlib is missing, OSError when the file can't be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise BltError("a picture needs matplotlib: pip install 'blt-edge[plot]'") from None
    texts = list(comparison.text_bytes)
    figure = Figure(figsize=(1.2 + 5.2 * len(texts), 4.6), layout="constrained")
    panels = figure.subplots(1, len(texts), squeeze=False)[0]
    speeds = [report.decode_bytes_per_second for report in comparison.bundles]
    for panel, text in zip(panels, texts, strict=True):
        points = _draw_panel(panel, comparison, text, speeds)
    bar = figure.colorbar(points, ax=list(panels))
    bar.set_label("decoding, bytes/s")
    machine = comparison.machine
    threads = machine.get("threads")
    limit = f", {threads} thread{'s' * (threads != 1)}" if threads else ""
    figure.suptitle(f"{machine.get('processor')}, {machine.get('cpus')} CPUs{limit}", fontsize=9)
    figure.savefig(path, dpi=150)


def _draw_panel(panel: Any, comparison: Comparison, text: str, speeds: list[float]) -> Any:
    sizes = [(report.graph_bytes + report.table_bytes) / 1e6 for report in comparison.bundles]
    bits = [report.texts[text].bits_per_byte for report in comparison.bundles]
    # One speed alone is no scale.
    top = max(speeds) if max(speeds) > min(speeds) else max(speeds) + 1
    points = panel.scatter(
        sizes, bits, c=speeds, vmin=min(speeds), vmax=top, s=90, edgecolors="black", zorder=3
    )
    panel.axhline(bits[0], linewidth=0.8, linestyle="--", color="gray", zorder=1)
    for report, across, up, place in zip(comparison.bundles, sizes, bits, _places(sizes, bits), strict=True):
        panel.annotate(
            Path(report.path).name,
            (across, up),
            xytext=place,
            textcoords="offset points",
            ha="right" if place[0] < 0 else "left",
            fontsize=8,
            # Names that had to move away say where they belong.
            arrowprops={"arrowstyle": "-", "linewidth": 0.6} if place[1] > _NAME_HEIGHT else None,
        )
    panel.set_xlim(0, 1.15 * max(sizes))
    middle, half = (max(bits) + min(bits)) / 2, _half_range(bits)
    panel.set_ylim(middle - half, middle + half)
    panel.ticklabel_format(useOffset=False)
    panel.set_title(f"{text}, {comparison.text_bytes[text]:,} bytes", fontsize=10)
    panel.set_xlabel("graphs and tables, MB")
    panel.set_ylabel("bits per byte")
    panel.grid(alpha=0.3)
    return points


def _places(sizes: list[float], bits: list[float]) -> list[tuple[float, float]]:
    """Where each name goes, in points from its point: beside it, and above lower names that are near."""
    wide, high = max(sizes), _half_range(bits) * 2 / _PANEL_HEIGHT
    places = [(0.0, 0.0)] * len(sizes)
    taken: list[tuple[float, float]] = []  # where along, and how many points up
    for at in sorted(range(len(sizes)), key=lambda at: bits[at]):
        height = _NAME_HEIGHT
        near = [level for across, level in taken if abs(across - sizes[at]) < 0.25 * wide]
        while any(abs(bits[at] / high + height - level) < _LINE for level in near):
            height += 1
        taken.append((sizes[at], bits[at] / high + height))
        places[at] = (-8.0 if sizes[at] > 0.75 * wide else 8.0, height)
    return places


def _half_range(bits: list[float]) -> float:
    # A difference that means nothing must not fill the picture.
    return max(0.7 * (max(bits) - min(bits)), _LEAST_RANGE / 2)
