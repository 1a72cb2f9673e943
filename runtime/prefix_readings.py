"""Prompts that are being read just now, so that of texts in one batch that begin alike one reads for all.

Two that read the same side by side take twice the work of one, and a text that waits for the other's state
has its first byte no later than if it had read along. So it waits, and what it waits for is kept when the
other one comes to where the two part.
What this does not know: how a prompt is read, how states are kept.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from .prefix_tree import common_prefix

__all__ = ["Reading", "Readings"]


class _Reader(Protocol):
    @property
    def length(self) -> int:
        """Ids read, BOS included."""


class Reading:
    """A prompt on its way into a sequence."""

    def __init__(self, data: bytes, stops: set[int], sequence: _Reader, near: int) -> None:
        """stops: lengths of the sequence, BOS included, at which its state is kept; others are put in. near:
        bytes before its end for which the state at the end will do."""
        self.data, self._stops, self._sequence, self._near = data, stops, sequence, near
        self.reached = sequence.length
        """The sequence's length when the pass that runs now has ended."""
        self.thread = threading.get_ident()
        self.ended = False
        """Whether it was read, or never will be."""

    def state_for(self, length: int) -> int | None:
        """At which length a state will be kept from which a text goes on that has `length` ids in common,
        BOS included; None where there will be none, or it is kept already."""
        end = 1 + len(self.data)
        wanted = end if end - length <= self._near else length
        to_come = wanted > self._sequence.length and (wanted > self.reached or wanted in (end, *self._stops))
        return wanted if to_come else None

    def wait_for(self, length: int) -> Callable[[], bool]:
        """Have the state kept at a length that `state_for` gave; whether it is, or never will be."""
        self._stops.add(length)
        return lambda: self.ended or self._sequence.length >= length


class Readings:
    """All of one store. Who waits for one is in the same thread, so that there is somebody to ask again."""

    def __init__(self, few: int, rollback: int) -> None:
        """few: bytes that are read again rather than waited for, or kept in a state more. rollback: bytes
        that a state can be rolled back."""
        self._few, self._near, self._now = few, min(few, rollback), list[Reading]()

    @contextmanager
    def begin(self, data: bytes, stops: set[int], sequence: _Reader) -> Iterator[Reading]:
        """A prompt is read in the block."""
        reading = Reading(data, stops, sequence, self._near)
        self._now.append(reading)
        try:
            yield reading
        finally:
            reading.ended = True
            self._now.remove(reading)

    def ahead(self, data: bytes, known: int) -> Callable[[], bool] | None:
        """Of a prompt of which `known` bytes need not be read: when another one has read enough of it.

        None where nobody reads so much more of it that it is worth waiting.
        """
        here, found = threading.get_ident(), []
        for reading in [*self._now]:
            common = common_prefix(reading.data, data)
            worth_it = reading.thread == here and common >= known + self._few
            if worth_it and (length := reading.state_for(1 + common)):
                found.append((common, length, reading))
        if not found:
            return None
        _, length, reading = max(found, key=lambda one: one[0])
        return reading.wait_for(length)
