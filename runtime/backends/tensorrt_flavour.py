"""The differences between the Python modules `tensorrt` (10.3 to 11) and `tensorrt_rtx`, in one place.

Both have nearly the same interface. TensorRT builds for the GPU it runs on and keeps a timing cache;
TensorRT-RTX builds for compute capabilities by name, with no GPU there, compiles the rest when an engine is
first loaded, and a timing cache would only make it look for a GPU. Reading the GPU's compute capability is
here too. What this does not know: bundles, stages, profiles.
"""

from __future__ import annotations

import importlib
import os
import secrets
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import BackendError, first_line
from .cuda import import_cudart

__all__ = ["TENSORRT_TARGETS", "Flavour", "device_compute_capability", "load_flavour"]

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
        temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}")
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                temporary.write_bytes(memoryview(config.get_timing_cache().serialize()))
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)


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
