"""Generated text on stdout, and Ctrl-C while it comes."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from .session import is_terminal

__all__ = ["TextOutput", "interrupt_sets"]

# What a terminal would obey becomes visible; a pipe gets everything as it is.
_VISIBLE = {
    **{code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"},
    0x7F: 0x2421,
    **dict.fromkeys(range(0x80, 0xA0), 0xFFFD),
}


class TextOutput:
    """stdout, as far as text goes there."""

    def __init__(self, shown: bool) -> None:
        self._stream = sys.stdout if shown else None
        self._visible = is_terminal(self._stream)
        self.open_line = False  # something was written, and no newline after it

    def write(self, text: str) -> None:
        """Write text at once."""
        if self._stream is None or not text:
            return
        self._stream.write(text.translate(_VISIBLE) if self._visible else text)
        self._stream.flush()
        self.open_line = not text.endswith("\n")

    def close_line(self) -> None:
        """Let what follows on stdout begin on a line of its own."""
        if self.open_line:
            self.write("\n")

    def end_line(self) -> None:
        """Let what follows on stderr begin on a line of its own, without adding to stdout."""
        if self.open_line and sys.stderr is not None:
            sys.stderr.write("\n")
            sys.stderr.flush()
        self.open_line = False


@contextmanager
def interrupt_sets(event: threading.Event) -> Iterator[None]:
    """Inside, the first Ctrl-C sets the event, so that the last byte and the figures are not lost."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before is not signal.default_int_handler:
        yield
        return

    def set_event(number: int, frame: object) -> None:
        event.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, set_event)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
