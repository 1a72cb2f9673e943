"""TensorRT without a GPU: engines that ONNX Runtime computes on the CPU, with the real module's rules."""

from __future__ import annotations

import json
import weakref
from enum import Enum, IntEnum
from pathlib import Path
from typing import Any

import numpy as np
from blt_edge.export.packed import write_packed
from blt_edge.export.proof import prove_engine
from blt_edge.runtime.backends.signatures import ROWS, packed_signature, stage_inputs
from blt_edge.runtime.backends.tensorrt import TensorRtModule
from blt_edge.runtime.backends.tensorrt_profiles import (
    ProfileAxes,
    Profiles,
    packed_plan_file,
    plan_file,
)
from blt_edge.runtime.engines import (
    ENGINE_NAME,
    describe_tensorrt,
    engine_path,
    packed_graph_file,
    render_engine,
)
from blt_edge.runtime.integrity import file_record
from blt_edge.runtime.manifest import load_manifest
from blt_edge.runtime.self_test import SELF_TEST_NAME
from support.simulated_cuda import SimulatedDriver, compute, cpu_session

__all__ = ["VERSION", "SimulatedTensorRt", "write_engines", "write_plan"]

VERSION = "10.3.0"


def write_plan(path: Path, bundle: Path, stage: str, ranges: Profiles, rows: int = 1) -> None:
    """A "plan": where its graph is, and for each profile the least, best and largest shape of each input.

    rows: for how many texts; the packed graph is written beside the bundle's own, whose weights it reads.
    """
    manifest = load_manifest(bundle)
    graph, inputs, profiles = manifest.stages[stage].file, stage_inputs(manifest, stage), ranges.stages[stage]
    if rows > 1:
        write_packed(bundle, [stage], [rows])
        graph, inputs = packed_graph_file(stage, rows), packed_signature(manifest, stage, rows)[0]
        profiles = (ranges.packed(stage, rows),)

    def size(axes: ProfileAxes, axis: int | str, bound: str) -> int:
        return axis if isinstance(axis, int) else int(getattr(axes[axis], bound))

    shapes = [
        {
            name: [[size(axes, axis, bound) for axis in named] for bound in ("min", "opt", "max")]
            for name, named in inputs.items()
        }
        for axes in profiles
    ]
    sizes = [axes[ROWS].max for axes in profiles if ROWS in axes]
    path.write_text(json.dumps({"graph": str(bundle / graph), "profiles": shapes, "sizes": sizes}))


def write_engines(
    bundle: Path, target: str, capability: str = "8.6", *, rows: tuple[int, ...] = (), **limits: int
) -> Path:
    """Engines of every stage in the bundle, as `blt-edge build` leaves them; returns their directory."""
    manifest, trt = load_manifest(bundle), TensorRtModule(target, VERSION, None)
    ranges = Profiles.of(manifest, **limits)
    description = describe_tensorrt(manifest, trt, (capability,), ranges)
    path = engine_path(bundle, description)
    path.mkdir(parents=True)
    for stage in manifest.stages:
        write_plan(path / plan_file(stage), bundle, stage, ranges)
        for count in rows:
            write_plan(path / packed_plan_file(stage, count), bundle, stage, ranges, count)
    prove_engine(bundle, manifest, None, ranges.limits, path / SELF_TEST_NAME, name=trt.name, alike=False)
    files = {file.name: file_record(file) for file in path.iterdir()}
    (path / ENGINE_NAME).write_text(render_engine(description, files, proven=False, rows=rows))
    return path


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

    def as_module(self, target: str) -> TensorRtModule:
        """As one of the two modules."""
        return TensorRtModule(target, VERSION, self)

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
        self.sizes: list[int] = plan.get("sizes", [])
        """The most that a value of the input that lies on the host may be."""
        self.session = cpu_session(Path(plan["graph"]))
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
        return self.module.TensorLocation.HOST if name == ROWS else self.module.TensorLocation.DEVICE

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
            strategies = SimulatedTensorRt.CudaGraphStrategy
            several = bool(self._engine.sizes)  # a graph would be captured anew in each run
            assert self._graphs is (strategies.DISABLED if several else strategies.WHOLE_GRAPH_CAPTURE)
            assert not self._captured, "it captures by itself"
        self._runs += 1
        tensors, rows = self._tensors(), self._rows()

        def work() -> None:
            assert self._rows(tensors) == rows, "sizes were overwritten before the run"
            self._driver.array(*self._scratch[:1], (self._scratch[1],), np.uint8)[...] = 0xEE
            compute(self._driver, self._engine.session, tensors)

        self._driver.enqueue(work)
        return True

    def _rows(self, tensors: dict[str, tuple[int, tuple[int, ...]]] | None = None) -> list[int]:
        """The values of the input that says how many positions each text has; none where there is none."""
        if not self._engine.sizes:
            return []
        address, shape = (self._addresses[ROWS], self._shapes[ROWS]) if tensors is None else tensors[ROWS]
        return [int(value) for value in self._driver.array(address, shape, np.int64)]

    def _tensors(self) -> dict[str, tuple[int, tuple[int, ...]]]:
        sizes: dict[str, int] = {f"new{row}": count for row, count in enumerate(self._rows())}
        if sizes:
            assert all(1 <= count <= self._engine.sizes[0] for count in sizes.values())
            assert sum(sizes.values()) == self._shapes["positions"][1], "no part of the axis may be left over"
        for value in self._engine.session.get_inputs():
            for axis, size in zip(value.shape, self._shapes[value.name], strict=True):
                if isinstance(axis, str):
                    assert sizes.setdefault(axis, size) == size, axis
        shapes = dict(self._shapes)
        for value in self._engine.session.get_outputs():
            shapes[value.name] = tuple(sizes[axis] if isinstance(axis, str) else axis for axis in value.shape)
        return {name: (self._addresses[name], shape) for name, shape in shapes.items()}
