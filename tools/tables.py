"""Tables that people are shown. A figure is never cut, and no table in a pipe is.

On a terminal what is too long is folded: names, prose and headers. Where that does not suffice, lines are as
long as in a pipe, and the terminal's to break. rich is imported when something is shown.
What it does not know: what the rows are about.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from typing import IO, TYPE_CHECKING

from .output import PROSE_WIDTH, echo, is_terminal, printable

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

_PIPE_WIDTH = 100_000
_NAME, _WORD = 8, 16
"""Columns that a column of names keeps, and characters up to which a word in another is not broken."""


def print_table(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    file: IO[str] | None = None,
    *,
    total: bool = False,
    prose: bool = False,
) -> None:
    """Print rows under a header. A column whose name begins with ">" is of figures, aligned right; `total`
    sets the last row apart; `prose` folds cells in a pipe, too. A cell "ok" or "FAIL" is coloured where
    colour can be seen.
    """
    cells = [[name.lstrip(">"), *(row[at] for row in rows)] for at, name in enumerate(columns)]
    least = [_least(column, at, columns[at].startswith(">")) for at, column in enumerate(cells)]
    target = sys.stdout if file is None else file
    widths, fits = _fit([max(map(_length, column)) for column in cells], least, _width(target, prose))
    table = _table(columns, widths)
    for index, row in enumerate(rows):
        table.add_row(*map(_text, row), end_section=total and index == len(rows) - 2)
    _print(table, target, fits)


def print_fields(
    fields: Sequence[tuple[str, str]], file: IO[str] | None = None, *, prose: bool = False
) -> None:
    """Print names and values in two columns; `prose` folds values in a pipe, too."""
    from rich.table import Table

    names, values = (max((_length(field[at]) for field in fields), default=0) for at in (0, 1))
    least = _least([value for _, value in fields], 1, False)
    target = sys.stdout if file is None else file
    widths, fits = _fit([names, values], [names, least], _width(target, prose))
    table = Table.grid(padding=(0, 2))
    for width in widths:
        table.add_column(width=width, overflow="fold")
    for name, value in fields:
        table.add_row(_text(name, "bold"), _text(value))
    _print(table, target, fits)


class GrowingTable:
    """A table on stdout, or with `err` on stderr, whose rows come one by one, each shown at once. A column is
    as wide as its header and its cell of `widest`, or a longer one from there on; the first, of names, gives
    way where a terminal is narrow.
    """

    def __init__(self, columns: Sequence[str], widest: Sequence[str], *, err: bool = False) -> None:
        self._columns, self._begun, self._err = columns, False, err
        pairs = zip(columns, widest, strict=True)
        self._widths = [max(_length(name.lstrip(">")), _length(cell)) for name, cell in pairs]
        self._fold()

    @property
    def _target(self) -> IO[str] | None:
        # Asked for anew: a progress bar stands in for the streams while it is shown.
        return sys.stderr if self._err else sys.stdout

    def _fold(self) -> None:
        least = [min(_NAME, self._widths[0]), *self._widths[1:]]
        self._widths, self._fits = _fit(self._widths, least, _width(self._target))

    def row(self, cells: Sequence[str], *, total: bool = False) -> None:
        """Print a row, before the first the header; a total is set apart. A row may end early."""
        longer = [max(width, _length(cell)) for width, cell in zip(self._widths[1:], cells[1:], strict=False)]
        self._widths[1 : 1 + len(longer)] = longer
        self._fold()
        if total:
            echo("\u2500" * (sum(self._widths) + 2 * len(self._widths) - 2), self._target)
        table = _table(self._columns, self._widths, header=not self._begun)
        table.add_row(*map(_text, cells))
        _print(table, self._target, self._fits)
        if self._target is not None:
            self._target.flush()
        self._begun = True


def _table(columns: Sequence[str], widths: Sequence[int], header: bool = True) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(
        box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False, show_header=header
    )
    for name, width in zip(columns, widths, strict=True):
        right = name.startswith(">")
        table.add_column(
            _text(name.lstrip(">")), width=width, justify="right" if right else "left", overflow="fold"
        )
    return table


def _length(cell: str) -> int:
    from rich.cells import cell_len

    return cell_len(printable(cell))


def _least(cells: Sequence[str], at: int, figures: bool) -> int:
    """The columns that a column of these cells, the header first, has to have."""
    if at == 0 and not figures:
        return min(_NAME, max(map(_length, cells)))
    word = max((_length(word) for cell in cells for word in cell.split()), default=0)
    return max(word, *map(_length, cells[1:])) if figures else min(_WORD, word)


def _fit(widths: Sequence[int], least: Sequence[int], available: int) -> tuple[list[int], bool]:
    """The widths, with 2 columns between, cut down from the widest to what is available; whether they fit."""
    found = list(widths)
    excess = sum(found) + 2 * len(found) - 2 - available
    if excess > sum(found) - sum(least):
        return found, False
    for _ in range(excess):
        slack = [at for at, width in enumerate(found) if width > least[at]]
        found[max(slack, key=found.__getitem__)] -= 1
    return found, True


def _width(target: IO[str] | None, prose: bool = False) -> int:
    from rich.console import Console

    if is_terminal(target):
        return Console(file=target).width
    return PROSE_WIDTH if prose else _PIPE_WIDTH


def _text(value: str, style: str = "") -> Text:
    from rich.text import Text

    return Text(printable(value), style={"ok": "green", "FAIL": "bold red"}.get(value, style))


def _print(table: Table, target: IO[str] | None, fits: bool) -> None:
    from rich.console import Console

    if target is None:
        return
    if is_terminal(target) and fits:
        Console(file=target).print(table)
        return
    text = io.StringIO()
    Console(file=text, width=_PIPE_WIDTH, color_system=None).print(table)
    target.writelines(line.rstrip() + "\n" for line in text.getvalue().splitlines())
