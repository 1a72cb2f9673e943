"""Progress on stderr and tables: what people look at. rich is imported when something is shown.

On a terminal progress is a bar that leaves nothing behind; in a pipe it is one plain line per step. A table
in a pipe is never cut or folded.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING

from .messages import printable
from .session import Session, is_terminal

if TYPE_CHECKING:
    from rich.text import Text

__all__ = ["Progress", "count", "print_fields", "print_table", "progress_bar", "size", "status"]

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""

_PIPE_WIDTH = 100_000


# 1. Progress.


@contextmanager
def progress_bar(session: Session) -> Iterator[Progress]:
    """A callback that shows progress in bytes while the block runs."""
    if session.quiet or sys.stderr is None:
        yield lambda what, done, total: None
    elif is_terminal(sys.stderr):
        yield from _bar()
    else:
        yield _Lines(session)


def _bar() -> Iterator[Progress]:
    from rich import progress
    from rich.console import Console
    from rich.table import Column

    # A bar over two lines would leave one of them behind.
    narrow = Column(no_wrap=True, overflow="ellipsis", max_width=32)
    display = progress.Progress(
        progress.TextColumn("{task.description}", markup=False, table_column=narrow),
        progress.BarColumn(),
        progress.TaskProgressColumn(),
        progress.DownloadColumn(),
        progress.TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    with display:
        task = display.add_task("preparing", total=None)

        def show(what: str, done: int, total: int) -> None:
            display.update(task, description=printable(what), completed=done, total=total)

        yield show


class _Lines:
    """Progress where nothing can be drawn: a line when something else begins."""

    def __init__(self, session: Session) -> None:
        self._session, self._last = session, ""

    def __call__(self, what: str, done: int, total: int) -> None:
        if what != self._last:
            self._last = what
            self._session.say(printable(what))


@contextmanager
def status(session: Session, first: str = "") -> Iterator[Callable[[str], None]]:
    """A callback that says what is being done now; on a terminal the last thing said vanishes at the end."""
    if session.quiet or not is_terminal(sys.stderr):
        lines = _Lines(session)
        if first:
            lines(first, 0, 0)
        yield lambda what: lines(what, 0, 0)
        return
    from rich.console import Console
    from rich.status import Status
    from rich.text import Text

    with Status(Text(printable(first)), console=Console(stderr=True)) as shown:
        yield lambda what: shown.update(Text(printable(what)))


# 2. Tables.


def print_table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], file: IO[str] | None = None, *, total: bool = False
) -> None:
    """Print rows under a header. A column whose name begins with ">" is aligned right; `total` sets the last
    row apart. A cell "ok" or "FAIL" is coloured where colour can be seen.
    """
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for name in columns:
        right = name.startswith(">")
        table.add_column(
            _text(name.lstrip(">")), justify="right" if right else "left", overflow="fold", no_wrap=right
        )
    for index, row in enumerate(rows):
        table.add_row(*map(_text, row), end_section=total and index == len(rows) - 2)
    _print(table, file)


def print_fields(fields: Sequence[tuple[str, str]], file: IO[str] | None = None) -> None:
    """Print names and values in two columns."""
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in fields:
        table.add_row(_text(name, "bold"), _text(value))
    _print(table, file)


def _text(value: str, style: str = "") -> Text:
    from rich.text import Text

    return Text(printable(value), style={"ok": "green", "FAIL": "bold red"}.get(value, style))


def _print(renderable: object, file: IO[str] | None) -> None:
    from rich.console import Console

    target = sys.stdout if file is None else file
    if target is None:
        return
    if is_terminal(target):
        Console(file=target).print(renderable)
        return
    text = io.StringIO()
    Console(file=text, width=_PIPE_WIDTH, color_system=None).print(renderable)
    target.writelines(line.rstrip() + "\n" for line in text.getvalue().splitlines())


# 3. Numbers.


def size(bytes_: float) -> str:
    """Bytes in decimal units: "512 bytes", "25.1 MB"."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if bytes_ >= scale:
            return f"{bytes_ / scale:.1f} {unit}"
    return f"{bytes_:.0f} bytes"


def count(number: float) -> str:
    """A count in three digits or so: "512", "1.2 M"."""
    for unit, scale in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= scale:
            return f"{number / scale:.1f} {unit}"
    return f"{number:.0f}"
