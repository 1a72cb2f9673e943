"""Constraints that need no library: UTF-8, and one text of some.

Each says which bytes may come next (`Rule`), in states that are small integers or ranges.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from typing import Protocol

import numpy as np
import numpy.typing as npt

__all__ = ["ChoiceRule", "Flags", "Rule", "Utf8Rule", "cut_character"]

Flags = npt.NDArray[np.bool_]


class Rule(Protocol):
    """What may come next in one text, by the bytes that have come."""

    @property
    def accepts_end(self) -> bool:
        """Whether the text may end here."""

    def allowed(self) -> Flags:
        """bool [256]: the bytes that may come next; not to be written to."""

    def forced(self) -> bytes:
        """Bytes that can only come next, one after the other, as far as that is known cheaply."""

    def advance(self, byte: int) -> None:
        """Take an allowed byte."""

    def roll_back(self, count: int) -> None:
        """Take back the last `count` bytes."""

    def fork(self) -> Rule:
        """The same state; neither sees what the other takes."""


# 1. UTF-8, by the table of well-formed byte sequences (Unicode 3.9, table 3-7).

_REFUSED = -1
_BETWEEN = 0  # characters
_ROWS: tuple[tuple[tuple[int, int, int], ...], ...] = (
    # (first byte, last byte, next state)
    (
        (0x00, 0x7F, 0),
        (0xC2, 0xDF, 1),
        (0xE0, 0xE0, 3),
        (0xE1, 0xEC, 2),
        (0xED, 0xED, 4),
        (0xEE, 0xEF, 2),
        (0xF0, 0xF0, 6),
        (0xF1, 0xF3, 5),
        (0xF4, 0xF4, 7),
    ),
    ((0x80, 0xBF, 0),),
    ((0x80, 0xBF, 1),),
    ((0xA0, 0xBF, 1),),
    ((0x80, 0x9F, 1),),
    ((0x80, 0xBF, 2),),
    ((0x90, 0xBF, 2),),
    ((0x80, 0x8F, 2),),
)
_NEXT = np.full((len(_ROWS), 256), _REFUSED, np.int8)
for _state, _row in enumerate(_ROWS):
    for _first, _last, _following in _row:
        _NEXT[_state, _first : _last + 1] = _following
_ALLOWED = _NEXT != _REFUSED
_ALLOWED.flags.writeable = False


class Utf8Rule:
    """Only valid UTF-8; the end is between characters."""

    def __init__(self, begun: bytes = b"") -> None:
        """begun: bytes of a character that the text before ended in (`cut_character`)."""
        self._states = [_BETWEEN]
        for byte in begun:
            self.advance(byte)

    @property
    def accepts_end(self) -> bool:
        return self._states[-1] == _BETWEEN

    def allowed(self) -> Flags:
        flags: Flags = _ALLOWED[self._states[-1]]
        return flags

    def forced(self) -> bytes:
        return b""

    def advance(self, byte: int) -> None:
        self._states.append(int(_NEXT[self._states[-1], byte]))

    def roll_back(self, count: int) -> None:
        del self._states[len(self._states) - count :]

    def fork(self) -> Utf8Rule:
        other = Utf8Rule()
        other._states = self._states.copy()
        return other


def cut_character(data: bytes) -> bytes:
    """The bytes at the end of `data` that begin a character and do not end it; empty where there are none."""
    for size in (1, 2, 3):
        tail, state = data[-size:], _BETWEEN
        if len(tail) < size:
            break
        for byte in tail:
            state = int(_NEXT[state, byte]) if state != _REFUSED else _REFUSED
        if state > _BETWEEN:
            return tail
    return b""


# 2. One of some texts.


class ChoiceRule:
    """One of some texts, each of which may begin others."""

    def __init__(self, texts: tuple[bytes, ...]) -> None:
        """texts: sorted, each once, at least one."""
        self._texts = texts
        self._ranges = [(0, len(texts))]  # after each byte: the texts that begin so

    @property
    def _depth(self) -> int:
        return len(self._ranges) - 1

    @property
    def accepts_end(self) -> bool:
        return len(self._texts[self._ranges[-1][0]]) == self._depth

    def allowed(self) -> Flags:
        flags, depth, (low, high) = np.zeros(256, np.bool_), self._depth, self._ranges[-1]
        low += self.accepts_end
        while low < high:
            byte = self._texts[low][depth]
            flags[byte] = True
            low = self._behind(byte, low, high)
        return flags

    def _behind(self, byte: int, low: int, high: int) -> int:
        depth = self._depth
        return bisect_right(self._texts, byte, low, high, key=lambda text: text[depth])

    def forced(self) -> bytes:
        (low, high), depth = self._ranges[-1], self._depth
        first, last = self._texts[low], self._texts[high - 1]
        end = depth
        while end < min(len(first), len(last)) and first[end] == last[end]:
            end += 1
        return first[depth:end]

    def advance(self, byte: int) -> None:
        low, high = self._ranges[-1]
        low += self.accepts_end
        depth = self._depth
        start = bisect_left(self._texts, byte, low, high, key=lambda text: text[depth])
        self._ranges.append((start, self._behind(byte, start, high)))

    def roll_back(self, count: int) -> None:
        del self._ranges[len(self._ranges) - count :]

    def fork(self) -> ChoiceRule:
        other = ChoiceRule(self._texts)
        other._ranges = self._ranges.copy()
        return other
