"""POST /v1/completions: one request from its body to the last byte of its answer.

Written on ASGI's own terms, because the client is watched while it waits: when it goes, its text is not worth
computing.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator

import anyio
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from .access import access_record
from .answers import DONE, Answer, event
from .requests import ApiError, ClientGoneError, CompletionRequest, parse_completion, read_json
from .service import Exchange, Service

__all__ = ["Completions"]

_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),  # proxies would collect bytes otherwise
]


class Completions:
    """The endpoint, an ASGI application."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request. Raises ApiError as long as nothing was sent."""
        handling = _Handling(self._service, scope, receive, send)
        try:
            with anyio.fail_after(self._service.settings.timeout):
                await handling.run()
        except TimeoutError:
            await handling.fail(self._timed_out(handling.parsed))
        except ApiError as error:
            await handling.fail(error)
        except ClientGoneError:
            access_record(scope).gone = True

    def _timed_out(self, parsed: bool) -> ApiError:
        limit = self._service.settings.timeout
        if not parsed:
            message, headers = f"the body did not arrive within {limit:g} s", {"Connection": "close"}
            return ApiError(408, message, code="timeout", headers=headers)
        return ApiError(
            504,
            f"the request took longer than {limit:g} s; ask for less, or raise the server's --timeout",
            kind="server_error",
            code="timeout",
            headers={"x-should-retry": "false"},  # OpenAI's client would ask again, for as long
        )


class _Handling:
    # One request, and how far its answer is.

    def __init__(self, service: Service, scope: Scope, receive: Receive, send: Send) -> None:
        self._service, self._scope, self._receive, self._send = service, scope, receive, send
        self._arrived = time.monotonic()
        self._streaming = self._answered = False
        self.parsed = False

    async def run(self) -> None:
        service, metrics = self._service, self._service.metrics
        document = await read_json(Request(self._scope, self._receive), service.settings.max_body)
        request = parse_completion(document, service.facts)
        self.parsed = True
        exchange = service.open(request, self._receive)
        try:
            answer = Answer(request, service.facts.name)
            if request.stream:
                await self._stream(request, exchange, answer)
            else:
                await self._whole(exchange, answer)
        finally:
            exchange.close()
        metrics.whole.observe(time.monotonic() - self._arrived)

    async def _whole(self, exchange: Exchange, answer: Answer) -> None:
        first = None
        async for pieces in exchange.batches():
            if first is None:
                first = self._first_byte()
            for piece in pieces:
                answer.add(piece)
        queued = (exchange.began or self._arrived) - self._arrived
        times = {"queue": queued, "first-byte": first or 0.0, "total": time.monotonic() - self._arrived}
        timing = ", ".join(f"{name};dur={1000 * seconds:.1f}" for name, seconds in times.items())
        response = JSONResponse(answer.document, headers={"Server-Timing": timing})
        self._answered = True
        await response(self._scope, self._receive, self._send)

    async def _stream(self, request: CompletionRequest, exchange: Exchange, answer: Answer) -> None:
        # The status is sent with the first text, so that whatever fails before has one of its own.
        async for body in self._events(request, exchange, answer):
            if not self._streaming:
                self._streaming = True
                await self._send({"type": "http.response.start", "status": 200, "headers": _STREAM_HEADERS})
            await self._send({"type": "http.response.body", "body": body, "more_body": True})
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _events(
        self, request: CompletionRequest, exchange: Exchange, answer: Answer
    ) -> AsyncIterator[bytes]:
        first = True
        async for pieces in exchange.batches():
            if first:
                self._first_byte()
                first = False
            yield b"".join(event(answer.add(piece)) for piece in pieces)
        yield (event(answer.usage_chunk) if request.include_usage else b"") + DONE

    def _first_byte(self) -> float:
        seconds = time.monotonic() - self._arrived
        self._service.metrics.first_byte.observe(seconds)
        return seconds

    async def fail(self, error: ApiError) -> None:
        """Tell the client: as an event where a stream has begun."""
        if not self._streaming and not self._answered:
            raise error
        access_record(self._scope).error = error.status
        if self._answered:
            return  # the connection is closed
        with anyio.move_on_after(1.0):  # one that does not read is not waited for
            await self._send({"type": "http.response.body", "body": event(error.document), "more_body": True})
            await self._send({"type": "http.response.body", "body": b"", "more_body": False})
