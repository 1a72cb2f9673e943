"""What texts must fit, compiled before their request's turn: one at a time, in a thread of its own.

So it keeps neither the queue's thread nor the event loop, and what takes long keeps up only those who have
something to be compiled, too: their clients take turns.
What this does not know: how a constraint is compiled (`runtime.guide`), and what a request is beside it.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Hashable
from functools import partial
from itertools import count

import anyio
import anyio.to_thread
from starlette.types import Receive

from ...runtime import GenerationOptions, OptionError
from ...runtime.constraint import Constraint
from ...runtime.guide import Prepared, prepare
from .constraints import refused_constraint
from .refusals import ApiError, ClientGoneError, retry_after, server_stops

__all__ = ["Compiler"]

_KEPT = 32
_LIBRARY = "llguidance"


class Compiler:
    """Compiles the constraints of one server's requests. Its methods belong to the event loop."""

    def __init__(self, most_waiting: int, patience: float, counted: Callable[[str], None]) -> None:
        """most_waiting: requests that may wait for others' to be compiled. patience: seconds of that wait.
        counted: told the kind of each request's constraint.
        """
        self._patience, self._counted = patience, counted
        self._turns = _Turns(most_waiting)
        self._kept: OrderedDict[Constraint, Prepared] = OrderedDict()  # those of late
        self._scopes: set[anyio.CancelScope] = set()
        self._cut = False

    def cut(self) -> None:
        """End all waits: the server stops."""
        self._cut = True
        for scope in [*self._scopes]:
            scope.cancel()

    @contextlib.asynccontextmanager
    async def compiled(
        self, options: GenerationOptions, field: str | None, receive: Receive, client: Hashable
    ) -> AsyncIterator[None]:
        """A block in which the options' constraint, if any, is compiled and stays so.

        field: the request's parameter that it is from. receive: watched until the block begins. client: who
        takes turns. Raises ApiError, ClientGoneError.
        """
        constraint, held = options.constraint, None
        if constraint is not None and constraint.kind != "choice":  # which needs no compiling
            self._forget_spent(constraint)
            held = self._kept.get(constraint)
            if held is None:
                held = await self._compile(constraint, field, receive, client)
            self._kept[constraint] = held
            self._kept.move_to_end(constraint)
            while len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        if constraint is not None:
            self._counted(constraint.kind)
        try:
            yield
        finally:
            del held
            if constraint is not None:
                self._forget_spent(constraint)

    def _forget_spent(self, constraint: Constraint) -> None:
        """What its texts have filled up goes with the last of them, not with those that come later."""
        held = self._kept.get(constraint)
        if held is not None and held.spent:
            del self._kept[constraint]

    async def _compile(
        self, constraint: Constraint, field: str | None, receive: Receive, client: Hashable
    ) -> Prepared:
        if importlib.util.find_spec(_LIBRARY) is None:
            raise _not_installed(field)
        gone, held = False, None

        async def watch() -> None:
            nonlocal gone
            while (await receive())["type"] != "http.disconnect":
                pass
            gone = True
            scope.cancel()

        with anyio.move_on_after(self._patience) as scope:
            self._scopes.add(scope)
            watching = asyncio.create_task(watch())
            try:
                async with self._turns.turn(client):
                    # It can't be stopped, and is over soon: what is waited for is the turn.
                    work = partial(prepare, GenerationOptions(constraint=constraint))
                    held = await anyio.to_thread.run_sync(work)
            except OptionError as error:
                raise refused_constraint(error, field) from None
            except _TooManyError as error:
                message = (
                    f"{error.waiting} others wait for what they must fit to be compiled; come again later"
                )
                headers = retry_after(error.waiting / 2)
                raise ApiError(429, message, "queue_full", param=field, headers=headers) from None
            finally:
                watching.cancel()
                self._scopes.discard(scope)
        if gone:
            raise ClientGoneError
        if self._cut:
            raise server_stops()
        if held is not None:
            return held
        message = f"what the text must fit was not compiled within {self._patience:g} s; come again later"
        raise ApiError(503, message, "queue_timeout", param=field, headers=retry_after(self._patience))


class _TooManyError(Exception):
    def __init__(self, waiting: int) -> None:
        super().__init__()
        self.waiting = waiting


class _Turns:
    """One after the other: of the client whose last turn is longest ago, who came first."""

    def __init__(self, most_waiting: int) -> None:
        self._most, self._taken = most_waiting, False
        self._waiting: list[_Waiter] = []
        self._last: dict[Hashable, int] = {}  # each client's, by its number
        self._number = count(1)

    @contextlib.asynccontextmanager
    async def turn(self, client: Hashable) -> AsyncIterator[None]:
        """A block that no other runs beside. Raises _TooManyError where as many wait as may."""
        if self._taken:
            if len(self._waiting) >= self._most:
                raise _TooManyError(len(self._waiting))
            await self._wait(_Waiter(client))
        self._taken = True
        self._last[client] = next(self._number)
        try:
            yield
        finally:
            self._pass_on()

    async def _wait(self, waiter: _Waiter) -> None:
        self._waiting.append(waiter)
        try:
            await waiter.turn.wait()
        except BaseException:
            if waiter in self._waiting:
                self._waiting.remove(waiter)
            else:  # it came at the moment when it was no longer waited for
                self._pass_on()
            raise

    def _pass_on(self) -> None:
        # Of those who do not wait now, too, or they came first each time that they are back; not those whose
        # turns are further back than of all who wait, which are first in any case.
        longest = min((self._last.get(waiter.client, 0) for waiter in self._waiting), default=None)
        self._last = {
            client: number
            for client, number in self._last.items()
            if longest is not None and number >= longest
        }
        self._taken = bool(self._waiting)
        if self._waiting:
            following = min(self._waiting, key=lambda waiter: self._last.get(waiter.client, 0))
            self._waiting.remove(following)
            following.turn.set()


class _Waiter:
    def __init__(self, client: Hashable) -> None:
        self.client, self.turn = client, asyncio.Event()


def _not_installed(field: str | None) -> ApiError:
    return ApiError(
        501,
        f"{field}: this server lacks llguidance, which schemas, patterns and grammars need; whoever runs it "
        "can install the extra guide (guided_choice and utf8 need none)",
        "not_installed",
        param=field,
        headers={"x-should-retry": "false"},  # OpenAI's client would ask again
    )
