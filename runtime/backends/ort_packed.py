"""ONNX Runtime on the CPU, several texts in one pass: a packed stage graph, each text's cache in a row."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary, ref

import numpy as np
import numpy.typing as npt

from ..buffers import zeros
from ..cache import StageCache
from ..manifest import Manifest
from .base import CacheLimits, PackedPart, placed
from .ort_session import import_onnxruntime, input_types, new_session, session_options, session_signature
from .signatures import check_signature, check_weights_file, is_of_a_row, packed_signature, row_name

__all__ = ["OrtPackedStage"]

Array = npt.NDArray[Any]


class _Value:
    """An array as ONNX Runtime knows it: bound in a microsecond, by whoever holds it."""

    __slots__ = ("array", "native")

    def __init__(self, array: Array) -> None:
        assert array.flags.c_contiguous
        self.array = array  # its address is all that the other knows
        self.native = import_onnxruntime().OrtValue.ortvalue_from_numpy(array)


_Values = dict[str, _Value]

# What texts' caches are bound as, in whatever row and graph: made once while their buffers stay.
_CACHES: WeakKeyDictionary[StageCache, tuple[int, _Values, _Values]] = WeakKeyDictionary()


def _values(arrays: Mapping[str, Array]) -> _Values:
    return {name: _Value(array) for name, array in arrays.items()}


def _of_cache(cache: StageCache) -> tuple[_Values, _Values]:
    """A cache's buffers as a graph's inputs and outputs."""
    known = _CACHES.get(cache)
    if known is None or known[0] != cache.generation:
        known = _CACHES[cache] = (cache.generation, _values(cache.inputs()), _values(cache.outputs()))
    return known[1], known[2]


# How many sizes of passes have buffers that stay, and in how many bytes; an engine has a dozen such graphs.
_KEPT = 32
_KEPT_BYTES = 2 << 20
# Of larger ones, in bytes, only the last: a prompt's chunk is of another size each time.
_SMALL = 1 << 20


class OrtPackedStage:
    """A stage graph for up to `rows` texts in an ONNX Runtime session: a `PackedStage`.

    A text keeps its row from pass to pass where it can, so that little has to be bound again. A row without
    a text computes one position that nobody looks at: attention takes no fewer. What is bound is the pass's,
    so batches in several threads take turns.
    """

    def __init__(
        self,
        manifest: Manifest,
        stage: str,
        threads: int | None,
        path: Path,
        rows: int,
        new_cache: Callable[[CacheLimits], StageCache],
        *,
        optimized: bool,
        fused: bool,
    ) -> None:
        """Load the graph at `path`. new_cache: makes one of the kind that it reads. optimized, fused: what
        the graph for one text is.

        Raises BackendError when ONNX Runtime refuses the graph, BundleError when it is not what the manifest
        says.
        """
        spec = manifest.stages[stage]
        check_weights_file(path, f"{stage}.onnx.data" if optimized else spec.data)
        ort = import_onnxruntime()
        options = session_options(ort, spec.precision, threads)
        if optimized:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        self._session = new_session(ort, path.name, path, options)
        inputs, outputs = session_signature(self._session)
        check_signature(path.name, packed_signature(manifest, stage, rows, fused=fused), (inputs, outputs))
        types = input_types(path.name, self._session)
        self._own = {name: axes for name, axes in inputs.items() if name != "rows" and not is_of_a_row(name)}
        self._made = {name: axes for name, axes in outputs.items() if not is_of_a_row(name)}
        self._types = types
        self._native = self._session.io_binding()
        idle = new_cache(CacheLimits(rollback=0, positions=1, chunk=1))
        idle.reserve(1)
        shared = {}
        if stage == "decoder":
            shared["patch_values"] = np.zeros((1, spec.patch_values or 0), np.float32)
        self._rows = [_Row(self._native, row, idle, shared, fused) for row in range(rows)]
        self._counts = _Value(np.zeros(rows, np.int64))
        self._native.bind_ortvalue_input("rows", self._counts.native)
        self._buffers: dict[tuple[int, int], tuple[_Values, _Values]] = {}
        self._kept_bytes = 0
        self._bound: tuple[int, int] | None = None
        self._now: tuple[_Values, _Values] = ({}, {})  # the buffers that are bound
        # In the midst of a pass Python may collect a batch that nobody closed, which calls `release`.
        self._turn = threading.RLock()
        self.run([])  # the first run fetches weights, and is slow: whoever measures runs must not see it

    def run(self, parts: Sequence[PackedPart]) -> float:
        with self._turn:
            return self._run(parts)

    def _run(self, parts: Sequence[PackedPart]) -> float:
        started = time.perf_counter()
        rows = placed(parts, [row.cache for row in self._rows])
        spans, end = [], 0
        for row, part in zip(self._rows, rows, strict=True):
            row.tell(part)
            spans.append(slice(end, end := end + (1 if part is None else part.count)))
        self._counts.array[:] = [span.stop - span.start for span in spans]
        inputs, outputs = self._prepare(parts, end)
        for name, value in inputs.items():
            target = value.array
            for part, span in zip(rows, spans, strict=True):
                if part is None:
                    target[:, span] = 1 if name == "patch_lengths" else 0
                elif name == "patch_bytes":
                    given = part.call.inputs[name]
                    target[:, span, : given.shape[2]] = given
                    target[:, span, given.shape[2] :] = 0  # what masks it lets through what is no number
                else:
                    target[:, span] = part.call.inputs[name]
        self._session.run_with_iobinding(self._native)
        for name, value in outputs.items():
            for part, span in zip(rows, spans, strict=True):
                if part is not None:
                    part.call.outputs[name][...] = value.array[:, span]
        return time.perf_counter() - started

    def release(self) -> None:
        """Let go of the buffers of texts that are gone."""
        with self._turn:
            for row in self._rows:
                row.sweep()

    def _prepare(self, parts: Sequence[PackedPart], count: int) -> tuple[_Values, _Values]:
        """Inputs and outputs of a pass over `count` positions, bound."""
        padded = (part.call.inputs["patch_bytes"].shape[2] for part in parts) if self._padded else ()
        key = (count, max(padded, default=1 if self._padded else 0))
        if key != self._bound:
            self._bind(key)
        return self._now

    def _bind(self, key: tuple[int, int]) -> None:
        self._bound, self._now = None, ({}, {})  # until all are bound; large ones are gone before the next
        found = self._buffers.get(key)
        if found is None:
            sizes = {"bytes": key[0], "patches": key[0], "patch_length": key[1]}
            found = (
                {
                    name: _Value(zeros(_sized(axes, sizes), self._types[name]))
                    for name, axes in self._own.items()
                },
                {name: _Value(zeros(_sized(axes, sizes))) for name, axes in self._made.items()},
            )
            size = sum(value.array.nbytes for values in found for value in values.values())
            if size <= _SMALL:
                self._kept_bytes += size
                if len(self._buffers) >= _KEPT or self._kept_bytes > _KEPT_BYTES:
                    self._buffers.clear()
                    self._kept_bytes = size
                self._buffers[key] = found
        inputs, outputs = found
        for name, value in inputs.items():
            self._native.bind_ortvalue_input(name, value.native)
        for name, value in outputs.items():
            self._native.bind_ortvalue_output(name, value.native)
        self._bound, self._now = key, found

    @property
    def _padded(self) -> bool:
        return "patch_bytes" in self._own


class _Row:
    """One text's place in a packed graph, and what is bound there."""

    def __init__(
        self, native: Any, row: int, idle: StageCache, shared: dict[str, Array], fused: bool
    ) -> None:
        """idle, shared: what is read where there is no text."""
        self._native, self._row, self._idle, self._idle_shared = native, row, idle, shared
        self._kept: list[_Values] = []  # the binding holds plain addresses
        self._shared: Mapping[str, Any] = {}
        self._text: ref[StageCache] | None = None
        self._generation = -1
        self._told: _Values = {}
        self._new: _Value | None = None
        if fused:
            lengths = {"past_length": np.zeros(1, np.int32), "total_length": np.zeros((), np.int32)}
            self._told = _values(lengths)
            self._bind(native.bind_ortvalue_input, self._told)
        else:
            planes, _, kv_heads, _, head_dim = idle.buffer.shape
            self._idle_new = np.zeros((planes, 1, kv_heads, 1, head_dim), np.float32)

    @property
    def cache(self) -> StageCache | None:
        """The text's that was here last."""
        return None if self._text is None else self._text()

    def tell(self, part: PackedPart | None) -> None:
        """Bind what the text's part in the next pass reads and writes, or what stands in for a text."""
        if part is None:
            if self._text is not None or not self._kept:
                self._take(self._idle, self._idle_shared)
                for name, length in (("past_length", 0), ("total_length", 1)):
                    if self._told:
                        self._told[name].array[...] = length
            self._write_new(None if self._told else self._idle_new)
            return
        cache = part.cache
        shared = all(self._shared.get(name) is array for name, array in part.shared.items())
        if self.cache is not cache or self._generation != cache.generation or not shared:
            self._take(cache, part.shared)
            self._text, self._generation = ref(cache), cache.generation
        for name, value in self._told.items():
            value.array[...] = part.call.inputs[name]
        self._write_new(None if self._told else part.call.outputs["new_kv"])

    def sweep(self) -> None:
        """Let go of a text that is gone."""
        if self._text is not None and self._text() is None:
            self.tell(None)

    def _take(self, cache: StageCache, shared: Mapping[str, Array]) -> None:
        self._text, self._kept = None, []  # until all of them are bound
        inputs, outputs = _of_cache(cache)
        read = {**_values(shared), **inputs}
        self._bind(self._native.bind_ortvalue_input, read)
        self._bind(self._native.bind_ortvalue_output, outputs)
        self._kept, self._shared = [read, outputs], dict(shared)

    def _write_new(self, array: Array | None) -> None:
        """Where new keys and values go that the graph does not put into the cache itself."""
        if array is not None and (self._new is None or self._new.array is not array):
            self._new = _Value(array)
            self._bind(self._native.bind_ortvalue_output, {"new_kv": self._new})

    def _bind(self, how: Callable[[str, Any], None], values: _Values) -> None:
        for name, value in values.items():
            how(row_name(self._row, name), value.native)


def _sized(axes: tuple[int | str, ...], sizes: dict[str, int]) -> tuple[int, ...]:
    return tuple(sizes[axis] if isinstance(axis, str) else axis for axis in axes)
