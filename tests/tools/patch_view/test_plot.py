"""Pictures: every format, long and odd texts, and no glyph that silently becomes a box."""

from __future__ import annotations

import os
import re
import subprocess
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from blt_edge.runtime.errors import BltError, requirement
from blt_edge.tools.patch_view import plot
from blt_edge.tools.patch_view.plot import draw_patches

pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'blt-edge[plot]'")


@pytest.fixture(autouse=True)
def _every_warning_fails() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns of missing glyphs
        yield


@pytest.fixture
def only_dejavu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A system without fonts of its own."""
    caches = (plot.font_for, plot._fonts)
    for cache in caches:
        cache.cache_clear()
    monkeypatch.setattr("matplotlib.font_manager.findSystemFonts", lambda: [])
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is written into the pictures that are drawn from now on."""
    from matplotlib.axes import Axes

    found: list[str] = []
    text = Axes.text

    def record(self: object, x: float, y: float, label: str, **rest: object) -> object:
        found.append(label)
        return text(self, x, y, label, **rest)

    monkeypatch.setattr(Axes, "text", record)
    return found


@pytest.mark.parametrize(("kind", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_formats(make_view, tmp_path: Path, kind: str, start: bytes) -> None:
    for name in ("a", "b"):
        draw_patches(make_view(b"A text."), tmp_path / name, kind, "model $x$")
    assert (tmp_path / "a").read_bytes().startswith(start)
    assert kind != "svg" or (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="POSIX pipes")
def test_into_a_pipe(make_view, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with subprocess.Popen(["cat", str(tmp_path / "pipe")], stdout=subprocess.PIPE) as reader:
        draw_patches(make_view(b"A text."), tmp_path / "pipe", "png", "model")
        assert reader.communicate()[0].startswith(b"\x89PNG")


def test_characters_are_whole(make_view, tmp_path: Path, drawn: list[str]) -> None:
    draw_patches(make_view("né e\u0301$x$ \n\0\xff".encode() + b"\xff"), tmp_path / "p", "svg", "model")
    assert drawn == ["n", "é", "␣", "é", "$", "x", "$", "␣", "⏎", "\\x00", "ÿ", "\\xff"]


def test_long_texts_go_on_in_the_next_row(make_view, odd_text: bytes, tmp_path: Path) -> None:
    sizes = []
    for data in (b"x" * 80, odd_text):
        draw_patches(make_view(data), tmp_path / "p", "svg", "model")
        svg = (tmp_path / "p").read_text()
        sizes.append(float(re.search(r'height="([\d.]+)pt"', svg)[1]))
    assert sizes[1] > 1.5 * sizes[0]


@pytest.mark.usefixtures("only_dejavu")
def test_glyphs_that_no_font_has(make_view, tmp_path: Path, drawn: list[str]) -> None:
    draw_patches(make_view("你é😀👩‍👩‍👧 مर\u0301".encode()), tmp_path / "p", "png", "model")
    assert drawn[:4] == ["U+4F60", "é", "😀", "U+1F469\n+4"]
    assert "U+0930\nU+0301" in drawn


@pytest.mark.parametrize("length", [1, 120])
@pytest.mark.parametrize(
    "rule", [{"threshold": 0.5, "monotonic": True}, {"mode": "space"}, {"mode": "byte", "patcher": False}]
)
def test_other_rules(make_view, odd_text: bytes, tmp_path: Path, rule: dict, length: int) -> None:
    draw_patches(make_view(odd_text[:length], **rule), tmp_path / "p", "svg", "model")
    svg = (tmp_path / "p").read_text()
    assert ("threshold of the rise" in svg) == ("monotonic" in rule)
    assert ("entropy before the byte" in svg) == ("patcher" not in rule)


def test_without_matplotlib(make_view, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(BltError, match=re.escape(f"pip install {requirement('plot')}")):
        draw_patches(make_view(b"x"), tmp_path / "picture.png", "png", "model")
    assert list(tmp_path.iterdir()) == []
