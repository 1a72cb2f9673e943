"""One model behind a queue: what all requests share, and one request's way through it.

One thread makes all texts, a few at a time: a pass over the new bytes of several costs little more than one
over those of one, and takes all the threads there are.
What it does not know: routes, headers, JSON; whose turn it is (`jobs`).
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Hashable, Iterator
from dataclasses import dataclass
from functools import partial

from starlette.types import Receive

from ...runtime import BltError, BltModel, GenerationChunk, OptionError, PromptTooLongError
from ...runtime.batch import Batch
from ...runtime.chat_template import load_chat_template
from ...runtime.host import release_memory
from ...runtime.prefix_store import StoredChoices
from ...runtime.prefix_tree import common_prefix
from .compiling import Compiler
from .constraints import refused_constraint
from .jobs import Job, JobQueue, QueueFullError, Text, pause
from .metrics import Metrics
from .parallel import usual_parallel
from .refusals import ApiError, ClientGoneError, invalid, retry_after, server_stops
from .requests import CompletionRequest, ModelFacts
from .settings import ServerSettings, request_defaults
from .stores import StoreMetrics, Stores

_RELEASE_SECONDS = 2.0

MOST_UNSENT = 4096
"""Bytes of a request's text that are made before the client has taken those before them: each may take some
3 KB of memory with all that is told of it."""


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
        """report: told of errors that nobody foresaw. Raises OptionError where greenlet is not installed, or
        jinja2 for a chat template; BundleError for one that does not work."""
        self.model, self.settings, self.report = model, settings, report
        self.chat = load_chat_template(model.path, model.manifest)
        """What makes texts of conversations; None in a bundle without a chat template."""
        self.stores = Stores(model, settings.cache_memory, settings.api_keys)
        self.parallel = settings.parallel or usual_parallel(model, self.stores.memory)
        """Texts at work at a time."""
        self.metrics = Metrics(
            lambda: self.queue.waiting, lambda: self.queue.at_work, StoreMetrics(lambda: self.stores.figures)
        )
        self.queue = JobQueue(
            settings.queue,
            self._batch,
            self.parallel,
            report=report,
            waited=self.metrics.waited.observe,
            name="generating",
        )
        self.compiler = Compiler(
            settings.queue + self.parallel,
            settings.queue_timeout,
            lambda kind: self.metrics.constrained.labels(kind).inc(),
        )
        self.facts = ModelFacts(
            settings.name,
            model.limits.max_positions,
            request_defaults(model, settings),
            () if self.chat is None else self.chat.stop,
        )
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
        self.compiler.cut()
        for exchange in self.exchanges:
            exchange.fail(server_stops())

    def texts(
        self,
        request: CompletionRequest,
        key: int,
        deliver: Callable[[ChoiceChunk], None],
        cancel: threading.Event,
    ) -> Iterator[Text | None]:
        """The work on each choice, which is what `blt-edge generate` prints, and counted; None as long as the
        next one's prompt is being read.

        key: the number of the one that was sent. deliver: gets the pieces, in the queue's thread; when
        `cancel` is set, each text's last one says "cancelled". Raises BltError, as the texts do.
        """
        store, n = self.stores[key], request.n
        prompts, begun = deque(enumerate(request.prompts)), list[tuple[StoredChoices, deque[int], int]]()
        while prompts or begun:
            ready = next((one for one in begun if one[0].ready), None)
            if ready is not None:
                choices, numbers, first = ready
                number = numbers.popleft()
                if not numbers:
                    begun.remove(ready)
            elif prompts:
                place, prompt = prompts.popleft()
                parting = common_prefix(prompt, prompts[0][1] if prompts else b"")
                choices = store.choices(
                    prompt,
                    request.options,
                    n=n,
                    cancel=cancel,
                    marks=[parting],
                    when_ready=self.queue.look,
                )
                number, first = 0, place * n
                if n > 1:
                    begun.append((choices, deque(range(1, n)), first))
            else:
                yield None
                continue
            yield partial(self._text, choices, number, first, deliver)

    def _text(
        self, choices: StoredChoices, number: int, first: int, deliver: Callable[[ChoiceChunk], None]
    ) -> None:
        with contextlib.closing(choices.stream(number)) as pieces:
            for chunk in pieces:
                if chunk.stats is not None:
                    self.metrics.prompt_bytes.inc(chunk.stats.prompt_bytes - chunk.stats.reused_bytes)
                    self.metrics.new_bytes.inc(chunk.stats.new_bytes)
                deliver(ChoiceChunk(first + number, chunk))

    def tidy(self) -> None:
        """Give memory back, now and then: it takes milliseconds. Runs in the queue's thread."""
        if time.monotonic() - self._released > _RELEASE_SECONDS:
            release_memory()
            self._released = time.monotonic()

    def _batch(self) -> Batch:
        batch = self.model.batch()
        batch.observer = self.metrics.observe_pass
        return batch


class Exchange:
    """One request between its client and the queue. All that happens to it arrives in one place, in order."""

    def __init__(
        self,
        service: Service,
        request: CompletionRequest,
        key: int,
        receive: Receive,
        client: Hashable = None,
    ) -> None:
        """Puts the request into the queue; `close` it at the end. Raises ApiError when it can't be taken.

        key: the number of the one that was sent. client: who sends from there, None where that can't be told.
        """
        if service.stopping:
            raise server_stops()
        self._service, self._loop = service, asyncio.get_running_loop()
        self._arrivals: asyncio.Queue[list[ChoiceChunk] | Exception | None] = asyncio.Queue()
        self._held: list[ChoiceChunk] = []  # until the loop is told of them; the queue's thread alone has it
        self._hold = 0  # bytes that are held at most
        self._holds = 0 if request.stream else MOST_UNSENT // 4  # behind the first piece, which is timed
        self._unsent, self._counting = 0, threading.Lock()
        self._constraint_field = request.constraint_field
        self._job = Job(partial(service.texts, request, key, self._step), self._end, (key, client))
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
                if isinstance(one, list):
                    pieces += one
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

    def _took(self, size: int) -> None:
        with self._counting:
            kept_up = not self._is_behind()
            self._unsent -= size
            goes_on = not kept_up and not self._is_behind()
        if goes_on:
            self._service.queue.look()

    def _is_behind(self) -> bool:
        return self._unsent >= MOST_UNSENT

    def _step(self, piece: ChoiceChunk) -> None:
        # In a text's work, which waits here for a client that does not keep up; one that takes nothing at all
        # is cut off (`connections.CLIENT_SECONDS`).
        cancel = self._job.cancel
        pause(lambda: not self._is_behind() or cancel.is_set())
        with self._counting:
            self._unsent += _size(piece)
        self._held.append(piece)
        if sum(map(_size, self._held)) > self._hold:
            self._hand_over()
            self._hold = self._holds

    def _hand_over(self) -> None:
        # Seldom where nobody waits for pieces: the loop wakes up for each, beside the thread that makes them.
        held, self._held = self._held, []
        if held:
            self._deliver(held)

    def _end(self, error: Exception | None) -> None:
        self._hand_over()
        self._deliver(error)
        self._service.tidy()

    def _deliver(self, arrival: list[ChoiceChunk] | Exception | None) -> None:
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
        if isinstance(error, OptionError):  # a constraint, which can't be followed further
            return refused_constraint(error, self._constraint_field)
        if isinstance(error, PromptTooLongError):
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
