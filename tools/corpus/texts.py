"""What a reader gives, what an engine makes of it, and what is told of a text at the end.

A text longer than a window reaches an engine as its windows: each is read from BOS, so each is scored as a
text of its own, wherever that is, and no engine holds more than a window of a text. What it does not know:
files, models, how many texts there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

__all__ = ["EMPTY", "Engine", "Facts", "ScoredText", "Text", "Unscored"]

EMPTY = "empty"
"""The note of a text without a byte; of what can't be read it begins with "unreadable: "."""


@dataclass(frozen=True)
class Facts:
    """What is known of a text once all of it was read."""

    size: int
    """Bytes, decompressed."""
    words: int
    """As `runtime.words` counts them."""
    sha256: str
    """Of its bytes, 64 hexadecimal digits."""


@dataclass(frozen=True)
class Text:
    """A window's worth of a text, or all of a short one: 1 to context - 1 bytes."""

    number: int
    """Counted from 0 in the order of reading, over all texts: what an engine gives back with the figures."""
    name: str
    """The file that it is from, "stdin" for that."""
    line: int | None
    """Its line there, from 1; None where the file is one text."""
    data: bytes
    facts: Facts | None
    """Of the whole text, with the last of its windows; None before."""
    done: int
    """Bytes of the input, as it lies on the disk, that were read up to its end."""


@dataclass(frozen=True)
class Unscored:
    """A text that no engine can score, or that broke off: what was given of it before is void."""

    name: str
    line: int | None
    note: str
    """"empty", or "unreadable: " and why."""
    done: int
    """As `Text.done`."""
    sha256: str | None = None
    """Of its bytes, or of the line that holds no text; None where another try may find something else."""


@dataclass(frozen=True)
class ScoredText:
    """What an engine tells of a `Text`."""

    number: int
    """`Text.number`."""
    bits: float
    """Negative log2 probability of its bytes, over all 260 classes."""
    patches: int
    """As `Score.patches`: each window's BOS patch included."""
    windows: int
    """1, for what is no longer than a window."""
    seconds: float | None = None
    """Wall clock of it alone; None where it was scored together with others."""


Engine = Callable[[Iterator[Text]], Iterator[ScoredText]]
"""Scores texts. It takes them as it needs them, no more than it holds at once, and may give results in any
order; each text has exactly one. It never gets an empty text. What it raises ends the run, and costs nothing
that it gave before."""
