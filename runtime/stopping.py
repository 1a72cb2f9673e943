"""Stop strings in a stream of bytes: found wherever the pieces are cut, and never emitted."""

from __future__ import annotations

from collections.abc import Iterable

from .checks import shown
from .errors import OptionError

__all__ = ["StopMatcher"]


class StopMatcher:
    """Passes bytes on until one of the stop strings has gone by.

    The stop string that *ends* first in the stream wins; of several that end at the same byte, the
    longest, so that no byte of the stop string is emitted. The result does not depend on how the stream
    is cut. Bytes that may yet turn out to begin a stop string are held back; `flush` returns them.

    Raises OptionError for an empty stop string, which would stop everything, TypeError for what is not bytes.
    """

    def __init__(self, stops: Iterable[bytes]) -> None:
        self._stops = tuple(dict.fromkeys(stops))
        if not all(isinstance(stop, bytes) for stop in self._stops):
            raise TypeError(f"stop strings are {shown(self._stops)}; allowed is a list of bytes objects")
        if b"" in self._stops:
            raise OptionError("a stop string is empty; allowed are strings of at least one byte")
        self._borders = [_borders(stop) for stop in self._stops]
        self._matched = [0] * len(self._stops)
        self._held = b""
        self._found: bytes | None = None

    @property
    def found(self) -> bytes | None:
        """The stop string that ended the stream, None while there was none."""
        return self._found

    def push(self, data: bytes) -> tuple[bytes, bool]:
        """Takes the next bytes; returns (bytes that are safe to emit now, whether a stop string was found).

        After a stop string everything is dropped: the answer is always (b"", True).
        """
        if self._found is not None:
            return b"", True
        if not self._stops:
            return data, False
        stream = self._held + data
        for end, byte in enumerate(data, start=len(self._held) + 1):
            self._advance(byte)
            if self._found is not None:
                self._held = b""
                return stream[: end - len(self._found)], True
        keep = len(stream) - max(self._matched)
        self._held = stream[keep:]
        return stream[:keep], False

    def flush(self) -> bytes:
        """Ends the stream: the bytes still held back, which began a stop string that never came."""
        held, self._held = self._held, b""
        self._matched = [0] * len(self._stops)
        return held

    def _advance(self, byte: int) -> None:
        """One byte for every stop string (Knuth-Morris-Pratt): how much of each the stream now ends with."""
        for index, stop in enumerate(self._stops):
            matched = self._matched[index]
            while matched and stop[matched] != byte:
                matched = self._borders[index][matched - 1]
            if stop[matched] == byte:
                matched += 1
            self._matched[index] = matched
            if matched == len(stop) and (self._found is None or matched > len(self._found)):
                self._found = stop


def _borders(stop: bytes) -> list[int]:
    """For each prefix of `stop`, the length of the longest shorter prefix that is also its suffix."""
    borders = [0] * len(stop)
    length = 0
    for end in range(1, len(stop)):
        while length and stop[end] != stop[length]:
            length = borders[length - 1]
        if stop[end] == stop[length]:
            length += 1
        borders[end] = length
    return borders
