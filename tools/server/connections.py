"""Connections: how many there may be, what each waits for, and which goes when there are too many.

A process that can't open one more file answers nobody. So a connection is counted before it is made, and one
that waits for its client gives way to a new one. Clients that go slow or go away are the business of this
module, too. What it does not know: routes, the model, what is asked and answered.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from enum import IntEnum
from itertools import chain
from typing import Any
from weakref import WeakValueDictionary

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

if sys.platform == "linux":
    import fcntl
    import termios
try:
    import resource
except ImportError:  # not on Windows, where a process may open enough
    resource = None  # type: ignore[assignment]

CLIENT_SECONDS = 20.0
"""For a request's head to arrive, from the connection or the last answer; and for a client to take
`LEAST_TAKEN` bytes of those that wait for it."""

LEAST_TAKEN = 20_000
SEND_BUFFER = 65_536
"""Bytes the system is to hold for a client that does not take them. By itself it would take up to 4 MB, and
more only after a third of that has gone: for minutes, a slow client looks like one that takes nothing."""

MOST = 4096
"""Connections, where the system would allow more: each takes some memory, too."""

MOST_BODIES = 64
"""Connections whose request's body is not complete: each may hold as much as a request may have."""

_RESERVED = 96
"""Files for everything else: the bundle's, the standard streams, the event loop's."""

_NO_ROOM = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_TELL_SECONDS = 60.0
_REFUSAL = (
    b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 5\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
)


