"""TensorRT, several texts in one pass: a plan of a packed graph in one execution context."""

from __future__ import annotations

from pathlib import Path

from ..errors import BackendError
from ..manifest import Manifest
from .gpu import Gpu, drop
from .gpu_packed import GpuPackedStage, Place
from .signatures import ROWS, Shapes, packed_signature
from .tensorrt import TensorRtModule
from .tensorrt_plan import TensorRtPlan
from .tensorrt_profiles import ProfileAxes, Profiles

__all__ = ["TensorRtPackedStage"]


class TensorRtPackedStage(GpuPackedStage):
    """A stage's plan for up to `rows` texts."""

    def __init__(
        self,
        gpu: Gpu,
        trt: TensorRtModule,
        manifest: Manifest,
        stage: str,
        path: Path,
        rows: int,
        ranges: Profiles,
    ) -> None:
        """Load the plan in the file `path`, which was built for `ranges.packed(stage, rows)`.

        Raises as `TensorRtPlan`; BackendError, too, when it was built for other sizes.
        """
        super().__init__(gpu, manifest, stage, rows)
        signature = packed_signature(manifest, stage, rows)
        self._file = path.name
        self._plan = TensorRtPlan(gpu, trt, path, signature, on_host=ROWS, captures=False)
        self._check_sizes(signature[0], ranges.packed(stage, rows))
        with gpu.lock:
            context = self._plan.new_context()
            if context is None or not context.set_optimization_profile_async(0, gpu.driver.stream):
                raise self._plan.refused("gave no execution context")
        self._context = context
        gpu.release_with(self, drop, (self._plan.new_context, context))

    def _check_sizes(self, inputs: Shapes, axes: ProfileAxes) -> None:
        """A pass of other sizes than the plan takes would be refused in the midst of a text."""
        engine = self._plan.engine
        for name, shape in inputs.items():
            wanted = [
                tuple(getattr(axes[axis], bound) if isinstance(axis, str) else axis for axis in shape)
                for bound in ("min", "opt", "max")
            ]
            found = [tuple(each) for each in engine.get_tensor_profile_shape(name, 0)]
            if engine.num_optimization_profiles != 1 or found != wanted:
                raise BackendError(f"{self._file}: it was built for other sizes; build it again")

    def _bind(self, name: str, place: Place, before: Place | None) -> bool:
        address, shape = place
        done = True
        if name in self._taken and (before is None or before[1] != shape):
            done = self._context.set_input_shape(name, shape)
        return bool(done and self._context.set_tensor_address(name, address))

    def _bound(self, done: bool) -> None:
        if not done:
            raise self._plan.refused("refused shapes that its profile has")
        scratch = self._plan.scratch
        self._context.set_device_memory(self._gpu.loose_scratch(scratch), scratch)

    def _execute(self) -> None:
        if not self._context.execute_async_v3(self._gpu.driver.stream):
            raise self._plan.refused("could not run it")
