"""A running server: its socket, uvicorn around the application, and an orderly end.

What it does not know: routes, the model.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from .app import create_app
from .service import Service

HEAD_SECONDS = 20.0
"""For a request's head to arrive, from the connection or from the head's first byte."""

_LAST_SECONDS = 3
"""For connections to take their last bytes."""


def bind(host: str, port: int) -> socket.socket:
    """A TCP socket on the address, not listening yet; port 0 is any free one. Raises OSError."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except UnicodeError:  # a label of no or too many letters
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known") from None
    family, kind, protocol, _, address = found[0]
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except BaseException:
        bound.close()
        raise
    return bound


def run_server(
    service: Service, bound: socket.socket, *, say: Callable[[str], None], started: Callable[[], None]
) -> None:
    """Serve until SIGTERM, SIGINT or `service.stop`, then close the service. say: gets the access lines and
    uvicorn's warnings. started: called once it listens.
    """
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # connections inherit it: one that takes no more bytes ends
        patience = round(1000 * service.settings.timeout)
        bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, max(1, patience))
    try:
        asyncio.run(_Server(service, say, started).serve([bound]))
    finally:
        service.queue.close()


class _Server(uvicorn.Server):
    """uvicorn, but a signal first lets what was accepted run on, and refuses with a status what is new."""

    def __init__(self, service: Service, say: Callable[[str], None], started: Callable[[], None]) -> None:
        _log_to(say)
        super().__init__(
            uvicorn.Config(
                create_app(service, say),
                http=_Connection,
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
        await super().startup(sockets)
        self._started()

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


class _Connection(H11Protocol):
    """HTTP/1.1 by h11, with an end to connections that ask for nothing.

    uvicorn waits without end for a request's head: a client that sends nothing, or a byte now and then, would
    keep its connection, and some hundreds of them the process's last file. uvicorn has no limit for that, an
    application first hears of a connection when the head is there, and a protocol around uvicorn's could not
    see when a request begins: so this looks at its `cycle`, which is not public, and which the tests of
    connections would miss.
    """

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait_for_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._wait_no_longer()

    def _wait_for_head(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._wait_no_longer()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _wait_no_longer(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _unsupported_upgrade_warning(self) -> None:
        """Nothing: uvicorn would advise to install what this server has no use for."""


def _log_to(say: Callable[[str], None]) -> None:
    # uvicorn's warnings, of broken HTTP for instance, as lines like the others.
    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            say(record.getMessage().strip())

    logger = logging.getLogger("uvicorn.error")
    logger.handlers, logger.propagate = [Lines(logging.WARNING)], False
