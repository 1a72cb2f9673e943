"""Around every request: an id, a line on stderr, the figures, and an answer when nobody foresaw an error.

Who may ask: the Host header against DNS rebinding, and the key.
"""

from __future__ import annotations

import hmac
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..output import printable
from .metrics import Metrics
from .requests import ApiError
from .settings import ServerSettings, is_loopback

__all__ = ["Access", "AccessRecord", "HostGuard", "KeyGuard", "access_record", "host_name"]

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


def host_name(header: str) -> str:
    """The name in a Host header, in lower case, without port and brackets; "" for what is none."""
    name = header.strip().lower()
    if name.startswith("["):
        inside, _, rest = name[1:].partition("]")
        return inside if not rest or rest.startswith(":") else ""
    return name.rpartition(":")[0] if ":" in name else name


class HostGuard:
    """On a loopback address, answers only to loopback names and those that are allowed.

    A web page whose name was made to point to this machine is of the same origin as the server for a
    browser; the Host header gives it away. On other addresses names are not known, and all are let through.
    """

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self._app = app
        self._checks = is_loopback(settings.host)
        self._allowed = {name.lower() for name in settings.allowed_hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on or raise ApiError. HTTP/1.0 without the header is no browser."""
        header = Headers(scope=scope).get("host")
        if self._checks and header is not None:
            name = host_name(header)
            if not is_loopback(name) and name not in self._allowed:
                raise ApiError(
                    403,
                    "the Host header is no name of this server; call it by 127.0.0.1 or localhost, or "
                    "allow the name with --allow-host",
                    code="host_not_allowed",
                )
        await self._app(scope, receive, send)


class KeyGuard:
    """Asks for `Authorization: Bearer KEY` everywhere but on the open paths."""

    def __init__(self, app: ASGIApp, key: str, open_paths: frozenset[str]) -> None:
        self._app, self._open = app, open_paths
        self._expected = key.encode("utf-8")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on or raise ApiError."""
        if scope["path"] not in self._open:
            scheme, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
            right = hmac.compare_digest(given.strip().encode("latin-1"), self._expected)
            if scheme.lower() != "bearer" or not right:
                raise ApiError(
                    401,
                    "the key is missing or wrong; send Authorization: Bearer and the server's --api-key",
                    kind="authentication_error",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
        await self._app(scope, receive, send)
