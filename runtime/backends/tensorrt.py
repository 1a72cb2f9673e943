"""The differences between the Python modules `tensorrt` (10.3 to 11) and `tensorrt_rtx`, in one place.

Both have nearly the same interface. TensorRT builds for the GPU it runs on and keeps a timing cache;
TensorRT-RTX builds for compute capabilities by name, with no GPU there, compiles the rest when an engine is
first loaded, and a timing cache would only make it look for a GPU. Reading the GPU's compute capability is
here too. What this does not know: bundles, stages, profiles.

Stages as TensorRT engines, everything resident on the GPU; `tensorrt` and `tensorrt_rtx` alike.

An engine has two optimization profiles, for prefill and for decode steps. A call has an execution context of
its own, because a captured graph holds on to its state; all contexts share one scratch memory, since
runs follow each other on one stream.
"""

from __future__ import annotations

import importlib
import mmap
import os
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..cache import StageCache
from ..engines import build_command
from ..errors import BackendError, BundleError, first_line
from ..files import write_whole
from ..manifest import Manifest, StageSpec
from .base import CacheLimits
from .cuda import import_cudart
from .gpu import DeviceRingCache, Gpu, drop
from .gpu_call import GpuCall, bind_buffers
from .signatures import check_contract, input_type, stage_inputs, stage_outputs
from .tensorrt_profiles import DECODE, Profiles, check_shape, choose_profile

__all__ = ["TENSORRT_TARGETS", "Flavour", "TensorRtStage", "device_compute_capability", "load_flavour"]

TENSORRT_TARGETS = ("tensorrt", "tensorrt-rtx")

_NAMES = {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT-RTX"}
_MODULES = {"tensorrt": ("tensorrt",), "tensorrt-rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings")}
_OLDEST = {"tensorrt": (10, 3), "tensorrt-rtx": (1, 1)}
_INSTALL = {
    "tensorrt": "on a Jetson it comes with JetPack (apt install python3-libnvinfer), elsewhere "
    "pip install 'blt-edge[tensorrt]'",
    "tensorrt-rtx": "pip install 'blt-edge[tensorrt-rtx]'",
}


@dataclass(frozen=True)
class Flavour:
    """One of the two modules, imported."""

    target: str
    """One of `TENSORRT_TARGETS`."""
    version: str
    """The module's own, such as "10.3.0.26"."""
    module: Any
    """Its classes; None where only descriptions are compared."""

    @property
    def name(self) -> str:
        """What people call it."""
        return _NAMES[self.target]

    @property
    def ahead_of_time(self) -> bool:
        """Whether it builds for GPUs that are not there."""
        return self.target == "tensorrt-rtx"

    @property
    def compute_capabilities(self) -> tuple[str, ...]:
        """What it builds for by name: ("7.5", "8.0", ...); nothing where it builds for its own GPU only."""
        return tuple(sorted(_capability_names(self.module), key=float)) if self.ahead_of_time else ()

    @property
    def captures(self) -> bool:
        """Whether its contexts capture CUDA graphs by themselves.

        RTX knows when: it first runs a new shape with makeshift kernels and compiles better ones meanwhile,
        and a graph captured by others would keep the makeshift ones, or fail.
        """
        return self.ahead_of_time

    def create_network(self, builder: Any) -> Any:
        """A network whose every tensor has the type that the graph gives it."""
        # 10.x has to be told; later modules keep the flag and know nothing else.
        strong = getattr(self.module.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        return builder.create_network(0 if strong is None else 1 << int(strong))

    def set_up(
        self,
        config: Any,
        *,
        capabilities: tuple[str, ...],
        workspace: int | None,
        optimization_level: int | None,
    ) -> None:
        """Set a builder configuration; None leaves a value to the engine.

        Float32 products stay float32 (no TF32). capabilities: only what `compute_capabilities` lists.
        """
        trt = self.module
        config.clear_flag(trt.BuilderFlag.TF32)
        if self.ahead_of_time:
            known = _capability_names(trt)
            config.num_compute_capabilities = len(capabilities)
            for index, capability in enumerate(capabilities):
                config.set_compute_capability(known[capability], index)
        if workspace is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace)
        if optimization_level is not None:
            config.builder_optimization_level = optimization_level

    def monitor(self, report: Any) -> Any:
        """A progress monitor that calls report(innermost phase, steps done, steps), from any thread.

        None where the module has none. It must outlive the build.
        """
        base = getattr(self.module, "IProgressMonitor", None)
        return None if base is None else _monitor(base, report)

    def logger(self, write: Any) -> Any:
        """A logger that calls write(severity name such as "ERROR", message) and prints nothing."""
        base = self.module.ILogger

        class Recorder(base):  # type: ignore[misc, valid-type]
            def __init__(self) -> None:
                base.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                write(severity.name, message)

        return Recorder()

    def context_maker(self, engine: Any) -> Callable[[], Any]:
        """A function that makes execution contexts without scratch memory of their own."""
        strategy = self.module.ExecutionContextAllocationStrategy.USER_MANAGED
        if not self.ahead_of_time:
            return partial(engine.create_execution_context, strategy)
        # RTX compiles kernels for this GPU when a context first runs: once for all contexts of an engine.
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(strategy)
        graphs = getattr(self.module, "CudaGraphStrategy", None)
        if graphs is not None:  # 1.2 and newer
            config.cuda_graph_strategy = graphs.WHOLE_GRAPH_CAPTURE
        cache = config.create_runtime_cache()
        config.set_runtime_cache(cache)

        def make(cache: Any = cache) -> Any:  # which must outlive the contexts
            return engine.create_execution_context(config)

        return make

    # The timing cache: how long kernels took on this GPU, so that the next build need not try them again.

    def timing_cache_path(self, capability: str) -> Path | None:
        """The user's own file of it for this version and GPU; None where it is of no use.

        Not in the bundle: a bundle may come from anybody, and this is parsed by native code.
        """
        if self.ahead_of_time:
            return None
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        return root / "blt-edge" / f"{self.target}-{self.version}-sm{capability.replace('.', '')}.timing"

    def read_timing_cache(self, config: Any, path: Path) -> Any:
        """Let a build use what is in `path`, if anything is; returns the cache, which must outlive it."""
        try:
            data = path.read_bytes()
        except OSError:
            data = b""
        cache = config.create_timing_cache(data)
        if cache is None or not config.set_timing_cache(cache, False):
            cache = config.create_timing_cache(b"")
            config.set_timing_cache(cache, False)
        return cache

    def write_timing_cache(self, config: Any, path: Path) -> None:
        """Keep what a build has learned, as well as can be: it is never needed."""
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, lambda new: new.write_bytes(memoryview(config.get_timing_cache().serialize())))


