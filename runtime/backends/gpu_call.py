"""A bound call of a stage on a GPU: one copy up, the engine's run, and one copy down of what the host reads.

What an engine is stands behind `Execution`. Where it allows that, a call is captured as a CUDA graph the
second time it runs, copies and all, and launched from then on. A call that can't be captured after all goes
on as it began; `Gpu.refusal` has the reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..cache import StageCache
from ..errors import BackendError
from .base import RESIDENT, Done
from .gpu import DeviceArray, DeviceRingCache, Gpu, Packed
from .signatures import Shapes, input_type, output_shapes

__all__ = ["Buffers", "Execution", "GpuCall", "Shape", "bind_buffers"]

Shape = tuple[tuple[int, ...], npt.DTypeLike]
"""A tensor's axes and type."""

# The first run of a shape may still set something up, which no graph may hold.
_FIRST_CAPTURED = 2


class Execution(Protocol):
    """An engine at one set of shapes and addresses."""

    capturable: bool
    """Whether `enqueue` may be captured as a CUDA graph."""

    def enqueue(self) -> None:
        """Queue one run on the stream. Raises BackendError when the engine refuses it."""


class GpuCall:
    """See StageCall. Cache and shared tensors are bound by the execution, not here."""

    def __init__(self, gpu: Gpu, inputs: Mapping[str, Shape], outputs: Mapping[str, Shape]) -> None:
        """Buffers for these; `connect` an execution before the first run."""
        self._gpu = gpu
        self._up = Packed(gpu, {name: shape for name, shape in inputs.items() if name not in RESIDENT})
        kept = (*RESIDENT, "new_kv")
        self._down = Packed(gpu, {name: shape for name, shape in outputs.items() if name not in kept})
        resident = {
            name: DeviceArray.empty(gpu, *shape)
            for name, shape in {**inputs, **outputs}.items()
            if name in kept
        }
        with gpu.lock:
            for name in inputs:
                if name in resident:  # padding is read, if not used: it must be finite
                    gpu.driver.clear(resident[name].address, resident[name].nbytes)
        self.inputs: dict[str, Any] = {**self._up.host, **{n: resident[n] for n in inputs if n in resident}}
        self.outputs: dict[str, Any] = {
            **self._down.host,
            **{n: resident[n] for n in outputs if n in resident},
        }
        self.addresses: dict[str, int] = {
            **self._up.device,
            **self._down.device,
            **{name: array.address for name, array in resident.items()},
        }
        """Device address of every input and output."""
        self._execution: Execution | None = None
        self._graph: Any = None
        self._runs = 0
        self._uploaded = -1  # the host's waits when the inputs were last queued
        self._event: Any = None

    def connect(self, execution: Execution) -> None:
        """Run this from now on."""
        self._execution = execution

    def begin(self) -> None:
        """See StageCall.begin."""
        if self._uploaded == self._gpu.waits:
            with self._gpu.lock:
                self._gpu.driver.wait(self._event)

    def run(self, done: Done) -> None:
        """See StageCall.run."""
        gpu = self._gpu
        with gpu.lock:
            assert self._execution is not None
            self._runs += 1
            if self._runs == _FIRST_CAPTURED and self._execution.capturable:
                self._capture()  # before the clock starts: it takes longer than a run
            gpu.timed(self._launch, done)
            self._uploaded = gpu.waits
            if self._down.bytes:
                gpu.synchronize()
            else:
                if self._event is None:
                    self._event = gpu.driver.new_event()
                gpu.driver.record(self._event)

    def _launch(self) -> None:
        if self._graph is not None:
            self._gpu.driver.launch(self._graph)
        else:
            self._queue()

    def _capture(self) -> None:
        gpu = self._gpu
        try:
            self._graph = gpu.driver.capture(self._queue)
        except BackendError as error:
            gpu.refusal = str(error)
            return
        gpu.captured += 1
        gpu.release_with(self, gpu.driver.release, self._graph)

    def _queue(self) -> None:
        assert self._execution is not None
        self._up.upload()
        self._execution.enqueue()
        self._down.download()


@dataclass(frozen=True)
class Buffers:
    """A call, and what an execution of it reads and writes."""

    call: GpuCall
    """With buffers of its own, not yet connected."""
    inputs: dict[str, tuple[int, ...]]
    """Shape of every input, the cache's and shared ones too."""
    outputs: dict[str, tuple[int, ...]]
    """Shape of every output."""
    addresses: dict[str, int]
    """Device address of all of them."""
    kept: dict[str, Any]
    """Tensors of others that must live as long as the execution."""


def bind_buffers(
    gpu: Gpu,
    axes: tuple[Shapes, Shapes],
    shapes: Mapping[str, tuple[int, ...]],
    cache: StageCache,
    shared: Mapping[str, Any],
) -> Buffers:
    """Buffers for a call; axes: of the graph's inputs and outputs; the others as in `StageBackend.bind`."""
    assert isinstance(cache, DeviceRingCache)
    own = {**shapes, "past_positions": (1, cache.capacity)}
    kept = {**cache.inputs(), **shared}
    inputs = {**own, **{name: tensor.shape for name, tensor in kept.items()}}
    outputs = output_shapes(axes[0], inputs, axes[1])
    call = GpuCall(
        gpu,
        {name: (shape, input_type(name)) for name, shape in own.items()},
        {name: (shape, np.float32) for name, shape in outputs.items()},
    )
    addresses = {**call.addresses, **{name: tensor.address for name, tensor in kept.items()}}
    return Buffers(call, inputs, outputs, addresses, kept)
