"""Who may ask: the Host header against DNS rebinding, and the key."""

from __future__ import annotations

import hmac

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from .errors import ApiError
from .settings import ServerSettings, is_loopback

__all__ = ["HostGuard", "KeyGuard", "host_name"]


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
