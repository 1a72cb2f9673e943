"""Lines that are typed, with editing and a history where Python's readline is there, or that come in a pipe.

What is wrong with the history's file is nobody's concern but its own: nothing is said of it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import click

from ..output import is_terminal
from .documents import MOST_READ
from .options import expanded

Complete = Callable[[str, str], list[str]]
"""complete(line up to the cursor, its last word) -> what the word may become."""

PROMPT = "> "
_HISTORY_LINES = 1000


class LineReader:
    """Where lines come from: a pipe, unless a person types them."""

    interactive = False
    """A person types them."""

    def __init__(self, limit: int = MOST_READ) -> None:
        """limit: bytes that a line can have."""
        self._limit = limit

    def read(self) -> bytes | None:
        """The next line without its newline; None at the end. Raises KeyboardInterrupt, and UsageError for a
        line that is too long, or has no end."""
        line: bytes = sys.stdin.buffer.readline(self._limit + 2) if sys.stdin is not None else b""
        if len(line.removesuffix(b"\n")) > self._limit:
            raise click.UsageError(
                f"stdin: a line has more than {self._limit:,} bytes, all that this model has positions for; "
                "give shorter ones"
            )
        return line.removesuffix(b"\n") if line else None

    def close(self) -> None:
        """No more lines will be read."""


def line_reader(complete: Complete, limit: int) -> LineReader:
    """The reader that stdin asks for; limit: bytes that a line can have."""
    return _Typed(complete) if is_terminal(sys.stdin) else LineReader(limit)


class _Typed(LineReader):
    interactive = True

    def __init__(self, complete: Complete) -> None:
        super().__init__()
        # What the terminal's encoding lacks comes through as the bytes it is.
        if hasattr(sys.stdin, "reconfigure"):
            sys.stdin.reconfigure(errors="surrogateescape")
        # Where text goes elsewhere, input() would write its prompt there, too.
        self._history = _History(complete) if is_terminal(sys.stdout) else None

    def read(self) -> bytes | None:
        if self._history is None:
            if sys.stderr is not None:
                sys.stderr.write(PROMPT)
                sys.stderr.flush()
            line = sys.stdin.readline()
            return line.removesuffix("\n").encode("utf-8", "surrogateescape") if line else None
        try:
            return input(PROMPT).encode("utf-8", "surrogateescape")
        except EOFError:
            return None

    def close(self) -> None:
        if self._history is not None:
            self._history.save()


def history_file() -> Path:
    """Where typed lines are kept (XDG base directories: state is what should last from run to run)."""
    given = Path(os.environ.get("XDG_STATE_HOME", ""))
    folder = given if given.is_absolute() else Path.home() / ".local" / "state"
    return folder / "blt-edge" / "chat_history"


class _History:
    def __init__(self, complete: Complete) -> None:
        try:
            import readline
        except ImportError:
            self._readline = None
            return
        self._readline = readline
        self._complete = complete
        readline.set_completer_delims(" \t\n")
        readline.set_completer(self._candidate)
        if "libedit" in (readline.__doc__ or ""):
            readline.parse_and_bind("bind ^I rl_complete")
        else:
            readline.parse_and_bind("tab: complete")
            readline.parse_and_bind("set enable-bracketed-paste on")  # several pasted lines are one input
        readline.clear_history()
        readline.set_history_length(_HISTORY_LINES)
        with suppress(OSError, RuntimeError):  # RuntimeError: there is no home
            readline.read_history_file(history_file())

    def _candidate(self, word: str, index: int) -> str | None:
        assert self._readline is not None
        line = self._readline.get_line_buffer()[: self._readline.get_endidx()]
        found = self._complete(line, word)
        return found[index] if index < len(found) else None

    def save(self) -> None:
        if self._readline is None:
            return
        with suppress(OSError, RuntimeError):
            path = history_file()
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600))
            path.chmod(0o600)
            self._readline.write_history_file(path)


def paths_that_begin(word: str) -> list[str]:
    """Paths for a word that is the beginning of one; folders end with a slash."""
    path = expanded(word)
    folder, name = (path, "") if not word or word.endswith(os.sep) else (path.parent, path.name)
    try:
        found = sorted(one for one in folder.iterdir() if one.name.startswith(name))
    except OSError:
        return []
    return [f"{one}{os.sep if one.is_dir() else ''}" for one in found]
