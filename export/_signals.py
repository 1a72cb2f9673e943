"""Signals around work to be undone: termination becomes an exception, and moments are uninterrupted."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

__all__ = ["termination_raises", "uninterrupted"]

_TERMINATION = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))
_ALL = (signal.SIGINT, *_TERMINATION)
_Handler = Callable[[int, FrameType | None], Any] | int | None


@contextmanager
def termination_raises() -> Iterator[None]:
    """Inside, the first of Ctrl-C, SIGTERM and SIGHUP raises, and all that follow are ignored.

    SIGTERM and SIGHUP raise SystemExit (128 + signal), so that cleaning up happens, and a second Ctrl-C does
    not interrupt it. Handlers that somebody else set, or ignored signals, are left alone; so is everything
    outside the main thread, where Python does not deliver signals.
    """
    before: dict[int, _Handler] = {}
    if threading.current_thread() is threading.main_thread():
        ours = (signal.SIG_DFL, signal.default_int_handler)
        before = {number: signal.getsignal(number) for number in _ALL if signal.getsignal(number) in ours}

    def leave(number: int, frame: FrameType | None) -> None:
        for every in before:
            signal.signal(every, _ignore)
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    for number in before:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) in (leave, _ignore):
                signal.signal(number, handler)


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


def _ignore(number: int, frame: FrameType | None) -> None:
    pass
