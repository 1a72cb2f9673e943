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
from contextlib import suppress

from .processes import heed_signals


class Terminal:
    """`python -c code arguments` on a terminal of 24 rows."""

    def __init__(
        self, code: str, arguments: Sequence[object], env: Mapping[str, str], columns: int = 80
    ) -> None:
        self.pid, self._descriptor = pty.fork()
        if self.pid == 0:
            heed_signals()
            os.environ.update(env)
            os.environ.pop("COLUMNS", None)
            os.execv(sys.executable, [sys.executable, "-c", code, *map(str, arguments)])
        fcntl.ioctl(self._descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self.shown = ""
        """All that was shown, without what moves the cursor and colours."""
        self._bytes = b""
        self._seen = 0

    def type(self, keys: str) -> None:
        """Press keys; what the program shows next is waited for from here on."""
        self._seen = len(self.shown)
        os.write(self._descriptor, keys.encode())

    def wait_for(self, text: str, seconds: float = 30) -> str:
        """Wait until `text` is shown after the last keys; returns what was shown since."""
        end = time.monotonic() + seconds
        while text not in self.shown[self._seen :]:
            if time.monotonic() > end or not self._read(end - time.monotonic()):
                raise AssertionError(f"{text!r} never came; shown: {self.shown[self._seen :]!r}")
        return self.shown[self._seen :]

    def ask(self, keys: str, text: str, seconds: float = 30) -> str:
        self.type(keys)
        return self.wait_for(text, seconds)

    def type_until(self, keys: str, text: str) -> None:
        """Press keys until `text` is shown: Python's readline does not see a signal while it takes a key."""
        for _ in range(30):
            with suppress(AssertionError):
                self.ask(keys, text, seconds=1)
                return
        raise AssertionError(f"{text!r} never came; shown: {self.shown!r}")

    def end(self, seconds: float = 30) -> int:
        end = time.monotonic() + seconds
        while self._read(end - time.monotonic()):
            pass
        os.close(self._descriptor)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    @property
    def raw(self) -> str:
        return self._bytes.decode("utf-8", "ignore")

    def _read(self, seconds: float) -> bool:
        if not select.select([self._descriptor], [], [], max(0.0, seconds))[0]:
            return False
        try:
            data = os.read(self._descriptor, 65536)
        except OSError:  # the other side is closed
            return False
        self._bytes += data
        self.shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.raw.replace("\r", ""))
        return bool(data)
