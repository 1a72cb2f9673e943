"""A GPU that is not there: host memory as a device, and engines that ONNX Runtime computes on the CPU, with
the real ones' rules and worst timing.

Queued work is carried out only when the host waits, so that a buffer written too early shows as a wrong
result. Memory outside what was allocated, memory or a graph given back while anything is queued (CUDA need
not wait for it), a capture in which anything is allocated, given back, copied from pageable memory or queued
by another thread, and a context changed after its capture are errors. New memory holds NaN.
"""

from __future__ import annotations

import ctypes
import json
import threading
import time
import weakref
from collections.abc import Callable
from enum import Enum, IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from blt_edge.runtime import devices
from blt_edge.runtime.backends import ort_gpu
from blt_edge.runtime.backends.contract import stage_inputs
from blt_edge.runtime.backends.ort_gpu import PROVIDERS
from blt_edge.runtime.backends.tensorrt_flavour import Flavour
from blt_edge.runtime.engines import ENGINE_NAME, form_path, render_engine
from blt_edge.runtime.errors import BackendError
from blt_edge.runtime.integrity import file_record
from blt_edge.runtime.manifest import load_manifest
from blt_edge.runtime.tensorrt_forms import (
    ProfileAxes,
    Profiles,
    describe_tensorrt,
    plan_file,
    profile_limits,
    profiles,
)

__all__ = ["SimulatedDriver", "SimulatedOrt", "SimulatedTensorRt", "simulate", "write_engines", "write_plan"]


