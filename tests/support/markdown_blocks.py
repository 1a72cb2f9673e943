"""Fenced blocks of a Markdown page, with the markers that say what one needs. Runs nothing.

A block that can't be run everywhere has a comment in front of it, on a line of its own:

    <!-- needs: GPU -->
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

NEEDS = ("GPU", "Jetson", "checkpoint", "minutes", "network")
"""What a block may need: minutes is for what takes too long, checkpoint for weights that nobody can give."""

RUNNABLE = ("console", "bash", "python")
"""Languages of blocks that are run; output in a console block is what does not follow `$ `."""

_SHOWN = ("text", "json", "toml", "yaml", "ini", "html", "javascript", "systemd", "diff")
_FENCE = re.compile(r"^( *)```(.*)$")
_MARKER = re.compile(r"<!-- needs: (.*) -->")


@dataclass(frozen=True)
class Block:
    """One fenced block."""

    language: str
    """The word after the fence."""
    text: str
    """What is in it, without the fences."""
    line: int
    """The line of its first fence, from 1."""
    needs: str | None
    """What it needs, from the marker before it."""


def blocks(page: Path) -> list[Block]:
    """All fenced blocks. Raises AssertionError, with page and line, for what would escape from being run."""
    found: list[Block] = []
    inside: list[str] | None = None
    language, start, last = "", 0, ""
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        fence = _FENCE.match(line)
        if fence is None:
            if inside is not None:
                inside.append(line)
            elif line.strip():
                last = line.strip()
        elif inside is None:
            inside, language, start = [], fence[2].strip(), number
        else:
            marker = _MARKER.fullmatch(last)
            block = Block(language, "\n".join(inside) + "\n", start, marker[1] if marker else None)
            _check(page, block)
            found.append(block)
            inside, last = None, ""
    assert inside is None, f"{page.name}:{start}: a block without an end"
    return found


def _check(page: Path, block: Block) -> None:
    place = f"{page.name}:{block.line}"
    assert block.needs is None or block.needs in NEEDS, f"{place}: needs {block.needs}; allowed are {NEEDS}"
    assert block.language in (*RUNNABLE, *_SHOWN), f"{place}: a block of {block.language!r}"
    if block.language not in RUNNABLE:
        assert not re.search(r"^\$ ", block.text, re.M), f"{place}: commands in a block that is not run"
    if block.language == "console":
        assert commands(block), f"{place}: a console block without a command"


def commands(block: Block) -> list[str]:
    """What a shell is given: each command after `$ ` with the lines that continue it, or a whole script."""
    if block.language == "bash":
        return [block.text]
    found: list[str] = []
    going_on = False
    for line in block.text.splitlines():
        if line.startswith("$ "):
            found.append(line[2:])
        elif going_on:
            found[-1] += "\n" + line.removeprefix("> ")
        going_on = (line.startswith("$ ") or going_on) and line.endswith("\\")
    return found


def links(page: Path) -> list[str]:
    """Targets of links and pictures that lie in the repository."""
    found = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", _without_blocks(page)))
    return [target for target in found if "://" not in target and not target.startswith("mailto:")]


def anchors(page: Path) -> set[str]:
    """Anchors of the headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", _without_blocks(page), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def _without_blocks(page: Path) -> str:
    return re.sub(r"^ *```.*?^ *```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
