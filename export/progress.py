"""One progress report for work that several parts do one after the other."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["Meter", "Progress"]

Progress = Callable[[str, int, int], None]
"""progress(what is being written, bytes done, bytes in all)."""


class Meter:
    """Adds up what the parts have written, for one progress display."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def of(self, what: str) -> Callable[[int], None]:
        """A callback for one part: bytes written since its last call."""

        def advance(count: int) -> None:
            self._done += count
            if self._progress is not None:
                self._progress(what, min(self._done, self._total), self._total)

        return advance

    def up_to(self, what: str) -> Callable[[int, int], None]:
        """A callback for one part that reports (bytes written of the part, bytes of the part)."""
        advance, before = self.of(what), self._done

        def reached(done: int, _all: int) -> None:
            advance(before + done - self._done)

        return reached
