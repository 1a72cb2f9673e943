"""Arrays, caches, staging bound calls on a GPU, over a driver (`cuda.CudaDriver`), for all GPU backends.

Everything is queued on one stream. The host waits in two places only: for outputs it reads
(`Gpu.synchronize`), and before it writes inputs that a queued copy may still be reading (`GpuCall.begin`).
What nobody holds any longer goes back to the device when the host has waited next: queued work may still be
reading it, and CUDA allows no freeing while a graph is captured.

A bound call is one copy up, the engine's run, and one copy down of what the host reads. Where an engine
allows that, it is captured as a CUDA graph the second time it runs, copies and all, and launched from then
on. A call that can't be captured after all goes on as it began; `Gpu.refusal` has the reason.
"""

from __future__ import annotations

import ctypes
import math
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt

from ..cache import RingCache, StageCache
from ..errors import BackendError
from ..manifest import StageSpec
from .base import RESIDENT, CacheLimits, Done
from .signatures import Signature, input_type, output_shapes

__all__ = ["DeviceArray", "DeviceRingCache", "Gpu", "GpuCall", "Packed", "drop"]

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]

# Parts of one block start where any kernel may want them to.
_ALIGNMENT = 256

# A request for so many bytes waits for the device, so that what was left goes back before it.
_LARGE = 1 << 20

# Of the process, not of a model: while ONNX Runtime captures, no thread may allocate, whatever its model.
_LOCK = threading.RLock()


class Gpu:
    """One device, its stream, and what was queued there and not yet waited for."""

    def __init__(self, driver: Any) -> None:
        """driver: a `cuda.CudaDriver`."""
        self.driver = driver
        self.lock = _LOCK
        """Held while something is queued or allocated: a graph must not capture another thread's work."""
        self.waits = 0
        """How often the host has waited for the stream."""
        self.captured = 0
        """Calls that became CUDA graphs."""
        self.refusal: str | None = None
        """Why one did not, the last time that happened."""
        self._left = _Leftovers()
        weakref.finalize(self, _close, driver, self._left).atexit = False
        self._events: list[Any] = []
        self._running: list[tuple[Done, Any, Any]] = []
        self._scratch: _Block | None = None
        self._loose: _Block | None = None

    def zeros(self, shape: tuple[int, ...]) -> DeviceArray:
        array = DeviceArray.empty(self, shape, np.float32)
        with self.lock:
            self.driver.clear(array.address, array.nbytes)
        return array

    def available(self) -> int | None:
        free, _ = self.driver.memory()
        return int(free)

    def timed(self, work: Callable[[], None], done: Done) -> None:
        """Queue `work`; `done` is told how long the device took, when the host next waits."""
        start, end = self._event(), self._event()
        self.driver.record(start)
        try:
            work()
        except BaseException:
            self._events += [start, end]
            raise
        self.driver.record(end)
        self._running.append((done, start, end))

    def _event(self) -> Any:
        return self._events.pop() if self._events else self.driver.new_event()

    def synchronize(self) -> None:
        """Wait for everything that is queued, and tell what it took. Raises BackendError if it failed."""
        with self.lock:
            running, self._running = self._running, []
            self.driver.synchronize()
            self.waits += 1
            self._left.give_back()
            for done, start, end in running:
                done(self.driver.seconds(start, end))
                self._events += [start, end]

    def allocate(self, count: int, pinned: bool = False) -> int:
        """Address of new memory: the device's, or the host's that the device reaches. Raises BackendError."""
        with self.lock:
            if self._left and count >= _LARGE:
                self.synchronize()
            new = self.driver.allocate_pinned if pinned else self.driver.allocate
            try:
                return int(new(max(count, 1)))
            except BackendError as error:
                if self._left:  # waiting gives that back
                    self.synchronize()
                    return self.allocate(count, pinned)
                where = "pinned host" if pinned else "device"
                told = f"{count} bytes of {where} memory: {error}; free some, or quantize"
                raise BackendError(told) from error

    def release_with(self, holder: object, release: Callable[[Any], object], thing: Any) -> None:
        """Once nobody holds `holder`, and the device is done with what was queued then: release(thing)."""
        # Not when the process ends: the driver may be gone by then, and gives all back itself.
        weakref.finalize(holder, self._left.add, release, thing).atexit = False

    def scratch(self, count: int) -> int:
        """Address of `count` bytes that any run may use while it runs. Ask for the most before the first run:
        a larger request moves them, and captured graphs keep the old address."""
        if self._scratch is None or self._scratch.bytes < count:
            assert not self._running, "scratch memory may not move under queued work"
            self._scratch = _Block(self, count)
        return int(self._scratch.address)

    def loose_scratch(self, count: int) -> int:
        """Likewise, for one run that no graph captures: the next request may get another address."""
        if self._scratch is not None and self._scratch.bytes >= count:
            return int(self._scratch.address)
        if self._loose is None or self._loose.bytes < count:
            self._loose = _Block(self, count)
        return int(self._loose.address)


