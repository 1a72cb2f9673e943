"""A TensorRT plan, loaded: checked against the manifest before anything is bound to it."""

from __future__ import annotations

import mmap
from collections import deque
from functools import partial
from pathlib import Path

import numpy as np

from ..errors import BackendError, BundleError
from .gpu import Gpu, drop
from .signatures import Signature, check_signature, input_type
from .tensorrt import TensorRtModule

__all__ = ["TensorRtPlan"]


class TensorRtPlan:
    """An engine of TensorRT, and how it says what is wrong with it."""

    def __init__(
        self,
        gpu: Gpu,
        trt: TensorRtModule,
        path: Path,
        signature: Signature,
        *,
        on_host: str | None = None,
        captures: bool = True,
    ) -> None:
        """Load the plan in the file `path`.

        signature: what it must take and give, all of it on the device but the input `on_host`, whose values
        are sizes. captures: as for `TensorRtModule.context_maker`.

        Raises BackendError when TensorRT refuses it, BundleError when it takes or gives something else.
        """
        self._trt, self._file = trt, path.name
        self._messages: deque[str] = deque(maxlen=3)
        # Not a method of ours: the engine holds its logger, where Python can't see the circle.
        self._logger = trt.logger(partial(_note, self._messages))
        self._runtime = trt.module.Runtime(self._logger)
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        with mapped, memoryview(mapped) as view:
            self.engine = self._runtime.deserialize_cuda_engine(view)
        if self.engine is None:
            raise self.refused("refused it")
        self._check(signature, on_host)
        self.new_context = trt.context_maker(self.engine, captures=captures)
        profiles = range(self.engine.num_optimization_profiles)
        self.scratch = max(self.engine.get_device_memory_size_for_profile_v2(each) for each in profiles)
        """Bytes of memory that a run works in."""
        gpu.release_with(self, drop, self.engine)

    def refused(self, what: str) -> BackendError:
        """An error with the reasons that TensorRT has logged."""
        reasons = "; ".join(self._messages) or "it gave no reason"
        self._messages.clear()
        return BackendError(f"{self._file}: {self._trt.name} {self._trt.version} {what}: {reasons}")

    def _check(self, signature: Signature, on_host: str | None) -> None:
        """Compare names, axes and types with the manifest: buffers are made by it."""
        module, engine = self._trt.module, self.engine
        found: Signature = ({}, {})
        for index in range(engine.num_io_tensors):
            name = engine.get_tensor_name(index)
            side = 0 if engine.get_tensor_mode(name) == module.TensorIOMode.INPUT else 1
            expected = signature[side].get(name)
            found[side][name] = _named(tuple(engine.get_tensor_shape(name)), expected)
            kind, place = engine.get_tensor_dtype(name), module.TensorLocation.DEVICE
            wanted = module.DataType.INT64 if input_type(name) is np.int64 else module.DataType.FLOAT
            if name == on_host:
                place = module.TensorLocation.HOST
            if kind != wanted or engine.get_tensor_location(name) != place:
                where = "host" if name == on_host else "device"
                raise BundleError(
                    f"{self._file}: {name[:60]!r} is {kind}, {wanted} on the {where} is needed; "
                    "build it again"
                )
        check_signature(self._file, signature, found)


def _note(messages: deque[str], severity: str, message: str) -> None:
    if severity in ("ERROR", "INTERNAL_ERROR"):
        messages.append(message)


def _named(sizes: tuple[int, ...], expected: tuple[int | str, ...] | None) -> tuple[int | str, ...]:
    """An engine's axes, dynamic ones (-1) by the names that the manifest gives them."""
    if expected is None or len(expected) != len(sizes):
        return sizes
    return tuple(
        axis if size == -1 and isinstance(axis, str) else size
        for size, axis in zip(sizes, expected, strict=True)
    )
