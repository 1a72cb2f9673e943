"""A function that strangers' input is given to, in a process that is kept for one call after another.

A call that hangs, crashes or takes too much memory costs that process; the next call gets a new one. What
this does not know: what the functions do.
"""

from __future__ import annotations

import os
import sys
import threading
import weakref
from typing import Any

from .child import ChildProcess, told_error
from .errors import BltError, first_line

__all__ = ["Worker", "WorkerBusyError", "WorkerDiedError", "WorkerError", "WorkerTimeoutError"]

_START_PATIENCE = 60.0  # from a slow disk a first import of numpy takes a Raspberry Pi ten seconds
_QUEUE_PATIENCE = 5.0


class WorkerError(BltError):
    """A call came to no answer. What happened, in words that follow the function's name, or "it"."""


class WorkerTimeoutError(WorkerError):
    """It took longer than it may."""


class WorkerDiedError(WorkerError):
    """Its process took more memory than it may, crashed, or ended for a reason that was not foreseen."""


class WorkerBusyError(WorkerError):
    """Others' calls took too long for this one to have its turn."""


class Worker:
    """One function, called in one process, by any threads of ours and one call at a time.

    The process is started by the first call, and again by the one after it died; it ends with ours, or with
    this object. A fork of our process starts its own.

    Linux bounds its address space. Windows and macOS do not: there its memory is bounded only by what it can
    take within its time.
    """

    def __init__(self, function: str, *, memory: int, largest: int = 16 << 20) -> None:
        """function: "package.module:name", taking what `ask` gets and returning what json can write; it is
        imported by its full name, with our environment's PYTHONPATH. memory: bytes that it may take beyond
        those it has once the module is imported. largest: bytes of an answer, as JSON."""
        self.function, self.memory, self.largest = function, memory, largest
        self._lock = threading.Lock()
        self._process: ChildProcess | None = None
        self._end: weakref.finalize[[], Any] | None = None
        _workers.add(self)

    def ask(self, request: Any, patience: float) -> Any:
        """What the function returns. request: what json can write. patience: seconds that it may take; they
        count from when the process is there and nobody else's call is in it.

        Raises `WorkerTimeoutError` after them, `WorkerDiedError`, `WorkerBusyError` where others' calls are
        in its way for 5 s longer than that; and BltError, OptionError or OSError that the function raised.
        """
        if not self._lock.acquire(timeout=patience + _QUEUE_PATIENCE):
            raise WorkerBusyError("is busy with others' calls that take long; try again later")
        try:
            return self._ask(request, patience)
        finally:
            self._lock.release()

    def close(self) -> None:
        """End the process; another call starts a new one."""
        with self._lock:
            self._stop()

    def _ask(self, request: Any, patience: float) -> Any:
        if self._process is not None and not self._process.running:
            self._stop()
        if self._process is None:
            self._start()
        process, message = self._process, {"patience": patience, "request": request}
        assert process is not None
        answered = False
        try:
            answer = self._answer(process, patience, message)
            answered = "error" not in answer or answer["error"]["kind"] != "memory"
        finally:
            if not answered:
                self._stop()
        told = told_error(answer.get("error"))
        if isinstance(told, MemoryError):
            raise WorkerDiedError(self._too_much)
        if told is not None:
            raise told
        return answer["result"]

    @property
    def _too_much(self) -> str:
        return f"takes more than the {self.memory >> 20} MiB of memory that it may take"

    def _answer(self, process: ChildProcess, patience: float, message: Any = None) -> dict[str, Any]:
        """The message that ends a request, or the start. What is raised leaves the process of no use."""
        with process.deadline(patience) as deadline:
            if message is not None:
                process.send(message)
            last = process.receive(most=self.largest)
        if last is None:
            oversized = process.running
            process.end()
            if deadline.expired:
                raise WorkerTimeoutError(f"takes more than {patience:g} s")
            if oversized:
                raise WorkerDiedError(f"gives an answer of more than {self.largest} bytes")
            death = process.death
            raise WorkerDiedError(self._too_much if death == "ran out of memory" else death)
        if deadline.expired:  # in the moment of the answer
            process.end()
        else:
            process.forget_log()
        return last

    def _start(self) -> None:
        try:
            self._process = ChildProcess(["serve_many", self.function, str(self.memory)])
        except OSError as error:
            raise WorkerDiedError(f"gets no process: {first_line(error)}") from None
        self._end = weakref.finalize(self, self._process.end)
        started = False
        try:
            told = told_error(self._answer(self._process, _START_PATIENCE).get("error"))
            if told is not None:
                raise told
            started = True
        finally:
            if not started:
                self._stop()

    def _stop(self) -> None:
        if self._process is not None and self._end is not None:
            self._process.end()
            self._end.detach()
        self._process = self._end = None

    def _forked(self) -> None:
        """In a fork: the process is our parent's, and its threads are not here."""
        self._lock = threading.Lock()
        if self._process is not None:
            self._process.abandon()
        if self._end is not None:
            self._end.detach()
        self._process = self._end = None


_workers: weakref.WeakSet[Worker] = weakref.WeakSet()


def _forget_processes() -> None:
    for worker in _workers:
        worker._forked()


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_forget_processes)