def most_connections() -> int:
    """How many connections this process has files for."""
    allowed = resource.RLIM_INFINITY if resource is None else resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if resource is None or allowed == resource.RLIM_INFINITY:
        return MOST
    return max(1, min(MOST, allowed - min(_RESERVED, allowed // 2)))


def client_of(address: Any) -> str | None:
    """Whose connection it is, by its peer's address: of IPv6 the network, which one client has to itself.
    None for this machine, whose users and proxies can't be told apart.
    """
    number = ipaddress.ip_address(str(address[0]).split("%", 1)[0])
    if isinstance(number, ipaddress.IPv6Address):
        number = number.ipv4_mapped or number
    if number.is_loopback:
        return None
    return str(number) if number.version == 4 else str(ipaddress.ip_network((number, 64), strict=False))


class Waits(IntEnum):
    """What a connection waits for, of its client. The first ones go first when there are too many."""

    HEAD = 0
    """A request."""
    BODY = 1
    """The rest of one."""
    READER = 2
    """That bytes of an answer are taken."""


class Connections:
    """All that are open. Its methods belong to the event loop."""

    def __init__(self, most: int, say: Callable[[str], None]) -> None:
        """most: of all clients; one address may have half of them, this machine's excepted. say: gets a line
        when there are too many, at most one in a minute.
        """
        self._most, self._most_of_one, self._say = most, max(1, most // 2), say
        # By descriptor: clients; those that come, while asyncio has them; those that wait, longest first.
        self._open: dict[int, str | None] = {}
        self._coming: WeakValueDictionary[int, socket.socket] = WeakValueDictionary()
        self._waiting: dict[Waits, dict[int, Connection]] = {what: {} for what in Waits}
        self._leaving: set[int] = set()
        self._of_client: Counter[str] = Counter()
        self._closed = self._refused = 0
        self._quiet_until = 0.0

    @property
    def changing(self) -> bool:
        """Whether one is taken but not made, or closed but has not given its file back: the next may wait."""
        return bool(self._coming or self._leaving)

    def admit(self, accepted: socket.socket, address: Any) -> bool:
        """Count a new connection, if there is room for it or room can be made."""
        number, client = accepted.fileno(), client_of(address)
        self.lost(number)  # one that was never made had it
        room = True
        if client is not None and self._of_client[client] >= self._most_of_one:
            why = f"{client} has {self._most_of_one} connections, the most for one address"
            room = self._make_room(why, lambda other: other == client)
        elif len(self._open) >= self._most:
            room = self._make_room(f"all {self._most} connections are taken (ulimit -n says how many files)")
        if room:
            self._open[number], self._coming[number] = client, accepted
            if client is not None:
                self._of_client[client] += 1
        return room

    def out_of_files(self) -> None:
        """The system has no file for a connection, though it should: somebody else has them."""
        if not self._make_room("no more files can be opened"):
            time.sleep(0.01)  # what is tried again at once should not take the whole processor

    def waits(self, number: int, connection: Connection, what: Waits | None) -> None:
        """A connection waits for something else than before, or for nothing of its client."""
        self._coming.pop(number, None)
        for waiting in self._waiting.values():
            waiting.pop(number, None)
        if what is None or number not in self._open:
            return
        self._waiting[what][number] = connection
        bodies = self._waiting[Waits.BODY]
        if len(bodies) > MOST_BODIES:
            self._drop(*next(iter(bodies.items())))
            self._tell(f"{MOST_BODIES} requests are not complete")

    def lost(self, number: int) -> None:
        """A connection has ended, and its descriptor is free."""
        self._leaving.discard(number)
        self._forget(number)

    def _make_room(self, why: str, of: Callable[[str | None], bool] = lambda client: True) -> bool:
        waiting = chain.from_iterable(found.items() for found in self._waiting.values())
        longest = next((one for one in waiting if of(self._open[one[0]])), None)
        if longest is None:
            self._refused += 1
        else:
            self._drop(*longest)
        self._tell(why)
        return longest is not None

    def _drop(self, number: int, connection: Connection) -> None:
        self._forget(number)
        self._leaving.add(number)
        self._closed += 1
        connection.transport.abort()

    def _forget(self, number: int) -> None:
        client = self._open.pop(number, None)
        if client is not None:
            self._of_client[client] -= 1
            if not self._of_client[client]:
                del self._of_client[client]
        for waiting in self._waiting.values():
            waiting.pop(number, None)

    def _tell(self, why: str) -> None:
        now = time.monotonic()
        if now >= self._quiet_until:
            self._quiet_until = now + _TELL_SECONDS
            self._say(
                f"{why}: for a new one, the one that waits longest for its client is closed; "
                f"closed so far: {self._closed}, refused: {self._refused}"
            )


class Listener(socket.socket):
    """A socket that asks before it hands out a connection."""

    connections: Connections | None = None

    def accept(self) -> tuple[socket.socket, Any]:
        """The next connection. Raises BlockingIOError, and ConnectionAbortedError for one it refused."""
        assert self.connections is not None
        if self.connections.changing:
            raise BlockingIOError
        try:
            accepted, address = super().accept()
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
            self.connections.out_of_files()
            raise BlockingIOError from None
        if self.connections.admit(accepted, address):
            return accepted, address
        with accepted, suppress(OSError):  # it may be gone already
            accepted.setblocking(False)
            accepted.send(_REFUSAL)
        raise ConnectionAbortedError


class Connection(H11Protocol):
    """HTTP/1.1 by h11, for clients that are slow, silent or gone.

    uvicorn waits without end for a head, and for a client to read. It has no limits for that, an application
    first hears of a connection when the head is there, and a protocol around uvicorn's could not see when a
    request begins: so this looks at its `cycle` and `flow`, which are not public, and which the tests of
    connections would miss.
    """

    def __init__(self, connections: Connections, **given: Any) -> None:
        super().__init__(**given)
        self._connections, self._number = connections, -1
        self._what: Waits | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self._untaken = 0

    # 1. What it waits for.

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._number = transport.get_extra_info("socket").fileno()
        self._look()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._look()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._look()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._look()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._look()

    def connection_lost(self, exc: Exception | None) -> None:
        self._connections.lost(self._number)
        self._number = -1
        super().connection_lost(exc)
        self._wait_no_longer()

    def _look(self) -> None:
        what = self._waits_for
        if what is self._what or self._number < 0:
            return
        self._what = what
        self._connections.waits(self._number, self, what)
        self._wait_no_longer()
        if what is Waits.HEAD:
            self._deadline = self.loop.call_later(CLIENT_SECONDS, self.transport.close)
        elif what is Waits.READER:
            self._watch_reader()

    @property
    def _waits_for(self) -> Waits | None:
        if self.flow.write_paused:
            return Waits.READER
        if self.cycle is None or self.cycle.response_complete:
            return Waits.HEAD
        return Waits.BODY if self.cycle.more_body else None

    def _watch_reader(self) -> None:
        self._untaken = self._not_taken()
        self._deadline = self.loop.call_later(CLIENT_SECONDS, self._judge_reader)

    def _judge_reader(self) -> None:
        if self._untaken - self._not_taken() < LEAST_TAKEN:
            self.transport.abort()
        else:
            self._watch_reader()

    def _not_taken(self) -> int:
        """Bytes that wait for the client: here, and on Linux, which tells, in the system."""
        here: int = self.transport.get_write_buffer_size()
        if sys.platform != "linux":
            return here
        told = fcntl.ioctl(self._number, termios.TIOCOUTQ, bytes(4))  # not acknowledged
        return here + int.from_bytes(told, sys.byteorder)

    def _wait_no_longer(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    # 2. A client that has said all it will say, and may still listen.

    def eof_received(self) -> bool:  # type: ignore[override]
        """Whether the connection stays open: for an answer that is being made."""
        cycle = self.cycle
        if cycle is None or cycle.response_complete or cycle.more_body:
            return False
        cycle.keep_alive = False
        self._ask_whether_it_listens(0.2)
        return True

    def _ask_whether_it_listens(self, pause: float) -> None:
        # One that has gone altogether looks the same until something is sent: then its system says so, and
        # the next thing sent fails. An answer that has begun asks by itself. HTTP/1.0 has no word for it.
        if (
            self.transport.is_closing()
            or self.cycle.response_started
            or self.conn.their_http_version == b"1.0"
        ):
            return
        word = h11.InformationalResponse(status_code=100, headers=[], reason=b"Continue")
        self.transport.write(self.conn.send(word) or b"")
        self.loop.call_later(pause, self._ask_whether_it_listens, min(5.0, 4 * pause))

    def _unsupported_upgrade_warning(self) -> None:
        """Nothing: uvicorn would advise to install what this server has no use for."""
