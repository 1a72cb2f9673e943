"""`blt-edge score`: what is shown and written of texts while an engine scores them, and at the end."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from ..corpus.exports import check_parquet, write_csv, write_document, write_parquet
from ..corpus.joining import score_texts
from ..corpus.lines import ResultLines
from ..corpus.progress import CorpusProgress
from ..corpus.readers import Reader
from ..corpus.results import Result, Totals, bytes_per_patch
from ..corpus.sources import Source
from ..corpus.texts import Engine, Text, Unscored
from ..output import Messages, counted, echo, is_terminal, progress_aside, progress_bar
from ..tables import GrowingTable
from .documents import nothing_in, open_input
from .options import STDIN

_COLUMNS = ("file", ">bytes", ">patches", ">bytes/patch", ">bits/byte", ">bytes/s")
_WIDEST = ("100,000,000", "100,000,000", "1,000.00", "unreadable", "100,000")
"""Cells that the columns behind the names have room for."""
MOST_ROWS = 100
"""Rows that a terminal is shown unless more are asked for."""


@dataclass(frozen=True)
class Outputs:
    """Where results go beside the table; None = nowhere, `STDIN` = stdout."""

    json: Path | None
    jsonl: Path | None
    csv: Path | None
    parquet: Path | None
    max_rows: int | None
    """Rows of the table before the total; None = as many as are usable."""
    resume: bool
    """Go on with what is in `jsonl`."""

    def check(self, files: Sequence[Path]) -> None:
        """Raise UsageError for what can't go together, and BltError for what can't be written."""
        given = {"--json": self.json, "--jsonl": self.jsonl, "--csv": self.csv, "--parquet": self.parquet}
        seen: dict[Path, str] = {}
        texts = {path.resolve() for path in files if path.is_file()}  # not of terminals
        for flag, path in given.items():
            if path is None:
                continue
            place = path if path == STDIN else path.resolve()
            if place in seen:
                raise click.UsageError(f"{seen[place]}, {flag}: {path} is given twice; give each its own")
            if place in texts:
                raise click.UsageError(f"{flag}: {path} is one of the texts; give another FILE to write")
            seen[place] = flag
        if files.count(STDIN) > 1:
            raise click.UsageError("FILE: - is given twice; stdin can be read only once")
        if self.resume and self.jsonl in (None, STDIN):
            raise click.UsageError("--resume goes on with a file of results; add --jsonl FILE")
        if self.resume and STDIN in files:
            raise click.UsageError("--resume: stdin can't be read again; give files")
        if self.parquet is not None:
            if self.parquet == STDIN:
                raise click.UsageError("--parquet: - is stdout, which can't be; give a file")
            check_parquet()

    def files(self) -> list[Path]:
        """The files that are written."""
        given = (self.json, self.jsonl, self.csv, self.parquet)
        return [one for one in given if one is not None and one != STDIN]

    @property
    def fills_stdout(self) -> bool:
        return STDIN in (self.json, self.jsonl, self.csv)


def result_lines(outputs: Outputs, run: dict[str, Any]) -> ResultLines:
    """The lines that a run keeps its results in. Raises OptionError where it can't go on from a former one,
    before anything is written."""
    path = outputs.jsonl
    kept = any(one is not None for one in (outputs.json, outputs.csv, outputs.parquet))
    if path is None:
        return ResultLines(None, run, kept=kept)
    if path == STDIN:
        return ResultLines(None, run, kept=kept, also=_write_line)
    if path.exists() and not path.is_file():  # a pipe or a device can't be read again
        if outputs.resume:
            raise click.UsageError(f"--resume: {path} is no plain file; give --jsonl another FILE")
        device = path.open("w", encoding="ascii", buffering=1)
        click.get_current_context().call_on_close(device.close)
        return ResultLines(None, run, kept=kept, also=lambda line: device.write(line + "\n"))
    return ResultLines(path, run, resume=outputs.resume)


def _write_line(line: str) -> None:
    if sys.stdout is not None:
        with progress_aside():
            sys.stdout.write(line + "\n")
            sys.stdout.flush()


class Scoring:
    """One run over the texts of a corpus."""

    def __init__(
        self,
        messages: Messages,
        sources: Sequence[Source],
        key: str,
        outputs: Outputs,
        lines: ResultLines,
    ) -> None:
        """key: of lines of JSON, where the text is."""
        self._messages, self._sources, self._key = messages, sources, key
        self._outputs, self._lines = outputs, lines
        self._alone = len(sources) == 1 and not sources[0].lines
        self._bytes, self._seconds = 0, 0.0  # of this run
        self._why = ""  # the only text can't be read
        self._table = None if outputs.fills_stdout else _Table(sources, outputs.max_rows)

    def run(self, engine: Engine, window: int) -> None:
        """Score, show and write. window: ids, BOS included.

        Raises what reading and scoring do, when what is known was written; and at the end UsageError when all
        is empty, and ClickException when a text could not be read.
        """
        with self._lines as lines:
            if lines.former:
                told = counted(lines.former, "text")
                self._messages.say(f"{lines.path} tells of {told} already, left out here and counted below")
            complete, started = False, time.perf_counter()
            try:
                for result in self._results(engine, window):
                    self._bytes += result.bytes
                    self._show(result)
                complete = True
            finally:
                self._seconds = time.perf_counter() - started
                self._finish(complete)
            self._check(lines.totals)

    def _results(self, engine: Engine, window: int) -> Iterator[Result]:
        """Each result when it is kept."""
        with progress_bar(self._messages) as show:
            progress = CorpusProgress(show, self._sources)
            reader = Reader(
                self._sources,
                window - 1,
                self._key,
                lambda: open_input(STDIN, self._messages, "the text"),
                self._lines if self._lines.former else None,
                progress.skipped,
            )
            for result in score_texts(_told(reader.texts(), progress.reading), engine, progress.passed):
                self._lines.add(result)
                yield result

    def _show(self, result: Result) -> None:
        if self._alone and result.note is not None:
            self._why = _why(result)
            return  # the error at the end says it
        if result.unread:
            self._messages.note(f"{result.shown_name}: {_why(result)}")
        if self._table is not None:
            self._table.row(result)

    def _finish(self, complete: bool) -> None:
        lines, outputs = self._lines, self._outputs
        lines.finish(complete=complete)
        totals, speed = lines.totals, self._bytes / self._seconds if self._seconds > 0 else 0.0
        if outputs.json is not None:
            total = totals.to_dict()
            if total is not None:
                total |= {"seconds": self._seconds, "bytes_per_second": speed}
            head = {**lines.run, "complete": complete, "total": total}
            write_document(_file(outputs.json), head, lines.results(), sys.stdout)
        if complete and outputs.csv is not None:
            write_csv(_file(outputs.csv), lines.results(), sys.stdout)
        if complete and outputs.parquet is not None:
            write_parquet(outputs.parquet, lines.results())
        if self._table is not None and totals.texts:
            self._table.total(totals, speed)
        if not complete and lines.path is not None:
            self._messages.say(f"the same command with --resume goes on from {lines.path}")

    def _check(self, totals: Totals) -> None:
        """Raise what the run as a whole failed by."""
        if totals.unread and self._alone:
            raise click.ClickException(f"{self._sources[0].name}: {self._why}")
        if totals.unread:
            texts = totals.texts + totals.empty + totals.unread
            what = "texts" if any(source.lines for source in self._sources) else "files"
            raise click.ClickException(f"{totals.unread} of {texts} {what} could not be read")
        if not totals.texts:
            raise nothing_in("FILE", [source.path or STDIN for source in self._sources], "score")


class _Table:
    """The rows on stdout, and what stands below them."""

    def __init__(self, sources: Sequence[Source], most: int | None) -> None:
        names = (source.name + ":100000" * source.lines for source in sources)
        self._table = GrowingTable(_COLUMNS, (max("total", *names, key=len), *_WIDEST))
        self._most = MOST_ROWS if most is None and is_terminal(sys.stdout) else most
        self._rows = 0

    def row(self, result: Result) -> None:
        """Show a row, or that there are no more."""
        self._rows += 1
        if self._most is None or self._rows <= self._most:
            with progress_aside():
                self._table.row(_cells(result))
        elif self._rows == self._most + 1 and self._most:
            with progress_aside():
                echo("... (--max-rows N shows more, --jsonl, --csv and --json have all)")

    def total(self, totals: Totals, speed: float) -> None:
        """Show all together, unless it is one row."""
        if totals.texts + totals.empty + totals.unread == 1 == self._rows:
            return
        size, patches = totals.bytes, totals.patches
        per_patch = f"{bytes_per_patch(size, patches):.2f}"
        bits = f"{totals.bits_per_byte:.4f}"
        cells = ("total", f"{size:,}", f"{patches:,}", per_patch, bits, f"{speed:,.0f}" if speed else "")
        self._table.row(cells, total=True)
        per_word = totals.word_perplexity
        told = [_several(totals.texts, "text")]
        told += [f"{totals.empty:,} empty"] * bool(totals.empty)
        told += [f"{totals.unread:,} unread"] * bool(totals.unread)
        told += [_several(totals.windows, "window"), _several(totals.words, "word")]
        told.append(f"perplexity {totals.byte_perplexity:.4f} a byte")
        if per_word is not None:
            told[-1] += f", {per_word:,.1f} a word"
        echo("; ".join(told))


def _several(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _told(events: Iterator[Text | Unscored], reading: Callable[[str], object]) -> Iterator[Text | Unscored]:
    for event in events:
        if isinstance(event, Text):
            reading(event.name)
        yield event


def _file(target: Path) -> Path | None:
    return None if target == STDIN else target


def _why(result: Result) -> str:
    return (result.note or "").partition(": ")[2]


def _cells(result: Result) -> Sequence[str]:
    if result.note is not None:
        return (result.shown_name, "0", "", "", result.note.partition(":")[0])
    speed = f"{result.bytes / result.seconds:,.0f}" if result.seconds else ""
    return (
        result.shown_name,
        f"{result.bytes:,}",
        f"{result.patches:,}",
        f"{bytes_per_patch(result.bytes, result.patches):.2f}",
        f"{result.bits_per_byte:.4f}",
        speed,
    )