class _Leftovers:
    """What nobody holds any longer. Python drops things whenever, in whatever thread."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[Callable[[Any], object], Any]] = deque()
        self.closed = False

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, release: Callable[[Any], object], thing: Any) -> None:
        """For the next `give_back`; at once when the device is idle for good."""
        if self.closed:
            release(thing)
        else:
            self._waiting.append((release, thing))

    def give_back(self) -> None:
        """Release everything; the device must be done with it."""
        while self._waiting:
            release, thing = self._waiting.popleft()
            release(thing)


def drop(thing: object) -> None:
    """A release that is over when nothing holds `thing` any longer."""


def _close(driver: Any, left: _Leftovers) -> None:
    with _LOCK, suppress(BackendError):  # a device that has failed has lost all memory anyway
        left.closed = True
        driver.synchronize()
        left.give_back()


class _Block:
    """Memory, the device's or the host's that the device reaches, given back when nobody holds it."""

    def __init__(self, gpu: Gpu, count: int, pinned: bool = False) -> None:
        self.address, self.bytes = gpu.allocate(count, pinned), count
        gpu.release_with(self, gpu.driver.free_pinned if pinned else gpu.driver.free, self.address)


class DeviceArray:
    """An array on the device, C order: a `Tensor`. Slices of leading axes are views; assignment copies."""

    __slots__ = ("_gpu", "_owner", "address", "dtype", "shape")

    def __init__(
        self, gpu: Gpu, address: int, shape: tuple[int, ...], dtype: npt.DTypeLike, owner: object
    ) -> None:
        """owner: whatever keeps the memory at `address`."""
        self._gpu, self._owner = gpu, owner
        self.address, self.shape, self.dtype = address, shape, np.dtype(dtype)

    @classmethod
    def empty(cls, gpu: Gpu, shape: tuple[int, ...], dtype: npt.DTypeLike) -> DeviceArray:
        """New memory, with whatever is in it."""
        block = _Block(gpu, math.prod(shape) * np.dtype(dtype).itemsize)
        return cls(gpu, block.address, shape, dtype, block)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[DeviceArray]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, key: Any, /) -> DeviceArray:
        """A view: whole numbers of leading axes, then at most one slice of the next axis."""
        keys = key if isinstance(key, tuple) else (key,)
        address, shape = self.address, self.shape
        for place, part in enumerate(keys):
            stride = math.prod(shape[1:]) * self.dtype.itemsize
            if isinstance(part, slice):
                assert place == len(keys) - 1, "what follows a slice would not be contiguous"
                start, stop, step = part.indices(shape[0])
                assert step == 1, "only contiguous slices"
                address, shape = address + start * stride, (max(0, stop - start), *shape[1:])
            else:
                index = int(part)
                assert -shape[0] <= index < shape[0], (index, shape)
                address, shape = address + index % shape[0] * stride, shape[1:]
        return DeviceArray(self._gpu, address, shape, self.dtype, self._owner)

    def __setitem__(self, key: Any, value: Any, /) -> None:
        """Copy in: from the device, or from numpy, which may change as soon as this returns."""
        target = self[key]
        if not isinstance(value, DeviceArray):
            value = np.ascontiguousarray(value, self.dtype)
        assert target.shape == value.shape, (target.shape, value.shape)
        if target.nbytes:
            source = value.address if isinstance(value, DeviceArray) else value.ctypes.data
            with self._gpu.lock:
                self._gpu.driver.copy(target.address, source, target.nbytes)

    def copy(self) -> DeviceArray:
        made = DeviceArray.empty(self._gpu, self.shape, self.dtype)
        made[:] = self
        return made

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> Array:
        """The values, fetched: waits for what is queued."""
        fetched = np.empty(self.shape, self.dtype)
        if self.nbytes:
            with self._gpu.lock:
                self._gpu.driver.copy(fetched.ctypes.data, self.address, self.nbytes)
                self._gpu.synchronize()
        return fetched if dtype is None else fetched.astype(dtype)


class DeviceRingCache(RingCache):
    """A ring whose keys and values are on the device; slots' positions are the host's, and go along with a
    run's other inputs.

    A window's ring has its full size at once and others grow by doubling: whatever was captured for the old
    buffers is lost when they grow.
    """

    def __init__(self, gpu: Gpu, spec: StageSpec, limits: CacheLimits) -> None:
        self._gpu = gpu
        super().__init__(
            spec.layers,
            spec.kv_heads,
            spec.head_dim,
            window=spec.window,
            rollback=limits.rollback,
            limit=limits.positions,
            first_capacity=256 if spec.window is None else spec.window - 1 + limits.rollback,
            growth=2.0,
        )

    def _new_buffer(self, shape: tuple[int, ...]) -> Any:
        return self._gpu.zeros(shape)

    def _copy_slots(self, target: Any, source: Any, slot: int, first: int, count: int) -> None:
        planes, _, heads, capacity, width = target.shape
        row = width * target.dtype.itemsize
        with self._gpu.lock:
            self._gpu.driver.copy_2d(
                target.address + slot * row,
                capacity * row,
                source.address + first * row,
                source.shape[3] * row,
                count * row,
                planes * heads,
            )

    def _upload(self, values: Floats) -> Any:
        uploaded = self._gpu.zeros(values.shape)
        uploaded[:] = values
        return uploaded

    def inputs(self) -> dict[str, Any]:
        named = super().inputs()
        del named["past_positions"]
        return named

    def prepare(self, inputs: Mapping[str, Any], count: int) -> None:
        inputs["past_positions"][...] = self.positions


class Packed:
    """Arrays that the host reads or writes, side by side in pinned memory, and their twins on the device:
    one copy moves them all."""

    def __init__(self, gpu: Gpu, shapes: Mapping[str, tuple[tuple[int, ...], npt.DTypeLike]]) -> None:
        """shapes: name -> (shape, dtype)."""
        self._gpu = gpu
        places, end = {}, 0
        for name, (shape, dtype) in shapes.items():
            size = math.prod(shape) * np.dtype(dtype).itemsize
            places[name] = slice(end, end + size)
            end += -(-size // _ALIGNMENT) * _ALIGNMENT
        self.bytes = end
        self._device, pinned = _Block(gpu, end), _Block(gpu, end, pinned=True)
        self._pinned = pinned.address
        raw = (ctypes.c_ubyte * max(end, 1)).from_address(pinned.address)
        # Arrays hold on to `raw`, and by it to the memory: a result may outlive its sequence.
        raw._pinned = pinned  # type: ignore[attr-defined]
        whole = np.frombuffer(memoryview(raw), np.uint8)
        whole[:] = 0
        self.host: dict[str, Array] = {
            name: whole[places[name]].view(dtype).reshape(shape) for name, (shape, dtype) in shapes.items()
        }
        """The host's side."""
        self.device = {name: self._device.address + place.start for name, place in places.items()}
        """Addresses of the device's side."""

    def upload(self) -> None:
        if self.bytes:
            self._gpu.driver.copy(self._device.address, self._pinned, self.bytes)

    def download(self) -> None:
        if self.bytes:
            self._gpu.driver.copy(self._pinned, self._device.address, self.bytes)


