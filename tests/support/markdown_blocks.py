"""Fenced blocks of a Markdown page, with the markers that say what one needs. Runs nothing.

A block that can't be run everywhere has a comment in front of it, on a line of its own:

    <!-- needs: GPU -->
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

# Minutes is for what takes too long, checkpoint for weights that nobody can give.
NEEDS = ("GPU", "Jetson", "Raspberry Pi", "Ray", "Spark", "checkpoint", "lm_eval", "minutes", "network")
# Output in a console block is what does not follow `$ `.
RUNNABLE = ("console", "bash", "python")
_SHOWN = ("text", "json", "toml", "yaml", "ini", "html", "javascript", "systemd", "diff")
_BLOCK = re.compile(r"^ *```([^\n]*)\n(.*?)^ *```$", re.M | re.S)
_MARKER = re.compile(r"<!-- needs: (.*) -->")


@dataclass(frozen=True)
class Block:
    """One fenced block: the word after its fence, what is in it, its first line and what its marker says."""

    language: str
    text: str
    line: int
    needs: str | None


def blocks(page: Path) -> list[Block]:
    """All fenced blocks. Raises AssertionError, with page and line, for what would escape from being run."""
    page_text = page.read_text(encoding="utf-8")
    found: list[Block] = []
    for match in _BLOCK.finditer(page_text):
        before = page_text[: match.start()]
        marker = _MARKER.fullmatch(before.rstrip().rpartition("\n")[2].strip())
        block = Block(match[1].strip(), match[2], before.count("\n") + 1, marker[1] if marker else None)
        _check(f"{page.name}:{block.line}", block)
        found.append(block)
    assert not re.search(r"^ *```", _without_blocks(page), re.M), f"{page.name}: a block without an end"
    return found


def _check(place: str, block: Block) -> None:
    assert block.needs is None or block.needs in NEEDS, f"{place}: needs {block.needs}; allowed are {NEEDS}"
    assert block.language in (*RUNNABLE, *_SHOWN), f"{place}: a block of {block.language!r}"
    assert not re.search(r"^ *```", block.text, re.M), f"{place}: a block without an end"
    if block.language not in RUNNABLE:
        assert not re.search(r"^\$ ", block.text, re.M), f"{place}: commands in a block that is not run"
    assert block.language != "console" or commands(block), f"{place}: a console block without a command"


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
    return _BLOCK.sub("", page.read_text(encoding="utf-8"))
