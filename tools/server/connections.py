"""Connections as uvicorn handles them, and an end to those that ask for nothing.

uvicorn waits without end for a request's head, and h11 holds what came of it: a client that sends nothing, or
a byte now and then, would keep its connection, and some hundreds of them the process's last file. What it
does not know: routes, the model.
"""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

__all__ = ["HEAD_SECONDS", "Protocol"]

HEAD_SECONDS = 20.0
"""For a request's head to arrive, from the connection or from the head's first byte."""


class Protocol(H11Protocol):
    """HTTP/1.1 by h11."""

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait."""
        super().connection_made(transport)
        self._wait_for_head()

    def data_received(self, data: bytes) -> None:
        """Wait on, unless the head is there."""
        super().data_received(data)
        self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no longer."""
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
