"""What the worker does for one request: every choice, one after the other, as pieces of text.

A choice is what `BltModel.stream` makes of the prompt and the choice's options, which is what `blt-edge
generate` prints. Where the prompt is told of, too, it is read here first, in the same passes.

One model behind a queue: what all requests share, and one request's way through it.

What it does not know: routes, headers, JSON.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Generator
from dataclasses import dataclass, replace
from typing import Any

from starlette.types import Receive

from ...runtime import (
    BltError,
    BltModel,
    ByteDetail,
    FinishReason,
    GenerationChunk,
    GenerationOptions,
    GenerationStats,
    OptionError,
    PromptTooLongError,
    Sequence,
)
from ...runtime.scoring import likelihood
from ...runtime.vocabulary import BYTE_OFFSET, encode
from .metrics import Metrics
from .requests import ApiError, ClientGoneError, CompletionRequest, ModelFacts, invalid, retry_after
from .settings import ServerSettings
from .worker import Began, Ended, Job, Mailbox, QueueFullError, Worker

__all__ = ["Exchange", "Piece", "Service", "generate_pieces"]


@dataclass(frozen=True)
class Piece:
    """A piece of one choice."""

    choice: int
    """Index of the choice."""
    chunk: GenerationChunk
    """Its text; the last one of a choice has its finish reason and figures."""
    prompt: tuple[ByteDetail, ...] | None = None
    """In a choice's first piece, where the request asks for it: the prompt's bytes."""


def generate_pieces(
    model: BltModel, request: CompletionRequest, cancel: threading.Event
) -> Generator[Piece, None, None]:
    """All choices in order; when `cancel` is set, the last piece says "cancelled". Raises BltError."""
    for index, (prompt, options) in enumerate(request.choices):
        if not request.reads_prompt and not request.score_only:
            for chunk in model.stream(prompt, options, cancel=cancel):
                yield Piece(index, chunk)
        else:
            yield from _with_prompt(model, index, prompt, options, request.score_only, cancel)
        if cancel.is_set():
            return


def _with_prompt(
    model: BltModel,
    index: int,
    prompt: bytes,
    options: GenerationOptions,
    score_only: bool,
    cancel: threading.Event,
) -> Generator[Piece, None, None]:
    started = time.perf_counter()
    sequence = model.sequence()
    details: tuple[ByteDetail, ...] | None = _read_prompt(sequence, prompt, options.logprobs, cancel)
    read = _stats_of_prompt(sequence, len(prompt), time.perf_counter() - started)
    if cancel.is_set() or score_only:
        reason: FinishReason = "cancelled" if cancel.is_set() else "length"
        yield Piece(index, GenerationChunk("", b"", reason, read), details)
        return
    for chunk in model.stream(b"", options, sequence=sequence, cancel=cancel):
        stats = None if chunk.stats is None else _together(read, chunk.stats)
        yield Piece(index, replace(chunk, stats=stats), details)
        details = None


def _read_prompt(
    sequence: Sequence, prompt: bytes, logprobs: int | None, cancel: threading.Event
) -> tuple[ByteDetail, ...]:
    """Read BOS and the prompt; what was known of each byte before it. Some only if `cancel` is set."""
    likely: list[tuple[float | None, tuple[tuple[int, float], ...]]] = []
    for result in sequence.extend(encode(prompt)):
        if cancel.is_set():
            break
        if logprobs is not None:
            known = prompt[len(likely) : len(likely) + len(result.logits)]  # the last row is of a new byte
            likely += [
                likelihood(row, byte + BYTE_OFFSET, logprobs)
                for row, byte in zip(result.logits, known, strict=False)
            ]
    starts, entropies = set(sequence.boundaries.starts), sequence.entropies
    return tuple(
        ByteDetail(
            byte=byte,
            position=place,
            starts_patch=place + 1 in starts,
            entropy=None if entropies is None else float(entropies[place]),
            guessed=False,
            logprob=likely[place][0] if likely else None,
            top=likely[place][1] if likely else (),
        )
        for place, byte in enumerate(prompt[: sequence.length - 1])
    )


def _stats_of_prompt(sequence: Sequence, prompt_bytes: int, seconds: float) -> GenerationStats:
    return GenerationStats(
        prompt_bytes=prompt_bytes,
        new_bytes=0,
        patches=len(sequence.boundaries.patch_lengths()),
        prefill_seconds=seconds,
        first_byte_seconds=seconds,
        decode_seconds=0.0,
        stage_seconds={name: spent.seconds for name, spent in sequence.times.items()},
        stage_calls={name: spent.calls for name, spent in sequence.times.items()},
        state_bytes=sequence.state_bytes,
    )


def _together(read: GenerationStats, made: GenerationStats) -> GenerationStats:
    """Figures of a generation whose prompt was read before it began."""
    return replace(
        made,
        prompt_bytes=read.prompt_bytes,
        patches=read.patches + made.patches,
        prefill_seconds=read.prefill_seconds + made.prefill_seconds,
        first_byte_seconds=read.first_byte_seconds + made.first_byte_seconds,
        stage_seconds={name: read.stage_seconds[name] + spent for name, spent in made.stage_seconds.items()},
        stage_calls={name: read.stage_calls[name] + calls for name, calls in made.stage_calls.items()},
    )


Report = Callable[[Exception], None]
"""Told of an error that nobody foresaw."""


class Service:
    """The model, its worker, and whether the server goes on. Its methods belong to the event loop."""

    def __init__(self, model: BltModel, settings: ServerSettings, report: Report) -> None:
        self.model, self.settings, self.report = model, settings, report
        self.worker = Worker(settings.queue, "generating")
        self.metrics = Metrics(self.worker)
        self.facts = ModelFacts(
            settings.name,
            model.limits.max_positions,
            GenerationOptions(temperature=1.0, draft=settings.draft, draft_length=settings.draft_length),
        )
        self.created = int(time.time())
        self._exchanges: set[Exchange] = set()
        self._stops_at: float | None = None

    @property
    def stopping(self) -> bool:
        """Whether new requests are refused."""
        return self._stops_at is not None

    @property
    def finished(self) -> bool:
        """Whether, being told to stop, there is nothing left to wait for."""
        if self._stops_at is None:
            return False
        return time.monotonic() >= self._stops_at or (self.worker.idle and not self._exchanges)

    def stop(self) -> None:
        """Refuse what comes from now on; told again, wait no longer for what was accepted."""
        grace = self.settings.grace if self._stops_at is None else 0.0
        self._stops_at = time.monotonic() + grace

    def cut(self) -> None:
        """End whatever still goes on."""
        for exchange in self._exchanges:
            exchange.fail(_stopped())

    def close(self) -> None:
        """End the worker."""
        self.worker.close()

    def open(self, request: CompletionRequest, receive: Receive) -> Exchange:
        """Put a request into the queue; close what is returned. Raises ApiError when it is full."""
        if self.stopping:
            raise _stopped()
        exchange = Exchange(self, request, receive)
        self._exchanges.add(exchange)
        return exchange

    def forget(self, exchange: Exchange) -> None:
        """An exchange has ended."""
        self._exchanges.discard(exchange)

    def pieces(self, request: CompletionRequest, cancel: threading.Event) -> Generator[Piece, None, None]:
        """The request's pieces, counted; runs in the worker's thread."""
        for piece in generate_pieces(self.model, request, cancel):
            if piece.chunk.stats is not None:
                self.metrics.prompt_bytes.inc(piece.chunk.stats.prompt_bytes)
                self.metrics.new_bytes.inc(piece.chunk.stats.new_bytes)
            yield piece


class Exchange:
    """One request between its client and the worker. All that may happen to it arrives in one mailbox."""

    def __init__(self, service: Service, request: CompletionRequest, receive: Receive) -> None:
        """Raises ApiError when the queue is full."""
        self._service, self._mailbox = service, Mailbox()
        self._job = Job(lambda cancel: service.pieces(request, cancel), self._mailbox.put)
        self.submitted = time.monotonic()
        self.began: float | None = None
        try:
            service.worker.submit(self._job)
        except QueueFullError:
            raise ApiError(
                429,
                f"{service.worker.waiting} requests wait already; come again later, or raise --queue",
                kind="rate_limit_error",
                code="queue_full",
                headers=retry_after(service.worker.expected_wait / 2),  # half of the queue is room enough
            ) from None
        self._watch = asyncio.create_task(self._wait_for_end(receive))
        self._timer = asyncio.get_running_loop().call_later(service.settings.queue_timeout, self._overdue)

    async def batches(self) -> AsyncIterator[list[Piece]]:
        """The pieces as they come, all there are at a time. Raises ApiError, ClientGoneError."""
        while True:
            pieces, ended = [], False
            for letter in await self._mailbox.take():
                if isinstance(letter, Piece):
                    pieces.append(letter)
                elif isinstance(letter, Began):
                    self.began = time.monotonic()
                    self._timer.cancel()
                elif isinstance(letter, Ended):
                    if letter.error is not None:
                        raise self._told(letter.error)
                    ended = True
                else:
                    raise letter
            if pieces:
                yield pieces
            if ended:
                return

    def fail(self, error: ApiError | ClientGoneError) -> None:
        """End it with an error."""
        self._service.worker.withdraw(self._job)
        self._mailbox.put(error)

    def close(self) -> None:
        """Nobody reads on: the queue forgets it, or the worker stops."""
        self._timer.cancel()
        self._watch.cancel()
        self._service.worker.withdraw(self._job)
        self._service.forget(self)

    async def _wait_for_end(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.fail(ClientGoneError())

    def _overdue(self) -> None:
        worker, limit = self._service.worker, self._service.settings.queue_timeout
        if self.began is None and worker.forget(self._job):
            message = f"the request's turn did not come within {limit:g} s; come again later"
            headers = retry_after(worker.expected_wait)
            self.fail(ApiError(503, message, kind="server_error", code="queue_timeout", headers=headers))

    def _told(self, error: Exception) -> ApiError:
        if isinstance(error, (OptionError, PromptTooLongError)):
            return invalid(str(error))
        if not isinstance(error, BltError):
            self._service.report(error)
            return ApiError(500, "the server failed", kind="server_error", code="internal_error")
        return ApiError(500, str(error), kind="server_error", code="model_error")


def _stopped() -> ApiError:
    headers: dict[str, Any] = {**retry_after(5), "Connection": "close"}
    return ApiError(503, "the server is stopping", kind="server_error", code="stopping", headers=headers)
