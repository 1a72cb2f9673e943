"""How a text's work finds out that it is one of several in its thread.

Work on a text asks for one pass of a stage after the other. In a batch (`batch`) that is done by the batch,
which runs a stage once for several texts: work that belongs to one has its `Lane` in `LANE`, and whoever runs
a stage leaves it to that. Everywhere else `LANE` holds None, and a stage runs where it is asked to.
What this does not know: how lanes are switched, what a pass is.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextvars import ContextVar
from typing import Protocol

from .backends.base import Done, StageBackend, StageCall
from .cache import StageCache
from .costs import CostTable

__all__ = ["LANE", "Lane", "StageRun", "own_seconds"]


class StageRun(Protocol):
    """A stage that is to run for one text."""

    name: str
    """The stage's."""
    backend: StageBackend
    """Its graph."""
    cache: StageCache
    """The text's part in it."""

    @property
    def shared(self) -> dict[str, object]:
        """Inputs that are read from the text's own tensors."""


class Lane(Protocol):
    """One text's place among those of its thread."""

    @property
    def costs(self) -> CostTable:
        """What runs cost a text that shares them."""

    @property
    def seconds(self) -> float:
        """Seconds that this text has taken until now: its own work, and its share of passes."""

    def run(self, stage: StageRun, call: StageCall, count: int, done: Done) -> None:
        """Fill the call's outputs, over `count` new positions; raises what the engine does."""

    def wait(self, until: Callable[[], bool]) -> None:
        """Let the others go on until `until()` is true."""


LANE: ContextVar[Lane | None] = ContextVar("blt_edge_lane", default=None)
"""The lane of what runs here; None = it is alone."""


def own_seconds() -> float:
    """A clock, in seconds, that stands still for a text while others of its thread go on."""
    lane = LANE.get()
    return time.perf_counter() if lane is None else lane.seconds
