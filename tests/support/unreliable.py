"""A stage whose engine fails in the middle of a text, as none does when it is asked to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from blt_edge.runtime.backends.base import CacheLimits, OneText, StageBackend, StageCall

__all__ = ["Unreliable"]


class Unreliable(OneText):
    """A `StageBackend` around another: from the run of this number on, 0 being the first, runs raise."""

    def __init__(self, backend: StageBackend, failing: int, error: BaseException) -> None:
        self._backend, self.left, self.error = backend, failing, error
        self.memory = backend.memory

    def new_cache(self, limits: CacheLimits) -> Any:
        return self._backend.new_cache(limits)

    def bind(self, shapes: Mapping[str, tuple[int, ...]], cache: Any, shared: Mapping[str, Any]) -> _Call:
        return _Call(self, self._backend.bind(shapes, cache, shared))


class _Call:
    def __init__(self, owner: Unreliable, call: StageCall) -> None:
        self._owner, self._call = owner, call
        self.inputs, self.outputs, self.begin = call.inputs, call.outputs, call.begin

    def run(self, done: Any) -> None:
        self._owner.left -= 1
        if self._owner.left < 0:
            for values in self.outputs.values():
                values[...] = float("nan")  # what was half-done is of no use
            raise self._owner.error
        self._call.run(done)
