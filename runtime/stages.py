"""Stage graphs with their caches, called at whatever shapes a sequence needs.

`CachedStage` keeps one bound call per shape, so that a decode step binds nothing, and times every run.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .backends.base import StageBackend, StageCall
from .cache import KvCache
from .manifest import StageSpec

__all__ = ["CachedStage", "StageTime", "next_power_of_two"]

Array = npt.NDArray[Any]

_Shapes = tuple[tuple[int, ...], ...]


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
        spec: StageSpec,
        *,
        rollback: int,
        limit: int,
        shared: Mapping[str, Array] | None = None,
    ) -> None:
        self._backend = backend
        self._shared = dict(shared or {})
        self._steps: dict[_Shapes, StageCall] = {}  # calls for one position: a step binds nothing
        self._bulk: tuple[_Shapes, StageCall] | None = None  # the last call for several
        self._generation = -1
        self.cache = KvCache(
            spec.layers, spec.kv_heads, spec.head_dim, window=spec.window, rollback=rollback, limit=limit
        )
        self.time = StageTime()

    def prepare(self, count: int, shapes: Mapping[str, tuple[int, ...]]) -> StageCall:
        """A call for `count` new positions with inputs of these shapes, positions filled in."""
        cache = self.cache
        cache.reserve(count)
        if cache.generation != self._generation:
            # Calls hold on to the buffers they were bound to: drop them with the old buffers.
            self._steps.clear()
            self._bulk = None
            self._generation = cache.generation
        key = tuple(shapes.values())
        call = self._steps.get(key) if count == 1 else self._bulk_call(key)
        if call is None:
            call = self._backend.bind({**shapes, "positions": (1, count)}, cache, self._shared)
            if count == 1:
                self._steps[key] = call
            else:
                self._bulk = (key, call)
        positions = call.inputs["positions"]
        if count == 1:
            positions[0, 0] = cache.length
        else:
            positions[0] = np.arange(cache.length, cache.length + count)
        return call

    def _bulk_call(self, key: _Shapes) -> StageCall | None:
        if self._bulk is not None and self._bulk[0] == key:
            return self._bulk[1]
        self._bulk = None  # its buffers are large: gone before the next ones come
        return None

    def run(self, call: StageCall) -> dict[str, Array]:
        """Run, append new keys and values to the cache, return the outputs (reused by the next run)."""
        started = time.perf_counter()
        call.run()
        self.time.seconds += time.perf_counter() - started
        self.time.calls += 1
        self.cache.append(call.outputs["new_kv"])
        return call.outputs


def next_power_of_two(number: int) -> int:
    """Smallest power of two that is at least `number` (> 0)."""
    return 1 << (number - 1).bit_length()
