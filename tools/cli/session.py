"""What the user asked of the whole run: how much to say. Knows no verbs."""

from __future__ import annotations

import sys
from dataclasses import dataclass

__all__ = ["Session", "is_terminal"]


@dataclass
class Session:
    """Verbosity of this run, and stderr for progress and figures."""

    verbose: bool = False
    """-v: tracebacks of errors that nobody foresaw, warnings of libraries."""
    quiet: bool = False
    """-q: nothing on stderr but errors."""

    def say(self, line: str = "") -> None:
        """Write a line on stderr, unless it is to be quiet."""
        if not self.quiet:
            self.note(line)

    def note(self, line: str) -> None:
        """Write a line on stderr that is no progress and no figure: even -q does not hide it."""
        if sys.stderr is not None:
            sys.stderr.write(line + "\n")
            sys.stderr.flush()


def is_terminal(stream: object) -> bool:
    """Whether a person may be looking at the stream (sys.stdout and sys.stderr are None when closed)."""
    isatty = getattr(stream, "isatty", None)
    try:
        return bool(isatty and isatty())
    except ValueError:  # closed since
        return False
