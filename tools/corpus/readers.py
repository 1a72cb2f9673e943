"""Reads the texts of a corpus, one after the other, in windows.

Of a file that is one text no more than two windows are held, of lines of JSON one line. What it does not
know: models, results, what an engine does.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import BinaryIO, Protocol

from ...runtime.errors import BltError
from ...runtime.words import WordCounter, count_words
from .compressed import DamagedError, compression, open_file
from .sources import Source
from .texts import EMPTY, Facts, Text, Unscored

__all__ = ["MOST_DECOMPRESSED", "MOST_LINE", "Reader", "Told"]

MOST_DECOMPRESSED = 1_000_000_000
"""Bytes of one compressed text: a small file can unpack to any number. A plain one may be of any size."""
MOST_LINE = 32_000_000
"""Bytes of one line of JSON, which has to be in memory."""


class Told(Protocol):
    """What is known of texts that were scored before."""

    def knows(self, name: str, line: int | None) -> bool:
        """Whether a text of that place was, whatever it held."""

    def take(self, name: str, line: int | None, sha256: str) -> bool:
        """Whether this very text was, so that it is left out; what else was told of its place is void."""


class _TextError(BltError):
    """Why a text can't be read; the others can."""


@dataclass
class Reader:
    """Reads sources: `texts` is everything in them, in order."""

    sources: Iterable[Source]
    window: int
    """Bytes of a window, at least 1."""
    key: str = ""
    """Of lines of JSON: the key whose value is the text, or keys with dots between."""
    open_stdin: Callable[[], AbstractContextManager[BinaryIO]] | None = None
    told: Told | None = None
    """What need not be read again; None = nothing."""
    passed: Callable[[int], None] = lambda done: None
    """Told of `Text.done` where a text is left out."""
    number: int = 0
    """Of the next window."""

    def texts(self) -> Iterator[Text | Unscored]:
        """Each text in its windows, or why it has none. Only errors that are of no single text are raised."""
        before = 0
        for source in self.sources:
            end = before + source.size
            try:
                yield from self._lines(source, before) if source.lines else self._whole(source, before)
            except OSError as error:
                yield Unscored(source.name, None, f"unreadable: {error.strerror or error}", end)
            except (_TextError, DamagedError) as error:
                yield Unscored(source.name, None, f"unreadable: {error}", end)
            before = end

    # 1. A file that is one text.

    def _whole(self, source: Source, before: int) -> Iterator[Text | Unscored]:
        if self.told is not None and source.path is not None and self.told.knows(source.name, None):
            digest = hashlib.sha256()
            with self._opened(source) as (stream, _):
                for part, _last in _windows(stream, 1 << 20, _limit(source)):
                    digest.update(part)
            if self._told(source, None, digest.hexdigest(), before + source.size):
                return
        digest, words, size = hashlib.sha256(), WordCounter(), 0
        with self._opened(source) as (stream, place):
            for part, last in _windows(stream, self.window, _limit(source)):
                digest.update(part)
                words.add(part)
                size += len(part)
                facts = Facts(size, words.count, digest.hexdigest()) if last else None
                done = before + (source.size if last else min(place(), source.size))
                yield self._text(source, None, part, facts, done)
        if not size:
            yield Unscored(source.name, None, EMPTY, before + source.size, digest.hexdigest())

    # 2. A text a line.

    def _lines(self, source: Source, before: int) -> Iterator[Text | Unscored]:
        with self._opened(source) as (stream, place):
            for number, line in _lines(stream):
                done = before + min(place(), source.size)
                try:
                    data = _text_of(line, self.key)
                except _TextError as error:
                    sha256 = _sha256(line)
                    if not self._told(source, number, sha256, done):
                        yield Unscored(source.name, number, f"unreadable: {error}", done, sha256)
                    continue
                if data is None:
                    continue
                sha256 = _sha256(data)
                if self._told(source, number, sha256, done):
                    continue
                if not data:
                    yield Unscored(source.name, number, EMPTY, done, sha256)
                facts = Facts(len(data), count_words(data), sha256)
                for start in range(0, len(data), self.window):
                    last = start + self.window >= len(data)
                    part = data[start : start + self.window]
                    yield self._text(source, number, part, facts if last else None, done)

    # 3. Both.

    @contextmanager
    def _opened(self, source: Source) -> Iterator[tuple[BinaryIO, Callable[[], int]]]:
        if source.path is None:
            assert self.open_stdin is not None, "whoever names stdin says how it is opened"
            with self.open_stdin() as stream:
                yield stream, lambda: 0
        else:
            with open_file(source.path) as opened:
                yield opened

    def _told(self, source: Source, line: int | None, sha256: str, done: int) -> bool:
        if self.told is None or not self.told.take(source.name, line, sha256):
            return False
        self.passed(done)
        return True

    def _text(self, source: Source, line: int | None, data: bytes, facts: Facts | None, done: int) -> Text:
        self.number += 1
        return Text(self.number - 1, source.name, line, data, facts, done)


def _limit(source: Source) -> int | None:
    packed = source.path is not None and compression(source.path)
    return MOST_DECOMPRESSED if packed else None


def _windows(stream: BinaryIO, size: int, limit: int | None) -> Iterator[tuple[bytes, bool]]:
    """Pieces of `size` bytes, the last one shorter perhaps, each with whether it is the last; nothing of an
    empty stream. Raises _TextError before more than `limit` bytes."""
    held, taken = b"", 0
    while piece := _filled(stream, size):
        taken += len(piece)
        if limit is not None and taken > limit:
            raise _TextError(f"it has more than {limit:,} bytes once decompressed; decompress it first")
        if held:
            yield held, False
        held = piece
    if held:
        yield held, True


def _filled(stream: BinaryIO, size: int) -> bytes:
    """The next `size` bytes, fewer only at the end: a pipe may give fewer at a time."""
    parts = []
    while size and (part := stream.read(size)):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _lines(stream: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Lines with their numbers, from 1; of one that is too long the first `MOST_LINE` + 1 bytes."""
    number = 0
    while line := stream.readline(MOST_LINE + 1):
        number += 1
        yield number, line
        if len(line) > MOST_LINE:
            while line and not line.endswith(b"\n"):
                line = stream.readline(1 << 20)


def _text_of(line: bytes, key: str) -> bytes | None:
    """The text in a line of JSON; None for a blank line. Raises _TextError for a line without."""
    if len(line) > MOST_LINE:
        raise _TextError(f"the line has more than {MOST_LINE:,} bytes")
    if not line.strip():
        return None
    try:
        found = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise _TextError("the line is no UTF-8") from None
    except (ValueError, RecursionError):
        raise _TextError("the line is no JSON") from None
    text = _at(found, key)
    if not isinstance(text, str):
        kind = {dict: "an object", list: "a list", type(None): "null", bool: "true or false"}
        raise _TextError(f"{key} is {kind.get(type(text), 'a number')}, not a text")
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise _TextError(f"{key} holds half a character (a lone surrogate)") from None


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _at(found: object, key: str) -> object:
    """What an object has under the key, a name with dots in it before a way by them."""
    if not isinstance(found, dict):
        raise _TextError("the line is no JSON object")
    if key in found:
        return found[key]
    first, dot, rest = key.partition(".")
    if not dot or not isinstance(found.get(first), dict):
        raise _TextError(f"the line has no {key}")
    try:
        return _at(found[first], rest)
    except _TextError:
        raise _TextError(f"the line has no {key}") from None