# The first run of a shape may still set something up, which no graph may hold.
_FIRST_CAPTURED = 2


class GpuCall:
    """A `StageCall` on a GPU."""

    def __init__(
        self,
        gpu: Gpu,
        signature: Signature,
        shapes: Mapping[str, tuple[int, ...]],
        cache: StageCache,
        shared: Mapping[str, Any],
    ) -> None:
        """Buffers for a call, as `StageBackend.bind` is asked for it; `connect` an engine before it runs."""
        assert isinstance(cache, DeviceRingCache)
        self._gpu = gpu
        others = {**cache.inputs(), **shared}
        own = {**shapes, "past_positions": (1, cache.capacity)}
        self.input_shapes = {**own, **{name: tensor.shape for name, tensor in others.items()}}
        """Of every input, the cache's and shared ones too."""
        self.output_shapes = output_shapes(signature, self.input_shapes)
        resident = (*RESIDENT, "new_kv")
        self._up = Packed(
            gpu, {name: (shape, input_type(name)) for name, shape in own.items() if name not in resident}
        )
        self._down = Packed(
            gpu,
            {name: (shape, np.float32) for name, shape in self.output_shapes.items() if name not in resident},
        )
        # Padding of inputs is read, if not used: it must be finite.
        read = {name: gpu.zeros(shape) for name, shape in own.items() if name in resident}
        written = {
            name: DeviceArray.empty(gpu, shape, np.float32)
            for name, shape in self.output_shapes.items()
            if name in resident
        }
        self.inputs: dict[str, Any] = {**self._up.host, **read}
        self.outputs: dict[str, Any] = {**self._down.host, **written}
        self._held = {**read, **written, **others}
        self.addresses: dict[str, int] = {
            **self._up.device,
            **self._down.device,
            **{name: tensor.address for name, tensor in self._held.items()},
        }
        """Device address of every input and output."""
        self._enqueue: Callable[[], None] | None = None
        self._capturable = False
        self._graph: Any = None
        self._runs = 0
        self._uploaded = -1  # the host's waits when the inputs were last queued
        self._event: Any = None

    def connect(self, enqueue: Callable[[], None], *, capturable: bool) -> None:
        """Run this from now on.

        enqueue() queues one run on the stream; it raises BackendError when the engine refuses it. capturable:
        whether that may be captured as a CUDA graph.
        """
        self._enqueue, self._capturable = enqueue, capturable

    def begin(self) -> None:
        if self._uploaded == self._gpu.waits:
            with self._gpu.lock:
                self._gpu.driver.wait(self._event)

    def run(self, done: Done) -> None:
        gpu = self._gpu
        with gpu.lock:
            self._runs += 1
            if self._runs == _FIRST_CAPTURED and self._capturable:
                self._capture()  # before the clock starts: it takes longer than a run
            gpu.timed(self._queue if self._graph is None else self._launch, done)
            self._uploaded = gpu.waits
            if self._down.bytes:
                gpu.synchronize()
            else:
                if self._event is None:
                    self._event = gpu.driver.new_event()
                gpu.driver.record(self._event)

    def _launch(self) -> None:
        self._gpu.driver.launch(self._graph)

    def _capture(self) -> None:
        gpu = self._gpu
        try:
            self._graph = gpu.driver.capture(self._queue)
        except BackendError as error:
            gpu.refusal = str(error)
        else:
            gpu.captured += 1
            gpu.release_with(self, gpu.driver.release, self._graph)

    def upload(self) -> None:
        """Queue the copy of what the host has filled in, for a run that is not this call's own: that the
        device waits for it is the caller's affair."""
        self._up.upload()

    def _queue(self) -> None:
        assert self._enqueue is not None
        self._up.upload()
        self._enqueue()
        self._down.download()
