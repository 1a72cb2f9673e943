"""How far a corpus is, and how long it still takes: a bar on a terminal, a line now and then elsewhere.

What it does not know: texts, results.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from ..output import Progress, counted, is_terminal, size
from .sources import Source

__all__ = ["CorpusProgress", "left"]

_NAMED = 20
"""Files that are each named in a pipe; of more there are lines by time."""
_EVERY = 60.0
"""Seconds between those."""


class CorpusProgress:
    """Says how far a corpus is, by the bytes of its files as they lie on the disk."""

    def __init__(
        self, show: Progress, sources: Sequence[Source], clock: Callable[[], float] = time.monotonic
    ) -> None:
        """show: what `progress_bar` gives. clock: seconds from anywhere."""
        self._show, self._clock = show, clock
        known = all(source.size or (source.path is not None and source.path.is_file()) for source in sources)
        self._total = sum(source.size for source in sources) if known else 0
        self._files = len(sources)
        self._bar = is_terminal(sys.stderr)
        self._what, self._name = "", ""
        self._begun, self._done, self._free = clock(), 0, 0
        self._next = self._begun + _EVERY

    def reading(self, name: str) -> None:
        """A window of this file is about to be scored."""
        if name == self._name:
            return
        self._name = name
        if self._bar or self._files <= _NAMED:
            self._what = f"scoring {Path(name).name}"
        elif not self._what:
            self._what = f"scoring {counted(self._files, 'file')}"
        self._tell()

    def skipped(self, done: int) -> None:
        """What lies before `done` was scored by a former run, as far as it was not by this one."""
        self._free += max(0, done - self._done)
        self.passed(done)

    def passed(self, done: int) -> None:
        """What lies before `done` is scored."""
        self._done = max(self._done, done)
        now = self._clock()
        if not self._bar and now >= self._next:
            self._next = now + _EVERY
            self._what = self._line(now - self._begun)
        self._tell()

    def _tell(self) -> None:
        if self._what:
            self._show(self._what, self._done, self._total and max(self._total, self._done))

    def _line(self, seconds: float) -> str:
        if not self._total:
            return f"scored {size(self._done)}"
        told = f"scored {size(self._done)} of {size(self._total)} ({self._done / self._total:.0%})"
        rate = (self._done - self._free) / seconds if seconds > 0 else 0.0
        return f"{told}, {left((self._total - self._done) / rate)}" if rate > 0 else told


def left(seconds: float) -> str:
    """A time to wait, in words: "about 3 min left"."""
    for unit, scale in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 1.5 * scale:
            return f"about {seconds / scale:.0f} {unit} left"
    return f"about {seconds:.0f} s left"
