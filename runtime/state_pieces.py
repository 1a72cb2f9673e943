"""The arrays of a state file, in pieces of `PIECE` bytes that each have a sha256 of their own.

So several threads read a large file at a time, each with a small piece that its core's cache holds from the
disk's cache to its place: read, hashed, looked through and put there. The seal at the end of the file is the
sha256 of what is before the arrays and of all the pieces' sha256, in order; a piece is of one array alone.
What this does not know: which arrays there are, and what they must say.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from .errors import StateError
from .processors import usable_cores

__all__ = ["AGAIN", "PIECE", "SEAL", "ArrayReader", "ArrayWriter", "read_exactly"]

Array = npt.NDArray[Any]

PIECE = 1 << 20
"""Bytes of a piece; an array's last one may have less."""

SEAL = 32
"""Bytes of the seal."""

AGAIN = "read the text again and save it again"

# A thread costs as much to start as a tenth of a piece to read; fewer pieces for each are not worth it.
_LEAST_PIECES = 4
_MOST_THREADS = 8


class ArrayWriter:
    """Writes arrays one after the other, and the seal."""

    def __init__(self, file: BinaryIO, start: bytes) -> None:
        """start: what comes before the arrays; it is written."""
        self._file, self._seal = file, hashlib.sha256(start)
        file.write(start)

    def put(self, name: str, parts: Iterable[Array]) -> None:
        """Write the values of an array, in its type, which come in parts. Raises StateError."""
        digest, room = hashlib.sha256(), PIECE
        for part in parts:
            check_finite(name, part)
            data = part.reshape(-1).view(np.uint8).data
            self._file.write(data)
            while len(data):
                taken, data = data[:room], data[room:]
                digest.update(taken)
                room -= len(taken)
                if not room:
                    self._seal.update(digest.digest())
                    digest, room = hashlib.sha256(), PIECE
        if room < PIECE:
            self._seal.update(digest.digest())

    def finish(self) -> None:
        """Write the seal."""
        self._file.write(self._seal.digest())


class ArrayReader:
    """Reads the arrays, each once, in the file's order; `check_seal` at the end."""

    def __init__(self, file: BinaryIO, start: bytes) -> None:
        """start: what was read before the arrays."""
        self._file, self._place, self._seal = file, len(start), hashlib.sha256(start)
        self._lock = threading.Lock()

    def read(self, name: str, target: Array) -> None:
        """Read the next array into one of its shape and type, C-contiguous or every row of its first axes.

        Raises StateError where the file ends within it, or a value is no finite number.
        """
        if not target.size:
            return
        rows = target.reshape(_rows_of(target), -1)
        assert np.may_share_memory(rows, target), "the values would go into a copy"

        def put(number: int, data: memoryview) -> None:
            values = np.frombuffer(data, target.dtype)
            check_finite(name, values)
            _put(rows, number * (PIECE // target.itemsize), values)

        self._pieces(target.nbytes, put)

    def skip(self, size: int) -> None:
        """Hash the next array, which has so many bytes, and do nothing else with it."""
        self._pieces(size, lambda number, data: None)

    def check_seal(self) -> None:
        """Raises StateError unless what was read is what was written."""
        seal = bytearray(SEAL)
        self._fill(memoryview(seal), self._place)
        if seal != self._seal.digest():
            raise StateError(f"it was changed after it was written (its sha256 differs); {AGAIN}")

    def _pieces(self, size: int, use: Callable[[int, memoryview], None]) -> None:
        count, place = -(-size // PIECE), self._place
        digests, left = [b""] * count, deque(range(count))

        def work() -> None:
            scratch = memoryview(bytearray(min(size, PIECE)))
            try:
                while left:
                    try:
                        number = left.popleft()
                    except IndexError:  # another thread has taken the last one
                        return
                    data = scratch[: min(PIECE, size - number * PIECE)]
                    self._fill(data, place + number * PIECE)
                    digests[number] = hashlib.sha256(data).digest()
                    use(number, data)
            finally:
                left.clear()  # after an error the others need not go on

        threads = min(_MOST_THREADS, count // _LEAST_PIECES)
        if threads > 1:
            threads = min(threads, usable_cores())
        if threads > 1:
            with ThreadPoolExecutor(threads, "restoring") as pool:
                for done in [pool.submit(work) for _ in range(threads)]:
                    done.result()
        else:
            work()
        self._seal.update(b"".join(digests))
        self._place += size

    def _fill(self, target: memoryview, place: int) -> None:
        if hasattr(os, "preadv"):
            number, done = self._file.fileno(), 0
            while done < len(target):
                count = os.preadv(number, [target[done:]], place + done)
                if not count:
                    raise StateError(f"it is truncated; {AGAIN}")
                done += count
        else:  # Windows: a file has one position
            with self._lock:
                self._file.seek(place)
                read_exactly(self._file, target)


def read_exactly(file: BinaryIO, target: memoryview) -> None:
    """Fill `target` from the file. Raises StateError where that ends before."""
    done = 0
    while done < len(target):
        count = file.readinto(target[done:])  # type: ignore[attr-defined]
        if not count:
            raise StateError(f"it is truncated; {AGAIN}")
        done += count


def check_finite(name: str, values: Array) -> None:
    """Raise StateError where floats of an array are no finite numbers."""
    # The extremes of what holds a nan are nan.
    if values.dtype.kind == "f" and values.size and not np.isfinite([values.min(), values.max()]).all():
        raise StateError(f"{name}: some values are no finite numbers; begin a new sequence")


def _rows_of(target: Array) -> int:
    """Rows that lie each in one stretch: axes behind the first gap, from the end, make a row."""
    rows, stretch = 1, target.itemsize
    for axis in reversed(range(target.ndim)):
        if target.shape[axis] > 1 and target.strides[axis] != stretch:
            rows = int(np.prod(target.shape[: axis + 1]))
            break
        stretch *= target.shape[axis]
    return rows


def _put(rows: Array, first: int, values: Array) -> None:
    """Put values [n] where those from number `first` on are of rows [R, W], read one after the other."""
    width, done = rows.shape[1], 0
    while done < len(values):
        row, column = divmod(first + done, width)
        whole = 0 if column else (len(values) - done) // width
        if whole:
            part = whole * width
            rows[row : row + whole] = values[done : done + part].reshape(whole, width)
        else:
            part = min(len(values) - done, width - column)
            rows[row, column : column + part] = values[done : done + part]
        done += part
