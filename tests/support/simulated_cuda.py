"""A CUDA driver without a GPU: host memory as a device, with the real one's rules and worst timing.

Queued work is carried out only when the host waits, so that a buffer written too early shows as a wrong
result. Memory outside what was allocated, memory or a graph given back while anything is queued (CUDA need
not wait for it), a capture in which anything is allocated, given back, copied from pageable memory or queued
by another thread, and a context changed after its capture are errors. New memory holds NaN.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from blt_edge.runtime.errors import BackendError

__all__ = ["SimulatedDriver", "compute", "cpu_session"]


class SimulatedDriver:
    """See `runtime.backends.cuda.CudaDriver`."""

    name = "Simulated"
    compute_capability = (8, 6)
    stream = 77

    def __init__(self, most: int | None = None) -> None:
        """most: bytes of device memory there are."""
        self._blocks: dict[int, np.ndarray] = {}
        self._pinned: dict[int, np.ndarray] = {}
        self._queue: list[Callable[[], None]] = []
        self._captured: list[Callable[[], None]] | None = None
        self._capturing_thread = 0
        self._most = most
        self.refuses_capture = False
        """What is captured turns out not to be capturable."""
        self.broken: list[str] = []
        """Rules that were broken where no test hears an exception: when Python drops something."""
        self.launches = 0
        self.synchronized = 0

    @property
    def allocated(self) -> int:
        """Device bytes in use."""
        return sum(block.nbytes for block in self._blocks.values())

    def memory(self) -> tuple[int, int]:
        most = self._most or 1 << 40
        return most - self.allocated, most

    def allocate(self, count: int) -> int:
        assert self._captured is None, "a captured graph must not allocate"
        if self._most is not None and self.allocated + count > self._most:
            raise BackendError("CUDA: cudaMalloc: out of memory")
        return self._new(self._blocks, count)

    def _new(self, blocks: dict[int, np.ndarray], count: int) -> int:
        block = np.full(count, 0xFF, np.uint8)
        blocks[block.ctypes.data] = block
        return int(block.ctypes.data)

    def _check_idle(self, what: str) -> None:
        if self._queue or self._captured is not None:
            self.broken.append(f"{what} while work is {'queued' if self._queue else 'captured'}")

    def free(self, address: int) -> None:
        self._check_idle("memory freed")
        self._drain()
        self._blocks.pop(address)[:] = 0xFF

    def allocate_pinned(self, count: int) -> int:
        assert self._captured is None, "a captured graph must not allocate"
        return self._new(self._pinned, count)

    def free_pinned(self, address: int) -> None:
        self._check_idle("pinned memory freed")
        self._drain()
        self._pinned.pop(address)[:] = 0xFF

    def within(self, address: int, count: int) -> bool:
        """Whether these bytes are all in one block of ours."""
        return any(
            start <= address and address + count <= start + block.nbytes
            for blocks in (self._blocks, self._pinned)
            for start, block in blocks.items()
        )

    def enqueue(self, work: Callable[[], None]) -> None:
        """Queue anything."""
        ours = self._captured is None or self._capturing_thread == threading.get_ident()
        assert ours, "a graph must not hold another thread's work"
        (self._queue if self._captured is None else self._captured).append(work)

    def copy(self, target: int, source: int, count: int) -> None:
        if self.within(source, count):
            self.enqueue(lambda: self._move(target, source, count))
            return
        # Pageable memory may change after the call; a graph would read it when it is launched.
        assert self._captured is None, "a captured graph must not copy from pageable memory"
        data = ctypes.string_at(source, count)
        self.enqueue(lambda: self._write(target, data))

    def _write(self, target: int, data: bytes) -> None:
        assert self.within(target, len(data))
        ctypes.memmove(target, data, len(data))

    def _move(self, target: int, source: int, count: int) -> None:
        assert self.within(source, count), "read after free"
        ctypes.memmove(target, source, count)

    def copy_2d(self, target: int, pitch: int, source: int, source_pitch: int, width: int, rows: int) -> None:
        assert width <= pitch
        assert width <= source_pitch

        def work() -> None:
            assert self.within(target, pitch * (rows - 1) + width)
            assert self.within(source, source_pitch * (rows - 1) + width)
            for row in range(rows):
                ctypes.memmove(target + row * pitch, source + row * source_pitch, width)

        self.enqueue(work)

    def clear(self, address: int, count: int) -> None:
        assert self.within(address, count)
        self.enqueue(lambda: ctypes.memset(address, 0, count) and None)

    def _drain(self) -> None:
        queue, self._queue = self._queue, []
        for work in queue:
            work()

    def synchronize(self) -> None:
        assert self._captured is None
        self.synchronized += 1
        self._drain()

    def new_event(self) -> list[float]:
        return []

    def record(self, event: list[float]) -> None:
        event.clear()
        self.enqueue(lambda: event.append(time.perf_counter()))

    def wait(self, event: list[float]) -> None:
        while not event:
            self._queue.pop(0)()

    def seconds(self, start: list[float], end: list[float]) -> float:
        return end[-1] - start[-1]

    def capture(self, work: Callable[[], None]) -> list[Callable[[], None]]:
        self._captured, self._capturing_thread = [], threading.get_ident()
        try:
            work()
            if self.refuses_capture:
                raise BackendError("CUDA: cudaStreamEndCapture: operation failed due to a previous error")
            return self._captured
        finally:
            self._captured = None

    def launch(self, graph: list[Callable[[], None]]) -> None:
        self.launches += 1
        for work in graph:
            self.enqueue(work)

    def release(self, graph: list[Callable[[], None]]) -> None:
        self._check_idle("a graph released")
        graph.clear()

    @property
    def capturing(self) -> bool:
        """Whether work is being captured."""
        return self._captured is not None

    def array(self, address: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """What lies at an address; a view."""
        dtype = np.dtype(dtype)
        count = int(np.prod(shape)) * dtype.itemsize
        assert self.within(address, count), "memory that was not allocated"
        raw = (ctypes.c_ubyte * count).from_address(address)
        return np.frombuffer(raw, dtype).reshape(shape)


def cpu_session(path: Path) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if b"QuantizeLinear" in path.read_bytes():  # on activations: "DequantizeLinear" has a small q
        # A GPU's int8 products don't saturate, as those of processors without VNNI do.
        options.add_session_config_entry("session.x64quantprecision", "1")
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def compute(driver: SimulatedDriver, session: Any, tensors: dict[str, tuple[int, tuple[int, ...]]]) -> None:
    feeds, names = {}, [value.name for value in session.get_outputs()]
    for value in session.get_inputs():
        dtype = np.int64 if value.type == "tensor(int64)" else np.float32
        feeds[value.name] = driver.array(*tensors[value.name], dtype)
    for name, result in zip(names, session.run(names, feeds), strict=True):
        driver.array(*tensors[name], np.float32)[...] = result
