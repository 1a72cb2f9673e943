"""Stages as engines of TensorRT.

An engine has two optimization profiles, for prefill and for decode steps. A call has an execution context of
its own, because a captured graph holds on to its state; all contexts share one scratch memory, since runs
follow each other on one stream. Plans for several texts are loaded when they are first asked for, and
compared with the plan for one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ..cache import StageCache
from ..errors import BackendError
from ..manifest import Manifest, StageSpec
from ..packed_check import check_packed
from .base import CacheLimits, PackedStage
from .gpu import DeviceRingCache, Gpu, GpuCall, drop
from .gpu_packed import Loaded
from .signatures import stage_signature
from .tensorrt import TensorRtModule
from .tensorrt_packed import TensorRtPackedStage
from .tensorrt_plan import TensorRtPlan
from .tensorrt_profiles import DECODE, PROFILED_PADDING, Profiles, build_command, check_shape, choose_profile

__all__ = ["TensorRtStage"]


class TensorRtStage:
    """A stage as an engine of TensorRT: a `StageBackend`."""

    def __init__(
        self,
        gpu: Gpu,
        trt: TensorRtModule,
        manifest: Manifest,
        stage: str,
        plan: Path,
        ranges: Profiles,
        bundle: Path,
        *,
        packed: Mapping[int, Path] | None = None,
    ) -> None:
        """Load the engine in the file `plan`, which `find_tensorrt_engine` has compared with this machine.

        ranges: what it was built for; bundle: for the advice to build it again. packed: plans of the same
        stage for several texts, by how many.

        Raises BackendError when TensorRT refuses it, BundleError when its inputs or outputs are not what the
        manifest says.
        """
        self.memory = gpu
        self._trt, self._manifest = trt, manifest
        self._stage, self._spec, self._ranges = stage, manifest.stages[stage], ranges
        self._build = build_command(bundle, trt.target)
        self._signature = stage_signature(manifest, stage)
        self._plan = TensorRtPlan(gpu, trt, plan, self._signature)
        gpu.scratch(self._plan.scratch)
        self._files = packed or {}
        self._packed = Loaded(sorted(self._files), self._load_packed)

    @property
    def rows(self) -> tuple[int, ...]:
        return self._packed.rows

    @property
    def padding(self) -> int:
        return PROFILED_PADDING

    @property
    def packed_positions(self) -> int:
        return self._ranges.packed_positions(self._stage)

    def packed(self, texts: int) -> PackedStage:
        return self._packed.for_texts(texts)

    def _load_packed(self, rows: int) -> PackedStage:
        stage, manifest, path = self._stage, self._manifest, self._files[rows]
        packed = TensorRtPackedStage(self.memory, self._trt, manifest, stage, path, rows, self._ranges)
        try:
            check_packed(manifest, stage, self, packed, rows, self._ranges.limits)
        except BackendError as error:
            raise BackendError(f"{error}; {self._build} --force makes it again") from error
        return packed

    def new_cache(self, limits: CacheLimits) -> StageCache:
        return _EngineCache(self.memory, self._spec, limits, self._stage, self._ranges, self._build)

    def bind(
        self, shapes: Mapping[str, tuple[int, ...]], cache: StageCache, shared: Mapping[str, Any]
    ) -> GpuCall:
        """Raises BackendError when no profile takes these shapes."""
        call = GpuCall(self.memory, self._signature, shapes, cache, shared)
        sizes = {
            axis: size
            for name, shape in call.input_shapes.items()
            for axis, size in zip(self._signature[0][name], shape, strict=True)
            if isinstance(axis, str)
        }
        profile = choose_profile(self._ranges, self._stage, sizes, self._build)
        plan = self._plan
        with self.memory.lock:
            context = plan.new_context()
            if context is None:
                raise plan.refused("gave no execution context")
            context.set_device_memory(self.memory.scratch(plan.scratch), plan.scratch)
            done = context.set_optimization_profile_async(profile, self.memory.driver.stream)
            done = done and all(context.set_input_shape(*shape) for shape in call.input_shapes.items())
            done = done and all(context.set_tensor_address(*address) for address in call.addresses.items())
            if not done:
                raise plan.refused("refused shapes that its profile has")
        call.connect(partial(self._run, context), capturable=not self._trt.captures)
        # What a context holds may be in use until the device is done with its last run.
        self.memory.release_with(call, drop, (plan.new_context, context))
        return call

    def _run(self, context: Any) -> None:
        if not context.execute_async_v3(self.memory.driver.stream):
            raise self._plan.refused("could not run it")


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
