"""The child's end of `child` and `worker`: requests come in, JSON lines go out, and it ends with its parent.

A request is a line of JSON on stdin. Lines that go out are {"event": ...}, {"warning": ...} for each
BltWarning, and at the end of a request {"result": ...}, or {"error": ...} for an error that was foreseen.
Anything else ends the process, with a traceback on stderr. Imports little, so that a child is there quickly.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from .errors import BltError, BltWarning, OptionError

__all__ = ["LARGEST_NOISE", "Channel", "serve_many", "serve_once"]

LARGEST_NOISE = 4 << 20
"""Bytes that a function which runs many times, and its libraries, may write on stderr or to a file."""
_ORPHANED = 3
_GRACE = 2.0
"""Seconds after which a child ends by itself that its parent should have ended."""


class Channel:
    """Where requests come from and messages go to; makes the process one that ends with its parent."""

    def __init__(self) -> None:
        # Ctrl-C reaches the whole terminal; the parent decides what becomes of us.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        # Libraries may print: the messages have a descriptor that nobody else knows.
        self._messages = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self._lock = threading.Lock()
        self._requests: SimpleQueue[bytes] = SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()
        self._usual, warnings.showwarning = warnings.showwarning, self._show

    def _read(self) -> None:
        # Not through sys.stdin, whose lock would keep the interpreter from ending.
        parts: list[bytes] = []
        while data := os.read(0, 1 << 16):
            *ends, rest = data.split(b"\n")
            for end in ends:
                self._requests.put(b"".join([*parts, end]))
                parts = []
            parts.append(rest)
        os._exit(_ORPHANED)

    def receive(self) -> Any:
        """The next request."""
        return json.loads(self._requests.get())

    def send(self, kind: str, content: Any) -> None:
        """Any thread may."""
        line = json.dumps({kind: content}) + "\n"
        with self._lock:
            self._messages.write(line)
            self._messages.flush()

    def answer(self, work: Callable[[], Any]) -> None:
        """Send what `work` returns, or what it raises where that was foreseen."""
        try:
            kind, content = "result", work()
        except BltError as error:
            usage = isinstance(error, OptionError)
            kind, content = "error", {"kind": "usage" if usage else "run", "message": str(error)}
        except MemoryError as error:
            kind, content = "error", {"kind": "memory", "message": str(error)}
        except OSError as error:
            arguments = [error.errno, error.strerror, error.filename]
            kind, content = "error", {"kind": "system", "arguments": arguments}
        for stream in (sys.stdout, sys.stderr):  # once it has this, the parent may end us and read the log
            stream.flush()
        self.send(kind, content)

    def _show(self, message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if issubclass(category, BltWarning):
            self.send("warning", str(message))
        else:
            self._usual(message, category, *where, **more)


def serve_once(module: str) -> None:
    """Read a request, call the module's `work(request, tell)`, report, and end the process."""
    channel = Channel()
    request = channel.receive()
    channel.answer(
        lambda: importlib.import_module(module).work(request, lambda event: channel.send("event", event))
    )
    # What engines would do on the way out is of no use to anybody.
    os._exit(0)


def serve_many(function: str, memory: str) -> None:
    """Call "module:function" for request after request, each {"patience": seconds, "request": ...}.

    memory: bytes that it may take beyond those it has once the module is imported. A first result, None, says
    that it has come so far.
    """
    channel = Channel()
    module, _, name = function.partition(":")
    # Found before it is told of: what is on stderr by then may be dropped.
    channel.answer(lambda: getattr(importlib.import_module(module), name) and None)
    call = getattr(sys.modules[module], name)
    _limit(int(memory))
    while True:
        asked = channel.receive()
        # The parent ends us sooner. Should it be gone, while a library's code lets no thread of Python run,
        # the system does.
        _alarm(asked["patience"] + _GRACE)
        channel.answer(lambda: call(asked["request"]))  # noqa: B023
        _alarm(0)


def _alarm(seconds: float) -> None:
    if hasattr(signal, "setitimer"):  # not on Windows
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, seconds)


def _limit(memory: int) -> None:
    """Bound what the process may take from now on, where the system does that."""
    try:
        import resource
    except ImportError:  # Windows
        return
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST_NOISE, LARGEST_NOISE))
    with suppress(OSError, ValueError):  # macOS counts no address space, and has no such file
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + memory, used + memory))
