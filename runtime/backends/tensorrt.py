"""TensorRT: the Python modules `tensorrt` (10.3 to 11) and `tensorrt_rtx`.

Both modules have nearly the same interface; `TensorRtModule` is the one place that knows the differences.
TensorRT builds for the GPU it runs on and keeps a timing cache; TensorRT-RTX builds for compute capabilities
by name, with no GPU there, compiles the rest when an engine is first loaded, and a timing cache would only
make it look for a GPU.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import BackendError, first_line, requirement
from ..files import write_whole

__all__ = ["TENSORRT_TARGETS", "TensorRtModule", "load_tensorrt"]


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

    def context_maker(self, engine: Any, *, captures: bool = True) -> Callable[[], Any]:
        """A function that makes execution contexts without scratch memory of their own.

        captures: whether they capture CUDA graphs where the module does that by itself.
        """
        strategy = self.module.ExecutionContextAllocationStrategy.USER_MANAGED
        if not self.ahead_of_time:
            return partial(engine.create_execution_context, strategy)
        # RTX compiles kernels for this GPU when a context first runs: once for all contexts of an engine.
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(strategy)
        graphs = getattr(self.module, "CudaGraphStrategy", None)
        if captures and graphs is not None:  # 1.2 and newer
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
