"""One model behind a queue: what all requests share, and one request's way through it.

A model computes one text at a time as fast as several, because its stages use all the threads there are: so
one thread runs jobs, one after the other, from a queue of bounded length.
What it does not know: routes, headers, JSON.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator
from dataclasses import dataclass
from typing import Any

from starlette.types import Receive

from ...runtime import BltError, BltModel, GenerationChunk, OptionError, PromptTooLongError
from ...runtime.host import release_memory
from ...runtime.prefix_tree import common_prefix
from .metrics import Metrics
from .requests import ApiError, ClientGoneError, CompletionRequest, ModelFacts, invalid, retry_after
from .settings import ServerSettings, request_defaults
from .stores import StoreMetrics, Stores

_RELEASE_SECONDS = 2.0

MOST_UNSENT = 4096
"""Bytes of a request's text that are made before the client has taken those before them: each may take some
3 KB of memory with all that is told of it."""

# 1. The queue and its thread.


class QueueFullError(Exception):
    """As many jobs wait as may."""


class Job:
    """One piece of work, and where its steps go."""

    def __init__(
        self, steps: Callable[[threading.Event], Generator[Any, None, None]], deliver: Callable[[Any], None]
    ) -> None:
        """steps(cancel): the work; it ends soon after `cancel` is set. deliver: gets, in the queue's
        thread, every step, then None or what the work raised; nothing of a job withdrawn before its turn.
        """
        self.steps, self.deliver = steps, deliver
        self.cancel = threading.Event()
        self.began: float | None = None
        """When its turn came, time.monotonic() seconds."""

    def run(self) -> None:
        self.began = time.monotonic()
        last: Exception | None = None
        try:
            with contextlib.closing(self.steps(self.cancel)) as steps:
                for step in steps:
                    self.deliver(step)
        except Exception as error:
            last = error
        self.deliver(last)


class JobQueue:
    """Jobs that wait, and a thread that runs one after the other. What is in them it does not know."""

    def __init__(self, capacity: int, name: str = "jobs") -> None:
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
        return len(self._waiting)

    @property
    def idle(self) -> bool:
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
            there = job in self._waiting
            if there:
                self._waiting.remove(job)
            return there

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
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return
                job = self._running = self._waiting.popleft()
            job.run()
            assert job.began is not None
            seconds = time.monotonic() - job.began
            with self._changed:
                self._running = None
                share = 0.2 if self._usual_seconds else 1.0
                self._usual_seconds += share * (seconds - self._usual_seconds)
            del job  # its last steps would live until the next one comes


# 2. The service, and the way of a request through it.


@dataclass(frozen=True)
class ChoiceChunk:
    choice: int
    """Index of the choice."""
    chunk: GenerationChunk
    """Its text; the last one of a choice has its finish reason and figures."""


class Service:
    """The model, its queue, and whether the server goes on. Its methods belong to the event loop."""

    def __init__(
        self, model: BltModel, settings: ServerSettings, report: Callable[[Exception], None]
    ) -> None:
        """report: told of errors that nobody foresaw."""
        self.model, self.settings, self.report = model, settings, report
        self.queue = JobQueue(settings.queue, "generating")
        self.stores = Stores(model, settings.cache_memory, settings.api_keys)
        self.metrics = Metrics(lambda: self.queue.waiting, StoreMetrics(lambda: self.stores.figures))
        self.facts = ModelFacts(settings.name, model.limits.max_positions, request_defaults(model, settings))
        self.created = int(time.time())
        self.exchanges: set[Exchange] = set()
        """Requests that are being answered."""
        self._stops_at: float | None = None
        self._released = time.monotonic()

    @property
    def stopping(self) -> bool:
        """Whether new requests are refused."""
        return self._stops_at is not None

    @property
    def finished(self) -> bool:
        """Whether, being told to stop, there is nothing left to wait for."""
        if self._stops_at is None:
            return False
        return time.monotonic() >= self._stops_at or (self.queue.idle and not self.exchanges)

    def stop(self) -> None:
        """Refuse what comes from now on; told again, wait no longer for what was accepted."""
        grace = self.settings.grace if self._stops_at is None else 0.0
        self._stops_at = time.monotonic() + grace

    def close(self) -> None:
        """Stop the queue, and keep what was read for the next time, where there is a place for it."""
        self.queue.close()
        self.stores.close()

    def cut(self) -> None:
        """End whatever still goes on."""
        for exchange in self.exchanges:
            exchange.fail(_stopped())

    def work(
        self, request: CompletionRequest, key: int, cancel: threading.Event
    ) -> Generator[ChoiceChunk, None, None]:
        """The text of all choices in order, each as `blt-edge generate` prints it, and counted.

        key: the number of the one that was sent. Runs in the queue's thread; when `cancel` is set, the last
        piece says "cancelled". Raises BltError.
        """
        store, n = self.stores[key], request.n
        for place, prompt in enumerate(request.prompts):
            following = b"".join(request.prompts[place + 1 : place + 2])
            parting = common_prefix(prompt, following)
            pieces = store.stream_choices(prompt, request.options, n=n, cancel=cancel, marks=[parting])
            with contextlib.closing(pieces):
                for number, chunk in pieces:
                    if chunk.stats is not None:
                        self.metrics.prompt_bytes.inc(chunk.stats.prompt_bytes - chunk.stats.reused_bytes)
                        self.metrics.new_bytes.inc(chunk.stats.new_bytes)
                    yield ChoiceChunk(place * n + number, chunk)
            if cancel.is_set():
                break
        # Seldom: it takes milliseconds.
        if time.monotonic() - self._released > _RELEASE_SECONDS:
            release_memory()
            self._released = time.monotonic()


class Exchange:
    """One request between its client and the queue. All that happens to it arrives in one place, in order."""

    def __init__(self, service: Service, request: CompletionRequest, key: int, receive: Receive) -> None:
        """Puts the request into the queue; `close` it at the end. Raises ApiError when it can't be taken.

        key: the number of the one that was sent.
        """
        if service.stopping:
            raise _stopped()
        self._service, self._loop = service, asyncio.get_running_loop()
        self._arrivals: asyncio.Queue[ChoiceChunk | Exception | None] = asyncio.Queue()
        self._unsent, self._sent = 0, threading.Condition()
        self._job = Job(lambda cancel: service.work(request, key, cancel), self._step)
        try:
            service.queue.submit(self._job)
        except QueueFullError:
            raise ApiError(
                429,
                f"{service.queue.waiting} requests wait already; come again later, or raise --queue",
                "queue_full",
                headers=retry_after(service.queue.expected_wait / 2),  # half of the queue is room enough
            ) from None
        self._watch = asyncio.create_task(self._wait_for_end(receive))
        self._timer = self._loop.call_later(service.settings.queue_timeout, self._overdue)
        service.exchanges.add(self)

    @property
    def began(self) -> float | None:
        """When its turn came, time.monotonic() seconds."""
        return self._job.began

    async def batches(self) -> AsyncIterator[list[ChoiceChunk]]:
        """The pieces as they come, all there are at a time. Raises ApiError, ClientGoneError."""
        ended = False
        while not ended:
            arrived = [await self._arrivals.get()]
            while not self._arrivals.empty():
                arrived.append(self._arrivals.get_nowait())
            pieces = []
            for one in arrived:
                if isinstance(one, ChoiceChunk):
                    pieces.append(one)
                elif one is None:
                    ended = True
                else:
                    raise self._told(one)
            if pieces:
                yield pieces
                self._took(sum(map(_size, pieces)))

    def fail(self, error: ApiError | ClientGoneError) -> None:
        self._withdraw()
        self._deliver(error)

    def close(self) -> None:
        """Nobody reads on: the queue forgets it, or its work stops."""
        self._timer.cancel()
        self._watch.cancel()
        self._withdraw()
        self._service.exchanges.discard(self)

    def _withdraw(self) -> None:
        self._service.queue.withdraw(self._job)
        self._took(0)  # the thread need not wait for it

    def _took(self, size: int) -> None:
        with self._sent:
            self._unsent -= size
            self._sent.notify()

    def _step(self, arrival: ChoiceChunk | Exception | None) -> None:
        # In the queue's thread, which waits here for a client that does not keep up; one that takes nothing
        # at all is cut off (`connections.CLIENT_SECONDS`).
        if isinstance(arrival, ChoiceChunk):
            with self._sent:
                self._sent.wait_for(lambda: self._unsent < MOST_UNSENT or self._job.cancel.is_set())
                self._unsent += _size(arrival)
        self._deliver(arrival)

    def _deliver(self, arrival: ChoiceChunk | Exception | None) -> None:
        # From any thread.
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody reads on
            self._loop.call_soon_threadsafe(self._arrivals.put_nowait, arrival)

    async def _wait_for_end(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.fail(ClientGoneError())

    def _overdue(self) -> None:
        queue, limit = self._service.queue, self._service.settings.queue_timeout
        if queue.forget(self._job):
            message = f"the request's turn did not come within {limit:g} s; come again later"
            self.fail(ApiError(503, message, "queue_timeout", headers=retry_after(queue.expected_wait)))

    def _told(self, error: Exception) -> ApiError | ClientGoneError:
        if isinstance(error, (ApiError, ClientGoneError)):
            return error
        if isinstance(error, (OptionError, PromptTooLongError)):
            return invalid(str(error))
        if isinstance(error, BltError):
            return ApiError(500, str(error), "model_error")
        self._service.report(error)
        return server_failed()


def _size(piece: ChoiceChunk) -> int:
    chunk = piece.chunk
    return max(1, len(chunk.data)) + len(chunk.prompt_details)


def server_failed() -> ApiError:
    """What is told of an error that nobody foresaw."""
    return ApiError(500, "the server failed", "internal_error")


def _stopped() -> ApiError:
    headers = {**retry_after(5), "Connection": "close"}
    return ApiError(503, "the server is stopping", "stopping", headers=headers)
