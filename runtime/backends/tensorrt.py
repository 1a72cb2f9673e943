"""TensorRT: the Python modules `tensorrt` (10.3 to 11) and `tensorrt_rtx`, and stages as engines of either.

Both modules have nearly the same interface; `TensorRtModule` is the one place that knows the differences.
TensorRT builds for the GPU it runs on and keeps a timing cache; TensorRT-RTX builds for compute capabilities
by name, with no GPU there, compiles the rest when an engine is first loaded, and a timing cache would only
make it look for a GPU.

An engine has two optimization profiles, for prefill and for decode steps. A call has an execution context of
its own, because a captured graph holds on to its state; all contexts share one scratch memory, since runs
follow each other on one stream.
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
from ..errors import BackendError, BundleError, first_line, requirement
from ..files import write_whole
from ..manifest import Manifest, StageSpec
from .base import CacheLimits, OneText
from .gpu import DeviceRingCache, Gpu, GpuCall, drop
from .signatures import Signature, check_signature, input_type, stage_signature
from .tensorrt_profiles import DECODE, Profiles, build_command, check_shape, choose_profile

__all__ = ["TENSORRT_TARGETS", "TensorRtModule", "TensorRtStage", "load_tensorrt"]


@dataclass(frozen=True)
class _Edition:
    name: str
    modules: tuple[str, ...]
    """Names to import it by; a package may only name others."""
    oldest: tuple[int, int]
    install: str


_EDITIONS = {
    "tensorrt": _Edition(
        "TensorRT",
        ("tensorrt",),
        (10, 3),
        "on a Jetson it comes with JetPack (apt install python3-libnvinfer), elsewhere "
        f"pip install {requirement('tensorrt')}",
    ),
    "tensorrt-rtx": _Edition(
        "TensorRT-RTX",
        ("tensorrt_rtx", "tensorrt_rtx_bindings"),
        (1, 1),
        f"pip install {requirement('tensorrt-rtx')}",
    ),
}

TENSORRT_TARGETS = tuple(_EDITIONS)


# 1. The modules.


@dataclass(frozen=True)
class TensorRtModule:
    """One of the two modules, imported."""

    target: str
    """One of `TENSORRT_TARGETS`."""
    version: str
    """The module's own, such as "10.3.0.26"."""
    module: Any
    """Its classes; None where only descriptions are compared."""

    @property
    def name(self) -> str:
        return _EDITIONS[self.target].name

    @property
    def ahead_of_time(self) -> bool:
        """Whether it builds for GPUs that are not there."""
        return self.target == "tensorrt-rtx"

    @property
    def compute_capabilities(self) -> tuple[str, ...]:
        """What it builds for by name: ("7.5", "8.0", ...); nothing where it builds for its own GPU only."""
        return tuple(sorted(self._capabilities(), key=float)) if self.ahead_of_time else ()

    def _capabilities(self) -> dict[str, Any]:
        return {
            f"{name[2:-1]}.{name[-1]}": value
            for name, value in self.module.ComputeCapability.__members__.items()
            if name.startswith("SM") and name[2:].isdecimal()
        }

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
            known = self._capabilities()
            config.num_compute_capabilities = len(capabilities)
            for index, capability in enumerate(capabilities):
                config.set_compute_capability(known[capability], index)
        if workspace is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace)
        if optimization_level is not None:
            config.builder_optimization_level = optimization_level

    def monitor(self, report: Callable[[str, int, int], None]) -> Any:
        """A progress monitor that calls report(innermost phase, steps done, steps), from any thread.

        None where the module has none. It must outlive the build.
        """
        base = getattr(self.module, "IProgressMonitor", None)
        if base is None:
            return None

        class Monitor(base):  # type: ignore[misc, valid-type]
            def __init__(self) -> None:
                super().__init__()
                self._open: dict[str, tuple[int, int]] = {}  # phase -> steps done and steps, innermost last

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

    def logger(self, write: Callable[[str, str], None]) -> Any:
        """A logger that calls write(severity name such as "ERROR", message) and prints nothing."""
        base = self.module.ILogger

        class Recorder(base):  # type: ignore[misc, valid-type]
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


