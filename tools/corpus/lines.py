"""Results as lines of JSON, which outlive whatever ends a run, and a run that goes on from them.

First a line of what was run, then one for each text, out of this process as soon as it is known, then one of
all together, which is there when a run ended by itself or by Ctrl-C. One that was killed left whole lines and
perhaps half a one, which the next run drops. What it does not know: models, tables, the terminal.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, cast

from ...runtime.errors import BltError, OptionError
from ...runtime.files import claim, write_whole
from ...runtime.manifest import Manifest
from .results import Result, Totals

__all__ = ["ResultLines", "described_run"]

FORMAT = 1
_MOST_LINE = 1 << 20
"""Bytes of a line; a path has 4096."""
_Place = tuple[str, "int | None"]
_DIGEST = 16
"""Bytes of a sha256 that are compared."""


def described_run(model: str, manifest: Manifest, context: int, field: str | None) -> dict[str, Any]:
    """What decides the figures of a text: the bundle by its fingerprint, where it is cut, where windows end,
    and of lines of JSON which field is the text. "model" and "source" are for people.
    """
    rule = manifest.patching
    fields = (name for name in type(rule).__dataclass_fields__ if getattr(rule, name) is not None)
    return {
        "format": FORMAT,
        "model": model,
        "source": manifest.source.name,
        "bundle": manifest.fingerprint,
        "context": context,
        "patching": {name: getattr(rule, name) for name in fields},
        "field": field,
    }


class ResultLines:
    """The results of a run, in a file of its own or in one that goes when the run ends.

    Use it as a context manager: nothing is written before, so that a run may still be refused.
    """

    def __init__(
        self,
        path: Path | None,
        run: Mapping[str, Any],
        *,
        kept: bool = True,
        resume: bool = False,
        also: Callable[[str], object] = lambda line: None,
    ) -> None:
        """path: None = a temporary file, or nothing where results are not `kept`. run: `described_run`.
        resume: go on with what is in the file, where there is one. also: told of each line that is written,
        without its end.

        Raises OSError, and OptionError where the file is not of the same run, or no file of results.
        """
        self.path, self.run, self._kept, self._also = path, dict(run), kept, also
        self.totals = Totals()
        """Of all results, the former ones too."""
        self.former = 0
        """Results that were there and still count."""
        self._end, self._again = 0, False
        self._told: dict[_Place, bytes] = {}
        self._stale: set[tuple[_Place, bytes]] = set()
        self._file: BinaryIO
        self._open, self._broken = ExitStack(), False
        if resume and path is not None and path.exists():
            self._scan(path)

    # 1. What was told before.

    def knows(self, name: str, line: int | None) -> bool:
        """Whether there is a former result of this place that no text was found for yet."""
        return (name, line) in self._told

    def take(self, name: str, line: int | None, sha256: str) -> bool:
        """Whether there is a former result of this text, which is then not found again. One of another text
        that was at this place no longer counts.
        """
        place, digest = (name, line), bytes.fromhex(sha256)[:_DIGEST]
        held = self._told.pop(place, b"")
        digests = [held[at : at + _DIGEST] for at in range(0, len(held), _DIGEST)]
        found = digest in digests
        if found:
            digests.remove(digest)
            if digests:
                self._told[place] = b"".join(digests)
        else:
            self._stale.update((place, one) for one in digests)
        return found

    def _scan(self, path: Path) -> None:
        with path.open("rb") as file:
            first = file.readline(_MOST_LINE)
            beginning = b'{"run": '
            if first[: len(beginning)] != beginning[: len(first)]:
                raise OptionError(f"resume: {path} is no file of results of score; give another FILE")
            if not first.endswith(b"\n"):
                return  # killed before its first line was whole
            self._check_run(path, first)
            self._end, number, total = len(first), 1, False
            while (line := file.readline(_MOST_LINE)).endswith(b"\n"):
                number += 1
                result = _parsed(line, path, number)
                if total:
                    raise OptionError(f"resume: {path} goes on behind its total, in line {number}; mend it")
                total = result is None
                if result is not None:
                    self._end += len(line)
                    self._remember(result)
            if len(line) == _MOST_LINE:
                raise OptionError(f"resume: line {number + 1} of {path} is too long; mend it")

    def _remember(self, result: Result) -> None:
        if result.sha256 is None:
            self._again = True  # another try may do better
            return
        self.former += 1
        self.totals.add(result)
        place = (sys.intern(result.name), result.line)
        self._told[place] = self._told.get(place, b"") + _digest(result)

    def _check_run(self, path: Path, line: bytes) -> None:
        try:
            run = json.loads(line)["run"]
            old = {key: run[key] for key in self.run}
            old["patching"] = dict(old["patching"])
        except (ValueError, KeyError, TypeError, RecursionError):
            raise OptionError(f"resume: {path} does not say what it is of; give another FILE") from None
        new, what = self.run, ""
        both = (old, new), (new, old)
        if old["format"] != new["format"]:
            what = f"is of format {old['format']}, this version writes {new['format']}; give"
        elif old["bundle"] != new["bundle"]:
            pairs = [f"{one['source']}, fingerprint {str(one['bundle'])[:16]}" for one in (old, new)]
            what = f"is of another bundle ({pairs[0]}; this one is {pairs[1]}); give that one, or"
        elif old["context"] != new["context"]:
            what = f"is of context {old['context']}, this run is of {new['context']}; give that one, or"
        elif old["patching"] != new["patching"]:
            pairs = [_shown_rule(one["patching"], other["patching"]) for one, other in both]
            what = f"is of patches by {pairs[0]}, this run is of {pairs[1]}; give that rule, or"
        elif old["field"] != new["field"]:
            pairs = [f"field {one['field']}" if one["field"] else "whole files" for one in (old, new)]
            what = f"is of {pairs[0]}, this run is of {pairs[1]}; give --field as it was, or"
        if what:
            raise OptionError(f"resume: {path} {what} another FILE")

    # 2. What is told now.

    def __enter__(self) -> ResultLines:
        """Open the file. Raises OSError, and BltError while another run writes it."""
        if self.path is not None:
            self._reopen(self.path)
            self._file.truncate(self._end)
        elif self._kept:
            self._file = cast(BinaryIO, self._open.enter_context(tempfile.TemporaryFile()))
        else:
            self._file = self._open.enter_context(Path(os.devnull).open("r+b"))
        if self._again:
            self._rewrite(lambda result: result.sha256 is not None)
        if not self._file.seek(0, os.SEEK_END):
            self._write({"run": self.run})
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError) if self._broken else nullcontext():  # it was told
            self._open.close()

    def add(self, result: Result) -> None:
        """Write a text's line, at once. Raises OSError."""
        self.totals.add(result)
        self._write(result.to_dict())

    def finish(self, *, complete: bool) -> None:
        """Drop what no longer counts, and write the last line; nothing behind a line that could not be
        written whole. Raises OSError."""
        if self._broken:
            return
        if self._stale:
            stale = self._stale
            for result in self._rewrite(lambda one: ((one.name, one.line), _digest(one)) not in stale):
                self.former -= 1
                self.totals.remove(result)
        self._write({"total": self.totals.to_dict(), "complete": complete})

    def results(self) -> Iterator[Result]:
        """All results, in the file's order; none where they are not kept."""
        self._file.seek(0)
        for line in iter(self._file.readline, b""):
            data = json.loads(line)
            if "file" in data:
                yield Result.from_dict(data)
        self._file.seek(0, os.SEEK_END)

    def _write(self, document: Mapping[str, Any]) -> None:
        line = json.dumps(document)
        try:
            self._file.write(line.encode("ascii") + b"\n")
            self._file.flush()
        except OSError as error:
            self._broken = True
            kept_in = tempfile.gettempdir() if self.path is None and self._kept else self.path
            error.filename = error.filename or (None if kept_in is None else str(kept_in))
            raise
        self._also(line)

    def _rewrite(self, keep: Callable[[Result], bool]) -> list[Result]:
        """Leave out results that are not to be kept, and return them. Raises OSError: all is as it was."""
        assert self.path is not None
        path, dropped = self.path, list[Result]()

        def write(target: Path) -> None:
            with target.open("wb") as file, path.open("rb") as before:
                for line in before:
                    data = json.loads(line)
                    if "file" in data and not keep(result := Result.from_dict(data)):
                        dropped.append(result)
                    else:
                        file.write(line)

        self._open.close()  # some systems replace no file that is open
        try:
            write_whole(path, write)
        finally:
            self._reopen(path)
            self._file.seek(0, os.SEEK_END)
        return dropped

    def _reopen(self, path: Path) -> None:
        self._file = self._open.enter_context(path.open("r+b" if path.exists() else "w+b"))
        try:
            lock = claim(path)
        except BlockingIOError:
            raise BltError(f"{path}: another run is writing it; wait for it, or give another FILE") from None
        if lock is not None:
            self._open.callback(os.close, lock)


def _parsed(line: bytes, path: Path, number: int) -> Result | None:
    """A text's result; None for the line of all together. Raises OptionError."""
    try:
        data = json.loads(line)
        if isinstance(data, dict) and "total" in data:
            return None
        return Result.from_dict(data)
    except (ValueError, RecursionError):  # OptionError is a ValueError
        raise OptionError(
            f"resume: line {number} of {path} is no result; mend it, or give another FILE"
        ) from None


def _shown_rule(rule: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """What a rule has otherwise than another one."""
    differs = [name for name in {**rule, **other} if rule.get(name) != other.get(name)]
    return ", ".join(f"{name} {rule.get(name, 'none')}" for name in differs)


def _digest(result: Result) -> bytes:
    return bytes.fromhex(result.sha256 or "")[:_DIGEST]