def load_flavour(target: str) -> Flavour:
    """Import the module of one of `TENSORRT_TARGETS`.

    Raises BackendError when it is not installed, can't be loaded, or is too old.
    """
    for name in _MODULES[target]:
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError:
            continue
        except (ImportError, OSError, RuntimeError) as error:  # a library that it needs
            raise BackendError(
                f"{_NAMES[target]} is installed, but can't be loaded: {first_line(error)}"
            ) from error
        if not hasattr(module, "Builder"):
            continue  # a package that only names others
        return _checked(Flavour(target, str(module.__version__), module))
    raise BackendError(f"{_NAMES[target]} is not installed: {_INSTALL[target]}")


def _checked(flavour: Flavour) -> Flavour:
    oldest = _OLDEST[flavour.target]
    numbers = flavour.version.split(".")[:2]
    if all(number.isdecimal() for number in numbers) and tuple(map(int, numbers)) < oldest:
        raise BackendError(
            f"{flavour.name} {flavour.version} is too old, {'.'.join(map(str, oldest))} or newer is needed: "
            f"{_INSTALL[flavour.target]}"
        )
    return flavour


def device_compute_capability() -> str | None:
    """Compute capability of the first visible GPU, such as "8.7"; None where there is no GPU or no driver.

    Nothing is kept on the GPU. Raises BackendError when cuda-python is missing.
    """
    cudart = import_cudart()
    attributes = cudart.cudaDeviceAttr
    wanted = (
        attributes.cudaDevAttrComputeCapabilityMajor,
        attributes.cudaDevAttrComputeCapabilityMinor,
    )
    try:
        answers = [cudart.cudaDeviceGetAttribute(attribute, 0) for attribute in wanted]
    except (RuntimeError, OSError):  # a driver's library that can't be loaded
        return None
    if any(int(status) != 0 for status, _ in answers):
        return None
    return ".".join(str(value) for _, value in answers)


def _capability_names(module: Any) -> dict[str, Any]:
    members = module.ComputeCapability.__members__
    return {
        f"{name[2:-1]}.{name[-1]}": value
        for name, value in members.items()
        if name.startswith("SM") and name[2:].isdecimal()
    }


def _monitor(base: Any, report: Any) -> Any:
    class Monitor(base):  # type: ignore[misc]
        def __init__(self) -> None:
            base.__init__(self)
            self._open: dict[str, tuple[int, int]] = {}  # phase -> steps done and steps, the innermost last

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            self._open[phase] = (0, steps)
            report(phase, 0, steps)

        def step_complete(self, phase: str, step: int) -> bool:
            if phase in self._open:
                self._open[phase] = (step + 1, self._open[phase][1])
                report(phase, *self._open[phase])
            return True

        def phase_finish(self, phase: str) -> None:
            self._open.pop(phase, None)
            for name, (done, steps) in [*self._open.items()][-1:]:
                report(name, done, steps)

    return Monitor()


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
