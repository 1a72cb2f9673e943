"""Stage graphs with their caches, called at whatever shapes a sequence needs.

`CachedStage` keeps the bound calls of small shapes, so that a decode step or a round of drafts binds nothing,
and times every run. It is the one place where engines run: whatever they raise leaves as a BackendError.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from .backends.base import CacheLimits, StageBackend, StageCall
from .cache import StageCache
from .errors import BackendError, BltError, OutOfMemoryError, engine_error, ran_out_of_memory
from .lanes import LANE

__all__ = ["CachedStage", "Observer", "StageTime", "next_power_of_two"]

Observer = Callable[[str, float, float, int], None]
"""observer(stage, moment it began on time.perf_counter's clock, seconds, new positions that it took in)."""

_Shapes = tuple[tuple[int, ...], ...]

# A call with larger buffers, in bytes, is one of prefill, whose shapes seldom come back.
_SMALL = 1 << 20
# A draft's lengths times the shapes of the patches that close in it.
_KEPT_CALLS = 64


@dataclass
class StageTime:
    """How often a stage ran and how long, in seconds of wall clock."""

    calls: int = 0
    seconds: float = 0.0


class CachedStage:
    """A stage graph and the cache of one sequence."""

    def __init__(
        self,
        backend: StageBackend,
        *,
        limits: CacheLimits,
        name: str = "",
        shared: Mapping[str, Any] | None = None,
        observers: tuple[Observer, ...] = (),
        cache: StageCache | None = None,
    ) -> None:
        """cache: one of this backend's, to go on with; None begins with an empty one."""
        self.backend, self.name = backend, name
        self.shared = dict(shared or {})
        """Inputs that are read from these tensors."""
        self._observers = observers
        self._calls: OrderedDict[_Shapes, StageCall] = OrderedDict()  # of few positions, the last used last
        self._bulk: tuple[_Shapes, StageCall] | None = None  # the last call of many
        self._generation = -1
        self.cache = backend.new_cache(limits) if cache is None else cache
        self.time = StageTime()
        self._observers_error: Exception | None = None  # which is no engine's
        self.intact = True
        """Whether the cache is what `run` made it: not once one failed, or was interrupted, half-way."""

    def share(self, **shared: Any) -> None:
        """Read these inputs from other tensors from now on."""
        self.shared.update(shared)
        self._generation, self.cache.binding = -1, None

    def prepare(self, count: int, shapes: Mapping[str, tuple[int, ...]]) -> StageCall:
        """A call for `count` new positions with inputs of these shapes, positions filled in; `run` is next.

        Raises BackendError naming the stage when the engine fails, OutOfMemoryError when memory is short.
        """
        self.intact = False
        try:
            return self._bound(count, shapes)
        except Exception as error:
            self._explain(error, count)
            raise

    def _bound(self, count: int, shapes: Mapping[str, tuple[int, ...]]) -> StageCall:
        cache = self.cache
        cache.reserve(count)
        if cache.generation != self._generation:
            # Calls hold on to the buffers they were bound to: drop them with the old buffers.
            self._calls.clear()
            self._bulk = None
            self._generation = cache.generation
        key = tuple(shapes.values())
        call = self._calls.get(key)
        if call is not None:
            self._calls.move_to_end(key)
        elif self._bulk is not None and self._bulk[0] == key:
            call = self._bulk[1]
        else:
            self._bulk = None  # its buffers are large: gone before the next ones come
            call = self.backend.bind({**shapes, "positions": (1, count)}, cache, self.shared)
            if sum(array.nbytes for array in (*call.inputs.values(), *call.outputs.values())) > _SMALL:
                self._bulk = (key, call)
            else:
                self._calls[key] = call
                if len(self._calls) > _KEPT_CALLS:
                    self._calls.popitem(last=False)
        call.begin()
        positions = call.inputs["positions"]
        if count == 1:
            positions[0, 0] = cache.length
        else:
            positions[0] = np.arange(cache.length, cache.length + count)
        cache.prepare(call.inputs, count)
        return call

    def run(self, call: StageCall) -> dict[str, Any]:
        """Run, append new keys and values to the cache, return the outputs (reused by the next run).

        Raises as `prepare` does.
        """
        count = call.inputs["positions"].shape[1]
        lane, done = LANE.get(), partial(self._ran, time.perf_counter(), count)
        try:
            if lane is None:
                call.run(done)
            else:
                lane.run(self, call, count, done)
            self.cache.advance(call.outputs, count)
        except Exception as error:
            if error is not self._observers_error:
                self._explain(error, count)
            raise
        self.intact = True
        return call.outputs

    def _explain(self, error: Exception, count: int) -> None:
        """Raise an error of an engine, or of memory, as ours; asserts are about our own mistakes, and other
        errors of ours about what a run was asked for."""
        if isinstance(error, AssertionError):
            return
        if isinstance(error, BltError) and not isinstance(error, BackendError):
            return
        if isinstance(error, BackendError):
            # A backend's own words say what to do; those about the device alone don't say where.
            kind = OutOfMemoryError if ran_out_of_memory(error) else BackendError
            if isinstance(error, kind) and self.name in str(error):
                return
            raise kind(f"{self.name}: {error}") from error
        first = self.cache.length
        place = f"position {first}" if count == 1 else f"positions {first} to {first + count - 1}"
        advice = "blt-edge validate tells whether the bundle is sound"
        raise engine_error(f"{self.name}: its graph failed at {place}", error, advice) from error

    def _ran(self, started: float, count: int, seconds: float) -> None:
        self.time.seconds += seconds
        self.time.calls += 1
        try:
            for observe in self._observers:
                observe(self.name, started, seconds, count)
        except Exception as error:
            self._observers_error = error
            raise


def next_power_of_two(number: int) -> int:
    """Smallest power of two that is at least `number` (> 0)."""
    return 1 << (number - 1).bit_length()
