"""What a backend offers: bound calls of a stage graph.

A call is a graph with its input and output buffers fixed. The owner fills `inputs`, calls `run`, and
reads `outputs`; nothing is allocated or bound per step. Buffers are reused by the next
run of the same call: whoever keeps a result copies it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy.typing as npt

from ..cache import KvCache

__all__ = ["StageBackend", "StageCall"]

Array = npt.NDArray[Any]


class StageCall(Protocol):
    """One stage graph at one set of shapes, bound to one cache."""

    inputs: dict[str, Array]
    """Host buffers to fill before `run`: every graph input but the cache."""
    outputs: dict[str, Array]
    """Host buffers that hold the results after `run`."""

    def run(self) -> None:
        """Compute outputs from inputs and the cache as it stands."""


class StageBackend(Protocol):
    """One loaded stage graph."""

    def bind(
        self, shapes: Mapping[str, tuple[int, ...]], cache: KvCache, shared: Mapping[str, Array]
    ) -> StageCall:
        """A call with inputs of these shapes; `shared` inputs are read from the caller's own arrays.

        shapes: graph input name -> shape, for every input that is neither the cache's nor shared.
        """
