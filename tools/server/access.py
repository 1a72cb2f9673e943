"""Around every request: an id, a line on stderr, the figures, and an answer when nobody foresaw an error."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..cli.messages import printable
from .metrics import Metrics

__all__ = ["Access", "AccessRecord", "access_record"]

_GONE = 499
_KEY = "blt_edge.access"


@dataclass
class AccessRecord:
    """What became of one request."""

    status: int = _GONE
    """That was sent; 499 as long as none was."""
    bytes: int = 0
    """Of the body that was sent."""
    gone: bool = False
    """The client left before its answer was complete."""
    error: int | None = None
    """The status of an error that came after the answer had begun."""

    @property
    def final(self) -> int:
        """The status that counts."""
        return _GONE if self.gone else self.error or self.status


def access_record(scope: Scope) -> AccessRecord:
    """The record of the request of this scope."""
    record: AccessRecord = scope[_KEY]
    return record


class Access:
    """The outermost application. `route` names a path for the figures, so that their number is bounded."""

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        say: Callable[[str], None],
        report: Callable[[Exception], None],
        route: Callable[[str], str],
    ) -> None:
        """say: gets a line for each request. report: gets errors that nobody foresaw."""
        self._app, self._metrics, self._say = app, metrics, say
        self._report, self._route = report, route

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the application answer, and keep account."""
        started = time.monotonic()
        record = scope[_KEY] = AccessRecord()
        request_id = f"req-{secrets.token_hex(8)}"

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            else:
                record.bytes += len(message.get("body", b""))
            await send(message)

        self._metrics.in_flight.inc()
        try:
            await self._app(scope, receive, counted)
        except Exception as error:
            record.error = 500
            self._report(error)
        finally:
            self._metrics.in_flight.dec()
            self._account(scope, record, time.monotonic() - started)

    def _account(self, scope: Scope, record: AccessRecord, seconds: float) -> None:
        self._metrics.requests.labels(self._route(scope["path"]), str(record.final)).inc()
        path = printable(scope["path"])[:100]
        self._say(f"{scope['method']} {path} {record.final} {record.bytes} bytes {1000 * seconds:.0f} ms")