def load_tensorrt(target: str) -> TensorRtModule:
    """Import the module of one of `TENSORRT_TARGETS`.

    Raises BackendError when it is not installed, can't be loaded, or is too old.
    """
    edition = _EDITIONS[target]
    for name in edition.modules:
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError:
            continue
        except (ImportError, OSError, RuntimeError) as error:  # a library that it needs
            told = f"{edition.name} is installed, but can't be loaded: {first_line(error)}"
            raise BackendError(told) from error
        if hasattr(module, "Builder"):
            break
    else:
        raise BackendError(f"{edition.name} is not installed: {edition.install}")
    version = str(module.__version__)
    numbers = version.split(".")[:2]
    if all(number.isdecimal() for number in numbers) and tuple(map(int, numbers)) < edition.oldest:
        raise BackendError(
            f"{edition.name} {version} is too old, {'.'.join(map(str, edition.oldest))} or newer is needed: "
            f"{edition.install}"
        )
    return TensorRtModule(target, version, module)


# 2. A stage.


class TensorRtStage(OneText):
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
    ) -> None:
        """Load the engine in the file `plan`, which `find_tensorrt_engine` has compared with this machine.

        ranges: what it was built for; bundle: for the advice to build it again.

        Raises BackendError when TensorRT refuses it, BundleError when its inputs or outputs are not what the
        manifest says.
        """
        self.memory = gpu
        self._trt, self._file = trt, plan.name
        self._stage, self._spec, self._ranges = stage, manifest.stages[stage], ranges
        self._build = build_command(bundle, trt.target)
        self._signature = stage_signature(manifest, stage)
        self._messages: deque[str] = deque(maxlen=3)
        # Not a method of ours: the engine holds its logger, where Python can't see the circle.
        self._logger = trt.logger(partial(_note, self._messages))
        self._runtime = trt.module.Runtime(self._logger)
        with plan.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        with mapped, memoryview(mapped) as view:
            self._engine = self._runtime.deserialize_cuda_engine(view)
        if self._engine is None:
            raise self._refused("refused it")
        self._check()
        self._new_context = trt.context_maker(self._engine)
        profiles = range(self._engine.num_optimization_profiles)
        self._scratch = max(self._engine.get_device_memory_size_for_profile_v2(each) for each in profiles)
        gpu.scratch(self._scratch)
        gpu.release_with(self, drop, self._engine)

    def _refused(self, what: str) -> BackendError:
        reasons = "; ".join(self._messages) or "it gave no reason"
        self._messages.clear()
        return BackendError(f"{self._file}: {self._trt.name} {self._trt.version} {what}: {reasons}")

    def _check(self) -> None:
        """Compare names, axes and types with the manifest: buffers are made by it."""
        module, engine = self._trt.module, self._engine
        found: Signature = ({}, {})
        for index in range(engine.num_io_tensors):
            name = engine.get_tensor_name(index)
            side = 0 if engine.get_tensor_mode(name) == module.TensorIOMode.INPUT else 1
            expected = self._signature[side].get(name)
            found[side][name] = _named(tuple(engine.get_tensor_shape(name)), expected)
            kind = engine.get_tensor_dtype(name)
            wanted = module.DataType.INT64 if input_type(name) is np.int64 else module.DataType.FLOAT
            if kind != wanted or engine.get_tensor_location(name) != module.TensorLocation.DEVICE:
                raise BundleError(
                    f"{self._file}: {name[:60]!r} is {kind}, {wanted} on the device is needed; build it again"
                )
        check_signature(self._file, self._signature, found)

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
        with self.memory.lock:
            context = self._new_context()
            if context is None:
                raise self._refused("gave no execution context")
            context.set_device_memory(self.memory.scratch(self._scratch), self._scratch)
            done = context.set_optimization_profile_async(profile, self.memory.driver.stream)
            done = done and all(context.set_input_shape(*shape) for shape in call.input_shapes.items())
            done = done and all(context.set_tensor_address(*address) for address in call.addresses.items())
            if not done:
                raise self._refused("refused shapes that its profile has")
        call.connect(partial(self._run, context), capturable=not self._trt.captures)
        # What a context holds may be in use until the device is done with its last run.
        self.memory.release_with(call, drop, (self._new_context, context))
        return call

    def _run(self, context: Any) -> None:
        if not context.execute_async_v3(self.memory.driver.stream):
            raise self._refused("could not run it")


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
    """An engine's axes, dynamic ones (-1) by the names that the manifest gives them."""
    if expected is None or len(expected) != len(sizes):
        return sizes
    return tuple(
        axis if size == -1 and isinstance(axis, str) else size
        for size, axis in zip(sizes, expected, strict=True)
    )
