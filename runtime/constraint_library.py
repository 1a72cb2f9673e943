"""Constraints that a library compiles: tried in a process of their own, then kept compiled here.

Nothing stops a compilation from outside, and its memory is the process's. So each is made first in a process
that is killed when it takes too long or too much, and here when that went well, because the library
(`constraint_compiler`) does the same again. Whose constraint it is makes no difference: one's own file may be
as wrong, and a program can't know whom its users' schemas come from.
"""

from __future__ import annotations

import os
import sys
import threading
from collections import OrderedDict
from collections.abc import MutableMapping
from typing import Any
from weakref import WeakValueDictionary

import numpy as np

from .constraint import Constraint
from .constraint_automata import Flags
from .constraint_compiler import compile_matcher, guarded, require_library, told_error
from .errors import OptionError
from .vocabulary import BYTE_OFFSET
from .worker import Worker, WorkerBusyError, WorkerError, WorkerTimeoutError

__all__ = ["MEMORY", "PATIENCE", "LibraryRule", "compiled"]

PATIENCE = 1.0
"""Seconds that a compilation may take."""

MEMORY = 256 << 20
"""Bytes that a compilation may take."""

_QUEUE_PATIENCE = 5.0
# A text adds to what its constraint's texts share, and to its memory: after so many bytes it goes with the
# last text that is at work with it, and who comes later begins anew.
_KEPT = 16
_MOST_TAKEN = 2048


class _Compiled:
    """A compiled constraint, and what its texts have in common."""

    def __init__(self, constraint: Constraint) -> None:
        """Raises OptionError."""
        self.constraint = constraint
        self.matcher = compile_matcher(constraint)
        self.taken = 0
        """Bytes of all its texts."""
        self.retired = False
        """Whether it goes when its texts do."""


class LibraryRule:
    """What llguidance says of one text, as a `Rule`. Its methods raise OptionError when it can't go on."""

    def __init__(self, origin: _Compiled, matcher: Any) -> None:
        """matcher: one of its own, whose states are also those of others with this origin."""
        self._origin, self._matcher = origin, matcher

    @property
    def accepts_end(self) -> bool:
        return bool(self._asked(self._matcher.is_accepting))

    def allowed(self) -> Flags:
        flags: Flags = (
            np.frombuffer(self._asked(self._matcher.compute_logit_bias), np.uint8)[BYTE_OFFSET:] != 0
        )
        # It does not raise: a limit that was reached ends the text, as far as it knows.
        self._check()
        return flags

    def forced(self) -> bytes:
        found: bytes = self._asked(self._matcher.compute_ff_bytes)
        self._check()
        return found

    def advance(self, byte: int) -> None:
        if not self._asked(self._matcher.consume_token, byte + BYTE_OFFSET):
            self._check()
        origin = self._origin
        origin.taken += 1
        if origin.taken > _MOST_TAKEN and not origin.retired:
            origin.retired = True
            _drop(origin, _recent)

    def roll_back(self, count: int) -> None:
        if not self._asked(self._matcher.rollback, count):
            self._check()

    def fork(self) -> LibraryRule:
        return LibraryRule(self._origin, self._asked(self._matcher.deep_copy))

    @property
    def spent(self) -> bool:
        """Whether what its texts share is to go with them."""
        return self._origin.retired

    @property
    def _cant(self) -> str:
        return f"constraint: {self._origin.constraint.words} can't be followed further"

    def _asked(self, call: Any, *arguments: Any) -> Any:
        return guarded(self._cant, call, *arguments)

    def _check(self) -> None:
        if self._matcher.is_error():
            self._origin.retired = True
            _drop(self._origin, _recent, _in_use)  # what its texts share may be full
            raise OptionError(f"{self._cant}: {told_error(self._matcher)}")


_trial = Worker("blt_edge.runtime.constraint_compiler:tried", memory=MEMORY)
_recent: OrderedDict[Constraint, _Compiled] = OrderedDict()
_in_use: WeakValueDictionary[Constraint, _Compiled] = WeakValueDictionary()
_lock = threading.Lock()
_turn = threading.Lock()


def compiled(constraint: Constraint) -> LibraryRule:
    """A rule at the beginning of a text, of its own.

    A constraint stays compiled while any rule of it is there, and for some time after. Any thread may call
    this. Raises OptionError, one line, where the library is not installed or refuses the constraint, where
    compiling takes longer than `PATIENCE` or more than `MEMORY`, and where others' are in the way for long.
    """
    origin = _kept(constraint)
    if origin is not None:
        return _rule(origin)
    require_library()
    # One at a time, so that strangers' constraints do not add up.
    if not _turn.acquire(timeout=PATIENCE + _QUEUE_PATIENCE):
        raise OptionError(_BUSY)
    try:
        origin = _kept(constraint)  # by who was waited for
        if origin is None:
            _try(constraint)
            origin = _Compiled(constraint)
            _keep(origin)
        return _rule(origin)
    finally:
        _turn.release()


_BUSY = "constraint: others are still being compiled, which take long; try again later"


def _try(constraint: Constraint) -> None:
    """Compile it where it can do no harm. Raises OptionError."""
    words = constraint.words
    try:
        _trial.ask({"kind": constraint.kind, "source": constraint.source}, PATIENCE)
    except WorkerTimeoutError:
        raise OptionError(
            f"constraint: {words} takes more than {PATIENCE:g} s to compile; make it simpler"
        ) from None
    except WorkerBusyError:
        raise OptionError(_BUSY) from None
    except WorkerError as error:
        raise OptionError(
            f"constraint: {words} can't be used: its compilation {error}; make it simpler"
        ) from None


def _rule(origin: _Compiled) -> LibraryRule:
    return LibraryRule(origin, origin.matcher).fork()


def _kept(constraint: Constraint) -> _Compiled | None:
    with _lock:
        if constraint in _recent:
            _recent.move_to_end(constraint)
        return _in_use.get(constraint)


def _keep(origin: _Compiled) -> None:
    with _lock:
        _recent[origin.constraint] = _in_use[origin.constraint] = origin
        while len(_recent) > _KEPT:
            _recent.popitem(last=False)


def _drop(origin: _Compiled, *places: MutableMapping[Constraint, _Compiled]) -> None:
    with _lock:
        for kept in places:
            if kept.get(origin.constraint) is origin:
                del kept[origin.constraint]


def _forked() -> None:
    """In a fork: who held the locks is not here."""
    global _lock, _turn
    _lock, _turn = threading.Lock(), threading.Lock()


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_forked)
