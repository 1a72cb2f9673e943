"""What terminals and pipes get."""

from __future__ import annotations

import pytest
from blt_edge.runtime.patching import PatchingRule
from blt_edge.tools.patch_view.terminal import (
    Marks,
    choose_marks,
    coloured_legend,
    coloured_lines,
    figures,
    histogram,
    marked_lines,
)
from blt_edge.tools.patch_view.view import cut, summarize
from rich.cells import cell_len


def test_marks_and_nothing_else_are_added(make_view, odd_text: bytes) -> None:
    view = make_view(odd_text)
    text = "".join(marked_lines(view, Marks("\ue000", "\ue001")))
    assert text.count("\ue000") + text.count("\ue001") == len(view.starts)
    assert text.startswith("\ue000")
    shown = "".join(cluster.shown for cluster in view.clusters)
    assert text.replace("\ue000", "").replace("\ue001", "") == shown


def test_a_mark_for_each_start_inside_a_character() -> None:
    view = cut("a你\nb".encode(), PatchingRule("byte"), None)
    assert marked_lines(view, Marks()) == ["|a|你¦¦|⏎", "|b"]
    lines = marked_lines(view, Marks("|", "!"), encoding="ascii")
    assert lines == ["|a|\\xe4|\\xbd|\\xa0|\\x0a", "|b"]


def test_lines_are_cut_at_newlines_only_without_a_width(make_view) -> None:
    data = b"long " * 3000 + b"\n" + b"x" * 9000
    assert [len(line.replace("|", "")) for line in marked_lines(make_view(data), Marks())] == [15001, 9000]


@pytest.mark.parametrize("width", [8, 20, 79])
def test_lines_fit_the_width(make_view, odd_text: bytes, width: int) -> None:
    view = make_view(odd_text, share=0.1)
    for line in marked_lines(view, Marks(), width):
        assert cell_len(line) <= max(width, 12)
    lines = list(coloured_lines(view, width))
    assert "".join(line.plain for line in lines) == "".join(cluster.shown for cluster in view.clusters)
    assert all(line.cell_len <= max(width, 12) for line in lines)


def test_colours_tell_patches_apart() -> None:
    view = cut("ab你".encode(), PatchingRule("static", patch_size=2), None)
    (line,) = coloured_lines(view, 80)
    styles = [str(span.style) for span in line.spans]
    assert styles[0] == styles[1]
    assert styles[1].split("on")[-1] != styles[2].split("on")[-1]
    assert "underline" in styles[2]  # its third byte starts a patch
    legend = coloured_legend(view).plain
    assert "underlined" in legend
    assert "nats" not in legend


def test_shades_follow_entropy(make_view) -> None:
    view = make_view(b"abcdefgh", share=0.0)
    (line,) = coloured_lines(view, 80)
    reds = [int(str(span.style).split("on rgb(")[1].split(",")[0]) for span in line.spans]
    order = sorted(range(8), key=lambda at: view.entropies[at])
    assert [reds[at] for at in order] == sorted(reds, reverse=True)
    assert coloured_legend(view).plain.endswith(f"{view.top:.3g} nats")


def test_marks_that_the_text_does_not_hold() -> None:
    assert choose_marks(b"plain") == Marks("|", "¦")
    assert choose_marks("a|b¦".encode()) == Marks("│", "┆")
    assert choose_marks("|│‖◆^ ¦┆⁞◇'".encode()) == Marks("|", "¦")  # none left
    assert choose_marks(b"a|b", "ascii") == Marks("^", "'")


def test_figures(make_view) -> None:
    view = cut("né\xff".encode("latin-1") + b"e", PatchingRule("byte"), None)
    assert figures(view, summarize(view)) == [
        "4 bytes, 2 characters, 2 invalid bytes, 4 patches: mean 1.00 bytes, median 1, longest 1",
        "a patch starts with every byte",
    ]
    rising = make_view(b"some text", threshold=0.5, monotonic=True)
    assert "positions entropy rises by more than the threshold" in figures(rising, summarize(rising))[2]


def test_histogram(make_view) -> None:
    view = make_view(b"x" * 10, mode="static", patch_size=4)
    assert histogram(summarize(view), 8)[1:] == ["1 0", "2 1 ████", "3 0", "4 2 ████████"]
    assert histogram(summarize(view), 8, "ascii")[-1] == "4 2 ########"
