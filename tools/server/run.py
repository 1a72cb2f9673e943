"""A running server: its socket, uvicorn around the application, and an orderly end.

What it does not know: routes, the model.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any

import uvicorn

from .app import create_app
from .connections import SEND_BUFFER, Connection, Connections, Listener, most_connections
from .service import Service

_LAST_SECONDS = 3
"""For connections to take their last bytes."""


def bind(host: str, port: int) -> Listener:
    """A TCP socket on the address, not listening yet; port 0 is any free one. Raises OSError."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except UnicodeError:  # a label of no or too many letters
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known") from None
    family, kind, protocol, _, address = found[0]
    bound = Listener(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except BaseException:
        bound.close()
        raise
    return bound


def run_server(
    service: Service, bound: Listener, *, say: Callable[[str], None], started: Callable[[], None]
) -> None:
    """Serve until SIGTERM, SIGINT or `service.stop`, then close the service. say: gets the access lines and
    uvicorn's warnings. started: called once it listens.
    """
    # Connections inherit these.
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # one that takes no more bytes ends
        patience = round(1000 * service.settings.timeout)
        bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, max(1, patience))
    bound.connections = Connections(most_connections(), say)
    try:
        asyncio.run(_Server(service, bound.connections, say, started).serve([bound]))
    finally:
        service.close()


class _Server(uvicorn.Server):
    """uvicorn, but a signal first lets what was accepted run on, and refuses with a status what is new."""

    def __init__(
        self,
        service: Service,
        connections: Connections,
        say: Callable[[str], None],
        started: Callable[[], None],
    ) -> None:
        _log_to(say)
        super().__init__(
            uvicorn.Config(
                create_app(service, say),
                http=partial(Connection, connections),  # type: ignore[arg-type]
                ws="none",
                lifespan="off",
                interface="asgi3",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                timeout_graceful_shutdown=_LAST_SECONDS,
            )
        )
        self._service, self._say, self._started = service, say, started
        self._told = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().set_exception_handler(self._unforeseen)
        await super().startup(sockets)
        self._started()

    def _unforeseen(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        # One line, where asyncio would print a traceback each time.
        self._service.report(context.get("exception") or RuntimeError(context["message"]))

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal: stop, and when it comes again, at once."""
        self._service.stop()

    async def on_tick(self, counter: int) -> bool:
        """Every tenth of a second: whether to leave."""
        leave = await super().on_tick(counter)
        if self._service.stopping and not self._told:
            self._told = True
            if not self._service.finished:
                grace = self._service.settings.grace
                self._say(f"stopping: what was accepted has {grace:g} s; another Ctrl-C ends it now")
        return leave or self._service.finished

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._service.cut()
        await super().shutdown(sockets)


def _log_to(say: Callable[[str], None]) -> None:
    # uvicorn's warnings, of broken HTTP for instance, as lines like the others.
    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            say(record.getMessage().strip())

    logger = logging.getLogger("uvicorn.error")
    logger.handlers, logger.propagate = [Lines(logging.WARNING)], False
