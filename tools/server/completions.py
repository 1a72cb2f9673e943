"""POST /v1/completions and /v1/chat/completions: one request from its body to the last byte of its answer.

Written on ASGI's own terms, because the client is watched while it waits: when it goes, its text is not worth
computing.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import anyio
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from .answers import DONE, AnswerDocument, Completion, event
from .body import read_json
from .connections import client_of
from .metrics import request_record
from .refusals import ApiError, ClientGoneError, late_body
from .requests import CompletionRequest, parse_completion
from .service import ChoiceChunk, Exchange, Service
from .settings import key_number

_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),  # proxies would collect bytes otherwise
]


Begin = Callable[[dict[str, Any], Service], Awaitable[tuple[CompletionRequest, AnswerDocument]]]
"""Makes of a request's JSON object what is to be run, and what is made of it. Raises ApiError."""


async def begin_completion(
    document: dict[str, Any], service: Service
) -> tuple[CompletionRequest, AnswerDocument]:
    """A completion: nothing is waited for."""
    request = parse_completion(document, service.facts)
    return request, Completion(request, service.facts.name)


class CompletionsEndpoint:
    """The endpoint, an ASGI application."""

    def __init__(self, service: Service, begin: Begin = begin_completion) -> None:
        self._service, self._begin = service, begin

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request. Raises ApiError as long as nothing was sent."""
        answer = _Answer(self._service, self._begin, scope, receive, send)
        limit = self._service.settings.timeout
        try:
            with anyio.fail_after(limit):
                await answer.run()
        except TimeoutError:
            error = late_body(limit)
            if answer.arrived:
                message = (
                    f"the request took longer than {limit:g} s; ask for less, or raise the server's --timeout"
                )
                headers = {"x-should-retry": "false"}  # OpenAI's client would ask again, for as long
                error = ApiError(504, message, "timeout", headers=headers)
            await answer.fail(error)
        except ApiError as error:
            await answer.fail(error)
        except ClientGoneError:
            request_record(scope).gone = True


class _Answer:
    # One request, and how far its answer is.

    def __init__(self, service: Service, begin: Begin, scope: Scope, receive: Receive, send: Send) -> None:
        self._begin = begin
        self._service, self._scope, self._receive, self._send = service, scope, receive, send
        self._arrived = time.monotonic()
        self._first_byte: float | None = None  # seconds after that
        self._streaming = self._sending = False
        self.arrived = False
        """Whether its body has."""

    async def run(self) -> None:
        service = self._service
        document = await read_json(Request(self._scope, self._receive), service.settings.max_body)
        self.arrived = True
        request, completion = await self._begin(document, service)
        address = self._scope["client"]
        client, key = client_of(address) if address else None, key_number(self._scope)
        async with service.compiler.compiled(
            request.options, request.constraint_field, self._receive, (key, client)
        ):
            exchange = Exchange(service, request, key, self._receive, client)
            try:
                if request.stream:
                    await self._stream(exchange, completion, request.include_usage)
                else:
                    await self._whole(exchange, completion)
            finally:
                exchange.close()
        service.metrics.whole.observe(self._seconds)

    async def _whole(self, exchange: Exchange, completion: AnswerDocument) -> None:
        async for pieces in self._pieces(exchange):
            for piece in pieces:
                completion.chunks(piece)
        queued = (exchange.began or self._arrived) - self._arrived
        times = {"queue": queued, "first-byte": self._first_byte or 0.0, "total": self._seconds}
        timing = ", ".join(f"{name};dur={1000 * seconds:.1f}" for name, seconds in times.items())
        response = JSONResponse(completion.document, headers={"Server-Timing": timing})
        self._sending = True
        await response(self._scope, self._receive, self._send)

    async def _stream(self, exchange: Exchange, completion: AnswerDocument, include_usage: bool) -> None:
        async for pieces in self._pieces(exchange):
            await self._send_part(
                b"".join(event(one) for piece in pieces for one in completion.chunks(piece))
            )
        await self._send_part((event(completion.usage_chunk) if include_usage else b"") + DONE)
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _pieces(self, exchange: Exchange) -> AsyncIterator[list[ChoiceChunk]]:
        async for pieces in exchange.batches():
            if self._first_byte is None:
                self._first_byte = self._seconds
                self._service.metrics.first_byte.observe(self._first_byte)
            yield pieces

    async def _send_part(self, body: bytes) -> None:
        # The status is sent with the first text, so that whatever fails before has one of its own.
        if not self._streaming:
            self._streaming = True
            await self._send({"type": "http.response.start", "status": 200, "headers": _STREAM_HEADERS})
        await self._send({"type": "http.response.body", "body": body, "more_body": True})

    @property
    def _seconds(self) -> float:
        return time.monotonic() - self._arrived

    async def fail(self, error: ApiError) -> None:
        """Tell the client: as an event where a stream has begun."""
        if not self._streaming and not self._sending:
            raise error
        request_record(self._scope).error = error.status
        if self._sending:
            return  # the connection is closed
        with anyio.move_on_after(1.0):  # one that does not read is not waited for
            await self._send({"type": "http.response.body", "body": event(error.document), "more_body": True})
            await self._send({"type": "http.response.body", "body": b"", "more_body": False})
