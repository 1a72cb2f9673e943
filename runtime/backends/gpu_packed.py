"""Several texts in one pass on a GPU: a packed graph, over each text's own cache on the device.

A pass copies up what the host has filled in for each text, puts the texts' new positions behind one another,
runs, and gives each its part of what came out; what passes from stage to stage never leaves the device. Keys
and values are read from each text's ring, and new ones written straight into its call. Only addresses and
sizes that have changed are told to the engine again.

The host waits for each pass: what it took is known then, and the next one may be bound. No CUDA graphs: texts
come and go, and a graph would be one for each combination of their buffers and lengths. What this does not
know: which engine runs.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from weakref import ref

import numpy as np
import numpy.typing as npt

from ..cache import StageCache
from ..errors import BltError
from ..manifest import Manifest
from .base import RESIDENT, CacheLimits, PackedPart, PackedStage, placed
from .gpu import DeviceArray, DeviceRingCache, Gpu, GpuCall, Packed
from .signatures import ROWS, Shapes, input_type, is_of_a_row, new_axis, packed_signature, row_name

__all__ = ["Bound", "GpuPackedStage", "Loaded", "Place"]

Array = npt.NDArray[Any]
_Shape = tuple[int, ...]
Place = tuple[int, _Shape]
"""A tensor's address and shape."""
Bound = dict[str, Place]
"""By a tensor's name in the graph."""

# How many sizes of passes have buffers of their own.
_KEPT = 8


class GpuPackedStage(ABC):
    """A stage's graph for up to `rows` texts: a `PackedStage`.

    A row without a text computes one position that nobody looks at: attention takes no fewer.
    """

    def __init__(self, gpu: Gpu, manifest: Manifest, stage: str, rows: int) -> None:
        signature, spec = packed_signature(manifest, stage, rows), manifest.stages[stage]
        self._gpu, self._axis = gpu, new_axis(stage)
        self._inputs, self._outputs = (
            {name: axes for name, axes in shapes.items() if name != ROWS and not is_of_a_row(name)}
            for shapes in signature
        )
        self._taken = frozenset(signature[0])
        """Names of all inputs."""
        self._sizes = Packed(gpu, {ROWS: ((rows,), np.int64)})
        counts = self._sizes.host[ROWS]
        # Read on the host, by whatever parts the positions.
        self._counts: Bound = {ROWS: (counts.ctypes.data, counts.shape)}
        self._texts: list[ref[StageCache] | None] = [None] * rows
        self._idle = _Idle(gpu, DeviceRingCache(gpu, spec, CacheLimits(0, 1, 1)), spec.patch_values, stage)
        self._buffers: dict[tuple[int, int], _Buffers] = {}
        self._known: Bound = {}

    @abstractmethod
    def _bind(self, name: str, place: Place, before: Place | None) -> bool:
        """Let the next run read or write a tensor there; before: where it was, None = nowhere. False where
        the engine refuses."""

    @abstractmethod
    def _bound(self, done: bool) -> None:
        """All is bound; raises BackendError where that was not `done`."""

    @abstractmethod
    def _execute(self) -> None:
        """Queue a run. Raises BackendError when the engine refuses it."""

    def run(self, parts: Sequence[PackedPart]) -> float:
        """Raises BackendError when the engine fails."""
        gpu = self._gpu
        with gpu.lock:
            rows = placed(parts, [None if text is None else text() for text in self._texts])
            spans, end = [], 0
            for part in rows:
                spans.append(slice(end, end := end + (1 if part is None else part.count)))
            self._sizes.host[ROWS][:] = [span.stop - span.start for span in spans]
            buffers = self._buffers_for(parts, end)
            self._tell({**buffers.bound, **self._of_rows(rows), **self._counts})
            self._texts = [None if part is None else ref(part.cache) for part in rows]
            took: list[float] = []
            try:
                gpu.timed(lambda: self._queue(buffers, rows, spans), took.append)
            finally:  # what was queued may read what the next pass overwrites
                gpu.synchronize()
            for name, values in buffers.down.host.items():
                for part, span in zip(rows, spans, strict=True):
                    if part is not None:
                        part.call.outputs[name][...] = values[:, span]
        return took[0]

    def release(self) -> None:  # noqa: B027 (nothing to do)
        """Nothing of a text is held: the context knows addresses, which the next pass tells it anew."""

    def _queue(self, buffers: _Buffers, rows: Sequence[PackedPart | None], spans: Sequence[slice]) -> None:
        buffers.gather(rows, spans)
        for part in rows:
            if part is not None:
                _call_of(part).upload()
        self._execute()
        buffers.scatter(rows, spans)

    def _tell(self, bound: Bound) -> None:
        """Bind what has changed."""
        known, done = self._known, True
        self._known = {}  # until all of it is bound
        for name, place in bound.items():
            before = known.get(name)
            # Sizes are bound again even where they lie where they did: they are others.
            if place != before or name == ROWS:
                done = done and self._bind(name, place, before)
        self._bound(done)
        self._known = bound

    # What the graph reads and writes.

    def _of_rows(self, rows: Sequence[PackedPart | None]) -> Bound:
        """What belongs to one text each."""
        return {
            row_name(row, name): place
            for row, part in enumerate(rows)
            for name, place in (self._idle.bound if part is None else _of_text(part)).items()
        }

    def _buffers_for(self, parts: Sequence[PackedPart], count: int) -> _Buffers:
        """What all texts share, for `count` positions."""
        lengths = (part.call.inputs["patch_bytes"].shape[2] for part in parts)
        longest = max(lengths) if "patch_bytes" in self._inputs else 0
        key = (count, longest)
        if key not in self._buffers:
            if len(self._buffers) >= _KEPT:
                self._buffers.clear()
            sizes = {self._axis: count, "patch_length": longest}
            self._buffers[key] = _Buffers(self._gpu, self._inputs, self._outputs, sizes)
        return self._buffers[key]


