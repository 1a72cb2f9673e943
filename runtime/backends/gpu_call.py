"""A bound call of a stage on a GPU: one copy up, the engine's run, and one copy down of what the host reads.

Where an engine allows that, a call is captured as a CUDA graph the second time it runs, copies and all, and
launched from then on. A call that can't be captured after all goes on as it began; `Gpu.refusal` has the
reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ..cache import StageCache
from ..errors import BackendError
from .base import RESIDENT, Done
from .gpu import DeviceArray, DeviceRingCache, Gpu, Packed
from .signatures import Signature, input_type, output_shapes

__all__ = ["GpuCall"]

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

    def _queue(self) -> None:
        assert self._enqueue is not None
        self._up.upload()
        self._enqueue()
        self._down.download()