class SimulatedDriver:
    """See `runtime.backends.cuda.CudaDriver`."""

    name = "Simulated"
    compute_capability = (8, 6)
    stream = 77

    def __init__(self, most: int | None = None) -> None:
        """most: bytes of device memory there are."""
        self._blocks: dict[int, np.ndarray] = {}
        self._pinned: dict[int, np.ndarray] = {}
        self._queue: list[Callable[[], None]] = []
        self._captured: list[Callable[[], None]] | None = None
        self._capturing_thread = 0
        self._most = most
        self.refuses_capture = False
        """What is captured turns out not to be capturable."""
        self.broken: list[str] = []
        """Rules that were broken where no test hears an exception: when Python drops something."""
        self.launches = 0
        self.synchronized = 0

    @property
    def allocated(self) -> int:
        """Device bytes in use."""
        return sum(block.nbytes for block in self._blocks.values())

    def memory(self) -> tuple[int, int]:
        most = self._most or 1 << 40
        return most - self.allocated, most

    def allocate(self, count: int) -> int:
        assert self._captured is None, "a captured graph must not allocate"
        if self._most is not None and self.allocated + count > self._most:
            raise BackendError("CUDA: cudaMalloc: out of memory")
        return self._new(self._blocks, count)

    def _new(self, blocks: dict[int, np.ndarray], count: int) -> int:
        block = np.full(count, 0xFF, np.uint8)
        blocks[block.ctypes.data] = block
        return int(block.ctypes.data)

    def _check_idle(self, what: str) -> None:
        if self._queue or self._captured is not None:
            self.broken.append(f"{what} while work is {'queued' if self._queue else 'captured'}")

    def free(self, address: int) -> None:
        self._check_idle("memory freed")
        self._drain()
        self._blocks.pop(address)[:] = 0xFF

    def allocate_pinned(self, count: int) -> int:
        assert self._captured is None, "a captured graph must not allocate"
        return self._new(self._pinned, count)

    def free_pinned(self, address: int) -> None:
        self._check_idle("pinned memory freed")
        self._drain()
        self._pinned.pop(address)[:] = 0xFF

    def within(self, address: int, count: int) -> bool:
        """Whether these bytes are all in one block of ours."""
        return any(
            start <= address and address + count <= start + block.nbytes
            for blocks in (self._blocks, self._pinned)
            for start, block in blocks.items()
        )

    def enqueue(self, work: Callable[[], None]) -> None:
        """Queue anything."""
        ours = self._captured is None or self._capturing_thread == threading.get_ident()
        assert ours, "a graph must not hold another thread's work"
        (self._queue if self._captured is None else self._captured).append(work)

    def copy(self, target: int, source: int, count: int) -> None:
        if self.within(source, count):
            self.enqueue(lambda: self._move(target, source, count))
            return
        # Pageable memory may change after the call; a graph would read it when it is launched.
        assert self._captured is None, "a captured graph must not copy from pageable memory"
        data = ctypes.string_at(source, count)
        self.enqueue(lambda: self._write(target, data))

    def _write(self, target: int, data: bytes) -> None:
        assert self.within(target, len(data))
        ctypes.memmove(target, data, len(data))

    def _move(self, target: int, source: int, count: int) -> None:
        assert self.within(source, count), "read after free"
        ctypes.memmove(target, source, count)

    def copy_2d(self, target: int, pitch: int, source: int, source_pitch: int, width: int, rows: int) -> None:
        assert width <= pitch
        assert width <= source_pitch

        def work() -> None:
            assert self.within(target, pitch * (rows - 1) + width)
            assert self.within(source, source_pitch * (rows - 1) + width)
            for row in range(rows):
                ctypes.memmove(target + row * pitch, source + row * source_pitch, width)

        self.enqueue(work)

    def clear(self, address: int, count: int) -> None:
        assert self.within(address, count)
        self.enqueue(lambda: ctypes.memset(address, 0, count) and None)

    def _drain(self) -> None:
        queue, self._queue = self._queue, []
        for work in queue:
            work()

    def synchronize(self) -> None:
        assert self._captured is None
        self.synchronized += 1
        self._drain()

    def new_event(self) -> list[float]:
        return []

    def record(self, event: list[float]) -> None:
        event.clear()
        self.enqueue(lambda: event.append(time.perf_counter()))

    def wait(self, event: list[float]) -> None:
        while not event:
            self._queue.pop(0)()

    def seconds(self, start: list[float], end: list[float]) -> float:
        return end[-1] - start[-1]

    def capture(self, work: Callable[[], None]) -> list[Callable[[], None]]:
        self._captured, self._capturing_thread = [], threading.get_ident()
        try:
            work()
            if self.refuses_capture:
                raise BackendError("CUDA: cudaStreamEndCapture: operation failed due to a previous error")
            return self._captured
        finally:
            self._captured = None

    def launch(self, graph: list[Callable[[], None]]) -> None:
        self.launches += 1
        for work in graph:
            self.enqueue(work)

    def release(self, graph: list[Callable[[], None]]) -> None:
        self._check_idle("a graph released")
        graph.clear()

    @property
    def capturing(self) -> bool:
        """Whether work is being captured."""
        return self._captured is not None

    def array(self, address: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """What lies at an address; a view."""
        dtype = np.dtype(dtype)
        count = int(np.prod(shape)) * dtype.itemsize
        assert self.within(address, count), "memory that was not allocated"
        raw = (ctypes.c_ubyte * count).from_address(address)
        return np.frombuffer(raw, dtype).reshape(shape)


def _cpu_session(path: Path) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _compute(driver: SimulatedDriver, session: Any, tensors: dict[str, tuple[int, tuple[int, ...]]]) -> None:
    feeds, names = {}, [value.name for value in session.get_outputs()]
    for value in session.get_inputs():
        dtype = np.int64 if value.type == "tensor(int64)" else np.float32
        feeds[value.name] = driver.array(*tensors[value.name], dtype)
    for name, result in zip(names, session.run(names, feeds), strict=True):
        driver.array(*tensors[name], np.float32)[...] = result


# TensorRT.


def write_plan(path: Path, bundle: Path, stage: str, ranges: Profiles) -> None:
    """A "plan": where its graph is, and for each profile the least, best and largest shape of each input."""
    manifest = load_manifest(bundle)

    def size(axes: ProfileAxes, axis: int | str, bound: str) -> int:
        return axis if isinstance(axis, int) else int(getattr(axes[axis], bound))

    shapes = [
        {
            name: [[size(axes, axis, bound) for axis in named] for bound in ("min", "opt", "max")]
            for name, named in stage_inputs(manifest, stage).items()
        }
        for axes in ranges.stages[stage]
    ]
    graph = bundle / manifest.stages[stage].file
    path.write_text(json.dumps({"graph": str(graph), "profiles": shapes}))


def write_engines(bundle: Path, flavour: Flavour, capability: str = "8.6", **limits: int) -> Path:
    """Engines of every stage in the bundle, as `blt-edge build` leaves them; returns the form's directory."""
    manifest = load_manifest(bundle)
    ranges = profiles(manifest, profile_limits(manifest, **limits))
    description = describe_tensorrt(manifest, flavour, (capability,), ranges)
    form = form_path(bundle, description)
    form.mkdir(parents=True)
    for stage in manifest.stages:
        write_plan(form / plan_file(stage), bundle, stage, ranges)
    files = {path.name: file_record(path) for path in form.iterdir()}
    (form / ENGINE_NAME).write_text(render_engine(description, files))
    return form


class SimulatedTensorRt:
    """What of the modules `tensorrt` and `tensorrt_rtx` the backend uses."""

    DataType = Enum("DataType", ["FLOAT", "INT64", "HALF"])
    TensorIOMode = Enum("TensorIOMode", ["INPUT", "OUTPUT"])
    TensorLocation = Enum("TensorLocation", ["DEVICE", "HOST"])
    ExecutionContextAllocationStrategy = Enum("ExecutionContextAllocationStrategy", ["USER_MANAGED"])
    CudaGraphStrategy = Enum("CudaGraphStrategy", ["DISABLED", "WHOLE_GRAPH_CAPTURE"])

    class ILogger:
        """Base of loggers."""

        class Severity(IntEnum):
            """How bad."""

            ERROR = 1

        def __init__(self, base: Any = None) -> None: ...

    def __init__(self, driver: SimulatedDriver) -> None:
        self.driver = driver

    def flavour(self, target: str) -> Flavour:
        """As one of the two modules."""
        return Flavour(target, "10.3.0", self)

    def Runtime(self, logger: Any) -> _Runtime:  # noqa: N802
        """As TensorRT spells it."""
        return _Runtime(self, logger)


def _keep_alive(holder: object, held: object) -> None:
    # As the modules' bindings do it: where Python's search for circles does not look.
    weakref.finalize(holder, lambda held: None, held).atexit = False


class _Runtime:
    def __init__(self, module: SimulatedTensorRt, logger: Any) -> None:
        self._module = module
        self._log = weakref.WeakMethod(logger.log)
        _keep_alive(self, logger)

    def deserialize_cuda_engine(self, data: Any) -> _Engine | None:
        try:
            plan = json.loads(bytes(data))
        except ValueError:
            log = self._log()
            assert log is not None
            log(SimulatedTensorRt.ILogger.Severity.ERROR, "magic number mismatch")
            return None
        engine = _Engine(self._module, plan)
        _keep_alive(engine, self)
        return engine


class _Engine:
    def __init__(self, module: SimulatedTensorRt, plan: dict[str, Any]) -> None:
        self.module, self._profiles = module, plan["profiles"]
        self.session = _cpu_session(Path(plan["graph"]))
        self._inputs = {value.name: value for value in self.session.get_inputs()}
        self._values = {**self._inputs, **{value.name: value for value in self.session.get_outputs()}}
        self._names = list(self._values)
        self.num_io_tensors = len(self._names)
        self.num_optimization_profiles = len(self._profiles)

    def get_tensor_name(self, index: int) -> str:
        return self._names[index]

    def get_tensor_mode(self, name: str) -> Any:
        return self.module.TensorIOMode.INPUT if name in self._inputs else self.module.TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        whole = self._values[name].type == "tensor(int64)"
        return self.module.DataType.INT64 if whole else self.module.DataType.FLOAT

    def get_tensor_location(self, name: str) -> Any:
        return self.module.TensorLocation.DEVICE

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(-1 if isinstance(axis, str) else axis for axis in self._values[name].shape)

    def get_tensor_profile_shape(self, name: str, profile: int) -> Any:
        return self._profiles[profile][name]

    def get_device_memory_size_for_profile_v2(self, profile: int) -> int:
        return 1000 * (profile + 1)

    def create_runtime_config(self) -> Any:
        class Config:
            cuda_graph_strategy = SimulatedTensorRt.CudaGraphStrategy.DISABLED

            def set_execution_context_allocation_strategy(self, strategy: Any) -> None: ...
            def create_runtime_cache(self) -> object:
                return object()

            def set_runtime_cache(self, cache: object) -> bool:
                return True

        return Config()

    def create_execution_context(self, how: Any) -> _Context:
        context = _Context(self, getattr(how, "cuda_graph_strategy", None))
        _keep_alive(context, self)
        return context


class _Context:
    def __init__(self, engine: _Engine, graphs: Any) -> None:
        """graphs: RTX's strategy; None for TensorRT."""
        self._engine, self._driver = engine, engine.module.driver
        self._graphs, self._runs = graphs, 0
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._profile = 0
        self._captured = False
        self._scratch: tuple[int, int] = (0, 0)

    def set_device_memory(self, address: int, size: int) -> None:
        assert not self._captured
        self._scratch = (address, size)

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        assert not self._captured
        assert stream == self._driver.stream
        self._profile = profile
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert not self._captured, "a captured graph holds on to its context"
        least, _, most = self._engine.get_tensor_profile_shape(name, self._profile)
        self._shapes[name] = tuple(shape)
        return all(low <= size <= high for low, size, high in zip(least, shape, most, strict=True))

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert not self._captured
        self._addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == self._driver.stream
        assert self._scratch[1] >= self._engine.get_device_memory_size_for_profile_v2(self._profile)
        self._captured = self._driver.capturing
        assert self._runs or not self._captured, "the first run after a shape is set allocates"
        if self._graphs is not None:
            assert self._graphs is SimulatedTensorRt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            assert not self._captured, "it captures by itself"
        self._runs += 1
        tensors = self._tensors()

        def work() -> None:
            self._driver.array(*self._scratch[:1], (self._scratch[1],), np.uint8)[...] = 0xEE
            _compute(self._driver, self._engine.session, tensors)

        self._driver.enqueue(work)
        return True

    def _tensors(self) -> dict[str, tuple[int, tuple[int, ...]]]:
        sizes: dict[str, int] = {}
        for value in self._engine.session.get_inputs():
            for axis, size in zip(value.shape, self._shapes[value.name], strict=True):
                if isinstance(axis, str):
                    assert sizes.setdefault(axis, size) == size, axis
        shapes = dict(self._shapes)
        for value in self._engine.session.get_outputs():
            shapes[value.name] = tuple(sizes[axis] if isinstance(axis, str) else axis for axis in value.shape)
        return {name: (self._addresses[name], shape) for name, shape in shapes.items()}


# ONNX Runtime.


class SimulatedOrt:
    """What of onnxruntime-gpu the backend uses."""

    __version__ = "1.99"

    def __init__(
        self,
        driver: SimulatedDriver,
        provider: str,
        *,
        falls_back: bool = False,
        captures: bool = True,
    ) -> None:
        """falls_back: sessions run on the CPU whatever was asked for, as happens without CUDA's libraries.
        captures: whether all nodes are where they can be captured."""
        self.driver, self.provider, self.falls_back = driver, provider, falls_back
        self.captures = captures
        self.options: list[dict[str, str]] = []
        self.preloaded = 0

    def preload_dlls(self) -> None:
        print("Failed to load libcublas.so")
        self.preloaded += 1

    def get_available_providers(self) -> list[str]:
        return [self.provider, "CPUExecutionProvider"]

    class SessionOptions:
        """Nothing of it matters here."""

    class RunOptions:
        """Entries by name."""

        def __init__(self) -> None:
            self.entries: dict[str, str] = {}

        def add_run_config_entry(self, name: str, value: str) -> None:
            self.entries[name] = value

    def InferenceSession(  # noqa: N802
        self,
        path: str,
        options: Any,
        providers: list[tuple[str, dict[str, str]]],
        enable_fallback: bool = True,
    ) -> _GpuSession:
        """As ONNX Runtime spells it."""
        assert [name for name, _ in providers] == [self.provider]
        assert self.preloaded, "pip's CUDA libraries are found by nobody else"
        given = providers[0][1]
        self.options.append(given)
        session = _GpuSession(self, Path(path))
        try:
            self._check_options(given)
        except RuntimeError as error:
            if not enable_fallback:
                raise
            print(f"*************** EP Error ***************\nEP Error {error} when using {providers}")
            session.get_providers = lambda: ["CPUExecutionProvider"]  # type: ignore[method-assign]
        return session

    def _check_options(self, given: dict[str, str]) -> None:
        """Names and switches as each provider reads them; others pass."""
        is_tensorrt = self.provider == "TensorrtExecutionProvider"
        for name, value in given.items():
            if is_tensorrt and name == "has_user_compute_stream":
                raise RuntimeError(f"Invalid TensorRT EP option: {name}")
            if is_tensorrt and name.endswith("_enable") and value.lower() not in ("true", "false"):
                raise RuntimeError(f"The value for the key '{name}' should be 'True' or 'False'.")
        graphs = given["trt_cuda_graph_enable" if is_tensorrt else "enable_cuda_graph"]
        if not self.captures and graphs.lower() in ("1", "true"):
            raise RuntimeError(
                "This session cannot use the graph capture feature as requested by the user as all compute "
                f"graph nodes have not been partitioned to the {self.provider}"
            )


class _GpuSession:
    def __init__(self, module: SimulatedOrt, path: Path) -> None:
        self._module, self._session = module, _cpu_session(path)
        self._graphs: dict[str, dict[str, tuple[int, tuple[int, ...]]]] = {}
        self.get_inputs, self.get_outputs = self._session.get_inputs, self._session.get_outputs

    def get_providers(self) -> list[str]:
        return [] if self._module.falls_back else [self._module.provider, "CPUExecutionProvider"]

    def io_binding(self) -> _GpuBinding:
        return _GpuBinding()

    def run_with_iobinding(self, binding: _GpuBinding, options: SimulatedOrt.RunOptions) -> None:
        assert options.entries["disable_synchronize_execution_providers"] == "1"
        # A graph replays the addresses and shapes of its first run, whatever is bound later.
        tensors, graph = dict(binding.tensors), options.entries["gpu_graph_id"]
        if graph != "-1":
            tensors = self._graphs.setdefault(graph, tensors)
        self._module.driver.enqueue(lambda: _compute(self._module.driver, self._session, tensors))


class _GpuBinding:
    def __init__(self) -> None:
        self.tensors: dict[str, tuple[int, tuple[int, ...]]] = {}

    def bind_input(self, name: str, device: str, index: int, dtype: Any, shape: Any, address: int) -> None:
        assert (device, index) == ("cuda", 0)
        self.tensors[name] = (address, tuple(shape))

    bind_output = bind_input


# The whole machine.


def simulate(monkeypatch: pytest.MonkeyPatch, *there: str) -> SimulatedDriver:
    """Until the test's end this machine has a GPU, and `there`: "tensorrt", "tensorrt-rtx", `PROVIDERS`."""
    driver = SimulatedDriver()
    monkeypatch.setattr(devices, "CudaDriver", lambda: driver)

    def flavour(target: str) -> Flavour:
        if target not in there:
            raise BackendError(f"{target} is not installed")
        return SimulatedTensorRt(driver).flavour(target)

    monkeypatch.setattr(devices, "load_flavour", flavour)
    for device in there:
        if device in PROVIDERS:
            module = SimulatedOrt(driver, PROVIDERS[device].name)
            monkeypatch.setattr(ort_gpu, "import_onnxruntime", lambda module=module: module)
            monkeypatch.setattr(devices, "import_onnxruntime", lambda module=module: module)
    return driver
