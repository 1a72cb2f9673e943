"""Stages as TensorRT engines, everything resident on the GPU; `tensorrt` and `tensorrt_rtx` alike.

An engine has two optimization profiles, for prefill and for decode steps. A call has an execution context of
its own, because a captured graph holds on to its state; all contexts share one scratch memory, since
runs follow each other on one stream.
"""

from __future__ import annotations

import mmap
from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..cache import StageCache
from ..errors import BackendError, BundleError
from ..manifest import Manifest
from ..specs import StageSpec
from ..tensorrt_forms import DECODE, Profiles, build_command, check_shape, choose_profile
from .base import CacheLimits
from .contract import check_contract, input_type, stage_inputs, stage_outputs
from .gpu import DeviceRingCache, Gpu, drop
from .gpu_call import GpuCall, bind_buffers
from .tensorrt_flavour import Flavour

__all__ = ["TensorRtStage"]


class TensorRtStage:
    """One stage's engine."""

    def __init__(
        self,
        gpu: Gpu,
        flavour: Flavour,
        manifest: Manifest,
        stage: str,
        plan: Path,
        ranges: Profiles,
        bundle: Path,
    ) -> None:
        """Load the engine in the file `plan`, which `find_tensorrt_engine` has compared with this machine.

        ranges: what it was built for; bundle: for the advice to build it again.

        Raises BackendError when TensorRT refuses it, BundleError when its inputs or outputs are not what the
        manifest says.
        """
        self.memory = gpu
        self._gpu, self._flavour, self._file = gpu, flavour, plan.name
        self._stage, self._spec, self._ranges = stage, manifest.stages[stage], ranges
        self._build = build_command(bundle, flavour.target)
        self._axes = stage_inputs(manifest, stage)
        self._output_axes = stage_outputs(manifest, stage)
        self._messages: deque[str] = deque(maxlen=3)
        # Not a method of ours: the engine holds its logger, where Python can't see the circle.
        self._logger = flavour.logger(partial(_note, self._messages))
        self._runtime = flavour.module.Runtime(self._logger)
        self._engine = self._deserialize(plan)
        self._check()
        self._new_context = flavour.context_maker(self._engine)
        profiles = range(self._engine.num_optimization_profiles)
        self._scratch = max(self._engine.get_device_memory_size_for_profile_v2(each) for each in profiles)
        gpu.scratch(self._scratch)
        gpu.release_with(self, drop, self._engine)

    def _refused(self, what: str) -> BackendError:
        reasons = "; ".join(self._messages) or "it gave no reason"
        self._messages.clear()
        return BackendError(f"{self._file}: {self._flavour.name} {self._flavour.version} {what}: {reasons}")

    def _deserialize(self, plan: Path) -> Any:
        with plan.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            view = memoryview(mapped)
            try:
                engine = self._runtime.deserialize_cuda_engine(view)
            finally:
                view.release()
        if engine is None:
            raise self._refused("refused it")
        return engine

    def _check(self) -> None:
        """Compare names, axes and types with the manifest: buffers are made by it."""
        trt, engine = self._flavour.module, self._engine
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        found: dict[bool, dict[str, tuple[int | str, ...]]] = {True: {}, False: {}}
        for name in names:
            is_input = engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
            expected = (self._axes if is_input else self._output_axes).get(name)
            sizes = tuple(engine.get_tensor_shape(name))
            found[is_input][name] = _named(sizes, expected)
            kind = engine.get_tensor_dtype(name)
            wanted = trt.DataType.INT64 if input_type(name) is np.int64 else trt.DataType.FLOAT
            if kind != wanted or engine.get_tensor_location(name) != trt.TensorLocation.DEVICE:
                raise BundleError(
                    f"{self._file}: {name[:60]!r} is {kind}, {wanted} on the device is needed; build it again"
                )
        check_contract(self._file, "input", self._axes, found[True])
        check_contract(self._file, "output", self._output_axes, found[False])

    def new_cache(self, limits: CacheLimits) -> StageCache:
        """See StageBackend.new_cache."""
        return _EngineCache(self._gpu, self._spec, limits, self._stage, self._ranges, self._build)

    def bind(
        self, shapes: Mapping[str, tuple[int, ...]], cache: StageCache, shared: Mapping[str, Any]
    ) -> GpuCall:
        """See StageBackend.bind. Raises BackendError when no profile takes these shapes."""
        bound = bind_buffers(self._gpu, (self._axes, self._output_axes), shapes, cache, shared)
        sizes = {
            axis: size
            for name, shape in bound.inputs.items()
            for axis, size in zip(self._axes[name], shape, strict=True)
            if isinstance(axis, str)
        }
        profile = choose_profile(self._ranges, self._stage, sizes, self._build)
        with self._gpu.lock:
            context = self._new_context()
            if context is None:
                raise self._refused("gave no execution context")
            bound.call.connect(_Execution(self, context, profile, bound.inputs, bound.addresses, bound.kept))
        # What a context holds may be in use until the device is done with its last run.
        self._gpu.release_with(bound.call, drop, (self._new_context, context))
        return bound.call


def _note(messages: deque[str], severity: str, message: str) -> None:
    if severity in ("ERROR", "INTERNAL_ERROR"):
        messages.append(message)


class _EngineCache(DeviceRingCache):
    """A ring that never has more slots than the engine takes, and refuses what would not fit."""

    def __init__(
        self, gpu: Gpu, spec: StageSpec, limits: CacheLimits, stage: str, ranges: Profiles, build: str
    ) -> None:
        self._refused_by = (ranges, stage, DECODE)
        self._build = build
        slots = ranges.stages[stage][DECODE]["past"].max
        wanted = None if spec.window is None else spec.window - 1 + limits.rollback
        self._most = slots if wanted is None or slots < wanted else limits.positions
        super().__init__(gpu, spec, replace(limits, positions=min(limits.positions, self._most)))

    def reserve(self, count: int) -> None:
        """Raises BackendError when the engine was built for fewer positions."""
        if self.length + count > self._most:
            check_shape(*self._refused_by, {"past": self.length + count}, self._build)
        super().reserve(count)


def _named(sizes: tuple[int, ...], expected: tuple[int | str, ...] | None) -> tuple[int | str, ...]:
    """An engine's axes, dynamic ones (-1) by the names that the contract gives them."""
    if expected is None or len(expected) != len(sizes):
        return tuple(sizes)
    return tuple(
        axis if size == -1 and isinstance(axis, str) else size
        for size, axis in zip(sizes, expected, strict=True)
    )


class _Execution:
    """An execution context at one set of shapes and addresses."""

    def __init__(
        self,
        stage: TensorRtStage,
        context: Any,
        profile: int,
        shapes: Mapping[str, tuple[int, ...]],
        addresses: Mapping[str, int],
        kept: Mapping[str, Any],
    ) -> None:
        """kept: tensors that must live as long as this."""
        self._stage, self._context, self._kept = stage, context, kept
        self.capturable = not stage._flavour.captures
        gpu = stage.memory
        self._stream = gpu.driver.stream
        context.set_device_memory(gpu.scratch(stage._scratch), stage._scratch)
        done = context.set_optimization_profile_async(profile, self._stream)
        done = done and all(context.set_input_shape(name, shape) for name, shape in shapes.items())
        done = done and all(context.set_tensor_address(name, address) for name, address in addresses.items())
        if not done:
            raise stage._refused("refused shapes that its profile has")

    def enqueue(self) -> None:
        """See Execution.enqueue."""
        if not self._context.execute_async_v3(self._stream):
            raise self._stage._refused("could not run it")
