"""Which bytes of a text are predicted after which, where a model holds so many ids and no more.

The convention is the harness' own: every byte is predicted once, a text that is too long is cut into windows
as far apart as they go, and the last of them has as much before it as fits. A window begins with BOS, so a
model of `length` ids sees length - 1 bytes, and the last byte that it predicts is none of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["Span", "common_length", "spans"]


@dataclass(frozen=True, order=True)
class Span:
    """Bytes that are predicted together."""

    before: bytes
    """What is read first, behind BOS."""
    scored: bytes
    """What is predicted after that, at least one byte."""


def spans(text: bytes, first: int, length: int) -> Iterator[Span]:
    """Spans in which text[first:] is predicted once, by a model that holds `length` >= 2 ids.

    Where text[first:] is less than `length` bytes it is one span, with as much of text[:first] as fits before
    it; what is longer has less before it than there is.
    """
    while first < len(text):
        # All but the first window of a text have a byte at least before what they predict.
        end = min(len(text), max(length, first + length - 1))
        start = max(0, end - length)
        yield Span(text[start:first], text[first:end])
        first = end


def common_length(one: bytes, other: bytes) -> int:
    """How many bytes two texts begin alike with."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[:middle] == other[:middle]:
            low = middle
        else:
            high = middle - 1
    return low