class Loaded:
    """Packed stages by how many texts they take, each loaded when it is asked for first."""

    def __init__(self, rows: Sequence[int], load: Callable[[int], PackedStage]) -> None:
        """rows: ascending. load(how many of them) loads one; raises BltError."""
        self.rows = tuple(rows)
        self._load = load
        self._found: dict[int, PackedStage | BltError] = {}
        self._loading = threading.RLock()

    def for_texts(self, texts: int) -> PackedStage:
        """That for so many texts or a few more. Raises what loading it raised, which is not tried again:
        graphs take long to load."""
        rows = next(rows for rows in self.rows if rows >= texts)
        with self._loading:  # batches of two threads would load it twice
            if rows not in self._found:
                try:
                    self._found[rows] = self._load(rows)
                except BltError as error:
                    self._found[rows] = error
        found = self._found[rows]
        if isinstance(found, BltError):
            raise found
        return found


class _Idle:
    """What a row without a text reads and writes."""

    def __init__(self, gpu: Gpu, cache: DeviceRingCache, patch_values: int | None, stage: str) -> None:
        planes, _, kv_heads, _, head_dim = cache.buffer.shape
        held = {**cache.inputs(), "new_kv": gpu.zeros((planes, 1, kv_heads, 1, head_dim))}
        if stage == "decoder":
            held["patch_values"] = gpu.zeros((1, patch_values or 0))
        positions = DeviceArray.empty(gpu, cache.positions.shape, np.int64)
        positions[:] = cache.positions
        self._held = {**held, "past_positions": positions}
        self.bound: Bound = {name: (each.address, each.shape) for name, each in self._held.items()}


class _Buffers:
    """What all texts of a pass of one size share, on the device and, as far as the host needs it, there."""

    def __init__(self, gpu: Gpu, inputs: Shapes, outputs: Shapes, sizes: Mapping[str, int]) -> None:
        self._gpu = gpu

        def sized(shapes: Shapes, resident: bool) -> Iterator[tuple[str, _Shape]]:
            for name, axes in shapes.items():
                if (name in RESIDENT) == resident:
                    yield name, tuple(sizes[axis] if isinstance(axis, str) else axis for axis in axes)

        self.up = Packed(gpu, {name: (shape, input_type(name)) for name, shape in sized(inputs, False)})
        self.down = Packed(gpu, {name: (shape, np.float32) for name, shape in sized(outputs, False)})
        # Padding, and what stands in for a text, is read, if not used: it must be finite.
        self._read = {name: gpu.zeros(shape) for name, shape in sized(inputs, True)}
        self._written = {
            name: DeviceArray.empty(gpu, shape, np.float32) for name, shape in sized(outputs, True)
        }
        self._blank: DeviceArray | None = None  # zeros of padded patches
        self.bound: Bound = {
            **{name: (self.up.device[name], each.shape) for name, each in self.up.host.items()},
            **{name: (self.down.device[name], each.shape) for name, each in self.down.host.items()},
            **{name: (each.address, each.shape) for name, each in {**self._read, **self._written}.items()},
        }

    def gather(self, rows: Sequence[PackedPart | None], spans: Sequence[slice]) -> None:
        """Queue the copies that put the texts' inputs behind one another."""
        for name, values in self.up.host.items():
            for part, span in zip(rows, spans, strict=True):
                if part is None:
                    values[:, span] = 1 if name == "patch_lengths" else 0
                else:
                    values[:, span] = part.call.inputs[name]
        self.up.upload()
        for name, target in self._read.items():
            for part, span in zip(rows, spans, strict=True):
                if part is not None:
                    self._copy_in(target[0, span], part.call.inputs[name][0])

    def _copy_in(self, target: DeviceArray, source: DeviceArray) -> None:
        """Rows [n, ...] to rows that may be longer, as patches are padded to the longest of all texts."""
        if target.shape == source.shape:
            target[:] = source
            return
        # Behind shorter patches stands what other texts left: masked, but masking is no product with nan.
        if self._blank is None or len(self._blank) < len(target):
            self._blank = self._gpu.zeros(target.shape)
        target[:] = self._blank[: len(target)]
        count, pitch, width = len(source), target.nbytes // len(target), source.nbytes // len(source)
        self._gpu.driver.copy_2d(target.address, pitch, source.address, width, width, count)

    def scatter(self, rows: Sequence[PackedPart | None], spans: Sequence[slice]) -> None:
        """Queue the copies that give each text its outputs; those for the host are there after a wait."""
        for name, values in self._written.items():
            for part, span in zip(rows, spans, strict=True):
                if part is not None:
                    part.call.outputs[name][0] = values[0, span]
        self.down.download()


def _of_text(part: PackedPart) -> Bound:
    """What the graph reads and writes of one text: its ring, and what its own call has of it."""
    call, cache = _call_of(part), part.cache
    assert isinstance(cache, DeviceRingCache)
    read = {**cache.inputs(), **part.shared}
    found = {name: (each.address, each.shape) for name, each in read.items()}
    shapes = {**call.input_shapes, **call.output_shapes}
    return found | {name: (call.addresses[name], shapes[name]) for name in ("past_positions", "new_kv")}


def _call_of(part: PackedPart) -> GpuCall:
    assert isinstance(part.call, GpuCall)
    return part.call
