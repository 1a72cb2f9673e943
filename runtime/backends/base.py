"""What a backend offers: bound calls of a stage graph.

A call is a graph with its input and output buffers fixed. The owner says `begin`, fills `inputs`, calls
`run`, and reads `outputs`; nothing is allocated or bound per step. Buffers are reused by the next
run of the same call: whoever keeps a result copies it.

Values that pass from stage to stage (`RESIDENT`) stay where the backend computes: on a GPU they are device
memory, runs are queued on one stream, and only a run with outputs for the host waits for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy.typing as npt

from ..cache import OrderedCache, RingCache, StageCache
from ..specs import StageSpec
from .memory import Memory

__all__ = ["RESIDENT", "CacheLimits", "Done", "StageBackend", "StageCall", "ordered_cache", "ring_cache"]

Array = npt.NDArray[Any]

RESIDENT = ("byte_states", "patch_bytes", "patch_values")
"""Inputs and outputs that pass from stage to stage and are in the backend's memory, not the host's."""

Done = Callable[[float], None]
"""done(seconds that a run took), called when that is known: on a GPU, when the host next waits for it."""


@dataclass(frozen=True)
class CacheLimits:
    """Sizes that a stage's cache is made for."""

    rollback: int
    """Positions that can always be taken back."""
    positions: int
    """Positions that the model has."""
    chunk: int
    """Positions that one call takes at most."""


def ring_cache(spec: StageSpec, limits: CacheLimits) -> RingCache:
    """What a portable stage graph reads."""
    sizes = (spec.layers, spec.kv_heads, spec.head_dim)
    return RingCache(*sizes, window=spec.window, rollback=limits.rollback, limit=limits.positions)


def ordered_cache(spec: StageSpec, limits: CacheLimits) -> OrderedCache:
    """What a stage graph with fused attention reads."""
    sizes = (spec.layers, spec.kv_heads, spec.head_dim)
    return OrderedCache(
        *sizes, window=spec.window, rollback=limits.rollback, limit=limits.positions, chunk=limits.chunk
    )


class StageCall(Protocol):
    """One stage graph at one set of shapes, bound to one cache."""

    inputs: dict[str, Any]
    """Buffers to fill before `run`, every graph input but the cache: `Tensor` if `RESIDENT`, else numpy."""
    outputs: dict[str, Any]
    """Buffers that hold the results after `run`, likewise."""

    def begin(self) -> None:
        """Wait until `inputs` may be written: an earlier run may still be reading them."""

    def run(self, done: Done) -> None:
        """Compute outputs from inputs and the cache as it stands."""


class StageBackend(Protocol):
    """One loaded stage graph."""

    @property
    def memory(self) -> Memory:
        """Where its `RESIDENT` values are: the same for all stages of a model."""

    def new_cache(self, limits: CacheLimits) -> StageCache:
        """An empty cache, in the layout that the graph reads."""

    def bind(
        self, shapes: Mapping[str, tuple[int, ...]], cache: StageCache, shared: Mapping[str, Any]
    ) -> StageCall:
        """A call with inputs of these shapes; `shared` inputs are read from the caller's own tensors.

        shapes: graph input name -> shape, for every input that is neither the cache's nor shared.
        """
