"""A function in a process of its own, so that its memory, crash or hang is not ours: the one protocol for it.

The child's end is `child_main`. Here are its start, requests and messages, deadlines and deaths; and one call
of a module's `work` in a process that is gone afterwards (`run_child`). `worker` keeps a process for many.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import BltError, BltWarning, OptionError, ran_out_of_memory
from .files import uninterrupted

__all__ = ["ChildProcess", "Deadline", "Outcome", "Tell", "run_child", "told_error"]

Tell = Callable[[Mapping[str, Any]], None]
"""Sends an event to the parent; may be called from any thread."""

# The current directory is no place for Python to look for modules; 3.10 has no variable that says so.
_SERVE = (
    "import sys; sys.path[0] or sys.path.pop(0); "
    "from blt_edge.runtime import child_main as m; getattr(m, sys.argv[1])(*sys.argv[2:])"
)


@dataclass(frozen=True)
class Outcome:
    """How a child ended: one of the first three is not None."""

    result: dict[str, Any] | None = None
    """What its function returned."""
    error: Exception | None = None
    """An error that was foreseen: BltError, OptionError, OSError or MemoryError, with the child's words."""
    death: str | None = None
    """How it died, in words that follow "its process": "crashed (SIGSEGV)", "ended with code 1: ..."."""
    log: str = ""
    """What it and its libraries wrote on stderr."""


def run_child(
    module: str,
    request: Mapping[str, Any],
    listen: Callable[[dict[str, Any]], None] | None = None,
    *,
    patience: float | None = None,
    folder: Path | None = None,
) -> Outcome:
    """Call `work(request, tell)` of a module by its full name, in a process that is gone when this returns.

    listen: gets what the function tells. patience: seconds after which the child is killed; None waits.
    folder: the directory it runs in, and may write to; None is ours.
    Raises what `listen` raises; Ctrl-C and termination pass through.
    """
    with ChildProcess(["serve_once", module], folder) as process, process.deadline(patience) as deadline:
        process.send(request)
        last = process.receive(listen)
    if last is None:
        death = f"gave no answer within {patience:g} s" if deadline.expired else process.death
        return Outcome(death=death, log=process.log)
    return Outcome(last.get("result"), told_error(last.get("error")), log=process.log)


class Deadline:
    """A context after which something is done to what takes too long."""

    def __init__(self, seconds: float | None, expire: Callable[[], None]) -> None:
        """seconds: None waits for ever. expire: called in a thread of its own."""
        self.expired = False
        self._expire = expire
        self._timer = None if seconds is None else threading.Timer(seconds, self._late)

    def _late(self) -> None:
        self.expired = True
        self._expire()

    def __enter__(self) -> Deadline:
        if self._timer is not None:
            self._timer.daemon = True
            self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer.join()  # whether it expired is certain afterwards


class ChildProcess:
    """The parent's end of a process that serves requests, in a context at whose end it is gone.

    One thread at a time may use it, but for a deadline's.
    """

    def __init__(self, arguments: list[str], folder: Path | None = None) -> None:
        """arguments: a function of `child_main`, and what that takes. folder: the directory it runs in, and
        may write to; None is ours. Raises OSError."""
        self.log = ""
        """What it and its libraries wrote on stderr, once it has ended."""
        self._log = _new_log()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _SERVE, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                cwd=folder,
                # Also for what it starts.
                env={**os.environ, "PYTHONSAFEPATH": "1"},
            )
        except BaseException:
            self._log.close()
            raise
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._requests, self._messages = self._process.stdin, self._process.stdout

    def __enter__(self) -> ChildProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def deadline(self, seconds: float | None) -> Deadline:
        """A context that kills the process when it takes longer."""
        return Deadline(seconds, self._process.kill)

    def send(self, request: Any) -> None:
        """Write a request; what is gone takes none."""
        line = json.dumps(request).encode() + b"\n"
        with suppress(OSError):  # BrokenPipeError, or on Windows another
            self._requests.write(line)
            self._requests.flush()

    def receive(
        self, listen: Callable[[dict[str, Any]], None] | None = None, most: int = -1
    ) -> dict[str, Any] | None:
        """The message that ends a request; None where the process died, or wrote a line of `most` bytes.

        listen: gets the events before it.
        """
        while (line := self._messages.readline(most)).endswith(b"\n"):
            message: dict[str, Any] = json.loads(line)
            if "warning" in message:
                warnings.warn(message["warning"], BltWarning, stacklevel=4)
            elif "event" not in message:
                return message
            elif listen is not None:
                listen(message["event"])
        if most < 0 or len(line) < most:
            self._process.wait()
        return None

    def forget_log(self) -> None:
        """Drop what was written on stderr; only between requests."""
        if self._log.seek(0, os.SEEK_END):
            self._log.truncate(0)
            self._log.seek(0)  # its place is the process's, too

    def end(self) -> None:
        """Kill it, if it runs, and read its log. Again, it does nothing."""
        if self._log.closed:
            return
        with uninterrupted():
            self._process.kill()
            self._process.wait()
            for pipe in (self._requests, self._messages):
                with suppress(OSError):
                    pipe.close()
            self._log.seek(0)
            self.log = self._log.read().decode("utf-8", "replace")
            self._log.close()

    def abandon(self) -> None:
        """Let go of a process that is another's, because this one is a fork of that."""
        nowhere = os.open(os.devnull, os.O_RDWR)
        # Not closed: their locks may be held by threads that are not here.
        for file in (self._requests, self._messages, self._log):
            os.dup2(nowhere, file.fileno(), inheritable=False)
        os.close(nowhere)
        self._process.returncode = 0

    @property
    def death(self) -> str:
        """How it died, once it has ended, in words that follow "its process"."""
        status, log = self._process.returncode, self.log
        if status == -getattr(signal, "SIGKILL", 9):
            return "was killed, most likely because memory ran out"
        if status < 0 and ran_out_of_memory(RuntimeError(log)):
            return "ran out of memory"
        if status < 0:
            known = -status in set(signal.Signals)
            return f"crashed ({signal.Signals(-status).name if known else f'signal {-status}'})"
        lines = log.strip().splitlines()
        return f"ended early with code {status}" + (f": {lines[-1]}" if lines else "")


def _new_log() -> Any:
    """A file without a name; in memory where nothing can be written, as in many a container."""
    try:
        return tempfile.TemporaryFile(buffering=0)
    except OSError:
        if not hasattr(os, "memfd_create"):
            raise
        return os.fdopen(os.memfd_create("log"), "w+b", buffering=0)


def told_error(told: Mapping[str, Any] | None) -> Exception | None:
    """The error that a message tells of."""
    if told is None:
        return None
    if told["kind"] == "system":
        return OSError(*told["arguments"])
    kinds: dict[str, type[Exception]] = {"usage": OptionError, "memory": MemoryError}
    return kinds.get(told["kind"], BltError)(told["message"])
