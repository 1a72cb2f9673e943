"""Signals around work to be undone: termination becomes an exception, and moments are uninterrupted."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["termination_raises", "uninterrupted"]

_TERMINATION = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))
_ALL = (signal.SIGINT, *_TERMINATION)


@contextmanager
def termination_raises() -> Iterator[None]:
    """Inside, SIGTERM and SIGHUP raise SystemExit (128 + signal), so that cleaning up happens.

    Handlers that somebody else set, or ignored signals, are left alone; so is everything outside the main
    thread, where Python does not deliver signals.
    """
    changed = []
    if threading.current_thread() is threading.main_thread():
        changed = [number for number in _TERMINATION if signal.getsignal(number) is signal.SIG_DFL]
    for number in changed:
        signal.signal(number, _leave)
    try:
        yield
    finally:
        for number in changed:
            if signal.getsignal(number) is _leave:
                signal.signal(number, signal.SIG_DFL)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Inside, Ctrl-C and termination wait; they take effect at the end. For moments only."""
    waiting: list[int] = []
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.getsignal(number) for number in _ALL}
    for number, handler in before.items():
        if handler is not None:
            signal.signal(number, lambda number, frame: waiting.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:
                signal.signal(number, handler)
        for number in waiting[:1]:
            signal.raise_signal(number)


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)
