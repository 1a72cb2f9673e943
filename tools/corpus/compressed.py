"""Files read as they are, or decompressed: .gz, .bz2, .xz and, where there is a library for it, .zst.

What is read is never more in memory than was asked for, and a buffer: neither a file that unpacks to a
thousand times its size nor one that wants gigabytes to be unpacked gets them. A file that breaks off is an
error, not a shorter text. What it does not know: what is in the files.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

from ...runtime.errors import BltError, first_line, requirement

__all__ = ["DamagedError", "compression", "open_file", "uncompressed_name"]

_ENDINGS = (".gz", ".bz2", ".xz", ".zst")
_MOST_MEMORY = 128 << 20
"""What a file may ask for to be unpacked, in bytes; no preset of xz or zstd up to its level 19 takes more."""
_PIECE = 1 << 16
_ZST_PIECE = 512
"""zstandard gives at once whatever its input unpacks to: 128 KiB a block of 4 bytes at most."""


class DamagedError(BltError):
    """A compressed file is not what its name says, or breaks off."""


def compression(path: Path) -> str:
    """The ending that says how a file is compressed; "" for none."""
    ending = path.suffix.lower()
    return ending if ending in _ENDINGS else ""


def uncompressed_name(path: Path) -> str:
    """The name without that ending."""
    return path.name[: len(path.name) - len(compression(path))]


@contextmanager
def open_file(path: Path) -> Iterator[tuple[BinaryIO, Callable[[], int]]]:
    """A file's bytes, decompressed, and a function that tells how many on the disk were taken so far (0 where
    nobody knows).

    Raises OSError; BltError where the library is missing; inside, DamagedError for what can't be unpacked.
    """
    ending = compression(path)
    begin, broken = _decompressor(path, ending)  # the library first: without it nothing is opened
    with path.open("rb") as raw:
        place = raw.tell if raw.seekable() else lambda: 0
        if not ending:
            yield raw, place
            return
        try:
            if ending == ".gz":
                yield cast(BinaryIO, gzip.GzipFile(fileobj=raw, mode="rb")), place
            else:
                yield cast(BinaryIO, io.BufferedReader(_Frames(raw, begin), _PIECE)), place
        except (EOFError, OSError, broken) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            # Those of gzip and bz2 are OSErrors, too, without a number.
            raise DamagedError(f"damaged {ending} data: {first_line(error)}") from error


def _decompressor(path: Path, ending: str) -> tuple[Callable[[], _Decompressor], type[Exception]]:
    """Makes decompressors of what has the ending; and the error that they raise."""
    if ending == ".zst":
        return _zstd(path)
    if ending == ".xz":
        return partial(lzma.LZMADecompressor, memlimit=_MOST_MEMORY), lzma.LZMAError
    return bz2.BZ2Decompressor, zlib.error


class _Decompressor(Protocol):
    """What bz2, lzma and, from Python 3.14 on, compression.zstd have."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int = -1) -> bytes: ...


class _Frames(io.RawIOBase):
    """The contents of one compressed frame after the other."""

    def __init__(self, raw: BinaryIO, begin: Callable[[], _Decompressor]) -> None:
        self._raw, self._begin = raw, begin
        self._frame = begin()
        self._held = b""  # read, and not given to a frame yet

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the beginning of the buffer; 0 at the end. Raises EOFError where a frame breaks off, and what
        unpacking it raises.
        """
        room = memoryview(buffer).cast("B")
        while not self._frame.eof or self._next():
            piece = b""
            if self._frame.needs_input:
                piece, self._held = self._held or self._raw.read(_PIECE), b""
                if not piece:
                    raise EOFError("it breaks off")
            found = self._frame.decompress(piece, len(room))
            if found:
                room[: len(found)] = found
                return len(found)
        return 0

    def _next(self) -> bool:
        """Begin the frame after one that has ended, behind zeros that fill up blocks; False at the end."""
        rest = self._frame.unused_data.lstrip(b"\0")
        while not rest:
            piece = self._raw.read(_PIECE)
            if not piece:
                return False
            rest = piece.lstrip(b"\0")
        self._frame, self._held = self._begin(), rest
        return True


class _Zstandard:
    """The package zstandard's decompressor of a frame, as the others are: it gives all at once, and so is
    given little."""

    def __init__(self, frame: Any) -> None:
        self._frame = frame
        self._given, self._found = b"", io.BytesIO()

    @property
    def eof(self) -> bool:
        return bool(self._frame.eof) and not self._left

    @property
    def needs_input(self) -> bool:
        return not self._given and not self._left

    @property
    def unused_data(self) -> bytes:
        return bytes(self._frame.unused_data) + self._given

    @property
    def _left(self) -> int:
        return len(self._found.getbuffer()) - self._found.tell()

    def decompress(self, data: bytes, max_length: int = -1) -> bytes:
        """As `_Decompressor.decompress`."""
        self._given += data
        while self._given and not self._left and not self._frame.eof:
            piece, self._given = self._given[:_ZST_PIECE], self._given[_ZST_PIECE:]
            self._found = io.BytesIO(self._frame.decompress(piece))
        return self._found.read(max_length)


def _zstd(path: Path) -> tuple[Callable[[], _Decompressor], type[Exception]]:
    """Makes decompressors, by the standard library where it has them; and the error that they raise."""
    library = _imported("compression.zstd")
    if library is not None:
        options = {library.DecompressionParameter.window_log_max: _MOST_MEMORY.bit_length() - 1}
        return partial(library.ZstdDecompressor, options=options), library.ZstdError
    library = _imported("zstandard")
    if library is not None:
        maker = library.ZstdDecompressor(max_window_size=_MOST_MEMORY)
        return lambda: _Zstandard(maker.decompressobj()), library.ZstdError
    raise BltError(
        f"{path} needs the package zstandard, which is not installed: "
        f"pip install {requirement('corpus')}; or decompress it first"
    )


def _imported(name: str) -> Any:
    try:
        return import_module(name)
    except ModuleNotFoundError:
        return None
