"""Fonts for pictures: for each piece of a text one that has its glyphs, so that none becomes an empty box."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

__all__ = ["font_for"]

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
