"""From the worker's thread to the event loop: whatever happens to one request, in order.

One thread that runs jobs, one after the other, from a queue of bounded length.

A model computes one text at a time as fast as several: its stages use all the threads there are. What it does
not know: models, HTTP, event loops. A job is a function that yields steps; whoever wants them gives a
callback, which runs in the worker's thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

__all__ = ["Began", "Ended", "Job", "Mailbox", "QueueFullError", "Worker"]


class Mailbox:
    """Letters for one coroutine. Make it in the loop that reads it."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._letters: deque[Any] = deque()
        self._arrived = asyncio.Event()

    def put(self, letter: Any) -> None:
        """Leave a letter, from any thread; after the loop's end nobody reads it."""
        self._letters.append(letter)
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._arrived.set)

    async def take(self) -> list[Any]:
        """Wait until there are letters, and take all there are."""
        while not self._letters:
            self._arrived.clear()
            if not self._letters:
                await self._arrived.wait()
        taken = []
        while self._letters:
            taken.append(self._letters.popleft())
        return taken


class QueueFullError(Exception):
    """As many jobs wait as may."""


@dataclass(frozen=True)
class Began:
    """The job's turn has come."""


@dataclass(frozen=True)
class Ended:
    """The job's last word."""

    error: Exception | None = None
    """What its function raised; None when it came to its end."""


class Job:
    """One piece of work, and where its steps go."""

    def __init__(
        self,
        steps: Callable[[threading.Event], Generator[Any, None, None]],
        deliver: Callable[[Any], None],
    ) -> None:
        """steps(cancel): the work; it ends soon after `cancel` is set. deliver: gets `Began`, every step, and
        `Ended`, in this order and in the worker's thread; nothing when the job is withdrawn before its turn.
        """
        self.steps, self.deliver = steps, deliver
        self.cancel = threading.Event()


class Worker:
    """The queue and its thread."""

    def __init__(self, capacity: int, name: str = "worker") -> None:
        """capacity: jobs that may wait while one runs."""
        self._capacity = capacity
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._running: Job | None = None
        self._closed = False
        self._usual_seconds = 0.0  # that a job takes, as a moving mean; 0 before the first
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Jobs whose turn has not come."""
        return len(self._waiting)

    @property
    def idle(self) -> bool:
        """Whether nothing runs and nothing waits."""
        with self._changed:
            return self._running is None and not self._waiting

    @property
    def expected_wait(self) -> float:
        """Seconds until the jobs of now are done, by what jobs have taken."""
        return (self.waiting + (self._running is not None)) * self._usual_seconds

    def submit(self, job: Job) -> None:
        """Put a job at the queue's end. Raises QueueFullError."""
        with self._changed:
            if self._closed or len(self._waiting) + (self._running is not None) > self._capacity:
                raise QueueFullError
            self._waiting.append(job)
            self._changed.notify()

    def withdraw(self, job: Job) -> None:
        """End a job: one that waits is forgotten, one that runs is told to stop."""
        job.cancel.set()
        self.forget(job)

    def forget(self, job: Job) -> bool:
        """Take a job out of the queue; whether it was still there."""
        with self._changed:
            try:
                self._waiting.remove(job)
            except ValueError:
                return False
            return True

    def close(self, patience: float = 30.0) -> None:
        """Forget what waits, stop what runs, and wait at most `patience` seconds for its end."""
        with self._changed:
            self._closed = True
            self._waiting.clear()
            if self._running is not None:
                self._running.cancel.set()
            self._changed.notify()
        self._thread.join(patience)

    def _work(self) -> None:
        while (job := self._next()) is not None:
            started = time.monotonic()
            _run(job)
            seconds = time.monotonic() - started
            with self._changed:
                self._running = None
                share = 0.2 if self._usual_seconds else 1.0
                self._usual_seconds += share * (seconds - self._usual_seconds)
            del job  # its last steps would live until the next one comes

    def _next(self) -> Job | None:
        with self._changed:
            while not self._waiting and not self._closed:
                self._changed.wait()
            if self._closed:
                return None
            self._running = self._waiting.popleft()
            return self._running


def _run(job: Job) -> None:
    job.deliver(Began())
    error: Exception | None = None
    steps = job.steps(job.cancel)
    try:
        for step in steps:
            job.deliver(step)
    except Exception as raised:
        error = raised
    finally:
        steps.close()
    job.deliver(Ended(error))
