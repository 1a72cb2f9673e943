"""A cut text for terminals, where patches are told apart by colour, and for pipes, where marks do it.

On a terminal with colours every cluster has a background: its hue changes where a patch starts, and it is the
stronger the higher the entropy of the cluster's most uncertain byte. Text and background are both set, so it
does not matter whether the terminal is dark or light. Where a patch starts inside a cluster, the cluster is
underlined. Without colours a mark stands before each patch, and behind a cluster another mark for each patch
that starts inside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .clusters import break_rows
from .view import PatchView, Summary, histogram_rows, rule_words

if TYPE_CHECKING:
    from rich.text import Text

_HUES = (((222, 235, 250), (88, 160, 240)), ((253, 236, 214), (244, 146, 40)))
"""Backgrounds of even and odd patches, at no entropy and at the highest; black text is legible on all."""

_BLOCKS = " ▏▎▍▌▋▊▉█"


# 1. With marks.


@dataclass(frozen=True)
class Marks:
    """What stands for patch starts without colours."""

    start: str = "|"
    """Before a patch."""
    inner: str = "¦"
    """Behind a cluster, for each patch that starts inside it."""


def choose_marks(data: bytes, encoding: str = "utf-8") -> Marks:
    """Marks that the text itself does not hold, if there are any left, and that the encoding has."""
    text = data.decode("utf-8", "replace")

    def first(candidates: str) -> str:
        able = [mark for mark in candidates if _encodable(mark, encoding)]
        return next((mark for mark in able if mark not in text), able[0])

    return Marks(first("|│‖◆^"), first("¦┆⁞◇'"))


def marked_lines(
    view: PatchView, marks: Marks, width: int | None = None, encoding: str = "utf-8"
) -> list[str]:
    """The text with marks at patch starts. A line ends behind each newline, and before it is wider than
    `width` columns (None: nowhere else). Of a cluster that the encoding lacks its bytes are escaped.
    """
    shown = []
    for cluster in view.clusters:
        if _encodable(cluster.shown, encoding):
            start = marks.start if view.starts_with(cluster) else ""
            shown.append(start + cluster.shown + marks.inner * view.inner_starts(cluster))
        else:
            escapes = (
                (marks.start if position in view.start_set else "") + f"\\x{view.data[position]:02x}"
                for position in range(cluster.start, cluster.end)
            )
            shown.append("".join(escapes))
    return ["".join(shown[index] for index in row) for row in _rows(view, shown, width)]


def _encodable(text: str, encoding: str) -> bool:
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return False
    return True


def _rows(view: PatchView, shown: list[str], width: int | None) -> list[range]:
    """Lines of clusters shown so; width None: they end behind newlines only."""
    from rich.cells import cell_len

    starts = [view.starts_with(cluster) for cluster in view.clusters]
    newlines = [cluster.text == "\n" for cluster in view.clusters]
    widths = [0] * len(shown) if width is None else [cell_len(text) for text in shown]
    return break_rows(widths, starts, newlines, max(width or 0, 8))


# 2. With colours.


def coloured_lines(view: PatchView, width: int) -> Iterator[Text]:
    """The text as lines of at most `width` columns, for a terminal of 256 colours or more."""
    from rich.text import Text

    for row in _rows(view, [cluster.shown for cluster in view.clusters], width):
        line = Text(no_wrap=True, end="")
        for index in row:
            cluster = view.clusters[index]
            entropy = view.entropy(cluster)
            share = 0.35 if entropy is None else view.share(entropy)
            weight = "italic " if cluster.escaped else ""
            weight += "underline " if view.inner_starts(cluster) else ""
            background = _background(view.visible_patches[index], share)
            line.append(cluster.shown, f"{weight}rgb(0,0,0) on {background}")
        yield line


def _background(number: int, share: float) -> str:
    pale, strong = _HUES[number % 2]
    return "rgb({},{},{})".format(*(round(a + (b - a) * share) for a, b in zip(pale, strong, strict=True)))


def coloured_legend(view: PatchView) -> Text:
    """One line that explains the colours and signs that occur."""
    from rich.text import Text

    legend = Text("a patch starts where the colour changes")
    if view.entropies is not None:
        legend.append("; entropy 0 ")
        for number in (0, 1):
            for step in range(6):
                legend.append(" ", f"on {_background(number, step / 5)}")
        legend.append(f" {view.top:.3g} nats")
    if view.has_inner_starts:
        legend.append("; ")
        legend.append("underlined", "underline")
        legend.append(": a patch starts inside the character")
    return legend


# 3. Figures.


def figures(view: PatchView, summary: Summary) -> list[str]:
    lines = [
        f"{summary}: mean {summary.mean_length:.2f} bytes, median {summary.median_length:g}, "
        f"longest {summary.longest}",
        f"a patch starts {rule_words(view.rule)}",
    ]
    if summary.mean_entropy is not None:
        over = ""
        if summary.over_threshold is not None:
            what = "entropy rises by more than" if view.rule.monotonic else "entropy is over"
            over = f"; at {summary.over_threshold:.1%} of positions {what} the threshold"
        lines.append(f"mean entropy {summary.mean_entropy:.3f} nats{over}")
    return lines


def histogram(summary: Summary, columns: int = 40, encoding: str = "utf-8") -> list[str]:
    """Bars: how many patches have which length."""
    found = histogram_rows(summary)
    most = max(count for _, count in found)
    name_width = max(len(name) for name, _ in found)
    count_width = len(str(most))
    lines = ["patch lengths in bytes"]
    for name, count in found:
        bar = _bar(columns * count / most, encoding)
        lines.append(f"{name:>{name_width}} {count:>{count_width}} {bar}".rstrip())
    return lines


def _bar(length: float, encoding: str) -> str:
    if not _encodable(_BLOCKS, encoding):
        return "#" * max(round(length), int(length > 0))
    eighths = max(round(8 * length), int(length > 0))
    return "█" * (eighths // 8) + _BLOCKS[eighths % 8].strip()
