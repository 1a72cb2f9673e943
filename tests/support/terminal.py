"""A program in a pseudo-terminal, typed to as a person would."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import sys
import termios
import time
from collections.abc import Mapping, Sequence

__all__ = ["Terminal"]


class Terminal:
    """`python -c code arguments` on a terminal of 24 rows."""

    def __init__(
        self, code: str, arguments: Sequence[object], env: Mapping[str, str], columns: int = 80
    ) -> None:
        self.pid, self._descriptor = pty.fork()
        if self.pid == 0:
            os.environ.update(env)
            os.environ.pop("COLUMNS", None)
            os.execv(sys.executable, [sys.executable, "-c", code, *map(str, arguments)])
        fcntl.ioctl(self._descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self.shown = ""
        self.raw = b""

    def type(self, keys: str) -> None:
        """Press keys; what the program shows next is waited for from here on."""
        self._update()
        self._seen = len(self.shown)
        os.write(self._descriptor, keys.encode())

    def wait_for(self, text: str, seconds: float = 30) -> str:
        """Wait until `text` is shown after the last keys; returns what was shown since."""
        end = time.monotonic() + seconds
        start = getattr(self, "_seen", 0)
        while text not in self.shown[start:]:
            if time.monotonic() > end or not self._read(end - time.monotonic()):
                raise AssertionError(f"{text!r} never came; shown: {self.shown[start:]!r}")
        return self.shown[start:]

    def type_until(self, keys: str, text: str) -> None:
        """Press keys until `text` is shown: Python's readline does not see a signal while it takes a key."""
        for _ in range(30):
            self.type(keys)
            try:
                self.wait_for(text, seconds=1)
                return
            except AssertionError:
                pass
        raise AssertionError(f"{text!r} never came; shown: {self.shown!r}")

    def end(self, seconds: float = 30) -> int:
        """Wait for the end; the exit code."""
        end = time.monotonic() + seconds
        while self._read(end - time.monotonic()):
            pass
        os.close(self._descriptor)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def _read(self, seconds: float) -> bool:
        if not select.select([self._descriptor], [], [], max(0.0, seconds))[0]:
            return False
        try:
            data = os.read(self._descriptor, 65536)
        except OSError:  # the other side is closed
            return False
        self.raw += data
        self._update()
        return bool(data)

    def _update(self) -> None:
        text = self.raw.decode("utf-8", "ignore").replace("\r", "")
        self.shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
