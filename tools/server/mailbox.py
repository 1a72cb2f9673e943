"""From the worker's thread to the event loop: whatever happens to one request, in order."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from typing import Any

__all__ = ["Mailbox"]


class Mailbox:
    """Letters for one coroutine. Make it in the loop that reads it."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._letters: deque[Any] = deque()
        self._arrived = asyncio.Event()

    def put(self, letter: Any) -> None:
        """Leave a letter, from any thread; after the loop's end nobody reads it."""
        self._letters.append(letter)
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._arrived.set)

    async def take(self) -> list[Any]:
        """Wait until there are letters, and take all there are."""
        while not self._letters:
            self._arrived.clear()
            if not self._letters:
                await self._arrived.wait()
        taken = []
        while self._letters:
            taken.append(self._letters.popleft())
        return taken
